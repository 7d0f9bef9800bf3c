/* fuzz_schedule.c: what a frame may carry by the schedule: any spec that a peer may open, any plan that a master may give,
 * any offset and length. A frame that is found is exactly one item, within the arrays; items do not overlap the result's end.
 * Input: world, rank, plan, spec, then offsets and lengths. */
#include "../src/schedule.h"
#include "fuzz.h"

static void found(const schedule *s, uint32_t phase, uint32_t from, uint64_t offset, uint64_t length) {
    uint64_t item, piece;
    uint32_t owner;
    if (!schedule_item_find(s, phase, from, s->rank, offset, length, &item)) return;
    HOLDS(item < schedule_items(s, phase, from, s->rank));
    HOLDS(schedule_item_offset(s, phase, from, s->rank, item) == offset && schedule_item_bytes(s, phase, from, s->rank, item) == length);
    HOLDS(length > 0 && length <= PYCCL_PIECE_MAX);
    schedule_item(s, phase, from, s->rank, item, &owner, &piece);
    HOLDS(owner < s->world && piece < schedule_pieces(s, owner));
    const uint64_t start = schedule_share_start(s, owner), first = schedule_piece_start(s, owner, piece);
    const uint64_t elements = schedule_piece_elements(s, owner, piece);
    HOLDS(elements > 0 && first >= start && first + elements <= start + schedule_share_elements(s, owner));
    HOLDS(schedule_partial_bytes(s, owner, piece) <= PYCCL_PIECE_MAX);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static epoch_plan plan;
    fuzz_input in = {data, size};
    const uint32_t world = 2 + fuzz_u8(&in) % 8, rank = fuzz_u8(&in) % world, root = fuzz_u8(&in) % world;
    const uint8_t says = fuzz_u8(&in);
    uint32_t shares[10], ring[10];
    uint8_t bytes[PYCCL_SPEC_SIZE];
    pyccl_spec spec;
    for (uint32_t i = 0; i < world; i++) {
        fuzz_take(&in, &shares[i], sizeof shares[i]);
        ring[i] = fuzz_u8(&in) % (world + 1);
    }
    const pyccl_plan given = {.shares = says & 1 ? shares : NULL, .ring = says & 2 ? ring : NULL, .ring_from_bytes = fuzz_u64(&in),
                              .piece_bytes = says & 4 ? UINT32_C(1) << says % 32 : 0, .ring_pace = (uint32_t)fuzz_u64(&in)};
    if (epoch_plan_init(&plan, says & 8 ? NULL : &given, world) != PYCCL_OK) return 0;
    fuzz_take(&in, bytes, sizeof bytes);
    if (pyccl_spec_decode_untrusted(bytes, &spec) != PYCCL_OK) return 0;
    if (spec.kind == PYCCL_EXCHANGE && root == rank) return 0;
    schedule s;
    schedule_init(&s, &spec, &plan, rank, root);
    uint64_t covered = 0;
    for (uint32_t owner = 0; owner < world; owner++) {
        HOLDS(s.swap || schedule_share_start(&s, owner) + schedule_share_elements(&s, owner) >= schedule_share_elements(&s, owner));
        covered += schedule_share_elements(&s, owner);
    }
    if (spec.kind == PYCCL_ALL_REDUCE && !s.swap) HOLDS(covered == spec.count);
    while (in.left > 0) {
        const uint32_t from = fuzz_u8(&in) % world, phase = fuzz_u8(&in) % 2;
        const uint64_t offset = fuzz_u64(&in), length = fuzz_u64(&in), items = from == rank ? 0 : schedule_items(&s, phase, from, rank);
        if (from == rank) continue;
        found(&s, phase, from, offset, length);
        if (items == 0) continue;
        const uint64_t at = schedule_item_offset(&s, phase, from, rank, offset % items); /* one that is there */
        const uint32_t bytes_there = schedule_item_bytes(&s, phase, from, rank, offset % items);
        uint64_t item;
        const bool travels = schedule_item_find(&s, phase, from, rank, at, bytes_there, &item);
        HOLDS(travels ? item == offset % items : s.ring); /* of a ring's slots some never go this way */
        found(&s, phase, from, at, bytes_there);
        found(&s, phase, from, at + length % 3 - 1, bytes_there);
    }
    return 0;
}
