/* test_pace.c: the rate of a long line, on a line with a queue that drops what is too much, and senders that always want
 * more than it takes. */
#include "pace.h"
#include "test.h"

#define MS INT64_C(1000000)
#define SECOND INT64_C(1000000000)
#define STEP_NS (10 * MS)
#define LINKS 2
#define LATER 64                     /* steps that something may take to come back */
#define PACKET 1448.0

typedef struct sender {
    pace p;
    bool told;                       /* of a change of its limit */
    double hunger;                   /* bytes a second that its connections send as long as nobody says otherwise */
    double cap;                      /* of all its flows, each on its own; 0: none */
    double window;                   /* bytes under way at most, of all its connections; 0: any number */
    double delivered, sent, repeated, dropped;
    double acks[LATER], losses[LATER]; /* by step: what the sender will hear of */
} sender;

typedef struct line {
    sender of[LINKS];
    int links;
    double rate, queue_s, loss;      /* bytes a second; what waits at most; share that is lost whatever is sent */
    int64_t rtt_ns, at_ns;
    double waiting;                  /* bytes in the queue */
    double behind_s;                 /* so long acknowledgements wait behind what the other end sends */
    uint64_t step;
} line;

static pace_crowd hosts[LINKS];       /* of the senders, each its own unless told */

static line line_new(double rate, int links, double hunger) {
    line l = {.rate = rate, .queue_s = 0.05, .rtt_ns = 150 * MS, .at_ns = 5 * SECOND, .links = links};
    for (int i = 0; i < links; i++) {
        pace_crowd_init(&hosts[i]);
        pace_init(&l.of[i].p, &hosts[i]);
        l.of[i].hunger = hunger;
    }
    return l;
}

static double wants(const sender *s, double seconds) {
    const double limit = pace_limit(&s->p), hunger = (limit > 0 && limit < s->hunger ? limit : s->hunger) * seconds;
    const double room = s->window - (s->sent * PACKET - s->delivered - s->dropped);
    if (s->window == 0 || hunger < room) return hunger;
    return room > 0 ? room : 0;
}

static void step_line(line *l, bool busy) {
    const double seconds = (double)STEP_NS / 1e9;
    double offered[LINKS] = {0}, all = 0;
    for (int i = 0; i < l->links; i++) {
        sender *s = &l->of[i];
        const double sent = busy ? wants(s, seconds) : 0, capped = s->cap > 0 && sent > s->cap * seconds ? s->cap * seconds : sent;
        s->sent += sent / PACKET;
        offered[i] = capped * (1 - l->loss);
        s->losses[l->step % LATER] = sent - offered[i];
        all += offered[i];
    }
    const double room = l->rate * (seconds + l->queue_s) - l->waiting, dropped = all > room ? (all - room) / all : 0;
    l->waiting += all * (1 - dropped) - l->rate * seconds;
    if (l->waiting < 0) l->waiting = 0;
    const uint64_t later = (uint64_t)((l->rtt_ns + (int64_t)((l->waiting / l->rate + l->behind_s) * 1e9)) / STEP_NS);
    for (int i = 0; i < l->links; i++) {
        sender *s = &l->of[i];
        s->losses[l->step % LATER] += offered[i] * dropped;
        s->dropped += offered[i] * dropped;
        s->acks[(l->step + later) % LATER] += offered[i] * (1 - dropped);
        s->delivered += s->acks[l->step % LATER];
        s->acks[l->step % LATER] = 0;
        s->repeated += s->losses[(l->step + LATER - (uint64_t)(l->rtt_ns / STEP_NS)) % LATER] / PACKET;
        const pace_counts counts = {(uint64_t)s->delivered, (uint64_t)s->sent, (uint64_t)s->repeated,
                                    (int64_t)later * STEP_NS, (int64_t)later * STEP_NS - l->rtt_ns};
        s->told |= pace_note(&s->p, l->at_ns, &counts, busy);
    }
    l->at_ns += STEP_NS;
    l->step++;
}

typedef struct share { double delivered[LINKS], all, dropped; } share; /* of the line's rate; of what was sent */

