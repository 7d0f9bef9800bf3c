/* test_engine_links.c: what a peer may send and when it is heard: garbage, pieces that do not fit, later epochs, silence,
 * the pulse, the cut, specs that differ; and arguments that the engine refuses. */
#include <errno.h>
#include <linux/tcp.h>

#include "engine_vectors.h"
#include "frame.h"

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
        {.type = PYCCL_FRAME_DATA, .phase = 1, .offset = SCHEDULE_PIECE_BYTES, .spec_hash = hash, .length = 8},
        {.type = PYCCL_FRAME_DATA, .phase = 1, .offset = UINT64_MAX - SCHEDULE_PIECE_BYTES + 1, .spec_hash = hash, .length = 4000},
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

/* The congestion control of a new connection in an engine for which a round trip of long_rtt_ns is long. */
static void congestion_with(int64_t long_rtt_ns, char name[16]) {
    pyccl_engine_options options = {.heartbeat_ns = SECOND, .silence_ns = 60 * SECOND, .long_rtt_ns = long_rtt_ns,
                                    .fsm = {.settle_ns = SECOND, .stall_ns = SECOND, .tell_ns = SECOND}};
    uint8_t id[16];
    uint32_t slot;
    int pair[2];
    pyccl_engine *engine = NULL;
    socklen_t size = 15;
    memset(id, 0x77, sizeof id);
    REQUIRE(pyccl_engine_new(&options, &engine) == PYCCL_OK && pyccl_engine_peer_add(engine, id, &slot) == PYCCL_OK);
    tcp_pair(pair);
    const int kept = dup(pair[0]);
    REQUIRE(setsockopt(kept, IPPROTO_TCP, TCP_CONGESTION, "reno", 4) == 0);
    REQUIRE(pyccl_engine_conn_add(engine, slot, pair[0]) == PYCCL_OK);
    memset(name, 0, 16);
    REQUIRE(getsockopt(kept, IPPROTO_TCP, TCP_CONGESTION, name, &size) == 0);
    pyccl_engine_free(engine);
    close(kept);
    close(pair[1]);
}

TEST(engine_gives_long_lines_bbr_and_leaves_short_ones_as_they_are) {
    char name[16];
    const int probe = socket(AF_INET, SOCK_STREAM, 0);
    const int has_bbr = setsockopt(probe, IPPROTO_TCP, TCP_CONGESTION, "bbr", 3) == 0;
    close(probe);
    congestion_with(1, name);
    CHECK(strcmp(name, has_bbr ? "bbr" : "reno") == 0);
    congestion_with(3600 * SECOND, name);
    CHECK(strcmp(name, "reno") == 0);
    congestion_with(0, name);
    CHECK(strcmp(name, "reno") == 0);
}

/* Bytes that the peer has of what left over this connection of the link from 0 to 1. */
static uint64_t sent_over(const cluster *c, uint32_t conn) {
    struct tcp_info info = {0};
    socklen_t size = sizeof info;
    REQUIRE(getsockopt(c->raw[0][1][conn], IPPROTO_TCP, TCP_INFO, &info, &size) == 0);
    return info.tcpi_bytes_acked;
}

TEST(engine_sends_data_over_as_many_connections_as_it_is_told_and_asks_for_those_that_lack) {
    cluster c;
    cluster_open(&c, 2, 3, OVER_TCP);
    const uint64_t count = 1 << 20, piece = SCHEDULE_PIECE_BYTES;
    pyccl_link_stats stats;
    pyccl_event event;
    CHECK_EQ(pyccl_engine_link_use(c.engine[0], c.slot[0][1], PYCCL_CONNS_MAX + 1), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_engine_link_use(c.engine[0], 99, 1), PYCCL_ERR_ARGUMENT);
    for (uint32_t use = 1; use <= 4; use += 3) {
        CHECK_EQ(pyccl_engine_link_use(c.engine[0], c.slot[0][1], use), PYCCL_OK);
        vectors v = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, count, 2, 83 + use);
        pyccl_op *ops[2];
        for (uint32_t i = 0; i < 2; i++) ops[i] = submit(&c, i, reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, count, 0), v.in[i], v.in[i], 0);
        for (uint32_t i = 0; i < 2; i++) {
            CHECK_EQ(finish(ops[i]), PYCCL_OK);
            CHECK(memcmp(v.in[i], v.want, v.bytes) == 0);
        }
        CHECK(sent_over(&c, 0) > piece);
        if (use == 1) CHECK(sent_over(&c, 1) + sent_over(&c, 2) < piece); /* DONE and heartbeats go over all */
        else CHECK(sent_over(&c, 1) > piece && sent_over(&c, 2) > piece);
        vectors_free(&v);
    }
    CHECK(await_event(c.engine[0], PYCCL_EVENT_LINK_WANTS, &event));
    CHECK(event.slot == c.slot[0][1] && event.count == 4);
    REQUIRE(pyccl_engine_link_stats(c.engine[0], c.slot[0][1], &stats) == PYCCL_OK);
    CHECK(stats.conns == 3 && stats.lanes == 4 && stats.rtt_ns > 0);
    CHECK_EQ(pyccl_engine_link_use(c.engine[0], c.slot[0][1], 0), PYCCL_OK); /* it is told nothing any more: all there are */
    REQUIRE(pyccl_engine_link_stats(c.engine[0], c.slot[0][1], &stats) == PYCCL_OK);
    CHECK_EQ(stats.lanes, PYCCL_CONNS_MAX);
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

