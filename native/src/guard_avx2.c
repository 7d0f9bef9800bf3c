/* guard_avx2.c: the loops of guard_loops.h with AVX2. CMake compiles this file for that instruction set. */
#if defined(__x86_64__)
#define GUARD_KERNEL guard_avx2
#include "guard_loops.h"
#else
typedef int guard_avx2_is_empty; /* ISO C wants something here */
#endif
