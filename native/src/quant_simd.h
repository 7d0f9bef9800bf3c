/* quant_simd.h: what codecs do for each element, with the vectors of a simd_*.h, which the including file has chosen.
 *
 * For each codec: X_put makes codes of CODE_GROUP vectors of float32, X_get makes a vector of float32 of codes. The macros
 * below make loops of them for every dtype. Whole vectors first; what is left of a block is copied into a padded buffer
 * and runs through the same code. See quant.h for what codes are and quant_scalar.c for the same in plain C. */
#include <math.h>

#include "quant.h"

#define LINE 64 /* bytes of the cache */
#define GROUP (VF_WIDTH * CODE_GROUP) /* elements that become codes at a time */

enum { uint8_BITS = 8, int8_BITS = 8, e4m3_BITS = 8, e3m0_BITS = 4, bf16_BITS = 16 };

ELEMENT vi bits_of(vf x) { return (vi)x; }
ELEMENT vf of_bits(vi bits) { return (vf)bits; }
ELEMENT vi sizes_of(vf x) { return bits_of(x) & 0x7fffffff; }
ELEMENT vf cut(vf x, float limit) { return f32_max(f32_min(x, f32_splat(limit)), f32_splat(-limit)); }

/* ---- codes ---- */

ELEMENT void uint8_put(uint8_t *at, const vf x[CODE_GROUP], quant_by by) {
    vi codes[CODE_GROUP];
    for (size_t k = 0; k < CODE_GROUP; k++) codes[k] = i32_nearest((x[k] * f32_splat(0.5f) - f32_splat(by.low)) * f32_splat(by.factor));
    bytes_store(at, codes);
}
ELEMENT vf uint8_get(const uint8_t *at, quant_by by) {
    return cut((f32_splat(by.low) + f32_from_i32(u8_load(at)) * f32_splat(by.scale)) * f32_splat(by.factor), by.limit);
}

ELEMENT void int8_put(uint8_t *at, const vf x[CODE_GROUP], quant_by by) {
    vi codes[CODE_GROUP];
    for (size_t k = 0; k < CODE_GROUP; k++) codes[k] = i32_nearest(x[k] * f32_splat(by.factor)) & 0xff;
    bytes_store(at, codes);
}
ELEMENT vf int8_get(const uint8_t *at, quant_by by) {
    return cut(f32_from_i32(i8_load(at)) * f32_splat(by.scale), by.limit);
}

ELEMENT void e4m3_put(uint8_t *at, const vf x[CODE_GROUP], quant_by by) {
    vi codes[CODE_GROUP];
    for (size_t k = 0; k < CODE_GROUP; k++) {
        const vf t = x[k] * f32_splat(by.factor);
        const vi size = sizes_of(t), least_exponent = bits_of(f32_splat(0x1p-6f));
        const vi exponent = i32_max(size & 0x7f800000, least_exponent), steps = exponent + (20 << 23);
        const vi rounded = bits_of(of_bits(size) + of_bits(steps)) - steps;
        codes[k] = (rounded + ((exponent - least_exponent) >> 20)) | ((bits_of(t) >> 24) & 0x80);
    }
    bytes_store(at, codes);
}
ELEMENT vf e4m3_get(const uint8_t *at, quant_by by) {
    const vi code = u8_load(at), size = code & 0x7f, sign = (code & 0x80) << 24, bits = size << 20;
    /* As if normal, and as if not: below 2^-6 the second is less and right, above the first. */
    const vf plain = f32_min(of_bits(bits + (120 << 23)), of_bits(bits + (121 << 23)) - f32_splat(0x1p-6f));
    const vi x = bits_of(cut(of_bits(bits_of(plain) | sign) * f32_splat(by.scale), by.limit));
    const vi nan = size == 0x7f;
    return of_bits((x & ~nan) | (nan & (int32_t)F32_NAN));
}

ELEMENT void e3m0_put(uint8_t *at, const vf x[CODE_GROUP], quant_by by) {
    vi codes[CODE_GROUP];
    for (size_t k = 0; k < CODE_GROUP; k++) {
        const vf t = x[k] * f32_splat(by.factor);
        const vi size = sizes_of(t), some = size > (int32_t)by.least - 1; /* -1: not zero */
        codes[k] = i32_max((size - (int32_t)by.base) >> 23, -some) | ((bits_of(t) >> 28) & 8 & some);
    }
    nibbles_store(at, codes);
}
ELEMENT vf e3m0_get(const uint8_t *at, quant_by by) { return levels_pick(by.level, nibbles_load(at)); }

ELEMENT void bf16_put(uint8_t *at, const vf x[CODE_GROUP], quant_by by) {
    (void)by;
    for (size_t k = 0; k < CODE_GROUP; k++) bf16_store(at + k * VF_WIDTH * 2, f32_canonical(x[k]));
}
ELEMENT vf bf16_get(const uint8_t *at, quant_by by) {
    (void)by;
    return f32_canonical(bf16_load(at));
}

