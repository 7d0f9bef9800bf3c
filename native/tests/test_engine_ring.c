/* test_engine_ring.c: the ring between engines, under any plan: values, losses, early pieces, and a neighbour that sends
 * anything. Spec: proto/wire.md 3.3, 3.5, 3.7 */
#include "engine_vectors.h"
#include "frame.h"

static pyccl_spec ring_spec(uint8_t dtype, uint8_t op, uint64_t count) {
    pyccl_spec spec = reduce_spec(dtype, op, count, 0);
    spec.algorithm = PYCCL_RING;
    return spec;
}

static void cluster_plan(cluster *c, const pyccl_plan *plan) {
    c->plan = plan;
    cluster_epoch(c, 1);
}

static void values_suite(uint32_t world, wire how) {
    static const uint64_t counts[] = {0, 1, 7, 1003};
    uint64_t seed = test_seed() + world;
    drawn_plan drawn;
    cluster c;
    cluster_open(&c, world, 2, how);
    for (uint8_t dtype = PYCCL_INT32; dtype <= PYCCL_BFLOAT16; dtype += DTYPE_STEP) {
        plan_draw(&drawn, &seed, world);
        cluster_plan(&c, dtype % 3 == 0 ? NULL : &drawn.plan);
        for (uint8_t op = PYCCL_SUM; op <= LAST_OP; op++) {
            if (op == PYCCL_AVG && !is_float(dtype)) continue;
            for (size_t k = 0; k < sizeof counts / sizeof *counts; k++) check_any(&c, ring_spec(dtype, op, counts[k]), NULL, (int)(k + op) % 2);
        }
        check_any(&c, ring_spec(dtype, PYCCL_SUM, LONG(UINT64_C(600011))), NULL, dtype % 2);
    }
    cluster_close(&c);
}

TEST(engine_ring_of_two_swaps) { values_suite(2, OVER_UNIX); }
TEST(engine_ring_of_three_folds_in_its_order) { values_suite(3, OVER_TCP); }
TEST(engine_ring_of_four_folds_in_its_order) { values_suite(4, OVER_UNIX); }
TEST(engine_ring_of_five_folds_in_its_order) { values_suite(5, OVER_TCP); }
TEST(engine_ring_of_six_folds_in_its_order) { values_suite(6, OVER_UNIX); }
TEST(engine_ring_of_seven_folds_in_its_order) { values_suite(7, OVER_TCP); }
TEST(engine_ring_of_eight_folds_in_its_order) { values_suite(8, OVER_UNIX); }

static void codec_suite(uint32_t world) {
    static const uint8_t dtypes[] = {PYCCL_FLOAT16, PYCCL_BFLOAT16, PYCCL_FLOAT32, PYCCL_FLOAT64};
    static const uint32_t blocks[] = {64, 4096, 65536};
    static const uint64_t counts[] = {0, 1, 63, 65, 4097, 300001};
    uint64_t seed = test_seed() + world;
    drawn_plan drawn;
    cluster c;
    cluster_open(&c, world, 2, OVER_TCP);
    for (size_t d = 0; d < sizeof dtypes; d++) {
        plan_draw(&drawn, &seed, world);
        cluster_plan(&c, &drawn.plan);
        for (uint8_t op = PYCCL_SUM; op <= LAST_OP; op++)
            for (size_t k = 0; k < sizeof counts / sizeof *counts; k++) {
                pyccl_spec spec = ring_spec(dtypes[d], op, counts[k]);
                spec.codec = PYCCL_CODEC_UINT8;
                spec.block = blocks[(k + op + d) % 3];
                check_any(&c, spec, NULL, (int)(k + op + d) / 3 % 2);
            }
        pyccl_spec spec = ring_spec(dtypes[d], PYCCL_AVG, LONG(UINT64_C(2000003)));
        spec.codec = PYCCL_CODEC_UINT8;
        spec.block = 1024;
        check_any(&c, spec, NULL, d % 2);
    }
    cluster_close(&c);
}

TEST(engine_ring_codec_rounds_twice_by_three) { codec_suite(3); }
TEST(engine_ring_codec_rounds_twice_by_five) { codec_suite(5); }

