/* test_engine_scatter.c: reduce_scatter between engines, direct and in a ring: everybody keeps its own rows.
 * Spec: proto/wire.md 3.3, 3.4 */
#include "engine_vectors.h"

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
        args.spec.retry = 1;
        REQUIRE(pyccl_op_submit(c->engine[i], &args, &ops[i]) == PYCCL_OK);
    }
    for (uint32_t i = 0; i < c->count; i++) {
        const uint64_t start = row_of_rank(rows, c->count, i), mine = row_of_rank(rows, c->count, i + 1) - start;
        CHECK_EQ(pyccl_op_wait(ops[i], PATIENCE), PYCCL_OK);
        uint8_t *want = expected_part(&spec, &v, weights, c->plan, i, start * row, mine * row);
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

static void scatter_suite(uint32_t world, wire how, uint8_t algorithm) {
    static const struct { uint64_t rows, row; } shapes[] = {{0, 1}, {1, 5}, {2, 1}, {7, 3}, {1001, 1}, {5, LONG(80001)}};
    static const double weights[] = {0.5, 2, 0, 1, 1};
    uint64_t seed = test_seed() + world;
    drawn_plan drawn;
    cluster c;
    cluster_open(&c, world, 2, how);
    plan_draw(&drawn, &seed, world); /* shares are cut by rows, whatever it says of them */
    c.plan = &drawn.plan;
    cluster_epoch(&c, 1);
    for (uint8_t dtype = PYCCL_INT32; dtype <= PYCCL_BFLOAT16; dtype += DTYPE_STEP)
        for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++)
            for (uint8_t op = PYCCL_SUM; op <= LAST_OP; op++) {
                if (op == PYCCL_AVG && !is_float(dtype)) continue;
                check_scatter(&c, scatter_spec(algorithm, dtype, op, shapes[k].rows, shapes[k].row), shapes[k].rows, shapes[k].row,
                              op == PYCCL_AVG && k % 2 ? weights : NULL, (int)(k + op) % 2);
            }
    for (size_t k = 0; k < sizeof shapes / sizeof *shapes; k++)
        for (uint8_t op = PYCCL_SUM; op <= PYCCL_AVG; op++) {
            pyccl_spec spec = scatter_spec(algorithm, op == PYCCL_SUM ? PYCCL_FLOAT32 : PYCCL_BFLOAT16, op, shapes[k].rows, shapes[k].row);
            spec.codec = PYCCL_CODEC_UINT8;
            spec.block = k % 2 ? 64 : 4096;
            check_scatter(&c, spec, shapes[k].rows, shapes[k].row, op == PYCCL_AVG && k % 2 ? weights : NULL, (int)k % 2);
        }
    cluster_close(&c);
}

TEST(engine_scatter_by_two) { scatter_suite(2, OVER_TCP, PYCCL_DIRECT); }
TEST(engine_scatter_by_three) { scatter_suite(3, OVER_UNIX, PYCCL_DIRECT); }
TEST(engine_scatter_by_five) { scatter_suite(5, OVER_TCP, PYCCL_DIRECT); }
TEST(engine_scatter_in_a_ring_of_two) { scatter_suite(2, OVER_UNIX, PYCCL_RING); }
TEST(engine_scatter_in_a_ring_of_three) { scatter_suite(3, OVER_TCP, PYCCL_RING); }
TEST(engine_scatter_in_a_ring_of_five) { scatter_suite(5, OVER_UNIX, PYCCL_RING); }

