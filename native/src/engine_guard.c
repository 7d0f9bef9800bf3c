/* engine_guard.c: what a guard says of an attempt: everybody's contributions to our share, and the shares of others.
 *
 *   submit          our own input, before anything is sent, on the caller's thread; refused: OPEN says so and nothing is sent
 *   contribution    a piece as it counts (decoded where a codec is used) when it has arrived; ours where a codec rounds it
 *   our share       each folded piece: finite contributions may add up to infinity
 *   other shares    each piece of the result that arrives: what their owners did not look at
 *
 * What is found goes into the complaint of our DONE (op_fsm.c says who is blamed): the operation runs to its end and fails
 * on all, with the same name everywhere.
 * Threads: guard_refuses on any, all else on the engine's.         Spec: proto/wire.md 3.8 */
#include "engine.h"

#include <math.h>
#include <stdlib.h>

#include "frame.h"
#include "guard.h"

#define SLACK (1.0 + 0x1p-10)        /* of sums in another order than the contributor's, and of a result's rounding */

typedef struct guard {
    double peak, norm_squared;       /* limits; infinity: none */
    double result_peak;              /* of the result, by op and world; infinity: none */
    uint32_t accused, suspect;       /* rank + 1; 0: nobody */
    bool overflows;                  /* our share is not finite */
    double squares[];                /* [rank]: of its contributions to our share */
} guard;

static double limit_of(float limit) { return limit > 0 ? (double)limit : (double)INFINITY; }

/* NaN is beyond any limit, infinity beyond none, too. */
static bool exceeds(double peak, double limit) { return !(peak <= limit) || isinf(peak); }

bool guard_refuses(const pyccl_spec *spec, const void *src) {
    if (!spec->guard || spec->count == 0) return false;
    const frame_limits limits = frame_spec_limits(spec);
    const kernel k = kernel_current();
    if (exceeds(guard_peak(k, spec->dtype, src, spec->count), limit_of(limits.peak))) return true;
    const double norm = limit_of(limits.norm);
    return isfinite(norm) && guard_squares(k, spec->dtype, src, spec->count) > norm * norm;
}

/* What no sum, average, least or greatest of numbers within the limit exceeds, roundings left out. */
static double result_limit(const pyccl_spec *spec, double peak, uint32_t world) {
    if (spec->op == PYCCL_PROD) return (double)INFINITY;
    return (spec->op == PYCCL_SUM ? peak * world : peak) * SLACK;
}

pyccl_status guard_new(attempt *a) {
    const pyccl_spec *spec = &a->op->args.spec;
    const uint32_t world = a->schedule.world;
    if (!spec->guard) return PYCCL_OK;
    const frame_limits limits = frame_spec_limits(spec);
    guard *g = calloc(1, sizeof *g + world * sizeof g->squares[0]);
    if (g == NULL) return PYCCL_ERR_NOMEM;
    const double norm = limit_of(limits.norm) * SLACK;
    g->peak = limit_of(limits.peak);
    g->norm_squared = norm * norm;
    g->result_peak = result_limit(spec, g->peak, world);
    a->guard = g;
    return PYCCL_OK;
}

static void lowest(uint32_t *named, uint32_t rank) {
    if (*named == 0 || rank + 1 < *named) *named = rank + 1;
}

static void judge(guard *g, uint32_t rank, uint8_t dtype, const void *x, uint64_t elements) {
    const kernel k = kernel_current();
    if (exceeds(guard_peak(k, dtype, x, elements), g->peak)) {
        lowest(&g->accused, rank);
        return;
    }
    if (isinf(g->norm_squared)) return;
    g->squares[rank] += guard_squares(k, dtype, x, elements);
    if (g->squares[rank] > g->norm_squared) lowest(&g->accused, rank);
}

void guard_contribution(const pyccl_engine *engine, const attempt *a, uint32_t rank, uint64_t piece, const uint8_t *bytes) {
    const pyccl_spec *spec = &a->op->args.spec;
    const schedule *s = &a->schedule;
    if (a->guard == NULL) return; /* of a ring `piece` is another owner's */
    uint64_t n, left = schedule_piece_elements(s, s->rank, piece);
    if (!fold_is_coded(a)) {
        judge(a->guard, rank, spec->dtype, bytes, left);
        return;
    }
    for (; left > 0; left -= n) {
        n = left < fold_tile_elements(a) ? left : fold_tile_elements(a);
        const pyccl_status rc = pyccl_codec_decode(spec->codec, PYCCL_FLOAT32, spec->block, bytes, n, engine->tile);
        PYCCL_ASSERT(rc == PYCCL_OK);
        judge(a->guard, rank, PYCCL_FLOAT32, engine->tile, n);
        bytes += pyccl_codec_size(spec->codec, spec->block, n);
    }
}

void guard_result(const attempt *a, uint32_t owner, uint64_t piece, const uint8_t *bytes) {
    const schedule *s = &a->schedule;
    guard *g = a->guard;
    if (g == NULL) return;
    const bool ours = owner == s->rank || s->swap;
    const double peak = guard_peak(kernel_current(), a->op->args.spec.dtype, bytes, schedule_piece_elements(s, owner, piece));
    if (ours) g->overflows |= !isfinite(peak);
    else if (exceeds(peak, g->result_peak)) lowest(&g->suspect, owner);
}

uint32_t guard_complaint(const attempt *a) {
    const guard *g = a->guard;
    const uint32_t accused = g->accused > 0 ? g->accused : g->overflows ? PYCCL_CULPRIT_NOBODY : 0;
    return accused + g->suspect * PYCCL_COMPLAINT_RESULT;
}
