/* quant_simd.h: the parts of codecs with the vectors of a simd_*.h, which the including file has chosen.
 *
 * Whole vectors first; what is left of a block is copied into a padded buffer and runs through the same code.
 * See quant.h for what each part computes and quant_scalar.c for the same in plain C. */
#include <math.h>

#include "quant.h"

#define GROUP (VF_WIDTH * CODE_GROUP) /* elements that become codes at a time */

/* One of these per dtype: SIZE of an element, LOAD and STORE of VF_WIDTH of them as float32. */
#define QUANT_DTYPE(name, SIZE, LOAD, STORE)                                                                          \
    static void range_vectors_##name(const uint8_t *in, size_t vectors, vf *low, vf *high, vf *nan) {                 \
        vf l = *low, h = *high, n = *nan, l2 = l, h2 = h;                                                             \
        size_t i = 0;                                                                                                 \
        for (; i + 2 <= vectors; i += 2) { /* two chains: a minimum takes four cycles to arrive */                    \
            const vf x = LOAD(in + i * VF_WIDTH * (SIZE)), y = LOAD(in + (i + 1) * VF_WIDTH * (SIZE));                \
            l = f32_min(l, x);                                                                                        \
            h = f32_max(h, x);                                                                                        \
            l2 = f32_min(l2, y);                                                                                      \
            h2 = f32_max(h2, y);                                                                                      \
            n = nan_seen(n, x, y);                                                                                    \
        }                                                                                                             \
        for (; i < vectors; i++) {                                                                                    \
            const vf x = LOAD(in + i * VF_WIDTH * (SIZE));                                                            \
            l = f32_min(l, x);                                                                                        \
            h = f32_max(h, x);                                                                                        \
            n = nan_seen(n, x, x);                                                                                    \
        }                                                                                                             \
        *low = f32_min(l, l2);                                                                                        \
        *high = f32_max(h, h2);                                                                                       \
        *nan = n;                                                                                                     \
    }                                                                                                                 \
    static void encode_groups_##name(const uint8_t *in, size_t groups, float half_low, float inverse, uint8_t *codes) {\
        const vf half = f32_splat(0.5f), low = f32_splat(half_low), factor = f32_splat(inverse);                      \
        for (size_t i = 0; i < groups; i++) {                                                                         \
            vf t[CODE_GROUP];                                                                                         \
            for (size_t k = 0; k < CODE_GROUP; k++)                                                                   \
                t[k] = (LOAD(in + (i * GROUP + k * VF_WIDTH) * (SIZE)) * half - low) * factor;                        \
            codes_store(codes + i * GROUP, t);                                                                        \
        }                                                                                                             \
    }                                                                                                                 \
    static void decode_vectors_##name(const uint8_t *codes, size_t vectors, quant_affine by, uint8_t *out) {          \
        const vf l = f32_splat(by.low), s = f32_splat(by.scale), f = f32_splat(by.factor);                            \
        const vf most = f32_splat(by.limit), least = f32_splat(-by.limit);                                            \
        for (size_t i = 0; i < vectors; i++) {                                                                        \
            const vf x = (l + codes_load(codes + i * VF_WIDTH) * s) * f;                                              \
            STORE(out + i * VF_WIDTH * (SIZE), f32_max(f32_min(x, most), least));                                     \
        }                                                                                                             \
    }

QUANT_DTYPE(f32, 4, f32_load, f32_store)
QUANT_DTYPE(f64, 8, f32_load_f64, f32_store_f64)
QUANT_DTYPE(f16, 2, f16_load, f16_store)
QUANT_DTYPE(bf16, 2, bf16_load, bf16_store)

/* ---- by dtype ---- */

static void range_vectors(uint8_t dtype, const uint8_t *in, size_t vectors, vf *low, vf *high, vf *nan) {
    switch (dtype) {
    case PYCCL_FLOAT16: range_vectors_f16(in, vectors, low, high, nan); break;
    case PYCCL_BFLOAT16: range_vectors_bf16(in, vectors, low, high, nan); break;
    case PYCCL_FLOAT64: range_vectors_f64(in, vectors, low, high, nan); break;
    default: range_vectors_f32(in, vectors, low, high, nan);
    }
}

