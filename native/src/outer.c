/* outer.c: one step of the outer optimizers' SGD, in place, theta - w, eager means, mixing and a step of gossip; one pass
 * over memory each.
 *
 *     b <- mu*b + g      d = g + mu*b (Nesterov) or b      theta <- theta - lr*d
 *     late <- late + (g - before) / world
 *     live <- alpha*live + (1 - alpha)*theta
 *     v <- alpha*v + beta*mean(moved) - gamma*(phi - mean(phis))      phi <- phi + v
 *
 * Every product and every sum is rounded by itself (no FMA), in IEEE mode whatever the caller's thread has set, so all
 * members of a run that hold the same bits hold the same bits after it. Memory-bound: the compiler's vectors will do.
 * Threads: nothing shared. */
#include <string.h>

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

#define MIX(name, real)                                                                                     \
    static void name(real *restrict live, const real *restrict theta, size_t count, real keep, real take) { \
        for (size_t i = 0; i < count; i++) live[i] = keep * live[i] + take * theta[i];                      \
    }

MIX(mix_f32, float)
MIX(mix_f64, double)

pyccl_status pyccl_mix(uint8_t dtype, void *live, const void *theta, size_t count, double alpha) {
    if (dtype != PYCCL_FLOAT32 && dtype != PYCCL_FLOAT64) return PYCCL_ERR_ARGUMENT;
    if (alpha == 0.0) {
        if (count != 0) memcpy(live, theta, count * (dtype == PYCCL_FLOAT32 ? sizeof(float) : sizeof(double)));
        return PYCCL_OK;
    }
    const float_mode mode = float_mode_enter();
    if (dtype == PYCCL_FLOAT32) mix_f32(live, theta, count, (float)alpha, (float)(1.0 - alpha));
    else mix_f64(live, theta, count, alpha, 1.0 - alpha);
    float_mode_leave(mode);
    return PYCCL_OK;
}

#define TILE ((size_t)128) /* elements: so few that the arrays are read side by side; with 1024 it is slower by half */

/* name_sum: out = the sum of in[0], in[1], … from `at` on, in that order.
 * name_part: the rule for some elements. sum: of phis. */
#define GOSSIP(name, real)                                                                                    \
    static void name##_sum(const void *const *in, uint32_t members, size_t at, size_t count,                  \
                           real *restrict out) {                                                              \
        const real *first = (const real *)in[0] + at;                                                         \
        if (members == 1) memcpy(out, first, count * sizeof *out);                                            \
        for (uint32_t m = 1; m < members; m++, first = out) {                                                 \
            const real *next = (const real *)in[m] + at;                                                      \
            for (size_t i = 0; i < count; i++) out[i] = first[i] + next[i];                                   \
        }                                                                                                     \
    }                                                                                                         \
    static void name##_part(real *restrict phi, real *restrict v, const real *restrict moved,                 \
                            const real *restrict sum, uint32_t members, size_t count, real alpha, real push,  \
                            real gamma) {                                                                     \
        if (members == 1)                                                                                     \
            for (size_t i = 0; i < count; i++) v[i] = alpha * v[i] + push * moved[i];                         \
        else                                                                                                  \
            for (size_t i = 0; i < count; i++)                                                                \
                v[i] = (alpha * v[i] + push * moved[i]) - gamma * (phi[i] - sum[i] / (real)members);          \
        for (size_t i = 0; i < count; i++) phi[i] += v[i];                                                    \
    }                                                                                                         \
    static void name(real *phi, real *v, const void *const *moved, const void *const *phis, uint32_t members, \
                     size_t count, real alpha, real push, real gamma) {                                       \
        real moved_sum[TILE], phi_sum[TILE];                                                                  \
        for (size_t at = 0; at < count; at += TILE) {                                                         \
            const size_t n = count - at < TILE ? count - at : TILE;                                           \
            name##_sum(moved, members, at, n, moved_sum);                                                     \
            if (members > 1) name##_sum(phis, members, at, n, phi_sum);                                       \
            name##_part(phi + at, v + at, moved_sum, phi_sum, members, n, alpha, push, gamma);                \
        }                                                                                                     \
    }

GOSSIP(gossip_f32, float)
GOSSIP(gossip_f64, double)

pyccl_status pyccl_gossip(uint8_t dtype, void *phi, void *v, const void *const *moved, const void *const *phis,
                          uint32_t members, size_t count, double alpha, double beta, double gamma) {
    if ((dtype != PYCCL_FLOAT32 && dtype != PYCCL_FLOAT64) || members == 0) return PYCCL_ERR_ARGUMENT;
    const double push = beta / members;
    const float_mode mode = float_mode_enter();
    if (dtype == PYCCL_FLOAT32)
        gossip_f32(phi, v, moved, phis, members, count, (float)alpha, (float)push, (float)gamma);
    else gossip_f64(phi, v, moved, phis, members, count, alpha, push, gamma);
    float_mode_leave(mode);
    return PYCCL_OK;
}
