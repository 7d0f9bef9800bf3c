/* test_link.c: which connections of a long link are given what it has to send, how much waits in their sockets, and what
 * moves under caps, in computed time. */
#include <linux/inet_diag.h>
#include <linux/tcp.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "link.h"
#include "tcp_pair.h"
#include "test.h"

#define CONNS 3
#define MS INT64_C(1000000)

static uint8_t PIECE[1 << 20];

typedef struct world {
    link_env env;
    pyccl_link link;
    pyccl_conn *conns[CONNS];
    int others[CONNS];               /* our ends */
    uint32_t left, given[CONNS];     /* pieces */
} world;

static bool load_next(void *ctx, pyccl_link *link, pyccl_conn *conn, link_load *load) {
    world *w = ctx;
    (void)link;
    if (w->left == 0) return false;
    w->left--;
    w->given[conn->index]++;
    *load = (link_load){.frame = {.type = PYCCL_FRAME_DATA, .length = sizeof PIECE}, .data = PIECE, .owner = w};
    return true;
}

static void moved(void *ctx, const void *owner) {
    (void)ctx;
    (void)owner;
}

static link_verdict goes(void *ctx, pyccl_conn *conn) {
    (void)ctx;
    (void)conn;
    return LINK_GO; /* what comes is discarded */
}

static const link_hooks HOOKS = {.load_next = load_next, .moved = moved, .frame_begin = goes, .frame_end = goes};

/* Of a world whose env has its settings. */
static void link_open(world *w) {
    w->env.epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    pace_crowd_init(&w->env.crowd);
    throttle_init(&w->env.tx, 0, 0);
    throttle_init(&w->env.rx, 0, 0);
    const uint8_t id[PYCCL_ID_SIZE] = {1};
    link_init(&w->link, &w->env, id, 0);
}

static void world_open(world *w) {
    *w = (world){.env = {.hooks = &HOOKS, .ctx = w, .now_ns = 1000 * MS, .lanes = CONNS}};
    link_open(w);
    for (int i = 0; i < CONNS; i++) {
        int pair[2];
        REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
        REQUIRE(link_conn_add(&w->link, pair[0], NULL, &w->conns[i]) == PYCCL_OK);
        w->others[i] = pair[1];
    }
    w->link.rtt_ns = 150 * MS;
}

static void world_close(world *w) {
    for (int i = 0; i < CONNS; i++) {
        link_conn_close(w->conns[i]);
        if (w->others[i] >= 0) close(w->others[i]);
    }
    link_bury(&w->env);
    link_fini(&w->link);
    close(w->env.epoll_fd);
}

static void rates(world *w, double first, double second, double third) {
    const double of[CONNS] = {first, second, third};
    w->link.flow = 0;
    for (int i = 0; i < CONNS; i++) w->link.flow += w->conns[i]->rate = of[i];
}

TEST(link_gives_all_connections_something_as_long_as_no_rate_is_known) {
    world w;
    world_open(&w);
    w.left = 100;
    link_pump(&w.link);
    for (int i = 0; i < CONNS; i++) CHECK(w.given[i] > 0);
    world_close(&w);
}

TEST(link_gives_nothing_of_a_short_operation_to_a_connection_far_behind) {
    world w;
    world_open(&w);
    rates(&w, 10e6, 10e6, 0.1e6);
    w.left = 100;
    link_pump(&w.link);
    CHECK(w.given[0] > 0 && w.given[1] > 0);
    CHECK_EQ(w.given[2], 0);
    w.link.pace.spell = true; /* so long that it is none */
    w.link.pace.spell_ns = w.env.now_ns - 5 * w.link.rtt_ns;
    w.link.pace.last_ns = w.env.now_ns;
    link_pump(&w.link);
    CHECK(w.given[2] > 0);
    world_close(&w);
}

TEST(link_gives_a_slow_connection_what_it_can_carry_in_time) {
    world w;
    world_open(&w);
    rates(&w, 10e6, 10e6, 2e6);
    w.left = 100;
    link_pump(&w.link);
    for (int i = 0; i < CONNS; i++) CHECK(w.given[i] > 0);
    world_close(&w);
}

