/* test_engine_state.c: shared state that one engine publishes and others fetch in pieces. */
#include "engine_vectors.h"
#include "engine.h"
#include "frame.h"

TEST(engine_fetches_published_state_in_pieces_across_regions) {
    cluster c;
    cluster_open(&c, 2, 2, OVER_TCP);
    const uint64_t size = 20000003;
    uint8_t *source = malloc(size), *copy = calloc(1, size);
    fill(source, PYCCL_UINT8, size, 4);
    const pyccl_region regions[] = {{source, 5}, {NULL, 0}, {source + 5, 3000000}, {source + 3000005, size - 3000005}};
    CHECK_EQ(pyccl_state_publish(c.engine[0], 7, regions, 4), PYCCL_OK);
    CHECK_EQ(pyccl_state_publish(c.engine[0], 7, regions, 4), PYCCL_ERR_ARGUMENT);
    const uint32_t piece = 65536;
    uint64_t pieces = 0;
    for (uint64_t at = 0; at < size; at += piece, pieces++) {
        const uint32_t n = size - at < piece ? (uint32_t)(size - at) : piece;
        CHECK_EQ(pyccl_state_fetch(c.engine[1], c.slot[1][0], 7, at, n, copy + at, pieces, 0), PYCCL_OK);
        if (pieces == 100) kill_conn(&c, 1, 0, 1);
    }
    for (uint64_t k = 0; k < pieces; k++) {
        pyccl_event event;
        CHECK(await_event(c.engine[1], PYCCL_EVENT_STATE, &event));
        CHECK_EQ(event.code, PYCCL_OK);
    }
    CHECK(memcmp(source, copy, size) == 0);
    pyccl_event event;
    CHECK_EQ(pyccl_state_fetch(c.engine[1], c.slot[1][0], 7, size - 10, 11, copy, 500, 0), PYCCL_OK);
    CHECK(await_event(c.engine[1], PYCCL_EVENT_STATE, &event));
    CHECK_EQ(event.code, PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_state_unpublish(c.engine[0], 7), PYCCL_OK);
    CHECK_EQ(pyccl_state_fetch(c.engine[1], c.slot[1][0], 7, 0, 10, copy, 501, 0), PYCCL_OK);
    CHECK(await_event(c.engine[1], PYCCL_EVENT_STATE, &event));
    CHECK_EQ(event.code, PYCCL_ERR_ARGUMENT);
    CHECK_EQ(event.value, 501);
    free(source);
    free(copy);
    cluster_close(&c);
}

TEST(engine_frees_state_memory_in_the_middle_of_a_transfer) {
    cluster c;
    cluster_open(&c, 2, 1, OVER_TCP);
    const uint64_t size = LONG(64 << 20);
    for (int run = 0; run < 3; run++) {
        uint8_t *source = malloc(size), *copy = malloc(size);
        memset(source, 3, size);
        const pyccl_region region = {source, size};
        CHECK_EQ(pyccl_state_publish(c.engine[0], 1, &region, 1), PYCCL_OK);
        for (uint64_t at = 0; at < size; at += PYCCL_PIECE_MAX)
            CHECK_EQ(pyccl_state_fetch(c.engine[1], c.slot[1][0], 1, at, PYCCL_PIECE_MAX, copy + at, at, 0), PYCCL_OK);
        pyccl_event event;
        CHECK(await_event(c.engine[1], PYCCL_EVENT_STATE, &event));
        if (run != 1) CHECK_EQ(pyccl_state_unpublish(c.engine[0], 1), PYCCL_OK);
        if (run != 1) free(source);
        for (uint64_t at = 0; run == 2 && at < size; at += PYCCL_PIECE_MAX) (void)!pyccl_state_cancel(c.engine[1], at);
        if (run != 2) CHECK_EQ(pyccl_state_forget(c.engine[1]), PYCCL_OK);
        free(copy);
        if (run == 1) CHECK_EQ(pyccl_state_unpublish(c.engine[0], 1), PYCCL_OK);
        if (run == 1) free(source);
    }
    check_all_reduce(&c, PYCCL_FLOAT32, PYCCL_SUM, 100003, 1);
    cluster_close(&c);
}

