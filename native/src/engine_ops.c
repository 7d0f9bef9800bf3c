/* engine_ops.c: attempts. An attempt is one run of one operation in one epoch: what has arrived, what has gone to whom
 * over which connection. The machine (op_fsm.c) says when one starts, stops and commits; the schedule (schedule.c) says
 * what has to move; engine_fold.c makes the result.
 *
 * Receiving: a piece is NONE, ARRIVING (a connection writes it to its place) or DONE. A second copy that comes while
 * the first is arriving is kept aside and counts when it is whole first: the sender repeats a piece only when it has
 * given up the connection, which we may not have noticed yet, and it will not repeat it a third time.
 * Sending: cursors, nothing is queued. The connection of each piece is remembered; when it ends its pieces are LOST
 * and go again. Invariant: a peer_tx that can send something now is in its peer's queue, oldest attempt first.
 * Threads: the engine's thread only.                               Spec: proto/wire.md 3.3-3.5 */
#include <stdlib.h>
#include <string.h>

#include "engine.h"

#define WORK_PIECES 8                /* local pieces between two looks at the sockets */
#define PAST_CACHE_BYTES (8u << 20)
#define PROGRESS_NS 10000000         /* progress is told to the machine at most this often */
#define STEP_PARTS 8                 /* contributions to one are at most such a part ahead of those to any other, */
#define STEP_PIECES 8                /* or so many pieces */
#define NEAR_AHEAD_PIECES 4          /* contributions to a near peer are at most this far ahead of what comes back */

/* ---- the queue of a peer ---- */

static void tx_unqueue(peer_tx *t) {
    peer *p = t->queued;
    if (p == NULL) return;
    if (t->prev != NULL) t->prev->next = t->next;
    else p->tx_first = t->next;
    if (t->next != NULL) t->next->prev = t->prev;
    else p->tx_last = t->prev;
    t->prev = t->next = NULL;
    t->queued = NULL;
}

static void tx_stop_waiting(pyccl_engine *engine, peer_tx *t) {
    if (!t->waits) return;
    t->waits = false;
    peer *p = engine->ranks[t->rank];
    PYCCL_ASSERT(p != NULL && p->tx_waiting > 0);
    p->tx_waiting--;
}

static void tx_enqueue(pyccl_engine *engine, peer_tx *t) {
    peer *p = engine->ranks[t->rank];
    if (t->queued != NULL || p == NULL) return;
    tx_stop_waiting(engine, t);
    peer_tx *after = p->tx_last;
    while (after != NULL && after->attempt->ordinal > t->attempt->ordinal) after = after->prev;
    t->prev = after;
    t->next = after != NULL ? after->next : p->tx_first;
    if (t->prev != NULL) t->prev->next = t;
    else p->tx_first = t;
    if (t->next != NULL) t->next->prev = t;
    else p->tx_last = t;
    t->queued = p;
    p->link.wants_send = true;
}

void ops_forget_peer(pyccl_engine *engine, peer *p) {
    if (p->rank < 0) return;
    for (attempt *a = engine->attempts; a != NULL; a = a->next) {
        tx_stop_waiting(engine, &a->peers[p->rank]);
        tx_unqueue(&a->peers[p->rank]);
        a->peers[p->rank].eager_bytes = 0;
    }
    PYCCL_ASSERT(p->tx_first == NULL && p->tx_waiting == 0);
    p->eager_used = PYCCL_EAGER_MAX; /* what it still holds of ours is not known: wait for its OPENs */
}

void ops_requeue(pyccl_engine *engine, peer *p) {
    if (p->rank < 0) return;
    for (attempt *a = engine->attempts; a != NULL; a = a->next) tx_enqueue(engine, &a->peers[p->rank]);
}

/* ---- life of an attempt ---- */

/* Of the source of a broadcast, of the partner in an exchange; else 0. */
static uint32_t root_rank(const pyccl_engine *engine, const pyccl_spec *spec) {
    uint8_t id[PYCCL_ID_SIZE];
    uint32_t rank = 0;
    if (spec->kind != PYCCL_BROADCAST && spec->kind != PYCCL_EXCHANGE) return 0;
    for (int i = 0; i < PYCCL_ID_SIZE; i++)
        id[i] = spec->kind == PYCCL_EXCHANGE ? spec->root[i] ^ engine->options.self_id[i] : spec->root[i];
    while (rank < engine->world && memcmp(engine->members[rank], id, PYCCL_ID_SIZE) != 0) rank++;
    return rank;
}

