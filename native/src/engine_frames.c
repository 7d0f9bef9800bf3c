/* engine_frames.c: frames and epochs: what comes in is judged by the gate of the operation machine and handed on, what
 * the machine wants is carried out.
 *
 * A frame is judged twice: when its header is here, to say where its payload goes, and when it is whole, because the
 * epoch may have changed or frozen in between. Between two frames all actions of the machine have been carried out.
 * Threads: the engine's thread only.                               Spec: proto/wire.md 3, 5 */
#include <stdlib.h>
#include <string.h>

#include "engine.h"

void engine_frame_stamp(const pyccl_engine *engine, pyccl_frame *frame) {
    frame->epoch_number = engine->epoch_number;
    frame->epoch_tag = engine->epoch_tag;
}

void engine_sink_cancel(pyccl_engine *engine, pyccl_conn *conn) {
    switch (conn->sink.kind) {
    case SINK_PIECE:
    case SINK_COPY: ops_data_cancel(conn); break;
    case SINK_EARLY: early_cancel(engine, conn); break;
    case SINK_FETCH: state_data_cancel(conn); break;
    default: break;
    }
    link_sink_drop(conn);
}

static pyccl_gate gate(const pyccl_engine *engine, const pyccl_conn *conn) {
    const peer *p = (const peer *)conn->link;
    return pyccl_fsm_gate(engine->fsm, conn->frame.epoch_number, conn->frame.epoch_tag, p->rank >= 0);
}

/* ---- in ---- */

static link_verdict data_begin(pyccl_engine *engine, peer *p, pyccl_conn *conn) {
    const pyccl_frame *frame = &conn->frame;
    uint64_t cookie = 0;
    switch (pyccl_fsm_data(engine->fsm, (uint32_t)p->rank, frame->space, frame->tag, frame->seq, &cookie)) {
    case PYCCL_GATE_PASS: break;
    case PYCCL_GATE_REFUSE: return LINK_REFUSE;
    default: return LINK_GO;
    }
    if (cookie == 0) return early_begin(engine, p, conn);
    pyccl_op *op = engine_op(engine, cookie);
    return op != NULL ? ops_data_begin(engine, p, conn, op) : LINK_GO;
}

static link_verdict frame_begin(void *ctx, pyccl_conn *conn) {
    pyccl_engine *engine = ctx;
    peer *p = (peer *)conn->link;
    if (conn->frame.type == PYCCL_FRAME_HEARTBEAT) return LINK_GO;
    switch (gate(engine, conn)) {
    case PYCCL_GATE_PASS: break;
    case PYCCL_GATE_LATER: return LINK_PAUSE;
    case PYCCL_GATE_REFUSE: return LINK_REFUSE;
    default: return LINK_GO;
    }
    switch (conn->frame.type) {
    case PYCCL_FRAME_DATA: return data_begin(engine, p, conn);
    case PYCCL_FRAME_STATE_DATA: return state_data_begin(engine, p, conn);
    case PYCCL_FRAME_STATE_PACKED: return state_packed_begin(p, conn);
    default:
        conn->sink.kind = SINK_CONTROL;
        if (conn->frame.length > 0) conn->sink.dst = conn->small;
        PYCCL_ASSERT(conn->frame.length <= sizeof conn->small);
        return LINK_GO;
    }
}

static link_verdict message_end(pyccl_engine *engine, const peer *p, const pyccl_conn *conn) {
    const pyccl_frame *frame = &conn->frame;
    pyccl_message message = {.type = frame->type, .space = frame->space, .rank = (uint32_t)p->rank, .tag = frame->tag,
                             .seq = frame->seq, .value = frame->value};
    if (frame->type == PYCCL_FRAME_OPEN) {
        memcpy(&message.weight, &frame->offset, sizeof message.weight);
        if (pyccl_spec_decode_untrusted(conn->small, &message.spec) != PYCCL_OK) return LINK_REFUSE;
        if (message.spec.space != frame->space || message.spec.tag != frame->tag) return LINK_REFUSE;
        if (message.spec.op != PYCCL_AVG && message.weight != 1.0) return LINK_REFUSE;
        if (frame->phase != 0 && !message.spec.guard) return LINK_REFUSE;
        message.complaint = frame->phase;
    }
    if (frame->type == PYCCL_FRAME_DONE) message.complaint = (uint32_t)frame->offset;
    engine->tick_stale = true;
    return pyccl_fsm_receive(engine->fsm, &message, engine->env.now_ns) == PYCCL_OK ? LINK_GO : LINK_REFUSE;
}

static link_verdict early_piece_end(pyccl_engine *engine, peer *p, pyccl_conn *conn) {
    const pyccl_frame *frame = &conn->frame;
    uint64_t cookie = 0;
    const pyccl_gate judged = pyccl_fsm_data(engine->fsm, (uint32_t)p->rank, frame->space, frame->tag, frame->seq, &cookie);
    if (judged == PYCCL_GATE_PASS) return early_end(engine, p, conn, cookie != 0 ? engine_op(engine, cookie) : NULL);
    engine_sink_cancel(engine, conn); /* it ended here, or we are frozen */
    return LINK_GO;
}

