/* quant_avx512.c: the loops of quant_simd.h with AVX-512. CMake compiles this file for that instruction set. */
#if defined(__x86_64__)
#include "simd_avx512.h"

#include "quant_simd.h"

const quant_kernels quant_avx512 = QUANT_KERNELS(range_run, peak_run);
#else
typedef int quant_avx512_is_empty; /* ISO C wants something here */
#endif
