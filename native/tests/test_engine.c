/* test_engine.c: several engines in one process, over TCP on loopback and over socket pairs, without Python.
 * The test plays the master: it enters epochs, freezes and gives verdicts. Results are compared bit for bit with a
 * plain loop. Nothing sleeps: every wait has a condition and a deadline. */
#include <arpa/inet.h>
#include <errno.h>
#include <math.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "direct.h"
#include "element.h"
#include "pyccl.h"
#include "test.h"

#define ENGINES_MAX 5
#define CONNS 4
#define SECOND INT64_C(1000000000)
#define PATIENCE (60 * SECOND)

typedef struct cluster {
    uint32_t count, conns;
    pyccl_engine *engine[ENGINES_MAX];
    uint8_t id[ENGINES_MAX][16];
    uint32_t slot[ENGINES_MAX][ENGINES_MAX];
    int raw[ENGINES_MAX][ENGINES_MAX][CONNS]; /* duplicates of the engines' sockets, to break them from outside */
    int alive[ENGINES_MAX];
    uint64_t number;
} cluster;

typedef enum wire { OVER_TCP, OVER_UNIX } wire;

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * SECOND + now.tv_nsec;
}

/* ---- cluster ---- */

static void tcp_pair(int pair[2]) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    const int listener = socket(AF_INET, SOCK_STREAM, 0);
    REQUIRE(listener >= 0 && bind(listener, (struct sockaddr *)&address, sizeof address) == 0 && listen(listener, 1) == 0);
    REQUIRE(getsockname(listener, (struct sockaddr *)&address, &size) == 0);
    pair[0] = socket(AF_INET, SOCK_STREAM, 0);
    REQUIRE(connect(pair[0], (struct sockaddr *)&address, sizeof address) == 0);
    pair[1] = accept(listener, NULL, NULL);
    REQUIRE(pair[1] >= 0);
    close(listener);
}

static void cluster_link(cluster *c, uint32_t a, uint32_t b, uint32_t conn, wire how) {
    int pair[2];
    if (how == OVER_TCP) tcp_pair(pair);
    else REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    c->raw[a][b][conn] = dup(pair[0]);
    c->raw[b][a][conn] = dup(pair[1]);
    REQUIRE(pyccl_engine_conn_add(c->engine[a], c->slot[a][b], pair[0]) == PYCCL_OK);
    REQUIRE(pyccl_engine_conn_add(c->engine[b], c->slot[b][a], pair[1]) == PYCCL_OK);
}

