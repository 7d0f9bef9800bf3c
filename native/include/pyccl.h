/* pyccl.h: the public interface of the pyccl data plane (C11, also valid C++).
 *
 * Two machines live behind it:
 *   pyccl_fsm     the operation machine: DONE, commit, abort, freeze, verdicts, epochs, safe-point cuts.
 *                 Pure: events and time go in, actions come out; no socket, clock, thread or tensor byte.
 *   pyccl_engine  one thread that owns connected sockets, frames, kernels and operations, and drives one pyccl_fsm.
 * The simulator drives the same compiled pyccl_fsm that the engine drives: what is simulated is what ships.
 *
 * Conventions: times are int64_t nanoseconds on one monotonic clock; ids are 16 bytes; ranks index the member list of
 * the current epoch, which is in bytewise order of the peer ids. Functions that can fail return a pyccl_status.
 * Text between the two "cffi" marks is what the Python binding parses: keep it free of other preprocessor lines.
 * Specification of the bytes on the wire: proto/wire.md. */
#ifndef PYCCL_H
#define PYCCL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* cffi: begin */
#define PYCCL_ID_SIZE 16
#define PYCCL_WORLD_MAX 256         /* members of one group */
#define PYCCL_FRAME_SIZE 64         /* bytes of a data-frame header */
#define PYCCL_SECRET_SIZE 32        /* bytes of a secret that keys of records follow from */
#define PYCCL_SPEC_SIZE 40          /* bytes of an encoded pyccl_spec, the payload of OPEN */
#define PYCCL_PIECE_MAX 1048576     /* bytes of the longest payload of one frame */
#define PYCCL_PLAN_PIECE_MIN 16384  /* bytes of the pieces that a plan may ask for */
#define PYCCL_PLAN_PIECE_MAX 131072
#define PYCCL_BLOCK_MIN 64          /* elements of a codec block: a power of two */
#define PYCCL_BLOCK_MAX 65536
#define PYCCL_PACE_DIRECT 1000000   /* pyccl_plan.ring_pace in millionths of it */
#define PYCCL_EAGER_MAX 4194304     /* bytes one peer may send of operations that the receiver has not submitted yet */
#define PYCCL_OPS_OPEN_MAX 4096     /* open at a time of those that one member is the first to call: further submits wait */
#define PYCCL_EARLY_MAX 4096        /* operations one peer may open, or open and give up, before we submit them: likewise */
#define PYCCL_CULPRIT_NOBODY 257    /* in ABORT and ANSWER, above the status: 0 the sender gave it up, 1.. its rank + 1 */
#define PYCCL_COMPLAINT_RESULT 65536 /* a complaint is the rank + 1 of whose contribution is refused, or CULPRIT_NOBODY: our
                                        share came out not finite; and, times this, the rank + 1 of whose share did. 0: none */
#define PYCCL_CONNS_MAX 64          /* connections of one pair */
#define PYCCL_TAGS_MAX 65536        /* different tags between two restarts of numbers: a control message holds as many */

/* 0 is done, positive is "not yet", negative is failed. Values are never reused; gaps keep kin together. */
typedef enum pyccl_status {
    PYCCL_OK = 0,
    PYCCL_PENDING = 1,               /* pyccl_op_wait: the time ran out, nothing was aborted                     */
    PYCCL_ERR_NOMEM = -1,            /* MemoryError                                                             */
    PYCCL_ERR_OS = -2,               /* OSError: a system call failed, errno tells                              */
    PYCCL_ERR_ARGUMENT = -10,        /* UsageError: the caller's bug, nothing was sent                          */
    PYCCL_ERR_LIMIT = -11,           /* UsageError: more tags than the limit above                               */
    PYCCL_ERR_CLOSED = -12,          /* UsageError: the communicator is closed or not connected                 */
    PYCCL_ERR_PEER_LOST = -20,       /* PeerLostError: a participant (or the root) was lost; input restored      */
    PYCCL_ERR_ALONE = -21,           /* AloneError: nobody else is left in the group                             */
    PYCCL_ERR_EVICTED = -22,         /* EvictedError: the master took us out of the run                         */
    PYCCL_ERR_DEADLINE = -30,        /* DeadlineError: the operation's time ran out here or at a participant     */
    PYCCL_ERR_STALLED = -31,         /* DeadlineError: a started operation made no progress                     */
    PYCCL_ERR_CANCELLED = -32,       /* the caller gave up (Ctrl-C, close) here or at a participant              */
    PYCCL_ERR_OUTCOME_UNKNOWN = -33, /* OutcomeUnknownError: prepared, never settled; we left the run            */
    PYCCL_ERR_MASTER_AWAY = -34,     /* MasterUnavailableError: a peer is lost, and no master that may settle it */
    PYCCL_ERR_MISMATCH = -40,        /* MismatchError: participants called different things                     */
    PYCCL_ERR_RESULT_DIFFERS = -41,  /* MismatchError: participants hold different result bits                  */
    PYCCL_ERR_POISON = -42,          /* PoisonError: the guard refuses what a participant contributed           */
    PYCCL_ERR_FRAME = -50            /* RemoteProtocolError: a peer broke proto/wire.md                         */
} pyccl_status;

typedef enum pyccl_kind {
    PYCCL_ALL_REDUCE = 1,
    PYCCL_BROADCAST = 2,
    PYCCL_BARRIER = 3,
    PYCCL_ALL_GATHER = 4,
    PYCCL_EXCHANGE = 5,              /* two members swap their inputs; space PAIR, nobody else takes part */
    PYCCL_REDUCE_SCATTER = 6         /* each keeps its own part of what an all_reduce would give */
} pyccl_kind;

