/* direct.h: the schedule of algorithm "direct": who sends which piece to whom, and where it lies in the result.
 * Every member owns one share of the result. Phase 0 brings the contributions to a share to its owner, phase 1 takes
 * the finished share from its owner to everybody who needs it. Pieces of a share travel and are folded one by one.
 * An exchange is the all_gather of a pair of which each keeps the other's share; all other members own nothing.
 * The swap, an all_reduce of two: each side owns the whole vector, sends all of its input and folds; no phase 1.
 *
 * Places are elements of the result; offsets and bytes "on the wire" are those of frames, encoded where a codec is used.
 * Pure arithmetic: no socket, clock or allocation. The engine asks these functions and does no share arithmetic of
 * its own: another algorithm, or shares of unequal size, are a change of this file.
 * Invariant: the shares of a plan cover each element of the result exactly once, in the order of their owners; in a
 * swap each of the two shares does.
 * Threads: nothing shared, a plan belongs to its caller.          Spec: proto/wire.md 3.3 */
#ifndef PYCCL_DIRECT_H
#define PYCCL_DIRECT_H

#include <stdbool.h>
#include <stdint.h>

#include "../include/pyccl.h"

#define DIRECT_CONTRIBUTION 0
#define DIRECT_RESULT 1
#define DIRECT_PIECE_BYTES (256 << 10) /* without a codec: a piece is sent, folded and hashed while it is in the cache */

typedef struct direct_plan {
    uint8_t kind;                    /* pyccl_kind */
    uint32_t world, rank;            /* rank: ours */
    uint32_t root;                   /* broadcast: rank of the source; exchange: of the partner */
    bool swap;
    uint8_t codec;                   /* pyccl_codec of pieces on the wire */
    uint32_t block;                  /* elements of a codec block, which no share or piece divides; 1 without a codec */
    uint32_t element_bytes;
    uint64_t piece_elements;         /* of a piece that is not the last of its share: whole blocks */
    uint64_t count;                  /* elements of one input */
} direct_plan;

/* The spec must have been checked: a known kind and dtype, count at most 2^48; root < world for a broadcast and an
 * exchange, there not rank. */
void direct_plan_init(direct_plan *plan, const pyccl_spec *spec, uint32_t world, uint32_t rank, uint32_t root);

uint64_t direct_input_bytes(const direct_plan *plan);
uint64_t direct_result_bytes(const direct_plan *plan);                    /* of what is kept of it: exchange, half */
uint64_t direct_share_start(const direct_plan *plan, uint32_t owner);     /* its first element in the result */
uint64_t direct_share_elements(const direct_plan *plan, uint32_t owner);
uint64_t direct_pieces(const direct_plan *plan, uint32_t owner);          /* pieces of the owner's share */
uint64_t direct_result_pieces(const direct_plan *plan);                   /* pieces of the whole result */
uint64_t direct_piece_start(const direct_plan *plan, uint32_t owner, uint64_t piece); /* first element in the result */
uint64_t direct_piece_elements(const direct_plan *plan, uint32_t owner, uint64_t piece);
uint64_t direct_piece_offset(const direct_plan *plan, uint64_t piece);    /* on the wire, inside the share */
uint32_t direct_piece_bytes(const direct_plan *plan, uint32_t owner, uint64_t piece);  /* on the wire */
/* The piece a frame carries: false when offset and length are not exactly those of one piece of the owner's share. */
bool direct_piece_find(const direct_plan *plan, uint32_t owner, uint64_t offset, uint64_t length, uint64_t *piece);

bool direct_contributes(const direct_plan *plan, uint32_t from, uint32_t owner); /* sends phase 0 of owner's share to it */
bool direct_receives(const direct_plan *plan, uint32_t owner, uint32_t to);      /* gets phase 1 of owner's share */
uint32_t direct_contributors(const direct_plan *plan, uint32_t owner);           /* how many send phase 0 to owner */
/* The piece is whole at `at` without anything from the network once the operation has started. */
bool direct_is_local(const direct_plan *plan, uint32_t owner, uint32_t at);

#endif
