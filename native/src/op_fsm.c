/* op_fsm.c: what becomes of an operation. Pure: events and time in, actions out; no socket, clock, thread or tensor byte.
 *
 * It does not know how data moves (schedule.c) nor who decides about members (the master): it is told "the whole
 * result is held" and "this is the next epoch, with these verdicts".
 *
 *   (none) --peer's OPEN, DONE, ABORT--> EARLY ---submit--> RUNNING --result and every OPEN--> PREPARED --every DONE--> COMMITTED
 *                                                              |                                |  \--verdict, ANSWER--> COMMITTED
 *                                                              +-- deadline, cancel, stall,     +-- ABORT, ANSWER, hashes differ
 *                                                              |   ABORT, verdict               |
 *                                                              +------------> FAILED <----------+   (a tombstone)
 *
 * Invariants (design: atomic outcome, fencing; the exhaustive models found each of these the hard way)
 *  - DONE is sent once PREPARED and never before; after DONE nothing local ends an operation but leaving the run.
 *  - While frozen (a report went to the master) nothing from a peer changes an outcome and no DONE leaves.
 *  - Verdicts and epoch are applied in one step, fsm_epoch.
 *  - A FAILED operation stays as tombstone until numbers restart and answers a retry of its number with ABORT.
 *  - A COMMITTED one stays until every member is known to have settled it (watermarks in OPEN and SETTLED).
 *  - A number is consumed by every submit, failed ones too: members count alike or not at all.
 *  - An exchange concerns its pair and nobody else: "every" above is the two, and its numbers are those of the pair and
 *    the tag. Frames between two members on SPACE_PAIR mean that pair; the control plane names it by the two ranks.
 *
 * Threads: none; the caller serialises.          Spec: proto/wire.md 5 */
#include "pyccl.h"

#include <stdlib.h>
#include <string.h>

#include "map.h"
#include "status.h"

enum { WORDS = PYCCL_WORLD_MAX / 64 };

typedef struct rank_set {
    uint64_t word[WORDS];
} rank_set;

typedef enum op_state { EARLY, RUNNING, PREPARED, COMMITTED, FAILED } op_state;

typedef struct fsm_tag fsm_tag;

typedef struct fsm_op {
    struct fsm_op *tag_prev, *tag_next;    /* operations of the tag, by number                      */
    struct fsm_op *live_prev, *live_next;  /* RUNNING and PREPARED ones in the order of submits     */
    fsm_tag *tag;
    uint64_t seq, cookie;                  /* cookie 0: not ours to report on (EARLY, records)      */
    op_state state;
    pyccl_spec spec;                       /* ours; EARLY: the first one a peer opened it with      */
    pyccl_spec other;                      /* EARLY: a second, different one                        */
    uint32_t spec_rank, other_rank;
    double weight;                         /* ours                                                  */
    double *weights;                       /* (world) of each rank that opened it; behind hash      */
    uint32_t owner_rank;                   /* EARLY: whose share of PYCCL_EARLY_MAX it counts in    */
    uint32_t attempts;
    int64_t submitted_ns, deadline_ns, progress_ns, leave_ns;
    int32_t abort_status;                  /* EARLY: a peer already aborted it                      */
    uint8_t culprit[PYCCL_ID_SIZE];        /* FAILED, or EARLY and aborted: who gave it up; zero: not known */
    uint8_t have_spec, have_other, result, asked, told_differs;
    uint8_t refused;                       /* the guard refuses our own input                       */
    uint32_t complaint;                    /* of our DONE                                           */
    uint32_t accused;                      /* lowest rank + 1 whose contribution a DONE refuses, 0  */
    rank_set opened, done, settled;
    rank_set refusing;                     /* whose OPEN refuses its own input                      */
    rank_set complaining, suspects;        /* who complains in its DONE; whose shares are complained of */
    rank_set submitted;                    /* who has shown that it has given the number to a submit */
    uint64_t hash[];                       /* (world) result hash of each rank that sent DONE       */
} fsm_op;

struct fsm_tag {
    fsm_tag *next, *dirty_next;
    fsm_op *ops, *ops_last;
    pyccl_map by_seq;                      /* seq + 1 -> fsm_op                                     */
    uint64_t next_seq;                     /* submits so far                                        */
    uint64_t cut;                          /* while cutting: numbers below it run in this epoch     */
    uint64_t low;                          /* every number below it is settled here                 */
    uint64_t told;                         /* watermark that all members were told                  */
    uint32_t tag;
    uint32_t partner;                      /* SPACE_PAIR: rank of the other one; world: it is gone  */
    uint8_t partner_id[PYCCL_ID_SIZE];
    uint8_t space, dirty;
    struct lane *lane;                     /* submits that wait for its next numbers; NULL: none    */
    uint64_t settled_to[];                 /* (world) of ours, how far each rank has settled them   */
};

typedef struct deferred {                  /* submitted while frozen, above the cut or without room: no number yet */
    struct deferred *next;
    uint64_t order;                        /* of submits: the older ones go first                   */
    uint64_t cookie;
    pyccl_spec spec;
    double weight;
    uint8_t refused;
    int64_t submitted_ns, deadline_ns;
    int32_t status;                        /* not 0: given up, it only takes its number             */
} deferred;

typedef struct lane {                      /* those of one channel, in the order of their numbers: behind one that waits all do */
    struct lane *next;
    fsm_tag *tag;                          /* NULL: the partner is no member                        */
    deferred *first, **end;
    uint64_t count;
} lane;

struct pyccl_fsm {
    pyccl_fsm_options options;
    uint64_t epoch_number, epoch_tag;
    uint32_t world, rank;
    uint8_t members[PYCCL_WORLD_MAX][PYCCL_ID_SIZE];
    uint8_t entered, left, frozen, cutting;
    fsm_tag *tags, *dirty;
    pyccl_map tag_map, cookie_map;
    fsm_op *live_first, *live_last;
    size_t live_count, tag_count;
    lane *lanes, **lanes_end;              /* by the order of their first ones                      */
    pyccl_map deferred_map;                /* cookie -> deferred, not those given up                */
    size_t deferred_count;
    uint64_t orders;                       /* submits so far                                        */
    int64_t deferred_ns;                   /* before it no deadline of a deferred one passes        */
    uint8_t room;                          /* something that a lane may wait for has happened       */
    uint32_t early[PYCCL_WORLD_MAX];
    uint32_t ahead[PYCCL_WORLD_MAX];       /* numbers of ours that it is not known to have submitted: its `early` of us */
    int64_t tell_ns_at;                    /* 0: nothing to tell                                    */
    pyccl_action *queue;                   /* ring of actions not yet taken                         */
    size_t queue_cap, queue_head, queue_count;
};

/* ---- rank sets ---- */

static void set_add(rank_set *set, uint32_t rank) { set->word[rank / 64] |= UINT64_C(1) << (rank % 64); }
static int set_has(const rank_set *set, uint32_t rank) { return (int)(set->word[rank / 64] >> (rank % 64) & 1); }

/* ---- who takes part ---- */

/* The rank of a member; world: it is none. */
static uint32_t member_rank(const pyccl_fsm *fsm, const uint8_t id[PYCCL_ID_SIZE]) {
    uint32_t rank = 0;
    while (rank < fsm->world && memcmp(fsm->members[rank], id, PYCCL_ID_SIZE) != 0) rank++;
    return rank;
}

/* Of an exchange: the other one of the pair. */
static void partner_id_of(const pyccl_fsm *fsm, const pyccl_spec *spec, uint8_t id[PYCCL_ID_SIZE]) {
    for (int i = 0; i < PYCCL_ID_SIZE; i++) id[i] = spec->root[i] ^ fsm->members[fsm->rank][i];
}

/* Its rank; world: it is no member. Of a collective: 0. */
static uint32_t partner_of(const pyccl_fsm *fsm, const pyccl_spec *spec) {
    uint8_t id[PYCCL_ID_SIZE];
    if (spec->space != PYCCL_SPACE_PAIR) return 0;
    partner_id_of(fsm, spec, id);
    return member_rank(fsm, id);
}

static int takes_part(const pyccl_fsm *fsm, const fsm_tag *tag, uint32_t rank) {
    return tag->space != PYCCL_SPACE_PAIR || rank == tag->partner || rank == fsm->rank;
}

/* The first participant that is not in the set; world: all are. */
static uint32_t first_outside(const pyccl_fsm *fsm, const fsm_tag *tag, const rank_set *set) {
    uint32_t rank = 0;
    while (rank < fsm->world && (set_has(set, rank) || !takes_part(fsm, tag, rank))) rank++;
    return rank;
}

static int set_is_full(const pyccl_fsm *fsm, const fsm_tag *tag, const rank_set *set) {
    return first_outside(fsm, tag, set) == fsm->world;
}

/* ---- the action queue ---- */

static pyccl_action *act(pyccl_fsm *fsm, pyccl_action_type type) {
    if (fsm->queue_count == fsm->queue_cap) {
        size_t cap = fsm->queue_cap ? fsm->queue_cap * 2 : 64;
        pyccl_action *grown = malloc(cap * sizeof *grown);
        PYCCL_ASSERT(grown != NULL);
        for (size_t i = 0; i < fsm->queue_count; i++) grown[i] = fsm->queue[(fsm->queue_head + i) % fsm->queue_cap];
        free(fsm->queue);
        fsm->queue = grown;
        fsm->queue_cap = cap;
        fsm->queue_head = 0;
    }
    pyccl_action *action = &fsm->queue[(fsm->queue_head + fsm->queue_count++) % fsm->queue_cap];
    memset(action, 0, sizeof *action);
    action->type = type;
    return action;
}

int pyccl_fsm_next(pyccl_fsm *fsm, pyccl_action *out) {
    if (fsm->queue_count == 0) return 0;
    *out = fsm->queue[fsm->queue_head];
    fsm->queue_head = (fsm->queue_head + 1) % fsm->queue_cap;
    fsm->queue_count--;
    return 1;
}