TEST(engine_ring_avg_counts_weights) {
    static const double weights[][4] = {{1, 1, 1, 1}, {0.5, 2, 0, 1}, {0, 0, 0.25, 0}, {3, 3, 3, 3}};
    uint64_t seed = test_seed();
    drawn_plan drawn;
    cluster c;
    cluster_open(&c, 4, 2, OVER_TCP);
    plan_draw(&drawn, &seed, 4);
    cluster_plan(&c, &drawn.plan);
    for (size_t k = 0; k < sizeof weights / sizeof *weights; k++)
        for (uint8_t dtype = PYCCL_FLOAT32; dtype <= PYCCL_BFLOAT16; dtype += DTYPE_STEP) {
            if (!is_float(dtype)) continue;
            pyccl_spec spec = ring_spec(dtype, PYCCL_AVG, k % 2 ? 4001 : LONG(UINT64_C(500009)));
            check_any(&c, spec, weights[k], k % 2);
            spec.codec = PYCCL_CODEC_UINT8;
            spec.block = 256;
            check_any(&c, spec, weights[k], k % 2);
        }
    const double none[4] = {0};
    vectors v = vectors_any(&(pyccl_spec){.dtype = PYCCL_FLOAT32, .op = PYCCL_SUM, .count = 100003}, NULL, 4, 8);
    uint8_t *before[4];
    pyccl_op *ops[4];
    for (uint32_t i = 0; i < 4; i++) before[i] = copied(v.in[i], v.bytes);
    for (uint32_t i = 0; i < 4; i++) ops[i] = submit_weighted(&c, i, ring_spec(PYCCL_FLOAT32, PYCCL_AVG, 100003), v.in[i], v.in[i], none[i]);
    for (uint32_t i = 0; i < 4; i++) {
        CHECK_EQ(finish(ops[i]), PYCCL_ERR_ARGUMENT);
        CHECK(memcmp(v.in[i], before[i], v.bytes) == 0);
        free(before[i]);
    }
    vectors_free(&v);
    cluster_close(&c);
}

/* What each sends: of every share but its own a contribution, of every share but the next one's the result. */
TEST(engine_ring_moves_each_share_twice_round_and_says_that_it_ran) {
    for (int coded = 0; coded < 2; coded++) {
        cluster c;
        cluster_open(&c, 4, 1, OVER_TCP);
        pyccl_spec spec = ring_spec(PYCCL_FLOAT32, PYCCL_SUM, 4 * 4096 * 10);
        spec.codec = coded ? PYCCL_CODEC_UINT8 : 0;
        spec.block = coded ? 4096 : 0;
        vectors v = vectors_any(&spec, NULL, 4, 1);
        pyccl_op *ops[4];
        for (uint32_t i = 0; i < 4; i++) ops[i] = submit(&c, i, spec, v.in[i], v.out[i], 0);
        const uint64_t share = 40960 * 4, codes = 10 * (4096 + 8), moved = coded ? codes + 2 * share + 3 * codes : 6 * share;
        for (uint32_t i = 0; i < 4; i++) {
            pyccl_op_info info;
            CHECK_EQ(pyccl_op_wait(ops[i], PATIENCE), PYCCL_OK);
            pyccl_op_info_get(ops[i], &info);
            CHECK_EQ(info.algorithm, PYCCL_RING);
            CHECK_EQ(info.tx_bytes, moved);
            CHECK_EQ(info.rx_bytes, moved);
            CHECK_EQ(finish(ops[i]), PYCCL_OK);
        }
        vectors_free(&v);
        cluster_close(&c);
    }
}

