/* lanes.h: how many connections of a long line carry data: a trial of twice as many wherever the line is busy, kept while it
 * pays. A pure machine: what was sent and when goes in, a number comes out.
 *
 * A rate counts over a window in which the line had more to send than its connections took, without a pause; two windows
 * in a row that do not rise by GAIN any more are what this number gives. What a trial does not raise by GAIN goes back to
 * the number before, and is tried again after RETRY_NS, each time after twice as long: a path may change.
 * Threads: nothing shared, it belongs to its caller.               Spec: ARCHITECTURE.md, Decisions */
#ifndef PYCCL_LANES_H
#define PYCCL_LANES_H

#include <stdbool.h>
#include <stdint.h>

typedef struct lanes {
    uint32_t use, most;              /* how many carry data now, and may at most */
    uint32_t before;                 /* while a trial runs: the number to go back to; else 0 */
    uint32_t failed;                 /* trials in a row that did not pay */
    bool busy, fresh;                /* at the last note; fresh: the first window after a change, which does not count */
    int64_t at_ns, busy_ns, trial_ns;/* of the last note; of this window; when the next trial may be */
    uint64_t sent, busy_bytes;       /* at the last note; in this window */
    double rate, last;               /* what the number gives, bytes a second; of the last window, 0: none */
} lanes;

void lanes_init(lanes *l, uint32_t use, uint32_t most);
/* `sent` bytes have left until now; busy: every connection that carries data is full; standing: connections there are.
 * Returns true when `use` has changed. */
bool lanes_note(lanes *l, int64_t now_ns, uint64_t sent, bool busy, uint32_t standing, int64_t rtt_ns);

#endif
