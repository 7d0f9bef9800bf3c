/* engine_api.c: pyccl_op_*: how callers hand operations to the engine's thread, wait for them and give them up.
 *
 * An operation is its own command: submit checks it, queues it and returns. What only the thread can know (no epoch,
 * too many tags) ends the operation with that status. `ended` is set as the last thing the thread does to it;
 * from then on it is the caller's. Waiters sleep on that word itself (a futex): a condition's lock would be held while
 * they are woken, and who wakes on the thread's own processor would find it taken.
 * Threads: pyccl_op_* from any; engine_* on the engine's thread.   Spec: pyccl.h */
#include <errno.h>
#include <float.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "engine.h"
#include "frame.h"

/* until: on CLOCK_MONOTONIC, of FUTEX_WAIT_BITSET. */
static long futex(atomic_int *word, int what, int value, const struct timespec *until) {
    return syscall(SYS_futex, word, what | FUTEX_PRIVATE_FLAG, value, until, NULL, FUTEX_BITSET_MATCH_ANY);
}

/* ---- on the thread ---- */

pyccl_op *engine_op(const pyccl_engine *engine, uint64_t cookie) { return pyccl_map_get(&engine->ops, cookie); }

void engine_op_end(pyccl_op *op, int32_t status, uint32_t attempts, const uint8_t culprit[16]) {
    pyccl_engine *engine = op->engine;
    ops_stop(engine, op);
    if (op->cookie != 0) pyccl_map_remove(&engine->ops, op->cookie);
    op->cookie = 0;
    engine->moved_ns = engine->env.now_ns;
    const pyccl_event event = {.type = PYCCL_EVENT_OP, .slot = UINT32_MAX, .code = status, .value = op->args.user,
                               .seq = op->seq, .tag = op->args.spec.tag, .space = op->args.spec.space};
    const bool notify = op->args.notify != 0;
    op->info = (pyccl_op_info){.status = status, .attempts = attempts, .world = op->world, .algorithm = op->algorithm,
                               .epoch_number = op->epoch_number, .tx_bytes = op->tx_bytes, .rx_bytes = op->rx_bytes,
                               .seq = op->seq, .elapsed_ns = engine_clock() - op->submitted_ns};
    memcpy(op->info.epoch_id, op->epoch_id, sizeof op->info.epoch_id);
    if (culprit != NULL) memcpy(op->info.peer, culprit, sizeof op->info.peer);
    atomic_int *word = &op->ended;
    atomic_store_explicit(word, 1, memory_order_release); /* the caller may free it now */
    (void)futex(word, FUTEX_WAKE, INT_MAX, NULL); /* looks at the address only; a waiter minds no wake-up too many */
    if (notify) engine_event(engine, &event);
}

static void run_submit(pyccl_engine *engine, command *c) {
    pyccl_op *op = (pyccl_op *)c;
    const int64_t now = engine->env.now_ns;
    const int64_t deadline = op->args.timeout_ns > INT64_MAX - op->submitted_ns ? INT64_MAX : op->submitted_ns + op->args.timeout_ns;
    engine->moved_ns = now;
    engine->tick_stale = true;
    op->cookie = ++engine->cookies;
    pyccl_map_put(&engine->ops, op->cookie, op);
    const pyccl_status rc = pyccl_fsm_submit_weighted(engine->fsm, op->cookie, &op->args.spec, op->args.weight, op->refused, deadline, now);
    if (rc != PYCCL_OK) engine_op_end(op, rc, 0, NULL);
}

/* ---- for the caller ---- */

static bool overlap(const void *a, uint64_t a_bytes, const void *b, uint64_t b_bytes) {
    const uintptr_t x = (uintptr_t)a, y = (uintptr_t)b;
    return x < y ? y - x < a_bytes : x - y < b_bytes;
}

static bool weight_valid(const pyccl_op_args *args) {
    if (args->spec.op != PYCCL_AVG) return args->weight == 1.0;
    return args->weight >= 0 && args->weight <= DBL_MAX;
}

static pyccl_status args_check(const pyccl_engine *engine, const pyccl_op_args *args) {
    const pyccl_spec *spec = &args->spec;
    if (!frame_spec_valid(spec) || !weight_valid(args) || args->timeout_ns <= 0) return PYCCL_ERR_ARGUMENT;
    if (spec->kind == PYCCL_BARRIER || spec->count == 0) return PYCCL_OK;
    const bool root = memcmp(spec->root, engine->options.self_id, PYCCL_ID_SIZE) == 0;
    const bool apart = spec->kind == PYCCL_ALL_GATHER || spec->kind == PYCCL_REDUCE_SCATTER;
    const bool reads = spec->kind != PYCCL_BROADCAST || root, writes = !apart && (spec->kind != PYCCL_BROADCAST || !root);
    if ((reads && args->src == NULL) || (writes && args->dst == NULL)) return PYCCL_ERR_ARGUMENT;
    const uint64_t bytes = spec->count * pyccl_dtype_size(spec->dtype);
    if (!reads || args->dst == NULL || (args->dst == args->src && !apart)) return PYCCL_OK;
    return overlap(args->src, bytes, args->dst, apart ? args->dst_bytes : bytes) ? PYCCL_ERR_ARGUMENT : PYCCL_OK;
}

