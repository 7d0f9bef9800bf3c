/* engine_cluster.h: several engines in one process, over TCP on loopback or over socket pairs, without Python.
 * The test plays the master: it enters epochs, freezes and gives verdicts. Nothing sleeps: every wait has a condition
 * and a deadline. */
#ifndef PYCCL_ENGINE_CLUSTER_H
#define PYCCL_ENGINE_CLUSTER_H

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "pyccl.h"
#include "tcp_pair.h"
#include "test.h"

#define ENGINES_MAX 8
#define CONNS 4
#define SECOND INT64_C(1000000000)
#define PATIENCE (60 * SECOND)

/* Under TSan, where a byte costs twenty times as much, arrays are shorter: as many as give several pieces to each share
 * will do. Kernels, which no two threads share, do not run for every op and dtype again. */
#ifdef PYCCL_SANITIZE_THREAD
#define LONG(count) ((count) / 4)
#define LAST_OP PYCCL_AVG
#define DTYPE_STEP 3
#else
#define LONG(count) (count)
#define LAST_OP PYCCL_MAX
#define DTYPE_STEP 1
#endif

typedef struct cluster {
    uint32_t count, conns;
    pyccl_engine *engine[ENGINES_MAX];
    uint8_t id[ENGINES_MAX][16];
    uint32_t slot[ENGINES_MAX][ENGINES_MAX];
    int raw[ENGINES_MAX][ENGINES_MAX][CONNS]; /* duplicates of the engines' sockets, to break them from outside */
    int alive[ENGINES_MAX];
    uint64_t number;
    const pyccl_plan *plan;          /* of the next epoch */
    uint64_t max_tx, max_rx;                  /* of engine 0, bytes a second */
} cluster;

typedef enum wire { OVER_TCP, OVER_UNIX, SEALED_TCP } wire;

static inline int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * SECOND + now.tv_nsec;
}

/* ---- cluster ---- */

static inline void cluster_link(cluster *c, uint32_t a, uint32_t b, uint32_t conn, wire how) {
    int pair[2];
    if (how == OVER_UNIX) REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    else tcp_pair(pair);
    c->raw[a][b][conn] = dup(pair[0]);
    c->raw[b][a][conn] = dup(pair[1]);
    if (how == SEALED_TCP) {
        const uint8_t cipher = conn % 2 == 0 ? PYCCL_CIPHER_AES_256_GCM : PYCCL_CIPHER_CHACHA20_POLY1305;
        pyccl_conn_keys one = {.cipher = cipher, .dialed = 1}, other = {.cipher = cipher};
        memset(one.tx, (int)(1 + conn), sizeof one.tx);
        memset(one.rx, (int)(101 + conn), sizeof one.rx);
        memcpy(other.tx, one.rx, sizeof other.tx);
        memcpy(other.rx, one.tx, sizeof other.rx);
        REQUIRE(pyccl_engine_conn_add_sealed(c->engine[a], c->slot[a][b], pair[0], &one) == PYCCL_OK);
        REQUIRE(pyccl_engine_conn_add_sealed(c->engine[b], c->slot[b][a], pair[1], &other) == PYCCL_OK);
        return;
    }
    REQUIRE(pyccl_engine_conn_add(c->engine[a], c->slot[a][b], pair[0]) == PYCCL_OK);
    REQUIRE(pyccl_engine_conn_add(c->engine[b], c->slot[b][a], pair[1]) == PYCCL_OK);
}

static inline void cluster_epoch_with(cluster *c, int restart, const pyccl_op_verdict *verdicts, size_t count) {
    uint8_t members[ENGINES_MAX][16];
    uint32_t world = 0;
    pyccl_epoch epoch = {.number = ++c->number, .restart = (uint8_t)restart, .plan = c->plan};
    memset(epoch.id, (int)(0x40 + c->number), sizeof epoch.id);
    for (uint32_t i = 0; i < c->count; i++)
        if (c->alive[i]) memcpy(members[world++], c->id[i], 16);
    epoch.world = world;
    epoch.members = members[0];
    for (uint32_t i = 0; i < c->count; i++) {
        if (!c->alive[i]) continue;
        REQUIRE(pyccl_engine_epoch(c->engine[i], &epoch, verdicts, count) == PYCCL_OK);
        epoch.rank++;
    }
}

static inline void cluster_epoch(cluster *c, int restart) { cluster_epoch_with(c, restart, NULL, 0); }

static inline void cluster_open_as_it_is(cluster *c, uint32_t count, uint32_t conns, wire how, int64_t heartbeat_ns, int64_t silence_ns) {
    c->count = count;
    c->conns = conns;
    for (uint32_t i = 0; i < count; i++) {
        pyccl_engine_options options = {.heartbeat_ns = heartbeat_ns, .silence_ns = silence_ns,
            .max_tx_bytes_s = i == 0 ? c->max_tx : 0, .max_rx_bytes_s = i == 0 ? c->max_rx : 0,
            .fsm = {.settle_ns = 5 * SECOND, .stall_ns = 30 * SECOND, .tell_ns = SECOND / 10}};
        memset(c->id[i], (int)i + 1, 16);
        memcpy(options.self_id, c->id[i], 16);
        REQUIRE(pyccl_engine_new(&options, &c->engine[i]) == PYCCL_OK);
        c->alive[i] = 1;
    }
    for (uint32_t a = 0; a < count; a++)
        for (uint32_t b = 0; b < count; b++)
            if (a != b) REQUIRE(pyccl_engine_peer_add(c->engine[a], c->id[b], &c->slot[a][b]) == PYCCL_OK);
    for (uint32_t a = 0; a < count; a++)
        for (uint32_t b = a + 1; b < count; b++)
            for (uint32_t k = 0; k < conns; k++) cluster_link(c, a, b, k, how);
    cluster_epoch(c, 1);
}

