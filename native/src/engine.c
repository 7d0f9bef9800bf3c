/* engine.c: the thread, its commands, events and timers, and the links it owns.
 *
 *   callers --commands (mutex, wake eventfd)--> thread --operations end (futex)--> callers
 *                                                |  \--events (mutex, eventfd)--> the binding
 *      epoll: sockets, wake, pulse <-------------+--- one pyccl_fsm, all links, all attempts
 *
 * The loop: wait; run commands; read what came; local work; timers; send. Frames are judged one by one and the actions
 * of the machine carried out after each; sending is done for all links that want to after each source of work.
 * Threads: see engine.h; the thread blocks all signals.            Spec: proto/wire.md 3 */
#include "engine.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define EPOLL_BATCH 64
#define GAP_NS INT64_C(1000000000)   /* a longer gap in our own loop: we were stopped, nobody else was silent */
#define USER_TIMEOUT_MIN_MS 15000
#define TICK_EAGER_OPS 64            /* with more open operations the machine is asked at most every TICK_PAUSE_NS */
#define TICK_PAUSE_NS 1000000

int64_t engine_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* ---- events ---- */

static void eventfd_raise(int fd) {
    const uint64_t one = 1;
    const ssize_t n = write(fd, &one, sizeof one);
    PYCCL_ASSERT(n == (ssize_t)sizeof one || errno == EAGAIN);
}

static void eventfd_clear(int fd) {
    uint64_t count;
    const ssize_t n = read(fd, &count, sizeof count);
    PYCCL_ASSERT(n == (ssize_t)sizeof count || errno == EAGAIN);
}

void engine_event(pyccl_engine *engine, const pyccl_event *event) {
    pthread_mutex_lock(&engine->event_lock);
    if (engine->event_count == engine->event_cap) {
        const size_t cap = engine->event_cap > 0 ? engine->event_cap * 2 : 64;
        pyccl_event *grown = malloc(cap * sizeof *grown);
        PYCCL_ASSERT(grown != NULL);
        for (size_t i = 0; i < engine->event_count; i++)
            grown[i] = engine->events[(engine->event_head + i) % engine->event_cap];
        free(engine->events);
        engine->events = grown;
        engine->event_cap = cap;
        engine->event_head = 0;
    }
    engine->events[(engine->event_head + engine->event_count++) % engine->event_cap] = *event;
    if (engine->event_count == 1) eventfd_raise(engine->event_fd);
    pthread_mutex_unlock(&engine->event_lock);
}

int pyccl_engine_fd(const pyccl_engine *engine) { return engine->event_fd; }

size_t pyccl_engine_events(pyccl_engine *engine, pyccl_event *out, size_t cap) {
    size_t count = 0;
    pthread_mutex_lock(&engine->event_lock);
    const bool had = engine->event_count > 0;
    for (; count < cap && engine->event_count > 0; engine->event_count--) {
        out[count++] = engine->events[engine->event_head];
        engine->event_head = (engine->event_head + 1) % engine->event_cap;
    }
    if (had && engine->event_count == 0) eventfd_clear(engine->event_fd);
    pthread_mutex_unlock(&engine->event_lock);
    return count;
}

/* ---- commands ---- */

bool engine_post(pyccl_engine *engine, command *c) {
    c->next = NULL;
    c->done = false;
    pthread_mutex_lock(&engine->lock);
    const bool open = !engine->closed, wake = open && engine->asleep;
    if (open) {
        if (engine->command_first == NULL) engine->command_first = c;
        else engine->command_last->next = c;
        engine->command_last = c;
        engine->asleep = false;
    }
    pthread_mutex_unlock(&engine->lock);
    if (wake) eventfd_raise(engine->wake_fd); /* not under the lock, which is the first thing that the thread takes */
    return open;
}

