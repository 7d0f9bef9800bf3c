/* Codecs against the definition in proto/wire.md 3.6, written again here element by element; every kernel against it. */
#include "test.h"

#include <float.h>
#include <math.h>

#include "element.h"
#include "pyccl.h"
#include "quant.h"
#include "reduce.h"
#include "vectors.h"

#define CODEC PYCCL_CODEC_UINT8
#define GUARD 0xA5

static const uint8_t DTYPES[] = {PYCCL_FLOAT32, PYCCL_FLOAT64, PYCCL_FLOAT16, PYCCL_BFLOAT16};
enum { DTYPE_COUNT = sizeof DTYPES / sizeof *DTYPES };

/* ---- the definition ---- */

static float element(uint8_t dtype, const uint8_t *in, size_t i) {
    uint16_t half;
    double wide;
    float single;
    memcpy(&half, in + 2 * i, 2);
    if (dtype == PYCCL_FLOAT16) return f32_from_f16(half);
    if (dtype == PYCCL_BFLOAT16) return f32_from_bf16(half);
    if (dtype == PYCCL_FLOAT64) {
        memcpy(&wide, in + 8 * i, 8);
        return (float)wide;
    }
    memcpy(&single, in + 4 * i, 4);
    return single;
}

static void element_put(uint8_t dtype, uint8_t *out, size_t i, float x) {
    const double wide = x;
    const uint16_t half = dtype == PYCCL_FLOAT16 ? f16_from_f32(x) : bf16_from_f32(x);
    if (dtype == PYCCL_FLOAT64) {
        const uint64_t nan = F64_NAN;
        memcpy(out + 8 * i, isnan(x) ? (const void *)&nan : (const void *)&wide, 8);
    } else if (dtype == PYCCL_FLOAT32) {
        memcpy(out + 4 * i, &x, 4);
    } else {
        memcpy(out + 2 * i, &half, 2);
    }
}

static float most(uint8_t dtype) {
    return dtype == PYCCL_FLOAT16 ? 65504.0f : dtype == PYCCL_BFLOAT16 ? 0x1.fep127f : FLT_MAX;
}

static void define_scale(float low, float high, float *scale) {
    *scale = 0;
    if (low == high) return;
    const float rough = (float)(((double)high - (double)low) / 255.0);
    int exponent;
    const double mantissa = frexp(rough, &exponent);
    *scale = (float)ldexp(nearbyint(ldexp(mantissa, 16)), exponent - 16); /* 16 significant bits, ties to even */
    if (*scale < 0x1p-125f) *scale = 0x1p-125f;
}

static void define_encode_block(uint8_t dtype, const uint8_t *in, size_t count, uint8_t *out) {
    volatile float low = INFINITY, high = -INFINITY;
    bool finite = true;
    float scale;
    for (size_t i = 0; i < count; i++) {
        const float x = element(dtype, in, i);
        finite = finite && isfinite(x);
        low = x < low ? x : low;
        high = x > high ? x : high;
    }
    if (!finite) {
        const uint32_t nan[2] = {0x7fc00000, 0x7fc00000};
        memcpy(out, nan, 8);
        memset(out + 8, 0, count);
        return;
    }
    low = low == 0 ? 0.0f : low;
    define_scale(low, high, &scale);
    memcpy(out, (const void *)&low, 4);
    memcpy(out + 4, &scale, 4);
    const volatile float half_low = low * 0.5f, inverse = scale == 0 ? 0 : 1.0f / (scale * 0.5f);
    for (size_t i = 0; i < count; i++) {
        const volatile float half = element(dtype, in, i) * 0.5f, difference = half - half_low, t = difference * inverse;
        const double code = nearbyint(t);
        CHECK(code >= 0 && code <= 255);
        out[8 + i] = (uint8_t)code;
    }
}