/* The tables of what arrives, and of what is ready to go out. */
static pyccl_status attempt_tables(attempt *a) {
    const schedule *s = &a->schedule;
    uint64_t items[2] = {0, 0};
    a->slot_at = calloc(s->world, sizeof *a->slot_at);
    for (int phase = 0; phase < 2; phase++) a->arrived_at[phase] = calloc(s->world, sizeof *a->arrived_at[phase]);
    if (a->slot_at == NULL || a->arrived_at[0] == NULL || a->arrived_at[1] == NULL) return PYCCL_ERR_NOMEM;
    for (uint32_t rank = 0; rank < s->world; rank++) {
        for (uint32_t phase = 0; phase < 2; phase++) {
            a->arrived_at[phase][rank] = items[phase];
            items[phase] += schedule_items(s, phase, rank, s->rank);
        }
        if (rank > 0 && !s->swap && s->kind != PYCCL_EXCHANGE) a->slot_at[rank] = a->slot_at[rank - 1] + schedule_pieces(s, rank - 1);
    }
    const uint64_t ready = s->ring ? items[SCHEDULE_RESULT] : a->own_pieces, partials = s->ring ? items[SCHEDULE_CONTRIBUTION] : 0;
    a->pieces_left = schedule_due_pieces(s);
    a->contribution_count = schedule_folds(s) ? items[SCHEDULE_CONTRIBUTION] : 0;
    for (int phase = 0; phase < 2; phase++) a->arrived[phase] = calloc(items[phase] + 1, 1);
    a->missing = calloc(a->own_pieces + 1, sizeof *a->missing);
    a->ready = calloc(ready + 1, sizeof *a->ready);
    a->partials = calloc(partials + 1, sizeof *a->partials);
    a->contribution = calloc(a->contribution_count + 1, sizeof *a->contribution);
    if (a->arrived[0] == NULL || a->arrived[1] == NULL || a->missing == NULL || a->ready == NULL || a->partials == NULL || a->contribution == NULL)
        return PYCCL_ERR_NOMEM;
    for (uint64_t piece = 0; piece < a->own_pieces; piece++) a->missing[piece] = (uint16_t)schedule_contributors(s, s->rank);
    return PYCCL_OK;
}

static pyccl_status attempt_weights(attempt *a) {
    if (a->op->args.spec.op != PYCCL_AVG) return PYCCL_OK;
    a->weights = calloc(a->schedule.world, sizeof *a->weights);
    a->held = calloc((a->schedule.ring ? a->contribution_count : a->own_pieces) + 1, sizeof *a->held);
    if (a->weights == NULL || a->held == NULL) return PYCCL_ERR_NOMEM;
    a->weights[a->schedule.rank] = a->op->args.weight;
    a->weights_missing = a->schedule.world - 1;
    return PYCCL_OK;
}

static pyccl_status attempt_peers(attempt *a) {
    const schedule *s = &a->schedule;
    a->peers = calloc(s->world, sizeof *a->peers);
    if (a->peers == NULL) return PYCCL_ERR_NOMEM;
    for (uint32_t rank = 0; rank < s->world; rank++) {
        peer_tx *t = &a->peers[rank];
        t->attempt = a;
        t->rank = rank;
        for (uint32_t phase = 0; phase < 2; phase++) t->items[phase] = schedule_items(s, phase, s->rank, rank);
        const uint64_t items = t->items[0] + t->items[1];
        if (items == 0) continue;
        const uint32_t begins = s->ring ? schedule_previous(s, s->rank) : 0; /* whose share begins its way round with us */
        t->contribution_first = s->ring ? a->slot_at[begins] : 0;
        t->contributions = a->op->refused ? 0 : s->ring ? schedule_pieces(s, begins) : t->items[SCHEDULE_CONTRIBUTION];
        t->carrier[0] = malloc(items);
        if (t->carrier[0] == NULL) return PYCCL_ERR_NOMEM;
        t->carrier[1] = t->carrier[0] + t->items[0];
        memset(t->carrier[0], CARRIER_NONE, items);
    }
    return PYCCL_OK;
}

/* Where the result comes together: in the caller's memory, or in ours where there is none. What it overwrites there and
 * must be put back if there is no commit is saved piece by piece: see engine_fold.c. */
static pyccl_status attempt_result(pyccl_engine *engine, attempt *a) {
    const pyccl_op_args *args = &a->op->args;
    const uint64_t bytes = schedule_kept_bytes(&a->schedule);
    const bool apart = a->schedule.kind == PYCCL_ALL_GATHER || a->schedule.kind == PYCCL_REDUCE_SCATTER;
    if (apart && args->dst != NULL && args->dst_bytes < bytes) return PYCCL_ERR_ARGUMENT;
    if (bytes == 0 || (a->schedule.kind == PYCCL_BROADCAST && a->schedule.root == a->schedule.rank)) return PYCCL_OK;
    a->result = args->dst;
    a->past_cache = bytes >= PAST_CACHE_BYTES;
    const bool overwrites = a->schedule.kind == PYCCL_BROADCAST || (!apart && args->dst == args->src);
    if (args->dst != NULL && !overwrites) return PYCCL_OK;
    a->scratch = scratch_take(engine, bytes, &a->scratch_bytes);
    if (a->scratch == NULL) return PYCCL_ERR_NOMEM;
    if (args->dst == NULL) {
        a->result = a->scratch;
        return PYCCL_OK;
    }
    a->undo = a->scratch;
    a->saved = calloc(schedule_input_pieces(&a->schedule), 1);
    return a->saved != NULL ? PYCCL_OK : PYCCL_ERR_NOMEM;
}