static void encode_groups(uint8_t dtype, const uint8_t *in, size_t groups, float half_low, float inverse, uint8_t *codes) {
    switch (dtype) {
    case PYCCL_FLOAT16: encode_groups_f16(in, groups, half_low, inverse, codes); break;
    case PYCCL_BFLOAT16: encode_groups_bf16(in, groups, half_low, inverse, codes); break;
    case PYCCL_FLOAT64: encode_groups_f64(in, groups, half_low, inverse, codes); break;
    default: encode_groups_f32(in, groups, half_low, inverse, codes);
    }
}

static void decode_vectors(uint8_t dtype, const uint8_t *codes, size_t vectors, quant_affine by, uint8_t *out) {
    switch (dtype) {
    case PYCCL_FLOAT16: decode_vectors_f16(codes, vectors, by, out); break;
    case PYCCL_BFLOAT16: decode_vectors_bf16(codes, vectors, by, out); break;
    case PYCCL_FLOAT64: decode_vectors_f64(codes, vectors, by, out); break;
    default: decode_vectors_f32(codes, vectors, by, out);
    }
}

/* ---- blocks of any length ---- */

/* `elements` places: the `rest` elements at `in`, then copies of the first of them. */
static void pad(uint8_t dtype, const uint8_t *in, size_t rest, size_t elements, uint8_t *out) {
    const size_t bytes = pyccl_dtype_size(dtype);
    memcpy(out, in, rest * bytes);
    for (size_t i = rest; i < elements; i++) memcpy(out + i * bytes, in, bytes);
}

static quant_range range_run(uint8_t dtype, const void *in, size_t count) {
    const size_t rest = count % VF_WIDTH, whole = count - rest;
    const uint8_t *end = (const uint8_t *)in + whole * pyccl_dtype_size(dtype);
    vf low = f32_splat(INFINITY), high = f32_splat(-INFINITY), nan = f32_splat(0);
    range_vectors(dtype, in, whole / VF_WIDTH, &low, &high, &nan);
    if (rest > 0) {
        uint8_t padded[VF_WIDTH * sizeof(double)];
        pad(dtype, end, rest, VF_WIDTH, padded);
        range_vectors(dtype, padded, 1, &low, &high, &nan);
    }
    quant_range range = {f32_min_of(low), f32_max_of(high), true};
    range.finite = !nan_any(nan) && range.low > -INFINITY && range.high < INFINITY;
    return range;
}

static void affine_encode_run(uint8_t dtype, const void *in, size_t count, float half_low, float inverse, uint8_t *codes) {
    const size_t rest = count % GROUP, whole = count - rest;
    encode_groups(dtype, in, whole / GROUP, half_low, inverse, codes);
    if (rest == 0) return;
    uint8_t padded[GROUP * sizeof(double)], padded_codes[GROUP];
    pad(dtype, (const uint8_t *)in + whole * pyccl_dtype_size(dtype), rest, GROUP, padded);
    encode_groups(dtype, padded, 1, half_low, inverse, padded_codes);
    memcpy(codes + whole, padded_codes, rest);
}

static void affine_decode_run(uint8_t dtype, const uint8_t *codes, size_t count, quant_affine by, void *out) {
    const size_t rest = count % VF_WIDTH, whole = count - rest, bytes = pyccl_dtype_size(dtype);
    decode_vectors(dtype, codes, whole / VF_WIDTH, by, out);
    if (rest == 0) return;
    uint8_t padded_codes[VF_WIDTH] = {0}, padded[VF_WIDTH * sizeof(double)];
    memcpy(padded_codes, codes + whole, rest);
    decode_vectors(dtype, padded_codes, 1, by, padded);
    memcpy((uint8_t *)out + whole * bytes, padded, rest * bytes);
}
