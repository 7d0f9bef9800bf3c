/* seal.c: see seal.h.                                             Spec: proto/wire.md 10 */
#include "seal.h"

#include <errno.h>
#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/kdf.h>
#include <openssl/params.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "ratchet.h"
#include "status.h"

#define EPOCH_BYTES (24u + RATCHET_BYTES)        /* what a record of type 2 seals: number, id, what the ratchet tells */
#define RX_BYTES (2 * SEAL_RECORD_MAX)
#define TX_BYTES (SEAL_RECORD_MAX + SEAL_HEAD_BYTES + EPOCH_BYTES + SEAL_TAG_BYTES) /* an epoch, and then bytes */

enum { TYPE_BYTES = 1, TYPE_EPOCH = 2 };

typedef struct half {                            /* one direction */
    EVP_CIPHER_CTX *ctx;
    const EVP_CIPHER *cipher;
    uint8_t secret[PYCCL_SECRET_SIZE];
    uint8_t dialed;                              /* from who dialed */
    bool encrypts;
    uint64_t epoch, count;
} half;

struct seal {
    half tx, rx;
    ratchet ratchet;
    bool dead;                                   /* a record did not open: nothing behind it counts */
    bool entering;                               /* the other side is to be told of this epoch */
    bool answers;                                /* it has made a new key, which we have not mixed in yet */
    uint64_t number;
    uint8_t id[16];
    size_t tx_at, tx_have;
    size_t rx_at, rx_have;                       /* of `in`: received, not opened */
    size_t plain_at, plain_have;                 /* of `in`: opened in its place, not taken */
    uint8_t out[TX_BYTES];
    uint8_t in[RX_BYTES];
};

static void put_u64(uint8_t *to, uint64_t value) {
    for (int i = 0; i < 8; i++) to[i] = (uint8_t)(value >> (8 * i));
}

static uint64_t get_u64(const uint8_t *from) {
    uint64_t value = 0;
    for (int i = 0; i < 8; i++) value |= (uint64_t)from[i] << (8 * i);
    return value;
}

uint8_t pyccl_cipher_best(void) {
#if defined(__x86_64__)
    const bool has_aes = __builtin_cpu_supports("aes") != 0 && __builtin_cpu_supports("pclmul") != 0;
#elif defined(__aarch64__) && defined(__linux__)
    const bool has_aes = (getauxval(AT_HWCAP) & (HWCAP_AES | HWCAP_PMULL)) == (HWCAP_AES | HWCAP_PMULL);
#else
    const bool has_aes = false;
#endif
    return has_aes ? PYCCL_CIPHER_AES_256_GCM : PYCCL_CIPHER_CHACHA20_POLY1305;
}

/* ---- keys ---- */

/* HKDF-SHA256 of 32 bytes; salt NULL: of a secret that is a key already, expanded only. */
static bool hkdf(const uint8_t *salt, const uint8_t secret[PYCCL_SECRET_SIZE], const void *info, size_t size,
                 uint8_t out[PYCCL_SECRET_SIZE]) {
    EVP_KDF *kdf = EVP_KDF_fetch(NULL, "HKDF", NULL);
    EVP_KDF_CTX *ctx = kdf != NULL ? EVP_KDF_CTX_new(kdf) : NULL;
    int mode = salt != NULL ? EVP_KDF_HKDF_MODE_EXTRACT_AND_EXPAND : EVP_KDF_HKDF_MODE_EXPAND_ONLY;
    char digest[] = "SHA256";
    const OSSL_PARAM params[] = {
        OSSL_PARAM_construct_int(OSSL_KDF_PARAM_MODE, &mode),
        OSSL_PARAM_construct_utf8_string(OSSL_KDF_PARAM_DIGEST, digest, 0),
        OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_KEY, (void *)(uintptr_t)secret, PYCCL_SECRET_SIZE),
        OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_INFO, (void *)(uintptr_t)info, size),
        salt != NULL ? OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_SALT, (void *)(uintptr_t)salt, PYCCL_SECRET_SIZE)
                     : OSSL_PARAM_construct_end(),
        OSSL_PARAM_construct_end(),
    };
    const bool done = ctx != NULL && EVP_KDF_derive(ctx, out, PYCCL_SECRET_SIZE, params) == 1;
    EVP_KDF_CTX_free(ctx);
    EVP_KDF_free(kdf);
    return done;
}