TEST(engine_cancels_single_fetches_and_leaves_the_others) {
    enum { FETCHES = 600, SIZE = 1000 }; /* more than are asked for at a time */
    cluster c;
    cluster_open(&c, 2, 1, OVER_TCP);
    uint8_t *source = malloc(FETCHES * SIZE), *copy = calloc(FETCHES, SIZE), members[2][16], nothing[SIZE] = {0};
    fill(source, PYCCL_UINT8, FETCHES * SIZE, 4);
    const pyccl_region region = {source, FETCHES * SIZE};
    CHECK_EQ(pyccl_state_publish(c.engine[0], 7, &region, 1), PYCCL_OK);
    memcpy(members, c.id, sizeof members);
    pyccl_epoch epoch = {.number = 2, .world = 2, .rank = 1, .restart = 1, .members = members[0]};
    memset(epoch.id, 0x42, 16);
    CHECK_EQ(pyccl_engine_epoch(c.engine[1], &epoch, NULL, 0), PYCCL_OK); /* its asks are left unread until 0 enters too */
    for (uint64_t k = 0; k < FETCHES; k++)
        CHECK_EQ(pyccl_state_fetch(c.engine[1], c.slot[1][0], 7, k * SIZE, SIZE, copy + k * SIZE, k, 0), PYCCL_OK);
    for (uint64_t k = 0; k < FETCHES; k += 3) CHECK_EQ(pyccl_state_cancel(c.engine[1], k), PYCCL_OK);
    CHECK_EQ(pyccl_state_cancel(c.engine[1], 0), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_state_cancel(c.engine[1], FETCHES), PYCCL_ERR_ARGUMENT);
    epoch.rank = 0;
    CHECK_EQ(pyccl_engine_epoch(c.engine[0], &epoch, NULL, 0), PYCCL_OK);
    pyccl_event event;
    for (uint32_t left = FETCHES - FETCHES / 3; left > 0; left--) {
        CHECK(await_event(c.engine[1], PYCCL_EVENT_STATE, &event));
        CHECK_EQ(event.code, PYCCL_OK);
        CHECK(event.value % 3 != 0);
    }
    for (uint64_t k = 0; k < FETCHES; k++)
        CHECK(memcmp(copy + k * SIZE, k % 3 == 0 ? nothing : source + k * SIZE, SIZE) == 0);
    CHECK_EQ(pyccl_state_cancel(c.engine[1], 1), PYCCL_ERR_ARGUMENT); /* it has ended */
    CHECK_EQ(pyccl_state_unpublish(c.engine[0], 7), PYCCL_OK);
    free(source);
    free(copy);
    cluster_close(&c);
}

TEST(engine_fetches_end_when_the_peer_or_the_epoch_ends) {
    cluster c;
    cluster_open(&c, 3, 1, OVER_TCP);
    uint8_t copy[64];
    pyccl_event event;
    kill_conn(&c, 0, 1, 0);
    CHECK(await_event(c.engine[0], PYCCL_EVENT_CONN_DOWN, NULL));
    CHECK_EQ(pyccl_state_fetch(c.engine[0], c.slot[0][1], 1, 0, 64, copy, 1, 0), PYCCL_OK);
    CHECK(await_event(c.engine[0], PYCCL_EVENT_STATE, &event));
    CHECK_EQ(event.code, PYCCL_ERR_PEER_LOST);
    CHECK_EQ(pyccl_state_fetch(c.engine[0], 77, 1, 0, 64, copy, 1, 0), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_state_fetch(c.engine[0], c.slot[0][2], 1, 0, 0, copy, 1, 0), PYCCL_ERR_ARGUMENT);
    cluster_close(&c);
}

/* ---- a holder or fetcher whose bytes are written by hand ---- */

