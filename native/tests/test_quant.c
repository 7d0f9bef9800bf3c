/* Codecs against the definition in proto/wire.md 3.6, written again here element by element; every kernel against it. */
#include "test.h"

#include <float.h>
#include <math.h>

#include "element.h"
#include "pyccl.h"
#include "quant.h"
#include "reduce.h"
#include "vectors.h"

#define GUARD 0xA5

static const uint8_t CODECS[] = {PYCCL_CODEC_UINT8, PYCCL_CODEC_INT8, PYCCL_CODEC_FP8_E4M3, PYCCL_CODEC_FP4_E3M0, PYCCL_CODEC_BFLOAT16};
enum { CODEC_COUNT = sizeof CODECS / sizeof *CODECS };

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

static size_t head_bytes(uint8_t codec) { return codec == PYCCL_CODEC_UINT8 ? 8 : codec == PYCCL_CODEC_BFLOAT16 ? 0 : 4; }
static size_t code_bits(uint8_t codec) { return codec == PYCCL_CODEC_FP4_E3M0 ? 4 : codec == PYCCL_CODEC_BFLOAT16 ? 16 : 8; }
static size_t block_bytes(uint8_t codec, size_t count) { return head_bytes(codec) + (count * code_bits(codec) + 7) / 8; }

static void define_uint8(const float *x, size_t count, uint8_t *out) {
    volatile float low = x[0], high = x[0];
    float scale;
    for (size_t i = 0; i < count; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
    low = low == 0 ? 0.0f : low;
    define_scale(low, high, &scale);
    memcpy(out, (const void *)&low, 4);
    memcpy(out + 4, &scale, 4);
    const volatile float half_low = low * 0.5f, inverse = scale == 0 ? 0 : 1.0f / (scale * 0.5f);
    for (size_t i = 0; i < count; i++) {
        const volatile float half = x[i] * 0.5f, difference = half - half_low, t = difference * inverse;
        const double code = nearbyint(t);
        CHECK(code >= 0 && code <= 255);
        out[8 + i] = (uint8_t)code;
    }
}

static float peak_of(const float *x, size_t count) {
    float peak = 0;
    for (size_t i = 0; i < count; i++) peak = fabsf(x[i]) > peak ? fabsf(x[i]) : peak;
    return peak;
}

/* 16 significant bits of peak / most, the rest cut off. */
static float define_cut_scale(float peak, float most) {
    int exponent;
    const double mantissa = frexp((double)(float)(peak / most), &exponent);
    const float scale = (float)ldexp(floor(ldexp(mantissa, 16)), exponent - 16);
    return scale < 0x1p-125f ? 0x1p-125f : scale;
}

static double e4m3_size(unsigned code) { /* 0..126 */
    return code < 8 ? ldexp(code, -9) : ldexp(8 + code % 8, (int)(code / 8) - 10);
}

static unsigned e4m3_nearest(double size) {
    unsigned best = 0;
    for (unsigned code = 1; code < 127; code++) {
        const double now = fabs(e4m3_size(code) - size), before = fabs(e4m3_size(best) - size);
        if (now < before || (now == before && code % 2 == 0)) best = code;
    }
    return best;
}

static void define_int8_or_fp8(uint8_t codec, const float *x, size_t count, uint8_t *out) {
    const bool is_fp8 = codec == PYCCL_CODEC_FP8_E4M3;
    float scale = define_cut_scale(peak_of(x, count), is_fp8 ? 448 : 127);
    if (is_fp8 ? peak_of(x, count) <= 0x1p-135f : peak_of(x, count) <= 0x1p-126f) scale = 0;
    const volatile float inverse = 1 / scale;
    memcpy(out, &scale, 4);
    for (size_t i = 0; i < count; i++) {
        const volatile float t = x[i] * inverse;
        if (scale == 0) out[4 + i] = 0;
        else if (is_fp8) out[4 + i] = (uint8_t)(e4m3_nearest(fabs((double)t)) | (signbit(t) ? 0x80 : 0));
        else out[4 + i] = (uint8_t)(int8_t)nearbyint(t);
    }
}

/* The definition in real numbers: products of two float32, and quarters of them, are exact in double. */
static void define_fp4(const float *x, size_t count, uint8_t *out) {
    const float scale = peak_of(x, count);
    memcpy(out, &scale, 4);
    memset(out + 4, 0, (count + 1) / 2);
    for (size_t i = 0; i < count; i++) {
        unsigned code = scale > 0 && fabs((double)x[i]) >= ldexp(scale, -7);
        for (unsigned e = 2; e < 8; e++) code += code > 0 && fabs((double)x[i]) >= 0.75 * ldexp(scale, (int)e - 7);
        if (code > 0 && x[i] < 0) code |= 8;
        out[4 + i / 2] |= (uint8_t)(code << (i % 2 * 4));
    }
}

static void define_bf16(const float *x, size_t count, uint8_t *out) {
    for (size_t i = 0; i < count; i++) {
        int exponent = -125;
        if (x[i] != 0 && isfinite(x[i])) (void)frexp((double)x[i], &exponent);
        const double step = ldexp(1, (exponent < -125 ? -125 : exponent) - 8);
        const double rounded = isfinite(x[i]) ? nearbyint((double)x[i] / step) * step : (double)x[i];
        const float single = isnan(x[i]) ? f32_of(F32_NAN) : fabs(rounded) >= 0x1p128 ? copysignf(INFINITY, x[i]) : (float)rounded;
        const uint16_t half = (uint16_t)(f32_bits(single) >> 16);
        memcpy(out + 2 * i, &half, 2);
    }
}

static void define_encode_block(uint8_t codec, uint8_t dtype, const uint8_t *in, size_t count, uint8_t *out) {
    float *x = calloc(count + 1, sizeof *x);
    bool finite = true;
    for (size_t i = 0; i < count; i++) {
        x[i] = element(dtype, in, i);
        finite = finite && isfinite(x[i]);
    }
    if (codec == PYCCL_CODEC_BFLOAT16) {
        define_bf16(x, count, out);
    } else if (!finite) {
        const uint32_t nan = 0x7fc00000;
        memset(out, 0, block_bytes(codec, count));
        memcpy(out, &nan, 4);
        if (codec == PYCCL_CODEC_UINT8) memcpy(out + 4, &nan, 4);
    } else if (codec == PYCCL_CODEC_UINT8) {
        define_uint8(x, count, out);
    } else if (codec == PYCCL_CODEC_FP4_E3M0) {
        define_fp4(x, count, out);
    } else {
        define_int8_or_fp8(codec, x, count, out);
    }
    free(x);
}

static float define_decode_uint8(const uint8_t *in, uint8_t code) {
    float low, scale;
    uint32_t scale_bits;
    memcpy(&low, in, 4);
    memcpy(&scale, in + 4, 4);
    memcpy(&scale_bits, in + 4, 4);
    const float half = scale > 0x1p120f ? 0.5f : 1.0f;
    const volatile float product = (float)code * (scale * half), start = low * half, part = start + product;
    const bool good = isfinite(low) && isfinite(scale) && !signbit(scale) && scale_bits % 256 == 0;
    return good ? part / half : NAN;
}

static float define_decode_scaled(uint8_t codec, const uint8_t *in, size_t i) {
    float scale;
    uint32_t bits;
    memcpy(&scale, in, 4);
    memcpy(&bits, in, 4);
    const bool is_fp4 = codec == PYCCL_CODEC_FP4_E3M0;
    const unsigned byte = in[is_fp4 ? 4 + i / 2 : 4 + i], nibble = byte >> (i % 2 * 4) & 15;
    if (!isfinite(scale) || signbit(scale) || (!is_fp4 && bits % 256 != 0)) return NAN;
    if (codec == PYCCL_CODEC_INT8) return (float)((double)(byte < 128 ? (int)byte : (int)byte - 256) * (double)scale);
    if (codec == PYCCL_CODEC_FP8_E4M3 && byte % 128 == 127) return NAN;
    const double size = codec == PYCCL_CODEC_FP8_E4M3 ? e4m3_size(byte % 128) : nibble % 8 == 0 ? 0 : ldexp(1, (int)(nibble % 8) - 7);
    const bool negative = codec == PYCCL_CODEC_FP8_E4M3 ? byte >= 128 : nibble >= 8;
    return (float)((negative ? -size : size) * (double)scale);
}

static void define_decode_block(uint8_t codec, uint8_t dtype, const uint8_t *in, size_t count, uint8_t *out) {
    for (size_t i = 0; i < count; i++) {
        float x;
        if (codec == PYCCL_CODEC_BFLOAT16) {
            const uint32_t bits = (uint32_t)in[2 * i] << 16 | (uint32_t)in[2 * i + 1] << 24;
            memcpy(&x, &bits, 4);
        } else {
            x = codec == PYCCL_CODEC_UINT8 ? define_decode_uint8(in, in[8 + i]) : define_decode_scaled(codec, in, i);
            x = x > most(dtype) ? most(dtype) : x < -most(dtype) ? -most(dtype) : x;
        }
        element_put(dtype, out, i, isnan(x) ? f32_of(F32_NAN) : x);
    }
}

static void define_encode(uint8_t codec, uint8_t dtype, uint32_t block, const uint8_t *in, size_t count, uint8_t *out) {
    for (size_t first = 0; first < count; first += block) {
        const size_t part = count - first < block ? count - first : block;
        define_encode_block(codec, dtype, in + first * pyccl_dtype_size(dtype), part, out);
        out += block_bytes(codec, part);
    }
}

static void define_decode(uint8_t codec, uint8_t dtype, uint32_t block, const uint8_t *in, size_t count, uint8_t *out) {
    for (size_t first = 0; first < count; first += block) {
        const size_t part = count - first < block ? count - first : block;
        define_decode_block(codec, dtype, in, part, out + first * pyccl_dtype_size(dtype));
        in += block_bytes(codec, part);
    }
}

/* ---- inputs ---- */

typedef enum flavour { PLAIN, ALL_EQUAL, TINY, WIDE, COARSE, TIES, LADDER, SMALL, ANY_BITS, FLAVOURS } flavour;

/* On and beside what lies halfway between two codes, where the block's peak is 127 or 448 times a power of two, or `draw`n. */
static float draw_tie(uint64_t *state) {
    const uint64_t r = test_random(state);
    const float odd = (float)(r >> 8 & 63) * ldexpf(1, (int)(r >> 16 & 15) - 10), level = 448 * 0.75f * ldexpf(1, -(int)(r >> 24 & 7));
    const float sizes[] = {odd, level, 448 * 0x1p-7f, 127 - (float)(r >> 32 & 127) - 0.5f, 448};
    const float size = sizes[r % 5], beside = r >> 40 & 1 ? nextafterf(size, INFINITY) : nextafterf(size, 0);
    const float x = (r >> 44) % 3 > 0 || size == 448 ? size : beside;
    return r >> 48 & 1 ? -x : x;
}

static float draw(flavour how, uint64_t *state) {
    const uint64_t r = test_random(state);
    const float unit = (float)(r >> 40) * 0x1p-24f; /* 0..1 */
    switch (how) {
    case PLAIN: return r % 31 == 0 ? (r % 2 == 0 ? -0.0f : 0.0f) : unit * 2.0f - 0.7f;
    case ALL_EQUAL: return r % 3 == 0 ? -0.0f : 0.0f;
    case TINY: return f32_of((uint32_t)(r % 600) | (uint32_t)(r >> 63) << 31); /* denormals */
    case WIDE: return (unit * 2.0f - 1.0f) * FLT_MAX;
    case COARSE: return 1e6f + (float)(r % 5) * 0.0625f;
    case TIES: return draw_tie(state);
    case LADDER: return ldexpf(unit - 0.5f, (int)(r % 300) - 160);
    case SMALL: return ldexpf(unit - 0.5f, -(int)(100 + r % 40)); /* peaks on both sides of the least scale */
    default: return f32_of((uint32_t)r);
    }
}

static void fill(uint8_t dtype, uint8_t *out, size_t count, uint32_t block, flavour how, uint64_t *state) {
    for (size_t i = 0; i < count; i++) {
        const flavour now = how == FLAVOURS ? (flavour)((i / block * 7 + 3) % FLAVOURS) : how;
        float x = now == TIES && i % block == 0 ? (i / block % 2 == 0 ? 448.0f : 127.0f) : draw(now, state);
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

static void check_same(const char *what, kernel k, uint8_t codec, uint8_t dtype, uint32_t block, size_t count, const uint8_t *got,
                       const uint8_t *want, size_t bytes) {
    size_t at = 0;
    while (at < bytes && got[at] == want[at]) at++;
    CHECK(at == bytes);
    CHECK_EQ(got[bytes], GUARD);
    if (at < bytes)
        printf("    %s %s codec %d dtype %d block %u count %zu: byte %zu is %02x, want %02x\n", what, kernel_name(k), codec, dtype,
               block, count, at, got[at], want[at]);
}

static void check_kernels(uint8_t codec, uint8_t dtype, uint32_t block, size_t count, size_t skew, const uint8_t *in, const uint8_t *coded) {
    const size_t bytes = count * pyccl_dtype_size(dtype), size = pyccl_codec_size(codec, block, count);
    uint8_t *got_codes = allocate(size + skew), *got = allocate(bytes + skew), *want_codes = allocate(size), *want = allocate(bytes);
    define_encode(codec, dtype, block, in, count, want_codes);
    define_decode(codec, dtype, block, coded != NULL ? coded : want_codes, count, want);
    for (kernel k = KERNEL_SCALAR; k < KERNEL_COUNT; k++) {
        if (!kernel_supported(k)) continue;
        memset(got_codes, 0xEE, size + skew);
        memset(got, 0xEE, bytes + skew);
        CHECK_EQ(quant_encode_with(k, codec, dtype, block, in, count, got_codes + skew), PYCCL_OK);
        check_same("encode", k, codec, dtype, block, count, got_codes + skew, want_codes, size);
        if (coded != NULL) memcpy(got_codes + skew, coded, size);
        CHECK_EQ(quant_decode_with(k, codec, dtype, block, got_codes + skew, count, got + skew), PYCCL_OK);
        check_same("decode", k, codec, dtype, block, count, got + skew, want, bytes);
    }
    free(got_codes);
    free(got);
    free(want_codes);
    free(want);
}

/* Any bytes; but most scales with as few bits as is legal. */
static void fill_hostile(uint8_t codec, uint32_t block, uint8_t *out, size_t size, uint64_t *state) {
    for (size_t i = 0; i < size; i++) out[i] = (uint8_t)test_random(state);
    if (head_bytes(codec) == 0) return;
    for (size_t i = head_bytes(codec) - 4; i + 4 <= size; i += block_bytes(codec, block))
        if (test_random(state) % 4 != 0) out[i] = 0, out[i + 3] &= 0x7f;
}

static void check_codec_on_any_input(uint8_t codec) {
    uint64_t state = test_seed();
    const uint32_t blocks[] = {1, 2, 7, 16, 31, 32, 33, 64, 100, 255, 1024, 2048, 4096, UINT32_MAX};
    for (size_t d = 0; d < DTYPE_COUNT; d++)
        for (size_t b = 0; b < sizeof blocks / sizeof *blocks; b++)
            for (unsigned round = 0; round < 14; round++) {
                const size_t count = test_random(&state) % (round % 3 == 0 ? 6000 : 200), skew = test_random(&state) % 4;
                const size_t bytes = count * pyccl_dtype_size(DTYPES[d]), size = pyccl_codec_size(codec, blocks[b], count);
                uint8_t *in = allocate(bytes + skew), *hostile = allocate(size);
                fill(DTYPES[d], in + skew, count, blocks[b], round < FLAVOURS ? (flavour)round : FLAVOURS, &state);
                fill_hostile(codec, blocks[b], hostile, size, &state);
                check_kernels(codec, DTYPES[d], blocks[b], count, skew, in + skew, round % 2 == 0 ? NULL : hostile);
                free(in);
                free(hostile);
            }
}

TEST(quant_uint8_kernels_equal_the_definition_on_any_input_and_any_bytes) { check_codec_on_any_input(PYCCL_CODEC_UINT8); }
TEST(quant_int8_kernels_equal_the_definition_on_any_input_and_any_bytes) { check_codec_on_any_input(PYCCL_CODEC_INT8); }
TEST(quant_fp8_kernels_equal_the_definition_on_any_input_and_any_bytes) { check_codec_on_any_input(PYCCL_CODEC_FP8_E4M3); }
TEST(quant_fp4_kernels_equal_the_definition_on_any_input_and_any_bytes) { check_codec_on_any_input(PYCCL_CODEC_FP4_E3M0); }
TEST(quant_bfloat16_kernels_equal_the_definition_on_any_input_and_any_bytes) { check_codec_on_any_input(PYCCL_CODEC_BFLOAT16); }

/* Every code there is, with scales that overflow, underflow, and that no encoder writes. */
TEST(quant_every_code_decodes_alike_with_every_kind_of_scale) {
    static const uint32_t scales[] = {0, 1, 0x100, 0x80000000, 0x7f800, 0x007fff00, 0x00800000, 0x01000000, 0x3f800000, 0x3f800100, 0x3f800001,
                                      0x7f000000, 0x7f7fff00, 0x7f7fffff, 0x7f800000, 0x7fc00000, 0xbf800000, 0xff800000};
    enum { COUNT = 1 << 16 };
    static uint8_t coded[COUNT * 2 + 8], none[COUNT * 8];
    for (size_t c = 0; c < CODEC_COUNT; c++)
        for (size_t k = 0; k < sizeof scales / sizeof *scales; k++) {
            const size_t head = head_bytes(CODECS[c]), count = CODECS[c] == PYCCL_CODEC_BFLOAT16 ? COUNT : 512;
            if (head == 0 && k > 0) break;
            for (size_t i = 0; i < count * code_bits(CODECS[c]) / 8; i++) coded[head + i] = (uint8_t)(head == 0 && i % 2 == 1 ? i >> 9 : head == 0 ? i >> 1 : i);
            for (size_t i = 0; i < head; i += 4) memcpy(coded + i, &scales[k], 4);
            for (size_t d = 0; d < DTYPE_COUNT; d++) check_kernels(CODECS[c], DTYPES[d], COUNT, count, 1, none, coded);
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

TEST(quant_sizes_are_heads_and_codes) {
    const uint8_t u8 = PYCCL_CODEC_UINT8, fp4 = PYCCL_CODEC_FP4_E3M0;
    CHECK_EQ(pyccl_codec_size(u8, 100, 0), 0);
    CHECK_EQ(pyccl_codec_size(u8, 100, 1), 9);
    CHECK_EQ(pyccl_codec_size(u8, 100, 100), 108);
    CHECK_EQ(pyccl_codec_size(u8, 100, 101), 117);
    CHECK_EQ(pyccl_codec_size(u8, UINT32_MAX, (size_t)1 << 48), ((size_t)1 << 48) + 8 * (((size_t)1 << 48) / UINT32_MAX + 1));
    CHECK_EQ(pyccl_codec_size(PYCCL_CODEC_INT8, 100, 101), 109);
    CHECK_EQ(pyccl_codec_size(PYCCL_CODEC_FP8_E4M3, 100, 101), 109);
    CHECK_EQ(pyccl_codec_size(fp4, 100, 101), 54 + 5);
    CHECK_EQ(pyccl_codec_size(fp4, 7, 7), 8);
    CHECK_EQ(pyccl_codec_size(fp4, 7, 15), 8 + 8 + 5);
    CHECK_EQ(pyccl_codec_size(PYCCL_CODEC_BFLOAT16, 7, 15), 30);
    CHECK_EQ(pyccl_codec_size(u8, 0, 5), 0);
    CHECK_EQ(pyccl_codec_size(u8, 8, SIZE_MAX), 0);
    CHECK_EQ(pyccl_codec_size(PYCCL_CODEC_NONE, 8, 5), 0);
    CHECK_EQ(pyccl_codec_size(6, 8, 5), 0);
    CHECK_EQ(pyccl_codec_size(255, 8, 5), 0);
}

TEST(quant_refuses_unknown_codecs_other_dtypes_and_no_block) {
    float x[4] = {1, 2, 3, 4};
    uint8_t coded[12] = {0};
    CHECK_EQ(pyccl_codec_encode(PYCCL_CODEC_NONE, PYCCL_FLOAT32, 4, x, 4, coded), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_codec_encode(6, PYCCL_FLOAT32, 4, x, 4, coded), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_codec_decode(255, PYCCL_FLOAT32, 4, coded, 4, x), PYCCL_ERR_ARGUMENT);
    const uint8_t *in[] = {coded};
    CHECK_EQ(pyccl_codec_reduce(0, PYCCL_SUM, 4, in, NULL, 1, 4, x), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_codec_reduce(6, PYCCL_SUM, 4, in, NULL, 1, 4, x), PYCCL_ERR_ARGUMENT);
    for (size_t c = 0; c < CODEC_COUNT; c++) {
        const uint8_t codec = CODECS[c];
        CHECK_EQ(pyccl_codec_encode(codec, PYCCL_INT32, 4, x, 4, coded), PYCCL_ERR_ARGUMENT);
        CHECK_EQ(pyccl_codec_encode(codec, 0, 4, x, 4, coded), PYCCL_ERR_ARGUMENT);
        CHECK_EQ(pyccl_codec_encode(codec, PYCCL_FLOAT32, 0, x, 4, coded), PYCCL_ERR_ARGUMENT);
        CHECK_EQ(pyccl_codec_decode(codec, PYCCL_UINT8, 4, coded, 4, x), PYCCL_ERR_ARGUMENT);
        CHECK_EQ(pyccl_codec_decode(codec, PYCCL_FLOAT32, 0, coded, 4, x), PYCCL_ERR_ARGUMENT);
        CHECK_EQ(pyccl_codec_reduce(codec, PYCCL_SUM, 0, in, NULL, 1, 4, x), PYCCL_ERR_ARGUMENT);
        CHECK_EQ(pyccl_codec_reduce(codec, 9, 4, in, NULL, 1, 4, x), PYCCL_ERR_ARGUMENT);
    }
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

TEST(quant_uint8_error_is_half_a_step_and_encoding_again_changes_nothing) {
    enum { COUNT = 300, CODEC = PYCCL_CODEC_UINT8 };
    uint64_t state = test_seed();
    for (unsigned round = 0; round < 20000; round++) {
        float x[COUNT], y[COUNT], z[COUNT], low, high, scale;
        uint8_t coded[COUNT + 8], again[COUNT + 8];
        const flavour how = (flavour)(round % TIES);
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

/* What docs/codecs.md promises of an element of a block with this peak. */
static double error_bound(uint8_t codec, float x, float peak, float scale) {
    const double size = fabs((double)x);
    switch (codec) {
    case PYCCL_CODEC_INT8: return (double)scale * (0.5 + 0x1p-16);
    case PYCCL_CODEC_FP8_E4M3: return fmax(size * (0x1p-4 + 0x1p-22), (double)scale * (0x1p-10 + 0x1p-28));
    case PYCCL_CODEC_FP4_E3M0: return fmax(size / 3, (double)peak * 0x1p-7) + 0x1p-150;
    default: return fmax(size * 0x1p-8, 0x1p-134);
    }
}

TEST(quant_errors_are_within_their_bounds_and_encoding_again_changes_nothing) {
    enum { COUNT = 300 };
    uint64_t state = test_seed();
    for (unsigned round = 0; round < 10000; round++) {
        const uint8_t codec = CODECS[1 + round % (CODEC_COUNT - 1)];
        const flavour how = (flavour)(round / CODEC_COUNT % ANY_BITS);
        const size_t bytes = pyccl_codec_size(codec, COUNT, COUNT);
        float x[COUNT], y[COUNT], scale = 0, peak = 0;
        uint8_t coded[COUNT * 2], again[COUNT * 2];
        const float size = ldexpf(1.0f, (int)(test_random(&state) % 245) - 125);
        for (size_t i = 0; i < COUNT; i++) x[i] = how == PLAIN ? draw(how, &state) * size : draw(how, &state);
        const float largest = most(codec == PYCCL_CODEC_BFLOAT16 ? PYCCL_BFLOAT16 : PYCCL_FLOAT32);
        for (size_t i = 0; i < COUNT; i++) x[i] = fabsf(x[i]) > largest ? copysignf(largest, x[i]) : x[i];
        REQUIRE(pyccl_codec_encode(codec, PYCCL_FLOAT32, COUNT, x, COUNT, coded) == PYCCL_OK);
        REQUIRE(pyccl_codec_decode(codec, PYCCL_FLOAT32, COUNT, coded, COUNT, y) == PYCCL_OK);
        REQUIRE(pyccl_codec_encode(codec, PYCCL_FLOAT32, COUNT, y, COUNT, again) == PYCCL_OK);
        memcpy(&scale, coded, 4);
        peak = peak_of(x, COUNT);
        for (size_t i = 0; i < COUNT; i++) {
            const double error = fabs((double)x[i] - (double)y[i]);
            double bound = error_bound(codec, x[i], peak, scale);
            if (scale == 0 && codec != PYCCL_CODEC_BFLOAT16) bound = codec == PYCCL_CODEC_INT8 ? 0x1p-126 : 0x1p-135;
            if (error > bound) printf("    codec %d x %a decoded %a peak %a scale %a: error %g, bound %g\n", codec, x[i], y[i], peak, scale, error, bound);
            CHECK(error <= bound);
            CHECK(codec == PYCCL_CODEC_BFLOAT16 || scale <= 0x1p-125f || fabsf(y[i]) <= peak);
        }
        if (codec != PYCCL_CODEC_FP4_E3M0 || peak >= 0x1p-120f) CHECK(memcmp(coded, again, bytes) == 0);
    }
}

TEST(quant_fp4_gives_the_examples_of_its_definition) {
    const float x[9] = {2, -1.4f, 0.1f, 0.01f, -0.0f, 0.0f, -0.0156f, 0.015625f, -2};
    const float want[9] = {2, -1, 0.125f, 0, 0, 0, 0, 0.03125f, -2};
    static const uint8_t codes[9] = {0x00, 0x00, 0x00, 0x40, 0xe7, 0x03, 0x00, 0x10, 0x0f}; /* the scale, then pairs */
    uint8_t coded[9];
    float y[9];
    CHECK_EQ(pyccl_codec_encode(PYCCL_CODEC_FP4_E3M0, PYCCL_FLOAT32, 16, x, 9, coded), PYCCL_OK);
    CHECK(memcmp(coded, codes, sizeof coded) == 0);
    CHECK_EQ(pyccl_codec_decode(PYCCL_CODEC_FP4_E3M0, PYCCL_FLOAT32, 16, coded, 9, y), PYCCL_OK);
    CHECK(memcmp(y, want, sizeof y) == 0);
}

TEST(quant_one_bad_element_makes_its_block_nan_but_in_bfloat16_itself_alone) {
    for (size_t c = 0; c < CODEC_COUNT; c++) {
        const float bad[] = {NAN, INFINITY, -INFINITY};
        for (size_t b = 0; b < 3; b++) {
            float x[200], y[200];
            uint8_t coded[420];
            for (size_t i = 0; i < 200; i++) x[i] = 1;
            x[70] = bad[b];
            CHECK_EQ(pyccl_codec_encode(CODECS[c], PYCCL_FLOAT32, 64, x, 200, coded), PYCCL_OK);
            CHECK_EQ(pyccl_codec_decode(CODECS[c], PYCCL_FLOAT32, 64, coded, 200, y), PYCCL_OK);
            for (size_t i = 0; i < 200; i++) {
                const bool all = CODECS[c] != PYCCL_CODEC_BFLOAT16, lost = all ? i / 64 == 1 : i == 70;
                CHECK(lost ? (all || b == 0 ? f32_bits(y[i]) == F32_NAN : y[i] == bad[b]) : fabsf(y[i] - 1) < 0x1p-14f);
            }
        }
    }
}

TEST(quant_corner_values) {
    enum { CODEC = PYCCL_CODEC_UINT8 };
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

static void check_reduce(uint8_t codec) {
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
            coded[k] = allocate(pyccl_codec_size(codec, blocks[b], COUNT));
            CHECK_EQ(pyccl_codec_encode(codec, PYCCL_FLOAT32, blocks[b], x, COUNT, coded[k]), PYCCL_OK);
            CHECK_EQ(pyccl_codec_decode(codec, PYCCL_FLOAT32, blocks[b], coded[k], COUNT, decoded[k]), PYCCL_OK);
            in[k] = decoded[k];
        }
        for (kernel k = KERNEL_SCALAR; k < KERNEL_COUNT; k++) {
            if (!kernel_supported(k)) continue;
            for (uint8_t op = PYCCL_SUM; op <= PYCCL_MAX; op++)
                for (size_t inputs = 1; inputs <= INPUTS; inputs++) {
                    const double *w = op == PYCCL_AVG && k % 2 == 0 ? weights : NULL;
                    CHECK_EQ(reduce_with(k, PYCCL_FLOAT32, op, in, w, inputs, COUNT, want), PYCCL_OK);
                    CHECK_EQ(quant_reduce_with(k, codec, op, blocks[b], (const uint8_t *const *)coded, w, inputs, COUNT, got), PYCCL_OK);
                    CHECK(memcmp(got, want, sizeof got) == 0);
                }
        }
        for (size_t k = 0; k < INPUTS; k++) free(coded[k]);
    }
}

TEST(quant_reduce_gives_the_bytes_of_decoding_and_folding) {
    for (size_t c = 0; c < CODEC_COUNT; c++) check_reduce(CODECS[c]);
}

#if defined(__x86_64__)
TEST(quant_ignores_and_keeps_the_callers_flush_to_zero_mode) {
    enum { CODEC = PYCCL_CODEC_UINT8 };
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
