/* test_seal.c: records against golden ones, streams in pieces of any size, and what an attacker on the line can do. */
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#include "seal.h"
#include "test.h"

#define STREAM (1u << 20)
#define EPOCH_BYTES (24u + RATCHET_BYTES)

static const uint8_t CIPHERS[] = {PYCCL_CIPHER_AES_256_GCM, PYCCL_CIPHER_CHACHA20_POLY1305};
static const uint8_t EPOCH_1[16] = "epoch one", EPOCH_2[16] = "epoch two";

/* Random bytes that can be foretold: the n-th draw of who. */
typedef struct dice {
    uint8_t who, drawn;
} dice;

static bool dice_draw(void *ctx, uint8_t out[RATCHET_KEY_BYTES]) {
    dice *d = ctx;
    memset(out, d->who + d->drawn++, RATCHET_KEY_BYTES);
    return true;
}

static ratchet_source dice_source(dice *d) { return (ratchet_source){dice_draw, d}; }

/* Two ends, and the line between them in the test's hands: what a sends comes out of wire[0], what b gets goes in at wire[1],
 * and the other way round. */
typedef struct line {
    seal *a, *b;
    int fd_a, fd_b, wire[2];
    dice dice_a, dice_b;
} line;

static void keys_of(pyccl_conn_keys *dialer, pyccl_conn_keys *other, uint8_t cipher) {
    *dialer = (pyccl_conn_keys){.cipher = cipher, .dialed = 1};
    for (uint8_t i = 0; i < PYCCL_SECRET_SIZE; i++) dialer->tx[i] = i, dialer->rx[i] = (uint8_t)(100 + i);
    *other = (pyccl_conn_keys){.cipher = cipher};
    memcpy(other->tx, dialer->rx, sizeof other->tx);
    memcpy(other->rx, dialer->tx, sizeof other->rx);
}

static void no_block(int fd) { REQUIRE(fcntl(fd, F_SETFL, O_NONBLOCK) == 0); }

static void line_open(line *l, uint8_t cipher) {
    pyccl_conn_keys dialer, other;
    int left[2], right[2];
    keys_of(&dialer, &other, cipher);
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, left) == 0 && socketpair(AF_UNIX, SOCK_STREAM, 0, right) == 0);
    *l = (line){NULL, NULL, left[0], right[1], {left[1], right[0]}, {0x10, 0}, {0x80, 0}};
    l->a = seal_new(&dialer, dice_source(&l->dice_a));
    l->b = seal_new(&other, dice_source(&l->dice_b));
    REQUIRE(l->a != NULL && l->b != NULL);
    no_block(l->fd_a);
    no_block(l->fd_b);
    no_block(l->wire[0]);
    no_block(l->wire[1]);
}

static void line_close(line *l) {
    seal_free(l->a);
    seal_free(l->b);
    close(l->fd_a);
    close(l->fd_b);
    close(l->wire[0]);
    close(l->wire[1]);
}

static ssize_t put(line *l, const void *data, size_t size) {
    const struct iovec iov = {(void *)(uintptr_t)data, size};
    return seal_send(l->a, l->fd_a, &iov, 1);
}

static ssize_t get(line *l, void *to, size_t size) {
    const struct iovec iov = {to, size};
    return seal_recv(l->b, l->fd_b, &iov, 1);
}

/* What a sent since, as it is on the line. */
static size_t tapped(line *l, uint8_t *to, size_t room) {
    const ssize_t n = recv(l->wire[0], to, room, 0);
    return n > 0 ? (size_t)n : 0;
}

static void deliver(line *l, const uint8_t *data, size_t size) { REQUIRE(send(l->wire[1], data, size, 0) == (ssize_t)size); }

static size_t record_of(line *l, const char *text, uint8_t *to, size_t room) {
    REQUIRE(put(l, text, strlen(text)) == (ssize_t)strlen(text));
    return tapped(l, to, room);
}

/* As record_of and get, the other way. */
static size_t record_back(line *l, const char *text, uint8_t *to, size_t room) {
    const struct iovec iov = {(void *)(uintptr_t)text, strlen(text)};
    REQUIRE(seal_send(l->b, l->fd_b, &iov, 1) == (ssize_t)strlen(text));
    const ssize_t n = recv(l->wire[1], to, room, 0);
    return n > 0 ? (size_t)n : 0;
}

static ssize_t get_back(line *l, const uint8_t *data, size_t size, void *to, size_t room) {
    const struct iovec iov = {to, room};
    REQUIRE(send(l->wire[0], data, size, 0) == (ssize_t)size);
    return seal_recv(l->a, l->fd_a, &iov, 1);
}

