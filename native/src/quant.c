/* quant.c: codecs: arrays of floats <-> blocks of small codes, each block with what it takes to decode it.
 *
 *      block 0                          block 1                               last block: as many codes as are left
 *      | low f32 | scale f32 | code ... | low f32 | scale f32 | code ... | ... |
 *
 * Encoding reads a block twice while it is in L1: its range, then its codes. Everything is computed in float32 by single
 * IEEE operations, but for the scale of a block. Two choices keep the arithmetic free of traps:
 *   - a scale has 16 significant bits: code * scale is exact, so decoding rounds once and an FMA could not change it;
 *   - differences are taken between halves: they can't overflow, and 2^-125 as the least scale keeps inverses finite;
 *     blocks that span more than the largest float32 are decoded in halves, too.
 * Invariants: the codes of finite elements decode to finite elements, code 0 to the block's least; a block with anything
 * else in it decodes to NaN throughout; any bytes at all decode to something, the same on every CPU.
 * Knows no operation, frame or piece. Threads: nothing shared.              Spec: proto/wire.md 3.6 */
#include "quant.h"

#include <float.h>
#include <string.h>

#include "element.h"
#include "float_mode.h"
#include "reduce.h"
#include "status.h"

#define SCALE_LEAST 0x1p-125f
#define SCALE_WIDE 0x1p120f /* 255 of these are still a float32; beyond, a block spans more than that */
#define SCALE_SPARE_BITS 0xffu /* of its mantissa, zero: 24 - 16 */
#define FINITE_MOST UINT32_C(0x7f7fffff)

static const quant_kernels *kernels_of(kernel k) {
    PYCCL_ASSERT(kernel_supported(k));
#if defined(__x86_64__)
    if (k == KERNEL_AVX2) return &quant_avx2;
    if (k == KERNEL_AVX512) return &quant_avx512;
#elif defined(__aarch64__)
    if (k == KERNEL_NEON) return &quant_neon;
#endif
    return &quant_scalar;
}

/* The largest finite number of a dtype, as float32 sees it; 0 for what no codec takes. */
static float limit_of(uint8_t dtype) {
    switch (dtype) {
    case PYCCL_FLOAT16: return 65504.0f;
    case PYCCL_BFLOAT16: return 0x1.fep127f;
    case PYCCL_FLOAT32:
    case PYCCL_FLOAT64: return FLT_MAX;
    default: return 0;
    }
}

/* ---- codec uint8: affine ---- */

#define AFFINE_HEAD 8

typedef struct affine {
    float low, scale;
} affine;

static affine affine_of(quant_range range) {
    const float nan = f32_of(F32_NAN);
    if (!range.finite) return (affine){nan, nan};
    const float low = range.low + 0.0f; /* -0 becomes +0 */
    if (range.low == range.high) return (affine){low, 0};
    const uint32_t bits = f32_bits((float)(((double)range.high - (double)range.low) / 255.0));
    const float scale = f32_of((bits + 0x7f + (bits >> 8 & 1)) & ~SCALE_SPARE_BITS);
    return (affine){low, scale < SCALE_LEAST ? SCALE_LEAST : scale};
}

static void affine_put(uint8_t *out, affine a) {
    const uint32_t bits[2] = {f32_bits(a.low), f32_bits(a.scale)}; /* hosts are little-endian: digest.c */
    memcpy(out, bits, sizeof bits);
}

/* False for a head that marks a block of NaN, or that no encoder writes. */
static bool affine_get_untrusted(const uint8_t *in, affine *out) {
    uint32_t bits[2];
    memcpy(bits, in, sizeof bits);
    *out = (affine){f32_of(bits[0]), f32_of(bits[1])};
    return (bits[0] & 0x7fffffff) <= FINITE_MOST && bits[1] <= FINITE_MOST && (bits[1] & SCALE_SPARE_BITS) == 0;
}

static void affine_encode_block(const quant_kernels *kernels, uint8_t dtype, const void *in, size_t count, uint8_t *out) {
    const quant_range range = kernels->range(dtype, in, count);
    const affine a = affine_of(range);
    affine_put(out, a);
    if (!range.finite || a.scale == 0) {
        memset(out + AFFINE_HEAD, 0, count);
    } else {
        kernels->affine_encode(dtype, in, count, a.low * 0.5f, 1.0f / (a.scale * 0.5f), out + AFFINE_HEAD);
    }
}

static void fill_nan(uint8_t dtype, size_t count, void *out) {
    const uint16_t f16 = F16_NAN, bf16 = BF16_NAN;
    const uint32_t single = F32_NAN;
    const uint64_t wide = F64_NAN;
    const void *nan = dtype == PYCCL_FLOAT16    ? (const void *)&f16
                      : dtype == PYCCL_BFLOAT16 ? (const void *)&bf16
                      : dtype == PYCCL_FLOAT32  ? (const void *)&single
                                                : (const void *)&wide;
    const size_t bytes = pyccl_dtype_size(dtype);
    for (size_t i = 0; i < count; i++) memcpy((uint8_t *)out + i * bytes, nan, bytes);
}

static void affine_decode_part(const quant_kernels *kernels, uint8_t dtype, const uint8_t *block, size_t first, size_t count,
                               void *out) {
    affine a;
    if (affine_get_untrusted(block, &a)) {
        quant_affine by = {a.low, a.scale, 1, limit_of(dtype)};
        if (a.scale > SCALE_WIDE) by = (quant_affine){a.low * 0.5f, a.scale * 0.5f, 2, limit_of(dtype)};
        kernels->affine_decode(dtype, block + AFFINE_HEAD + first, count, by, out);
    } else {
        fill_nan(dtype, count, out);
    }
}

/* ---- codecs ---- */

