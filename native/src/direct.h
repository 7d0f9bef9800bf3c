/* direct.h: the schedule of algorithm "direct": who sends which piece to whom, and where it lies in the result.
 * Every member owns one share of the result. Phase 0 brings the contributions to a share to its owner, phase 1 takes
 * the finished share from its owner to everybody who needs it. Pieces of a share travel and are folded one by one.
 *
 * Pure arithmetic: no socket, clock or allocation. The engine asks these functions and does no share arithmetic of
 * its own: another algorithm, or shares of unequal size, are a change of this file.
 * Invariant: the shares of a plan cover each byte of the result exactly once, in the order of their owners.
 * Threads: nothing shared, a plan belongs to its caller.          Spec: proto/wire.md 3.3 */
#ifndef PYCCL_DIRECT_H
#define PYCCL_DIRECT_H

#include <stdbool.h>
#include <stdint.h>

#include "../include/pyccl.h"

#define DIRECT_CONTRIBUTION 0
#define DIRECT_RESULT 1

typedef struct direct_plan {
    uint8_t kind;                    /* pyccl_kind */
    uint32_t world, rank;            /* rank: ours */
    uint32_t root;                   /* broadcast: rank of the source */
    uint32_t element_bytes;
    uint64_t count;                  /* elements of one input */
} direct_plan;

/* The spec must have been checked: a known kind and dtype, count at most 2^48; root < world for a broadcast. */
void direct_plan_init(direct_plan *plan, const pyccl_spec *spec, uint32_t world, uint32_t rank, uint32_t root);

uint64_t direct_input_bytes(const direct_plan *plan);
uint64_t direct_result_bytes(const direct_plan *plan);
uint64_t direct_share_offset(const direct_plan *plan, uint32_t owner);   /* byte offset inside the result */
uint64_t direct_share_bytes(const direct_plan *plan, uint32_t owner);
uint64_t direct_pieces(const direct_plan *plan, uint32_t owner);         /* pieces of the owner's share */
uint64_t direct_piece_offset(const direct_plan *plan, uint64_t piece);   /* byte offset inside the share */
uint32_t direct_piece_bytes(const direct_plan *plan, uint32_t owner, uint64_t piece);
/* The piece a frame carries: false when offset and length are not exactly those of one piece of the owner's share. */
bool direct_piece_find(const direct_plan *plan, uint32_t owner, uint64_t offset, uint64_t length, uint64_t *piece);

bool direct_contributes(const direct_plan *plan, uint32_t from, uint32_t owner); /* sends phase 0 of owner's share to it */
bool direct_receives(const direct_plan *plan, uint32_t owner, uint32_t to);      /* gets phase 1 of owner's share */
uint32_t direct_contributors(const direct_plan *plan, uint32_t owner);           /* how many send phase 0 to owner */
/* The piece is whole at `at` without anything from the network once the operation has started. */
bool direct_is_local(const direct_plan *plan, uint32_t owner, uint32_t at);

#endif