static void cluster_epoch_with(cluster *c, int restart, const pyccl_op_verdict *verdicts, size_t count) {
    uint8_t members[ENGINES_MAX][16];
    uint32_t world = 0;
    pyccl_epoch epoch = {.number = ++c->number, .restart = (uint8_t)restart};
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

static void cluster_epoch(cluster *c, int restart) { cluster_epoch_with(c, restart, NULL, 0); }

static void cluster_open_with(cluster *c, uint32_t count, uint32_t conns, wire how, int64_t heartbeat_ns, int64_t silence_ns) {
    memset(c, 0, sizeof *c);
    c->count = count;
    c->conns = conns;
    for (uint32_t i = 0; i < count; i++) {
        pyccl_engine_options options = {.heartbeat_ns = heartbeat_ns, .silence_ns = silence_ns,
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

static void cluster_open(cluster *c, uint32_t count, uint32_t conns, wire how) {
    cluster_open_with(c, count, conns, how, SECOND, 5 * SECOND);
}

static void cluster_close(cluster *c) {
    for (uint32_t i = 0; i < c->count; i++) pyccl_engine_free(c->engine[i]);
    for (uint32_t a = 0; a < c->count; a++)
        for (uint32_t b = 0; b < c->count; b++)
            for (uint32_t k = 0; a != b && k < c->conns; k++)
                if (c->raw[a][b][k] > 0) close(c->raw[a][b][k]);
}

/* Wait for an event of this type; others are dropped. */
static int await_event(pyccl_engine *engine, uint32_t type, pyccl_event *out) {
    const int64_t until = now_ns() + PATIENCE;
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

static pyccl_op *submit(const cluster *c, uint32_t i, pyccl_spec spec, const void *src, void *dst, uint64_t dst_bytes) {
    spec.algorithm = PYCCL_DIRECT;
    spec.retry = 1;
    const pyccl_op_args args = {.spec = spec, .src = src, .dst = dst, .dst_bytes = dst_bytes, .weight = 1, .timeout_ns = PATIENCE};
    pyccl_op *op = NULL;
    REQUIRE(pyccl_op_submit(c->engine[i], &args, &op) == PYCCL_OK);
    return op;
}

static pyccl_spec reduce_spec(uint8_t dtype, uint8_t op, uint64_t count, uint32_t tag) {
    return (pyccl_spec){.kind = PYCCL_ALL_REDUCE, .dtype = dtype, .op = op, .count = count, .tag = tag};
}

static int finish(pyccl_op *op) {
    const int status = pyccl_op_wait(op, PATIENCE);
    if (status == PYCCL_PENDING) {
        printf("an operation did not end\n");
        abort();
    }
    pyccl_op_free(op);
    return status;
}

/* ---- data and the plain loop ---- */

static void fill(void *out, uint8_t dtype, uint64_t count, uint64_t seed) {
    for (uint64_t i = 0; i < count; i++) {
        const uint64_t r = test_random(&seed);
        switch (dtype) {
        case PYCCL_INT32: ((uint32_t *)out)[i] = (uint32_t)r; break;
        case PYCCL_INT64: ((uint64_t *)out)[i] = r; break;
        case PYCCL_FLOAT32: ((float *)out)[i] = (float)(int32_t)r * 0x1p-24f; break;
        case PYCCL_FLOAT64: ((double *)out)[i] = (double)(int64_t)r * 0x1p-56; break;
        default: ((uint8_t *)out)[i] = (uint8_t)r;
        }
    }
}

#define FOLD(type, zero_type)                                                            \
    do {                                                                                 \
        const type *x[ENGINES_MAX];                                                      \
        for (uint32_t r = 0; r < world; r++) x[r] = in[r];                               \
        for (uint64_t i = 0; i < count; i++) {                                           \
            type a = x[0][i];                                                            \
            for (uint32_t r = 1; r < world; r++) {                                       \
                const type b = x[r][i];                                                  \
                if (op == PYCCL_SUM || op == PYCCL_AVG) a = (type)((zero_type)a + (zero_type)b); \
                if (op == PYCCL_PROD) a = (type)((zero_type)a * (zero_type)b);           \
                if (op == PYCCL_MIN) a = b < a ? b : a;                                  \
                if (op == PYCCL_MAX) a = b > a ? b : a;                                  \
            }                                                                            \
            if (op == PYCCL_AVG) a = (type)(a / (type)world);                            \
            ((type *)out)[i] = a;                                                        \
        }                                                                                \
    } while (0)

static void fold(uint8_t dtype, uint8_t op, const void *const *in, uint32_t world, uint64_t count, void *out) {
    switch (dtype) {
    case PYCCL_INT32: FOLD(int32_t, uint32_t); break;
    case PYCCL_INT64: FOLD(int64_t, uint64_t); break;
    case PYCCL_FLOAT32: FOLD(float, float); break;
    default: FOLD(double, double);
    }
}

typedef struct vectors {             /* the inputs of one all_reduce and what must come out */
    uint32_t world;
    uint64_t bytes;
    uint8_t *in[ENGINES_MAX], *out[ENGINES_MAX], *want;
} vectors;

static vectors vectors_new(uint8_t dtype, uint8_t op, uint64_t count, uint32_t world, uint64_t seed) {
    vectors v = {.world = world, .bytes = count * pyccl_dtype_size(dtype)};
    for (uint32_t i = 0; i < world; i++) {
        v.in[i] = malloc(v.bytes + 1);
        v.out[i] = malloc(v.bytes + 1);
        memset(v.out[i], 0xEE, v.bytes + 1);
        fill(v.in[i], dtype, count, seed * 1000 + i);
    }
    v.want = malloc(v.bytes + 1);
    fold(dtype, op, (const void *const *)v.in, world, count, v.want);
    return v;
}

static void vectors_free(vectors *v) {
    for (uint32_t i = 0; i < v->world; i++) {
        free(v->in[i]);
        free(v->out[i]);
    }
    free(v->want);
}

static void check_all_reduce(const cluster *c, uint8_t dtype, uint8_t op, uint64_t count, int in_place) {
    vectors v = vectors_new(dtype, op, count, c->count, count * 31 + dtype * 7 + op);
    pyccl_op *ops[ENGINES_MAX];
    for (uint32_t i = 0; i < c->count; i++)
        ops[i] = submit(c, i, reduce_spec(dtype, op, count, 0), v.in[i], in_place ? v.in[i] : v.out[i], v.bytes);
    for (uint32_t i = 0; i < c->count; i++) {
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
        CHECK(memcmp(in_place ? v.in[i] : v.out[i], v.want, v.bytes) == 0);
        CHECK(in_place || v.out[i][v.bytes] == 0xEE);
    }
    vectors_free(&v);
}

/* ---- tests: values ---- */

static void all_reduce_suite(uint32_t world, wire how) {
    static const uint8_t dtypes[] = {PYCCL_INT32, PYCCL_INT64, PYCCL_FLOAT32, PYCCL_FLOAT64};
    static const uint64_t counts[] = {1, 7, 1001, 300001};
    cluster c;
    cluster_open(&c, world, 2, how);
    for (size_t d = 0; d < sizeof dtypes; d++)
        for (uint8_t op = PYCCL_SUM; op <= PYCCL_MAX; op++) {
            if (op == PYCCL_AVG && dtypes[d] <= PYCCL_INT64) continue;
            for (size_t k = 0; k < sizeof counts / sizeof *counts; k++) check_all_reduce(&c, dtypes[d], op, counts[k], (k + op) % 2);
        }
    check_all_reduce(&c, PYCCL_FLOAT32, PYCCL_SUM, 0, 0);
    check_all_reduce(&c, PYCCL_FLOAT32, PYCCL_AVG, 3000017, 0);
    check_all_reduce(&c, PYCCL_FLOAT32, PYCCL_AVG, 3000017, 1);
    cluster_close(&c);
}

TEST(engine_all_reduce_of_two_gives_the_bits_of_a_plain_loop) { all_reduce_suite(2, OVER_TCP); }
TEST(engine_all_reduce_of_three_gives_the_bits_of_a_plain_loop) { all_reduce_suite(3, OVER_UNIX); }
TEST(engine_all_reduce_of_five_gives_the_bits_of_a_plain_loop) { all_reduce_suite(5, OVER_TCP); }

TEST(engine_broadcast_gives_all_the_bytes_of_the_root) {
    static const uint64_t counts[] = {0, 1, 5, 1000, 5000011};
    cluster c;
    cluster_open(&c, 3, 2, OVER_TCP);
    for (size_t k = 0; k < sizeof counts / sizeof *counts; k++)
        for (uint32_t root = 0; root < 3; root++) {
            pyccl_spec spec = {.kind = PYCCL_BROADCAST, .dtype = PYCCL_UINT8, .count = counts[k], .tag = 9};
            memcpy(spec.root, c.id[root], 16);
            vectors v = vectors_new(PYCCL_INT64, PYCCL_SUM, counts[k] / 8 + 1, 3, k);
            uint8_t *want = malloc(counts[k] + 1);
            memcpy(want, v.in[root], counts[k]);
            pyccl_op *ops[3];
            for (uint32_t i = 0; i < 3; i++) ops[i] = submit(&c, i, spec, v.in[i], v.in[i], counts[k]);
            for (uint32_t i = 0; i < 3; i++) {
                CHECK_EQ(finish(ops[i]), PYCCL_OK);
                CHECK(memcmp(v.in[i], want, counts[k]) == 0);
            }
            free(want);
            vectors_free(&v);
        }
    cluster_close(&c);
}

TEST(engine_all_gather_gives_all_the_inputs_in_order_of_the_ranks) {
    static const uint64_t counts[] = {0, 1, 1000, 700001};
    cluster c;
    cluster_open(&c, 3, 2, OVER_TCP);
    for (size_t k = 0; k < sizeof counts / sizeof *counts; k++) {
        const uint64_t bytes = counts[k] * 4;
        const pyccl_spec spec = {.kind = PYCCL_ALL_GATHER, .dtype = PYCCL_FLOAT32, .count = counts[k], .tag = 4};
        vectors v = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, counts[k], 3, k);
        pyccl_op *ops[3];
        uint8_t *out[3];
        for (uint32_t i = 0; i < 3; i++) {
            out[i] = malloc(3 * bytes + 1);
            ops[i] = submit(&c, i, spec, v.in[i], out[i], 3 * bytes);
        }
        for (uint32_t i = 0; i < 3; i++) {
            CHECK_EQ(finish(ops[i]), PYCCL_OK);
            for (uint32_t j = 0; j < 3; j++) CHECK(memcmp(out[i] + j * bytes, v.in[j], bytes) == 0);
        }
        for (uint32_t i = 0; i < 3; i++) free(out[i]);
        vectors_free(&v);
    }
    cluster_close(&c);
}

TEST(engine_all_gather_into_too_little_memory_fails_on_all) {
    cluster c;
    cluster_open(&c, 2, 1, OVER_TCP);
    uint8_t in[2][64] = {{0}}, out[2][128];
    const pyccl_spec spec = {.kind = PYCCL_ALL_GATHER, .dtype = PYCCL_UINT8, .count = 64};
    pyccl_op *a = submit(&c, 0, spec, in[0], out[0], 127), *b = submit(&c, 1, spec, in[1], out[1], 128);
    CHECK_EQ(finish(a), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(finish(b), PYCCL_ERR_ARGUMENT);
    cluster_close(&c);
}

TEST(engine_barrier_ends_when_all_have_come) {
    cluster c;
    cluster_open(&c, 3, 1, OVER_TCP);
    const pyccl_spec spec = {.kind = PYCCL_BARRIER, .dtype = PYCCL_UINT8, .tag = 1};
    pyccl_op *a = submit(&c, 0, spec, NULL, NULL, 0), *b = submit(&c, 1, spec, NULL, NULL, 0);
    CHECK_EQ(pyccl_op_wait(a, SECOND / 50), PYCCL_PENDING);
    CHECK(!pyccl_op_done(b));
    pyccl_op *last = submit(&c, 2, spec, NULL, NULL, 0);
    CHECK_EQ(finish(a), PYCCL_OK);
    CHECK_EQ(finish(b), PYCCL_OK);
    CHECK_EQ(finish(last), PYCCL_OK);
    cluster_close(&c);
}

/* ---- tests: every dtype, codecs, weights ---- */

static int is_float(uint8_t dtype) {
    return dtype == PYCCL_FLOAT16 || dtype == PYCCL_BFLOAT16 || dtype == PYCCL_FLOAT32 || dtype == PYCCL_FLOAT64;
}

/* Numbers that do not lose themselves in infinity; of shorter floats any bits would be mostly that. */
static void fill_any(void *out, uint8_t dtype, uint64_t count, uint64_t seed) {
    float *wide = malloc(count * sizeof *wide + 1);
    fill(wide, PYCCL_FLOAT32, count, seed);
    for (uint64_t i = 0; i < count; i++) {
        if (dtype == PYCCL_FLOAT16) ((uint16_t *)out)[i] = f16_from_f32(wide[i]);
        if (dtype == PYCCL_BFLOAT16) ((uint16_t *)out)[i] = bf16_from_f32(wide[i]);
    }
    if (dtype == PYCCL_FLOAT32 || dtype == PYCCL_FLOAT64) fill(out, dtype, count, seed);
    else if (!is_float(dtype)) fill(out, PYCCL_UINT8, count * pyccl_dtype_size(dtype), seed);
    free(wide);
}

/* proto/wire.md 3.3, 3.6 with the codec functions on whole vectors. */
static void fold_coded(const pyccl_spec *spec, void *const *in, const double *weights, uint32_t world, void *out) {
    const uint64_t count = spec->count;
    uint8_t *codes = malloc(pyccl_codec_size(spec->codec, spec->block, count) + 1);
    float *wide[ENGINES_MAX];
    for (uint32_t i = 0; i < world; i++) {
        wide[i] = malloc(count * sizeof(float) + 1);
        REQUIRE(pyccl_codec_encode(spec->codec, spec->dtype, spec->block, in[i], count, codes) == PYCCL_OK);
        REQUIRE(pyccl_codec_decode(spec->codec, PYCCL_FLOAT32, spec->block, codes, count, wide[i]) == PYCCL_OK);
    }
    REQUIRE(pyccl_reduce(PYCCL_FLOAT32, spec->op, (const void *const *)wide, weights, world, count, wide[0]) == PYCCL_OK);
    if (world > 2) {
        REQUIRE(pyccl_codec_encode(spec->codec, PYCCL_FLOAT32, spec->block, wide[0], count, codes) == PYCCL_OK);
        REQUIRE(pyccl_codec_decode(spec->codec, PYCCL_FLOAT32, spec->block, codes, count, wide[0]) == PYCCL_OK);
    }
    for (uint64_t i = 0; i < count; i++) {
        if (spec->dtype == PYCCL_FLOAT16) ((uint16_t *)out)[i] = f16_from_f32(wide[0][i]);
        if (spec->dtype == PYCCL_BFLOAT16) ((uint16_t *)out)[i] = bf16_from_f32(wide[0][i]);
        if (spec->dtype == PYCCL_FLOAT32) ((float *)out)[i] = wide[0][i];
        if (spec->dtype == PYCCL_FLOAT64) ((double *)out)[i] = wide[0][i];
    }
    for (uint32_t i = 0; i < world; i++) free(wide[i]);
    free(codes);
}

static vectors vectors_any(const pyccl_spec *spec, const double *weights, uint32_t world, uint64_t seed) {
    vectors v = {.world = world, .bytes = spec->count * pyccl_dtype_size(spec->dtype)};
    for (uint32_t i = 0; i < world; i++) {
        v.in[i] = malloc(v.bytes + 1);
        v.out[i] = malloc(v.bytes + 1);
        memset(v.out[i], 0xEE, v.bytes + 1);
        fill_any(v.in[i], spec->dtype, spec->count, seed * 1000 + i);
    }
    v.want = malloc(v.bytes + 1);
    if (spec->codec != 0) fold_coded(spec, (void *const *)v.in, weights, world, v.want);
    else REQUIRE(pyccl_reduce(spec->dtype, spec->op, (const void *const *)v.in, weights, world, spec->count, v.want) == PYCCL_OK);
    return v;
}

static pyccl_op *submit_weighted(const cluster *c, uint32_t i, pyccl_spec spec, const void *src, void *dst, double weight) {
    spec.algorithm = PYCCL_DIRECT;
    spec.retry = 1;
    const pyccl_op_args args = {.spec = spec, .src = src, .dst = dst, .weight = weight, .timeout_ns = PATIENCE};
    pyccl_op *op = NULL;
    REQUIRE(pyccl_op_submit(c->engine[i], &args, &op) == PYCCL_OK);
    return op;
}

static void check_any(const cluster *c, pyccl_spec spec, const double *weights, int in_place) {
    vectors v = vectors_any(&spec, weights, c->count, spec.count * 31 + spec.dtype * 7 + spec.op);
    pyccl_op *ops[ENGINES_MAX];
    for (uint32_t i = 0; i < c->count; i++)
        ops[i] = submit_weighted(c, i, spec, v.in[i], in_place ? v.in[i] : v.out[i], weights != NULL ? weights[i] : 1.0);
    for (uint32_t i = 0; i < c->count; i++) {
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
        if (v.bytes == 0) continue;
        if (memcmp(in_place ? v.in[i] : v.out[i], v.want, v.bytes) != 0) {
            printf("world %u member %u dtype %u op %u codec %u block %u count %llu in place %d\n", c->count, i, spec.dtype,
                   spec.op, spec.codec, spec.block, (unsigned long long)spec.count, in_place);
            CHECK(!"the bits differ");
        }
        CHECK(in_place || v.out[i][v.bytes] == 0xEE);
    }
    vectors_free(&v);
}

static void dtypes_suite(uint32_t world) {
    cluster c;
    cluster_open(&c, world, 2, OVER_TCP);
    for (uint8_t dtype = PYCCL_INT32; dtype <= PYCCL_BFLOAT16; dtype++)
        for (uint8_t op = PYCCL_SUM; op <= PYCCL_MAX; op++) {
            if (op == PYCCL_AVG && !is_float(dtype)) continue;
            check_any(&c, reduce_spec(dtype, op, 1003, 0), NULL, op % 2);
            check_any(&c, reduce_spec(dtype, op, 300011, 0), NULL, !(op % 2));
        }
    cluster_close(&c);
}

TEST(engine_all_reduce_of_every_dtype_by_two) { dtypes_suite(2); }
TEST(engine_all_reduce_of_every_dtype_by_three) { dtypes_suite(3); }

static void codec_suite(uint32_t world, wire how) {
    static const uint8_t dtypes[] = {PYCCL_FLOAT16, PYCCL_BFLOAT16, PYCCL_FLOAT32, PYCCL_FLOAT64};
    static const uint32_t blocks[] = {64, 4096, 65536};
    static const uint64_t counts[] = {0, 1, 63, 65, 4097, 200001, 524288 + 4099};
    cluster c;
    cluster_open(&c, world, 2, how);
    for (size_t d = 0; d < sizeof dtypes; d++)
        for (uint8_t op = PYCCL_SUM; op <= PYCCL_MAX; op++)
            for (size_t k = 0; k < sizeof counts / sizeof *counts; k++) {
                pyccl_spec spec = reduce_spec(dtypes[d], op, counts[k], 0);
                spec.codec = PYCCL_CODEC_UINT8;
                spec.block = blocks[(k + op + d) % 3];
                check_any(&c, spec, NULL, (int)(k + op + d) / 3 % 2);
            }
    cluster_close(&c);
}

TEST(engine_codec_rounds_once_by_two) { codec_suite(2, OVER_TCP); }
TEST(engine_codec_rounds_twice_by_three) { codec_suite(3, OVER_UNIX); }
TEST(engine_codec_rounds_twice_by_five) { codec_suite(5, OVER_TCP); }

TEST(engine_codec_counts_encoded_bytes) {
    for (uint32_t world = 2; world <= 3; world++) {
        cluster c;
        cluster_open(&c, world, 1, OVER_TCP);
        pyccl_spec spec = reduce_spec(PYCCL_FLOAT32, PYCCL_AVG, 3 * 4096 * 10, 0);
        spec.codec = PYCCL_CODEC_UINT8;
        spec.block = 4096;
        vectors v = vectors_any(&spec, NULL, world, 1);
        pyccl_op *ops[3];
        for (uint32_t i = 0; i < world; i++) ops[i] = submit(&c, i, spec, v.in[i], v.out[i], 0);
        for (uint32_t i = 0; i < world; i++) {
            pyccl_op_info info;
            CHECK_EQ(pyccl_op_wait(ops[i], PATIENCE), PYCCL_OK);
            pyccl_op_info_get(ops[i], &info);
            const uint64_t vector = 30 * (4096 + 8), moved = world == 2 ? vector : vector / 3 * 4;
            CHECK_EQ(info.tx_bytes, moved);
            CHECK_EQ(info.rx_bytes, moved);
            CHECK_EQ(finish(ops[i]), PYCCL_OK);
        }
        vectors_free(&v);
        cluster_close(&c);
    }
}

TEST(engine_avg_counts_weights) {
    static const double weights[][3] = {{1, 1, 1}, {0.5, 2, 0}, {0, 0, 1e-3}, {3, 3, 3}};
    for (uint32_t world = 2; world <= 3; world++) {
        cluster c;
        cluster_open(&c, world, 2, OVER_TCP);
        for (size_t k = 0; k < sizeof weights / sizeof *weights; k++) {
            if (world == 2 && k == 2) continue;
            for (uint64_t count = 0; count <= 3000017; count = count * 20 + 1501) {
                check_any(&c, reduce_spec(PYCCL_FLOAT32, PYCCL_AVG, count, 0), weights[k], k % 2);
                check_any(&c, reduce_spec(PYCCL_FLOAT64, PYCCL_AVG, count, 0), weights[k], k % 2);
                pyccl_spec coded = reduce_spec(PYCCL_BFLOAT16, PYCCL_AVG, count, 0);
                coded.codec = PYCCL_CODEC_UINT8;
                coded.block = 1024;
                check_any(&c, coded, weights[k], k % 2);
            }
        }
        cluster_close(&c);
    }
}

TEST(engine_weights_that_can_not_divide_fail_on_all) {
    cluster c;
    cluster_open(&c, 3, 2, OVER_TCP);
    static const double none[3] = {0, -0.0, 0}, much[3] = {1e300, 1, 1};
    for (int run = 0; run < 6; run++) {
        const double *weights = run % 2 ? none : much;
        const pyccl_spec spec = reduce_spec(PYCCL_FLOAT32, PYCCL_AVG, run < 4 ? 500001 : run == 4 ? 3 : 0, (uint32_t)run / 2);
        vectors v = vectors_any(&spec, NULL, 3, 8), same = vectors_any(&spec, NULL, 3, 8);
        pyccl_op *ops[3];
        for (uint32_t i = 0; i < 3; i++) ops[i] = submit_weighted(&c, i, spec, v.in[i], v.in[i], weights[i]);
        for (uint32_t i = 0; i < 3; i++) {
            CHECK_EQ(finish(ops[i]), PYCCL_ERR_ARGUMENT);
            CHECK(v.bytes == 0 || memcmp(v.in[i], same.in[i], v.bytes) == 0);
        }
        vectors_free(&v);
        vectors_free(&same);
    }
    check_all_reduce(&c, PYCCL_FLOAT32, PYCCL_AVG, 1003, 1);
    const double wrong[] = {-1, NAN, INFINITY};
    float x[4] = {0};
    pyccl_op *op;
    for (size_t k = 0; k < 4; k++) {
        pyccl_op_args args = {.spec = reduce_spec(PYCCL_FLOAT32, PYCCL_AVG, 4, 0), .src = x, .dst = x, .timeout_ns = SECOND};
        args.spec.algorithm = PYCCL_DIRECT;
        if (k == 3) args.spec.op = PYCCL_SUM;
        args.weight = k == 3 ? 2 : wrong[k];
        CHECK_EQ(pyccl_op_submit(c.engine[0], &args, &op), PYCCL_ERR_ARGUMENT);
    }
    cluster_close(&c);
}

TEST(engine_all_gather_keeps_its_result_until_it_is_taken) {
    static const uint64_t counts[] = {0, 1, 700001};
    cluster c;
    cluster_open(&c, 3, 2, OVER_TCP);
    for (size_t k = 0; k < sizeof counts / sizeof *counts; k++) {
        const uint64_t bytes = counts[k] * 4;
        const pyccl_spec spec = {.kind = PYCCL_ALL_GATHER, .dtype = PYCCL_FLOAT32, .count = counts[k], .tag = 4};
        vectors v = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, counts[k], 3, k);
        pyccl_op *ops[3];
        uint8_t *out = malloc(3 * bytes + 1);
        ops[0] = submit(&c, 0, spec, v.in[0], NULL, 0);
        CHECK_EQ(pyccl_op_take(ops[0], out, 3 * bytes), PYCCL_ERR_ARGUMENT);
        for (uint32_t i = 1; i < 3; i++) ops[i] = submit(&c, i, spec, v.in[i], NULL, 0);
        for (uint32_t i = 0; i < 3; i++) {
            CHECK_EQ(pyccl_op_wait(ops[i], PATIENCE), PYCCL_OK);
            if (bytes > 0) CHECK_EQ(pyccl_op_take(ops[i], out, 3 * bytes - 1), PYCCL_ERR_ARGUMENT);
            for (int twice = 0; twice < 2; twice++) {
                memset(out, 0, 3 * bytes);
                CHECK_EQ(pyccl_op_take(ops[i], out, 3 * bytes), PYCCL_OK);
                for (uint32_t j = 0; j < 3; j++) CHECK(memcmp(out + j * bytes, v.in[j], bytes) == 0);
            }
            CHECK_EQ(finish(ops[i]), PYCCL_OK);
        }
        free(out);
        vectors_free(&v);
    }
    uint8_t both[64];
    const pyccl_spec spec = {.kind = PYCCL_ALL_GATHER, .dtype = PYCCL_UINT8, .algorithm = PYCCL_DIRECT, .count = 16};
    const pyccl_op_args overlapping = {.spec = spec, .src = both + 8, .dst = both, .dst_bytes = 48, .weight = 1, .timeout_ns = SECOND};
    pyccl_op *op;
    CHECK_EQ(pyccl_op_submit(c.engine[0], &overlapping, &op), PYCCL_ERR_ARGUMENT);
    cluster_close(&c);
}

/* ---- tests: many at a time ---- */

static void many_ops(uint32_t world, uint32_t tags, uint64_t count, uint32_t conns) {
    cluster c;
    cluster_open(&c, world, conns, OVER_TCP);
    vectors *v = calloc(tags, sizeof *v);
    pyccl_op **ops = calloc((size_t)tags * world, sizeof *ops);
    for (uint32_t tag = 0; tag < tags; tag++) v[tag] = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, count + tag, world, tag);
    for (uint32_t k = 0; k < tags; k++)
        for (uint32_t i = 0; i < world; i++) {
            const uint32_t tag = i == 0 ? k : i == 1 ? tags - 1 - k : (k * 7 + i) % tags;
            if (tags % 7 == 0 && i > 1) abort();
            ops[tag * world + i] = submit(&c, i, reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, count + tag, tag), v[tag].in[i], v[tag].in[i], 0);
        }
    for (uint32_t tag = 0; tag < tags; tag++) {
        for (uint32_t i = 0; i < world; i++) {
            CHECK_EQ(finish(ops[tag * world + i]), PYCCL_OK);
            CHECK(memcmp(v[tag].in[i], v[tag].want, v[tag].bytes) == 0);
        }
        vectors_free(&v[tag]);
    }
    free(v);
    free(ops);
    cluster_close(&c);
}

TEST(engine_runs_200_tagged_operations_submitted_in_different_orders) { many_ops(3, 200, 1000, 3); }
TEST(engine_runs_big_operations_submitted_in_reversed_order) { many_ops(2, 4, 9 * 262144 + 1, 2); }
TEST(engine_runs_big_operations_of_three_members_in_different_orders) { many_ops(3, 5, 9 * 262144 + 1, 1); }

TEST(engine_keeps_the_order_of_one_tag) {
    cluster c;
    cluster_open(&c, 2, 2, OVER_TCP);
    enum { RUNS = 300 };
    pyccl_op *ops[2][RUNS];
    static int64_t x[2][RUNS];
    for (int k = 0; k < RUNS; k++) x[0][k] = k, x[1][k] = 1000 * k;
    for (uint32_t i = 0; i < 2; i++)
        for (int k = 0; k < RUNS; k++) ops[i][k] = submit(&c, i, reduce_spec(PYCCL_INT64, PYCCL_SUM, 1, 5), &x[i][k], &x[i][k], 8);
    for (uint32_t i = 0; i < 2; i++)
        for (int k = 0; k < RUNS; k++) {
            CHECK_EQ(finish(ops[i][k]), PYCCL_OK);
            CHECK_EQ(x[i][k], 1001 * k);
        }
    cluster_close(&c);
}

/* ---- tests: connections and members that end ---- */

static void await_bytes(const cluster *c, uint32_t i, uint32_t j, uint64_t bytes) {
    const int64_t until = now_ns() + PATIENCE;
    pyccl_link_stats stats = {0};
    while (stats.rx_bytes < bytes && now_ns() < until) REQUIRE(pyccl_engine_link_stats(c->engine[i], c->slot[i][j], &stats) == PYCCL_OK);
    CHECK(stats.rx_bytes >= bytes);
}

/* The third member is missing, so nothing comes back. The second operation's data goes after all of the first's that may
 * go: when it has ended, what is held back is held back. */
TEST(engine_keeps_contributions_in_step_with_what_comes_back_on_loopback) {
    cluster c;
    cluster_open(&c, 3, 1, OVER_TCP);
    const uint64_t pieces = 12, count = 3 * pieces * DIRECT_PIECE_BYTES / 4;
    vectors v = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, count, 3, 79);
    int64_t x[3] = {1, 2, 3};
    pyccl_op *ops[3], *small[3];
    for (uint32_t i = 0; i < 2; i++) ops[i] = submit(&c, i, reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, count, 0), v.in[i], v.in[i], 0);
    for (uint32_t i = 0; i < 2; i++) await_bytes(&c, i, 1 - i, DIRECT_PIECE_BYTES);
    for (uint32_t i = 0; i < 3; i++) small[i] = submit(&c, i, reduce_spec(PYCCL_INT64, PYCCL_SUM, 1, 1), &x[i], &x[i], 0);
    for (uint32_t i = 0; i < 3; i++) CHECK_EQ(finish(small[i]), PYCCL_OK);
    for (uint32_t i = 0; i < 2; i++) {
        pyccl_link_stats stats;
        REQUIRE(pyccl_engine_link_stats(c.engine[i], c.slot[i][1 - i], &stats) == PYCCL_OK);
        CHECK(stats.rx_bytes < 5 * DIRECT_PIECE_BYTES);
    }
    ops[2] = submit(&c, 2, reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, count, 0), v.in[2], v.in[2], 0);
    for (uint32_t i = 0; i < 3; i++) {
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
        CHECK(memcmp(v.in[i], v.want, v.bytes) == 0);
    }
    vectors_free(&v);
    cluster_close(&c);
}