static void send_one(pyccl_fsm *fsm, const fsm_tag *tag, uint64_t seq, pyccl_frame_type type, uint32_t to, uint64_t value,
                     const fsm_op *opened) {
    pyccl_message *message = &act(fsm, PYCCL_ACT_SEND)->message;
    message->type = (uint8_t)type;
    message->rank = to;
    message->space = tag->space;
    message->tag = tag->tag;
    message->seq = seq;
    message->value = value;
    if (opened == NULL) return;
    message->spec = opened->spec;
    message->weight = opened->weight;
    message->complaint = opened->refused;
}

static void send_done(pyccl_fsm *fsm, const fsm_op *op, uint32_t to) {
    send_one(fsm, op->tag, op->seq, PYCCL_FRAME_DONE, to, op->hash[fsm->rank], NULL);
    fsm->queue[(fsm->queue_head + fsm->queue_count - 1) % fsm->queue_cap].message.complaint = op->complaint;
}

static void send_all(pyccl_fsm *fsm, const fsm_tag *tag, uint64_t seq, pyccl_frame_type type, uint64_t value,
                     const fsm_op *opened) {
    for (uint32_t rank = 0; rank < fsm->world; rank++)
        if (rank != fsm->rank && takes_part(fsm, tag, rank)) send_one(fsm, tag, seq, type, rank, value, opened);
}

/* ---- tags ---- */

uint64_t pyccl_channel(uint8_t space, uint32_t tag, uint32_t rank, uint32_t other) {
    if (space != PYCCL_SPACE_PAIR) return tag;
    PYCCL_ASSERT(rank != other && rank < PYCCL_WORLD_MAX && other < PYCCL_WORLD_MAX);
    const uint64_t low = rank < other ? rank : other, high = rank < other ? other : rank;
    return tag | low << 32 | high << 40;
}

static uint64_t channel_of(const pyccl_fsm *fsm, const fsm_tag *tag) {
    return pyccl_channel(tag->space, tag->tag, fsm->rank, tag->partner);
}

static uint64_t channel_key(uint8_t space, uint64_t channel) { return ((uint64_t)space << 48 | channel) + 1; }

/* partner: of a pair; a collective has none. */
static fsm_tag *tag_find(const pyccl_fsm *fsm, uint8_t space, uint32_t tag, uint32_t partner) {
    return pyccl_map_get(&fsm->tag_map, channel_key(space, pyccl_channel(space, tag, fsm->rank, partner)));
}

static fsm_tag *tag_get(pyccl_fsm *fsm, uint8_t space, uint32_t tag, uint32_t partner) {
    fsm_tag *found = tag_find(fsm, space, tag, partner);
    if (found != NULL) return found;
    found = calloc(1, sizeof *found + fsm->world * sizeof found->settled_to[0]);
    PYCCL_ASSERT(found != NULL);
    found->space = space;
    found->tag = tag;
    if (space == PYCCL_SPACE_PAIR) {
        found->partner = partner;
        memcpy(found->partner_id, fsm->members[partner], PYCCL_ID_SIZE);
    }
    found->next = fsm->tags;
    fsm->tags = found;
    fsm->tag_count++;
    pyccl_map_put(&fsm->tag_map, channel_key(space, channel_of(fsm, found)), found);
    return found;
}

/* As the control plane names it. NULL: a pair that we are not of. */
static fsm_tag *tag_of_channel(pyccl_fsm *fsm, uint8_t space, uint64_t channel) {
    const uint32_t low = channel >> 32 & 0xFF, high = channel >> 40 & 0xFF;
    if (space != PYCCL_SPACE_PAIR) return tag_get(fsm, space, (uint32_t)channel, 0);
    if (low >= high || high >= fsm->world || (low != fsm->rank && high != fsm->rank)) return NULL;
    return tag_get(fsm, space, (uint32_t)channel, low == fsm->rank ? high : low);
}

static void tag_mark_dirty(pyccl_fsm *fsm, fsm_tag *tag, int64_t now_ns) {
    if (!tag->dirty) {
        tag->dirty = 1;
        tag->dirty_next = fsm->dirty;
        fsm->dirty = tag;
    }
    if (fsm->tell_ns_at == 0) fsm->tell_ns_at = now_ns + fsm->options.tell_ns;
}

/* ---- operations ---- */

static fsm_op *op_find(const fsm_tag *tag, uint64_t seq) {
    return tag != NULL && seq < UINT64_MAX ? pyccl_map_get(&tag->by_seq, seq + 1) : NULL;
}

/* A new one is nearly always the last: only what peers have opened already has higher numbers. */
static void op_link(fsm_tag *tag, fsm_op *op) {
    fsm_op *before = tag->ops_last;
    while (before != NULL && before->seq > op->seq) before = before->tag_prev;
    op->tag_prev = before;
    op->tag_next = before != NULL ? before->tag_next : tag->ops;
    *(before != NULL ? &before->tag_next : &tag->ops) = op;
    *(op->tag_next != NULL ? &op->tag_next->tag_prev : &tag->ops_last) = op;
    pyccl_map_put(&tag->by_seq, op->seq + 1, op);
}

static void op_unlink(fsm_op *op) {
    fsm_tag *tag = op->tag;
    *(op->tag_prev != NULL ? &op->tag_prev->tag_next : &tag->ops) = op->tag_next;
    *(op->tag_next != NULL ? &op->tag_next->tag_prev : &tag->ops_last) = op->tag_prev;
    pyccl_map_remove(&tag->by_seq, op->seq + 1);
}

static fsm_op *op_new(pyccl_fsm *fsm, fsm_tag *tag, uint64_t seq, op_state state) {
    fsm_op *op = calloc(1, sizeof *op + fsm->world * (sizeof op->hash[0] + sizeof op->weights[0]));
    PYCCL_ASSERT(op != NULL);
    op->weights = (double *)(void *)(op->hash + fsm->world);
    op->tag = tag;
    op->seq = seq;
    op->state = state;
    op_link(tag, op);
    return op;
}

/* Every number below it is settled here, and stays so: what has ended never runs again under its number. */
static uint64_t tag_watermark(fsm_tag *tag) {
    for (; tag->low < tag->next_seq; tag->low++) {
        const fsm_op *op = op_find(tag, tag->low);
        if (op != NULL && (op->state == RUNNING || op->state == PREPARED)) break;
    }
    return tag->low;
}

/* ---- how far ahead of others we are ---- */

static int awaits_submit_of(const pyccl_fsm *fsm, const fsm_op *op, uint32_t rank) {
    return op->state != EARLY && rank != fsm->rank && takes_part(fsm, op->tag, rank) && !set_has(&op->submitted, rank);
}

static void ahead_add(pyccl_fsm *fsm, const fsm_op *op) {
    for (uint32_t rank = 0; rank < fsm->world; rank++) fsm->ahead[rank] += awaits_submit_of(fsm, op, rank);
}

static void ahead_remove(pyccl_fsm *fsm, const fsm_op *op) {
    for (uint32_t rank = 0; rank < fsm->world; rank++) fsm->ahead[rank] -= awaits_submit_of(fsm, op, rank);
}

static void op_submitted_by(pyccl_fsm *fsm, fsm_op *op, uint32_t rank) {
    if (set_has(&op->submitted, rank)) return;
    if (awaits_submit_of(fsm, op, rank)) fsm->ahead[rank]--;
    set_add(&op->submitted, rank);
    fsm->room = 1;
}

/* A participant that has submitted the next number of the tag has to keep nothing of us for it; any other one must not be
 * full. What another member has called first may run beside open_max of ours: members that each ran ahead in channels of
 * their own come together again. */
static int has_room(const pyccl_fsm *fsm, const fsm_tag *tag, int given_up) {
    const int open = given_up || fsm->live_count < fsm->options.open_max;
    int full = 0;
    for (uint32_t rank = 0; rank < fsm->world && !full; rank++)
        full = rank != fsm->rank && takes_part(fsm, tag, rank) && fsm->ahead[rank] >= fsm->options.early_max;
    if (open && !full) return 1;
    const fsm_op *early = op_find(tag, tag->next_seq);
    if (early == NULL) return 0;
    for (uint32_t rank = 0; rank < fsm->world; rank++) {
        if (rank == fsm->rank || !takes_part(fsm, tag, rank) || set_has(&early->submitted, rank)) continue;
        if (fsm->ahead[rank] >= fsm->options.early_max) return 0;
    }
    return 1;
}

static void op_drop(pyccl_fsm *fsm, fsm_op *op) {
    ahead_remove(fsm, op);
    fsm->room = 1;
    op_unlink(op);
    if (op->state == EARLY) fsm->early[op->owner_rank]--;
    free(op);
}

static void live_add(pyccl_fsm *fsm, fsm_op *op) {
    op->live_prev = fsm->live_last;
    op->live_next = NULL;
    if (fsm->live_last != NULL) fsm->live_last->live_next = op;
    else fsm->live_first = op;
    fsm->live_last = op;
    fsm->live_count++;
    pyccl_map_put(&fsm->cookie_map, op->cookie, op);
}

static void live_remove(pyccl_fsm *fsm, fsm_op *op) {
    if (op->live_prev != NULL) op->live_prev->live_next = op->live_next;
    else fsm->live_first = op->live_next;
    if (op->live_next != NULL) op->live_next->live_prev = op->live_prev;
    else fsm->live_last = op->live_prev;
    fsm->live_count--;
    fsm->room = 1;
    pyccl_map_remove(&fsm->cookie_map, op->cookie);
}

static void peer_name(const pyccl_fsm *fsm, uint32_t rank, uint8_t out[PYCCL_ID_SIZE]) {
    if (rank < fsm->world) memcpy(out, fsm->members[rank], PYCCL_ID_SIZE);
}