static void define_decode_block(uint8_t dtype, const uint8_t *in, size_t count, uint8_t *out) {
    float low, scale;
    uint32_t scale_bits;
    memcpy(&low, in, 4);
    memcpy(&scale, in + 4, 4);
    memcpy(&scale_bits, in + 4, 4);
    const float half = scale > 0x1p120f ? 0.5f : 1.0f;
    const bool good = isfinite(low) && isfinite(scale) && !signbit(scale) && scale_bits % 256 == 0;
    for (size_t i = 0; i < count; i++) {
        const volatile float product = (float)in[8 + i] * (scale * half), start = low * half, part = start + product;
        const volatile float sum = part / half;
        const float cut = sum > most(dtype) ? most(dtype) : sum < -most(dtype) ? -most(dtype) : sum;
        element_put(dtype, out, i, good ? cut : f32_of(F32_NAN));
    }
}

static void define_encode(uint8_t dtype, uint32_t block, const uint8_t *in, size_t count, uint8_t *out) {
    for (size_t first = 0; first < count; first += block) {
        const size_t part = count - first < block ? count - first : block;
        define_encode_block(dtype, in + first * pyccl_dtype_size(dtype), part, out);
        out += 8 + part;
    }
}

static void define_decode(uint8_t dtype, uint32_t block, const uint8_t *in, size_t count, uint8_t *out) {
    for (size_t first = 0; first < count; first += block) {
        const size_t part = count - first < block ? count - first : block;
        define_decode_block(dtype, in, part, out + first * pyccl_dtype_size(dtype));
        in += 8 + part;
    }
}

/* ---- inputs ---- */

typedef enum flavour { PLAIN, ALL_EQUAL, TINY, WIDE, COARSE, ANY_BITS, FLAVOURS } flavour;

static float draw(flavour how, uint64_t *state) {
    const uint64_t r = test_random(state);
    const float unit = (float)(r >> 40) * 0x1p-24f; /* 0..1 */
    switch (how) {
    case PLAIN: return r % 31 == 0 ? (r % 2 == 0 ? -0.0f : 0.0f) : unit * 2.0f - 0.7f;
    case ALL_EQUAL: return r % 3 == 0 ? -0.0f : 0.0f;
    case TINY: return f32_of((uint32_t)(r % 600) | (uint32_t)(r >> 63) << 31); /* denormals */
    case WIDE: return (unit * 2.0f - 1.0f) * FLT_MAX;
    case COARSE: return 1e6f + (float)(r % 5) * 0.0625f;
    default: return f32_of((uint32_t)r);
    }
}

static void fill(uint8_t dtype, uint8_t *out, size_t count, uint32_t block, flavour how, uint64_t *state) {
    for (size_t i = 0; i < count; i++) {
        const flavour now = how == FLAVOURS ? (flavour)((i / block * 7 + 3) % FLAVOURS) : how;
        float x = draw(now, state);
        if (now != ANY_BITS && fabsf(x) > most(dtype)) x = copysignf(most(dtype), x);
        element_put(dtype, out, i, x);
        if (now == ANY_BITS) { /* NaNs with payloads too */
            const uint64_t bits = test_random(state) % 50 != 0 ? test_random(state) & UINT64_C(0xbfffbfffbfffbfff) : test_random(state);
            memcpy(out + i * pyccl_dtype_size(dtype), &bits, pyccl_dtype_size(dtype));
        }
    }
}

/* ---- tests ---- */

static void *allocate(size_t bytes) {
    uint8_t *data = malloc(bytes + 1);
    REQUIRE(data != NULL);
    data[bytes] = GUARD;
    return data;
}

static void check_same(const char *what, kernel k, uint8_t dtype, uint32_t block, size_t count, const uint8_t *got,
                       const uint8_t *want, size_t bytes) {
    size_t at = 0;
    while (at < bytes && got[at] == want[at]) at++;
    CHECK(at == bytes);
    CHECK_EQ(got[bytes], GUARD);
    if (at < bytes)
        printf("    %s %s dtype %d block %u count %zu: byte %zu is %02x, want %02x\n", what, kernel_name(k), dtype, block,
               count, at, got[at], want[at]);
}

