/* quant_scalar.c: the parts of codecs in plain C: the reference of every other kernel. See quant.h. */
#include "quant.h"

#include "element.h"

/* Element i as float32: float16 and bfloat16 exactly, float64 rounded. */
ELEMENT float load(uint8_t dtype, const void *in, size_t i) {
    switch (dtype) {
    case PYCCL_FLOAT16: return f32_from_f16(((const u16 *)in)[i]);
    case PYCCL_BFLOAT16: return f32_from_bf16(((const u16 *)in)[i]);
    case PYCCL_FLOAT64: return (float)((const f64 *)in)[i];
    default: return ((const f32 *)in)[i];
    }
}

ELEMENT void store(uint8_t dtype, void *out, size_t i, float x) {
    switch (dtype) {
    case PYCCL_FLOAT16: ((u16 *)out)[i] = f16_from_f32(x); break;
    case PYCCL_BFLOAT16: ((u16 *)out)[i] = bf16_from_f32(x); break;
    case PYCCL_FLOAT64: ((f64 *)out)[i] = (double)x; break;
    default: ((f32 *)out)[i] = x;
    }
}

static quant_range range_scalar(uint8_t dtype, const void *in, size_t count) {
    quant_range range = {load(dtype, in, 0), load(dtype, in, 0), true};
    for (size_t i = 0; i < count; i++) {
        const float x = load(dtype, in, i);
        if ((f32_bits(x) & 0x7f800000) == 0x7f800000) range.finite = false;
        if (x < range.low) range.low = x;
        if (x > range.high) range.high = x;
    }
    return range;
}

static uint32_t peak_scalar(uint8_t dtype, const void *in, size_t count) {
    uint32_t peak = 0;
    for (size_t i = 0; i < count; i++) {
        const uint32_t size = f32_bits(load(dtype, in, i)) & 0x7fffffff;
        if (size > peak) peak = size;
    }
    return peak;
}

/* Rounded, ties to even; |x| < 2^22. */
ELEMENT uint32_t nearest(float x) {
    const float integers = 0x1.8p23f; /* floats of this size are integers: the addition rounds */
    return f32_bits(x + integers) - f32_bits(integers);
}

ELEMENT float cut(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x; }

static void uint8_encode(uint8_t dtype, const void *in, size_t count, quant_by by, uint8_t *codes) {
    for (size_t i = 0; i < count; i++) codes[i] = (uint8_t)nearest((load(dtype, in, i) * 0.5f - by.low) * by.factor);
}

static void uint8_decode(uint8_t dtype, const uint8_t *codes, size_t count, quant_by by, void *out) {
    for (size_t i = 0; i < count; i++) store(dtype, out, i, cut((by.low + (float)codes[i] * by.scale) * by.factor, by.limit));
}

static void int8_encode(uint8_t dtype, const void *in, size_t count, quant_by by, uint8_t *codes) {
    for (size_t i = 0; i < count; i++) codes[i] = (uint8_t)nearest(load(dtype, in, i) * by.factor);
}

static void int8_decode(uint8_t dtype, const uint8_t *codes, size_t count, quant_by by, void *out) {
    for (size_t i = 0; i < count; i++) store(dtype, out, i, cut((float)(int8_t)codes[i] * by.scale, by.limit));
}

/* E4M3: sign, four bits of exponent with bias 7, three of mantissa; 0x7f is NaN, 0x7e 448. Below 2^-6 the steps are 2^-9. */
static void e4m3_encode(uint8_t dtype, const void *in, size_t count, quant_by by, uint8_t *codes) {
    const uint32_t least_exponent = f32_bits(0x1p-6f);
    for (size_t i = 0; i < count; i++) {
        const uint32_t bits = f32_bits(load(dtype, in, i) * by.factor), size = bits & 0x7fffffff;
        uint32_t exponent = size & 0x7f800000;
        if (exponent < least_exponent) exponent = least_exponent;
        const uint32_t steps = exponent + (20u << 23); /* of floats of this size a unit is the step: the addition rounds */
        const uint32_t code = f32_bits(f32_of(size) + f32_of(steps)) - steps + ((exponent - least_exponent) >> 20);
        codes[i] = (uint8_t)(code | (bits >> 24 & 0x80));
    }
}

static void e4m3_decode(uint8_t dtype, const uint8_t *codes, size_t count, quant_by by, void *out) {
    for (size_t i = 0; i < count; i++) {
        const uint32_t size = codes[i] & 0x7f, sign = (uint32_t)(codes[i] & 0x80) << 24;
        const float plain = size < 8 ? (float)size * 0x1p-9f : f32_of((size << 20) + (120u << 23));
        store(dtype, out, i, size == 0x7f ? f32_of(F32_NAN) : cut(f32_of(f32_bits(plain) | sign) * by.scale, by.limit));
    }
}

static void e3m0_encode(uint8_t dtype, const void *in, size_t count, quant_by by, uint8_t *codes) {
    for (size_t i = 0; i < count; i++) {
        const uint32_t bits = f32_bits(load(dtype, in, i) * by.factor), size = bits & 0x7fffffff;
        const uint32_t above = (size - by.base) >> 23; /* base < least */
        const uint32_t code = size < by.least ? 0 : (above > 1 ? above : 1) | (bits >> 28 & 8);
        codes[i / 2] = (uint8_t)(i % 2 == 0 ? code : codes[i / 2] | code << 4);
    }
}

static void e3m0_decode(uint8_t dtype, const uint8_t *codes, size_t count, quant_by by, void *out) {
    for (size_t i = 0; i < count; i++) {
        const uint32_t code = codes[i / 2] >> (i % 2 * 4);
        store(dtype, out, i, f32_of(f32_bits(by.level[code & 7]) | (code & 8) << 28));
    }
}

static void bf16_encode(uint8_t dtype, const void *in, size_t count, quant_by by, uint8_t *codes) {
    (void)by;
    for (size_t i = 0; i < count; i++) ((u16 *)(void *)codes)[i] = bf16_from_f32(load(dtype, in, i));
}

static void bf16_decode(uint8_t dtype, const uint8_t *codes, size_t count, quant_by by, void *out) {
    (void)by;
    for (size_t i = 0; i < count; i++) {
        const float x = f32_from_bf16(((const u16 *)(const void *)codes)[i]);
        store(dtype, out, i, x == x ? x : f32_of(F32_NAN));
    }
}

const quant_kernels quant_scalar = QUANT_KERNELS(range_scalar, peak_scalar);