typedef enum pyccl_dtype {
    PYCCL_INT32 = 1,
    PYCCL_INT64 = 2,
    PYCCL_FLOAT32 = 3,
    PYCCL_FLOAT64 = 4,
    PYCCL_UINT8 = 5,
    PYCCL_INT8 = 6,
    PYCCL_UINT16 = 7,
    PYCCL_INT16 = 8,
    PYCCL_UINT32 = 9,
    PYCCL_UINT64 = 10,
    PYCCL_FLOAT16 = 11,
    PYCCL_BFLOAT16 = 12
} pyccl_dtype;

typedef enum pyccl_reduce_op { PYCCL_SUM = 1, PYCCL_AVG = 2, PYCCL_PROD = 3, PYCCL_MIN = 4, PYCCL_MAX = 5 } pyccl_reduce_op;
typedef enum pyccl_space { PYCCL_SPACE_USER = 0, PYCCL_SPACE_INTERNAL = 1, PYCCL_SPACE_PAIR = 2 } pyccl_space;
typedef enum pyccl_codec {           /* proto/wire.md 3.6 */
    PYCCL_CODEC_NONE = 0,
    PYCCL_CODEC_UINT8 = 1,
    PYCCL_CODEC_INT8 = 2,
    PYCCL_CODEC_FP8_E4M3 = 3,
    PYCCL_CODEC_FP4_E3M0 = 4,
    PYCCL_CODEC_BFLOAT16 = 5
} pyccl_codec;
typedef enum pyccl_algorithm { PYCCL_AUTO = 0, PYCCL_DIRECT = 1, PYCCL_RING = 2 } pyccl_algorithm; /* AUTO: the plan decides */

/* What an operation is; equal on all participants or it is a mismatch. Encoded in OPEN (proto/wire.md 3.2). */
typedef struct pyccl_spec {
    uint8_t kind;                    /* pyccl_kind */
    uint8_t dtype;                   /* pyccl_dtype */
    uint8_t op;                      /* pyccl_reduce_op; 0 where nothing is reduced */
    uint8_t codec;                   /* pyccl_codec; all_reduce and reduce_scatter of floats only */
    uint8_t algorithm;               /* pyccl_algorithm; DIRECT but for an all_reduce */
    uint8_t retry;                   /* 1: a loss epoch runs it again, 0: it fails with PEER_LOST; exchange: 1 */
    uint8_t space;                   /* pyccl_space: tags of users, of the library and of pairs do not meet */
    uint8_t guard;                   /* 1: contributions that are not finite, or beyond the limits in root, fail it; see 3.8.
                                        all_reduce and reduce_scatter of floats, DIRECT */
    uint32_t tag;
    uint32_t block;                  /* elements in one codec block: PYCCL_BLOCK_MIN..MAX; 0 without a codec */
    uint64_t count;                  /* elements of each participant's input */
    uint8_t root[16];                /* broadcast: the peer id of the source; exchange: XOR of the two ids; reduce_scatter:
                                        elements of a row as u64, little-endian; else zero. With guard the last 8 bytes
                                        are two float32: the greatest |x| and the greatest norm, 0 for any */
} pyccl_spec;

/* ---- frames ------------------------------------------------------------------------------------------------ */

typedef enum pyccl_frame_type {
    PYCCL_FRAME_OPEN = 1,            /* sender submitted (tag, seq); payload: spec; value: all below it is settled */
    PYCCL_FRAME_DATA = 2,            /* a piece of a contribution (phase 0) or of a result (phase 1)             */
    PYCCL_FRAME_DONE = 3,            /* sender holds its whole result; value: 64-bit result hash; offset: complaint */
    PYCCL_FRAME_ABORT = 4,           /* it ended in failure before DONE; value: -status | culprit << 8           */
    PYCCL_FRAME_ASK = 5,             /* sender is prepared and past its deadline: what became of it?             */
    PYCCL_FRAME_ANSWER = 6,          /* value: 0 committed, else as in ABORT; not sent while unsettled           */
    PYCCL_FRAME_SETTLED = 7,         /* everything of this tag below seq is settled at the sender                */
    PYCCL_FRAME_HEARTBEAT = 8,       /* alive; epoch fields are 0                                                */
    PYCCL_FRAME_STATE_ASK = 9,       /* send `value` bytes of the published state `seq` from `offset`            */
    PYCCL_FRAME_STATE_DATA = 10,     /* those bytes                                                              */
    PYCCL_FRAME_STATE_NONE = 11,     /* not published here (any more)                                            */
    PYCCL_FRAME_STATE_PACKED = 12    /* all that was asked for, packed; value: how much that is                  */
} pyccl_frame_type;

typedef struct pyccl_frame {         /* the 64-byte header, decoded */
    uint8_t type, phase, space;      /* phase of OPEN: 1: the sender refuses its own input */
    uint64_t epoch_number;
    uint64_t epoch_tag;              /* first 8 bytes of the epoch id, little-endian */
    uint64_t seq;
    uint32_t tag;
    uint32_t length;                 /* payload bytes that follow */
    uint64_t offset;                 /* OPEN: bits of the sender's weight, a double, finite and >= 0; DONE: complaint */
    uint64_t value;
    uint32_t spec_hash;              /* DATA: low half of the hash of the encoded spec; else 0 */
} pyccl_frame;

