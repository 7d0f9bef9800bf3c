/* test_engine_flow.c: many operations at a time, and how far a sender may run ahead of its receivers. */
#include <sys/socket.h>
#include <unistd.h>

#include "engine_vectors.h"
#include "frame.h"

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

/* Floats: more than the eager window, by one contribution of two members, or by all the contributions of three. */
#define BIG (5 * 262144 + 1)

TEST(engine_runs_200_tagged_operations_submitted_in_different_orders) { many_ops(3, 200, 1000, 3); }
TEST(engine_runs_big_operations_submitted_in_reversed_order) { many_ops(2, 4, BIG, 2); }
TEST(engine_runs_big_operations_of_three_members_in_different_orders) { many_ops(3, 5, BIG, 1); }

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

/* The third member is missing, so nothing comes back. The second operation's data goes after all of the first's that may
 * go: when it has ended, what is held back is held back. */
TEST(engine_keeps_contributions_in_step_with_what_comes_back_on_loopback) {
    cluster c;
    cluster_open(&c, 3, 1, OVER_TCP);
    const uint64_t pieces = 12, count = 3 * pieces * SCHEDULE_PIECE_BYTES / 4;
    vectors v = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, count, 3, 79);
    int64_t x[3] = {1, 2, 3};
    pyccl_op *ops[3], *small[3];
    for (uint32_t i = 0; i < 2; i++) ops[i] = submit(&c, i, reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, count, 0), v.in[i], v.in[i], 0);
    for (uint32_t i = 0; i < 2; i++) await_bytes(&c, i, 1 - i, SCHEDULE_PIECE_BYTES);
    for (uint32_t i = 0; i < 3; i++) small[i] = submit(&c, i, reduce_spec(PYCCL_INT64, PYCCL_SUM, 1, 1), &x[i], &x[i], 0);
    for (uint32_t i = 0; i < 3; i++) CHECK_EQ(finish(small[i]), PYCCL_OK);
    for (uint32_t i = 0; i < 2; i++) {
        pyccl_link_stats stats;
        REQUIRE(pyccl_engine_link_stats(c.engine[i], c.slot[i][1 - i], &stats) == PYCCL_OK);
        CHECK(stats.rx_bytes < 5 * SCHEDULE_PIECE_BYTES);
    }
    ops[2] = submit(&c, 2, reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, count, 0), v.in[2], v.in[2], 0);
    for (uint32_t i = 0; i < 3; i++) {
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
        CHECK(memcmp(v.in[i], v.want, v.bytes) == 0);
    }
    vectors_free(&v);
    cluster_close(&c);
}

/* Member 0 reads next to nothing. What the others send each other waits for it, but for a part: an exchange's piece goes
 * behind all that may go, so when it has ended, what is held back is held back. */
TEST(engine_keeps_contributions_to_all_in_step_on_lines_that_are_not_loopback) {
    enum { PIECES = 64, PIECE = PYCCL_PLAN_PIECE_MIN, MEMBERS = 4 };
    const uint64_t count = MEMBERS * PIECES * PIECE / 4;
    const pyccl_plan plan = {.ring_from_bytes = UINT64_MAX, .piece_bytes = PIECE};
    cluster c;
    cluster_open_capped(&c, MEMBERS, 1, OVER_UNIX, 0, 1000);
    c.plan = &plan;
    cluster_epoch(&c, 1);
    vectors v = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, count, MEMBERS, 83);
    pyccl_op *ops[MEMBERS], *pair[2];
    uint8_t x[2][100] = {{1}, {2}}, y[2][100];
    pyccl_spec spec = {.kind = PYCCL_EXCHANGE, .dtype = PYCCL_UINT8, .space = PYCCL_SPACE_PAIR, .count = sizeof x[0], .tag = 7};
    for (int i = 0; i < 16; i++) spec.root[i] = c.id[1][i] ^ c.id[2][i];
    for (uint32_t i = 0; i < MEMBERS; i++) {
        ops[i] = submit(&c, i, reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, count, 0), v.in[i], v.in[i], 0);
        for (uint32_t j = 1; i == 0 && j < MEMBERS; j++) await_bytes(&c, j, 0, PYCCL_FRAME_SIZE + PYCCL_SPEC_SIZE);
    }
    for (uint32_t i = 0; i < 2; i++) pair[i] = submit(&c, 1 + i, spec, x[i], y[i], sizeof y[i]);
    for (uint32_t i = 0; i < 2; i++) CHECK_EQ(finish(pair[i]), PYCCL_OK);
    for (uint32_t i = 1; i <= 2; i++) {
        pyccl_link_stats stats;
        REQUIRE(pyccl_engine_link_stats(c.engine[i], c.slot[i][3 - i], &stats) == PYCCL_OK);
        CHECK(stats.rx_bytes > PIECE && stats.rx_bytes < (PIECES + PIECES / 4) * PIECE); /* as many results as contributions */
    }
    for (uint32_t i = 0; i < MEMBERS; i++) pyccl_engine_stop(c.engine[i], PYCCL_ERR_CLOSED);
    for (uint32_t i = 0; i < MEMBERS; i++) CHECK(finish(ops[i]) != PYCCL_OK);
    vectors_free(&v);
    cluster_close(&c);
}

