/* test_engine_guard.c: guarded reductions between engines: who contributes what is refused fails the operation on all,
 * under the same name, inputs restored. First members that look at their own input, then one that lies, which the test
 * plays frame by frame. Spec: proto/wire.md 3.8 */
#include <float.h>
#include <math.h>

#include "engine_vectors.h"

#define COUNT 30011

static void set_limits(pyccl_spec *spec, float peak, float norm) {
    spec->guard = 1;
    memcpy(spec->root + 8, &peak, 4);
    memcpy(spec->root + 12, &norm, 4);
}

static pyccl_spec guarded(uint8_t dtype, uint8_t op, uint64_t count, float peak, float norm) {
    pyccl_spec spec = reduce_spec(dtype, op, count, 0);
    set_limits(&spec, peak, norm);
    return spec;
}

static void put_float(uint8_t dtype, void *array, uint64_t i, double x) {
    if (dtype == PYCCL_FLOAT16) ((uint16_t *)array)[i] = f16_from_f32((float)x);
    else if (dtype == PYCCL_BFLOAT16) ((uint16_t *)array)[i] = bf16_from_f32((float)x);
    else if (dtype == PYCCL_FLOAT32) ((float *)array)[i] = (float)x;
    else ((double *)array)[i] = x;
}

/* Every member's numbers are 0.5, but for what the caller puts among them. */
static void inputs(uint8_t *in[ENGINES_MAX], uint32_t world, uint8_t dtype) {
    for (uint32_t i = 0; i < world; i++) {
        in[i] = malloc(COUNT * pyccl_dtype_size(dtype));
        for (uint64_t k = 0; k < COUNT; k++) put_float(dtype, in[i], k, 0.5);
    }
}

/* status, and whom all name: a member, or -1. In place: afterwards inputs are as they were. */
static void check_refused(const cluster *c, pyccl_spec spec, uint8_t *in[ENGINES_MAX], int culprit) {
    const uint64_t bytes = spec.count * pyccl_dtype_size(spec.dtype);
    pyccl_op *ops[ENGINES_MAX];
    uint8_t *before[ENGINES_MAX], *out[ENGINES_MAX];
    for (uint32_t i = 0; i < c->count; i++) {
        before[i] = copied(in[i], bytes);
        out[i] = spec.kind == PYCCL_REDUCE_SCATTER ? malloc(bytes) : in[i];
        ops[i] = submit(c, i, spec, in[i], out[i], bytes);
    }
    for (uint32_t i = 0; i < c->count; i++) {
        pyccl_op_info info;
        CHECK_EQ(pyccl_op_wait(ops[i], PATIENCE), PYCCL_ERR_POISON);
        pyccl_op_info_get(ops[i], &info);
        CHECK_EQ(info.peer[0], culprit < 0 ? 0 : c->id[culprit][0]);
        CHECK(memcmp(in[i], before[i], bytes) == 0);
        pyccl_op_free(ops[i]);
        free(before[i]);
        if (out[i] != in[i]) free(out[i]);
    }
}

static void check_passes(const cluster *c, pyccl_spec spec, uint8_t *in[ENGINES_MAX]) {
    const uint64_t bytes = spec.count * pyccl_dtype_size(spec.dtype);
    pyccl_op *ops[ENGINES_MAX];
    uint8_t *out[ENGINES_MAX], *plain[ENGINES_MAX];
    for (int with = 1; with >= 0; with--) {
        if (!with) {
            spec.guard = 0;
            memset(spec.root + 8, 0, 8);
        }
        uint8_t **results = with ? out : plain;
        for (uint32_t i = 0; i < c->count; i++) {
            results[i] = calloc(bytes + 1, 1);
            ops[i] = submit(c, i, spec, in[i], results[i], bytes);
        }
        for (uint32_t i = 0; i < c->count; i++) CHECK_EQ(finish(ops[i]), PYCCL_OK);
    }
    for (uint32_t i = 0; i < c->count; i++) {
        CHECK(memcmp(out[i], plain[i], bytes) == 0);
        free(out[i]);
        free(plain[i]);
    }
}

static void free_all(uint8_t *in[ENGINES_MAX], uint32_t world) {
    for (uint32_t i = 0; i < world; i++) free(in[i]);
}

