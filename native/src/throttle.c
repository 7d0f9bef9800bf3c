/* throttle.c: see throttle.h.                                     Spec: pyccl_engine_options */
#include "throttle.h"

#define BURST_S 0.04                 /* more than the thread ever sleeps too long while it has work */
#define BURST_MIN 16384.0
#define QUANTUM_S 0.004
#define QUANTUM_MAX 65536.0
#define QUANTUM_MIN 4096.0
#define BYTE_COST (1.0 + 26.0 / 1448.0)
#define NS 1e9

static double quantum(const throttle *t) {
    const double bytes = t->rate * QUANTUM_S;
    return bytes < QUANTUM_MIN ? QUANTUM_MIN : bytes > QUANTUM_MAX ? QUANTUM_MAX : bytes;
}

static double burst(const throttle *t) {
    const double bytes = t->rate * BURST_S;
    return bytes < BURST_MIN ? BURST_MIN : bytes;
}

void throttle_init(throttle *t, uint64_t bytes_per_s, int64_t now_ns) {
    *t = (throttle){.rate = (double)bytes_per_s, .at_ns = now_ns};
    t->tokens = burst(t);
}

size_t throttle_room(throttle *t, int64_t now_ns) {
    if (t->rate == 0) return SIZE_MAX;
    if (now_ns > t->at_ns) {
        t->tokens += t->rate * ((double)(now_ns - t->at_ns) / NS);
        if (t->tokens > burst(t)) t->tokens = burst(t);
        t->at_ns = now_ns;
    }
    return t->tokens >= quantum(t) ? (size_t)(t->tokens / BYTE_COST) : 0;
}

void throttle_take(throttle *t, size_t bytes) {
    if (t->rate > 0) t->tokens -= (double)bytes * BYTE_COST;
}

int64_t throttle_due(const throttle *t) {
    const double missing = quantum(t) - t->tokens;
    if (t->rate == 0 || missing <= 0) return t->at_ns;
    return t->at_ns + 1 + (int64_t)(missing / t->rate * NS);
}