TEST(link_sends_no_more_at_once_than_may_wait_in_the_socket) {
    world w;
    world_open(&w);
    CHECK_EQ(w.conns[0]->unsent_max, 256 << 10); /* nothing is known of it */
    rates(&w, 10e6, 0.1e6, 0.1e6);
    w.conns[0]->unsent_max = 4096;
    w.left = 1;
    link_pump(&w.link);
    CHECK_EQ(w.given[0], 1);
    CHECK(w.conns[0]->data_sent > 0);
    CHECK(w.conns[0]->blocked || w.conns[0]->data_sent % 4096 == 0);
    world_close(&w);
}

static uint32_t bbr_gain(int fd) {
    union tcp_cc_info info = {{0}};
    socklen_t size = sizeof info;
    REQUIRE(getsockopt(fd, IPPROTO_TCP, TCP_CC_INFO, &info, &size) == 0 && size == sizeof info.bbr);
    return info.bbr.bbr_pacing_gain;
}

/* Work goes on until BBR seeks the line's rate, or has stopped to. */
static void work_until(world *w, int other, bool seeks) {
    static uint8_t sink[1 << 20];
    const double until = test_clock_s() + 30;
    do {
        REQUIRE(test_clock_s() < until);
        w->left = 100;
        link_conn_writable(w->conns[0]);
        link_pump(&w->link);
        while (recv(other, sink, sizeof sink, MSG_DONTWAIT) > 0) {}
    } while ((bbr_gain(w->conns[0]->fd) >= 2 << 8) != seeks);
}

/* One connection over TCP; pair[1] is its other end. */
static void tcp_world_open(world *w, int *pair) {
    link_open(w);
    tcp_pair(pair);
    REQUIRE(link_conn_add(&w->link, pair[0], NULL, &w->conns[0]) == PYCCL_OK);
}

static void tcp_world_close(world *w, const int *pair) {
    link_conn_close(w->conns[0]);
    link_bury(&w->env);
    link_fini(&w->link);
    close(pair[1]);
    close(w->env.epoll_fd);
}

TEST(link_renews_the_search_of_a_paced_connection_before_bbr_would_probe) {
    world w = {.env = {.hooks = &HOOKS, .ctx = &w, .now_ns = 1000 * MS, .lanes = 1, .long_rtt_ns = 1, .user_timeout_ms = 60000}};
    int pair[2];
    tcp_world_open(&w, pair);
    char name[16] = "";
    socklen_t size = sizeof name;
    REQUIRE(getsockopt(pair[0], IPPROTO_TCP, TCP_CONGESTION, name, &size) == 0);
    if (strcmp(name, "bbr") == 0) {
        pyccl_conn *conn = w.conns[0];
        const int64_t second = 1000 * MS, begun = conn->revived_ns = w.env.now_ns;
        work_until(&w, pair[1], true);
        work_until(&w, pair[1], false);
        w.left = 100;
        w.link.pace.last_ns = w.env.now_ns += 9 * second; /* it has worked all the time */
        link_pump(&w.link);
        CHECK_EQ(conn->revived_ns, begun); /* no pace of ours would keep a search from sending too much */
        w.link.pace.rate = 1e9;
        w.link.pace.last_ns = w.env.now_ns += second;
        link_pump(&w.link);
        CHECK_EQ(conn->revived_ns, w.env.now_ns);
        work_until(&w, pair[1], true); /* it seeks; BBR probes from there, too */
        w.left = 100;
        w.link.pace.last_ns = w.env.now_ns += 9 * second;
        link_pump(&w.link);
        CHECK_EQ(conn->revived_ns, w.env.now_ns);
    }
    tcp_world_close(&w, pair);
}

