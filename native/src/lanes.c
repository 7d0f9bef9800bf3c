/* lanes.c: see lanes.h.                                           Spec: ARCHITECTURE.md, Decisions */
#include "lanes.h"

#define GAIN 1.1
#define WINDOW_MIN_NS INT64_C(250000000)
#define WINDOW_RTTS 4                /* slow start and what new connections buffer are over within one */
#define RETRY_NS INT64_C(60000000000)
#define RETRY_DOUBLED 5

void lanes_init(lanes *l, uint32_t use, uint32_t most) { *l = (lanes){.use = use < most ? use : most, .most = most}; }

static void window_begin(lanes *l) {
    l->busy_ns = 0;
    l->busy_bytes = 0;
}

static void change(lanes *l, uint32_t use) {
    l->use = use;
    l->last = 0;
    l->fresh = true;
}

/* What `use` gives is known: l->last. */
static bool decide(lanes *l, int64_t now_ns) {
    const bool paid = l->last >= GAIN * l->rate;
    if (l->before > 0 && !paid) {
        const uint32_t doubled = l->failed < RETRY_DOUBLED ? l->failed : RETRY_DOUBLED;
        l->trial_ns = now_ns + (RETRY_NS << doubled);
        l->failed++;
        change(l, l->before);
        l->before = 0;
        return true;
    }
    if (l->before > 0) l->failed = 0;
    l->rate = l->last;
    l->before = 0;
    l->last = 0;
    if (l->use >= l->most || now_ns < l->trial_ns) return false;
    l->before = l->use;
    change(l, l->use < l->most / 2 ? l->use * 2 : l->most);
    return true;
}

static bool window_end(lanes *l, int64_t now_ns) {
    const double rate = (double)l->busy_bytes / ((double)l->busy_ns / 1e9), last = l->last;
    window_begin(l);
    if (l->fresh) {
        l->fresh = false;
        return false;
    }
    const bool rises = rate > GAIN * last;
    l->last = rate > last ? rate : last;
    return rises ? false : decide(l, now_ns);
}

bool lanes_note(lanes *l, int64_t now_ns, uint64_t sent, bool busy, uint32_t standing, int64_t rtt_ns) {
    if (l->busy) {
        l->busy_ns += now_ns - l->at_ns;
        l->busy_bytes += sent - l->sent;
    }
    const int64_t window = rtt_ns * WINDOW_RTTS > WINDOW_MIN_NS ? rtt_ns * WINDOW_RTTS : WINDOW_MIN_NS;
    l->at_ns = now_ns;
    l->sent = sent;
    l->busy = busy;
    if (standing < l->use) window_begin(l); /* those that are wanted are not there yet */
    return l->busy_ns >= window && window_end(l, now_ns);
}
