/* guard_avx512.c: the loops of guard_loops.h with AVX-512. CMake compiles this file for that instruction set. */
#if defined(__x86_64__)
#define GUARD_KERNEL guard_avx512
#include "guard_loops.h"
#else
typedef int guard_avx512_is_empty; /* ISO C wants something here */
#endif
