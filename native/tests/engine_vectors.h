/* engine_vectors.h: inputs of operations between engines and what must come out, bit for bit: a plain loop, or for every
 * dtype and codec the kernels on whole vectors (which test_reduce.c and test_quant.c compare with plain loops). */
#ifndef PYCCL_ENGINE_VECTORS_H
#define PYCCL_ENGINE_VECTORS_H

#include "schedule.h"
#include "element.h"
#include "engine_cluster.h"

static inline void fill(void *out, uint8_t dtype, uint64_t count, uint64_t seed) {
    for (uint64_t i = 0; i < count; i++) {
        const uint64_t r = test_random(&seed);
        switch (dtype) {
        case PYCCL_INT32: ((uint32_t *)out)[i] = (uint32_t)r; break;
        case PYCCL_INT64: ((uint64_t *)out)[i] = r; break;
        case PYCCL_FLOAT32: ((float *)out)[i] = (float)(int32_t)r * 0x1p-24f; break;
        case PYCCL_FLOAT64: ((double *)out)[i] = (double)(int64_t)r * 0x1p-56; break;
        default: ((uint8_t *)out)[i] = (uint8_t)r;
        }
    }
}

#define FOLD(type, zero_type)                                                            \
    do {                                                                                 \
        const type *x[ENGINES_MAX];                                                      \
        for (uint32_t r = 0; r < world; r++) x[r] = in[r];                               \
        for (uint64_t i = 0; i < count; i++) {                                           \
            type a = x[0][i];                                                            \
            for (uint32_t r = 1; r < world; r++) {                                       \
                const type b = x[r][i];                                                  \
                if (op == PYCCL_SUM || op == PYCCL_AVG) a = (type)((zero_type)a + (zero_type)b); \
                if (op == PYCCL_PROD) a = (type)((zero_type)a * (zero_type)b);           \
                if (op == PYCCL_MIN) a = b < a ? b : a;                                  \
                if (op == PYCCL_MAX) a = b > a ? b : a;                                  \
            }                                                                            \
            if (op == PYCCL_AVG) a = (type)(a / (type)world);                            \
            ((type *)out)[i] = a;                                                        \
        }                                                                                \
    } while (0)

static inline void fold(uint8_t dtype, uint8_t op, const void *const *in, uint32_t world, uint64_t count, void *out) {
    switch (dtype) {
    case PYCCL_INT32: FOLD(int32_t, uint32_t); break;
    case PYCCL_INT64: FOLD(int64_t, uint64_t); break;
    case PYCCL_FLOAT32: FOLD(float, float); break;
    default: FOLD(double, double);
    }
}

typedef struct vectors {             /* the inputs of one all_reduce and what must come out */
    uint32_t world;
    uint64_t bytes;
    uint8_t *in[ENGINES_MAX], *out[ENGINES_MAX], *want;
} vectors;

static inline vectors vectors_new(uint8_t dtype, uint8_t op, uint64_t count, uint32_t world, uint64_t seed) {
    vectors v = {.world = world, .bytes = count * pyccl_dtype_size(dtype)};
    for (uint32_t i = 0; i < world; i++) {
        v.in[i] = malloc(v.bytes + 1);
        v.out[i] = malloc(v.bytes + 1);
        memset(v.out[i], 0xEE, v.bytes + 1);
        fill(v.in[i], dtype, count, seed * 1000 + i);
    }
    v.want = malloc(v.bytes + 1);
    fold(dtype, op, (const void *const *)v.in, world, count, v.want);
    return v;
}

static inline void vectors_free(vectors *v) {
    for (uint32_t i = 0; i < v->world; i++) {
        free(v->in[i]);
        free(v->out[i]);
    }
    free(v->want);
}

static inline uint8_t *copied(const uint8_t *bytes, uint64_t size) {
    uint8_t *copy = malloc(size + 1);
    memcpy(copy, bytes, size);
    return copy;
}

