/* digest.c: XXH3 with 64 and 128 bits, one shot, with seed; bit-compatible with the reference for every length and seed.
 *
 * Fast, not cryptographic: it finds accidents, not forgeries. Written after the algorithm's description; there are four
 * regimes, each with its own mixing of the input with a fixed 192-byte secret:
 *
 *     0..16 bytes     one or two words, in 64 and 128 bits each their own formula
 *     17..128         pairs of 16-byte blocks from both ends inwards
 *     129..240        16-byte blocks in order, the secret from the start again (3 bytes on) after the first 128 bytes
 *     241..           eight 64-bit lanes eat stripes of 64 bytes; after each block of 16 stripes they are scrambled
 *
 *     | stripe 0 | stripe 1 | ... | stripe 15 | scramble | stripe 16 | ...      | last 64 bytes (may overlap) |
 *       secret+0   secret+8         secret+120  secret+128  secret+0              secret+121
 *
 * Only the last regime moves much data; it exists as scalar code, the reference, and for AVX2, AVX-512 and NEON
 * (kernel.h). Lanes are integers, so all give the same bytes. Hosts are little-endian.     Threads: nothing shared.
 * Source: Y. Collet, XXH3, doc/xxhash_spec.md of the xxHash project. */
#include "digest.h"

#include <string.h>

#include "pyccl.h"
#include "status.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "pyccl supports little-endian hosts only"
#endif

#define PRIME32_1 UINT32_C(0x9E3779B1)
#define PRIME32_2 UINT32_C(0x85EBCA77)
#define PRIME32_3 UINT32_C(0xC2B2AE3D)
#define PRIME64_1 UINT64_C(0x9E3779B185EBCA87)
#define PRIME64_2 UINT64_C(0xC2B2AE3D27D4EB4F)
#define PRIME64_3 UINT64_C(0x165667B19E3779F9)
#define PRIME64_4 UINT64_C(0x85EBCA77C2B2AE63)
#define PRIME64_5 UINT64_C(0x27D4EB2F165667C5)
#define PRIME_MX1 UINT64_C(0x165667919E3779F9)
#define PRIME_MX2 UINT64_C(0x9FB21C651E98DF25)

#define SECRET_BYTES 192
#define SECRET_MIDSIZE_BYTES 136 /* the part that inputs of 129..240 bytes use for their last block */
#define STRIPE_BYTES 64
#define STRIPES_PER_BLOCK 16
#define BLOCK_BYTES (STRIPE_BYTES * STRIPES_PER_BLOCK)
#define LANES 8
#define MIDSIZE_MAX 240

