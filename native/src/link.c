/* link.c: see link.h.                                             Spec: proto/wire.md 1, 3 */
#include "link.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/inet_diag.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "status.h"

#define RX_BUDGET_BYTES (4u << 20)   /* of one connection, before others have their turn */
#define TX_ROUNDS 32                 /* frames of one connection, before others have their turn */
#define UNSENT_S 0.04                /* of a connection's rate waits in its socket: less runs dry when the thread wakes late */
#define UNSENT_MIN (16 << 10)
#define UNSENT_MAX (256 << 10)
#define UNSENT_CHANGES 1.25          /* by less it stays as it is */
#define BEHIND 16                    /* times slower than the mean: what it is given would come last */
#define PATIENT_RTTS 4               /* of an operation: then there is time for it */
#define REVIVE 2                     /* times slower than its share */
#define REVIVE_NS INT64_C(2000000000)
#define FRESH_NS INT64_C(5000000000) /* of a connection with which work begins; BBR probes after 10 s */
#define STALE_NS INT64_C(8500000000) /* of one that works */
#define PROBE_STRETCH 2              /* so many times the least round trip, and more: BBR had better look whether that is still right */
#define PROBE_STRETCH_US 10000
#define PROBE_CWND 4                 /* of a connection that probes */
#define DEAD_RETRANSMITS 2           /* in a row */
#define STARTUP_GAIN (2 << 8)        /* of BBR's pacing, at least, while it seeks its rate */
#define LANES_LEAST 2                /* one alone stands still with each loss */
#define LOOK_NS INT64_C(20000000)
#define WANTED_AGAIN_NS INT64_C(10000000000)

/* ---- the plain transport ---- */

static ssize_t plain_send(pyccl_conn *conn, const struct iovec *iov, int count) {
    const struct msghdr message = {.msg_iov = (struct iovec *)iov, .msg_iovlen = (size_t)count};
    ssize_t n;
    do n = sendmsg(conn->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    while (n < 0 && errno == EINTR);
    return n;
}

static ssize_t plain_recv(pyccl_conn *conn, const struct iovec *iov, int count) {
    struct msghdr message = {.msg_iov = (struct iovec *)iov, .msg_iovlen = (size_t)count};
    ssize_t n;
    do n = recvmsg(conn->fd, &message, MSG_DONTWAIT);
    while (n < 0 && errno == EINTR);
    return n;
}

static const link_transport PLAIN = {plain_send, plain_recv};

/* ---- the sealing transport ---- */

static ssize_t sealed_send(pyccl_conn *conn, const struct iovec *iov, int count) {
    return seal_send(conn->seal, conn->fd, iov, count);
}

static ssize_t sealed_recv(pyccl_conn *conn, const struct iovec *iov, int count) {
    const ssize_t n = seal_recv(conn->seal, conn->fd, iov, count);
    if (seal_is_unsent(conn->seal)) conn->link->wants_send = true; /* it answers a new key */
    return n;
}

static const link_transport SEALED = {sealed_send, sealed_recv};

/* Bytes that the socket was given no room for yet, or news of an epoch. */
static bool is_unsent(const pyccl_conn *conn) { return conn->seal != NULL && seal_is_unsent(conn->seal); }

/* Bytes that came and were not read: epoll does not tell of them again. */
static bool has_more(const pyccl_conn *conn) { return conn->seal != NULL && seal_has_more(conn->seal); }

void link_conn_enter(pyccl_conn *conn, uint64_t number, const uint8_t id[16]) {
    if (conn->seal == NULL) return;
    seal_enter(conn->seal, number, id);
    conn->link->wants_send = true; /* also where nothing else is to be said: old keys end with their epoch */
}

void link_enter(pyccl_link *link, uint64_t number, const uint8_t id[16]) {
    for (uint32_t i = 0; i < PYCCL_CONNS_MAX; i++)
        if (link->conns[i] != NULL) link_conn_enter(link->conns[i], number, id);
}

/* ---- life of links and connections ---- */

static bool is_long(const link_env *env, int64_t rtt_ns) { return env->long_rtt_ns > 0 && rtt_ns >= env->long_rtt_ns; }

/* Long lines of a host are one line, near its end: the more links share it, the fewer connections each needs, and the more of them
 * only get in each other's way. */
static uint32_t lanes_first(const pyccl_link *link) {
    const link_env *env = link->env;
    if (env->lanes == 0) return PYCCL_CONNS_MAX;
    if (!link->is_counted) return env->lanes;
    const uint32_t share = (env->lanes + env->long_links - 1) / env->long_links;
    return share > LANES_LEAST ? share : env->lanes < LANES_LEAST ? env->lanes : LANES_LEAST;
}

static void lanes_begin(pyccl_link *link) {
    lanes_init(&link->lanes, &link->env->turn, lanes_first(link), PYCCL_CONNS_MAX);
}

static void count_long(pyccl_link *link) {
    const bool counts = link->conn_count > 0 && is_long(link->env, link->rtt_ns);
    if (counts == link->is_counted) return;
    link->env->long_links += counts ? 1 : -1u;
    link->is_counted = counts;
    if (counts) return;
    lanes_rest(&link->lanes);
    if (link->conn_count == 0) return;
    pace_fini(&link->pace); /* the line is short now, and has none: lanes_changed, which follows, lifts what is in force */
    pace_init(&link->pace, &link->env->crowd);
    if (!link->told_use) lanes_begin(link);
}

void link_init(pyccl_link *link, link_env *env, const uint8_t id[PYCCL_ID_SIZE], uint32_t slot) {
    memset(link, 0, sizeof *link);
    link->env = env;
    memcpy(link->id, id, PYCCL_ID_SIZE);
    link->slot = slot;
    link->heard_ns = env->now_ns;
    lanes_begin(link);
    pace_init(&link->pace, &env->crowd);
}

void link_fini(pyccl_link *link) {
    PYCCL_ASSERT(link->conn_count == 0);
    lanes_fini(&link->lanes);
    pace_fini(&link->pace);
    free(link->control);
    link->control = NULL;
    link->control_cap = link->control_count = 0;
}

static bool peer_is_loopback(int fd) {
    struct sockaddr_storage address = {0};
    socklen_t size = sizeof address;
    if (getpeername(fd, (struct sockaddr *)&address, &size) != 0) return false;
    if (address.ss_family == AF_INET)
        return ntohl(((const struct sockaddr_in *)&address)->sin_addr.s_addr) >> 24 == 127;
    if (address.ss_family != AF_INET6) return false;
    const struct in6_addr *ip = &((const struct sockaddr_in6 *)&address)->sin6_addr;
    return IN6_IS_ADDR_LOOPBACK(ip) || (IN6_IS_ADDR_V4MAPPED(ip) && ip->s6_addr[12] == 127);
}

/* The least of the greeting; 0: not known. */
static int64_t round_trip_ns(int fd) {
    struct tcp_info info = {0};
    socklen_t size = sizeof info;
    if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size) != 0 || info.tcpi_min_rtt == UINT32_MAX) return 0;
    return info.tcpi_min_rtt * INT64_C(1000);
}

