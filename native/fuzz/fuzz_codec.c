/* fuzz_codec.c: codes of strangers. Any bytes decode, within the array, to numbers or the canonical NaN, the same with every
 * kernel, alone and in a fold; the guard's view of them is that of a plain loop. Input: codec, dtype, block, count, bytes. */
#include <math.h>

#include "../src/kernel.h"
#include "../src/quant.h"
#include "fuzz.h"

enum { COUNT_MAX = 600 };

static void same_on_all(uint8_t codec, uint8_t dtype, uint32_t block, const uint8_t *codes, size_t count) {
    const size_t bytes = count * pyccl_dtype_size(dtype);
    uint8_t *want = malloc(bytes + 1), *got = malloc(bytes + 1);
    static const char *const KERNELS[] = {"avx2", "avx512", "neon"};
    HOLDS(want != NULL && got != NULL);
    HOLDS(pyccl_kernel_select("scalar") == PYCCL_OK && pyccl_codec_decode(codec, dtype, block, codes, count, want) == PYCCL_OK);
    for (size_t k = 0; k < 3; k++) {
        if (pyccl_kernel_select(KERNELS[k]) != PYCCL_OK) continue;
        HOLDS(pyccl_codec_decode(codec, dtype, block, codes, count, got) == PYCCL_OK && memcmp(want, got, bytes) == 0);
    }
    HOLDS(pyccl_kernel_select("auto") == PYCCL_OK);
    double peak, squares;
    HOLDS(pyccl_magnitude(dtype, want, count, &peak, &squares) == PYCCL_OK);
    HOLDS(isnan(peak) || peak >= 0);
    if (codec != PYCCL_CODEC_BFLOAT16) HOLDS(!isinf(peak));
    free(want);
    free(got);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const uint8_t DTYPES[] = {PYCCL_FLOAT16, PYCCL_BFLOAT16, PYCCL_FLOAT32, PYCCL_FLOAT64};
    fuzz_input in = {data, size};
    const uint8_t codec = fuzz_u8(&in), dtype = DTYPES[fuzz_u8(&in) % 4];
    const uint32_t block = UINT32_C(1) << fuzz_u8(&in) % 17;
    const size_t count = fuzz_u64(&in) % COUNT_MAX, bytes = pyccl_codec_size(codec, block, count);
    if (pyccl_codec_size(codec, block, 1) == 0) {
        uint8_t out[8];
        HOLDS(pyccl_codec_decode(codec, dtype, block, data, 0, out) == PYCCL_ERR_ARGUMENT);
        return 0;
    }
    uint8_t *codes = malloc(bytes + 1); /* no more: ASan sees what is read behind it */
    float folded[COUNT_MAX], alone[COUNT_MAX];
    HOLDS(codes != NULL);
    fuzz_take(&in, codes, bytes);
    same_on_all(codec, dtype, block, codes, count);
    const uint8_t *inputs[2] = {codes, codes};
    HOLDS(pyccl_codec_reduce(codec, PYCCL_MAX, block, inputs, NULL, 2, count, folded) == PYCCL_OK);
    HOLDS(pyccl_codec_decode(codec, PYCCL_FLOAT32, block, codes, count, alone) == PYCCL_OK);
    HOLDS(count == 0 || memcmp(folded, alone, count * sizeof *alone) == 0);
    free(codes);
    return 0;
}