static const uint8_t SECRET[SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

typedef struct u128 {
    uint64_t low, high;
} u128;

/* ---- words ---- */

static inline uint32_t read32(const uint8_t *at) {
    uint32_t x;
    memcpy(&x, at, sizeof x);
    return x;
}

static inline uint64_t read64(const uint8_t *at) {
    uint64_t x;
    memcpy(&x, at, sizeof x);
    return x;
}

static inline uint64_t secret64(size_t at) { return read64(SECRET + at); }
static inline uint64_t secret64_xor(size_t at) { return secret64(at) ^ secret64(at + 8); }
static inline uint32_t secret32_xor(size_t at) { return read32(SECRET + at) ^ read32(SECRET + at + 4); }
static inline uint32_t rotl32(uint32_t x, int by) { return x << by | x >> (32 - by); }
static inline uint64_t rotl64(uint64_t x, int by) { return x << by | x >> (64 - by); }

static inline u128 multiply_wide(uint64_t a, uint64_t b) {
    const unsigned __int128 product = (unsigned __int128)a * b;
    return (u128){(uint64_t)product, (uint64_t)(product >> 64)};
}

static inline uint64_t multiply_fold(uint64_t a, uint64_t b) {
    const u128 product = multiply_wide(a, b);
    return product.low ^ product.high;
}

/* ---- finishing mixes ---- */

static inline uint64_t avalanche(uint64_t h) {
    h = (h ^ h >> 37) * PRIME_MX1;
    return h ^ h >> 32;
}

static inline uint64_t avalanche_xxh64(uint64_t h) {
    h = (h ^ h >> 33) * PRIME64_2;
    h = (h ^ h >> 29) * PRIME64_3;
    return h ^ h >> 32;
}

static inline uint64_t avalanche_rotating(uint64_t h, size_t size) {
    h = (h ^ rotl64(h, 49) ^ rotl64(h, 24)) * PRIME_MX2;
    h = (h ^ ((h >> 35) + size)) * PRIME_MX2;
    return h ^ h >> 28;
}

/* ---- 0..16 bytes ---- */

static inline uint32_t gather_1to3(const uint8_t *in, size_t size) {
    return (uint32_t)in[0] << 16 | (uint32_t)in[size >> 1] << 24 | (uint32_t)in[size - 1] | (uint32_t)size << 8;
}

static inline uint64_t seed_4to8(uint64_t seed) { return seed ^ (uint64_t)__builtin_bswap32((uint32_t)seed) << 32; }

static uint64_t short_64(const uint8_t *in, size_t size, uint64_t seed) {
    if (size > 8) {
        const uint64_t low = read64(in) ^ (secret64_xor(24) + seed);
        const uint64_t high = read64(in + size - 8) ^ (secret64_xor(40) - seed);
        return avalanche(size + __builtin_bswap64(low) + high + multiply_fold(low, high));
    }
    if (size >= 4) {
        const uint64_t word = read32(in + size - 4) + ((uint64_t)read32(in) << 32);
        return avalanche_rotating(word ^ (secret64_xor(8) - seed_4to8(seed)), size);
    }
    if (size > 0) return avalanche_xxh64(gather_1to3(in, size) ^ (secret32_xor(0) + seed));
    return avalanche_xxh64(seed ^ secret64_xor(56));
}

static u128 short_128_9to16(const uint8_t *in, size_t size, uint64_t seed) {
    const uint64_t low = read64(in), high = read64(in + size - 8) ^ (secret64_xor(48) + seed);
    u128 m = multiply_wide(low ^ read64(in + size - 8) ^ (secret64_xor(32) - seed), PRIME64_1);
    m.low += (uint64_t)(size - 1) << 54;
    m.high += high + (uint64_t)(uint32_t)high * (PRIME32_2 - 1);
    m.low ^= __builtin_bswap64(m.high);
    u128 h = multiply_wide(m.low, PRIME64_2);
    h.high += m.high * PRIME64_2;
    return (u128){avalanche(h.low), avalanche(h.high)};
}

static u128 short_128_4to8(const uint8_t *in, size_t size, uint64_t seed) {
    const uint64_t word = read32(in) + ((uint64_t)read32(in + size - 4) << 32);
    u128 m = multiply_wide(word ^ (secret64_xor(16) + seed_4to8(seed)), PRIME64_1 + (size << 2));
    m.high += m.low << 1;
    m.low ^= m.high >> 3;
    m.low = (m.low ^ m.low >> 35) * PRIME_MX2;
    return (u128){m.low ^ m.low >> 28, avalanche(m.high)};
}

static u128 short_128(const uint8_t *in, size_t size, uint64_t seed) {
    if (size > 8) return short_128_9to16(in, size, seed);
    if (size >= 4) return short_128_4to8(in, size, seed);
    if (size > 0) {
        const uint32_t low = gather_1to3(in, size), high = rotl32(__builtin_bswap32(low), 13);
        return (u128){avalanche_xxh64(low ^ (secret32_xor(0) + seed)), avalanche_xxh64(high ^ (secret32_xor(8) - seed))};
    }
    return (u128){avalanche_xxh64(seed ^ secret64_xor(64)), avalanche_xxh64(seed ^ secret64_xor(80))};
}

/* ---- 17..240 bytes ---- */

static inline uint64_t mix16(const uint8_t *in, size_t secret_at, uint64_t seed) {
    return multiply_fold(read64(in) ^ (secret64(secret_at) + seed), read64(in + 8) ^ (secret64(secret_at + 8) - seed));
}

static inline u128 mix32(u128 acc, const uint8_t *one, const uint8_t *two, size_t secret_at, uint64_t seed) {
    acc.low = (acc.low + mix16(one, secret_at, seed)) ^ (read64(two) + read64(two + 8));
    acc.high = (acc.high + mix16(two, secret_at + 16, seed)) ^ (read64(one) + read64(one + 8));
    return acc;
}

static uint64_t middle_64(const uint8_t *in, size_t size, uint64_t seed) {
    uint64_t acc = size * PRIME64_1;
    if (size <= 128) {
        for (size_t pairs = (size - 1) / 32 + 1; pairs-- > 0;) {
            acc += mix16(in + 16 * pairs, 32 * pairs, seed);
            acc += mix16(in + size - 16 * (pairs + 1), 32 * pairs + 16, seed);
        }
        return avalanche(acc);
    }
    for (size_t i = 0; i < 8; i++) acc += mix16(in + 16 * i, 16 * i, seed);
    acc = avalanche(acc);
    for (size_t i = 8; i < size / 16; i++) acc += mix16(in + 16 * i, 16 * (i - 8) + 3, seed);
    return avalanche(acc + mix16(in + size - 16, SECRET_MIDSIZE_BYTES - 17, seed));
}

static u128 middle_128(const uint8_t *in, size_t size, uint64_t seed) {
    u128 acc = {size * PRIME64_1, 0};
    if (size <= 128) {
        for (size_t pairs = (size - 1) / 32 + 1; pairs-- > 0;)
            acc = mix32(acc, in + 16 * pairs, in + size - 16 * (pairs + 1), 32 * pairs, seed);
    } else {
        for (size_t i = 0; i < 4; i++) acc = mix32(acc, in + 32 * i, in + 32 * i + 16, 32 * i, seed);
        acc = (u128){avalanche(acc.low), avalanche(acc.high)};
        for (size_t i = 4; i < size / 32; i++)
            acc = mix32(acc, in + 32 * i, in + 32 * i + 16, 32 * (i - 4) + 3, seed);
        acc = mix32(acc, in + size - 16, in + size - 32, SECRET_MIDSIZE_BYTES - 17 - 16, 0 - seed);
    }
    const uint64_t high = acc.low * PRIME64_1 + acc.high * PRIME64_4 + (size - seed) * PRIME64_2;
    return (u128){avalanche(acc.low + acc.high), 0 - avalanche(high)};
}

/* ---- 241 bytes and more ---- */

/* Where the stripes lie: whole blocks, then the stripes of the block begun, then the last 64 bytes once more. */
typedef struct stripes {
    const uint8_t *in, *last;
    size_t blocks, rest; /* rest: stripes after the last whole block, 0..15 or 16 */
} stripes;

static stripes stripes_of(const uint8_t *in, size_t size) {
    const size_t blocks = (size - 1) / BLOCK_BYTES;
    return (stripes){in, in + size - STRIPE_BYTES, blocks, (size - 1 - blocks * BLOCK_BYTES) / STRIPE_BYTES};
}

static const uint64_t LANES_START[LANES] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3,
                                            PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};

