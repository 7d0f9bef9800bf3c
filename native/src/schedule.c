/* schedule.c: see schedule.h.                                     Spec: proto/wire.md 3.3 */
#include "schedule.h"

#include <string.h>

#include "status.h"

__extension__ typedef unsigned __int128 wide;

/* ---- plans ---- */

static bool is_permutation(const uint32_t *ring, uint32_t world) {
    bool seen[PYCCL_WORLD_MAX] = {false};
    for (uint32_t i = 0; i < world; i++) {
        if (ring[i] >= world || seen[ring[i]]) return false;
        seen[ring[i]] = true;
    }
    return true;
}

static bool is_piece(uint32_t bytes) {
    return bytes >= PYCCL_PLAN_PIECE_MIN && bytes <= PYCCL_PLAN_PIECE_MAX && (bytes & (bytes - 1)) == 0;
}

pyccl_status epoch_plan_init(epoch_plan *out, const pyccl_plan *plan, uint32_t world) {
    PYCCL_ASSERT(world >= 1 && world <= PYCCL_WORLD_MAX);
    const uint32_t *shares = plan != NULL ? plan->shares : NULL, *ring = plan != NULL ? plan->ring : NULL;
    if (ring != NULL && !is_permutation(ring, world)) return PYCCL_ERR_ARGUMENT;
    if (plan != NULL && plan->piece_bytes != 0 && !is_piece(plan->piece_bytes)) return PYCCL_ERR_ARGUMENT;
    if (plan != NULL && plan->ring_pace >= PYCCL_PACE_DIRECT) return PYCCL_ERR_ARGUMENT;
    memset(out, 0, sizeof *out);
    out->world = world;
    out->equal = shares == NULL;
    out->ring_from_bytes = plan != NULL ? plan->ring_from_bytes : UINT64_MAX;
    out->piece_bytes = plan != NULL && plan->piece_bytes != 0 ? plan->piece_bytes : SCHEDULE_PIECE_BYTES;
    out->ring_pace = plan != NULL ? plan->ring_pace : 0;
    for (uint32_t rank = 0; rank < world; rank++) {
        out->before[rank + 1] = out->before[rank] + (shares != NULL ? shares[rank] : 1);
        out->ring[rank] = ring != NULL ? ring[rank] : rank;
        out->place[out->ring[rank]] = rank;
    }
    return out->before[world] > 0 ? PYCCL_OK : PYCCL_ERR_ARGUMENT;
}

/* ---- the schedule ---- */

static uint64_t wire_bytes(const schedule *s, uint64_t elements) {
    if (s->codec == PYCCL_CODEC_NONE) return elements * s->element_bytes;
    return pyccl_codec_size(s->codec, s->block, elements);
}

/* What passes over a hop of the ring, in the measure in which direct moves the input once each way: between two hops of
 * phase 0 sums travel, not codes. */
static wide ring_bytes(const schedule *s) {
    const wide coded = wire_bytes(s, s->count), sums = (wide)s->count * s->partial_bytes, world = s->world;
    if (s->kind == PYCCL_REDUCE_SCATTER) return (coded + (world - 2) * sums) / (world - 1);
    return (world * coded + (world - 2) * sums) / (2 * (world - 1));
}

/* Two lines of time over bytes that meet at ring_from_bytes. */
static bool plan_wants_ring(const schedule *s) {
    const wide from = s->plan->ring_from_bytes, pace = s->plan->ring_pace;
    if (from == UINT64_MAX) return false;
    return (wide)wire_bytes(s, s->count) * PYCCL_PACE_DIRECT >= ring_bytes(s) * pace + from * (PYCCL_PACE_DIRECT - pace);
}

static bool wants_ring(const schedule *s, const pyccl_spec *spec) {
    if (!schedule_folds(s) || s->world < 3) return false;
    return spec->algorithm == PYCCL_RING || (spec->algorithm == PYCCL_AUTO && plan_wants_ring(s));
}

static uint64_t row_of(const pyccl_spec *spec) {
    uint64_t row = 0;
    if (spec->kind != PYCCL_REDUCE_SCATTER) return 1;
    for (int i = 7; i >= 0; i--) row = row << 8 | spec->root[i];
    return row;
}

