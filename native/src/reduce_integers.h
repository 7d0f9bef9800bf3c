/* reduce_integers.h: one step of a fold of integers, as loops that compilers turn into vectors of whatever the including
 * file is compiled for; for that the count is a local, which no store can change. Overflow wraps: sums and products are
 * those of unsigned numbers, so that C defines them. */
#ifndef PYCCL_REDUCE_INTEGERS_H
#define PYCCL_REDUCE_INTEGERS_H

#include "element.h"
#include "reduce.h"
#include "status.h"

#if defined(__clang__)
#define ELEMENTWISE _Pragma("clang loop vectorize(assume_safety)")
#else
#define ELEMENTWISE _Pragma("GCC ivdep") /* element i depends on no other, also where out is one of the inputs */
#endif

#define EACH(type, out_type, expr)                            \
    do {                                                      \
        const type *a = s->a, *b = s->b;                      \
        out_type *out = s->out;                               \
        const size_t count = s->count;                        \
        ELEMENTWISE for (size_t i = 0; i < count; i++) {      \
            const type x = a[i], y = b[i];                    \
            out[i] = (out_type)(expr);                        \
        }                                                     \
    } while (0)

/* math: unsigned and at least as wide as int, or the promotion to int could overflow (uint16_t products do). */
#define INTEGER_STEP(type, math)                                                     \
    static void step_##type(const reduce_step *s) {                                  \
        switch (s->op) {                                                             \
        case PYCCL_SUM: EACH(type, type, (math)x + (math)y); break;                  \
        case PYCCL_PROD: EACH(type, type, (math)x * (math)y); break;                 \
        case PYCCL_MIN: EACH(type, type, x < y ? x : y); break;                      \
        case PYCCL_MAX: EACH(type, type, x > y ? x : y); break;                      \
        case REDUCE_ONE: memmove(s->out, s->a, s->count * sizeof(type)); break;      \
        default: PYCCL_ASSERT(!"op of integers");                                    \
        }                                                                            \
    }

INTEGER_STEP(u8, uint32_t)
INTEGER_STEP(i8, uint32_t)
INTEGER_STEP(u16, uint32_t)
INTEGER_STEP(i16, uint32_t)
INTEGER_STEP(u32, uint32_t)
INTEGER_STEP(i32, uint32_t)
INTEGER_STEP(u64, uint64_t)
INTEGER_STEP(i64, uint64_t)

static void step_integers(const reduce_step *s) {
    switch (s->dtype) {
    case PYCCL_UINT8: step_u8(s); break;
    case PYCCL_INT8: step_i8(s); break;
    case PYCCL_UINT16: step_u16(s); break;
    case PYCCL_INT16: step_i16(s); break;
    case PYCCL_UINT32: step_u32(s); break;
    case PYCCL_INT32: step_i32(s); break;
    case PYCCL_UINT64: step_u64(s); break;
    case PYCCL_INT64: step_i64(s); break;
    default: PYCCL_ASSERT(!"dtype of a step");
    }
}

#endif
