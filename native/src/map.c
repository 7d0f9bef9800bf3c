/* map.c: see map.h. */
#include "map.h"

#include <stdlib.h>
#include <string.h>

#include "status.h"

static size_t home(const pyccl_map *map, uint64_t key) {
    key ^= key >> 32;
    key *= UINT64_C(0x9E3779B97F4A7C15);  /* Fibonacci hashing: keys are pointers and small numbers */
    return (size_t)(key >> 32) & (map->cap - 1);
}

static size_t find(const pyccl_map *map, uint64_t key) {  /* the key's slot, or the free slot where it belongs */
    size_t i = home(map, key);
    while (map->slots[i].key != 0 && map->slots[i].key != key) i = (i + 1) & (map->cap - 1);
    return i;
}

void *pyccl_map_get(const pyccl_map *map, uint64_t key) {
    if (map->count == 0) return NULL;
    return map->slots[find(map, key)].value;  /* a free slot holds NULL */
}

static void grow(pyccl_map *map) {
    pyccl_map bigger = {.cap = map->cap ? map->cap * 2 : 16, .count = map->count};
    bigger.slots = calloc(bigger.cap, sizeof *bigger.slots);
    PYCCL_ASSERT(bigger.slots != NULL);
    for (size_t i = 0; i < map->cap; i++)
        if (map->slots[i].key != 0) bigger.slots[find(&bigger, map->slots[i].key)] = map->slots[i];
    free(map->slots);
    *map = bigger;
}

void pyccl_map_put(pyccl_map *map, uint64_t key, void *value) {
    PYCCL_ASSERT(key != 0 && value != NULL);
    if (map->count * 2 >= map->cap) grow(map);
    size_t i = find(map, key);
    PYCCL_ASSERT(map->slots[i].key == 0);
    map->slots[i] = (pyccl_map_slot){key, value};
    map->count++;
}

void pyccl_map_remove(pyccl_map *map, uint64_t key) {
    PYCCL_ASSERT(map->count > 0);
    size_t mask = map->cap - 1, hole = find(map, key);
    PYCCL_ASSERT(map->slots[hole].key == key);
    for (size_t i = (hole + 1) & mask; map->slots[i].key != 0; i = (i + 1) & mask) {
        /* move back whatever may legally stand at or before the hole */
        if (((i - home(map, map->slots[i].key)) & mask) >= ((i - hole) & mask)) {
            map->slots[hole] = map->slots[i];
            hole = i;
        }
    }
    map->slots[hole] = (pyccl_map_slot){0, NULL};
    map->count--;
}

void pyccl_map_clear(pyccl_map *map) {
    if (map->cap != 0) memset(map->slots, 0, map->cap * sizeof *map->slots);
    map->count = 0;
}

void pyccl_map_fini(pyccl_map *map) {
    free(map->slots);
    *map = (pyccl_map){0};
}
