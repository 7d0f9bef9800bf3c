/* kernel.h: which instruction set the element kernels (reduce.c, quant.c, digest.c) use. All give the same bytes.
 *
 * One process-wide choice, the only mutable global of the data plane: made at the first use from what the CPU has, and
 * changed by pyccl_kernel_select (tests and benchmarks).      Threads: any; a change reaches calls that begin later. */
#ifndef PYCCL_KERNEL_H
#define PYCCL_KERNEL_H

#include <stdbool.h>

typedef enum kernel {
    KERNEL_SCALAR = 0,               /* plain C: the reference, and what any CPU runs */
    KERNEL_AVX2 = 1,                 /* x86: AVX2 and F16C */
    KERNEL_AVX512 = 2,               /* x86: F, BW, DQ, VL */
    KERNEL_NEON = 3,                 /* aarch64: always there */
    KERNEL_COUNT = 4
} kernel;

bool kernel_supported(kernel k);     /* compiled in, and this CPU has it */
kernel kernel_current(void);
const char *kernel_name(kernel k);

#endif