/* The operation is over for the caller; what stays is a record for the others. culprit: rank, or world for none. */
static void op_commit(pyccl_fsm *fsm, fsm_op *op, int64_t now_ns) {
    pyccl_action *action = act(fsm, PYCCL_ACT_COMMIT);
    action->cookie = op->cookie;
    action->attempts = op->attempts;
    action->seq = op->seq;
    live_remove(fsm, op);
    op->state = COMMITTED;
    op->cookie = 0;
    set_add(&op->settled, fsm->rank);
    tag_mark_dirty(fsm, op->tag, now_ns);
    if (set_is_full(fsm, op->tag, &op->settled)) op_drop(fsm, op);
}

static void fail_action(pyccl_fsm *fsm, uint64_t cookie, uint64_t seq, int32_t status, uint32_t attempts, const uint8_t *peer) {
    pyccl_action *action = act(fsm, PYCCL_ACT_FAIL);
    action->cookie = cookie;
    action->seq = seq;
    action->status = status;
    action->attempts = attempts;
    if (peer != NULL) memcpy(action->peer, peer, PYCCL_ID_SIZE);
}

static void name_culprit(fsm_op *op, const uint8_t *peer) {
    if (peer != NULL) memcpy(op->culprit, peer, PYCCL_ID_SIZE);
    else memset(op->culprit, 0, PYCCL_ID_SIZE);
}

static void op_fail(pyccl_fsm *fsm, fsm_op *op, int32_t status, const uint8_t *peer, int64_t now_ns) {
    fail_action(fsm, op->cookie, op->seq, status, op->attempts, peer);
    live_remove(fsm, op);
    op->state = FAILED;
    op->cookie = 0;
    op->abort_status = status;
    name_culprit(op, peer);
    set_add(&op->settled, fsm->rank);
    tag_mark_dirty(fsm, op->tag, now_ns);
}

/* What ABORT and ANSWER say of it. */
static uint64_t failure_value(const pyccl_fsm *fsm, const fsm_op *op) {
    const uint32_t rank = member_rank(fsm, op->culprit);
    const uint64_t named = rank == fsm->rank ? 0 : rank < fsm->world ? rank + UINT64_C(1) : PYCCL_CULPRIT_NOBODY;
    return (uint64_t)-op->abort_status | named << 8;
}

/* A failure of our own before DONE: allowed also while frozen, but then the tombstone tells the others later. */
static void op_fail_alone(pyccl_fsm *fsm, fsm_op *op, int32_t status, int64_t now_ns) {
    PYCCL_ASSERT(op->state == RUNNING);
    if (!fsm->frozen) send_all(fsm, op->tag, op->seq, PYCCL_FRAME_ABORT, (uint64_t)-status, NULL);
    op_fail(fsm, op, status, NULL, now_ns);
    name_culprit(op, fsm->members[fsm->rank]);
}

/* The hash most participants hold (the lowest of equals) is taken as right; returns the first rank that differs from it,
 * or world when all are equal. Each of them computes this from the same hashes, so all name the same peer. */
static uint32_t first_that_differs(const pyccl_fsm *fsm, const fsm_op *op) {
    uint64_t best = 0;
    uint32_t best_votes = 0;
    for (uint32_t i = 0; i < fsm->world; i++) {
        uint32_t votes = 0;
        if (!takes_part(fsm, op->tag, i)) continue;
        for (uint32_t j = 0; j < fsm->world; j++) votes += takes_part(fsm, op->tag, j) && op->hash[j] == op->hash[i];
        if (votes > best_votes || (votes == best_votes && op->hash[i] < best)) {
            best = op->hash[i];
            best_votes = votes;
        }
        if (votes == fsm->world) return fsm->world;
    }
    for (uint32_t i = 0; i < fsm->world; i++)
        if (takes_part(fsm, op->tag, i) && op->hash[i] != best) return i;
    return fsm->world;
}

/* ---- guards: wire.md 3.8 ---- */

static int set_is_empty(const rank_set *set) {
    for (int i = 0; i < WORDS; i++)
        if (set->word[i] != 0) return 0;
    return 1;
}

static void op_complained(fsm_op *op, uint32_t rank, uint32_t complaint) {
    const uint32_t accused = complaint % PYCCL_COMPLAINT_RESULT, suspect = complaint / PYCCL_COMPLAINT_RESULT;
    if (complaint == 0) return;
    set_add(&op->complaining, rank);
    if (accused > 0 && accused < PYCCL_CULPRIT_NOBODY && (op->accused == 0 || accused < op->accused)) op->accused = accused;
    if (suspect > 0) set_add(&op->suspects, suspect - 1);
}

/* The same on all who have every DONE: who contributed what was refused, else whose share came out wrong though it does not
 * say so itself; NULL: finite contributions made something that is not. */
static const uint8_t *poisoner(const pyccl_fsm *fsm, const fsm_op *op) {
    if (op->accused > 0) return fsm->members[op->accused - 1];
    for (uint32_t rank = 0; rank < fsm->world; rank++)
        if (set_has(&op->suspects, rank) && !set_has(&op->complaining, rank)) return fsm->members[rank];
    return NULL;
}

/* Steps that need no further event: prepare, then commit. Where somebody refuses its own input nobody ever prepares. */
static void op_advance(pyccl_fsm *fsm, fsm_op *op, int64_t now_ns) {
    if (fsm->frozen) return;
    if (op->state == RUNNING && set_is_full(fsm, op->tag, &op->opened) && !set_is_empty(&op->refusing)) {
        uint32_t rank = 0;
        while (!set_has(&op->refusing, rank)) rank++;
        op_fail(fsm, op, PYCCL_ERR_POISON, fsm->members[rank], now_ns);
        return;
    }
    if (op->state == RUNNING && op->result && set_is_full(fsm, op->tag, &op->opened)) {
        op->state = PREPARED;
        set_add(&op->done, fsm->rank);
        op_complained(op, fsm->rank, op->complaint);
        for (uint32_t rank = 0; rank < fsm->world; rank++)
            if (rank != fsm->rank && takes_part(fsm, op->tag, rank)) send_done(fsm, op, rank);
    }
    if (op->state == PREPARED && set_is_full(fsm, op->tag, &op->done)) {
        uint32_t liar = first_that_differs(fsm, op);
        if (!set_is_empty(&op->complaining)) op_fail(fsm, op, PYCCL_ERR_POISON, poisoner(fsm, op), now_ns);
        else if (liar < fsm->world) op_fail(fsm, op, PYCCL_ERR_RESULT_DIFFERS, fsm->members[liar], now_ns);
        else op_commit(fsm, op, now_ns);
    }
}

static void tell_differs(pyccl_fsm *fsm, fsm_op *op, uint32_t rank, const pyccl_spec *theirs) {
    if (op->told_differs) return;
    op->told_differs = 1;
    pyccl_action *action = act(fsm, PYCCL_ACT_DIFFERS);
    action->cookie = op->cookie;
    action->rank = rank;
    action->seq = op->seq;
    peer_name(fsm, rank, action->peer);
    action->message.type = PYCCL_FRAME_OPEN;
    action->message.rank = rank;
    action->message.space = op->tag->space;
    action->message.tag = op->tag->tag;
    action->message.seq = op->seq;
    action->message.spec = *theirs;
}

static int spec_equal(const pyccl_spec *a, const pyccl_spec *b) {
    uint8_t x[PYCCL_SPEC_SIZE], y[PYCCL_SPEC_SIZE];
    pyccl_spec_encode(a, x);
    pyccl_spec_encode(b, y);
    return memcmp(x, y, sizeof x) == 0;
}

static int lacks_root(const pyccl_fsm *fsm, const pyccl_spec *spec) {
    return spec->kind == PYCCL_BROADCAST && member_rank(fsm, spec->root) == fsm->world;
}

static void tell_peer_open(pyccl_fsm *fsm, const fsm_op *op, uint32_t rank) {
    pyccl_action *action = act(fsm, PYCCL_ACT_PEER_OPEN);
    action->cookie = op->cookie;
    action->rank = rank;
    action->message.weight = op->weights[rank];
}

/* Begin an attempt in the current epoch: tell everybody, move data. */
static void op_begin(pyccl_fsm *fsm, fsm_op *op, int64_t now_ns) {
    uint64_t watermark = tag_watermark(op->tag);
    set_add(&op->opened, fsm->rank);
    if (op->refused) set_add(&op->refusing, fsm->rank);
    op->attempts++;
    op->progress_ns = now_ns;
    send_all(fsm, op->tag, op->seq, PYCCL_FRAME_OPEN, watermark, op);
    if (watermark > op->tag->told) op->tag->told = watermark;
    pyccl_action *action = act(fsm, PYCCL_ACT_START);
    action->cookie = op->cookie;
    action->seq = op->seq;
}