static bool half_key(half *h) {
    static const char INFO[] = "pyccl record key 1";
    uint8_t key[PYCCL_SECRET_SIZE];
    const bool done = hkdf(NULL, h->secret, INFO, sizeof INFO - 1, key) &&
                      EVP_CipherInit_ex(h->ctx, h->cipher, NULL, key, NULL, h->encrypts ? 1 : 0) == 1;
    OPENSSL_cleanse(key, sizeof key);
    h->count = 0;
    return done;
}

static bool half_init(half *h, const uint8_t secret[PYCCL_SECRET_SIZE], uint8_t cipher, bool dialed, bool encrypts) {
    h->cipher = cipher == PYCCL_CIPHER_AES_256_GCM ? EVP_aes_256_gcm() : EVP_chacha20_poly1305();
    h->ctx = EVP_CIPHER_CTX_new();
    h->dialed = dialed;
    h->encrypts = encrypts;
    memcpy(h->secret, secret, PYCCL_SECRET_SIZE);
    return h->ctx != NULL && half_key(h);
}

/* On to the next secret: of the old one, what the ratchet has given, and all that the record told. */
static bool half_enter(half *h, const uint8_t epoch[EPOCH_BYTES], uint8_t shared[RATCHET_KEY_BYTES]) {
    static const char INFO[] = "pyccl epoch 1";
    uint8_t info[sizeof INFO - 1 + EPOCH_BYTES], next[PYCCL_SECRET_SIZE];
    memcpy(info, INFO, sizeof INFO - 1);
    memcpy(info + sizeof INFO - 1, epoch, EPOCH_BYTES);
    const bool done = hkdf(h->secret, shared, info, sizeof info, next);
    OPENSSL_cleanse(shared, RATCHET_KEY_BYTES);
    if (!done) return false;
    memcpy(h->secret, next, sizeof next);
    OPENSSL_cleanse(next, sizeof next);
    h->epoch = get_u64(epoch);
    return half_key(h);
}

/* The nonce and the associated data of the next record. */
static bool half_begin(half *h, const uint8_t head[SEAL_HEAD_BYTES]) {
    uint8_t nonce[12] = {0}, known[SEAL_HEAD_BYTES + 17];
    int ignored;
    put_u64(nonce + 4, h->count);
    memcpy(known, head, SEAL_HEAD_BYTES);
    known[SEAL_HEAD_BYTES] = h->dialed;
    put_u64(known + SEAL_HEAD_BYTES + 1, h->epoch);
    put_u64(known + SEAL_HEAD_BYTES + 9, h->count);
    h->count++;
    return EVP_CipherInit_ex(h->ctx, NULL, NULL, NULL, nonce, -1) == 1 &&
           EVP_CipherUpdate(h->ctx, NULL, &ignored, known, sizeof known) == 1;
}

seal *seal_new(const pyccl_conn_keys *keys, ratchet_source source) {
    PYCCL_ASSERT(keys->cipher == PYCCL_CIPHER_AES_256_GCM || keys->cipher == PYCCL_CIPHER_CHACHA20_POLY1305);
    seal *s = malloc(sizeof *s);
    if (s == NULL) return NULL;
    memset(s, 0, offsetof(seal, out));
    ratchet_init(&s->ratchet, source);
    if (half_init(&s->tx, keys->tx, keys->cipher, keys->dialed != 0, true) &&
        half_init(&s->rx, keys->rx, keys->cipher, keys->dialed == 0, false))
        return s;
    seal_free(s);
    return NULL;
}

void seal_free(seal *s) {
    if (s == NULL) return;
    EVP_CIPHER_CTX_free(s->tx.ctx);
    EVP_CIPHER_CTX_free(s->rx.ctx);
    OPENSSL_cleanse(&s->tx, sizeof s->tx);
    OPENSSL_cleanse(&s->rx, sizeof s->rx);
    ratchet_fini(&s->ratchet);
    free(s);
}

void seal_enter(seal *s, uint64_t number, const uint8_t id[16]) {
    s->entering = true;
    s->number = number;
    memcpy(s->id, id, 16);
}

/* ---- sending ---- */

bool seal_is_unsent(const seal *s) { return s->tx_at < s->tx_have || s->entering || s->answers; }

