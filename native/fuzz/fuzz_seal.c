/* fuzz_seal.c: records of a sealed connection that somebody in between alters. What is opened is the beginning of what was
 * sealed; the first record that was touched ends it, and nothing behind it comes. Input: cipher, how the stream is read,
 * then commands: seal some bytes, go on in an epoch, send as it is, flip a bit, cut, repeat, put in other bytes. */
#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

#include "../src/seal.h"
#include "fuzz.h"

enum { STREAM_MAX = 1 << 17, PART_MAX = 70000 };

static uint8_t plain[STREAM_MAX], wire[2 * STREAM_MAX];

/* What the other side of the socket has. */
static size_t drain(int fd, uint8_t *to, size_t room) {
    size_t got = 0;
    ssize_t n;
    while (got < room && (n = recv(fd, to + got, room - got, MSG_DONTWAIT)) > 0) got += (size_t)n;
    return got;
}

/* Private keys that every run of an input draws alike. */
static bool draw(void *ctx, uint8_t out[RATCHET_KEY_BYTES]) {
    memset(out, ++*(uint8_t *)ctx, RATCHET_KEY_BYTES);
    return true;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_input in = {data, size};
    pyccl_conn_keys one = {.cipher = 1 + fuzz_u8(&in) % 2, .dialed = 1}, other = {.cipher = one.cipher};
    const size_t read_size = 1 + fuzz_u64(&in) % PART_MAX;
    size_t sealed = 0, sent = 0;     /* bytes of `plain`, of `wire` */
    uint64_t epoch = 0;
    bool harmed = false;
    int pair[2];
    memset(one.tx, 1, sizeof one.tx);
    memset(one.rx, 2, sizeof one.rx);
    memset(other.tx, 2, sizeof other.tx);
    memset(other.rx, 1, sizeof other.rx);
    uint8_t drawn = 0;
    const ratchet_source source = {draw, &drawn};
    seal *from = seal_new(&one, source), *to = seal_new(&other, source);
    HOLDS(from != NULL && to != NULL && socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    while (in.left > 0 && sent < sizeof wire - 2 * SEAL_RECORD_MAX) {
        const uint8_t what = fuzz_u8(&in);
        const size_t number = fuzz_u64(&in) % PART_MAX;
        switch (what % 6) {
        case 0: { /* seal; honest, unless something before was touched */
            const size_t n = number < STREAM_MAX - sealed ? number : STREAM_MAX - sealed;
            if (n == 0) break;
            memset(plain + sealed, what, n);
            const struct iovec iov = {plain + sealed, n};
            const ssize_t took = seal_send(from, pair[0], &iov, 1);
            HOLDS(took >= 0 || errno == EAGAIN);
            if (took > 0) sealed += (size_t)took;
            sent += drain(pair[1], wire + sent, sizeof wire - sent);
            break;
        }
        case 1: { /* an epoch, in order */
            uint8_t id[16];
            memset(id, what, sizeof id);
            epoch += number;
            seal_enter(from, epoch, id);
            break;
        }
        case 2: /* a bit */
            if (sent > 0) wire[number % sent] ^= (uint8_t)(1u << what % 8);
            harmed |= sent > 0;
            break;
        case 3: /* what was last is left out */
            if (sent > 0) sent -= 1 + number % sent;
            harmed = true;
            break;
        case 4: { /* again */
            const size_t n = sent == 0 ? 0 : 1 + number % sent;
            memmove(wire + sent, wire + sent - n, n < sizeof wire - sent ? n : 0);
            if (n < sizeof wire - sent) sent += n;
            harmed = true;
            break;
        }
        default: { /* the input's own bytes */
            const size_t n = number % 300;
            fuzz_take(&in, wire + sent, n);
            sent += n;
            harmed |= n > 0;
        }
        }
    }
    static uint8_t opened[2 * STREAM_MAX];
    size_t got = 0, at = 0;
    while (got < sizeof opened - PART_MAX) {
        const size_t n = sent - at < 4096 ? sent - at : 4096;
        const ssize_t took = n == 0 ? 0 : send(pair[1], wire + at, n, MSG_NOSIGNAL | MSG_DONTWAIT); /* who reads little has no room */
        HOLDS(took >= 0 || errno == EAGAIN);
        at += took > 0 ? (size_t)took : 0;
        const struct iovec iov = {opened + got, read_size};
        const ssize_t r = seal_recv(to, pair[0], &iov, 1);
        if (r > 0) got += (size_t)r;
        if (r < 0 && errno == EBADMSG) {
            HOLDS(harmed && seal_recv(to, pair[0], &iov, 1) < 0 && errno == EBADMSG && !seal_has_more(to));
            break;
        }
        if (r < 0 && at == sent && !seal_has_more(to)) break;
        HOLDS(r != 0);
    }
    HOLDS(got <= sealed && memcmp(opened, plain, got) == 0);
    if (!harmed) HOLDS(got == sealed || seal_is_unsent(from));
    seal_free(from);
    seal_free(to);
    close(pair[0]);
    close(pair[1]);
    return 0;
}
