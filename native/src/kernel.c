/* kernel.c: picks an instruction set once per process. See kernel.h. */
#include "kernel.h"

#include <stdatomic.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "pyccl.h"
#include "status.h"

#define UNDECIDED (-1)

static const char *const NAMES[KERNEL_COUNT] = {
    [KERNEL_SCALAR] = "scalar", [KERNEL_AVX2] = "avx2", [KERNEL_AVX512] = "avx512", [KERNEL_NEON] = "neon"};

static atomic_int chosen = UNDECIDED;

#if defined(__x86_64__)
/* Clang's __builtin_cpu_supports does not know it. Asked once: under a hypervisor cpuid traps, and every piece of a reduction
 * asks which kernels there are. */
static bool has_f16c(void) {
    static atomic_int known = UNDECIDED;
    int has = atomic_load_explicit(&known, memory_order_relaxed);
    if (has == UNDECIDED) {
        unsigned a, b, c, d;
        has = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
        atomic_store_explicit(&known, has, memory_order_relaxed);
    }
    return has != 0;
}
#endif

bool kernel_supported(kernel k) {
#if defined(__x86_64__)
    if (k == KERNEL_AVX2) return __builtin_cpu_supports("avx2") != 0 && has_f16c();
    if (k == KERNEL_AVX512)
        return kernel_supported(KERNEL_AVX2) && __builtin_cpu_supports("avx512f") != 0 &&
               __builtin_cpu_supports("avx512bw") != 0 && __builtin_cpu_supports("avx512dq") != 0 &&
               __builtin_cpu_supports("avx512vl") != 0;
#elif defined(__aarch64__)
    if (k == KERNEL_NEON) return true;
#endif
    return k == KERNEL_SCALAR;
}

static kernel kernel_best(void) {
    static const kernel PREFERENCE[] = {KERNEL_AVX512, KERNEL_AVX2, KERNEL_NEON};
    for (size_t i = 0; i < sizeof PREFERENCE / sizeof *PREFERENCE; i++)
        if (kernel_supported(PREFERENCE[i])) return PREFERENCE[i];
    return KERNEL_SCALAR;
}

kernel kernel_current(void) {
    const int now = atomic_load_explicit(&chosen, memory_order_relaxed);
    if (now != UNDECIDED) return (kernel)now;
    const kernel best = kernel_best(); /* two threads may both get here: they store the same */
    int undecided = UNDECIDED;
    atomic_compare_exchange_strong_explicit(&chosen, &undecided, (int)best, memory_order_relaxed, memory_order_relaxed);
    return undecided == UNDECIDED ? best : (kernel)undecided;
}

const char *kernel_name(kernel k) {
    PYCCL_ASSERT(k >= KERNEL_SCALAR && k < KERNEL_COUNT);
    return NAMES[k];
}

const char *pyccl_kernel_name(void) { return kernel_name(kernel_current()); }

pyccl_status pyccl_kernel_select(const char *name) {
    if (strcmp(name, "auto") == 0) {
        atomic_store_explicit(&chosen, (int)kernel_best(), memory_order_relaxed);
        return PYCCL_OK;
    }
    for (kernel k = KERNEL_SCALAR; k < KERNEL_COUNT; k++) {
        if (strcmp(name, NAMES[k]) != 0 || !kernel_supported(k)) continue;
        atomic_store_explicit(&chosen, (int)k, memory_order_relaxed);
        return PYCCL_OK;
    }
    return PYCCL_ERR_ARGUMENT;
}