/* ---- loops: one for each codec and dtype ---- */

#define CODE_BYTES(codec, elements) ((elements) * codec##_BITS / 8)

/* SIZE of an element, LOAD and STORE of VF_WIDTH of them as float32. */
#define EACH_DTYPE(MAKE, codec)                          \
    MAKE(codec, f32, 4, f32_load, f32_store)             \
    MAKE(codec, f64, 8, f32_load_f64, f32_store_f64)     \
    MAKE(codec, f16, 2, f16_load, f16_store)             \
    MAKE(codec, bf16, 2, bf16_load, bf16_store)

typedef void encode_loop(const uint8_t *in, size_t groups, quant_by by, uint8_t *codes);
typedef void decode_loop(const uint8_t *codes, size_t vectors, quant_by by, uint8_t *out);

#define ENCODE_LOOP(codec, name, SIZE, LOAD, STORE)                                                                \
    static void codec##_encode_##name(const uint8_t *in, size_t groups, quant_by by, uint8_t *codes) {             \
        for (size_t i = 0; i < groups; i++) {                                                                      \
            vf x[CODE_GROUP];                                                                                      \
            for (size_t k = 0; k < GROUP * (SIZE); k += LINE) __builtin_prefetch(in + by.ahead + i * GROUP * (SIZE) + k); \
            for (size_t k = 0; k < CODE_GROUP; k++) x[k] = LOAD(in + (i * GROUP + k * VF_WIDTH) * (SIZE));         \
            codec##_put(codes + i * CODE_BYTES(codec, GROUP), x, by);                                              \
        }                                                                                                          \
    }
#define DECODE_LOOP(codec, name, SIZE, LOAD, STORE)                                                                \
    static void codec##_decode_##name(const uint8_t *codes, size_t vectors, quant_by by, uint8_t *out) {           \
        for (size_t i = 0; i < vectors; i++)                                                                       \
            STORE(out + i * VF_WIDTH * (SIZE), codec##_get(codes + i * CODE_BYTES(codec, VF_WIDTH), by));          \
    }

#define OF_DTYPE(dtype, of_f16, of_bf16, of_f64, of_f32) \
    ((dtype) == PYCCL_FLOAT16 ? (of_f16) : (dtype) == PYCCL_BFLOAT16 ? (of_bf16) : (dtype) == PYCCL_FLOAT64 ? (of_f64) : (of_f32))

static void encode_run(encode_loop *loop, uint8_t dtype, size_t code_bits, const void *in, size_t count, quant_by by, uint8_t *codes) {
    const size_t rest = count % GROUP, whole = count - rest, bytes = pyccl_dtype_size(dtype);
    loop(in, whole / GROUP, by, codes);
    if (rest == 0) return;
    uint8_t padded[GROUP * sizeof(double)] = {0}, padded_codes[GROUP * sizeof(uint16_t)];
    memcpy(padded, (const uint8_t *)in + whole * bytes, rest * bytes);
    by.ahead = 0;
    loop(padded, 1, by, padded_codes);
    memcpy(codes + whole * code_bits / 8, padded_codes, (rest * code_bits + 7) / 8);
}

static void decode_run(decode_loop *loop, uint8_t dtype, size_t code_bits, const uint8_t *codes, size_t count, quant_by by, void *out) {
    const size_t rest = count % VF_WIDTH, whole = count - rest, bytes = pyccl_dtype_size(dtype);
    loop(codes, whole / VF_WIDTH, by, out);
    if (rest == 0) return;
    uint8_t padded_codes[VF_WIDTH * sizeof(uint16_t)] = {0}, padded[VF_WIDTH * sizeof(double)];
    memcpy(padded_codes, codes + whole * code_bits / 8, (rest * code_bits + 7) / 8);
    loop(padded_codes, 1, by, padded);
    memcpy((uint8_t *)out + whole * bytes, padded, rest * bytes);
}

