/* XXH3 against vectors of the reference, and each kernel against the scalar one. */
#include "test.h"

#include "digest.h"
#include "pyccl.h"
#include "vectors.h"

static uint8_t *pattern_new(size_t size) {
    uint8_t *data = malloc(size > 0 ? size : 1);
    REQUIRE(data != NULL);
    for (size_t i = 0; i < size; i++) data[i] = (uint8_t)(i * 131 + 7);
    return data;
}

static void check_kernel(kernel k, const uint8_t *data, size_t size, uint64_t seed, uint64_t want_64,
                         const uint8_t want_128[16]) {
    uint8_t got[16];
    digest_xxh3_128(k, data, size, seed, got);
    const bool same = digest_xxh3_64(k, data, size, seed) == want_64 && memcmp(got, want_128, 16) == 0;
    CHECK(same);
    if (!same) printf("    kernel %d, length %zu, seed %llu\n", (int)k, size, (unsigned long long)seed);
}

TEST(digest_vectors_hold_for_every_kernel) {
    vector_file vectors = vectors_open("digests.txt");
    unsigned lines = 0;
    while (vectors_next(&vectors)) {
        unsigned long long size, seed, want_64;
        char hex[33];
        uint8_t want_128[16], got[16];
        REQUIRE(sscanf(vectors.line, "%llu %llu %llx %32s", &size, &seed, &want_64, hex) == 4);
        REQUIRE(bytes_from_hex(hex, want_128, sizeof want_128));
        uint8_t *data = pattern_new(size); /* of just this size: ASan sees a read past the end */
        for (kernel k = KERNEL_SCALAR; k < KERNEL_COUNT; k++)
            if (kernel_supported(k)) check_kernel(k, data, size, seed, want_64, want_128);
        CHECK(pyccl_xxh3_64(data, size, seed) == want_64);
        pyccl_xxh3_128(data, size, seed, got);
        CHECK(memcmp(got, want_128, sizeof got) == 0);
        free(data);
        lines++;
    }
    CHECK(lines >= 100);
}

TEST(digest_kernels_agree_on_random_lengths_and_alignments) {
    uint64_t state = test_seed();
    for (unsigned i = 0; i < 2000; i++) {
        const size_t size = test_random(&state) % (i % 10 == 0 ? 100000 : 5000), skew = test_random(&state) % 64;
        const uint64_t seed = test_random(&state);
        uint8_t *data = malloc(size + skew + 1), want[16];
        REQUIRE(data != NULL);
        for (size_t k = 0; k < size + skew; k++) data[k] = (uint8_t)test_random(&state);
        const uint64_t want_64 = digest_xxh3_64(KERNEL_SCALAR, data + skew, size, seed);
        digest_xxh3_128(KERNEL_SCALAR, data + skew, size, seed, want);
        for (kernel k = KERNEL_SCALAR + 1; k < KERNEL_COUNT; k++)
            if (kernel_supported(k)) check_kernel(k, data + skew, size, seed, want_64, want);
        free(data);
    }
}

TEST(digest_follows_the_selected_kernel_which_the_cpu_must_have) {
    const char *const names[] = {"scalar", "avx2", "avx512", "neon"};
    CHECK(kernel_supported(kernel_current()));
    CHECK(kernel_supported(KERNEL_SCALAR));
    for (kernel k = KERNEL_SCALAR; k < KERNEL_COUNT; k++) {
        const char *before = pyccl_kernel_name();
        const pyccl_status rc = pyccl_kernel_select(names[k]);
        CHECK_EQ(rc, kernel_supported(k) ? PYCCL_OK : PYCCL_ERR_ARGUMENT);
        CHECK(strcmp(pyccl_kernel_name(), rc == PYCCL_OK ? names[k] : before) == 0);
    }
    CHECK_EQ(pyccl_kernel_select("mmx"), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_kernel_select(""), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_kernel_select("auto"), PYCCL_OK);
    printf("  kernel: %s\n", pyccl_kernel_name());
}

TEST(chunk_digests_are_the_digests_of_the_chunks) {
    enum { CHUNK = 1000 };
    const size_t sizes[] = {0, 1, 999, 1000, 1001, 2000, 4321};
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        const size_t chunks = (sizes[k] + CHUNK - 1) / CHUNK;
        uint8_t *data = pattern_new(sizes[k]), *digests = malloc(chunks * 16 + 1), want[16];
        REQUIRE(digests != NULL);
        digests[chunks * 16] = 0xEE;
        pyccl_chunk_digests(data, sizes[k], CHUNK, digests);
        for (size_t i = 0; i < chunks; i++) {
            const size_t rest = sizes[k] - i * CHUNK;
            pyccl_xxh3_128(data + i * CHUNK, rest < CHUNK ? rest : CHUNK, 0, want);
            CHECK(memcmp(digests + 16 * i, want, 16) == 0);
        }
        CHECK_EQ(digests[chunks * 16], 0xEE);
        free(digests);
        free(data);
    }
}
