/* direct.c: see direct.h.                                         Spec: proto/wire.md 3.3 */
#include "direct.h"

#include "status.h"

#define DIRECT_CODED_ELEMENTS (UINT64_C(1) << 18) /* 1 MiB of float32 where it is folded */

static uint64_t wire_bytes(const direct_plan *plan, uint64_t elements) {
    if (plan->codec == PYCCL_CODEC_NONE) return elements * plan->element_bytes;
    return pyccl_codec_size(plan->codec, plan->block, elements);
}

void direct_plan_init(direct_plan *plan, const pyccl_spec *spec, uint32_t world, uint32_t rank, uint32_t root) {
    PYCCL_ASSERT(world >= 1 && world <= PYCCL_WORLD_MAX && rank < world);
    PYCCL_ASSERT(spec->kind != PYCCL_BROADCAST || root < world);
    PYCCL_ASSERT(spec->kind != PYCCL_EXCHANGE || (root < world && root != rank));
    PYCCL_ASSERT(spec->count <= UINT64_C(1) << 48);
    plan->kind = spec->kind;
    plan->world = world;
    plan->rank = rank;
    plan->root = root;
    plan->swap = spec->kind == PYCCL_ALL_REDUCE && world == 2;
    plan->codec = spec->codec;
    plan->block = spec->codec != PYCCL_CODEC_NONE ? spec->block : 1;
    plan->element_bytes = (uint32_t)pyccl_dtype_size(spec->dtype);
    plan->count = spec->kind == PYCCL_BARRIER ? 0 : spec->count;
    PYCCL_ASSERT(plan->element_bytes > 0 && plan->block > 0);
    plan->piece_elements = spec->codec != PYCCL_CODEC_NONE ? DIRECT_CODED_ELEMENTS : DIRECT_PIECE_BYTES / plan->element_bytes;
    PYCCL_ASSERT(plan->piece_elements % plan->block == 0 && wire_bytes(plan, plan->piece_elements) <= PYCCL_PIECE_MAX);
}

uint64_t direct_input_bytes(const direct_plan *plan) { return plan->count * plan->element_bytes; }

uint64_t direct_result_bytes(const direct_plan *plan) {
    return plan->kind == PYCCL_ALL_GATHER ? plan->world * direct_input_bytes(plan) : direct_input_bytes(plan);
}

static bool in_pair(const direct_plan *plan, uint32_t rank) { return rank == plan->rank || rank == plan->root; }

/* numpy.array_split, of blocks: the first ones have a block more. */
static uint64_t split_start(const direct_plan *plan, uint32_t owner) {
    const uint64_t blocks = (plan->count + plan->block - 1) / plan->block;
    const uint64_t base = blocks / plan->world, longer = blocks % plan->world;
    const uint64_t start = (owner * base + (owner < longer ? owner : longer)) * plan->block;
    return start < plan->count ? start : plan->count;
}

uint64_t direct_share_start(const direct_plan *plan, uint32_t owner) {
    PYCCL_ASSERT(owner < plan->world);
    if (plan->kind == PYCCL_ALL_GATHER) return owner * plan->count;
    if (plan->kind == PYCCL_EXCHANGE) return owner > plan->rank || owner > plan->root ? plan->count : 0;
    return plan->swap ? 0 : split_start(plan, owner);
}

uint64_t direct_share_elements(const direct_plan *plan, uint32_t owner) {
    PYCCL_ASSERT(owner < plan->world);
    if (plan->kind == PYCCL_ALL_GATHER || plan->swap) return plan->count;
    if (plan->kind == PYCCL_EXCHANGE) return in_pair(plan, owner) ? plan->count : 0;
    return split_start(plan, owner + 1) - split_start(plan, owner);
}

uint64_t direct_pieces(const direct_plan *plan, uint32_t owner) {
    return (direct_share_elements(plan, owner) + plan->piece_elements - 1) / plan->piece_elements;
}

uint64_t direct_result_pieces(const direct_plan *plan) {
    uint64_t pieces = 0;
    if (plan->swap) return direct_pieces(plan, plan->rank);
    for (uint32_t owner = 0; owner < plan->world; owner++) pieces += direct_pieces(plan, owner);
    return pieces;
}

uint64_t direct_piece_start(const direct_plan *plan, uint32_t owner, uint64_t piece) {
    return direct_share_start(plan, owner) + piece * plan->piece_elements;
}

uint64_t direct_piece_elements(const direct_plan *plan, uint32_t owner, uint64_t piece) {
    const uint64_t share = direct_share_elements(plan, owner), start = piece * plan->piece_elements;
    PYCCL_ASSERT(start < share);
    return share - start < plan->piece_elements ? share - start : plan->piece_elements;
}

uint64_t direct_piece_offset(const direct_plan *plan, uint64_t piece) { return piece * wire_bytes(plan, plan->piece_elements); }

uint32_t direct_piece_bytes(const direct_plan *plan, uint32_t owner, uint64_t piece) {
    return (uint32_t)wire_bytes(plan, direct_piece_elements(plan, owner, piece));
}

bool direct_piece_find(const direct_plan *plan, uint32_t owner, uint64_t offset, uint64_t length, uint64_t *piece) {
    const uint64_t whole = wire_bytes(plan, plan->piece_elements);
    *piece = offset / whole;
    if (offset % whole != 0 || *piece >= direct_pieces(plan, owner)) return false;
    return length == direct_piece_bytes(plan, owner, *piece);
}

bool direct_contributes(const direct_plan *plan, uint32_t from, uint32_t owner) {
    if (from == owner) return false;
    switch (plan->kind) {
    case PYCCL_ALL_REDUCE: return true;
    case PYCCL_BROADCAST: return from == plan->root;
    default: return false;
    }
}

bool direct_receives(const direct_plan *plan, uint32_t owner, uint32_t to) {
    if (to == owner) return false;
    switch (plan->kind) {
    case PYCCL_ALL_REDUCE: return !plan->swap;
    case PYCCL_ALL_GATHER: return true;
    case PYCCL_EXCHANGE: return in_pair(plan, owner) && in_pair(plan, to);
    case PYCCL_BROADCAST: return to != plan->root;
    default: return false;
    }
}

uint32_t direct_contributors(const direct_plan *plan, uint32_t owner) {
    switch (plan->kind) {
    case PYCCL_ALL_REDUCE: return plan->world - 1;
    case PYCCL_BROADCAST: return owner == plan->root ? 0 : 1;
    default: return 0;
    }
}

bool direct_is_local(const direct_plan *plan, uint32_t owner, uint32_t at) {
    switch (plan->kind) {
    case PYCCL_ALL_REDUCE: return plan->world == 1;
    case PYCCL_BROADCAST: return at == plan->root;
    case PYCCL_ALL_GATHER:
    case PYCCL_EXCHANGE: return owner == at;
    default: return false;
    }
}