static share work(line *l, int64_t ns) {
    double delivered[LINKS], sent = 0, dropped = 0;
    share got = {.all = 0};
    for (int i = 0; i < l->links; i++) {
        delivered[i] = l->of[i].delivered;
        sent -= l->of[i].sent;
        dropped -= l->of[i].dropped;
    }
    for (const int64_t end = l->at_ns + ns; l->at_ns < end;) step_line(l, true);
    for (int i = 0; i < l->links; i++) {
        got.delivered[i] = (l->of[i].delivered - delivered[i]) / (l->rate * (double)ns / 1e9);
        got.all += got.delivered[i];
        sent += l->of[i].sent;
        dropped += l->of[i].dropped;
    }
    got.dropped = dropped / PACKET / sent;
    return got;
}

static void rest(line *l, int64_t ns) {
    for (const int64_t end = l->at_ns + ns; l->at_ns < end;) step_line(l, false);
}

TEST(pace_ends_the_loss_that_a_sender_makes_itself) {
    line l = line_new(50e6, 1, 75e6);
    CHECK(work(&l, 400 * MS).dropped > 0.2);
    work(&l, SECOND);
    const share got = work(&l, 8 * SECOND);
    CHECK(got.dropped < 0.01);
    CHECK(got.all > 0.95);
}

TEST(pace_leaves_no_queue_behind) {
    line l = line_new(50e6, 1, 75e6);
    double stood = 0;
    work(&l, 9 * SECOND);
    for (int i = 0; i < 800; i++) {
        step_line(&l, true);
        stood += l.waiting / l.rate / 800;
    }
    CHECK(stood < 0.025);
}

/* Several connections that each think the line theirs: so many round trips of it are under way. */
static line line_deep(int links, double round_trips) {
    line l = line_new(12.5e6, links, 25e6);
    l.rtt_ns = 60 * MS;
    l.queue_s = 0.5;
    for (int i = 0; i < links; i++) {
        l.of[i].p.crowd = &hosts[0];
        l.of[i].window = 12.5e6 * 0.06 * round_trips / links;
    }
    return l;
}

TEST(pace_of_one_host_lets_no_queue_stand_that_is_longer_than_the_line_though_it_drops_nothing) {
    line l = line_deep(LINKS, 4);
    double stood = 0;
    work(&l, 500 * MS);
    CHECK(l.waiting / l.rate > 0.15);
    work(&l, 3 * SECOND);
    CHECK(hosts[0].whole.rate > 0);
    for (int i = 0; i < 800; i++) {
        step_line(&l, true);
        stood += l.waiting / l.rate / 800;
    }
    CHECK(stood < 0.06);
    CHECK(work(&l, 5 * SECOND).all > 0.93);
}

TEST(pace_lets_a_queue_stand_that_drops_nothing_and_holds_up_nobody) {
    line shorter = line_deep(LINKS, 1.7);
    work(&shorter, 10 * SECOND);
    CHECK(shorter.waiting > 0 && hosts[0].whole.rate == 0);
    line alone = line_deep(1, 4);
    work(&alone, 10 * SECOND);
    CHECK(alone.waiting > 0 && alone.of[0].p.rate == 0);
    line narrow = line_deep(LINKS, 4);
    narrow.rate = 1e6;
    for (int i = 0; i < LINKS; i++) narrow.of[i].window = 4 * 1e6 * 0.06 / LINKS;
    work(&narrow, 10 * SECOND);
    CHECK(narrow.waiting > 0 && hosts[0].whole.rate == 0);
}

TEST(pace_does_not_yield_to_what_the_other_end_sends) {
    line l = line_new(50e6, 1, 75e6);
    work(&l, 10 * SECOND);
    for (int i = 0; i < 30; i++) { /* an operation a second; the other end's queue grows in each */
        l.behind_s = 0;
        work(&l, 400 * MS);
        l.behind_s = 0.03;
        work(&l, 600 * MS);
    }
    CHECK(work(&l, SECOND).all > 0.9);
}

TEST(pace_limits_nothing_where_nothing_is_too_much) {
    line l = line_new(50e6, 1, 45e6);
    work(&l, 10 * SECOND);
    CHECK(l.of[0].p.rate == 0);
}

TEST(pace_is_remembered_between_operations) {
    line l = line_new(50e6, 1, 75e6);
    double dropped = 0;
    work(&l, 2 * SECOND);
    for (int op = 0; op < 10; op++) {
        rest(&l, 20 * SECOND);
        dropped += work(&l, SECOND).dropped / 10;
    }
    CHECK(dropped < 0.03);
}

