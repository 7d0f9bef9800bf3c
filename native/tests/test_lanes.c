/* test_lanes.c: the search for the number of connections, on lines whose rate for every number is given. */
#include "lanes.h"
#include "test.h"

#define MS INT64_C(1000000)
#define SECOND INT64_C(1000000000)
#define RTT (150 * MS)

typedef double (*line)(uint32_t conns);

static double capped_flows(uint32_t conns) { return conns < 10 ? conns * 2.5e6 : 25e6; } /* 20 of 200 Mbit/s each */
static double one_is_enough(uint32_t conns) { return conns > 0 ? 50e6 : 0; }
static double grows_for_ever(uint32_t conns) { return conns * 1e6; }
static double one_of_eight(uint32_t conns) { return conns > 0 ? 2.5e6 : 0; }
static double two_are_worse(uint32_t conns) { return conns <= 8 ? 40e6 : 30e6; }

typedef struct run {
    lanes l;
    lanes_turn turn;
    int64_t at_ns;
    double sent;
    uint32_t standing, changes, highest;
} run;

static void run_init(run *r, lanes_turn *turn, uint32_t use) {
    *r = (run){.at_ns = 77 * SECOND, .standing = use};
    lanes_init(&r->l, turn, use, 64);
}

static void note(run *r, bool busy) {
    if (lanes_note(&r->l, r->at_ns, (uint64_t)r->sent, (uint64_t)r->sent, busy, r->standing, RTT)) r->changes++;
    if (r->l.use > r->highest) r->highest = r->l.use;
}

/* Busy for so long: a note every 10 ms; connections that are wanted come half a second later, all at once. */
static void work(run *r, line rate, int64_t ns) {
    int64_t wanted_at = -1;
    for (int64_t end = r->at_ns + ns; r->at_ns < end; r->at_ns += 10 * MS) {
        if (r->standing < r->l.use && wanted_at < 0) wanted_at = r->at_ns;
        if (wanted_at >= 0 && r->at_ns - wanted_at > SECOND / 2) {
            r->standing = r->l.use;
            wanted_at = -1;
        }
        note(r, true);
        const uint32_t used = r->l.use < r->standing ? r->l.use : r->standing;
        r->sent += rate(used) * 0.01;
    }
}

static void rest(run *r, int64_t ns) {
    note(r, false);
    r->at_ns += ns;
}

TEST(lanes_fill_a_line_that_caps_each_flow_within_three_operations) {
    run r;
    run_init(&r, &r.turn, 8);
    for (int op = 0; op < 3; op++) {
        work(&r, capped_flows, 3 * SECOND);
        rest(&r, SECOND);
    }
    CHECK(r.l.use >= 10);
    CHECK(r.highest <= 18);
    work(&r, capped_flows, 8 * SECOND);
    CHECK_EQ(r.l.use, 12);
}

TEST(lanes_come_down_when_the_line_does_not_need_them_any_more) {
    run r;
    run_init(&r, &r.turn, 8);
    work(&r, capped_flows, 20 * SECOND);
    CHECK_EQ(r.l.use, 12);
    work(&r, one_is_enough, 200 * SECOND);
    CHECK_EQ(r.l.use, 8);
}

TEST(lanes_keep_what_the_line_needs) {
    run r;
    run_init(&r, &r.turn, 8);
    work(&r, capped_flows, 20 * SECOND);
    const double before = r.sent;
    work(&r, capped_flows, 120 * SECOND);
    CHECK_EQ(r.l.use, 12);
    CHECK(r.changes >= 5); /* there were trials in both directions */
    CHECK(r.sent - before > 0.95 * 120 * 25e6);
}

TEST(lanes_go_back_where_more_gives_nothing_and_try_again_later_and_later) {
    run r;
    run_init(&r, &r.turn, 8);
    work(&r, one_is_enough, 15 * SECOND);
    CHECK_EQ(r.l.use, 8);
    CHECK_EQ(r.highest, 12);
    CHECK_EQ(r.changes, 2);
    work(&r, one_is_enough, 10 * SECOND);
    CHECK_EQ(r.changes, 4);
    work(&r, one_is_enough, 20 * SECOND);
    CHECK_EQ(r.changes, 4);
    work(&r, one_is_enough, 20 * SECOND);
    CHECK_EQ(r.changes, 6);
    CHECK_EQ(r.l.use, 8);
}

