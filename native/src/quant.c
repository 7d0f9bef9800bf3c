/* quant.c: codecs: arrays of floats <-> blocks of small codes, each block with what it takes to decode it.
 *
 *                block 0                          block 1                               last block: as many codes as are left
 *      uint8     | low f32 | scale f32 | code ... | low f32 | scale f32 | code ... | ... |
 *      others    | scale f32 | code ...           | scale f32 | code ... | ...            (bfloat16: codes alone)
 *
 * Encoding reads a block twice while it is in L1: its range, then its codes. Everything is computed in float32 by single
 * IEEE operations, but for what is done once for a block. What keeps the arithmetic free of traps:
 *   - a scale has 16 significant bits: code * scale is exact, so decoding rounds at most once and an FMA could not change it;
 *   - uint8: differences are taken between halves: they can't overflow, and 2^-125 as the least scale keeps inverses finite;
 *     blocks that span more than the largest float32 are decoded in halves, too;
 *   - int8, fp8: the scale is cut, not rounded, to these bits: the decoded peak is not above the peak, and encoding it
 *     again finds the same scale;
 *   - fp4: sizes are compared with the boundaries between levels as bits, exactly: no quotient is rounded.
 * Invariants: the codes of finite elements decode to finite elements, uint8's code 0 to the block's least (bfloat16 rounds
 * like any float); a block with anything else in it decodes to NaN throughout (bfloat16: those elements stay what they
 * were); any bytes at all decode to something, the same on every CPU.
 * Knows no operation, frame or piece. Threads: nothing shared.              Spec: proto/wire.md 3.6 */
#include "quant.h"

#include <float.h>
#include <string.h>

#include "element.h"
#include "float_mode.h"
#include "reduce.h"
#include "status.h"

#define SCALE_LEAST 0x1p-125f /* code * scale is exact down to here, also of the least fp8 */
#define SCALE_WIDE 0x1p120f /* 255 of these are still a float32; beyond, a block spans more than that */
#define SCALE_SPARE_BITS 0xffu /* of its mantissa, zero: 24 - 16 */
#define FETCH_AHEAD 16384 /* bytes, at least: what is in L1 until it is read */
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

/* ---- heads of blocks: NaN marks a block of NaN ---- */

#define AFFINE_HEAD 8
#define SCALE_HEAD 4

static void head_put(uint8_t *out, float x) {
    const uint32_t bits = f32_bits(x); /* hosts are little-endian: digest.c */
    memcpy(out, &bits, sizeof bits);
}

static float head_get(const uint8_t *in) {
    uint32_t bits;
    memcpy(&bits, in, sizeof bits);
    return f32_of(bits);
}

/* Finite and not negative, nor -0. */
static bool scale_legal(float scale) { return f32_bits(scale) <= FINITE_MOST; }
static bool scale_legal_short(float scale) { return scale_legal(scale) && (f32_bits(scale) & SCALE_SPARE_BITS) == 0; }

/* ---- codec uint8: affine ---- */

static float affine_scale(quant_range range) {
    const uint32_t bits = f32_bits((float)(((double)range.high - (double)range.low) / 255.0));
    const float scale = f32_of((bits + 0x7f + (bits >> 8 & 1)) & ~SCALE_SPARE_BITS);
    return scale < SCALE_LEAST ? SCALE_LEAST : scale;
}

static bool affine_measure(const quant_kernels *kernels, uint8_t dtype, const void *in, size_t count, uint8_t *head, quant_by *by) {
    const quant_range range = kernels->range(dtype, in, count);
    const float nan = f32_of(F32_NAN), low = range.low + 0.0f; /* -0 becomes +0 */
    const bool flat = range.low == range.high;
    const float scale = flat ? 0 : affine_scale(range);
    head_put(head, range.finite ? low : nan);
    head_put(head + SCALE_HEAD, range.finite ? scale : nan);
    if (!range.finite || flat) return false;
    *by = (quant_by){.low = low * 0.5f, .factor = 1.0f / (scale * 0.5f)};
    return true;
}

static bool affine_read_untrusted(const uint8_t *head, float limit, quant_by *by) {
    const float low = head_get(head), scale = head_get(head + SCALE_HEAD);
    if ((f32_bits(low) & 0x7fffffff) > FINITE_MOST || !scale_legal_short(scale)) return false;
    const bool wide = scale > SCALE_WIDE;
    *by = (quant_by){.low = wide ? low * 0.5f : low, .scale = wide ? scale * 0.5f : scale, .factor = wide ? 2 : 1, .limit = limit};
    return true;
}

/* ---- codecs with a scale alone: int8, fp8, fp4 ---- */

/* Of a block with this peak: its largest code stands for peak / scale, which is `most` and less than 2^-15 of it more.
 * 0 where all codes are: for zeros, and for what the least scale leaves none of. */