/* Take the next number of the tag for a submit and start it, unless something known already ends it. */
static void op_admit(pyccl_fsm *fsm, fsm_tag *tag, const deferred *from, int64_t now_ns) {
    uint64_t seq = tag->next_seq++;
    fsm_op *op = op_find(tag, seq);
    fsm_op early;
    memset(&early, 0, sizeof early);
    if (op == NULL) op = op_new(fsm, tag, seq, RUNNING);
    else {
        PYCCL_ASSERT(op->state == EARLY);
        early = *op;
        fsm->early[op->owner_rank]--;
        op->state = RUNNING;
    }
    ahead_add(fsm, op);
    op->spec = from->spec;
    op->weight = from->weight;
    op->refused = from->refused;
    op->cookie = from->cookie;
    op->submitted_ns = from->submitted_ns;
    op->deadline_ns = from->deadline_ns;
    memset(&op->opened, 0, sizeof op->opened);
    if (from->status != 0) {  /* given up while it waited: the number is taken, the others learn it */
        op->state = FAILED;
        op->cookie = 0;
        op->abort_status = from->status;
        name_culprit(op, fsm->members[fsm->rank]);
        set_add(&op->settled, fsm->rank);
        send_all(fsm, tag, seq, PYCCL_FRAME_ABORT, (uint64_t)-from->status, NULL);
        tag_mark_dirty(fsm, tag, now_ns);
        return;
    }
    live_add(fsm, op);
    if (!op->spec.guard) { /* what was said of one that nobody has called */
        memset(&op->refusing, 0, sizeof op->refusing);
        memset(&op->complaining, 0, sizeof op->complaining);
    }
    if (early.abort_status != 0) {
        static const uint8_t nobody[PYCCL_ID_SIZE];
        op_fail(fsm, op, early.abort_status, memcmp(early.culprit, nobody, sizeof nobody) != 0 ? early.culprit : NULL, now_ns);
        return;
    }
    if (lacks_root(fsm, &op->spec)) {
        op_fail(fsm, op, PYCCL_ERR_PEER_LOST, op->spec.root, now_ns);
        return;
    }
    op_begin(fsm, op, now_ns);
    if (early.have_spec) {
        const pyccl_spec *theirs = NULL;
        uint32_t rank = early.spec_rank;
        if (!spec_equal(&early.spec, &op->spec)) theirs = &early.spec;
        else if (early.have_other) { theirs = &early.other; rank = early.other_rank; }
        if (theirs != NULL) {
            tell_differs(fsm, op, rank, theirs);
            return;  /* the flush will end it: no OPEN is taken as agreement */
        }
        for (uint32_t r = 0; r < fsm->world; r++)
            if (set_has(&early.opened, r)) {
                set_add(&op->opened, r);
                tell_peer_open(fsm, op, r);
            }
        op_advance(fsm, op, now_ns);
    }
}

static int admissible(const pyccl_fsm *fsm, const fsm_tag *tag) {
    return !fsm->frozen && (!fsm->cutting || (tag != NULL && tag->next_seq < tag->cut));
}

/* There is nobody to run it with: it fails without a number, which nobody else could count. */
static int fails_for_want_of_peers(pyccl_fsm *fsm, uint64_t cookie, const pyccl_spec *spec) {
    uint8_t id[PYCCL_ID_SIZE];
    if (partner_of(fsm, spec) == fsm->world) {
        partner_id_of(fsm, spec, id);
        fail_action(fsm, cookie, 0, PYCCL_ERR_PEER_LOST, 0, id);
        return 1;
    }
    if (fsm->world > 1) return 0;
    fail_action(fsm, cookie, 0, PYCCL_ERR_ALONE, 0, NULL);
    return 1;
}

/* ---- submits that wait ---- */

/* Its submit takes a number now; NULL: the partner is no member, so there is none to take. */
static void admit(pyccl_fsm *fsm, fsm_tag *tag, const deferred *item, int64_t now_ns) {
    const int fails = item->status == 0 && fails_for_want_of_peers(fsm, item->cookie, &item->spec);
    if (!fails && tag != NULL) op_admit(fsm, tag, item, now_ns);
}

/* Behind all lanes whose first one is older. at: where to look from. */
static void lane_insert(pyccl_fsm *fsm, lane **at, lane *l) {
    while (*at != NULL && (*at)->first->order < l->first->order) at = &(*at)->next;
    l->next = *at;
    *at = l;
    if (l->next == NULL) fsm->lanes_end = &l->next;
}

static deferred *lane_pop(pyccl_fsm *fsm, lane **at) {
    lane *l = *at;
    deferred *item = l->first;
    *at = l->next;
    if (l->next == NULL) fsm->lanes_end = at;
    l->first = item->next;
    l->count--;
    fsm->deferred_count--;
    if (item->status == 0) pyccl_map_remove(&fsm->deferred_map, item->cookie);
    if (l->first != NULL) lane_insert(fsm, at, l);
    else {
        if (l->tag != NULL) l->tag->lane = NULL;
        free(l);
    }
    return item;
}

/* Submits that waited and may run now: the oldest first, in each lane one behind the other. */
static void admit_deferred(pyccl_fsm *fsm, int64_t now_ns) {
    do {
        fsm->room = 0;
        for (lane **at = &fsm->lanes; *at != NULL;) {
            fsm_tag *tag = (*at)->tag;
            if (!admissible(fsm, tag) || (tag != NULL && !has_room(fsm, tag, (*at)->first->status != 0))) {
                at = &(*at)->next;
                continue;
            }
            deferred *item = lane_pop(fsm, at);
            admit(fsm, tag, item, now_ns);
            free(item);
        }
    } while (fsm->room && fsm->lanes != NULL);
}

static void admit_if_room(pyccl_fsm *fsm, int64_t now_ns) {
    if (fsm->room && fsm->lanes != NULL && !fsm->frozen) admit_deferred(fsm, now_ns);
}

/* Of a pair without a partner there is no tag. */
static lane *lane_without_tag(const pyccl_fsm *fsm, const pyccl_spec *spec) {
    lane *l = fsm->lanes;
    while (l != NULL && (l->tag != NULL || l->first->spec.tag != spec->tag || memcmp(l->first->spec.root, spec->root, sizeof spec->root) != 0))
        l = l->next;
    return l;
}

/* tag: of its channel; NULL: the partner is no member. */
static pyccl_status defer(pyccl_fsm *fsm, fsm_tag *tag, const deferred *from) {
    lane *l = tag != NULL ? tag->lane : lane_without_tag(fsm, &from->spec);
    deferred *item = malloc(sizeof *item);
    if (item != NULL && l == NULL) {
        l = calloc(1, sizeof *l);
        if (l != NULL) l->end = &l->first;
    }
    if (item == NULL || l == NULL) {
        free(item);
        return PYCCL_ERR_NOMEM;
    }
    if (fsm->lanes == NULL) fsm->room = 0;  /* whatever has happened is in the judgement that it waits */
    *item = *from;
    item->next = NULL;
    item->order = ++fsm->orders;
    *l->end = item;
    l->end = &item->next;
    if (l->count++ == 0) {
        l->tag = tag;
        if (tag != NULL) tag->lane = l;
        lane_insert(fsm, fsm->lanes_end, l);
    }
    fsm->deferred_count++;
    if (item->status == 0) pyccl_map_put(&fsm->deferred_map, item->cookie, item);
    if (item->status == 0 && item->deadline_ns < fsm->deferred_ns) fsm->deferred_ns = item->deadline_ns;
    return PYCCL_OK;
}

static void deferred_give_up(pyccl_fsm *fsm, deferred *item, int32_t status) {
    fail_action(fsm, item->cookie, 0, status, 0, NULL);
    pyccl_map_remove(&fsm->deferred_map, item->cookie);
    item->cookie = 0;
    item->status = status;
}

/* Tags were freed and ranks have moved. */
static void lanes_follow(pyccl_fsm *fsm) {
    for (lane *l = fsm->lanes; l != NULL; l = l->next) {
        const pyccl_spec *spec = &l->first->spec;
        const uint32_t partner = partner_of(fsm, spec);
        l->tag = partner < fsm->world ? tag_get(fsm, spec->space, spec->tag, partner) : NULL;
        if (l->tag != NULL) l->tag->lane = l;
    }
}

/* ---- life ---- */

pyccl_status pyccl_fsm_new(const pyccl_fsm_options *options, pyccl_fsm **out) {
    *out = NULL;
    if (options->settle_ns < 0 || options->stall_ns < 0 || options->tell_ns < 0) return PYCCL_ERR_ARGUMENT;
    pyccl_fsm *fsm = calloc(1, sizeof *fsm);
    if (fsm == NULL) return PYCCL_ERR_NOMEM;
    fsm->options = *options;
    if (fsm->options.open_max == 0) fsm->options.open_max = PYCCL_OPS_OPEN_MAX;
    if (fsm->options.early_max == 0) fsm->options.early_max = PYCCL_EARLY_MAX;
    fsm->lanes_end = &fsm->lanes;
    fsm->deferred_ns = INT64_MAX;
    *out = fsm;
    return PYCCL_OK;
}

static void tag_free(pyccl_fsm *fsm, fsm_tag *tag) {
    while (tag->ops != NULL) op_drop(fsm, tag->ops);
    pyccl_map_fini(&tag->by_seq);
    free(tag);
}

static void free_tags(pyccl_fsm *fsm) {
    while (fsm->tags != NULL) {
        fsm_tag *tag = fsm->tags;
        fsm->tags = tag->next;
        tag_free(fsm, tag);
    }
    fsm->dirty = NULL;
    fsm->tell_ns_at = 0;
    fsm->tag_count = 0;
    pyccl_map_clear(&fsm->tag_map);
}

/* why: what the callers are told; 0: they have been told. Tags that lanes belong to are freed with them. */
static void free_deferred(pyccl_fsm *fsm, int32_t why) {
    while (fsm->lanes != NULL) {
        lane *l = fsm->lanes;
        fsm->lanes = l->next;
        while (l->first != NULL) {
            deferred *item = l->first;
            l->first = item->next;
            if (why != 0 && item->status == 0) fail_action(fsm, item->cookie, 0, why, 0, NULL);
            free(item);
        }
        free(l);
    }
    fsm->lanes_end = &fsm->lanes;
    fsm->deferred_count = 0;
    fsm->deferred_ns = INT64_MAX;
    pyccl_map_clear(&fsm->deferred_map);
}

void pyccl_fsm_free(pyccl_fsm *fsm) {
    if (fsm == NULL) return;
    free_tags(fsm);
    free_deferred(fsm, 0);
    pyccl_map_fini(&fsm->tag_map);
    pyccl_map_fini(&fsm->cookie_map);
    pyccl_map_fini(&fsm->deferred_map);
    free(fsm->queue);
    free(fsm);
}

void pyccl_fsm_end(pyccl_fsm *fsm, pyccl_status why) {
    while (fsm->live_first != NULL) {
        fsm_op *op = fsm->live_first;
        /* What was prepared may have been committed by the others: nobody here can know. */
        int32_t status = op->state == PREPARED && fsm->world > 1 ? PYCCL_ERR_OUTCOME_UNKNOWN : (int32_t)why;
        fail_action(fsm, op->cookie, op->seq, status, op->attempts, NULL);
        live_remove(fsm, op);
    }
    free_deferred(fsm, (int32_t)why);
    free_tags(fsm);
    fsm->entered = 0;
    fsm->left = 0;
    fsm->frozen = fsm->cutting = 0;
    fsm->world = 0;
}