static void own_input_suite(uint32_t world, wire how) {
    static const double bad[] = {NAN, INFINITY, -INFINITY};
    static const uint8_t dtypes[] = {PYCCL_FLOAT16, PYCCL_BFLOAT16, PYCCL_FLOAT32, PYCCL_FLOAT64};
    cluster c;
    cluster_open(&c, world, 2, how);
    for (size_t d = 0; d < sizeof dtypes; d++) {
        uint8_t *in[ENGINES_MAX];
        pyccl_spec scatter = guarded(dtypes[d], PYCCL_SUM, COUNT, 0, 0);
        scatter.kind = PYCCL_REDUCE_SCATTER;
        scatter.root[0] = 1;
        inputs(in, world, dtypes[d]);
        check_passes(&c, guarded(dtypes[d], PYCCL_SUM, COUNT, 0, 0), in);
        check_passes(&c, guarded(dtypes[d], PYCCL_AVG, COUNT, 0.5f, 0.5f * 173.3f), in); /* the norm is 0.5 * 173.24 */
        check_passes(&c, scatter, in);
        for (size_t b = 0; b < sizeof bad / sizeof *bad; b++) {
            put_float(dtypes[d], in[world - 1], b * COUNT / 3 + 1, bad[b]); /* in each third */
            check_refused(&c, guarded(dtypes[d], PYCCL_SUM, COUNT, 0, 0), in, (int)world - 1);
            check_refused(&c, scatter, in, (int)world - 1);
            put_float(dtypes[d], in[0], 5, NAN); /* two of them: the lower rank is named */
            check_refused(&c, guarded(dtypes[d], PYCCL_MAX, COUNT, 0, 0), in, 0);
            put_float(dtypes[d], in[0], 5, 0.5);
            put_float(dtypes[d], in[world - 1], b * COUNT / 3 + 1, 0.5);
        }
        put_float(dtypes[d], in[1], COUNT - 1, -0.75);
        check_refused(&c, guarded(dtypes[d], PYCCL_SUM, COUNT, 0.5f, 0), in, 1);
        put_float(dtypes[d], in[1], COUNT - 1, 64);
        check_refused(&c, guarded(dtypes[d], PYCCL_AVG, COUNT, 0, 100), in, 1);
        check_passes(&c, guarded(dtypes[d], PYCCL_AVG, COUNT, 64, 120), in);
        free_all(in, world);
    }
    cluster_close(&c);
}

TEST(engine_guard_refuses_inputs_of_two) { own_input_suite(2, OVER_TCP); }
TEST(engine_guard_refuses_inputs_of_three) { own_input_suite(3, OVER_UNIX); }
TEST(engine_guard_refuses_inputs_over_sealed_links) { own_input_suite(3, SEALED_TCP); }

TEST(engine_guard_takes_only_floats_and_direct_reductions) {
    cluster c;
    cluster_open(&c, 2, 1, OVER_UNIX);
    float x[16] = {0};
    pyccl_spec wrong[4] = {guarded(PYCCL_INT32, PYCCL_SUM, 16, 0, 0), guarded(PYCCL_FLOAT32, PYCCL_SUM, 16, -1, 0),
                           guarded(PYCCL_FLOAT32, PYCCL_SUM, 16, 0, 0), guarded(PYCCL_FLOAT32, 0, 16, 0, 0)};
    for (int i = 0; i < 4; i++) wrong[i].algorithm = i == 2 ? PYCCL_RING : PYCCL_DIRECT;
    wrong[3].kind = PYCCL_ALL_GATHER;
    for (int i = 0; i < 4; i++) {
        const pyccl_op_args args = {.spec = wrong[i], .src = x, .dst = x, .weight = 1, .timeout_ns = SECOND};
        pyccl_op *op;
        CHECK_EQ(pyccl_op_submit(c.engine[0], &args, &op), PYCCL_ERR_ARGUMENT);
    }
    cluster_close(&c);
}

TEST(engine_guard_names_nobody_where_finite_numbers_add_up_to_infinity) {
    for (uint32_t world = 2; world <= 3; world++) {
        cluster c;
        uint8_t *in[ENGINES_MAX];
        cluster_open(&c, world, 2, OVER_TCP);
        inputs(in, world, PYCCL_FLOAT32);
        for (uint32_t i = 0; i < world; i++) put_float(PYCCL_FLOAT32, in[i], COUNT / 2, (double)FLT_MAX);
        check_refused(&c, guarded(PYCCL_FLOAT32, PYCCL_SUM, COUNT, 0, 0), in, -1);
        check_passes(&c, guarded(PYCCL_FLOAT32, PYCCL_MAX, COUNT, 0, 0), in);
        cluster_close(&c);
        free_all(in, world);
    }
}

