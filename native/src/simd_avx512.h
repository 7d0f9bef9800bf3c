/* simd_avx512.h: vectors of sixteen float32 and eight float64 with AVX-512 (F, BW, DQ, VL). As simd_avx2.h. */
#ifndef PYCCL_SIMD_H
#define PYCCL_SIMD_H

#include <immintrin.h>

#include "element.h"

typedef __m512 vf;
typedef __m512d vd;
typedef int32_t vi __attribute__((vector_size(sizeof(vf))));
#define VF_WIDTH 16
#define CODE_GROUP 1

ELEMENT vf f32_splat(float x) { return _mm512_set1_ps(x); }
ELEMENT vd f64_splat(double x) { return _mm512_set1_pd(x); }

ELEMENT vf f32_load(const uint8_t *at) { return _mm512_loadu_ps(at); }
ELEMENT void f32_store(uint8_t *at, vf x) { _mm512_storeu_ps(at, x); }
ELEMENT vd f64_load(const uint8_t *at) { return _mm512_loadu_pd(at); }
ELEMENT void f64_store(uint8_t *at, vd x) { _mm512_storeu_pd(at, x); }

ELEMENT __m256i load256(const uint8_t *at) { return _mm256_loadu_si256((const __m256i *)(const void *)at); }
ELEMENT void store256(uint8_t *at, __m256i x) { _mm256_storeu_si256((__m256i *)(void *)at, x); }

ELEMENT vf f16_load(const uint8_t *at) { return _mm512_cvtph_ps(load256(at)); }
ELEMENT void f16_store(uint8_t *at, vf x) { store256(at, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }

ELEMENT vf bf16_load(const uint8_t *at) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load256(at)), 16));
}
ELEMENT void bf16_store(uint8_t *at, vf x) { /* the instruction of AVX512_BF16 flushes denormals: not ours */
    const __m512i bits = _mm512_castps_si512(x), even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
    store256(at, _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16)));
}

ELEMENT vf f32_load_f64(const uint8_t *at) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(f64_load(at))), _mm512_cvtpd_ps(f64_load(at + 64)), 1);
}
ELEMENT void f32_store_f64(uint8_t *at, vf x) {
    f64_store(at, _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
    f64_store(at + 64, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
}

ELEMENT vf f32_nan_where(__mmask16 where, vf x) {
    return _mm512_mask_mov_ps(x, where, _mm512_castsi512_ps(_mm512_set1_epi32((int)F32_NAN)));
}
ELEMENT vd f64_nan_where(__mmask8 where, vd x) {
    return _mm512_mask_mov_pd(x, where, _mm512_castsi512_pd(_mm512_set1_epi64((long long)F64_NAN)));
}
ELEMENT vf f32_canonical(vf x) { return f32_nan_where(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x); }
ELEMENT vd f64_canonical(vd x) { return f64_nan_where(_mm512_cmp_pd_mask(x, x, _CMP_UNORD_Q), x); }

/* As with AVX2: the second operand wins where the two are equal. */
ELEMENT vf f32_least(vf x, vf y) {
    return f32_nan_where(_mm512_cmp_ps_mask(x, y, _CMP_UNORD_Q), _mm512_or_ps(_mm512_min_ps(x, y), _mm512_min_ps(y, x)));
}
ELEMENT vf f32_greatest(vf x, vf y) {
    return f32_nan_where(_mm512_cmp_ps_mask(x, y, _CMP_UNORD_Q), _mm512_and_ps(_mm512_max_ps(x, y), _mm512_max_ps(y, x)));
}
ELEMENT vd f64_least(vd x, vd y) {
    return f64_nan_where(_mm512_cmp_pd_mask(x, y, _CMP_UNORD_Q), _mm512_or_pd(_mm512_min_pd(x, y), _mm512_min_pd(y, x)));
}
ELEMENT vd f64_greatest(vd x, vd y) {
    return f64_nan_where(_mm512_cmp_pd_mask(x, y, _CMP_UNORD_Q), _mm512_and_pd(_mm512_max_pd(x, y), _mm512_max_pd(y, x)));
}

ELEMENT vf f32_min(vf x, vf y) { return _mm512_min_ps(x, y); }
ELEMENT vf f32_max(vf x, vf y) { return _mm512_max_ps(x, y); }
ELEMENT float f32_min_of(vf x) { return _mm512_reduce_min_ps(x); }
ELEMENT float f32_max_of(vf x) { return _mm512_reduce_max_ps(x); }
ELEMENT vf nan_seen(vf seen, vf x, vf y) { return f32_nan_where(_mm512_cmp_ps_mask(x, y, _CMP_UNORD_Q), seen); }
ELEMENT int nan_any(vf seen) { return _mm512_cmp_ps_mask(seen, seen, _CMP_UNORD_Q) != 0; }

ELEMENT vi i32_max(vi x, vi y) { return (vi)_mm512_max_epi32((__m512i)x, (__m512i)y); }
ELEMENT vi i32_nearest(vf x) { return (vi)_mm512_cvtps_epi32(x); }
ELEMENT vf f32_from_i32(vi x) { return _mm512_cvtepi32_ps((__m512i)x); }

ELEMENT __m128i load128(const uint8_t *at) { return _mm_loadu_si128((const __m128i *)(const void *)at); }
ELEMENT vi u8_load(const uint8_t *at) { return (vi)_mm512_cvtepu8_epi32(load128(at)); }
ELEMENT vi i8_load(const uint8_t *at) { return (vi)_mm512_cvtepi8_epi32(load128(at)); }

ELEMENT void bytes_store(uint8_t *at, const vi codes[CODE_GROUP]) {
    _mm_storeu_si128((__m128i *)(void *)at, _mm512_cvtepi32_epi8((__m512i)codes[0]));
}
ELEMENT void nibbles_store(uint8_t *at, const vi codes[CODE_GROUP]) {
    const __m128i pairs = _mm_maddubs_epi16(_mm512_cvtepi32_epi8((__m512i)codes[0]), _mm_set1_epi16(0x1001));
    _mm_storel_epi64((__m128i *)(void *)at, _mm_packus_epi16(pairs, pairs));
}
ELEMENT vi nibbles_load(const uint8_t *at) {
    const __m128i bytes = _mm_loadl_epi64((const __m128i *)(const void *)at);
    return (vi)_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, _mm_srli_epi16(bytes, 4)));
}
ELEMENT vf levels_pick(const float level[8], vi code) {
    const __m512 sizes = _mm512_castps256_ps512(_mm256_loadu_ps(level));
    const vf size = _mm512_permutexvar_ps((__m512i)(code & 7), sizes);
    return (vf)((vi)size | ((code & 8) << 28));
}

#endif
