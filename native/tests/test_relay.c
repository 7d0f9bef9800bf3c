/* test_relay.c: bytes, ends and resets pass through a relay; what is slow holds up its own pair, and there are so many. */
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdbool.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "pyccl.h"
#include "test.h"

#define WAIT_MS 60000
#define TIMEOUT_MS 20000

static const uint8_t ALICE[16] = "alice", BOB[16] = "bob", CAROL[16] = "carol", ANN[16] = "ann";
static uint32_t peers_made; /* ids that nobody has had */

/* A TCP connection over loopback: ends[0] is the test's, ends[1] the relay's. */
static void connect_tcp(int ends[2]) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    const int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    REQUIRE(bind(listener, (struct sockaddr *)&address, size) == 0 && listen(listener, 1) == 0);
    REQUIRE(getsockname(listener, (struct sockaddr *)&address, &size) == 0);
    ends[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    REQUIRE(connect(ends[0], (struct sockaddr *)&address, size) == 0);
    ends[1] = accept(listener, NULL, NULL);
    REQUIRE(ends[1] >= 0 && close(listener) == 0);
    REQUIRE(fcntl(ends[0], F_SETFL, O_NONBLOCK) == 0);
}

static pyccl_relay_end end_of(int fd, const uint8_t peer[16], const uint8_t owner[16]) {
    pyccl_relay_end end = {.fd = fd};
    memcpy(end.peer, peer, sizeof end.peer);
    memcpy(end.owner, owner, sizeof end.owner);
    return end;
}

/* A pair of the relay; a and b: the far ends. */
static pyccl_status owned(pyccl_relay *relay, int *a, int *b, const uint8_t *const peers[2], const uint8_t *const owners[2]) {
    int first[2], second[2];
    connect_tcp(first);
    connect_tcp(second);
    *a = first[0];
    *b = second[0];
    const pyccl_relay_end ends[2] = {end_of(first[1], peers[0], owners[0]), end_of(second[1], peers[1], owners[1])};
    return pyccl_relay_add(relay, ends);
}

static pyccl_status relayed(pyccl_relay *relay, int *a, int *b, const uint8_t *peer_a, const uint8_t *peer_b) {
    const uint8_t *const peers[2] = {peer_a, peer_b};
    return owned(relay, a, b, peers, peers);
}

/* Of two peers that are in no other pair. */
static pyccl_status relayed_for(pyccl_relay *relay, int *a, int *b, const uint8_t *owner_a, const uint8_t *owner_b) {
    uint8_t made[2][16] = {{0}};
    for (int i = 0; i < 2; i++, peers_made++) memcpy(made[i], &peers_made, sizeof peers_made);
    return owned(relay, a, b, (const uint8_t *const[2]){made[0], made[1]}, (const uint8_t *const[2]){owner_a, owner_b});
}

static pyccl_relay *relay_new(void) {
    pyccl_relay *relay;
    REQUIRE(pyccl_relay_new(TIMEOUT_MS, 0, &relay) == PYCCL_OK);
    return relay;
}

static bool await(int fd, short events) {
    struct pollfd one = {.fd = fd, .events = events};
    return poll(&one, 1, WAIT_MS) == 1;
}

static void send_all(int fd, const uint8_t *data, size_t size) {
    while (size > 0) {
        REQUIRE(await(fd, POLLOUT));
        const ssize_t n = send(fd, data, size, MSG_NOSIGNAL);
        REQUIRE(n > 0 || errno == EAGAIN);
        if (n > 0) data += n, size -= (size_t)n;
    }
}

/* 0: the stream has ended, -1: errno. */
static ssize_t receive(int fd, uint8_t *to, size_t size) {
    ssize_t n;
    do REQUIRE(await(fd, POLLIN));
    while ((n = recv(fd, to, size, 0)) < 0 && errno == EAGAIN);
    return n;
}

static void receive_all(int fd, uint8_t *to, size_t size) {
    while (size > 0) {
        const ssize_t n = receive(fd, to, size);
        REQUIRE(n > 0);
        to += n;
        size -= (size_t)n;
    }
}

static bool is_reset(int fd) {
    uint8_t byte;
    return receive(fd, &byte, 1) < 0 && errno == ECONNRESET;
}

