/* direct.c: see direct.h.                                         Spec: proto/wire.md 3.3 */
#include "direct.h"

#include "status.h"

void direct_plan_init(direct_plan *plan, const pyccl_spec *spec, uint32_t world, uint32_t rank, uint32_t root) {
    PYCCL_ASSERT(world >= 1 && world <= PYCCL_WORLD_MAX && rank < world);
    PYCCL_ASSERT(spec->kind != PYCCL_BROADCAST || root < world);
    PYCCL_ASSERT(spec->count <= UINT64_C(1) << 48);
    plan->kind = spec->kind;
    plan->world = world;
    plan->rank = rank;
    plan->root = root;
    plan->element_bytes = (uint32_t)pyccl_dtype_size(spec->dtype);
    plan->count = spec->kind == PYCCL_BARRIER ? 0 : spec->count;
    PYCCL_ASSERT(plan->count == 0 || plan->element_bytes > 0);
}

uint64_t direct_input_bytes(const direct_plan *plan) { return plan->count * plan->element_bytes; }

uint64_t direct_result_bytes(const direct_plan *plan) {
    return plan->kind == PYCCL_ALL_GATHER ? plan->world * direct_input_bytes(plan) : direct_input_bytes(plan);
}

/* numpy.array_split: the first count % world shares have one element more. */
static uint64_t split_start(const direct_plan *plan, uint32_t owner) {
    const uint64_t base = plan->count / plan->world, longer = plan->count % plan->world;
    return owner * base + (owner < longer ? owner : longer);
}

uint64_t direct_share_offset(const direct_plan *plan, uint32_t owner) {
    PYCCL_ASSERT(owner <= plan->world);
    if (plan->kind == PYCCL_ALL_GATHER) return owner * direct_input_bytes(plan);
    return split_start(plan, owner) * plan->element_bytes;
}

uint64_t direct_share_bytes(const direct_plan *plan, uint32_t owner) {
    return direct_share_offset(plan, owner + 1) - direct_share_offset(plan, owner);
}

uint64_t direct_pieces(const direct_plan *plan, uint32_t owner) {
    return (direct_share_bytes(plan, owner) + PYCCL_PIECE_MAX - 1) / PYCCL_PIECE_MAX;
}

uint64_t direct_piece_offset(const direct_plan *plan, uint64_t piece) {
    (void)plan;
    return piece * PYCCL_PIECE_MAX;
}

uint32_t direct_piece_bytes(const direct_plan *plan, uint32_t owner, uint64_t piece) {
    const uint64_t share = direct_share_bytes(plan, owner), offset = direct_piece_offset(plan, piece);
    PYCCL_ASSERT(offset < share);
    return share - offset < PYCCL_PIECE_MAX ? (uint32_t)(share - offset) : PYCCL_PIECE_MAX;
}

bool direct_piece_find(const direct_plan *plan, uint32_t owner, uint64_t offset, uint64_t length, uint64_t *piece) {
    *piece = offset / PYCCL_PIECE_MAX;
    if (offset % PYCCL_PIECE_MAX != 0 || *piece >= direct_pieces(plan, owner)) return false;
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
    case PYCCL_ALL_REDUCE:
    case PYCCL_ALL_GATHER: return true;
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
    case PYCCL_ALL_GATHER: return owner == at;
    default: return false;
    }
}