static inline void check_all_reduce(const cluster *c, uint8_t dtype, uint8_t op, uint64_t count, int in_place) {
    vectors v = vectors_new(dtype, op, count, c->count, count * 31 + dtype * 7 + op);
    pyccl_op *ops[ENGINES_MAX];
    for (uint32_t i = 0; i < c->count; i++)
        ops[i] = submit(c, i, reduce_spec(dtype, op, count, 0), v.in[i], in_place ? v.in[i] : v.out[i], v.bytes);
    for (uint32_t i = 0; i < c->count; i++) {
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
        CHECK(memcmp(in_place ? v.in[i] : v.out[i], v.want, v.bytes) == 0);
        CHECK(in_place || v.out[i][v.bytes] == 0xEE);
    }
    vectors_free(&v);
}

static inline int is_float(uint8_t dtype) {
    return dtype == PYCCL_FLOAT16 || dtype == PYCCL_BFLOAT16 || dtype == PYCCL_FLOAT32 || dtype == PYCCL_FLOAT64;
}

/* Numbers that do not lose themselves in infinity; of shorter floats any bits would be mostly that. */
static inline void fill_any(void *out, uint8_t dtype, uint64_t count, uint64_t seed) {
    float *wide = malloc(count * sizeof *wide + 1);
    fill(wide, PYCCL_FLOAT32, count, seed);
    for (uint64_t i = 0; i < count; i++) {
        if (dtype == PYCCL_FLOAT16) ((uint16_t *)out)[i] = f16_from_f32(wide[i]);
        if (dtype == PYCCL_BFLOAT16) ((uint16_t *)out)[i] = bf16_from_f32(wide[i]);
    }
    if (dtype == PYCCL_FLOAT32 || dtype == PYCCL_FLOAT64) fill(out, dtype, count, seed);
    else if (!is_float(dtype)) fill(out, PYCCL_UINT8, count * pyccl_dtype_size(dtype), seed);
    free(wide);
}

/* proto/wire.md 3.3, 3.6 with the codec functions on whole vectors. */
static inline void fold_coded(const pyccl_spec *spec, void *const *in, const double *weights, uint32_t world, void *out) {
    const uint64_t count = spec->count;
    uint8_t *codes = malloc(pyccl_codec_size(spec->codec, spec->block, count) + 1);
    float *wide[ENGINES_MAX];
    for (uint32_t i = 0; i < world; i++) {
        wide[i] = malloc(count * sizeof(float) + 1);
        REQUIRE(pyccl_codec_encode(spec->codec, spec->dtype, spec->block, in[i], count, codes) == PYCCL_OK);
        REQUIRE(pyccl_codec_decode(spec->codec, PYCCL_FLOAT32, spec->block, codes, count, wide[i]) == PYCCL_OK);
    }
    REQUIRE(pyccl_reduce(PYCCL_FLOAT32, spec->op, (const void *const *)wide, weights, world, count, wide[0]) == PYCCL_OK);
    if (world > 2) {
        REQUIRE(pyccl_codec_encode(spec->codec, PYCCL_FLOAT32, spec->block, wide[0], count, codes) == PYCCL_OK);
        REQUIRE(pyccl_codec_decode(spec->codec, PYCCL_FLOAT32, spec->block, codes, count, wide[0]) == PYCCL_OK);
    }
    for (uint64_t i = 0; i < count; i++) {
        if (spec->dtype == PYCCL_FLOAT16) ((uint16_t *)out)[i] = f16_from_f32(wide[0][i]);
        if (spec->dtype == PYCCL_BFLOAT16) ((uint16_t *)out)[i] = bf16_from_f32(wide[0][i]);
        if (spec->dtype == PYCCL_FLOAT32) ((float *)out)[i] = wide[0][i];
        if (spec->dtype == PYCCL_FLOAT64) ((double *)out)[i] = wide[0][i];
    }
    for (uint32_t i = 0; i < world; i++) free(wide[i]);
    free(codes);
}

