/* test.h: a harness in one header. A test program includes it once, defines tests and has its main() from here.
 *
 *     TEST(frame_refuses_wrong_magic) { CHECK(decode(bad) == PYCCL_ERR_FRAME); }
 *
 * CHECK goes on after a failure (the first ten of a test are printed), REQUIRE ends the test. A program prints the name
 * of each test that fails and, last, "N passed, M failed"; it exits with 1 if any failed or none ran.
 * Tests that take TEST_SLOW_S or more are named with their time.
 * `test_frame magic` runs the tests whose name contains "magic". TEST_SEED=n repeats a run that printed its seed. */
#ifndef PYCCL_TEST_H
#define PYCCL_TEST_H

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define TEST_SLOW_S 1.0

typedef struct test_case {
    const char *name;
    void (*run)(void);
    struct test_case *next;
} test_case;

static test_case *test_first, **test_end = &test_first;
static unsigned test_failures; /* of the running test */
static jmp_buf test_exit;

#define TEST(test_name)                                                                        \
    static void test_name(void);                                                               \
    __attribute__((constructor)) static void test_name##_register(void) {                      \
        static test_case self = {#test_name, test_name, NULL};                                 \
        *test_end = &self;                                                                     \
        test_end = &self.next;                                                                 \
    }                                                                                          \
    static void test_name(void)

#define CHECK(cond) ((cond) ? (void)0 : test_fail(__FILE__, __LINE__, #cond))
#define REQUIRE(cond) ((cond) ? (void)0 : (test_fail(__FILE__, __LINE__, #cond), longjmp(test_exit, 1)))
/* Integers; both values are printed. */
#define CHECK_EQ(got, want) test_equal(__FILE__, __LINE__, #got " == " #want, (long long)(got), (long long)(want))

__attribute__((unused)) static void test_fail(const char *file, int line, const char *text) {
    if (test_failures++ < 10) printf("  %s:%d: %s\n", file, line, text);
}

__attribute__((unused)) static void test_equal(const char *file, int line, const char *text, long long got, long long want) {
    if (got == want) return;
    test_fail(file, line, text);
    if (test_failures <= 10) printf("    got %lld, want %lld\n", got, want);
}

__attribute__((unused)) static double test_clock_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* A seed for this run, printed when the test asks for it, so that a failure can be repeated. */
__attribute__((unused)) static uint64_t test_seed(void) {
    const char *given = getenv("TEST_SEED");
    const uint64_t seed = given != NULL ? strtoull(given, NULL, 0) : (uint64_t)time(NULL);
    printf("  seed: TEST_SEED=%llu\n", (unsigned long long)seed);
    return seed;
}

/* splitmix64: the next number of *state. */
__attribute__((unused)) static uint64_t test_random(uint64_t *state) {
    uint64_t z = *state += UINT64_C(0x9E3779B97F4A7C15);
    z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
    return z ^ z >> 31;
}

__attribute__((noinline)) static void test_run(const test_case *test) { /* by itself: longjmp spoils locals */
    test_failures = 0;
    if (setjmp(test_exit) == 0) test->run();
}

int main(int argc, char **argv) {
    const char *filter = argc > 1 ? argv[1] : "";
    unsigned passed = 0, failed = 0;
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (const test_case *test = test_first; test != NULL; test = test->next) {
        if (strstr(test->name, filter) == NULL) continue;
        const double start_s = test_clock_s();
        test_run(test);
        const double took_s = test_clock_s() - start_s;
        if (took_s >= TEST_SLOW_S) printf("  %.1f s: %s\n", took_s, test->name);
        *(test_failures == 0 ? &passed : &failed) += 1;
        if (test_failures != 0) printf("FAILED %s (%u checks)\n", test->name, test_failures);
    }
    printf("%u passed, %u failed\n", passed, failed);
    return failed != 0 || passed == 0;
}

#endif
