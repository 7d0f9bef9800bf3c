/* test_hostile.c: a member that sends anything at all: frames of every type with every field drawn, split and cut, and
 * noise. Two honest engines run operations with it; the test is the third member and plays the master.
 *
 * It may fail their operations, and lose its connection. It may not crash an engine, touch the input of an operation
 * that failed, or leave anything behind that shows after it is gone. Run under ASan, UBSan and TSan too. */
#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "frame.h"
#include "pyccl.h"
#include "test.h"

#define SECOND INT64_C(1000000000)
#define PATIENCE (60 * SECOND)
#define HONEST 2
#define TAGS 3
#define COUNT 700
#ifdef PYCCL_SANITIZE_THREAD
#define ROUNDS 1000 /* each takes fifteen times as long */
#else
#define ROUNDS 2000
#endif
#define ROUNDS_LONG (3 * ROUNDS)

typedef struct call {
    pyccl_op *op;
    int64_t x[COUNT], before[COUNT];
} call;

typedef struct world {
    uint64_t rng, number;
    pyccl_engine *engine[HONEST];
    uint32_t slot[HONEST]; /* of the hostile member */
    uint8_t id[HONEST + 1][PYCCL_ID_SIZE];
    call calls[HONEST][TAGS];
    uint64_t submits[HONEST][TAGS];
    unsigned ended, refused;
} world;

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * SECOND + now.tv_nsec;
}

static uint64_t below(world *w, uint64_t n) { return test_random(&w->rng) % n; }
static bool often(world *w) { return below(w, 30) != 0; }

/* ---- the honest side ---- */

static void enter(world *w, uint32_t members, bool mismatch) {
    pyccl_epoch epoch = {.number = ++w->number, .world = members, .restart = 1, .mismatch = mismatch, .members = w->id[0]};
    memset(epoch.id, (int)w->number, sizeof epoch.id);
    for (uint32_t i = 0; i < HONEST; i++) {
        epoch.rank = i;
        REQUIRE(pyccl_engine_epoch(w->engine[i], &epoch, NULL, 0) == PYCCL_OK);
    }
}

static pyccl_spec spec_of(uint32_t tag) {
    return (pyccl_spec){.kind = PYCCL_ALL_REDUCE, .dtype = PYCCL_INT64, .op = PYCCL_SUM, .algorithm = tag == 1 ? PYCCL_RING : PYCCL_DIRECT,
                        .retry = 1, .count = COUNT, .tag = tag};
}

static void submit(world *w, uint32_t i, uint32_t tag) {
    w->submits[i][tag]++;
    call *c = &w->calls[i][tag];
    for (uint32_t k = 0; k < COUNT; k++) c->x[k] = c->before[k] = (int64_t)(test_random(&w->rng) >> 2);
    const pyccl_op_args args = {.spec = spec_of(tag), .src = c->x, .dst = c->x, .weight = 1, .timeout_ns = PATIENCE};
    REQUIRE(pyccl_op_submit(w->engine[i], &args, &c->op) == PYCCL_OK);
}

static int finish(call *c) {
    const int status = pyccl_op_wait(c->op, PATIENCE);
    REQUIRE(status != PYCCL_PENDING);
    if (status != PYCCL_OK) CHECK(memcmp(c->x, c->before, sizeof c->x) == 0);
    pyccl_op_free(c->op);
    c->op = NULL;
    return status;
}

static void world_open(world *w) {
    int pair[2];
    uint32_t slot;
    const pyccl_engine_options common = {.heartbeat_ns = SECOND, .silence_ns = 60 * SECOND,
        .fsm = {.settle_ns = PATIENCE, .stall_ns = PATIENCE, .tell_ns = SECOND / 100}};
    memset(w, 0, sizeof *w);
    w->rng = test_seed();
    for (uint32_t i = 0; i <= HONEST; i++) memset(w->id[i], (int)i + 1, PYCCL_ID_SIZE);
    for (uint32_t i = 0; i < HONEST; i++) {
        pyccl_engine_options options = common;
        memcpy(options.self_id, w->id[i], PYCCL_ID_SIZE);
        REQUIRE(pyccl_engine_new(&options, &w->engine[i]) == PYCCL_OK);
        REQUIRE(pyccl_engine_peer_add(w->engine[i], w->id[HONEST], &w->slot[i]) == PYCCL_OK);
    }
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    for (uint32_t i = 0; i < HONEST; i++) {
        REQUIRE(pyccl_engine_peer_add(w->engine[i], w->id[1 - i], &slot) == PYCCL_OK);
        REQUIRE(pyccl_engine_conn_add(w->engine[i], slot, pair[i]) == PYCCL_OK);
    }
    enter(w, HONEST + 1, false);
}

/* ---- the hostile side ---- */