/* A socket comes with CUBIC, set before its handshake: one that ever was BBR's paces for good, which costs a timer for
 * each segment and half the rate of a short line. On a long one BBR goes on at its rate through losses and pauses.
 * Options are advice: a socket that is no TCP socket refuses them, a kernel may lack BBR, and both work. */
static void socket_tune(const link_env *env, int fd, int64_t rtt_ns) {
    const int on = 1;
    const unsigned timeout_ms = (unsigned)env->user_timeout_ms;
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &timeout_ms, sizeof timeout_ms);
    if (is_long(env, rtt_ns)) (void)setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "bbr", 3);
}

/* BBR seeks its rate from now on, faster each round trip, from what the window is. Nothing else makes one fast again that
 * lost much or had little to send: it looks for a quarter more in eight round trips of having more to send than it may. */
static void socket_revive(int fd) {
    if (setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4) == 0) (void)setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "bbr", 3);
}

typedef enum bbr_state { NO_BBR, BBR_SEEKS, BBR_SETTLED } bbr_state; /* settled: it has stopped to seek */

static bbr_state socket_bbr(int fd) {
    union tcp_cc_info info = {{0}};
    socklen_t size = sizeof info;
    if (getsockopt(fd, IPPROTO_TCP, TCP_CC_INFO, &info, &size) != 0 || size != sizeof info.bbr) return NO_BBR;
    return info.bbr.bbr_pacing_gain < STARTUP_GAIN ? BBR_SETTLED : BBR_SEEKS;
}

static pyccl_status socket_prepare(const link_env *env, int fd, int64_t rtt_ns) {
    int type = 0;
    socklen_t size = sizeof type;
    if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) != 0) return PYCCL_ERR_OS;
    if (type != SOCK_STREAM) return PYCCL_ERR_ARGUMENT;
    const int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0) return PYCCL_ERR_OS;
    if (fcntl(fd, F_SETFD, FD_CLOEXEC) != 0) return PYCCL_ERR_OS;
    socket_tune(env, fd, rtt_ns);
    return PYCCL_OK;
}

static void conn_arm(pyccl_conn *conn) {
    if (conn->fd < 0) return;
    const uint32_t interest = (conn->paused || conn->held ? 0 : (uint32_t)EPOLLIN) | (conn->blocked ? (uint32_t)EPOLLOUT : 0);
    if (interest == conn->interest) return;
    struct epoll_event event = {.events = interest, .data.ptr = conn};
    if (epoll_ctl(conn->link->env->epoll_fd, EPOLL_CTL_MOD, conn->fd, &event) == 0) conn->interest = interest;
    else {
        conn->broken = errno;
        conn->link->env->broken = true;
    }
}

/* ---- what each connection of a long line can do ---- */

/* What waits in one socket can't leave by another, so with too much in a slow one the last of an operation comes late. */
static void unsent_limit(pyccl_conn *conn, double share) {
    const int most = share < UNSENT_MIN ? UNSENT_MIN : share > UNSENT_MAX ? UNSENT_MAX : (int)share;
    if (conn->unsent_max > 0 && most < conn->unsent_max * UNSENT_CHANGES && conn->unsent_max < most * UNSENT_CHANGES) return;
    conn->unsent_max = most;
    (void)setsockopt(conn->fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &most, sizeof most);
}

