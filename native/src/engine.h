/* engine.h: what the files of the engine share.
 *
 *   engine.c        the thread: epoll, commands, events, timers, links and the pulse; its life
 *   engine_calls.c  the public functions that the thread carries out while the caller waits
 *   engine_frames.c frames in and out: gate, messages, the actions of the operation machine
 *   engine_api.c    pyccl_op_*: submit, wait, cancel, how an operation ends
 *   engine_ops.c    attempts: which pieces are here, which go out, commit
 *   engine_fold.c   the result of an attempt: folds, codecs, weights, undo
 *   engine_ring.c   folds along a ring
 *   engine_guard.c  contributions and results that a guard refuses
 *   engine_memory.c result buffers and piece buffers that are used again
 *   engine_early.c  pieces of operations that are not submitted here yet
 *   engine_state.c  the state service: publications, asks, fetches
 *
 * Invariants
 *  - the fsm, links, attempts and publications belong to the engine's thread alone;
 *  - an attempt that ended has been taken from every connection (link_disown): no byte moves from or to the caller's
 *    arrays after its operation has ended;
 *  - actions of the fsm are carried out before another frame is judged (engine_act).
 * Threads: `lock` guards the commands, `event_lock` the events; how operations end: engine_api.c.
 * Spec: proto/wire.md 3 */
#ifndef PYCCL_ENGINE_H
#define PYCCL_ENGINE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../include/pyccl.h"
#include "map.h"
#include "schedule.h"
#include "link.h"
#include "status.h"

#define EARLY_BUCKETS 1024
#define EARLY_PIECES_MAX (2 * PYCCL_OPS_OPEN_MAX + PYCCL_CONNS_MAX) /* of one peer; small ones are many */
#define EAGER_PIECE_MIN (PYCCL_EAGER_MAX / (2 * PYCCL_OPS_OPEN_MAX)) /* bytes that a smaller piece counts as */
#define SCRATCH_KEPT 4               /* freed result buffers that are kept: the biggest */
#define PIECES_KEPT 64               /* freed piece buffers that are kept: fresh pages cost as much as the copy into them */
#define ENGINE_TILE_FLOATS 65536     /* of the longest codec block */
#define CONTROL_WAITING_MAX (1 << 18) /* control frames that wait for one peer when it sends another: more is hostile */
#define ASKS_MAX 1024                /* queued at the one who serves, per peer */
#define ASKS_PACKED_MAX 32           /* of them, to be packed: what is held for that; others are sent as they are */
#define ASKS_SENT_MAX 256            /* unanswered at the one who asks, per peer */

typedef enum sink_kind {             /* link_sink.kind */
    SINK_NONE = 0,                   /* discarded */
    SINK_CONTROL,                    /* judged when whole */
    SINK_PIECE,                      /* straight into the attempt; note: attempt */
    SINK_COPY,                       /* a second copy of a piece that is arriving elsewhere; note: attempt */
    SINK_EARLY,                      /* note: early_piece */
    SINK_FETCH                       /* note: fetch */
} sink_kind;

typedef struct attempt attempt;
typedef struct peer peer;

/* First member of all whose memory a connection may borrow: link_load.owner and link_sink.owner point to one. */
typedef enum owner_kind { OWNER_ATTEMPT = 1, OWNER_PUBLICATION, OWNER_FETCH } owner_kind;

/* ---- operations (engine_api.c) ---- */

typedef struct command {
    struct command *next;
    void (*run)(pyccl_engine *engine, struct command *command);
    pyccl_status status;
    bool waited, done;               /* waited: its sender waits for `done` */
} command;

typedef struct why_command {
    command command;
    pyccl_status why;
} why_command;

struct pyccl_op {
    command command;                 /* first: the submit; the queue holds it */
    pyccl_engine *engine;
    pyccl_op_args args;
    int64_t submitted_ns;
    bool refused;                    /* its guard refuses our input */
    uint64_t cookie;                 /* 0: not in engine->ops */
    attempt *attempt;                /* NULL: none runs */
    uint64_t tx_bytes, rx_bytes, seq;
    void *kept;                      /* result that has no dst, after the commit: see pyccl_op_take */
    uint64_t kept_bytes;
    uint32_t world;                  /* of the epoch it ran in last; 0: it never ran */
    uint8_t algorithm;               /* pyccl_algorithm that ran there */
    uint64_t epoch_number;
    uint8_t epoch_id[16];
    atomic_int ended;                /* a futex */
    pyccl_op_info info;              /* complete when ended */
};

