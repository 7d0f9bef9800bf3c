/* engine_fold.c: the result of an attempt: where its pieces lie, how they are folded and encoded, and how memory that
 * the result overwrites gets its old bytes back.
 *
 *   in place    the result comes together in the caller's array. Before a piece of it is overwritten its old bytes go
 *               to `undo` (same offsets); until the commit they are our input, for repeated contributions too, and
 *               fold_restore puts them back when the attempt ends without a commit.
 *   codec       every contribution is encoded once, our own too, and kept until the attempt ends; the owner folds what
 *               the codes decode to, encodes the result and uses what that decodes to, as everybody else does.
 *   exchange    of a result of two shares the partner's alone is kept, at the start of the caller's array: what is sent and
 *               what comes in its place have one slot
 *   reduce_scatter  our share alone is kept, as the fold gives it: no codec rounds it again
 *   avg         waits for the OPEN of every participant, which brings its weight.
 * Invariant: fold_input() gives the bytes the caller submitted, whatever has been overwritten.
 * Threads: the engine's thread only.                               Spec: proto/wire.md 3.3, 3.4, 3.6, 3.7 */
#include <string.h>

#include "engine.h"
#include "reduce.h"

#define TILE_BYTES 32768             /* what is folded at a time from codes */
#define SAVE_BYTES 8192              /* what is saved and folded at a time: read from memory once, stored while it is folded */
#define BREATH_BYTES (8u << 20)      /* copied between two looks at the clock */

/* ---- places ---- */

static uint64_t slot_of(const attempt *a, uint32_t owner, uint64_t piece) { return a->slot_at[owner] + piece; }

static uint64_t result_offset(const attempt *a, uint32_t owner, uint64_t piece) {
    return schedule_piece_start(&a->schedule, owner, piece) * a->schedule.element_bytes;
}

static uint64_t piece_bytes(const attempt *a, uint32_t owner, uint64_t piece) {
    return schedule_piece_elements(&a->schedule, owner, piece) * a->schedule.element_bytes;
}

/* Where it is kept: in the caller's memory, and in undo. */
static uint64_t kept_offset(const attempt *a, uint32_t owner, uint64_t piece) {
    if (a->schedule.kind == PYCCL_EXCHANGE || a->schedule.kind == PYCCL_REDUCE_SCATTER) return piece * a->schedule.piece_elements * a->schedule.element_bytes;
    return result_offset(a, owner, piece);
}

/* Our input to a piece, as it was submitted. */
const uint8_t *fold_input(const attempt *a, uint32_t owner, uint64_t piece) {
    if (a->schedule.kind == PYCCL_ALL_GATHER) return a->src + piece * a->schedule.piece_elements * a->schedule.element_bytes;
    if (a->schedule.kind == PYCCL_REDUCE_SCATTER) return a->src + result_offset(a, owner, piece);
    const bool saved = a->undo != NULL && a->saved[slot_of(a, owner, piece)];
    return (saved ? a->undo : a->src) + kept_offset(a, owner, piece);
}

/* ---- undo ---- */

/* Of bytes that are not used again soon. */
static void put_aside(const attempt *a, void *to, const void *from, size_t bytes) {
    if (a->past_cache) copy_past(to, from, bytes);
    else memcpy(to, from, bytes);
}

/* The old bytes of the piece are in undo: frames that are half sent go on from there. */
static void mark_saved(pyccl_engine *engine, attempt *a, uint32_t owner, uint64_t piece) {
    const uint64_t offset = kept_offset(a, owner, piece);
    a->saved[slot_of(a, owner, piece)] = 1;
    for (peer *p = engine->peers; p != NULL; p = p->next)
        link_redirect(&p->link, a, a->result + offset, piece_bytes(a, owner, piece), a->undo + offset);
}

static void save(pyccl_engine *engine, attempt *a, uint32_t owner, uint64_t piece) {
    if (a->undo == NULL || a->saved[slot_of(a, owner, piece)]) return;
    const uint64_t offset = kept_offset(a, owner, piece);
    put_aside(a, a->undo + offset, a->result + offset, piece_bytes(a, owner, piece));
    mark_saved(engine, a, owner, piece);
}

uint8_t *fold_place(pyccl_engine *engine, attempt *a, uint32_t owner, uint64_t piece) {
    save(engine, a, owner, piece);
    return a->result + kept_offset(a, owner, piece);
}

