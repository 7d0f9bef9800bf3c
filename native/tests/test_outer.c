/* test_outer.c: the outer step rounds every product and sum by itself, in IEEE mode. */
#include <float.h>
#include <stdbool.h>

#include "pyccl.h"
#include "test.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#define COUNT 1003

static float volatile product, sum; /* volatile: nothing is fused, whatever the flags */

static float times(float a, float b) { return product = a * b; }
static float plus(float a, float b) { return sum = a + b; }

static void draw(uint64_t *seed, float *x, size_t count) {
    for (size_t i = 0; i < count; i++) x[i] = (float)((double)(test_random(seed) % 2000003) / 1000001.0 - 1.0);
}

TEST(outer_every_operation_is_rounded_by_itself) {
    uint64_t seed = test_seed();
    static float theta[COUNT], b[COUNT], g[COUNT], want[COUNT], kept[COUNT];
    const float lr = 0.7f, mu = 0.9f;
    for (int kind = 0; kind < 3; kind++) { /* SGD, heavy-ball, Nesterov */
        draw(&seed, theta, COUNT);
        draw(&seed, b, COUNT);
        draw(&seed, g, COUNT);
        for (size_t i = 0; i < COUNT; i++) {
            kept[i] = kind == 0 ? b[i] : plus(times(mu, b[i]), g[i]);
            const float d = kind == 0 ? g[i] : kind == 1 ? kept[i] : plus(g[i], times(mu, kept[i]));
            want[i] = plus(theta[i], -times(lr, d));
        }
        CHECK_EQ(pyccl_outer_sgd(PYCCL_FLOAT32, theta, kind == 0 ? NULL : b, g, COUNT, 0.7, 0.9, kind == 2), PYCCL_OK);
        CHECK(memcmp(theta, want, sizeof theta) == 0 && memcmp(b, kept, sizeof b) == 0);
    }
}

TEST(outer_float64_and_no_other_dtype) {
    double theta[2] = {1.0, 1.0}, b[2] = {0.0, 0.0};
    const double g[2] = {0.4, 0.4};
    CHECK_EQ(pyccl_outer_sgd(PYCCL_FLOAT64, theta, b, g, 2, 0.7, 0.9, 1), PYCCL_OK);
    CHECK(theta[0] > 0.468 - 1e-12 && theta[0] < 0.468 + 1e-12 && theta[1] == theta[0]);
    CHECK_EQ(pyccl_outer_sgd(PYCCL_FLOAT16, theta, b, g, 2, 0.7, 0.9, 1), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_outer_sgd(PYCCL_INT32, theta, b, g, 2, 0.7, 0.9, 1), PYCCL_ERR_ARGUMENT);
}

TEST(outer_difference_of_any_length_and_place) {
    const size_t counts[] = {0, 1, 5, 1000, (1 << 20) - 1, 1 << 20, (1 << 20) + 7};
    uint64_t seed = test_seed();
    const size_t most = (1 << 20) + 16;
    float *a = malloc(3 * most * sizeof *a);
    REQUIRE(a != NULL);
    float *b = a + most, *out = b + most;
    draw(&seed, a, 2 * most);
    for (size_t c = 0; c < sizeof counts / sizeof *counts; c++)
        for (size_t at = 0; at < 5; at++) {
            const size_t n = counts[c];
            bool right = true;
            out[at + n] = 7.0f;
            pyccl_difference(a + at, b + 1, n, out + at);
            for (size_t i = 0; i < n; i++) right &= out[at + i] == plus(a[at + i], -b[1 + i]);
            CHECK(right && out[at + n] == 7.0f);
        }
    free(a);
}

TEST(outer_eager_rounds_every_operation_by_itself) {
    uint64_t seed = test_seed();
    static float late[COUNT], g[COUNT], before[COUNT], want[COUNT];
    static float volatile quotient;
    draw(&seed, late, COUNT);
    draw(&seed, g, COUNT);
    draw(&seed, before, COUNT);
    for (size_t i = 0; i < COUNT; i++) {
        quotient = plus(g[i], -before[i]) / 3.0f;
        want[i] = plus(late[i], quotient);
    }
    CHECK_EQ(pyccl_eager(PYCCL_FLOAT32, late, g, before, COUNT, 3), PYCCL_OK);
    CHECK(memcmp(late, want, sizeof late) == 0);
    double wide[1] = {1.0};
    const double mine[1] = {0.75}, mine_before[1] = {0.25};
    CHECK_EQ(pyccl_eager(PYCCL_FLOAT64, wide, mine, mine_before, 1, 2), PYCCL_OK);
    CHECK(wide[0] == 1.25);
    CHECK_EQ(pyccl_eager(PYCCL_FLOAT16, late, g, before, 1, 2), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_eager(PYCCL_FLOAT32, late, g, before, 1, 0), PYCCL_ERR_ARGUMENT);
}

#if defined(__x86_64__)
TEST(outer_keeps_denormals_in_a_thread_that_flushes_them) {
    float theta[1] = {0.0f}, b[1] = {0.0f};
    const float g[1] = {FLT_MIN};
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040u); /* flush to zero, denormals are zero */
    CHECK_EQ(pyccl_outer_sgd(PYCCL_FLOAT32, theta, b, g, 1, 0.25, 0.5, 0), PYCCL_OK);
    CHECK((_mm_getcsr() & 0x8040u) == 0x8040u);
    _mm_setcsr(before);
    CHECK(theta[0] == -FLT_MIN / 4 && b[0] == FLT_MIN);
}
#endif
