/* fuzz.h: what the fuzz targets share: reading an input piece by piece, and an assertion that stays on.
 *
 * A target is one LLVMFuzzerTestOneInput in native/fuzz/fuzz_*.c. It keeps nothing between inputs, so that any input can be
 * run alone. CMake builds targets with -DPYCCL_FUZZ=ON and clang; tools/fuzz runs them. What they found is a regression
 * vector in proto/vectors or a file in native/fuzz/corpus. */
#ifndef PYCCL_FUZZ_H
#define PYCCL_FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define HOLDS(cond) ((cond) ? (void)0 : (fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #cond), abort()))

typedef struct fuzz_input {
    const uint8_t *at;
    size_t left;
} fuzz_input;

/* The next bytes; zeros behind the end. */
static inline void fuzz_take(fuzz_input *in, void *out, size_t size) {
    const size_t n = in->left < size ? in->left : size;
    memset(out, 0, size);
    if (n > 0) memcpy(out, in->at, n);
    in->at += n;
    in->left -= n;
}

static inline uint8_t fuzz_u8(fuzz_input *in) {
    uint8_t x;
    fuzz_take(in, &x, 1);
    return x;
}

static inline uint64_t fuzz_u64(fuzz_input *in) {
    uint64_t x;
    fuzz_take(in, &x, sizeof x);
    return x;
}

#endif
