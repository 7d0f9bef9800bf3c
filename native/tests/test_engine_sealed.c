/* test_engine_sealed.c: operations over sealed connections, some of AES-GCM and some of ChaCha20: epochs, caps, attackers.
 * Heartbeats come too seldom to help on what got stuck. */
#include <errno.h>
#include <poll.h>

#include "engine_vectors.h"
#include "seal.h"

#define SELDOM (600 * SECOND)

static void open_sealed(cluster *c, uint32_t world, uint32_t conns) {
    cluster_open_with(c, world, conns, SEALED_TCP, SELDOM, 2 * SELDOM);
}

static void reduce_all(cluster *c, uint64_t count, uint32_t tag) {
    vectors v = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, count, c->count, tag);
    pyccl_op *ops[ENGINES_MAX];
    for (uint32_t i = 0; i < c->count; i++) ops[i] = submit(c, i, reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, count, tag), v.in[i], v.in[i], 0);
    for (uint32_t i = 0; i < c->count; i++) {
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
        CHECK(memcmp(v.in[i], v.want, v.bytes) == 0);
    }
    vectors_free(&v);
}

TEST(engine_reduces_over_sealed_connections_from_epoch_to_epoch) {
    cluster c;
    open_sealed(&c, 3, 3);
    for (uint32_t i = 0; i < 4; i++) {
        reduce_all(&c, LONG(1000003), 2 * i);
        reduce_all(&c, 5, 2 * i + 1);
        cluster_epoch(&c, 1);
    }
    cluster_close(&c);
}

TEST(engine_reads_sealed_frames_that_it_left_unread_when_it_enters_their_epoch) {
    cluster c;
    open_sealed(&c, 2, 1);
    uint8_t members[2][16];
    memcpy(members[0], c.id[0], 16);
    memcpy(members[1], c.id[1], 16);
    pyccl_epoch next = {.number = ++c.number, .restart = 1, .world = 2, .members = members[0]};
    memset(next.id, 0x77, sizeof next.id);
    REQUIRE(pyccl_engine_epoch(c.engine[0], &next, NULL, 0) == PYCCL_OK);
    vectors v = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, 100000, 2, 1);
    pyccl_op *first = submit(&c, 0, reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, 100000, 0), v.in[0], v.in[0], 0);
    pyccl_link_stats seen = {0};
    const int64_t until = now_ns() + PATIENCE;
    while (seen.rx_bytes == 0 && now_ns() < until) REQUIRE(pyccl_engine_link_stats(c.engine[1], c.slot[1][0], &seen) == PYCCL_OK);
    CHECK(seen.rx_bytes > 0);
    next.rank = 1;
    REQUIRE(pyccl_engine_epoch(c.engine[1], &next, NULL, 0) == PYCCL_OK);
    pyccl_op *second = submit(&c, 1, reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, 100000, 0), v.in[1], v.in[1], 0);
    CHECK_EQ(finish(first), PYCCL_OK);
    CHECK_EQ(finish(second), PYCCL_OK);
    CHECK(memcmp(v.in[0], v.want, v.bytes) == 0 && memcmp(v.in[1], v.want, v.bytes) == 0);
    vectors_free(&v);
    cluster_close(&c);
}

TEST(engine_reads_sealed_connections_on_after_a_cap_held_them) {
    cluster c = {.max_rx = 8 << 20};
    cluster_open_as_it_is(&c, 2, 2, SEALED_TCP, SELDOM, 2 * SELDOM);
    reduce_all(&c, 500000, 0);
    cluster_close(&c);
}

