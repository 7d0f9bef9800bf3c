/* schedule.h: the schedule of an operation: who sends which piece to whom, and where it lies in the result.
 * Every member owns one share of the result, a share is cut into pieces. A piece passes two phases: its contributions
 * are brought together and folded (phase 0), the folded piece is taken to everybody who needs it (phase 1).
 *
 *   direct   phase 0 goes from everybody to the owner, phase 1 from the owner to everybody.
 *   ring     both phases go from each member to the next in the ring alone:
 *
 *              next(j) --x--> . --sum of 2--> . ... --sum of N-1--> j            phase 0 of the share of j
 *              j --result--> next(j) --result--> . ... --> the one before j      phase 1
 *
 *   swap     an all_reduce of two: each side owns the whole vector, sends all of its input and folds; no phase 1.
 *
 * An exchange is the all_gather of a pair of which each keeps the other's share; all other members own nothing. A
 * reduce_scatter ends with phase 0: who owns a share keeps it.
 *
 * Places are elements of the result; offsets and bytes "on the wire" are those of frames, encoded where a codec is used.
 * What one member may send to another in a phase are numbered *items*: direct, the pieces of one share; ring, the pieces
 * of all shares ("slots"), of which some never travel between these two.
 * Pure arithmetic: no socket, clock or allocation. The engine asks these functions and does no share arithmetic of
 * its own.
 * Invariant: the shares of a schedule cover each element of the result exactly once, in the order of their owners; in a
 * swap each of the two shares does.
 * Threads: nothing shared, a schedule belongs to its caller.       Spec: proto/wire.md 3.3 */
#ifndef PYCCL_SCHEDULE_H
#define PYCCL_SCHEDULE_H

#include <stdbool.h>
#include <stdint.h>

#include "../include/pyccl.h"

#define SCHEDULE_CONTRIBUTION 0
#define SCHEDULE_RESULT 1
#define SCHEDULE_PIECE_BYTES (256 << 10) /* unless the plan has smaller ones for slow lines: a piece is sent, folded and hashed while it is in the cache */

typedef struct epoch_plan {          /* of an epoch; judged */
    uint32_t world;
    bool equal;                      /* shares as numpy.array_split; else by weight: */
    uint64_t before[PYCCL_WORLD_MAX + 1]; /* sum of the weights of all lower ranks */
    uint32_t ring[PYCCL_WORLD_MAX];  /* ranks in the order of the ring */
    uint32_t place[PYCCL_WORLD_MAX]; /* of a rank in `ring` */
    uint64_t ring_from_bytes;
    uint32_t piece_bytes;
    uint32_t ring_pace;
} epoch_plan;

/* plan NULL: shares are equal, the ring is in rank order, nothing chooses it. ERR_ARGUMENT: shares are all zero, ring is no
 * permutation of the ranks, no plan may have such pieces, or ring_pace is no less than PYCCL_PACE_DIRECT. */
pyccl_status epoch_plan_init(epoch_plan *out, const pyccl_plan *plan, uint32_t world);

typedef struct schedule {
    uint8_t kind;                    /* pyccl_kind */
    uint32_t world, rank;            /* rank: ours */
    uint32_t root;                   /* broadcast: rank of the source; exchange: of the partner */
    bool swap, ring;
    uint8_t codec;                   /* pyccl_codec of pieces on the wire */
    uint32_t block;                  /* elements of a codec block, which no share or piece divides; 1 without a codec */
    uint32_t element_bytes;
    uint32_t partial_bytes;          /* ring: of an element of a sum that is not finished */
    uint64_t piece_elements;         /* of a piece that is not the last of its share: whole blocks */
    uint64_t count;                  /* elements of one input */
    uint64_t row;                    /* reduce_scatter: elements that stay together */
    const epoch_plan *plan;
} schedule;

/* The spec must have been checked: a known kind and dtype, count at most 2^48; root < world for a broadcast and an
 * exchange, there not rank. plan: of `world` members, it must outlive the schedule. */
void schedule_init(schedule *s, const pyccl_spec *spec, const epoch_plan *plan, uint32_t rank, uint32_t root);
uint8_t schedule_algorithm(const schedule *s);                            /* pyccl_algorithm that runs */

uint64_t schedule_input_bytes(const schedule *s);
uint64_t schedule_kept_bytes(const schedule *s);                          /* of the result that we keep: exchange, reduce_scatter: a part */
uint64_t schedule_share_start(const schedule *s, uint32_t owner);         /* its first element in the result */
uint64_t schedule_share_elements(const schedule *s, uint32_t owner);
uint64_t schedule_pieces(const schedule *s, uint32_t owner);              /* pieces of the owner's share */
uint64_t schedule_input_pieces(const schedule *s);                        /* pieces of all shares; swap: of the one vector */
uint64_t schedule_kept_pieces(const schedule *s);                         /* that must be whole here in the end */
uint64_t schedule_due_pieces(const schedule *s);                          /* these, and sums that go on without coming back whole */
uint64_t schedule_piece_start(const schedule *s, uint32_t owner, uint64_t piece); /* first element in the result */
uint64_t schedule_piece_elements(const schedule *s, uint32_t owner, uint64_t piece);
uint32_t schedule_piece_bytes_max(const schedule *s);                     /* of a piece as it is, or encoded; 0: there is none */
uint32_t schedule_partial_bytes(const schedule *s, uint32_t owner, uint64_t piece); /* of an unfinished sum of the piece */

uint64_t schedule_items(const schedule *s, uint32_t phase, uint32_t from, uint32_t to); /* 0: nothing goes there */
/* The piece behind an item below schedule_items. */
void schedule_item(const schedule *s, uint32_t phase, uint32_t from, uint32_t to, uint64_t item, uint32_t *owner, uint64_t *piece);
uint64_t schedule_item_offset(const schedule *s, uint32_t phase, uint32_t from, uint32_t to, uint64_t item);
uint32_t schedule_item_bytes(const schedule *s, uint32_t phase, uint32_t from, uint32_t to, uint64_t item); /* on the wire */
/* The item a frame carries: false when it is none that `from` sends to `to`, or its length is another. */
bool schedule_item_find(const schedule *s, uint32_t phase, uint32_t from, uint32_t to, uint64_t offset, uint64_t length, uint64_t *item);

bool schedule_contributes(const schedule *s, uint32_t from, uint32_t owner); /* direct: sends phase 0 of owner's share to it */
bool schedule_receives(const schedule *s, uint32_t owner, uint32_t to);      /* direct: gets phase 1 of owner's share */
uint32_t schedule_contributors(const schedule *s, uint32_t owner);           /* direct: how many send phase 0 to owner */
bool schedule_folds(const schedule *s);                                      /* phase 0 is folded, not only copied */
/* The piece is whole at `at` without anything from the network once the operation has started. */
bool schedule_is_local(const schedule *s, uint32_t owner, uint32_t at);

/* Ring. */
uint32_t schedule_next(const schedule *s, uint32_t rank);
uint32_t schedule_previous(const schedule *s, uint32_t rank);
uint32_t schedule_step(const schedule *s, uint32_t owner, uint32_t rank);    /* inputs folded before that of rank: 0..world-1 */

#endif