void pyccl_frame_encode(const pyccl_frame *frame, uint8_t out[64]);
/* PYCCL_ERR_FRAME: wrong magic, checksum, type, or a length its type does not allow. *out is zero then. */
pyccl_status pyccl_frame_decode_untrusted(const uint8_t in[64], pyccl_frame *out);
void pyccl_spec_encode(const pyccl_spec *spec, uint8_t out[40]);
pyccl_status pyccl_spec_decode_untrusted(const uint8_t in[40], pyccl_spec *out);
uint32_t pyccl_spec_hash(const pyccl_spec *spec);

/* ---- digests and kernels ------------------------------------------------------------------------------------ */

/* XXH3, bit-compatible with the reference (seed, one shot). 128: canonical big-endian bytes as xxh3_128_digest(). */
uint64_t pyccl_xxh3_64(const void *data, size_t size_bytes, uint64_t seed);
void pyccl_xxh3_128(const void *data, size_t size_bytes, uint64_t seed, uint8_t out[16]);
/* Digests of consecutive chunks: out holds ceil(size/chunk) * 16 bytes; an empty input has none. */
void pyccl_chunk_digests(const void *data, size_t size_bytes, size_t chunk_bytes, uint8_t *out);

size_t pyccl_dtype_size(uint8_t dtype);      /* bytes of one element; 0: no such dtype */
/* out[i] = fold of in[0][i], in[1][i], … in[inputs-1][i] in that order; AVG divides the finished sum once by `inputs`.
 * Floats: no FMA, NaN results are the canonical quiet NaN, min/max propagate NaN and order -0 below +0; float16 and
 * bfloat16 are folded in float32 and rounded once. Integers wrap and have no AVG.
 * weights: NULL, or for AVG one per input, >= 0: each element is multiplied by its weight in the accumulation type
 * (float64 for float64, else float32; the weight is rounded to it), the products are summed in order and divided by the
 * sum of the weights (in float64, in order, then rounded to that type). Weights of 1 give the bytes that NULL gives.
 * out may be equal to one of the inputs, but not overlap one in part.
 * ERR_ARGUMENT: dtype and op can't be reduced; a weight is negative or not finite, or the total 0 or not finite, in the
 * accumulation type. With count 0 nothing but the arguments is looked at. */
pyccl_status pyccl_reduce(uint8_t dtype, uint8_t op, const void *const *in, const double *weights, size_t inputs,
                          size_t count, void *out);

/* Codecs (proto/wire.md 3.6): blocks of `block` elements, the last one shorter, each encoded by itself. dtype is that of
 * the array in memory, one of the floats; what is encoded is float32. Arrays need no alignment and must not overlap.
 * ERR_ARGUMENT: no such codec, a dtype that is no float, or block 0. */
size_t pyccl_codec_size(uint8_t codec, uint32_t block, size_t count);   /* bytes of `count` elements encoded; 0: no such codec */
pyccl_status pyccl_codec_encode(uint8_t codec, uint8_t dtype, uint32_t block, const void *in, size_t count, uint8_t *out);
/* Any pyccl_codec_size bytes decode to something, the same everywhere: a block whose head no encoder writes, to NaN. */
pyccl_status pyccl_codec_decode(uint8_t codec, uint8_t dtype, uint32_t block, const uint8_t *in, size_t count, void *out);
/* Decode every input to float32 and fold as pyccl_reduce does, tile by tile: same bytes, no arrays in between. */
pyccl_status pyccl_codec_reduce(uint8_t codec, uint8_t op, uint32_t block, const uint8_t *const *in, const double *weights,
                                size_t inputs, size_t count, float *out);

/* One step of SGD as torch.optim.SGD makes it (dampening 0, no weight decay), in place: b = mu*b + g; d = g + mu*b if
 * nesterov, else b; theta -= lr*d. momentum: b, zero before the first step; NULL: d = g. lr and mu are rounded to the
 * dtype. Every operation is rounded by itself. The arrays are aligned for their dtype and do not overlap.
 * ERR_ARGUMENT: dtype is neither float32 nor float64. */
pyccl_status pyccl_outer_sgd(uint8_t dtype, void *theta, void *momentum, const void *g, size_t count, double lr,
                             double mu, int nesterov);

/* out[i] = a[i] - b[i]. The arrays are aligned for float and do not overlap. */
void pyccl_difference(const float *a, const float *b, size_t count, float *out);

/* late[i] += (g[i] - before[i]) / world, every operation rounded by itself. The arrays are aligned for their dtype and do
 * not overlap. ERR_ARGUMENT: dtype is neither float32 nor float64, or world is 0. */
pyccl_status pyccl_eager(uint8_t dtype, void *late, const void *g, const void *before, size_t count, uint32_t world);

/* live = alpha*live + (1 - alpha)*theta, every operation rounded by itself; with alpha 0 the bits of theta. alpha and
 * 1 - alpha are rounded to the dtype. The arrays are aligned for it and do not overlap. ERR_ARGUMENT: dtype is neither
 * float32 nor float64. */
pyccl_status pyccl_mix(uint8_t dtype, void *live, const void *theta, size_t count, double alpha);

/* One step of a replica in a group of `members`, in place on phi and v: with the sums of moved[] and of phis[], each in
 * the order given, v = alpha*v + (beta/members)*sum(moved) - gamma*(phi - sum(phis)/members), without the last term where
 * members is 1; phi += v. Every operation is rounded by itself; alpha, beta/members and gamma are rounded to the dtype.
 * One of phis is phi itself; else no arrays overlap. They are aligned for their dtype. ERR_ARGUMENT: dtype is neither
 * float32 nor float64, or members is 0. */