#define SCRAMBLE_AT (SECRET_BYTES - STRIPE_BYTES)
#define LAST_STRIPE_AT (SECRET_BYTES - STRIPE_BYTES - 7)

static inline void accumulate_scalar(uint64_t acc[LANES], const uint8_t *in, const uint8_t *secret) {
    for (size_t i = 0; i < LANES; i++) {
        const uint64_t word = read64(in + 8 * i), keyed = word ^ read64(secret + 8 * i);
        acc[i ^ 1] += word;
        acc[i] += (uint64_t)(uint32_t)keyed * (keyed >> 32);
    }
}

static void long_scalar(uint64_t acc[LANES], stripes s, const uint8_t secret[SECRET_BYTES]) {
    for (size_t block = 0; block <= s.blocks; block++) {
        const size_t count = block < s.blocks ? STRIPES_PER_BLOCK : s.rest;
        for (size_t i = 0; i < count; i++)
            accumulate_scalar(acc, s.in + block * BLOCK_BYTES + i * STRIPE_BYTES, secret + 8 * i);
        if (block == s.blocks) break;
        for (size_t i = 0; i < LANES; i++)
            acc[i] = (acc[i] ^ acc[i] >> 47 ^ read64(secret + SCRAMBLE_AT + 8 * i)) * PRIME32_1;
    }
    accumulate_scalar(acc, s.last, secret + LAST_STRIPE_AT);
}

