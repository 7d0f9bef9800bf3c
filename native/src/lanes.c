/* lanes.c: see lanes.h.                                           Spec: ARCHITECTURE.md, Decisions */
#include "lanes.h"

#define RISES 1.1
#define GAIN 0.1                     /* of the link's own rate, by more connections */
#define GAIN_OF_ALL 0.03             /* and of all links': by less, chance differs */
#define COSTS 0.03                   /* of the link's own rate at most, fewer connections */
#define WINDOW_MIN_NS INT64_C(250000000)
#define WINDOW_RTTS 4                /* slow start and what new connections buffer are over within one */
#define FADES 0.95                   /* a rate that was seen counts for less with every decision */
#define RETRY_NS INT64_C(15000000000)
#define RETRY_DOUBLED 6
#define TURN_NS INT64_C(30000000000) /* a link that has nothing to send ends no trial */

void lanes_init(lanes *l, lanes_turn *turn, uint32_t use, uint32_t most) {
    lanes_fini(l);
    *l = (lanes){.turn = turn, .use = use < most ? use : most, .most = most};
    l->least = l->use;
}

void lanes_fini(lanes *l) {
    if (l->turn != NULL && l->turn->taken == l) l->turn->taken = NULL;
}

static void window_begin(lanes *l) {
    l->busy_ns = 0;
    l->busy_bytes = l->busy_all = 0;
}

static void change(lanes *l, uint32_t use) {
    l->use = use;
    l->windows = 0;
    l->fresh = true;
}

static double middle(const double seen[LANES_WINDOWS], uint32_t windows) {
    double sorted[LANES_WINDOWS];
    for (uint32_t i = 0; i < windows; i++) {
        uint32_t at = i;
        for (; at > 0 && sorted[at - 1] > seen[i]; at--) sorted[at] = sorted[at - 1];
        sorted[at] = seen[i];
    }
    return sorted[windows / 2];
}

/* What the trial gave beside what the number before gives. */
static bool pays(const lanes *l, double tried, double before) {
    if (l->fewer) return tried >= before - COSTS * l->rate;
    const double own = GAIN * l->rate, all = GAIN_OF_ALL * before;
    return tried >= before + (own > all ? own : all);
}

/* The next trial is in the other direction. */
static void fail(lanes *l, int64_t now_ns) {
    l->trial_ns = now_ns + (RETRY_NS << (l->failed < RETRY_DOUBLED ? l->failed : RETRY_DOUBLED));
    l->failed++;
    l->fewer = !l->fewer;
    l->turn->next_ns = now_ns + RETRY_NS;
    lanes_fini(l);
}

static bool back(lanes *l) {
    change(l, l->before);
    l->before = 0;
    return true;
}

static bool trial_begin(lanes *l, int64_t now_ns) {
    lanes_turn *turn = l->turn;
    if (now_ns < l->trial_ns || (turn->taken == NULL ? now_ns < turn->next_ns : now_ns - turn->taken_ns < TURN_NS)) return false;
    if (l->use == l->most) l->fewer = true;
    if (l->use == l->least) l->fewer = false;
    if (l->least == l->most) return false;
    const uint32_t use = l->fewer ? l->use - l->use / 3 : l->use + (l->use + 1) / 2;
    turn->taken = l;
    turn->taken_ns = now_ns;
    l->before = l->use;
    change(l, use < l->least ? l->least : use > l->most ? l->most : use);
    return true;
}

static bool trial_end(lanes *l, double all, int64_t now_ns) {
    if (pays(l, all, l->all)) {
        l->proving = l->use;
        l->proving_rate = middle(l->seen, l->windows);
        l->proving_all = all;
        return back(l);
    }
    if (!l->fewer && l->windows < LANES_WINDOWS) return false;
    fail(l, now_ns);
    return back(l);
}

/* What the number before gives after the trial tells whether it was the trial that gave it, and not the weather. */
static bool prove(lanes *l, double all, int64_t now_ns) {
    const uint32_t use = l->proving;
    l->proving = 0;
    if (!pays(l, l->proving_all, all)) {
        fail(l, now_ns);
        return false;
    }
    l->failed = 0;
    lanes_fini(l);
    l->rate = l->proving_rate;
    l->all = l->proving_all;
    change(l, use);
    return true;
}

/* So many windows have been seen that their middle may tell what `use` gives. */
static bool decide(lanes *l, int64_t now_ns) {
    const double rate = middle(l->seen, l->windows), all = middle(l->seen_all, l->windows);
    if (l->before > 0) return trial_end(l, all, now_ns);
    l->windows = 0;
    l->rate = rate > l->rate * FADES ? rate : l->rate * FADES;
    l->all = all > l->all * FADES ? all : l->all * FADES;
    if (l->proving > 0) return prove(l, all, now_ns);
    return trial_begin(l, now_ns);
}

static bool window_end(lanes *l, int64_t now_ns) {
    const double seconds = (double)l->busy_ns / 1e9, rate = (double)l->busy_bytes / seconds, all = (double)l->busy_all / seconds;
    window_begin(l);
    if (l->fresh) {
        l->fresh = false;
        return false;
    }
    if (l->windows > 0 && rate > RISES * middle(l->seen, l->windows)) l->windows = 0; /* it rises: slow start is not over */
    l->seen_all[l->windows] = all;
    l->seen[l->windows++] = rate;
    return l->windows >= (LANES_WINDOWS + 1) / 2 && decide(l, now_ns);
}

void lanes_rest(lanes *l) {
    if (l->before > 0) back(l);
    l->proving = 0;
    lanes_fini(l);
}

bool lanes_least(lanes *l, uint32_t least) {
    const uint32_t before = l->use;
    if (least > l->most) least = l->most;
    if (least == l->least) return false;
    lanes_rest(l);
    if (l->use == l->least || l->use < least) change(l, least);
    l->least = least;
    return l->use != before;
}

void lanes_pause(lanes *l) { l->busy = false; }

bool lanes_note(lanes *l, int64_t now_ns, uint64_t acked, uint64_t all, bool busy, uint32_t standing, int64_t rtt_ns) {
    if (l->busy) {
        if (l->turn->taken == l) l->turn->taken_ns = now_ns;
        l->busy_ns += now_ns - l->at_ns;
        l->busy_bytes += acked - l->acked;
        l->busy_all += all - l->acked_all;
    }
    const int64_t window = rtt_ns * WINDOW_RTTS > WINDOW_MIN_NS ? rtt_ns * WINDOW_RTTS : WINDOW_MIN_NS;
    l->at_ns = now_ns;
    l->acked = acked;
    l->acked_all = all;
    l->busy = busy;
    if (standing < l->use) window_begin(l); /* those that are wanted are not there yet */
    return l->busy_ns >= window && window_end(l, now_ns);
}