static link_verdict frame_whole(pyccl_engine *engine, peer *p, pyccl_conn *conn) {
    if (gate(engine, conn) != PYCCL_GATE_PASS) {
        engine_sink_cancel(engine, conn);
        return LINK_GO;
    }
    switch (conn->sink.kind) {
    case SINK_PIECE:
    case SINK_COPY:
        if (!pyccl_fsm_frozen(engine->fsm)) return ops_data_end(engine, p, conn);
        engine_sink_cancel(engine, conn);
        return LINK_GO;
    case SINK_EARLY: return early_piece_end(engine, p, conn);
    case SINK_FETCH:
        state_data_end(engine, p, conn);
        return LINK_GO;
    default: break;
    }
    PYCCL_ASSERT(conn->sink.kind == SINK_CONTROL);
    if (p->link.control_count > CONTROL_WAITING_MAX) return LINK_REFUSE; /* it asks and does not read our answers */
    if (conn->frame.type == PYCCL_FRAME_STATE_ASK) return state_asked(engine, p, &conn->frame);
    if (conn->frame.type != PYCCL_FRAME_STATE_NONE) return message_end(engine, p, conn);
    state_none(engine, p, &conn->frame);
    return LINK_GO;
}

static link_verdict frame_end(void *ctx, pyccl_conn *conn) {
    pyccl_engine *engine = ctx;
    if (conn->sink.kind == SINK_NONE) return LINK_GO;
    const link_verdict verdict = frame_whole(engine, (peer *)conn->link, conn);
    engine_act(engine);
    return verdict;
}

static void refused(void *ctx, pyccl_link *link) { engine_refuse(ctx, (peer *)link); }

/* ---- out ---- */

static bool load_next(void *ctx, pyccl_link *link, pyccl_conn *conn, link_load *load) {
    pyccl_engine *engine = ctx;
    peer *p = (peer *)link;
    p->state_turn = !p->state_turn;
    if (p->state_turn && state_load_next(engine, p, load)) return true;
    if (ops_load_next(engine, p, conn, load)) return true;
    return !p->state_turn && state_load_next(engine, p, load);
}

static void moved(void *ctx, const void *owner) {
    if (*(const owner_kind *)owner == OWNER_ATTEMPT) ops_moved(ctx, (attempt *)(uintptr_t)owner);
    if (*(const owner_kind *)owner == OWNER_FETCH) state_moved(ctx, owner);
}

static void wants_conns(void *ctx, pyccl_link *link) {
    const pyccl_event event = {.type = PYCCL_EVENT_LINK_WANTS, .slot = link->slot, .count = link->lanes.use};
    engine_event(ctx, &event);
}

const link_hooks ENGINE_HOOKS = {frame_begin, frame_end, refused, load_next, wants_conns, moved};

static void send_message(pyccl_engine *engine, const pyccl_message *message) {
    peer *p = engine->ranks[message->rank];
    if (p == NULL) return;
    if (p->link.conn_count == 0) { /* the machine repeats it when the link is there again */
        p->reset_owed = true;
        return;
    }
    const bool open = message->type == PYCCL_FRAME_OPEN;
    pyccl_frame frame = {.type = message->type, .space = message->space, .seq = message->seq, .tag = message->tag,
                         .value = message->value, .length = open ? PYCCL_SPEC_SIZE : 0};
    if (open) {
        memcpy(&frame.offset, &message->weight, sizeof frame.offset);
        frame.phase = (uint8_t)message->complaint;
    } else frame.offset = message->complaint;
    engine_frame_stamp(engine, &frame);
    link_control_push(&p->link, &frame, open ? &message->spec : NULL);
}

static void tell_differs(pyccl_engine *engine, const pyccl_action *action, const pyccl_op *op) {
    const peer *p = engine->ranks[action->rank];
    if (p == NULL) return;
    const pyccl_event event = {.type = PYCCL_EVENT_DIFFERS, .slot = p->link.slot, .value = engine->epoch_number, .seq = action->message.seq,
                               .tag = pyccl_channel(action->message.space, action->message.tag, engine->rank, action->rank),
                               .space = action->message.space, .mine = op->args.spec, .theirs = action->message.spec};
    engine_event(engine, &event);
}

/* Actions that concern one operation of ours. */
static void act_on_op(pyccl_engine *engine, const pyccl_action *action) {
    pyccl_op *op = engine_op(engine, action->cookie);
    if (op == NULL) return;
    switch (action->type) {
    case PYCCL_ACT_START: ops_start(engine, op, action->seq); break;
    case PYCCL_ACT_STOP: ops_stop(engine, op); break;
    case PYCCL_ACT_PEER_OPEN: ops_peer_open(engine, op, action->rank, action->message.weight); break;
    case PYCCL_ACT_COMMIT:
        ops_commit(op);
        engine_op_end(op, PYCCL_OK, action->attempts, action->peer);
        break;
    case PYCCL_ACT_FAIL: engine_op_end(op, action->status, action->attempts, action->peer); break;
    case PYCCL_ACT_DIFFERS: tell_differs(engine, action, op); break;
    case PYCCL_ACT_RESEND: break; /* what a connection lost went back to the queue when it ended: ops_conn_lost */
    default: PYCCL_ASSERT(!"an action that is not known");
    }
}