/* ---- the caller's events ---- */

pyccl_status pyccl_fsm_submit(pyccl_fsm *fsm, uint64_t cookie, const pyccl_spec *spec, int64_t deadline_ns, int64_t now_ns) {
    return pyccl_fsm_submit_weighted(fsm, cookie, spec, 1.0, 0, deadline_ns, now_ns);
}

pyccl_status pyccl_fsm_submit_weighted(pyccl_fsm *fsm, uint64_t cookie, const pyccl_spec *spec, double weight, int refused,
                                       int64_t deadline_ns, int64_t now_ns) {
    PYCCL_ASSERT(cookie != 0 && (!refused || spec->guard));
    if (!fsm->entered) return PYCCL_ERR_CLOSED;
    const uint32_t partner = partner_of(fsm, spec);
    fsm_tag *tag = partner < fsm->world ? tag_find(fsm, spec->space, spec->tag, partner) : NULL;
    if (tag == NULL && fsm->tag_count >= PYCCL_TAGS_MAX) return PYCCL_ERR_LIMIT;
    deferred item = {.cookie = cookie, .spec = *spec, .weight = weight, .refused = refused != 0,
                     .submitted_ns = now_ns, .deadline_ns = deadline_ns};
    if (!fsm->frozen && !fsm->cutting && fails_for_want_of_peers(fsm, cookie, spec))
        return PYCCL_OK;  /* frozen or cutting: a newcomer may be on its way, wait for it */
    if (tag == NULL && partner < fsm->world) tag = tag_get(fsm, spec->space, spec->tag, partner);
    if (tag == NULL || tag->lane != NULL || !admissible(fsm, tag) || !has_room(fsm, tag, 0)) return defer(fsm, tag, &item);
    op_admit(fsm, tag, &item, now_ns);
    admit_if_room(fsm, now_ns);
    return PYCCL_OK;
}

void pyccl_fsm_complain(pyccl_fsm *fsm, uint64_t cookie, uint32_t complaint) {
    fsm_op *op = pyccl_map_get(&fsm->cookie_map, cookie);
    if (op == NULL || op->state != RUNNING || fsm->frozen) return;
    PYCCL_ASSERT(op->spec.guard && !op->result);
    op->complaint = complaint;
}

void pyccl_fsm_result(pyccl_fsm *fsm, uint64_t cookie, uint64_t hash, int64_t now_ns) {
    fsm_op *op = pyccl_map_get(&fsm->cookie_map, cookie);
    if (op == NULL || op->state != RUNNING || fsm->frozen) return;  /* frozen: the attempt is over either way */
    op->result = 1;
    op->hash[fsm->rank] = hash;
    op->progress_ns = now_ns;
    op_advance(fsm, op, now_ns);
    admit_if_room(fsm, now_ns);
}

void pyccl_fsm_progress(pyccl_fsm *fsm, uint64_t cookie, int64_t now_ns) {
    fsm_op *op = pyccl_map_get(&fsm->cookie_map, cookie);
    if (op != NULL) op->progress_ns = now_ns;
}

void pyccl_fsm_cancel(pyccl_fsm *fsm, uint64_t cookie, pyccl_status why, int64_t now_ns) {
    PYCCL_ASSERT(why < 0);
    fsm_op *op = pyccl_map_get(&fsm->cookie_map, cookie);
    deferred *item = pyccl_map_get(&fsm->deferred_map, cookie);
    if (item != NULL) deferred_give_up(fsm, item, why);
    else if (op != NULL && op->state == RUNNING) op_fail_alone(fsm, op, why, now_ns);
    else if (op != NULL && op->deadline_ns > now_ns) op->deadline_ns = now_ns;  /* prepared: settle it; see tick */
    admit_if_room(fsm, now_ns);
}

static int concerns_any(const pyccl_fsm *fsm, const fsm_tag *tag, const uint8_t *ids, size_t count) {
    for (size_t i = 0; i < count; i++) {
        const uint32_t rank = member_rank(fsm, ids + i * PYCCL_ID_SIZE);
        if (rank < fsm->world && takes_part(fsm, tag, rank)) return 1;
    }
    return 0;
}

void pyccl_fsm_give_up(pyccl_fsm *fsm, pyccl_status why, const uint8_t *lost, size_t count, int64_t before_ns, int64_t now_ns) {
    PYCCL_ASSERT(why < 0);
    fsm_op *next = NULL;
    for (fsm_op *op = fsm->live_first; op != NULL; op = next) {
        next = op->live_next;
        if (op->state != RUNNING || op->submitted_ns >= before_ns) continue;
        if (fsm->frozen || concerns_any(fsm, op->tag, lost, count)) op_fail_alone(fsm, op, why, now_ns);
    }
    for (lane *l = fsm->lanes; l != NULL; l = l->next) {
        if (!fsm->frozen && !fsm->cutting && l->tag != NULL && !concerns_any(fsm, l->tag, lost, count)) continue;
        for (deferred *item = l->first; item != NULL; item = item->next)
            if (item->status == 0 && item->submitted_ns < before_ns) deferred_give_up(fsm, item, why);
    }
    admit_if_room(fsm, now_ns);
}

/* ---- frames ---- */

pyccl_gate pyccl_fsm_gate(const pyccl_fsm *fsm, uint64_t epoch_number, uint64_t epoch_tag, int member) {
    if (!fsm->entered || epoch_number > fsm->epoch_number) return PYCCL_GATE_LATER;
    if (epoch_number < fsm->epoch_number) return PYCCL_GATE_DROP;
    return epoch_tag == fsm->epoch_tag && member ? PYCCL_GATE_PASS : PYCCL_GATE_REFUSE;
}

pyccl_gate pyccl_fsm_data(pyccl_fsm *fsm, uint32_t rank, uint8_t space, uint32_t tag_number, uint64_t seq, uint64_t *cookie) {
    PYCCL_ASSERT(rank < fsm->world && rank != fsm->rank);
    *cookie = 0;
    if (fsm->frozen) return PYCCL_GATE_DROP;
    const fsm_tag *tag = tag_find(fsm, space, tag_number, rank);
    uint64_t next_seq = tag != NULL ? tag->next_seq : 0;
    if (seq >= next_seq) return seq - next_seq < fsm->options.early_max ? PYCCL_GATE_PASS : PYCCL_GATE_REFUSE;
    const fsm_op *op = op_find(tag, seq);
    if (op == NULL || op->state != RUNNING) return PYCCL_GATE_DROP;
    *cookie = op->cookie;
    return PYCCL_GATE_PASS;
}

/* The operation a peer speaks of, made EARLY if we have not submitted it; NULL with *rc OK: long settled. */
static fsm_op *op_for_peer(pyccl_fsm *fsm, const pyccl_message *message, pyccl_status *rc) {
    fsm_tag *tag = tag_find(fsm, message->space, message->tag, message->rank);
    *rc = PYCCL_OK;
    fsm_op *op = op_find(tag, message->seq);
    if (op != NULL) {
        op_submitted_by(fsm, op, message->rank);
        return op;
    }
    uint64_t next_seq = tag != NULL ? tag->next_seq : 0;
    if (message->seq < next_seq) return NULL;
    if (message->seq - next_seq >= fsm->options.early_max || fsm->early[message->rank] >= fsm->options.early_max) {
        *rc = PYCCL_ERR_FRAME;
        return NULL;
    }
    fsm->early[message->rank]++;
    op = op_new(fsm, tag_get(fsm, message->space, message->tag, message->rank), message->seq, EARLY);
    op->owner_rank = message->rank;
    op_submitted_by(fsm, op, message->rank);
    return op;
}

static void settled_below(pyccl_fsm *fsm, uint8_t space, uint32_t tag_number, uint32_t rank, uint64_t below) {
    fsm_tag *tag = tag_find(fsm, space, tag_number, rank);
    if (tag == NULL) return;
    const uint64_t to = below < tag->next_seq ? below : tag->next_seq;  /* what is EARLY has not been ours to note */
    fsm_op *next = NULL;
    if (to <= tag->settled_to[rank]) return;
    fsm_op *op = op_find(tag, tag->settled_to[rank]);  /* unless the epoch is new: the rank has kept it from being dropped */
    for (op = op != NULL ? op : tag->ops; op != NULL && op->seq < to; op = next) {
        next = op->tag_next;
        set_add(&op->settled, rank);
        op_submitted_by(fsm, op, rank);
        if (op->state == COMMITTED && set_is_full(fsm, tag, &op->settled)) op_drop(fsm, op);
    }
    tag->settled_to[rank] = to;
}

/* What a tombstone answers. One that failed by comparing hashes in this epoch gives its DONE instead of an ABORT: the
 * other compares for itself and names the same peer. */
static void tell_failed(pyccl_fsm *fsm, const fsm_op *op, uint32_t to) {
    if (op->abort_status == PYCCL_ERR_RESULT_DIFFERS && set_has(&op->done, fsm->rank))
        send_done(fsm, op, to);
    else send_one(fsm, op->tag, op->seq, PYCCL_FRAME_ABORT, to, failure_value(fsm, op), NULL);
}