void fold_restore(pyccl_engine *engine, attempt *a) {
    uint64_t copied = 0;
    if (a->undo == NULL) return;
    for (uint32_t owner = 0; owner < a->schedule.world; owner++)
        for (uint64_t piece = 0; piece < schedule_pieces(&a->schedule, owner); piece++) {
            const uint64_t slot = slot_of(a, owner, piece), offset = kept_offset(a, owner, piece);
            if (!a->saved[slot]) continue;
            memcpy(a->result + offset, a->undo + offset, piece_bytes(a, owner, piece));
            a->saved[slot] = 0;
            copied += piece_bytes(a, owner, piece);
            if (copied < BREATH_BYTES) continue;
            copied = 0;
            engine_breathe(engine);
        }
}

/* ---- codec ---- */

bool fold_is_coded(const attempt *a) { return a->schedule.codec != PYCCL_CODEC_NONE; }

const uint8_t *fold_encoded_input(attempt *a, uint32_t owner, uint64_t piece) {
    const uint64_t slot = slot_of(a, owner, piece);
    uint8_t *codes = a->codes + slot * a->code_stride;
    if (a->encoded[slot]) return codes;
    const pyccl_status rc = pyccl_codec_encode(a->schedule.codec, a->op->args.spec.dtype, a->schedule.block, fold_input(a, owner, piece),
                                               schedule_piece_elements(&a->schedule, owner, piece), codes);
    PYCCL_ASSERT(rc == PYCCL_OK);
    a->encoded[slot] = 1;
    return codes;
}

uint8_t *fold_result_codes(const attempt *a, uint32_t owner, uint64_t piece) {
    return a->result_codes + (a->schedule.ring ? slot_of(a, owner, piece) : piece) * a->code_stride;
}

const uint8_t *fold_source(attempt *a, uint32_t phase, uint32_t to, uint64_t item) {
    const schedule *s = &a->schedule;
    uint32_t owner;
    uint64_t piece;
    schedule_item(s, phase, s->rank, to, item, &owner, &piece);
    if (phase == SCHEDULE_CONTRIBUTION) {
        if (s->ring && schedule_step(s, owner, s->rank) > 0) return a->contribution[item];
        return fold_is_coded(a) ? fold_encoded_input(a, owner, piece) : fold_input(a, owner, piece);
    }
    if (fold_is_coded(a)) return fold_result_codes(a, owner, piece);
    if (s->kind == PYCCL_ALL_GATHER || s->kind == PYCCL_EXCHANGE || a->result == NULL) return fold_input(a, owner, piece);
    return a->result + result_offset(a, owner, piece);
}

/* float32 rounded once to another float, as every fold ends; NaN canonical. */
static void round_floats(uint8_t dtype, const float *in, size_t count, uint8_t *out) {
    static const uint64_t nan_bits = UINT64_C(0x7ff8000000000000);
    if (dtype == PYCCL_FLOAT64) {
        for (size_t i = 0; i < count; i++) {
            const double wide = in[i];
            memcpy(out + i * sizeof wide, in[i] == in[i] ? (const void *)&wide : (const void *)&nan_bits, sizeof wide);
        }
        return;
    }
    reduce_fold fold;
    const pyccl_status rc = reduce_fold_init(&fold, kernel_current(), dtype, PYCCL_SUM, NULL, 1);
    PYCCL_ASSERT(rc == PYCCL_OK);
    const reduce_step step = {.a = in, .b = in, .out = out, .count = count, .dtype = dtype, .op = REDUCE_ONE, .a_wide = true,
                              .weight_a = 1, .weight_b = 1, .divisor = 1};
    fold.run(&step);
}

/* Elements of a tile: whole blocks. */
uint64_t fold_tile_elements(const attempt *a) {
    const uint64_t elements = TILE_BYTES / sizeof(float);
    return elements < a->schedule.block ? a->schedule.block : elements;
}

/* An encoded piece of the result, from its owner. */
static void result_decode(pyccl_engine *engine, attempt *a, uint32_t owner, uint64_t piece, const uint8_t *codes) {
    const uint8_t dtype = a->op->args.spec.dtype;
    uint8_t *out = fold_place(engine, a, owner, piece);
    uint64_t left = schedule_piece_elements(&a->schedule, owner, piece);
    while (left > 0) {
        const uint64_t n = left < fold_tile_elements(a) ? left : fold_tile_elements(a);
        void *to = dtype == PYCCL_FLOAT32 ? (void *)out : engine->tile;
        const pyccl_status rc = pyccl_codec_decode(a->schedule.codec, PYCCL_FLOAT32, a->schedule.block, codes, n, to);
        PYCCL_ASSERT(rc == PYCCL_OK);
        if (dtype != PYCCL_FLOAT32) round_floats(dtype, engine->tile, n, out);
        codes += pyccl_codec_size(a->schedule.codec, a->schedule.block, n);
        out += n * a->schedule.element_bytes;
        left -= n;
    }
}

