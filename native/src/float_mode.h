/* float_mode.h: kernels run in IEEE mode: rounding to nearest even, denormals kept, no traps.
 *
 * A thread may have inherited flush-to-zero or another rounding from its creator (-ffast-math programs set them);
 * results must not depend on that. Every public function that computes with floats resets the mode and puts it back. */
#ifndef PYCCL_FLOAT_MODE_H
#define PYCCL_FLOAT_MODE_H

#include <stdint.h>

#if defined(__x86_64__)
typedef unsigned float_mode;
static inline float_mode float_mode_enter(void) {
    const float_mode before = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(0x1f80u);
    return before;
}
static inline void float_mode_leave(float_mode before) { __builtin_ia32_ldmxcsr(before); }
#elif defined(__aarch64__)
typedef uint64_t float_mode;
static inline float_mode float_mode_enter(void) {
    float_mode before;
    __asm__ volatile("mrs %0, fpcr\n\tmsr fpcr, %1" : "=&r"(before) : "r"(UINT64_C(0)) : "memory");
    return before;
}
static inline void float_mode_leave(float_mode before) { __asm__ volatile("msr fpcr, %0" : : "r"(before) : "memory"); }
#else
#include <fenv.h>
typedef fenv_t float_mode;
static inline float_mode float_mode_enter(void) {
    fenv_t before;
    (void)fegetenv(&before); /* neither can fail for the environment of this thread */
    (void)fesetenv(FE_DFL_ENV);
    return before;
}
static inline void float_mode_leave(float_mode before) { (void)fesetenv(&before); }
#endif

#endif