/* Engine 1 of three; the test is the other two and reads nothing before all that they contribute is there, and so all results
 * could go. What it has to contribute goes before them all the same. */
TEST(engine_sends_its_inputs_before_results_on_lines_that_are_not_loopback) {
    enum { PIECES = 64, PIECE = PYCCL_PLAN_PIECE_MIN };
    const pyccl_plan plan = {.ring_from_bytes = UINT64_MAX, .piece_bytes = PIECE};
    cluster c;
    cluster_open(&c, 3, 0, OVER_UNIX);
    c.plan = &plan;
    cluster_epoch(&c, 1);
    int fds[2];
    for (uint32_t i = 0; i < 2; i++) {
        int pair[2];
        REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
        REQUIRE(pyccl_engine_conn_add(c.engine[1], c.slot[1][2 * i], pair[0]) == PYCCL_OK);
        fds[i] = pair[1];
    }
    pyccl_spec spec = reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, 3 * PIECES * PIECE / 4, 0);
    spec.algorithm = PYCCL_DIRECT;
    spec.retry = 1;
    float *x = calloc(spec.count, sizeof *x);
    pyccl_op *op = submit(&c, 1, spec, x, x, 0);
    pyccl_frame frame = {.type = PYCCL_FRAME_DATA, .epoch_number = c.number, .length = PIECE, .spec_hash = pyccl_spec_hash(&spec)};
    memset(&frame.epoch_tag, (int)(0x40 + c.number), sizeof frame.epoch_tag);
    static uint8_t bytes[PYCCL_FRAME_SIZE + PIECE];
    pyccl_frame open = frame;
    const double weight = 1;
    open.type = PYCCL_FRAME_OPEN;
    open.length = PYCCL_SPEC_SIZE;
    open.spec_hash = 0;
    memcpy(&open.offset, &weight, sizeof open.offset);
    pyccl_frame_encode(&open, bytes);
    pyccl_spec_encode(&spec, bytes + PYCCL_FRAME_SIZE);
    for (uint32_t i = 0; i < 2; i++)
        REQUIRE(send(fds[i], bytes, PYCCL_FRAME_SIZE + PYCCL_SPEC_SIZE, MSG_NOSIGNAL) == PYCCL_FRAME_SIZE + PYCCL_SPEC_SIZE);
    for (uint32_t piece = 0; piece < PIECES; piece++)
        for (uint32_t i = 0; i < 2; i++) {
            frame.offset = (uint64_t)piece * PIECE;
            pyccl_frame_encode(&frame, bytes);
            REQUIRE(send(fds[i], bytes, sizeof bytes, MSG_NOSIGNAL) == sizeof bytes);
        }
    for (uint32_t i = 0; i < 2; i++) await_bytes(&c, 1, 2 * i, PYCCL_FRAME_SIZE + PYCCL_SPEC_SIZE + PIECES * sizeof bytes);
    uint32_t inputs[2] = {0}, results[2] = {0};
    while (inputs[0] < PIECES || inputs[1] < PIECES) {
        const uint32_t i = inputs[0] > inputs[1]; /* in step: who is ahead gets results meanwhile */
        REQUIRE(recv(fds[i], bytes, PYCCL_FRAME_SIZE, MSG_WAITALL) == PYCCL_FRAME_SIZE);
        REQUIRE(pyccl_frame_decode_untrusted(bytes, &frame) == PYCCL_OK);
        if (frame.length > 0) REQUIRE(recv(fds[i], bytes, frame.length, MSG_WAITALL) == (ssize_t)frame.length);
        if (frame.type == PYCCL_FRAME_DATA) (*(frame.phase == 0 ? &inputs[i] : &results[i]))++;
    }
    CHECK(results[0] + results[1] < PIECES); /* half of them: a few that went while the inputs to one were ahead */
    pyccl_op_cancel(op, PYCCL_ERR_CANCELLED);
    CHECK_EQ(finish(op), PYCCL_ERR_CANCELLED);
    for (uint32_t i = 0; i < 2; i++) close(fds[i]);
    free(x);
    cluster_close(&c);
}