void engine_run(pyccl_engine *engine, command *c) {
    c->waited = true;
    c->status = PYCCL_OK;
    if (!engine_post(engine, c)) {
        c->status = PYCCL_ERR_CLOSED;
        return;
    }
    pthread_mutex_lock(&engine->lock);
    while (!c->done) pthread_cond_wait(&engine->command_done, &engine->lock);
    pthread_mutex_unlock(&engine->lock);
}

static void command_finish(pyccl_engine *engine, command *c) {
    pthread_mutex_lock(&engine->lock);
    c->done = true;
    pthread_cond_broadcast(&engine->command_done);
    pthread_mutex_unlock(&engine->lock);
}

static command *commands_take(pyccl_engine *engine, bool close) {
    pthread_mutex_lock(&engine->lock);
    command *first = engine->command_first;
    engine->command_first = engine->command_last = NULL;
    engine->asleep = false;
    if (close) engine->closed = true;
    pthread_mutex_unlock(&engine->lock);
    return first;
}

/* False: there are commands. */
static bool commands_sleep(pyccl_engine *engine) {
    pthread_mutex_lock(&engine->lock);
    engine->asleep = engine->command_first == NULL;
    const bool asleep = engine->asleep;
    pthread_mutex_unlock(&engine->lock);
    return asleep;
}

/* False: there was none. */
static bool commands_run(pyccl_engine *engine) {
    command *first = commands_take(engine, false);
    for (command *c = first, *next; c != NULL; c = next) {
        next = c->next;
        const bool waited = c->waited; /* a submit that ended is gone after run */
        c->run(engine, c);
        engine_act(engine);
        if (waited) command_finish(engine, c);
    }
    return first != NULL;
}

/* The thread ends: nothing that was queued runs. */
static void commands_refuse(pyccl_engine *engine) {
    for (command *c = commands_take(engine, true), *next; c != NULL; c = next) {
        next = c->next;
        if (c->waited) {
            c->status = PYCCL_ERR_CLOSED;
            command_finish(engine, c);
        } else engine_op_end((pyccl_op *)c, engine->stop_why, 0, NULL);
    }
}

/* ---- peers and connections ---- */

peer *engine_peer(const pyccl_engine *engine, uint32_t slot) {
    return slot < engine->slot_count ? engine->slots[slot] : NULL;
}

static peer *peer_find(const pyccl_engine *engine, const uint8_t id[PYCCL_ID_SIZE]) {
    peer *p = engine->peers;
    while (p != NULL && memcmp(p->link.id, id, PYCCL_ID_SIZE) != 0) p = p->next;
    return p;
}

static bool slots_grow(pyccl_engine *engine) {
    if (engine->slot_count < engine->slot_cap) return true;
    const uint32_t cap = engine->slot_cap > 0 ? engine->slot_cap * 2 : 64;
    peer **grown = realloc(engine->slots, cap * sizeof *grown);
    if (grown == NULL) return false;
    engine->slots = grown;
    engine->slot_cap = cap;
    return true;
}

peer *engine_peer_get(pyccl_engine *engine, const uint8_t id[PYCCL_ID_SIZE]) {
    peer *p = peer_find(engine, id);
    if (p != NULL) return p;
    p = calloc(1, sizeof *p);
    if (p == NULL || !slots_grow(engine)) {
        free(p);
        return NULL;
    }
    link_init(&p->link, &engine->env, id, engine->slot_count);
    engine->slots[engine->slot_count++] = p;
    p->rank = -1;
    p->reset_owed = true;
    p->next = engine->peers;
    engine->peers = p;
    return p;
}

static void conn_take_down(pyccl_engine *engine, pyccl_conn *conn) {
    peer *p = (peer *)conn->link;
    const uint32_t index = conn->index;
    engine_sink_cancel(engine, conn);
    link_conn_close(conn);
    ops_conn_lost(engine, p, index);
    if (p->link.conn_count > 0) return;
    p->reset_owed = true;
    state_drop_asks(p);
    link_control_clear(&p->link);
}