typedef struct codec {
    uint8_t head_bytes, code_bits;   /* code_bits 0: no such codec */
    void (*encode)(const quant_kernels *kernels, uint8_t dtype, const void *in, size_t count, uint8_t *block);
    /* elements first .. first+count-1 of a block; any bytes */
    void (*decode)(const quant_kernels *kernels, uint8_t dtype, const uint8_t *block, size_t first, size_t count, void *out);
} codec;

static const codec CODECS[] = {
    [PYCCL_CODEC_NONE] = {0},
    [PYCCL_CODEC_UINT8] = {AFFINE_HEAD, 8, affine_encode_block, affine_decode_part},
};

static const codec *codec_of(uint8_t number) {
    return number < sizeof CODECS / sizeof *CODECS && CODECS[number].code_bits > 0 ? &CODECS[number] : NULL;
}

static size_t block_bytes(const codec *c, size_t elements) { return c->head_bytes + (elements * c->code_bits + 7) / 8; }

size_t pyccl_codec_size(uint8_t number, uint32_t block, size_t count) {
    const codec *c = codec_of(number);
    if (c == NULL || block == 0 || count > SIZE_MAX / 32) return 0;
    const size_t rest = count % block;
    return count / block * block_bytes(c, block) + (rest > 0 ? block_bytes(c, rest) : 0);
}

pyccl_status quant_encode_with(kernel k, uint8_t number, uint8_t dtype, uint32_t block, const void *in, size_t count, uint8_t *out) {
    const codec *c = codec_of(number);
    if (c == NULL || limit_of(dtype) == 0 || block == 0) return PYCCL_ERR_ARGUMENT;
    const quant_kernels *kernels = kernels_of(k);
    const uint8_t *at = in;
    const float_mode before = float_mode_enter();
    while (count > 0) {
        const size_t part = count < block ? count : block;
        c->encode(kernels, dtype, at, part, out);
        at += part * pyccl_dtype_size(dtype);
        out += block_bytes(c, part);
        count -= part;
    }
    float_mode_leave(before);
    return PYCCL_OK;
}

pyccl_status quant_decode_with(kernel k, uint8_t number, uint8_t dtype, uint32_t block, const uint8_t *in, size_t count, void *out) {
    const codec *c = codec_of(number);
    if (c == NULL || limit_of(dtype) == 0 || block == 0) return PYCCL_ERR_ARGUMENT;
    const quant_kernels *kernels = kernels_of(k);
    uint8_t *at = out;
    const float_mode before = float_mode_enter();
    while (count > 0) {
        const size_t part = count < block ? count : block;
        c->decode(kernels, dtype, in, 0, part, at);
        at += part * pyccl_dtype_size(dtype);
        in += block_bytes(c, part);
        count -= part;
    }
    float_mode_leave(before);
    return PYCCL_OK;
}

/* ---- folds of encoded arrays ---- */

#define TILE 2048 /* elements: two tiles of float32 and the codes of one stay in L1 */

typedef struct coded_fold {
    const codec *codec;
    const quant_kernels *kernels;
    reduce_fold fold;
    const uint8_t *const *in;
} coded_fold;

/* Elements first .. first+count-1 of the block that begins at `offset` of every input. */
static void fold_tile(const coded_fold *f, size_t offset, size_t first, size_t count, float *out) {
    _Alignas(64) float partial[TILE], next[TILE];
    PYCCL_ASSERT(count <= TILE);
    f->codec->decode(f->kernels, PYCCL_FLOAT32, f->in[0] + offset, first, count, partial);
    for (size_t i = f->fold.inputs == 1 ? 0 : 1; i < f->fold.inputs; i++) {
        const bool last = i + 1 == f->fold.inputs;
        if (i > 0) f->codec->decode(f->kernels, PYCCL_FLOAT32, f->in[i] + offset, first, count, next);
        reduce_fold_step(&f->fold, i, partial, i > 0 ? next : partial, last ? out : partial, count);
    }
}

pyccl_status quant_reduce_with(kernel k, uint8_t number, uint8_t op, uint32_t block, const uint8_t *const *in,
                               const double *weights, size_t inputs, size_t count, float *out) {
    coded_fold f = {.codec = codec_of(number), .kernels = kernels_of(k), .in = in};
    if (f.codec == NULL || block == 0) return PYCCL_ERR_ARGUMENT;
    const float_mode before = float_mode_enter();
    const pyccl_status rc = reduce_fold_init(&f.fold, k, PYCCL_FLOAT32, op, weights, inputs);
    for (size_t done = 0, offset = 0; rc == PYCCL_OK && done < count;) {
        const size_t elements = count - done < block ? count - done : block;
        for (size_t first = 0; first < elements; first += TILE)
            fold_tile(&f, offset, first, elements - first < TILE ? elements - first : TILE, out + done + first);
        done += elements;
        offset += block_bytes(f.codec, elements);
    }
    float_mode_leave(before);
    return rc;
}

pyccl_status pyccl_codec_encode(uint8_t codec_number, uint8_t dtype, uint32_t block, const void *in, size_t count, uint8_t *out) {
    return quant_encode_with(kernel_current(), codec_number, dtype, block, in, count, out);
}

pyccl_status pyccl_codec_decode(uint8_t codec_number, uint8_t dtype, uint32_t block, const uint8_t *in, size_t count, void *out) {
    return quant_decode_with(kernel_current(), codec_number, dtype, block, in, count, out);
}

pyccl_status pyccl_codec_reduce(uint8_t codec_number, uint8_t op, uint32_t block, const uint8_t *const *in, const double *weights,
                                size_t inputs, size_t count, float *out) {
    return quant_reduce_with(kernel_current(), codec_number, op, block, in, weights, inputs, count, out);
}