pyccl_status pyccl_gossip(uint8_t dtype, void *phi, void *v, const void *const *moved, const void *const *phis,
                          uint32_t members, size_t count, double alpha, double beta, double gamma);

/* The greatest |x| of floats, NaN where there is a NaN, and the sum of their squares in float64, in an order that is the
 * same everywhere, NaN where there is an infinity or a NaN. ERR_ARGUMENT: dtype is no float. */
pyccl_status pyccl_magnitude(uint8_t dtype, const void *x, size_t count, double *peak, double *squares);

/* The instruction set that digests, folds and codecs use: "scalar", "avx2", "avx512" or "neon"; all give the same bytes. */
const char *pyccl_kernel_name(void);
/* For tests and benchmarks, of the whole process: one of those names, or "auto", which is how it starts: the best that
 * the CPU has. ERR_ARGUMENT: no such name, or this CPU lacks it; nothing has changed. */
pyccl_status pyccl_kernel_select(const char *name);

/* ---- the operation machine ---------------------------------------------------------------------------------- */

typedef struct pyccl_fsm pyccl_fsm;

typedef struct pyccl_fsm_options {
    int64_t settle_ns;               /* a prepared operation may stay unsettled this long after its deadline     */
    int64_t stall_ns;                /* a started operation without progress fails after this long; 0: never     */
    int64_t tell_ns;                 /* settled numbers nobody was told of are announced after this long         */
    uint32_t open_max, early_max;    /* 0: PYCCL_OPS_OPEN_MAX, PYCCL_EARLY_MAX. The same on all members           */
} pyccl_fsm_options;

/* How the members of an epoch share the work. Pointers may be NULL, see there; arrays are copied. */
typedef struct pyccl_plan {
    const uint32_t *shares;          /* [world]: weights of the shares that ranks own, not all 0; NULL: equal ones */
    const uint32_t *ring;            /* [world]: the ranks, each once, in the order of the ring; NULL: rank order */
    uint64_t ring_from_bytes;        /* a reduction of algorithm AUTO of so many bytes takes the ring; UINT64_MAX: none */
    uint32_t piece_bytes;            /* of a piece of a share: a power of two, PYCCL_PLAN_PIECE_MIN..MAX; 0: twice the greatest */
    uint32_t ring_pace;              /* what a byte more costs there, in millionths of what it costs direct; below PYCCL_PACE_DIRECT.
                                        Decides where a ring sends more bytes than direct: sums of halves and of what was coded */
} pyccl_plan;

typedef struct pyccl_epoch {
    uint64_t number;
    uint8_t id[16];
    uint32_t world, rank;            /* rank: our index in members */
    uint8_t restart;                 /* 1: numbers restart at 0 (safe point, mismatch); 0: a loss epoch keeps them */
    uint8_t mismatch;                /* 1: what the verdicts do not commit fails with MISMATCH                   */
    const uint8_t *members;          /* world * 16 bytes, in bytewise order */
    const pyccl_plan *plan;          /* of the engine; NULL: equal shares, never a ring unless asked for */
} pyccl_epoch;

typedef enum pyccl_op_state {        /* in reports; an operation that is not reported counts as running */
    PYCCL_STATE_RUNNING = 1,
    PYCCL_STATE_PREPARED = 2,
    PYCCL_STATE_COMMITTED = 3,
    PYCCL_STATE_FAILED = 4
} pyccl_op_state;

typedef enum pyccl_verdict { PYCCL_VERDICT_COMMIT = 1, PYCCL_VERDICT_FAIL = 2 } pyccl_verdict; /* none: retry */

/* The control plane names what is numbered together, a channel, by space and this: the tag; in SPACE_PAIR
 * tag | lower rank << 32 | higher rank << 40, ranks of the epoch that the message or call is about. */
uint64_t pyccl_channel(uint8_t space, uint32_t tag, uint32_t rank, uint32_t other);  /* our rank and the partner's, either order */

typedef struct pyccl_op_report {
    uint8_t space, state;            /* state: pyccl_op_state */
    uint64_t tag;                    /* here and in the next three: the channel */
    uint64_t seq, hash;              /* hash: of the result, where prepared or committed */
} pyccl_op_report;

typedef struct pyccl_op_verdict {
    uint8_t space, verdict;
    uint64_t tag;
    uint64_t seq;
} pyccl_op_verdict;

typedef struct pyccl_op_count {      /* operations of this channel submitted since numbers restarted, also those that wait for
                                        room, but not above a cut */
    uint8_t space;
    uint64_t tag;
    uint64_t count;
} pyccl_op_count;

typedef struct pyccl_op_lack {       /* an operation we have open that a participant has not opened; or have given up and it
                                        has not called, and a submit waits for that */
    uint8_t space;
    uint64_t tag;
    uint64_t seq;
    uint32_t rank;                   /* the first such */
} pyccl_op_lack;

typedef struct pyccl_message {       /* OPEN, DONE, ABORT, ASK, ANSWER, SETTLED as the machine sees them */
    uint8_t type, space;
    uint32_t rank;                   /* received: from; sent: to */
    uint32_t tag;
    uint64_t seq, value;
    pyccl_spec spec;                 /* OPEN only */
    double weight;                   /* OPEN only: of the sender's input to an avg; else 1 */
    uint32_t complaint;              /* of a guard. OPEN: 1: the sender's own input is refused; DONE: see PYCCL_COMPLAINT_RESULT */
} pyccl_message;

