/* test_direct.c: the schedule covers every element once and is the same seen from both ends. Spec: proto/wire.md 3.3 */
#include "../src/direct.h"

#include "test.h"

static direct_plan plan_of(uint8_t kind, uint8_t dtype, uint64_t count, uint32_t world, uint32_t rank, uint32_t root) {
    const pyccl_spec spec = {.kind = kind, .dtype = dtype, .algorithm = PYCCL_DIRECT, .count = count};
    direct_plan plan;
    direct_plan_init(&plan, &spec, world, rank, root);
    return plan;
}

static const uint64_t COUNTS[] = {0, 1, 2, 3, 7, 8, 9, 1000, 65535, 65536, 65537, 262144, 1000003};

/* Worlds of two swap an all_reduce: broadcast has shares in every world. */
TEST(direct_shares_are_those_of_array_split) {
    for (uint32_t world = 1; world <= 9; world++)
        for (size_t c = 0; c < sizeof COUNTS / sizeof *COUNTS; c++) {
            const direct_plan plan = plan_of(PYCCL_BROADCAST, PYCCL_FLOAT32, COUNTS[c], world, 0, 0);
            uint64_t at = 0;
            for (uint32_t owner = 0; owner < world; owner++) {
                CHECK_EQ(direct_share_start(&plan, owner), at);
                const uint64_t elements = COUNTS[c] / world + (owner < COUNTS[c] % world ? 1 : 0);
                CHECK_EQ(direct_share_elements(&plan, owner), elements);
                at += elements;
            }
            CHECK_EQ(at * 4, direct_result_bytes(&plan));
        }
}

static void check_pieces(const direct_plan *plan) {
    uint64_t pieces = 0, next = 0;
    for (uint32_t owner = 0; owner < plan->world; owner++) {
        uint64_t elements = 0, offset = 0;
        if (plan->swap) next = pieces = 0;
        for (uint64_t piece = 0; piece < direct_pieces(plan, owner); piece++, pieces++) {
            uint64_t found;
            const uint64_t n = direct_piece_elements(plan, owner, piece);
            const uint32_t bytes = direct_piece_bytes(plan, owner, piece);
            CHECK_EQ(direct_piece_start(plan, owner, piece), next);
            CHECK_EQ(direct_piece_offset(plan, piece), offset);
            CHECK_EQ(bytes, plan->codec ? pyccl_codec_size(plan->codec, plan->block, n) : n * plan->element_bytes);
            CHECK(bytes > 0 && bytes <= PYCCL_PIECE_MAX);
            CHECK(next % plan->block == 0);
            CHECK(direct_piece_find(plan, owner, offset, bytes, &found) && found == piece);
            CHECK(!direct_piece_find(plan, owner, offset + 1, bytes, &found));
            CHECK(!direct_piece_find(plan, owner, offset, bytes - 1, &found));
            next += n, elements += n, offset += bytes;
        }
        CHECK_EQ(elements, direct_share_elements(plan, owner));
    }
    CHECK_EQ(pieces, direct_result_pieces(plan));
    CHECK_EQ(next * plan->element_bytes, direct_result_bytes(plan));
}

TEST(direct_pieces_cover_each_element_once) {
    static const uint8_t dtypes[] = {PYCCL_INT32, PYCCL_FLOAT64, PYCCL_UINT8}, kinds[] = {PYCCL_ALL_REDUCE, PYCCL_BROADCAST, PYCCL_ALL_GATHER};
    for (uint32_t world = 1; world <= 9; world++)
        for (size_t c = 0; c < sizeof COUNTS / sizeof *COUNTS; c++)
            for (size_t d = 0; d < sizeof dtypes; d++)
                for (size_t k = 0; k < sizeof kinds; k++) {
                    const direct_plan plan = plan_of(kinds[k], dtypes[d], COUNTS[c], world, 0, world - 1);
                    check_pieces(&plan);
                }
}

TEST(direct_codec_blocks_are_not_divided) {
    static const uint8_t dtypes[] = {PYCCL_FLOAT16, PYCCL_FLOAT32, PYCCL_FLOAT64};
    for (uint32_t world = 1; world <= 9; world++)
        for (size_t c = 0; c < sizeof COUNTS / sizeof *COUNTS; c++)
            for (uint32_t block = PYCCL_BLOCK_MIN; block <= PYCCL_BLOCK_MAX; block *= 4)
                for (size_t d = 0; d < sizeof dtypes; d++) {
                    const pyccl_spec spec = {.kind = PYCCL_ALL_REDUCE, .dtype = dtypes[d], .op = PYCCL_SUM,
                                             .codec = (uint8_t)(PYCCL_CODEC_UINT8 + (c + d + block / 64) % PYCCL_CODEC_BFLOAT16),
                                             .algorithm = PYCCL_DIRECT, .block = block, .count = COUNTS[c]};
                    direct_plan plan;
                    direct_plan_init(&plan, &spec, world, 0, 0);
                    check_pieces(&plan);
                    for (uint32_t owner = 1; owner < world; owner++) CHECK(direct_share_elements(&plan, owner) <= direct_share_elements(&plan, owner - 1));
                }
}