void engine_close_links(pyccl_engine *engine, peer *p) {
    for (uint32_t i = 0; i < PYCCL_CONNS_MAX; i++)
        if (p->link.conns[i] != NULL) conn_take_down(engine, p->link.conns[i]);
    state_end_fetches(engine, p, PYCCL_ERR_PEER_LOST);
}

void engine_refuse(pyccl_engine *engine, peer *p) {
    const pyccl_event event = {.type = PYCCL_EVENT_LINK_REFUSED, .slot = p->link.slot, .code = PYCCL_ERR_FRAME};
    if (p->link.conn_count > 0) engine_event(engine, &event);
    engine_close_links(engine, p);
    early_clear_peer(engine, p); /* it repeats what it sent, and what it never should have may fill its window */
}

/* A connection ended by itself, or stands no longer for anything. */
static void conn_down(pyccl_engine *engine, pyccl_conn *conn) {
    peer *p = (peer *)conn->link;
    const int code = conn->broken > 0 ? conn->broken : 0;
    conn_take_down(engine, conn);
    const pyccl_event event = {.type = PYCCL_EVENT_CONN_DOWN, .slot = p->link.slot, .code = code, .count = p->link.conn_count};
    engine_event(engine, &event);
}

static bool peer_take_down(pyccl_engine *engine, peer *p) {
    bool lost = false;
    for (uint32_t i = 0; i < PYCCL_CONNS_MAX; i++) {
        pyccl_conn *conn = p->link.conns[i];
        if (conn == NULL || conn->broken == 0) continue;
        if (!conn->paused && conn->broken != LINK_HUNG_UP) link_conn_drain(conn); /* what came before the end still counts */
        if (conn->fd < 0) continue;
        conn_down(engine, conn);
        lost = true;
    }
    return lost;
}

static void broken_take_down(pyccl_engine *engine) {
    while (engine->env.broken) {
        engine->env.broken = false;
        for (peer *p = engine->peers; p != NULL; p = p->next) {
            if (!peer_take_down(engine, p)) continue;
            if (p->link.conn_count > 0 && p->rank >= 0) pyccl_fsm_link_reset(engine->fsm, (uint32_t)p->rank, engine->env.now_ns);
            state_conn_lost(engine, p);
            engine_act(engine);
        }
    }
}

void engine_hang_up(pyccl_engine *engine, pyccl_conn *conn) {
    if (conn->broken == 0) conn->broken = LINK_HUNG_UP;
    engine->env.broken = true;
}

static void pump_all(pyccl_engine *engine) {
    for (peer *p = engine->peers; p != NULL; p = p->next)
        if (p->link.wants_send) link_pump(&p->link);
}

void engine_silent(pyccl_engine *engine, peer *p) {
    p->silent = true;
    const pyccl_event event = {.type = PYCCL_EVENT_LINK_SILENT, .slot = p->link.slot};
    engine_event(engine, &event);
}

void engine_heard(pyccl_engine *engine, peer *p) {
    if (!p->silent) return;
    p->silent = false;
    const pyccl_event event = {.type = PYCCL_EVENT_LINK_HEARD, .slot = p->link.slot};
    engine_event(engine, &event);
}