static pyccl_status on_open(pyccl_fsm *fsm, const pyccl_message *message, int64_t now_ns) {
    if (message->value > message->seq) return PYCCL_ERR_FRAME;  /* it can't have settled what it opens */
    if (message->space == PYCCL_SPACE_PAIR && partner_of(fsm, &message->spec) != message->rank) return PYCCL_ERR_FRAME;
    pyccl_status rc;
    fsm_op *op = op_for_peer(fsm, message, &rc);
    if (rc != PYCCL_OK) return rc;
    settled_below(fsm, message->space, message->tag, message->rank, message->value);  /* below message->seq: not op */
    if (op == NULL) return PYCCL_OK;
    switch (op->state) {
    case EARLY:
        if (!op->have_spec) {
            op->have_spec = 1;
            op->spec = message->spec;
            op->spec_rank = message->rank;
        } else if (!op->have_other && !spec_equal(&op->spec, &message->spec)) {
            op->have_other = 1;
            op->other = message->spec;
            op->other_rank = message->rank;
        }
        set_add(&op->opened, message->rank);
        if (message->complaint) set_add(&op->refusing, message->rank);
        op->weights[message->rank] = message->weight;
        break;
    case RUNNING:
        if (!spec_equal(&op->spec, &message->spec)) {
            tell_differs(fsm, op, message->rank, &message->spec);
        } else if (!set_has(&op->opened, message->rank)) {
            set_add(&op->opened, message->rank);
            if (message->complaint) set_add(&op->refusing, message->rank);
            op->weights[message->rank] = message->weight;
            op->progress_ns = now_ns;
            tell_peer_open(fsm, op, message->rank);
            op_advance(fsm, op, now_ns);
        }
        break;
    case FAILED:
        tell_failed(fsm, op, message->rank);
        break;
    case PREPARED:
    case COMMITTED:
        break;  /* a repetition after a link reset */
    }
    return PYCCL_OK;
}

/* Whom a complaint names takes part; a sender does not accuse itself of what only others can see. */
static int is_complaint_untrusted(const pyccl_fsm *fsm, const pyccl_message *message) {
    const uint32_t accused = message->complaint % PYCCL_COMPLAINT_RESULT, suspect = message->complaint / PYCCL_COMPLAINT_RESULT;
    return (accused <= fsm->world || accused == PYCCL_CULPRIT_NOBODY) && suspect <= fsm->world && suspect != message->rank + 1 &&
           (message->complaint == 0 || message->space != PYCCL_SPACE_PAIR);
}

static pyccl_status on_done(pyccl_fsm *fsm, const pyccl_message *message, int64_t now_ns) {
    pyccl_status rc;
    if (!is_complaint_untrusted(fsm, message)) return PYCCL_ERR_FRAME;
    fsm_op *op = op_for_peer(fsm, message, &rc);
    if (op == NULL) return rc;
    if (op->state == COMMITTED || op->state == FAILED || set_has(&op->done, message->rank)) return PYCCL_OK;
    if (message->complaint != 0 && op->state != EARLY && !op->spec.guard) return PYCCL_ERR_FRAME;
    set_add(&op->done, message->rank);
    op->hash[message->rank] = message->value;
    op_complained(op, message->rank, message->complaint);
    if (op->state != EARLY) {
        op->progress_ns = now_ns;
        op_advance(fsm, op, now_ns);
    }
    return PYCCL_OK;
}

static int names_nobody(int32_t status) {
    return status == PYCCL_ERR_RESULT_DIFFERS || status == PYCCL_ERR_PEER_LOST || status == PYCCL_ERR_ARGUMENT ||
           status == PYCCL_ERR_MASTER_AWAY;
}

static int32_t abort_status(uint64_t value) {
    const int32_t status = -(int32_t)(value & 255);
    switch (status) {
    case PYCCL_ERR_ARGUMENT:
    case PYCCL_ERR_DEADLINE:
    case PYCCL_ERR_STALLED:
    case PYCCL_ERR_MASTER_AWAY:
    case PYCCL_ERR_RESULT_DIFFERS:
    case PYCCL_ERR_MISMATCH:
    case PYCCL_ERR_POISON:
    case PYCCL_ERR_PEER_LOST: return status;
    default: return PYCCL_ERR_CANCELLED;
    }
}

/* Whether the value of an ABORT or ANSWER is a status, and above it names a participant. */
static int is_failure_untrusted(const pyccl_fsm *fsm, const pyccl_message *message) {
    const uint64_t named = message->value >> 8;
    if ((message->value & 255) == 0) return 0;
    if (named == 0 || named == PYCCL_CULPRIT_NOBODY) return 1;
    return named <= fsm->world &&
           (message->space != PYCCL_SPACE_PAIR || named - 1 == message->rank || named - 1 == fsm->rank);
}

/* Who gave the operation up, by the sender's word; NULL: that is not known. Who sent DONE did not. */
static const uint8_t *culprit_of(const pyccl_fsm *fsm, const fsm_op *op, const pyccl_message *message) {
    const uint64_t named = message->value >> 8;
    if (named == PYCCL_CULPRIT_NOBODY || names_nobody(abort_status(message->value))) return NULL;
    const uint32_t rank = named == 0 ? message->rank : (uint32_t)(named - 1);
    if (abort_status(message->value) == PYCCL_ERR_POISON) return fsm->members[rank]; /* who contributed, and did not give up */
    return rank == fsm->rank || set_has(&op->done, rank) ? NULL : fsm->members[rank];
}

static pyccl_status on_abort(pyccl_fsm *fsm, const pyccl_message *message, int64_t now_ns) {
    pyccl_status rc;
    if (!is_failure_untrusted(fsm, message)) return PYCCL_ERR_FRAME;
    fsm_op *op = op_for_peer(fsm, message, &rc);
    if (op == NULL) return rc;
    int32_t status = abort_status(message->value);
    if (op->state == EARLY) {
        if (op->abort_status == 0) {
            op->abort_status = status;
            name_culprit(op, culprit_of(fsm, op, message));
        }
    } else if (op->state == RUNNING || op->state == PREPARED) {
        /* Who failed alone never sent DONE and never will: nobody can have committed. The sender may pass that on after
         * a DONE of its own (it was prepared when it learned of it; a repeated OPEN or a link reset asked it). */
        op_fail(fsm, op, status, culprit_of(fsm, op, message), now_ns);
    }
    return PYCCL_OK;
}

static void on_ask(pyccl_fsm *fsm, const pyccl_message *message) {
    const fsm_op *op = op_find(tag_find(fsm, message->space, message->tag, message->rank), message->seq);
    if (op != NULL && (op->state == COMMITTED || op->state == FAILED))
        send_one(fsm, op->tag, op->seq, PYCCL_FRAME_ANSWER, message->rank,
                 op->state == COMMITTED ? 0 : failure_value(fsm, op), NULL);
}

static pyccl_status on_answer(pyccl_fsm *fsm, const pyccl_message *message, int64_t now_ns) {
    fsm_op *op = op_find(tag_find(fsm, message->space, message->tag, message->rank), message->seq);
    if (message->value != 0 && !is_failure_untrusted(fsm, message)) return PYCCL_ERR_FRAME;
    if (op == NULL || op->state != PREPARED || !op->asked) return PYCCL_OK;  /* settled meanwhile */
    if (message->value == 0) op_commit(fsm, op, now_ns);
    else op_fail(fsm, op, abort_status(message->value), culprit_of(fsm, op, message), now_ns);
    return PYCCL_OK;
}

pyccl_status pyccl_fsm_receive(pyccl_fsm *fsm, const pyccl_message *message, int64_t now_ns) {
    PYCCL_ASSERT(fsm->entered && message->rank < fsm->world && message->rank != fsm->rank);
    if (message->type == PYCCL_FRAME_ASK) {  /* answered also while frozen: it tells what is, it changes nothing here */
        on_ask(fsm, message);
        return PYCCL_OK;
    }
    if (fsm->frozen) return PYCCL_OK;
    pyccl_status rc = PYCCL_OK;
    switch (message->type) {
    case PYCCL_FRAME_OPEN: rc = on_open(fsm, message, now_ns); break;
    case PYCCL_FRAME_DONE: rc = on_done(fsm, message, now_ns); break;
    case PYCCL_FRAME_ABORT: rc = on_abort(fsm, message, now_ns); break;
    case PYCCL_FRAME_ANSWER: rc = on_answer(fsm, message, now_ns); break;
    case PYCCL_FRAME_SETTLED: settled_below(fsm, message->space, message->tag, message->rank, message->seq); break;
    default: return PYCCL_ERR_FRAME;
    }
    admit_if_room(fsm, now_ns);
    return rc;
}

void pyccl_fsm_link_reset(pyccl_fsm *fsm, uint32_t rank, int64_t now_ns) {
    (void)now_ns;
    if (!fsm->entered || fsm->frozen) return;  /* frozen: the next epoch repeats what it retries */
    PYCCL_ASSERT(rank < fsm->world && rank != fsm->rank);
    for (fsm_tag *tag = fsm->tags; tag != NULL; tag = tag->next) {
        if (!takes_part(fsm, tag, rank)) continue;
        if (tag->told > 0) send_one(fsm, tag, tag->told, PYCCL_FRAME_SETTLED, rank, 0, NULL);  /* or its records stay */
        for (const fsm_op *op = tag->ops; op != NULL; op = op->tag_next) {
            if (op->state == RUNNING || op->state == PREPARED) {
                send_one(fsm, tag, op->seq, PYCCL_FRAME_OPEN, rank, tag_watermark(tag), op);
                pyccl_action *action = act(fsm, PYCCL_ACT_RESEND);
                action->cookie = op->cookie;
                action->rank = rank;
            }
            if (set_has(&op->settled, rank)) continue;
            if (op->state == PREPARED || op->state == COMMITTED)
                send_done(fsm, op, rank);
            if (op->state == PREPARED && op->asked)
                send_one(fsm, tag, op->seq, PYCCL_FRAME_ASK, rank, 0, NULL);
            if (op->state == FAILED) tell_failed(fsm, op, rank);
        }
    }
}

/* ---- freeze, report, safe points ---- */

pyccl_status pyccl_fsm_freeze(pyccl_fsm *fsm, int64_t now_ns) {
    (void)now_ns;
    if (fsm->left) return PYCCL_ERR_OUTCOME_UNKNOWN;  /* an empty report would say that nothing was prepared here */
    fsm->frozen = fsm->entered;
    return PYCCL_OK;
}

