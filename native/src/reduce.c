/* reduce.c: folds the members' arrays element by element, in the order given.
 *
 * Invariant: the bytes of the result are a function of the inputs' bytes, their order, the op and the weights alone, not
 * of the CPU, of the thread's floating-point mode or of how the compiler vectorises: each element is a chain of single
 * IEEE operations (-ffp-contract=off, no reassociation), a NaN becomes one fixed pattern, -0 orders below +0, integers
 * wrap. float16 and bfloat16 are widened, folded in float32 and rounded once at the end.
 *
 *      in[0] |---- block 0 ----|---- block 1 ----| ...     per block:  part = in[0] . in[1]
 *      in[1] |-----------------|-----------------| ...                 part = part . in[2]      (stays in L1)
 *       ...                                                            ...
 *      in[n-1] ----------------|-----------------| ...                 out  = part . in[n-1]    (AVG: / total weight)
 *
 * `out` is written in the last step of a block, which reads each element before it writes it, and every earlier input of
 * the block has been read by then: `out` may be any one of the inputs.
 * The steps themselves: reduce_scalar.c (the reference), reduce_simd.h (the same for vectors).
 * Threads: nothing shared.                                  Rules: design.md 4.2, proto/wire.md 3.7 */
#include "reduce.h"

#include <math.h>
#include <string.h>

#include "float_mode.h"
#include "status.h"

#define BLOCK_BYTES 16384 /* of a partial result: half an L1 cache, so that the inputs' lines fit beside it */

size_t pyccl_dtype_size(uint8_t dtype) {
    static const uint8_t SIZES[] = {[PYCCL_INT32] = 4, [PYCCL_INT64] = 8,   [PYCCL_FLOAT32] = 4, [PYCCL_FLOAT64] = 8,
                                    [PYCCL_UINT8] = 1, [PYCCL_INT8] = 1,    [PYCCL_UINT16] = 2,  [PYCCL_INT16] = 2,
                                    [PYCCL_UINT32] = 4, [PYCCL_UINT64] = 8, [PYCCL_FLOAT16] = 2, [PYCCL_BFLOAT16] = 2};
    return dtype < sizeof SIZES ? SIZES[dtype] : 0;
}

static bool is_half(uint8_t dtype) { return dtype == PYCCL_FLOAT16 || dtype == PYCCL_BFLOAT16; }
static bool is_float(uint8_t dtype) { return dtype == PYCCL_FLOAT32 || dtype == PYCCL_FLOAT64 || is_half(dtype); }

static reduce_function *function_of(kernel k) {
    PYCCL_ASSERT(kernel_supported(k));
#if defined(__x86_64__)
    if (k == KERNEL_AVX2) return reduce_avx2;
    if (k == KERNEL_AVX512) return reduce_avx512;
#elif defined(__aarch64__)
    if (k == KERNEL_NEON) return reduce_neon;
#endif
    return reduce_scalar;
}

/* As the accumulation type sees it: float64, or float32 for all smaller floats. */
static double accumulated(uint8_t dtype, double x) { return dtype == PYCCL_FLOAT64 ? x : (double)(float)x; }

/* False unless weights and their sum are numbers one can average by. */
static bool weights_sum(uint8_t dtype, const double *weights, size_t inputs, double *total) {
    *total = 0;
    for (size_t i = 0; i < inputs; i++) {
        const double weight = accumulated(dtype, weights[i]);
        if (!(weight >= 0 && isfinite(weight))) return false;
        *total += weights[i];
    }
    *total = accumulated(dtype, *total);
    return *total > 0 && isfinite(*total);
}

pyccl_status reduce_fold_init(reduce_fold *fold, kernel k, uint8_t dtype, uint8_t op, const double *weights, size_t inputs) {
    const bool average = op == PYCCL_AVG && is_float(dtype);
    if (pyccl_dtype_size(dtype) == 0 || op < PYCCL_SUM || op > PYCCL_MAX || inputs == 0) return PYCCL_ERR_ARGUMENT;
    if ((op == PYCCL_AVG || weights != NULL) && !average) return PYCCL_ERR_ARGUMENT;
    *fold = (reduce_fold){inputs, weights, average ? (double)inputs : 1.0, dtype, op, function_of(k)};
    if (weights != NULL && !weights_sum(dtype, weights, inputs, &fold->divisor)) return PYCCL_ERR_ARGUMENT;
    return PYCCL_OK;
}

static uint8_t op_of_step(const reduce_fold *fold, bool last) {
    if (fold->inputs == 1) return REDUCE_ONE;
    return fold->op == PYCCL_AVG && !last ? REDUCE_WEIGHTED_SUM : fold->op;
}

void reduce_fold_step(const reduce_fold *fold, size_t input, const void *a, const void *b, void *out, size_t count) {
    const bool last = input + 1 == fold->inputs, half = is_half(fold->dtype);
    const reduce_step step = {
        .a = a,
        .b = b,
        .out = out,
        .count = count,
        .dtype = fold->dtype,
        .op = op_of_step(fold, last),
        .a_wide = half && input > 1,
        .out_wide = half && !last,
        .weight_a = fold->weights != NULL && input <= 1 ? fold->weights[0] : 1.0, /* a partial sum is weighted already */
        .weight_b = fold->weights != NULL ? fold->weights[input] : 1.0,
        .divisor = last ? fold->divisor : 1.0,
    };
    fold->run(&step);
}

static void fold_block(const reduce_fold *fold, const void *const *in, size_t offset, size_t count, void *out) {
    _Alignas(64) uint8_t partial[BLOCK_BYTES];
    const void *a = (const uint8_t *)in[0] + offset;
    for (size_t i = fold->inputs == 1 ? 0 : 1; i < fold->inputs; i++) {
        const bool last = i + 1 == fold->inputs;
        reduce_fold_step(fold, i, a, (const uint8_t *)in[i] + offset, last ? (uint8_t *)out + offset : partial, count);
        a = partial;
    }
}

pyccl_status reduce_with(kernel k, uint8_t dtype, uint8_t op, const void *const *in, const double *weights, size_t inputs,
                         size_t count, void *out) {
    reduce_fold fold;
    const float_mode before = float_mode_enter();
    const pyccl_status rc = reduce_fold_init(&fold, k, dtype, op, weights, inputs);
    const size_t bytes = pyccl_dtype_size(dtype), partial_bytes = is_half(dtype) ? sizeof(float) : bytes;
    const size_t block = inputs <= 2 ? SIZE_MAX : BLOCK_BYTES / partial_bytes; /* two inputs need no partial result */
    for (size_t first = 0; rc == PYCCL_OK && first < count;) {
        const size_t part = count - first < block ? count - first : block;
        fold_block(&fold, in, first * bytes, part, out);
        first += part;
    }
    float_mode_leave(before);
    return rc;
}

pyccl_status pyccl_reduce(uint8_t dtype, uint8_t op, const void *const *in, const double *weights, size_t inputs,
                          size_t count, void *out) {
    return reduce_with(kernel_current(), dtype, op, in, weights, inputs, count, out);
}
