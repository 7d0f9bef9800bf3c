/* relay.c: two members that do not reach each other, and a third that carries their bytes: see pyccl.h.
 *
 * Each way of a pair is a pipe between two sockets: bytes are spliced in and out of it and never come into user space. A
 * way reads only when its pipe is empty, so what it holds is bounded, and a receiver that is slow slows its sender.
 * With a cap nothing is read while the bucket is empty; the senders' windows do the rest.
 * What is there to be moved is moved before a pair counts as silent: it may be we who were stopped.
 *
 * Invariants
 *  - a socket is in the epoll set only while something is wanted of it: what is always ready would keep the thread busy;
 *  - events name a pair by its place and life, so those of a batch that come after its end find nothing.
 * Threads: `lock` guards all pairs; the thread lets go of it after each event. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "../include/pyccl.h"
#include "status.h"
#include "throttle.h"

#define PIPE_BYTES (256 << 10)       /* of each way; the kernel may give less */
#define TURNS 8                      /* full pipes that one event moves each way: other pairs wait meanwhile */
#define EVENTS_AT_ONCE 64
#define WAKE UINT64_MAX

typedef struct leg {
    pyccl_relay_end end;
    uint32_t interest;               /* epoll events armed; 0: not in the set */
} leg;

typedef struct way {                 /* from legs[i] to legs[1 - i] */
    int in, out;                     /* of the pipe: what is written, what is read */
    size_t held;                     /* bytes in it */
    bool ended;                      /* the stream has, and the other leg was told so */
} way;

typedef struct pair {
    bool used;
    bool capped;                     /* it would read, and may not yet */
    uint32_t life;                   /* how many pairs have had this place before */
    uint64_t number;                 /* of all pairs that the relay has had */
    int64_t moved_ns;                /* when it carried something */
    leg legs[2];
    way ways[2];
} pair;

struct pyccl_relay {
    pthread_t thread;
    pthread_mutex_t lock;
    int epoll_fd, wake_fd;
    unsigned user_timeout_ms;
    bool stopping;
    uint32_t count;
    uint64_t last;                   /* number */
    uint32_t first;                  /* of the pairs that the cap has held up, who goes on first */
    throttle cap;
    pair pairs[PYCCL_RELAY_PAIRS_MAX];
};