/* ---- attempts (engine_ops.c) ---- */

typedef struct peer_tx {             /* what one attempt has to send to one rank */
    struct peer_tx *prev, *next;     /* in peer->tx_first while `queued` */
    attempt *attempt;
    peer *queued;
    uint32_t rank;
    bool open;                       /* the peer has opened the operation: the eager window does not bind */
    bool waits;                      /* nothing but the eager window holds it back */
    bool ahead;                      /* out of the queue, since contributions to others have to catch up */
    uint64_t items[2];               /* per phase, of the schedule; 0: nothing goes there */
    uint64_t contribution_first;     /* items of phase 0 that start here: our own input, */
    uint64_t contributions;          /* so many */
    uint64_t contribution_next;      /* of these, how many were taken */
    uint64_t partial_next;           /* next in attempt->partials */
    uint64_t result_next;            /* next in attempt->ready */
    uint64_t returned;               /* pieces that came back for our contributions: its own (swap), or results of them */
    uint64_t lost;                   /* items that went over a connection that ended */
    uint64_t eager_bytes;            /* taken from the peer's eager window */
    uint8_t *carrier[2];             /* per phase and item: connection index, or one of: */
#define CARRIER_NONE 0xFF
#define CARRIER_LOST 0xFE
#define CARRIER_ARRIVED 0xFD         /* what came back shows that it is there */
} peer_tx;

typedef enum piece_state { PIECE_NONE = 0, PIECE_ARRIVING, PIECE_DONE } piece_state;

typedef struct shared_plan {         /* attempts outlive their epoch by a moment */
    uint32_t users;
    epoch_plan plan;
} shared_plan;

struct attempt {
    owner_kind owner;                /* first */
    attempt *prev, *next;            /* engine->attempts */
    pyccl_op *op;
    uint64_t seq, ordinal;           /* ordinal: the older goes first on a link */
    uint32_t spec_hash;
    shared_plan *plan;
    schedule schedule;
    const uint8_t *src;
    uint8_t *result;                 /* where the whole result comes together; NULL: it is empty, or src is it */
    void *scratch;                   /* result or undo, of ours */
    size_t scratch_bytes;
    bool past_cache;                 /* too big for the caches: what is put aside goes past them */
    uint8_t *undo;                   /* old bytes of what the result has overwritten; NULL: they need not come back */
    uint8_t *saved;                  /* [slot]: undo holds the old bytes of this piece */
    uint64_t *slot_at;               /* [owner]: a piece has the slot slot_at[owner] + piece, in a ring its item */
    uint8_t *codes;                  /* codec: our input, encoded: [slot * code_stride], where `encoded`[slot] */
    uint8_t *encoded;
    uint8_t *result_codes;           /* what we send of the result, encoded: [own piece or, ring, slot; * code_stride] */
    size_t codes_bytes;
    uint64_t code_stride;
    double *weights;                 /* [rank]: avg only */
    uint32_t weights_missing;        /* ranks whose OPEN, and so whose weight, is not here */
    bool weighted;                   /* one is not 1 */
    bool committed;
    struct guard *guard;             /* NULL: there is none */
    uint64_t *held;                  /* pieces (ring: slots) with all contributions that wait for weights */
    uint64_t held_count;
    uint32_t ahead_count;            /* ranks that wait for contributions to others */
    uint64_t own_pieces;             /* of our share */
    uint64_t *arrived_at[2];         /* per phase: [rank], where the items begin that come from there */
    uint8_t *arrived[2];             /* per phase: piece_state [arrived_at[rank] + item] */
    uint8_t **contribution;          /* [arrived_at[0][rank] + item] where they are folded; ring: the sum that goes on, too */
    uint64_t contribution_count;
    uint16_t *missing;               /* [own piece]: contributions not here yet */
    uint64_t *partials;              /* ring: items of phase 0 whose sum is ready to go on, in that order */
    uint64_t partial_count;
    uint64_t *ready;                 /* items of phase 1 that are ready to go out, in that order */
    uint64_t ready_count;
    uint64_t pieces_left;            /* of the result that we keep; ring, reduce_scatter: and of sums for others */
    uint64_t hash;
    bool told;                       /* pyccl_fsm_result was called */
    bool has_local;                  /* pieces that need nothing from the network wait for ops_work */
    uint32_t local_share;
    uint64_t local_piece;
    int64_t progress_ns;
    peer_tx *peers;                  /* [world] */
};

/* ---- peers ---- */

typedef struct early_piece early_piece;
typedef struct publication publication;
typedef struct fetch fetch;