/* proto/wire.md 3.3, 3.7: each share in the order of the ring, with pyccl_reduce. The total of weights must be exact. */
static inline void fold_ring(const pyccl_spec *spec, void *const *in, const double *weights, uint32_t world, const pyccl_plan *plan, void *out) {
    epoch_plan judged;
    schedule s;
    REQUIRE(epoch_plan_init(&judged, plan, world) == PYCCL_OK);
    schedule_init(&s, spec, &judged, 0, 0);
    for (uint32_t owner = 0; owner < world; owner++) {
        const uint64_t start = schedule_share_start(&s, owner), count = schedule_share_elements(&s, owner);
        void *turned[ENGINES_MAX];
        double turned_weights[ENGINES_MAX];
        uint32_t at = owner;
        for (uint32_t k = 0; k < world; k++) {
            at = schedule_next(&s, at);
            turned[k] = (uint8_t *)in[at] + start * s.element_bytes;
            turned_weights[k] = weights != NULL ? weights[at] : 1;
        }
        pyccl_spec part = *spec;
        part.count = count;
        uint8_t *to = (uint8_t *)out + start * s.element_bytes;
        if (spec->codec != 0) fold_coded(&part, turned, weights != NULL ? turned_weights : NULL, world, to);
        else REQUIRE(pyccl_reduce(spec->dtype, spec->op, (const void *const *)turned, weights != NULL ? turned_weights : NULL, world, count, to) == PYCCL_OK);
    }
}

static inline vectors vectors_planned(const pyccl_spec *spec, const double *weights, uint32_t world, uint64_t seed, const pyccl_plan *plan) {
    vectors v = {.world = world, .bytes = spec->count * pyccl_dtype_size(spec->dtype)};
    for (uint32_t i = 0; i < world; i++) {
        v.in[i] = malloc(v.bytes + 1);
        v.out[i] = malloc(v.bytes + 1);
        memset(v.out[i], 0xEE, v.bytes + 1);
        fill_any(v.in[i], spec->dtype, spec->count, seed * 1000 + i);
    }
    v.want = malloc(v.bytes + 1);
    const int in_ring = world > 2 && spec->kind == PYCCL_ALL_REDUCE && spec->algorithm == PYCCL_RING;
    if (in_ring) fold_ring(spec, (void *const *)v.in, weights, world, plan, v.want);
    else if (spec->codec != 0) fold_coded(spec, (void *const *)v.in, weights, world, v.want);
    else REQUIRE(pyccl_reduce(spec->dtype, spec->op, (const void *const *)v.in, weights, world, spec->count, v.want) == PYCCL_OK);
    return v;
}

static inline vectors vectors_any(const pyccl_spec *spec, const double *weights, uint32_t world, uint64_t seed) {
    return vectors_planned(spec, weights, world, seed, NULL);
}

static inline void check_any(const cluster *c, pyccl_spec spec, const double *weights, int in_place) {
    vectors v = vectors_planned(&spec, weights, c->count, spec.count * 31 + spec.dtype * 7 + spec.op, c->plan);
    pyccl_op *ops[ENGINES_MAX];
    for (uint32_t i = 0; i < c->count; i++)
        ops[i] = submit_weighted(c, i, spec, v.in[i], in_place ? v.in[i] : v.out[i], weights != NULL ? weights[i] : 1.0);
    for (uint32_t i = 0; i < c->count; i++) {
        CHECK_EQ(finish(ops[i]), PYCCL_OK);
        if (v.bytes == 0) continue;
        if (memcmp(in_place ? v.in[i] : v.out[i], v.want, v.bytes) != 0) {
            printf("world %u member %u dtype %u op %u codec %u block %u count %llu algorithm %u in place %d\n", c->count, i, spec.dtype,
                   spec.op, spec.codec, spec.block, (unsigned long long)spec.count, spec.algorithm, in_place);
            CHECK(!"the bits differ");
        }
        CHECK(in_place || v.out[i][v.bytes] == 0xEE);
    }
    vectors_free(&v);
}

/* ---- reduce_scatter ---- */

static inline pyccl_spec scatter_spec(uint8_t algorithm, uint8_t dtype, uint8_t op, uint64_t rows, uint64_t row) {
    pyccl_spec spec = {.kind = PYCCL_REDUCE_SCATTER, .dtype = dtype, .op = op, .algorithm = algorithm, .count = rows * row};
    for (int i = 0; i < 8; i++) spec.root[i] = (uint8_t)(row >> (8 * i));
    return spec;
}