static void check_kernels(uint8_t dtype, uint32_t block, size_t count, size_t skew, const uint8_t *in, const uint8_t *coded) {
    const size_t bytes = count * pyccl_dtype_size(dtype), size = pyccl_codec_size(CODEC, block, count);
    uint8_t *got_codes = allocate(size + skew), *got = allocate(bytes + skew), *want_codes = allocate(size), *want = allocate(bytes);
    define_encode(dtype, block, in, count, want_codes);
    define_decode(dtype, block, coded != NULL ? coded : want_codes, count, want);
    for (kernel k = KERNEL_SCALAR; k < KERNEL_COUNT; k++) {
        if (!kernel_supported(k)) continue;
        memset(got_codes, 0xEE, size + skew);
        memset(got, 0xEE, bytes + skew);
        CHECK_EQ(quant_encode_with(k, CODEC, dtype, block, in, count, got_codes + skew), PYCCL_OK);
        check_same("encode", k, dtype, block, count, got_codes + skew, want_codes, size);
        if (coded != NULL) memcpy(got_codes + skew, coded, size);
        CHECK_EQ(quant_decode_with(k, CODEC, dtype, block, got_codes + skew, count, got + skew), PYCCL_OK);
        check_same("decode", k, dtype, block, count, got + skew, want, bytes);
    }
    free(got_codes);
    free(got);
    free(want_codes);
    free(want);
}

TEST(quant_kernels_equal_the_definition_on_any_input_and_any_bytes) {
    uint64_t state = test_seed();
    const uint32_t blocks[] = {1, 2, 7, 16, 31, 32, 33, 64, 100, 255, 1024, 2048, 4096, UINT32_MAX};
    for (size_t d = 0; d < DTYPE_COUNT; d++)
        for (size_t b = 0; b < sizeof blocks / sizeof *blocks; b++)
            for (unsigned round = 0; round < 12; round++) {
                const size_t count = test_random(&state) % (round % 3 == 0 ? 6000 : 200), skew = test_random(&state) % 4;
                const size_t bytes = count * pyccl_dtype_size(DTYPES[d]), size = pyccl_codec_size(CODEC, blocks[b], count);
                uint8_t *in = allocate(bytes + skew), *hostile = allocate(size);
                fill(DTYPES[d], in + skew, count, blocks[b], round < FLAVOURS ? (flavour)round : FLAVOURS, &state);
                for (size_t i = 0; i < size; i++) hostile[i] = (uint8_t)test_random(&state);
                for (size_t i = 0; i < size; i += 8 + (size_t)blocks[b]) /* most scales with as few bits as is legal */
                    if (i + 8 <= size && test_random(&state) % 4 != 0) hostile[i + 4] = 0, hostile[i + 7] &= 0x7f;
                check_kernels(DTYPES[d], blocks[b], count, skew, in + skew, round % 2 == 0 ? NULL : hostile);
                free(in);
                free(hostile);
            }
}

TEST(quant_vectors_hold_for_every_kernel) {
    vector_file vectors = vectors_open("codecs.txt");
    unsigned lines = 0;
    while (vectors_next(&vectors)) {
        char name[80], in_hex[400], coded_hex[200], decoded_hex[400];
        unsigned codec, dtype, block, count;
        uint8_t in[200], coded[100], decoded[200], got[200];
        REQUIRE(sscanf(vectors.line, "%79s %u %u %u %u %399s %199s %399s", name, &codec, &dtype, &block, &count, in_hex, coded_hex,
                       decoded_hex) == 8);
        const size_t bytes = count * pyccl_dtype_size((uint8_t)dtype), size = pyccl_codec_size((uint8_t)codec, block, count);
        const bool encodes = strcmp(in_hex, "-") != 0;
        REQUIRE(bytes <= sizeof in && size <= sizeof coded);
        REQUIRE(!encodes || bytes_from_hex(in_hex, in, bytes));
        REQUIRE(bytes_from_hex(coded_hex, coded, size) && bytes_from_hex(decoded_hex, decoded, bytes));
        for (kernel k = KERNEL_SCALAR; k < KERNEL_COUNT; k++) {
            if (!kernel_supported(k)) continue;
            if (encodes) {
                CHECK_EQ(quant_encode_with(k, (uint8_t)codec, (uint8_t)dtype, block, in, count, got), PYCCL_OK);
                CHECK(memcmp(got, coded, size) == 0 || (printf("    %s %s encode\n", name, kernel_name(k)), false));
            }
            CHECK_EQ(quant_decode_with(k, (uint8_t)codec, (uint8_t)dtype, block, coded, count, got), PYCCL_OK);
            CHECK(memcmp(got, decoded, bytes) == 0 || (printf("    %s %s decode\n", name, kernel_name(k)), false));
        }
        lines++;
    }
    CHECK(lines >= 50);
}