/* Sums of shorter floats, and of what codes decode to, are float32. */
static uint32_t partial_bytes_of(const pyccl_spec *spec) {
    const bool single = spec->codec != PYCCL_CODEC_NONE || spec->dtype == PYCCL_FLOAT16 || spec->dtype == PYCCL_BFLOAT16;
    return single ? (uint32_t)sizeof(float) : (uint32_t)pyccl_dtype_size(spec->dtype);
}

/* As many codes of a byte as a piece has bytes, and whole blocks: of both that are powers of two the greater. */
static uint64_t coded_elements(const schedule *s) {
    return s->plan->piece_bytes > s->block ? s->plan->piece_bytes : s->block;
}

void schedule_init(schedule *s, const pyccl_spec *spec, const epoch_plan *plan, uint32_t rank, uint32_t root) {
    const uint32_t world = plan->world;
    PYCCL_ASSERT(world >= 1 && world <= PYCCL_WORLD_MAX && rank < world);
    PYCCL_ASSERT(spec->kind != PYCCL_BROADCAST || root < world);
    PYCCL_ASSERT(spec->kind != PYCCL_EXCHANGE || (root < world && root != rank));
    PYCCL_ASSERT(spec->count <= UINT64_C(1) << 48);
    *s = (schedule){.kind = spec->kind, .world = world, .rank = rank, .root = root, .codec = spec->codec, .plan = plan};
    s->swap = spec->kind == PYCCL_ALL_REDUCE && world == 2;
    s->block = spec->codec != PYCCL_CODEC_NONE ? spec->block : 1;
    s->element_bytes = (uint32_t)pyccl_dtype_size(spec->dtype);
    s->partial_bytes = partial_bytes_of(spec);
    s->count = spec->kind == PYCCL_BARRIER ? 0 : spec->count;
    s->row = row_of(spec);
    s->ring = wants_ring(s, spec);
    PYCCL_ASSERT(s->element_bytes > 0 && s->block > 0 && s->row > 0);
    s->piece_elements = spec->codec == PYCCL_CODEC_NONE ? plan->piece_bytes / s->element_bytes : coded_elements(s);
    PYCCL_ASSERT(s->piece_elements % s->block == 0 && wire_bytes(s, s->piece_elements) <= PYCCL_PIECE_MAX);
    PYCCL_ASSERT(s->piece_elements * s->partial_bytes <= PYCCL_PIECE_MAX);
}

uint8_t schedule_algorithm(const schedule *s) { return s->ring ? PYCCL_RING : PYCCL_DIRECT; }

/* ---- shares ---- */

uint64_t schedule_input_bytes(const schedule *s) { return s->count * s->element_bytes; }

uint64_t schedule_kept_bytes(const schedule *s) {
    if (s->kind == PYCCL_REDUCE_SCATTER) return schedule_share_elements(s, s->rank) * s->element_bytes;
    return s->kind == PYCCL_ALL_GATHER ? s->world * schedule_input_bytes(s) : schedule_input_bytes(s);
}

static bool in_pair(const schedule *s, uint32_t rank) { return rank == s->rank || rank == s->root; }

/* Of `units` the first that is not of a rank below `owner`: numpy.array_split, where the first ones have one more, or by
 * the plan's weights, floor(units * weights before / all weights). */
static uint64_t split(const schedule *s, uint64_t units, uint32_t owner, bool equal) {
    const uint64_t base = units / s->world, longer = units % s->world;
    if (equal) return owner * base + (owner < longer ? owner : longer);
    return (uint64_t)((wide)units * s->plan->before[owner] / s->plan->before[s->world]);
}

static uint64_t split_start(const schedule *s, uint32_t owner) {
    const uint64_t blocks = (s->count + s->block - 1) / s->block;
    if (s->kind == PYCCL_REDUCE_SCATTER) return split(s, s->count / s->row, owner, true) * s->row;
    const uint64_t start = split(s, blocks, owner, s->plan->equal) * s->block;
    return start < s->count ? start : s->count;
}