/* What counts is what the codes decode to. */
TEST(engine_guard_refuses_what_a_codec_rounds_beyond_a_limit) {
    for (uint32_t world = 2; world <= 3; world++)
        for (uint64_t at = 7; at < COUNT; at += COUNT / 3) { /* in everybody's share, the contributor's own too */
            cluster c;
            uint8_t *in[ENGINES_MAX];
            cluster_open(&c, world, 2, OVER_UNIX);
            inputs(in, world, PYCCL_FLOAT32);
            pyccl_spec spec = guarded(PYCCL_FLOAT32, PYCCL_AVG, COUNT, 0, 0);
            spec.codec = PYCCL_CODEC_BFLOAT16;
            spec.block = 64;
            check_passes(&c, spec, in);
            put_float(PYCCL_FLOAT32, in[1], at, (double)FLT_MAX); /* bfloat16 has no such number */
            check_refused(&c, spec, in, 1);
            set_limits(&spec, 1.001f, 0);
            put_float(PYCCL_FLOAT32, in[1], at, 1.0009765625); /* 1 */
            check_passes(&c, spec, in);
            put_float(PYCCL_FLOAT32, in[1], at, NAN);
            check_refused(&c, spec, in, 1);
            spec.codec = PYCCL_CODEC_INT8;
            check_refused(&c, spec, in, 1);
            cluster_close(&c);
            free_all(in, world);
        }
}

/* ---- one that lies ---- */

enum { LIED = 3 * 1024, THIRD = LIED / 3 }; /* a piece each */

typedef struct lie {
    uint8_t codec;
    double contributed;              /* one number of what it contributes to each of the others' shares */
    double every;                    /* all others; 0: 0.5 */
    double result;                   /* one number of its own share, as it says it came out */
    uint32_t complaint;              /* of its DONE */
    float peak, norm;
    int named;                       /* -1: nobody; else a member */
} lie;

static void liar_send(int fd, const cluster *c, pyccl_frame frame, const void *payload) {
    uint8_t bytes[PYCCL_FRAME_SIZE];
    frame.epoch_number = c->number;
    memset(&frame.epoch_tag, (int)(0x40 + c->number), sizeof frame.epoch_tag);
    pyccl_frame_encode(&frame, bytes);
    REQUIRE(send(fd, bytes, sizeof bytes, MSG_NOSIGNAL) == (ssize_t)sizeof bytes);
    if (frame.length > 0) REQUIRE(send(fd, payload, frame.length, MSG_NOSIGNAL) == (ssize_t)frame.length);
}

static void liar_data(int fd, const cluster *c, const pyccl_spec *spec, uint8_t phase, const float *x) {
    uint8_t bytes[THIRD * sizeof *x];
    uint32_t length = sizeof bytes;
    if (spec->codec != 0) {
        length = (uint32_t)pyccl_codec_size(spec->codec, spec->block, THIRD);
        REQUIRE(pyccl_codec_encode(spec->codec, PYCCL_FLOAT32, spec->block, x, THIRD, bytes) == PYCCL_OK);
    } else memcpy(bytes, x, sizeof bytes);
    liar_send(fd, c, (pyccl_frame){.type = PYCCL_FRAME_DATA, .phase = phase, .length = length, .spec_hash = pyccl_spec_hash(spec)}, bytes);
}