int pyccl_fsm_frozen(const pyccl_fsm *fsm) { return fsm->frozen; }

size_t pyccl_fsm_report(const pyccl_fsm *fsm, pyccl_op_report *out, size_t cap) {
    size_t count = 0;
    for (const fsm_tag *tag = fsm->tags; tag != NULL; tag = tag->next)
        for (const fsm_op *op = tag->ops; op != NULL; op = op->tag_next) {
            if (op->state != PREPARED && op->state != COMMITTED) continue;
            if (op->state == PREPARED && !set_is_empty(&op->complaining)) continue; /* nobody commits it: it counts as running */
            if (count < cap)
                out[count] = (pyccl_op_report){
                    .space = tag->space,
                    .state = op->state == PREPARED ? PYCCL_STATE_PREPARED : PYCCL_STATE_COMMITTED,
                    .tag = channel_of(fsm, tag), .seq = op->seq, .hash = op->hash[fsm->rank]};
            count++;
        }
    return count;
}

/* Numbers that were given, or are owed to what waits. What was submitted above a cut is left out: it waits for the next
 * epoch, and nobody needs to run it in this one. */
static uint64_t tag_claimed(const pyccl_fsm *fsm, const fsm_tag *tag) {
    const uint64_t claimed = tag->next_seq + (tag->lane != NULL ? tag->lane->count : 0);
    if (!fsm->cutting || claimed <= tag->cut) return claimed;
    return tag->next_seq > tag->cut ? tag->next_seq : tag->cut;
}

size_t pyccl_fsm_counts(const pyccl_fsm *fsm, pyccl_op_count *out, size_t cap) {
    size_t count = 0;
    for (const fsm_tag *tag = fsm->tags; tag != NULL; tag = tag->next) {
        const uint64_t claimed = tag_claimed(fsm, tag);
        if (claimed == 0) continue;
        if (count < cap) out[count] = (pyccl_op_count){.space = tag->space, .tag = channel_of(fsm, tag), .count = claimed};
        count++;
    }
    return count;
}

/* Something given up whose number `rank` has not called yet; NULL: nothing. The oldest of its tag. */
static const fsm_op *given_up_ahead_of(const pyccl_fsm *fsm, uint32_t rank) {
    const fsm_op *found = NULL;
    for (const fsm_tag *tag = fsm->tags; tag != NULL && found == NULL; tag = tag->next)
        for (const fsm_op *op = tag->ops; op != NULL; op = op->tag_next)
            if (op->state == FAILED && awaits_submit_of(fsm, op, rank) && (found == NULL || op->seq < found->seq)) found = op;
    return found;
}

/* Whether a submit waits for this participant to call what it has not called yet. */
static int is_waited_for(const pyccl_fsm *fsm, uint32_t rank) {
    if (rank == fsm->rank || fsm->ahead[rank] < fsm->options.early_max) return 0;
    for (const lane *l = fsm->lanes; l != NULL; l = l->next)
        if (l->tag != NULL && takes_part(fsm, l->tag, rank) && admissible(fsm, l->tag)) return 1;
    return 0;
}

size_t pyccl_fsm_lacking(const pyccl_fsm *fsm, pyccl_op_lack *out, size_t cap) {
    size_t count = 0;
    for (const fsm_op *op = fsm->live_first; op != NULL; op = op->live_next) {
        const uint32_t rank = first_outside(fsm, op->tag, &op->opened);
        if (rank == fsm->world) continue;
        if (count < cap)
            out[count] = (pyccl_op_lack){.space = op->tag->space, .tag = channel_of(fsm, op->tag), .seq = op->seq, .rank = rank};
        count++;
    }
    for (uint32_t rank = 0; rank < fsm->world; rank++) {
        const fsm_op *op = is_waited_for(fsm, rank) ? given_up_ahead_of(fsm, rank) : NULL;
        if (op == NULL) continue;
        if (count < cap)
            out[count] = (pyccl_op_lack){.space = op->tag->space, .tag = channel_of(fsm, op->tag), .seq = op->seq, .rank = rank};
        count++;
    }
    return count;
}

int pyccl_fsm_moves(const pyccl_fsm *fsm) {
    for (const fsm_op *op = fsm->live_first; op != NULL; op = op->live_next)
        if (set_is_full(fsm, op->tag, &op->opened)) return 1;
    return 0;
}

size_t pyccl_fsm_open_count(const pyccl_fsm *fsm) { return fsm->live_count + fsm->deferred_count; }

int pyccl_fsm_cut(pyccl_fsm *fsm, const pyccl_op_count *cut, size_t cuts, int open, int64_t now_ns) {
    if (!fsm->entered) return 0;
    for (fsm_tag *tag = fsm->tags; tag != NULL; tag = tag->next) tag->cut = 0;
    fsm->cutting = !open;
    for (size_t i = 0; i < cuts && !open; i++) {
        fsm_tag *tag = tag_of_channel(fsm, cut[i].space, cut[i].tag);
        if (tag != NULL) tag->cut = cut[i].count;
    }
    admit_deferred(fsm, now_ns);
    int above = 0;
    for (const fsm_tag *tag = fsm->tags; tag != NULL; tag = tag->next) above |= tag->next_seq > tag->cut;
    return fsm->cutting && above;
}

int pyccl_fsm_below_cut(const pyccl_fsm *fsm) {
    if (!fsm->cutting) return 0;
    for (const fsm_tag *tag = fsm->tags; tag != NULL; tag = tag->next)
        if (tag_claimed(fsm, tag) < tag->cut) return 1;
    return 0;
}

int pyccl_fsm_drained(const pyccl_fsm *fsm) {
    if (!fsm->cutting || fsm->live_count != 0) return 0;
    for (const fsm_tag *tag = fsm->tags; tag != NULL; tag = tag->next)
        if (tag->next_seq < tag->cut) return 0;
    return 1;
}

/* ---- epochs ---- */

static const pyccl_op_verdict *verdict_find(const pyccl_fsm *fsm, const pyccl_op_verdict *verdicts, size_t count, const fsm_op *op) {
    const uint64_t channel = channel_of(fsm, op->tag);
    for (size_t i = 0; i < count; i++)
        if (verdicts[i].seq == op->seq && verdicts[i].tag == channel && verdicts[i].space == op->tag->space)
            return &verdicts[i];
    return NULL;
}

static pyccl_status epoch_check(const pyccl_fsm *fsm, const pyccl_epoch *epoch, const pyccl_op_verdict *verdicts, size_t count) {
    if (epoch->world < 1 || epoch->world > PYCCL_WORLD_MAX || epoch->rank >= epoch->world) return PYCCL_ERR_ARGUMENT;
    if (fsm->entered && epoch->number <= fsm->epoch_number) return PYCCL_ERR_ARGUMENT;
    for (uint32_t i = 1; i < epoch->world; i++)
        if (memcmp(epoch->members + (i - 1) * PYCCL_ID_SIZE, epoch->members + i * PYCCL_ID_SIZE, PYCCL_ID_SIZE) >= 0)
            return PYCCL_ERR_ARGUMENT;
    if (epoch->mismatch && !epoch->restart) return PYCCL_ERR_ARGUMENT;
    for (uint32_t i = 0; fsm->entered && !epoch->restart && i < epoch->world; i++)  /* a loss epoch only removes members: */
        if (member_rank(fsm, epoch->members + i * PYCCL_ID_SIZE) == fsm->world) return PYCCL_ERR_ARGUMENT;  /* op->hash holds no more */
    for (const fsm_op *op = fsm->live_first; op != NULL; op = op->live_next) {
        const pyccl_op_verdict *verdict = verdict_find(fsm, verdicts, count, op);
        if (verdict != NULL && op->state != PREPARED) return PYCCL_ERR_ARGUMENT;  /* we hold no result to commit */
        if (verdict == NULL && epoch->restart && !epoch->mismatch) return PYCCL_ERR_ARGUMENT;  /* not drained */
    }
    return PYCCL_OK;
}

/* The verdict of the flush on one open operation; what is left RUNNING is to be tried again. */
static void op_judge(pyccl_fsm *fsm, fsm_op *op, const pyccl_op_verdict *verdict, int mismatch, int64_t now_ns) {
    if (verdict != NULL && verdict->verdict == PYCCL_VERDICT_COMMIT) op_commit(fsm, op, now_ns);
    else if (verdict != NULL) op_fail(fsm, op, PYCCL_ERR_RESULT_DIFFERS, NULL, now_ns);
    else if (mismatch) op_fail(fsm, op, PYCCL_ERR_MISMATCH, NULL, now_ns);
    else {
        op->state = RUNNING;
        act(fsm, PYCCL_ACT_STOP)->cookie = op->cookie;
    }
}

/* Forget what belongs to the old epoch: records and early operations; tombstones stay unless numbers restart. */
static void forget_old(pyccl_fsm *fsm) {
    for (fsm_tag *tag = fsm->tags; tag != NULL; tag = tag->next) {
        fsm_op *next = NULL;
        for (fsm_op *op = tag->ops; op != NULL; op = next) {
            next = op->tag_next;
            if (op->state == EARLY || op->state == COMMITTED) op_drop(fsm, op);
            else {
                memset(&op->opened, 0, sizeof op->opened);
                memset(&op->done, 0, sizeof op->done);
                memset(&op->settled, 0, sizeof op->settled);
                memset(&op->refusing, 0, sizeof op->refusing);
                memset(&op->complaining, 0, sizeof op->complaining);
                memset(&op->suspects, 0, sizeof op->suspects);
                op->complaint = op->accused = 0;
                op->result = op->asked = op->told_differs = 0;
            }
        }
        tag->cut = 0;
        tag->told = 0;
        memset(tag->settled_to, 0, fsm->world * sizeof tag->settled_to[0]);
    }
}

