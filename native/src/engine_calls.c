/* engine_calls.c: the public functions that the engine's thread carries out while the caller waits: links, the pulse,
 * and the operation machine as the control plane sees it.
 *
 * Each is a struct that starts with a command and lives on the caller's stack until the thread has run it.
 * Threads: pyccl_* from any; run_* on the engine's thread.         Spec: pyccl.h */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "engine.h"

/* ---- links, for the caller ---- */

typedef struct peer_command {
    command command;
    const uint8_t *id;
    uint32_t slot, conns;
    int fd;
    const pyccl_conn_keys *keys;     /* NULL: plain */
    int error;                       /* errno of ERR_OS */
    pyccl_link_stats *stats;
} peer_command;

/* A peer that is added again in the middle of its epoch takes its place as member again. */
static void peer_rejoin(pyccl_engine *engine, peer *p) {
    for (uint32_t rank = 0; engine->in_epoch && rank < engine->world; rank++) {
        if (rank == engine->rank || memcmp(engine->members[rank], p->link.id, PYCCL_ID_SIZE) != 0) continue;
        p->rank = (int32_t)rank;
        engine->ranks[rank] = p;
        p->eager_used = PYCCL_EAGER_MAX; /* what it still holds of ours is not known */
        ops_requeue(engine, p);
    }
}

static void run_peer_add(pyccl_engine *engine, command *c) {
    peer_command *wanted = (peer_command *)c;
    const uint32_t slots = engine->slot_count;
    peer *p = engine_peer_get(engine, wanted->id);
    c->status = p != NULL ? PYCCL_OK : PYCCL_ERR_NOMEM;
    if (p == NULL) return;
    if (engine->slot_count > slots) peer_rejoin(engine, p);
    wanted->slot = p->link.slot;
}

pyccl_status pyccl_engine_peer_add(pyccl_engine *engine, const uint8_t id[16], uint32_t *slot) {
    peer_command c = {.command = {.run = run_peer_add}, .id = id};
    *slot = UINT32_MAX;
    if (memcmp(id, engine->options.self_id, PYCCL_ID_SIZE) == 0) return PYCCL_ERR_ARGUMENT;
    engine_run(engine, &c.command);
    if (c.command.status == PYCCL_OK) *slot = c.slot;
    return c.command.status;
}

static void run_peer_remove(pyccl_engine *engine, command *c) {
    peer *p = engine_peer(engine, ((peer_command *)c)->slot);
    c->status = p != NULL ? PYCCL_OK : PYCCL_ERR_ARGUMENT;
    if (p == NULL) return;
    engine_close_links(engine, p);
    ops_forget_peer(engine, p);
    early_clear_peer(engine, p);
    if (p->rank >= 0) engine->ranks[p->rank] = NULL;
    peer **at = &engine->peers;
    while (*at != p) at = &(*at)->next;
    *at = p->next;
    engine->slots[p->link.slot] = NULL;
    link_bury(&engine->env); /* its connections point to it; commands run when no batch of events is open */
    link_fini(&p->link);
    state_drop_asks(p);
    free(p->asks);
    free(p);
}

pyccl_status pyccl_engine_peer_remove(pyccl_engine *engine, uint32_t slot) {
    peer_command c = {.command = {.run = run_peer_remove}, .slot = slot};
    engine_run(engine, &c.command);
    return c.command.status;
}

static void check_within(pyccl_engine *engine, int64_t ns) {
    if (engine->check_ns > engine->env.now_ns + ns) engine->check_ns = engine->env.now_ns + ns;
}

/* Nothing comes over them, but a new one shook hands: their line is gone, and what stands in them would wait for minutes. Unless the
 * line, or the peer, has just come back. */
static void hang_up_silent(pyccl_engine *engine, peer *p, const pyccl_conn *fresh) {
    for (uint32_t i = 0; i < PYCCL_CONNS_MAX; i++)
        if (p->link.conns[i] != NULL && p->link.conns[i] != fresh && link_conn_has_unread(p->link.conns[i])) return;
    for (uint32_t i = 0; i < PYCCL_CONNS_MAX; i++)
        if (p->link.conns[i] != NULL && p->link.conns[i] != fresh) engine_hang_up(engine, p->link.conns[i]);
}

static void run_conn_add(pyccl_engine *engine, command *c) {
    peer_command *wanted = (peer_command *)c;
    peer *p = engine_peer(engine, wanted->slot);
    pyccl_conn *conn = NULL;
    c->status = p != NULL ? link_conn_add(&p->link, wanted->fd, wanted->keys, &conn) : PYCCL_ERR_ARGUMENT;
    wanted->error = errno;
    if (p != NULL && p->silent && (c->status == PYCCL_OK || c->status == PYCCL_ERR_LIMIT))
        hang_up_silent(engine, p, conn); /* for want of room, too: the next one finds some */
    if (c->status != PYCCL_OK) return;
    if (engine->in_epoch) link_conn_enter(conn, engine->epoch_number, engine->epoch_id);
    ops_requeue(engine, p); /* a link that is not near any more holds nothing back */
    check_within(engine, engine->options.heartbeat_ns);
    engine_heard(engine, p); /* it shook hands just now; should it fall silent again, that is told again */
    if (!p->reset_owed) return;
    p->reset_owed = false;
    if (p->rank < 0) return;
    pyccl_fsm_link_reset(engine->fsm, (uint32_t)p->rank, engine->env.now_ns);
}