/* Codes: of our input to every piece, and of what we send of the result. */
static pyccl_status attempt_codes(pyccl_engine *engine, attempt *a) {
    const schedule *s = &a->schedule;
    if (!fold_is_coded(a) || s->count == 0) return PYCCL_OK;
    const uint64_t inputs = schedule_input_pieces(s);
    const uint64_t results = s->swap || s->kind == PYCCL_REDUCE_SCATTER ? 0 : s->ring ? inputs : a->own_pieces;
    a->code_stride = schedule_piece_bytes_max(s);
    a->encoded = calloc(inputs, 1);
    a->codes = scratch_take(engine, (inputs + results) * a->code_stride, &a->codes_bytes);
    if (engine->tile == NULL) engine->tile = malloc(2 * ENGINE_TILE_FLOATS * sizeof(float));
    if (a->encoded == NULL || a->codes == NULL || engine->tile == NULL) return PYCCL_ERR_NOMEM;
    if (results > 0) a->result_codes = a->codes + inputs * a->code_stride;
    return PYCCL_OK;
}

/* What is left of buffers; in a ring they are of other sizes than what arrived in them. */
static void contributions_free(pyccl_engine *engine, attempt *a) {
    const schedule *s = &a->schedule;
    if (a->contribution == NULL) return;
    for (uint32_t rank = 0; rank < s->world && a->contribution_count > 0; rank++)
        for (uint64_t item = 0; item < schedule_items(s, SCHEDULE_CONTRIBUTION, rank, s->rank); item++) {
            uint8_t *buffer = a->contribution[a->arrived_at[SCHEDULE_CONTRIBUTION][rank] + item];
            if (buffer == NULL) continue;
            if (s->ring) free(buffer);
            else piece_free(engine, buffer, schedule_item_bytes(s, SCHEDULE_CONTRIBUTION, rank, s->rank, item));
        }
    free(a->contribution);
}

static void attempt_free(pyccl_engine *engine, attempt *a) {
    contributions_free(engine, a);
    if (a->peers != NULL)
        for (uint32_t rank = 0; rank < a->schedule.world; rank++) free(a->peers[rank].carrier[0]);
    scratch_give(engine, a->scratch, a->scratch_bytes);
    scratch_give(engine, a->codes, a->codes_bytes);
    free(a->encoded);
    free(a->guard);
    free(a->saved);
    free(a->slot_at);
    free(a->weights);
    free(a->held);
    free(a->peers);
    free(a->missing);
    free(a->partials);
    free(a->ready);
    for (int phase = 0; phase < 2; phase++) {
        free(a->arrived[phase]);
        free(a->arrived_at[phase]);
    }
    plan_release(a->plan);
    free(a);
}

shared_plan *plan_share(shared_plan *plan) {
    plan->users++;
    return plan;
}

void plan_release(shared_plan *plan) {
    if (plan != NULL && --plan->users == 0) free(plan);
}

static pyccl_status attempt_new(pyccl_engine *engine, pyccl_op *op, uint64_t seq, attempt **out) {
    *out = NULL;
    PYCCL_ASSERT(engine->in_epoch && engine->world > 1); /* alone: the machine starts nothing */
    const uint32_t root = root_rank(engine, &op->args.spec);
    if (root >= engine->world) return PYCCL_ERR_PEER_LOST;
    attempt *a = calloc(1, sizeof *a);
    if (a == NULL) return PYCCL_ERR_NOMEM;
    a->owner = OWNER_ATTEMPT;
    a->op = op;
    a->seq = seq;
    a->ordinal = ++engine->ordinals;
    a->spec_hash = pyccl_spec_hash(&op->args.spec);
    a->src = op->args.src;
    a->plan = plan_share(engine->plan);
    schedule_init(&a->schedule, &op->args.spec, &a->plan->plan, engine->rank, root);
    a->own_pieces = schedule_pieces(&a->schedule, engine->rank);
    pyccl_status rc = attempt_tables(a);
    if (rc == PYCCL_OK) rc = attempt_peers(a);
    if (rc == PYCCL_OK) rc = attempt_weights(a);
    if (rc == PYCCL_OK) rc = attempt_result(engine, a);
    if (rc == PYCCL_OK) rc = attempt_codes(engine, a);
    if (rc == PYCCL_OK) rc = guard_new(a);
    if (rc == PYCCL_OK) *out = a;
    else attempt_free(engine, a);
    return rc;
}