uint64_t schedule_share_start(const schedule *s, uint32_t owner) {
    PYCCL_ASSERT(owner < s->world);
    if (s->kind == PYCCL_ALL_GATHER) return owner * s->count;
    if (s->kind == PYCCL_EXCHANGE) return owner > s->rank || owner > s->root ? s->count : 0;
    return s->swap ? 0 : split_start(s, owner);
}

uint64_t schedule_share_elements(const schedule *s, uint32_t owner) {
    PYCCL_ASSERT(owner < s->world);
    if (s->kind == PYCCL_ALL_GATHER || s->swap) return s->count;
    if (s->kind == PYCCL_EXCHANGE) return in_pair(s, owner) ? s->count : 0;
    return split_start(s, owner + 1) - split_start(s, owner);
}

uint64_t schedule_pieces(const schedule *s, uint32_t owner) {
    return (schedule_share_elements(s, owner) + s->piece_elements - 1) / s->piece_elements;
}

uint64_t schedule_input_pieces(const schedule *s) {
    uint64_t pieces = 0;
    if (s->swap) return schedule_pieces(s, s->rank);
    for (uint32_t owner = 0; owner < s->world; owner++) pieces += schedule_pieces(s, owner);
    return pieces;
}

uint64_t schedule_kept_pieces(const schedule *s) {
    return s->kind == PYCCL_REDUCE_SCATTER ? schedule_pieces(s, s->rank) : schedule_input_pieces(s);
}

/* All that comes, in a ring without results; nothing comes of the share of whom it comes from. */
uint64_t schedule_due_pieces(const schedule *s) {
    if (!s->ring || s->kind != PYCCL_REDUCE_SCATTER) return schedule_kept_pieces(s);
    return schedule_input_pieces(s) - schedule_pieces(s, schedule_previous(s, s->rank));
}

uint64_t schedule_piece_start(const schedule *s, uint32_t owner, uint64_t piece) {
    return schedule_share_start(s, owner) + piece * s->piece_elements;
}

uint64_t schedule_piece_elements(const schedule *s, uint32_t owner, uint64_t piece) {
    const uint64_t share = schedule_share_elements(s, owner), start = piece * s->piece_elements;
    PYCCL_ASSERT(start < share);
    return share - start < s->piece_elements ? share - start : s->piece_elements;
}

uint32_t schedule_piece_bytes_max(const schedule *s) {
    uint64_t most = 0;
    for (uint32_t owner = 0; owner < s->world; owner++) {
        const uint64_t elements = schedule_share_elements(s, owner);
        if (elements > most) most = elements;
    }
    return (uint32_t)wire_bytes(s, most < s->piece_elements ? most : s->piece_elements);
}

uint32_t schedule_partial_bytes(const schedule *s, uint32_t owner, uint64_t piece) {
    return (uint32_t)(schedule_piece_elements(s, owner, piece) * s->partial_bytes);
}

/* ---- who sends what to whom ---- */

bool schedule_folds(const schedule *s) { return s->kind == PYCCL_ALL_REDUCE || s->kind == PYCCL_REDUCE_SCATTER; }

bool schedule_contributes(const schedule *s, uint32_t from, uint32_t owner) {
    if (from == owner) return false;
    if (schedule_folds(s)) return true;
    return s->kind == PYCCL_BROADCAST && from == s->root;
}

bool schedule_receives(const schedule *s, uint32_t owner, uint32_t to) {
    if (to == owner) return false;
    switch (s->kind) {
    case PYCCL_ALL_REDUCE: return !s->swap;
    case PYCCL_ALL_GATHER: return true;
    case PYCCL_EXCHANGE: return in_pair(s, owner) && in_pair(s, to);
    case PYCCL_BROADCAST: return to != s->root;
    default: return false;
    }
}

uint32_t schedule_contributors(const schedule *s, uint32_t owner) {
    if (schedule_folds(s)) return s->world - 1;
    return s->kind == PYCCL_BROADCAST && owner != s->root ? 1 : 0;
}