/* Right to the bit; bytes that engine 0 moved one way meanwhile. */
static uint64_t capped_round(const cluster *c, uint64_t round, uint64_t elements, int up) {
    pyccl_op *ops[ENGINES_MAX];
    uint64_t moved = 0;
    vectors v = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, elements, c->count, 311 + round);
    for (uint32_t i = 0; i < c->count; i++) ops[i] = submit(c, i, reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, elements, 0), v.in[i], v.in[i], 0);
    for (uint32_t i = 0; i < c->count; i++) {
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
        CHECK(memcmp(v.in[i], v.want, v.bytes) == 0);
    }
    vectors_free(&v);
    for (uint32_t i = 1; i < c->count; i++) {
        pyccl_link_stats stats;
        REQUIRE(pyccl_engine_link_stats(c->engine[0], c->slot[0][i], &stats) == PYCCL_OK);
        moved += up ? stats.tx_bytes : stats.rx_bytes;
    }
    return moved;
}

/* Of a cap, in the best of ROUNDS_MAX operations. Under TSan the values alone take longer than what the cap allows. */
#ifdef PYCCL_SANITIZE_THREAD
#define LEAST_SHARE 0.0
#else
#define LEAST_SHARE 0.8
#endif
#define ROUNDS_MAX 40

/* Member 0 may move 8 MB a second one way: all_reduces of 1 MiB among `count`, never in less time; nor in more, where the machine
 * lets it: so the best of many, each from the end of the one before, when the burst is used up. */
static void capped(uint32_t count, uint32_t conns, wire how, int up) {
    cluster c;
    const uint64_t elements = 1 << 18;
    const double cap = 8000000;
    cluster_open_capped(&c, count, conns, how, up ? (uint64_t)cap : 0, up ? 0 : (uint64_t)cap);
    const int64_t begin = now_ns();
    uint64_t moved = capped_round(&c, 0, elements, up);
    int64_t start = now_ns();
    double best = 0;
    for (uint64_t round = 1; round < 3 || (best < LEAST_SHARE * cap && round < ROUNDS_MAX); round++) {
        const uint64_t before = moved;
        moved = capped_round(&c, round, elements, up);
        const int64_t end = now_ns();
        CHECK(moved > (round + 1) * elements * 4);
        CHECK((double)moved < 1.05 * cap * (double)(end - begin) / 1e9 + 0.05 * cap); /* no more than the rate and its burst */
        const double rate = (double)(moved - before) * 1e9 / (double)(end - start);
        if (rate > best) best = rate;
        start = end;
    }
    CHECK(best >= LEAST_SHARE * cap);
    cluster_close(&c);
}

TEST(engine_keeps_an_upload_cap_over_one_connection) { capped(2, 1, OVER_TCP, 1); }
TEST(engine_keeps_an_upload_cap_over_all_connections_together) { capped(4, 3, OVER_TCP, 1); }
TEST(engine_keeps_a_download_cap_over_one_connection) { capped(2, 1, OVER_UNIX, 0); }
TEST(engine_keeps_a_download_cap_over_all_connections_together) { capped(4, 3, OVER_TCP, 0); }

/* More than are numbered at a time, by one member before the others call any: the last ones wait for room. */
TEST(engine_holds_back_what_one_member_submits_thousands_ahead) {
    enum { MANY = PYCCL_EARLY_MAX + 900, WORLD = 3 };
    static int64_t x[WORLD][MANY];
    pyccl_op **ops = calloc((size_t)WORLD * MANY, sizeof *ops);
    const pyccl_spec spec = reduce_spec(PYCCL_INT64, PYCCL_SUM, 1, 3);
    cluster c;
    cluster_open(&c, WORLD, 1, OVER_TCP);
    for (uint32_t i = 0; i < WORLD; i++) {
        for (uint32_t k = 0; k < MANY; k++) {
            x[i][k] = (int64_t)(i + 1) * k + i;
            ops[i * MANY + k] = submit(&c, i, spec, &x[i][k], &x[i][k], 0);
        }
        pyccl_link_stats stats;
        REQUIRE(pyccl_engine_link_stats(c.engine[i], c.slot[i][i == 0], &stats) == PYCCL_OK); /* commands run in order */
    }
    int wrong = 0;
    for (uint32_t i = 0; i < WORLD; i++)
        for (uint32_t k = 0; k < MANY; k++) {
            CHECK_EQ(finish(ops[i * MANY + k]), PYCCL_OK);
            wrong += x[i][k] != 6 * (int64_t)k + 3;
        }
    CHECK_EQ(wrong, 0);
    free(ops);
    cluster_close(&c);
}

