/* test_engine_scatter.c: reduce_scatter between engines: everybody keeps its own rows. Spec: proto/wire.md 3.3, 3.4 */
#include "engine_vectors.h"

static pyccl_spec scatter_spec(uint8_t dtype, uint8_t op, uint64_t rows, uint64_t row) {
    pyccl_spec spec = {.kind = PYCCL_REDUCE_SCATTER, .dtype = dtype, .op = op, .count = rows * row};
    for (int i = 0; i < 8; i++) spec.root[i] = (uint8_t)(row >> (8 * i));
    return spec;
}

static uint64_t row_of_rank(uint64_t rows, uint32_t world, uint32_t rank) {
    return rank * (rows / world) + (rank < rows % world ? rank : rows % world);
}

/* What all_reduce would give, one rounding less: a share is encoded for its owner alone, from its first element on. */
static uint8_t *expected_part(const pyccl_spec *spec, const vectors *v, const double *weights, uint64_t start, uint64_t count) {
    const uint64_t size = pyccl_dtype_size(spec->dtype);
    uint8_t *out = malloc(count * size + 1), *codes = malloc(count * 2 + 4096);
    const void *in[ENGINES_MAX];
    float *wide[ENGINES_MAX];
    for (uint32_t i = 0; i < v->world; i++) in[i] = v->in[i] + start * size;
    if (spec->codec == 0) {
        REQUIRE(pyccl_reduce(spec->dtype, spec->op, in, weights, v->world, count, out) == PYCCL_OK);
        free(codes);
        return out;
    }
    for (uint32_t i = 0; i < v->world; i++) {
        wide[i] = malloc(count * sizeof(float) + 1);
        REQUIRE(pyccl_codec_encode(spec->codec, spec->dtype, spec->block, in[i], count, codes) == PYCCL_OK);
        REQUIRE(pyccl_codec_decode(spec->codec, PYCCL_FLOAT32, spec->block, codes, count, wide[i]) == PYCCL_OK);
    }
    REQUIRE(pyccl_reduce(PYCCL_FLOAT32, spec->op, (const void *const *)wide, weights, v->world, count, wide[0]) == PYCCL_OK);
    for (uint64_t i = 0; i < count; i++) {
        if (spec->dtype == PYCCL_FLOAT32) ((float *)(void *)out)[i] = wide[0][i];
        if (spec->dtype == PYCCL_BFLOAT16) ((uint16_t *)(void *)out)[i] = bf16_from_f32(wide[0][i]);
    }
    for (uint32_t i = 0; i < v->world; i++) free(wide[i]);
    free(codes);
    return out;
}

/* kept: the engine keeps the part until it is taken. */
static void check_scatter(const cluster *c, pyccl_spec spec, uint64_t rows, uint64_t row, const double *weights, int kept) {
    const uint64_t size = row * pyccl_dtype_size(spec.dtype);
    pyccl_spec inputs = spec;
    inputs.kind = PYCCL_ALL_REDUCE;
    inputs.codec = 0;
    inputs.op = PYCCL_MAX;
    vectors v = vectors_any(&inputs, NULL, c->count, rows + row), same = vectors_any(&inputs, NULL, c->count, rows + row);
    pyccl_op *ops[ENGINES_MAX];
    for (uint32_t i = 0; i < c->count; i++) {
        const uint64_t bytes = (row_of_rank(rows, c->count, i + 1) - row_of_rank(rows, c->count, i)) * size;
        pyccl_op_args args = {.spec = spec, .src = v.in[i], .dst = kept ? NULL : v.out[i], .dst_bytes = bytes,
                              .weight = weights != NULL ? weights[i] : 1, .timeout_ns = PATIENCE};
        args.spec.algorithm = PYCCL_DIRECT;
        args.spec.retry = 1;
        REQUIRE(pyccl_op_submit(c->engine[i], &args, &ops[i]) == PYCCL_OK);
    }
    for (uint32_t i = 0; i < c->count; i++) {
        const uint64_t start = row_of_rank(rows, c->count, i), mine = row_of_rank(rows, c->count, i + 1) - start;
        CHECK_EQ(pyccl_op_wait(ops[i], PATIENCE), PYCCL_OK);
        uint8_t *want = expected_part(&spec, &v, weights, start * row, mine * row);
        if (kept && mine > 0) {
            CHECK_EQ(pyccl_op_take(ops[i], v.out[i], mine * size - 1), PYCCL_ERR_ARGUMENT);
            CHECK_EQ(pyccl_op_take(ops[i], v.out[i], mine * size), PYCCL_OK);
        }
        CHECK(memcmp(v.out[i], want, mine * size) == 0);
        CHECK(v.out[i][mine * size] == 0xEE);
        CHECK(memcmp(v.in[i], same.in[i], v.bytes) == 0);
        free(want);
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
    }
    vectors_free(&v);
    vectors_free(&same);
}

