/* test_schedule.c: the schedule covers every element once and is the same seen from both ends. Spec: proto/wire.md 3.3 */
#include "../src/schedule.h"

#include "test.h"

#define WORLD_MAX 9

static const uint64_t COUNTS[] = {0, 1, 2, 3, 7, 8, 9, 1000, 65535, 65536, 65537, 262144, 1000003};
#define COUNTS_COUNT (sizeof COUNTS / sizeof *COUNTS)

/* A plan must outlive its schedules: one for each world. */
static const epoch_plan *equal_plan(uint32_t world) {
    static epoch_plan plans[WORLD_MAX + 1];
    REQUIRE(world <= WORLD_MAX && epoch_plan_init(&plans[world], NULL, world) == PYCCL_OK);
    return &plans[world];
}

static epoch_plan drawn_plan(uint64_t *seed, uint32_t world) {
    uint32_t shares[WORLD_MAX], ring[WORLD_MAX];
    for (uint32_t i = 0; i < world; i++) {
        const uint32_t at = (uint32_t)(test_random(seed) % (i + 1));
        ring[i] = ring[at];
        ring[at] = i;
        shares[i] = test_random(seed) % 3 == 0 ? 0 : (uint32_t)test_random(seed) >> test_random(seed) % 32;
    }
    shares[test_random(seed) % world] = UINT32_MAX;
    epoch_plan plan;
    const uint32_t piece = test_random(seed) % 2 == 0 ? 0 : PYCCL_PLAN_PIECE_MIN << test_random(seed) % 4;
    const pyccl_plan given = {.shares = shares, .ring = ring, .ring_from_bytes = UINT64_MAX, .piece_bytes = piece};
    REQUIRE(epoch_plan_init(&plan, &given, world) == PYCCL_OK);
    return plan;
}

static schedule of_plan(const epoch_plan *plan, const pyccl_spec *spec, uint32_t rank, uint32_t root) {
    schedule s;
    schedule_init(&s, spec, plan, rank, root);
    return s;
}

static schedule schedule_of(uint8_t kind, uint8_t dtype, uint64_t count, uint32_t world, uint32_t rank, uint32_t root) {
    const pyccl_spec spec = {.kind = kind, .dtype = dtype, .algorithm = PYCCL_DIRECT, .count = count, .root = {1}};
    return of_plan(equal_plan(world), &spec, rank, root);
}

/* Worlds of two swap an all_reduce: broadcast has shares in every world. */
TEST(schedule_shares_are_those_of_array_split) {
    for (uint32_t world = 1; world <= WORLD_MAX; world++)
        for (size_t c = 0; c < COUNTS_COUNT; c++) {
            const schedule s = schedule_of(PYCCL_BROADCAST, PYCCL_FLOAT32, COUNTS[c], world, 0, 0);
            uint64_t at = 0;
            for (uint32_t owner = 0; owner < world; owner++) {
                CHECK_EQ(schedule_share_start(&s, owner), at);
                const uint64_t elements = COUNTS[c] / world + (owner < COUNTS[c] % world ? 1 : 0);
                CHECK_EQ(schedule_share_elements(&s, owner), elements);
                at += elements;
            }
            CHECK_EQ(at * 4, schedule_kept_bytes(&s));
        }
}