typedef enum pyccl_action_type {
    PYCCL_ACT_SEND = 1,              /* send `message` in the current epoch                                       */
    PYCCL_ACT_START = 2,             /* move data for `cookie` in the current epoch as number `seq`; from scratch */
    PYCCL_ACT_STOP = 3,              /* drop everything the attempt of `cookie` received or computed              */
    PYCCL_ACT_PEER_OPEN = 4,         /* `rank` has opened `cookie`: its weight is message.weight; the eager window
                                        no longer binds                                                           */
    PYCCL_ACT_COMMIT = 5,            /* `cookie` succeeded: result to the caller                                  */
    PYCCL_ACT_FAIL = 6,              /* `cookie` failed with `status`; culprit peer in `peer` (zero: none)        */
    PYCCL_ACT_RESEND = 7,            /* repeat to `rank` the DATA of `cookie` that the lost link may have eaten   */
    PYCCL_ACT_SETTLE = 8,            /* ask the master for a flush: `cookie` is prepared and past its deadline    */
    PYCCL_ACT_LEAVE = 9,             /* leave the run: an outcome can't be learned                                */
    PYCCL_ACT_DIFFERS = 10           /* `rank` opened `cookie` as message.spec: tell the master of the mismatch   */
} pyccl_action_type;

typedef struct pyccl_action {
    uint32_t type, rank;
    uint64_t cookie, seq;
    int32_t status;
    uint32_t attempts;               /* COMMIT, FAIL: epochs in which the operation ran */
    uint8_t peer[16];
    pyccl_message message;           /* SEND, DIFFERS; PEER_OPEN: weight only */
} pyccl_action;

typedef enum pyccl_gate {
    PYCCL_GATE_PASS = 1,             /* of the current epoch, from a member                                       */
    PYCCL_GATE_DROP = 2,             /* of an older epoch, or settled, or we are frozen                           */
    PYCCL_GATE_LATER = 3,            /* of a newer epoch: leave it unread until the EpochCommit                   */
    PYCCL_GATE_REFUSE = 4            /* protocol error: same number, another epoch; or not a member of ours       */
} pyccl_gate;

pyccl_status pyccl_fsm_new(const pyccl_fsm_options *options, pyccl_fsm **out);
void pyccl_fsm_free(pyccl_fsm *fsm);
/* cookie: not 0, unique among open operations. The machine answers with START or FAIL, at once, when there is room below
 * the limits, or in a later epoch. What waits costs memory here alone; there may be any number. */
pyccl_status pyccl_fsm_submit(pyccl_fsm *fsm, uint64_t cookie, const pyccl_spec *spec, int64_t deadline_ns, int64_t now_ns);
/* weight, refused: what its OPEN tells the others; pyccl_fsm_submit: 1 and 0. refused: 1: its guard refuses our input. */
pyccl_status pyccl_fsm_submit_weighted(pyccl_fsm *fsm, uint64_t cookie, const pyccl_spec *spec, double weight, int refused,
                                       int64_t deadline_ns, int64_t now_ns);
/* What our DONE says of the contributions and shares of others: before pyccl_fsm_result, of the same attempt. */
void pyccl_fsm_complain(pyccl_fsm *fsm, uint64_t cookie, uint32_t complaint);
void pyccl_fsm_result(pyccl_fsm *fsm, uint64_t cookie, uint64_t hash, int64_t now_ns);  /* whole result held */
void pyccl_fsm_progress(pyccl_fsm *fsm, uint64_t cookie, int64_t now_ns);               /* bytes moved      */
/* The caller gives up. Before DONE it fails with `why`; after DONE its deadline becomes now and it is settled. */
void pyccl_fsm_cancel(pyccl_fsm *fsm, uint64_t cookie, pyccl_status why, int64_t now_ns);
/* No master: what only it can move on, is not prepared and was submitted before `before_ns` fails alone with `why`. That
 * is what has one of the lost members (`count` ids, one behind the other) among its participants, what waits for a cut or
 * an epoch, and all that is frozen. */
void pyccl_fsm_give_up(pyccl_fsm *fsm, pyccl_status why, const uint8_t *lost, size_t count, int64_t before_ns, int64_t now_ns);
/* Judge a frame's epoch; member: 1 when its sender is a member of the current epoch. */
pyccl_gate pyccl_fsm_gate(const pyccl_fsm *fsm, uint64_t epoch_number, uint64_t epoch_tag, int member);
/* Judge DATA that passed the gate: PASS with *cookie (0: not submitted here yet, keep it within the eager window),
 * DROP, or REFUSE. */
pyccl_gate pyccl_fsm_data(pyccl_fsm *fsm, uint32_t rank, uint8_t space, uint32_t tag, uint64_t seq, uint64_t *cookie);
/* A message that passed the gate. ERR_FRAME: it can't come from a peer that follows the rules. */
pyccl_status pyccl_fsm_receive(pyccl_fsm *fsm, const pyccl_message *message, int64_t now_ns);
void pyccl_fsm_link_reset(pyccl_fsm *fsm, uint32_t rank, int64_t now_ns);  /* frames to `rank` may be lost: repeat */
/* Idempotent; ends with fsm_epoch. ERR_OUTCOME_UNKNOWN, here and from fsm_epoch: after ACT_LEAVE, until fsm_end. */
pyccl_status pyccl_fsm_freeze(pyccl_fsm *fsm, int64_t now_ns);
int pyccl_fsm_frozen(const pyccl_fsm *fsm);
/* These four return how many entries there are and write at most `cap` of them. */
size_t pyccl_fsm_report(const pyccl_fsm *fsm, pyccl_op_report *out, size_t cap);
size_t pyccl_fsm_counts(const pyccl_fsm *fsm, pyccl_op_count *out, size_t cap);
size_t pyccl_fsm_lacking(const pyccl_fsm *fsm, pyccl_op_lack *out, size_t cap);
size_t pyccl_fsm_open_count(const pyccl_fsm *fsm);                        /* those that wait included */
int pyccl_fsm_moves(const pyccl_fsm *fsm);    /* 1: something is open that all participants have opened */
/* All members stand at the safe point: numbers below the cut run in this epoch, later ones wait for the next.
 * Returns 0, or 1 when a count of ours is above the cut (send the counts: the cut must rise). open: 1 takes the cut back. */