void ops_stop(pyccl_engine *engine, pyccl_op *op) {
    attempt *a = op->attempt;
    if (a == NULL) return;
    for (uint32_t rank = 0; rank < a->schedule.world; rank++) {
        tx_unqueue(&a->peers[rank]);
        tx_stop_waiting(engine, &a->peers[rank]);
    }
    for (peer *p = engine->peers; p != NULL; p = p->next) link_disown(&p->link, a);
    if (!a->committed) fold_restore(engine, a);
    if (a->prev != NULL) a->prev->next = a->next;
    else engine->attempts = a->next;
    if (a->next != NULL) a->next->prev = a->prev;
    else engine->attempts_last = a->prev;
    if (a->has_local) engine->local_work--;
    op->attempt = NULL;
    attempt_free(engine, a);
}

/* ---- the result ---- */

void ops_result_ready(pyccl_engine *engine, attempt *a, uint32_t owner, uint64_t piece) {
    const schedule *s = &a->schedule;
    if (s->ring) {
        const uint32_t next = schedule_next(s, s->rank);
        if (owner == next || a->peers[next].items[SCHEDULE_RESULT] == 0) return; /* it has been round, or does not go round */
        a->ready[a->ready_count++] = a->slot_at[owner] + piece;
        tx_enqueue(engine, &a->peers[next]);
        return;
    }
    if (owner != s->rank) return;
    a->ready[a->ready_count++] = piece;
    for (uint32_t rank = 0; rank < s->world; rank++)
        if (a->peers[rank].items[SCHEDULE_RESULT] > 0) tx_enqueue(engine, &a->peers[rank]);
}

void ops_partial_ready(pyccl_engine *engine, attempt *a, uint64_t item) {
    a->partials[a->partial_count++] = item;
    tx_enqueue(engine, &a->peers[schedule_next(&a->schedule, a->schedule.rank)]);
}

/* Whoever sends a result early has broken the rules, and some connection may still be sending the sum. */
void ops_partial_used(pyccl_engine *engine, attempt *a, uint64_t item) {
    const schedule *s = &a->schedule;
    uint32_t owner;
    uint64_t piece;
    schedule_item(s, SCHEDULE_CONTRIBUTION, schedule_previous(s, s->rank), s->rank, item, &owner, &piece);
    peer_tx *t = &a->peers[schedule_next(s, s->rank)];
    uint8_t *carrier = &t->carrier[SCHEDULE_CONTRIBUTION][item], **sum = &a->contribution[item];
    const peer *p = engine->ranks[t->rank];
    if (*carrier == CARRIER_NONE) return;
    if (*sum != NULL && p != NULL && link_reads(&p->link, *sum, schedule_partial_bytes(s, owner, piece))) return;
    if (*carrier == CARRIER_LOST) t->lost--;
    *carrier = CARRIER_ARRIVED;
    piece_free(engine, *sum, schedule_partial_bytes(s, owner, piece));
    *sum = NULL;
}

/* Tell the machine once the whole result is here. */
static void tell_if_whole(pyccl_engine *engine, attempt *a) {
    if (a->pieces_left > 0 || a->weights_missing > 0 || a->told) return;
    a->told = true;
    engine->tick_stale = true;
    if (a->guard != NULL) pyccl_fsm_complain(engine->fsm, a->op->cookie, guard_complaint(a));
    pyccl_fsm_result(engine->fsm, a->op->cookie, fold_hash(a), engine->env.now_ns);
}

void ops_commit(pyccl_op *op) {
    attempt *a = op->attempt;
    PYCCL_ASSERT(a != NULL && a->told);
    a->committed = true;
    if ((a->schedule.kind != PYCCL_ALL_GATHER && a->schedule.kind != PYCCL_REDUCE_SCATTER) || op->args.dst != NULL) return;
    op->kept = a->scratch;
    op->kept_bytes = schedule_kept_bytes(&a->schedule);
    a->scratch = NULL;
}

/* ---- pieces that need nothing from the network ---- */

/* At most `budget` pieces of one attempt. */
static void attempt_work(pyccl_engine *engine, attempt *a, int budget) {
    while (a->local_share < a->schedule.world && budget > 0) {
        if (!schedule_is_local(&a->schedule, a->local_share, a->schedule.rank) ||
            a->local_piece >= schedule_pieces(&a->schedule, a->local_share)) {
            a->local_share++;
            a->local_piece = 0;
            continue;
        }
        fold_local(engine, a, a->local_share, a->local_piece++);
        budget--;
    }
    if (a->has_local && a->local_share == a->schedule.world) {
        a->has_local = false;
        engine->local_work--;
    }
    tell_if_whole(engine, a);
}