/* ---- folds ---- */

const double *fold_weights(const attempt *a) { return a->weighted ? a->weights : NULL; }

/* Returns where the folded piece lies for now. In a big swap that is a buffer that was received: it goes from there past
 * the caches to the result, which no one reads soon. */
static const uint8_t *fold_plain(attempt *a, uint64_t piece, const void **in) {
    const pyccl_spec *spec = &a->op->args.spec;
    const schedule *s = &a->schedule;
    const uint64_t offset = kept_offset(a, s->rank, piece), bytes = piece_bytes(a, s->rank, piece);
    const uint64_t tile = a->undo != NULL ? SAVE_BYTES : bytes;
    const bool aside = s->swap && a->past_cache && a->undo == NULL;
    uint8_t *result = a->result + offset, *out = aside ? a->contribution[piece] : result; /* swap: all are of the other */
    for (uint64_t at = 0; at < bytes; at += tile) {
        const uint64_t n = bytes - at < tile ? bytes - at : tile;
        if (a->undo != NULL) put_aside(a, a->undo + offset + at, result + at, n);
        const pyccl_status rc = pyccl_reduce(spec->dtype, spec->op, in, fold_weights(a), s->world, n / s->element_bytes, out + at);
        PYCCL_ASSERT(rc == PYCCL_OK);
        for (uint32_t rank = 0; rank < s->world; rank++) in[rank] = (const uint8_t *)in[rank] + n;
    }
    if (aside) {
        put_aside(a, result, out, bytes);
        copy_past_end();
    }
    return out;
}

void fold_finish_tile(const attempt *a, float *sum, uint64_t elements, uint8_t **codes, uint8_t *out) {
    const pyccl_spec *spec = &a->op->args.spec;
    if (*codes != NULL) {
        pyccl_status rc = pyccl_codec_encode(spec->codec, PYCCL_FLOAT32, spec->block, sum, elements, *codes);
        if (rc == PYCCL_OK) rc = pyccl_codec_decode(spec->codec, PYCCL_FLOAT32, spec->block, *codes, elements, sum);
        PYCCL_ASSERT(rc == PYCCL_OK);
        *codes += pyccl_codec_size(spec->codec, spec->block, elements);
    }
    if ((void *)sum != (void *)out) round_floats(spec->dtype, sum, elements, out);
}

/* What the codes decode to is folded in float32. Where the result goes to nobody that is it, else what its codes decode to. */
static void fold_coded(pyccl_engine *engine, attempt *a, uint64_t piece, const uint8_t **in) {
    const pyccl_spec *spec = &a->op->args.spec;
    const schedule *s = &a->schedule;
    const uint64_t tile = fold_tile_elements(a);
    uint64_t left = schedule_piece_elements(s, s->rank, piece), at = kept_offset(a, s->rank, piece);
    uint8_t *codes = a->result_codes != NULL ? fold_result_codes(a, s->rank, piece) : NULL;
    while (left > 0) {
        const uint64_t n = left < tile ? left : tile, size = pyccl_codec_size(spec->codec, spec->block, n);
        float *folded = spec->dtype == PYCCL_FLOAT32 ? (float *)(void *)(a->result + at) : engine->tile;
        if (a->undo != NULL) put_aside(a, a->undo + at, a->result + at, n * s->element_bytes);
        const pyccl_status rc = pyccl_codec_reduce(spec->codec, spec->op, spec->block, in, fold_weights(a), s->world, n, folded);
        PYCCL_ASSERT(rc == PYCCL_OK);
        fold_finish_tile(a, folded, n, &codes, a->result + at);
        for (uint32_t rank = 0; rank < s->world; rank++) in[rank] += size;
        at += n * s->element_bytes;
        left -= n;
    }
}

/* No two members hold the same bits of a reduce_scatter: they compare what it was made of. */
static uint64_t hash_of_scatter(const attempt *a) {
    uint8_t spec[PYCCL_SPEC_SIZE];
    pyccl_spec_encode(&a->op->args.spec, spec);
    const uint64_t of_weights = a->weights != NULL ? pyccl_xxh3_64(a->weights, a->schedule.world * sizeof *a->weights, 0) : 0;
    return pyccl_xxh3_64(spec, sizeof spec, of_weights + a->schedule.world);
}