static void scatter_suite(uint32_t world, wire how) {
    static const struct { uint64_t rows, row; } shapes[] = {{0, 1}, {1, 5}, {2, 1}, {7, 3}, {1001, 1}, {5, 80001}};
    static const double weights[] = {0.5, 2, 0, 1, 1};
    cluster c;
    cluster_open(&c, world, 2, how);
    for (uint8_t dtype = PYCCL_INT32; dtype <= PYCCL_BFLOAT16; dtype++)
        for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++)
            for (uint8_t op = PYCCL_SUM; op <= LAST_OP; op++) {
                if (op == PYCCL_AVG && !is_float(dtype)) continue;
                check_scatter(&c, scatter_spec(dtype, op, shapes[k].rows, shapes[k].row), shapes[k].rows, shapes[k].row,
                              op == PYCCL_AVG && k % 2 ? weights : NULL, (int)(k + op) % 2);
            }
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++)
        for (uint8_t op = PYCCL_SUM; op <= PYCCL_AVG; op++) {
            pyccl_spec spec = scatter_spec(op == PYCCL_SUM ? PYCCL_FLOAT32 : PYCCL_BFLOAT16, op, shapes[k].rows, shapes[k].row);
            spec.codec = PYCCL_CODEC_UINT8;
            spec.block = k % 2 ? 64 : 4096;
            check_scatter(&c, spec, shapes[k].rows, shapes[k].row, op == PYCCL_AVG && k % 2 ? weights : NULL, (int)k % 2);
        }
    cluster_close(&c);
}

TEST(engine_scatter_by_two) { scatter_suite(2, OVER_TCP); }
TEST(engine_scatter_by_three) { scatter_suite(3, OVER_UNIX); }
TEST(engine_scatter_by_five) { scatter_suite(5, OVER_TCP); }

