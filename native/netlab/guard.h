/* guard.h: ends every process in the lab's network namespaces, whoever started it and whatever it did to get away.
 * Knows /proc and signals, nothing of lines. */
#ifndef NETLAB_GUARD_H
#define NETLAB_GUARD_H

#include <stddef.h>
#include <sys/types.h>

/* SIGKILL to all whose network namespace has one of these inode numbers, but for the process `spared` (a thread of the
 * lab's owner may be in one), until there are none. Returns how many still were there after GUARD_S. */
#define GUARD_S 10
size_t guard_end_all(const ino_t *namespaces, size_t count, pid_t spared);

#endif
