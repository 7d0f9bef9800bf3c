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

static void affine_encode_scalar(uint8_t dtype, const void *in, size_t count, float half_low, float inverse, uint8_t *codes) {
    const float integers = 0x1.8p23f; /* floats of this size are integers: the addition rounds, ties to even */
    for (size_t i = 0; i < count; i++) {
        const float t = (load(dtype, in, i) * 0.5f - half_low) * inverse;
        codes[i] = (uint8_t)(f32_bits(t + integers) - f32_bits(integers));
    }
}

static void affine_decode_scalar(uint8_t dtype, const uint8_t *codes, size_t count, quant_affine by, void *out) {
    for (size_t i = 0; i < count; i++) {
        const float x = (by.low + (float)codes[i] * by.scale) * by.factor;
        store(dtype, out, i, x > by.limit ? by.limit : x < -by.limit ? -by.limit : x);
    }
}

const quant_kernels quant_scalar = {range_scalar, affine_encode_scalar, affine_decode_scalar};