static int64_t now_ns(void) {
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* ---- pairs; all under the lock ---- */

static void close_if(int fd) {
    if (fd >= 0) (void)close(fd);
}

/* Neither depends on the last copy of the descriptor, which a forked child may hold: close alone would. */
static void leg_close(const leg *l, bool reset) {
    const struct sockaddr nobody = {.sa_family = AF_UNSPEC};
    if (reset) (void)connect(l->end.fd, &nobody, sizeof nobody);
    else (void)shutdown(l->end.fd, SHUT_RDWR);
    (void)close(l->end.fd);
}

static void pair_close(pyccl_relay *relay, pair *p, bool reset) {
    for (int i = 0; i < 2; i++) {
        if (p->legs[i].interest != 0) (void)epoll_ctl(relay->epoll_fd, EPOLL_CTL_DEL, p->legs[i].end.fd, NULL);
        leg_close(&p->legs[i], reset);
        close_if(p->ways[i].in);
        close_if(p->ways[i].out);
    }
    p->used = false;
    p->life++;
    relay->count--;
}

/* False: a socket is broken. */
static bool way_move(pyccl_relay *relay, pair *p, way *w, int i) {
    const int from = p->legs[i].end.fd, to = p->legs[1 - i].end.fd;
    for (int turn = 0; turn < TURNS && !w->ended; turn++) {
        const int64_t now = now_ns();
        if (w->held == 0) {
            const size_t room = throttle_room(&relay->cap, now);
            if (room == 0) {
                p->capped = true;
                return true;
            }
            const size_t most = room < PIPE_BYTES ? room : PIPE_BYTES;
            const ssize_t n = splice(from, NULL, w->in, NULL, most, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
            if (n < 0) return errno == EAGAIN || errno == EINTR;
            if (n == 0) {
                w->ended = true;
                return shutdown(to, SHUT_WR) == 0;
            }
            w->held = (size_t)n;
            p->moved_ns = now;
            throttle_take(&relay->cap, w->held);
        }
        const ssize_t n = splice(w->out, NULL, to, NULL, w->held, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
        if (n < 0) return errno == EAGAIN || errno == EINTR;
        w->held -= (size_t)n;
        p->moved_ns = now;
    }
    return true;
}

static bool leg_arm(const pyccl_relay *relay, pair *p, int i) {
    const way *reads = &p->ways[i], *writes = &p->ways[1 - i];
    const bool may_read = reads->held == 0 && !reads->ended && !p->capped;
    const uint32_t wanted = (may_read ? (uint32_t)EPOLLIN : 0) | (writes->held > 0 ? (uint32_t)EPOLLOUT : 0);
    leg *l = &p->legs[i];
    if (wanted == l->interest) return true;
    struct epoll_event event = {.events = wanted};
    event.data.u64 = (uint64_t)p->life << 32 | (uint64_t)(p - relay->pairs);
    const int how = l->interest == 0 ? EPOLL_CTL_ADD : wanted == 0 ? EPOLL_CTL_DEL : EPOLL_CTL_MOD;
    if (epoll_ctl(relay->epoll_fd, how, l->end.fd, &event) != 0) return false;
    l->interest = wanted;
    return true;
}

static void pair_move(pyccl_relay *relay, pair *p) {
    bool fine = true;
    p->capped = false;
    for (int i = 0; i < 2; i++) fine = fine && way_move(relay, p, &p->ways[i], i);
    for (int i = 0; i < 2; i++) fine = fine && leg_arm(relay, p, i);
    if (!fine || (p->ways[0].ended && p->ways[1].ended)) pair_close(relay, p, !fine);
}

/* ---- the thread ---- */

static bool handle(pyccl_relay *relay, uint64_t name) {
    (void)pthread_mutex_lock(&relay->lock);
    const bool stopping = relay->stopping;
    eventfd_t wakes;
    if (name == WAKE) (void)eventfd_read(relay->wake_fd, &wakes);
    else if (!stopping) {
        pair *p = &relay->pairs[(uint32_t)name % PYCCL_RELAY_PAIRS_MAX];
        if (p->used && p->life == (uint32_t)(name >> 32)) pair_move(relay, p);
    }
    (void)pthread_mutex_unlock(&relay->lock);
    return !stopping;
}

/* What time alone brings: those that the cap has held up go on as soon as it allows, those that carry nothing end. The
 * milliseconds until then; -1: nothing will. */
static int in_time(pyccl_relay *relay) {
    (void)pthread_mutex_lock(&relay->lock);
    const int64_t now = now_ns(), silence_ns = (int64_t)relay->user_timeout_ms * 1000000;
    const bool room = throttle_room(&relay->cap, now) > 0;
    int64_t due = INT64_MAX;
    for (uint32_t i = 0; i < PYCCL_RELAY_PAIRS_MAX; i++) {
        pair *p = &relay->pairs[(relay->first + i) % PYCCL_RELAY_PAIRS_MAX];
        if (p->used && (p->capped ? room : now - p->moved_ns >= silence_ns)) pair_move(relay, p);
        if (p->used && !p->capped && now - p->moved_ns >= silence_ns) pair_close(relay, p, true);
        if (!p->used) continue;
        const int64_t next = p->capped ? throttle_due(&relay->cap) : p->moved_ns + silence_ns;
        if (next < due) due = next;
    }
    relay->first++; /* each pair has its turn with what there is */
    const int64_t missing_ms = (due - now_ns()) / 1000000 + 1;
    (void)pthread_mutex_unlock(&relay->lock);
    if (due == INT64_MAX) return -1;
    return missing_ms < 1 ? 1 : missing_ms > INT_MAX ? INT_MAX : (int)missing_ms;
}

static void *thread_main(void *arg) {
    pyccl_relay *relay = arg;
    struct epoll_event events[EVENTS_AT_ONCE];
    for (;;) {
        const int count = epoll_wait(relay->epoll_fd, events, EVENTS_AT_ONCE, in_time(relay));
        PYCCL_ASSERT(count >= 0 || errno == EINTR);
        for (int i = 0; i < count; i++)
            if (!handle(relay, events[i].data.u64)) return NULL;
    }
}

static int thread_start(pyccl_relay *relay) {
    sigset_t all, old;
    sigfillset(&all); /* also SIGPIPE: splice() into a socket whose peer is gone raises it */
    pthread_sigmask(SIG_SETMASK, &all, &old);
    const int failed = pthread_create(&relay->thread, NULL, thread_main, relay);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return failed;
}

/* ---- for the caller ---- */

static void relay_delete(pyccl_relay *relay) {
    close_if(relay->epoll_fd);
    close_if(relay->wake_fd);
    (void)pthread_mutex_destroy(&relay->lock);
    free(relay);
}

pyccl_status pyccl_relay_new(uint32_t user_timeout_ms, uint64_t max_bytes_s, pyccl_relay **out) {
    *out = NULL;
    pyccl_relay *relay = calloc(1, sizeof *relay);
    if (relay == NULL) return PYCCL_ERR_NOMEM;
    (void)pthread_mutex_init(&relay->lock, NULL);
    relay->user_timeout_ms = user_timeout_ms;
    throttle_init(&relay->cap, max_bytes_s, now_ns());
    relay->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    relay->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct epoll_event wake = {.events = EPOLLIN, .data.u64 = WAKE};
    if (relay->epoll_fd < 0 || relay->wake_fd < 0 ||
        epoll_ctl(relay->epoll_fd, EPOLL_CTL_ADD, relay->wake_fd, &wake) != 0 || thread_start(relay) != 0) {
        relay_delete(relay);
        return PYCCL_ERR_OS;
    }
    *out = relay;
    return PYCCL_OK;
}

static bool leg_open(const pyccl_relay *relay, leg *l, const pyccl_relay_end *end) {
    const int fd = end->fd, yes = 1, flags = fcntl(fd, F_GETFL);
    *l = (leg){.end = *end};
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &relay->user_timeout_ms, sizeof relay->user_timeout_ms);
    return flags >= 0 && fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0;
}

static bool way_open(way *w) {
    int ends[2] = {-1, -1};
    const bool made = pipe2(ends, O_CLOEXEC | O_NONBLOCK) == 0;
    if (made) (void)fcntl(ends[1], F_SETPIPE_SZ, PIPE_BYTES);
    *w = (way){.in = ends[1], .out = ends[0]};
    return made;
}

static pyccl_status pair_open(pyccl_relay *relay, pair *p, const pyccl_relay_end ends[2]) {
    bool fine = true;
    for (int i = 0; i < 2; i++) {
        fine = leg_open(relay, &p->legs[i], &ends[i]) && fine;
        fine = way_open(&p->ways[i]) && fine;
    }
    p->used = true;
    p->capped = false;
    p->number = ++relay->last;
    p->moved_ns = now_ns();
    relay->count++;
    for (int i = 0; i < 2; i++) fine = fine && leg_arm(relay, p, i);
    if (!fine) pair_close(relay, p, true);
    return fine ? PYCCL_OK : PYCCL_ERR_OS;
}

static bool same(const uint8_t one[PYCCL_ID_SIZE], const uint8_t other[PYCCL_ID_SIZE]) {
    return memcmp(one, other, PYCCL_ID_SIZE) == 0;
}

static bool is_of(const pair *p, const uint8_t peer[PYCCL_ID_SIZE]) {
    return same(p->legs[0].end.peer, peer) || same(p->legs[1].end.peer, peer);
}

static bool is_owned(const pair *p, const uint8_t owner[PYCCL_ID_SIZE]) {
    return same(p->legs[0].end.owner, owner) || same(p->legs[1].end.owner, owner);
}

/* Which one a new pair of these two peers takes the place of; NULL: none. */
static pair *replaced_by(pyccl_relay *relay, const pyccl_relay_end ends[2]) {
    pair *oldest = NULL;
    uint32_t count = 0;
    for (pair *p = relay->pairs; p < relay->pairs + PYCCL_RELAY_PAIRS_MAX; p++) {
        if (!p->used || !is_of(p, ends[0].peer) || !is_of(p, ends[1].peer)) continue;
        if (oldest == NULL || p->number < oldest->number) oldest = p;
        count++;
    }
    return count >= PYCCL_RELAY_SAME_MAX ? oldest : NULL;
}

/* For how many more pairs of these owners there are places. */
static uint32_t room_for(const pyccl_relay *relay, const pyccl_relay_end ends[2]) {
    uint32_t room = PYCCL_RELAY_PAIRS_MAX - relay->count, owned[2] = {0, 0};
    for (const pair *p = relay->pairs; p < relay->pairs + PYCCL_RELAY_PAIRS_MAX; p++)
        for (int i = 0; i < 2; i++) owned[i] += p->used && is_owned(p, ends[i].owner);
    for (int i = 0; i < 2; i++)
        if (PYCCL_RELAY_OWNED_MAX - owned[i] < room) room = PYCCL_RELAY_OWNED_MAX - owned[i];
    return room;
}

static pair *free_place(pyccl_relay *relay) {
    pair *p = relay->pairs;
    while (p->used) p++;
    return p;
}

uint32_t pyccl_relay_room(pyccl_relay *relay, const pyccl_relay_end ends[2]) {
    (void)pthread_mutex_lock(&relay->lock);
    const uint32_t room = room_for(relay, ends), least = replaced_by(relay, ends) != NULL;
    (void)pthread_mutex_unlock(&relay->lock);
    return room < least ? least : room;
}

pyccl_status pyccl_relay_add(pyccl_relay *relay, const pyccl_relay_end ends[2]) {
    (void)pthread_mutex_lock(&relay->lock);
    pair *replaced = replaced_by(relay, ends);
    if (replaced != NULL) pair_close(relay, replaced, true);
    const bool fits = room_for(relay, ends) > 0;
    const pyccl_status rc = fits ? pair_open(relay, free_place(relay), ends) : PYCCL_ERR_LIMIT;
    (void)pthread_mutex_unlock(&relay->lock);
    if (fits)
        (void)eventfd_write(relay->wake_fd, 1); /* it may be the first to fall silent */
    else
        for (int i = 0; i < 2; i++) close_if(ends[i].fd);
    return rc;
}

/* peer: NULL for all. */
static void close_all(pyccl_relay *relay, const uint8_t *peer) {
    (void)pthread_mutex_lock(&relay->lock);
    for (uint32_t i = 0; i < PYCCL_RELAY_PAIRS_MAX; i++) {
        pair *p = &relay->pairs[i];
        if (p->used && (peer == NULL || is_of(p, peer))) pair_close(relay, p, true);
    }
    (void)pthread_mutex_unlock(&relay->lock);
}

void pyccl_relay_forget(pyccl_relay *relay, const uint8_t peer[16]) {
    close_all(relay, peer);
}

uint32_t pyccl_relay_pairs(pyccl_relay *relay) {
    (void)pthread_mutex_lock(&relay->lock);
    const uint32_t count = relay->count;
    (void)pthread_mutex_unlock(&relay->lock);
    return count;
}

void pyccl_relay_free(pyccl_relay *relay) {
    if (relay == NULL) return;
    (void)pthread_mutex_lock(&relay->lock);
    relay->stopping = true;
    (void)pthread_mutex_unlock(&relay->lock);
    (void)eventfd_write(relay->wake_fd, 1);
    (void)pthread_join(relay->thread, NULL);
    close_all(relay, NULL);
    relay_delete(relay);
}