static void conn_event(pyccl_engine *engine, pyccl_conn *conn, uint32_t events) {
    if (conn->fd < 0) return;
    peer *p = (peer *)conn->link;
    const uint64_t before = p->link.rx_bytes;
    if ((conn->paused || conn->held) && (events & (EPOLLHUP | EPOLLERR)) != 0) {
        conn->broken = -1;
        engine->env.broken = true;
        return;
    }
    if ((events & EPOLLOUT) != 0) link_conn_writable(conn);
    if ((events & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0) link_conn_readable(conn);
    if (p->link.rx_bytes != before) engine_heard(engine, p);
}

/* ---- the pulse ---- */

static void pulse_close(pyccl_engine *engine) {
    if (engine->pulse_fd < 0) return;
    (void)epoll_ctl(engine->env.epoll_fd, EPOLL_CTL_DEL, engine->pulse_fd, NULL);
    (void)close(engine->pulse_fd);
    seal_free(engine->pulse_seal);
    engine->pulse_seal = NULL;
    engine->pulse_fd = -1;
}

pyccl_status engine_pulse_open(pyccl_engine *engine, int fd, const pyccl_conn_keys *keys) {
    pulse_close(engine);
    if (fd < 0) return PYCCL_OK;
    const int on = 1, flags = fcntl(fd, F_GETFL);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = &engine->pulse_fd};
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0) return PYCCL_ERR_OS;
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    seal *sealed = keys != NULL ? seal_new(keys, (ratchet_source){0}) : NULL;
    if (keys != NULL && sealed == NULL) return PYCCL_ERR_NOMEM;
    if (epoll_ctl(engine->env.epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0) {
        seal_free(sealed);
        return PYCCL_ERR_OS;
    }
    engine->pulse_seal = sealed;
    engine->pulse_fd = fd;
    engine->pulse_left = 0;
    engine->pulse_sent_ns = engine->env.now_ns - engine->options.heartbeat_ns;
    engine->check_ns = engine->env.now_ns;
    return PYCCL_OK;
}

static void pulse_down(pyccl_engine *engine, int code) {
    const pyccl_event event = {.type = PYCCL_EVENT_PULSE_DOWN, .slot = UINT32_MAX, .code = code};
    pulse_close(engine);
    engine_event(engine, &event);
}

static void pulse_read(pyccl_engine *engine) {
    ssize_t n = 1;
    while (n > 0) n = recv(engine->pulse_fd, engine->env.discard, sizeof engine->env.discard, MSG_DONTWAIT);
    if (n == 0) pulse_down(engine, 0);
    else if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) pulse_down(engine, errno);
}

