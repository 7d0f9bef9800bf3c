/* guard.c: see guard.h. */
#include "guard.h"

#include <dirent.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAUSE_NS 1000000

static bool is_inside(pid_t pid, const ino_t *namespaces, size_t count) {
    char path[64];
    struct stat found;
    snprintf(path, sizeof path, "/proc/%d/ns/net", (int)pid);
    if (stat(path, &found) != 0) return false; /* it has ended */
    for (size_t i = 0; i < count; i++)
        if (found.st_ino == namespaces[i]) return true;
    return false;
}

/* The descriptor keeps the number from being another process' between the look and the signal. */
static bool end_one(pid_t pid, const ino_t *namespaces, size_t count) {
    int fd = (int)syscall(SYS_pidfd_open, pid, 0);
    if (fd < 0) return false;
    bool inside = is_inside(pid, namespaces, count);
    if (inside) (void)syscall(SYS_pidfd_send_signal, fd, SIGKILL, NULL, 0);
    close(fd);
    return inside;
}

size_t guard_end_all(const ino_t *namespaces, size_t count, pid_t spared) {
    struct timespec now, pause = {.tv_nsec = PAUSE_NS};
    clock_gettime(CLOCK_MONOTONIC, &now);
    for (time_t until_s = now.tv_sec + GUARD_S;;) {
        size_t found = 0;
        DIR *proc = opendir("/proc");
        if (proc == NULL) return 0;
        for (struct dirent *entry; (entry = readdir(proc)) != NULL;) {
            pid_t pid = (pid_t)atol(entry->d_name); /* 0: no process */
            if (pid > 0 && pid != spared && pid != getpid()) found += end_one(pid, namespaces, count);
        }
        closedir(proc);
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (found == 0 || now.tv_sec > until_s) return found;
        nanosleep(&pause, NULL);
    }
}