bool ops_work(pyccl_engine *engine) {
    if (engine->local_work == 0 || pyccl_fsm_frozen(engine->fsm)) return false;
    attempt *a = engine->attempts;
    while (a != NULL && !a->has_local) a = a->next;
    PYCCL_ASSERT(a != NULL);
    attempt_work(engine, a, WORK_PIECES);
    return true;
}

void ops_start(pyccl_engine *engine, pyccl_op *op, uint64_t seq) {
    ops_stop(engine, op);
    attempt *a = NULL;
    const pyccl_status rc = attempt_new(engine, op, seq, &a);
    if (rc != PYCCL_OK) {
        pyccl_fsm_cancel(engine->fsm, op->cookie, rc, engine->env.now_ns);
        return;
    }
    op->attempt = a;
    op->seq = seq;
    op->world = op->args.spec.kind == PYCCL_EXCHANGE ? 2 : engine->world;
    op->algorithm = schedule_algorithm(&a->schedule);
    op->epoch_number = engine->epoch_number;
    memcpy(op->epoch_id, engine->epoch_id, sizeof op->epoch_id);
    a->prev = engine->attempts_last;
    if (a->prev != NULL) a->prev->next = a;
    else engine->attempts = a;
    engine->attempts_last = a;
    for (uint32_t rank = 0; rank < a->schedule.world; rank++)
        if (a->peers[rank].contributions > 0) tx_enqueue(engine, &a->peers[rank]);
    a->has_local = true;
    engine->local_work++;
    early_replay(engine, op, seq);
    attempt_work(engine, a, WORK_PIECES);
}

/* ---- sending ---- */

static bool tx_find_lost(const peer_tx *t, uint32_t *phase, uint64_t *item) {
    for (*phase = 2; (*phase)-- > 0;) {
        const uint8_t *found = t->items[*phase] > 0 ? memchr(t->carrier[*phase], CARRIER_LOST, t->items[*phase]) : NULL;
        if (found == NULL) continue;
        *item = (uint64_t)(found - t->carrier[*phase]);
        return true;
    }
    return false;
}

/* On a near link contributions keep step with what comes back for them: our input to a piece is still in the cache when
 * the result overwrites it, and what is under way fits there too. */
static bool tx_too_far_ahead(const pyccl_engine *engine, const peer_tx *t) {
    const peer *p = engine->ranks[t->rank];
    const schedule *s = &t->attempt->schedule;
    if (s->kind != PYCCL_ALL_REDUCE || p == NULL || !p->link.near) return false;
    const uint64_t hops = s->ring ? s->world : 1;
    return t->contribution_next >= t->returned + NEAR_AHEAD_PIECES * hops;
}

/* A line that links share is not shared evenly, and a link that is left alone at the end takes long to fill it. So those
 * that are ahead make room. Who does not take part yet, or has no connection, holds up nobody. */
static bool tx_out_of_step(const pyccl_engine *engine, const peer_tx *t) {
    const attempt *a = t->attempt;
    const peer *p = engine->ranks[t->rank];
    if (!schedule_folds(&a->schedule) || a->schedule.ring || p == NULL || p->link.near) return false;
    const double all = (double)t->contributions, step = all / STEP_PARTS > STEP_PIECES ? all / STEP_PARTS : STEP_PIECES;
    if ((double)t->contribution_next < step) return false;
    for (uint32_t rank = 0; rank < a->schedule.world; rank++) {
        const peer_tx *other = &a->peers[rank];
        const peer *q = engine->ranks[rank];
        if (other->contributions == 0 || !other->open || q == NULL || q->link.near || q->link.conn_count == 0) continue;
        const double done = (double)other->contribution_next / (double)other->contributions;
        if ((double)t->contribution_next >= done * all + step) return true;
    }
    return false;
}

/* Some contribution has left: those that waited for it may look again. */
static void tx_release_ahead(pyccl_engine *engine, attempt *a) {
    for (uint32_t rank = 0; a->ahead_count > 0 && rank < a->schedule.world; rank++) {
        peer_tx *t = &a->peers[rank];
        if (!t->ahead) continue;
        t->ahead = false;
        a->ahead_count--;
        tx_enqueue(engine, t);
    }
}

typedef enum tx_found { TX_NOTHING, TX_AHEAD, TX_ITEM } tx_found;

/* Inputs go before results, so that the last to be sent are results that have long been there: nothing waits for a way to the
 * owner and back at the end. Where a ring goes round or data are to stay in the cache, what is furthest on its way goes first. */
static bool tx_inputs_first(const pyccl_engine *engine, const peer_tx *t) {
    const peer *p = engine->ranks[t->rank];
    return !t->attempt->schedule.ring && p != NULL && !p->link.near;
}