static float scale_of(uint32_t peak, float most, float nothing) {
    if (peak > FINITE_MOST) return f32_of(F32_NAN);
    if (f32_of(peak) <= nothing) return 0;
    const float scale = f32_of(f32_bits(f32_of(peak) / most) & ~SCALE_SPARE_BITS);
    return scale < SCALE_LEAST ? SCALE_LEAST : scale;
}

static bool scaled_measure(const quant_kernels *kernels, uint8_t dtype, const void *in, size_t count, uint8_t *head, quant_by *by,
                           float most, float nothing) {
    const float scale = scale_of(kernels->peak(dtype, in, count), most, nothing);
    head_put(head, scale);
    *by = (quant_by){.factor = 1.0f / scale};
    return scale > 0;
}

static bool int8_measure(const quant_kernels *kernels, uint8_t dtype, const void *in, size_t count, uint8_t *head, quant_by *by) {
    return scaled_measure(kernels, dtype, in, count, head, by, 127, SCALE_LEAST * 0x1p-1f);
}

static bool e4m3_measure(const quant_kernels *kernels, uint8_t dtype, const void *in, size_t count, uint8_t *head, quant_by *by) {
    return scaled_measure(kernels, dtype, in, count, head, by, 448, SCALE_LEAST * 0x1p-10f);
}

static bool scaled_read_untrusted(const uint8_t *head, float limit, quant_by *by) {
    *by = (quant_by){.scale = head_get(head), .limit = limit};
    return scale_legal_short(by->scale);
}

/* The least float32 that is not below x. */
static uint32_t bits_above(double x) {
    const float near = (float)x;
    return f32_bits(near) + ((double)near < x);
}

/* Levels are powers of two of the peak. Where boundaries would be denormal, all is compared times 2^64. */
static bool e3m0_measure(const quant_kernels *kernels, uint8_t dtype, const void *in, size_t count, uint8_t *head, quant_by *by) {
    const uint32_t bits = kernels->peak(dtype, in, count);
    const float peak = f32_of(bits > FINITE_MOST ? F32_NAN : bits);
    head_put(head, peak);
    *by = (quant_by){.factor = peak < 0x1p-64f ? 0x1p64f : 1.0f};
    by->base = bits_above((double)(peak * by->factor) * (0.75 * 0x1p-7));
    by->least = f32_bits(peak * by->factor * 0x1p-7f);
    return peak > 0;
}

static bool e3m0_read_untrusted(const uint8_t *head, float limit, quant_by *by) {
    const float scale = head_get(head);
    *by = (quant_by){0};
    for (int e = 1; e < QUANT_LEVELS; e++) {
        const float size = scale * f32_of((uint32_t)(e - 7 + 127) << 23);
        by->level[e] = size > limit ? limit : size;
    }
    return scale_legal(scale);
}

/* ---- codec bfloat16: each element by itself ---- */

static bool bf16_measure(const quant_kernels *kernels, uint8_t dtype, const void *in, size_t count, uint8_t *head, quant_by *by) {
    (void)kernels, (void)dtype, (void)in, (void)count, (void)head;
    *by = (quant_by){0};
    return true;
}

static bool bf16_read(const uint8_t *head, float limit, quant_by *by) {
    (void)head, (void)limit;
    *by = (quant_by){0};
    return true;
}

/* ---- codecs ---- */

typedef struct codec {
    uint8_t head_bytes, code_bits;   /* code_bits 0: no such codec */
    /* Writes the head of a block and finds what its codes are made by; false: every code is 0. */
    bool (*measure)(const quant_kernels *kernels, uint8_t dtype, const void *in, size_t count, uint8_t *head, quant_by *by);
    /* What codes are read by; false: the block is one of NaN. Any bytes. limit: of the dtype that is decoded to. */
    bool (*read)(const uint8_t *head, float limit, quant_by *by);
} codec;

static const codec CODECS[QUANT_CODECS] = {
    [PYCCL_CODEC_UINT8] = {AFFINE_HEAD, 8, affine_measure, affine_read_untrusted},
    [PYCCL_CODEC_INT8] = {SCALE_HEAD, 8, int8_measure, scaled_read_untrusted},
    [PYCCL_CODEC_FP8_E4M3] = {SCALE_HEAD, 8, e4m3_measure, scaled_read_untrusted},
    [PYCCL_CODEC_FP4_E3M0] = {SCALE_HEAD, 4, e3m0_measure, e3m0_read_untrusted},
    [PYCCL_CODEC_BFLOAT16] = {0, 16, bf16_measure, bf16_read},
};

static bool codec_known(uint8_t number) { return number < QUANT_CODECS && CODECS[number].code_bits > 0; }

static size_t code_bytes(uint8_t number, size_t elements) { return (elements * CODECS[number].code_bits + 7) / 8; }

static size_t block_bytes(uint8_t number, size_t elements) { return CODECS[number].head_bytes + code_bytes(number, elements); }