static pyccl_status conn_add(pyccl_engine *engine, uint32_t slot, int fd, const pyccl_conn_keys *keys) {
    peer_command c = {.command = {.run = run_conn_add}, .slot = slot, .fd = fd, .keys = keys};
    engine_run(engine, &c.command);
    if (c.command.status == PYCCL_OK) return PYCCL_OK;
    if (fd >= 0) (void)close(fd);
    if (c.command.status == PYCCL_ERR_OS) errno = c.error;
    return c.command.status;
}

pyccl_status pyccl_engine_conn_add(pyccl_engine *engine, uint32_t slot, int fd) { return conn_add(engine, slot, fd, NULL); }

static bool is_known(const pyccl_conn_keys *keys) {
    return (keys->cipher == PYCCL_CIPHER_AES_256_GCM || keys->cipher == PYCCL_CIPHER_CHACHA20_POLY1305) && keys->dialed <= 1;
}

pyccl_status pyccl_engine_conn_add_sealed(pyccl_engine *engine, uint32_t slot, int fd, const pyccl_conn_keys *keys) {
    if (is_known(keys)) return conn_add(engine, slot, fd, keys);
    if (fd >= 0) (void)close(fd);
    return PYCCL_ERR_ARGUMENT;
}

static void run_pulse(pyccl_engine *engine, command *c) {
    peer_command *wanted = (peer_command *)c;
    c->status = engine_pulse_open(engine, wanted->fd, wanted->keys);
    wanted->error = errno;
}

pyccl_status pyccl_engine_pulse(pyccl_engine *engine, int fd, const pyccl_conn_keys *keys) {
    peer_command c = {.command = {.run = run_pulse}, .fd = fd, .keys = keys};
    if (keys != NULL && !is_known(keys)) c.command.status = PYCCL_ERR_ARGUMENT;
    else engine_run(engine, &c.command);
    if (c.command.status == PYCCL_OK) return PYCCL_OK;
    if (fd >= 0) (void)close(fd);
    if (c.command.status == PYCCL_ERR_OS) errno = c.error;
    return c.command.status;
}

static void run_link_use(pyccl_engine *engine, command *c) {
    const peer_command *wanted = (const peer_command *)c;
    peer *p = engine_peer(engine, wanted->slot);
    c->status = p != NULL ? PYCCL_OK : PYCCL_ERR_ARGUMENT;
    if (p != NULL) link_use(&p->link, wanted->conns);
}

pyccl_status pyccl_engine_link_use(pyccl_engine *engine, uint32_t slot, uint32_t conns) {
    peer_command c = {.command = {.run = run_link_use}, .slot = slot, .conns = conns};
    if (conns > PYCCL_CONNS_MAX) return PYCCL_ERR_ARGUMENT;
    engine_run(engine, &c.command);
    return c.command.status;
}

static void run_link_stats(pyccl_engine *engine, command *c) {
    const peer_command *wanted = (const peer_command *)c;
    const peer *p = engine_peer(engine, wanted->slot);
    c->status = p != NULL ? PYCCL_OK : PYCCL_ERR_ARGUMENT;
    if (p == NULL) return;
    *wanted->stats = (pyccl_link_stats){.tx_bytes = p->link.tx_bytes, .rx_bytes = p->link.rx_bytes, .conns = p->link.conn_count,
                                        .lanes = p->link.lanes.use, .rtt_ns = p->link.rtt_ns, .busy_bytes_s = (uint64_t)p->link.lanes.rate,
                                        .full = pace_is_found(&p->link.pace), .delivered_bytes = link_delivered(&p->link)};
    for (uint32_t i = 0; i < engine->slot_count; i++) {
        const peer *other = engine->slots[i];
        if (other != NULL) wanted->stats->moved_bytes += other->link.tx_bytes + other->link.rx_bytes;
    }
    struct timespec used;
    if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used) != 0) {
        c->status = PYCCL_ERR_OS;
        return;
    }
    wanted->stats->cpu_ns = used.tv_sec * INT64_C(1000000000) + used.tv_nsec;
}

pyccl_status pyccl_engine_link_stats(pyccl_engine *engine, uint32_t slot, pyccl_link_stats *out) {
    peer_command c = {.command = {.run = run_link_stats}, .slot = slot, .stats = out};
    memset(out, 0, sizeof *out);
    engine_run(engine, &c.command);
    return c.command.status;
}

/* ---- the machine, for the caller ---- */

static void run_end(pyccl_engine *engine, command *c) {
    pyccl_fsm_end(engine->fsm, ((why_command *)c)->why);
    engine->tick_stale = true;
    engine_act(engine);
    engine_forget_epoch(engine);
}

