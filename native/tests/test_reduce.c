/* Reduce kernels against loops written here from the rules alone: one element at a time, by the bits. */
#include "test.h"

#include <math.h>

#include "pyccl.h"
#include "reduce.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INPUTS_MAX 5
#define GUARD 0xA5

static const char *const OP_NAMES[] = {"?", "sum", "avg", "prod", "min", "max"};

/* ---- the reference ---- */

static uint32_t f32_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static uint64_t f64_bits(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static int compare_f64(double x, double y) { /* with -0 below +0; neither is NaN */
    if (x != y) return x < y ? -1 : 1;
    return (signbit(y) != 0) - (signbit(x) != 0);
}

static float pair_f32(uint8_t op, float x, float y) {
    volatile float result; /* rounded to float after each operation, whatever the compiler */
    if (op == PYCCL_SUM || op == PYCCL_AVG) {
        result = x + y;
    } else if (op == PYCCL_PROD) {
        result = x * y;
    } else if (isnan(x) || isnan(y)) {
        result = NAN;
    } else {
        result = (compare_f64(x, y) <= 0) == (op == PYCCL_MIN) ? x : y;
    }
    return result;
}

static double pair_f64(uint8_t op, double x, double y) {
    volatile double result;
    if (op == PYCCL_SUM || op == PYCCL_AVG) {
        result = x + y;
    } else if (op == PYCCL_PROD) {
        result = x * y;
    } else if (isnan(x) || isnan(y)) {
        result = NAN;
    } else {
        result = (compare_f64(x, y) <= 0) == (op == PYCCL_MIN) ? x : y;
    }
    return result;
}

static uint64_t pair_integer(uint8_t op, uint64_t x, uint64_t y) { /* both sign-extended; the caller cuts to size */
    switch (op) {
    case PYCCL_SUM: return x + y;
    case PYCCL_PROD: return x * y;
    case PYCCL_MIN: return (int64_t)x < (int64_t)y ? x : y;
    default: return (int64_t)x > (int64_t)y ? x : y;
    }
}

static uint64_t load(uint8_t dtype, const void *data, size_t i) {
    int32_t narrow;
    uint64_t wide;
    if (pyccl_dtype_size(dtype) == 4) {
        memcpy(&narrow, (const uint8_t *)data + 4 * i, 4);
        return (uint64_t)(int64_t)narrow;
    }
    memcpy(&wide, (const uint8_t *)data + 8 * i, 8);
    return wide;
}

static uint64_t expect_f32(uint8_t op, const void *const *in, size_t inputs, size_t i) {
    float total = 0;
    for (size_t k = 0; k < inputs; k++) {
        float x;
        memcpy(&x, (const uint8_t *)in[k] + 4 * i, 4);
        total = k == 0 ? x : pair_f32(op, total, x);
    }
    if (op == PYCCL_AVG) total = total / (float)inputs;
    return isnan(total) ? 0x7fc00000u : f32_bits(total);
}

static uint64_t expect_f64(uint8_t op, const void *const *in, size_t inputs, size_t i) {
    double total = 0;
    for (size_t k = 0; k < inputs; k++) {
        double x;
        memcpy(&x, (const uint8_t *)in[k] + 8 * i, 8);
        total = k == 0 ? x : pair_f64(op, total, x);
    }
    if (op == PYCCL_AVG) total = total / (double)inputs;
    return isnan(total) ? UINT64_C(0x7ff8000000000000) : f64_bits(total);
}

static void expect_into(uint8_t *out, uint8_t dtype, uint8_t op, const void *const *in, size_t inputs, size_t count) {
    const size_t size = pyccl_dtype_size(dtype);
    for (size_t i = 0; i < count; i++) {
        uint64_t bits = 0;
        if (dtype == PYCCL_FLOAT32) {
            bits = expect_f32(op, in, inputs, i);
        } else if (dtype == PYCCL_FLOAT64) {
            bits = expect_f64(op, in, inputs, i);
        } else {
            for (size_t k = 0; k < inputs; k++) {
                bits = k == 0 ? load(dtype, in[k], i) : pair_integer(op, bits, load(dtype, in[k], i));
                if (size == 4) bits = (uint64_t)(int64_t)(int32_t)(uint32_t)bits;
            }
        }
        memcpy(out + size * i, &bits, size);
    }
}

/* ---- inputs ---- */

static uint64_t awkward(uint8_t dtype, uint64_t *state) {
    static const uint32_t F32[] = {0, 0x80000000, 1, 0x80000001, 0x007fffff, 0x00800000, 0x3f800000, 0xbf800000, 0x7f7fffff,
                                   0xff7fffff, 0x7f800000, 0xff800000, 0x7fc00000, 0xffc00000, 0x7f800001, 0xffbfffff,
                                   0x7fdeadbe, 0x3f800001, 0x4b800000, 0x33800000};
    static const uint64_t F64[] = {0, UINT64_C(0x8000000000000000), 1, UINT64_C(0x8000000000000001),
                                   UINT64_C(0x000fffffffffffff), UINT64_C(0x0010000000000000), UINT64_C(0x3ff0000000000000),
                                   UINT64_C(0xbff0000000000000), UINT64_C(0x7fefffffffffffff), UINT64_C(0xffefffffffffffff),
                                   UINT64_C(0x7ff0000000000000), UINT64_C(0xfff0000000000000), UINT64_C(0x7ff8000000000000),
                                   UINT64_C(0xfff8000000000000), UINT64_C(0x7ff0000000000001), UINT64_C(0xfff7ffffffffffff),
                                   UINT64_C(0x7ffdeadbeefcafe1), UINT64_C(0x3ff0000000000001), UINT64_C(0x4340000000000000)};
    static const uint64_t INTEGERS[] = {0, 1, UINT64_MAX, INT32_MAX, UINT64_C(0xffffffff80000000), INT64_MAX,
                                        UINT64_C(0x8000000000000000), 2, 3};
    const uint64_t draw = test_random(state);
    if (draw % 3 == 0) return test_random(state); /* any bits */
    if (dtype == PYCCL_FLOAT32 && draw % 3 == 1) return f32_bits((float)(int64_t)(draw >> 40) / 7.0f - 9000.0f);
    if (dtype == PYCCL_FLOAT64 && draw % 3 == 1) return f64_bits((double)(draw >> 40) / 7.0 - 9000.0);
    if (dtype == PYCCL_FLOAT32) return F32[(draw >> 8) % (sizeof F32 / sizeof *F32)];
    if (dtype == PYCCL_FLOAT64) return F64[(draw >> 8) % (sizeof F64 / sizeof *F64)];
    return INTEGERS[(draw >> 8) % (sizeof INTEGERS / sizeof *INTEGERS)];
}

typedef struct arrays { /* inputs, result and expectation of one case, each in an allocation of just its size */
    uint8_t dtype;
    size_t count, bytes, skew; /* skew: the arrays start at this offset, aligned or not */
    uint8_t *block[INPUTS_MAX], *out_block, *want;
    const void *in[INPUTS_MAX];
} arrays;

static arrays arrays_new(uint8_t dtype, size_t count, size_t skew, uint64_t *state) {
    arrays a = {.dtype = dtype, .count = count, .bytes = count * pyccl_dtype_size(dtype), .skew = skew};
    for (size_t k = 0; k < INPUTS_MAX; k++) {
        a.block[k] = malloc(a.bytes + skew + 1);
        REQUIRE(a.block[k] != NULL);
        a.in[k] = a.block[k] + skew;
        for (size_t i = 0; i < count; i++) {
            const uint64_t bits = awkward(dtype, state);
            memcpy(a.block[k] + skew + i * pyccl_dtype_size(dtype), &bits, pyccl_dtype_size(dtype));
        }
        a.block[k][skew + a.bytes] = GUARD;
    }
    a.out_block = malloc(a.bytes + skew + 1);
    a.want = malloc(a.bytes + 1);
    REQUIRE(a.out_block != NULL && a.want != NULL);
    return a;
}

static void arrays_free(arrays *a) {
    for (size_t k = 0; k < INPUTS_MAX; k++) free(a->block[k]);
    free(a->out_block);
    free(a->want);
}

/* Reduce into `out`, which may be an input; then give the input its bytes back. */
static void check_once(arrays *a, reduce_kernel kernel, uint8_t op, size_t inputs, uint8_t *out_block) {
    uint8_t *saved = malloc(a->bytes + a->skew + 1), *out = out_block + a->skew;
    REQUIRE(saved != NULL);
    memcpy(saved, out_block, a->bytes + a->skew + 1);
    out[a->bytes] = GUARD;
    CHECK_EQ(reduce_with(kernel, a->dtype, op, a->in, inputs, a->count, out), PYCCL_OK);
    const bool same = memcmp(out, a->want, a->bytes) == 0;
    CHECK(same);
    CHECK_EQ(out[a->bytes], GUARD);
    if (!same) {
        size_t i = 0;
        while (load(a->dtype, out, i) == load(a->dtype, a->want, i)) i++;
        printf("    kernel %d dtype %d op %s inputs %zu count %zu in place %d, element %zu: got %llx, want %llx\n", (int)kernel,
               a->dtype, OP_NAMES[op], inputs, a->count, out_block != a->out_block, i,
               (unsigned long long)load(a->dtype, out, i), (unsigned long long)load(a->dtype, a->want, i));
    }
    memcpy(out_block, saved, a->bytes + a->skew + 1);
    free(saved);
}

static bool integer(uint8_t dtype) { return dtype == PYCCL_INT32 || dtype == PYCCL_INT64; }

static void check_count(uint8_t dtype, size_t count, size_t skew, uint64_t *state) {
    arrays a = arrays_new(dtype, count, skew, state);
    for (uint8_t op = PYCCL_SUM; op <= PYCCL_MAX; op++) {
        if (integer(dtype) && op == PYCCL_AVG) continue;
        for (size_t inputs = 1; inputs <= INPUTS_MAX; inputs++) {
            expect_into(a.want, dtype, op, a.in, inputs, count);
            for (reduce_kernel kernel = REDUCE_BASELINE; kernel <= REDUCE_AVX2; kernel++) {
                if (!reduce_kernel_supported(kernel)) continue;
                memset(a.out_block, 0, a.bytes + skew + 1);
                check_once(&a, kernel, op, inputs, a.out_block);
                for (size_t k = 0; k < inputs; k++) check_once(&a, kernel, op, inputs, a.block[k]);
            }
        }
    }
    arrays_free(&a);
}

TEST(reduce_equals_reference_for_every_dtype_op_and_alias) {
    uint64_t state = test_seed();
    const size_t counts[] = {0, 1, 2, 3, 7, 8, 9, 31, 64, 100, 2047, 2049, 4095, 4096, 4097, 9001};
    for (uint8_t dtype = PYCCL_INT32; dtype <= PYCCL_FLOAT64; dtype++)
        for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) check_count(dtype, counts[i], 0, &state);
}

