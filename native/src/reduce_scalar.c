/* reduce_scalar.c: one step of a fold in plain C: the reference of every other kernel, and what other CPUs run.
 * See reduce.h for what a step is. */
#include "reduce.h"

#include "element.h"
#include "reduce_integers.h"

/* The smaller of two equal values is the one with the sign: OR of the bits; of the greater AND. */
#define FLOAT_PAIRS(F, U, suffix, NAN_BITS)                                                    \
    ELEMENT U canonical_##suffix(F x) { return x != x ? NAN_BITS : suffix##_bits(x); }         \
    ELEMENT U least_##suffix(F x, F y) {                                                       \
        if (x != x || y != y) return NAN_BITS;                                                 \
        if (x == y) return suffix##_bits(x) | suffix##_bits(y);                                \
        return x < y ? suffix##_bits(x) : suffix##_bits(y);                                    \
    }                                                                                          \
    ELEMENT U greatest_##suffix(F x, F y) {                                                    \
        if (x != x || y != y) return NAN_BITS;                                                 \
        if (x == y) return suffix##_bits(x) & suffix##_bits(y);                                \
        return x > y ? suffix##_bits(x) : suffix##_bits(y);                                    \
    }

FLOAT_PAIRS(float, uint32_t, f32, F32_NAN)
FLOAT_PAIRS(double, uint64_t, f64, F64_NAN)

/* float32 and float64: the result's bits are stored. */
#define FLOAT_STEP(type, bits)                                                                                   \
    static void step_##type(const reduce_step *s) {                                                              \
        const type wa = (type)s->weight_a, wb = (type)s->weight_b, divisor = (type)s->divisor;                   \
        switch (s->op) {                                                                                         \
        case PYCCL_SUM: EACH(type, bits, canonical_##type(x + y)); break;                                        \
        case PYCCL_AVG: EACH(type, bits, canonical_##type((x * wa + y * wb) / divisor)); break;                  \
        case PYCCL_PROD: EACH(type, bits, canonical_##type(x * y)); break;                                       \
        case PYCCL_MIN: EACH(type, bits, least_##type(x, y)); break;                                             \
        case PYCCL_MAX: EACH(type, bits, greatest_##type(x, y)); break;                                          \
        case REDUCE_WEIGHTED_SUM: EACH(type, bits, canonical_##type(x * wa + y * wb)); break;                    \
        case REDUCE_ONE: EACH(type, bits, ((void)y, canonical_##type(x * wa / divisor))); break;                 \
        default: PYCCL_ASSERT(!"op of a step");                                                                  \
        }                                                                                                        \
    }

FLOAT_STEP(f32, u32)
FLOAT_STEP(f64, u64)

/* float16 and bfloat16 by way of float32: tiles are widened, folded as float32, and rounded. */
#define TILE 256

static void widen(uint8_t dtype, const u16 *in, size_t count, float *out) {
    if (dtype == PYCCL_FLOAT16) {
        for (size_t i = 0; i < count; i++) out[i] = f32_from_f16(in[i]);
    } else {
        for (size_t i = 0; i < count; i++) out[i] = f32_from_bf16(in[i]);
    }
}

static void narrow(uint8_t dtype, const float *in, size_t count, u16 *out) {
    if (dtype == PYCCL_FLOAT16) {
        for (size_t i = 0; i < count; i++) out[i] = f16_from_f32(in[i]);
    } else {
        for (size_t i = 0; i < count; i++) out[i] = bf16_from_f32(in[i]);
    }
}

static void step_halves(const reduce_step *s) {
    float a[TILE], b[TILE];
    reduce_step wide = *s;
    for (size_t i = 0; i < s->count; i += TILE) {
        wide.count = s->count - i < TILE ? s->count - i : TILE;
        wide.a = a;
        wide.b = b;
        wide.out = s->out_wide ? (f32 *)s->out + i : a;
        if (s->a_wide) {
            wide.a = (const f32 *)s->a + i;
        } else {
            widen(s->dtype, (const u16 *)s->a + i, wide.count, a);
        }
        widen(s->dtype, (const u16 *)s->b + i, wide.count, b);
        step_f32(&wide);
        if (!s->out_wide) narrow(s->dtype, a, wide.count, (u16 *)s->out + i);
    }
}

void reduce_scalar(const reduce_step *step) {
    switch (step->dtype) {
    case PYCCL_FLOAT32: step_f32(step); break;
    case PYCCL_FLOAT64: step_f64(step); break;
    case PYCCL_FLOAT16:
    case PYCCL_BFLOAT16: step_halves(step); break;
    default: step_integers(step);
    }
}