typedef struct ask {                 /* what is left of it */
    uint64_t sync, offset;
    uint32_t size;
    bool packing;                    /* the caller has been told, and has not answered */
    uint32_t packed_bytes;           /* 0: as they are */
    uint8_t *packed;
} ask;

struct peer {
    pyccl_link link;                 /* first */
    peer *next;                      /* engine->peers */
    int32_t rank;                    /* in the current epoch; -1: not a member */
    bool silent, reset_owed;
    int64_t dead_ns;                 /* when its connections are looked at for dead ones */
    peer_tx *tx_first, *tx_last;     /* attempts that can send something to it now, oldest first */
    uint32_t tx_waiting;             /* attempts whose peer_tx waits for its eager window */
    uint64_t eager_used;             /* bytes it holds for operations it has not opened, as far as we know; those of
                                        an operation that failed before its OPEN came stay until the epoch ends */
    uint64_t early_bytes;            /* bytes we hold for operations that we have not submitted */
    uint32_t early_count;
    bool state_turn;                 /* state and operations take turns */
    ask *asks;                       /* ring of ASKS_MAX, NULL until the first */
    uint32_t ask_head, ask_count;
    uint32_t packs_owed;             /* PYCCL_EVENT_PACK that the caller has not answered */
    fetch *fetch_first, *fetch_last; /* ours from it */
    uint32_t asked;                  /* of these, how many were sent */
    int64_t fetch_ns;                /* when one was asked, moved or ended last */
};

struct pyccl_engine {
    pyccl_engine_options options;
    pthread_t thread;
    int wake_fd, event_fd;
    link_env env;

    pthread_mutex_t lock;
    pthread_cond_t command_done;
    command *command_first, *command_last;
    bool asleep;                     /* the thread found no command and waits for events: wake_fd is to be raised */
    bool closed;                     /* the thread takes no more commands */

    pthread_mutex_t stop_lock;
    bool joined;

    atomic_uint waiters;             /* calls of pyccl_op_wait */

    pthread_mutex_t event_lock;
    pyccl_event *events;             /* ring */
    size_t event_head, event_count, event_cap;

    /* of the thread */
    pyccl_fsm *fsm;
    bool stopping, acting;
    bool gap;                        /* since silence was looked at, the clock has leapt */
    pyccl_status stop_why;
    int64_t ticked_ns;               /* when the fsm was called last */
    int64_t tick_ns;                 /* when the fsm wants to be called */
    int64_t check_ns;                /* when heartbeats and silence are looked at */
    bool tick_stale;                 /* something happened that may have moved tick_ns */
    int64_t moved_ns;                /* last submit, end of an operation, cut or epoch: quiet since */
    bool cut, drained_told;
    uint64_t cuts;                   /* calls of pyccl_engine_cut: an event names the cut it belongs to */

    peer **slots;                    /* by slot; NULL: removed. Slots are never used again */
    uint32_t slot_count, slot_cap;
    peer *peers;
    bool in_epoch;
    uint32_t world, rank;
    shared_plan *plan;               /* of the last epoch; NULL: there was none */
    uint64_t epoch_number, epoch_tag;
    uint8_t epoch_id[16];
    uint8_t members[PYCCL_WORLD_MAX][PYCCL_ID_SIZE];
    peer *ranks[PYCCL_WORLD_MAX];    /* NULL: ourselves, or removed */

    pyccl_map ops;                   /* by cookie: those that the fsm has, waiting ones included */
    uint64_t cookies;
    attempt *attempts, *attempts_last;
    uint64_t ordinals;
    uint32_t local_work;             /* attempts with has_local */
    struct { void *memory; size_t bytes; } scratch[SCRATCH_KEPT];
    void *pieces[PIECES_KEPT];
    float *tile;                     /* 2 * ENGINE_TILE_FLOATS of scratch; NULL until a codec is used */
    uint32_t piece_count;
    early_piece *early[EARLY_BUCKETS];
    publication *publications;

    int pulse_fd;
    seal *pulse_seal;                /* NULL: in plain */
    int64_t pulse_sent_ns;
    uint32_t pulse_left;             /* bytes of a heartbeat that was sent in part */
};