static bool conn_info(const pyccl_conn *conn, struct tcp_info *info) {
    socklen_t size = sizeof *info;
    return conn != NULL && getsockopt(conn->fd, IPPROTO_TCP, TCP_INFO, info, &size) == 0;
}

bool link_conn_has_unread(const pyccl_conn *conn) {
    int count = 0;
    return ioctl(conn->fd, FIONREAD, &count) == 0 && count > 0;
}

bool link_conn_is_dead(const pyccl_conn *conn, int64_t silence_ns) {
    struct tcp_info info = {0};
    if (conn->link->env->now_ns - conn->heard_ns >= silence_ns) return !link_conn_has_unread(conn);
    return conn_info(conn, &info) && info.tcpi_unacked > 0 && info.tcpi_retransmits >= DEAD_RETRANSMITS &&
           info.tcpi_last_ack_recv * INT64_C(1000000) >= silence_ns;
}

static void conn_learn(pyccl_conn *conn, const struct tcp_info *info) {
    const double paced = (double)info->tcpi_pacing_rate, rtt_us = info->tcpi_rtt > 0 ? info->tcpi_rtt : 1;
    const double window = (double)info->tcpi_snd_cwnd * info->tcpi_snd_mss * 1e6 / rtt_us;
    conn->rate = paced < window ? paced : window;
    conn->seeks_freely = info->tcpi_ca_state == TCP_CA_Open && info->tcpi_snd_cwnd > PROBE_CWND &&
                         info->tcpi_rtt < PROBE_STRETCH * (uint64_t)info->tcpi_min_rtt + PROBE_STRETCH_US;
    unsent_limit(conn, conn->rate * UNSENT_S);
}

static double share_of(const pyccl_link *link, double rate) { return rate / (link->carriers > 0 ? link->carriers : 1); }

static void flow_count(pyccl_link *link) {
    link->flow = 0;
    for (uint32_t i = 0; i < link->data_end; i++)
        if (link->conns[i] != NULL) link->flow += link->conns[i]->rate;
}

/* Ten seconds after its search began, or after a round trip shorter than all before, BBR lets a connection all but stop for
 * 0.2 s, to see the line without a queue, and what waits in that one comes late. A search that begins anew puts that off; where our
 * own pace is in force it sends no more than before. */
static bool will_probe(const pyccl_conn *conn, bool begins) {
    const int64_t age_ns = conn->link->env->now_ns - conn->revived_ns;
    return conn->seeks_freely && pace_limit(&conn->link->pace) > 0 && age_ns >= (begins ? FRESH_NS : STALE_NS);
}

/* When work begins, or all may send twice as much as before, those that are far below their share seek their rate again; as long
 * as nothing has been too much for the line and operations end before BBR has found it, all do. At any time, those that would
 * probe soon, also if they still seek. */
static void conns_revive(pyccl_link *link, bool begins) {
    const double limit = pace_limit(&link->pace), share = share_of(link, limit > 0 ? limit : link->flow);
    const bool seeks = limit == 0 && link->pace.lasted_ns < PATIENT_RTTS * link->rtt_ns;
    for (uint32_t i = 0; i < link->data_end; i++) {
        pyccl_conn *conn = link->conns[i];
        if (conn == NULL || link->env->now_ns < conn->revived_ns + REVIVE_NS) continue;
        const bool behind = begins && (seeks || conn->rate * REVIVE < share);
        const bool probes = will_probe(conn, begins);
        if ((!behind && !probes) || socket_bbr(conn->fd) < (probes ? BBR_SEEKS : BBR_SETTLED)) continue;
        conn->revived_ns = link->env->now_ns;
        socket_revive(conn->fd);
    }
}

/* The kernel keeps each connection's own pace below its share. A share and no common purse: what one does not use is little,
 * and nobody has to wake for it. */
static void pace_apply(pyccl_link *link) {
    const double limit = pace_limit(&link->pace);
    const unsigned long most = limit > 0 ? (unsigned long)share_of(link, limit) : ~0ul;
    link->paced = true;
    for (uint32_t i = 0; i < link->data_end; i++)
        if (link->conns[i] != NULL) (void)setsockopt(link->conns[i]->fd, SOL_SOCKET, SO_MAX_PACING_RATE, &most, sizeof most);
}

/* Connections came or went, another number of them carries data, or the rate is known better. */
static void lanes_changed(pyccl_link *link) {
    const uint32_t used = link->lanes.use < link->conn_count ? link->lanes.use : link->conn_count;
    uint32_t left = used;
    lanes_pause(&link->lanes);
    if (link->carriers > 0 && used > link->carriers)
        pace_widen(&link->pace, (double)used / link->carriers, link->env->now_ns, link->rtt_ns);
    if (used != link->carriers) pace_pause(&link->pace);
    link->carriers = used;
    link->wants_send = true;
    for (link->data_end = 0; left > 0; link->data_end++)
        if (link->conns[link->data_end] != NULL) left--;
    flow_count(link); /* what went took its part of it: none that is left may seem to be behind that */
    if (link->paced) pace_apply(link);
}