TEST(engine_scatter_into_too_little_memory_fails_on_all) {
    cluster c;
    cluster_open(&c, 2, 1, OVER_TCP);
    uint8_t in[2][64] = {{0}}, out[2][32];
    const pyccl_spec spec = scatter_spec(PYCCL_DIRECT, PYCCL_UINT8, PYCCL_SUM, 64, 1);
    pyccl_op *a = submit(&c, 0, spec, in[0], out[0], 31), *b = submit(&c, 1, spec, in[1], out[1], 32);
    CHECK_EQ(finish(a), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(finish(b), PYCCL_ERR_ARGUMENT);
    cluster_close(&c);
}

/* Nobody sends more than each owner's part of its input, or in a ring as much of sums: half of what an all_reduce moves.
 * algorithm: AUTO by a plan that wants the ring. */
static void moves_once(uint8_t algorithm) {
    const pyccl_plan plan = {.ring_from_bytes = 32000};
    cluster c;
    cluster_open(&c, 4, 1, OVER_TCP);
    c.plan = &plan;
    cluster_epoch(&c, 1);
    vectors v = vectors_new(PYCCL_INT64, PYCCL_SUM, 4000, 4, 1);
    pyccl_op *ops[4];
    for (uint32_t i = 0; i < 4; i++) {
        const pyccl_op_args args = {.spec = scatter_spec(algorithm, PYCCL_INT64, PYCCL_SUM, 4000, 1), .src = v.in[i], .dst = v.out[i],
                                    .dst_bytes = 8000, .weight = 1, .timeout_ns = PATIENCE};
        REQUIRE(pyccl_op_submit(c.engine[i], &args, &ops[i]) == PYCCL_OK);
    }
    for (uint32_t i = 0; i < 4; i++) {
        pyccl_op_info info;
        CHECK_EQ(pyccl_op_wait(ops[i], PATIENCE), PYCCL_OK);
        pyccl_op_info_get(ops[i], &info);
        CHECK(info.tx_bytes == 24000 && info.rx_bytes == 24000 && info.algorithm == (algorithm == PYCCL_DIRECT ? PYCCL_DIRECT : PYCCL_RING));
        CHECK(memcmp(v.out[i], v.want + i * 8000, 8000) == 0);
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
    }
    vectors_free(&v);
    cluster_close(&c);
}

TEST(engine_scatter_moves_each_input_once) { moves_once(PYCCL_DIRECT); }
TEST(engine_scatter_by_a_plan_moves_each_sum_once_round_the_ring) { moves_once(PYCCL_AUTO); }

/* Without the last member, which is lost while the second has not begun: so they can't have ended it. Integers: in any order. */
static void survives(uint32_t world, uint8_t algorithm) {
    cluster c;
    cluster_open(&c, world, 2, OVER_TCP);
    const uint64_t count = LONG(UINT64_C(3000001));
    const pyccl_spec spec = scatter_spec(algorithm, PYCCL_INT64, PYCCL_SUM, count, 1);
    vectors v = vectors_new(PYCCL_INT64, PYCCL_SUM, count, world, 5), rest = vectors_new(PYCCL_INT64, PYCCL_SUM, count, world - 1, 5);
    pyccl_op *ops[ENGINES_MAX];
    for (uint32_t i = 0; i < world; i++)
        if (i != 1) ops[i] = submit(&c, i, spec, v.in[i], NULL, 0);
    await_bytes(&c, 0, world - 1, 1 << 20);
    pyccl_engine_stop(c.engine[world - 1], PYCCL_ERR_CLOSED);
    c.alive[world - 1] = 0;
    ops[1] = submit(&c, 1, spec, v.in[1], NULL, 0);
    for (uint32_t i = 0; i < world - 1; i++) {
        size_t reported = 0;
        CHECK_EQ(pyccl_engine_freeze(c.engine[i], NULL, 0, &reported), PYCCL_OK);
    }
    cluster_epoch(&c, 0);
    for (uint32_t i = 0; i < world - 1; i++) {
        pyccl_op_info info;
        CHECK_EQ(pyccl_op_wait(ops[i], PATIENCE), PYCCL_OK);
        pyccl_op_info_get(ops[i], &info);
        CHECK(info.attempts == 2 && info.world == world - 1);
        CHECK_EQ(info.algorithm, world - 1 > 2 ? algorithm : PYCCL_DIRECT);
        const uint64_t start = row_of_rank(count, world - 1, i) * 8, bytes = row_of_rank(count, world - 1, i + 1) * 8 - start;
        CHECK_EQ(pyccl_op_take(ops[i], v.out[i], bytes), PYCCL_OK);
        CHECK(memcmp(v.out[i], rest.want + start, bytes) == 0);
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
    }
    CHECK(finish(ops[world - 1]) < 0);
    vectors_free(&v);
    vectors_free(&rest);
    cluster_close(&c);
}

TEST(engine_scatter_is_cut_anew_among_the_survivors) { survives(3, PYCCL_DIRECT); }
TEST(engine_scatter_in_a_ring_is_cut_anew_among_the_survivors) { survives(4, PYCCL_RING); }
TEST(engine_scatter_of_the_two_that_a_ring_left) { survives(3, PYCCL_RING); }

/* Sums that went on, too. */
static void repeats(uint32_t world, uint8_t algorithm) {
    cluster c;
    cluster_open(&c, world, 3, OVER_TCP);
    const uint64_t share = LONG(UINT64_C(3000000)), bytes = share * 8;
    vectors v = vectors_new(PYCCL_INT64, PYCCL_SUM, share * world, world, 6);
    pyccl_op *ops[ENGINES_MAX];
    for (uint32_t i = 0; i < world; i++)
        ops[i] = submit(&c, i, scatter_spec(algorithm, PYCCL_INT64, PYCCL_SUM, share * world, 1), v.in[i], NULL, 0);
    for (uint32_t k = 0; k < 2; k++) {
        await_bytes(&c, 0, world - 1, (k + 1) * bytes / 4);
        for (uint32_t i = 0; i < world; i++) kill_conn(&c, i, (i + 1) % world, k);
    }
    for (uint32_t i = 0; i < world; i++) {
        CHECK_EQ(pyccl_op_wait(ops[i], PATIENCE), PYCCL_OK);
        CHECK_EQ(pyccl_op_take(ops[i], v.out[i], bytes), PYCCL_OK);
        CHECK(memcmp(v.out[i], v.want + i * bytes, bytes) == 0);
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
    }
    vectors_free(&v);
    cluster_close(&c);
}

TEST(engine_scatter_repeats_what_connections_lost) { repeats(3, PYCCL_DIRECT); }
TEST(engine_scatter_in_a_ring_repeats_what_connections_lost) { repeats(4, PYCCL_RING); }