static bool refuses(line *l) {
    uint8_t out[64];
    const bool first = get(l, out, sizeof out) == -1 && errno == EBADMSG;
    return first && get(l, out, sizeof out) == -1 && errno == EBADMSG; /* and whatever may follow */
}

/* ---- bytes ---- */

static uint8_t hex_digit(char c) { return (uint8_t)(c <= '9' ? c - '0' : c - 'a' + 10); }

static void check_golden(const uint8_t *got, size_t size, const char *hex) {
    CHECK_EQ(size, strlen(hex) / 2);
    for (size_t i = 0; i < size && i < strlen(hex) / 2; i++)
        if (got[i] != (hex_digit(hex[2 * i]) << 4 | hex_digit(hex[2 * i + 1]))) {
            printf("  %s: byte %zu differs\n", hex, i);
            CHECK(false);
            return;
        }
}

TEST(seal_writes_and_opens_the_records_of_the_vectors) {
    char path[] = PYCCL_VECTORS "/seals.txt", who[16], text[64], hex[1024];
    unsigned cipher, epoch, seen = 0;
    line l = {.a = NULL};
    FILE *file = fopen(path, "r");
    REQUIRE(file != NULL);
    while (fscanf(file, "%u %15s %u %63s %1023s", &cipher, who, &epoch, text, hex) == 5) {
        const bool dials = strcmp(who, "dialer") == 0;
        uint8_t wire[512], out[64];
        if (seen++ % 8 == 0) {
            if (l.a != NULL) line_close(&l);
            line_open(&l, (uint8_t)cipher);
        }
        if (epoch > 0) seal_enter(dials ? l.a : l.b, epoch, epoch == 1 ? EPOCH_1 : EPOCH_2);
        const size_t size = dials ? record_of(&l, text, wire, sizeof wire) : record_back(&l, text, wire, sizeof wire);
        check_golden(wire, size, hex);
        if (dials) deliver(&l, wire, size);
        const ssize_t n = dials ? get(&l, out, sizeof out) : get_back(&l, wire, size, out, sizeof out);
        CHECK(n == (ssize_t)strlen(text) && memcmp(out, text, strlen(text)) == 0);
    }
    CHECK_EQ(seen, 16);
    line_close(&l);
    fclose(file);
}

TEST(seal_carries_a_stream_in_pieces_of_any_size_over_epochs) {
    const uint32_t seed = (uint32_t)test_seed();
    srand(seed);
    for (size_t c = 0; c < 2; c++) {
        line l;
        line_open(&l, CIPHERS[c]);
        uint8_t *sent = malloc(STREAM), *got = malloc(STREAM), *middle = malloc(STREAM);
        REQUIRE(sent != NULL && got != NULL && middle != NULL);
        for (size_t i = 0; i < STREAM; i++) sent[i] = (uint8_t)rand();
        size_t out = 0, in = 0;
        while (in < STREAM) {
            size_t want = (size_t)rand() % 200000 + 1;
            if (want > STREAM - out) want = STREAM - out;
            const size_t cut = want > 0 ? (size_t)rand() % want : 0;
            const struct iovec parts[] = {{sent + out, cut}, {sent + out + cut, want - cut}};
            const ssize_t n = want > 0 ? seal_send(l.a, l.fd_a, parts, 2) : seal_send(l.a, l.fd_a, NULL, 0);
            REQUIRE(n >= 0 || errno == EAGAIN);
            if (n > 0) out += (size_t)n;
            if (rand() % 8 == 0) seal_enter(l.a, (uint64_t)out + 1, EPOCH_1);
            size_t moved = tapped(&l, middle, (size_t)rand() % 100000 + 1), done = 0;
            do {
                const ssize_t m = done < moved ? send(l.wire[1], middle + done, moved - done, 0) : 0;
                if (m > 0) done += (size_t)m;
                size_t room = (size_t)rand() % 150000 + 1;
                if (room > STREAM - in) room = STREAM - in;
                const struct iovec into[] = {{got + in, room / 2}, {got + in + room / 2, room - room / 2}};
                const ssize_t k = seal_recv(l.b, l.fd_b, into, 2);
                REQUIRE(k > 0 || errno == EAGAIN);
                if (k > 0) in += (size_t)k;
            } while (done < moved);
            while (in < STREAM && seal_has_more(l.b)) {
                const ssize_t k = get(&l, got + in, STREAM - in < 777 ? STREAM - in : 777);
                REQUIRE(k > 0 || errno == EAGAIN); /* EAGAIN: it was told of an epoch */
                if (k > 0) in += (size_t)k;
            }
        }
        CHECK(memcmp(sent, got, STREAM) == 0);
        CHECK_EQ(seal_send(l.a, l.fd_a, NULL, 0), 0); /* an epoch that it was about to tell of, */
        uint8_t none[1];
        CHECK(get(&l, none, 1) == -1 && errno == EAGAIN); /* and one that it has told of */
        CHECK(!seal_is_unsent(l.a) && !seal_has_more(l.b));
        free(sent);
        free(got);
        free(middle);
        line_close(&l);
    }
}