TEST(reduce_accepts_arrays_of_any_alignment) {
    uint64_t state = test_seed();
    for (uint8_t dtype = PYCCL_INT32; dtype <= PYCCL_FLOAT64; dtype++)
        for (size_t skew = 1; skew < 16; skew += 2) check_count(dtype, 77, skew, &state);
}

TEST(reduce_public_function_gives_the_kernels_bytes) {
    uint64_t state = test_seed();
    arrays a = arrays_new(PYCCL_FLOAT32, 5000, 0, &state);
    expect_into(a.want, PYCCL_FLOAT32, PYCCL_AVG, a.in, 3, a.count);
    CHECK_EQ(pyccl_reduce(PYCCL_FLOAT32, PYCCL_AVG, a.in, 3, a.count, a.out_block), PYCCL_OK);
    CHECK(memcmp(a.out_block, a.want, a.bytes) == 0);
    arrays_free(&a);
}

TEST(reduce_multiplies_and_adds_without_fusing) {
    /* Each step rounds by itself, left to right. */
    const float third[1] = {1.0f / 3.0f}, three[1] = {3.0f}, big[1] = {16777216.0f}, one[1] = {1.0f};
    const void *product[] = {three, third}, *sum[] = {big, one, one};
    float out[1];
    CHECK_EQ(pyccl_reduce(PYCCL_FLOAT32, PYCCL_PROD, product, 2, 1, out), PYCCL_OK);
    CHECK(f32_bits(out[0]) == 0x3f800000);
    CHECK_EQ(pyccl_reduce(PYCCL_FLOAT32, PYCCL_SUM, sum, 3, 1, out), PYCCL_OK);
    CHECK(out[0] == 16777216.0f); /* left to right: each 1 is lost; from the right they would not be */
}