void link_use(pyccl_link *link, uint32_t conns) {
    link->told_use = conns > 0;
    if (conns > 0) lanes_init(&link->lanes, &link->env->turn, conns, conns);
    else lanes_begin(link);
    link->wanted_ns = 0;
    lanes_changed(link);
}

static pyccl_status conn_new(pyccl_link *link, int fd, const pyccl_conn_keys *keys, pyccl_conn **out) {
    pyccl_conn *conn = calloc(1, sizeof *conn);
    *out = conn;
    if (conn == NULL) return PYCCL_ERR_NOMEM;
    conn->link = link;
    conn->transport = keys != NULL ? &SEALED : &PLAIN;
    conn->seal = keys != NULL ? seal_new(keys, (ratchet_source){0}) : NULL;
    conn->fd = fd;
    conn->interest = EPOLLIN;
    conn->sent_ns = link->env->now_ns;
    conn->revived_ns = conn->sent_ns - REVIVE_NS;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = conn};
    if (keys != NULL && conn->seal == NULL) {
        free(conn);
        return PYCCL_ERR_NOMEM;
    }
    if (epoll_ctl(link->env->epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0) return PYCCL_OK;
    seal_free(conn->seal);
    free(conn);
    return PYCCL_ERR_OS;
}

pyccl_status link_conn_add(pyccl_link *link, int fd, const pyccl_conn_keys *keys, pyccl_conn **out) {
    *out = NULL;
    if (link->conn_count >= PYCCL_CONNS_MAX) return PYCCL_ERR_LIMIT;
    const bool near = peer_is_loopback(fd);
    const int64_t rtt_ns = round_trip_ns(fd);
    pyccl_status rc = socket_prepare(link->env, fd, rtt_ns);
    if (rc != PYCCL_OK) return rc;
    pyccl_conn *conn;
    rc = conn_new(link, fd, keys, &conn);
    if (rc != PYCCL_OK) return rc;
    while (link->conns[conn->index] != NULL) conn->index++;
    link->conns[conn->index] = conn;
    link->conn_count++;
    link->near = near;
    link->rtt_ns = rtt_ns;
    count_long(link);
    unsent_limit(conn, UNSENT_MAX);
    lanes_changed(link);
    conn->heard_ns = link->heard_ns = link->env->now_ns;
    link->wants_send = true;
    *out = conn;
    return PYCCL_OK;
}

static void tx_release(pyccl_conn *conn) {
    free(conn->data_owned);
    conn->data = NULL;
    conn->data_owned = NULL;
    conn->data_owner = NULL;
    conn->head_len = conn->head_sent = conn->data_len = conn->data_sent = 0;
}

void link_sink_drop(pyccl_conn *conn) {
    free(conn->sink.owned);
    memset(&conn->sink, 0, sizeof conn->sink);
    conn->at = NULL;
}

void link_conn_close(pyccl_conn *conn) {
    PYCCL_ASSERT(conn->fd >= 0);
    pyccl_link *link = conn->link;
    (void)epoll_ctl(link->env->epoll_fd, EPOLL_CTL_DEL, conn->fd, NULL);
    (void)shutdown(conn->fd, SHUT_RDWR); /* close alone does not end it while a forked child holds a copy */
    (void)close(conn->fd);
    conn->fd = -1;
    seal_free(conn->seal);
    conn->seal = NULL;
    tx_release(conn);
    link_sink_drop(conn);
    link->conns[conn->index] = NULL;
    link->conn_count--;
    count_long(link);
    lanes_changed(link);
    conn->grave_next = link->env->grave;
    link->env->grave = conn;
}

void link_bury(link_env *env) {
    while (env->grave != NULL) {
        pyccl_conn *conn = env->grave;
        env->grave = conn->grave_next;
        free(conn);
    }
}

void link_excuse(pyccl_link *link, bool all) {
    const int64_t now = link->env->now_ns;
    if (all) link->heard_ns = now;
    for (uint32_t i = 0; i < PYCCL_CONNS_MAX; i++) {
        pyccl_conn *conn = link->conns[i];
        if (conn == NULL || !(all || conn->paused || conn->held)) continue;
        conn->heard_ns = link->heard_ns = now;
    }
}

/* ---- control frames ---- */

void link_control_push(pyccl_link *link, const pyccl_frame *frame, const pyccl_spec *spec) {
    if (link->control_count == link->control_cap) {
        const size_t cap = link->control_cap > 0 ? link->control_cap * 2 : 32;
        link_control *grown = malloc(cap * sizeof *grown);
        PYCCL_ASSERT(grown != NULL);
        for (size_t i = 0; i < link->control_count; i++)
            grown[i] = link->control[(link->control_head + i) % link->control_cap];
        free(link->control);
        link->control = grown;
        link->control_cap = cap;
        link->control_head = 0;
    }
    link_control *entry = &link->control[(link->control_head + link->control_count++) % link->control_cap];
    entry->frame = *frame;
    if (spec != NULL) pyccl_spec_encode(spec, entry->spec);
    PYCCL_ASSERT((spec != NULL) == (frame->length == PYCCL_SPEC_SIZE));
    link->wants_send = true;
}

