/* frame.c: the header of data frames and the spec: struct <-> bytes, and every limit of proto/wire.md 3.
 *
 * Knows no socket, epoch or operation: it judges a header by itself, whole, before anything moves. Bytes are put
 * together by shifts, so neither alignment nor the host's byte order matters.
 * Invariant: what the decoder accepts encodes to the same bytes again; what the encoder is given is valid (asserted).
 * Threads: nothing shared.
 *
 *  frame   0        4      5       6       7      8                   16
 *          +--------+------+-------+-------+------+-------------------+
 *          | magic  | type | phase | space | zero |   epoch number    |
 *      16  +--------+------+-------+-------+------+-------------------+ 32
 *          |             epoch tag                |        seq        |
 *      32  +--------------------+-----------------+-------------------+ 48
 *          | tag (4)            | length (4)      |      offset       |
 *      48  +--------------------+-----------------+---------+---------+ 64
 *          |               value                  | spec    | check-  |   check- = low half of XXH3-64
 *          |                                      | hash    | sum     |            of bytes 0..59
 *          +--------------------------------------+---------+---------+
 *
 *  spec    0      1       2    3       4           5       6       7      8       12        16        24          40
 *          +------+-------+----+-------+-----------+-------+-------+------+-------+---------+---------+-----------+
 *          | kind | dtype | op | codec | algorithm | retry | space | guard|  tag  |  block  |  count  | root (16) |
 *          +------+-------+----+-------+-----------+-------+-------+------+-------+---------+---------+-----------+  */
#include "frame.h"

#include <string.h>

#include "status.h"

#define FRAME_MAGIC UINT32_C(0x31435950) /* "PYC1" */
#define FRAME_CHECKED_BYTES 60           /* what the checksum covers */
#define FRAME_FAILURE_MAX (UINT64_C(255) | (uint64_t)PYCCL_CULPRIT_NOBODY << 8) /* in ABORT and ANSWER: minus the status, culprit */
#define SPEC_COUNT_MAX (UINT64_C(1) << 48)

static void put_u32(uint8_t *at, uint32_t x) {
    for (int i = 0; i < 4; i++) at[i] = (uint8_t)(x >> (8 * i));
}

static void put_u64(uint8_t *at, uint64_t x) {
    for (int i = 0; i < 8; i++) at[i] = (uint8_t)(x >> (8 * i));
}

static uint32_t get_u32(const uint8_t *at) {
    uint32_t x = 0;
    for (int i = 0; i < 4; i++) x |= (uint32_t)at[i] << (8 * i);
    return x;
}

static uint64_t get_u64(const uint8_t *at) {
    return (uint64_t)get_u32(at) | (uint64_t)get_u32(at + 4) << 32;
}

static uint32_t header_checksum(const uint8_t header[64]) {
    return (uint32_t)pyccl_xxh3_64(header, FRAME_CHECKED_BYTES, 0);
}

/* ---- frames ---- */

typedef struct field_range {
    uint64_t low, high;
} field_range;

typedef struct frame_rule { /* one row of the table in wire.md 3; what is not named must be zero */
    field_range length, value;
    bool phase, space, epoch, seq, tag, offset, spec_hash; /* may differ from zero */
} frame_rule;

#define ANY {0, UINT64_MAX}
#define ZERO {0, 0}
#define PIECE {1, PYCCL_PIECE_MAX}
#define FAILURE_VALUE {1, FRAME_FAILURE_MAX}
#define OUTCOME_VALUE {0, FRAME_FAILURE_MAX}
#define OF_OPERATION .space = true, .epoch = true, .seq = true, .tag = true
#define OF_STATE .epoch = true, .seq = true, .offset = true

static const frame_rule FRAME_RULES[] = {
    [PYCCL_FRAME_OPEN] = {.length = {PYCCL_SPEC_SIZE, PYCCL_SPEC_SIZE}, .value = ANY, OF_OPERATION, .phase = true, .offset = true},
    [PYCCL_FRAME_DATA] = {.length = PIECE, .value = ZERO, OF_OPERATION, .phase = true, .offset = true, .spec_hash = true},
    [PYCCL_FRAME_DONE] = {.length = ZERO, .value = ANY, OF_OPERATION, .offset = true},
    [PYCCL_FRAME_ABORT] = {.length = ZERO, .value = FAILURE_VALUE, OF_OPERATION},
    [PYCCL_FRAME_ASK] = {.length = ZERO, .value = ZERO, OF_OPERATION},
    [PYCCL_FRAME_ANSWER] = {.length = ZERO, .value = OUTCOME_VALUE, OF_OPERATION},
    [PYCCL_FRAME_SETTLED] = {.length = ZERO, .value = ZERO, OF_OPERATION},
    [PYCCL_FRAME_HEARTBEAT] = {.length = ZERO, .value = ZERO},
    [PYCCL_FRAME_STATE_ASK] = {.length = ZERO, .value = PIECE, OF_STATE, .phase = true},
    [PYCCL_FRAME_STATE_DATA] = {.length = PIECE, .value = ZERO, OF_STATE},
    [PYCCL_FRAME_STATE_NONE] = {.length = ZERO, .value = ZERO, OF_STATE},
    [PYCCL_FRAME_STATE_PACKED] = {.length = PIECE, .value = PIECE, OF_STATE},
};

