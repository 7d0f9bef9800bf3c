/* fuzz_engine.c: a member that sends an engine anything: it may fail operations and lose
 * its connection. It may not touch the input of an operation that failed, and what it sends behind a frame that is refused
 * changes nothing. Input: frames; each a byte that says what is repaired (magic and checksum, epoch, the spec hash of one of
 * our operations), 64 bytes of header and as much payload as it says, up to what is left. */
#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "../src/frame.h"
#include "fuzz.h"

enum { OPS = 5, COUNT = 300, STATE_BYTES = 70000 };
#define SECOND INT64_C(1000000000)

static pyccl_spec spec_of(uint32_t i) {
    pyccl_spec spec = {.kind = PYCCL_ALL_REDUCE, .dtype = PYCCL_FLOAT32, .op = PYCCL_SUM, .algorithm = i == 1 ? PYCCL_RING : PYCCL_DIRECT,
                       .retry = 1, .tag = i, .count = COUNT};
    if (i == 2) spec.op = PYCCL_AVG;
    if (i == 3) spec.guard = 1;
    if (i >= 3) {
        spec.codec = PYCCL_CODEC_UINT8;
        spec.block = 64;
    }
    if (i == 4) {
        spec.kind = PYCCL_REDUCE_SCATTER;
        spec.root[0] = 3;
    }
    return spec;
}

static void put(uint8_t *at, uint64_t x, int bytes) {
    for (int i = 0; i < bytes; i++) at[i] = (uint8_t)(x >> (8 * i));
}

static void repair(uint8_t header[PYCCL_FRAME_SIZE], uint8_t what) {
    if (what & 2) {
        put(header + 8, 1, 8);
        memset(header + 16, 1, 8);
    }
    if (what & 4) {
        const pyccl_spec spec = spec_of(header[32] % OPS);
        put(header + 32, spec.tag, 4);
        put(header + 24, header[24] & 1, 8);
        if (header[4] == PYCCL_FRAME_DATA) put(header + 56, pyccl_spec_hash(&spec), 4);
    }
    if (what & 1) {
        memcpy(header, "PYC1", 4);
        header[7] = 0;
        put(header + 60, pyccl_xxh3_64(header, 60, 0), 4);
    }
}

/* False: the engine has closed the connection. */
static bool send_all(int fd, const uint8_t *bytes, size_t size) {
    uint8_t heard[4096];
    while (size > 0) {
        const ssize_t n = send(fd, bytes, size, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno != EAGAIN) return false;
        if (n > 0) bytes += n, size -= (size_t)n;
        const ssize_t got = recv(fd, heard, sizeof heard, MSG_DONTWAIT);
        if (got == 0 || (got < 0 && errno != EAGAIN)) return false;
        struct pollfd wait = {.fd = fd, .events = POLLIN | POLLOUT};
        if (n < 0) HOLDS(poll(&wait, 1, 20000) == 1);
    }
    return true;
}

/* False: what comes behind the last frame is left unread, which is of a later epoch. */
static bool attack(fuzz_input *in, int fd) {
    static uint8_t frame[PYCCL_FRAME_SIZE + PYCCL_PIECE_MAX];
    while (in->left > 0) {
        const uint8_t what = fuzz_u8(in);
        uint32_t length;
        fuzz_take(in, frame, PYCCL_FRAME_SIZE);
        repair(frame, what);
        memcpy(&length, frame + 36, 4);
        if (length > PYCCL_PIECE_MAX) length = 0;
        if (frame[4] == PYCCL_FRAME_OPEN && what & 4 && length == PYCCL_SPEC_SIZE) {
            const pyccl_spec spec = spec_of(frame[32] % OPS);
            pyccl_spec_encode(&spec, frame + PYCCL_FRAME_SIZE);
        } else fuzz_take(in, frame + PYCCL_FRAME_SIZE, length);
        pyccl_frame decoded;
        const bool later = pyccl_frame_decode_untrusted(frame, &decoded) == PYCCL_OK && decoded.epoch_number > 1;
        if (!send_all(fd, frame, PYCCL_FRAME_SIZE + (later ? 0 : length))) return true;
        if (later) return false;
    }
    return true;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_input in = {data, size};
    static float x[OPS][COUNT], before[OPS][COUNT], out[OPS][COUNT];
    static uint8_t published[STATE_BYTES], fetched[STATE_BYTES];
    uint8_t ids[3][16], epoch_says;
    uint32_t slot;
    int pair[2];
    pyccl_engine *engine;
    pyccl_op *ops[OPS];
    pyccl_engine_options options = {.heartbeat_ns = SECOND, .silence_ns = 60 * SECOND, .fsm = {.settle_ns = 60 * SECOND, .stall_ns = 60 * SECOND, .tell_ns = SECOND}};
    for (int i = 0; i < 3; i++) memset(ids[i], i + 1, 16);
    memcpy(options.self_id, ids[0], 16);
    HOLDS(pyccl_engine_new(&options, &engine) == PYCCL_OK);
    HOLDS(pyccl_engine_peer_add(engine, ids[1], &slot) == PYCCL_OK);
    epoch_says = fuzz_u8(&in);
    pyccl_epoch epoch = {.number = 1, .world = 2 + epoch_says % 2, .restart = 1, .members = ids[0]};
    memset(epoch.id, 1, sizeof epoch.id);
    HOLDS(pyccl_engine_epoch(engine, &epoch, NULL, 0) == PYCCL_OK);
    const pyccl_region region = {published, sizeof published};
    HOLDS(pyccl_state_publish(engine, 7, &region, 1) == PYCCL_OK);
    HOLDS(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    HOLDS(pyccl_engine_conn_add(engine, slot, pair[0]) == PYCCL_OK);
    HOLDS(pyccl_state_fetch(engine, slot, 9, 0, sizeof fetched, fetched, 1, 1) == PYCCL_OK);
    for (uint32_t i = 0; i < OPS; i++) {
        for (int k = 0; k < COUNT; k++) x[i][k] = before[i][k] = (float)(k * 7 % 31);
        const bool in_place = i != 2 && i != 4;
        const pyccl_op_args args = {.spec = spec_of(i), .src = x[i], .dst = in_place ? x[i] : out[i], .dst_bytes = sizeof out[i], .weight = 1, .timeout_ns = 60 * SECOND};
        HOLDS(pyccl_op_submit(engine, &args, &ops[i]) == PYCCL_OK);
    }
    const bool reads = attack(&in, pair[1]);
    (void)shutdown(pair[1], SHUT_WR); /* it has read all when its side is closed, too */
    uint8_t heard[4096];
    while (reads) {
        struct pollfd wait = {.fd = pair[1], .events = POLLIN};
        HOLDS(poll(&wait, 1, 20000) == 1);
        const ssize_t n = recv(pair[1], heard, sizeof heard, MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno != EAGAIN)) break;
    }
    close(pair[1]);
    HOLDS(pyccl_state_unpublish(engine, 7) == PYCCL_OK);
    pyccl_engine_stop(engine, PYCCL_ERR_CLOSED);
    for (uint32_t i = 0; i < OPS; i++) {
        pyccl_op_info info;
        HOLDS(pyccl_op_done(ops[i]));
        pyccl_op_info_get(ops[i], &info);
        if (info.status != PYCCL_OK || i == 2 || i == 4) HOLDS(memcmp(x[i], before[i], sizeof x[i]) == 0);
        pyccl_op_free(ops[i]);
    }
    pyccl_engine_free(engine);
    return 0;
}