TEST(schedule_plan_is_refused_unless_its_ring_has_every_rank_once_and_some_share_is_not_zero) {
    static const uint32_t twice[] = {0, 1, 1}, beyond[] = {0, 1, 3}, good[] = {2, 0, 1}, none[] = {0, 0, 0}, one[] = {0, 0, 7};
    epoch_plan plan;
    CHECK_EQ(epoch_plan_init(&plan, &(pyccl_plan){.ring = twice}, 3), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(epoch_plan_init(&plan, &(pyccl_plan){.ring = beyond}, 3), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(epoch_plan_init(&plan, &(pyccl_plan){.ring_pace = PYCCL_PACE_DIRECT}, 3), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(epoch_plan_init(&plan, &(pyccl_plan){.shares = none}, 3), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(epoch_plan_init(&plan, &(pyccl_plan){.shares = one, .ring = good}, 3), PYCCL_OK);
    const pyccl_spec spec = {.kind = PYCCL_ALL_REDUCE, .dtype = PYCCL_INT8, .op = PYCCL_SUM, .algorithm = PYCCL_DIRECT, .count = 1000};
    const schedule s = of_plan(&plan, &spec, 0, 0);
    CHECK_EQ(schedule_share_elements(&s, 0), 0);
    CHECK_EQ(schedule_share_elements(&s, 1), 0);
    CHECK_EQ(schedule_share_elements(&s, 2), 1000);
    CHECK(schedule_next(&s, 2) == 0 && schedule_next(&s, 0) == 1 && schedule_next(&s, 1) == 2 && schedule_previous(&s, 2) == 1);
}

TEST(schedule_plan_says_how_long_pieces_are_but_never_shorter_than_a_block) {
    static const uint32_t bad[] = {1, PYCCL_PLAN_PIECE_MIN / 2, PYCCL_PLAN_PIECE_MIN + 4, 2 * PYCCL_PLAN_PIECE_MAX, UINT32_MAX};
    epoch_plan plan;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK_EQ(epoch_plan_init(&plan, &(pyccl_plan){.piece_bytes = bad[i]}, 3), PYCCL_ERR_ARGUMENT);
    REQUIRE(epoch_plan_init(&plan, &(pyccl_plan){.piece_bytes = 32768}, 3) == PYCCL_OK);
    pyccl_spec spec = {.kind = PYCCL_ALL_REDUCE, .dtype = PYCCL_FLOAT64, .op = PYCCL_SUM, .algorithm = PYCCL_DIRECT, .count = 1000000};
    CHECK_EQ(of_plan(&plan, &spec, 0, 0).piece_elements, 4096);
    spec.codec = PYCCL_CODEC_UINT8, spec.block = 256;
    CHECK_EQ(of_plan(&plan, &spec, 0, 0).piece_elements, 32768);
    spec.block = PYCCL_BLOCK_MAX;
    CHECK_EQ(of_plan(&plan, &spec, 0, 0).piece_elements, PYCCL_BLOCK_MAX);
}

TEST(schedule_unequal_shares_are_the_floor_of_the_weights_below) {
    static const uint32_t weights[] = {3, 0, UINT32_MAX, 1};
    epoch_plan plan;
    REQUIRE(epoch_plan_init(&plan, &(pyccl_plan){.shares = weights}, 4) == PYCCL_OK);
    const pyccl_spec spec = {.kind = PYCCL_BROADCAST, .dtype = PYCCL_UINT8, .algorithm = PYCCL_DIRECT, .count = UINT64_C(1) << 48};
    const schedule s = of_plan(&plan, &spec, 0, 0);
    /* floor(2^48 * w / (2^32 + 3)): as Python computes it */
    CHECK_EQ(schedule_share_start(&s, 1), 196607);
    CHECK_EQ(schedule_share_start(&s, 2), 196607);
    CHECK_EQ(schedule_share_start(&s, 3), UINT64_C(281474976645120));
    CHECK_EQ(schedule_share_start(&s, 3) + schedule_share_elements(&s, 3), UINT64_C(1) << 48);
}

/* Every element lies in one piece, and a piece divides no block. */
static void check_pieces(const schedule *s) {
    uint64_t pieces = 0, next = 0;
    for (uint32_t owner = 0; owner < s->world; owner++) {
        uint64_t elements = 0;
        if (s->swap) next = pieces = 0;
        for (uint64_t piece = 0; piece < schedule_pieces(s, owner); piece++, pieces++) {
            const uint64_t n = schedule_piece_elements(s, owner, piece);
            CHECK_EQ(schedule_piece_start(s, owner, piece), next);
            CHECK(s->kind == PYCCL_REDUCE_SCATTER || next % s->block == 0);
            CHECK(n > 0 && n <= s->piece_elements && schedule_partial_bytes(s, owner, piece) <= PYCCL_PIECE_MAX);
            next += n, elements += n;
        }
        CHECK_EQ(elements, schedule_share_elements(s, owner));
    }
    CHECK_EQ(pieces, schedule_input_pieces(s));
    CHECK_EQ(next, s->kind == PYCCL_ALL_GATHER ? s->world * s->count : s->count);
}

/* What one sends another are items that the other finds by offset and length, and nothing else. */
static void check_items(const schedule *s, uint32_t phase, uint32_t from, uint32_t to) {
    uint64_t items = schedule_items(s, phase, from, to), found;
    for (uint64_t item = 0; item < items; item++) {
        uint32_t owner;
        uint64_t piece;
        schedule_item(s, phase, from, to, item, &owner, &piece);
        const uint64_t offset = schedule_item_offset(s, phase, from, to, item), n = schedule_piece_elements(s, owner, piece);
        const uint32_t bytes = schedule_item_bytes(s, phase, from, to, item), most = schedule_piece_bytes_max(s);
        const bool partial = s->ring && phase == SCHEDULE_CONTRIBUTION && from != schedule_next(s, owner);
        const bool travels = !s->ring || owner != (phase == SCHEDULE_CONTRIBUTION ? from : to);
        CHECK_EQ(bytes, partial ? n * s->partial_bytes : s->codec ? pyccl_codec_size(s->codec, s->block, n) : n * s->element_bytes);
        CHECK(bytes > 0 && bytes <= PYCCL_PIECE_MAX && (partial || bytes <= most));
        CHECK(schedule_item_find(s, phase, from, to, offset, bytes, &found) == travels && (!travels || found == item));
        CHECK(!schedule_item_find(s, phase, from, to, offset, bytes - 1, &found));
        CHECK(!schedule_item_find(s, phase, from, to, offset, bytes + 1, &found));
        CHECK(!schedule_item_find(s, phase, from, to, offset + s->element_bytes, bytes, &found) || found != item);
        CHECK(s->element_bytes == 1 || !schedule_item_find(s, phase, from, to, offset + 1, bytes, &found));
    }
    CHECK(!schedule_item_find(s, phase, from, to, UINT64_MAX - 7, 8, &found));
    CHECK(!schedule_item_find(s, phase, from, to, UINT64_C(1) << 50, 8, &found));
}

static void check_schedule(const schedule *s) {
    check_pieces(s);
    for (uint32_t phase = 0; phase < 2; phase++)
        for (uint32_t from = 0; from < s->world; from++)
            for (uint32_t to = 0; to < s->world; to++)
                if (from != to) check_items(s, phase, from, to);
}

TEST(schedule_pieces_cover_each_element_once) {
    static const uint8_t dtypes[] = {PYCCL_INT32, PYCCL_FLOAT64, PYCCL_UINT8};
    static const uint8_t kinds[] = {PYCCL_ALL_REDUCE, PYCCL_BROADCAST, PYCCL_ALL_GATHER, PYCCL_REDUCE_SCATTER};
    for (uint32_t world = 1; world <= WORLD_MAX; world++)
        for (size_t c = 0; c < COUNTS_COUNT; c++)
            for (size_t d = 0; d < sizeof dtypes; d++)
                for (size_t k = 0; k < sizeof kinds; k++) {
                    const schedule s = schedule_of(kinds[k], dtypes[d], COUNTS[c], world, 0, world - 1);
                    check_schedule(&s);
                }
}

TEST(schedule_codec_blocks_are_not_divided) {
    static const uint8_t dtypes[] = {PYCCL_FLOAT16, PYCCL_FLOAT32, PYCCL_FLOAT64}, algorithms[] = {PYCCL_DIRECT, PYCCL_RING};
    for (uint32_t world = 1; world <= WORLD_MAX; world += 1 + world / 4)
        for (size_t c = 0; c < COUNTS_COUNT; c++)
            for (uint32_t block = PYCCL_BLOCK_MIN; block <= PYCCL_BLOCK_MAX; block *= 32)
                for (size_t d = 0; d < sizeof dtypes; d++)
                    for (size_t k = 0; k < sizeof algorithms; k++) {
                        const uint8_t codec = (uint8_t)(PYCCL_CODEC_UINT8 + (c + d + block / 64) % PYCCL_CODEC_BFLOAT16);
                        const pyccl_spec spec = {.kind = PYCCL_ALL_REDUCE, .dtype = dtypes[d], .op = PYCCL_SUM, .codec = codec,
                                                 .algorithm = algorithms[k], .block = block, .count = COUNTS[c]};
                        const schedule s = of_plan(equal_plan(world), &spec, 0, 0);
                        check_schedule(&s);
                    }
}

TEST(schedule_of_any_plan_covers_each_element_once) {
    static const uint8_t dtypes[] = {PYCCL_FLOAT16, PYCCL_FLOAT32, PYCCL_UINT8};
    uint64_t seed = test_seed();
    for (int run = 0; run < 300; run++) {
        const uint32_t world = 1 + (uint32_t)(test_random(&seed) % WORLD_MAX);
        const epoch_plan plan = drawn_plan(&seed, world);
        const uint8_t dtype = dtypes[run % 3];
        const bool coded = dtype != PYCCL_UINT8 && run % 2 == 0;
        const pyccl_spec spec = {.kind = PYCCL_ALL_REDUCE, .dtype = dtype, .op = PYCCL_SUM, .codec = coded, .block = coded ? 64 : 0,
                                 .algorithm = run % 4 < 2 ? PYCCL_RING : PYCCL_DIRECT, .count = COUNTS[test_random(&seed) % COUNTS_COUNT]};
        for (uint32_t rank = 0; rank < world; rank++) {
            const schedule s = of_plan(&plan, &spec, rank, 0);
            check_schedule(&s);
        }
    }
}

/* Phase 0 of a share starts behind its owner and brings every input there once; phase 1 takes the result to all. */
TEST(schedule_ring_brings_each_input_to_the_owner_and_the_result_to_all) {
    uint64_t seed = test_seed();
    for (uint32_t world = 3; world <= WORLD_MAX; world++) {
        const epoch_plan plan = drawn_plan(&seed, world);
        const pyccl_spec spec = {.kind = PYCCL_ALL_REDUCE, .dtype = PYCCL_FLOAT32, .op = PYCCL_SUM, .algorithm = PYCCL_RING, .count = 5000};
        const schedule s = of_plan(&plan, &spec, 0, 0);
        CHECK(s.ring && schedule_algorithm(&s) == PYCCL_RING);
        for (uint32_t owner = 0; owner < world; owner++) {
            uint32_t at = schedule_next(&s, owner);
            for (uint32_t step = 0; step < world; step++, at = schedule_next(&s, at)) {
                CHECK_EQ(schedule_step(&s, owner, at), step);
                CHECK_EQ(schedule_previous(&s, schedule_next(&s, at)), at);
                for (uint32_t to = 0; to < world; to++)
                    CHECK((to != at && schedule_items(&s, SCHEDULE_CONTRIBUTION, at, to) > 0) == (to == schedule_next(&s, at)));
            }
            CHECK_EQ(at, schedule_next(&s, owner));
            CHECK_EQ(schedule_step(&s, owner, owner), world - 1);
        }
    }
}

TEST(schedule_takes_the_ring_where_it_was_asked_for_or_the_plan_says_so) {
    static const struct { uint8_t kind, algorithm; uint32_t world; uint64_t from, count; uint8_t runs; } cases[] = {
        {PYCCL_ALL_REDUCE, PYCCL_RING, 3, UINT64_MAX, 1, PYCCL_RING},      {PYCCL_ALL_REDUCE, PYCCL_RING, 2, 0, 1000, PYCCL_DIRECT},
        {PYCCL_ALL_REDUCE, PYCCL_DIRECT, 3, 0, 1000, PYCCL_DIRECT},        {PYCCL_ALL_REDUCE, PYCCL_AUTO, 3, UINT64_MAX, 1000, PYCCL_DIRECT},
        {PYCCL_ALL_REDUCE, PYCCL_AUTO, 3, 4000, 1000, PYCCL_RING},         {PYCCL_ALL_REDUCE, PYCCL_AUTO, 3, 4001, 1000, PYCCL_DIRECT},
        {PYCCL_BROADCAST, PYCCL_DIRECT, 3, 0, 1000, PYCCL_DIRECT},         {PYCCL_REDUCE_SCATTER, PYCCL_DIRECT, 3, 0, 1000, PYCCL_DIRECT},
        {PYCCL_REDUCE_SCATTER, PYCCL_RING, 3, UINT64_MAX, 1, PYCCL_RING},  {PYCCL_REDUCE_SCATTER, PYCCL_RING, 2, 0, 1000, PYCCL_DIRECT},
        {PYCCL_REDUCE_SCATTER, PYCCL_AUTO, 3, 4000, 1000, PYCCL_RING},     {PYCCL_REDUCE_SCATTER, PYCCL_AUTO, 3, 4001, 1000, PYCCL_DIRECT}};
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        epoch_plan plan;
        REQUIRE(epoch_plan_init(&plan, &(pyccl_plan){.ring_from_bytes = cases[k].from}, cases[k].world) == PYCCL_OK);
        const pyccl_spec spec = {.kind = cases[k].kind, .dtype = PYCCL_FLOAT32, .op = PYCCL_SUM, .algorithm = cases[k].algorithm,
                                 .count = cases[k].count, .root = {1}};
        const schedule s = of_plan(&plan, &spec, 0, 0);
        CHECK_EQ(schedule_algorithm(&s), cases[k].runs);
    }
}

/* Four members; a byte takes so many millionths in the ring of what it takes direct. Codes of 8 bits become sums of 32. */
TEST(schedule_by_a_plan_counts_what_a_ring_sends_more_of) {
    static const struct { uint8_t kind, dtype, codec; uint32_t pace; uint8_t runs; } cases[] = {
        {PYCCL_ALL_REDUCE, PYCCL_FLOAT32, 0, 999999, PYCCL_RING},
        {PYCCL_ALL_REDUCE, PYCCL_FLOAT32, PYCCL_CODEC_INT8, 490000, PYCCL_RING},
        {PYCCL_ALL_REDUCE, PYCCL_FLOAT32, PYCCL_CODEC_INT8, 510000, PYCCL_DIRECT},
        {PYCCL_ALL_REDUCE, PYCCL_FLOAT32, PYCCL_CODEC_FP4_E3M0, 290000, PYCCL_RING},
        {PYCCL_ALL_REDUCE, PYCCL_FLOAT32, PYCCL_CODEC_FP4_E3M0, 310000, PYCCL_DIRECT},
        {PYCCL_ALL_REDUCE, PYCCL_FLOAT16, 0, 740000, PYCCL_RING},
        {PYCCL_ALL_REDUCE, PYCCL_FLOAT16, 0, 760000, PYCCL_DIRECT},
        {PYCCL_REDUCE_SCATTER, PYCCL_FLOAT32, 0, 999999, PYCCL_RING},
        {PYCCL_REDUCE_SCATTER, PYCCL_FLOAT32, PYCCL_CODEC_INT8, 330000, PYCCL_RING},
        {PYCCL_REDUCE_SCATTER, PYCCL_FLOAT32, PYCCL_CODEC_INT8, 340000, PYCCL_DIRECT}};
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        epoch_plan plan;
        REQUIRE(epoch_plan_init(&plan, &(pyccl_plan){.ring_from_bytes = 1000, .ring_pace = cases[k].pace}, 4) == PYCCL_OK);
        const pyccl_spec spec = {.kind = cases[k].kind, .dtype = cases[k].dtype, .op = PYCCL_SUM, .codec = cases[k].codec,
                                 .block = cases[k].codec ? 65536 : 0, .algorithm = PYCCL_AUTO, .count = 1 << 24, .root = {1}};
        const schedule s = of_plan(&plan, &spec, 0, 0);
        CHECK_EQ(schedule_algorithm(&s), cases[k].runs);
    }
}

TEST(schedule_item_find_accepts_exactly_the_pieces) {
    const schedule s = schedule_of(PYCCL_BROADCAST, PYCCL_FLOAT32, 3 * (SCHEDULE_PIECE_BYTES / 4) + 5, 2, 0, 0);
    uint64_t item = 0;
    CHECK(schedule_item_find(&s, SCHEDULE_CONTRIBUTION, 0, 1, 0, SCHEDULE_PIECE_BYTES, &item) && item == 0);
    const uint64_t rest = schedule_share_elements(&s, 1) * 4 - SCHEDULE_PIECE_BYTES;
    CHECK(schedule_item_find(&s, SCHEDULE_CONTRIBUTION, 0, 1, SCHEDULE_PIECE_BYTES, rest, &item) && item == 1);
    CHECK(!schedule_item_find(&s, SCHEDULE_CONTRIBUTION, 0, 1, SCHEDULE_PIECE_BYTES, rest - 1, &item));
    CHECK(!schedule_item_find(&s, SCHEDULE_CONTRIBUTION, 0, 1, SCHEDULE_PIECE_BYTES, rest + 1, &item));
    CHECK(!schedule_item_find(&s, SCHEDULE_CONTRIBUTION, 0, 1, 4, SCHEDULE_PIECE_BYTES, &item));
    CHECK(!schedule_item_find(&s, SCHEDULE_CONTRIBUTION, 0, 1, 2 * SCHEDULE_PIECE_BYTES, 4, &item));
    CHECK(!schedule_item_find(&s, SCHEDULE_CONTRIBUTION, 0, 1, UINT64_MAX - SCHEDULE_PIECE_BYTES + 1, 4, &item));
    CHECK(!schedule_item_find(&s, SCHEDULE_RESULT, 1, 0, 0, SCHEDULE_PIECE_BYTES, &item)); /* the root has it */
}

TEST(schedule_two_swap_whole_vectors) {
    for (uint32_t rank = 0; rank < 2; rank++) {
        const schedule s = schedule_of(PYCCL_ALL_REDUCE, PYCCL_FLOAT32, 1000, 2, rank, 0);
        for (uint32_t owner = 0; owner < 2; owner++) {
            CHECK_EQ(schedule_share_start(&s, owner), 0);
            CHECK_EQ(schedule_share_elements(&s, owner), 1000);
            CHECK_EQ(schedule_contributors(&s, owner), 1);
            CHECK(schedule_contributes(&s, 1 - owner, owner) && !schedule_contributes(&s, owner, owner));
            CHECK(!schedule_receives(&s, 0, owner) && !schedule_receives(&s, 1, owner));
        }
    }
}

TEST(schedule_all_gather_shares_are_whole_inputs) {
    const schedule s = schedule_of(PYCCL_ALL_GATHER, PYCCL_FLOAT64, 1000, 3, 1, 0);
    CHECK_EQ(schedule_kept_bytes(&s), 24000);
    for (uint32_t owner = 0; owner < 3; owner++) {
        CHECK_EQ(schedule_share_start(&s, owner), owner * 1000);
        CHECK_EQ(schedule_share_elements(&s, owner), 1000);
        CHECK(schedule_is_local(&s, owner, owner) && !schedule_is_local(&s, owner, (owner + 1) % 3));
        CHECK_EQ(schedule_contributors(&s, owner), 0);
    }
}

TEST(schedule_reduce_scatter_keeps_whole_rows_of_our_share) {
    static const uint64_t rows[] = {0, 1, 2, 3, 5, 8, 1000};
    for (uint32_t world = 2; world <= WORLD_MAX; world++)
        for (size_t k = 0; k < 2 * sizeof rows / sizeof *rows; k++)
            for (uint32_t rank = 0; rank < world; rank++) {
                const uint64_t count = rows[k / 2];
                const bool ring = world > 2 && k % 2;
                const pyccl_spec spec = {.kind = PYCCL_REDUCE_SCATTER, .dtype = PYCCL_FLOAT32, .op = PYCCL_SUM, .algorithm = k % 2 ? PYCCL_RING : PYCCL_DIRECT,
                                         .count = count * 300, .root = {300 & 255, 300 >> 8}};
                uint64_t seed = world; /* a plan's shares are not asked */
                const epoch_plan plan = drawn_plan(&seed, world);
                const schedule s = of_plan(&plan, &spec, rank, 0);
                const uint64_t mine = count / world + (rank < count % world);
                CHECK_EQ(schedule_share_elements(&s, rank), mine * 300);
                CHECK_EQ(schedule_kept_bytes(&s), mine * 1200);
                CHECK_EQ(schedule_kept_pieces(&s), schedule_pieces(&s, rank));
                const uint64_t passing = schedule_input_pieces(&s) - schedule_pieces(&s, schedule_previous(&s, rank));
                CHECK_EQ(schedule_due_pieces(&s), ring ? passing : schedule_pieces(&s, rank));
                for (uint32_t to = 0; to < world; to++) {
                    const uint64_t sent = ring ? (to == schedule_next(&s, rank)) * schedule_input_pieces(&s) : schedule_pieces(&s, to);
                    if (to != rank) CHECK_EQ(schedule_items(&s, SCHEDULE_CONTRIBUTION, rank, to), sent);
                    CHECK_EQ(schedule_items(&s, SCHEDULE_RESULT, rank, to), 0);
                }
                check_schedule(&s);
            }
}

TEST(schedule_exchange_is_between_its_pair_alone) {
    for (uint32_t world = 2; world <= 5; world++)
        for (uint32_t rank = 0; rank < world; rank++)
            for (uint32_t other = 0; other < world; other++) {
                if (other == rank) continue;
                const schedule s = schedule_of(PYCCL_EXCHANGE, PYCCL_FLOAT64, 262145, world, rank, other);
                const uint32_t low = rank < other ? rank : other, high = rank < other ? other : rank;
                uint64_t pieces = 0;
                CHECK_EQ(schedule_kept_bytes(&s), 262145 * 8);
                CHECK_EQ(schedule_share_start(&s, low), 0);
                CHECK_EQ(schedule_share_start(&s, high), 262145);
                for (uint32_t owner = 0; owner < world; owner++) {
                    const bool of_it = owner == rank || owner == other;
                    CHECK_EQ(schedule_share_elements(&s, owner), of_it ? 262145 : 0);
                    CHECK_EQ(schedule_contributors(&s, owner), 0);
                    CHECK(schedule_is_local(&s, owner, rank) == (owner == rank));
                    pieces += schedule_pieces(&s, owner);
                    for (uint32_t to = 0; to < world; to++)
                        CHECK(schedule_receives(&s, owner, to) == (of_it && owner != to && (to == rank || to == other)));
                }
                CHECK_EQ(pieces, schedule_kept_pieces(&s));
            }
}

TEST(schedule_everybody_gets_every_share_by_exactly_one_way) {
    static const uint8_t kinds[] = {PYCCL_ALL_REDUCE, PYCCL_BROADCAST, PYCCL_ALL_GATHER};
    for (uint32_t world = 2; world <= WORLD_MAX; world++)
        for (size_t k = 0; k < sizeof kinds; k++)
            for (uint32_t root = 0; root < world; root++) {
                const schedule s = schedule_of(kinds[k], PYCCL_FLOAT32, 100, world, 0, root);
                for (uint32_t owner = 0; owner < world; owner++) {
                    uint32_t contributors = 0;
                    for (uint32_t at = 0; at < world; at++) {
                        contributors += schedule_contributes(&s, at, owner);
                        if (s.swap) continue;
                        const bool folds_here = at == owner && schedule_contributors(&s, owner) > 0;
                        CHECK_EQ(schedule_receives(&s, owner, at) + folds_here + schedule_is_local(&s, owner, at), 1);
                    }
                    CHECK_EQ(contributors, schedule_contributors(&s, owner));
                }
            }
}

TEST(schedule_barrier_moves_nothing) {
    const schedule s = schedule_of(PYCCL_BARRIER, PYCCL_UINT8, 0, 5, 2, 0);
    CHECK_EQ(schedule_kept_bytes(&s), 0);
    for (uint32_t owner = 0; owner < 5; owner++) {
        CHECK_EQ(schedule_pieces(&s, owner), 0);
        for (uint32_t at = 0; at < 5; at++) CHECK(!schedule_contributes(&s, at, owner) && !schedule_receives(&s, owner, at));
    }
}
