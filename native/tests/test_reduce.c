/* Reduce kernels against loops written here from the rules alone: one element at a time, by the bits. */
#include "test.h"

#include <math.h>

#include "element.h"
#include "pyccl.h"
#include "reduce.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INPUTS_MAX 5
#define GUARD 0xA5
#define DTYPE_LAST PYCCL_BFLOAT16

static const char *const OP_NAMES[] = {"?", "sum", "avg", "prod", "min", "max"};

static bool half(uint8_t dtype) { return dtype == PYCCL_FLOAT16 || dtype == PYCCL_BFLOAT16; }
static bool integer(uint8_t dtype) { return !half(dtype) && dtype != PYCCL_FLOAT32 && dtype != PYCCL_FLOAT64; }

/* ---- the reference ---- */

/* A float format by its numbers: value = fraction * 2^(exponent - fraction_bits), exponents from `least` on. */
typedef struct format {
    int fraction_bits, least, bias;
    uint16_t infinity, nan;
} format;

static const format F16 = {10, -14, 15, 0x7c00, 0x7e00}, BF16 = {7, -126, 127, 0x7f80, 0x7fc0};
static const format *format_of(uint8_t dtype) { return dtype == PYCCL_FLOAT16 ? &F16 : &BF16; }

static double half_value(const format *f, uint16_t bits) {
    const int exponent = (bits & 0x7fff) >> f->fraction_bits, fraction = bits & ((1 << f->fraction_bits) - 1);
    double value = ldexp((1 << f->fraction_bits) + fraction, exponent - f->bias - f->fraction_bits);
    if (exponent == 0) value = ldexp(fraction, f->least - f->fraction_bits);
    if ((bits & 0x7fff) == f->infinity) value = INFINITY;
    if ((bits & 0x7fff) > f->infinity) value = NAN;
    return (bits & 0x8000) != 0 ? -value : value;
}

