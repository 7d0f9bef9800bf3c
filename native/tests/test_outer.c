/* test_outer.c: the rules round every product and sum by itself, in IEEE mode. */
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

TEST(outer_mix_rounds_every_operation_by_itself) {
    uint64_t seed = test_seed();
    static float live[COUNT], theta[COUNT], want[COUNT];
    draw(&seed, live, COUNT);
    draw(&seed, theta, COUNT);
    for (size_t i = 0; i < COUNT; i++) want[i] = plus(times(0.3f, live[i]), times((float)(1.0 - 0.3), theta[i]));
    CHECK_EQ(pyccl_mix(PYCCL_FLOAT32, live, theta, COUNT, 0.3), PYCCL_OK);
    CHECK(memcmp(live, want, sizeof live) == 0);
    theta[0] = -0.0f;
    CHECK_EQ(pyccl_mix(PYCCL_FLOAT32, live, theta, COUNT, 0.0), PYCCL_OK);
    CHECK(memcmp(live, theta, sizeof live) == 0);
    double wide[2] = {1.0, 2.0};
    const double other[2] = {3.0, -0.0};
    CHECK_EQ(pyccl_mix(PYCCL_FLOAT64, wide, other, 2, 0.25), PYCCL_OK);
    CHECK(wide[0] == 2.5 && wide[1] == 0.5);
    CHECK_EQ(pyccl_mix(PYCCL_FLOAT64, wide, other, 2, 0.0), PYCCL_OK);
    CHECK(memcmp(wide, other, sizeof wide) == 0);
    CHECK_EQ(pyccl_mix(PYCCL_BFLOAT16, live, theta, 1, 0.0), PYCCL_ERR_ARGUMENT);
}

TEST(outer_gossip_rounds_every_operation_by_itself_and_adds_in_order) {
    enum { MEMBERS_MAX = 5 };
    uint64_t seed = test_seed();
    static float moved[MEMBERS_MAX][COUNT], phis[MEMBERS_MAX][COUNT], v[COUNT], want[COUNT], want_v[COUNT];
    static float volatile mean;
    const void *moves[MEMBERS_MAX], *slow[MEMBERS_MAX];
    for (size_t m = 0; m < MEMBERS_MAX; m++) moves[m] = moved[m], slow[m] = phis[m];
    for (uint32_t members = 1; members <= MEMBERS_MAX; members++) {
        for (size_t m = 0; m < members; m++) {
            draw(&seed, moved[m], COUNT);
            draw(&seed, phis[m], COUNT);
        }
        draw(&seed, v, COUNT);
        float *phi = phis[members / 2];
        for (size_t i = 0; i < COUNT; i++) {
            float total = moved[0][i], slow_total = phis[0][i];
            for (size_t m = 1; m < members; m++) total = plus(total, moved[m][i]), slow_total = plus(slow_total, phis[m][i]);
            want_v[i] = plus(times(0.5f, v[i]), times((float)(0.7 / members), total));
            mean = slow_total / (float)members;
            if (members > 1) want_v[i] = plus(want_v[i], -times(0.6f, plus(phi[i], -mean)));
            want[i] = plus(phi[i], want_v[i]);
        }
        CHECK_EQ(pyccl_gossip(PYCCL_FLOAT32, phi, v, moves, slow, members, COUNT, 0.5, 0.7, 0.6), PYCCL_OK);
        CHECK(memcmp(phi, want, sizeof want) == 0 && memcmp(v, want_v, sizeof v) == 0);
    }
    double phi[1] = {1.0}, momentum[1] = {0.0};
    const double mine[1] = {-0.2}, theirs[1] = {-0.4}, other[1] = {3.0};
    const void *wide[2] = {mine, theirs}, *wide_slow[2] = {phi, other};
    CHECK_EQ(pyccl_gossip(PYCCL_FLOAT64, phi, momentum, wide, wide_slow, 2, 1, 0.5, 0.7, 0.7), PYCCL_OK);
    CHECK(phi[0] > 1.49 - 1e-12 && phi[0] < 1.49 + 1e-12 && momentum[0] > 0.49 - 1e-12 && momentum[0] < 0.49 + 1e-12);
    CHECK_EQ(pyccl_gossip(PYCCL_FLOAT16, v, v, moves, slow, 1, 1, 0.5, 0.7, 0.7), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_gossip(PYCCL_FLOAT32, v, v, moves, slow, 0, 1, 0.5, 0.7, 0.7), PYCCL_ERR_ARGUMENT);
}

#if defined(__x86_64__)
TEST(outer_keeps_denormals_in_a_thread_that_flushes_them) {
    float theta[1] = {0.0f}, b[1] = {0.0f};
    const float g[1] = {FLT_MIN};
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040u); /* flush to zero, denormals are zero */
    CHECK_EQ(pyccl_outer_sgd(PYCCL_FLOAT32, theta, b, g, 1, 0.25, 0.5, 0), PYCCL_OK);
    float live[1] = {0.0f}, phi[1] = {0.0f}, v[1] = {0.0f};
    const void *const moved[1] = {g}, *const phis[1] = {phi};
    CHECK_EQ(pyccl_mix(PYCCL_FLOAT32, live, g, 1, 0.75), PYCCL_OK);
    CHECK_EQ(pyccl_gossip(PYCCL_FLOAT32, phi, v, moved, phis, 1, 1, 0.5, 0.25, 0.5), PYCCL_OK);
    CHECK((_mm_getcsr() & 0x8040u) == 0x8040u);
    _mm_setcsr(before);
    CHECK(theta[0] == -FLT_MIN / 4 && b[0] == FLT_MIN);
    CHECK(live[0] == FLT_MIN / 4 && phi[0] == FLT_MIN / 4 && v[0] == FLT_MIN / 4);
}
#endif
