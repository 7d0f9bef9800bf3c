/* map.h: a map from non-zero 64-bit keys to pointers: open addressing, linear probing, no tombstones (deletion shifts
 * back). Used by op_fsm.c for tags and cookies. Running out of memory for a few kilobytes ends the process. */
#ifndef PYCCL_MAP_H
#define PYCCL_MAP_H

#include <stddef.h>
#include <stdint.h>

typedef struct pyccl_map_slot {
    uint64_t key;                          /* 0: free */
    void *value;
} pyccl_map_slot;

typedef struct pyccl_map {                 /* all zero is an empty map */
    pyccl_map_slot *slots;
    size_t cap, count;                     /* cap: 0 or a power of two, at least twice count */
} pyccl_map;

void *pyccl_map_get(const pyccl_map *map, uint64_t key);       /* NULL: not there */
void pyccl_map_put(pyccl_map *map, uint64_t key, void *value); /* the key must not be there */
void pyccl_map_remove(pyccl_map *map, uint64_t key);           /* the key must be there */
void pyccl_map_clear(pyccl_map *map);
void pyccl_map_fini(pyccl_map *map);

#endif
