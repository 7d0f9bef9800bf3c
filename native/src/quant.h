/* quant.h: codecs as the engine and the kernels see them: blocks of elements, each encoded by itself.
 *
 * A codec is a row of CODECS in quant.c: bytes before the codes of a block, bits of a code, and how to find what a block's
 * codes are made and read by (quant_by), once for each block. The kernels of an instruction set do what is done for each
 * element: the range of a block, and the codes themselves.  Spec: proto/wire.md 3.6 */
#ifndef PYCCL_QUANT_H
#define PYCCL_QUANT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernel.h"
#include "pyccl.h"

#define QUANT_LEVELS 8
#define QUANT_CODECS (PYCCL_CODEC_BFLOAT16 + 1)

/* Of the elements as float32. finite: neither NaN nor infinity among them, else the numbers mean nothing. */
typedef struct quant_range {
    float low, high;                 /* of zeros, either sign */
    bool finite;
} quant_range;

typedef struct quant_by { /* what the codes of one block are made and read by; a codec uses some of it */
    size_t ahead;                    /* encode: bytes from an element to one that is read soon, or 0 */
    float low;                       /* uint8 encode: half the offset; decode: the offset */
    float factor;                    /* encode: what elements are multiplied by; uint8 decode: what the sum is */
    float scale, limit;              /* decode: of a code; largest size of a result (level: already cut to it) */
    uint32_t base, least;            /* fp4 encode: bits of 0.75 * 2^-7 and of 2^-7 of the block's peak times factor */
    float level[QUANT_LEVELS];       /* fp4 decode: size of each code */
} quant_by;

/* Codes of elements that the caller knows to be in the range of the codec. A pair of fp4 codes is a byte, the first in its
 * low half; of an odd count the last high half is zero.
 *   uint8     round((x / 2 - low) * factor), ties to even              (low + code * scale) * factor, cut to limit
 *   int8      round(x * factor), ties to even                          code * scale, cut to limit
 *   fp8       E4M3 nearest to x * factor, ties to even                 code * scale, cut to limit; NaN of a NaN code
 *   fp4       b, the bits of |x * factor|: 0 where b < least,          level[code & 7], with the sign
 *             else max(1, floor((b - base) / 2^23)) and the sign
 *   bfloat16  nearest, ties to even; NaN canonical                     exactly; NaN canonical */
typedef void quant_encoder(uint8_t dtype, const void *in, size_t count, quant_by by, uint8_t *codes);
typedef void quant_decoder(uint8_t dtype, const uint8_t *codes, size_t count, quant_by by, void *out);

typedef struct quant_kernels {
    quant_range (*range)(uint8_t dtype, const void *in, size_t count);  /* count >= 1 */
    uint32_t (*peak)(uint8_t dtype, const void *in, size_t count);      /* greatest bits of an |x|: of a NaN, if there is one */
    quant_encoder *encode[QUANT_CODECS];                                /* by pyccl_codec */
    quant_decoder *decode[QUANT_CODECS];
} quant_kernels;

/* A table of them, of a file that has these functions. */
#define QUANT_KERNELS(range, peak)                                                                      \
    {                                                                                                   \
        range, peak,                                                                                    \
        {[PYCCL_CODEC_UINT8] = uint8_encode, [PYCCL_CODEC_INT8] = int8_encode,                          \
         [PYCCL_CODEC_FP8_E4M3] = e4m3_encode, [PYCCL_CODEC_FP4_E3M0] = e3m0_encode,                    \
         [PYCCL_CODEC_BFLOAT16] = bf16_encode},                                                         \
        {[PYCCL_CODEC_UINT8] = uint8_decode, [PYCCL_CODEC_INT8] = int8_decode,                          \
         [PYCCL_CODEC_FP8_E4M3] = e4m3_decode, [PYCCL_CODEC_FP4_E3M0] = e3m0_decode,                    \
         [PYCCL_CODEC_BFLOAT16] = bf16_decode}                                                          \
    }

extern const quant_kernels quant_scalar, quant_avx2, quant_avx512, quant_neon;

/* As the functions in pyccl.h; the kernel must be supported. */
pyccl_status quant_encode_with(kernel k, uint8_t codec, uint8_t dtype, uint32_t block, const void *in, size_t count, uint8_t *out);
pyccl_status quant_decode_with(kernel k, uint8_t codec, uint8_t dtype, uint32_t block, const uint8_t *in, size_t count, void *out);
pyccl_status quant_reduce_with(kernel k, uint8_t codec, uint8_t op, uint32_t block, const uint8_t *const *in,
                               const double *weights, size_t inputs, size_t count, float *out);

#endif