static bool in_range(uint64_t x, field_range range) { return range.low <= x && x <= range.high; }

/* Of an IEEE double: finite, sign bit 0. */
static bool weight_valid(uint64_t bits) { return bits < UINT64_C(0x7FF) << 52; }

/* A failure has a status, whoever is named with it. */
static bool failure_valid(uint64_t value) { return value == 0 || (value & 255) != 0; }

/* Of a DONE: who contributed and who owns what is complained of, each a rank + 1, nobody or, for the share, none. */
static bool complaint_valid(uint64_t complaint) {
    return complaint % PYCCL_COMPLAINT_RESULT <= PYCCL_CULPRIT_NOBODY && complaint / PYCCL_COMPLAINT_RESULT <= PYCCL_WORLD_MAX;
}

bool frame_valid(const pyccl_frame *frame) {
    if (frame->type < PYCCL_FRAME_OPEN || frame->type > PYCCL_FRAME_STATE_PACKED) return false;
    const frame_rule *rule = &FRAME_RULES[frame->type];
    if (frame->type == PYCCL_FRAME_OPEN && !weight_valid(frame->offset)) return false;
    if (frame->type == PYCCL_FRAME_DONE && !complaint_valid(frame->offset)) return false;
    if (frame->type == PYCCL_FRAME_STATE_PACKED && frame->length >= frame->value) return false;
    if ((frame->type == PYCCL_FRAME_ABORT || frame->type == PYCCL_FRAME_ANSWER) && !failure_valid(frame->value)) return false;
    return in_range(frame->length, rule->length) && in_range(frame->value, rule->value) &&
           frame->phase <= (rule->phase ? 1 : 0) && frame->space <= (rule->space ? PYCCL_SPACE_PAIR : 0) &&
           (rule->epoch || (frame->epoch_number == 0 && frame->epoch_tag == 0)) &&
           (rule->seq || frame->seq == 0) && (rule->tag || frame->tag == 0) &&
           (rule->offset || frame->offset == 0) && (rule->spec_hash || frame->spec_hash == 0);
}

void pyccl_frame_encode(const pyccl_frame *frame, uint8_t out[64]) {
    PYCCL_ASSERT(frame_valid(frame));
    put_u32(out, FRAME_MAGIC);
    out[4] = frame->type;
    out[5] = frame->phase;
    out[6] = frame->space;
    out[7] = 0;
    put_u64(out + 8, frame->epoch_number);
    put_u64(out + 16, frame->epoch_tag);
    put_u64(out + 24, frame->seq);
    put_u32(out + 32, frame->tag);
    put_u32(out + 36, frame->length);
    put_u64(out + 40, frame->offset);
    put_u64(out + 48, frame->value);
    put_u32(out + 56, frame->spec_hash);
    put_u32(out + 60, header_checksum(out));
}

pyccl_status pyccl_frame_decode_untrusted(const uint8_t in[64], pyccl_frame *out) {
    memset(out, 0, sizeof *out);
    if (get_u32(in) != FRAME_MAGIC || in[7] != 0 || get_u32(in + 60) != header_checksum(in)) return PYCCL_ERR_FRAME;
    const pyccl_frame frame = {
        .type = in[4],
        .phase = in[5],
        .space = in[6],
        .epoch_number = get_u64(in + 8),
        .epoch_tag = get_u64(in + 16),
        .seq = get_u64(in + 24),
        .tag = get_u32(in + 32),
        .length = get_u32(in + 36),
        .offset = get_u64(in + 40),
        .value = get_u64(in + 48),
        .spec_hash = get_u32(in + 56),
    };
    if (!frame_valid(&frame)) return PYCCL_ERR_FRAME;
    *out = frame;
    return PYCCL_OK;
}

/* ---- specs ---- */

static bool spec_reduces(const pyccl_spec *spec) { return spec->kind == PYCCL_ALL_REDUCE || spec->kind == PYCCL_REDUCE_SCATTER; }

static bool spec_is_float(const pyccl_spec *spec) {
    return spec->dtype == PYCCL_FLOAT32 || spec->dtype == PYCCL_FLOAT64 || spec->dtype == PYCCL_FLOAT16 || spec->dtype == PYCCL_BFLOAT16;
}

static bool spec_op_valid(const pyccl_spec *spec) {
    if (!spec_reduces(spec)) return spec->op == 0;
    if (spec->op < PYCCL_SUM || spec->op > PYCCL_MAX) return false;
    return spec->op != PYCCL_AVG || spec_is_float(spec);
}