static uint8_t *random_bytes(size_t size, uint64_t *state) {
    uint64_t *words = malloc(size);
    REQUIRE(words != NULL && size % sizeof *words == 0);
    for (size_t i = 0; i < size / sizeof *words; i++) words[i] = test_random(state);
    return (uint8_t *)words;
}

TEST(relay_carries_all_bytes_both_ways_at_once) {
    enum { SIZE = 32 << 20 };
    uint64_t seed = test_seed();
    pyccl_relay *relay = relay_new();
    int fds[2];
    REQUIRE(relayed(relay, &fds[0], &fds[1], ALICE, BOB) == PYCCL_OK);
    uint8_t *out[2] = {random_bytes(SIZE, &seed), random_bytes(SIZE, &seed)}, *in[2] = {malloc(SIZE), malloc(SIZE)};
    size_t sent[2] = {0, 0}, got[2] = {0, 0};
    while (got[0] < SIZE || got[1] < SIZE) {
        struct pollfd polled[2];
        for (int i = 0; i < 2; i++) polled[i] = (struct pollfd){.fd = fds[i], .events = sent[i] < SIZE ? POLLIN | POLLOUT : POLLIN};
        REQUIRE(poll(polled, 2, WAIT_MS) > 0);
        for (int i = 0; i < 2; i++) {
            const size_t most = 1 + test_random(&seed) % 200000; /* odd sizes, over many pipes' worth */
            ssize_t n = send(fds[i], out[i] + sent[i], SIZE - sent[i] < most ? SIZE - sent[i] : most, MSG_NOSIGNAL);
            if (n > 0) sent[i] += (size_t)n;
            n = recv(fds[i], in[i] + got[i], SIZE - got[i], 0);
            REQUIRE(n != 0 && (n > 0 || errno == EAGAIN));
            if (n > 0) got[i] += (size_t)n;
        }
    }
    for (int i = 0; i < 2; i++) CHECK(memcmp(in[i], out[1 - i], SIZE) == 0);
    for (int i = 0; i < 2; i++) free(in[i]), free(out[i]), close(fds[i]);
    pyccl_relay_free(relay);
}

TEST(relay_passes_on_the_end_of_one_way_and_carries_the_other) {
    pyccl_relay *relay = relay_new();
    int a, b;
    uint8_t got[8] = {0};
    REQUIRE(relayed(relay, &a, &b, ALICE, BOB) == PYCCL_OK);
    CHECK_EQ(pyccl_relay_pairs(relay), 1);
    send_all(a, (const uint8_t *)"question", 8);
    CHECK(shutdown(a, SHUT_WR) == 0);
    receive_all(b, got, 8);
    CHECK(memcmp(got, "question", 8) == 0);
    CHECK_EQ(receive(b, got, 1), 0);
    CHECK_EQ(pyccl_relay_pairs(relay), 1);
    send_all(b, (const uint8_t *)"answers!", 8);
    CHECK(shutdown(b, SHUT_WR) == 0);
    receive_all(a, got, 8);
    CHECK(memcmp(got, "answers!", 8) == 0);
    CHECK_EQ(receive(a, got, 1), 0);
    CHECK_EQ(pyccl_relay_pairs(relay), 0);
    close(a);
    close(b);
    pyccl_relay_free(relay);
}

TEST(relay_holds_little_of_what_nobody_reads_and_serves_others_meanwhile) {
    enum { MOST = 256 << 20, CHUNK = 1 << 16 };
    uint64_t seed = test_seed();
    pyccl_relay *relay = relay_new();
    int a, b, c, d;
    REQUIRE(relayed(relay, &a, &b, ALICE, BOB) == PYCCL_OK);
    REQUIRE(relayed(relay, &c, &d, ALICE, CAROL) == PYCCL_OK);
    uint8_t *chunk = random_bytes(CHUNK, &seed), *got = malloc(CHUNK), echo[4];
    size_t sent = 0, part = 0;
    struct pollfd full = {.fd = a, .events = POLLOUT};
    while (sent < MOST && poll(&full, 1, 300) == 1) {
        const ssize_t n = send(a, chunk + part, CHUNK - part, MSG_NOSIGNAL);
        REQUIRE(n > 0 || errno == EAGAIN);
        if (n <= 0) continue;
        sent += (size_t)n;
        part = (part + (size_t)n) % CHUNK;
    }
    CHECK(sent < MOST); /* what the buffers of four sockets and a pipe hold */
    send_all(c, (const uint8_t *)"ping", 4);
    receive_all(d, echo, 4);
    CHECK(shutdown(a, SHUT_WR) == 0);
    for (size_t at = 0; at < sent;) {
        const size_t size = sent - at < CHUNK ? sent - at : CHUNK;
        receive_all(b, got, size);
        CHECK(memcmp(got, chunk, size) == 0);
        at += size;
    }
    CHECK_EQ(receive(b, got, 1), 0);
    free(chunk), free(got);
    close(a), close(b), close(c), close(d);
    pyccl_relay_free(relay);
}