static ssize_t pulse_send(pyccl_engine *engine, const void *data, size_t size) {
    const struct iovec iov = {(void *)(uintptr_t)data, size};
    if (engine->pulse_seal != NULL) return seal_send(engine->pulse_seal, engine->pulse_fd, &iov, 1);
    return send(engine->pulse_fd, data, size, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static int64_t pulse_beat(pyccl_engine *engine) {
    const int64_t now = engine->env.now_ns;
    if (engine->pulse_fd < 0) return INT64_MAX;
    if (now < engine->pulse_sent_ns + engine->options.heartbeat_ns) return engine->pulse_sent_ns + engine->options.heartbeat_ns;
    const pyccl_frame frame = {.type = PYCCL_FRAME_HEARTBEAT};
    uint8_t bytes[PYCCL_FRAME_SIZE];
    pyccl_frame_encode(&frame, bytes);
    if (engine->pulse_left == 0) engine->pulse_left = PYCCL_FRAME_SIZE;
    const ssize_t n = pulse_send(engine, bytes + PYCCL_FRAME_SIZE - engine->pulse_left, engine->pulse_left);
    if (n > 0) engine->pulse_left -= (uint32_t)n;
    engine->pulse_sent_ns = now;
    if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) pulse_down(engine, errno);
    return now + engine->options.heartbeat_ns;
}

/* ---- timers ---- */

static void sooner(int64_t *due, int64_t at_ns) {
    if (at_ns < *due) *due = at_ns;
}

/* A member without any connection is silent too: the host may be gone, so that nothing refuses a new one. */
static void silence_check(pyccl_engine *engine, peer *p) {
    const int64_t now = engine->env.now_ns;
    if (p->link.conn_count == 0 && p->rank < 0) return;
    link_excuse(&p->link, false);
    if (p->silent) return;
    if (now - p->link.heard_ns >= engine->options.silence_ns) engine_silent(engine, p);
    else sooner(&engine->check_ns, p->link.heard_ns + engine->options.silence_ns);
}

/* Only connections between two frames can beat; nothing is read, so nobody is called silent for what we did not hear. */
void engine_breathe(pyccl_engine *engine) {
    const int64_t turn_ns = engine->env.now_ns, now = engine_clock(), beat = engine->options.heartbeat_ns;
    engine->env.now_ns = now;
    (void)pulse_beat(engine);
    for (peer *p = engine->peers; p != NULL; p = p->next)
        for (uint32_t i = 0; i < PYCCL_CONNS_MAX; i++) {
            pyccl_conn *conn = p->link.conns[i];
            if (conn != NULL && now - conn->sent_ns >= beat) link_conn_heartbeat(conn);
        }
    engine->env.now_ns = turn_ns;
}

/* The line of some connections is gone where others of the link are heard: who changed its address has new ones to us, and missed us
 * first; or something in between swallows what they carry, and acknowledges it. */
static void hang_up_dead(pyccl_engine *engine, peer *p) {
    const int64_t now = engine->env.now_ns, silence_ns = engine->options.silence_ns;
    pyccl_conn *dead[PYCCL_CONNS_MAX];
    uint32_t count = 0;
    if (p->link.conn_count < 2 || now - p->link.received_ns >= silence_ns || now < p->dead_ns) return;
    p->dead_ns = now + engine->options.heartbeat_ns;
    for (uint32_t i = 0; i < PYCCL_CONNS_MAX; i++) {
        pyccl_conn *conn = p->link.conns[i];
        if (conn != NULL && link_conn_is_dead(conn, silence_ns)) dead[count++] = conn;
    }
    for (uint32_t i = 0; i < count && count < p->link.conn_count; i++) engine_hang_up(engine, dead[i]);
}

/* Each idle connection says something now and then: also so that a side notices that the other has given it up. */
static void links_check(pyccl_engine *engine) {
    const int64_t now = engine->env.now_ns, beat = engine->options.heartbeat_ns;
    if (now < engine->check_ns) return;
    engine->check_ns = now + beat;
    sooner(&engine->check_ns, pulse_beat(engine));
    for (peer *p = engine->peers; p != NULL; p = p->next) {
        for (uint32_t i = 0; i < PYCCL_CONNS_MAX; i++) {
            pyccl_conn *conn = p->link.conns[i];
            if (conn == NULL) continue;
            if (now - conn->sent_ns >= beat) link_conn_heartbeat(conn);
            else sooner(&engine->check_ns, conn->sent_ns + beat);
        }
        silence_check(engine, p);
        hang_up_dead(engine, p);
        sooner(&engine->check_ns, state_check(engine, p));
    }
}

static void tick(pyccl_engine *engine) {
    const int64_t now = engine->env.now_ns;
    const bool eager = engine->tick_stale && pyccl_fsm_open_count(engine->fsm) <= TICK_EAGER_OPS;
    if (engine->tick_stale) sooner(&engine->tick_ns, eager ? now : engine->ticked_ns + TICK_PAUSE_NS);
    if (now < engine->tick_ns) return;
    engine->tick_stale = false;
    engine->ticked_ns = now;
    engine->tick_ns = pyccl_fsm_tick(engine->fsm, now);
    engine_act(engine);
}

/* There may be room under the caps again. Who was first the last time is last this time. */
static void caps_check(pyccl_engine *engine) {
    link_env *env = &engine->env;
    const bool tx = env->now_ns >= env->tx_due, rx = env->now_ns >= env->rx_due;
    if (!tx && !rx) return;
    if (tx) env->tx_due = INT64_MAX;
    if (rx) env->rx_due = INT64_MAX;
    for (peer *p = engine->peers; p != NULL; p = p->next) link_feed(&p->link, tx, rx);
    peer *first = engine->peers, **last = &engine->peers;
    if (first == NULL) return;
    while (*last != NULL) last = &(*last)->next;
    *last = first;
    engine->peers = first->next;
    first->next = NULL;
}

static int wait_ms(const pyccl_engine *engine) {
    int64_t due = engine->check_ns;
    for (const peer *p = engine->peers; p != NULL; p = p->next)
        if (p->link.wants_send) return 0;
    if (engine->local_work > 0 && !pyccl_fsm_frozen(engine->fsm)) return 0;
    sooner(&due, engine->tick_ns);
    sooner(&due, engine->env.tx_due);
    sooner(&due, engine->env.rx_due);
    const int64_t left = due - engine_clock();
    if (left <= 0) return 0;
    return left > INT64_C(3600000000000) ? 3600000 : (int)((left + 999999) / 1000000);
}

/* We did not look for a while (stopped, or a long copy): nobody may be called silent before the sockets are drained. */
static void after_gap(pyccl_engine *engine) {
    for (peer *p = engine->peers; p != NULL; p = p->next) link_excuse(&p->link, true);
}

/* ---- the thread ---- */

static void dispatch(pyccl_engine *engine, const struct epoll_event *event) {
    if (event->data.ptr == &engine->wake_fd) return; /* it has woken us */
    if (event->data.ptr != &engine->pulse_fd) conn_event(engine, event->data.ptr, event->events);
    else if (engine->pulse_fd >= 0) pulse_read(engine);
}

/* Look at the clock, wherever it is: a process may be stopped between any two instructions. */
static void clock_look(pyccl_engine *engine, int64_t slept_ns) {
    const int64_t now = engine_clock();
    if (now - engine->env.now_ns > slept_ns + GAP_NS) engine->gap = true;
    engine->env.now_ns = now;
}

static void turn(pyccl_engine *engine) {
    struct epoll_event events[EPOLL_BATCH];
    int timeout_ms = wait_ms(engine);
    if (timeout_ms > 0 && !commands_sleep(engine)) timeout_ms = 0;
    clock_look(engine, 0);
    int n = epoll_wait(engine->env.epoll_fd, events, EPOLL_BATCH, timeout_ms);
    PYCCL_ASSERT(n >= 0 || errno == EINTR);
    clock_look(engine, timeout_ms * INT64_C(1000000));
    caps_check(engine);
    if (commands_run(engine)) { /* before what came is read: others wait for what a new operation sends */
        pump_all(engine);
        n = epoll_wait(engine->env.epoll_fd, events, EPOLL_BATCH, 0); /* a command may have ended what the first found */
    }
    for (int i = 0; i < n; i++) {
        dispatch(engine, &events[i]);
        clock_look(engine, 0);
        pump_all(engine);
    }
    ops_work(engine);
    engine_act(engine);
    pump_all(engine);
    broken_take_down(engine);
    clock_look(engine, 0);
    if (engine->gap) after_gap(engine);
    engine->gap = false;
    links_check(engine);
    broken_take_down(engine);
    tick(engine);
    pump_all(engine);
    link_bury(&engine->env);
}

static void *thread_main(void *arg) {
    pyccl_engine *engine = arg;
    engine->env.now_ns = engine_clock();
    while (!engine->stopping) turn(engine);
    pyccl_fsm_end(engine->fsm, engine->stop_why);
    engine_act(engine);
    engine_forget_epoch(engine);
    commands_refuse(engine);
    for (peer *p = engine->peers; p != NULL; p = p->next) engine_close_links(engine, p);
    pulse_close(engine);
    link_bury(&engine->env);
    return NULL;
}

/* ---- life ---- */

static void engine_delete(pyccl_engine *engine) {
    while (engine->peers != NULL) {
        peer *p = engine->peers;
        engine->peers = p->next;
        link_fini(&p->link);
        state_drop_asks(p);
        free(p->asks);
        free(p);
    }
    pyccl_fsm_free(engine->fsm);
    pyccl_map_fini(&engine->ops);
    plan_release(engine->plan);
    state_fini(engine);
    memory_fini(engine);
    if (engine->wake_fd >= 0) (void)close(engine->wake_fd);
    if (engine->event_fd >= 0) (void)close(engine->event_fd);
    if (engine->env.epoll_fd >= 0) (void)close(engine->env.epoll_fd);
    pthread_mutex_destroy(&engine->lock);
    pthread_mutex_destroy(&engine->stop_lock);
    pthread_mutex_destroy(&engine->event_lock);
    pthread_cond_destroy(&engine->command_done);
    free(engine->slots);
    free(engine->events);
    free(engine);
}

static pyccl_status engine_open(pyccl_engine *engine) {
    engine->env.epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    engine->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    engine->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (engine->env.epoll_fd < 0 || engine->wake_fd < 0 || engine->event_fd < 0) return PYCCL_ERR_OS;
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.ptr = &engine->wake_fd}; /* never read: each raise wakes */
    if (epoll_ctl(engine->env.epoll_fd, EPOLL_CTL_ADD, engine->wake_fd, &event) != 0) return PYCCL_ERR_OS;
    return pyccl_fsm_new(&engine->options.fsm, &engine->fsm);
}

