/* quant_neon.c: the loops of quant_simd.h with NEON. CMake compiles this file for that instruction set. */
#if defined(__aarch64__)
#include "simd_neon.h"

#include "quant_simd.h"

const quant_kernels quant_neon = QUANT_KERNELS(range_run, peak_run);
#else
typedef int quant_neon_is_empty; /* ISO C wants something here */
#endif