TEST(reduce_min_orders_negative_zero_below_positive_zero) {
    const double plus[2] = {0.0, -0.0}, minus[2] = {-0.0, 0.0};
    const void *in[] = {plus, minus};
    double out[2];
    CHECK_EQ(pyccl_reduce(PYCCL_FLOAT64, PYCCL_MIN, in, 2, 2, out), PYCCL_OK);
    CHECK(signbit(out[0]) && signbit(out[1]));
    CHECK_EQ(pyccl_reduce(PYCCL_FLOAT64, PYCCL_MAX, in, 2, 2, out), PYCCL_OK);
    CHECK(!signbit(out[0]) && !signbit(out[1]));
}

TEST(reduce_refuses_what_cannot_be_reduced) {
    int64_t x[1] = {5}, out[1] = {7};
    const void *in[] = {x, x};
    CHECK_EQ(pyccl_reduce(PYCCL_INT32, PYCCL_AVG, in, 2, 1, out), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_reduce(PYCCL_INT64, PYCCL_AVG, in, 2, 1, out), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_reduce(PYCCL_UINT8, PYCCL_SUM, in, 2, 1, out), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_reduce(0, PYCCL_SUM, in, 2, 1, out), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_reduce(6, PYCCL_SUM, in, 2, 1, out), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_reduce(PYCCL_INT64, 0, in, 2, 1, out), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_reduce(PYCCL_INT64, 6, in, 2, 1, out), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_reduce(PYCCL_INT64, PYCCL_SUM, in, 0, 1, out), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(out[0], 7);
}

TEST(dtype_sizes_are_those_of_numpy) {
    const size_t sizes[] = {0, 4, 8, 4, 8, 1, 0};
    for (uint8_t dtype = 0; dtype < 7; dtype++) CHECK_EQ(pyccl_dtype_size(dtype), sizes[dtype]);
    CHECK_EQ(pyccl_dtype_size(255), 0);
}

#if defined(__x86_64__)
TEST(reduce_ignores_and_keeps_the_callers_flush_to_zero_mode) {
    const uint32_t denormal[1] = {0x00000003};
    const void *in[] = {denormal, denormal};
    uint32_t out[1] = {0};
    const unsigned before = _mm_getcsr(), flushing = before | 0x8040; /* FTZ and DAZ, as -ffast-math programs set them */
    _mm_setcsr(flushing);
    const pyccl_status rc = pyccl_reduce(PYCCL_FLOAT32, PYCCL_SUM, in, 2, 1, out);
    const unsigned after = _mm_getcsr();
    _mm_setcsr(before);
    CHECK_EQ(rc, PYCCL_OK);
    CHECK_EQ(out[0], 6);
    CHECK_EQ(after & 0xffc0, flushing & 0xffc0);
}
#endif
