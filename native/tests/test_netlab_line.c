/* test_netlab_line.c: rates, queues, caps and losses of the lab's lines, in computed time. */
#include "line.h"

#include "test.h"

#define MS INT64_C(1000000)
#define S (1000 * MS)

TEST(pipe_emits_exactly_its_rate_over_any_length_of_time) {
    line_pipe pipe = {.rate_bps = 7000003, .queue_ns = INT64_MAX / 4}; /* no packet takes a whole number of ns */
    int64_t leaves = 0;
    for (int i = 0; i < 100000; i++) REQUIRE(line_pipe_enter(&pipe, 0, 1500, &leaves));
    double exact = 100000.0 * 1500 * 8 / 7000003 * 1e9;
    CHECK((double)leaves >= exact);
    CHECK((double)leaves < exact + 2);
}

TEST(pipe_is_never_early_and_never_idle_while_somebody_waits) {
    line_pipe pipe = {.rate_bps = 1000000, .queue_ns = 50 * MS};
    int64_t leaves;
    REQUIRE(line_pipe_enter(&pipe, 5 * S, 1250, &leaves));
    CHECK_EQ(leaves, 5 * S + 10 * MS);
    REQUIRE(line_pipe_enter(&pipe, 5 * S + 3 * MS, 125, &leaves));
    CHECK_EQ(leaves, 5 * S + 11 * MS);
    REQUIRE(line_pipe_enter(&pipe, 6 * S, 125, &leaves)); /* idle meanwhile: nothing was saved up */
    CHECK_EQ(leaves, 6 * S + 1 * MS);
}

TEST(pipe_drops_what_would_wait_longer_than_its_queue_and_nothing_else) {
    line_pipe pipe = {.rate_bps = 12000000, .queue_ns = 5 * MS}; /* 1500 bytes: 1 ms */
    int64_t leaves;
    for (int i = 0; i < 6; i++) CHECK(line_pipe_enter(&pipe, 0, 1500, &leaves)); /* the sixth waits 5 ms */
    CHECK(!line_pipe_enter(&pipe, 0, 1500, &leaves));
    CHECK(!line_pipe_enter(&pipe, 1 * MS - 1, 40, &leaves));
    CHECK(line_pipe_enter(&pipe, 1 * MS, 1500, &leaves));
    CHECK_EQ(leaves, 7 * MS);
    CHECK_EQ(pipe.dropped, 2);
    CHECK_EQ(pipe.packets, 7);
    CHECK_EQ(pipe.bytes, 7 * 1500);
}

TEST(pipe_with_a_queue_of_nothing_still_carries_one_packet_after_the_other) {
    line_pipe pipe = {.rate_bps = 12000000};
    int64_t leaves;
    CHECK(line_pipe_enter(&pipe, 0, 1500, &leaves));
    CHECK(!line_pipe_enter(&pipe, MS / 2, 1500, &leaves));
    CHECK(line_pipe_enter(&pipe, MS, 1500, &leaves));
}

TEST(pipe_without_a_rate_takes_no_time) {
    line_pipe pipe = {0};
    int64_t leaves;
    for (int i = 0; i < 10; i++) {
        CHECK(line_pipe_enter(&pipe, 42, 65535, &leaves));
        CHECK_EQ(leaves, 42);
    }
}

TEST(loss_is_a_function_of_seed_hosts_and_number) {
    uint64_t key = line_key(1, 0, 1), other = line_key(2, 0, 1), back = line_key(1, 1, 0);
    int same_seed = 0, same_way = 0;
    for (uint64_t i = 0; i < 1000; i++) {
        bool lost = line_lost(key, i, 0.5);
        CHECK_EQ(lost, line_lost(key, i, 0.5));
        same_seed += lost == line_lost(other, i, 0.5);
        same_way += lost == line_lost(back, i, 0.5);
    }
    CHECK(same_seed > 400 && same_seed < 600);
    CHECK(same_way > 400 && same_way < 600);
}

TEST(loss_is_as_frequent_as_asked) {
    const double losses[] = {0, 1e-3, 0.1, 0.5, 1};
    for (size_t k = 0; k < sizeof losses / sizeof *losses; k++) {
        int lost = 0;
        for (uint64_t i = 0; i < 1000000; i++) lost += line_lost(line_key(7, 2, 3), i, losses[k]);
        double want = 1e6 * losses[k], five_sigma_squared = 25 * want * (1 - losses[k]);
        CHECK((lost - want) * (lost - want) <= five_sigma_squared);
    }
}

TEST(each_flow_has_a_pipe_of_its_own) {
    line_flows flows = {.rate_bps = 12000000, .queue_ns = 2 * MS};
    for (uint64_t key = 1; key <= 5000; key++) { /* the table grows; nobody's pipe is lost */
        int64_t leaves;
        CHECK(line_flows_enter(&flows, key, 0, 1500, &leaves));
        CHECK_EQ(leaves, 1 * MS);
    }
    for (uint64_t key = 1; key <= 5000; key++) {
        int64_t leaves;
        CHECK(line_flows_enter(&flows, key, 0, 1500, &leaves));
        CHECK_EQ(leaves, 2 * MS);
        CHECK(line_flows_enter(&flows, key, 0, 1500, &leaves));
        CHECK(!line_flows_enter(&flows, key, 0, 1500, &leaves));
    }
    CHECK_EQ(flows.dropped, 5000);
    line_flows_fini(&flows);
}

TEST(idle_flows_are_forgotten) {
    line_flows flows = {.rate_bps = 12000000, .queue_ns = 2 * MS};
    int64_t leaves;
    for (uint64_t i = 0; i < 100000; i++) REQUIRE(line_flows_enter(&flows, i + 1, (int64_t)i * 2 * MS, 1500, &leaves));
    CHECK_EQ(flows.capacity, 64);
    line_flows_fini(&flows);
}