TEST(pace_follows_a_line_that_becomes_slower) {
    line l = line_new(50e6, 1, 75e6);
    work(&l, 5 * SECOND);
    l.rate = 12.5e6;
    l.waiting = 0;
    work(&l, 2 * SECOND);
    const share got = work(&l, 5 * SECOND);
    CHECK(got.dropped < 0.02);
    CHECK(got.all > 0.9);
}

TEST(pace_follows_a_line_that_becomes_faster) {
    line l = line_new(12.5e6, 1, 150e6);
    work(&l, 20 * SECOND); /* trials are rare by now */
    l.rate = 100e6;
    work(&l, 25 * SECOND);
    CHECK(work(&l, 5 * SECOND).all > 0.9);
}

TEST(pace_of_a_narrow_line_is_found_too) {
    line l = line_new(100e3, 1, 200e3); /* ten packets in a round trip */
    work(&l, 20 * SECOND);
    const share got = work(&l, 20 * SECOND);
    CHECK(got.dropped < 0.03);
    CHECK(got.all > 0.85);
}

TEST(pace_rises_again_from_a_few_packets_in_a_round_trip) {
    line l = line_new(60e3, 1, 50e6);
    work(&l, 30 * SECOND);
    CHECK(l.of[0].p.rate > 0 && l.of[0].p.rate < 120e3);
    l.rate = 5e6;
    work(&l, 30 * SECOND);
    CHECK(work(&l, 5 * SECOND).all > 0.8);
}

typedef struct hearing { pace p; pace_counts counts; double delivered, sent, repeated; int64_t at_ns; } hearing;

static void hear(hearing *h, double rate, double repeats, int64_t queue_ns) {
    const double bytes = rate * (double)STEP_NS / 1e9;
    h->at_ns += STEP_NS;
    h->delivered += bytes;
    h->sent += bytes / PACKET;
    h->repeated += bytes / PACKET * repeats;
    h->counts = (pace_counts){(uint64_t)h->delivered, (uint64_t)h->sent, (uint64_t)h->repeated, 150 * MS, queue_ns};
    (void)pace_note(&h->p, h->at_ns, &h->counts, true);
}

TEST(pace_does_not_fall_to_what_one_window_had) {
    hearing h = {.at_ns = 5 * SECOND};
    pace_crowd_init(&hosts[0]);
    pace_init(&h.p, &hosts[0]);
    while (h.p.rate == 0) hear(&h, 50e6, 0.3, 50 * MS);
    while (h.p.rate < 60e6) hear(&h, h.p.rate, 0, 0);
    const double rate = h.p.rate;
    while (h.p.rate >= rate) hear(&h, 35e6, 0, 50 * MS);
    CHECK(h.p.rate > 50e6 && h.p.rate < 60e6);
}

TEST(pace_is_cut_by_half_at_a_time) {
    hearing h = {.at_ns = 5 * SECOND};
    pace_crowd_init(&hosts[0]);
    pace_init(&h.p, &hosts[0]);
    while (h.p.rate == 0) hear(&h, 50e6, 0.3, 50 * MS);
    while (h.p.blamed > 0) hear(&h, h.p.rate, 0, 50 * MS);
    const double rate = h.p.rate;
    while (h.p.rate >= rate) hear(&h, 1e6, 0.3, 50 * MS); /* others of this host had the line */
    CHECK(h.p.rate >= rate / 2);
}

TEST(pace_is_not_found_where_a_fast_line_carried_little) {
    hearing h = {.at_ns = 5 * SECOND};
    pace_crowd_init(&hosts[0]);
    pace_init(&h.p, &hosts[0]);
    for (int i = 0; i < 100; i++) hear(&h, 50e6, 0, 0);
    while (h.p.rate == 0) hear(&h, 1e6, 0.05, 50 * MS); /* the other side reads slowly */
    CHECK(h.p.rate > 39e6);
}

TEST(pace_blames_nobody_for_what_the_line_loses_by_itself) {
    line l = line_new(50e6, 1, 30e6);
    l.loss = 0.05;
    work(&l, 5 * SECOND);
    CHECK(work(&l, 10 * SECOND).all > 0.9 * 0.6 * 0.95);
    l.of[0].hunger = 75e6; /* and yet sees what is its own */
    work(&l, 5 * SECOND);
    const share got = work(&l, 10 * SECOND);
    CHECK(got.dropped < 0.05);
    CHECK(got.all > 0.9);
}

