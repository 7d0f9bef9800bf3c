/* digest.h: the long-input kernels of digest.c by name, so that tests can call each of them. */
#ifndef PYCCL_DIGEST_H
#define PYCCL_DIGEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum digest_kernel { DIGEST_SCALAR = 0, DIGEST_AVX2 = 1, DIGEST_AVX512 = 2 } digest_kernel;

bool digest_kernel_supported(digest_kernel kernel); /* compiled in, and this CPU has it */
digest_kernel digest_kernel_best(void);
/* As the functions in pyccl.h; the kernel must be supported. All kernels give the same bytes. */
uint64_t digest_xxh3_64(digest_kernel kernel, const void *data, size_t size_bytes, uint64_t seed);
void digest_xxh3_128(digest_kernel kernel, const void *data, size_t size_bytes, uint64_t seed, uint8_t out[16]);

#endif
