/* quant.h: codecs as the engine and the kernels see them: blocks of elements, each encoded by itself.
 *
 * A codec is a row of CODECS in quant.c: bytes before the codes of a block, bits of a code, and how to encode and decode
 * one block with the kernels of an instruction set. The kernels are the parts that many codecs share: the range of a
 * block, and affine codes of eight bits.                    Spec: proto/wire.md 3.6 */
#ifndef PYCCL_QUANT_H
#define PYCCL_QUANT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernel.h"
#include "pyccl.h"

/* Of the elements as float32. finite: neither NaN nor infinity among them, else the numbers mean nothing. */
typedef struct quant_range {
    float low, high;                 /* of zeros, either sign */
    bool finite;
} quant_range;

typedef struct quant_affine {
    float low, scale, factor, limit;
} quant_affine;

typedef struct quant_kernels {
    quant_range (*range)(uint8_t dtype, const void *in, size_t count); /* count >= 1 */
    /* codes[i] = round((in[i] / 2 - half_low) * inverse), ties to even; the caller knows that it lies in 0..255 */
    void (*affine_encode)(uint8_t dtype, const void *in, size_t count, float half_low, float inverse, uint8_t *codes);
    /* out[i] = (low + codes[i] * scale) * factor, cut to [-limit, limit], rounded to dtype */
    void (*affine_decode)(uint8_t dtype, const uint8_t *codes, size_t count, quant_affine by, void *out);
} quant_kernels;

extern const quant_kernels quant_scalar, quant_avx2, quant_avx512, quant_neon;

/* As the functions in pyccl.h; the kernel must be supported. */
pyccl_status quant_encode_with(kernel k, uint8_t codec, uint8_t dtype, uint32_t block, const void *in, size_t count, uint8_t *out);
pyccl_status quant_decode_with(kernel k, uint8_t codec, uint8_t dtype, uint32_t block, const uint8_t *in, size_t count, void *out);
pyccl_status quant_reduce_with(kernel k, uint8_t codec, uint8_t op, uint32_t block, const uint8_t *const *in,
                               const double *weights, size_t inputs, size_t count, float *out);

#endif
