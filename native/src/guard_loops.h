/* guard_loops.h: the loops of guard.h in plain C, for the compiler to make vectors of: included by a file for each
 * instruction set, which is compiled for it and says `GUARD_KERNEL`. No loop depends on the order in which lanes run. */
#include "guard.h"

#include "element.h"
#include "pyccl.h"
#include "status.h"

#define PEAK(type, magnitude)                                                         \
    static uint64_t peak_##type(const void *x, size_t count) {                        \
        const type *in = x;                                                           \
        type most = 0;                                                                \
        for (size_t i = 0; i < count; i++) {                                          \
            const type size = in[i] & (type)(magnitude);                              \
            most = size > most ? size : most;                                         \
        }                                                                             \
        return most;                                                                  \
    }

PEAK(u16, 0x7fff)
PEAK(u32, 0x7fffffff)
PEAK(u64, INT64_MAX)

static uint64_t guard_peak_of(uint8_t dtype, const void *x, size_t count) {
    switch (dtype) {
    case PYCCL_FLOAT32: return peak_u32(x, count);
    case PYCCL_FLOAT64: return peak_u64(x, count);
    case PYCCL_FLOAT16:
    case PYCCL_BFLOAT16: return peak_u16(x, count);
    default: PYCCL_ASSERT(!"a dtype that is guarded"); return 0;
    }
}

/* Finite numbers only: exact, without the branch of f32_from_f16. */
ELEMENT double f16_size(uint16_t x) { return (double)(f32_of((uint32_t)(x & 0x7fff) << 13) * 0x1p112f); }
ELEMENT double bf16_size(uint16_t x) { return (double)f32_from_bf16(x); }

#define SQUARES(name, type, number)                                                   \
    static void squares_##name(const void *x, size_t count, double sums[GUARD_LANES]) { \
        const type *in = x;                                                           \
        double lane[GUARD_LANES];                                                     \
        size_t i = 0;                                                                 \
        memcpy(lane, sums, sizeof lane);                                              \
        for (; i + GUARD_LANES <= count; i += GUARD_LANES)                            \
            for (size_t k = 0; k < GUARD_LANES; k++) {                                \
                const double size = number(in[i + k]);                                \
                lane[k] += size * size;                                               \
            }                                                                         \
        for (size_t k = 0; i < count; i++, k++) {                                     \
            const double size = number(in[i]);                                        \
            lane[k] += size * size;                                                   \
        }                                                                             \
        memcpy(sums, lane, sizeof lane);                                              \
    }

SQUARES(f16, u16, f16_size)
SQUARES(bf16, u16, bf16_size)
SQUARES(f32, f32, (double))
SQUARES(f64, f64, )

static void guard_squares_of(uint8_t dtype, const void *x, size_t count, double sums[GUARD_LANES]) {
    switch (dtype) {
    case PYCCL_FLOAT32: squares_f32(x, count, sums); break;
    case PYCCL_FLOAT64: squares_f64(x, count, sums); break;
    case PYCCL_FLOAT16: squares_f16(x, count, sums); break;
    case PYCCL_BFLOAT16: squares_bf16(x, count, sums); break;
    default: PYCCL_ASSERT(!"a dtype that is guarded");
    }
}

const guard_kernel GUARD_KERNEL = {guard_peak_of, guard_squares_of};