static pyccl_status op_new(pyccl_engine *engine, const pyccl_op_args *args, pyccl_op **out) {
    *out = NULL;
    pyccl_op *op = calloc(1, sizeof *op);
    if (op == NULL) return PYCCL_ERR_NOMEM;
    op->engine = engine;
    op->args = *args;
    op->args.weight += 0.0; /* -0 becomes +0 */
    op->refused = guard_refuses(&args->spec, args->src);
    op->command.run = run_submit;
    op->submitted_ns = engine_clock();
    atomic_init(&op->ended, 0);
    *out = op;
    return PYCCL_OK;
}

static void op_delete(pyccl_op *op) {
    free(op->kept);
    free(op);
}

pyccl_status pyccl_op_submit(pyccl_engine *engine, const pyccl_op_args *args, pyccl_op **out) {
    *out = NULL;
    pyccl_op *op = NULL;
    pyccl_status rc = args_check(engine, args);
    if (rc == PYCCL_OK) rc = op_new(engine, args, &op);
    if (rc != PYCCL_OK) return rc;
    *out = op; /* before the thread knows it: it may end at once */
    if (engine_post(engine, &op->command)) return PYCCL_OK;
    *out = NULL;
    op_delete(op);
    return PYCCL_ERR_CLOSED;
}

static struct timespec timespec_of(int64_t ns) {
    return (struct timespec){.tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000)};
}

pyccl_status pyccl_op_wait(pyccl_op *op, int64_t timeout_ns) {
    pyccl_engine *engine = op->engine;
    if (pyccl_op_done(op)) return (pyccl_status)op->info.status;
    if (timeout_ns <= 0) return PYCCL_PENDING;
    const int64_t now = engine_clock();
    const struct timespec until = timespec_of(timeout_ns > INT64_MAX - now ? INT64_MAX : now + timeout_ns);
    bool in_time = true;
    atomic_fetch_add_explicit(&engine->waiters, 1, memory_order_relaxed);
    while (!pyccl_op_done(op) && in_time) in_time = futex(&op->ended, FUTEX_WAIT_BITSET, 0, &until) == 0 || errno != ETIMEDOUT;
    atomic_fetch_sub_explicit(&engine->waiters, 1, memory_order_relaxed);
    return pyccl_op_done(op) ? (pyccl_status)op->info.status : PYCCL_PENDING;
}

int pyccl_op_done(const pyccl_op *op) { return atomic_load_explicit(&op->ended, memory_order_acquire); }

typedef struct cancel_command {
    command command;
    pyccl_op *op;
    pyccl_status why;
} cancel_command;

static void run_cancel(pyccl_engine *engine, command *c) {
    const cancel_command *cancel = (const cancel_command *)c;
    if (cancel->op->cookie == 0) return;
    engine->tick_stale = true;
    pyccl_fsm_cancel(engine->fsm, cancel->op->cookie, cancel->why, engine->env.now_ns);
}

void pyccl_op_cancel(pyccl_op *op, pyccl_status why) {
    if (pyccl_op_done(op)) return;
    cancel_command c = {.command = {.run = run_cancel}, .op = op, .why = why < 0 ? why : PYCCL_ERR_CANCELLED};
    engine_run(op->engine, &c.command);
}

void pyccl_op_info_get(const pyccl_op *op, pyccl_op_info *out) {
    memset(out, 0, sizeof *out);
    out->status = PYCCL_PENDING;
    if (pyccl_op_done(op)) *out = op->info;
}

pyccl_status pyccl_op_take(const pyccl_op *op, void *dst, uint64_t dst_bytes) {
    if (!pyccl_op_done(op) || op->info.status != PYCCL_OK) return PYCCL_ERR_ARGUMENT;
    const bool keeps = op->args.spec.kind == PYCCL_ALL_GATHER || op->args.spec.kind == PYCCL_REDUCE_SCATTER;
    if (!keeps || op->args.dst != NULL || dst_bytes < op->kept_bytes) return PYCCL_ERR_ARGUMENT;
    if (op->kept_bytes > 0) memcpy(dst, op->kept, op->kept_bytes);
    return PYCCL_OK;
}

void pyccl_op_free(pyccl_op *op) {
    if (op == NULL) return;
    PYCCL_ASSERT(pyccl_op_done(op));
    op_delete(op);
}
