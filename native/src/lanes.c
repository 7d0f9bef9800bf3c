/* lanes.c: see lanes.h.                                           Spec: ARCHITECTURE.md, Decisions */
#include "lanes.h"

#define GAIN 1.1
#define KEEPS 0.97                   /* of the rate, by fewer connections */
#define WINDOW_MIN_NS INT64_C(250000000)
#define WINDOW_RTTS 4                /* slow start and what new connections buffer are over within one */
#define FADES 0.95                   /* a rate that was seen counts for less with every decision */
#define RETRY_NS INT64_C(15000000000)
#define RETRY_DOUBLED 6

void lanes_init(lanes *l, uint32_t use, uint32_t most) {
    *l = (lanes){.use = use < most ? use : most, .most = most};
    l->least = l->use;
}

static void window_begin(lanes *l) {
    l->busy_ns = 0;
    l->busy_bytes = 0;
}

static void change(lanes *l, uint32_t use) {
    l->use = use;
    l->windows = 0;
    l->fresh = true;
}

static double middle(const lanes *l) {
    double sorted[LANES_WINDOWS];
    for (uint32_t i = 0; i < l->windows; i++) {
        uint32_t at = i;
        for (; at > 0 && sorted[at - 1] > l->seen[i]; at--) sorted[at] = sorted[at - 1];
        sorted[at] = l->seen[i];
    }
    return sorted[l->windows / 2];
}

/* The next trial is in the other direction. */
static void fail(lanes *l, int64_t now_ns) {
    l->trial_ns = now_ns + (RETRY_NS << (l->failed < RETRY_DOUBLED ? l->failed : RETRY_DOUBLED));
    l->failed++;
    l->fewer = !l->fewer;
}

static bool back(lanes *l) {
    change(l, l->before);
    l->before = 0;
    return true;
}

static bool trial_begin(lanes *l) {
    if (l->use == l->most) l->fewer = true;
    if (l->use == l->least) l->fewer = false;
    if (l->least == l->most) return false;
    const uint32_t use = l->fewer ? l->use - l->use / 3 : l->use + (l->use + 1) / 2;
    l->before = l->use;
    change(l, use < l->least ? l->least : use > l->most ? l->most : use);
    return true;
}

static bool trial_end(lanes *l, double rate, int64_t now_ns) {
    if (rate >= (l->fewer ? KEEPS : GAIN) * l->rate) {
        l->proving = l->use;
        l->proving_rate = rate;
        return back(l);
    }
    if (!l->fewer && l->windows < LANES_WINDOWS) return false;
    fail(l, now_ns);
    return back(l);
}

/* What the number before gives after the trial tells whether it was the trial that gave it, and not the weather. */
static bool prove(lanes *l, double rate, int64_t now_ns) {
    const uint32_t use = l->proving;
    l->proving = 0;
    if (l->proving_rate < (l->fewer ? KEEPS : GAIN) * rate) {
        fail(l, now_ns);
        return false;
    }
    l->failed = 0;
    l->rate = l->proving_rate;
    change(l, use);
    return true;
}

/* So many windows have been seen that their middle may tell what `use` gives. */
static bool decide(lanes *l, int64_t now_ns) {
    const double rate = middle(l);
    if (l->before > 0) return trial_end(l, rate, now_ns);
    l->windows = 0;
    l->rate = rate > l->rate * FADES ? rate : l->rate * FADES;
    if (l->proving > 0) return prove(l, rate, now_ns);
    return now_ns >= l->trial_ns && trial_begin(l);
}

static bool window_end(lanes *l, int64_t now_ns) {
    const double rate = (double)l->busy_bytes / ((double)l->busy_ns / 1e9);
    window_begin(l);
    if (l->fresh) {
        l->fresh = false;
        return false;
    }
    if (l->windows > 0 && rate > GAIN * middle(l)) l->windows = 0; /* it rises: slow start is not over */
    l->seen[l->windows++] = rate;
    return l->windows >= (LANES_WINDOWS + 1) / 2 && decide(l, now_ns);
}

void lanes_pause(lanes *l) { l->busy = false; }

bool lanes_note(lanes *l, int64_t now_ns, uint64_t acked, bool busy, uint32_t standing, int64_t rtt_ns) {
    if (l->busy) {
        l->busy_ns += now_ns - l->at_ns;
        l->busy_bytes += acked - l->acked;
    }
    const int64_t window = rtt_ns * WINDOW_RTTS > WINDOW_MIN_NS ? rtt_ns * WINDOW_RTTS : WINDOW_MIN_NS;
    l->at_ns = now_ns;
    l->acked = acked;
    l->busy = busy;
    if (standing < l->use) window_begin(l); /* those that are wanted are not there yet */
    return l->busy_ns >= window && window_end(l, now_ns);
}
