/* lanes.h: how many connections of a long line carry data: a trial of half as many again wherever the line is busy, kept
 * while it pays; then one of a third less, kept while it costs nothing. A pure machine: what was sent and when goes in, a number comes out.
 *
 * A rate counts over a window of time in which the line had more to send than its connections took. The middle one of three
 * windows that do not rise by GAIN any more is what this number gives: the best of them may be what a processor that was
 * busy elsewhere let through afterwards. A trial that gives GAIN more (of fewer: KEEPS) is believed once the number before
 * has been measured again after it. One that does not after five windows (of fewer: three) has failed, and the next, in the
 * other direction, comes after RETRY_NS, each time after twice as long: a path may change.
 * An error costs little: connections that do not pay carry no data.
 * Threads: nothing shared, it belongs to its caller.               Spec: ARCHITECTURE.md, Decisions */
#ifndef PYCCL_LANES_H
#define PYCCL_LANES_H

#include <stdbool.h>
#include <stdint.h>

#define LANES_WINDOWS 5

typedef struct lanes {
    uint32_t use, least, most;       /* how many carry data now, and may */
    uint32_t before;                 /* while a trial runs: the number to go back to; else 0 */
    uint32_t proving;                /* while the number before is measured again: that of the trial; else 0 */
    double proving_rate;             /* which gave so much */
    bool fewer;                      /* the direction of this trial, or else of the next */
    uint32_t failed;                 /* trials in a row that did not pay */
    uint32_t windows;                /* seen since the last change or decision */
    double seen[LANES_WINDOWS];      /* bytes a second */
    bool busy, fresh;                /* at the last note; fresh: the first window after a change, which does not count */
    int64_t at_ns, busy_ns, trial_ns;/* of the last note; of this window; when the next trial may be */
    uint64_t acked, busy_bytes;      /* at the last note; in this window */
    double rate;                     /* what the number gives; 0: not known */
} lanes;

void lanes_init(lanes *l, uint32_t use, uint32_t most);
/* `acked` bytes have arrived until now (what sockets only hold is no rate); busy: every connection that carries data is
 * full; standing: connections there are. Returns true when `use` has changed. */
bool lanes_note(lanes *l, int64_t now_ns, uint64_t acked, bool busy, uint32_t standing, int64_t rtt_ns);
void lanes_pause(lanes *l);          /* other connections: what was acked until now is not comparable with what will be */

#endif