uint64_t fold_hash(const attempt *a) { return a->schedule.kind == PYCCL_REDUCE_SCATTER ? hash_of_scatter(a) : a->hash; }

void fold_piece_is_whole(pyccl_engine *engine, attempt *a, uint32_t owner, uint64_t piece, const uint8_t *bytes) {
    guard_result(a, owner, piece, bytes);
    if (a->schedule.kind != PYCCL_REDUCE_SCATTER) a->hash += pyccl_xxh3_64(bytes, piece_bytes(a, owner, piece), result_offset(a, owner, piece));
    PYCCL_ASSERT(a->pieces_left > 0);
    a->pieces_left--;
    ops_result_ready(engine, a, owner, piece);
}

/* All contributions to a piece of our share are here: fold them in the order of the ranks. */
static void fold_piece(pyccl_engine *engine, attempt *a, uint64_t piece) {
    const schedule *s = &a->schedule;
    const void *in[PYCCL_WORLD_MAX];
    const uint32_t self = s->rank;
    for (uint32_t rank = 0; rank < s->world; rank++) {
        if (rank != self) in[rank] = a->contribution[a->arrived_at[SCHEDULE_CONTRIBUTION][rank] + piece];
        else in[rank] = fold_is_coded(a) ? fold_encoded_input(a, self, piece) : fold_input(a, self, piece);
    }
    if (fold_is_coded(a)) guard_contribution(engine, a, self, piece, in[self]); /* else its submit has looked at it */
    const uint8_t *folded = a->result + kept_offset(a, self, piece);
    if (fold_is_coded(a)) fold_coded(engine, a, piece, (const uint8_t **)in);
    else folded = fold_plain(a, piece, in);
    if (a->undo != NULL) mark_saved(engine, a, self, piece);
    fold_piece_is_whole(engine, a, self, piece, folded);
    for (uint32_t rank = 0; rank < s->world; rank++) {
        if (rank == self) continue;
        uint8_t **buffer = &a->contribution[a->arrived_at[SCHEDULE_CONTRIBUTION][rank] + piece];
        piece_free(engine, *buffer, schedule_item_bytes(s, SCHEDULE_CONTRIBUTION, rank, self, piece));
        *buffer = NULL;
    }
}

static void fold_whole(pyccl_engine *engine, attempt *a, uint64_t item) {
    if (a->schedule.ring) ring_fold(engine, a, item);
    else fold_piece(engine, a, item);
}

void fold_contribution(pyccl_engine *engine, attempt *a, uint64_t item) {
    if (!a->schedule.ring && --a->missing[item] > 0) return;
    if (a->weights_missing > 0) a->held[a->held_count++] = item;
    else fold_whole(engine, a, item);
}

void fold_result(pyccl_engine *engine, attempt *a, uint32_t owner, uint64_t piece, const uint8_t *codes) {
    if (fold_is_coded(a)) result_decode(engine, a, owner, piece, a->schedule.ring ? fold_result_codes(a, owner, piece) : codes);
    fold_piece_is_whole(engine, a, owner, piece, a->result + kept_offset(a, owner, piece));
}

void fold_local(pyccl_engine *engine, attempt *a, uint32_t owner, uint64_t piece) {
    const uint8_t *from = fold_input(a, owner, piece);
    uint8_t *dst = a->schedule.kind == PYCCL_ALL_GATHER ? a->result : a->op->args.dst;
    if (a->schedule.kind != PYCCL_EXCHANGE && dst != NULL && dst != a->src) memcpy(dst + result_offset(a, owner, piece), from, piece_bytes(a, owner, piece));
    fold_piece_is_whole(engine, a, owner, piece, from);
}

/* ---- weights ---- */

pyccl_status fold_weight(pyccl_engine *engine, attempt *a, uint32_t rank, double weight) {
    if (a->weights_missing == 0) return PYCCL_OK;
    const pyccl_spec *spec = &a->op->args.spec;
    a->weights[rank] = weight;
    if (--a->weights_missing > 0) return PYCCL_OK;
    for (uint32_t i = 0; i < a->schedule.world; i++) a->weighted |= a->weights[i] != 1.0;
    const uint8_t dtype = fold_is_coded(a) ? PYCCL_FLOAT32 : spec->dtype;
    const void *in[PYCCL_WORLD_MAX] = {NULL};
    const pyccl_status rc = pyccl_reduce(dtype, spec->op, in, fold_weights(a), a->schedule.world, 0, NULL); /* the total */
    if (rc != PYCCL_OK) return rc;
    while (a->held_count > 0) fold_whole(engine, a, a->held[--a->held_count]);
    return PYCCL_OK;
}
