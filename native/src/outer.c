/* outer.c: one step of the outer optimizers' SGD, in place, theta - w, and eager means; one pass over memory each.
 *
 *     b <- mu*b + g      d = g + mu*b (Nesterov) or b      theta <- theta - lr*d
 *     late <- late + (g - before) / world
 *
 * Every product and every sum is rounded by itself (no FMA), in IEEE mode whatever the caller's thread has set, so all
 * members of a run that hold the same bits hold the same bits after it. Memory-bound: the compiler's vectors will do.
 * Threads: nothing shared. */
#include "float_mode.h"
#include "pyccl.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define STREAM_FROM ((size_t)1 << 20) /* elements: what is longer does not stay in a cache, so stores go past them */

#define STEPS(name, real)                                                                                   \
    static void name##_plain(real *restrict theta, const real *restrict g, size_t count, real lr) {         \
        for (size_t i = 0; i < count; i++) theta[i] -= lr * g[i];                                           \
    }                                                                                                       \
    static void name##_heavy(real *restrict theta, real *restrict b, const real *restrict g, size_t count,  \
                             real lr, real mu) {                                                            \
        for (size_t i = 0; i < count; i++) {                                                                \
            b[i] = mu * b[i] + g[i];                                                                        \
            theta[i] -= lr * b[i];                                                                          \
        }                                                                                                   \
    }                                                                                                       \
    static void name##_nesterov(real *restrict theta, real *restrict b, const real *restrict g,             \
                                size_t count, real lr, real mu) {                                           \
        for (size_t i = 0; i < count; i++) {                                                                \
            b[i] = mu * b[i] + g[i];                                                                        \
            theta[i] -= lr * (g[i] + mu * b[i]);                                                            \
        }                                                                                                   \
    }                                                                                                       \
    static void name(real *theta, real *b, const real *g, size_t count, real lr, real mu, int nesterov) {   \
        if (b == NULL) name##_plain(theta, g, count, lr);                                                   \
        else if (nesterov) name##_nesterov(theta, b, g, count, lr, mu);                                     \
        else name##_heavy(theta, b, g, count, lr, mu);                                                      \
    }

STEPS(step_f32, float)
STEPS(step_f64, double)

pyccl_status pyccl_outer_sgd(uint8_t dtype, void *theta, void *momentum, const void *g, size_t count, double lr,
                             double mu, int nesterov) {
    if (dtype != PYCCL_FLOAT32 && dtype != PYCCL_FLOAT64) return PYCCL_ERR_ARGUMENT;
    const float_mode before = float_mode_enter();
    if (dtype == PYCCL_FLOAT32) step_f32(theta, momentum, g, count, (float)lr, (float)mu, nesterov);
    else step_f64(theta, momentum, g, count, lr, mu, nesterov);
    float_mode_leave(before);
    return PYCCL_OK;
}

static void difference_f32(const float *a, const float *b, float *out, size_t count) {
    size_t i = 0;
#if defined(__SSE2__)
    if (count >= STREAM_FROM) {
        for (; ((uintptr_t)(out + i) & 15) != 0; i++) out[i] = a[i] - b[i];
        for (; i + 4 <= count; i += 4) _mm_stream_ps(out + i, _mm_sub_ps(_mm_loadu_ps(a + i), _mm_loadu_ps(b + i)));
        _mm_sfence();
    }
#endif
    for (; i < count; i++) out[i] = a[i] - b[i];
}

void pyccl_difference(const float *a, const float *b, size_t count, float *out) {
    const float_mode before = float_mode_enter();
    difference_f32(a, b, out, count);
    float_mode_leave(before);
}

#define EAGER(name, real)                                                                              \
    static void name(real *restrict late, const real *restrict g, const real *restrict before,         \
                     size_t count, real world) {                                                       \
        for (size_t i = 0; i < count; i++) late[i] += (g[i] - before[i]) / world;                      \
    }

EAGER(eager_f32, float)
EAGER(eager_f64, double)

pyccl_status pyccl_eager(uint8_t dtype, void *late, const void *g, const void *before, size_t count, uint32_t world) {
    if ((dtype != PYCCL_FLOAT32 && dtype != PYCCL_FLOAT64) || world == 0) return PYCCL_ERR_ARGUMENT;
    const float_mode mode = float_mode_enter();
    if (dtype == PYCCL_FLOAT32) eager_f32(late, g, before, count, (float)world);
    else eager_f64(late, g, before, count, world);
    float_mode_leave(mode);
    return PYCCL_OK;
}