/* What goes next to this rank: what was lost, then results, sums and our own contributions, or these first. */
static tx_found tx_pick(const pyccl_engine *engine, const peer_tx *t, uint32_t *phase, uint64_t *item) {
    const attempt *a = t->attempt;
    if (t->lost > 0) {
        const bool found = tx_find_lost(t, phase, item);
        PYCCL_ASSERT(found);
        return TX_ITEM;
    }
    const bool input = t->contribution_next < t->contributions && !tx_too_far_ahead(engine, t), ahead = input && tx_out_of_step(engine, t);
    const bool first = input && !ahead && tx_inputs_first(engine, t);
    if (!first && t->items[SCHEDULE_RESULT] > 0 && t->result_next < a->ready_count) {
        *phase = SCHEDULE_RESULT;
        *item = a->ready[t->result_next];
        return TX_ITEM;
    }
    *phase = SCHEDULE_CONTRIBUTION;
    if (t->items[SCHEDULE_CONTRIBUTION] > 0 && t->partial_next < a->partial_count) {
        *item = a->partials[t->partial_next];
        return TX_ITEM;
    }
    *item = t->contribution_first + t->contribution_next;
    return ahead ? TX_AHEAD : input ? TX_ITEM : TX_NOTHING;
}

/* A cursor moves past the item that tx_pick has found there. */
static void tx_advance(peer_tx *t, uint32_t phase, uint64_t item) {
    const attempt *a = t->attempt;
    if (phase == SCHEDULE_RESULT) t->result_next++;
    else if (t->partial_next < a->partial_count && a->partials[t->partial_next] == item) t->partial_next++;
    else t->contribution_next++;
}

static void tx_take(pyccl_engine *engine, peer_tx *t, uint32_t phase, uint64_t item, const pyccl_conn *conn, link_load *load) {
    attempt *a = t->attempt;
    const schedule *s = &a->schedule;
    uint8_t *carrier = &t->carrier[phase][item];
    if (*carrier == CARRIER_LOST) t->lost--;
    else tx_advance(t, phase, item);
    if (phase == SCHEDULE_CONTRIBUTION) tx_release_ahead(engine, a);
    *carrier = (uint8_t)conn->index;
    load->frame = (pyccl_frame){.type = PYCCL_FRAME_DATA, .phase = (uint8_t)phase, .space = a->op->args.spec.space,
                                .seq = a->seq, .tag = a->op->args.spec.tag, .spec_hash = a->spec_hash,
                                .length = schedule_item_bytes(s, phase, s->rank, t->rank, item),
                                .offset = schedule_item_offset(s, phase, s->rank, t->rank, item)};
    engine_frame_stamp(engine, &load->frame);
    load->data = fold_source(a, phase, t->rank, item);
    load->owner = a;
    a->op->tx_bytes += load->frame.length;
    ops_moved(engine, a);
}

/* What a piece takes of the eager window: the peer keeps no more than EARLY_PIECES_MAX, however small they are. */
static uint32_t eager_cost(uint32_t bytes) { return bytes > EAGER_PIECE_MIN ? bytes : EAGER_PIECE_MIN; }

bool ops_load_next(pyccl_engine *engine, peer *p, pyccl_conn *conn, link_load *load) {
    if (p->rank < 0 || pyccl_fsm_frozen(engine->fsm)) return false;
    for (peer_tx *t = p->tx_first, *next; t != NULL; t = next) {
        next = t->next;
        uint32_t phase;
        uint64_t item;
        const tx_found found = tx_pick(engine, t, &phase, &item);
        if (found != TX_ITEM) {
            tx_unqueue(t);
            t->attempt->ahead_count += found == TX_AHEAD && !t->ahead ? 1 : 0;
            t->ahead |= found == TX_AHEAD;
            continue;
        }
        const uint32_t bytes = eager_cost(schedule_item_bytes(&t->attempt->schedule, phase, t->attempt->schedule.rank, t->rank, item));
        if (!t->open && t->carrier[phase][item] != CARRIER_LOST) {
            if (p->eager_used + bytes > PYCCL_EAGER_MAX) {
                tx_unqueue(t);
                t->waits = true;
                p->tx_waiting++;
                continue;
            }
            p->eager_used += bytes;
            t->eager_bytes += bytes;
        }
        tx_take(engine, t, phase, item, conn, load);
        return true;
    }
    return false;
}

/* Its weight may be the last that a fold waits for. */
static void take_weight(pyccl_engine *engine, attempt *a, uint32_t rank, double weight) {
    const pyccl_status rc = fold_weight(engine, a, rank, weight);
    if (rc == PYCCL_OK) tell_if_whole(engine, a);
    else pyccl_fsm_cancel(engine->fsm, a->op->cookie, rc, engine->env.now_ns);
}