/* engine.c */
int64_t engine_clock(void);
void engine_breathe(pyccl_engine *engine);   /* now and then in long work: others hear that we are alive, nothing else moves */
void engine_event(pyccl_engine *engine, const pyccl_event *event);
void engine_run(pyccl_engine *engine, command *c);                       /* on the thread, while the caller waits */
bool engine_post(pyccl_engine *engine, command *c);                      /* on the thread, later; false: it has ended */
/* In place of the old one; fd -1: none. */
pyccl_status engine_pulse_open(pyccl_engine *engine, int fd, const pyccl_conn_keys *keys);
void engine_refuse(pyccl_engine *engine, peer *p);
/* Complaints of silence outlive an epoch: whatever engine_silent has told, the first byte takes back with LINK_HEARD. */
void engine_silent(pyccl_engine *engine, peer *p);
void engine_heard(pyccl_engine *engine, peer *p);                        /* if it was silent, it is not any more */
void engine_hang_up(pyccl_engine *engine, pyccl_conn *conn);             /* as if it had ended, when nothing iterates */
void engine_close_links(pyccl_engine *engine, peer *p);
peer *engine_peer(const pyccl_engine *engine, uint32_t slot);            /* NULL: no such slot */
peer *engine_peer_get(pyccl_engine *engine, const uint8_t id[PYCCL_ID_SIZE]); /* made if it is not there; NULL: no memory */

/* engine_frames.c */
extern const link_hooks ENGINE_HOOKS;
void engine_act(pyccl_engine *engine);                                   /* carry out what the fsm wants */
pyccl_status engine_enter_epoch(pyccl_engine *engine, const pyccl_epoch *epoch, const pyccl_op_verdict *verdicts, size_t count);
void engine_forget_epoch(pyccl_engine *engine);                          /* nothing of the old epoch moves any more */
void engine_sink_cancel(pyccl_engine *engine, pyccl_conn *conn);         /* the payload that is arriving will not */
void engine_frame_stamp(const pyccl_engine *engine, pyccl_frame *frame); /* the current epoch */

/* engine_api.c */
pyccl_op *engine_op(const pyccl_engine *engine, uint64_t cookie);        /* NULL: it has ended */
void engine_op_end(pyccl_op *op, int32_t status, uint32_t attempts, const uint8_t culprit[16]); /* NULL: none */

/* engine_ops.c */
void ops_start(pyccl_engine *engine, pyccl_op *op, uint64_t seq);
void ops_stop(pyccl_engine *engine, pyccl_op *op);
void ops_commit(pyccl_op *op);                                           /* what was overwritten is not needed any more */
void ops_peer_open(pyccl_engine *engine, pyccl_op *op, uint32_t rank, double weight);
void ops_forget_peer(pyccl_engine *engine, peer *p);      /* it is no member any more, or the epoch ends */
void ops_conn_lost(pyccl_engine *engine, peer *p, uint32_t conn_index);
void ops_requeue(pyccl_engine *engine, peer *p);                         /* whatever can be sent to it is in its queue */
bool ops_load_next(pyccl_engine *engine, peer *p, pyccl_conn *conn, link_load *load);
bool ops_work(pyccl_engine *engine);                                     /* some local pieces; true: more is left */
void ops_moved(pyccl_engine *engine, attempt *a);
link_verdict ops_data_begin(pyccl_engine *engine, peer *p, pyccl_conn *conn, pyccl_op *op);
link_verdict ops_data_end(pyccl_engine *engine, peer *p, pyccl_conn *conn);
void ops_data_cancel(pyccl_conn *conn);
/* A piece that lies in `*data` (piece_alloc(length)); it may be taken (*data = NULL). False: protocol error. */
bool ops_deliver(pyccl_engine *engine, peer *p, pyccl_op *op, const pyccl_frame *frame, uint8_t **data);

void ops_result_ready(pyccl_engine *engine, attempt *a, uint32_t owner, uint64_t piece); /* it can go on, if it has to */
void ops_partial_ready(pyccl_engine *engine, attempt *a, uint64_t item);  /* ring */
void ops_partial_used(pyccl_engine *engine, attempt *a, uint64_t item);   /* ring: the result is here, its parts are not needed */
shared_plan *plan_share(shared_plan *plan);
void plan_release(shared_plan *plan);                                    /* NULL: nothing */

