/* simd_avx2.h: vectors of eight float32 and four float64 with AVX2 and F16C, for reduce_simd.h and quant_simd.h.
 *
 * Included by files that are compiled with -mavx2 -mf16c only. Operators (+ * /) on the vector types are those of the
 * compiler; -ffp-contract=off keeps them apart. What X_store is given must not hold a NaN other than the canonical. */
#ifndef PYCCL_SIMD_H
#define PYCCL_SIMD_H

#include <immintrin.h>

#include "element.h"

typedef __m256 vf;
typedef __m256d vd;
typedef int32_t vi __attribute__((vector_size(sizeof(vf))));
#define VF_WIDTH 8
#define CODE_GROUP 4 /* vectors that become codes at a time */

ELEMENT vf f32_splat(float x) { return _mm256_set1_ps(x); }
ELEMENT vd f64_splat(double x) { return _mm256_set1_pd(x); }

ELEMENT vf f32_load(const uint8_t *at) { return _mm256_loadu_ps((const float *)(const void *)at); }
ELEMENT void f32_store(uint8_t *at, vf x) { _mm256_storeu_ps((float *)(void *)at, x); }
ELEMENT vd f64_load(const uint8_t *at) { return _mm256_loadu_pd((const double *)(const void *)at); }
ELEMENT void f64_store(uint8_t *at, vd x) { _mm256_storeu_pd((double *)(void *)at, x); }

ELEMENT __m128i load128(const uint8_t *at) { return _mm_loadu_si128((const __m128i *)(const void *)at); }
ELEMENT void store128(uint8_t *at, __m128i x) { _mm_storeu_si128((__m128i *)(void *)at, x); }

ELEMENT vf f16_load(const uint8_t *at) { return _mm256_cvtph_ps(load128(at)); }
ELEMENT void f16_store(uint8_t *at, vf x) { store128(at, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }

ELEMENT vf bf16_load(const uint8_t *at) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(at)), 16));
}
ELEMENT void bf16_store(uint8_t *at, vf x) {
    const __m256i bits = _mm256_castps_si256(x), even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff)));
    const __m256i high = _mm256_srli_epi32(sum, 16);
    store128(at, _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}