TEST(direct_piece_find_accepts_exactly_the_pieces) {
    const direct_plan plan = plan_of(PYCCL_BROADCAST, PYCCL_FLOAT32, 3 * (DIRECT_PIECE_BYTES / 4) + 5, 2, 0, 0);
    uint64_t piece = 0;
    CHECK(direct_piece_find(&plan, 0, 0, DIRECT_PIECE_BYTES, &piece) && piece == 0);
    const uint64_t rest = direct_share_elements(&plan, 0) * 4 - DIRECT_PIECE_BYTES;
    CHECK(direct_piece_find(&plan, 0, DIRECT_PIECE_BYTES, rest, &piece) && piece == 1);
    CHECK(!direct_piece_find(&plan, 0, DIRECT_PIECE_BYTES, rest - 1, &piece));
    CHECK(!direct_piece_find(&plan, 0, DIRECT_PIECE_BYTES, rest + 1, &piece));
    CHECK(!direct_piece_find(&plan, 0, 4, DIRECT_PIECE_BYTES, &piece));
    CHECK(!direct_piece_find(&plan, 0, 2 * DIRECT_PIECE_BYTES, 4, &piece));
    CHECK(!direct_piece_find(&plan, 0, UINT64_MAX - DIRECT_PIECE_BYTES + 1, 4, &piece));
}

TEST(direct_two_swap_whole_vectors) {
    for (uint32_t rank = 0; rank < 2; rank++) {
        const direct_plan plan = plan_of(PYCCL_ALL_REDUCE, PYCCL_FLOAT32, 1000, 2, rank, 0);
        for (uint32_t owner = 0; owner < 2; owner++) {
            CHECK_EQ(direct_share_start(&plan, owner), 0);
            CHECK_EQ(direct_share_elements(&plan, owner), 1000);
            CHECK_EQ(direct_contributors(&plan, owner), 1);
            CHECK(direct_contributes(&plan, 1 - owner, owner) && !direct_contributes(&plan, owner, owner));
            CHECK(!direct_receives(&plan, 0, owner) && !direct_receives(&plan, 1, owner));
        }
    }
}

TEST(direct_all_gather_shares_are_whole_inputs) {
    const direct_plan plan = plan_of(PYCCL_ALL_GATHER, PYCCL_FLOAT64, 1000, 3, 1, 0);
    CHECK_EQ(direct_result_bytes(&plan), 24000);
    CHECK_EQ(direct_share_start(&plan, 2), 2000);
    CHECK_EQ(direct_share_elements(&plan, 2), 1000);
    CHECK_EQ(direct_contributors(&plan, 1), 0);
    CHECK(direct_receives(&plan, 0, 1) && !direct_receives(&plan, 1, 1));
    CHECK(direct_is_local(&plan, 1, 1) && !direct_is_local(&plan, 0, 1));
}

TEST(direct_exchange_moves_two_inputs_between_two_members) {
    for (uint32_t world = 2; world <= 5; world++)
        for (uint32_t rank = 0; rank < world; rank++)
            for (uint32_t other = 0; other < world; other++) {
                if (other == rank) continue;
                const direct_plan plan = plan_of(PYCCL_EXCHANGE, PYCCL_FLOAT64, 262145, world, rank, other);
                const uint32_t low = rank < other ? rank : other, high = rank < other ? other : rank;
                uint64_t pieces = 0;
                CHECK_EQ(direct_result_bytes(&plan), 262145 * 8);
                CHECK_EQ(direct_share_start(&plan, low), 0);
                CHECK_EQ(direct_share_start(&plan, high), 262145);
                for (uint32_t owner = 0; owner < world; owner++) {
                    const bool of_it = owner == rank || owner == other;
                    CHECK_EQ(direct_share_elements(&plan, owner), of_it ? 262145 : 0);
                    CHECK_EQ(direct_contributors(&plan, owner), 0);
                    CHECK(direct_is_local(&plan, owner, rank) == (owner == rank));
                    pieces += direct_pieces(&plan, owner);
                    for (uint32_t to = 0; to < world; to++)
                        CHECK(direct_receives(&plan, owner, to) == (of_it && owner != to && (to == rank || to == other)));
                }
                CHECK_EQ(pieces, direct_result_pieces(&plan));
            }
}

TEST(direct_everybody_gets_every_share_by_exactly_one_way) {
    static const uint8_t kinds[] = {PYCCL_ALL_REDUCE, PYCCL_BROADCAST, PYCCL_ALL_GATHER};
    for (uint32_t world = 2; world <= 9; world++)
        for (size_t k = 0; k < sizeof kinds; k++)
            for (uint32_t root = 0; root < world; root++) {
                const direct_plan plan = plan_of(kinds[k], PYCCL_FLOAT32, 100, world, 0, root);
                for (uint32_t owner = 0; owner < world; owner++) {
                    uint32_t contributors = 0;
                    for (uint32_t at = 0; at < world; at++) {
                        contributors += direct_contributes(&plan, at, owner);
                        if (plan.swap) continue;
                        const bool folds_here = at == owner && direct_contributors(&plan, owner) > 0;
                        CHECK_EQ(direct_receives(&plan, owner, at) + folds_here + direct_is_local(&plan, owner, at), 1);
                    }
                    CHECK_EQ(contributors, direct_contributors(&plan, owner));
                }
            }
}

TEST(direct_barrier_moves_nothing) {
    const direct_plan plan = plan_of(PYCCL_BARRIER, PYCCL_UINT8, 0, 5, 2, 0);
    CHECK_EQ(direct_result_bytes(&plan), 0);
    for (uint32_t owner = 0; owner < 5; owner++) {
        CHECK_EQ(direct_pieces(&plan, owner), 0);
        for (uint32_t at = 0; at < 5; at++) CHECK(!direct_contributes(&plan, at, owner) && !direct_receives(&plan, owner, at));
    }
}