TEST(seal_ends_where_the_stream_ends) {
    line l;
    uint8_t wire[256], out[8];
    line_open(&l, CIPHERS[0]);
    const size_t size = record_of(&l, "text", wire, sizeof wire);
    deliver(&l, wire, size);
    CHECK_EQ(get(&l, out, 4), 4);
    shutdown(l.wire[1], SHUT_WR);
    CHECK_EQ(get(&l, out, sizeof out), 0);
    line_close(&l);
}

/* ---- attackers ---- */

TEST(seal_opens_no_record_of_which_any_bit_was_changed) {
    for (size_t c = 0; c < 2; c++) {
        uint8_t wire[256];
        line l;
        line_open(&l, CIPHERS[c]);
        const size_t size = record_of(&l, "text", wire, sizeof wire);
        CHECK_EQ(size, SEAL_HEAD_BYTES + 4 + SEAL_TAG_BYTES);
        line_close(&l);
        for (size_t bit = 0; bit < 8 * size; bit++) {
            uint8_t bad[256] = {0}, out[64];
            line_open(&l, CIPHERS[c]);
            memcpy(bad, wire, size);
            bad[bit / 8] ^= (uint8_t)(1 << bit % 8);
            deliver(&l, bad, size);
            const ssize_t n = get(&l, out, sizeof out);
            /* a length that is legal and greater waits for bytes that then do not open */
            CHECK(n == -1 && (errno == EBADMSG || (errno == EAGAIN && bit < 24)));
            line_close(&l);
        }
    }
}

TEST(seal_opens_no_record_twice_out_of_order_or_behind_one_that_is_missing) {
    for (size_t c = 0; c < 2; c++) {
        uint8_t wire[3][64], out[64];
        size_t size = 0;
        line l;
        line_open(&l, CIPHERS[c]);
        for (int i = 0; i < 3; i++) size = record_of(&l, "text", wire[i], sizeof wire[i]);
        line_close(&l);
        const int orders[][3] = {{0, 0, 1}, {1, 0, 2}, {0, 2, 1}, {2, 1, 0}, {1, 2, 0}};
        for (size_t o = 0; o < sizeof orders / sizeof *orders; o++) {
            line_open(&l, CIPHERS[c]);
            for (int i = 0; i < 3; i++) deliver(&l, wire[orders[o][i]], size);
            if (orders[o][0] == 0) CHECK_EQ(get(&l, out, 4), 4);
            CHECK(refuses(&l));
            line_close(&l);
        }
    }
}

TEST(seal_opens_nothing_that_was_sent_the_other_way_or_over_another_connection) {
    uint8_t wire[64];
    line l;
    line_open(&l, CIPHERS[0]);
    size_t size = record_of(&l, "text", wire, sizeof wire);
    send(l.wire[0], wire, size, 0); /* back to its sender */
    uint8_t out[64];
    const struct iovec iov = {out, sizeof out};
    CHECK(seal_recv(l.a, l.fd_a, &iov, 1) == -1 && errno == EBADMSG);
    line_close(&l);

    pyccl_conn_keys dialer, other;
    line_open(&l, CIPHERS[0]);
    keys_of(&dialer, &other, CIPHERS[0]);
    dialer.tx[31] ^= 1; /* the secret of another connection */
    seal_free(l.a);
    l.a = seal_new(&dialer, dice_source(&l.dice_a));
    REQUIRE(l.a != NULL);
    size = record_of(&l, "text", wire, sizeof wire);
    deliver(&l, wire, size);
    CHECK(refuses(&l));
    line_close(&l);
}