/* A record behind what is in `out`, of the first bytes of `iov`. */
static bool record_put(seal *s, uint8_t type, const struct iovec *iov, size_t skip, size_t size) {
    uint8_t *at = s->out + s->tx_have;
    int n;
    PYCCL_ASSERT(size > 0 && size <= SEAL_PLAIN_MAX && s->tx_have + SEAL_HEAD_BYTES + size + SEAL_TAG_BYTES <= TX_BYTES);
    const uint8_t head[SEAL_HEAD_BYTES] = {(uint8_t)size, (uint8_t)(size >> 8), (uint8_t)(size >> 16), type};
    memcpy(at, head, sizeof head);
    if (!half_begin(&s->tx, head)) return false;
    at += sizeof head;
    for (size_t left = size; left > 0; iov++) {
        if (skip >= iov->iov_len) {
            skip -= iov->iov_len;
            continue;
        }
        const size_t part = iov->iov_len - skip < left ? iov->iov_len - skip : left;
        if (EVP_CipherUpdate(s->tx.ctx, at, &n, (const uint8_t *)iov->iov_base + skip, (int)part) != 1) return false;
        at += part;
        left -= part;
        skip = 0;
    }
    if (EVP_CipherFinal_ex(s->tx.ctx, at, &n) != 1) return false;
    if (EVP_CIPHER_CTX_ctrl(s->tx.ctx, EVP_CTRL_AEAD_GET_TAG, SEAL_TAG_BYTES, at) != 1) return false;
    s->tx_have += sizeof head + size + SEAL_TAG_BYTES;
    return true;
}

/* Tell of the epoch that begins, of more records in the one there is, or that we have mixed in the other side's new key, and
 * go on under the next key. An answer has no new key of ours, or it would be answered in turn. */
static bool epoch_put(seal *s) {
    uint8_t epoch[EPOCH_BYTES], shared[RATCHET_KEY_BYTES];
    const struct iovec iov = {epoch, sizeof epoch};
    const bool fresh = s->entering || s->tx.count >= SEAL_RECORDS_MAX;
    put_u64(epoch, s->number);
    memcpy(epoch + 8, s->id, sizeof s->id);
    s->entering = s->answers = false;
    return ratchet_turn(&s->ratchet, fresh, epoch + 24, shared) && record_put(s, TYPE_EPOCH, &iov, 0, sizeof epoch) &&
           half_enter(&s->tx, epoch, shared);
}