/* Blocks of 2^6 to 2^16 elements, a power of two, for a codec; it needs floats to reduce. */
static bool spec_codec_valid(const pyccl_spec *spec) {
    if (spec->codec == PYCCL_CODEC_NONE) return spec->block == 0;
    return pyccl_codec_size(spec->codec, PYCCL_BLOCK_MIN, 1) > 0 && spec_reduces(spec) && spec_is_float(spec) && spec->block >= PYCCL_BLOCK_MIN &&
           spec->block <= PYCCL_BLOCK_MAX && (spec->block & (spec->block - 1)) == 0;
}

/* Whole rows of at least one element; of an all_reduce none. */
static bool spec_row_valid(const pyccl_spec *spec) {
    const uint64_t row = get_u64(spec->root);
    if (spec->kind == PYCCL_ALL_REDUCE) return row == 0;
    return row > 0 && row <= SPEC_COUNT_MAX && spec->count % row == 0;
}

/* A limit of a guard: a positive float32, or +0 for none. */
static bool limit_valid(uint32_t bits) { return bits < UINT32_C(0x7F800000); }

/* Of floats that are reduced where the owner of a share sees what each contributes. */
static bool spec_guard_valid(const pyccl_spec *spec) {
    if (spec->guard == 0) return !spec_reduces(spec) || get_u64(spec->root + 8) == 0;
    return spec->guard == 1 && spec_reduces(spec) && spec_is_float(spec) && spec->algorithm == PYCCL_DIRECT &&
           limit_valid(get_u32(spec->root + 8)) && limit_valid(get_u32(spec->root + 12));
}

static float limit_of(const uint8_t *at) {
    const uint32_t bits = get_u32(at);
    float limit;
    memcpy(&limit, &bits, sizeof limit);
    return limit;
}

frame_limits frame_spec_limits(const pyccl_spec *spec) {
    return (frame_limits){.peak = limit_of(spec->root + 8), .norm = limit_of(spec->root + 12)};
}

/* Who takes part, beside the members of the epoch: the root of a broadcast, the pair of an exchange; or a row. */
static bool spec_peers_valid(const pyccl_spec *spec) {
    static const uint8_t no_root[16] = {0};
    const bool rootless = memcmp(spec->root, no_root, sizeof no_root) == 0;
    if (spec->kind == PYCCL_EXCHANGE) return spec->space == PYCCL_SPACE_PAIR && spec->retry == 1 && !rootless;
    if (spec->space > PYCCL_SPACE_INTERNAL) return false;
    return spec_reduces(spec) ? spec_row_valid(spec) : spec->kind == PYCCL_BROADCAST || rootless;
}

static bool spec_algorithm_valid(const pyccl_spec *spec) {
    return spec->algorithm == PYCCL_DIRECT || (spec_reduces(spec) && spec->algorithm <= PYCCL_RING);
}

bool frame_spec_valid(const pyccl_spec *spec) {
    return spec->kind >= PYCCL_ALL_REDUCE && spec->kind <= PYCCL_REDUCE_SCATTER &&
           spec->dtype >= PYCCL_INT32 && spec->dtype <= PYCCL_BFLOAT16 && spec_op_valid(spec) &&
           spec_codec_valid(spec) && spec_algorithm_valid(spec) && spec->retry <= 1 &&
           spec_peers_valid(spec) && spec_guard_valid(spec) &&
           spec->count <= (spec->kind == PYCCL_BARRIER ? 0 : SPEC_COUNT_MAX);
}

/* Any spec, valid or not: tests and error messages may need the bytes of a wrong one. Submit checks before. */
void pyccl_spec_encode(const pyccl_spec *spec, uint8_t out[40]) {
    out[0] = spec->kind;
    out[1] = spec->dtype;
    out[2] = spec->op;
    out[3] = spec->codec;
    out[4] = spec->algorithm;
    out[5] = spec->retry;
    out[6] = spec->space;
    out[7] = spec->guard;
    put_u32(out + 8, spec->tag);
    put_u32(out + 12, spec->block);
    put_u64(out + 16, spec->count);
    memcpy(out + 24, spec->root, sizeof spec->root);
}

pyccl_status pyccl_spec_decode_untrusted(const uint8_t in[40], pyccl_spec *out) {
    memset(out, 0, sizeof *out);
    pyccl_spec spec = {
        .kind = in[0],
        .dtype = in[1],
        .op = in[2],
        .codec = in[3],
        .algorithm = in[4],
        .retry = in[5],
        .space = in[6],
        .guard = in[7],
        .tag = get_u32(in + 8),
        .block = get_u32(in + 12),
        .count = get_u64(in + 16),
    };
    memcpy(spec.root, in + 24, sizeof spec.root);
    if (!frame_spec_valid(&spec)) return PYCCL_ERR_FRAME;
    *out = spec;
    return PYCCL_OK;
}

uint32_t pyccl_spec_hash(const pyccl_spec *spec) {
    uint8_t bytes[PYCCL_SPEC_SIZE];
    pyccl_spec_encode(spec, bytes);
    return (uint32_t)pyccl_xxh3_64(bytes, sizeof bytes, 0);
}