static void act_once(pyccl_engine *engine, const pyccl_action *action) {
    pyccl_event event = {.slot = UINT32_MAX};
    switch (action->type) {
    case PYCCL_ACT_SEND: send_message(engine, &action->message); break;
    case PYCCL_ACT_SETTLE:
        event.type = PYCCL_EVENT_SETTLE;
        engine_event(engine, &event);
        break;
    case PYCCL_ACT_LEAVE:
        event.type = PYCCL_EVENT_LEAVE;
        engine_event(engine, &event);
        engine_forget_epoch(engine);
        break;
    default: act_on_op(engine, action);
    }
}

void engine_act(pyccl_engine *engine) {
    pyccl_action action;
    if (engine->acting) return;
    engine->acting = true;
    while (pyccl_fsm_next(engine->fsm, &action)) act_once(engine, &action);
    engine->acting = false;
    if (!engine->cut || engine->drained_told || !pyccl_fsm_drained(engine->fsm)) return;
    engine->drained_told = true;
    const pyccl_event event = {.type = PYCCL_EVENT_DRAINED, .slot = UINT32_MAX, .value = engine->cuts};
    engine_event(engine, &event);
}

/* ---- epochs ---- */

void engine_forget_epoch(pyccl_engine *engine) {
    for (peer *p = engine->peers; p != NULL; p = p->next) {
        for (uint32_t i = 0; i < PYCCL_CONNS_MAX; i++)
            if (p->link.conns[i] != NULL) engine_sink_cancel(engine, p->link.conns[i]);
        link_control_clear(&p->link);
        state_clear(engine, p);
        ops_forget_peer(engine, p);
        p->eager_used = 0;
        p->rank = -1;
    }
    early_clear(engine);
    memset(engine->ranks, 0, sizeof engine->ranks);
    engine->in_epoch = engine->cut = engine->drained_told = false;
    engine->world = 0;
}

/* Takes `plan`. */
static void adopt(pyccl_engine *engine, const pyccl_epoch *epoch, shared_plan *plan) {
    plan_release(engine->plan);
    engine->plan = plan;
    engine->in_epoch = true;
    engine->moved_ns = engine->env.now_ns;
    engine->world = epoch->world;
    engine->rank = epoch->rank;
    engine->epoch_number = epoch->number;
    memcpy(engine->epoch_id, epoch->id, sizeof engine->epoch_id);
    engine->epoch_tag = 0;
    for (int i = 7; i >= 0; i--) engine->epoch_tag = engine->epoch_tag << 8 | epoch->id[i];
    memcpy(engine->members, epoch->members, (size_t)epoch->world * PYCCL_ID_SIZE);
    for (uint32_t rank = 0; rank < epoch->world; rank++) {
        if (rank == epoch->rank) continue;
        peer *p = engine_peer_get(engine, engine->members[rank]);
        PYCCL_ASSERT(p != NULL);
        p->rank = (int32_t)rank;
        engine->ranks[rank] = p;
        if (p->silent) engine_silent(engine, p); /* who was told before may have ignored it: it was no member */
    }
}

static void resume_paused(pyccl_engine *engine) {
    for (peer *p = engine->peers; p != NULL; p = p->next)
        for (uint32_t i = 0; i < PYCCL_CONNS_MAX; i++)
            if (p->link.conns[i] != NULL && p->link.conns[i]->paused) link_conn_resume(p->link.conns[i]);
}

pyccl_status engine_enter_epoch(pyccl_engine *engine, const pyccl_epoch *epoch, const pyccl_op_verdict *verdicts, size_t count) {
    engine_act(engine);
    if (epoch->world < 1 || epoch->world > PYCCL_WORLD_MAX || epoch->rank >= epoch->world || epoch->members == NULL ||
        memcmp(epoch->members + (size_t)epoch->rank * PYCCL_ID_SIZE, engine->options.self_id, PYCCL_ID_SIZE) != 0)
        return PYCCL_ERR_ARGUMENT;
    shared_plan *plan = calloc(1, sizeof *plan);
    if (plan == NULL) return PYCCL_ERR_NOMEM;
    plan->users = 1;
    pyccl_status rc = epoch_plan_init(&plan->plan, epoch->plan, epoch->world);
    if (rc == PYCCL_OK) rc = pyccl_fsm_epoch(engine->fsm, epoch, verdicts, count, engine->env.now_ns);
    if (rc != PYCCL_OK) {
        plan_release(plan);
        return rc;
    }
    engine_forget_epoch(engine);
    adopt(engine, epoch, plan);
    for (peer *p = engine->peers; p != NULL; p = p->next) link_enter(&p->link, epoch->number, epoch->id);
    engine->tick_stale = true;
    engine_act(engine);
    resume_paused(engine);
    return PYCCL_OK;
}