int pyccl_fsm_cut(pyccl_fsm *fsm, const pyccl_op_count *cut, size_t cuts, int open, int64_t now_ns);
int pyccl_fsm_drained(const pyccl_fsm *fsm);  /* 1: a cut is set and everything below it is submitted and settled here */
int pyccl_fsm_below_cut(const pyccl_fsm *fsm);/* 1: a cut is set and something below it is not submitted here        */
/* Apply the verdicts and enter the epoch in one step. ERR_ARGUMENT: not newer than ours, or a verdict we can't obey. */
pyccl_status pyccl_fsm_epoch(pyccl_fsm *fsm, const pyccl_epoch *epoch, const pyccl_op_verdict *verdicts, size_t count, int64_t now_ns);
/* Out of the run (evicted, left, closed): every open operation fails with `why`; nothing is sent. */
void pyccl_fsm_end(pyccl_fsm *fsm, pyccl_status why);
int64_t pyccl_fsm_tick(pyccl_fsm *fsm, int64_t now_ns);                    /* returns when to call again; INT64_MAX: no timer */
int pyccl_fsm_next(pyccl_fsm *fsm, pyccl_action *out);                     /* 1: *out holds the oldest action, 0: none */

/* ---- the engine --------------------------------------------------------------------------------------------- */

typedef struct pyccl_engine pyccl_engine;
typedef struct pyccl_op pyccl_op;

typedef struct pyccl_engine_options {
    uint8_t self_id[16];
    int64_t heartbeat_ns;            /* a link that sent nothing for this long sends HEARTBEAT                    */
    int64_t silence_ns;              /* a link that heard nothing for this long is reported LINK_SILENT, and
                                        again in each epoch that its peer is a member of, until LINK_HEARD            */
    int64_t long_rtt_ns;             /* a connection with this round trip at least is given BBR; 0: none is       */
    uint32_t lanes;                  /* connections of a link that carry our data at first; on a long line more as long
                                        as that pays, see EVENT_LINK_WANTS; 0: all there are, always              */
    uint64_t max_tx_bytes_s, max_rx_bytes_s; /* of all data connections together; 0: no cap                       */
    pyccl_fsm_options fsm;
} pyccl_engine_options;

typedef struct pyccl_op_args {
    pyccl_spec spec;
    const void *src;                 /* spec.count elements (broadcast: read at the root only) */
    void *dst;                       /* result; may equal src (in place), else must not overlap it. exchange: the partner's
                                        input. all_gather: world * count elements, reduce_scatter: our part (dst_bytes
                                        says how much there is, ERR_ARGUMENT when too little), or NULL: see
                                        pyccl_op_take. What is not src is undefined after a failure */
    uint64_t dst_bytes;
    double weight;                   /* of our input to an avg: finite, >= 0, total > 0 (or ERR_ARGUMENT on all); else 1 */
    int64_t timeout_ns;              /* from now to the result; <= 0 is ERR_ARGUMENT */
    uint64_t user;                   /* with notify: returned in EVENT_OP */
    int32_t notify;                  /* 1: post PYCCL_EVENT_OP when it has ended */
} pyccl_op_args;

typedef struct pyccl_op_info {
    int32_t status;
    uint32_t attempts, world, algorithm;  /* world: who took part; algorithm: what ran, never AUTO; 0: it never ran */
    uint64_t epoch_number, tx_bytes, rx_bytes;
    uint64_t seq;
    int64_t elapsed_ns;
    uint8_t epoch_id[16];
    uint8_t peer[16];                /* culprit where one is known, else zero */
} pyccl_op_info;

typedef enum pyccl_cipher {
    PYCCL_CIPHER_AES_256_GCM = 1,
    PYCCL_CIPHER_CHACHA20_POLY1305 = 2
} pyccl_cipher;
uint8_t pyccl_cipher_best(void);     /* the faster one here */

typedef enum pyccl_event_type {
    PYCCL_EVENT_CONN_DOWN = 1,       /* one connection of `slot` ended; code: errno or 0 for EOF; count: those left  */
    PYCCL_EVENT_LINK_SILENT = 2,     /* nothing heard from `slot` for silence_ns                                     */
    PYCCL_EVENT_LINK_HEARD = 3,      /* heard again after LINK_SILENT                                                */
    PYCCL_EVENT_LINK_REFUSED = 4,    /* `slot` broke the protocol: its connections are closed                        */
    PYCCL_EVENT_OP = 5,              /* operation with args.notify ended; value: args.user                           */
    PYCCL_EVENT_SETTLE = 6,          /* ask the master for a flush                                                   */
    PYCCL_EVENT_LEAVE = 7,           /* an outcome can't be learned: leave the run                                   */
    PYCCL_EVENT_DIFFERS = 8,         /* `slot` opened (space, tag, seq) as `theirs`, we have `mine`; value: epoch     */
    PYCCL_EVENT_DRAINED = 9,         /* all below the cut is settled here; value: number of the pyccl_engine_cut call */
    PYCCL_EVENT_STATE = 10,          /* a fetch ended; value: fetch id; code: status; count: packed bytes, 0: as they are */
    PYCCL_EVENT_PULSE_DOWN = 11,     /* the pulse connection to the master ended                                     */
    PYCCL_EVENT_PACK = 12,           /* `slot` takes these packed: value: sync, seq: offset, count: bytes; answer it  */
    PYCCL_EVENT_LINK_WANTS = 13      /* `slot` would use `count` connections, more than there are                    */
} pyccl_event_type;

