/* throttle.h: a token bucket that keeps a stream of bytes at a rate. Time is an argument.
 *
 * Tokens come with time, up to BURST_S of the rate; what moves takes them. There is room once a quantum is there, so that
 * a low rate costs few wake-ups; small things that may not wait are taken all the same and leave a debt.
 * A byte counts a little more than one: half of what TCP and IP add to a full segment of a 1500-byte line. So the bytes
 * that a program counts and those that the line carries, acknowledgements of the other direction included, are both
 * within 5 % of the rate.
 * Threads: nothing shared, a throttle belongs to its caller.      Spec: pyccl_engine_options */
#ifndef PYCCL_THROTTLE_H
#define PYCCL_THROTTLE_H

#include <stddef.h>
#include <stdint.h>

typedef struct throttle {
    double rate;                     /* bytes a second; 0: no limit */
    double tokens;                   /* as of at_ns */
    int64_t at_ns;
} throttle;

void throttle_init(throttle *t, uint64_t bytes_per_s, int64_t now_ns);
size_t throttle_room(throttle *t, int64_t now_ns);     /* bytes that may move; 0: none for now, SIZE_MAX: no limit */
void throttle_take(throttle *t, size_t bytes);         /* they have moved */
int64_t throttle_due(const throttle *t);               /* when there is room */

#endif
