/* guard.c: magnitudes and squares of arrays (guard.h), by the instruction set in use. On aarch64 the plain loops are NEON. */
#include "guard.h"

#include <math.h>

#include "element.h"
#include "float_mode.h"
#include "pyccl.h"

#define GUARD_KERNEL guard_scalar
#include "guard_loops.h"

static const guard_kernel *kernel_of(kernel k) {
#if defined(__x86_64__)
    if (k == KERNEL_AVX512) return &guard_avx512;
    if (k == KERNEL_AVX2) return &guard_avx2;
#endif
    (void)k;
    return &guard_scalar;
}

static double number_of(uint8_t dtype, uint64_t bits) {
    double wide;
    switch (dtype) {
    case PYCCL_FLOAT32: return (double)f32_of((uint32_t)bits);
    case PYCCL_FLOAT16: return (double)f32_from_f16((uint16_t)bits);
    case PYCCL_BFLOAT16: return (double)f32_from_bf16((uint16_t)bits);
    default: memcpy(&wide, &bits, sizeof wide); return wide;
    }
}

double guard_peak(kernel k, uint8_t dtype, const void *x, size_t count) {
    const uint64_t bits = kernel_of(k)->peak(dtype, x, count);
    const float_mode before = float_mode_enter();
    const double peak = number_of(dtype, bits);
    float_mode_leave(before);
    return peak;
}

double guard_squares(kernel k, uint8_t dtype, const void *x, size_t count) {
    double sums[GUARD_LANES] = {0};
    const float_mode before = float_mode_enter();
    kernel_of(k)->squares(dtype, x, count, sums);
    for (int width = GUARD_LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) sums[i] += sums[i + width];
    float_mode_leave(before);
    return sums[0];
}

pyccl_status pyccl_magnitude(uint8_t dtype, const void *x, size_t count, double *peak, double *squares) {
    *peak = *squares = 0;
    if (dtype != PYCCL_FLOAT16 && dtype != PYCCL_BFLOAT16 && dtype != PYCCL_FLOAT32 && dtype != PYCCL_FLOAT64) return PYCCL_ERR_ARGUMENT;
    *peak = guard_peak(kernel_current(), dtype, x, count);
    *squares = isfinite(*peak) ? guard_squares(kernel_current(), dtype, x, count) : (double)NAN;
    return PYCCL_OK;
}