static void engine_init(pyccl_engine *engine, const pyccl_engine_options *options) {
    engine->options = *options;
    engine->wake_fd = engine->event_fd = engine->env.epoll_fd = engine->pulse_fd = -1;
    engine->env.hooks = &ENGINE_HOOKS;
    engine->env.ctx = engine;
    engine->env.user_timeout_ms = options->silence_ns / 1000000 > USER_TIMEOUT_MIN_MS / 3
        ? (options->silence_ns / 1000000 < INT32_MAX / 3 ? options->silence_ns / 1000000 * 3 : INT32_MAX) : USER_TIMEOUT_MIN_MS;
    engine->env.long_rtt_ns = options->long_rtt_ns;
    engine->env.now_ns = engine->moved_ns = engine_clock();
    engine->env.lanes = options->lanes;
    pace_crowd_init(&engine->env.crowd);
    throttle_init(&engine->env.tx, options->max_tx_bytes_s, engine->env.now_ns);
    throttle_init(&engine->env.rx, options->max_rx_bytes_s, engine->env.now_ns);
    engine->tick_ns = engine->env.tx_due = engine->env.rx_due = INT64_MAX;
    engine->stop_why = PYCCL_ERR_CLOSED;
    pthread_mutex_init(&engine->lock, NULL);
    pthread_mutex_init(&engine->stop_lock, NULL);
    pthread_mutex_init(&engine->event_lock, NULL);
    pthread_cond_init(&engine->command_done, NULL);
}