TEST(engine_auto_takes_the_ring_from_as_many_bytes_as_the_plan_says) {
    const pyccl_plan plan = {.ring_from_bytes = 4000};
    cluster c;
    cluster_open(&c, 3, 1, OVER_TCP);
    cluster_plan(&c, &plan);
    static const uint32_t ran[] = {PYCCL_DIRECT, PYCCL_RING};
    for (uint64_t k = 0; k < 2; k++) {
        pyccl_spec spec = reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, 999 + k, 0);
        float x[3][1000] = {{0}};
        pyccl_op *ops[3];
        for (uint32_t i = 0; i < 3; i++) {
            const pyccl_op_args args = {.spec = {.kind = spec.kind, .dtype = spec.dtype, .op = spec.op, .algorithm = PYCCL_AUTO, .retry = 1, .count = spec.count},
                                        .src = x[i], .dst = x[i], .weight = 1, .timeout_ns = PATIENCE};
            x[i][spec.count - 1] = 2.0f + (float)i;
            REQUIRE(pyccl_op_submit(c.engine[i], &args, &ops[i]) == PYCCL_OK);
        }
        for (uint32_t i = 0; i < 3; i++) {
            pyccl_op_info info;
            CHECK_EQ(pyccl_op_wait(ops[i], PATIENCE), PYCCL_OK);
            pyccl_op_info_get(ops[i], &info);
            CHECK_EQ(info.algorithm, ran[k]);
            CHECK_EQ(finish(ops[i]), PYCCL_OK);
            CHECK(x[i][spec.count - 1] == 9.0f);
        }
    }
    cluster_close(&c);
}

TEST(engine_unequal_shares_move_what_they_weigh) {
    static const uint32_t shares[] = {0, 3, 1};
    const pyccl_plan plan = {.shares = shares, .ring_from_bytes = UINT64_MAX};
    cluster c;
    cluster_open(&c, 3, 2, OVER_TCP);
    cluster_plan(&c, &plan);
    for (uint8_t dtype = PYCCL_INT32; dtype <= PYCCL_BFLOAT16; dtype += DTYPE_STEP) {
        check_any(&c, reduce_spec(dtype, PYCCL_SUM, 5, 0), NULL, dtype % 2);
        check_any(&c, reduce_spec(dtype, PYCCL_MAX, LONG(UINT64_C(400007)), 0), NULL, dtype % 2);
        if (!is_float(dtype)) continue;
        pyccl_spec coded = reduce_spec(dtype, PYCCL_AVG, LONG(UINT64_C(400007)), 0);
        coded.codec = PYCCL_CODEC_UINT8;
        coded.block = 1024;
        check_any(&c, coded, NULL, dtype % 2);
    }
    const pyccl_spec spec = reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, 4000, 0);
    vectors v = vectors_any(&spec, NULL, 3, 1);
    pyccl_op *ops[3];
    static const uint64_t sent[] = {16000, 4000 + 2 * 12000, 12000 + 2 * 4000};
    for (uint32_t i = 0; i < 3; i++) ops[i] = submit(&c, i, spec, v.in[i], v.out[i], 0);
    for (uint32_t i = 0; i < 3; i++) {
        pyccl_op_info info;
        CHECK_EQ(pyccl_op_wait(ops[i], PATIENCE), PYCCL_OK);
        pyccl_op_info_get(ops[i], &info);
        CHECK_EQ(info.tx_bytes, sent[i]);
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
    }
    vectors_free(&v);
    cluster_close(&c);
}

/* ---- losses ---- */

/* Sums that went on are repeated as they were; inputs, too, also where the result has overwritten them. */
static void conns_die(uint32_t world, uint8_t dtype, uint8_t codec, wire how, int in_place) {
    uint64_t seed = test_seed();
    drawn_plan drawn;
    cluster c;
    cluster_open(&c, world, 4, how);
    plan_draw(&drawn, &seed, world);
    cluster_plan(&c, &drawn.plan);
    pyccl_spec spec = ring_spec(dtype, PYCCL_SUM, LONG(UINT64_C(8000007)));
    spec.codec = codec;
    spec.block = codec ? 4096 : 0;
    vectors v = vectors_planned(&spec, NULL, world, 77, c.plan);
    pyccl_op *ops[ENGINES_MAX];
    for (uint32_t i = 0; i < world; i++) ops[i] = submit(&c, i, spec, v.in[i], in_place ? v.in[i] : v.out[i], 0);
    for (uint32_t k = 0; k < 3; k++) {
        const int64_t until = now_ns() + PATIENCE;
        while (all_link_bytes(&c, 0) < v.bytes / 4 * (k + 1) && !pyccl_op_done(ops[0]) && now_ns() < until) {}
        for (uint32_t i = 0; i < world; i++) kill_conn(&c, drawn.ring[i], drawn.ring[(i + 1) % world], k);
    }
    for (uint32_t i = 0; i < world; i++) {
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
        CHECK(memcmp(in_place ? v.in[i] : v.out[i], v.want, v.bytes) == 0);
    }
    CHECK(await_event(c.engine[0], PYCCL_EVENT_CONN_DOWN, NULL));
    vectors_free(&v);
    cluster_close(&c);
}