/* Members 0 and 1 are engines, 2 is the test: it says that its input is all right. */
static void check_lie(const lie *l) {
    cluster c = {0};
    const uint32_t liar = 2;
    float x[2][LIED], before[LIED], contributed[THIRD], result[THIRD];
    int fds[2];
    pyccl_op *ops[2];
    pyccl_spec spec = guarded(PYCCL_FLOAT32, PYCCL_SUM, LIED, l->peak, l->norm);
    spec.algorithm = PYCCL_DIRECT;
    spec.retry = 1;
    spec.codec = l->codec;
    spec.block = l->codec != 0 ? 64 : 0;
    cluster_open_as_it_is(&c, 3, 1, OVER_UNIX, SECOND, 60 * SECOND);
    pyccl_engine_free(c.engine[liar]); /* the test speaks in its place */
    for (uint32_t i = 0; i < 2; i++) {
        int pair[2];
        pyccl_link_stats stats = {.conns = 1};
        while (stats.conns > 0) REQUIRE(pyccl_engine_link_stats(c.engine[i], c.slot[i][liar], &stats) == PYCCL_OK);
        REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
        REQUIRE(pyccl_engine_conn_add(c.engine[i], c.slot[i][liar], pair[0]) == PYCCL_OK);
        fds[i] = pair[1];
    }
    for (int k = 0; k < LIED; k++) x[0][k] = x[1][k] = before[k] = 0.5f;
    for (int k = 0; k < THIRD; k++) {
        contributed[k] = l->every != 0 ? (float)l->every : 0.5f;
        result[k] = 1;
    }
    contributed[99] = (float)l->contributed;
    result[99] = (float)l->result;
    for (uint32_t i = 0; i < 2; i++) ops[i] = submit(&c, i, spec, x[i], x[i], 0);
    for (uint32_t i = 0; i < 2; i++) {
        uint8_t encoded[PYCCL_SPEC_SIZE];
        const double one = 1;
        pyccl_frame open = {.type = PYCCL_FRAME_OPEN, .length = PYCCL_SPEC_SIZE};
        memcpy(&open.offset, &one, sizeof one);
        pyccl_spec_encode(&spec, encoded);
        liar_send(fds[i], &c, open, encoded);
        liar_data(fds[i], &c, &spec, 0, contributed);
        liar_data(fds[i], &c, &spec, 1, result);
        liar_send(fds[i], &c, (pyccl_frame){.type = PYCCL_FRAME_DONE, .offset = l->complaint}, NULL);
    }
    for (uint32_t i = 0; i < 2; i++) {
        pyccl_op_info info;
        CHECK_EQ(pyccl_op_wait(ops[i], PATIENCE), PYCCL_ERR_POISON);
        pyccl_op_info_get(ops[i], &info);
        CHECK_EQ(info.peer[0], l->named < 0 ? 0 : c.id[l->named][0]);
        CHECK(memcmp(x[i], before, sizeof before) == 0);
        pyccl_op_free(ops[i]);
        close(fds[i]);
    }
    c.alive[liar] = 0;
    c.count = 2; /* the rest goes on without it */
    cluster_epoch(&c, 1);
    check_all_reduce(&c, PYCCL_FLOAT32, PYCCL_SUM, 1003, 1);
    for (uint32_t i = 0; i < 2; i++) {
        close(c.raw[i][liar][0]);
        close(c.raw[liar][i][0]);
    }
    cluster_close(&c);
}

TEST(engine_guard_finds_who_contributes_what_it_should_have_refused) {
    static const double bad[] = {NAN, INFINITY, -INFINITY};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) check_lie(&(lie){.contributed = bad[i], .result = 1, .named = 2});
    check_lie(&(lie){.contributed = -0.75, .result = 1, .peak = 0.7f, .named = 2});
    check_lie(&(lie){.contributed = 1, .every = 1, .result = 1, .norm = 30, .named = 2}); /* 32 to each share; ours: 27.7 */
}

TEST(engine_guard_looks_at_what_codes_decode_to) {
    static const uint8_t codecs[] = {PYCCL_CODEC_UINT8, PYCCL_CODEC_INT8, PYCCL_CODEC_FP8_E4M3, PYCCL_CODEC_FP4_E3M0, PYCCL_CODEC_BFLOAT16};
    for (size_t i = 0; i < sizeof codecs; i++) {
        check_lie(&(lie){.codec = codecs[i], .contributed = NAN, .result = 1, .named = 2});
        check_lie(&(lie){.codec = codecs[i], .contributed = 8, .result = 1, .peak = 4, .named = 2});
        check_lie(&(lie){.codec = codecs[i], .contributed = 0.5, .result = NAN, .named = 2});
    }
}

TEST(engine_guard_finds_whose_share_came_out_wrong) {
    check_lie(&(lie){.contributed = 0.5, .result = NAN, .named = 2});
    check_lie(&(lie){.contributed = 0.5, .result = INFINITY, .named = 2});
    check_lie(&(lie){.contributed = 0.5, .result = 1.6, .peak = 0.5f, .named = 2}); /* three numbers of at most 0.5 */
    check_lie(&(lie){.contributed = NAN, .result = NAN, .named = 2});
}

/* It can blame others, as it could before by giving up: a complaint is believed. */
TEST(engine_guard_believes_a_complaint) {
    check_lie(&(lie){.contributed = 0.5, .result = 1, .complaint = 1, .named = 0});
    check_lie(&(lie){.contributed = 0.5, .result = 1, .complaint = PYCCL_CULPRIT_NOBODY, .named = -1});
    check_lie(&(lie){.contributed = 0.5, .result = 1, .complaint = 2 * PYCCL_COMPLAINT_RESULT, .named = 1});
    check_lie(&(lie){.contributed = 0.5, .result = NAN, .complaint = PYCCL_CULPRIT_NOBODY, .named = -1}); /* finite numbers, it says */
}