#define CODEC(codec)                                                                                                          \
    EACH_DTYPE(ENCODE_LOOP, codec)                                                                                            \
    EACH_DTYPE(DECODE_LOOP, codec)                                                                                            \
    static void codec##_encode(uint8_t dtype, const void *in, size_t count, quant_by by, uint8_t *codes) {                    \
        encode_loop *const loop =                                                                                             \
            OF_DTYPE(dtype, codec##_encode_f16, codec##_encode_bf16, codec##_encode_f64, codec##_encode_f32);                 \
        encode_run(loop, dtype, codec##_BITS, in, count, by, codes);                                                          \
    }                                                                                                                         \
    static void codec##_decode(uint8_t dtype, const uint8_t *codes, size_t count, quant_by by, void *out) {                   \
        decode_loop *const loop =                                                                                             \
            OF_DTYPE(dtype, codec##_decode_f16, codec##_decode_bf16, codec##_decode_f64, codec##_decode_f32);                 \
        decode_run(loop, dtype, codec##_BITS, codes, count, by, out);                                                         \
    }

CODEC(uint8)
CODEC(int8)
CODEC(e4m3)
CODEC(e3m0)
CODEC(bf16)

/* ---- ranges ---- */

typedef struct lanes {
    vf low, high, nan;
} lanes;

typedef void range_loop(const uint8_t *in, size_t vectors, lanes *seen);
typedef void peak_loop(const uint8_t *in, size_t vectors, vi *seen);

#define RANGE_LOOP(_, name, SIZE, LOAD, STORE)                                                                \
    static void range_##name(const uint8_t *in, size_t vectors, lanes *seen) {                                \
        lanes a = *seen, b = *seen;                                                                           \
        size_t i = 0;                                                                                         \
        for (; i + 2 <= vectors; i += 2) { /* two chains: a minimum takes four cycles to arrive */            \
            const vf x = LOAD(in + i * VF_WIDTH * (SIZE)), y = LOAD(in + (i + 1) * VF_WIDTH * (SIZE));        \
            a.low = f32_min(a.low, x);                                                                        \
            a.high = f32_max(a.high, x);                                                                      \
            b.low = f32_min(b.low, y);                                                                        \
            b.high = f32_max(b.high, y);                                                                      \
            a.nan = nan_seen(a.nan, x, y);                                                                    \
        }                                                                                                     \
        for (; i < vectors; i++) {                                                                            \
            const vf x = LOAD(in + i * VF_WIDTH * (SIZE));                                                    \
            a.low = f32_min(a.low, x);                                                                        \
            a.high = f32_max(a.high, x);                                                                      \
            a.nan = nan_seen(a.nan, x, x);                                                                    \
        }                                                                                                     \
        *seen = (lanes){f32_min(a.low, b.low), f32_max(a.high, b.high), a.nan};                               \
    }
#define PEAK_LOOP(_, name, SIZE, LOAD, STORE)                                                                 \
    static void peak_##name(const uint8_t *in, size_t vectors, vi *seen) {                                    \
        vi a = *seen, b = a;                                                                                  \
        size_t i = 0;                                                                                         \
        for (; i + 2 <= vectors; i += 2) {                                                                    \
            a = i32_max(a, sizes_of(LOAD(in + i * VF_WIDTH * (SIZE))));                                       \
            b = i32_max(b, sizes_of(LOAD(in + (i + 1) * VF_WIDTH * (SIZE))));                                 \
        }                                                                                                     \
        for (; i < vectors; i++) a = i32_max(a, sizes_of(LOAD(in + i * VF_WIDTH * (SIZE))));                  \
        *seen = i32_max(a, b);                                                                                \
    }

EACH_DTYPE(RANGE_LOOP, )
EACH_DTYPE(PEAK_LOOP, )

/* A vector of the `rest` elements at `in`, filled up with copies of the first of them. */
static void pad(uint8_t dtype, const uint8_t *in, size_t rest, uint8_t *out) {
    const size_t bytes = pyccl_dtype_size(dtype);
    memcpy(out, in, rest * bytes);
    for (size_t i = rest; i < VF_WIDTH; i++) memcpy(out + i * bytes, in, bytes);
}

static quant_range range_run(uint8_t dtype, const void *in, size_t count) {
    const size_t rest = count % VF_WIDTH, whole = count - rest;
    range_loop *const loop = OF_DTYPE(dtype, range_f16, range_bf16, range_f64, range_f32);
    lanes seen = {f32_splat(INFINITY), f32_splat(-INFINITY), f32_splat(0)};
    loop(in, whole / VF_WIDTH, &seen);
    if (rest > 0) {
        uint8_t padded[VF_WIDTH * sizeof(double)];
        pad(dtype, (const uint8_t *)in + whole * pyccl_dtype_size(dtype), rest, padded);
        loop(padded, 1, &seen);
    }
    quant_range range = {f32_min_of(seen.low), f32_max_of(seen.high), true};
    range.finite = !nan_any(seen.nan) && range.low > -INFINITY && range.high < INFINITY;
    return range;
}

static uint32_t peak_run(uint8_t dtype, const void *in, size_t count) {
    const size_t rest = count % VF_WIDTH, whole = count - rest;
    peak_loop *const loop = OF_DTYPE(dtype, peak_f16, peak_bf16, peak_f64, peak_f32);
    vi seen = bits_of(f32_splat(0));
    loop(in, whole / VF_WIDTH, &seen);
    if (rest > 0) {
        uint8_t padded[VF_WIDTH * sizeof(double)];
        pad(dtype, (const uint8_t *)in + whole * pyccl_dtype_size(dtype), rest, padded);
        loop(padded, 1, &seen);
    }
    int32_t peak = 0;
    for (size_t i = 0; i < VF_WIDTH; i++) peak = seen[i] > peak ? seen[i] : peak;
    return (uint32_t)peak;
}
