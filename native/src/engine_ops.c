/* engine_ops.c: attempts. An attempt is one run of one operation in one epoch: what has arrived, what has gone to whom
 * over which connection. The machine (op_fsm.c) says when one starts, stops and commits; the schedule (direct.c) says
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

static uint64_t pieces_from(const attempt *a, uint32_t phase, uint32_t rank) {
    if (phase == DIRECT_CONTRIBUTION) return direct_contributes(&a->plan, rank, a->plan.rank) ? a->own_pieces : 0;
    return direct_receives(&a->plan, rank, a->plan.rank) ? direct_pieces(&a->plan, rank) : 0;
}

/* The tables of what arrives. */
static pyccl_status attempt_tables(attempt *a) {
    const uint32_t world = a->plan.world;
    uint64_t results = 0;
    a->arrived_at = calloc(world, sizeof *a->arrived_at);
    a->slot_at = calloc(world, sizeof *a->slot_at);
    if (a->arrived_at == NULL || a->slot_at == NULL) return PYCCL_ERR_NOMEM;
    a->pieces_left = direct_result_pieces(&a->plan);
    for (uint32_t owner = 0; owner < world; owner++) {
        a->arrived_at[owner] = results;
        results += pieces_from(a, DIRECT_RESULT, owner);
        if (owner > 0 && !a->plan.swap && a->plan.kind != PYCCL_EXCHANGE) a->slot_at[owner] = a->slot_at[owner - 1] + direct_pieces(&a->plan, owner - 1);
    }
    const uint64_t contributions = direct_contributors(&a->plan, a->plan.rank) > 0 ? world * a->own_pieces : 0;
    a->arrived[DIRECT_CONTRIBUTION] = calloc(contributions + 1, 1);
    a->arrived[DIRECT_RESULT] = calloc(results + 1, 1);
    a->missing = calloc(a->own_pieces + 1, sizeof *a->missing);
    a->ready = calloc(a->own_pieces + 1, sizeof *a->ready);
    a->contribution = calloc(a->plan.kind == PYCCL_ALL_REDUCE ? contributions + 1 : 1, sizeof *a->contribution);
    if (a->arrived[0] == NULL || a->arrived[1] == NULL || a->missing == NULL || a->ready == NULL || a->contribution == NULL)
        return PYCCL_ERR_NOMEM;
    for (uint64_t piece = 0; piece < a->own_pieces; piece++)
        a->missing[piece] = (uint16_t)direct_contributors(&a->plan, a->plan.rank);
    return PYCCL_OK;
}

static pyccl_status attempt_weights(attempt *a) {
    if (a->op->args.spec.op != PYCCL_AVG) return PYCCL_OK;
    a->weights = calloc(a->plan.world, sizeof *a->weights);
    a->held = calloc(a->own_pieces + 1, sizeof *a->held);
    if (a->weights == NULL || a->held == NULL) return PYCCL_ERR_NOMEM;
    a->weights[a->plan.rank] = a->op->args.weight;
    a->weights_missing = a->plan.world - 1;
    return PYCCL_OK;
}

static pyccl_status attempt_peers(attempt *a) {
    a->peers = calloc(a->plan.world, sizeof *a->peers);
    if (a->peers == NULL) return PYCCL_ERR_NOMEM;
    for (uint32_t rank = 0; rank < a->plan.world; rank++) {
        peer_tx *t = &a->peers[rank];
        t->attempt = a;
        t->rank = rank;
        t->results = direct_receives(&a->plan, a->plan.rank, rank);
        t->contributions = direct_contributes(&a->plan, a->plan.rank, rank) ? direct_pieces(&a->plan, rank) : 0;
        const uint64_t bytes = t->contributions + (t->results ? a->own_pieces : 0);
        if (bytes == 0) continue;
        t->carrier[0] = malloc(bytes);
        if (t->carrier[0] == NULL) return PYCCL_ERR_NOMEM;
        t->carrier[1] = t->carrier[0] + t->contributions;
        memset(t->carrier[0], CARRIER_NONE, bytes);
    }
    return PYCCL_OK;
}

/* Where the result comes together: in the caller's memory, or in ours where there is none. What it overwrites there and
 * must be put back if there is no commit is saved piece by piece: see engine_fold.c. */