TEST(pace_of_links_that_share_a_line_starves_none) {
    line l = line_new(50e6, LINKS, 60e6);
    work(&l, 10 * SECOND);
    const share got = work(&l, 20 * SECOND);
    CHECK(got.all > 0.93);
    CHECK(got.dropped < 0.02);
    for (int i = 0; i < LINKS; i++) CHECK(got.delivered[i] > 0.25);
}

static line line_of_one_host(double rate, double hunger) {
    line l = line_new(rate, LINKS, hunger);
    for (int i = 0; i < LINKS; i++) l.of[i].p.crowd = &hosts[0];
    return l;
}

TEST(pace_of_one_host_is_shared_by_its_links) {
    line l = line_of_one_host(50e6, 60e6);
    work(&l, 10 * SECOND);
    const share got = work(&l, 20 * SECOND);
    CHECK_EQ(hosts[0].busy, LINKS);
    CHECK(got.all > 0.93);
    CHECK(got.dropped < 0.01);
    for (int i = 0; i < LINKS; i++) {
        CHECK(got.delivered[i] > 0.93 * got.all / LINKS);
        CHECK(pace_limit(&l.of[i].p) == hosts[0].whole.rate / LINKS);
        CHECK(l.of[i].p.rate == 0); /* nothing is learned of one alone */
    }
    rest(&l, SECOND);
    CHECK_EQ(hosts[0].busy, 0);
    for (int i = 0; i < LINKS; i++) CHECK(pace_limit(&l.of[i].p) == hosts[0].whole.rate / LINKS); /* the next begins with it */
}

TEST(pace_of_one_host_is_not_for_a_link_alone) {
    line l = line_of_one_host(50e6, 60e6);
    work(&l, 10 * SECOND);
    rest(&l, SECOND);
    l.links = 1;
    work(&l, 100 * MS);
    CHECK(pace_limit(&l.of[0].p) == hosts[0].whole.rate / LINKS); /* the other may be about to begin */
    work(&l, 5 * SECOND);
    CHECK(l.of[0].p.rate > 0);
    CHECK(pace_limit(&l.of[0].p) == l.of[0].p.rate); /* its own: the path behind the host's line may be narrower */
}

TEST(pace_of_one_host_leaves_to_others_what_a_narrow_path_does_not_take) {
    line l = line_of_one_host(50e6, 60e6);
    work(&l, 10 * SECOND);
    l.of[1].cap = 5e6; /* what is more is lost there, which is not the line's doing */
    work(&l, 5 * SECOND);
    const share got = work(&l, 10 * SECOND);
    CHECK(got.delivered[0] > 0.75);
    CHECK(hosts[0].whole.rate > 45e6);
    CHECK(pace_limit(&l.of[0].p) > 1.4 * pace_limit(&l.of[1].p));
}

TEST(pace_of_one_host_counts_nobody_with_whom_nothing_moves) {
    line l = line_of_one_host(50e6, 60e6);
    work(&l, 10 * SECOND);
    l.links = 1; /* the other one is not looked at any more: nothing comes from there */
    work(&l, 5 * SECOND);
    CHECK_EQ(hosts[0].busy, LINKS);
    CHECK(work(&l, 5 * SECOND).all > 0.9);
}

TEST(pace_tells_when_what_is_in_force_has_changed) {
    line l = line_of_one_host(50e6, 60e6);
    double limits[LINKS] = {0};
    for (int n = 0; n < 3000; n++) {
        step_line(&l, n % 1000 < 900);
        for (int i = 0; i < LINKS; i++) {
            if (pace_limit(&l.of[i].p) != limits[i] && l.of[i].told) limits[i] = pace_limit(&l.of[i].p);
            l.of[i].told = false;
        }
    }
    for (int i = 0; i < LINKS; i++) CHECK(limits[i] > 0 && limits[i] == l.of[i].p.told);
}