static uint16_t half_nearest(const format *f, double x) {
    if (isnan(x)) return f->nan;
    const uint16_t sign = signbit(x) ? 0x8000 : 0;
    int exponent;
    frexp(x, &exponent); /* x = 0.5..1 * 2^exponent */
    exponent = x == 0 || exponent - 1 < f->least ? f->least : exponent - 1;
    if (isinf(x) || exponent > f->bias) return sign | f->infinity;
    const double steps = nearbyint(ldexp(fabs(x), f->fraction_bits - exponent)); /* ties to even */
    /* One more exponent than the field says is in `steps` itself, also where it rounded up to the next one. */
    const uint32_t bits = (uint32_t)steps + ((uint32_t)(exponent - f->least) << f->fraction_bits);
    return (uint16_t)(sign | (bits < f->infinity ? bits : f->infinity));
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

static uint64_t pair_integer(uint8_t op, bool is_signed, uint64_t x, uint64_t y) { /* both extended to 64 bits */
    switch (op) {
    case PYCCL_SUM: return x + y;
    case PYCCL_PROD: return x * y;
    case PYCCL_MIN: return is_signed ? ((int64_t)x < (int64_t)y ? x : y) : (x < y ? x : y);
    default: return is_signed ? ((int64_t)x > (int64_t)y ? x : y) : (x > y ? x : y);
    }
}

static bool is_signed(uint8_t dtype) {
    return dtype == PYCCL_INT8 || dtype == PYCCL_INT16 || dtype == PYCCL_INT32 || dtype == PYCCL_INT64;
}

static uint64_t extend(uint8_t dtype, uint64_t bits) {
    const unsigned unused = 64 - 8 * (unsigned)pyccl_dtype_size(dtype);
    bits <<= unused;
    return is_signed(dtype) ? (uint64_t)((int64_t)bits >> unused) : bits >> unused;
}

static uint64_t load(uint8_t dtype, const void *data, size_t i) {
    uint64_t bits = 0;
    memcpy(&bits, (const uint8_t *)data + pyccl_dtype_size(dtype) * i, pyccl_dtype_size(dtype));
    return extend(dtype, bits);
}

typedef struct fold_case {
    uint8_t dtype, op;
    const double *weights; /* or NULL */
    size_t inputs;
} fold_case;

static double total_weight(const fold_case *c) {
    double total = 0;
    for (size_t k = 0; k < c->inputs; k++) total += c->weights == NULL ? 1.0 : c->weights[k];
    return total;
}

static float load_float(uint8_t dtype, const void *data, size_t i) {
    const uint64_t bits = load(dtype, data, i);
    const uint32_t low = (uint32_t)bits;
    float x;
    memcpy(&x, &low, sizeof x);
    return half(dtype) ? (float)half_value(format_of(dtype), (uint16_t)bits) : x;
}

static uint64_t expect_narrow(const fold_case *c, const void *const *in, size_t i) { /* accumulates in float32 */
    volatile float total = 0;
    for (size_t k = 0; k < c->inputs; k++) {
        volatile float x = load_float(c->dtype, in[k], i);
        if (c->weights != NULL) x = x * (float)c->weights[k];
        total = k == 0 ? x : pair_f32(c->op, total, x);
    }
    if (c->op == PYCCL_AVG) total = total / (float)total_weight(c);
    if (half(c->dtype)) return half_nearest(format_of(c->dtype), total);
    return isnan(total) ? 0x7fc00000u : f32_bits(total);
}

static uint64_t expect_f64(const fold_case *c, const void *const *in, size_t i) {
    volatile double total = 0;
    for (size_t k = 0; k < c->inputs; k++) {
        double given;
        memcpy(&given, (const uint8_t *)in[k] + 8 * i, 8);
        volatile double x = given;
        if (c->weights != NULL) x = x * c->weights[k];
        total = k == 0 ? x : pair_f64(c->op, total, x);
    }
    if (c->op == PYCCL_AVG) total = total / total_weight(c);
    return isnan(total) ? UINT64_C(0x7ff8000000000000) : f64_bits(total);
}

static uint64_t expect_integer(const fold_case *c, const void *const *in, size_t i) {
    uint64_t total = load(c->dtype, in[0], i);
    for (size_t k = 1; k < c->inputs; k++)
        total = extend(c->dtype, pair_integer(c->op, is_signed(c->dtype), total, load(c->dtype, in[k], i)));
    return total;
}

static void expect_into(uint8_t *out, const fold_case *c, const void *const *in, size_t count) {
    const size_t size = pyccl_dtype_size(c->dtype);
    for (size_t i = 0; i < count; i++) {
        const uint64_t bits = integer(c->dtype)            ? expect_integer(c, in, i)
                              : c->dtype == PYCCL_FLOAT64 ? expect_f64(c, in, i)
                                                          : expect_narrow(c, in, i);
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
                                        UINT64_C(0x8000000000000000), 2, 3, 0x7f, 0x80, 0x7fff, 0x8000, 0xff, 0xffff};
    static const uint16_t F16S[] = {0, 0x8000, 1, 0x8001, 0x03ff, 0x0400, 0x3c00, 0xbc00, 0x7bff, 0xfbff, 0x7c00, 0xfc00,
                                    0x7e00, 0xfe00, 0x7c01, 0xfdff, 0x3c01, 0x6400, 0x1400, 0x3bff};
    static const uint16_t BF16S[] = {0, 0x8000, 1, 0x8001, 0x007f, 0x0080, 0x3f80, 0xbf80, 0x7f7f, 0xff7f, 0x7f80, 0xff80,
                                     0x7fc0, 0xffc0, 0x7f81, 0xffbf, 0x3f81, 0x4300, 0x3b80, 0x3f7f};
    const uint64_t draw = test_random(state);
    if (draw % 3 == 0) return test_random(state); /* any bits */
    if (half(dtype) && draw % 3 == 1) return half_nearest(format_of(dtype), (double)(draw >> 40) / 7e5 - 12.0);
    if (dtype == PYCCL_FLOAT16) return F16S[(draw >> 8) % (sizeof F16S / sizeof *F16S)];
    if (dtype == PYCCL_BFLOAT16) return BF16S[(draw >> 8) % (sizeof BF16S / sizeof *BF16S)];
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
static void check_once(arrays *a, kernel k, const fold_case *c, uint8_t *out_block) {
    uint8_t *saved = malloc(a->bytes + a->skew + 1), *out = out_block + a->skew;
    REQUIRE(saved != NULL);
    memcpy(saved, out_block, a->bytes + a->skew + 1);
    out[a->bytes] = GUARD;
    CHECK_EQ(reduce_with(k, a->dtype, c->op, a->in, c->weights, c->inputs, a->count, out), PYCCL_OK);
    const bool same = memcmp(out, a->want, a->bytes) == 0;
    CHECK(same);
    CHECK_EQ(out[a->bytes], GUARD);
    if (!same) {
        size_t i = 0;
        while (load(a->dtype, out, i) == load(a->dtype, a->want, i)) i++;
        printf("    %s dtype %d op %s inputs %zu weights %d count %zu in place %d, element %zu: got %llx, want %llx\n",
               kernel_name(k), a->dtype, OP_NAMES[c->op], c->inputs, c->weights != NULL, a->count, out_block != a->out_block, i,
               (unsigned long long)load(a->dtype, out, i), (unsigned long long)load(a->dtype, a->want, i));
    }
    memcpy(out_block, saved, a->bytes + a->skew + 1);
    free(saved);
}

static void check_case(arrays *a, const fold_case *c) {
    expect_into(a->want, c, a->in, a->count);
    for (kernel k = KERNEL_SCALAR; k < KERNEL_COUNT; k++) {
        if (!kernel_supported(k)) continue;
        memset(a->out_block, 0, a->bytes + a->skew + 1);
        check_once(a, k, c, a->out_block);
        for (size_t i = 0; i < c->inputs; i++) check_once(a, k, c, a->block[i]);
    }
}

static void check_count(uint8_t dtype, size_t count, size_t skew, uint64_t *state) {
    static const double ONES[INPUTS_MAX] = {1, 1, 1, 1, 1};
    double weights[INPUTS_MAX];
    arrays a = arrays_new(dtype, count, skew, state);
    for (size_t k = 0; k < INPUTS_MAX; k++) weights[k] = (double)(test_random(state) % 1000 + 1) / 129.0;
    weights[test_random(state) % (INPUTS_MAX - 1) + 1] = 0;
    for (size_t inputs = 1; inputs <= INPUTS_MAX; inputs++) {
        for (uint8_t op = PYCCL_SUM; op <= PYCCL_MAX; op++)
            if (!integer(dtype) || op != PYCCL_AVG) check_case(&a, &(fold_case){dtype, op, NULL, inputs});
        if (integer(dtype)) continue;
        check_case(&a, &(fold_case){dtype, PYCCL_AVG, ONES, inputs});
        check_case(&a, &(fold_case){dtype, PYCCL_AVG, weights, inputs});
    }
    arrays_free(&a);
}

TEST(reduce_equals_reference_for_every_dtype_op_and_alias) {
    uint64_t state = test_seed();
    const size_t counts[] = {0, 1, 2, 3, 7, 8, 9, 31, 64, 100, 2047, 4097, 9001};
    for (uint8_t dtype = PYCCL_INT32; dtype <= DTYPE_LAST; dtype++)
        for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) check_count(dtype, counts[i], 0, &state);
}

TEST(reduce_accepts_arrays_of_any_alignment) {
    uint64_t state = test_seed();
    for (uint8_t dtype = PYCCL_INT32; dtype <= DTYPE_LAST; dtype++)
        for (size_t skew = 1; skew < 16; skew += 2) check_count(dtype, 77, skew, &state);
}

TEST(reduce_public_function_gives_the_kernels_bytes) {
    uint64_t state = test_seed();
    arrays a = arrays_new(PYCCL_FLOAT32, 5000, 0, &state);
    expect_into(a.want, &(fold_case){PYCCL_FLOAT32, PYCCL_AVG, NULL, 3}, a.in, a.count);
    CHECK_EQ(pyccl_reduce(PYCCL_FLOAT32, PYCCL_AVG, a.in, NULL, 3, a.count, a.out_block), PYCCL_OK);
    CHECK(memcmp(a.out_block, a.want, a.bytes) == 0);
    arrays_free(&a);
}

TEST(reduce_of_weights_one_gives_the_bytes_of_no_weights) {
    uint64_t state = test_seed();
    const double ones[INPUTS_MAX] = {1, 1, 1, 1, 1};
    for (uint8_t dtype = PYCCL_FLOAT32; dtype <= DTYPE_LAST; dtype++) {
        if (integer(dtype)) continue;
        arrays a = arrays_new(dtype, 5003, 1, &state);
        for (size_t inputs = 1; inputs <= INPUTS_MAX; inputs++) {
            CHECK_EQ(pyccl_reduce(dtype, PYCCL_AVG, a.in, NULL, inputs, a.count, a.want), PYCCL_OK);
            CHECK_EQ(pyccl_reduce(dtype, PYCCL_AVG, a.in, ones, inputs, a.count, a.out_block), PYCCL_OK);
            CHECK(memcmp(a.out_block, a.want, a.bytes) == 0);
        }
        arrays_free(&a);
    }
}

/* Every float16 and bfloat16: one input is a copy whose NaNs are canonical; and 2^20 floats rounded. */
TEST(reduce_widens_every_half_exactly_and_rounds_it_back) {
    uint16_t in[1 << 16], out[1 << 16];
    for (uint32_t i = 0; i < 1 << 16; i++) in[i] = (uint16_t)i;
    const void *inputs[] = {in};
    for (uint8_t dtype = PYCCL_FLOAT16; dtype <= PYCCL_BFLOAT16; dtype++) {
        const format *f = format_of(dtype);
        for (kernel k = KERNEL_SCALAR; k < KERNEL_COUNT; k++) {
            if (!kernel_supported(k)) continue;
            CHECK_EQ(reduce_with(k, dtype, PYCCL_SUM, inputs, NULL, 1, 1 << 16, out), PYCCL_OK);
            for (uint32_t i = 0; i < 1 << 16; i++) {
                const bool nan = (i & 0x7fff) > f->infinity;
                if (out[i] != (nan ? f->nan : i)) CHECK_EQ(out[i], i);
            }
        }
        for (uint32_t i = 0; i < 1 << 16; i++) {
            const double value = half_value(f, (uint16_t)i), ours = dtype == PYCCL_FLOAT16 ? f32_from_f16((uint16_t)i) : f32_from_bf16((uint16_t)i);
            CHECK(isnan(value) ? isnan(ours) : f64_bits(value) == f64_bits(ours));
        }
    }
}

TEST(half_rounding_is_to_the_nearest_and_to_even) {
    uint64_t state = test_seed();
    for (uint32_t i = 0; i < 1 << 21; i++) {
        uint32_t bits = (uint32_t)test_random(&state); /* any float; every second one near float16's middles */
        if (i % 2 == 0) bits = (bits & 0x80000000) | ((102u + bits % 42) << 23) | (bits >> 3 & 0x7fe000) | (0xfff + i / 2 % 3);
        const float x = f32_of(bits);
        if (f16_from_f32(x) != half_nearest(&F16, x)) CHECK_EQ(f16_from_f32(x), half_nearest(&F16, x));
        if (bf16_from_f32(x) != half_nearest(&BF16, x)) CHECK_EQ(bf16_from_f32(x), half_nearest(&BF16, x));
    }
}

TEST(reduce_multiplies_and_adds_without_fusing) {
    /* Each step rounds by itself, left to right. */
    const float third[1] = {1.0f / 3.0f}, three[1] = {3.0f}, big[1] = {16777216.0f}, one[1] = {1.0f};
    const void *product[] = {three, third}, *sum[] = {big, one, one};
    float out[1];
    CHECK_EQ(pyccl_reduce(PYCCL_FLOAT32, PYCCL_PROD, product, NULL, 2, 1, out), PYCCL_OK);
    CHECK(f32_bits(out[0]) == 0x3f800000);
    CHECK_EQ(pyccl_reduce(PYCCL_FLOAT32, PYCCL_SUM, sum, NULL, 3, 1, out), PYCCL_OK);
    CHECK(out[0] == 16777216.0f); /* left to right: each 1 is lost; from the right they would not be */
}

TEST(reduce_min_orders_negative_zero_below_positive_zero) {
    const double plus[2] = {0.0, -0.0}, minus[2] = {-0.0, 0.0};
    const void *in[] = {plus, minus};
    double out[2];
    CHECK_EQ(pyccl_reduce(PYCCL_FLOAT64, PYCCL_MIN, in, NULL, 2, 2, out), PYCCL_OK);
    CHECK(signbit(out[0]) && signbit(out[1]));
    CHECK_EQ(pyccl_reduce(PYCCL_FLOAT64, PYCCL_MAX, in, NULL, 2, 2, out), PYCCL_OK);
    CHECK(!signbit(out[0]) && !signbit(out[1]));
}

TEST(reduce_refuses_what_cannot_be_reduced) {
    int64_t x[1] = {5}, out[1] = {7};
    const void *in[] = {x, x};
    CHECK_EQ(pyccl_reduce(PYCCL_INT32, PYCCL_AVG, in, NULL, 2, 1, out), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_reduce(PYCCL_INT64, PYCCL_AVG, in, NULL, 2, 1, out), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_reduce(PYCCL_UINT8, PYCCL_AVG, in, NULL, 2, 1, out), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_reduce(0, PYCCL_SUM, in, NULL, 2, 1, out), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_reduce(DTYPE_LAST + 1, PYCCL_SUM, in, NULL, 2, 1, out), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_reduce(PYCCL_INT64, 0, in, NULL, 2, 1, out), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_reduce(PYCCL_INT64, 6, in, NULL, 2, 1, out), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_reduce(PYCCL_INT64, PYCCL_SUM, in, NULL, 0, 1, out), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(out[0], 7);
}

TEST(reduce_refuses_weights_that_mean_nothing) {
    const float x[1] = {1};
    const void *in[] = {x, x};
    const double bad[][2] = {{1, -1}, {-0.5, 2}, {NAN, 1}, {1, INFINITY}, {0, 0}, {0, 1e-60}, {1e39, 1}, {3e38, 3e38}};
    float out[1] = {7};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        CHECK_EQ(pyccl_reduce(PYCCL_FLOAT32, PYCCL_AVG, in, bad[i], 2, 1, out), PYCCL_ERR_ARGUMENT);
        CHECK_EQ(pyccl_reduce(PYCCL_BFLOAT16, PYCCL_AVG, NULL, bad[i], 2, 0, NULL), PYCCL_ERR_ARGUMENT);
    }
    const double good[2] = {1, 1};
    CHECK_EQ(pyccl_reduce(PYCCL_FLOAT32, PYCCL_SUM, in, good, 2, 1, out), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_reduce(PYCCL_INT32, PYCCL_SUM, in, good, 2, 1, out), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_reduce(PYCCL_FLOAT64, PYCCL_AVG, NULL, bad[6], 2, 0, NULL), PYCCL_OK); /* float64 has room for it */
    CHECK(out[0] == 7);
}

TEST(dtype_sizes_are_those_of_numpy) {
    const size_t sizes[] = {0, 4, 8, 4, 8, 1, 1, 2, 2, 4, 8, 2, 2, 0};
    for (uint8_t dtype = 0; dtype < 14; dtype++) CHECK_EQ(pyccl_dtype_size(dtype), sizes[dtype]);
    CHECK_EQ(pyccl_dtype_size(255), 0);
}

#if defined(__x86_64__)
TEST(reduce_ignores_and_keeps_the_callers_flush_to_zero_mode) {
    const uint32_t denormal[1] = {0x00000003};
    const void *in[] = {denormal, denormal};
    uint32_t out[1] = {0};
    const unsigned before = _mm_getcsr(), flushing = before | 0x8040; /* FTZ and DAZ, as -ffast-math programs set them */
    _mm_setcsr(flushing);
    const pyccl_status rc = pyccl_reduce(PYCCL_FLOAT32, PYCCL_SUM, in, NULL, 2, 1, out);
    const unsigned after = _mm_getcsr();
    _mm_setcsr(before);
    CHECK_EQ(rc, PYCCL_OK);
    CHECK_EQ(out[0], 6);
    CHECK_EQ(after & 0xffc0, flushing & 0xffc0);
}
#endif
