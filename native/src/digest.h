/* digest.h: the long-input kernels of digest.c by name, so that tests can call each of them. */
#ifndef PYCCL_DIGEST_H
#define PYCCL_DIGEST_H

#include <stddef.h>
#include <stdint.h>

#include "kernel.h"

/* As the functions in pyccl.h; the kernel must be supported. All kernels give the same bytes. */
uint64_t digest_xxh3_64(kernel k, const void *data, size_t size_bytes, uint64_t seed);
void digest_xxh3_128(kernel k, const void *data, size_t size_bytes, uint64_t seed, uint8_t out[16]);

#endif