/* Bytes of an attacker between the records of engine 0: the connection ends at engine 1, the operation goes on over others. */
TEST(engine_loses_a_connection_to_an_attacker_and_nothing_else) {
    cluster c;
    open_sealed(&c, 2, 4);
    const uint64_t count = LONG(12000007);
    vectors v = vectors_new(PYCCL_FLOAT32, PYCCL_SUM, count, 2, 9);
    pyccl_op *ops[2];
    for (uint32_t i = 0; i < 2; i++) ops[i] = submit(&c, i, reduce_spec(PYCCL_FLOAT32, PYCCL_SUM, count, 0), v.in[i], v.in[i], 0);
    for (uint32_t k = 0; k < 3; k++) {
        const uint8_t garbage[64] = {8, 0, 0, 1};
        pyccl_event event;
        struct pollfd room = {.fd = c.raw[0][1][k], .events = POLLOUT};
        ssize_t n;
        do REQUIRE(poll(&room, 1, 60000) == 1); /* the engine fills the socket, too */
        while ((n = send(room.fd, garbage, sizeof garbage, MSG_NOSIGNAL)) < 0 && errno == EAGAIN);
        REQUIRE(n > 0);
        CHECK(await_event(c.engine[1], PYCCL_EVENT_CONN_DOWN, &event));
        CHECK_EQ(event.count, 3 - k);
        CHECK_EQ(event.code, EBADMSG);
    }
    for (uint32_t i = 0; i < 2; i++) {
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
        CHECK(memcmp(v.in[i], v.want, v.bytes) == 0);
    }
    vectors_free(&v);
    cluster_close(&c);
}

TEST(engine_refuses_keys_of_no_known_cipher) {
    cluster c;
    open_sealed(&c, 2, 1);
    int pair[2];
    tcp_pair(pair);
    const pyccl_conn_keys unknown = {.cipher = 3}, odd = {.cipher = PYCCL_CIPHER_AES_256_GCM, .dialed = 2};
    CHECK_EQ(pyccl_engine_conn_add_sealed(c.engine[0], c.slot[0][1], pair[0], &unknown), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_engine_conn_add_sealed(c.engine[0], c.slot[0][1], pair[1], &odd), PYCCL_ERR_ARGUMENT);
    cluster_close(&c);
}

TEST(engine_seals_its_heartbeats_to_the_master) {
    cluster c;
    cluster_open_with(&c, 2, 1, SEALED_TCP, SECOND / 50, 5 * SECOND);
    int pair[2];
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    const pyccl_conn_keys ours = {.tx = {1}, .rx = {2}, .cipher = PYCCL_CIPHER_AES_256_GCM, .dialed = 1};
    const pyccl_conn_keys masters = {.tx = {2}, .rx = {1}, .cipher = PYCCL_CIPHER_AES_256_GCM};
    seal *master = seal_new(&masters, (ratchet_source){0});
    REQUIRE(master != NULL);
    CHECK_EQ(pyccl_engine_pulse(c.engine[0], pair[0], &ours), PYCCL_OK);
    for (int k = 0; k < 3;) {
        uint8_t beat[PYCCL_FRAME_SIZE];
        pyccl_frame frame;
        struct pollfd come = {.fd = pair[1], .events = POLLIN};
        REQUIRE(poll(&come, 1, 60000) == 1);
        const struct iovec iov = {beat, sizeof beat};
        const ssize_t n = seal_recv(master, pair[1], &iov, 1);
        if (n < 0 && errno == EAGAIN) continue; /* half a record */
        REQUIRE(n == (ssize_t)sizeof beat);
        CHECK_EQ(pyccl_frame_decode_untrusted(beat, &frame), PYCCL_OK);
        CHECK_EQ(frame.type, PYCCL_FRAME_HEARTBEAT);
        k++;
    }
    seal_free(master);
    close(pair[1]);
    CHECK(await_event(c.engine[0], PYCCL_EVENT_PULSE_DOWN, NULL));
    int refused[2];
    const pyccl_conn_keys unknown = {.cipher = 3};
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, refused) == 0);
    CHECK_EQ(pyccl_engine_pulse(c.engine[0], refused[0], &unknown), PYCCL_ERR_ARGUMENT);
    close(refused[1]);
    cluster_close(&c);
}