TEST(engine_ends_what_waits_for_room) {
    enum { MANY = PYCCL_EARLY_MAX + 500 };
    static int64_t x[MANY];
    pyccl_op **ops = calloc(MANY, sizeof *ops);
    cluster c;
    cluster_open(&c, 2, 1, OVER_TCP);
    for (uint32_t k = 0; k < MANY; k++) {
        x[k] = k;
        ops[k] = submit(&c, 0, reduce_spec(PYCCL_INT64, PYCCL_SUM, 1, 3), &x[k], &x[k], 0);
    }
    pyccl_op_cancel(ops[MANY - 1], PYCCL_ERR_CANCELLED);
    CHECK_EQ(finish(ops[MANY - 1]), PYCCL_ERR_CANCELLED);
    CHECK(!pyccl_op_done(ops[MANY - 2]));
    CHECK(pyccl_engine_end(c.engine[0], PYCCL_ERR_EVICTED) == PYCCL_OK);
    for (uint32_t k = 0; k < MANY - 1; k++) {
        CHECK_EQ(finish(ops[k]), PYCCL_ERR_EVICTED);
        CHECK_EQ(x[k], k);
    }
    free(ops);
    cluster_close(&c);
}

/* Member 0 gives up operations before 1 has submitted them, three times: 1 keeps the piece of each until the epoch ends.
 * There are more of them than it keeps of one peer, so 0 must hold the last ones back though they have few bytes. */
TEST(engine_sends_no_more_small_early_pieces_than_a_peer_keeps) {
    enum { EACH = 3000, ROUNDS = 3, KEPT = 2 * PYCCL_OPS_OPEN_MAX, OPEN_BYTES = 64 + PYCCL_SPEC_SIZE, PIECE_BYTES = 64 + 8 };
    _Static_assert(EACH * ROUNDS > KEPT + PYCCL_CONNS_MAX, "more than are kept");
    static int64_t x[2][EACH];
    pyccl_op **ops = calloc(EACH, sizeof *ops);
    const pyccl_spec spec = reduce_spec(PYCCL_INT64, PYCCL_SUM, 1, 3);
    cluster c;
    cluster_open(&c, 2, 1, OVER_TCP);
    for (uint32_t round = 0, pieces = 0; round < ROUNDS; round++) {
        const uint32_t sent = KEPT - pieces < EACH ? KEPT - pieces : EACH;
        pyccl_link_stats before;
        REQUIRE(pyccl_engine_link_stats(c.engine[1], c.slot[1][0], &before) == PYCCL_OK);
        for (uint32_t k = 0; k < EACH; k++) ops[k] = submit(&c, 0, spec, &x[0][k], &x[0][k], 0);
        await_bytes(&c, 1, 0, before.rx_bytes + EACH * OPEN_BYTES + sent * PIECE_BYTES);
        for (uint32_t k = 0; k < EACH; k++) pyccl_op_cancel(ops[k], PYCCL_ERR_CANCELLED);
        for (uint32_t k = 0; k < EACH; k++) CHECK_EQ(finish(ops[k]), PYCCL_ERR_CANCELLED);
        for (uint32_t k = 0; k < EACH; k++) ops[k] = submit(&c, 1, spec, &x[1][k], &x[1][k], 0);
        for (uint32_t k = 0; k < EACH; k++) CHECK_EQ(finish(ops[k]), PYCCL_ERR_CANCELLED);
        pieces += sent;
    }
    pyccl_event event;
    while (pyccl_engine_events(c.engine[1], &event, 1) == 1) CHECK(event.type != PYCCL_EVENT_LINK_REFUSED);
    check_all_reduce(&c, PYCCL_FLOAT32, PYCCL_SUM, 100003, 1); /* the window is full: it goes once the peer's OPEN is there */
    free(ops);
    cluster_close(&c);
}
