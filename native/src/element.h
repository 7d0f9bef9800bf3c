/* element.h: single elements: types for arrays of any alignment, bits of floats, float16 and bfloat16 in plain C.
 *
 * The conversions are exact upwards and round once, to nearest even, downwards; a NaN becomes the canonical quiet NaN.
 * They are the reference that the vector forms (simd_*.h) must equal. Valid in IEEE mode only (float_mode.h). */
#ifndef PYCCL_ELEMENT_H
#define PYCCL_ELEMENT_H

#include <stdint.h>
#include <string.h>

/* Arrays come from frames and from callers: any alignment, any effective type. */
#define FOREIGN __attribute__((aligned(1), may_alias))
typedef int8_t FOREIGN i8;
typedef uint8_t FOREIGN u8;
typedef int16_t FOREIGN i16;
typedef uint16_t FOREIGN u16;
typedef int32_t FOREIGN i32;
typedef uint32_t FOREIGN u32;
typedef int64_t FOREIGN i64;
typedef uint64_t FOREIGN u64;
typedef float FOREIGN f32;
typedef double FOREIGN f64;

#define ELEMENT static inline __attribute__((always_inline))

#define F32_NAN UINT32_C(0x7fc00000)
#define F64_NAN UINT64_C(0x7ff8000000000000)
#define F16_NAN 0x7e00
#define BF16_NAN 0x7fc0

ELEMENT uint32_t f32_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

ELEMENT float f32_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

ELEMENT uint64_t f64_bits(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

ELEMENT float f32_from_f16(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) return f32_of(sign | 0x7f800000 | (rest & 0x3ff) << 13); /* infinity, NaN */
    const float scaled = f32_of(rest << 13) * 0x1p112f; /* the exponent biases differ by 112; exact, denormals too */
    return f32_of(sign | f32_bits(scaled));
}

ELEMENT uint16_t f16_from_f32(float x) {
    if (x != x) return F16_NAN;
    const uint16_t sign = (uint16_t)(f32_bits(x) >> 16 & 0x8000);
    const uint32_t rest = f32_bits(x) & 0x7fffffff;
    const float size = f32_of(rest);
    if (size >= 65520.0f) return (uint16_t)(sign | 0x7c00);
    /* Below the normals a step is 2^-24: that of floats from 0.5 to 1, so that the addition rounds. */
    if (size < 0x1p-14f) return (uint16_t)(sign | (f32_bits(size + 0.5f) - f32_bits(0.5f)));
    return (uint16_t)(sign | (((rest + 0xfff + (rest >> 13 & 1)) >> 13) - (112u << 10)));
}

ELEMENT float f32_from_bf16(uint16_t half) { return f32_of((uint32_t)half << 16); }

ELEMENT uint16_t bf16_from_f32(float x) {
    if (x != x) return BF16_NAN;
    const uint32_t bits = f32_bits(x);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#endif