static void put(uint8_t *at, uint64_t x, int bytes) {
    for (int i = 0; i < bytes; i++) at[i] = (uint8_t)(x >> (8 * i));
}

static uint64_t get_u64(const uint8_t *at) {
    uint64_t x = 0;
    for (int i = 7; i >= 0; i--) x = x << 8 | at[i];
    return x;
}

static uint64_t pick(world *w, const uint64_t *from, size_t count) { return from[below(w, count)]; }

/* A header as an encoder without scruples would write it, and its payload; returns their bytes. */
static size_t frame_draw(world *w, uint32_t i, uint8_t *out) {
    static const uint64_t offsets[] = {0, 8, 1864, 1872, 1872 + 1864, 1 << 20, 2 << 20, UINT64_MAX, UINT64_MAX - 7, UINT64_C(1) << 48};
    static const uint64_t lengths[] = {0, 1, 7, 8, 40, 1864, 1872, 5600, 1 << 20, (1 << 20) + 1, UINT32_MAX};
    static const uint64_t values[] = {0, 1, 2, 255, 256, 4096, 1 << 20, UINT64_MAX};
    const uint64_t type = often(w) ? 1 + below(w, 12) : below(w, 256);
    const uint64_t number = often(w) ? w->number : w->number + below(w, 3) - 1;
    const bool beat = type == PYCCL_FRAME_HEARTBEAT && often(w), open = type == PYCCL_FRAME_OPEN;
    const bool state = type >= PYCCL_FRAME_STATE_ASK && often(w), data = type == PYCCL_FRAME_DATA || type == PYCCL_FRAME_STATE_DATA || type == PYCCL_FRAME_STATE_PACKED;
    const pyccl_spec spec = spec_of((uint32_t)below(w, TAGS));
    uint64_t length = open ? PYCCL_SPEC_SIZE : data ? pick(w, lengths, sizeof lengths / sizeof *lengths) : 0;
    if (!often(w)) length = pick(w, lengths, sizeof lengths / sizeof *lengths);
    memset(out, 0, PYCCL_FRAME_SIZE);
    memcpy(out, "PYC1", 4);
    out[4] = (uint8_t)type;
    out[5] = (uint8_t)(type == PYCCL_FRAME_DATA || type == PYCCL_FRAME_STATE_ASK || !often(w) ? below(w, 2) : 0);
    out[6] = (uint8_t)(often(w) ? 0 : below(w, 3));
    out[7] = (uint8_t)(below(w, 64) == 0);
    if (!beat) put(out + 8, number, 8);
    if (!beat) put(out + 16, UINT64_C(0x0101010101010101) * (often(w) ? number : number + 1), 8);
    if (!beat) put(out + 24, often(w) ? w->submits[i][spec.tag] - 1 + below(w, 8) / 6 - below(w, 8) / 6 : test_random(&w->rng), 8);
    if (!beat && !state) put(out + 32, often(w) ? spec.tag : below(w, 5), 4);
    put(out + 36, length, 4);
    if (data || state || !often(w)) put(out + 40, pick(w, offsets, sizeof offsets / sizeof *offsets), 8);
    if (open) put(out + 40, often(w) ? UINT64_C(0x3FF0000000000000) : test_random(&w->rng), 8);
    if ((!data || type == PYCCL_FRAME_STATE_PACKED) && !beat) put(out + 48, often(w) ? pick(w, values, sizeof values / sizeof *values) : test_random(&w->rng), 8);
    if (type == PYCCL_FRAME_DATA) put(out + 56, often(w) ? pyccl_spec_hash(&spec) : test_random(&w->rng), 4);
    if (!often(w) && !often(w)) out[8 + below(w, 52)] ^= (uint8_t)(1u << below(w, 8));
    put(out + 60, pyccl_xxh3_64(out, 60, 0), 4);
    if (below(w, 32) == 0) out[below(w, 64)] ^= 0x10; /* a wrong checksum */
    if (length > PYCCL_PIECE_MAX) length = 0;
    for (uint64_t k = 0; k < length; k++) out[PYCCL_FRAME_SIZE + k] = (uint8_t)test_random(&w->rng);
    if (open && length == PYCCL_SPEC_SIZE) {
        pyccl_spec_encode(&spec, out + PYCCL_FRAME_SIZE);
        if (!often(w)) out[PYCCL_FRAME_SIZE + below(w, PYCCL_SPEC_SIZE)] ^= (uint8_t)(1u << below(w, 8));
    }
    return PYCCL_FRAME_SIZE + length;
}

