/* simd_neon.h: vectors of four float32 and two float64 with NEON (aarch64). As simd_avx2.h. */
#ifndef PYCCL_SIMD_H
#define PYCCL_SIMD_H

#include <arm_neon.h>

#include "element.h"

typedef float32x4_t vf;
typedef float64x2_t vd;
typedef int32_t vi __attribute__((vector_size(sizeof(vf))));
#define VF_WIDTH 4
#define CODE_GROUP 4

ELEMENT vf f32_splat(float x) { return vdupq_n_f32(x); }
ELEMENT vd f64_splat(double x) { return vdupq_n_f64(x); }

/* By way of bytes: no alignment is assumed. */
ELEMENT vf f32_load(const uint8_t *at) { return vreinterpretq_f32_u8(vld1q_u8(at)); }
ELEMENT void f32_store(uint8_t *at, vf x) { vst1q_u8(at, vreinterpretq_u8_f32(x)); }
ELEMENT vd f64_load(const uint8_t *at) { return vreinterpretq_f64_u8(vld1q_u8(at)); }
ELEMENT void f64_store(uint8_t *at, vd x) { vst1q_u8(at, vreinterpretq_u8_f64(x)); }

ELEMENT vf f16_load(const uint8_t *at) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(at))); }
ELEMENT void f16_store(uint8_t *at, vf x) { vst1_u8(at, vreinterpret_u8_f16(vcvt_f16_f32(x))); }

ELEMENT vf bf16_load(const uint8_t *at) {
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(at)), 16));
}
ELEMENT void bf16_store(uint8_t *at, vf x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x), even = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t sum = vaddq_u32(bits, vaddq_u32(even, vdupq_n_u32(0x7fff)));
    vst1_u8(at, vreinterpret_u8_u16(vshrn_n_u32(sum, 16)));
}

ELEMENT vf f32_load_f64(const uint8_t *at) { return vcombine_f32(vcvt_f32_f64(f64_load(at)), vcvt_f32_f64(f64_load(at + 16))); }
ELEMENT void f32_store_f64(uint8_t *at, vf x) {
    f64_store(at, vcvt_f64_f32(vget_low_f32(x)));
    f64_store(at + 16, vcvt_high_f64_f32(x));
}

ELEMENT vf f32_canonical(vf x) { return vbslq_f32(vceqq_f32(x, x), x, vreinterpretq_f32_u32(vdupq_n_u32(F32_NAN))); }
ELEMENT vd f64_canonical(vd x) { return vbslq_f64(vceqq_f64(x, x), x, vreinterpretq_f64_u64(vdupq_n_u64(F64_NAN))); }

/* FMIN and FMAX propagate NaN and order -0 below +0. */
ELEMENT vf f32_least(vf x, vf y) { return f32_canonical(vminq_f32(x, y)); }
ELEMENT vf f32_greatest(vf x, vf y) { return f32_canonical(vmaxq_f32(x, y)); }
ELEMENT vd f64_least(vd x, vd y) { return f64_canonical(vminq_f64(x, y)); }
ELEMENT vd f64_greatest(vd x, vd y) { return f64_canonical(vmaxq_f64(x, y)); }

ELEMENT vf f32_min(vf x, vf y) { return vminq_f32(x, y); }
ELEMENT vf f32_max(vf x, vf y) { return vmaxq_f32(x, y); }
ELEMENT float f32_min_of(vf x) { return vminvq_f32(x); }
ELEMENT float f32_max_of(vf x) { return vmaxvq_f32(x); }
ELEMENT vf nan_seen(vf seen, vf x, vf y) { return vmaxq_f32(seen, vmaxq_f32(x, y)); }
ELEMENT int nan_any(vf seen) { return vminvq_u32(vceqq_f32(seen, seen)) == 0; }

ELEMENT vi i32_max(vi x, vi y) { return (vi)vmaxq_s32((int32x4_t)x, (int32x4_t)y); }
ELEMENT vi i32_nearest(vf x) { return (vi)vcvtnq_s32_f32(x); }
ELEMENT vf f32_from_i32(vi x) { return vcvtq_f32_s32((int32x4_t)x); }

ELEMENT vi u8_load(const uint8_t *at) {
    uint32_t four;
    memcpy(&four, at, sizeof four);
    return (vi)vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four))));
}
ELEMENT vi i8_load(const uint8_t *at) {
    uint32_t four;
    memcpy(&four, at, sizeof four);
    return (vi)vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four))));
}

ELEMENT uint8x16_t bytes_of(const vi codes[CODE_GROUP]) {
    const uint16x8_t low = vcombine_u16(vmovn_u32((uint32x4_t)codes[0]), vmovn_u32((uint32x4_t)codes[1]));
    const uint16x8_t high = vcombine_u16(vmovn_u32((uint32x4_t)codes[2]), vmovn_u32((uint32x4_t)codes[3]));
    return vcombine_u8(vmovn_u16(low), vmovn_u16(high));
}
ELEMENT void bytes_store(uint8_t *at, const vi codes[CODE_GROUP]) { vst1q_u8(at, bytes_of(codes)); }
ELEMENT void nibbles_store(uint8_t *at, const vi codes[CODE_GROUP]) {
    const uint16x8_t pairs = vreinterpretq_u16_u8(bytes_of(codes));
    vst1_u8(at, vmovn_u16(vorrq_u16(pairs, vshrq_n_u16(pairs, 4))));
}
ELEMENT vi nibbles_load(const uint8_t *at) {
    uint16_t four;
    memcpy(&four, at, sizeof four);
    const vi shifts = {0, -4, -8, -12};
    return (vi)vshlq_u32(vdupq_n_u32(four), (int32x4_t)shifts);
}
ELEMENT vf levels_pick(const float level[8], vi code) { /* by bytes: 4 * code + 0, 1, 2, 3 */
    const uint8_t *at = (const uint8_t *)(const void *)level;
    const uint8x16x2_t table = {{vld1q_u8(at), vld1q_u8(at + 16)}};
    const vi places = (code & 7) * 0x04040404 + 0x03020100;
    const uint8x16_t size = vqtbl2q_u8(table, (uint8x16_t)places);
    return (vf)((vi)size | ((code & 8) << 28));
}

#endif