TEST(engine_ring_of_three_repeats_what_connections_lost) { conns_die(3, PYCCL_FLOAT32, 0, OVER_TCP, 1); }
TEST(engine_ring_of_four_repeats_what_connections_lost) { conns_die(4, PYCCL_INT64, 0, OVER_UNIX, 0); }
TEST(engine_ring_of_halves_repeats_what_connections_lost) { conns_die(3, PYCCL_BFLOAT16, 0, OVER_UNIX, 1); }
TEST(engine_coded_ring_repeats_what_connections_lost) { conns_die(4, PYCCL_FLOAT32, PYCCL_CODEC_UINT8, OVER_TCP, 1); }

TEST(engine_ring_goes_on_over_a_link_that_was_gone) {
    cluster c;
    cluster_open(&c, 3, 1, OVER_TCP);
    const pyccl_spec spec = ring_spec(PYCCL_FLOAT32, PYCCL_SUM, LONG(UINT64_C(8000007)));
    vectors v = vectors_any(&spec, NULL, 3, 78);
    pyccl_op *ops[3];
    for (uint32_t i = 0; i < 3; i++) ops[i] = submit(&c, i, spec, v.in[i], v.in[i], 0);
    for (uint64_t k = 0; k < 2; k++) {
        pyccl_event event;
        await_bytes(&c, 1, 0, (k + 1) * v.bytes / 4);
        kill_conn(&c, 0, 1, 0);
        CHECK(await_event(c.engine[0], PYCCL_EVENT_CONN_DOWN, &event));
        CHECK(await_event(c.engine[1], PYCCL_EVENT_CONN_DOWN, &event));
        close(c.raw[0][1][0]);
        close(c.raw[1][0][0]);
        cluster_link(&c, 0, 1, 0, OVER_TCP);
    }
    for (uint32_t i = 0; i < 3; i++) {
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
        CHECK(memcmp(v.in[i], v.want, v.bytes) == 0);
    }
    vectors_free(&v);
    cluster_close(&c);
}

/* The survivors' ring is another one: they begin again from their inputs. */
TEST(engine_ring_is_closed_again_when_a_member_is_lost) {
    cluster c;
    cluster_open(&c, 4, 2, OVER_TCP);
    const pyccl_spec spec = ring_spec(PYCCL_FLOAT32, PYCCL_SUM, LONG(UINT64_C(6000001)));
    vectors v = vectors_any(&spec, NULL, 4, 5), rest = vectors_any(&spec, NULL, 3, 5);
    pyccl_op *ops[4];
    for (uint32_t i = 0; i < 4; i++)
        if (i != 1) ops[i] = submit(&c, i, spec, v.in[i], v.in[i], 0);
    await_bytes(&c, 0, 3, 1 << 20);
    pyccl_engine_stop(c.engine[3], PYCCL_ERR_CLOSED);
    c.alive[3] = 0;
    ops[1] = submit(&c, 1, spec, v.in[1], v.in[1], 0); /* late: four can't have ended it */
    for (uint32_t i = 0; i < 3; i++) {
        size_t reported = 0;
        CHECK_EQ(pyccl_engine_freeze(c.engine[i], NULL, 0, &reported), PYCCL_OK);
    }
    cluster_epoch(&c, 0);
    for (uint32_t i = 0; i < 3; i++) {
        CHECK_EQ(pyccl_op_wait(ops[i], PATIENCE), PYCCL_OK);
        pyccl_op_info info;
        pyccl_op_info_get(ops[i], &info);
        CHECK(info.attempts == 2 && info.world == 3 && info.algorithm == PYCCL_RING);
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
        CHECK(memcmp(v.in[i], rest.want, v.bytes) == 0);
    }
    CHECK(finish(ops[3]) < 0);
    vectors_free(&v);
    vectors_free(&rest);
    cluster_close(&c);
}