static void kill_conn(const cluster *c, uint32_t i, uint32_t j, uint32_t k) { shutdown(c->raw[i][j][k], SHUT_RDWR); }

static void conns_die_midway(uint32_t world, uint32_t conns, uint32_t deaths, wire how) {
    cluster c;
    cluster_open(&c, world, conns, how);
    const uint64_t count = 12000007;
    vectors v = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, count, world, 77);
    pyccl_op *ops[ENGINES_MAX];
    for (uint32_t i = 0; i < world; i++) ops[i] = submit(&c, i, reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, count, 0), v.in[i], v.in[i], 0);
    for (uint32_t k = 0; k < deaths; k++) {
        await_bytes(&c, 0, 1, (k + 1) * (3u << 20));
        kill_conn(&c, k % 2, 1 - k % 2, k);
        if (world > 2) kill_conn(&c, 2, 0, k);
    }
    for (uint32_t i = 0; i < world; i++) {
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
        CHECK(memcmp(v.in[i], v.want, v.bytes) == 0);
    }
    CHECK(await_event(c.engine[0], PYCCL_EVENT_CONN_DOWN, NULL));
    vectors_free(&v);
    cluster_close(&c);
}

TEST(engine_completes_when_one_connection_of_several_dies) { conns_die_midway(2, 4, 1, OVER_TCP); }
TEST(engine_completes_when_all_but_one_connection_die) { conns_die_midway(2, 4, 3, OVER_TCP); }
TEST(engine_completes_when_connections_of_three_members_die) { conns_die_midway(3, 3, 2, OVER_UNIX); }