typedef struct pyccl_event {
    uint32_t type, slot;
    int32_t code;
    uint32_t count;
    uint64_t value, seq;
    uint64_t tag;                    /* DIFFERS: the channel */
    uint8_t space;
    pyccl_spec mine, theirs;
} pyccl_event;

typedef struct pyccl_region {        /* a published piece of shared state; offsets of the regions follow one another */
    const void *data;
    uint64_t size_bytes;
} pyccl_region;

/* What two peers agreed on for one connection; proto/wire.md 10. */
typedef struct pyccl_conn_keys {
    uint8_t tx[PYCCL_SECRET_SIZE], rx[PYCCL_SECRET_SIZE];
    uint8_t cipher;                  /* pyccl_cipher */
    uint8_t dialed;                  /* 1: this side has dialed */
} pyccl_conn_keys;

typedef struct pyccl_link_stats {
    uint64_t tx_bytes, rx_bytes;
    uint32_t conns, lanes;           /* lanes: how many connections may carry our data, whether they stand or not */
    int64_t rtt_ns;                  /* the least of the newest connection's greeting; 0: not known */
    uint64_t busy_bytes_s;           /* what our data gets when there is enough of it; 0: not known, or the line is short */
    uint8_t full;                    /* 1: the line, or its connections, are known to take no more than they get now */
    uint64_t delivered_bytes;        /* that the other end's TCP has, on the connections that stand */
    uint64_t moved_bytes;            /* of all links of the engine, those that are gone left out: sent and received */
    int64_t cpu_ns;                  /* what the engine's thread has used until now */
} pyccl_link_stats;

pyccl_status pyccl_engine_new(const pyccl_engine_options *options, pyccl_engine **out);  /* starts its thread */
int pyccl_engine_fd(const pyccl_engine *engine);   /* eventfd, readable while events wait */
size_t pyccl_engine_events(pyccl_engine *engine, pyccl_event *out, size_t cap);  /* takes them; clears the eventfd when empty */
/* Fails open operations with `why`, closes all connections, ends the thread. Idempotent; operations stay readable. */
void pyccl_engine_stop(pyccl_engine *engine, pyccl_status why);
void pyccl_engine_free(pyccl_engine *engine);      /* stops it; every pyccl_op must have been freed */
/* Fail all open operations with `why` and leave the epoch; the engine stays usable for a new connect. */
pyccl_status pyccl_engine_end(pyccl_engine *engine, pyccl_status why);

pyccl_status pyccl_engine_peer_add(pyccl_engine *engine, const uint8_t id[16], uint32_t *slot);  /* idempotent */
pyccl_status pyccl_engine_peer_remove(pyccl_engine *engine, uint32_t slot);                      /* closes its connections */
/* Takes fd, always: closed on error. Of a link that was told to be silent it closes all others, unless something has
 * just come over them: what stood in them is sent anew. */
pyccl_status pyccl_engine_conn_add(pyccl_engine *engine, uint32_t slot, int fd);
/* As conn_add, sealed: what the other side sends is opened with `rx`, which is its `tx`. */
pyccl_status pyccl_engine_conn_add_sealed(pyccl_engine *engine, uint32_t slot, int fd, const pyccl_conn_keys *keys);
/* Heartbeats to the master; takes fd. keys: sealed, by who dialed; NULL: in plain. */
pyccl_status pyccl_engine_pulse(pyccl_engine *engine, int fd, const pyccl_conn_keys *keys);
/* So many connections carry our data, up to PYCCL_CONNS_MAX; 0: as many as at first, and on a long line a search for more. */
pyccl_status pyccl_engine_link_use(pyccl_engine *engine, uint32_t slot, uint32_t conns);
pyccl_status pyccl_engine_link_stats(pyccl_engine *engine, uint32_t slot, pyccl_link_stats *out);

/* As the functions of the machine, carried out by the engine thread; the caller waits for it. freeze and epoch refuse with
 * ERR_OUTCOME_UNKNOWN what comes after EVENT_LEAVE, also before that event was taken. */
pyccl_status pyccl_engine_freeze(pyccl_engine *engine, pyccl_op_report *out, size_t cap, size_t *count);
pyccl_status pyccl_engine_epoch(pyccl_engine *engine, const pyccl_epoch *epoch, const pyccl_op_verdict *verdicts, size_t count);
pyccl_status pyccl_engine_counts(pyccl_engine *engine, pyccl_op_count *out, size_t cap, size_t *count);
pyccl_status pyccl_engine_cut(pyccl_engine *engine, const pyccl_op_count *cut, size_t cuts, int open, int *behind);
/* pyccl_fsm_give_up of what was submitted at least `age_ns` ago. */
pyccl_status pyccl_engine_give_up(pyccl_engine *engine, pyccl_status why, const uint8_t *lost, size_t count, int64_t age_ns);
/* Who waits for what: *waiters counts pyccl_op_wait calls, *quiet_ns the time since a submit, the end of
 * an operation, a cut or an epoch; 0 while one runs that all its participants have opened: who waits for its end may do
 * anything after it. *below the cut. */