TEST(pace_of_one_host_does_not_keep_back_who_works_alone_from_then_on) {
    line l = line_of_one_host(50e6, 60e6);
    work(&l, 10 * SECOND);
    rest(&l, SECOND);
    l.links = 1;
    for (int op = 0; op < 2; op++) {
        work(&l, 50 * MS);
        CHECK(op > 0 || pace_limit(&l.of[0].p) == hosts[0].whole.rate / LINKS);
        rest(&l, SECOND);
    }
    CHECK(l.of[0].p.rate == 0); /* nor has what it was held to been taken for what its path carries */
    CHECK(!l.of[0].p.crowded && pace_limit(&l.of[0].p) == l.of[0].p.rate);
}

TEST(pace_of_one_host_is_learned_from_short_operations) {
    line l = line_of_one_host(50e6, 40e6);
    for (int op = 0; op < 10; op++) {
        work(&l, 140 * MS);
        rest(&l, SECOND);
    }
    CHECK(hosts[0].whole.rate > 0);
    const share got = work(&l, 140 * MS);
    CHECK(got.dropped < 0.01);
    for (int i = 0; i < LINKS; i++) CHECK(l.of[i].p.rate == 0);
}

TEST(pace_is_not_learned_from_a_spell_that_others_of_the_host_took_part_in) {
    line l = line_new(50e6, 1, 75e6);
    for (int op = 0; op < 100; op++) {
        CHECK(work(&l, 140 * MS).dropped > 0.02);
        hosts[0].met_ns = l.at_ns; /* between two notes of this one */
        rest(&l, SECOND);
    }
    CHECK(l.of[0].p.rate == 0);
    work(&l, SECOND);
    CHECK(l.of[0].p.rate > 0);
    const double rate = l.of[0].p.rate;
    l.of[0].p.crowded = true;
    pace_widen(&l.of[0].p, 1.5, l.at_ns, l.rtt_ns);
    CHECK(l.of[0].p.rate == rate);
}

TEST(pace_learns_from_operations_shorter_than_a_window) {
    line l = line_new(50e6, 1, 75e6);
    double dropped = 0, least = 1e9;
    CHECK(work(&l, 140 * MS).dropped > 0.02);
    for (int op = 0; op < 100; op++) {
        rest(&l, SECOND);
        dropped += work(&l, 140 * MS).dropped / 100;
        if (op > 0 && l.of[0].p.rate < least) least = l.of[0].p.rate;
    }
    CHECK(dropped < 0.005);
    CHECK(least > 40e6);
}

TEST(pace_learns_no_rate_from_what_was_little) {
    line l = line_new(50e6, 1, 150e6);
    l.queue_s = 0.001;
    for (int op = 0; op < 50; op++) {
        CHECK(work(&l, 20 * MS).dropped > 0.3); /* what the line takes is seen for no longer than that */
        rest(&l, SECOND);
    }
    CHECK(l.of[0].p.rate == 0);
}

TEST(pace_knows_how_long_a_spell_lasts) {
    line l = line_new(50e6, 1, 45e6);
    CHECK_EQ(pace_lasts(&l.of[0].p, l.at_ns, l.rtt_ns), 0);
    work(&l, SECOND);
    CHECK(pace_lasts(&l.of[0].p, l.at_ns, l.rtt_ns) >= SECOND - STEP_NS);
    rest(&l, 2 * STEP_NS); /* it has to send again at once */
    CHECK(pace_lasts(&l.of[0].p, l.at_ns, l.rtt_ns) > SECOND);
    rest(&l, SECOND);
    CHECK_EQ(pace_lasts(&l.of[0].p, l.at_ns, l.rtt_ns), 0);
}

TEST(pace_gives_more_connections_room_to_show_what_they_bring) {
    line l = line_new(50e6, 1, 75e6);
    l.of[0].cap = 20e6; /* each flow on its own: what is too much is lost there */
    work(&l, 3 * SECOND);
    CHECK(l.of[0].p.rate > 18e6 && l.of[0].p.rate < 24e6);
    l.of[0].cap = 30e6;
    pace_widen(&l.of[0].p, 1.5, l.at_ns, l.rtt_ns);
    const double before = l.of[0].delivered;
    work(&l, SECOND);
    CHECK(l.of[0].delivered - before > 1.1 * 19e6); /* at once, whenever the next trial would have been */
    work(&l, 4 * SECOND);
    CHECK(work(&l, 2 * SECOND).all > 0.9 * 0.6);
}