/* 1: nothing is left; 0: the socket has no room; -1: errno. */
static int out_flush(seal *s, int fd) {
    while (s->tx_at < s->tx_have) {
        const ssize_t n = send(fd, s->out + s->tx_at, s->tx_have - s->tx_at, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return errno == EAGAIN || errno == EWOULDBLOCK ? 0 : -1;
        s->tx_at += (size_t)n;
    }
    s->tx_at = s->tx_have = 0;
    return 1;
}

ssize_t seal_send(seal *s, int fd, const struct iovec *iov, int count) {
    size_t all = 0, taken = 0;
    if (s->dead) goto dead;
    for (int i = 0; i < count; i++) all += iov[i].iov_len;
    for (;;) {
        const int room = out_flush(s, fd);
        if (room < 0) return -1;
        const bool turns = s->entering || s->answers;
        if (room == 0 || (taken == all && !turns)) break;
        const size_t size = all - taken < SEAL_PLAIN_MAX ? all - taken : SEAL_PLAIN_MAX;
        if ((turns || s->tx.count >= SEAL_RECORDS_MAX) && !epoch_put(s)) goto dead;
        if (size > 0 && !record_put(s, TYPE_BYTES, iov, taken, size)) goto dead;
        taken += size;
    }
    if (taken > 0 || all == 0) return (ssize_t)taken;
    errno = EAGAIN;
    return -1;
dead:
    s->dead = true;
    errno = EBADMSG;
    return -1;
}

/* ---- receiving ---- */

/* Of the record at rx_at: its size sealed, 0 if it is not whole yet. False: it can't be one. */
static bool record_size(const seal *s, size_t *plain) {
    const uint8_t *head = s->in + s->rx_at;
    *plain = 0;
    if (s->rx_have < SEAL_HEAD_BYTES) return true;
    const size_t size = (size_t)head[0] | (size_t)head[1] << 8 | (size_t)head[2] << 16;
    const bool is_legal = head[3] == TYPE_BYTES ? size >= 1 && size <= SEAL_PLAIN_MAX : head[3] == TYPE_EPOCH && size == EPOCH_BYTES;
    if (is_legal && s->rx_have >= SEAL_HEAD_BYTES + size + SEAL_TAG_BYTES) *plain = size;
    return is_legal;
}

bool seal_has_more(const seal *s) {
    size_t plain;
    if (s->dead) return false;
    return s->plain_have > 0 || !record_size(s, &plain) || plain > 0;
}

/* Open the whole record at rx_at to `to`, which may be its own place. What is there is to be used only when this is true. */
static bool record_open(seal *s, size_t size, uint8_t *to) {
    const uint8_t *head = s->in + s->rx_at;
    uint8_t *sealed = s->in + s->rx_at + SEAL_HEAD_BYTES;
    int n;
    const bool opened = half_begin(&s->rx, head) && EVP_CipherUpdate(s->rx.ctx, to, &n, sealed, (int)size) == 1 &&
                        EVP_CIPHER_CTX_ctrl(s->rx.ctx, EVP_CTRL_AEAD_SET_TAG, SEAL_TAG_BYTES, sealed + size) == 1 &&
                        EVP_CipherFinal_ex(s->rx.ctx, to, &n) == 1;
    s->rx_at += SEAL_HEAD_BYTES + size + SEAL_TAG_BYTES;
    s->rx_have -= SEAL_HEAD_BYTES + size + SEAL_TAG_BYTES;
    return opened;
}

static bool epoch_taken(seal *s) {
    uint8_t epoch[EPOCH_BYTES], shared[RATCHET_KEY_BYTES];
    bool fresh;
    if (!record_open(s, EPOCH_BYTES, epoch) || get_u64(epoch) < s->rx.epoch) return false;
    if (!ratchet_turned(&s->ratchet, epoch + 24, shared, &fresh)) return false;
    s->answers = s->answers || fresh;
    return half_enter(&s->rx, epoch, shared);
}

/* As recv, behind what is in `in`. */
static ssize_t in_fill(seal *s, int fd) {
    if (s->rx_have == 0) s->rx_at = 0;
    if (s->rx_at > RX_BYTES - SEAL_RECORD_MAX) { /* a whole record must fit behind rx_at */
        memmove(s->in, s->in + s->rx_at, s->rx_have);
        s->rx_at = 0;
    }
    ssize_t n;
    do n = recv(fd, s->in + s->rx_at + s->rx_have, RX_BYTES - s->rx_at - s->rx_have, MSG_DONTWAIT);
    while (n < 0 && errno == EINTR);
    if (n > 0) s->rx_have += (size_t)n;
    return n;
}

static size_t plain_take(seal *s, uint8_t *to, size_t room) {
    const size_t size = s->plain_have < room ? s->plain_have : room;
    memcpy(to, s->in + s->plain_at, size);
    s->plain_at += size;
    s->plain_have -= size;
    return size;
}

/* Bytes into `to`, `room` > 0 of them at most, as recv. */
static ssize_t part_recv(seal *s, int fd, uint8_t *to, size_t room) {
    size_t size;
    while (!s->dead) {
        if (s->plain_have > 0) return (ssize_t)plain_take(s, to, room);
        if (!record_size(s, &size)) break;
        if (size == 0) {
            const ssize_t n = in_fill(s, fd);
            if (n <= 0) return n;
            continue;
        }
        if (s->in[s->rx_at + 3] == TYPE_EPOCH) {
            if (!epoch_taken(s)) break;
        } else if (size <= room) {
            if (!record_open(s, size, to)) break;
            return (ssize_t)size;
        } else {
            uint8_t *place = s->in + s->rx_at + SEAL_HEAD_BYTES;
            if (!record_open(s, size, place)) break;
            s->plain_at = (size_t)(place - s->in);
            s->plain_have = size;
        }
    }
    s->dead = true;
    errno = EBADMSG;
    return -1;
}

ssize_t seal_recv(seal *s, int fd, const struct iovec *iov, int count) {
    size_t got = 0;
    for (int i = 0; i < count; i++) {
        for (size_t at = 0; at < iov[i].iov_len;) {
            const ssize_t n = part_recv(s, fd, (uint8_t *)iov[i].iov_base + at, iov[i].iov_len - at);
            if (n < 0 && errno == EBADMSG) return -1; /* what was opened before it counts no more than what TCP lost */
            if (n <= 0) return got > 0 ? (ssize_t)got : n;
            at += (size_t)n;
            got += (size_t)n;
        }
    }
    return (ssize_t)got;
}
