/* test_engine_loss.c: connections and members that end in the middle of an operation: it is completed, repeated or undone. */
#include "engine_vectors.h"

static void conns_die_midway(uint32_t world, uint32_t conns, uint32_t deaths, wire how) {
    cluster c;
    cluster_open(&c, world, conns, how);
    const uint64_t count = LONG(12000007);
    vectors v = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, count, world, 77);
    pyccl_op *ops[ENGINES_MAX];
    for (uint32_t i = 0; i < world; i++) ops[i] = submit(&c, i, reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, count, 0), v.in[i], v.in[i], 0);
    for (uint32_t k = 0; k < deaths; k++) {
        await_bytes(&c, 0, 1, (k + 1) * v.bytes / 16);
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
    const uint64_t count = LONG(12000007);
    vectors v = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, count, 2, 78);
    pyccl_op *ops[2];
    for (uint32_t i = 0; i < 2; i++) ops[i] = submit(&c, i, reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, count, 0), v.in[i], v.in[i], 0);
    for (int k = 0; k < 3; k++) {
        await_bytes(&c, 0, 1, (k + 1) * v.bytes / 16);
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
    const uint64_t count = LONG(9000001);
    vectors v = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, count, 3, 5), rest = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, count, 2, 5);
    uint8_t *input = copied(v.in[2], v.bytes);
    pyccl_op *ops[3];
    for (uint32_t i = 0; i < 3; i += 2) ops[i] = submit(&c, i, reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, count, 0), v.in[i], v.in[i], 0);
    await_bytes(&c, 0, 2, 1 << 20);
    pyccl_engine_stop(c.engine[2], PYCCL_ERR_CLOSED);
    c.alive[2] = 0;
    ops[1] = submit(&c, 1, reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, count, 0), v.in[1], v.in[1], 0); /* late: three can't end it */
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
    CHECK(memcmp(v.in[2], input, v.bytes) == 0);
    free(input);
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
    const uint64_t count = LONG(6000001);
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

/* Everybody does `spec` in place; when member 0 has got `after` bytes something ends it. All commit with the right bits, or
 * have their input back. BY_SETTLE: the members freeze and retry, and must then succeed. After 0 bytes: before the last
 * member calls, so that it can't have ended. Returns 1 if it was committed. */
static int ends_midway(const vectors *v, pyccl_spec spec, uint64_t after, how_it_ends how) {
    const uint32_t world = v->world;
    cluster c;
    cluster_open(&c, world, 2, OVER_TCP);
    if (spec.kind == PYCCL_BROADCAST) memcpy(spec.root, c.id[world - 1], 16);
    uint8_t *x[ENGINES_MAX];
    pyccl_op *ops[ENGINES_MAX];
    for (uint32_t i = 0; i < world; i++) {
        x[i] = copied(v->in[i], v->bytes);
        if (after > 0 || i + 1 < world) ops[i] = submit(&c, i, spec, x[i], x[i], 0);
    }
    const int64_t until = now_ns() + PATIENCE;
    while (all_link_bytes(&c, 0) < after && !pyccl_op_done(ops[0]) && now_ns() < until) {}
    if (how == BY_CANCEL) pyccl_op_cancel(ops[0], PYCCL_ERR_CANCELLED);
    if (after == 0) ops[world - 1] = submit(&c, world - 1, spec, x[world - 1], x[world - 1], 0);
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
    const uint8_t *result = spec.kind == PYCCL_BROADCAST ? v->in[world - 1] : v->want;
    int good = 0;
    for (uint32_t i = 0; i < world; i++) {
        const int status = finish(ops[i]);
        const int right = memcmp(x[i], status == PYCCL_OK ? result : v->in[i], v->bytes) == 0;
        if (!right) printf("world %u member %u codec %u after %llu how %d status %d\n", world, i, spec.codec, (unsigned long long)after, how, status);
        CHECK(right);
        good += status == PYCCL_OK;
        free(x[i]);
    }
    if (how == BY_CANCEL || how == BY_SETTLE) CHECK(good == 0 || good == (int)world);
    if (how == BY_SETTLE) CHECK_EQ(good, world);
    cluster_close(&c);
    return good > 0;
}

static void ends_everywhere(uint32_t world, uint8_t codec, uint8_t kind, uint8_t algorithm) {
    const uint64_t count = LONG(2500003), total = codec ? count / 2 : count * 4;
    pyccl_spec spec = reduce_spec(PYCCL_FLOAT32, PYCCL_AVG, count, 0);
    spec.codec = codec;
    spec.block = codec ? 1024 : 0;
    spec.algorithm = algorithm;
    vectors v = vectors_any(&spec, NULL, world, world);
    if (kind == PYCCL_BROADCAST) spec = (pyccl_spec){.kind = kind, .dtype = PYCCL_FLOAT32, .count = count};
    CHECK_EQ(ends_midway(&v, spec, 0, BY_CANCEL), 0);
    for (int how = BY_CANCEL; how <= BY_SETTLE; how++)
        for (uint64_t k = 1; k <= 3; k++) ends_midway(&v, spec, total * k / 4, (how_it_ends)how);
    vectors_free(&v);
}

TEST(engine_restores_in_place_inputs_of_two) { ends_everywhere(2, 0, PYCCL_ALL_REDUCE, PYCCL_DIRECT); }
TEST(engine_restores_in_place_inputs_of_three) { ends_everywhere(3, 0, PYCCL_ALL_REDUCE, PYCCL_DIRECT); }
TEST(engine_restores_in_place_inputs_of_five) { ends_everywhere(5, 0, PYCCL_ALL_REDUCE, PYCCL_DIRECT); }
TEST(engine_restores_coded_in_place_inputs_of_two) { ends_everywhere(2, PYCCL_CODEC_UINT8, PYCCL_ALL_REDUCE, PYCCL_DIRECT); }
TEST(engine_restores_coded_in_place_inputs_of_three) { ends_everywhere(3, PYCCL_CODEC_UINT8, PYCCL_ALL_REDUCE, PYCCL_DIRECT); }
TEST(engine_restores_in_place_inputs_of_a_ring_of_three) { ends_everywhere(3, 0, PYCCL_ALL_REDUCE, PYCCL_RING); }
TEST(engine_restores_in_place_inputs_of_a_ring_of_five) { ends_everywhere(5, 0, PYCCL_ALL_REDUCE, PYCCL_RING); }
TEST(engine_restores_coded_in_place_inputs_of_a_ring) { ends_everywhere(4, PYCCL_CODEC_UINT8, PYCCL_ALL_REDUCE, PYCCL_RING); }
TEST(engine_restores_broadcast_targets) { ends_everywhere(3, 0, PYCCL_BROADCAST, PYCCL_DIRECT); }

/* Contributions are repeated from what the caller submitted, also where the result has overwritten it. */
static void conns_die_in_place(uint32_t world, uint8_t codec, wire how) {
    cluster c;
    cluster_open(&c, world, 4, how);
    pyccl_spec spec = reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, LONG(12000007), 0);
    spec.codec = codec;
    spec.block = codec ? 4096 : 0;
    vectors v = vectors_any(&spec, NULL, world, 77);
    pyccl_op *ops[ENGINES_MAX];
    for (uint32_t i = 0; i < world; i++) ops[i] = submit(&c, i, spec, v.in[i], v.in[i], 0);
    const uint64_t total = codec ? spec.count : v.bytes;
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
