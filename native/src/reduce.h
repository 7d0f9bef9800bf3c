/* reduce.h: folds in steps, the kernels by name (for tests), and what reduce_scalar.c, reduce_avx2.c etc. provide. */
#ifndef PYCCL_REDUCE_H
#define PYCCL_REDUCE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kernel.h"
#include "pyccl.h"

enum { /* ops of a step, beyond those of pyccl_reduce_op */
    REDUCE_WEIGHTED_SUM = 6,         /* a * weight_a + b * weight_b: an average that is not finished */
    REDUCE_ONE = 7                   /* a * weight_a / divisor: a fold of one input; b is not read */
};

/* out[i] = a[i] . b[i]. AVG is (a * weight_a + b * weight_b) / divisor. Floats only: weights and divisor, 1 where nothing
 * is weighted (exact). float16 and bfloat16: a and out may be float32 arrays, the partial result of a longer fold. */
typedef struct reduce_step {
    const void *a, *b;
    void *out;                       /* may be a or b */
    size_t count;
    uint8_t dtype, op;
    bool a_wide, out_wide;
    double weight_a, weight_b, divisor; /* rounded to the accumulation type by the kernel */
} reduce_step;

typedef void reduce_function(const reduce_step *step);
reduce_function reduce_scalar, reduce_avx2, reduce_avx512, reduce_neon;

typedef struct reduce_fold { /* a fold whose arguments have been judged */
    size_t inputs;
    const double *weights;           /* NULL: all 1 */
    double divisor;
    uint8_t dtype, op;
    reduce_function *run;
} reduce_fold;

/* ERR_ARGUMENT as pyccl_reduce. The steps are those of inputs 1 .. inputs-1 (one input: of 0 alone, b is not read). */
pyccl_status reduce_fold_init(reduce_fold *fold, kernel k, uint8_t dtype, uint8_t op, const double *weights, size_t inputs);
/* a: input 0 where input <= 1, else what the step before wrote. The last step writes elements, others partial results. */
void reduce_fold_step(const reduce_fold *fold, size_t input, const void *a, const void *b, void *out, size_t count);

/* As pyccl_reduce; the kernel must be supported. */
pyccl_status reduce_with(kernel k, uint8_t dtype, uint8_t op, const void *const *in, const double *weights, size_t inputs,
                         size_t count, void *out);

#endif
