/* reduce.c: folds the members' arrays element by element, in the order given.
 *
 * Invariant: the bytes of the result are a function of the inputs' bytes, their order and the op alone, not of the CPU,
 * of the thread's floating-point mode or of how the compiler vectorises: each element is a chain of single IEEE
 * operations (-ffp-contract=off, no reassociation), a NaN becomes one fixed pattern, -0 orders below +0, integers wrap.
 * The same loops are compiled for the baseline and for AVX2 and picked at run time.
 *
 *      in[0] |---- block 0 ----|---- block 1 ----| ...     per block:  part = in[0] . in[1]
 *      in[1] |-----------------|-----------------| ...                 part = part . in[2]      (stays in L1)
 *       ...                                                            ...
 *      in[n-1] ----------------|-----------------| ...                 out  = part . in[n-1]    (AVG: / n)
 *
 * `out` is written in the last step of a block, which reads each element before it writes it, and every earlier input of
 * the block has been read by then: `out` may be any one of the inputs.
 * Threads: nothing shared.                                  Rules: design.md 4.2 */
#include "reduce.h"

#include <string.h>

#include "status.h"

#define BLOCK_BYTES 16384 /* of a partial result: half an L1 cache, so that the inputs' lines fit beside it */

#if defined(__clang__)
#define ELEMENTWISE _Pragma("clang loop vectorize(assume_safety)")
#else
#define ELEMENTWISE _Pragma("GCC ivdep") /* element i depends on no other, also where out is one of the inputs */
#endif

/* Arrays come from frames and from callers: any alignment, any effective type. */
#define FOREIGN __attribute__((aligned(1), may_alias))
typedef int32_t FOREIGN i32;
typedef uint32_t FOREIGN u32;
typedef int64_t FOREIGN i64;
typedef uint64_t FOREIGN u64;
typedef float FOREIGN f32;
typedef double FOREIGN f64;

/* One step of a fold; `divisor` is used by AVG only, whose last step is the sum and the division. */
typedef struct step {
    const void *a, *b;
    void *out;
    size_t count;
    uint8_t op;
    double divisor;
} step;

#define KERNEL static inline __attribute__((always_inline)) void

/* ---- integers: add and multiply as unsigned, so that overflow wraps and is defined ---- */

#define EACH(type, expr)                          \
    do {                                          \
        const type *a = s.a, *b = s.b;            \
        type *out = s.out;                        \
        ELEMENTWISE for (size_t i = 0; i < s.count; i++) { \
            const type x = a[i], y = b[i];        \
            out[i] = (expr);                      \
        }                                         \
    } while (0)

#define INTEGER_KERNEL(name, type, utype)                            \
    KERNEL name(step s) {                                            \
        switch (s.op) {                                              \
        case PYCCL_SUM: EACH(utype, x + y); break;                   \
        case PYCCL_PROD: EACH(utype, x * y); break;                  \
        case PYCCL_MIN: EACH(type, x < y ? x : y); break;            \
        case PYCCL_MAX: EACH(type, x > y ? x : y); break;            \
        default: PYCCL_ASSERT(!"reducible");                         \
        }                                                            \
    }

INTEGER_KERNEL(fold_i32, i32, u32)
INTEGER_KERNEL(fold_i64, i64, u64)

/* ---- floats ---- */

/* A float and its bits. The smaller of two equal values is the one with the sign: OR of the bits, the greater AND. */
#define FLOAT_HELPERS(F, U, suffix, NAN_BITS)                                                         \
    static inline __attribute__((always_inline)) U bits_##suffix(F x) {                               \
        U bits;                                                                                       \
        memcpy(&bits, &x, sizeof bits);                                                               \
        return bits;                                                                                  \
    }                                                                                                 \
    static inline __attribute__((always_inline)) U canonical_##suffix(F x) {                          \
        return x != x ? NAN_BITS : bits_##suffix(x);                                                  \
    }                                                                                                 \
    static inline __attribute__((always_inline)) U min_##suffix(F x, F y) {                           \
        const U bx = bits_##suffix(x), by = bits_##suffix(y);                                         \
        const U lesser = x < y ? bx : by;                                                             \
        const U least = x == y ? bx | by : lesser;                                                    \
        const U either = x != x ? NAN_BITS : least;                                                   \
        return y != y ? NAN_BITS : either;                                                            \
    }                                                                                                 \
    static inline __attribute__((always_inline)) U max_##suffix(F x, F y) {                           \
        const U bx = bits_##suffix(x), by = bits_##suffix(y);                                         \
        const U greater = x > y ? bx : by;                                                            \
        const U greatest = x == y ? bx & by : greater;                                                \
        const U either = x != x ? NAN_BITS : greatest;                                                \
        return y != y ? NAN_BITS : either;                                                            \
    }

