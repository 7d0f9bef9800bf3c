/* line.c: see line.h. */
#include "line.h"

#include <stdlib.h>

#define NS_PER_S 1000000000u
#define FLOWS_MIN 64u
#define PROBES 16u /* slots that a key may be in */

bool line_pipe_enter(line_pipe *pipe, int64_t now_ns, uint32_t size, int64_t *leaves_ns) {
    if (pipe->rate_bps == 0) {
        *leaves_ns = now_ns;
    } else {
        if (pipe->free_ns - now_ns > pipe->queue_ns) {
            pipe->dropped++;
            return false;
        }
        if (pipe->free_ns < now_ns) { /* it was idle */
            pipe->free_ns = now_ns;
            pipe->fraction = 0;
        }
        uint64_t work = (uint64_t)size * 8 * NS_PER_S + pipe->fraction; /* 64 KiB: 2^49 */
        pipe->free_ns += (int64_t)(work / pipe->rate_bps);
        pipe->fraction = work % pipe->rate_bps;
        *leaves_ns = pipe->free_ns + (pipe->fraction != 0); /* never early */
    }
    pipe->packets++;
    pipe->bytes += size;
    return true;
}

/* SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, doi:10.1145/2660193.2660195): the output function. */
static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

bool line_lost(uint64_t key, uint64_t number, double loss) {
    uint64_t drawn = mix(key + (number + 1) * 0x9e3779b97f4a7c15u);
    return (double)(drawn >> 11) * 0x1p-53 < loss;
}

uint64_t line_key(uint64_t seed, uint32_t from, uint32_t to) {
    return mix(mix(seed) ^ ((uint64_t)from << 32 | to));
}

static line_flow *find(line_flow *slots, size_t capacity, uint64_t key, int64_t now_ns) {
    line_flow *unused = NULL;
    uint64_t start = mix(key);
    for (unsigned i = 0; i < PROBES; i++) {
        line_flow *slot = &slots[(start + i) & (capacity - 1)];
        if (slot->key == key) return slot;
        if (unused == NULL && slot->pipe.free_ns <= now_ns) unused = slot;
    }
    return unused;
}

static bool grow(line_flows *flows, int64_t now_ns) {
    for (size_t capacity = flows->capacity == 0 ? FLOWS_MIN : 2 * flows->capacity;; capacity *= 2) {
        line_flow *slots = calloc(capacity, sizeof *slots);
        if (slots == NULL) return false;
        bool fits = true;
        for (size_t i = 0; i < flows->capacity && fits; i++) {
            line_flow *old = &flows->slots[i];
            if (old->pipe.free_ns <= now_ns) continue;
            line_flow *slot = find(slots, capacity, old->key, now_ns);
            if (slot != NULL) *slot = *old;
            fits = slot != NULL;
        }
        if (!fits) {
            free(slots);
            continue;
        }
        free(flows->slots);
        flows->slots = slots;
        flows->capacity = capacity;
        return true;
    }
}

bool line_flows_enter(line_flows *flows, uint64_t key, int64_t now_ns, uint32_t size, int64_t *leaves_ns) {
    line_flow *flow = flows->capacity == 0 ? NULL : find(flows->slots, flows->capacity, key, now_ns);
    while (flow == NULL) {
        if (!grow(flows, now_ns)) {
            flows->dropped++;
            return false;
        }
        flow = find(flows->slots, flows->capacity, key, now_ns);
    }
    if (flow->key != key || flow->pipe.rate_bps == 0)
        *flow = (line_flow){.key = key, .pipe = {.rate_bps = flows->rate_bps, .queue_ns = flows->queue_ns}};
    if (line_pipe_enter(&flow->pipe, now_ns, size, leaves_ns)) return true;
    flows->dropped++;
    return false;
}

void line_flows_fini(line_flows *flows) {
    free(flows->slots);
    flows->slots = NULL;
    flows->capacity = 0;
}
