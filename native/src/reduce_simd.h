/* reduce_simd.h: one step of a fold with the vectors of a simd_*.h, which the including file has chosen.
 *
 * Whole vectors first; what is left is copied into a padded vector and runs through the same code, so that no element
 * knows where in the array it stands. See reduce.h for what a step is and reduce_scalar.c for the same in plain C. */
#include "reduce.h"

#include "reduce_integers.h"
#include "status.h"

enum { f32_SIZE = 4, f64_SIZE = 8, f16_SIZE = 2, bf16_SIZE = 2 };

#define VECTORS(A, B, OUT, width, expr)                                                   \
    do {                                                                                  \
        const uint8_t *a = s->a, *b = s->b;                                               \
        uint8_t *out = s->out;                                                            \
        const size_t count = s->count;                                                    \
        for (size_t i = 0; i < count; i += (width)) {                                     \
            const __typeof__(wa) x = A##_load(a + i * A##_SIZE), y = B##_load(b + i * B##_SIZE); \
            OUT##_store(out + i * OUT##_SIZE, (expr));                                    \
        }                                                                                 \
    } while (0)

/* Reads arrays of A and B, computes in M (f32 or f64), writes OUT. */
#define VECTOR_STEP(name, A, B, OUT, M, width)                                                                    \
    static void name(const reduce_step *s) {                                                                      \
        const __typeof__(M##_splat(0)) wa = M##_splat((M)s->weight_a), wb = M##_splat((M)s->weight_b);            \
        const __typeof__(M##_splat(0)) divisor = M##_splat((M)s->divisor);                                        \
        switch (s->op) {                                                                                          \
        case PYCCL_SUM: VECTORS(A, B, OUT, width, M##_canonical(x + y)); break;                                   \
        case PYCCL_AVG: VECTORS(A, B, OUT, width, M##_canonical((x * wa + y * wb) / divisor)); break;             \
        case PYCCL_PROD: VECTORS(A, B, OUT, width, M##_canonical(x * y)); break;                                  \
        case PYCCL_MIN: VECTORS(A, B, OUT, width, M##_least(x, y)); break;                                        \
        case PYCCL_MAX: VECTORS(A, B, OUT, width, M##_greatest(x, y)); break;                                     \
        case REDUCE_WEIGHTED_SUM: VECTORS(A, B, OUT, width, M##_canonical(x * wa + y * wb)); break;               \
        case REDUCE_ONE: VECTORS(A, B, OUT, width, ((void)y, M##_canonical(x * wa / divisor))); break;            \
        default: PYCCL_ASSERT(!"op of a step");                                                                   \
        }                                                                                                         \
    }

VECTOR_STEP(step_f32, f32, f32, f32, f32, VF_WIDTH)
VECTOR_STEP(step_f64, f64, f64, f64, f64, VF_WIDTH / 2)

/* float16 and bfloat16: two inputs | the first two of more | a partial result and one more | and the last */
#define HALF_STEP(H)                                                      \
    VECTOR_STEP(step_##H##_pair, H, H, H, f32, VF_WIDTH)                  \
    VECTOR_STEP(step_##H##_first, H, H, f32, f32, VF_WIDTH)               \
    VECTOR_STEP(step_##H##_more, f32, H, f32, f32, VF_WIDTH)              \
    VECTOR_STEP(step_##H##_last, f32, H, H, f32, VF_WIDTH)                \
    static void step_##H(const reduce_step *s) {                          \
        if (s->a_wide) {                                                  \
            (s->out_wide ? step_##H##_more : step_##H##_last)(s);         \
        } else {                                                          \
            (s->out_wide ? step_##H##_first : step_##H##_pair)(s);        \
        }                                                                 \
    }

HALF_STEP(f16)
HALF_STEP(bf16)

static void step_vectors(const reduce_step *s) {
    switch (s->dtype) {
    case PYCCL_FLOAT32: step_f32(s); break;
    case PYCCL_FLOAT64: step_f64(s); break;
    case PYCCL_FLOAT16: step_f16(s); break;
    default: step_bf16(s);
    }
}

static void reduce_run(const reduce_step *s) {
    if (s->dtype != PYCCL_FLOAT32 && s->dtype != PYCCL_FLOAT64 && s->dtype != PYCCL_FLOAT16 && s->dtype != PYCCL_BFLOAT16) {
        step_integers(s);
        return;
    }
    const size_t rest = s->count % VF_WIDTH, whole = s->count - rest, bytes = pyccl_dtype_size(s->dtype);
    const size_t a_bytes = s->a_wide ? sizeof(float) : bytes, out_bytes = s->out_wide ? sizeof(float) : bytes;
    reduce_step part = *s;
    part.count = whole;
    step_vectors(&part);
    if (rest == 0) return;
    _Alignas(64) uint8_t a[VF_WIDTH * sizeof(double)] = {0}, b[sizeof a] = {0}, out[sizeof a];
    memcpy(a, (const uint8_t *)s->a + whole * a_bytes, rest * a_bytes);
    memcpy(b, (const uint8_t *)s->b + whole * bytes, rest * bytes);
    part.a = a;
    part.b = b;
    part.out = out;
    part.count = VF_WIDTH;
    step_vectors(&part);
    memcpy((uint8_t *)s->out + whole * out_bytes, out, rest * out_bytes);
}