FLOAT_HELPERS(float, uint32_t, f32, UINT32_C(0x7fc00000))
FLOAT_HELPERS(double, uint64_t, f64, UINT64_C(0x7ff8000000000000))

#define EACH_FLOAT(type, utype, expr)             \
    do {                                          \
        const type *a = s.a, *b = s.b;            \
        utype *out = s.out;                       \
        ELEMENTWISE for (size_t i = 0; i < s.count; i++) { \
            const type x = a[i], y = b[i];        \
            out[i] = (expr);                      \
        }                                         \
    } while (0)

#define FLOAT_KERNEL(name, type, utype, suffix)                                      \
    KERNEL name(step s) {                                                            \
        const type divisor = (type)s.divisor;                                        \
        switch (s.op) {                                                              \
        case PYCCL_SUM: EACH_FLOAT(type, utype, canonical_##suffix(x + y)); break;   \
        case PYCCL_PROD: EACH_FLOAT(type, utype, canonical_##suffix(x * y)); break;  \
        case PYCCL_MIN: EACH_FLOAT(type, utype, min_##suffix(x, y)); break;          \
        case PYCCL_MAX: EACH_FLOAT(type, utype, max_##suffix(x, y)); break;          \
        case PYCCL_AVG: EACH_FLOAT(type, utype, canonical_##suffix((x + y) / divisor)); break; \
        default: PYCCL_ASSERT(!"reducible");                                         \
        }                                                                            \
    }

FLOAT_KERNEL(fold_f32, f32, u32, f32)
FLOAT_KERNEL(fold_f64, f64, u64, f64)

/* A fold of one input: a copy whose NaNs are canonical. */
KERNEL copy_canonical(uint8_t dtype, step s) {
    if (dtype == PYCCL_FLOAT32) {
        EACH_FLOAT(f32, u32, ((void)y, canonical_f32(x)));
    } else if (dtype == PYCCL_FLOAT64) {
        EACH_FLOAT(f64, u64, ((void)y, canonical_f64(x)));
    } else {
        memmove(s.out, s.a, s.count * pyccl_dtype_size(dtype));
    }
}

KERNEL run_step(uint8_t dtype, step s) {
    switch (dtype) {
    case PYCCL_INT32: fold_i32(s); break;
    case PYCCL_INT64: fold_i64(s); break;
    case PYCCL_FLOAT32: fold_f32(s); break;
    case PYCCL_FLOAT64: fold_f64(s); break;
    default: PYCCL_ASSERT(!"reducible");
    }
}

/* ---- the same, once per instruction set ---- */

static __attribute__((noinline)) void step_baseline(uint8_t dtype, step s) { run_step(dtype, s); }
static __attribute__((noinline)) void copy_baseline(uint8_t dtype, step s) { copy_canonical(dtype, s); }

#if defined(__x86_64__)
/* "avx2" does not turn on FMA: the operations stay the same, only eight or four at a time. */
static __attribute__((noinline, target("avx2"))) void step_avx2(uint8_t dtype, step s) { run_step(dtype, s); }
static __attribute__((noinline, target("avx2"))) void copy_avx2(uint8_t dtype, step s) { copy_canonical(dtype, s); }
#endif

bool reduce_kernel_supported(reduce_kernel kernel) {
#if defined(__x86_64__)
    if (kernel == REDUCE_AVX2) return __builtin_cpu_supports("avx2") != 0;
#endif
    return kernel == REDUCE_BASELINE;
}

typedef void step_function(uint8_t dtype, step s);

static step_function *choose(reduce_kernel kernel, size_t inputs) {
#if defined(__x86_64__)
    if (kernel == REDUCE_AVX2) return inputs == 1 ? copy_avx2 : step_avx2;
#endif
    PYCCL_ASSERT(kernel == REDUCE_BASELINE);
    return inputs == 1 ? copy_baseline : step_baseline;
}

/* ---- blocks ---- */

typedef struct fold {
    const void *const *in;
    size_t inputs, element_bytes;
    uint8_t dtype, op;
    step_function *run;
} fold;

static const void *input_at(const fold *f, size_t input, size_t offset_bytes) {
    return (const uint8_t *)f->in[input] + offset_bytes;
}

static void fold_block(const fold *f, size_t first, size_t count, void *out) {
    _Alignas(64) uint8_t partial[BLOCK_BYTES];
    const size_t at = first * f->element_bytes;
    PYCCL_ASSERT(f->inputs <= 2 || count * f->element_bytes <= BLOCK_BYTES);
    step s = {.a = input_at(f, 0, at), .count = count, .divisor = (double)f->inputs};
    for (size_t i = f->inputs == 1 ? 0 : 1; i < f->inputs; i++) { /* one input: one step, of itself with itself */
        const bool last = i + 1 == f->inputs;
        s.b = input_at(f, i, at);
        s.out = last ? (uint8_t *)out + at : partial;
        s.op = f->op == PYCCL_AVG && !last ? PYCCL_SUM : f->op;
        f->run(f->dtype, s);
        s.a = partial;
    }
}

/* A thread may have inherited flush-to-zero or another rounding from its creator; results must not depend on that. */
#if defined(__x86_64__)
typedef unsigned float_mode;
#define FLOAT_MODE_DEFAULT 0x1f80u
static float_mode float_mode_get(void) { return __builtin_ia32_stmxcsr(); }
static void float_mode_set(float_mode mode) { __builtin_ia32_ldmxcsr(mode); }
#elif defined(__aarch64__)
typedef uint64_t float_mode;
#define FLOAT_MODE_DEFAULT UINT64_C(0)
static float_mode float_mode_get(void) {
    float_mode mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}
static void float_mode_set(float_mode mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
#else
#include <fenv.h>
typedef fenv_t float_mode;
#define FLOAT_MODE_DEFAULT (*(FE_DFL_ENV))
static float_mode float_mode_get(void) {
    fenv_t mode;
    PYCCL_ASSERT(fegetenv(&mode) == 0);
    return mode;
}
static void float_mode_set(float_mode mode) { PYCCL_ASSERT(fesetenv(&mode) == 0); }
#endif

size_t pyccl_dtype_size(uint8_t dtype) {
    switch (dtype) {
    case PYCCL_INT32:
    case PYCCL_FLOAT32: return 4;
    case PYCCL_INT64:
    case PYCCL_FLOAT64: return 8;
    case PYCCL_UINT8: return 1;
    default: return 0;
    }
}

static bool reducible(uint8_t dtype, uint8_t op) {
    const bool is_float = dtype == PYCCL_FLOAT32 || dtype == PYCCL_FLOAT64;
    const bool is_integer = dtype == PYCCL_INT32 || dtype == PYCCL_INT64;
    return op >= PYCCL_SUM && op <= PYCCL_MAX && (is_float || (is_integer && op != PYCCL_AVG));
}

pyccl_status reduce_with(reduce_kernel kernel, uint8_t dtype, uint8_t op, const void *const *in, size_t inputs,
                         size_t count, void *out) {
    if (!reducible(dtype, op) || inputs == 0) return PYCCL_ERR_ARGUMENT;
    const fold f = {in, inputs, pyccl_dtype_size(dtype), dtype, op, choose(kernel, inputs)};
    const size_t block = inputs <= 2 ? SIZE_MAX : BLOCK_BYTES / f.element_bytes; /* two inputs need no partial result */
    const float_mode mode = float_mode_get();
    float_mode_set(FLOAT_MODE_DEFAULT);
    for (size_t first = 0; first < count;) {
        const size_t part = count - first < block ? count - first : block;
        fold_block(&f, first, part, out);
        first += part;
    }
    float_mode_set(mode);
    return PYCCL_OK;
}

pyccl_status pyccl_reduce(uint8_t dtype, uint8_t op, const void *const *in, size_t inputs, size_t count, void *out) {
    const reduce_kernel kernel = reduce_kernel_supported(REDUCE_AVX2) ? REDUCE_AVX2 : REDUCE_BASELINE;
    return reduce_with(kernel, dtype, op, in, inputs, count, out);
}
