/* reduce_avx512.c: the loops of reduce_simd.h with AVX-512. CMake compiles this file for that instruction set. */
#if defined(__x86_64__)
#include "simd_avx512.h"

#include "reduce_simd.h"

void reduce_avx512(const reduce_step *step) { reduce_run(step); }
#else
typedef int reduce_avx512_is_empty; /* ISO C wants something here */
#endif