/* Signals are the callers': the thread inherits a mask that blocks all. */
static pyccl_status thread_start(pyccl_engine *engine) {
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    const int failed = pthread_create(&engine->thread, NULL, thread_main, engine);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return failed == 0 ? PYCCL_OK : PYCCL_ERR_OS;
}

pyccl_status pyccl_engine_new(const pyccl_engine_options *options, pyccl_engine **out) {
    *out = NULL;
    if (options->heartbeat_ns <= 0 || options->silence_ns <= 0 || options->lanes > PYCCL_CONNS_MAX) return PYCCL_ERR_ARGUMENT;
    pyccl_engine *engine = calloc(1, sizeof *engine);
    if (engine == NULL) return PYCCL_ERR_NOMEM;
    engine_init(engine, options);
    pyccl_status rc = engine_open(engine);
    if (rc == PYCCL_OK) rc = thread_start(engine);
    if (rc == PYCCL_OK) *out = engine;
    else engine_delete(engine);
    return rc;
}

static void run_stop(pyccl_engine *engine, command *c) {
    engine->stopping = true;
    engine->stop_why = ((why_command *)c)->why;
}

void pyccl_engine_stop(pyccl_engine *engine, pyccl_status why) {
    why_command c = {.command = {.run = run_stop}, .why = why < 0 ? why : PYCCL_ERR_CLOSED};
    pthread_mutex_lock(&engine->stop_lock);
    if (!engine->joined) {
        engine_run(engine, &c.command);
        pthread_join(engine->thread, NULL);
        engine->joined = true;
    }
    pthread_mutex_unlock(&engine->stop_lock);
}

void pyccl_engine_free(pyccl_engine *engine) {
    if (engine == NULL) return;
    pyccl_engine_stop(engine, PYCCL_ERR_CLOSED);
    engine_delete(engine);
}
