/* guard.h: what a guard looks at: the greatest magnitude of an array of floats, and the sum of its squares.
 *
 * Magnitudes of IEEE floats are ordered as their bits are, infinity above all numbers and NaN above that: one maximum of
 * integers tells whether all is finite and how large it is. Squares are summed in float64 in GUARD_LANES sums, element i
 * in sum i % GUARD_LANES, which are then added pairwise: the same additions, and so the same bits, on every CPU.
 * Threads: nothing shared.                                         Spec: proto/wire.md 3.8 */
#ifndef PYCCL_GUARD_H
#define PYCCL_GUARD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernel.h"

#define GUARD_LANES 16

typedef struct guard_kernel {        /* of one instruction set; dtype: one of the floats */
    uint64_t (*peak)(uint8_t dtype, const void *x, size_t count);  /* the bits of the greatest |x|; 0 of none */
    void (*squares)(uint8_t dtype, const void *x, size_t count, double sums[GUARD_LANES]); /* added to the sums; x is finite */
} guard_kernel;
extern const guard_kernel guard_scalar, guard_avx2, guard_avx512;

/* The greatest |x|, NaN where there is a NaN; an element counts as float64, which holds them all. */
double guard_peak(kernel k, uint8_t dtype, const void *x, size_t count);
double guard_squares(kernel k, uint8_t dtype, const void *x, size_t count); /* of finite numbers */

#endif
