/* test_engine_state.c: shared state that one engine publishes and others fetch in pieces. */
#include "engine_vectors.h"

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
        CHECK_EQ(pyccl_state_fetch(c.engine[1], c.slot[1][0], 7, at, n, copy + at, pieces), PYCCL_OK);
        if (pieces == 100) kill_conn(&c, 1, 0, 1);
    }
    for (uint64_t k = 0; k < pieces; k++) {
        pyccl_event event;
        CHECK(await_event(c.engine[1], PYCCL_EVENT_STATE, &event));
        CHECK_EQ(event.code, PYCCL_OK);
    }
    CHECK(memcmp(source, copy, size) == 0);
    pyccl_event event;
    CHECK_EQ(pyccl_state_fetch(c.engine[1], c.slot[1][0], 7, size - 10, 11, copy, 500), PYCCL_OK);
    CHECK(await_event(c.engine[1], PYCCL_EVENT_STATE, &event));
    CHECK_EQ(event.code, PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_state_unpublish(c.engine[0], 7), PYCCL_OK);
    CHECK_EQ(pyccl_state_fetch(c.engine[1], c.slot[1][0], 7, 0, 10, copy, 501), PYCCL_OK);
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
            CHECK_EQ(pyccl_state_fetch(c.engine[1], c.slot[1][0], 1, at, PYCCL_PIECE_MAX, copy + at, at), PYCCL_OK);
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
        CHECK_EQ(pyccl_state_fetch(c.engine[1], c.slot[1][0], 7, k * SIZE, SIZE, copy + k * SIZE, k), PYCCL_OK);
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
    CHECK_EQ(pyccl_state_fetch(c.engine[0], c.slot[0][1], 1, 0, 64, copy, 1), PYCCL_OK);
    CHECK(await_event(c.engine[0], PYCCL_EVENT_STATE, &event));
    CHECK_EQ(event.code, PYCCL_ERR_PEER_LOST);
    CHECK_EQ(pyccl_state_fetch(c.engine[0], 77, 1, 0, 64, copy, 1), PYCCL_ERR_ARGUMENT);
    CHECK_EQ(pyccl_state_fetch(c.engine[0], c.slot[0][2], 1, 0, 0, copy, 1), PYCCL_ERR_ARGUMENT);
    cluster_close(&c);
}