/* ahead: bytes to elements that are fetched meanwhile: who measures them would wait for memory and compute nothing. */
static void encode_block(const quant_kernels *kernels, uint8_t number, uint8_t dtype, const void *in, size_t count, size_t ahead,
                         uint8_t *block) {
    const codec *c = &CODECS[number];
    uint8_t *codes = block + c->head_bytes;
    quant_by by;
    if (c->measure(kernels, dtype, in, count, block, &by)) {
        by.ahead = ahead;
        kernels->encode[number](dtype, in, count, by, codes);
    } else {
        memset(codes, 0, code_bytes(number, count));
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

/* Elements first .. first+count-1 of a block; first is even. Any bytes. */
static void decode_part(const quant_kernels *kernels, uint8_t number, uint8_t dtype, const uint8_t *block, size_t first, size_t count,
                        void *out) {
    const codec *c = &CODECS[number];
    quant_by by;
    if (c->read(block, limit_of(dtype), &by)) {
        kernels->decode[number](dtype, block + c->head_bytes + code_bytes(number, first), count, by, out);
    } else {
        fill_nan(dtype, count, out);
    }
}

size_t pyccl_codec_size(uint8_t number, uint32_t block, size_t count) {
    if (!codec_known(number) || block == 0 || count > SIZE_MAX / 32) return 0;
    const size_t rest = count % block;
    return count / block * block_bytes(number, block) + (rest > 0 ? block_bytes(number, rest) : 0);
}

pyccl_status quant_encode_with(kernel k, uint8_t number, uint8_t dtype, uint32_t block, const void *in, size_t count, uint8_t *out) {
    if (!codec_known(number) || limit_of(dtype) == 0 || block == 0) return PYCCL_ERR_ARGUMENT;
    const quant_kernels *kernels = kernels_of(k);
    const uint8_t *at = in;
    const float_mode before = float_mode_enter();
    while (count > 0) {
        const size_t part = count < block ? count : block;
        const size_t bytes = part * pyccl_dtype_size(dtype), ahead = bytes < FETCH_AHEAD ? FETCH_AHEAD : bytes;
        encode_block(kernels, number, dtype, at, part, ahead <= (count - part) * pyccl_dtype_size(dtype) ? ahead : 0, out);
        at += bytes;
        out += block_bytes(number, part);
        count -= part;
    }
    float_mode_leave(before);
    return PYCCL_OK;
}

pyccl_status quant_decode_with(kernel k, uint8_t number, uint8_t dtype, uint32_t block, const uint8_t *in, size_t count, void *out) {
    if (!codec_known(number) || limit_of(dtype) == 0 || block == 0) return PYCCL_ERR_ARGUMENT;
    const quant_kernels *kernels = kernels_of(k);
    uint8_t *at = out;
    const float_mode before = float_mode_enter();
    while (count > 0) {
        const size_t part = count < block ? count : block;
        decode_part(kernels, number, dtype, in, 0, part, at);
        at += part * pyccl_dtype_size(dtype);
        in += block_bytes(number, part);
        count -= part;
    }
    float_mode_leave(before);
    return PYCCL_OK;
}

/* ---- folds of encoded arrays ---- */

#define TILE 2048 /* elements, even: two tiles of float32 and the codes of one stay in L1 */

typedef struct coded_fold {
    uint8_t number;
    const quant_kernels *kernels;
    reduce_fold fold;
    const uint8_t *const *in;
} coded_fold;

/* Elements first .. first+count-1 of the block that begins at `offset` of every input. */
static void fold_tile(const coded_fold *f, size_t offset, size_t first, size_t count, float *out) {
    _Alignas(64) float partial[TILE], next[TILE];
    PYCCL_ASSERT(count <= TILE);
    decode_part(f->kernels, f->number, PYCCL_FLOAT32, f->in[0] + offset, first, count, partial);
    for (size_t i = f->fold.inputs == 1 ? 0 : 1; i < f->fold.inputs; i++) {
        const bool last = i + 1 == f->fold.inputs;
        if (i > 0) decode_part(f->kernels, f->number, PYCCL_FLOAT32, f->in[i] + offset, first, count, next);
        reduce_fold_step(&f->fold, i, partial, i > 0 ? next : partial, last ? out : partial, count);
    }
}

pyccl_status quant_reduce_with(kernel k, uint8_t number, uint8_t op, uint32_t block, const uint8_t *const *in,
                               const double *weights, size_t inputs, size_t count, float *out) {
    coded_fold f = {.number = number, .kernels = kernels_of(k), .in = in};
    if (!codec_known(number) || block == 0) return PYCCL_ERR_ARGUMENT;
    const float_mode before = float_mode_enter();
    const pyccl_status rc = reduce_fold_init(&f.fold, k, PYCCL_FLOAT32, op, weights, inputs);
    for (size_t done = 0, offset = 0; rc == PYCCL_OK && done < count;) {
        const size_t elements = count - done < block ? count - done : block;
        for (size_t first = 0; first < elements; first += TILE)
            fold_tile(&f, offset, first, elements - first < TILE ? elements - first : TILE, out + done + first);
        done += elements;
        offset += block_bytes(number, elements);
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