bool schedule_is_local(const schedule *s, uint32_t owner, uint32_t at) {
    switch (s->kind) {
    case PYCCL_ALL_REDUCE: return s->world == 1;
    case PYCCL_BROADCAST: return at == s->root;
    case PYCCL_ALL_GATHER:
    case PYCCL_EXCHANGE: return owner == at;
    default: return false;
    }
}

uint32_t schedule_next(const schedule *s, uint32_t rank) {
    return s->plan->ring[(s->plan->place[rank] + 1) % s->world];
}

uint32_t schedule_previous(const schedule *s, uint32_t rank) {
    return s->plan->ring[(s->plan->place[rank] + s->world - 1) % s->world];
}

uint32_t schedule_step(const schedule *s, uint32_t owner, uint32_t rank) {
    return (s->plan->place[rank] + 2 * s->world - s->plan->place[owner] - 1) % s->world;
}

uint64_t schedule_items(const schedule *s, uint32_t phase, uint32_t from, uint32_t to) {
    if (s->ring) return to == schedule_next(s, from) && (phase == SCHEDULE_CONTRIBUTION || s->kind == PYCCL_ALL_REDUCE) ? schedule_input_pieces(s) : 0;
    if (phase == SCHEDULE_CONTRIBUTION) return schedule_contributes(s, from, to) ? schedule_pieces(s, to) : 0;
    return schedule_receives(s, from, to) ? schedule_pieces(s, from) : 0;
}

void schedule_item(const schedule *s, uint32_t phase, uint32_t from, uint32_t to, uint64_t item, uint32_t *owner, uint64_t *piece) {
    *piece = item;
    *owner = phase == SCHEDULE_CONTRIBUTION ? to : from;
    if (!s->ring) return;
    for (*owner = 0; *piece >= schedule_pieces(s, *owner); (*owner)++) *piece -= schedule_pieces(s, *owner);
}

uint64_t schedule_item_offset(const schedule *s, uint32_t phase, uint32_t from, uint32_t to, uint64_t item) {
    uint32_t owner;
    uint64_t piece;
    if (!s->ring) return item * wire_bytes(s, s->piece_elements);
    schedule_item(s, phase, from, to, item, &owner, &piece);
    return schedule_piece_start(s, owner, piece) * s->element_bytes;
}

uint32_t schedule_item_bytes(const schedule *s, uint32_t phase, uint32_t from, uint32_t to, uint64_t item) {
    uint32_t owner;
    uint64_t piece;
    schedule_item(s, phase, from, to, item, &owner, &piece);
    const bool partial = s->ring && phase == SCHEDULE_CONTRIBUTION && schedule_step(s, owner, from) > 0;
    if (partial) return schedule_partial_bytes(s, owner, piece);
    return (uint32_t)wire_bytes(s, schedule_piece_elements(s, owner, piece));
}

/* The slot that begins at an element of the result; false: none that travels between these two does. */
static bool slot_find(const schedule *s, uint32_t phase, uint32_t from, uint32_t to, uint64_t element, uint64_t *slot) {
    uint32_t owner = 0;
    if (element >= s->count) return false;
    for (*slot = 0; element >= schedule_share_start(s, owner) + schedule_share_elements(s, owner); owner++) *slot += schedule_pieces(s, owner);
    const uint64_t inside = element - schedule_share_start(s, owner);
    *slot += inside / s->piece_elements;
    return inside % s->piece_elements == 0 && owner != (phase == SCHEDULE_CONTRIBUTION ? from : to);
}

bool schedule_item_find(const schedule *s, uint32_t phase, uint32_t from, uint32_t to, uint64_t offset, uint64_t length, uint64_t *item) {
    *item = 0;
    const uint64_t items = schedule_items(s, phase, from, to), whole = wire_bytes(s, s->piece_elements);
    if (items == 0) return false;
    if (s->ring) {
        if (offset % s->element_bytes != 0 || !slot_find(s, phase, from, to, offset / s->element_bytes, item)) return false;
    } else {
        *item = offset / whole;
        if (offset % whole != 0 || *item >= items) return false;
    }
    return length == schedule_item_bytes(s, phase, from, to, *item);
}