TEST(relay_passes_a_reset_on) {
    pyccl_relay *relay = relay_new();
    const struct linger now = {.l_onoff = 1};
    int a, b;
    REQUIRE(relayed(relay, &a, &b, ALICE, BOB) == PYCCL_OK);
    CHECK(setsockopt(a, SOL_SOCKET, SO_LINGER, &now, sizeof now) == 0 && close(a) == 0);
    CHECK(is_reset(b));
    CHECK_EQ(pyccl_relay_pairs(relay), 0);
    close(b);
    pyccl_relay_free(relay);
}

TEST(relay_resets_what_goes_to_a_socket_that_is_gone) { /* splice() raises SIGPIPE there */
    pyccl_relay *relay = relay_new();
    uint8_t bytes[1000] = {0};
    int a, b;
    REQUIRE(relayed(relay, &a, &b, ALICE, BOB) == PYCCL_OK);
    CHECK(close(b) == 0);
    CHECK_EQ(receive(a, bytes, 1), 0);
    ssize_t sent;
    do {
        REQUIRE(await(a, POLLOUT));
        sent = send(a, bytes, sizeof bytes, MSG_NOSIGNAL);
    } while (sent > 0 || errno == EAGAIN);
    CHECK(errno == ECONNRESET || errno == EPIPE);
    close(a);
    pyccl_relay_free(relay);
}

TEST(relay_forgets_the_pairs_of_a_peer_and_no_others) {
    pyccl_relay *relay = relay_new();
    int fds[3][2];
    uint8_t echo[4];
    REQUIRE(relayed(relay, &fds[0][0], &fds[0][1], ALICE, BOB) == PYCCL_OK);
    REQUIRE(relayed(relay, &fds[1][0], &fds[1][1], BOB, CAROL) == PYCCL_OK);
    REQUIRE(relayed(relay, &fds[2][0], &fds[2][1], ALICE, CAROL) == PYCCL_OK);
    pyccl_relay_forget(relay, BOB);
    CHECK_EQ(pyccl_relay_pairs(relay), 1);
    for (int i = 0; i < 2; i++) CHECK(is_reset(fds[i][0]) && is_reset(fds[i][1]));
    send_all(fds[2][0], (const uint8_t *)"here", 4);
    receive_all(fds[2][1], echo, 4);
    CHECK(memcmp(echo, "here", 4) == 0);
    pyccl_relay_free(relay);
    CHECK(is_reset(fds[2][0]) && is_reset(fds[2][1]));
    for (int i = 0; i < 3; i++) close(fds[i][0]), close(fds[i][1]);
}

TEST(relay_takes_so_many_pairs_and_closes_the_sockets_of_one_more) {
    pyccl_relay *relay = relay_new();
    int fds[PYCCL_RELAY_PAIRS_MAX][2], more[2];
    uint8_t byte;
    const uint8_t *const owners[2] = {ALICE, BOB};
    for (int i = 0; i < PYCCL_RELAY_PAIRS_MAX; i++)
        REQUIRE(relayed_for(relay, &fds[i][0], &fds[i][1], owners[i % 2], owners[i % 2]) == PYCCL_OK);
    CHECK_EQ(relayed_for(relay, &more[0], &more[1], CAROL, ANN), PYCCL_ERR_LIMIT);
    for (int i = 0; i < 2; i++) CHECK_EQ(receive(more[i], &byte, 1), 0);
    for (int i = 0; i < 2; i++) close(more[i]), close(fds[7][i]); /* a place is free again when both ways have ended */
    while (pyccl_relay_pairs(relay) == PYCCL_RELAY_PAIRS_MAX) CHECK(poll(NULL, 0, 1) == 0);
    REQUIRE(relayed(relay, &fds[7][0], &fds[7][1], CAROL, ANN) == PYCCL_OK);
    send_all(fds[7][0], (const uint8_t *)"x", 1);
    receive_all(fds[7][1], &byte, 1);
    CHECK_EQ(byte, 'x');
    for (int i = 0; i < PYCCL_RELAY_PAIRS_MAX; i++) close(fds[i][0]), close(fds[i][1]);
    pyccl_relay_free(relay);
}

