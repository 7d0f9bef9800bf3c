/* line.h: what a line does to packets: serialise at a rate, drop at the tail, cap each flow, lose at random.
 * Pure: time comes in as an argument and goes out as an answer; nothing here waits, reads a clock or opens anything.
 * Times are nanoseconds on one clock, rates bits a second, sizes bytes of IP packets.
 * Invariant: what leaves a pipe leaves in the order it came, back to back at most; over any time a pipe emits no more
 * than rate x time + one packet. Fractions of a nanosecond are carried on, so the rate is exact over any length. */
#ifndef NETLAB_LINE_H
#define NETLAB_LINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct line_pipe {
    uint64_t rate_bps; /* 0: packets take no time */
    int64_t queue_ns;  /* a packet that would wait longer is dropped */
    int64_t free_ns;   /* when the last one that was let in has left */
    uint64_t fraction; /* of a nanosecond, in 1/rate_bps, not yet counted in free_ns */
    uint64_t packets, bytes, dropped;
} line_pipe;

/* A packet of `size` bytes arrives. True: its last bit leaves at *leaves_ns. False: the queue was full, it is gone.
 * now_ns never goes back from one call to the next. */
bool line_pipe_enter(line_pipe *pipe, int64_t now_ns, uint32_t size, int64_t *leaves_ns);

/* Whether packet `number` of the sequence `key` is lost, with the probability `loss`: the same answer every time, so
 * that a run's losses depend on its seed and on what was sent, not on when. */
bool line_lost(uint64_t key, uint64_t number, double loss);

/* The sequence's key of what goes from one host to another. */
uint64_t line_key(uint64_t seed, uint32_t from, uint32_t to);

typedef struct line_flow {
    uint64_t key; /* of addresses and ports */
    line_pipe pipe;
} line_flow;

/* A pipe of its own for each flow. Idle flows are forgotten: a pipe that is free is like a new one. */
typedef struct line_flows {
    uint64_t rate_bps;
    int64_t queue_ns;
    line_flow *slots;
    size_t capacity; /* a power of two, or 0 before the first packet */
    uint64_t dropped;
} line_flows;

/* As line_pipe_enter, for the flow's pipe. Out of memory counts as a full queue. */
bool line_flows_enter(line_flows *flows, uint64_t key, int64_t now_ns, uint32_t size, int64_t *leaves_ns);
void line_flows_fini(line_flows *flows);

#endif
