/* test_throttle.c: what moves under a token bucket in a given time, whatever the caller's rhythm. */
#include "test.h"
#include "throttle.h"

#define SECOND INT64_C(1000000000)

/* Bytes that moved in `ns` by a caller that always wants more, looks every step_ns and moves at most `most` at a time. */
static double moved_in(uint64_t rate, int64_t ns, int64_t step_ns, size_t most) {
    throttle t;
    double moved = 0;
    throttle_init(&t, rate, 5 * SECOND);
    for (int64_t at = 0; at < ns; at += step_ns)
        for (size_t room; (room = throttle_room(&t, 5 * SECOND + at)) > 0;) {
            const size_t n = room < most ? room : most;
            throttle_take(&t, n);
            moved += (double)n;
        }
    return moved;
}

TEST(throttle_keeps_the_rate_within_five_percent) {
    const uint64_t rates[] = {125000, 6250000, 125000000, UINT64_C(1250000000)};
    const int64_t steps[] = {100000, 1000000, 7000000, 20000000};
    for (size_t r = 0; r < 4; r++)
        for (size_t s = 0; s < 4; s++)
            for (size_t most = 1448; most <= 1 << 20; most *= 27) {
                const double share = moved_in(rates[r], 4 * SECOND, steps[s], most) / 4 / (double)rates[r];
                CHECK(share > 0.95 && share < 1.05);
            }
}

TEST(throttle_without_a_rate_limits_nothing) {
    throttle t;
    throttle_init(&t, 0, 0);
    throttle_take(&t, SIZE_MAX / 2);
    CHECK(throttle_room(&t, 0) == SIZE_MAX);
}

TEST(throttle_says_when_there_is_room_again) {
    throttle t;
    throttle_init(&t, 1000000, SECOND);
    size_t room;
    while ((room = throttle_room(&t, SECOND)) > 0) throttle_take(&t, room);
    const int64_t due = throttle_due(&t);
    CHECK(due > SECOND && due < SECOND + SECOND / 50);
    CHECK(throttle_room(&t, due - 1000000) == 0);
    CHECK(throttle_room(&t, due) > 0);
}

TEST(throttle_takes_back_what_went_without_room) {
    throttle t;
    throttle_init(&t, 1000000, 0);
    throttle_take(&t, 500000);
    CHECK(throttle_room(&t, SECOND / 4) == 0);
    CHECK(throttle_due(&t) > SECOND / 4);
    CHECK(throttle_room(&t, SECOND) > 0);
}

TEST(throttle_saves_no_more_than_a_moment_of_idle_time) {
    throttle t;
    throttle_init(&t, 1000000, 0);
    CHECK(throttle_room(&t, 3600 * SECOND) <= 50000);
    CHECK(throttle_room(&t, 0) <= 50000); /* a clock that goes back gives nothing */
}