void ops_peer_open(pyccl_engine *engine, pyccl_op *op, uint32_t rank, double weight) {
    peer *p = engine->ranks[rank];
    if (op->attempt == NULL) return;
    peer_tx *t = &op->attempt->peers[rank];
    t->open = true;
    if (op->attempt->weights_missing > 0) take_weight(engine, op->attempt, rank, weight);
    if (p == NULL) return;
    PYCCL_ASSERT(p->eager_used >= t->eager_bytes);
    p->eager_used -= t->eager_bytes;
    t->eager_bytes = 0;
    if (p->tx_waiting == 0) return;
    for (attempt *a = engine->attempts; a != NULL; a = a->next)
        if (a->peers[rank].waits) tx_enqueue(engine, &a->peers[rank]);
}

void ops_conn_lost(pyccl_engine *engine, peer *p, uint32_t conn_index) {
    if (p->rank < 0) return;
    for (attempt *a = engine->attempts; a != NULL; a = a->next) {
        peer_tx *t = &a->peers[p->rank];
        for (int phase = 0; phase < 2; phase++)
            for (uint64_t item = 0; item < t->items[phase]; item++) {
                if (t->carrier[phase][item] != conn_index) continue;
                t->carrier[phase][item] = CARRIER_LOST;
                t->lost++;
            }
        if (t->lost > 0) tx_enqueue(engine, t);
    }
}

void ops_moved(pyccl_engine *engine, attempt *a) {
    if (engine->env.now_ns - a->progress_ns < PROGRESS_NS) return;
    a->progress_ns = engine->env.now_ns;
    pyccl_fsm_progress(engine->fsm, a->op->cookie, engine->env.now_ns);
}

/* ---- receiving ---- */

/* The item a DATA frame carries; NULL: it is none that this peer may send us. */
static uint8_t *item_state_of(const attempt *a, uint32_t rank, const pyccl_frame *frame, uint64_t *item) {
    if (!schedule_item_find(&a->schedule, frame->phase, rank, a->schedule.rank, frame->offset, frame->length, item)) return NULL;
    return &a->arrived[frame->phase][a->arrived_at[frame->phase][rank] + *item];
}

static bool is_folded(const attempt *a, uint32_t phase) { return phase == SCHEDULE_CONTRIBUTION && schedule_folds(&a->schedule); }

static uint8_t **contribution_of(const attempt *a, uint32_t rank, uint64_t item) {
    return &a->contribution[a->arrived_at[SCHEDULE_CONTRIBUTION][rank] + item];
}

/* Where an item belongs, unless it is folded; codes that go no further are decoded at once: NULL. */
static uint8_t *place_of(pyccl_engine *engine, attempt *a, uint32_t rank, uint32_t phase, uint64_t item) {
    uint32_t owner;
    uint64_t piece;
    schedule_item(&a->schedule, phase, rank, a->schedule.rank, item, &owner, &piece);
    if (phase != SCHEDULE_RESULT || !fold_is_coded(a)) return fold_place(engine, a, owner, piece);
    return a->schedule.ring ? fold_result_codes(a, owner, piece) : NULL;
}

/* sink->dst NULL: no memory. */
static void item_place(pyccl_engine *engine, attempt *a, uint32_t rank, uint32_t phase, uint64_t item, uint32_t bytes, link_sink *sink) {
    if (is_folded(a, phase)) {
        uint8_t **place = contribution_of(a, rank, item);
        if (*place == NULL) *place = piece_alloc(engine, bytes);
        sink->dst = *place;
        return;
    }
    sink->dst = place_of(engine, a, rank, phase, item);
    if (sink->dst == NULL) sink->dst = sink->owned = piece_alloc(engine, bytes);
}

/* codes: the piece, where it lies nowhere else. */
static void item_arrived(pyccl_engine *engine, attempt *a, uint32_t rank, uint32_t phase, uint64_t item, const uint8_t *codes) {
    const schedule *s = &a->schedule;
    uint32_t owner;
    uint64_t piece;
    schedule_item(s, phase, rank, s->rank, item, &owner, &piece);
    a->op->rx_bytes += schedule_item_bytes(s, phase, rank, s->rank, item);
    ops_moved(engine, a);
    peer_tx *t = &a->peers[s->ring ? schedule_next(s, s->rank) : rank];
    if (s->ring ? phase == SCHEDULE_RESULT && owner == rank : phase == SCHEDULE_RESULT || s->swap) t->returned++;
    if (t->contribution_next < t->contributions) tx_enqueue(engine, t);
    if (is_folded(a, phase)) {
        guard_contribution(engine, a, rank, piece, *contribution_of(a, rank, item));
        fold_contribution(engine, a, s->ring ? item : piece);
    } else fold_result(engine, a, owner, piece, codes);
    if (s->ring && phase == SCHEDULE_RESULT) ops_partial_used(engine, a, item);
    tell_if_whole(engine, a);
}

