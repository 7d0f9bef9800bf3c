/* ratchet.h: X25519 keys that both ends of a sealed connection make anew, epoch after epoch.
 *
 * Who goes on in an epoch tells (RATCHET_BYTES) a key made for it, and which of the other side's keys it has mixed in:
 *
 *     0  32  X25519 key, or zeros: no new one, the last one counts on
 *    32  u32 the other side's keys seen so far, little-endian; the last of them is mixed in. 0: none
 *
 * What both then mix in only who holds one of the two private keys can know: who has stolen a secret of the connection, but
 * not these, is left behind by the next turn, and who has stolen all that one side holds by the next turn each way.
 * Private keys of ours that the other side may still mix in are kept, RATCHET_KEYS of them at most: who is never answered
 * makes no new ones.
 * Pure but for `draw`. Threads: one.                                                          Spec: proto/wire.md 10 */
#ifndef PYCCL_RATCHET_H
#define PYCCL_RATCHET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define RATCHET_KEY_BYTES 32u
#define RATCHET_BYTES (RATCHET_KEY_BYTES + 4u)
#define RATCHET_KEYS 4u

typedef struct ratchet_source {                  /* of random bytes; `draw` NULL: OpenSSL's */
    bool (*draw)(void *ctx, uint8_t out[RATCHET_KEY_BYTES]);
    void *ctx;
} ratchet_source;

typedef struct ratchet {
    ratchet_source source;
    uint8_t mine[RATCHET_KEYS][RATCHET_KEY_BYTES]; /* private; number n, from 1, at n % RATCHET_KEYS */
    uint8_t theirs[RATCHET_KEY_BYTES];
    uint32_t made, mixed;                        /* of ours: the newest, and the newest that they have mixed in */
    uint32_t heard;                              /* of theirs */
} ratchet;

void ratchet_init(ratchet *r, ratchet_source source);
void ratchet_fini(ratchet *r);
/* We turn, with a new key if `fresh` and there is room for one, or if we have none. False: OpenSSL failed. */
bool ratchet_turn(ratchet *r, bool fresh, uint8_t told[RATCHET_BYTES], uint8_t shared[RATCHET_KEY_BYTES]);
/* They have. False: they can't have. *fresh: with a new key, which we have not mixed in yet. */
bool ratchet_turned(ratchet *r, const uint8_t told[RATCHET_BYTES], uint8_t shared[RATCHET_KEY_BYTES], bool *fresh);

#endif