static pyccl_status attempt_result(pyccl_engine *engine, attempt *a) {
    const pyccl_op_args *args = &a->op->args;
    const uint64_t bytes = direct_result_bytes(&a->plan);
    const bool gather = a->plan.kind == PYCCL_ALL_GATHER;
    if (gather && args->dst != NULL && args->dst_bytes < bytes) return PYCCL_ERR_ARGUMENT;
    if (bytes == 0 || (a->plan.kind == PYCCL_BROADCAST && a->plan.root == a->plan.rank)) return PYCCL_OK;
    a->result = args->dst;
    a->past_cache = bytes >= PAST_CACHE_BYTES;
    const bool overwrites = a->plan.kind == PYCCL_BROADCAST || (!gather && args->dst == args->src);
    if (args->dst != NULL && !overwrites) return PYCCL_OK;
    a->scratch = scratch_take(engine, bytes, &a->scratch_bytes);
    if (a->scratch == NULL) return PYCCL_ERR_NOMEM;
    if (args->dst == NULL) {
        a->result = a->scratch;
        return PYCCL_OK;
    }
    a->undo = a->scratch;
    a->saved = calloc(direct_result_pieces(&a->plan), 1);
    return a->saved != NULL ? PYCCL_OK : PYCCL_ERR_NOMEM;
}

/* Codes: of our input to every piece, and of our share of the result where it goes to others. */
static pyccl_status attempt_codes(pyccl_engine *engine, attempt *a) {
    if (a->plan.codec == PYCCL_CODEC_NONE || a->plan.count == 0) return PYCCL_OK;
    const uint64_t inputs = direct_result_pieces(&a->plan), results = a->plan.swap ? 0 : a->own_pieces;
    a->code_stride = direct_piece_bytes(&a->plan, 0, 0); /* the first share is the longest */
    a->encoded = calloc(inputs, 1);
    a->codes = scratch_take(engine, (inputs + results) * a->code_stride, &a->codes_bytes);
    if (engine->tile == NULL) engine->tile = malloc(ENGINE_TILE_FLOATS * sizeof(float));
    if (a->encoded == NULL || a->codes == NULL || engine->tile == NULL) return PYCCL_ERR_NOMEM;
    a->result_codes = a->codes + inputs * a->code_stride;
    return PYCCL_OK;
}

static void attempt_free(pyccl_engine *engine, attempt *a) {
    if (a->contribution != NULL && a->plan.kind == PYCCL_ALL_REDUCE)
        for (uint64_t i = 0; i < a->plan.world * a->own_pieces; i++)
            if (a->contribution[i] != NULL)
                piece_free(engine, a->contribution[i], direct_piece_bytes(&a->plan, a->plan.rank, i % a->own_pieces));
    if (a->peers != NULL)
        for (uint32_t rank = 0; rank < a->plan.world; rank++) free(a->peers[rank].carrier[0]);
    scratch_give(engine, a->scratch, a->scratch_bytes);
    scratch_give(engine, a->codes, a->codes_bytes);
    free(a->encoded);
    free(a->saved);
    free(a->slot_at);
    free(a->weights);
    free(a->held);
    free(a->peers);
    free(a->contribution);
    free(a->missing);
    free(a->ready);
    free(a->arrived[0]);
    free(a->arrived[1]);
    free(a->arrived_at);
    free(a);
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
    direct_plan_init(&a->plan, &op->args.spec, engine->world, engine->rank, root);
    a->own_pieces = direct_pieces(&a->plan, engine->rank);
    pyccl_status rc = attempt_tables(a);
    if (rc == PYCCL_OK) rc = attempt_peers(a);
    if (rc == PYCCL_OK) rc = attempt_weights(a);
    if (rc == PYCCL_OK) rc = attempt_result(engine, a);
    if (rc == PYCCL_OK) rc = attempt_codes(engine, a);
    if (rc == PYCCL_OK) *out = a;
    else attempt_free(engine, a);
    return rc;
}