TEST(seal_opens_nothing_of_another_epoch_whoever_stole_the_key_of_one) {
    uint8_t old[64], epoch[128], out[64];
    line l;
    line_open(&l, CIPHERS[0]);
    const size_t old_size = record_of(&l, "first", old, sizeof old);
    deliver(&l, old, old_size);
    CHECK_EQ(get(&l, out, 5), 5);
    seal_enter(l.a, 2, EPOCH_2);
    const size_t size = record_of(&l, "second", epoch, sizeof epoch);
    CHECK_EQ(size, 2 * (SEAL_HEAD_BYTES + SEAL_TAG_BYTES) + EPOCH_BYTES + 6);
    deliver(&l, epoch, size);
    CHECK_EQ(get(&l, out, 6), 6);
    CHECK(memcmp(out, "second", 6) == 0);
    deliver(&l, old, old_size); /* count 0 again, of the epoch before */
    CHECK(refuses(&l));
    line_close(&l);

    line_open(&l, CIPHERS[0]); /* records of the new epoch without the one that leads there */
    (void)record_of(&l, "first", old, sizeof old);
    seal_enter(l.a, 2, EPOCH_2);
    const size_t both = record_of(&l, "second", epoch, sizeof epoch);
    deliver(&l, epoch + SEAL_HEAD_BYTES + EPOCH_BYTES + SEAL_TAG_BYTES, both - SEAL_HEAD_BYTES - EPOCH_BYTES - SEAL_TAG_BYTES);
    CHECK(refuses(&l));
    line_close(&l);
}

/* One epoch: both sides turn, each hears of the other's new key and answers it. `thief` gets what b gets. */
static bool epoch_passes(line *l, line *thief, uint64_t number) {
    uint8_t there[512], back[512], out[64];
    bool opened = true;
    seal_enter(l->a, number, EPOCH_1);
    seal_enter(l->b, number, EPOCH_1);
    if (thief != NULL) seal_enter(thief->b, number, EPOCH_1); /* it guesses as b draws, as long as it can */
    for (int round = 0; round < 2; round++) {
        const size_t size = record_of(l, "secret", there, sizeof there), answer = record_back(l, "thanks", back, sizeof back);
        deliver(l, there, size);
        CHECK_EQ(get(l, out, sizeof out), 6);
        if (thief != NULL) {
            (void)record_back(thief, "thanks", out, sizeof out);
            deliver(thief, there, size);
            opened = get(thief, out, sizeof out) == 6 && opened;
        }
        CHECK_EQ(get_back(l, back, answer, out, sizeof out), 6);
    }
    return opened;
}

TEST(seal_shuts_out_a_thief_of_everything_that_one_side_has_with_the_next_epoch) {
    for (size_t c = 0; c < 2; c++) {
        line l, thief;
        line_open(&l, CIPHERS[c]);
        line_open(&thief, CIPHERS[c]); /* its b does what ours does: it has every secret and every key */
        CHECK(epoch_passes(&l, &thief, 1));
        CHECK(epoch_passes(&l, &thief, 2));
        thief.dice_b.who = 0xc0; /* what b draws from here on it does not know */
        CHECK(!epoch_passes(&l, &thief, 3));
        CHECK(refuses(&thief));
        line_close(&l);
        line_close(&thief);
    }
}

TEST(seal_shuts_out_a_thief_of_the_secrets_of_an_epoch_with_the_first_record_of_the_next) {
    uint8_t wire[512], back[512], out[64];
    line l, thief;
    line_open(&l, CIPHERS[0]);
    line_open(&thief, CIPHERS[0]); /* both secrets, and none of the keys that are mixed in later */
    thief.dice_b.who = 0xc0;
    seal_enter(thief.b, 1, EPOCH_1);
    (void)record_back(&thief, "key", out, sizeof out);
    seal_enter(l.b, 1, EPOCH_1);
    size_t size = record_back(&l, "key", back, sizeof back);
    CHECK_EQ(get_back(&l, back, size, out, sizeof out), 3);
    seal_enter(l.a, 1, EPOCH_1);
    size = record_of(&l, "secret", wire, sizeof wire);
    deliver(&l, wire, size);
    deliver(&thief, wire, size);
    CHECK_EQ(get(&l, out, sizeof out), 6);
    CHECK(refuses(&thief));
    line_close(&l);
    line_close(&thief);
}