#if defined(__x86_64__)

/* AVX-512 has registers for the whole secret: unrolled, they stay there (+10 %). AVX2 has not, and gets slower (-7 %). */
#define UNROLL_BLOCK _Pragma("GCC unroll 16")
#define PREFETCH_BYTES 1024 /* ahead of the stripe in hand; past the end it is harmless */

static inline void prefetch(const uint8_t *at) { __builtin_prefetch((const void *)((uintptr_t)at + PREFETCH_BYTES)); }

#define AVX2 static inline __attribute__((target("avx2"), always_inline))
AVX2 __m256i load256(const uint8_t *at) { return _mm256_loadu_si256((const __m256i *)(const void *)at); }

AVX2 __m256i accumulate_avx2(__m256i acc, const uint8_t *in, const uint8_t *secret) {
    const __m256i word = load256(in), keyed = _mm256_xor_si256(word, load256(secret));
    const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
    return _mm256_add_epi64(acc, _mm256_add_epi64(product, _mm256_shuffle_epi32(word, 0x4E)));
}

AVX2 __m256i scramble_avx2(__m256i acc, const uint8_t *secret) {
    const __m256i prime = _mm256_set1_epi64x((long long)PRIME32_1);
    const __m256i keyed = _mm256_xor_si256(_mm256_xor_si256(acc, _mm256_srli_epi64(acc, 47)), load256(secret));
    const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(keyed, 32), prime);
    return _mm256_add_epi64(_mm256_mul_epu32(keyed, prime), _mm256_slli_epi64(high, 32));
}

__attribute__((target("avx2"))) static void long_avx2(uint64_t acc[LANES], stripes s, const uint8_t *secret) {
    __m256i low = load256((const uint8_t *)acc), high = load256((const uint8_t *)(acc + 4));
    const uint8_t *in = s.in;
    for (size_t block = 0; block < s.blocks; block++, in += BLOCK_BYTES) {
        for (size_t i = 0; i < STRIPES_PER_BLOCK; i++) {
            prefetch(in + i * STRIPE_BYTES);
            low = accumulate_avx2(low, in + i * STRIPE_BYTES, secret + 8 * i);
            high = accumulate_avx2(high, in + i * STRIPE_BYTES + 32, secret + 8 * i + 32);
        }
        low = scramble_avx2(low, secret + SCRAMBLE_AT);
        high = scramble_avx2(high, secret + SCRAMBLE_AT + 32);
    }
    for (size_t i = 0; i < s.rest; i++) {
        low = accumulate_avx2(low, in + i * STRIPE_BYTES, secret + 8 * i);
        high = accumulate_avx2(high, in + i * STRIPE_BYTES + 32, secret + 8 * i + 32);
    }
    low = accumulate_avx2(low, s.last, secret + LAST_STRIPE_AT);
    high = accumulate_avx2(high, s.last + 32, secret + LAST_STRIPE_AT + 32);
    _mm256_storeu_si256((__m256i *)(void *)acc, low);
    _mm256_storeu_si256((__m256i *)(void *)(acc + 4), high);
}

#define AVX512 static inline __attribute__((target("avx512f"), always_inline))
AVX512 __m512i load512(const uint8_t *at) { return _mm512_loadu_si512((const void *)at); }

AVX512 __m512i accumulate_avx512(__m512i acc, const uint8_t *in, const uint8_t *secret) {
    const __m512i word = load512(in), keyed = _mm512_xor_si512(word, load512(secret));
    const __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
    return _mm512_add_epi64(acc, _mm512_add_epi64(product, _mm512_shuffle_epi32(word, (_MM_PERM_ENUM)0x4E)));
}