/* In parts; false: the engine has closed the connection. What it says is read and thrown away. */
static bool send_parts(world *w, int fd, const uint8_t *bytes, size_t size) {
    uint8_t heard[4096];
    for (size_t at = 0; at < size;) {
        size_t part = below(w, 4) == 0 ? 1 + below(w, size - at) : size - at;
        const ssize_t n = send(fd, bytes + at, part, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno != EAGAIN) return false;
        if (n > 0) at += (size_t)n;
        const ssize_t got = recv(fd, heard, sizeof heard, MSG_DONTWAIT);
        if (got == 0 || (got < 0 && errno != EAGAIN)) return false;
        if (n > 0) continue;
        struct pollfd wait = {.fd = fd, .events = POLLOUT | POLLIN};
        REQUIRE(poll(&wait, 1, 60000) == 1);
    }
    return true;
}

static void attack(world *w, uint32_t i, uint8_t *bytes) {
    int pair[2];
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    REQUIRE(pyccl_engine_conn_add(w->engine[i], w->slot[i], pair[0]) == PYCCL_OK);
    bool open = true;
    for (uint64_t left = 1 + below(w, 24); open && left > 0; left--) {
        size_t size = frame_draw(w, i, bytes);
        if (below(w, 64) == 0)
            for (size_t k = 0; k < size && k < 300; k++) bytes[k] = (uint8_t)test_random(&w->rng); /* noise */
        if (below(w, 64) == 0) size = 1 + below(w, size); /* cut: what follows is read as the rest */
        if (get_u64(bytes + 8) > w->number) {             /* of a later epoch: it and what follows is left unread */
            size = PYCCL_FRAME_SIZE;
            left = 1;
        }
        open = send_parts(w, pair[1], bytes, size);
    }
    w->refused += !open;
    close(pair[1]);
    pyccl_link_stats stats = {.conns = 1};
    const int64_t until = now_ns() + PATIENCE;
    while (stats.conns > 0 && now_ns() < until) REQUIRE(pyccl_engine_link_stats(w->engine[i], w->slot[i], &stats) == PYCCL_OK);
    CHECK_EQ(stats.conns, 0);
}

static void events_drain(pyccl_engine *engine) {
    pyccl_event event;
    while (pyccl_engine_events(engine, &event, 1) == 1) {
    }
}

/* ---- afterwards ---- */

/* The hostile member is lost, and whatever is open fails: what it said to one and not to the other may have parted them. */
static void go_on_without_it(world *w) {
    size_t told;
    for (uint32_t i = 0; i < HONEST; i++) REQUIRE(pyccl_engine_freeze(w->engine[i], NULL, 0, &told) == PYCCL_OK);
    enter(w, HONEST, true);
    for (uint32_t i = 0; i < HONEST; i++)
        for (uint32_t tag = 0; tag < TAGS; tag++) (void)finish(&w->calls[i][tag]);
}

static void check_honest(world *w) {
    for (uint32_t i = 0; i < HONEST; i++)
        for (uint32_t tag = 0; tag < TAGS; tag++) submit(w, i, tag);
    for (uint32_t tag = 0; tag < TAGS; tag++) {
        call *a = &w->calls[0][tag], *b = &w->calls[1][tag];
        CHECK_EQ(finish(a), PYCCL_OK);
        CHECK_EQ(finish(b), PYCCL_OK);
        for (uint32_t k = 0; k < COUNT; k++) CHECK(a->x[k] == a->before[k] + b->before[k] && b->x[k] == a->x[k]);
    }
}

TEST(hostile_member_may_fail_operations_and_nothing_else) {
    static world w;
    uint8_t *bytes = malloc(PYCCL_FRAME_SIZE + PYCCL_PIECE_MAX);
    const unsigned rounds = getenv("PYCCL_TEST_LONG") != NULL ? ROUNDS_LONG : ROUNDS;
    REQUIRE(bytes != NULL);
    world_open(&w);
    for (uint32_t i = 0; i < HONEST; i++)
        for (uint32_t tag = 0; tag < TAGS; tag++) submit(&w, i, tag);
    for (unsigned round = 0; round < rounds; round++) {
        attack(&w, (uint32_t)below(&w, HONEST), bytes);
        for (uint32_t i = 0; i < HONEST; i++) {
            events_drain(w.engine[i]);
            for (uint32_t tag = 0; tag < TAGS; tag++) {
                if (!pyccl_op_done(w.calls[i][tag].op)) continue;
                (void)finish(&w.calls[i][tag]);
                w.ended++;
                submit(&w, i, tag);
            }
        }
    }
    free(bytes);
    printf("  %u of %u connections were refused, %u operations ended\n", w.refused, rounds, w.ended);
    CHECK(w.refused > rounds / 10);
    CHECK(w.ended > rounds / 100);
    go_on_without_it(&w);
    check_honest(&w);
    for (uint32_t i = 0; i < HONEST; i++) pyccl_engine_free(w.engine[i]);
}