static inline void cluster_open_with(cluster *c, uint32_t count, uint32_t conns, wire how, int64_t heartbeat_ns, int64_t silence_ns) {
    memset(c, 0, sizeof *c);
    cluster_open_as_it_is(c, count, conns, how, heartbeat_ns, silence_ns);
}

/* What engine 0 sends and receives is capped. */
static inline void cluster_open_capped(cluster *c, uint32_t count, uint32_t conns, wire how, uint64_t max_tx, uint64_t max_rx) {
    memset(c, 0, sizeof *c);
    c->max_tx = max_tx;
    c->max_rx = max_rx;
    cluster_open_as_it_is(c, count, conns, how, SECOND, 5 * SECOND);
}

static inline void cluster_open(cluster *c, uint32_t count, uint32_t conns, wire how) {
    cluster_open_with(c, count, conns, how, SECOND, 5 * SECOND);
}

static inline void cluster_close(cluster *c) {
    for (uint32_t i = 0; i < c->count; i++) pyccl_engine_free(c->engine[i]);
    for (uint32_t a = 0; a < c->count; a++)
        for (uint32_t b = 0; b < c->count; b++)
            for (uint32_t k = 0; a != b && k < c->conns; k++)
                if (c->raw[a][b][k] > 0) close(c->raw[a][b][k]);
}

/* Wait for an event of this type; others are dropped. None: *out is zero. */
static inline int await_event(pyccl_engine *engine, uint32_t type, pyccl_event *out) {
    const int64_t until = now_ns() + PATIENCE;
    if (out != NULL) *out = (pyccl_event){0};
    while (now_ns() < until) {
        pyccl_event event;
        while (pyccl_engine_events(engine, &event, 1) == 1)
            if (event.type == type) {
                if (out != NULL) *out = event;
                return 1;
            }
        struct pollfd wait = {.fd = pyccl_engine_fd(engine), .events = POLLIN};
        poll(&wait, 1, 1000);
    }
    return 0;
}

/* ---- operations ---- */

static inline pyccl_op *submit(const cluster *c, uint32_t i, pyccl_spec spec, const void *src, void *dst, uint64_t dst_bytes) {
    if (spec.algorithm == 0) spec.algorithm = PYCCL_DIRECT;
    spec.retry = 1;
    const pyccl_op_args args = {.spec = spec, .src = src, .dst = dst, .dst_bytes = dst_bytes, .weight = 1, .timeout_ns = PATIENCE};
    pyccl_op *op = NULL;
    REQUIRE(pyccl_op_submit(c->engine[i], &args, &op) == PYCCL_OK);
    return op;
}

static inline pyccl_spec reduce_spec(uint8_t dtype, uint8_t op, uint64_t count, uint32_t tag) {
    return (pyccl_spec){.kind = PYCCL_ALL_REDUCE, .dtype = dtype, .op = op, .count = count, .tag = tag};
}

static inline int finish(pyccl_op *op) {
    const int status = pyccl_op_wait(op, PATIENCE);
    if (status == PYCCL_PENDING) {
        printf("an operation did not end\n");
        abort();
    }
    pyccl_op_free(op);
    return status;
}

static inline pyccl_op *submit_weighted(const cluster *c, uint32_t i, pyccl_spec spec, const void *src, void *dst, double weight) {
    if (spec.algorithm == 0) spec.algorithm = PYCCL_DIRECT;
    spec.retry = 1;
    const pyccl_op_args args = {.spec = spec, .src = src, .dst = dst, .weight = weight, .timeout_ns = PATIENCE};
    pyccl_op *op = NULL;
    REQUIRE(pyccl_op_submit(c->engine[i], &args, &op) == PYCCL_OK);
    return op;
}

/* ---- what happens meanwhile ---- */

static inline void await_bytes(const cluster *c, uint32_t i, uint32_t j, uint64_t bytes) {
    const int64_t until = now_ns() + PATIENCE;
    pyccl_link_stats stats = {0};
    while (stats.rx_bytes < bytes && now_ns() < until) REQUIRE(pyccl_engine_link_stats(c->engine[i], c->slot[i][j], &stats) == PYCCL_OK);
    CHECK(stats.rx_bytes >= bytes);
}

static inline void kill_conn(const cluster *c, uint32_t i, uint32_t j, uint32_t k) { shutdown(c->raw[i][j][k], SHUT_RDWR); }

/* What ends an operation in the middle. */
typedef enum how_it_ends { BY_CANCEL, BY_END, BY_STOP, BY_SETTLE } how_it_ends;

static inline uint64_t all_link_bytes(const cluster *c, uint32_t i) {
    uint64_t bytes = 0;
    for (uint32_t j = 0; j < c->count; j++) {
        pyccl_link_stats stats = {0};
        if (j != i) REQUIRE(pyccl_engine_link_stats(c->engine[i], c->slot[i][j], &stats) == PYCCL_OK);
        bytes += stats.rx_bytes;
    }
    return bytes;
}

#endif