/* ---- early pieces ---- */

/* Those who have begun wait for the one who has not, and another ring with another tag passes them by. */
TEST(engine_ring_waits_for_a_neighbour_that_has_not_begun_while_others_pass) {
    cluster c;
    cluster_open(&c, 4, 2, OVER_TCP);
    pyccl_spec spec = ring_spec(PYCCL_FLOAT32, PYCCL_SUM, UINT64_C(12000007));
    vectors v = vectors_any(&spec, NULL, 4, 3);
    pyccl_op *ops[4];
    for (uint32_t i = 0; i < 3; i++) ops[i] = submit(&c, i, spec, v.in[i], v.in[i], 0);
    await_bytes(&c, 3, 2, PYCCL_EAGER_MAX - SCHEDULE_PIECE_BYTES);
    pyccl_spec other = ring_spec(PYCCL_INT32, PYCCL_SUM, 40001);
    other.tag = 1;
    check_any(&c, other, NULL, 1);
    for (uint32_t i = 0; i < 3; i++) CHECK_EQ(pyccl_op_wait(ops[i], 0), PYCCL_PENDING);
    pyccl_link_stats stats;
    REQUIRE(pyccl_engine_link_stats(c.engine[3], c.slot[3][2], &stats) == PYCCL_OK);
    CHECK(stats.rx_bytes < 2 * PYCCL_EAGER_MAX);
    ops[3] = submit(&c, 3, spec, v.in[3], v.in[3], 0);
    for (uint32_t i = 0; i < 4; i++) {
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
        CHECK(memcmp(v.in[i], v.want, v.bytes) == 0);
    }
    vectors_free(&v);
    cluster_close(&c);
}

TEST(engine_rings_of_many_tags_in_any_order) {
    cluster c;
    uint64_t seed = test_seed();
    cluster_open(&c, 5, 2, OVER_TCP);
    enum { TAGS = 12 };
    static const uint64_t counts[] = {3, 50021, 400009};
    vectors v[TAGS];
    pyccl_op *ops[TAGS][5];
    for (uint32_t tag = 0; tag < TAGS; tag++) {
        const pyccl_spec spec = ring_spec(PYCCL_FLOAT64, PYCCL_SUM, counts[tag % 3]);
        v[tag] = vectors_any(&spec, NULL, 5, tag + 1);
    }
    for (uint32_t i = 0; i < 5; i++) {
        uint32_t order[TAGS];
        for (uint32_t k = 0; k < TAGS; k++) {
            const uint32_t at = (uint32_t)(test_random(&seed) % (k + 1));
            order[k] = order[at];
            order[at] = k;
        }
        for (uint32_t k = 0; k < TAGS; k++) {
            pyccl_spec spec = ring_spec(PYCCL_FLOAT64, PYCCL_SUM, counts[order[k] % 3]);
            spec.tag = order[k];
            ops[order[k]][i] = submit(&c, i, spec, v[order[k]].in[i], v[order[k]].in[i], 0);
        }
    }
    for (uint32_t tag = 0; tag < TAGS; tag++) {
        for (uint32_t i = 0; i < 5; i++) {
            CHECK_EQ(finish(ops[tag][i]), PYCCL_OK);
            CHECK(memcmp(v[tag].in[i], v[tag].want, v[tag].bytes) == 0);
        }
        vectors_free(&v[tag]);
    }
    cluster_close(&c);
}

/* ---- a neighbour that breaks the rules ---- */

#define PIECES 3                     /* of each share */
#define SHARE (PIECES * (uint64_t)SCHEDULE_PIECE_BYTES / 4)

typedef struct bad {
    const char *what;
    uint32_t from;                   /* rank that sends it */
    uint8_t kind;                    /* 0: all_reduce */
    uint8_t phase, wrong_hash;
    uint64_t element, length;        /* offset / 4 */
    int refused;
} bad;