TEST(quant_sizes_are_eight_bytes_a_block_and_one_an_element) {
    CHECK_EQ(pyccl_codec_size(CODEC, 100, 0), 0);
    CHECK_EQ(pyccl_codec_size(CODEC, 100, 1), 9);
    CHECK_EQ(pyccl_codec_size(CODEC, 100, 100), 108);
    CHECK_EQ(pyccl_codec_size(CODEC, 100, 101), 117);
    CHECK_EQ(pyccl_codec_size(CODEC, UINT32_MAX, (size_t)1 << 48), ((size_t)1 << 48) + 8 * (((size_t)1 << 48) / UINT32_MAX + 1));
    CHECK_EQ(pyccl_codec_size(CODEC, 0, 5), 0);
    CHECK_EQ(pyccl_codec_size(CODEC, 8, SIZE_MAX), 0);
    CHECK_EQ(pyccl_codec_size(PYCCL_CODEC_NONE, 8, 5), 0);
    CHECK_EQ(pyccl_codec_size(2, 8, 5), 0);
    CHECK_EQ(pyccl_codec_size(255, 8, 5), 0);
}

TEST(quant_refuses_unknown_codecs_other_dtypes_and_no_block) {
    float x[4] = {1, 2, 3, 4};
    uint8_t coded[12] = {0};
    CHECK_EQ(pyccl_codec_encode(PYCCL_CODEC_NONE, PYCCL_FLOAT32, 4, x, 4, coded), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_codec_encode(2, PYCCL_FLOAT32, 4, x, 4, coded), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_codec_encode(CODEC, PYCCL_INT32, 4, x, 4, coded), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_codec_encode(CODEC, 0, 4, x, 4, coded), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_codec_encode(CODEC, PYCCL_FLOAT32, 0, x, 4, coded), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_codec_decode(255, PYCCL_FLOAT32, 4, coded, 4, x), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_codec_decode(CODEC, PYCCL_UINT8, 4, coded, 4, x), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_codec_decode(CODEC, PYCCL_FLOAT32, 0, coded, 4, x), PYCCL_ERR_ARGUMENT);
    const uint8_t *in[] = {coded};
    CHECK_EQ(pyccl_codec_reduce(CODEC, PYCCL_SUM, 0, in, NULL, 1, 4, x), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_codec_reduce(CODEC, 9, 4, in, NULL, 1, 4, x), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_codec_reduce(0, PYCCL_SUM, 4, in, NULL, 1, 4, x), PYCCL_ERR_ARGUMENT);
    CHECK(x[0] == 1 && coded[0] == 0);
}

static double ulp(float x) { return (double)nextafterf(fabsf(x), INFINITY) - fabs((double)x); }

/* |x - decoded| <= scale * (1/2 + 2^-14) + half a unit in the last place; low is exact; nothing finite stops being so. */
static void check_error(const float *x, const float *y, size_t count, float low, float scale) {
    for (size_t i = 0; i < count; i++) {
        REQUIRE(isfinite(y[i]));
        const double error = fabs((double)x[i] - (double)y[i]), bound = (double)scale * (0.5 + 0x1p-14) + 0.5 * ulp(y[i]);
        if (error > bound) printf("    x %a decoded %a low %a scale %a: error %g, bound %g\n", x[i], y[i], low, scale, error, bound);
        CHECK(error <= bound);
        if (x[i] == low) CHECK(f32_bits(y[i]) == f32_bits(low));
    }
}

