/* test_link.c: which connections of a long link are given what it has to send. */
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "link.h"
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

static const link_hooks HOOKS = {.load_next = load_next, .moved = moved};

static void world_open(world *w) {
    *w = (world){.env = {.hooks = &HOOKS, .ctx = w, .now_ns = 1000 * MS, .lanes = CONNS}};
    w->env.epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    throttle_init(&w->env.tx, 0, 0);
    throttle_init(&w->env.rx, 0, 0);
    const uint8_t id[PYCCL_ID_SIZE] = {1};
    link_init(&w->link, &w->env, id, 0);
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
        close(w->others[i]);
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