void ops_stop(pyccl_engine *engine, pyccl_op *op) {
    attempt *a = op->attempt;
    if (a == NULL) return;
    for (uint32_t rank = 0; rank < a->plan.world; rank++) {
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

/* A piece of our share is whole: it goes to everybody who needs it. */
void ops_result_ready(pyccl_engine *engine, attempt *a, uint64_t piece) {
    a->ready[a->ready_count++] = piece;
    for (uint32_t rank = 0; rank < a->plan.world; rank++)
        if (a->peers[rank].results) tx_enqueue(engine, &a->peers[rank]);
}

/* Tell the machine once the whole result is here. */
static void tell_if_whole(pyccl_engine *engine, attempt *a) {
    if (a->pieces_left > 0 || a->weights_missing > 0 || a->told) return;
    a->told = true;
    engine->tick_stale = true;
    pyccl_fsm_result(engine->fsm, a->op->cookie, a->hash, engine->env.now_ns);
}

void ops_commit(pyccl_op *op) {
    attempt *a = op->attempt;
    PYCCL_ASSERT(a != NULL && a->told);
    a->committed = true;
    if (a->plan.kind != PYCCL_ALL_GATHER || op->args.dst != NULL) return;
    op->kept = a->scratch;
    op->kept_bytes = direct_result_bytes(&a->plan);
    a->scratch = NULL;
}

/* ---- pieces that need nothing from the network ---- */

/* At most `budget` pieces of one attempt. */
static void attempt_work(pyccl_engine *engine, attempt *a, int budget) {
    while (a->local_share < a->plan.world && budget > 0) {
        if (!direct_is_local(&a->plan, a->local_share, a->plan.rank) ||
            a->local_piece >= direct_pieces(&a->plan, a->local_share)) {
            a->local_share++;
            a->local_piece = 0;
            continue;
        }
        fold_local(engine, a, a->local_share, a->local_piece++);
        budget--;
    }
    if (a->has_local && a->local_share == a->plan.world) {
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
    op->epoch_number = engine->epoch_number;
    memcpy(op->epoch_id, engine->epoch_id, sizeof op->epoch_id);
    a->prev = engine->attempts_last;
    if (a->prev != NULL) a->prev->next = a;
    else engine->attempts = a;
    engine->attempts_last = a;
    for (uint32_t rank = 0; rank < a->plan.world; rank++)
        if (a->peers[rank].contributions > 0) tx_enqueue(engine, &a->peers[rank]);
    a->has_local = true;
    engine->local_work++;
    early_replay(engine, op, seq);
    attempt_work(engine, a, WORK_PIECES);
}

/* ---- sending ---- */

static bool tx_find_lost(const peer_tx *t, uint32_t *phase, uint64_t *piece) {
    const uint64_t pieces[2] = {t->contributions, t->results ? t->attempt->own_pieces : 0};
    for (*phase = 2; (*phase)-- > 0;) {
        const uint8_t *found = pieces[*phase] > 0 ? memchr(t->carrier[*phase], CARRIER_LOST, pieces[*phase]) : NULL;
        if (found == NULL) continue;
        *piece = (uint64_t)(found - t->carrier[*phase]);
        return true;
    }
    return false;
}

/* On a near link contributions keep step with what comes back for them: our input to a piece is still in the cache when
 * the result overwrites it, and what is under way fits there too. */
static bool tx_too_far_ahead(const pyccl_engine *engine, const peer_tx *t) {
    const peer *p = engine->ranks[t->rank];
    if (t->attempt->plan.kind != PYCCL_ALL_REDUCE || p == NULL || !p->link.near) return false;
    return t->contribution_next >= t->returned + NEAR_AHEAD_PIECES;
}

/* What goes next to this rank: what was lost, then results (others wait for them), then contributions. */
static bool tx_pick(const pyccl_engine *engine, const peer_tx *t, uint32_t *phase, uint64_t *piece) {
    if (t->lost > 0) {
        const bool found = tx_find_lost(t, phase, piece);
        PYCCL_ASSERT(found);
        return true;
    }
    *phase = DIRECT_RESULT;
    if (t->results && t->result_next < t->attempt->ready_count) {
        *piece = t->attempt->ready[t->result_next];
        return true;
    }
    *phase = DIRECT_CONTRIBUTION;
    *piece = t->contribution_next;
    return t->contribution_next < t->contributions && !tx_too_far_ahead(engine, t);
}

static void tx_take(pyccl_engine *engine, peer_tx *t, uint32_t phase, uint64_t piece, const pyccl_conn *conn, link_load *load) {
    attempt *a = t->attempt;
    const uint32_t owner = phase == DIRECT_RESULT ? a->plan.rank : t->rank;
    uint8_t *carrier = &t->carrier[phase][piece];
    if (*carrier == CARRIER_LOST) t->lost--;
    else if (phase == DIRECT_RESULT) t->result_next++;
    else t->contribution_next++;
    *carrier = (uint8_t)conn->index;
    load->frame = (pyccl_frame){.type = PYCCL_FRAME_DATA, .phase = (uint8_t)phase, .space = a->op->args.spec.space,
                                .seq = a->seq, .tag = a->op->args.spec.tag, .spec_hash = a->spec_hash,
                                .length = direct_piece_bytes(&a->plan, owner, piece),
                                .offset = direct_piece_offset(&a->plan, piece)};
    engine_frame_stamp(engine, &load->frame);
    load->data = fold_source(a, phase, t->rank, piece);
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
        uint64_t piece;
        if (!tx_pick(engine, t, &phase, &piece)) {
            tx_unqueue(t);
            continue;
        }
        const uint32_t owner = phase == DIRECT_RESULT ? t->attempt->plan.rank : t->rank;
        const uint32_t bytes = eager_cost(direct_piece_bytes(&t->attempt->plan, owner, piece));
        if (!t->open && t->carrier[phase][piece] != CARRIER_LOST) {
            if (p->eager_used + bytes > PYCCL_EAGER_MAX) {
                tx_unqueue(t);
                t->waits = true;
                p->tx_waiting++;
                continue;
            }
            p->eager_used += bytes;
            t->eager_bytes += bytes;
        }
        tx_take(engine, t, phase, piece, conn, load);
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
        const uint64_t pieces[2] = {t->contributions, t->results ? a->own_pieces : 0};
        for (int phase = 0; phase < 2; phase++)
            for (uint64_t piece = 0; piece < pieces[phase]; piece++) {
                if (t->carrier[phase][piece] != conn_index) continue;
                t->carrier[phase][piece] = CARRIER_LOST;
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

/* The piece a DATA frame carries; NULL: it is none that this peer may send us. */
static uint8_t *piece_state_of(const attempt *a, uint32_t rank, const pyccl_frame *frame, uint64_t *piece) {
    const uint32_t owner = frame->phase == DIRECT_RESULT ? rank : a->plan.rank;
    if (pieces_from(a, frame->phase, rank) == 0) return NULL;
    if (!direct_piece_find(&a->plan, owner, frame->offset, frame->length, piece)) return NULL;
    if (frame->phase == DIRECT_RESULT) return &a->arrived[1][a->arrived_at[rank] + *piece];
    return &a->arrived[0][rank * a->own_pieces + *piece];
}

static bool is_folded(const attempt *a, uint32_t phase) {
    return phase == DIRECT_CONTRIBUTION && a->plan.kind == PYCCL_ALL_REDUCE;
}

static bool is_coded_result(const attempt *a, uint32_t phase) {
    return phase == DIRECT_RESULT && a->plan.codec != PYCCL_CODEC_NONE;
}

/* Where a piece belongs; what will be folded or decoded gets a buffer, results that are decoded at once one that the
 * sink owns. sink->dst NULL: no memory. */
static void piece_place(pyccl_engine *engine, attempt *a, uint32_t rank, uint32_t phase, uint64_t piece, link_sink *sink) {
    const uint32_t owner = phase == DIRECT_RESULT ? rank : a->plan.rank;
    const uint32_t bytes = direct_piece_bytes(&a->plan, owner, piece);
    if (is_coded_result(a, phase)) sink->dst = sink->owned = piece_alloc(engine, bytes);
    else if (is_folded(a, phase)) {
        uint8_t **place = &a->contribution[rank * a->own_pieces + piece];
        if (*place == NULL) *place = piece_alloc(engine, bytes);
        sink->dst = *place;
    } else sink->dst = fold_place(engine, a, owner, piece);
}

/* codes: the piece, where it must be decoded. */
static void piece_arrived(pyccl_engine *engine, attempt *a, uint32_t rank, uint32_t phase, uint64_t piece, const uint8_t *codes) {
    const uint32_t owner = phase == DIRECT_RESULT ? rank : a->plan.rank;
    a->op->rx_bytes += direct_piece_bytes(&a->plan, owner, piece);
    ops_moved(engine, a);
    peer_tx *t = &a->peers[rank];
    if (phase == DIRECT_RESULT || a->plan.swap) t->returned++;
    if (t->contribution_next < t->contributions) tx_enqueue(engine, t);
    if (is_folded(a, phase)) fold_contribution(engine, a, piece);
    else fold_result(engine, a, owner, piece, codes);
    tell_if_whole(engine, a);
}

/* A copy is whole while the first is still arriving: that connection gives up its claim. */
static void claim_drop(peer *p, const attempt *a, uint32_t phase, uint64_t piece) {
    for (uint32_t i = 0; i < PYCCL_CONNS_MAX; i++) {
        pyccl_conn *conn = p->link.conns[i];
        if (conn == NULL || conn->sink.kind != SINK_PIECE || conn->sink.note != a) continue;
        if (conn->frame.phase == phase && conn->sink.piece == piece) link_sink_drop(conn);
    }
}

static void copy_arrived(pyccl_engine *engine, peer *p, attempt *a, uint32_t phase, uint64_t piece, uint8_t *state,
                         uint8_t **data, uint32_t bytes) {
    const uint32_t rank = (uint32_t)p->rank;
    if (*state == PIECE_DONE) return;
    if (*state == PIECE_ARRIVING) claim_drop(p, a, phase, piece);
    uint8_t **place = is_folded(a, phase) ? &a->contribution[rank * a->own_pieces + piece] : NULL;
    if (place != NULL && *place == NULL) {
        *place = *data;
        *data = NULL;
    } else if (place != NULL) memcpy(*place, *data, bytes);
    else if (!is_coded_result(a, phase))
        memcpy(fold_place(engine, a, phase == DIRECT_RESULT ? rank : a->plan.rank, piece), *data, bytes);
    *state = PIECE_DONE;
    piece_arrived(engine, a, rank, phase, piece, *data);
}

bool ops_deliver(pyccl_engine *engine, peer *p, pyccl_op *op, const pyccl_frame *frame, uint8_t **data) {
    attempt *a = op->attempt;
    uint64_t piece;
    if (a == NULL || frame->spec_hash != a->spec_hash || pyccl_fsm_frozen(engine->fsm)) return true;
    uint8_t *state = piece_state_of(a, (uint32_t)p->rank, frame, &piece);
    if (state == NULL) return false;
    copy_arrived(engine, p, a, frame->phase, piece, state, data, frame->length);
    return true;
}

link_verdict ops_data_begin(pyccl_engine *engine, peer *p, pyccl_conn *conn, pyccl_op *op) {
    attempt *a = op->attempt;
    const pyccl_frame *frame = &conn->frame;
    uint64_t piece;
    if (a == NULL || frame->spec_hash != a->spec_hash) return LINK_GO; /* discarded */
    uint8_t *state = piece_state_of(a, (uint32_t)p->rank, frame, &piece);
    if (state == NULL) return LINK_REFUSE;
    if (*state == PIECE_DONE) return LINK_GO;
    link_sink sink = {.owner = a, .note = a, .piece = piece};
    sink.kind = *state == PIECE_NONE ? SINK_PIECE : SINK_COPY;
    if (sink.kind == SINK_COPY) sink.dst = sink.owned = piece_alloc(engine, frame->length);
    else piece_place(engine, a, (uint32_t)p->rank, frame->phase, piece, &sink);
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
    const uint64_t piece = conn->sink.piece;
    uint64_t found;
    uint8_t *state = piece_state_of(a, (uint32_t)p->rank, &conn->frame, &found);
    PYCCL_ASSERT(state != NULL && found == piece);
    if (conn->sink.kind == SINK_COPY) {
        copy_arrived(engine, p, a, conn->frame.phase, piece, state, &conn->sink.owned, conn->frame.length);
        return LINK_GO;
    }
    PYCCL_ASSERT(*state == PIECE_ARRIVING);
    *state = PIECE_DONE;
    uint8_t *codes = conn->sink.owned;
    conn->sink = (link_sink){.kind = SINK_NONE};
    piece_arrived(engine, a, (uint32_t)p->rank, conn->frame.phase, piece, codes);
    piece_free(engine, codes, conn->frame.length);
    return LINK_GO;
}

void ops_data_cancel(pyccl_conn *conn) {
    if (conn->sink.kind != SINK_PIECE) return;
    peer *p = (peer *)conn->link;
    attempt *a = conn->sink.note;
    uint64_t piece;
    uint8_t *state = piece_state_of(a, (uint32_t)p->rank, &conn->frame, &piece);
    PYCCL_ASSERT(state != NULL && *state == PIECE_ARRIVING);
    *state = PIECE_NONE;
}
