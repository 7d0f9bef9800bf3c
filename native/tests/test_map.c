/* test_map.c: map.c against a naive array, with keys that crowd into few home slots. */
#include "../src/map.h"

#include "test.h"

enum { KEYS = 400, ROUNDS = 60000 };

typedef struct naive_map {
    uint64_t key[KEYS];
    void *value[KEYS];                     /* NULL: the key is not in the map */
    size_t count;
} naive_map;

static int cells[1024];                    /* values are addresses in here */

static void same(const pyccl_map *map, const naive_map *naive) {
    CHECK_EQ(map->count, naive->count);
    CHECK(map->cap == 0 || ((map->cap & (map->cap - 1)) == 0 && map->cap >= 2 * map->count));
    size_t used = 0;
    for (size_t i = 0; i < map->cap; i++) {
        used += map->slots[i].key != 0;
        CHECK((map->slots[i].key == 0) == (map->slots[i].value == NULL));
    }
    CHECK_EQ(used, naive->count);
    for (size_t i = 0; i < KEYS; i++) CHECK(pyccl_map_get(map, naive->key[i]) == naive->value[i]);
}

/* Random puts and removes; fill: how many in 256 steps put while the key is absent. */
static void run(naive_map *naive, uint64_t seed, unsigned fill) {
    pyccl_map map = {0};
    for (int round = 0; round < ROUNDS; round++) {
        size_t i = test_random(&seed) % KEYS;
        unsigned dice = (unsigned)(test_random(&seed) & 255);
        if (naive->value[i] == NULL && dice < fill) {
            naive->value[i] = &cells[test_random(&seed) % 1024];
            naive->count++;
            pyccl_map_put(&map, naive->key[i], naive->value[i]);
        } else if (naive->value[i] != NULL && dice >= fill) {
            naive->value[i] = NULL;
            naive->count--;
            pyccl_map_remove(&map, naive->key[i]);
        } else CHECK(pyccl_map_get(&map, naive->key[i]) == naive->value[i]);
        if (round % 500 == 0) same(&map, naive);
        if (round % 20000 == 19999) {
            pyccl_map_clear(&map);
            memset(naive->value, 0, sizeof naive->value);
            naive->count = 0;
            same(&map, naive);
        }
    }
    pyccl_map_fini(&map);
    CHECK(map.slots == NULL && map.cap == 0 && map.count == 0);
}

static naive_map naive_with(uint64_t first, uint64_t stride) {
    naive_map naive = {.count = 0};
    for (uint64_t i = 0; i < KEYS; i++) naive.key[i] = first + i * stride;
    return naive;
}

TEST(map_agrees_with_an_array_for_small_keys) {
    for (unsigned fill = 32; fill < 256; fill += 64) {
        naive_map naive = naive_with(1, 1);
        run(&naive, fill, fill);
    }
}

TEST(map_agrees_with_an_array_for_tags_in_two_spaces) {
    naive_map naive = naive_with(1, UINT64_C(1) << 31);
    run(&naive, 7, 128);
}

TEST(map_agrees_with_an_array_for_pointers) {
    naive_map naive = naive_with(UINT64_C(0x7F0000001010), 4096);
    run(&naive, 8, 160);
}

TEST(map_agrees_with_an_array_for_keys_that_share_home_slots) {
    /* Odd inverse of the multiplier: these keys all land near slot 0 of a table of any size up to 2^20. */
    uint64_t inverse = 1;
    for (int i = 0; i < 6; i++) inverse *= 2 - UINT64_C(0x9E3779B97F4A7C15) * inverse;
    naive_map naive = {.count = 0};
    for (uint64_t i = 0; i < KEYS; i++) {
        uint64_t key = inverse * (i % 3 << 52 | (i + 1));
        naive.key[i] = key ^ key >> 32;    /* undoes the first fold of the hash */
    }
    run(&naive, 9, 150);
}

TEST(map_get_of_an_empty_map_is_null) {
    pyccl_map map = {0};
    CHECK(pyccl_map_get(&map, 5) == NULL);
    pyccl_map_clear(&map);
    pyccl_map_put(&map, 5, cells);
    pyccl_map_remove(&map, 5);
    CHECK(pyccl_map_get(&map, 5) == NULL);
    pyccl_map_fini(&map);
}

TEST(map_takes_the_largest_and_the_smallest_key) {
    pyccl_map map = {0};
    pyccl_map_put(&map, UINT64_MAX, &cells[0]);
    pyccl_map_put(&map, 1, &cells[1]);
    CHECK(pyccl_map_get(&map, UINT64_MAX) == &cells[0]);
    CHECK(pyccl_map_get(&map, 1) == &cells[1]);
    pyccl_map_fini(&map);
}