static inline uint64_t row_of_rank(uint64_t rows, uint32_t world, uint32_t rank) {
    return rank * (rows / world) + (rank < rows % world ? rank : rows % world);
}

/* The inputs in the order in which those of this rank's share are folded. */
static inline void fold_order(const pyccl_spec *spec, uint32_t world, const pyccl_plan *plan, uint32_t rank, uint32_t order[ENGINES_MAX]) {
    epoch_plan judged;
    schedule s;
    REQUIRE(epoch_plan_init(&judged, plan, world) == PYCCL_OK);
    schedule_init(&s, spec, &judged, 0, 0);
    CHECK_EQ(s.ring, world > 2 && spec->algorithm == PYCCL_RING);
    for (uint32_t i = 0, at = rank; i < world; i++) order[i] = s.ring ? at = schedule_next(&s, at) : i;
}

/* What all_reduce would give, one rounding less: a share is encoded for its owner alone, from its first element on. */
static inline uint8_t *expected_part(const pyccl_spec *spec, const vectors *v, const double *given, const pyccl_plan *plan, uint32_t rank,
                              uint64_t start, uint64_t count) {
    const uint64_t size = pyccl_dtype_size(spec->dtype);
    uint8_t *out = malloc(count * size + 1), *codes = malloc(count * 2 + 4096);
    const void *in[ENGINES_MAX];
    float *wide[ENGINES_MAX];
    uint32_t order[ENGINES_MAX];
    double turned[ENGINES_MAX];
    const double *weights = given != NULL ? turned : NULL;
    fold_order(spec, v->world, plan, rank, order);
    for (uint32_t i = 0; i < v->world; i++) {
        in[i] = v->in[order[i]] + start * size;
        turned[i] = given != NULL ? given[order[i]] : 1;
    }
    if (spec->codec == 0) {
        REQUIRE(pyccl_reduce(spec->dtype, spec->op, in, weights, v->world, count, out) == PYCCL_OK);
        free(codes);
        return out;
    }
    for (uint32_t i = 0; i < v->world; i++) {
        wide[i] = malloc(count * sizeof(float) + 1);
        REQUIRE(pyccl_codec_encode(spec->codec, spec->dtype, spec->block, in[i], count, codes) == PYCCL_OK);
        REQUIRE(pyccl_codec_decode(spec->codec, PYCCL_FLOAT32, spec->block, codes, count, wide[i]) == PYCCL_OK);
    }
    REQUIRE(pyccl_reduce(PYCCL_FLOAT32, spec->op, (const void *const *)wide, weights, v->world, count, wide[0]) == PYCCL_OK);
    for (uint64_t i = 0; i < count; i++) {
        if (spec->dtype == PYCCL_FLOAT32) ((float *)(void *)out)[i] = wide[0][i];
        if (spec->dtype == PYCCL_BFLOAT16) ((uint16_t *)(void *)out)[i] = bf16_from_f32(wide[0][i]);
    }
    for (uint32_t i = 0; i < v->world; i++) free(wide[i]);
    free(codes);
    return out;
}

/* Any plan: some own nothing, the ring in any order. */
typedef struct drawn_plan {
    uint32_t shares[ENGINES_MAX], ring[ENGINES_MAX];
    pyccl_plan plan;
} drawn_plan;

static inline void plan_draw(drawn_plan *drawn, uint64_t *seed, uint32_t world) {
    for (uint32_t i = 0; i < world; i++) {
        const uint32_t at = (uint32_t)(test_random(seed) % (i + 1));
        drawn->ring[i] = drawn->ring[at];
        drawn->ring[at] = i;
        drawn->shares[i] = test_random(seed) % 3 == 0 ? 0 : (uint32_t)(test_random(seed) % 1000);
    }
    drawn->shares[test_random(seed) % world] = 500;
    const uint32_t piece = test_random(seed) % 2 == 0 ? 0 : PYCCL_PLAN_PIECE_MIN << test_random(seed) % 4;
    drawn->plan = (pyccl_plan){.shares = drawn->shares, .ring = drawn->ring, .ring_from_bytes = UINT64_MAX, .piece_bytes = piece};
}

#endif