void link_control_clear(pyccl_link *link) { link->control_count = link->control_head = 0; }

/* ---- sending ---- */

static void head_put(pyccl_conn *conn, const pyccl_frame *frame, const uint8_t *payload, uint32_t size) {
    PYCCL_ASSERT(conn->head_len + PYCCL_FRAME_SIZE + size <= LINK_HEAD_BYTES);
    pyccl_frame_encode(frame, conn->head + conn->head_len);
    conn->head_len += PYCCL_FRAME_SIZE;
    if (size > 0) memcpy(conn->head + conn->head_len, payload, size);
    conn->head_len += size;
}

static void fill_control(pyccl_conn *conn) {
    pyccl_link *link = conn->link;
    while (link->control_count > 0 && conn->head_len + PYCCL_FRAME_SIZE + PYCCL_SPEC_SIZE <= LINK_HEAD_BYTES) {
        const link_control *entry = &link->control[link->control_head];
        head_put(conn, &entry->frame, entry->spec, entry->frame.length);
        link->control_head = (link->control_head + 1) % link->control_cap;
        link->control_count--;
    }
}

static void fill_data(pyccl_conn *conn) {
    pyccl_link *link = conn->link;
    while (conn->data == NULL && conn->head_len + PYCCL_FRAME_SIZE <= LINK_HEAD_BYTES) {
        link_load load = {.data = NULL};
        if (!link->env->hooks->load_next(link->env->ctx, link, conn, &load)) return;
        const uint32_t size = load.frame.length;
        PYCCL_ASSERT((load.data != NULL) == (size > 0));
        if (size <= LINK_INLINE_MAX && conn->head_len + PYCCL_FRAME_SIZE + size <= LINK_HEAD_BYTES) {
            head_put(conn, &load.frame, load.data, size);
            free(load.owned);
            continue;
        }
        head_put(conn, &load.frame, NULL, 0);
        conn->data = load.data;
        conn->data_len = size;
        conn->data_sent = 0;
        conn->data_owner = load.owner;
        conn->data_owned = load.owned;
    }
}

static bool tx_pending(const pyccl_conn *conn) { return conn->head_sent < conn->head_len || conn->data != NULL; }

static void tx_advance(pyccl_conn *conn, size_t sent) {
    const size_t head = conn->head_len - conn->head_sent < sent ? conn->head_len - conn->head_sent : sent;
    conn->head_sent += (uint32_t)head;
    conn->data_sent += (uint32_t)(sent - head);
    PYCCL_ASSERT(conn->data_sent <= conn->data_len);
    if (conn->head_sent == conn->head_len && conn->data_sent == conn->data_len) tx_release(conn);
}

static void conn_break(pyccl_conn *conn, int why) {
    if (conn->broken == 0) conn->broken = why;
    conn->link->env->broken = true;
}

static size_t tx_room(pyccl_link *link) {
    link_env *env = link->env;
    const size_t room = throttle_room(&env->tx, env->now_ns);
    if (room > 0) return room;
    link->starved = true;
    env->tx_due = throttle_due(&env->tx);
    return 0;
}

/* One send, of data no more than `room`; true when all of that left, so that more may be taken. */
static bool conn_send(pyccl_conn *conn, size_t room) {
    struct iovec iov[2];
    int count = 0;
    size_t want = 0;
    if (conn->head_sent < conn->head_len)
        iov[count++] = (struct iovec){conn->head + conn->head_sent, conn->head_len - conn->head_sent};
    if (conn->data != NULL && room > 0) {
        const size_t left = conn->data_len - conn->data_sent, most = room < (size_t)conn->unsent_max ? room : (size_t)conn->unsent_max;
        iov[count++] = (struct iovec){(void *)(uintptr_t)(conn->data + conn->data_sent), left < most ? left : most};
    }
    if (count == 0) return false;
    for (int i = 0; i < count; i++) want += iov[i].iov_len;
    const ssize_t n = conn->transport->send(conn, iov, count);
    if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK) {
        conn_break(conn, errno);
        return false;
    }
    const size_t sent = n > 0 ? (size_t)n : 0;
    if (sent > 0) {
        pyccl_link *link = conn->link;
        link->tx_bytes += sent;
        throttle_take(&link->env->tx, sent);
        conn->sent_ns = link->env->now_ns;
        if (conn->data_owner != NULL) link->env->hooks->moved(link->env->ctx, conn->data_owner);
        tx_advance(conn, sent);
    }
    if (sent == want && !is_unsent(conn)) return true;
    conn->blocked = true;
    conn_arm(conn);
    return false;
}

/* What was sealed and had no room; true: all of it has left. */
static bool conn_send_rest(pyccl_conn *conn) {
    if (seal_send(conn->seal, conn->fd, NULL, 0) < 0) {
        conn_break(conn, errno);
        return false;
    }
    conn->blocked = is_unsent(conn);
    conn_arm(conn);
    return !conn->blocked;
}