TEST(lanes_leave_a_number_that_makes_it_worse) {
    run r;
    run_init(&r, &r.turn, 8);
    work(&r, two_are_worse, 10 * SECOND);
    CHECK_EQ(r.l.use, 8);
    CHECK_EQ(r.changes, 2);
}

TEST(lanes_give_a_trial_more_than_one_window) {
    run r;
    run_init(&r, &r.turn, 8);
    while (r.l.before == 0) work(&r, capped_flows, SECOND / 10);
    work(&r, capped_flows, SECOND);
    work(&r, one_of_eight, SECOND); /* a pause of the machine in the middle of the trial */
    work(&r, capped_flows, 8 * SECOND);
    CHECK_EQ(r.l.failed, 0);
    CHECK(r.l.use >= 12);
}

TEST(lanes_believe_no_gain_that_is_there_without_them) {
    run r;
    run_init(&r, &r.turn, 8);
    while (r.l.before == 0) work(&r, one_of_eight, SECOND / 10);
    work(&r, one_is_enough, 12 * SECOND); /* the line became faster in the middle of the trial */
    CHECK_EQ(r.l.use, 8);
    CHECK_EQ(r.l.failed, 1);
}

TEST(lanes_stop_at_the_most_there_may_be) {
    run r;
    run_init(&r, &r.turn, 4);
    work(&r, grows_for_ever, 60 * SECOND);
    CHECK_EQ(r.l.use, 64);
    CHECK_EQ(r.highest, 64);
}

TEST(lanes_take_no_rate_from_slow_start) {
    run r;
    run_init(&r, &r.turn, 8);
    for (int i = 0; i < 400; i++) { /* the line speeds up for 4 s: nothing is known of 8 connections before */
        note(&r, true);
        r.sent += 1e4 * (i + 1);
        r.at_ns += 10 * MS;
        CHECK(r.l.use == 8 || i > 200);
    }
}

TEST(lanes_wait_for_the_connections_they_asked_for) {
    run r;
    run_init(&r, &r.turn, 8);
    while (r.changes == 0) {
        note(&r, true);
        r.sent += 1e6;
        r.at_ns += 10 * MS;
    }
    for (int i = 0; i < 3000; i++) {
        note(&r, true);
        r.sent += 2e6; /* faster for another reason: it says nothing of 12 connections that are not there */
        r.at_ns += 10 * MS;
    }
    CHECK_EQ(r.changes, 1);
    CHECK_EQ(r.l.use, 12);
}

/* Links of one host, each with as much of its line as it has of all connections, for so long. */
static void share(run *links, uint32_t count, line rate, int64_t ns, uint32_t *trials) {
    for (int64_t end = links->at_ns + ns; links->at_ns < end;) {
        double all = 0;
        uint32_t conns = 0, trying = 0;
        for (uint32_t i = 0; i < count; i++) {
            all += links[i].sent;
            conns += links[i].l.use;
            trying += links[i].l.before > 0 || links[i].l.proving > 0;
        }
        if (trying > *trials) *trials = trying;
        for (uint32_t i = 0; i < count; i++) {
            run *r = &links[i];
            if (lanes_note(&r->l, r->at_ns, (uint64_t)r->sent, (uint64_t)all, true, r->l.use, RTT)) r->changes++;
            if (r->l.use > r->highest) r->highest = r->l.use;
        }
        for (uint32_t i = 0; i < count; i++) {
            links[i].sent += rate(conns) * links[i].l.use / conns * 0.01;
            links[i].at_ns += 10 * MS;
        }
    }
}

TEST(lanes_that_take_from_the_host_s_other_links_do_not_pay) {
    run links[3];
    lanes_turn turn = {0};
    uint32_t trials = 0;
    for (int i = 0; i < 3; i++) run_init(&links[i], &turn, 3);
    share(links, 3, one_is_enough, 180 * SECOND, &trials);
    for (int i = 0; i < 3; i++) {
        CHECK_EQ(links[i].l.before > 0 ? links[i].l.before : links[i].l.use, 3);
        CHECK(links[i].changes >= 2);
    }
    CHECK_EQ(trials, 1); /* at a time */
}

