/* ratchet.c: see ratchet.h. */
#include "ratchet.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/rand.h>
#include <string.h>

static void put_u32(uint8_t *to, uint32_t value) {
    for (int i = 0; i < 4; i++) to[i] = (uint8_t)(value >> (8 * i));
}

static uint32_t get_u32(const uint8_t *from) {
    uint32_t value = 0;
    for (int i = 0; i < 4; i++) value |= (uint32_t)from[i] << (8 * i);
    return value;
}

static bool draw_from_openssl(void *ctx, uint8_t out[RATCHET_KEY_BYTES]) {
    (void)ctx;
    return RAND_priv_bytes(out, (int)RATCHET_KEY_BYTES) == 1;
}

void ratchet_init(ratchet *r, ratchet_source source) {
    memset(r, 0, sizeof *r);
    r->source = source.draw != NULL ? source : (ratchet_source){.draw = draw_from_openssl};
}

void ratchet_fini(ratchet *r) { OPENSSL_cleanse(r, sizeof *r); }

static EVP_PKEY *private_of(const uint8_t key[RATCHET_KEY_BYTES]) {
    return EVP_PKEY_new_raw_private_key(EVP_PKEY_X25519, NULL, key, RATCHET_KEY_BYTES);
}

static bool public_of(const uint8_t key[RATCHET_KEY_BYTES], uint8_t out[RATCHET_KEY_BYTES]) {
    size_t size = RATCHET_KEY_BYTES;
    EVP_PKEY *pkey = private_of(key);
    const bool done = pkey != NULL && EVP_PKEY_get_raw_public_key(pkey, out, &size) == 1;
    EVP_PKEY_free(pkey);
    return done;
}

/* False also where it comes out as zeros: a key that is none. */
static bool agree(const uint8_t mine[RATCHET_KEY_BYTES], const uint8_t theirs[RATCHET_KEY_BYTES], uint8_t out[RATCHET_KEY_BYTES]) {
    size_t size = RATCHET_KEY_BYTES;
    EVP_PKEY *own = private_of(mine);
    EVP_PKEY *other = EVP_PKEY_new_raw_public_key(EVP_PKEY_X25519, NULL, theirs, RATCHET_KEY_BYTES);
    EVP_PKEY_CTX *ctx = own != NULL ? EVP_PKEY_CTX_new(own, NULL) : NULL;
    const bool done = ctx != NULL && other != NULL && EVP_PKEY_derive_init(ctx) == 1 &&
                      EVP_PKEY_derive_set_peer(ctx, other) == 1 && EVP_PKEY_derive(ctx, out, &size) == 1;
    EVP_PKEY_CTX_free(ctx);
    EVP_PKEY_free(other);
    EVP_PKEY_free(own);
    return done;
}

static uint8_t *mine_of(ratchet *r, uint32_t number) { return r->mine[number % RATCHET_KEYS]; }

/* Those that they may still mix in stay: from the newest that they did on. */
static bool has_room(const ratchet *r) {
    const uint32_t oldest = r->mixed > 0 ? r->mixed : 1;
    return r->made + 1 - oldest < RATCHET_KEYS;
}

bool ratchet_turn(ratchet *r, bool fresh, uint8_t told[RATCHET_BYTES], uint8_t shared[RATCHET_KEY_BYTES]) {
    memset(told, 0, RATCHET_BYTES);
    memset(shared, 0, RATCHET_KEY_BYTES);
    if (r->made == 0 || (fresh && has_room(r))) {
        r->made++;
        if (!r->source.draw(r->source.ctx, mine_of(r, r->made)) || !public_of(mine_of(r, r->made), told)) return false;
    }
    put_u32(told + RATCHET_KEY_BYTES, r->heard);
    return r->heard == 0 || agree(mine_of(r, r->made), r->theirs, shared);
}

bool ratchet_turned(ratchet *r, const uint8_t told[RATCHET_BYTES], uint8_t shared[RATCHET_KEY_BYTES], bool *fresh) {
    static const uint8_t NONE[RATCHET_KEY_BYTES];
    const uint32_t mixes = get_u32(told + RATCHET_KEY_BYTES);
    *fresh = memcmp(told, NONE, RATCHET_KEY_BYTES) != 0;
    memset(shared, 0, RATCHET_KEY_BYTES);
    if (mixes < r->mixed || mixes > r->made || (!*fresh && r->heard == 0)) return false;
    if (*fresh) {
        if (r->heard == UINT32_MAX) return false;
        r->heard++;
        memcpy(r->theirs, told, RATCHET_KEY_BYTES);
    }
    if (mixes == 0) return true;
    for (; r->mixed < mixes; r->mixed++)
        if (r->mixed > 0) OPENSSL_cleanse(mine_of(r, r->mixed), RATCHET_KEY_BYTES);
    return agree(mine_of(r, mixes), r->theirs, shared);
}
