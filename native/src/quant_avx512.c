/* quant_avx512.c: the loops of quant_simd.h with AVX-512. CMake compiles this file for that instruction set. */
#if defined(__x86_64__)
#include "simd_avx512.h"

#include "quant_simd.h"

const quant_kernels quant_avx512 = {range_run, affine_encode_run, affine_decode_run};
#else
typedef int quant_avx512_is_empty; /* ISO C wants something here */
#endif