/* Engine 1 is gone; the far ends of two new connections, no loopback, stand in its place. */
static void two_hands(cluster *c, int hand[2]) {
    cluster_open(c, 2, 1, OVER_TCP);
    pyccl_engine_stop(c->engine[1], PYCCL_ERR_CLOSED);
    CHECK(await_event(c->engine[0], PYCCL_EVENT_CONN_DOWN, NULL));
    for (int i = 0; i < 2; i++) {
        int pair[2];
        REQUIRE(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
        REQUIRE(pyccl_engine_conn_add(c->engine[0], c->slot[0][1], pair[0]) == PYCCL_OK);
        hand[i] = pair[1];
    }
}

static void hands_close(cluster *c, const int hand[2]) {
    close(hand[0]);
    close(hand[1]);
    cluster_close(c);
}

static void say(const cluster *c, int fd, pyccl_frame frame, const uint8_t *payload, size_t bytes) {
    uint8_t header[PYCCL_FRAME_SIZE];
    frame.epoch_number = c->number;
    memset(&frame.epoch_tag, (int)(0x40 + c->number), sizeof frame.epoch_tag);
    pyccl_frame_encode(&frame, header);
    REQUIRE(send(fd, header, sizeof header, MSG_NOSIGNAL) == sizeof header);
    if (bytes > 0) REQUIRE(send(fd, payload, bytes, MSG_NOSIGNAL) == (ssize_t)bytes);
}

/* The next frame but heartbeats, from whichever hand; its payload to `payload`. */
static pyccl_frame hear(const int hand[2], uint8_t *payload) {
    for (;;) {
        struct pollfd ready[2] = {{.fd = hand[0], .events = POLLIN}, {.fd = hand[1], .events = POLLIN}};
        REQUIRE(poll(ready, 2, 60000) > 0);
        const int fd = hand[(ready[0].revents & POLLIN) == 0];
        uint8_t header[PYCCL_FRAME_SIZE];
        pyccl_frame frame;
        REQUIRE(recv(fd, header, sizeof header, MSG_WAITALL) == sizeof header);
        REQUIRE(pyccl_frame_decode_untrusted(header, &frame) == PYCCL_OK);
        if (frame.length > 0) REQUIRE(recv(fd, payload, frame.length, MSG_WAITALL) == (ssize_t)frame.length);
        if (frame.type != PYCCL_FRAME_HEARTBEAT) return frame;
    }
}

TEST(engine_cuts_what_it_serves_over_a_line) {
    cluster c;
    int hand[2];
    two_hands(&c, hand);
    static uint8_t source[PYCCL_PIECE_MAX], copy[PYCCL_PIECE_MAX], part[PYCCL_PIECE_MAX];
    fill(source, PYCCL_UINT8, sizeof source, 4);
    const pyccl_region region = {source, sizeof source};
    CHECK_EQ(pyccl_state_publish(c.engine[0], 7, &region, 1), PYCCL_OK);
    say(&c, hand[0], (pyccl_frame){.type = PYCCL_FRAME_STATE_ASK, .seq = 7, .offset = 100, .value = sizeof source - 100}, NULL, 0);
    size_t have = 100, frames = 0;
    for (; have < sizeof source; frames++) {
        const pyccl_frame frame = hear(hand, part);
        CHECK_EQ(frame.type, PYCCL_FRAME_STATE_DATA);
        CHECK((frame.offset - 100) % STATE_UNIT_BYTES == 0);
        memcpy(copy + frame.offset, part, frame.length);
        have += frame.length;
    }
    CHECK_EQ(frames, 8);
    CHECK(have == sizeof source && memcmp(source + 100, copy + 100, sizeof source - 100) == 0);
    hands_close(&c, hand);
}

static pyccl_frame units_from_50(uint32_t first, uint32_t count) {
    return (pyccl_frame){.type = PYCCL_FRAME_STATE_DATA, .seq = 7, .offset = 50 + (uint64_t)first * STATE_UNIT_BYTES, .length = count * STATE_UNIT_BYTES};
}

TEST(engine_asks_again_for_the_units_that_a_connection_lost) {
    enum { SIZE = 5 * STATE_UNIT_BYTES + 1000 };
    cluster c;
    int hand[2];
    two_hands(&c, hand);
    static uint8_t source[SIZE], copy[SIZE], nothing[1];
    fill(source, PYCCL_UINT8, SIZE, 4);
    CHECK_EQ(pyccl_state_fetch(c.engine[0], c.slot[0][1], 7, 50, SIZE, copy, 1, 0), PYCCL_OK);
    const pyccl_frame asked = hear(hand, nothing);
    CHECK(asked.type == PYCCL_FRAME_STATE_ASK && asked.offset == 50 && asked.value == SIZE);
    say(&c, hand[0], units_from_50(1, 2), source + STATE_UNIT_BYTES, 2 * STATE_UNIT_BYTES);
    say(&c, hand[0], units_from_50(3, 1), source + 3 * STATE_UNIT_BYTES, 100);
    shutdown(hand[0], SHUT_RDWR);
    CHECK(await_event(c.engine[0], PYCCL_EVENT_CONN_DOWN, NULL));
    const int left[2] = {hand[1], hand[1]};
    const pyccl_frame first = hear(left, nothing), rest = hear(left, nothing);
    CHECK(first.type == PYCCL_FRAME_STATE_ASK && first.offset == 50 && first.value == STATE_UNIT_BYTES);
    CHECK(rest.offset == 50 + 3 * STATE_UNIT_BYTES && rest.value == SIZE - 3 * STATE_UNIT_BYTES);
    say(&c, hand[1], units_from_50(2, 1), nothing, 0);
    for (int k = 0; k < STATE_UNIT_BYTES; k++) REQUIRE(send(hand[1], nothing, 1, MSG_NOSIGNAL) == 1); /* here already: discarded */
    say(&c, hand[1], units_from_50(0, 1), source, STATE_UNIT_BYTES);
    pyccl_frame data = units_from_50(3, 2);
    data.length = SIZE - 3 * STATE_UNIT_BYTES;
    say(&c, hand[1], data, source + 3 * STATE_UNIT_BYTES, data.length);
    pyccl_event event;
    CHECK(await_event(c.engine[0], PYCCL_EVENT_STATE, &event));
    CHECK(event.code == PYCCL_OK && memcmp(source, copy, SIZE) == 0);
    hands_close(&c, hand);
}

/* Asked for the first bytes of state 7, packed or not, the holder sends the head of a frame that costs it the link. */
static void check_refused(uint32_t size_bytes, int packed, pyccl_frame answer) {
    cluster c;
    int hand[2];
    two_hands(&c, hand);
    uint8_t *copy = malloc(size_bytes), nothing[1];
    pyccl_event event;
    REQUIRE(copy != NULL);
    CHECK_EQ(pyccl_state_fetch(c.engine[0], c.slot[0][1], 7, 0, size_bytes, copy, 1, packed), PYCCL_OK);
    (void)hear(hand, nothing);
    say(&c, hand[0], answer, NULL, 0);
    CHECK(await_event(c.engine[0], PYCCL_EVENT_LINK_REFUSED, &event));
    hands_close(&c, hand);
    free(copy);
}

TEST(engine_refuses_state_that_is_no_units_of_what_it_asked_for) {
    enum { SIZE = 5 * STATE_UNIT_BYTES + 1000 };
    const uint32_t places[][2] = {{1, STATE_UNIT_BYTES}, {0, STATE_UNIT_BYTES + 1}, {4 * STATE_UNIT_BYTES, 2 * STATE_UNIT_BYTES},
                                  {5 * STATE_UNIT_BYTES, 999}, {5 * STATE_UNIT_BYTES, 1001}};
    for (size_t k = 0; k < sizeof places / sizeof *places; k++) {
        const pyccl_frame answer = {.type = PYCCL_FRAME_STATE_DATA, .seq = 7, .offset = places[k][0], .length = places[k][1]};
        check_refused(SIZE, 0, answer);
    }
}

/* ---- packed ---- */

enum { PACKED_SIZE = 3 * STATE_UNIT_BYTES };

static pyccl_frame packed_frame(uint64_t offset, uint32_t length, uint64_t value) {
    return (pyccl_frame){.type = PYCCL_FRAME_STATE_PACKED, .seq = 7, .offset = offset, .length = length, .value = value};
}

TEST(engine_sends_what_its_caller_packed_and_others_first) {
    cluster c;
    cluster_open(&c, 2, 2, OVER_TCP);
    static uint8_t source[4 * PACKED_SIZE], copy[4][PACKED_SIZE];
    fill(source, PYCCL_UINT8, sizeof source, 4);
    const pyccl_region region = {source, sizeof source};
    CHECK_EQ(pyccl_state_publish(c.engine[0], 7, &region, 1), PYCCL_OK);
    for (uint64_t k = 0; k < 3; k++)
        CHECK_EQ(pyccl_state_fetch(c.engine[1], c.slot[1][0], 7, k * PACKED_SIZE, PACKED_SIZE, copy[k], k, k < 2), PYCCL_OK);
    pyccl_event asked[2], event;
    for (int k = 0; k < 2; k++) {
        CHECK(await_event(c.engine[0], PYCCL_EVENT_PACK, &asked[k]));
        CHECK(asked[k].slot == c.slot[0][1] && asked[k].value == 7 && asked[k].count == PACKED_SIZE);
    }
    CHECK(await_event(c.engine[1], PYCCL_EVENT_STATE, &event)); /* behind them, and not held up */
    CHECK(event.code == PYCCL_OK && event.value == 2 && event.count == 0);
    CHECK(memcmp(copy[2], source + 2 * PACKED_SIZE, PACKED_SIZE) == 0);
    const uint64_t first = asked[0].seq / PACKED_SIZE, second = asked[1].seq / PACKED_SIZE;
    CHECK_EQ(pyccl_state_packed(c.engine[0], c.slot[0][1], 7, asked[0].seq, PACKED_SIZE, "short", 5), PYCCL_OK);
    CHECK_EQ(pyccl_state_packed(c.engine[0], c.slot[0][1], 7, asked[0].seq, PACKED_SIZE, "short", 5), PYCCL_ERR_ARGUMENT);
    CHECK(await_event(c.engine[1], PYCCL_EVENT_STATE, &event));
    CHECK(event.code == PYCCL_OK && event.value == first && event.count == 5 && memcmp(copy[first], "short", 5) == 0);
    CHECK_EQ(pyccl_state_packed(c.engine[0], c.slot[0][1], 7, asked[1].seq, PACKED_SIZE, source, PACKED_SIZE), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_state_packed(c.engine[0], c.slot[0][1], 7, asked[1].seq, PACKED_SIZE, NULL, 0), PYCCL_OK);
    CHECK(await_event(c.engine[1], PYCCL_EVENT_STATE, &event));
    CHECK(event.code == PYCCL_OK && event.value == second && event.count == 0);
    CHECK(memcmp(copy[second], source + second * PACKED_SIZE, PACKED_SIZE) == 0);
    cluster_close(&c);
}

TEST(engine_asks_for_it_as_it_is_when_a_connection_lost_it_packed) {
    cluster c;
    int hand[2];
    two_hands(&c, hand);
    static uint8_t source[PACKED_SIZE], copy[PACKED_SIZE], nothing[1];
    fill(source, PYCCL_UINT8, PACKED_SIZE, 4);
    CHECK_EQ(pyccl_state_fetch(c.engine[0], c.slot[0][1], 7, 0, PACKED_SIZE, copy, 1, 1), PYCCL_OK);
    pyccl_frame asked = hear(hand, nothing);
    CHECK(asked.type == PYCCL_FRAME_STATE_ASK && asked.phase == 1 && asked.value == PACKED_SIZE);
    say(&c, hand[0], packed_frame(0, 1000, PACKED_SIZE), source, 999);
    shutdown(hand[0], SHUT_RDWR);
    CHECK(await_event(c.engine[0], PYCCL_EVENT_CONN_DOWN, NULL));
    const int left[2] = {hand[1], hand[1]};
    asked = hear(left, nothing);
    CHECK(asked.type == PYCCL_FRAME_STATE_ASK && asked.phase == 0 && asked.value == PACKED_SIZE);
    say(&c, hand[1], (pyccl_frame){.type = PYCCL_FRAME_STATE_DATA, .seq = 7, .length = PACKED_SIZE}, source, PACKED_SIZE);
    pyccl_event event;
    CHECK(await_event(c.engine[0], PYCCL_EVENT_STATE, &event));
    CHECK(event.code == PYCCL_OK && event.count == 0 && memcmp(source, copy, PACKED_SIZE) == 0);
    hands_close(&c, hand);
}

TEST(engine_sends_as_it_is_what_is_asked_for_again_before_it_is_packed) {
    cluster c;
    int hand[2];
    two_hands(&c, hand);
    static uint8_t source[PACKED_SIZE], part[PYCCL_PIECE_MAX];
    const pyccl_region region = {source, sizeof source};
    CHECK_EQ(pyccl_state_publish(c.engine[0], 7, &region, 1), PYCCL_OK);
    pyccl_frame ask = {.type = PYCCL_FRAME_STATE_ASK, .phase = 1, .seq = 7, .value = PACKED_SIZE};
    pyccl_event event;
    say(&c, hand[0], ask, NULL, 0);
    say(&c, hand[0], ask, NULL, 0);
    CHECK(await_event(c.engine[0], PYCCL_EVENT_PACK, &event));
    ask.phase = 0;
    say(&c, hand[0], ask, NULL, 0);
    for (uint32_t have = 0; have < PACKED_SIZE;) {
        const pyccl_frame frame = hear(hand, part);
        REQUIRE(frame.type == PYCCL_FRAME_STATE_DATA);
        have += frame.length;
    }
    CHECK_EQ(pyccl_state_packed(c.engine[0], c.slot[0][1], 7, 0, PACKED_SIZE, "short", 5), PYCCL_ERR_ARGUMENT);
    hands_close(&c, hand);
}

/* The memory of those that were not sent is freed with the engine: told by the sanitizers. */
TEST(engine_keeps_what_is_packed_until_it_can_be_sent) {
    enum { ASKED = 16 };
    cluster c;
    int hand[2];
    two_hands(&c, hand);
    static uint8_t source[ASKED * PACKED_SIZE], part[PYCCL_PIECE_MAX];
    const pyccl_region region = {source, sizeof source};
    CHECK_EQ(pyccl_state_publish(c.engine[0], 7, &region, 1), PYCCL_OK);
    for (uint64_t k = 0; k < ASKED; k++)
        say(&c, hand[0], (pyccl_frame){.type = PYCCL_FRAME_STATE_ASK, .phase = 1, .seq = 7, .offset = k * PACKED_SIZE, .value = PACKED_SIZE}, NULL, 0);
    for (uint64_t k = 0; k < ASKED; k++) {
        pyccl_event event;
        REQUIRE(await_event(c.engine[0], PYCCL_EVENT_PACK, &event));
        CHECK_EQ(pyccl_state_packed(c.engine[0], event.slot, 7, event.seq, event.count, source, event.count - 1), PYCCL_OK);
    }
    const pyccl_frame frame = hear(hand, part);
    CHECK(frame.type == PYCCL_FRAME_STATE_PACKED && frame.length == PACKED_SIZE - 1 && frame.value == PACKED_SIZE);
    hands_close(&c, hand);
}

TEST(engine_packs_for_a_peer_so_much_at_a_time_and_sends_the_rest_as_it_is) {
    enum { ASKED = ASKS_PACKED_MAX + 2, SIZE = 1000 };
    cluster c;
    int hand[2];
    two_hands(&c, hand);
    static uint8_t source[ASKED * SIZE], part[PYCCL_PIECE_MAX];
    const pyccl_region region = {source, sizeof source};
    CHECK_EQ(pyccl_state_publish(c.engine[0], 7, &region, 1), PYCCL_OK);
    for (uint64_t k = 0; k < ASKED; k++)
        say(&c, hand[0], (pyccl_frame){.type = PYCCL_FRAME_STATE_ASK, .phase = 1, .seq = 7, .offset = k * SIZE, .value = SIZE}, NULL, 0);
    for (uint64_t k = ASKS_PACKED_MAX; k < ASKED; k++) { /* the others wait for the packer */
        const pyccl_frame frame = hear(hand, part);
        CHECK(frame.type == PYCCL_FRAME_STATE_DATA && frame.length == SIZE && frame.offset >= ASKS_PACKED_MAX * SIZE);
    }
    hands_close(&c, hand);
}

static uint32_t packs_told(const cluster *c) {
    uint32_t told = 0;
    pyccl_event event;
    while (pyccl_engine_events(c->engine[0], &event, 1) == 1) told += event.type == PYCCL_EVENT_PACK;
    return told;
}

/* Each ask is taken back by one for the bytes as they are: nothing waits in the queue, and still its caller has been told. */
TEST(engine_tells_its_caller_of_no_more_asks_than_it_answers) {
    cluster c;
    int hand[2];
    two_hands(&c, hand);
    static uint8_t source[1000], part[PYCCL_PIECE_MAX];
    const pyccl_region region = {source, sizeof source};
    CHECK_EQ(pyccl_state_publish(c.engine[0], 7, &region, 1), PYCCL_OK);
    pyccl_frame ask = {.type = PYCCL_FRAME_STATE_ASK, .phase = 1, .seq = 8, .value = 1000};
    say(&c, hand[0], ask, NULL, 0);
    CHECK_EQ(hear(hand, part).type, PYCCL_FRAME_STATE_NONE);
    CHECK_EQ(packs_told(&c), 0); /* what is not published is nobody's to pack */
    ask.seq = 7;
    for (int k = 0; k < ASKS_PACKED_MAX; k++) {
        ask.phase = 1;
        say(&c, hand[0], ask, NULL, 0);
        ask.phase = 0;
        say(&c, hand[0], ask, NULL, 0);
        CHECK_EQ(hear(hand, part).type, PYCCL_FRAME_STATE_DATA);
    }
    ask.phase = 1;
    for (int k = 0; k < 3; k++) {
        say(&c, hand[0], ask, NULL, 0);
        CHECK_EQ(hear(hand, part).type, PYCCL_FRAME_STATE_DATA);
    }
    CHECK_EQ(packs_told(&c), ASKS_PACKED_MAX);
    CHECK_EQ(pyccl_state_packed(c.engine[0], c.slot[0][1], 7, 0, 1000, NULL, 0), PYCCL_ERR_ARGUMENT); /* late: an answer, too */
    say(&c, hand[0], ask, NULL, 0);
    CHECK(await_event(c.engine[0], PYCCL_EVENT_PACK, NULL));
    hands_close(&c, hand);
}

TEST(engine_refuses_a_packed_answer_to_another_question) {
    const uint64_t wrong[][2] = {{1, PACKED_SIZE}, {0, PACKED_SIZE - 1}, {0, PACKED_SIZE + 1}, {STATE_UNIT_BYTES, 2 * STATE_UNIT_BYTES}};
    for (size_t k = 0; k < sizeof wrong / sizeof *wrong; k++) {
        check_refused(PACKED_SIZE, 1, packed_frame(wrong[k][0], 1000, wrong[k][1]));
    }
}