/* What the kernel paces at 1 MB/s: 40 ms of it may wait, and the socket itself knows so. */
TEST(link_tells_each_socket_how_much_may_wait_in_it) {
    world w = {.env = {.hooks = &HOOKS, .ctx = &w, .now_ns = 1000 * MS, .long_rtt_ns = 1, .user_timeout_ms = 60000}};
    int pair[2], waits = 0;
    tcp_world_open(&w, pair);
    socklen_t size = sizeof waits;
    REQUIRE(getsockopt(pair[0], IPPROTO_TCP, TCP_NOTSENT_LOWAT, &waits, &size) == 0);
    CHECK_EQ(waits, 256 << 10); /* nothing is known of it */
    const unsigned long paced = 1000000;
    REQUIRE(setsockopt(pair[0], SOL_SOCKET, SO_MAX_PACING_RATE, &paced, sizeof paced) == 0);
    w.left = 100;
    link_pump(&w.link); /* more than it takes: the line is busy, and looked at */
    CHECK(w.conns[0]->blocked);
    CHECK(w.conns[0]->rate > 0 && w.conns[0]->rate <= 1e6);
    REQUIRE(getsockopt(pair[0], IPPROTO_TCP, TCP_NOTSENT_LOWAT, &waits, &size) == 0);
    CHECK_EQ(waits, (int)(w.conns[0]->rate * 0.04) > 16 << 10 ? (int)(w.conns[0]->rate * 0.04) : 16 << 10);
    tcp_world_close(&w, pair);
}

/* The connections of one lead to the other. */
static void worlds_join(world *from, world *to) {
    world_open(from);
    world_open(to);
    for (int i = 0; i < CONNS; i++) {
        link_conn_close(to->conns[i]);
        close(to->others[i]);
        to->others[i] = -1;
        REQUIRE(link_conn_add(&to->link, from->others[i], NULL, &to->conns[i]) == PYCCL_OK);
        from->others[i] = -1;
    }
    link_bury(&to->env);
}

/* All that can move now: what the engine's thread does until it has to wait. */
static void move_all(world *from, world *to) {
    uint64_t before;
    do {
        REQUIRE(from->link.tx_bytes < UINT64_C(1) << 30); /* no cap at all */
        before = from->link.tx_bytes + to->link.rx_bytes;
        from->left = 100;
        for (int i = 0; i < CONNS; i++) link_conn_writable(from->conns[i]);
        link_pump(&from->link);
        for (int i = 0; i < CONNS; i++)
            if (!to->conns[i]->held) link_conn_readable(to->conns[i]);
    } while (from->link.tx_bytes + to->link.rx_bytes != before);
}

/* As the engine's thread: it sleeps whole milliseconds, until a cap says that there is room. */
static void sleep_until_room(world *w, world *other) {
    const int64_t due = w->env.tx_due < w->env.rx_due ? w->env.tx_due : w->env.rx_due;
    REQUIRE(due > w->env.now_ns && due != INT64_MAX);
    w->env.now_ns += (due - w->env.now_ns + MS - 1) / MS * MS;
    other->env.now_ns = w->env.now_ns;
    const bool tx = w->env.now_ns >= w->env.tx_due, rx = w->env.now_ns >= w->env.rx_due;
    if (tx) w->env.tx_due = INT64_MAX;
    if (rx) w->env.rx_due = INT64_MAX;
    link_feed(&w->link, tx, rx);
}

/* Bytes that a link with always more to send moves in two seconds, over the cap of its sender or of its receiver. */
static double share_of_cap(uint64_t cap, bool up) {
    world *from = calloc(1, sizeof *from), *to = calloc(1, sizeof *to);
    REQUIRE(from != NULL && to != NULL);
    worlds_join(from, to);
    world *capped = up ? from : to, *free_one = up ? to : from;
    throttle_init(up ? &from->env.tx : &to->env.rx, cap, from->env.now_ns);
    capped->env.tx_due = capped->env.rx_due = INT64_MAX;
    const int64_t begun = from->env.now_ns;
    while (from->env.now_ns < begun + 2000 * MS) {
        move_all(from, to);
        sleep_until_room(capped, free_one);
    }
    const double moved = (double)(up ? from->link.tx_bytes : to->link.rx_bytes);
    for (int i = 0; up && i < CONNS; i++) CHECK(from->conns[i]->sent_ns > begun + 1000 * MS); /* each in its turn */
    const double seconds = (double)(from->env.now_ns - begun) / (1000.0 * MS);
    world_close(from);
    world_close(to);
    free(from);
    free(to);
    return moved / (double)cap / seconds;
}