TEST(engine_completes_when_the_only_connection_dies_and_another_comes) {
    cluster c;
    cluster_open(&c, 2, 1, OVER_TCP);
    const uint64_t count = 12000007;
    vectors v = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, count, 2, 78);
    pyccl_op *ops[2];
    for (uint32_t i = 0; i < 2; i++) ops[i] = submit(&c, i, reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, count, 0), v.in[i], v.in[i], 0);
    for (int k = 0; k < 3; k++) {
        await_bytes(&c, 0, 1, (k + 1) * (3u << 20));
        kill_conn(&c, 0, 1, 0);
        pyccl_event event;
        for (uint32_t i = 0; i < 2; i++) {
            CHECK(await_event(c.engine[i], PYCCL_EVENT_CONN_DOWN, &event));
            CHECK_EQ(event.count, 0);
            close(c.raw[i][1 - i][0]);
        }
        cluster_link(&c, 0, 1, 0, OVER_TCP);
    }
    for (uint32_t i = 0; i < 2; i++) {
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
        CHECK(memcmp(v.in[i], v.want, v.bytes) == 0);
    }
    vectors_free(&v);
    cluster_close(&c);
}

TEST(engine_survivors_repeat_an_operation_when_a_member_is_lost) {
    cluster c;
    cluster_open(&c, 3, 2, OVER_TCP);
    const uint64_t count = 9000001;
    vectors v = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, count, 3, 5), rest = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, count, 2, 5);
    pyccl_op *ops[3];
    for (uint32_t i = 0; i < 3; i++) ops[i] = submit(&c, i, reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, count, 0), v.in[i], v.in[i], 0);
    await_bytes(&c, 0, 2, 1 << 20);
    pyccl_engine_stop(c.engine[2], PYCCL_ERR_CLOSED);
    c.alive[2] = 0;
    int committed = 0;
    for (uint32_t i = 0; i < 2; i++) {
        pyccl_op_report reports[8];
        size_t reported = 0;
        CHECK(await_event(c.engine[i], PYCCL_EVENT_CONN_DOWN, NULL));
        CHECK_EQ(pyccl_engine_freeze(c.engine[i], reports, 8, &reported), PYCCL_OK);
        for (size_t k = 0; k < reported; k++) committed |= reports[k].state == PYCCL_STATE_COMMITTED;
    }
    CHECK(!committed);
    cluster_epoch(&c, 0);
    for (uint32_t i = 0; i < 2; i++) {
        CHECK_EQ(pyccl_op_wait(ops[i], PATIENCE), PYCCL_OK);
        pyccl_op_info info;
        pyccl_op_info_get(ops[i], &info);
        CHECK_EQ(info.attempts, 2);
        CHECK_EQ(info.world, 2);
        CHECK_EQ(info.epoch_number, 2);
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
        CHECK(memcmp(v.in[i], rest.want, v.bytes) == 0);
    }
    CHECK(finish(ops[2]) < 0);
    vectors same = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, count, 3, 5);
    CHECK(memcmp(v.in[2], same.in[2], v.bytes) == 0);
    vectors_free(&same);
    vectors_free(&v);
    vectors_free(&rest);
    cluster_close(&c);
}

TEST(engine_obeys_a_commit_verdict_with_the_result_it_holds) {
    cluster c;
    cluster_open(&c, 2, 1, OVER_TCP);
    vectors v = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, 1000, 2, 3);
    /* Both are frozen as soon as both hold their result, before both have committed: retry until we hit that. */
    for (int run = 0; run < 200; run++) {
        memcpy(v.out[0], v.in[0], v.bytes);
        memcpy(v.out[1], v.in[1], v.bytes);
        pyccl_op *ops[2];
        pyccl_op_report reports[2][64];
        size_t reported[2] = {0, 0};
        for (uint32_t i = 0; i < 2; i++) ops[i] = submit(&c, i, reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, 1000, 0), v.out[i], v.out[i], 0);
        for (uint32_t i = 0; i < 2; i++) CHECK_EQ(pyccl_engine_freeze(c.engine[i], reports[i], 64, &reported[i]), PYCCL_OK);
        pyccl_op_verdict verdict = {.verdict = PYCCL_VERDICT_COMMIT, .seq = (uint64_t)run};
        int prepared = 0, committed = 0;
        for (uint32_t i = 0; i < 2; i++)
            for (size_t k = 0; k < reported[i]; k++) {
                if (reports[i][k].seq != (uint64_t)run) continue;
                prepared += reports[i][k].state == PYCCL_STATE_PREPARED;
                committed += reports[i][k].state == PYCCL_STATE_COMMITTED;
            }
        cluster_epoch_with(&c, 0, &verdict, committed > 0 || prepared == 2);
        for (uint32_t i = 0; i < 2; i++) {
            CHECK_EQ(finish(ops[i]), PYCCL_OK);
            CHECK(memcmp(v.out[i], v.want, v.bytes) == 0);
        }
    }
    vectors_free(&v);
    cluster_close(&c);
}

TEST(engine_cancelled_operation_leaves_the_input_of_all_as_it_was) {
    cluster c;
    cluster_open(&c, 3, 2, OVER_TCP);
    const uint64_t count = 6000001;
    vectors v = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, count, 3, 11), again = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, count, 3, 11);
    pyccl_op *ops[3];
    for (uint32_t i = 0; i < 2; i++) ops[i] = submit(&c, i, reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, count, 0), v.in[i], v.in[i], 0);
    await_bytes(&c, 0, 1, 1 << 20);
    pyccl_op_cancel(ops[0], PYCCL_ERR_CANCELLED);
    CHECK_EQ(pyccl_op_wait(ops[0], 0), PYCCL_ERR_CANCELLED);
    memset(v.in[0], 0x55, v.bytes); /* the array is the caller's again: nothing reads or writes it */
    CHECK_EQ(finish(ops[1]), PYCCL_ERR_CANCELLED);
    CHECK(memcmp(v.in[1], again.in[1], v.bytes) == 0);
    ops[2] = submit(&c, 2, reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, count, 0), v.in[2], v.in[2], 0);
    CHECK_EQ(finish(ops[2]), PYCCL_ERR_CANCELLED);
    CHECK(memcmp(v.in[2], again.in[2], v.bytes) == 0);
    for (uint64_t k = 0; k < v.bytes; k++)
        if (v.in[0][k] != 0x55) {
            CHECK(!"the array was written after its operation had ended");
            break;
        }
    CHECK_EQ(finish(ops[0]), PYCCL_ERR_CANCELLED);
    check_all_reduce(&c, PYCCL_FLOAT32, PYCCL_SUM, 100003, 1);
    vectors_free(&v);
    vectors_free(&again);
    cluster_close(&c);
}

/* ---- tests: what was overwritten in place comes back ---- */

typedef enum how_it_ends { BY_CANCEL, BY_END, BY_STOP, BY_SETTLE } how_it_ends;

static uint64_t all_link_bytes(const cluster *c, uint32_t i) {
    uint64_t bytes = 0;
    for (uint32_t j = 0; j < c->count; j++) {
        pyccl_link_stats stats = {0};
        if (j != i) REQUIRE(pyccl_engine_link_stats(c->engine[i], c->slot[i][j], &stats) == PYCCL_OK);
        bytes += stats.rx_bytes;
    }
    return bytes;
}

/* Everybody reduces in place; when member 0 has got `after` bytes something ends it. All commit with the right bits, or
 * have their input back. BY_SETTLE: the members freeze and retry, and must then succeed. Returns 1 if it was committed. */
