/* reduce.h: the reduce kernels by name, so that tests can call each of them. */
#ifndef PYCCL_REDUCE_H
#define PYCCL_REDUCE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "pyccl.h"

typedef enum reduce_kernel { REDUCE_BASELINE = 0, REDUCE_AVX2 = 1 } reduce_kernel;

bool reduce_kernel_supported(reduce_kernel kernel); /* compiled in, and this CPU has it */
/* As pyccl_reduce; the kernel must be supported. All kernels give the same bytes. */
pyccl_status reduce_with(reduce_kernel kernel, uint8_t dtype, uint8_t op, const void *const *in, size_t inputs,
                         size_t count, void *out);

#endif