/* Ranks will move: who has submitted what stays true. Before adopt. */
static void submitted_follow(pyccl_fsm *fsm, const pyccl_epoch *epoch) {
    uint32_t moved[PYCCL_WORLD_MAX];           /* [old rank]; epoch->world: gone */
    for (uint32_t rank = 0; rank < fsm->world; rank++)
        for (moved[rank] = 0; moved[rank] < epoch->world; moved[rank]++)
            if (memcmp(fsm->members[rank], epoch->members + moved[rank] * PYCCL_ID_SIZE, PYCCL_ID_SIZE) == 0) break;
    for (const fsm_tag *tag = fsm->tags; tag != NULL; tag = tag->next)
        for (fsm_op *op = tag->ops; op != NULL; op = op->tag_next) {
            const rank_set old = op->submitted;
            memset(&op->submitted, 0, sizeof op->submitted);
            for (uint32_t rank = 0; rank < fsm->world; rank++)
                if (set_has(&old, rank) && moved[rank] < epoch->world) set_add(&op->submitted, moved[rank]);
        }
}

/* After adopt and pairs_follow. */
static void ahead_count(pyccl_fsm *fsm) {
    memset(fsm->ahead, 0, sizeof fsm->ahead);
    for (const fsm_tag *tag = fsm->tags; tag != NULL; tag = tag->next)
        for (const fsm_op *op = tag->ops; op != NULL; op = op->tag_next) ahead_add(fsm, op);
}

static void adopt(pyccl_fsm *fsm, const pyccl_epoch *epoch) {
    fsm->epoch_number = epoch->number;
    fsm->epoch_tag = 0;
    for (int i = 7; i >= 0; i--) fsm->epoch_tag = fsm->epoch_tag << 8 | epoch->id[i];
    fsm->world = epoch->world;
    fsm->rank = epoch->rank;
    memcpy(fsm->members, epoch->members, (size_t)epoch->world * PYCCL_ID_SIZE);
    memset(fsm->early, 0, sizeof fsm->early);
    fsm->entered = 1;
    fsm->frozen = fsm->cutting = 0;
}

static int is_orphan(const pyccl_fsm *fsm, const fsm_tag *tag) {
    return tag->space == PYCCL_SPACE_PAIR && tag->partner == fsm->world;
}

/* Ranks have moved: pairs are found under the new ones. What was open with a partner that is gone fails, and the pair is
 * forgotten: no number of it is ever used again, whoever comes back comes with a restart. */
static void pairs_follow(pyccl_fsm *fsm, int64_t now_ns) {
    fsm_op *next = NULL;
    for (fsm_tag *tag = fsm->tags; tag != NULL; tag = tag->next)
        if (tag->space == PYCCL_SPACE_PAIR) tag->partner = member_rank(fsm, tag->partner_id);
    for (fsm_op *op = fsm->live_first; op != NULL; op = next) {
        next = op->live_next;
        if (is_orphan(fsm, op->tag)) op_fail(fsm, op, PYCCL_ERR_PEER_LOST, op->tag->partner_id, now_ns);
    }
    for (fsm_tag **at = &fsm->dirty; *at != NULL;)
        if (is_orphan(fsm, *at)) *at = (*at)->dirty_next;
        else at = &(*at)->dirty_next;
    pyccl_map_clear(&fsm->tag_map);
    for (fsm_tag **at = &fsm->tags; *at != NULL;) {
        fsm_tag *tag = *at;
        if (!is_orphan(fsm, tag)) {
            pyccl_map_put(&fsm->tag_map, channel_key(tag->space, channel_of(fsm, tag)), tag);
            at = &tag->next;
            continue;
        }
        *at = tag->next;
        tag_free(fsm, tag);
        fsm->tag_count--;
    }
}

/* The first member of the old epoch that is not in the new one; NULL: nobody was lost. */
static const uint8_t *first_lost(const pyccl_fsm *fsm, const pyccl_epoch *epoch) {
    for (uint32_t i = 0; i < fsm->world; i++) {
        uint32_t j = 0;
        while (j < epoch->world && memcmp(fsm->members[i], epoch->members + j * PYCCL_ID_SIZE, PYCCL_ID_SIZE) != 0) j++;
        if (j == epoch->world) return fsm->members[i];
    }
    return NULL;
}

pyccl_status pyccl_fsm_epoch(pyccl_fsm *fsm, const pyccl_epoch *epoch, const pyccl_op_verdict *verdicts, size_t count, int64_t now_ns) {
    PYCCL_ASSERT(fsm->queue_count == 0);  /* actions name ranks of the old epoch */
    if (fsm->left) return PYCCL_ERR_OUTCOME_UNKNOWN;  /* our numbers are gone: the others count on from theirs */
    pyccl_status rc = epoch_check(fsm, epoch, verdicts, count);
    if (rc != PYCCL_OK) return rc;
    uint8_t lost[PYCCL_ID_SIZE];
    const uint8_t *gone = first_lost(fsm, epoch);
    if (gone != NULL) memcpy(lost, gone, sizeof lost);
    fsm_op *next = NULL;
    for (fsm_op *op = fsm->live_first; op != NULL; op = next) {
        next = op->live_next;
        op_judge(fsm, op, verdict_find(fsm, verdicts, count, op), epoch->mismatch, now_ns);
    }
    forget_old(fsm);
    if (epoch->restart) free_tags(fsm);
    submitted_follow(fsm, epoch);
    adopt(fsm, epoch);
    pairs_follow(fsm, now_ns);
    ahead_count(fsm);
    for (fsm_op *op = fsm->live_first; op != NULL; op = next) {
        next = op->live_next;
        if (fsm->world == 1) op_fail(fsm, op, PYCCL_ERR_ALONE, gone != NULL ? lost : NULL, now_ns);
        else if (gone != NULL && !op->spec.retry) op_fail(fsm, op, PYCCL_ERR_PEER_LOST, lost, now_ns);
        else if (lacks_root(fsm, &op->spec)) op_fail(fsm, op, PYCCL_ERR_PEER_LOST, op->spec.root, now_ns);
        else if (now_ns >= op->deadline_ns) op_fail_alone(fsm, op, PYCCL_ERR_DEADLINE, now_ns);  /* or it asks for flush after flush */
        else op_begin(fsm, op, now_ns);
    }
    if (epoch->mismatch) free_deferred(fsm, PYCCL_ERR_MISMATCH);  /* numbers are 0 on all: nothing is owed */
    lanes_follow(fsm);
    admit_deferred(fsm, now_ns);
    return PYCCL_OK;
}

/* ---- time ---- */

static void sooner(int64_t *due, int64_t at_ns) {
    if (at_ns < *due) *due = at_ns;
}

static void op_tick(pyccl_fsm *fsm, fsm_op *op, int64_t now_ns, int64_t *due, int *leave) {
    if (op->state == RUNNING) {
        if (now_ns >= op->deadline_ns) {
            op_fail_alone(fsm, op, PYCCL_ERR_DEADLINE, now_ns);
            return;
        }
        sooner(due, op->deadline_ns);
        if (fsm->options.stall_ns == 0 || fsm->frozen || !set_is_full(fsm, op->tag, &op->opened)) return;
        if (now_ns - op->progress_ns >= fsm->options.stall_ns) op_fail_alone(fsm, op, PYCCL_ERR_STALLED, now_ns);
        else sooner(due, op->progress_ns + fsm->options.stall_ns);
        return;
    }
    if (now_ns < op->deadline_ns) {
        sooner(due, op->deadline_ns);
        return;
    }
    if (!op->asked) {
        op->asked = 1;
        if (op->leave_ns == 0) op->leave_ns = now_ns + fsm->options.settle_ns;
        if (!fsm->frozen) send_all(fsm, op->tag, op->seq, PYCCL_FRAME_ASK, 0, NULL);
        act(fsm, PYCCL_ACT_SETTLE)->cookie = op->cookie;
    }
    if (now_ns >= op->leave_ns) *leave = 1;
    else sooner(due, op->leave_ns);
}

static void deferred_tick(pyccl_fsm *fsm, int64_t now_ns) {
    fsm->deferred_ns = INT64_MAX;
    for (lane *l = fsm->lanes; l != NULL; l = l->next)
        for (deferred *item = l->first; item != NULL; item = item->next) {
            if (item->status != 0) continue;
            if (now_ns >= item->deadline_ns) deferred_give_up(fsm, item, PYCCL_ERR_DEADLINE);
            else sooner(&fsm->deferred_ns, item->deadline_ns);
        }
}

static void tell_settled(pyccl_fsm *fsm) {
    while (fsm->dirty != NULL) {
        fsm_tag *tag = fsm->dirty;
        fsm->dirty = tag->dirty_next;
        tag->dirty = 0;
        uint64_t watermark = tag_watermark(tag);
        if (watermark > tag->told) send_all(fsm, tag, watermark, PYCCL_FRAME_SETTLED, 0, NULL);
        tag->told = watermark;
    }
    fsm->tell_ns_at = 0;
}

int64_t pyccl_fsm_tick(pyccl_fsm *fsm, int64_t now_ns) {
    int64_t due = INT64_MAX;
    int leave = 0;
    fsm_op *next = NULL;
    for (fsm_op *op = fsm->live_first; op != NULL; op = next) {
        next = op->live_next;
        op_tick(fsm, op, now_ns, &due, &leave);
    }
    if (now_ns >= fsm->deferred_ns) deferred_tick(fsm, now_ns);
    sooner(&due, fsm->deferred_ns);
    if (leave) {
        pyccl_fsm_end(fsm, PYCCL_ERR_CLOSED);
        fsm->left = 1;
        act(fsm, PYCCL_ACT_LEAVE);
        return INT64_MAX;
    }
    if (fsm->room && fsm->lanes != NULL && !fsm->frozen) {
        admit_deferred(fsm, now_ns);
        sooner(&due, now_ns);              /* what began has timers of its own */
    }
    if (fsm->tell_ns_at != 0 && !fsm->frozen) {
        if (now_ns >= fsm->tell_ns_at) tell_settled(fsm);
        else sooner(&due, fsm->tell_ns_at);
    }
    return due;
}