static int ends_midway(uint32_t world, uint8_t codec, uint64_t count, uint64_t after, how_it_ends how, uint8_t kind) {
    cluster c;
    cluster_open(&c, world, 2, OVER_TCP);
    pyccl_spec spec = reduce_spec(PYCCL_FLOAT32, PYCCL_AVG, count, 0);
    spec.codec = codec;
    spec.block = codec ? 1024 : 0;
    vectors v = vectors_any(&spec, NULL, world, after), same = vectors_any(&spec, NULL, world, after);
    if (kind == PYCCL_BROADCAST) {
        spec = (pyccl_spec){.kind = kind, .dtype = PYCCL_FLOAT32, .count = count};
        memcpy(spec.root, c.id[world - 1], 16);
        memcpy(v.want, v.in[world - 1], v.bytes);
    }
    pyccl_op *ops[ENGINES_MAX];
    for (uint32_t i = 0; i < world; i++) ops[i] = submit(&c, i, spec, v.in[i], v.in[i], 0);
    const int64_t until = now_ns() + PATIENCE;
    while (all_link_bytes(&c, 0) < after && !pyccl_op_done(ops[0]) && now_ns() < until) {}
    if (how == BY_CANCEL) pyccl_op_cancel(ops[0], PYCCL_ERR_CANCELLED);
    for (uint32_t i = 0; i < world && how == BY_END; i++) CHECK_EQ(pyccl_engine_end(c.engine[i], PYCCL_ERR_CANCELLED), PYCCL_OK);
    for (uint32_t i = 0; i < world && how == BY_STOP; i++) pyccl_engine_stop(c.engine[i], PYCCL_ERR_CLOSED);
    if (how == BY_SETTLE) {
        int prepared = 0, committed = 0;
        for (uint32_t i = 0; i < world; i++) {
            pyccl_op_report report;
            size_t reported;
            CHECK_EQ(pyccl_engine_freeze(c.engine[i], &report, 1, &reported), PYCCL_OK);
            prepared += reported > 0 && report.state == PYCCL_STATE_PREPARED;
            committed += reported > 0 && report.state == PYCCL_STATE_COMMITTED;
        }
        const pyccl_op_verdict verdict = {.verdict = PYCCL_VERDICT_COMMIT};
        cluster_epoch_with(&c, 0, &verdict, committed > 0 || prepared == (int)world);
    }
    int good = 0;
    for (uint32_t i = 0; i < world; i++) {
        const int status = finish(ops[i]);
        const int right = memcmp(v.in[i], status == PYCCL_OK ? v.want : same.in[i], v.bytes) == 0;
        if (!right) printf("world %u member %u codec %u after %llu how %d status %d\n", world, i, codec, (unsigned long long)after, how, status);
        CHECK(right);
        good += status == PYCCL_OK;
    }
    if (how == BY_CANCEL || how == BY_SETTLE) CHECK(good == 0 || good == (int)world);
    if (how == BY_SETTLE) CHECK_EQ(good, world);
    vectors_free(&v);
    vectors_free(&same);
    cluster_close(&c);
    return good > 0;
}

static void ends_everywhere(uint32_t world, uint8_t codec, uint8_t kind) {
    const uint64_t count = 2500003, total = codec ? count / 2 : count * 4;
    int committed = 0, runs = 0;
    for (int how = BY_CANCEL; how <= BY_SETTLE; how++)
        for (uint64_t k = 1; k <= 3; k++, runs++) committed += ends_midway(world, codec, count, total * k / 4, (how_it_ends)how, kind);
    CHECK(committed < runs);
}

TEST(engine_restores_in_place_inputs_of_two) { ends_everywhere(2, 0, PYCCL_ALL_REDUCE); }
TEST(engine_restores_in_place_inputs_of_three) { ends_everywhere(3, 0, PYCCL_ALL_REDUCE); }
TEST(engine_restores_in_place_inputs_of_five) { ends_everywhere(5, 0, PYCCL_ALL_REDUCE); }
TEST(engine_restores_coded_in_place_inputs_of_two) { ends_everywhere(2, PYCCL_CODEC_UINT8, PYCCL_ALL_REDUCE); }
TEST(engine_restores_coded_in_place_inputs_of_three) { ends_everywhere(3, PYCCL_CODEC_UINT8, PYCCL_ALL_REDUCE); }
TEST(engine_restores_broadcast_targets) { ends_everywhere(3, 0, PYCCL_BROADCAST); }

/* Contributions are repeated from what the caller submitted, also where the result has overwritten it. */
static void conns_die_in_place(uint32_t world, uint8_t codec, wire how) {
    cluster c;
    cluster_open(&c, world, 4, how);
    pyccl_spec spec = reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, 12000007, 0);
    spec.codec = codec;
    spec.block = codec ? 4096 : 0;
    vectors v = vectors_any(&spec, NULL, world, 77);
    pyccl_op *ops[ENGINES_MAX];
    for (uint32_t i = 0; i < world; i++) ops[i] = submit(&c, i, spec, v.in[i], v.in[i], 0);
    const uint64_t total = codec ? 12000007 : 48000028;
    for (uint32_t k = 0; k < 3; k++) {
        await_bytes(&c, 0, 1, total / world * (k + 1) / 4);
        kill_conn(&c, k % 2, 1 - k % 2, k);
        if (world > 2) kill_conn(&c, 2, 0, k);
    }
    for (uint32_t i = 0; i < world; i++) {
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
        CHECK(memcmp(v.in[i], v.want, v.bytes) == 0);
    }
    vectors_free(&v);
    cluster_close(&c);
}

TEST(engine_repeats_original_inputs_of_two) { conns_die_in_place(2, 0, OVER_TCP); }
TEST(engine_repeats_original_inputs_of_three) { conns_die_in_place(3, 0, OVER_UNIX); }
TEST(engine_repeats_coded_inputs_of_two) { conns_die_in_place(2, PYCCL_CODEC_UINT8, OVER_UNIX); }
TEST(engine_repeats_coded_inputs_of_three) { conns_die_in_place(3, PYCCL_CODEC_UINT8, OVER_TCP); }

TEST(engine_deadline_ends_an_operation_that_nobody_joins) {
    cluster c;
    cluster_open(&c, 2, 1, OVER_TCP);
    int64_t x = 1;
    pyccl_op_args args = {.spec = reduce_spec(PYCCL_INT64, PYCCL_SUM, 1, 0), .src = &x, .dst = &x, .weight = 1, .timeout_ns = SECOND / 20, .user = 99, .notify = 1};
    args.spec.algorithm = PYCCL_DIRECT;
    pyccl_op *op = NULL;
    REQUIRE(pyccl_op_submit(c.engine[0], &args, &op) == PYCCL_OK);
    pyccl_event event;
    CHECK(await_event(c.engine[0], PYCCL_EVENT_OP, &event));
    CHECK_EQ(event.value, 99);
    CHECK(pyccl_op_done(op));
    CHECK_EQ(finish(op), PYCCL_ERR_DEADLINE);
    cluster_close(&c);
}

TEST(engine_refuses_a_link_that_sends_garbage_and_serves_the_others) {
    cluster c;
    cluster_open(&c, 3, 2, OVER_TCP);
    uint8_t garbage[256];
    memset(garbage, 0xA5, sizeof garbage);
    CHECK(send(c.raw[2][0][1], garbage, sizeof garbage, MSG_NOSIGNAL) == (ssize_t)sizeof garbage);
    pyccl_event event;
    CHECK(await_event(c.engine[0], PYCCL_EVENT_LINK_REFUSED, &event));
    CHECK_EQ(event.slot, c.slot[0][2]);
    pyccl_link_stats stats;
    CHECK_EQ(pyccl_engine_link_stats(c.engine[0], c.slot[0][2], &stats), PYCCL_OK);
    CHECK_EQ(stats.conns, 0);
    c.alive[2] = 0;
    for (uint32_t i = 0; i < 2; i++) {
        size_t reported;
        CHECK_EQ(pyccl_engine_freeze(c.engine[i], NULL, 0, &reported), PYCCL_OK);
    }
    cluster_epoch(&c, 0);
    vectors v = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, 100001, 2, 1);
    pyccl_op *ops[2];
    for (uint32_t i = 0; i < 2; i++) ops[i] = submit(&c, i, reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, 100001, 0), v.in[i], v.out[i], 0);
    for (uint32_t i = 0; i < 2; i++) {
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
        CHECK(memcmp(v.out[i], v.want, v.bytes) == 0);
    }
    vectors_free(&v);
    cluster_close(&c);
}

/* A valid frame of the current epoch from engine `from`'s own socket, as a peer that breaks the rules would send it. */
static void send_frame(const cluster *c, uint32_t from, uint32_t to, pyccl_frame frame, uint32_t payload) {
    static uint8_t bytes[64 + PYCCL_PIECE_MAX];
    frame.epoch_number = c->number;
    memset(&frame.epoch_tag, (int)(0x40 + c->number), sizeof frame.epoch_tag);
    frame.length = payload;
    pyccl_frame_encode(&frame, bytes);
    for (size_t at = 0, size = 64 + (size_t)payload; at < size;) {
        const ssize_t n = send(c->raw[from][to][0], bytes + at, size - at, MSG_NOSIGNAL);
        if (n < 0 && (errno == EPIPE || errno == ECONNRESET)) return;
        if (n < 0 && errno == EAGAIN) {
            struct pollfd wait = {.fd = c->raw[from][to][0], .events = POLLOUT};
            poll(&wait, 1, 1000);
        } else REQUIRE(n > 0);
        if (n > 0) at += (size_t)n;
    }
}

TEST(engine_refuses_pieces_that_do_not_fit_and_too_many_early_ones) {
    const pyccl_spec spec = {.kind = PYCCL_ALL_REDUCE, .dtype = PYCCL_INT64, .op = PYCCL_SUM, .algorithm = PYCCL_DIRECT, .retry = 1, .count = 1000};
    const uint32_t hash = pyccl_spec_hash(&spec);
    const pyccl_frame bad[] = {
        {.type = PYCCL_FRAME_DATA, .phase = 0, .offset = 8, .spec_hash = hash, .length = 4000},
        {.type = PYCCL_FRAME_DATA, .phase = 0, .offset = 0, .spec_hash = hash, .length = 4008},
        {.type = PYCCL_FRAME_DATA, .phase = 1, .offset = DIRECT_PIECE_BYTES, .spec_hash = hash, .length = 8},
        {.type = PYCCL_FRAME_DATA, .phase = 1, .offset = UINT64_MAX - DIRECT_PIECE_BYTES + 1, .spec_hash = hash, .length = 4000},
    };
    for (size_t k = 0; k < sizeof bad / sizeof *bad; k++)
        for (int early = 0; early < 2; early++) {
            cluster c;
            cluster_open(&c, 2, 1, OVER_UNIX);
            int64_t x[1000] = {0};
            pyccl_op *op = early ? NULL : submit(&c, 0, spec, x, x, 0);
            if (!early) await_bytes(&c, 1, 0, 64);
            send_frame(&c, 1, 0, bad[k], bad[k].length);
            if (early) await_bytes(&c, 0, 1, 64 + bad[k].length);
            if (early) op = submit(&c, 0, spec, x, x, 0);
            CHECK(await_event(c.engine[0], PYCCL_EVENT_LINK_REFUSED, NULL));
            pyccl_op_cancel(op, PYCCL_ERR_CANCELLED);
            CHECK_EQ(finish(op), PYCCL_ERR_CANCELLED);
            cluster_close(&c);
        }
    cluster c;
    cluster_open(&c, 2, 1, OVER_UNIX);
    for (uint64_t k = 0; k < 5; k++)
        send_frame(&c, 1, 0, (pyccl_frame){.type = PYCCL_FRAME_DATA, .offset = k << 20}, PYCCL_PIECE_MAX);
    CHECK(await_event(c.engine[0], PYCCL_EVENT_LINK_REFUSED, NULL));
    cluster_close(&c);
}