/* So slow that the others carry the rest of a short operation before it would have carried one piece. */
static bool is_behind(const pyccl_conn *conn) {
    const pyccl_link *link = conn->link;
    if (conn->rate == 0 || conn->rate * BEHIND * link->carriers >= link->flow) return false;
    return pace_lasts(&link->pace, link->env->now_ns, link->rtt_ns) < PATIENT_RTTS * link->rtt_ns;
}

static bool conn_flush_once(pyccl_conn *conn) {
    if (conn->blocked || conn->broken != 0) return false;
    if (is_unsent(conn) && !conn_send_rest(conn)) return false;
    if (!tx_pending(conn)) {
        fill_control(conn);
        conn->passed = conn->index < conn->link->data_end && is_behind(conn);
        if (conn->index < conn->link->data_end && !conn->passed && tx_room(conn->link) > 0) fill_data(conn);
        if (!tx_pending(conn)) return false;
    }
    return conn_send(conn, tx_room(conn->link));
}

/* Every connection that carries data has more than it can take, and no cap is the reason. */
static bool is_busy(const pyccl_link *link) {
    uint32_t full = 0;
    for (uint32_t i = 0; i < link->data_end; i++) {
        if (link->conns[i] == NULL) continue;
        if (link->conns[i]->passed) continue;
        if (!link->conns[i]->blocked) return false;
        full++;
    }
    return full > 0 && !link->starved;
}

static void round_trips(pace_counts *counts, const struct tcp_info *info) {
    const int64_t now_ns = info->tcpi_rtt * INT64_C(1000), least_ns = info->tcpi_min_rtt * INT64_C(1000);
    if (now_ns > counts->rtt_ns) counts->rtt_ns = now_ns;
    if (now_ns - least_ns < counts->queue_ns) counts->queue_ns = now_ns > least_ns ? now_ns - least_ns : 0;
}

/* Of all connections; round trips of those that carry data. */
static void tcp_counts(pyccl_link *link, uint64_t *acked, pace_counts *counts) {
    *acked = 0;
    *counts = (pace_counts){.rtt_ns = link->rtt_ns, .queue_ns = INT64_MAX};
    for (uint32_t i = 0; i < PYCCL_CONNS_MAX; i++) {
        struct tcp_info info = {0};
        if (!conn_info(link->conns[i], &info)) continue;
        *acked += info.tcpi_bytes_acked;
        counts->delivered += (uint64_t)info.tcpi_delivered * info.tcpi_snd_mss;
        counts->sent += info.tcpi_data_segs_out;
        counts->repeated += info.tcpi_total_retrans;
        conn_learn(link->conns[i], &info);
        if (i < link->data_end && !link->conns[i]->passed) round_trips(counts, &info); /* of one that rests it is an old one */
    }
    flow_count(link);
}

uint64_t link_delivered(const pyccl_link *link) {
    uint64_t sum = 0;
    for (uint32_t i = 0; i < PYCCL_CONNS_MAX; i++) {
        struct tcp_info info = {0};
        if (conn_info(link->conns[i], &info)) sum += info.tcpi_bytes_acked + (uint64_t)info.tcpi_sacked * info.tcpi_snd_mss;
    }
    return sum;
}

/* What the kernel has counted is looked at while the line is busy and until what was sent then has arrived, and where that begins
 * and ends. Returns whether the number of connections has changed. */
static bool line_learn(pyccl_link *link) {
    const int64_t now = link->env->now_ns;
    const int64_t spell_ns = link->pace.spell_ns;
    const double limit = pace_limit(&link->pace);
    const bool busy = is_busy(link);
    if (busy == link->pace.busy && (!link->pace.spell || now - link->looked_ns < LOOK_NS)) return false;
    uint64_t acked;
    pace_counts counts;
    tcp_counts(link, &acked, &counts);
    link->looked_ns = now;
    if (acked > link->acked) link->env->long_acked += acked - link->acked; /* less: some are closed */
    link->acked = acked;
    if (pace_note(&link->pace, now, &counts, busy)) pace_apply(link);
    const double now_limit = pace_limit(&link->pace);
    const bool freed = limit > 0 && (now_limit == 0 || now_limit >= REVIVE * limit);
    conns_revive(link, freed || link->pace.spell_ns != spell_ns);
    if (link->env->lanes == 0) return false;
    const bool tells = busy && (link->lanes.before > 0 || link->lanes.proving > 0 || pace_is_found(&link->pace));
    return lanes_note(&link->lanes, now, acked, link->env->long_acked, tells, link->conn_count, link->rtt_ns);
}

/* How many connections a long line is worth is found out while it works. Those to begin with come unasked. */
static void lanes_look(pyccl_link *link) {
    const link_env *env = link->env;
    const bool learns = is_long(env, link->rtt_ns), searches = learns && env->lanes > 0;
    const double rate = link->lanes.rate;
    const bool shares = searches && !link->told_use && lanes_least(&link->lanes, lanes_first(link));
    const bool changed = (learns && line_learn(link)) || shares;
    if (changed) link->wanted_ns = 0;
    if (changed || link->lanes.rate != rate) lanes_changed(link);
    if (!link->told_use && (!searches || link->lanes.use <= env->lanes)) return;
    if (link->conn_count >= link->lanes.use || (link->wanted_ns != 0 && env->now_ns - link->wanted_ns < WANTED_AGAIN_NS)) return;
    link->wanted_ns = env->now_ns;
    env->hooks->wants_conns(env->ctx, link);
}