TEST(engine_scatter_into_too_little_memory_fails_on_all) {
    cluster c;
    cluster_open(&c, 2, 1, OVER_TCP);
    uint8_t in[2][64] = {{0}}, out[2][32];
    const pyccl_spec spec = scatter_spec(PYCCL_UINT8, PYCCL_SUM, 64, 1);
    pyccl_op *a = submit(&c, 0, spec, in[0], out[0], 31), *b = submit(&c, 1, spec, in[1], out[1], 32);
    CHECK_EQ(finish(a), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(finish(b), PYCCL_ERR_ARGUMENT);
    cluster_close(&c);
}

/* Nobody sends more than each owner's part of its input: half of what an all_reduce moves. */
TEST(engine_scatter_moves_each_input_once) {
    cluster c;
    cluster_open(&c, 4, 1, OVER_TCP);
    vectors v = vectors_new(PYCCL_INT64, PYCCL_SUM, 4000, 4, 1);
    pyccl_op *ops[4];
    for (uint32_t i = 0; i < 4; i++) ops[i] = submit(&c, i, scatter_spec(PYCCL_INT64, PYCCL_SUM, 4000, 1), v.in[i], v.out[i], 8000);
    for (uint32_t i = 0; i < 4; i++) {
        pyccl_op_info info;
        CHECK_EQ(pyccl_op_wait(ops[i], PATIENCE), PYCCL_OK);
        pyccl_op_info_get(ops[i], &info);
        CHECK(info.tx_bytes == 24000 && info.rx_bytes == 24000 && info.algorithm == PYCCL_DIRECT);
        CHECK(memcmp(v.out[i], v.want + i * 8000, 8000) == 0);
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
    }
    vectors_free(&v);
    cluster_close(&c);
}

TEST(engine_scatter_is_cut_anew_among_the_survivors) {
    cluster c;
    cluster_open(&c, 3, 2, OVER_TCP);
    const uint64_t count = LONG(UINT64_C(6000001));
    vectors v = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, count, 3, 5), rest = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, count, 2, 5);
    pyccl_op *ops[3];
    for (uint32_t i = 0; i < 3; i += 2) ops[i] = submit(&c, i, scatter_spec(PYCCL_FLOAT32, PYCCL_SUM, count, 1), v.in[i], NULL, 0);
    await_bytes(&c, 0, 2, 1 << 20);
    pyccl_engine_stop(c.engine[2], PYCCL_ERR_CLOSED);
    c.alive[2] = 0;
    ops[1] = submit(&c, 1, scatter_spec(PYCCL_FLOAT32, PYCCL_SUM, count, 1), v.in[1], NULL, 0); /* late: three can't end it */
    for (uint32_t i = 0; i < 2; i++) {
        size_t reported = 0;
        CHECK_EQ(pyccl_engine_freeze(c.engine[i], NULL, 0, &reported), PYCCL_OK);
    }
    cluster_epoch(&c, 0);
    const uint64_t half = row_of_rank(count, 2, 1);
    for (uint32_t i = 0; i < 2; i++) {
        pyccl_op_info info;
        CHECK_EQ(pyccl_op_wait(ops[i], PATIENCE), PYCCL_OK);
        pyccl_op_info_get(ops[i], &info);
        CHECK(info.attempts == 2 && info.world == 2);
        const uint64_t bytes = (i == 0 ? half : count - half) * 4;
        CHECK_EQ(pyccl_op_take(ops[i], v.out[i], bytes), PYCCL_OK);
        CHECK(memcmp(v.out[i], rest.want + (i == 0 ? 0 : half * 4), bytes) == 0);
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
    }
    CHECK(finish(ops[2]) < 0);
    vectors_free(&v);
    vectors_free(&rest);
    cluster_close(&c);
}

TEST(engine_scatter_repeats_what_connections_lost) {
    cluster c;
    cluster_open(&c, 3, 3, OVER_TCP);
    const uint64_t count = LONG(UINT64_C(9000000));
    vectors v = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, count, 3, 6);
    pyccl_op *ops[3];
    for (uint32_t i = 0; i < 3; i++) ops[i] = submit(&c, i, scatter_spec(PYCCL_FLOAT32, PYCCL_SUM, count, 1), v.in[i], NULL, 0);
    for (uint32_t k = 0; k < 2; k++) {
        await_bytes(&c, 0, 1, (k + 1) * v.bytes / 12);
        kill_conn(&c, 0, 1, k);
        kill_conn(&c, 2, 0, k);
    }
    for (uint32_t i = 0; i < 3; i++) {
        CHECK_EQ(pyccl_op_wait(ops[i], PATIENCE), PYCCL_OK);
        CHECK_EQ(pyccl_op_take(ops[i], v.out[i], v.bytes / 3), PYCCL_OK);
        CHECK(memcmp(v.out[i], v.want + i * (v.bytes / 3), v.bytes / 3) == 0);
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
    }
    vectors_free(&v);
    cluster_close(&c);
}
