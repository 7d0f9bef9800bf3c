/* test_engine_values.c: what collectives between engines compute: every kind, dtype, op, codec and weight. */
#include <math.h>

#include "engine_vectors.h"

static void all_reduce_suite(uint32_t world, wire how) {
    static const uint8_t dtypes[] = {PYCCL_INT32, PYCCL_INT64, PYCCL_FLOAT32, PYCCL_FLOAT64};
    static const uint64_t counts[] = {1, 7, 1001, 300001};
    cluster c;
    cluster_open(&c, world, 2, how);
    for (size_t d = 0; d < sizeof dtypes; d++)
        for (uint8_t op = PYCCL_SUM; op <= LAST_OP; op++) {
            if (op == PYCCL_AVG && dtypes[d] <= PYCCL_INT64) continue;
            for (size_t k = 0; k < sizeof counts / sizeof *counts; k++) check_all_reduce(&c, dtypes[d], op, counts[k], (k + op) % 2);
        }
    check_all_reduce(&c, PYCCL_FLOAT32, PYCCL_SUM, 0, 0);
    check_all_reduce(&c, PYCCL_FLOAT32, PYCCL_AVG, LONG(3000017), 0);
    check_all_reduce(&c, PYCCL_FLOAT32, PYCCL_AVG, LONG(3000017), 1);
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

static void dtypes_suite(uint32_t world) {
    cluster c;
    cluster_open(&c, world, 2, OVER_TCP);
    for (uint8_t dtype = PYCCL_INT32; dtype <= PYCCL_BFLOAT16; dtype += DTYPE_STEP)
        for (uint8_t op = PYCCL_SUM; op <= LAST_OP; op++) {
            if (op == PYCCL_AVG && !is_float(dtype)) continue;
            check_any(&c, reduce_spec(dtype, op, 1003, 0), NULL, op % 2);
            check_any(&c, reduce_spec(dtype, op, 300011, 0), NULL, !(op % 2));
        }
    cluster_close(&c);
}

TEST(engine_all_reduce_of_every_dtype_by_two) { dtypes_suite(2); }
TEST(engine_all_reduce_of_every_dtype_by_three) { dtypes_suite(3); }

static const uint8_t CODECS[] = {PYCCL_CODEC_UINT8, PYCCL_CODEC_INT8, PYCCL_CODEC_FP8_E4M3, PYCCL_CODEC_FP4_E3M0, PYCCL_CODEC_BFLOAT16};
enum { CODEC_COUNT = sizeof CODECS / sizeof *CODECS };

/* Every codec with every dtype and op, and with most counts and blocks. */
static void codec_suite(uint32_t world, wire how) {
    static const uint8_t dtypes[] = {PYCCL_FLOAT16, PYCCL_BFLOAT16, PYCCL_FLOAT32, PYCCL_FLOAT64};
    static const uint32_t blocks[] = {64, 4096, 65536};
    static const uint64_t counts[] = {0, 1, 63, 65, 4097, 200001, 524288 + 4099};
    cluster c;
    cluster_open(&c, world, 2, how);
    for (size_t d = 0; d < sizeof dtypes; d++)
        for (uint8_t op = PYCCL_SUM; op <= LAST_OP; op++)
            for (size_t k = 0; k < sizeof counts / sizeof *counts; k++) {
                pyccl_spec spec = reduce_spec(dtypes[d], op, counts[k], 0);
                spec.codec = CODECS[(k + op + 2 * d) % CODEC_COUNT];
                spec.block = blocks[(k + op + d) % 3];
                check_any(&c, spec, NULL, (int)(k + op + d) / 3 % 2);
            }
    cluster_close(&c);
}

TEST(engine_codec_rounds_once_by_two) { codec_suite(2, OVER_TCP); }
TEST(engine_codec_rounds_twice_by_three) { codec_suite(3, OVER_UNIX); }
TEST(engine_codec_rounds_twice_by_five) { codec_suite(5, OVER_TCP); }

TEST(engine_codec_counts_encoded_bytes) {
    static const uint64_t block_bytes[CODEC_COUNT] = {4096 + 8, 4096 + 4, 4096 + 4, 2048 + 4, 8192};
    for (uint32_t world = 2; world <= 3; world++) {
        cluster c;
        cluster_open(&c, world, 1, OVER_TCP);
        for (size_t k = 0; k < CODEC_COUNT; k++) {
            pyccl_spec spec = reduce_spec(PYCCL_FLOAT32, PYCCL_AVG, 3 * 4096 * 10, 0);
            spec.codec = CODECS[k];
            spec.block = 4096;
            vectors v = vectors_any(&spec, NULL, world, 1);
            pyccl_op *ops[3];
            for (uint32_t i = 0; i < world; i++) ops[i] = submit(&c, i, spec, v.in[i], v.out[i], 0);
            for (uint32_t i = 0; i < world; i++) {
                pyccl_op_info info;
                CHECK_EQ(pyccl_op_wait(ops[i], PATIENCE), PYCCL_OK);
                pyccl_op_info_get(ops[i], &info);
                const uint64_t vector = 30 * block_bytes[k], moved = world == 2 ? vector : vector / 3 * 4;
                CHECK_EQ(info.tx_bytes, moved);
                CHECK_EQ(info.rx_bytes, moved);
                CHECK_EQ(finish(ops[i]), PYCCL_OK);
            }
            vectors_free(&v);
        }
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
                coded.codec = CODECS[k + count % 2];
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
