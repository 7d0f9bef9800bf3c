/* test_guard.c: magnitudes and sums of squares: what plain loops say, and the same bits from every kernel. */
#include <float.h>
#include <math.h>

#include "element.h"
#include "guard.h"
#include "pyccl.h"
#include "test.h"

#define COUNT 1031

static const uint8_t DTYPES[] = {PYCCL_FLOAT16, PYCCL_BFLOAT16, PYCCL_FLOAT32, PYCCL_FLOAT64};
enum { DTYPE_COUNT = sizeof DTYPES / sizeof *DTYPES };

static void put_number(uint8_t dtype, void *array, size_t i, double x) {
    switch (dtype) {
    case PYCCL_FLOAT16: ((u16 *)array)[i] = f16_from_f32((float)x); break;
    case PYCCL_BFLOAT16: ((u16 *)array)[i] = bf16_from_f32((float)x); break;
    case PYCCL_FLOAT32: ((f32 *)array)[i] = (float)x; break;
    default: ((f64 *)array)[i] = x;
    }
}

static double number_at(uint8_t dtype, const void *array, size_t i) {
    switch (dtype) {
    case PYCCL_FLOAT16: return (double)f32_from_f16(((const u16 *)array)[i]);
    case PYCCL_BFLOAT16: return (double)f32_from_bf16(((const u16 *)array)[i]);
    case PYCCL_FLOAT32: return (double)((const f32 *)array)[i];
    default: return ((const f64 *)array)[i];
    }
}

static void draw(uint8_t dtype, void *array, size_t count, uint64_t *rng) {
    for (size_t i = 0; i < count; i++) {
        const int small = (int)(test_random(rng) % 40);
        put_number(dtype, array, i, ((double)(test_random(rng) >> 12) * 0x1p-52 - 0.5) * ldexp(1, 8 - small)); /* denormals of float16, too */
    }
}

static bool same_bits(double a, double b) { return memcmp(&a, &b, sizeof a) == 0; }

TEST(guard_peak_and_squares_are_those_of_plain_loops) {
    uint64_t rng = test_seed();
    static uint8_t memory[COUNT * 8 + 8];
    for (size_t d = 0; d < DTYPE_COUNT; d++)
        for (size_t count = 0; count <= COUNT; count = count * 2 + 1) {
            double peak = 0, squares = 0, lane[GUARD_LANES] = {0}, want_peak, want;
            uint8_t *x = memory + count % 3; /* any alignment */
            draw(DTYPES[d], x, count, &rng);
            for (size_t i = 0; i < count; i++) {
                const double number = number_at(DTYPES[d], x, i);
                peak = fmax(peak, fabs(number));
                lane[i % GUARD_LANES] += number * number;
            }
            for (int width = GUARD_LANES / 2; width > 0; width /= 2)
                for (int i = 0; i < width; i++) lane[i] += lane[i + width];
            squares = lane[0];
            CHECK_EQ(pyccl_magnitude(DTYPES[d], x, count, &want_peak, &want), PYCCL_OK);
            CHECK(same_bits(peak, want_peak));
            CHECK(same_bits(squares, want));
        }
}

TEST(guard_kernels_give_the_same_bits) {
    uint64_t rng = test_seed();
    static uint8_t x[COUNT * 8];
    for (size_t d = 0; d < DTYPE_COUNT; d++) {
        draw(DTYPES[d], x, COUNT, &rng);
        for (kernel k = KERNEL_SCALAR; k < KERNEL_COUNT; k++) {
            if (!kernel_supported(k)) continue;
            CHECK(same_bits(guard_peak(k, DTYPES[d], x, COUNT), guard_peak(KERNEL_SCALAR, DTYPES[d], x, COUNT)));
            CHECK(same_bits(guard_squares(k, DTYPES[d], x, COUNT), guard_squares(KERNEL_SCALAR, DTYPES[d], x, COUNT)));
        }
    }
}

TEST(guard_sees_one_nan_or_infinity_wherever_it_stands) {
    uint64_t rng = test_seed();
    static uint8_t x[COUNT * 8];
    static const double bad[] = {INFINITY, -INFINITY, NAN, -NAN};
    for (size_t d = 0; d < DTYPE_COUNT; d++)
        for (size_t at = 0; at < COUNT; at += 1 + at / 8)
            for (size_t b = 0; b < sizeof bad / sizeof *bad; b++)
                for (kernel k = KERNEL_SCALAR; k < KERNEL_COUNT; k++) {
                    if (!kernel_supported(k)) continue;
                    draw(DTYPES[d], x, COUNT, &rng);
                    CHECK(isfinite(guard_peak(k, DTYPES[d], x, COUNT)));
                    put_number(DTYPES[d], x, at, bad[b]);
                    const double peak = guard_peak(k, DTYPES[d], x, COUNT);
                    CHECK(isnan(bad[b]) ? isnan(peak) : isinf(peak));
                }
}

TEST(guard_squares_of_the_greatest_and_the_least_numbers_do_not_lose_themselves) {
    float x[3] = {FLT_MAX, FLT_TRUE_MIN, -FLT_MAX};
    double peak, squares;
    CHECK_EQ(pyccl_magnitude(PYCCL_FLOAT32, x, 3, &peak, &squares), PYCCL_OK);
    CHECK(same_bits(peak, (double)FLT_MAX) && same_bits(squares, 2 * (double)FLT_MAX * (double)FLT_MAX));
    CHECK_EQ(pyccl_magnitude(PYCCL_FLOAT32, x + 1, 1, &peak, &squares), PYCCL_OK);
    CHECK(same_bits(squares, 0x1p-298));
    x[1] = INFINITY;
    CHECK_EQ(pyccl_magnitude(PYCCL_FLOAT32, x, 3, &peak, &squares), PYCCL_OK);
    CHECK(isinf(peak) && isnan(squares));
    CHECK_EQ(pyccl_magnitude(PYCCL_INT32, x, 3, &peak, &squares), PYCCL_ERR_ARGUMENT);
}