TEST(relay_leaves_room_for_others_than_one_owner) {
    pyccl_relay *relay = relay_new();
    int fds[PYCCL_RELAY_OWNED_MAX + 2][2], more[2];
    uint8_t byte;
    for (int i = 0; i < PYCCL_RELAY_OWNED_MAX; i++)
        REQUIRE(relayed_for(relay, &fds[i][0], &fds[i][1], i % 3 ? ALICE : BOB, i % 3 == 1 ? BOB : ALICE) == PYCCL_OK);
    const pyccl_relay_end alices[2] = {end_of(-1, ANN, ALICE), end_of(-1, CAROL, ALICE)};
    const pyccl_relay_end others[2] = {end_of(-1, ANN, CAROL), end_of(-1, CAROL, ANN)};
    CHECK_EQ(pyccl_relay_room(relay, alices), 0);
    CHECK_EQ(pyccl_relay_room(relay, others), PYCCL_RELAY_PAIRS_MAX - PYCCL_RELAY_OWNED_MAX);
    CHECK_EQ(relayed_for(relay, &more[0], &more[1], ALICE, ALICE), PYCCL_ERR_LIMIT);
    for (int i = 0; i < 2; i++) CHECK_EQ(receive(more[i], &byte, 1), 0), close(more[i]);
    CHECK_EQ(relayed_for(relay, &more[0], &more[1], CAROL, ALICE), PYCCL_ERR_LIMIT);
    for (int i = 0; i < 2; i++) close(more[i]);
    for (int i = PYCCL_RELAY_OWNED_MAX; i < PYCCL_RELAY_OWNED_MAX + 2; i++)
        REQUIRE(relayed_for(relay, &fds[i][0], &fds[i][1], CAROL, ANN) == PYCCL_OK);
    for (int i = 0; i < PYCCL_RELAY_OWNED_MAX + 2; i++) close(fds[i][0]), close(fds[i][1]);
    pyccl_relay_free(relay);
}

TEST(relay_resets_the_oldest_pair_of_two_peers_for_a_new_one_and_no_others) {
    enum { EACH = PYCCL_RELAY_SAME_MAX };
    pyccl_relay *relay = relay_new();
    int other[2], fds[2 * EACH][2];
    uint8_t echo[4];
    REQUIRE(relayed(relay, &other[0], &other[1], ALICE, CAROL) == PYCCL_OK);
    for (int i = 0; i < 2 * EACH; i++) {
        const bool turned = i % 2 != 0;
        REQUIRE(relayed(relay, &fds[i][0], &fds[i][1], turned ? BOB : ALICE, turned ? ALICE : BOB) == PYCCL_OK);
        if (i >= EACH) CHECK(is_reset(fds[i - EACH][0]) && is_reset(fds[i - EACH][1]));
    }
    CHECK_EQ(pyccl_relay_pairs(relay), EACH + 1);
    for (int i = EACH; i <= 2 * EACH; i++) {
        const int *ends = i < 2 * EACH ? fds[i] : other;
        send_all(ends[0], (const uint8_t *)"here", 4);
        receive_all(ends[1], echo, 4);
    }
    for (int i = 0; i < 2 * EACH; i++) close(fds[i][0]), close(fds[i][1]);
    close(other[0]), close(other[1]);
    pyccl_relay_free(relay);
}