/* engine_fold.c */
const uint8_t *fold_source(attempt *a, uint32_t phase, uint32_t to, uint64_t item); /* an item as it goes to `to` */
uint8_t *fold_place(pyccl_engine *engine, attempt *a, uint32_t owner, uint64_t piece); /* where a piece of the result may be written */
uint8_t *fold_result_codes(const attempt *a, uint32_t owner, uint64_t piece);
void fold_contribution(pyccl_engine *engine, attempt *a, uint64_t item);    /* another one is here */
void fold_result(pyccl_engine *engine, attempt *a, uint32_t owner, uint64_t piece, const uint8_t *codes); /* in its place, or codes */
void fold_local(pyccl_engine *engine, attempt *a, uint32_t owner, uint64_t piece);
pyccl_status fold_weight(pyccl_engine *engine, attempt *a, uint32_t rank, double weight); /* ERR_ARGUMENT: the total is 0 */
uint64_t fold_hash(const attempt *a);                                     /* of the whole result, for DONE */
void fold_restore(pyccl_engine *engine, attempt *a);                     /* the caller's memory is as it was submitted */

bool fold_is_coded(const attempt *a);
const uint8_t *fold_input(const attempt *a, uint32_t owner, uint64_t piece); /* ours, as it was submitted */
const uint8_t *fold_encoded_input(attempt *a, uint32_t owner, uint64_t piece);
const double *fold_weights(const attempt *a);                             /* NULL: all 1 */
uint64_t fold_tile_elements(const attempt *a);
/* A tile of the finished float32 sum of a piece: encoded to `*codes` (NULL: not), and in the dtype to `out`. */
void fold_finish_tile(const attempt *a, float *sum, uint64_t elements, uint8_t **codes, uint8_t *out);
void fold_piece_is_whole(pyccl_engine *engine, attempt *a, uint32_t owner, uint64_t piece, const uint8_t *bytes);

/* engine_guard.c */
bool guard_refuses(const pyccl_spec *spec, const void *src);              /* our input, as it is submitted */
pyccl_status guard_new(attempt *a);
/* A piece of what `rank` contributes to our share, as it travels; one that is whole of the result, in the dtype. */
void guard_contribution(const pyccl_engine *engine, const attempt *a, uint32_t rank, uint64_t piece, const uint8_t *bytes);
void guard_result(const attempt *a, uint32_t owner, uint64_t piece, const uint8_t *bytes);
uint32_t guard_complaint(const attempt *a);                               /* of our DONE; there is a guard */

/* engine_ring.c */
void ring_fold(pyccl_engine *engine, attempt *a, uint64_t item);          /* what arrived, and our input */

/* engine_memory.c; NULL: no memory. Both kinds may also be given to free(). */
void copy_past(void *to, const void *from, size_t bytes);                /* memcpy past the caches */
void copy_past_end(void);                                                /* after it: what another thread will read is in order */
uint8_t *piece_alloc(pyccl_engine *engine, uint32_t bytes);
void piece_free(pyccl_engine *engine, uint8_t *memory, uint32_t bytes);
void *scratch_take(pyccl_engine *engine, size_t bytes, size_t *taken_bytes);
void scratch_give(pyccl_engine *engine, void *memory, size_t taken_bytes);
void memory_fini(pyccl_engine *engine);

/* engine_early.c */
link_verdict early_begin(pyccl_engine *engine, peer *p, pyccl_conn *conn);
link_verdict early_end(pyccl_engine *engine, peer *p, pyccl_conn *conn, pyccl_op *op);
void early_cancel(pyccl_engine *engine, pyccl_conn *conn);
void early_replay(pyccl_engine *engine, pyccl_op *op, uint64_t seq);
void early_clear(pyccl_engine *engine);
void early_clear_peer(pyccl_engine *engine, const peer *p);

/* engine_state.c */
link_verdict state_asked(pyccl_engine *engine, peer *p, const pyccl_frame *frame);
bool state_load_next(pyccl_engine *engine, peer *p, link_load *load);
link_verdict state_data_begin(pyccl_engine *engine, peer *p, pyccl_conn *conn);
link_verdict state_packed_begin(peer *p, pyccl_conn *conn);
void state_data_end(pyccl_engine *engine, peer *p, pyccl_conn *conn);
void state_data_cancel(pyccl_conn *conn);
void state_none(pyccl_engine *engine, peer *p, const pyccl_frame *frame);
void state_moved(pyccl_engine *engine, const fetch *f);
int64_t state_check(pyccl_engine *engine, peer *p);      /* ask again for what does not come; returns when to look again */
void state_conn_lost(pyccl_engine *engine, peer *p);     /* ask again over what is left, or end the fetches */
void state_end_fetches(pyccl_engine *engine, peer *p, pyccl_status status);
void state_drop_asks(peer *p);                           /* what it asked for and was not sent */
void state_clear(pyccl_engine *engine, peer *p);         /* asks and fetches of the old epoch */
void state_fini(pyccl_engine *engine);

#endif