AVX512 __m512i scramble_avx512(__m512i acc, const uint8_t *secret) {
    const __m512i prime = _mm512_set1_epi64((long long)PRIME32_1);
    const __m512i keyed = _mm512_xor_si512(_mm512_xor_si512(acc, _mm512_srli_epi64(acc, 47)), load512(secret));
    const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(keyed, 32), prime);
    return _mm512_add_epi64(_mm512_mul_epu32(keyed, prime), _mm512_slli_epi64(high, 32));
}

__attribute__((target("avx512f"))) static void long_avx512(uint64_t acc[LANES], stripes s, const uint8_t *secret) {
    __m512i lanes = load512((const uint8_t *)acc);
    const uint8_t *in = s.in;
    for (size_t block = 0; block < s.blocks; block++, in += BLOCK_BYTES) {
        UNROLL_BLOCK for (size_t i = 0; i < STRIPES_PER_BLOCK; i++) {
            prefetch(in + i * STRIPE_BYTES);
            lanes = accumulate_avx512(lanes, in + i * STRIPE_BYTES, secret + 8 * i);
        }
        lanes = scramble_avx512(lanes, secret + SCRAMBLE_AT);
    }
    for (size_t i = 0; i < s.rest; i++) lanes = accumulate_avx512(lanes, in + i * STRIPE_BYTES, secret + 8 * i);
    lanes = accumulate_avx512(lanes, s.last, secret + LAST_STRIPE_AT);
    _mm512_storeu_si512((void *)acc, lanes);
}

#elif defined(__aarch64__)

#define NEON static inline __attribute__((always_inline))
NEON uint64x2_t load_neon(const uint8_t *at) { return vreinterpretq_u64_u8(vld1q_u8(at)); }

NEON uint64x2_t accumulate_neon(uint64x2_t acc, const uint8_t *in, const uint8_t *secret) {
    const uint64x2_t word = load_neon(in), keyed = veorq_u64(word, load_neon(secret));
    acc = vaddq_u64(acc, vextq_u64(word, word, 1));
    return vmlal_u32(acc, vmovn_u64(keyed), vshrn_n_u64(keyed, 32));
}

NEON uint64x2_t scramble_neon(uint64x2_t acc, const uint8_t *secret) {
    const uint64x2_t keyed = veorq_u64(veorq_u64(acc, vshrq_n_u64(acc, 47)), load_neon(secret));
    const uint32x2_t prime = vdup_n_u32(PRIME32_1);
    const uint64x2_t high = vmull_u32(vshrn_n_u64(keyed, 32), prime);
    return vmlal_u32(vshlq_n_u64(high, 32), vmovn_u64(keyed), prime);
}

static void long_neon(uint64_t acc[LANES], stripes s, const uint8_t *secret) {
    uint64x2_t lanes[LANES / 2];
    for (size_t k = 0; k < LANES / 2; k++) lanes[k] = vld1q_u64(acc + 2 * k);
    for (size_t block = 0; block <= s.blocks; block++) {
        const size_t count = block < s.blocks ? STRIPES_PER_BLOCK : s.rest;
        const uint8_t *in = s.in + block * BLOCK_BYTES;
        for (size_t i = 0; i < count; i++)
            for (size_t k = 0; k < LANES / 2; k++)
                lanes[k] = accumulate_neon(lanes[k], in + i * STRIPE_BYTES + 16 * k, secret + 8 * i + 16 * k);
        if (block == s.blocks) break;
        for (size_t k = 0; k < LANES / 2; k++) lanes[k] = scramble_neon(lanes[k], secret + SCRAMBLE_AT + 16 * k);
    }
    for (size_t k = 0; k < LANES / 2; k++) {
        lanes[k] = accumulate_neon(lanes[k], s.last + 16 * k, secret + LAST_STRIPE_AT + 16 * k);
        vst1q_u64(acc + 2 * k, lanes[k]);
    }
}

#endif