/* Engine 1 is real, the test plays 0 and 2; the ring is 0, 1, 2. */
TEST(engine_ring_refuses_pieces_that_are_not_due) {
    static const bad cases[] = {
        {"the previous member's own share never comes from it as a contribution", 0, 0, 0, 0, 0, SCHEDULE_PIECE_BYTES, 1},
        {"the result of our own share does not come to us", 0, 0, 1, 0, SHARE, SCHEDULE_PIECE_BYTES, 1},
        {"the next member sends nothing", 2, 0, 0, 0, 2 * SHARE, SCHEDULE_PIECE_BYTES, 1},
        {"the next member sends no results", 2, 0, 1, 0, 2 * SHARE, SCHEDULE_PIECE_BYTES, 1},
        {"in the middle of a piece", 0, 0, 0, 0, 2 * SHARE + 1, SCHEDULE_PIECE_BYTES, 1},
        {"too short", 0, 0, 0, 0, 2 * SHARE, SCHEDULE_PIECE_BYTES - 4, 1},
        {"too long", 0, 0, 0, 0, 2 * SHARE, SCHEDULE_PIECE_BYTES + 4, 1},
        {"behind the end", 0, 0, 0, 0, 3 * SHARE, SCHEDULE_PIECE_BYTES, 1},
        {"of another operation's hash: discarded", 0, 0, 0, 1, 0, SCHEDULE_PIECE_BYTES, 0},
        {"a reduce_scatter has no results", 0, PYCCL_REDUCE_SCATTER, 1, 0, 0, SCHEDULE_PIECE_BYTES, 1},
        {"nor the sums of the previous member's share from it", 0, PYCCL_REDUCE_SCATTER, 0, 0, 0, SCHEDULE_PIECE_BYTES, 1},
    };
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        const bad *b = &cases[k];
        cluster c;
        cluster_open(&c, 3, 0, OVER_UNIX);
        int fds[3];
        for (uint32_t rank = 0; rank < 3; rank += 2) {
            int pair[2];
            REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
            REQUIRE(pyccl_engine_conn_add(c.engine[1], c.slot[1][rank], pair[0]) == PYCCL_OK);
            fds[rank] = pair[1];
        }
        pyccl_spec spec = ring_spec(PYCCL_FLOAT32, PYCCL_SUM, 3 * SHARE);
        spec.retry = 1;
        if (b->kind != 0) {
            spec.kind = b->kind;
            spec.root[0] = 1;
        }
        float *x = calloc(spec.count, sizeof *x);
        pyccl_op *op = submit(&c, 1, spec, x, b->kind != 0 ? NULL : x, 0);
        const pyccl_frame frame = {.type = PYCCL_FRAME_DATA, .phase = b->phase, .epoch_number = c.number, .epoch_tag = UINT64_C(0x4141414141414141),
                                   .offset = b->element * 4, .length = (uint32_t)b->length, .spec_hash = pyccl_spec_hash(&spec) + b->wrong_hash};
        uint8_t *bytes = calloc(1, PYCCL_FRAME_SIZE + b->length);
        pyccl_frame_encode(&frame, bytes);
        uint64_t sent = 0;
        while (sent < PYCCL_FRAME_SIZE + b->length) {
            const ssize_t n = send(fds[b->from], bytes + sent, PYCCL_FRAME_SIZE + b->length - sent, MSG_NOSIGNAL);
            if (n <= 0) break;
            sent += (uint64_t)n;
        }
        if (b->refused) {
            pyccl_event event;
            CHECK(await_event(c.engine[1], PYCCL_EVENT_LINK_REFUSED, &event));
            CHECK_EQ(event.slot, c.slot[1][b->from]);
        } else {
            await_bytes(&c, 1, b->from, PYCCL_FRAME_SIZE + b->length);
            pyccl_link_stats stats;
            REQUIRE(pyccl_engine_link_stats(c.engine[1], c.slot[1][b->from], &stats) == PYCCL_OK);
            CHECK_EQ(stats.conns, 1);
        }
        pyccl_op_cancel(op, PYCCL_ERR_CANCELLED);
        CHECK_EQ(finish(op), PYCCL_ERR_CANCELLED);
        for (uint64_t i = 0; i < spec.count; i++)
            if (x[i] != 0) {
                printf("%s\n", b->what);
                CHECK(!"the input was changed");
                break;
            }
        free(bytes);
        free(x);
        close(fds[0]);
        close(fds[2]);
        cluster_close(&c);
    }
}