pyccl_status pyccl_engine_end(pyccl_engine *engine, pyccl_status why) {
    why_command c = {.command = {.run = run_end}, .why = why};
    if (why >= 0) return PYCCL_ERR_ARGUMENT;
    engine_run(engine, &c.command);
    return c.command.status;
}


typedef struct fsm_command {
    command command;
    void *out;
    size_t cap, count;
    const pyccl_epoch *epoch;
    const pyccl_op_verdict *verdicts;
    const pyccl_op_count *cut;
    size_t cuts;
    int open, behind, below;
    uint32_t waiters;
    int64_t quiet_ns;
} fsm_command;

static void run_freeze(pyccl_engine *engine, command *c) {
    fsm_command *f = (fsm_command *)c;
    engine->tick_stale = true;
    c->status = pyccl_fsm_freeze(engine->fsm, engine->env.now_ns);
    f->count = pyccl_fsm_report(engine->fsm, f->out, f->cap);
}

pyccl_status pyccl_engine_freeze(pyccl_engine *engine, pyccl_op_report *out, size_t cap, size_t *count) {
    fsm_command c = {.command = {.run = run_freeze}, .out = out, .cap = cap};
    engine_run(engine, &c.command);
    *count = c.count;
    return c.command.status;
}

static void run_epoch(pyccl_engine *engine, command *c) {
    const fsm_command *f = (const fsm_command *)c;
    c->status = engine_enter_epoch(engine, f->epoch, f->verdicts, f->count);
}

pyccl_status pyccl_engine_epoch(pyccl_engine *engine, const pyccl_epoch *epoch, const pyccl_op_verdict *verdicts, size_t count) {
    fsm_command c = {.command = {.run = run_epoch}, .epoch = epoch, .verdicts = verdicts, .count = count};
    engine_run(engine, &c.command);
    return c.command.status;
}

static void run_counts(pyccl_engine *engine, command *c) {
    fsm_command *f = (fsm_command *)c;
    f->count = pyccl_fsm_counts(engine->fsm, f->out, f->cap);
}

pyccl_status pyccl_engine_counts(pyccl_engine *engine, pyccl_op_count *out, size_t cap, size_t *count) {
    fsm_command c = {.command = {.run = run_counts}, .out = out, .cap = cap};
    engine_run(engine, &c.command);
    *count = c.count;
    return c.command.status;
}

static void run_cut(pyccl_engine *engine, command *c) {
    fsm_command *f = (fsm_command *)c;
    engine->cut = engine->in_epoch && !f->open;
    engine->cuts++;
    engine->moved_ns = engine->env.now_ns;
    engine->drained_told = false;
    engine->tick_stale = true;
    f->behind = pyccl_fsm_cut(engine->fsm, f->cut, f->cuts, f->open, engine->env.now_ns);
}

pyccl_status pyccl_engine_cut(pyccl_engine *engine, const pyccl_op_count *cut, size_t cuts, int open, int *behind) {
    fsm_command c = {.command = {.run = run_cut}, .cut = cut, .cuts = cuts, .open = open};
    engine_run(engine, &c.command);
    *behind = c.behind;
    return c.command.status;
}

typedef struct give_up_command {
    command command;
    pyccl_status why;
    const uint8_t *lost;
    size_t lost_count;
    int64_t age_ns;
} give_up_command;

static void run_give_up(pyccl_engine *engine, command *c) {
    const give_up_command *g = (const give_up_command *)c;
    const int64_t now = engine->env.now_ns;
    engine->tick_stale = true;
    pyccl_fsm_give_up(engine->fsm, g->why, g->lost, g->lost_count, now - g->age_ns, now);
}

pyccl_status pyccl_engine_give_up(pyccl_engine *engine, pyccl_status why, const uint8_t *lost, size_t count, int64_t age_ns) {
    if (why >= 0 || age_ns < 0) return PYCCL_ERR_ARGUMENT;
    give_up_command c = {.command = {.run = run_give_up}, .why = why, .lost = lost, .lost_count = count, .age_ns = age_ns};
    engine_run(engine, &c.command);
    return c.command.status;
}

static void run_blocked(pyccl_engine *engine, command *c) {
    fsm_command *f = (fsm_command *)c;
    f->count = pyccl_fsm_lacking(engine->fsm, f->out, f->cap);
    f->below = pyccl_fsm_below_cut(engine->fsm);
    f->quiet_ns = pyccl_fsm_moves(engine->fsm) ? 0 : engine->env.now_ns - engine->moved_ns;
    f->waiters = atomic_load_explicit(&engine->waiters, memory_order_relaxed);
}

pyccl_status pyccl_engine_blocked(pyccl_engine *engine, pyccl_op_lack *out, size_t cap, size_t *count, uint32_t *waiters,
                                  int64_t *quiet_ns, int *below) {
    fsm_command c = {.command = {.run = run_blocked}, .out = out, .cap = cap};
    engine_run(engine, &c.command);
    *count = c.count;
    *waiters = c.waiters;
    *quiet_ns = c.quiet_ns;
    *below = c.below;
    return c.command.status;
}