TEST(engine_leaves_frames_of_a_later_epoch_unread_until_it_enters_it) {
    cluster c;
    cluster_open(&c, 2, 2, OVER_TCP);
    vectors v = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, 500001, 2, 9);
    uint8_t members[2][16];
    memcpy(members, c.id, sizeof members);
    pyccl_epoch epoch = {.number = 2, .world = 2, .restart = 1, .members = members[0]};
    memset(epoch.id, 0x42, 16);
    CHECK_EQ(pyccl_engine_epoch(c.engine[0], &epoch, NULL, 0), PYCCL_OK);
    pyccl_op *ops[2];
    ops[0] = submit(&c, 0, reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, 500001, 0), v.in[0], v.in[0], 0);
    await_bytes(&c, 1, 0, 64);
    CHECK_EQ(pyccl_op_wait(ops[0], SECOND / 50), PYCCL_PENDING);
    epoch.rank = 1;
    CHECK_EQ(pyccl_engine_epoch(c.engine[1], &epoch, NULL, 0), PYCCL_OK);
    ops[1] = submit(&c, 1, reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, 500001, 0), v.in[1], v.in[1], 0);
    for (uint32_t i = 0; i < 2; i++) {
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
        CHECK(memcmp(v.in[i], v.want, v.bytes) == 0);
    }
    vectors_free(&v);
    cluster_close(&c);
}

TEST(engine_reports_silence_and_hears_again) {
    cluster c;
    cluster_open_with(&c, 2, 1, OVER_TCP, SECOND / 50, SECOND / 5);
    /* Engine 0 gets a peer whose other end we hold: it says nothing until we do. */
    uint8_t id[16];
    uint32_t slot;
    int pair[2];
    memset(id, 0x77, 16);
    REQUIRE(pyccl_engine_peer_add(c.engine[0], id, &slot) == PYCCL_OK && socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    CHECK_EQ(pyccl_engine_conn_add(c.engine[0], slot, pair[0]), PYCCL_OK);
    pyccl_event event;
    CHECK(await_event(c.engine[0], PYCCL_EVENT_LINK_SILENT, &event));
    CHECK_EQ(event.slot, slot);
    uint8_t beat[64];
    CHECK(recv(pair[1], beat, 64, MSG_WAITALL) == 64);
    CHECK(send(pair[1], beat, 64, MSG_NOSIGNAL) == 64);
    CHECK(await_event(c.engine[0], PYCCL_EVENT_LINK_HEARD, &event));
    CHECK_EQ(event.slot, slot);
    close(pair[1]);
    CHECK(await_event(c.engine[0], PYCCL_EVENT_CONN_DOWN, &event));
    CHECK_EQ(pyccl_engine_peer_remove(c.engine[0], slot), PYCCL_OK);
    CHECK_EQ(pyccl_engine_peer_remove(c.engine[0], slot), PYCCL_ERR_ARGUMENT);
    cluster_close(&c);
}

/* Engine 1 is gone; our end of a new connection stands in its place, still a member. */
static void take_the_place_of_1(cluster *c, int pair[2]) {
    pyccl_engine_stop(c->engine[1], PYCCL_ERR_CLOSED);
    CHECK(await_event(c->engine[0], PYCCL_EVENT_CONN_DOWN, NULL));
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    CHECK_EQ(pyccl_engine_conn_add(c->engine[0], c->slot[0][1], pair[0]), PYCCL_OK);
}

TEST(engine_reports_a_member_without_a_connection_as_silent) {
    cluster c;
    cluster_open_with(&c, 2, 1, OVER_TCP, SECOND / 50, SECOND / 5);
    pyccl_engine_stop(c.engine[1], PYCCL_ERR_CLOSED);
    CHECK(await_event(c.engine[0], PYCCL_EVENT_CONN_DOWN, NULL));
    pyccl_event event = {0};
    CHECK(await_event(c.engine[0], PYCCL_EVENT_LINK_SILENT, &event));
    CHECK_EQ(event.slot, c.slot[0][1]);
    cluster_close(&c);
}

TEST(engine_reports_silence_again_on_a_new_connection) {
    cluster c;
    cluster_open_with(&c, 2, 1, OVER_TCP, SECOND / 50, SECOND / 5);
    int pair[2], other[2];
    take_the_place_of_1(&c, pair);
    CHECK(await_event(c.engine[0], PYCCL_EVENT_LINK_SILENT, NULL));
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, other) == 0);
    CHECK_EQ(pyccl_engine_conn_add(c.engine[0], c.slot[0][1], other[0]), PYCCL_OK);
    CHECK(await_event(c.engine[0], PYCCL_EVENT_LINK_HEARD, NULL));
    CHECK(await_event(c.engine[0], PYCCL_EVENT_LINK_SILENT, NULL));
    close(pair[1]);
    close(other[1]);
    cluster_close(&c);
}

TEST(engine_refuses_a_peer_that_asks_without_end_and_reads_no_answer) {
    cluster c;
    cluster_open(&c, 2, 1, OVER_TCP);
    int64_t x = 0;
    const pyccl_op_args args = {.spec = {.kind = PYCCL_ALL_REDUCE, .dtype = PYCCL_INT64, .op = PYCCL_SUM, .algorithm = PYCCL_DIRECT,
                                         .count = 1}, .src = &x, .dst = &x, .weight = 1, .timeout_ns = 1};
    pyccl_op *op;
    REQUIRE(pyccl_op_submit(c.engine[0], &args, &op) == PYCCL_OK);
    CHECK_EQ(finish(op), PYCCL_ERR_DEADLINE); /* a tombstone, which answers */
    int pair[2];
    take_the_place_of_1(&c, pair);
    const int kept = c.raw[1][0][0];
    c.raw[1][0][0] = pair[1];
    pyccl_event event = {0};
    for (uint32_t k = 0; k < 2000000 && event.type != PYCCL_EVENT_LINK_REFUSED; k++) {
        send_frame(&c, 1, 0, (pyccl_frame){.type = PYCCL_FRAME_ASK}, 0);
        if (k % 1000 == 0) (void)pyccl_engine_events(c.engine[0], &event, 1);
    }
    CHECK_EQ(event.type, PYCCL_EVENT_LINK_REFUSED);
    c.raw[1][0][0] = kept;
    close(pair[1]);
    cluster_close(&c);
}

TEST(engine_pulse_beats_and_reports_its_end) {
    cluster c;
    cluster_open_with(&c, 2, 1, OVER_TCP, SECOND / 50, 5 * SECOND);
    int pair[2];
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    CHECK_EQ(pyccl_engine_pulse(c.engine[0], pair[0]), PYCCL_OK);
    for (int k = 0; k < 3; k++) {
        uint8_t beat[64];
        pyccl_frame frame;
        CHECK(recv(pair[1], beat, 64, MSG_WAITALL) == 64);
        CHECK_EQ(pyccl_frame_decode_untrusted(beat, &frame), PYCCL_OK);
        CHECK_EQ(frame.type, PYCCL_FRAME_HEARTBEAT);
    }
    close(pair[1]);
    CHECK(await_event(c.engine[0], PYCCL_EVENT_PULSE_DOWN, NULL));
    cluster_close(&c);
}

TEST(engine_posts_drained_once_when_everything_below_the_cut_is_settled) {
    cluster c;
    cluster_open(&c, 2, 1, OVER_TCP);
    int64_t x[2] = {1, 2}, y[2] = {10, 20};
    pyccl_op *ops[2], *later[2];
    ops[0] = submit(&c, 0, reduce_spec(PYCCL_INT64, PYCCL_SUM, 1, 0), &x[0], &x[0], 0);
    const pyccl_op_count cut = {.tag = 0, .count = 1};
    int behind;
    for (uint32_t i = 0; i < 2; i++) CHECK_EQ(pyccl_engine_cut(c.engine[i], &cut, 1, 0, &behind), PYCCL_OK);
    ops[1] = submit(&c, 1, reduce_spec(PYCCL_INT64, PYCCL_SUM, 1, 0), &x[1], &x[1], 0);
    for (uint32_t i = 0; i < 2; i++) later[i] = submit(&c, i, reduce_spec(PYCCL_INT64, PYCCL_SUM, 1, 0), &y[i], &y[i], 0);
    for (uint32_t i = 0; i < 2; i++) {
        CHECK(await_event(c.engine[i], PYCCL_EVENT_DRAINED, NULL));
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
        CHECK_EQ(x[i], 3);
        CHECK(!pyccl_op_done(later[i]));
    }
    cluster_epoch(&c, 1);
    for (uint32_t i = 0; i < 2; i++) {
        CHECK_EQ(finish(later[i]), PYCCL_OK);
        CHECK_EQ(y[i], 30);
    }
    cluster_close(&c);
}

TEST(engine_tells_that_specs_differ) {
    cluster c;
    cluster_open(&c, 2, 1, OVER_TCP);
    int64_t x[2][4] = {{0}};
    pyccl_op *a = submit(&c, 0, reduce_spec(PYCCL_INT64, PYCCL_SUM, 4, 6), x[0], x[0], 0);
    pyccl_op *b = submit(&c, 1, reduce_spec(PYCCL_INT64, PYCCL_SUM, 3, 6), x[1], x[1], 0);
    pyccl_event event;
    CHECK(await_event(c.engine[0], PYCCL_EVENT_DIFFERS, &event));
    CHECK_EQ(event.slot, c.slot[0][1]);
    CHECK_EQ(event.tag, 6);
    CHECK_EQ(event.mine.count, 4);
    CHECK_EQ(event.theirs.count, 3);
    for (uint32_t i = 0; i < 2; i++) CHECK_EQ(pyccl_engine_end(c.engine[i], PYCCL_ERR_MISMATCH), PYCCL_OK);
    CHECK_EQ(finish(a), PYCCL_ERR_MISMATCH);
    CHECK_EQ(finish(b), PYCCL_ERR_MISMATCH);
    cluster_close(&c);
}

/* ---- tests: exchanges ---- */

static pyccl_spec exchange_spec(const cluster *c, uint32_t a, uint32_t b, uint8_t dtype, uint64_t count) {
    pyccl_spec spec = {.kind = PYCCL_EXCHANGE, .dtype = dtype, .space = PYCCL_SPACE_PAIR, .count = count, .tag = 7};
    for (int i = 0; i < 16; i++) spec.root[i] = c->id[a][i] ^ c->id[b][i];
    return spec;
}

static int all_bytes_are(const uint8_t *at, uint8_t value, uint64_t bytes) {
    while (bytes > 0 && *at == value) at++, bytes--;
    return bytes == 0;
}