void link_pump(pyccl_link *link) {
    link->wants_send = false;
    if (link->conn_count == 0) return;
    bool more = true;
    for (int round = 0; more && round < TX_ROUNDS; round++) {
        more = false;
        for (uint32_t i = 0; i < PYCCL_CONNS_MAX; i++) {
            pyccl_conn *conn = link->conns[(link->turn + i) % PYCCL_CONNS_MAX];
            if (conn != NULL) more |= conn_flush_once(conn);
        }
    }
    if (more) link->wants_send = true;
    lanes_look(link);
}

void link_conn_writable(pyccl_conn *conn) {
    conn->blocked = false;
    conn_arm(conn);
    conn->link->wants_send = true;
}

void link_conn_heartbeat(pyccl_conn *conn) {
    if (conn->blocked || conn->broken != 0 || tx_pending(conn)) return;
    const pyccl_frame frame = {.type = PYCCL_FRAME_HEARTBEAT};
    head_put(conn, &frame, NULL, 0);
    (void)conn_send(conn, 0);
}

/* ---- receiving ---- */

static void frame_finish(pyccl_conn *conn) {
    link_env *env = conn->link->env;
    conn->in_payload = false;
    const link_verdict verdict = env->hooks->frame_end(env->ctx, conn);
    if (conn->fd < 0) return;
    link_sink_drop(conn);
    if (verdict == LINK_REFUSE) env->hooks->refused(env->ctx, conn->link);
}

static void frame_judge(pyccl_conn *conn) {
    link_env *env = conn->link->env;
    memset(&conn->sink, 0, sizeof conn->sink);
    conn->at = NULL;
    const link_verdict verdict = env->hooks->frame_begin(env->ctx, conn);
    if (conn->fd < 0) return;
    conn->paused = verdict == LINK_PAUSE;
    conn_arm(conn);
    if (verdict == LINK_REFUSE) env->hooks->refused(env->ctx, conn->link);
    if (verdict != LINK_GO) return;
    conn->header_have = 0;
    conn->in_payload = true;
    conn->left = conn->frame.length;
    conn->at = conn->sink.dst;
    if (conn->left == 0) frame_finish(conn);
}

static void header_bytes(pyccl_conn *conn) {
    uint32_t n = PYCCL_FRAME_SIZE - conn->header_have;
    if (n > conn->stage_have - conn->stage_at) n = conn->stage_have - conn->stage_at;
    memcpy(conn->header + conn->header_have, conn->stage + conn->stage_at, n);
    conn->header_have += n;
    conn->stage_at += n;
    if (conn->header_have < PYCCL_FRAME_SIZE) return;
    if (pyccl_frame_decode_untrusted(conn->header, &conn->frame) == PYCCL_OK) frame_judge(conn);
    else conn->link->env->hooks->refused(conn->link->env->ctx, conn->link);
}

/* `n` payload bytes have been put where they belong. */
static void payload_arrived(pyccl_conn *conn, uint32_t n) {
    link_env *env = conn->link->env;
    PYCCL_ASSERT(n <= conn->left);
    conn->left -= n;
    if (conn->at != NULL) conn->at += n;
    if (conn->sink.owner != NULL) env->hooks->moved(env->ctx, conn->sink.owner);
    if (conn->left == 0) frame_finish(conn);
}

static void payload_bytes(pyccl_conn *conn) {
    uint32_t n = conn->stage_have - conn->stage_at;
    if (n > conn->left) n = conn->left;
    if (conn->at != NULL) memcpy(conn->at, conn->stage + conn->stage_at, n);
    conn->stage_at += n;
    payload_arrived(conn, n);
}

static void stage_consume(pyccl_conn *conn) {
    while (conn->stage_at < conn->stage_have && conn->fd >= 0 && !conn->paused) {
        if (conn->in_payload) payload_bytes(conn);
        else header_bytes(conn);
    }
    if (conn->stage_at == conn->stage_have) conn->stage_at = conn->stage_have = 0;
}

/* 0: the connection is held. One that is ending is read whatever the cap is, or its bytes are lost. */
static size_t rx_room(pyccl_conn *conn) {
    link_env *env = conn->link->env;
    const size_t room = conn->broken != 0 ? SIZE_MAX : throttle_room(&env->rx, env->now_ns);
    if (room > 0) return room;
    conn->held = true;
    env->rx_due = throttle_due(&env->rx);
    conn_arm(conn);
    return 0;
}