TEST(quant_error_is_half_a_step_and_encoding_again_changes_nothing) {
    enum { COUNT = 300 };
    uint64_t state = test_seed();
    for (unsigned round = 0; round < 20000; round++) {
        float x[COUNT], y[COUNT], z[COUNT], low, high, scale;
        uint8_t coded[COUNT + 8], again[COUNT + 8];
        const flavour how = (flavour)(round % ANY_BITS);
        const float size = ldexpf(1.0f, (int)(test_random(&state) % 245) - 125), shift = draw(PLAIN, &state) * (float)(round % 17);
        for (size_t i = 0; i < COUNT; i++) x[i] = how == PLAIN ? (draw(how, &state) + shift) * size * 0.01f : draw(how, &state);
        REQUIRE(pyccl_codec_encode(CODEC, PYCCL_FLOAT32, COUNT, x, COUNT, coded) == PYCCL_OK);
        REQUIRE(pyccl_codec_decode(CODEC, PYCCL_FLOAT32, COUNT, coded, COUNT, y) == PYCCL_OK);
        REQUIRE(pyccl_codec_encode(CODEC, PYCCL_FLOAT32, COUNT, y, COUNT, again) == PYCCL_OK);
        REQUIRE(pyccl_codec_decode(CODEC, PYCCL_FLOAT32, COUNT, again, COUNT, z) == PYCCL_OK);
        memcpy(&low, coded, 4);
        memcpy(&scale, coded + 4, 4);
        check_error(x, y, COUNT, low, scale);
        high = low;
        for (size_t i = 0; i < COUNT; i++) high = x[i] > high ? x[i] : high;
        const double size_most = fmax(fabs((double)low), fabs((double)high)), range = (double)high - (double)low;
        const bool exact = scale == 0 || (size_most <= 64 * range && range >= 0x1p-116);
        if (exact) CHECK(memcmp(coded, again, sizeof coded) == 0);
        /* The same bytes again; where a step is finer than the numbers, or the least, the same numbers but for a unit. */
        for (size_t i = 0; i < COUNT; i++) CHECK(fabs((double)y[i] - (double)z[i]) <= (exact ? 0 : 2 * ulp(y[i]) + (range < 0x1p-116 ? scale : 0)));
    }
}

TEST(quant_corner_values) {
    const float equal[3] = {-3.5f, -3.5f, -3.5f}, zeros[3] = {-0.0f, 0.0f, -0.0f}, ends[3] = {-FLT_MAX, 0, FLT_MAX};
    const float tiny[3] = {0, 0x1p-149f, 0x1p-148f}, bad[3] = {1, INFINITY, 2};
    float y[3];
    uint8_t coded[11];
    uint32_t head[2];
#define ROUND_TRIP(x)                                                                            \
    CHECK_EQ(pyccl_codec_encode(CODEC, PYCCL_FLOAT32, 3, x, 3, coded), PYCCL_OK);                \
    CHECK_EQ(pyccl_codec_decode(CODEC, PYCCL_FLOAT32, 3, coded, 3, y), PYCCL_OK);                \
    memcpy(head, coded, 8)
    ROUND_TRIP(equal);
    CHECK(memcmp(y, equal, sizeof y) == 0 && head[1] == 0);
    ROUND_TRIP(zeros);
    CHECK(f32_bits(y[0]) == 0 && f32_bits(y[1]) == 0 && f32_bits(y[2]) == 0 && head[0] == 0 && head[1] == 0);
    ROUND_TRIP(ends);
    CHECK(y[0] == -FLT_MAX && fabsf(y[1]) <= FLT_MAX / 254 && y[2] >= FLT_MAX * 0.9999f && y[2] <= FLT_MAX);
    ROUND_TRIP(tiny);
    CHECK(y[0] == 0 && y[1] == 0 && y[2] == 0 && head[1] == f32_bits(0x1p-125f));
    ROUND_TRIP(bad);
    CHECK(head[0] == F32_NAN && head[1] == F32_NAN && coded[8] == 0 && coded[9] == 0 && coded[10] == 0);
    for (size_t i = 0; i < 3; i++) CHECK_EQ(f32_bits(y[i]), F32_NAN);
    const double beyond[1] = {1e300};
    double wide[1];
    CHECK_EQ(pyccl_codec_encode(CODEC, PYCCL_FLOAT64, 3, beyond, 1, coded), PYCCL_OK);
    CHECK_EQ(pyccl_codec_decode(CODEC, PYCCL_FLOAT64, 3, coded, 1, wide), PYCCL_OK);
    uint64_t bits;
    memcpy(&bits, wide, 8);
    CHECK(bits == F64_NAN);
}

