/* lanes.h: how many connections of a long line carry data: a trial of half as many again wherever the line is busy, kept
 * while it pays; then one of a third less, kept while it costs nothing. A pure machine: what was sent and when goes in, a number comes out.
 *
 * A rate counts over a window of time in which the line had more to send than its connections took. The middle one of three
 * windows that do not rise by RISES any more is what this number gives: the best of them may be what a processor that was
 * busy elsewhere let through afterwards. What a trial gives is what it adds to the rate of all links of the host, which may
 * share one line: bytes that more connections take from other links are no gain. A trial that pays is believed once the
 * number before has been measured again after it. One that does not after five windows (of fewer: three) has failed, and the next, in the
 * other direction, comes after RETRY_NS, each time after twice as long: a path may change.
 * Links that share the host's line take turns: a trial disturbs the others, and they what it tells.
 * An error costs little: connections that do not pay carry no data.
 * Threads: nothing shared, it belongs to its caller.               Spec: ARCHITECTURE.md, Decisions */
#ifndef PYCCL_LANES_H
#define PYCCL_LANES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define LANES_WINDOWS 5

typedef struct lanes_turn {          /* of the links that share a host's line: one trial at a time, and a pause after one in vain */
    const struct lanes *taken;       /* has a trial; NULL: none */
    int64_t taken_ns, next_ns;       /* when it last had something to send; no trial before */
} lanes_turn;

typedef struct lanes {
    lanes_turn *turn;
    uint32_t use, least, most;       /* how many carry data now, and may */
    uint32_t before;                 /* while a trial runs: the number to go back to; else 0 */
    uint32_t proving;                /* while the number before is measured again: that of the trial; else 0 */
    double proving_rate, proving_all;/* which gave so much */
    bool fewer;                      /* the direction of this trial, or else of the next */
    uint32_t failed;                 /* trials in a row that did not pay */
    uint32_t windows;                /* seen since the last change or decision */
    double seen[LANES_WINDOWS], seen_all[LANES_WINDOWS]; /* bytes a second: of this link, of all */
    bool busy, fresh;                /* at the last note; fresh: the first window after a change, which does not count */
    int64_t at_ns, busy_ns, trial_ns;/* of the last note; of this window; when the next trial may be */
    uint64_t acked, busy_bytes;      /* at the last note; in this window */
    uint64_t acked_all, busy_all;    /* the same of all links */
    double rate, all;                /* what the number gives; 0: not known */
} lanes;

/* l: zero, or from before. It keeps its place in memory until lanes_fini. */
void lanes_init(lanes *l, lanes_turn *turn, uint32_t use, uint32_t most);
void lanes_fini(lanes *l);
/* `acked` bytes have arrived until now (what sockets only hold is no rate), and `all` over all links of the host, this one
 * among them; busy: every connection that carries data is full; standing: connections there are. Returns true when `use` has changed. */
bool lanes_note(lanes *l, int64_t now_ns, uint64_t acked, uint64_t all, bool busy, uint32_t standing, int64_t rtt_ns);
/* No fewer than so many from now on; where no more have paid, so many. A trial ends. Returns true when `use` has changed. */
bool lanes_least(lanes *l, uint32_t least);
void lanes_rest(lanes *l);           /* a trial ends, and the turn is another's */
void lanes_pause(lanes *l);          /* other connections: what was acked until now is not comparable with what will be */

#endif