/* A copy is whole while the first is still arriving: that connection gives up its claim. */
static void claim_drop(peer *p, const attempt *a, uint32_t phase, uint64_t item) {
    for (uint32_t i = 0; i < PYCCL_CONNS_MAX; i++) {
        pyccl_conn *conn = p->link.conns[i];
        if (conn == NULL || conn->sink.kind != SINK_PIECE || conn->sink.note != a) continue;
        if (conn->frame.phase == phase && conn->sink.piece == item) link_sink_drop(conn);
    }
}

static void copy_arrived(pyccl_engine *engine, peer *p, attempt *a, uint32_t phase, uint64_t item, uint8_t *state,
                         uint8_t **data, uint32_t bytes) {
    const uint32_t rank = (uint32_t)p->rank;
    if (*state == PIECE_DONE) return;
    if (*state == PIECE_ARRIVING) claim_drop(p, a, phase, item);
    uint8_t **buffer = is_folded(a, phase) ? contribution_of(a, rank, item) : NULL;
    uint8_t *place = buffer != NULL ? *buffer : place_of(engine, a, rank, phase, item);
    if (place != NULL) memcpy(place, *data, bytes);
    else if (buffer != NULL) {
        *buffer = *data;
        *data = NULL;
    }
    *state = PIECE_DONE;
    item_arrived(engine, a, rank, phase, item, *data);
}

bool ops_deliver(pyccl_engine *engine, peer *p, pyccl_op *op, const pyccl_frame *frame, uint8_t **data) {
    attempt *a = op->attempt;
    uint64_t item;
    if (a == NULL || frame->spec_hash != a->spec_hash || pyccl_fsm_frozen(engine->fsm)) return true;
    uint8_t *state = item_state_of(a, (uint32_t)p->rank, frame, &item);
    if (state == NULL) return false;
    copy_arrived(engine, p, a, frame->phase, item, state, data, frame->length);
    return true;
}

link_verdict ops_data_begin(pyccl_engine *engine, peer *p, pyccl_conn *conn, pyccl_op *op) {
    attempt *a = op->attempt;
    const pyccl_frame *frame = &conn->frame;
    uint64_t item;
    if (a == NULL || frame->spec_hash != a->spec_hash) return LINK_GO; /* discarded */
    uint8_t *state = item_state_of(a, (uint32_t)p->rank, frame, &item);
    if (state == NULL) return LINK_REFUSE;
    if (*state == PIECE_DONE) return LINK_GO;
    link_sink sink = {.owner = a, .note = a, .piece = item};
    sink.kind = *state == PIECE_NONE ? SINK_PIECE : SINK_COPY;
    if (sink.kind == SINK_COPY) sink.dst = sink.owned = piece_alloc(engine, frame->length);
    else item_place(engine, a, (uint32_t)p->rank, frame->phase, item, frame->length, &sink);
    if (sink.dst == NULL) {
        pyccl_fsm_cancel(engine->fsm, op->cookie, PYCCL_ERR_NOMEM, engine->env.now_ns);
        engine_act(engine);
        return LINK_GO;
    }
    *state = PIECE_ARRIVING;
    conn->sink = sink;
    return LINK_GO;
}

link_verdict ops_data_end(pyccl_engine *engine, peer *p, pyccl_conn *conn) {
    attempt *a = conn->sink.note;
    const uint64_t item = conn->sink.piece;
    uint64_t found;
    uint8_t *state = item_state_of(a, (uint32_t)p->rank, &conn->frame, &found);
    PYCCL_ASSERT(state != NULL && found == item);
    if (conn->sink.kind == SINK_COPY) {
        copy_arrived(engine, p, a, conn->frame.phase, item, state, &conn->sink.owned, conn->frame.length);
        return LINK_GO;
    }
    PYCCL_ASSERT(*state == PIECE_ARRIVING);
    *state = PIECE_DONE;
    uint8_t *codes = conn->sink.owned;
    conn->sink = (link_sink){.kind = SINK_NONE};
    item_arrived(engine, a, (uint32_t)p->rank, conn->frame.phase, item, codes);
    piece_free(engine, codes, conn->frame.length);
    return LINK_GO;
}

void ops_data_cancel(pyccl_conn *conn) {
    if (conn->sink.kind != SINK_PIECE) return;
    peer *p = (peer *)conn->link;
    attempt *a = conn->sink.note;
    uint64_t item;
    uint8_t *state = item_state_of(a, (uint32_t)p->rank, &conn->frame, &item);
    PYCCL_ASSERT(state != NULL && *state == PIECE_ARRIVING);
    *state = PIECE_NONE;
}