/* One receive: the payload straight to its place, what follows it into the stage. Bytes read; 0: stop. */
static size_t conn_recv(pyccl_conn *conn) {
    pyccl_link *link = conn->link;
    struct iovec iov[2];
    int count = 0;
    size_t direct = 0, want = 0;
    const size_t room = rx_room(conn);
    PYCCL_ASSERT(conn->stage_have == 0);
    if (room == 0) return 0;
    if (conn->in_payload) {
        direct = conn->at != NULL || conn->left < LINK_SINK_BYTES ? conn->left : LINK_SINK_BYTES;
        if (direct > room) direct = room;
        iov[count++] = (struct iovec){conn->at != NULL ? conn->at : link->env->discard, direct};
        want = direct;
    }
    if (!conn->in_payload || direct == conn->left) {
        iov[count++] = (struct iovec){conn->stage, LINK_STAGE_BYTES};
        want += LINK_STAGE_BYTES;
    }
    const ssize_t n = conn->transport->recv(conn, iov, count);
    if (n == 0) conn_break(conn, -1);
    if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK) conn_break(conn, errno);
    if (n <= 0) return 0;
    link->rx_bytes += (size_t)n;
    throttle_take(&link->env->rx, (size_t)n);
    conn->heard_ns = link->heard_ns = link->received_ns = link->env->now_ns;
    const size_t in_place = (size_t)n < direct ? (size_t)n : direct;
    conn->stage_have = (uint32_t)((size_t)n - in_place);
    if (in_place > 0) payload_arrived(conn, (uint32_t)in_place);
    if (conn->fd >= 0) stage_consume(conn);
    return (size_t)n == want ? (size_t)n : 0;
}

static void conn_read(pyccl_conn *conn, size_t budget) {
    size_t done = 0;
    while (conn->fd >= 0 && !conn->paused && (done < budget || has_more(conn))) {
        const size_t n = conn_recv(conn);
        if (n == 0) return;
        done += n;
    }
}

void link_conn_readable(pyccl_conn *conn) {
    pyccl_link *link = conn->link;
    if (conn->broken == 0) conn_read(conn, RX_BUDGET_BYTES);
    if (link->pace.spell && link->env->now_ns - link->looked_ns >= LOOK_NS) link->wants_send = true; /* have a look */
}

void link_feed(pyccl_link *link, bool tx, bool rx) {
    if (tx && link->starved) {
        link->starved = false;
        link->wants_send = true;
    }
    if (link->conn_count == 0) return;
    do link->turn = (link->turn + 1) % PYCCL_CONNS_MAX;
    while (link->conns[link->turn] == NULL);
    for (uint32_t i = 0; rx && i < PYCCL_CONNS_MAX; i++) {
        pyccl_conn *conn = link->conns[(link->turn + i) % PYCCL_CONNS_MAX];
        if (conn == NULL || !conn->held) continue;
        conn->held = false;
        conn_arm(conn);
        if (has_more(conn)) link_conn_readable(conn);
    }
}

void link_conn_drain(pyccl_conn *conn) {
    uint64_t before;
    do {
        before = conn->link->rx_bytes;
        conn_read(conn, SIZE_MAX);
    } while (conn->fd >= 0 && !conn->paused && conn->link->rx_bytes != before);
}

void link_conn_resume(pyccl_conn *conn) {
    PYCCL_ASSERT(conn->paused && conn->header_have == PYCCL_FRAME_SIZE);
    conn->paused = false;
    frame_judge(conn);
    if (conn->fd >= 0) stage_consume(conn);
    if (conn->fd >= 0 && !conn->paused && !conn->held && has_more(conn)) link_conn_readable(conn);
}

/* ---- borrowed memory ---- */

/* The frame must be completed, or its receiver loses the thread: send the rest from memory of our own. */
static void tx_disown(pyccl_conn *conn) {
    const uint32_t rest = conn->data_len - conn->data_sent;
    uint8_t *copy = malloc(rest);
    if (copy == NULL) {
        tx_release(conn);
        conn_break(conn, ENOMEM);
        return;
    }
    memcpy(copy, conn->data + conn->data_sent, rest);
    conn->data = copy;
    conn->data_owned = copy;
    conn->data_owner = NULL;
    conn->data_len = rest;
    conn->data_sent = 0;
}

void link_disown(pyccl_link *link, const void *owner) {
    for (uint32_t i = 0; i < PYCCL_CONNS_MAX; i++) {
        pyccl_conn *conn = link->conns[i];
        if (conn == NULL) continue;
        if (conn->data_owner == owner) tx_disown(conn);
        if (conn->sink.owner == owner) link_sink_drop(conn);
    }
}

void link_redirect(pyccl_link *link, const void *owner, const uint8_t *from, uint64_t bytes, const uint8_t *to) {
    for (uint32_t i = 0; link->conn_count > 0 && i < PYCCL_CONNS_MAX; i++) {
        pyccl_conn *conn = link->conns[i];
        if (conn == NULL || conn->data == NULL || conn->data_owner != owner) continue;
        if (conn->data >= from && (uint64_t)(conn->data - from) < bytes) conn->data = to + (conn->data - from);
    }
}

bool link_reads(const pyccl_link *link, const uint8_t *from, uint64_t bytes) {
    for (uint32_t i = 0; link->conn_count > 0 && i < PYCCL_CONNS_MAX; i++) {
        const pyccl_conn *conn = link->conns[i];
        if (conn != NULL && conn->data != NULL && conn->data >= from && (uint64_t)(conn->data - from) < bytes) return true;
    }
    return false;
}