pyccl_status pyccl_engine_blocked(pyccl_engine *engine, pyccl_op_lack *out, size_t cap, size_t *count, uint32_t *waiters,
                                  int64_t *quiet_ns, int *below);

/* The arrays must stay valid until the operation has ended. Thread-safe. With a guard src is looked through before this
 * returns; an input that is refused is no error here: the operation fails on all with ERR_POISON. */
pyccl_status pyccl_op_submit(pyccl_engine *engine, const pyccl_op_args *args, pyccl_op **out);
pyccl_status pyccl_op_wait(pyccl_op *op, int64_t timeout_ns);   /* PENDING, or the operation's own status */
int pyccl_op_done(const pyccl_op *op);
void pyccl_op_cancel(pyccl_op *op, pyccl_status why);           /* as pyccl_fsm_cancel; wait afterwards */
void pyccl_op_info_get(const pyccl_op *op, pyccl_op_info *out);
/* The result of an all_gather (info.world * count elements) or reduce_scatter (our part) that was submitted without dst
 * and has succeeded, copied to dst; as often as wanted until op_free. ERR_ARGUMENT: no such result, or dst_bytes is less. */
pyccl_status pyccl_op_take(const pyccl_op *op, void *dst, uint64_t dst_bytes);
void pyccl_op_free(pyccl_op *op);                               /* NULL or an operation that has ended */

/* Shared state: what is published under `sync` is served to members that ask. The memory must stay valid until
 * unpublish returns. A fetch ends with EVENT_STATE: OK, PEER_LOST (link or epoch ended) or ARGUMENT (not published).
 * packed: 1: the holder may pack the bytes. It is told with EVENT_PACK and answers with pyccl_state_packed: `data`, which
 * is copied, or bytes = 0: as they are. It answers each event once, late or not: of one peer so many wait for that at most.
 * ERR_ARGUMENT: nobody waits for that any more, or it is not shorter, which is no answer. */
pyccl_status pyccl_state_publish(pyccl_engine *engine, uint64_t sync, const pyccl_region *regions, size_t count);
pyccl_status pyccl_state_unpublish(pyccl_engine *engine, uint64_t sync);
pyccl_status pyccl_state_fetch(pyccl_engine *engine, uint32_t slot, uint64_t sync, uint64_t offset, uint32_t size_bytes,
                               void *dst, uint64_t fetch, int packed);
pyccl_status pyccl_state_packed(pyccl_engine *engine, uint32_t slot, uint64_t sync, uint64_t offset, uint32_t size_bytes,
                                const void *data, uint32_t bytes);
/* Drop one fetch: dst is free when this returns, no event comes. ERR_ARGUMENT: it has ended, its event is on its way. */
pyccl_status pyccl_state_cancel(pyccl_engine *engine, uint64_t fetch);
pyccl_status pyccl_state_forget(pyccl_engine *engine);          /* as cancel, all fetches */

/* Relay: a thread that carries bytes between two connected sockets, both ways, as they are, for two members that do not
 * reach each other; no lock of the caller's language can hold it up. An end of one socket's stream is passed on; a broken
 * socket, or the relay's end, resets the other; so does a silence. Thread-safe. */
typedef struct pyccl_relay pyccl_relay;
#define PYCCL_RELAY_PAIRS_MAX 64
#define PYCCL_RELAY_OWNED_MAX 32     /* pairs with an end of the same owner */
#define PYCCL_RELAY_SAME_MAX 2       /* pairs of the same two peers: each may ask for one while it does not know of the other's */

typedef struct pyccl_relay_end {
    int fd;
    uint8_t peer[16];                /* for relay_forget */
    uint8_t owner[16];               /* who answers for it, of one or several peers */
} pyccl_relay_end;

/* user_timeout_ms: TCP_USER_TIMEOUT of all sockets: a peer that acknowledges nothing for so long is gone. So is a pair that
 * carries nothing for so long: members beat more often. */
/* Starts its thread. max_bytes_s: of all that it carries, each byte counted once; 0: no cap. */
pyccl_status pyccl_relay_new(uint32_t user_timeout_ms, uint64_t max_bytes_s, pyccl_relay **out);
/* Takes both sockets, always: closed on error. Of the same two peers' pairs the oldest is reset when there are SAME_MAX.
 * ERR_LIMIT: PAIRS_MAX are there, or OWNED_MAX of one of the owners; ERR_OS. */
pyccl_status pyccl_relay_add(pyccl_relay *relay, const pyccl_relay_end ends[2]);
/* How many more such pairs it would take now; their sockets do not matter. One that would reset another counts. */
uint32_t pyccl_relay_room(pyccl_relay *relay, const pyccl_relay_end ends[2]);
void pyccl_relay_forget(pyccl_relay *relay, const uint8_t peer[16]);             /* resets the pairs of this peer */
uint32_t pyccl_relay_pairs(pyccl_relay *relay);
void pyccl_relay_free(pyccl_relay *relay);                                       /* resets all, ends the thread; NULL: nothing */

const char *pyccl_version(void);
const char *pyccl_status_name(int32_t status);                  /* "PYCCL_ERR_…"; "?" for a number that is none */
/* cffi: end */

#ifdef __cplusplus
}
#endif
#endif
