/* test_engine_exchange.c: exchanges of pairs beside one another and beside collectives. */
#include "engine_vectors.h"

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

/* Members 0 and 2 swap in place, 1 does nothing; as ends_midway (test_engine_loss.c). */
static int exchange_ends_midway(const vectors *v, uint64_t after, how_it_ends how) {
    cluster c;
    cluster_open(&c, 3, 2, OVER_TCP);
    const pyccl_spec spec = exchange_spec(&c, 0, 2, PYCCL_FLOAT32, v->bytes / 4);
    uint8_t *x[3];
    pyccl_op *ops[3];
    for (uint32_t i = 0; i < 3; i += 2) {
        x[i] = copied(v->in[i], v->bytes);
        if (after > 0 || i == 0) ops[i] = submit(&c, i, spec, x[i], x[i], 0);
    }
    const int64_t until = now_ns() + PATIENCE;
    while (all_link_bytes(&c, 0) < after && !pyccl_op_done(ops[0]) && now_ns() < until) {}
    if (how == BY_CANCEL) pyccl_op_cancel(ops[0], PYCCL_ERR_CANCELLED);
    if (after == 0) ops[2] = submit(&c, 2, spec, x[2], x[2], 0);
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
        CHECK(memcmp(x[i], v->in[status == PYCCL_OK ? 2 - i : i], v->bytes) == 0);
        good += status == PYCCL_OK;
        free(x[i]);
    }
    if (how == BY_CANCEL) CHECK(good == 0 || good == 2);
    if (how == BY_SETTLE) CHECK_EQ(good, 2);
    cluster_close(&c);
    return good > 0;
}

TEST(engine_exchange_in_place_is_swapped_on_both_or_restored) {
    const uint64_t count = LONG(2500003);
    vectors v = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, count, 3, 78);
    CHECK_EQ(exchange_ends_midway(&v, 0, BY_CANCEL), 0);
    for (int how = BY_CANCEL; how <= BY_SETTLE; how++)
        for (uint64_t k = 1; k <= 3; k++) exchange_ends_midway(&v, count * k, (how_it_ends)how);
    vectors_free(&v);
}

TEST(engine_exchange_in_place_repeats_what_was_submitted) {
    cluster c;
    cluster_open(&c, 3, 4, OVER_TCP);
    const uint64_t count = LONG(12000007);
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