TEST(lanes_of_a_host_grow_together_to_what_its_line_takes) {
    run links[3];
    lanes_turn turn = {0};
    uint32_t trials = 0, conns = 0;
    for (int i = 0; i < 3; i++) run_init(&links[i], &turn, 2);
    share(links, 3, capped_flows, 60 * SECOND, &trials);
    for (int i = 0; i < 3; i++) conns += links[i].l.use;
    CHECK(conns >= 9);
    CHECK(conns <= 15);
}

TEST(lanes_leave_the_turn_to_others_when_their_link_has_nothing_to_send) {
    run links[2];
    lanes_turn turn = {0};
    uint32_t trials = 0;
    for (int i = 0; i < 2; i++) run_init(&links[i], &turn, 3);
    while (links[0].l.before == 0) work(&links[0], one_is_enough, SECOND / 10);
    links[1].at_ns = links[0].at_ns;
    share(&links[1], 1, one_is_enough, 10 * SECOND, &trials);
    CHECK_EQ(links[1].changes, 0);
    share(&links[1], 1, one_is_enough, 40 * SECOND, &trials);
    CHECK(links[1].changes > 0);
}

TEST(lanes_keep_the_turn_over_a_pause_between_operations) {
    run links[2];
    lanes_turn turn = {0};
    uint32_t trials = 0;
    for (int i = 0; i < 2; i++) run_init(&links[i], &turn, 3);
    while (links[0].l.before == 0) work(&links[0], one_is_enough, SECOND / 10);
    for (int op = 0; op < 3; op++) {
        const int64_t at_ns = links[0].at_ns + 300 * SECOND;
        for (int i = 0; i < 2; i++) {
            note(&links[i], false);
            links[i].at_ns = at_ns;
        }
        share(links, 2, one_is_enough, 2 * SECOND, &trials);
    }
    CHECK_EQ(trials, 1);
}

TEST(lanes_end_a_trial_that_another_least_number_makes_pointless) {
    run r;
    run_init(&r, &r.turn, 2);
    while (r.l.before == 0) work(&r, one_is_enough, SECOND / 10);
    CHECK_EQ(r.l.use, 3);
    CHECK(!lanes_least(&r.l, 3));
    CHECK_EQ(r.l.use, 3);
    CHECK_EQ(r.l.before, 0);
    CHECK(r.turn.taken == NULL);
    work(&r, one_is_enough, 60 * SECOND);
    CHECK_EQ(r.l.before > 0 ? r.l.before : r.l.use, 3);
    while (r.l.before == 0) work(&r, one_is_enough, SECOND / 10);
    CHECK(lanes_least(&r.l, 2));
    CHECK_EQ(r.l.use, 2);
}

TEST(lanes_follow_how_many_links_share_the_line) {
    run r;
    run_init(&r, &r.turn, 8);
    CHECK(!lanes_least(&r.l, 8));
    CHECK(lanes_least(&r.l, 3));
    CHECK_EQ(r.l.use, 3);
    CHECK(lanes_least(&r.l, 8));
    CHECK_EQ(r.l.use, 8);
    work(&r, capped_flows, 20 * SECOND);
    CHECK_EQ(r.l.use, 12);
    CHECK(!lanes_least(&r.l, 3)); /* what has paid stays, until fewer do */
    CHECK_EQ(r.l.use, 12);
    work(&r, one_is_enough, 400 * SECOND);
    CHECK_EQ(r.l.use, 3);
}

TEST(lanes_learn_nothing_from_small_operations) {
    run r;
    run_init(&r, &r.turn, 8);
    for (int op = 0; op < 500; op++) { /* what fits the sockets at once never makes the line busy */
        note(&r, false);
        r.sent += 1e6;
        r.at_ns += SECOND / 5;
    }
    CHECK_EQ(r.changes, 0);
}
