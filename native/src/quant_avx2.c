/* quant_avx2.c: the loops of quant_simd.h with AVX2 and F16C. CMake compiles this file for that instruction set. */
#if defined(__x86_64__)
#include "simd_avx2.h"

#include "quant_simd.h"

const quant_kernels quant_avx2 = QUANT_KERNELS(range_run, peak_run);
#else
typedef int quant_avx2_is_empty; /* ISO C wants something here */
#endif
