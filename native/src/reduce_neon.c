/* reduce_neon.c: the loops of reduce_simd.h with NEON. CMake compiles this file for that instruction set. */
#if defined(__aarch64__)
#include "simd_neon.h"

#include "reduce_simd.h"

void reduce_neon(const reduce_step *step) { reduce_run(step); }
#else
typedef int reduce_neon_is_empty; /* ISO C wants something here */
#endif