/* A result before its sum has gone on, twice, and while it is half sent: memory is what ASan looks at. */
TEST(engine_ring_bears_results_that_come_too_early) {
    uint64_t seed = test_seed();
    for (int run = 0; run < 40; run++) {
        cluster c;
        cluster_open(&c, 3, 0, OVER_UNIX);
        int fds[3] = {-1, -1, -1};
        for (uint32_t rank = 0; rank < 3; rank += 2) {
            int pair[2];
            REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
            REQUIRE(pyccl_engine_conn_add(c.engine[1], c.slot[1][rank], pair[0]) == PYCCL_OK);
            fds[rank] = pair[1];
        }
        pyccl_spec spec = ring_spec(run % 2 ? PYCCL_FLOAT32 : PYCCL_BFLOAT16, PYCCL_SUM, run % 2 ? 3 * SHARE : 6 * SHARE);
        spec.retry = 1;
        spec.codec = run % 4 == 3 ? PYCCL_CODEC_UINT8 : 0;
        spec.block = spec.codec ? 65536 : 0;
        epoch_plan plan;
        schedule s;
        REQUIRE(epoch_plan_init(&plan, NULL, 3) == PYCCL_OK);
        schedule_init(&s, &spec, &plan, 1, 0);
        uint8_t *x = calloc(schedule_input_bytes(&s), 1), *bytes = calloc(1, PYCCL_FRAME_SIZE + PYCCL_PIECE_MAX);
        pyccl_op *op = submit(&c, 1, spec, x, x, 0);
        uint64_t total = 0;
        for (int k = 0; k < 30; k++) {
            const uint32_t phase = test_random(&seed) % 2;
            const uint64_t item = test_random(&seed) % schedule_items(&s, phase, 0, 1), offset = schedule_item_offset(&s, phase, 0, 1, item);
            const uint32_t length = schedule_item_bytes(&s, phase, 0, 1, item);
            uint64_t found;
            if (!schedule_item_find(&s, phase, 0, 1, offset, length, &found)) continue;
            const pyccl_frame frame = {.type = PYCCL_FRAME_DATA, .phase = (uint8_t)phase, .epoch_number = c.number, .epoch_tag = UINT64_C(0x4141414141414141),
                                       .offset = offset, .length = length, .spec_hash = pyccl_spec_hash(&spec)};
            pyccl_frame_encode(&frame, bytes);
            uint64_t sent = 0;
            while (sent < PYCCL_FRAME_SIZE + length) {
                const ssize_t n = send(fds[0], bytes + sent, PYCCL_FRAME_SIZE + length - sent, MSG_NOSIGNAL);
                REQUIRE(n > 0);
                sent += (uint64_t)n;
            }
            total += sent;
            if (test_random(&seed) % 4 == 0) (void)!recv(fds[2], bytes + PYCCL_FRAME_SIZE, test_random(&seed) % PYCCL_PIECE_MAX, MSG_DONTWAIT);
            memset(bytes, 0, PYCCL_FRAME_SIZE + PYCCL_PIECE_MAX);
        }
        await_bytes(&c, 1, 0, total);
        shutdown(fds[2], SHUT_RDWR); /* what is half sent is lost and would be repeated */
        CHECK(await_event(c.engine[1], PYCCL_EVENT_CONN_DOWN, NULL));
        pyccl_op_cancel(op, PYCCL_ERR_CANCELLED);
        CHECK_EQ(finish(op), PYCCL_ERR_CANCELLED);
        free(x);
        free(bytes);
        close(fds[0]);
        close(fds[2]);
        cluster_close(&c);
    }
}