/* Two pairs of one tag at once, a member that is in both, and a collective of that tag by all beside them. */
TEST(engine_exchange_gives_each_of_a_pair_the_bytes_of_the_other) {
    static const uint64_t counts[] = {0, 1, 1000, 700001};
    static const uint32_t pairs[][2] = {{0, 3}, {4, 1}, {1, 3}};
    cluster c;
    cluster_open(&c, 5, 2, OVER_TCP);
    for (size_t k = 0; k < sizeof counts / sizeof *counts; k++) {
        vectors v = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, counts[k], 5, k), all = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, 1000, 5, k);
        vectors out = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, counts[k], 5, k), last = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, counts[k], 2, k);
        uint8_t *dst[3][2] = {{out.out[0], out.out[1]}, {out.out[2], out.out[3]}, {last.out[0], last.out[1]}};
        pyccl_op *ops[3][2], *beside[5];
        for (uint32_t i = 0; i < 5; i++) beside[i] = submit(&c, i, reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, 1000, 7), all.in[i], all.in[i], 0);
        for (int q = 0; q < 3; q++)
            for (int end = 0; end < 2; end++)
                ops[q][end] = submit(&c, pairs[q][end], exchange_spec(&c, pairs[q][0], pairs[q][1], PYCCL_FLOAT32, counts[k]), v.in[pairs[q][end]], dst[q][end], v.bytes);
        for (int q = 0; q < 3; q++)
            for (int end = 0; end < 2; end++) {
                pyccl_op_info info;
                CHECK_EQ(pyccl_op_wait(ops[q][end], PATIENCE), PYCCL_OK);
                pyccl_op_info_get(ops[q][end], &info);
                CHECK(info.world == 2 && info.tx_bytes == v.bytes && info.rx_bytes == v.bytes && info.seq == k);
                CHECK_EQ(finish(ops[q][end]), PYCCL_OK);
                CHECK(memcmp(dst[q][end], v.in[pairs[q][1 - end]], v.bytes) == 0 && dst[q][end][v.bytes] == 0xEE);
            }
        for (uint32_t i = 0; i < 5; i++) {
            CHECK_EQ(finish(beside[i]), PYCCL_OK);
            CHECK(memcmp(all.in[i], all.want, all.bytes) == 0);
        }
        vectors same = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, counts[k], 5, k);
        for (uint32_t i = 0; i < 5; i++) CHECK(memcmp(v.in[i], same.in[i], v.bytes) == 0);
        vectors_free(&same);
        vectors_free(&v);
        vectors_free(&all);
        vectors_free(&out);
        vectors_free(&last);
    }
    cluster_close(&c);
}

/* Both partners of member 1 have sent their pieces, of one tag and number, before it submits. */
TEST(engine_exchange_keeps_early_pieces_of_two_partners_apart) {
    cluster c;
    cluster_open(&c, 3, 1, OVER_TCP);
    uint8_t in[3][5000], out[4][5000];
    for (int i = 0; i < 3; i++) memset(in[i], 0x21 + i, sizeof in[i]);
    const pyccl_spec with_0 = exchange_spec(&c, 0, 1, PYCCL_UINT8, 5000), with_2 = exchange_spec(&c, 1, 2, PYCCL_UINT8, 5000);
    pyccl_op *ops[4] = {submit(&c, 0, with_0, in[0], out[0], 0), submit(&c, 2, with_2, in[2], out[1], 0)};
    await_bytes(&c, 1, 0, 5000);
    await_bytes(&c, 1, 2, 5000);
    ops[2] = submit(&c, 1, with_2, in[1], out[2], 0);
    CHECK_EQ(pyccl_op_wait(ops[2], PATIENCE), PYCCL_OK);
    CHECK(!pyccl_op_done(ops[0]));
    ops[3] = submit(&c, 1, with_0, in[1], out[3], 0);
    for (int k = 0; k < 4; k++) CHECK_EQ(finish(ops[k]), PYCCL_OK);
    CHECK(all_bytes_are(out[0], 0x22, 5000) && all_bytes_are(out[1], 0x22, 5000));
    CHECK(all_bytes_are(out[2], 0x23, 5000) && all_bytes_are(out[3], 0x21, 5000));
    cluster_close(&c);
}

/* Members 0 and 2 swap in place, 1 does nothing; as ends_midway. */
static int exchange_ends_midway(uint64_t count, uint64_t after, how_it_ends how) {
    cluster c;
    cluster_open(&c, 3, 2, OVER_TCP);
    vectors v = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, count, 3, after), same = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, count, 3, after);
    pyccl_op *ops[3] = {NULL, NULL, NULL};
    for (uint32_t i = 0; i < 3; i += 2) ops[i] = submit(&c, i, exchange_spec(&c, 0, 2, PYCCL_FLOAT32, count), v.in[i], v.in[i], 0);
    const int64_t until = now_ns() + PATIENCE;
    while (all_link_bytes(&c, 0) < after && !pyccl_op_done(ops[0]) && now_ns() < until) {}
    if (how == BY_CANCEL) pyccl_op_cancel(ops[0], PYCCL_ERR_CANCELLED);
    for (uint32_t i = 0; i < 3 && how == BY_END; i++) CHECK_EQ(pyccl_engine_end(c.engine[i], PYCCL_ERR_CANCELLED), PYCCL_OK);
    for (uint32_t i = 0; i < 3 && how == BY_STOP; i++) pyccl_engine_stop(c.engine[i], PYCCL_ERR_CLOSED);
    if (how == BY_SETTLE) {
        int prepared = 0, committed = 0;
        for (uint32_t i = 0; i < 3; i++) {
            pyccl_op_report report;
            size_t reported;
            CHECK_EQ(pyccl_engine_freeze(c.engine[i], &report, 1, &reported), PYCCL_OK);
            CHECK(reported == 0 || (i != 1 && report.tag == pyccl_channel(PYCCL_SPACE_PAIR, 7, 0, 2)));
            prepared += reported > 0 && report.state == PYCCL_STATE_PREPARED;
            committed += reported > 0 && report.state == PYCCL_STATE_COMMITTED;
        }
        const pyccl_op_verdict verdict = {.space = PYCCL_SPACE_PAIR, .verdict = PYCCL_VERDICT_COMMIT, .tag = pyccl_channel(PYCCL_SPACE_PAIR, 7, 0, 2)};
        cluster_epoch_with(&c, 0, &verdict, committed > 0 || prepared == 2);
    }
    int good = 0;
    for (uint32_t i = 0; i < 3; i += 2) {
        const int status = finish(ops[i]);
        CHECK(memcmp(v.in[i], same.in[status == PYCCL_OK ? 2 - i : i], v.bytes) == 0);
        good += status == PYCCL_OK;
    }
    if (how == BY_CANCEL) CHECK(good == 0 || good == 2);
    if (how == BY_SETTLE) CHECK_EQ(good, 2);
    vectors_free(&v);
    vectors_free(&same);
    cluster_close(&c);
    return good > 0;
}

TEST(engine_exchange_in_place_is_swapped_on_both_or_restored) {
    int committed = 0;
    for (int how = BY_CANCEL; how <= BY_SETTLE; how++)
        for (uint64_t k = 1; k <= 3; k++) committed += exchange_ends_midway(2500003, 2500003 * k, (how_it_ends)how);
    CHECK(committed < 12);
}

TEST(engine_exchange_in_place_repeats_what_was_submitted) {
    cluster c;
    cluster_open(&c, 3, 4, OVER_TCP);
    const uint64_t count = 12000007;
    vectors v = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, count, 3, 79), same = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, count, 3, 79);
    pyccl_op *a = submit(&c, 0, exchange_spec(&c, 0, 1, PYCCL_FLOAT32, count), v.in[0], v.in[0], 0);
    pyccl_op *b = submit(&c, 1, exchange_spec(&c, 0, 1, PYCCL_FLOAT32, count), v.in[1], v.in[1], 0);
    for (uint32_t k = 0; k < 3; k++) {
        await_bytes(&c, 0, 1, v.bytes * (k + 1) / 4);
        kill_conn(&c, k % 2, 1 - k % 2, k);
    }
    CHECK_EQ(finish(a), PYCCL_OK);
    CHECK_EQ(finish(b), PYCCL_OK);
    CHECK(memcmp(v.in[0], same.in[1], v.bytes) == 0 && memcmp(v.in[1], same.in[0], v.bytes) == 0);
    vectors_free(&v);
    vectors_free(&same);
    cluster_close(&c);
}

static void cluster_loses(cluster *c, uint32_t who) {
    pyccl_engine_stop(c->engine[who], PYCCL_ERR_CLOSED);
    c->alive[who] = 0;
    for (uint32_t i = 0; i < c->count; i++) {
        size_t reported;
        if (c->alive[i]) CHECK_EQ(pyccl_engine_freeze(c->engine[i], NULL, 0, &reported), PYCCL_OK);
    }
    cluster_epoch(c, 0);
}

TEST(engine_exchange_survives_the_loss_of_somebody_else_and_not_of_the_partner) {
    cluster c;
    cluster_open(&c, 4, 1, OVER_TCP);
    int64_t x[4] = {10, 11, 12, 13}, y[4] = {0};
    pyccl_op_info info;
    pyccl_op *with_0 = submit(&c, 1, exchange_spec(&c, 0, 1, PYCCL_INT64, 1), &x[1], &y[0], 8);
    pyccl_op *with_3 = submit(&c, 1, exchange_spec(&c, 1, 3, PYCCL_INT64, 1), &x[1], &y[1], 8);
    cluster_loses(&c, 0);                  /* ranks move: 1 is 0 now, 3 is 2 */
    CHECK_EQ(pyccl_op_wait(with_0, PATIENCE), PYCCL_ERR_PEER_LOST);
    pyccl_op_info_get(with_0, &info);
    CHECK(memcmp(info.peer, c.id[0], 16) == 0);
    CHECK_EQ(finish(with_0), PYCCL_ERR_PEER_LOST);
    pyccl_op *back = submit(&c, 3, exchange_spec(&c, 1, 3, PYCCL_INT64, 1), &x[3], &y[3], 8);
    CHECK_EQ(finish(back), PYCCL_OK);
    CHECK_EQ(pyccl_op_wait(with_3, PATIENCE), PYCCL_OK);
    pyccl_op_info_get(with_3, &info);
    CHECK(info.attempts == 2 && info.world == 2);
    CHECK_EQ(finish(with_3), PYCCL_OK);
    CHECK(y[1] == 13 && y[3] == 11 && x[1] == 11);
    cluster_close(&c);
}

/* Member 0 waits in an exchange that 2 has not called; beside it runs one that 1 has opened and, frozen, does not end. */
TEST(engine_is_not_quiet_while_an_operation_runs_that_all_have_opened) {
    cluster c;
    cluster_open(&c, 3, 1, OVER_TCP);
    int64_t x[3] = {1, 2, 3}, y[3];
    pyccl_op_lack lack[4];
    size_t lacking = 0, reported;
    uint32_t waiters;
    int64_t quiet_ns = 0;
    int below;
    pyccl_op *waits = submit(&c, 0, exchange_spec(&c, 0, 2, PYCCL_INT64, 1), &x[0], &y[0], 8);
    const int64_t until = now_ns() + PATIENCE;
    while (quiet_ns == 0 && now_ns() < until)
        CHECK_EQ(pyccl_engine_blocked(c.engine[0], lack, 4, &lacking, &waiters, &quiet_ns, &below), PYCCL_OK);
    CHECK(quiet_ns > 0 && lacking == 1 && lack[0].tag == pyccl_channel(PYCCL_SPACE_PAIR, 7, 0, 2));
    pyccl_op *theirs = submit(&c, 1, exchange_spec(&c, 0, 1, PYCCL_INT64, 1), &x[1], &y[1], 8);
    await_bytes(&c, 0, 1, 64 + PYCCL_SPEC_SIZE);
    CHECK_EQ(pyccl_engine_freeze(c.engine[1], NULL, 0, &reported), PYCCL_OK);
    pyccl_op *runs = submit(&c, 0, exchange_spec(&c, 0, 1, PYCCL_INT64, 1), &x[0], &y[2], 8);
    for (lacking = 2; lacking == 2 && now_ns() < until;)
        CHECK_EQ(pyccl_engine_blocked(c.engine[0], lack, 4, &lacking, &waiters, &quiet_ns, &below), PYCCL_OK);
    CHECK(lacking == 1 && quiet_ns == 0);
    for (uint32_t i = 0; i < 3; i++) CHECK_EQ(pyccl_engine_end(c.engine[i], PYCCL_ERR_CANCELLED), PYCCL_OK);
    CHECK(finish(waits) < 0 && finish(theirs) < 0 && finish(runs) < 0);
    cluster_close(&c);
}