TEST(seal_goes_on_with_who_never_answers_and_opens_what_was_mixed_from_an_older_key) {
    uint8_t wire[4096], late[256], out[64];
    line l;
    line_open(&l, CIPHERS[0]);
    seal_enter(l.b, 1, EPOCH_1);
    for (uint64_t number = 1; number <= 20; number++) {
        seal_enter(l.a, number, EPOCH_1);
        const size_t size = record_of(&l, "alone", wire, sizeof wire);
        deliver(&l, wire, size);
        CHECK_EQ(get(&l, out, sizeof out), 5);
        if (number == 1) { /* b answers, and that is on the line for as long as a goes on */
            const size_t back = record_back(&l, "late", late, sizeof late);
            CHECK(back > 0 && back < sizeof late);
        }
    }
    CHECK_EQ(l.dice_a.drawn, RATCHET_KEYS); /* no key without end for who says nothing */
    CHECK_EQ(get_back(&l, late, 2 * (SEAL_HEAD_BYTES + SEAL_TAG_BYTES) + EPOCH_BYTES + 4, out, sizeof out), 4);
    CHECK(memcmp(out, "late", 4) == 0);
    seal_enter(l.a, 21, EPOCH_1);
    const size_t size = record_of(&l, "both", wire, sizeof wire);
    deliver(&l, wire, size);
    CHECK_EQ(get(&l, out, sizeof out), 4);
    CHECK_EQ(l.dice_a.drawn, RATCHET_KEYS);
    line_close(&l);
}

TEST(seal_tells_of_an_epoch_and_answers_a_new_key_without_other_bytes_and_then_is_quiet) {
    uint8_t wire[512], out[64];
    line l;
    line_open(&l, CIPHERS[0]);
    seal_enter(l.a, 1, EPOCH_1);
    for (int turn = 0; turn < 3; turn++) { /* a's key, b's with it mixed in, a's answer */
        const bool there = turn % 2 == 0;
        seal *from = there ? l.a : l.b, *to = there ? l.b : l.a;
        CHECK(seal_is_unsent(from));
        CHECK_EQ(seal_send(from, there ? l.fd_a : l.fd_b, NULL, 0), 0);
        const ssize_t n = recv(l.wire[there ? 0 : 1], wire, sizeof wire, 0);
        CHECK_EQ(n, SEAL_HEAD_BYTES + EPOCH_BYTES + SEAL_TAG_BYTES);
        REQUIRE(send(l.wire[there ? 1 : 0], wire, (size_t)n, 0) == n);
        const struct iovec iov = {out, sizeof out};
        CHECK(seal_recv(to, there ? l.fd_b : l.fd_a, &iov, 1) == -1 && errno == EAGAIN);
    }
    CHECK(!seal_is_unsent(l.a) && !seal_is_unsent(l.b));
    line_close(&l);
}

TEST(seal_goes_back_to_no_older_epoch) {
    uint8_t wire[256], out[64];
    line l;
    line_open(&l, CIPHERS[0]);
    seal_enter(l.a, 2, EPOCH_2);
    size_t size = record_of(&l, "new", wire, sizeof wire);
    deliver(&l, wire, size);
    CHECK_EQ(get(&l, out, 3), 3);
    seal_enter(l.a, 1, EPOCH_1);
    size = record_of(&l, "old", wire, sizeof wire);
    deliver(&l, wire, size);
    CHECK(refuses(&l));
    line_close(&l);
}

TEST(seal_refuses_lengths_and_types_that_no_record_has) {
    const uint8_t heads[][4] = {{0, 0, 0, 1}, {0xed, 0xff, 0, 1}, {0, 0, 1, 1}, {0xff, 0xff, 0xff, 1}, {4, 0, 0, 0},
                                {4, 0, 0, 3}, {59, 0, 0, 2},      {61, 0, 0, 2}, {0, 0, 0, 2}};
    for (size_t i = 0; i < sizeof heads / sizeof *heads; i++) {
        line l;
        line_open(&l, CIPHERS[0]);
        deliver(&l, heads[i], 4);
        CHECK(refuses(&l));
        line_close(&l);
    }
}

TEST(seal_shows_nothing_of_what_it_carries) {
    uint8_t plain[4096], wire[8192];
    line l;
    line_open(&l, CIPHERS[0]);
    memset(plain, 0x5a, sizeof plain);
    REQUIRE(put(&l, plain, sizeof plain) == (ssize_t)sizeof plain);
    const size_t size = tapped(&l, wire, sizeof wire);
    for (size_t i = 0; i + 8 <= size; i++) REQUIRE(memcmp(wire + i, plain, 8) != 0);
    line_close(&l);
}

TEST(seal_knows_a_cipher_for_this_processor) {
    CHECK(pyccl_cipher_best() == PYCCL_CIPHER_AES_256_GCM || pyccl_cipher_best() == PYCCL_CIPHER_CHACHA20_POLY1305);
}
