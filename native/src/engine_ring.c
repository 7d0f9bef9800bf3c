/* engine_ring.c: folds along a ring. What arrives of a piece is the input of the member that its way round begins with,
 * as it is or encoded, or the sum of several inputs in the accumulation type:
 *
 *      item --> [ input or sum ] . our input --> sum, in a buffer that goes on to the next member
 *                                            --> or, where the share is ours, the finished piece in the result
 *
 * A sum is kept until its result has come round, so that it can be sent again when a connection is lost; then it is of no
 * use any more (ops_partial_used). Of a reduce_scatter none comes: sums stay until the end, and a member is done only when
 * all of them have gone through it, since who is prepared takes no more data. A member that has opened the operation takes whatever comes, a vector of sums at
 * most, so nobody waits for room that only his own sending would make.
 * Threads: the engine's thread only.                               Spec: proto/wire.md 3.3, 3.7 */
#include <string.h>

#include "engine.h"
#include "float_mode.h"
#include "reduce.h"

/* Input 0 of the fold is that of the member after the owner; the divisor is that of rank order, as in every algorithm. */
static void fold_begin(const attempt *a, uint32_t owner, uint32_t step, double weights[PYCCL_WORLD_MAX], reduce_fold *fold) {
    const pyccl_spec *spec = &a->op->args.spec;
    const schedule *s = &a->schedule;
    const uint8_t dtype = fold_is_coded(a) ? PYCCL_FLOAT32 : spec->dtype;
    const pyccl_status rc = reduce_fold_init(fold, kernel_current(), dtype, spec->op, fold_weights(a), s->world);
    PYCCL_ASSERT(rc == PYCCL_OK); /* a total that can't divide has ended it when the last weight came */
    if (fold->weights == NULL) return;
    weights[0] = a->weights[schedule_next(s, owner)];
    weights[step] = a->weights[s->rank];
    fold->weights = weights;
}

/* from: the input or sum that arrived; out: the sum, or for the owner the place of the result. */
static void fold_plain(const attempt *a, const reduce_fold *fold, uint32_t owner, uint64_t piece, uint32_t step, const uint8_t *from, uint8_t *out) {
    const uint64_t elements = schedule_piece_elements(&a->schedule, owner, piece);
    const float_mode before = float_mode_enter();
    reduce_fold_step(fold, step, from, fold_input(a, owner, piece), out, elements);
    float_mode_leave(before);
}

/* Codes are decoded a tile at a time. result: for the owner, else NULL; sum: for all others. */
static void fold_coded(pyccl_engine *engine, attempt *a, const reduce_fold *fold, uint32_t owner, uint64_t piece, uint32_t step,
                       const uint8_t *from, uint8_t *sum, uint8_t *result) {
    const pyccl_spec *spec = &a->op->args.spec;
    const uint64_t tile = fold_tile_elements(a);
    const uint8_t *own = fold_encoded_input(a, owner, piece);
    uint8_t *codes = result != NULL && a->result_codes != NULL ? fold_result_codes(a, owner, piece) : NULL;
    float *ours = engine->tile;
    uint64_t n;
    for (uint64_t left = schedule_piece_elements(&a->schedule, owner, piece); left > 0; left -= n) {
        n = left < tile ? left : tile;
        const uint64_t size = pyccl_codec_size(spec->codec, spec->block, n);
        float *folded = result != NULL && spec->dtype == PYCCL_FLOAT32 ? (float *)(void *)result : engine->tile + ENGINE_TILE_FLOATS;
        pyccl_status rc = pyccl_codec_decode(spec->codec, PYCCL_FLOAT32, spec->block, own, n, ours);
        if (rc == PYCCL_OK && step == 1) rc = pyccl_codec_decode(spec->codec, PYCCL_FLOAT32, spec->block, from, n, folded);
        PYCCL_ASSERT(rc == PYCCL_OK);
        const float_mode before = float_mode_enter();
        reduce_fold_step(fold, step, step == 1 ? (const void *)folded : (const void *)from, ours, result != NULL ? (void *)folded : (void *)sum, n);
        float_mode_leave(before);
        if (result != NULL) {
            fold_finish_tile(a, folded, n, &codes, result);
            result += n * a->schedule.element_bytes;
        } else sum += n * sizeof(float);
        own += size;
        from += step == 1 ? size : n * sizeof(float);
    }
}

static void fold_into(pyccl_engine *engine, attempt *a, uint32_t owner, uint64_t piece, const uint8_t *from, uint8_t *sum, uint8_t *result) {
    double weights[PYCCL_WORLD_MAX];
    reduce_fold fold;
    const uint32_t step = schedule_step(&a->schedule, owner, a->schedule.rank);
    fold_begin(a, owner, step, weights, &fold);
    if (fold_is_coded(a)) fold_coded(engine, a, &fold, owner, piece, step, from, sum, result);
    else fold_plain(a, &fold, owner, piece, step, from, result != NULL ? result : sum);
}

/* The sum takes the place of what arrived where it is as long; else it gets a buffer of its own. False: no memory. */
static bool fold_on(pyccl_engine *engine, attempt *a, uint32_t owner, uint64_t piece, uint64_t item, uint32_t bytes) {
    uint8_t **buffer = &a->contribution[item];
    const uint32_t sum_bytes = schedule_partial_bytes(&a->schedule, owner, piece);
    const bool codes = fold_is_coded(a) && schedule_step(&a->schedule, owner, a->schedule.rank) == 1;
    uint8_t *from = *buffer, *sum = bytes == sum_bytes && !codes ? from : piece_alloc(engine, sum_bytes);
    if (sum == NULL) return false;
    fold_into(engine, a, owner, piece, from, sum, NULL);
    if (sum != from) piece_free(engine, from, bytes);
    *buffer = sum;
    if (a->schedule.kind == PYCCL_REDUCE_SCATTER) a->pieces_left--; /* nothing that comes back will show that it passed */
    ops_partial_ready(engine, a, item);
    return true;
}

void ring_fold(pyccl_engine *engine, attempt *a, uint64_t item) {
    const schedule *s = &a->schedule;
    const uint32_t from = schedule_previous(s, s->rank);
    const uint32_t bytes = schedule_item_bytes(s, SCHEDULE_CONTRIBUTION, from, s->rank, item);
    uint32_t owner;
    uint64_t piece;
    schedule_item(s, SCHEDULE_CONTRIBUTION, from, s->rank, item, &owner, &piece);
    if (owner != s->rank) {
        if (!fold_on(engine, a, owner, piece, item, bytes)) pyccl_fsm_cancel(engine->fsm, a->op->cookie, PYCCL_ERR_NOMEM, engine->env.now_ns);
        return;
    }
    uint8_t *result = fold_place(engine, a, owner, piece);
    fold_into(engine, a, owner, piece, a->contribution[item], NULL, result);
    piece_free(engine, a->contribution[item], bytes);
    a->contribution[item] = NULL;
    fold_piece_is_whole(engine, a, owner, piece, result);
}