TEST(relay_resets_a_pair_that_carries_nothing_and_no_other) {
    enum { SILENCE_MS = 2000 };
    pyccl_relay *relay;
    REQUIRE(pyccl_relay_new(SILENCE_MS, 0, &relay) == PYCCL_OK);
    int fds[2][2], full[2];
    uint8_t byte, chunk[4096] = {0};
    REQUIRE(relayed(relay, &full[0], &full[1], ALICE, ANN) == PYCCL_OK);
    while (send(full[0], chunk, sizeof chunk, MSG_NOSIGNAL) > 0) continue; /* who does not read is silent, too */
    for (int i = 0; i < 2; i++) REQUIRE(relayed(relay, &fds[i][0], &fds[i][1], ALICE, i ? BOB : CAROL) == PYCCL_OK);
    for (int beat = 0; pyccl_relay_pairs(relay) > 1; beat = 1 - beat) { /* one way is enough at a time */
        CHECK(poll(NULL, 0, 1) == 0);
        send_all(fds[1][beat], (const uint8_t *)"x", 1);
        receive_all(fds[1][1 - beat], &byte, 1);
    }
    CHECK(is_reset(fds[0][0]) && is_reset(fds[0][1]));
    CHECK_EQ(pyccl_relay_pairs(relay), 1);
    CHECK(is_reset(fds[1][0]) && is_reset(fds[1][1])); /* now that it is silent, too */
    CHECK_EQ(pyccl_relay_pairs(relay), 0);
    for (int i = 0; i < 2; i++) close(fds[i][0]), close(fds[i][1]), close(full[i]);
    pyccl_relay_free(relay);
}

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

TEST(relay_with_a_cap_carries_everything_and_no_faster) {
    enum { SIZE = 1 << 20, PAIRS = 3, RATE = 4 << 20, BURST = 256 << 10 };
    uint64_t seed = test_seed();
    pyccl_relay *relay;
    REQUIRE(pyccl_relay_new(TIMEOUT_MS, RATE, &relay) == PYCCL_OK);
    const double began = now_s();
    uint8_t *data = random_bytes(SIZE, &seed), *got = calloc(PAIRS, SIZE);
    int fds[PAIRS][2];
    size_t sent[PAIRS] = {0}, received[PAIRS] = {0}, total = 0;
    for (int i = 0; i < PAIRS; i++) REQUIRE(relayed_for(relay, &fds[i][0], &fds[i][1], ALICE, BOB) == PYCCL_OK);
    while (total < (size_t)PAIRS * SIZE) {
        struct pollfd polled[2 * PAIRS];
        for (int i = 0; i < PAIRS; i++) {
            polled[i] = (struct pollfd){.fd = fds[i][1], .events = POLLIN};
            polled[PAIRS + i] = (struct pollfd){.fd = fds[i][0], .events = sent[i] < SIZE ? POLLOUT : 0};
        }
        REQUIRE(poll(polled, 2 * PAIRS, WAIT_MS) > 0);
        for (int i = 0; i < PAIRS; i++) {
            ssize_t n = send(fds[i][0], data + sent[i], SIZE - sent[i], MSG_NOSIGNAL);
            if (n > 0) sent[i] += (size_t)n;
            n = recv(fds[i][1], got + (size_t)i * SIZE + received[i], SIZE - received[i], 0);
            if (n > 0) received[i] += (size_t)n, total += (size_t)n;
        }
        CHECK((double)total <= BURST + RATE * (now_s() - began));
    }
    for (int i = 0; i < PAIRS; i++) CHECK(memcmp(got + (size_t)i * SIZE, data, SIZE) == 0);
    for (int i = 0; i < PAIRS; i++) close(fds[i][0]), close(fds[i][1]);
    free(data);
    free(got);
    pyccl_relay_free(relay);
}

TEST(relay_refuses_what_is_no_descriptor_and_closes_the_other) {
    pyccl_relay *relay = relay_new();
    int ends[2];
    connect_tcp(ends);
    const pyccl_relay_end pair[2] = {end_of(ends[1], ALICE, ALICE), end_of(-1, BOB, BOB)};
    CHECK_EQ(pyccl_relay_add(relay, pair), PYCCL_ERR_OS);
    CHECK(is_reset(ends[0]));
    CHECK_EQ(pyccl_relay_pairs(relay), 0);
    close(ends[0]);
    pyccl_relay_free(relay);
    pyccl_relay_free(NULL);
}