static void long_run(kernel k, uint64_t acc[LANES], stripes s, const uint8_t secret[SECRET_BYTES]) {
    memcpy(acc, LANES_START, sizeof LANES_START);
#if defined(__x86_64__)
    if (k == KERNEL_AVX512) {
        long_avx512(acc, s, secret);
        return;
    }
    if (k == KERNEL_AVX2) {
        long_avx2(acc, s, secret);
        return;
    }
#elif defined(__aarch64__)
    if (k == KERNEL_NEON) {
        long_neon(acc, s, secret);
        return;
    }
#endif
    PYCCL_ASSERT(k == KERNEL_SCALAR);
    long_scalar(acc, s, secret);
}

static void secret_seeded(uint8_t secret[SECRET_BYTES], uint64_t seed) {
    for (size_t i = 0; i < SECRET_BYTES; i += 16) {
        const uint64_t low = secret64(i) + seed, high = secret64(i + 8) - seed;
        memcpy(secret + i, &low, sizeof low);
        memcpy(secret + i + 8, &high, sizeof high);
    }
}

static uint64_t lanes_merge(const uint64_t acc[LANES], const uint8_t *secret, uint64_t start) {
    for (size_t i = 0; i < LANES; i += 2)
        start += multiply_fold(acc[i] ^ read64(secret + 8 * i), acc[i + 1] ^ read64(secret + 8 * i + 8));
    return avalanche(start);
}

static uint64_t long_64(kernel k, const uint8_t *in, size_t size, uint64_t seed) {
    uint8_t secret[SECRET_BYTES];
    uint64_t acc[LANES];
    secret_seeded(secret, seed);
    long_run(k, acc, stripes_of(in, size), secret);
    return lanes_merge(acc, secret + 11, size * PRIME64_1);
}

static u128 long_128(kernel k, const uint8_t *in, size_t size, uint64_t seed) {
    uint8_t secret[SECRET_BYTES];
    uint64_t acc[LANES];
    secret_seeded(secret, seed);
    long_run(k, acc, stripes_of(in, size), secret);
    return (u128){lanes_merge(acc, secret + 11, size * PRIME64_1),
                  lanes_merge(acc, secret + SECRET_BYTES - STRIPE_BYTES - 11, ~(size * PRIME64_2))};
}

/* ---- the whole ---- */

uint64_t digest_xxh3_64(kernel k, const void *data, size_t size_bytes, uint64_t seed) {
    if (size_bytes <= 16) return short_64(data, size_bytes, seed);
    if (size_bytes <= MIDSIZE_MAX) return middle_64(data, size_bytes, seed);
    return long_64(k, data, size_bytes, seed);
}

static void put_big_endian(uint8_t *at, uint64_t x) {
    for (int i = 0; i < 8; i++) at[i] = (uint8_t)(x >> (56 - 8 * i));
}

void digest_xxh3_128(kernel k, const void *data, size_t size_bytes, uint64_t seed, uint8_t out[16]) {
    const u128 h = size_bytes <= 16            ? short_128(data, size_bytes, seed)
                   : size_bytes <= MIDSIZE_MAX ? middle_128(data, size_bytes, seed)
                                               : long_128(k, data, size_bytes, seed);
    put_big_endian(out, h.high);
    put_big_endian(out + 8, h.low);
}

uint64_t pyccl_xxh3_64(const void *data, size_t size_bytes, uint64_t seed) {
    return digest_xxh3_64(kernel_current(), data, size_bytes, seed);
}

void pyccl_xxh3_128(const void *data, size_t size_bytes, uint64_t seed, uint8_t out[16]) {
    digest_xxh3_128(kernel_current(), data, size_bytes, seed, out);
}

void pyccl_chunk_digests(const void *data, size_t size_bytes, size_t chunk_bytes, uint8_t *out) {
    PYCCL_ASSERT(chunk_bytes > 0);
    const kernel k = kernel_current();
    const uint8_t *in = data;
    while (size_bytes > 0) {
        const size_t chunk = size_bytes < chunk_bytes ? size_bytes : chunk_bytes;
        digest_xxh3_128(k, in, chunk, 0, out);
        in += chunk;
        size_bytes -= chunk;
        out += 16;
    }
}