/* A float64 array as float32 and back. */
ELEMENT vf f32_load_f64(const uint8_t *at) {
    return _mm256_set_m128(_mm256_cvtpd_ps(f64_load(at + 32)), _mm256_cvtpd_ps(f64_load(at)));
}
ELEMENT void f32_store_f64(uint8_t *at, vf x) {
    f64_store(at, _mm256_cvtps_pd(_mm256_castps256_ps128(x)));
    f64_store(at + 32, _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
}

ELEMENT vf f32_canonical(vf x) {
    return _mm256_blendv_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32((int)F32_NAN)), _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
ELEMENT vd f64_canonical(vd x) {
    return _mm256_blendv_pd(x, _mm256_castsi256_pd(_mm256_set1_epi64x((long long)F64_NAN)), _mm256_cmp_pd(x, x, _CMP_UNORD_Q));
}

/* MINPS returns its second operand when the two are equal (zeros of either sign) or unordered: ask both ways round. */
ELEMENT vf f32_least(vf x, vf y) {
    const vf nan = _mm256_castsi256_ps(_mm256_set1_epi32((int)F32_NAN));
    return _mm256_blendv_ps(_mm256_or_ps(_mm256_min_ps(x, y), _mm256_min_ps(y, x)), nan, _mm256_cmp_ps(x, y, _CMP_UNORD_Q));
}
ELEMENT vf f32_greatest(vf x, vf y) {
    const vf nan = _mm256_castsi256_ps(_mm256_set1_epi32((int)F32_NAN));
    return _mm256_blendv_ps(_mm256_and_ps(_mm256_max_ps(x, y), _mm256_max_ps(y, x)), nan, _mm256_cmp_ps(x, y, _CMP_UNORD_Q));
}
ELEMENT vd f64_least(vd x, vd y) {
    const vd nan = _mm256_castsi256_pd(_mm256_set1_epi64x((long long)F64_NAN));
    return _mm256_blendv_pd(_mm256_or_pd(_mm256_min_pd(x, y), _mm256_min_pd(y, x)), nan, _mm256_cmp_pd(x, y, _CMP_UNORD_Q));
}
ELEMENT vd f64_greatest(vd x, vd y) {
    const vd nan = _mm256_castsi256_pd(_mm256_set1_epi64x((long long)F64_NAN));
    return _mm256_blendv_pd(_mm256_and_pd(_mm256_max_pd(x, y), _mm256_max_pd(y, x)), nan, _mm256_cmp_pd(x, y, _CMP_UNORD_Q));
}

/* For codecs: order of numbers alone, any sign of zero, anything for NaN. */
ELEMENT vf f32_min(vf x, vf y) { return _mm256_min_ps(x, y); }
ELEMENT vf f32_max(vf x, vf y) { return _mm256_max_ps(x, y); }
/* The least and the greatest of a vector's numbers. */
ELEMENT float f32_min_of(vf x) {
    __m128 m = _mm_min_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_min_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_min_ss(m, _mm_movehdup_ps(m)));
}
ELEMENT float f32_max_of(vf x) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
/* `seen`, and NaN wherever x or y is NaN; start with zero. */
ELEMENT vf nan_seen(vf seen, vf x, vf y) { return _mm256_or_ps(seen, _mm256_cmp_ps(x, y, _CMP_UNORD_Q)); }
ELEMENT int nan_any(vf seen) { return _mm256_movemask_ps(_mm256_cmp_ps(seen, seen, _CMP_UNORD_Q)) != 0; }

/* ---- integers, for codes ---- */

ELEMENT vi i32_max(vi x, vi y) { return (vi)_mm256_max_epi32((__m256i)x, (__m256i)y); }
ELEMENT vi i32_nearest(vf x) { return (vi)_mm256_cvtps_epi32(x); } /* ties to even */
ELEMENT vf f32_from_i32(vi x) { return _mm256_cvtepi32_ps((__m256i)x); }

/* VF_WIDTH bytes as integers. */
ELEMENT vi u8_load(const uint8_t *at) { return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)at)); }
ELEMENT vi i8_load(const uint8_t *at) { return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)at)); }

/* Numbers 0..255 as bytes. */
ELEMENT __m256i bytes_of(const vi codes[CODE_GROUP]) {
    const __m256i low = _mm256_packs_epi32((__m256i)codes[0], (__m256i)codes[1]);
    const __m256i high = _mm256_packs_epi32((__m256i)codes[2], (__m256i)codes[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); /* packing works within halves */
    return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
}
ELEMENT void bytes_store(uint8_t *at, const vi codes[CODE_GROUP]) {
    _mm256_storeu_si256((__m256i *)(void *)at, bytes_of(codes));
}

/* Numbers 0..15, two in a byte, the first in the low half. */
ELEMENT void nibbles_store(uint8_t *at, const vi codes[CODE_GROUP]) {
    const __m256i pairs = _mm256_maddubs_epi16(bytes_of(codes), _mm256_set1_epi16(0x1001)); /* first + 16 * second */
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
    store128(at, _mm256_castsi256_si128(bytes));
}
ELEMENT vi nibbles_load(const uint8_t *at) { /* whatever is above the four bits */
    int32_t eight;
    memcpy(&eight, at, sizeof eight);
    return (vi)_mm256_srlv_epi32(_mm256_set1_epi32(eight), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
}
/* level[code & 7], negative where code & 8. */
ELEMENT vf levels_pick(const float level[8], vi code) {
    const vf size = _mm256_permutevar8x32_ps(_mm256_loadu_ps(level), (__m256i)code);
    return (vf)((vi)size | ((code & 8) << 28));
}

#endif