TEST(engine_tells_that_the_specs_of_an_exchange_differ) {
    cluster c;
    cluster_open(&c, 3, 1, OVER_TCP);
    int64_t x[2][4] = {{0}};
    pyccl_op *a = submit(&c, 1, exchange_spec(&c, 1, 2, PYCCL_INT64, 4), x[0], x[0], 0);
    pyccl_op *b = submit(&c, 2, exchange_spec(&c, 1, 2, PYCCL_INT64, 3), x[1], x[1], 0);
    pyccl_event event;
    CHECK(await_event(c.engine[1], PYCCL_EVENT_DIFFERS, &event));
    CHECK(event.slot == c.slot[1][2] && event.space == PYCCL_SPACE_PAIR && event.tag == pyccl_channel(PYCCL_SPACE_PAIR, 7, 1, 2));
    for (uint32_t i = 0; i < 3; i++) CHECK_EQ(pyccl_engine_end(c.engine[i], PYCCL_ERR_MISMATCH), PYCCL_OK);
    CHECK_EQ(finish(a), PYCCL_ERR_MISMATCH);
    CHECK_EQ(finish(b), PYCCL_ERR_MISMATCH);
    cluster_close(&c);
}

/* ---- tests: shared state ---- */

TEST(engine_fetches_published_state_in_pieces_across_regions) {
    cluster c;
    cluster_open(&c, 2, 2, OVER_TCP);
    const uint64_t size = 20000003;
    uint8_t *source = malloc(size), *copy = calloc(1, size);
    fill(source, PYCCL_UINT8, size, 4);
    const pyccl_region regions[] = {{source, 5}, {NULL, 0}, {source + 5, 3000000}, {source + 3000005, size - 3000005}};
    CHECK_EQ(pyccl_state_publish(c.engine[0], 7, regions, 4), PYCCL_OK);
    CHECK_EQ(pyccl_state_publish(c.engine[0], 7, regions, 4), PYCCL_ERR_ARGUMENT);
    const uint32_t piece = 65536;
    uint64_t pieces = 0;
    for (uint64_t at = 0; at < size; at += piece, pieces++) {
        const uint32_t n = size - at < piece ? (uint32_t)(size - at) : piece;
        CHECK_EQ(pyccl_state_fetch(c.engine[1], c.slot[1][0], 7, at, n, copy + at, pieces), PYCCL_OK);
        if (pieces == 100) kill_conn(&c, 1, 0, 1);
    }
    for (uint64_t k = 0; k < pieces; k++) {
        pyccl_event event;
        CHECK(await_event(c.engine[1], PYCCL_EVENT_STATE, &event));
        CHECK_EQ(event.code, PYCCL_OK);
    }
    CHECK(memcmp(source, copy, size) == 0);
    pyccl_event event;
    CHECK_EQ(pyccl_state_fetch(c.engine[1], c.slot[1][0], 7, size - 10, 11, copy, 500), PYCCL_OK);
    CHECK(await_event(c.engine[1], PYCCL_EVENT_STATE, &event));
    CHECK_EQ(event.code, PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_state_unpublish(c.engine[0], 7), PYCCL_OK);
    CHECK_EQ(pyccl_state_fetch(c.engine[1], c.slot[1][0], 7, 0, 10, copy, 501), PYCCL_OK);
    CHECK(await_event(c.engine[1], PYCCL_EVENT_STATE, &event));
    CHECK_EQ(event.code, PYCCL_ERR_ARGUMENT);
    CHECK_EQ(event.value, 501);
    free(source);
    free(copy);
    cluster_close(&c);
}

TEST(engine_frees_state_memory_in_the_middle_of_a_transfer) {
    cluster c;
    cluster_open(&c, 2, 1, OVER_TCP);
    const uint64_t size = 64 << 20;
    for (int run = 0; run < 3; run++) {
        uint8_t *source = malloc(size), *copy = malloc(size);
        memset(source, 3, size);
        const pyccl_region region = {source, size};
        CHECK_EQ(pyccl_state_publish(c.engine[0], 1, &region, 1), PYCCL_OK);
        for (uint64_t at = 0; at < size; at += PYCCL_PIECE_MAX)
            CHECK_EQ(pyccl_state_fetch(c.engine[1], c.slot[1][0], 1, at, PYCCL_PIECE_MAX, copy + at, at), PYCCL_OK);
        pyccl_event event;
        CHECK(await_event(c.engine[1], PYCCL_EVENT_STATE, &event));
        if (run != 1) CHECK_EQ(pyccl_state_unpublish(c.engine[0], 1), PYCCL_OK);
        if (run != 1) free(source);
        for (uint64_t at = 0; run == 2 && at < size; at += PYCCL_PIECE_MAX) (void)!pyccl_state_cancel(c.engine[1], at);
        if (run != 2) CHECK_EQ(pyccl_state_forget(c.engine[1]), PYCCL_OK);
        free(copy);
        if (run == 1) CHECK_EQ(pyccl_state_unpublish(c.engine[0], 1), PYCCL_OK);
        if (run == 1) free(source);
    }
    check_all_reduce(&c, PYCCL_FLOAT32, PYCCL_SUM, 100003, 1);
    cluster_close(&c);
}

TEST(engine_cancels_single_fetches_and_leaves_the_others) {
    enum { FETCHES = 600, SIZE = 1000 }; /* more than are asked for at a time */
    cluster c;
    cluster_open(&c, 2, 1, OVER_TCP);
    uint8_t *source = malloc(FETCHES * SIZE), *copy = calloc(FETCHES, SIZE), members[2][16], nothing[SIZE] = {0};
    fill(source, PYCCL_UINT8, FETCHES * SIZE, 4);
    const pyccl_region region = {source, FETCHES * SIZE};
    CHECK_EQ(pyccl_state_publish(c.engine[0], 7, &region, 1), PYCCL_OK);
    memcpy(members, c.id, sizeof members);
    pyccl_epoch epoch = {.number = 2, .world = 2, .rank = 1, .restart = 1, .members = members[0]};
    memset(epoch.id, 0x42, 16);
    CHECK_EQ(pyccl_engine_epoch(c.engine[1], &epoch, NULL, 0), PYCCL_OK); /* its asks are left unread until 0 enters too */
    for (uint64_t k = 0; k < FETCHES; k++)
        CHECK_EQ(pyccl_state_fetch(c.engine[1], c.slot[1][0], 7, k * SIZE, SIZE, copy + k * SIZE, k), PYCCL_OK);
    for (uint64_t k = 0; k < FETCHES; k += 3) CHECK_EQ(pyccl_state_cancel(c.engine[1], k), PYCCL_OK);
    CHECK_EQ(pyccl_state_cancel(c.engine[1], 0), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_state_cancel(c.engine[1], FETCHES), PYCCL_ERR_ARGUMENT);
    epoch.rank = 0;
    CHECK_EQ(pyccl_engine_epoch(c.engine[0], &epoch, NULL, 0), PYCCL_OK);
    pyccl_event event;
    for (uint32_t left = FETCHES - FETCHES / 3; left > 0; left--) {
        CHECK(await_event(c.engine[1], PYCCL_EVENT_STATE, &event));
        CHECK_EQ(event.code, PYCCL_OK);
        CHECK(event.value % 3 != 0);
    }
    for (uint64_t k = 0; k < FETCHES; k++)
        CHECK(memcmp(copy + k * SIZE, k % 3 == 0 ? nothing : source + k * SIZE, SIZE) == 0);
    CHECK_EQ(pyccl_state_cancel(c.engine[1], 1), PYCCL_ERR_ARGUMENT); /* it has ended */
    CHECK_EQ(pyccl_state_unpublish(c.engine[0], 7), PYCCL_OK);
    free(source);
    free(copy);
    cluster_close(&c);
}

TEST(engine_fetches_end_when_the_peer_or_the_epoch_ends) {
    cluster c;
    cluster_open(&c, 3, 1, OVER_TCP);
    uint8_t copy[64];
    pyccl_event event;
    kill_conn(&c, 0, 1, 0);
    CHECK(await_event(c.engine[0], PYCCL_EVENT_CONN_DOWN, NULL));
    CHECK_EQ(pyccl_state_fetch(c.engine[0], c.slot[0][1], 1, 0, 64, copy, 1), PYCCL_OK);
    CHECK(await_event(c.engine[0], PYCCL_EVENT_STATE, &event));
    CHECK_EQ(event.code, PYCCL_ERR_PEER_LOST);
    CHECK_EQ(pyccl_state_fetch(c.engine[0], 77, 1, 0, 64, copy, 1), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_state_fetch(c.engine[0], c.slot[0][2], 1, 0, 0, copy, 1), PYCCL_ERR_ARGUMENT);
    cluster_close(&c);
}

TEST(engine_refuses_arguments_it_can_not_obey) {
    cluster c;
    cluster_open(&c, 2, 1, OVER_TCP);
    int32_t x[8] = {0};
    pyccl_op *op;
    pyccl_op_args good = {.spec = reduce_spec(PYCCL_INT32, PYCCL_SUM, 4, 0), .src = x, .dst = x, .weight = 1, .timeout_ns = SECOND};
    good.spec.algorithm = PYCCL_DIRECT;
    pyccl_op_args args = good;
    args.spec.op = PYCCL_AVG;
    CHECK_EQ(pyccl_op_submit(c.engine[0], &args, &op), PYCCL_ERR_ARGUMENT);
    args = good, args.timeout_ns = 0;
    CHECK_EQ(pyccl_op_submit(c.engine[0], &args, &op), PYCCL_ERR_ARGUMENT);
    args = good, args.dst = x + 1;
    CHECK_EQ(pyccl_op_submit(c.engine[0], &args, &op), PYCCL_ERR_ARGUMENT);
    args = good, args.src = NULL;
    CHECK_EQ(pyccl_op_submit(c.engine[0], &args, &op), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_engine_conn_add(c.engine[0], 55, dup(0)), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_engine_conn_add(c.engine[0], c.slot[0][1], -1), PYCCL_ERR_OS);
    pyccl_engine_stop(c.engine[0], PYCCL_ERR_CLOSED);
    pyccl_engine_stop(c.engine[0], PYCCL_ERR_CLOSED);
    CHECK_EQ(pyccl_op_submit(c.engine[0], &good, &op), PYCCL_ERR_CLOSED);
    CHECK(op == NULL);
    cluster_close(&c);
}