/* A complaint is kept over an epoch, so what takes it back must come in the new one too. */
TEST(engine_reports_silence_again_in_a_new_epoch_and_then_that_it_hears) {
    cluster c;
    cluster_open_with(&c, 2, 1, OVER_TCP, SECOND / 50, SECOND / 5);
    int pair[2];
    take_the_place_of_1(&c, pair);
    CHECK(await_event(c.engine[0], PYCCL_EVENT_LINK_SILENT, NULL));
    const pyccl_epoch epoch = {.number = 2, .id = {0x42}, .world = 2, .members = c.id[0]};
    CHECK_EQ(pyccl_engine_epoch(c.engine[0], &epoch, NULL, 0), PYCCL_OK);
    pyccl_event event = {0};
    CHECK_EQ(pyccl_engine_events(c.engine[0], &event, 1), 1); /* told as the epoch begins, not at some later look */
    CHECK_EQ(event.type, PYCCL_EVENT_LINK_SILENT);
    uint8_t beat[64];
    CHECK(recv(pair[1], beat, 64, MSG_WAITALL) == 64);
    CHECK(send(pair[1], beat, 64, MSG_NOSIGNAL) == 64);
    CHECK(await_event(c.engine[0], PYCCL_EVENT_LINK_HEARD, NULL));
    close(pair[1]);
    cluster_close(&c);
}

TEST(engine_closes_silent_connections_for_a_new_one_and_reports_silence_of_that_too) {
    cluster c;
    cluster_open_with(&c, 2, 1, OVER_TCP, SECOND / 50, SECOND / 5);
    int pair[2], other[2];
    take_the_place_of_1(&c, pair);
    CHECK(await_event(c.engine[0], PYCCL_EVENT_LINK_SILENT, NULL));
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, other) == 0);
    CHECK_EQ(pyccl_engine_conn_add(c.engine[0], c.slot[0][1], other[0]), PYCCL_OK);
    CHECK(await_event(c.engine[0], PYCCL_EVENT_LINK_HEARD, NULL));
    pyccl_event down = {0};
    CHECK(await_event(c.engine[0], PYCCL_EVENT_CONN_DOWN, &down));
    CHECK(down.slot == c.slot[0][1] && down.count == 1);
    uint8_t beats[4096];
    ssize_t n = 1;
    while (n > 0) n = recv(pair[1], beats, sizeof beats, 0); /* what was sent before the end */
    CHECK_EQ(n, 0);
    CHECK(await_event(c.engine[0], PYCCL_EVENT_LINK_SILENT, NULL));
    close(pair[1]);
    close(other[1]);
    cluster_close(&c);
}

/* What stands between may swallow one connection alone, and acknowledge it. */
TEST(engine_closes_a_connection_that_swallows_where_others_are_heard) {
    cluster c;
    cluster_open_with(&c, 2, 3, OVER_TCP, SECOND / 50, SECOND / 5);
    int hole[2];
    tcp_pair(hole);
    CHECK_EQ(pyccl_engine_conn_add(c.engine[0], c.slot[0][1], hole[0]), PYCCL_OK);
    vectors v = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, LONG(4000001), 2, 5);
    pyccl_op *ops[2];
    for (uint32_t i = 0; i < 2; i++) ops[i] = submit(&c, i, reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, LONG(4000001), 0), v.in[i], v.out[i], 0);
    static uint8_t swallowed[65536];
    ssize_t n = 1;
    uint64_t bytes = 0;
    while ((n = recv(hole[1], swallowed, sizeof swallowed, 0)) > 0) bytes += (uint64_t)n;
    CHECK(bytes > sizeof swallowed); /* and not just heartbeats */
    pyccl_event down = {0};
    CHECK(await_event(c.engine[0], PYCCL_EVENT_CONN_DOWN, &down));
    CHECK(down.slot == c.slot[0][1] && down.count == 3);
    for (uint32_t i = 0; i < 2; i++) {
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
        CHECK(memcmp(v.out[i], v.want, v.bytes) == 0);
    }
    pyccl_event event;
    while (pyccl_engine_events(c.engine[0], &event, 1) == 1) CHECK(event.type != PYCCL_EVENT_LINK_SILENT);
    vectors_free(&v);
    close(hole[1]);
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

TEST(engine_refuses_a_peer_that_asks_for_more_state_than_is_queued_and_reads_none) {
    enum { STATE_BYTES = 2 * PYCCL_PIECE_MAX, MANY = 3000 };
    cluster c;
    cluster_open(&c, 2, 1, OVER_TCP);
    uint8_t *state = calloc(1, STATE_BYTES);
    const pyccl_region region = {state, STATE_BYTES};
    REQUIRE(pyccl_state_publish(c.engine[0], 7, &region, 1) == PYCCL_OK);
    int pair[2];
    take_the_place_of_1(&c, pair);
    const int kept = c.raw[1][0][0];
    c.raw[1][0][0] = pair[1];
    for (uint32_t k = 0; k < MANY; k++) /* none lies in another */
        send_frame(&c, 1, 0, (pyccl_frame){.type = PYCCL_FRAME_STATE_ASK, .seq = 7, .offset = k, .value = PYCCL_PIECE_MAX}, 0);
    CHECK(await_event(c.engine[0], PYCCL_EVENT_LINK_REFUSED, NULL));
    c.raw[1][0][0] = kept;
    close(pair[1]);
    REQUIRE(pyccl_state_unpublish(c.engine[0], 7) == PYCCL_OK);
    cluster_close(&c);
    free(state);
}

TEST(engine_pulse_beats_and_reports_its_end) {
    cluster c;
    cluster_open_with(&c, 2, 1, OVER_TCP, SECOND / 50, 5 * SECOND);
    int pair[2];
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    CHECK_EQ(pyccl_engine_pulse(c.engine[0], pair[0], NULL), PYCCL_OK);
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
