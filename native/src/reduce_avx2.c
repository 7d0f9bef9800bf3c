/* reduce_avx2.c: the loops of reduce_simd.h with AVX2 and F16C. CMake compiles this file for that instruction set. */
#if defined(__x86_64__)
#include "simd_avx2.h"

#include "reduce_simd.h"

void reduce_avx2(const reduce_step *step) { reduce_run(step); }
#else
typedef int reduce_avx2_is_empty; /* ISO C wants something here */
#endif