TEST(quant_reduce_gives_the_bytes_of_decoding_and_folding) {
    enum { COUNT = 9001, INPUTS = 4 };
    uint64_t state = test_seed();
    const uint32_t blocks[] = {1, 100, 1024, 4096, 5000, UINT32_MAX};
    const double weights[INPUTS] = {0.5, 3, 0, 1.25};
    static float x[COUNT], decoded[INPUTS][COUNT], want[COUNT], got[COUNT];
    for (size_t b = 0; b < sizeof blocks / sizeof *blocks; b++) {
        uint8_t *coded[INPUTS];
        const void *in[INPUTS];
        for (size_t k = 0; k < INPUTS; k++) {
            fill(PYCCL_FLOAT32, (uint8_t *)x, COUNT, blocks[b], k == 2 ? FLAVOURS : PLAIN, &state);
            coded[k] = allocate(pyccl_codec_size(CODEC, blocks[b], COUNT));
            CHECK_EQ(pyccl_codec_encode(CODEC, PYCCL_FLOAT32, blocks[b], x, COUNT, coded[k]), PYCCL_OK);
            CHECK_EQ(pyccl_codec_decode(CODEC, PYCCL_FLOAT32, blocks[b], coded[k], COUNT, decoded[k]), PYCCL_OK);
            in[k] = decoded[k];
        }
        for (kernel k = KERNEL_SCALAR; k < KERNEL_COUNT; k++) {
            if (!kernel_supported(k)) continue;
            for (uint8_t op = PYCCL_SUM; op <= PYCCL_MAX; op++)
                for (size_t inputs = 1; inputs <= INPUTS; inputs++) {
                    const double *w = op == PYCCL_AVG && k % 2 == 0 ? weights : NULL;
                    CHECK_EQ(reduce_with(k, PYCCL_FLOAT32, op, in, w, inputs, COUNT, want), PYCCL_OK);
                    CHECK_EQ(quant_reduce_with(k, CODEC, op, blocks[b], (const uint8_t *const *)coded, w, inputs, COUNT, got), PYCCL_OK);
                    CHECK(memcmp(got, want, sizeof got) == 0);
                }
        }
        for (size_t k = 0; k < INPUTS; k++) free(coded[k]);
    }
}

#if defined(__x86_64__)
TEST(quant_ignores_and_keeps_the_callers_flush_to_zero_mode) {
    const float x[2] = {0, 0x1p-120f};
    float y[2];
    uint8_t plain[10], coded[10];
    CHECK_EQ(pyccl_codec_encode(CODEC, PYCCL_FLOAT32, 2, x, 2, plain), PYCCL_OK);
    const unsigned before = __builtin_ia32_stmxcsr(), flushing = (before | 0x8040) ^ 0x6000; /* and rounding to zero */
    __builtin_ia32_ldmxcsr(flushing);
    const pyccl_status rc = pyccl_codec_encode(CODEC, PYCCL_FLOAT32, 2, x, 2, coded);
    const pyccl_status rc2 = pyccl_codec_decode(CODEC, PYCCL_FLOAT32, 2, coded, 2, y);
    const unsigned after = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(before);
    CHECK_EQ(rc, PYCCL_OK);
    CHECK_EQ(rc2, PYCCL_OK);
    CHECK(memcmp(plain, coded, sizeof coded) == 0);
    CHECK(y[0] == 0 && y[1] > 0);
    CHECK_EQ(after & 0xffc0, flushing & 0xffc0);
}
#endif