static void moves_at_the_rate(bool up) {
    const uint64_t caps[] = {125000, 1000000, 6250000, 125000000};
    for (size_t i = 0; i < sizeof caps / sizeof *caps; i++) {
        const double share = share_of_cap(caps[i], up);
        CHECK(share > 0.95 && share < 1.05);
    }
}

TEST(link_sends_at_the_rate_of_an_upload_cap_and_not_slower) { moves_at_the_rate(true); }
TEST(link_receives_at_the_rate_of_a_download_cap_and_not_slower) { moves_at_the_rate(false); }

/* With two connections each, of which one is closed, so that it is counted as a long link. */
static void long_links_open(link_env *env, pyccl_link *links, pyccl_conn **conns, int *others, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        const uint8_t id[PYCCL_ID_SIZE] = {(uint8_t)(i + 1)};
        link_init(&links[i], env, id, i);
        for (uint32_t k = 2 * i; k < 2 * i + 2; k++) {
            int pair[2];
            REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
            REQUIRE(link_conn_add(&links[i], pair[0], NULL, &conns[k]) == PYCCL_OK);
            others[k] = pair[1];
        }
        links[i].rtt_ns = 150 * MS;
        link_conn_close(conns[2 * i]);
    }
}

TEST(link_has_the_fewer_connections_in_use_the_more_long_links_share_the_line) {
    static const uint32_t first[] = {8, 4, 3, 2, 2, 2};
    enum { LINKS = sizeof first / sizeof *first };
    world w = {.left = 0};
    w.env = (link_env){.hooks = &HOOKS, .ctx = &w, .now_ns = 1000 * MS, .lanes = 8, .long_rtt_ns = 5 * MS};
    w.env.epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    pace_crowd_init(&w.env.crowd);
    throttle_init(&w.env.tx, 0, 0);
    throttle_init(&w.env.rx, 0, 0);
    pyccl_link *links = calloc(LINKS, sizeof *links);
    pyccl_conn *conns[2 * LINKS];
    int others[2 * LINKS];
    REQUIRE(links != NULL);
    long_links_open(&w.env, links, conns, others, LINKS);
    for (uint32_t left = LINKS; left > 0; left--) {
        CHECK_EQ(w.env.long_links, left);
        for (uint32_t i = 0; i < left; i++) {
            link_pump(&links[i]);
            CHECK_EQ(links[i].lanes.use, first[left - 1]);
        }
        link_conn_close(conns[2 * left - 1]);
    }
    CHECK_EQ(w.env.long_links, 0);
    links[0].is_counted = true; /* as if it had been long until a nearer connection came */
    w.env.long_links = 1;
    int pair[2];
    pyccl_conn *nearer;
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    links[0].lanes.use = 2;
    links[0].pace.rate = 1e6;
    (void)pace_note(&links[0].pace, w.env.now_ns, &(pace_counts){.rtt_ns = 100 * MS}, true);
    CHECK_EQ(w.env.crowd.busy, 1);
    REQUIRE(link_conn_add(&links[0], pair[0], NULL, &nearer) == PYCCL_OK);
    CHECK_EQ(w.env.long_links, 0);
    CHECK_EQ(links[0].lanes.use, 8);
    CHECK(links[0].pace.rate == 0);
    CHECK_EQ(w.env.crowd.busy, 0);
    link_conn_close(nearer);
    close(pair[1]);
    link_bury(&w.env);
    for (uint32_t i = 0; i < LINKS; i++) link_fini(&links[i]);
    for (uint32_t k = 0; k < 2 * LINKS; k++) close(others[k]);
    close(w.env.epoll_fd);
    free(links);
}
