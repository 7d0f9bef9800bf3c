/* test_engine_faults.c: reductions of any kind, codec and plan, most of them in a ring, while connections end, a member gives
 * up or is lost, at any moment. All end alike: with the right bits, or with their inputs. Spec: proto/wire.md 3.3, 5 */
#include "engine_vectors.h"

enum { RUNS = 60 };

typedef enum fault { FAULT_CONNS, FAULT_CANCEL, FAULT_LOSS, FAULTS } fault;

typedef struct run {
    cluster c;
    drawn_plan drawn;
    pyccl_spec spec;
    fault fault;
    uint64_t seed, after;            /* after: bytes that member 0 has received when it happens */
    uint32_t late, lost;             /* late: submits last. lost: FAULT_LOSS */
    int in_place, early;             /* early: it happens before the last submits */
    vectors v;
    uint8_t *x[ENGINES_MAX];         /* all_reduce: inputs that are overwritten, or results */
    pyccl_op *ops[ENGINES_MAX];
} run;

static uint32_t below(run *r, uint32_t n) { return (uint32_t)(test_random(&r->seed) % n); }

static pyccl_spec spec_draw(run *r) {
    static const uint8_t dtypes[] = {PYCCL_INT64, PYCCL_FLOAT32, PYCCL_BFLOAT16, PYCCL_FLOAT64};
    static const uint64_t counts[] = {5, 4099, 300007, 900001};
    const uint8_t dtype = dtypes[below(r, 4)], algorithm = below(r, 4) ? PYCCL_RING : PYCCL_DIRECT;
    const uint64_t count = LONG(counts[below(r, 4)]);
    pyccl_spec spec = below(r, 2) ? scatter_spec(algorithm, dtype, PYCCL_SUM, count, 1) : reduce_spec(dtype, PYCCL_SUM, count, 0);
    spec.algorithm = algorithm;
    if (dtype == PYCCL_FLOAT32 || dtype == PYCCL_BFLOAT16) {
        spec.op = below(r, 2) ? PYCCL_AVG : PYCCL_SUM;
        spec.codec = below(r, 2) ? PYCCL_CODEC_UINT8 : 0;
        spec.block = spec.codec ? 1024 : 0;
    }
    spec.retry = 1;
    return spec;
}

static int scatters(const run *r) { return r->spec.kind == PYCCL_REDUCE_SCATTER; }

/* Inputs and, of an all_reduce, what must come out among the first `world` members. */
static vectors vectors_of(const run *r, uint32_t world, const pyccl_plan *plan) {
    pyccl_spec spec = r->spec;
    if (scatters(r)) { /* expected_part() folds these inputs */
        spec = reduce_spec(spec.dtype, PYCCL_MAX, spec.count, 0);
        memset(spec.root, 0, sizeof spec.root);
    }
    return vectors_planned(&spec, NULL, world, 9, plan);
}

static void begin(run *r, uint32_t i) {
    r->x[i] = copied(r->v.in[i], r->v.bytes);
    void *dst = scatters(r) ? NULL : r->in_place ? r->x[i] : r->v.out[i];
    r->ops[i] = submit(&r->c, i, r->spec, r->x[i], dst, 0);
}

/* All have begun: until it is done, or so far. */
static void wait_for_bytes(const run *r) {
    const int64_t until = now_ns() + PATIENCE;
    while (all_link_bytes(&r->c, 0) < r->after && !pyccl_op_done(r->ops[0]) && now_ns() < until) {}
}

/* One has not: any moment is as good as another. */
static void linger(run *r) {
    for (uint32_t looks = below(r, 1000); looks > 0; looks--) (void)all_link_bytes(&r->c, 0);
}

/* One connection of some pairs; the other one stays. */
static void conns_end(run *r) {
    for (uint32_t i = 0; i < r->c.count; i++)
        for (uint32_t j = 0; j < i; j++)
            if (below(r, 2)) kill_conn(&r->c, i, j, 0);
}

/* As the master would: commit what somebody has committed, or all survivors hold; else again. */
static void settle(run *r, int *committed) {
    int prepared = 0, survivors = 0;
    *committed = 0;
    for (uint32_t i = 0; i < r->c.count; i++) {
        pyccl_op_report report;
        size_t reported = 0;
        if (!r->c.alive[i]) continue;
        CHECK_EQ(pyccl_engine_freeze(r->c.engine[i], &report, 1, &reported), PYCCL_OK);
        survivors++;
        prepared += reported > 0 && report.state == PYCCL_STATE_PREPARED;
        *committed |= reported > 0 && report.state == PYCCL_STATE_COMMITTED;
        *committed |= pyccl_op_wait(r->ops[i], 0) == PYCCL_OK; /* long since: all have settled it */
    }
    *committed |= prepared == survivors;
    const pyccl_op_verdict verdict = {.verdict = PYCCL_VERDICT_COMMIT};
    r->c.plan = NULL;
    cluster_epoch_with(&r->c, 0, &verdict, *committed);
}

/* What member i of `world` must hold. */
static int is_right(const run *r, uint32_t i, uint32_t world, const vectors *expected, const pyccl_plan *plan) {
    if (!scatters(r)) return memcmp(r->in_place ? r->x[i] : r->v.out[i], expected->want, r->v.bytes) == 0;
    const uint64_t size = pyccl_dtype_size(r->spec.dtype), rows = r->spec.count;
    const uint64_t start = row_of_rank(rows, world, i), mine = row_of_rank(rows, world, i + 1) - start;
    uint8_t *part = malloc(mine * size + 1), *want = expected_part(&r->spec, expected, NULL, plan, i, start, mine);
    const int right = (mine == 0 || pyccl_op_take(r->ops[i], part, mine * size) == PYCCL_OK) && memcmp(part, want, mine * size) == 0;
    free(part);
    free(want);
    return right;
}

static void check_end(run *r, uint32_t world, const vectors *expected, const pyccl_plan *plan) {
    uint32_t good = 0;
    for (uint32_t i = 0; i < world; i++) {
        const int status = pyccl_op_wait(r->ops[i], PATIENCE);
        if (status != PYCCL_OK && r->fault != FAULT_CANCEL) printf("  member %u: %s\n", i, pyccl_status_name(status));
        REQUIRE(status != PYCCL_PENDING);
        good += status == PYCCL_OK;
        if (status == PYCCL_OK) CHECK(is_right(r, i, world, expected, plan));
        if (status != PYCCL_OK || scatters(r) || !r->in_place) CHECK(memcmp(r->x[i], r->v.in[i], r->v.bytes) == 0);
        CHECK_EQ(finish(r->ops[i]), status);
    }
    CHECK(good == 0 || good == world);
    if (r->fault != FAULT_CANCEL) CHECK_EQ(good, world);
}

static void describe(const run *r, int number) {
    static const char *const names[FAULTS] = {"connections end", "cancelled", "a member is lost"};
    printf("  run %d: %s after %llu bytes, %u members, last to begin %u%s, kind %u dtype %u codec %u algorithm %u count %llu%s\n", number,
           names[r->fault], (unsigned long long)r->after, r->c.count, r->late, r->early ? " (after it)" : "", r->spec.kind, r->spec.dtype,
           r->spec.codec, r->spec.algorithm, (unsigned long long)r->spec.count, r->in_place ? " in place" : "");
}

static void one_run(uint64_t seed, int number) {
    static run r; /* longjmp spoils locals */
    memset(&r, 0, sizeof r);
    r.seed = seed;
    const uint32_t world = 3 + below(&r, 3);
    cluster_open(&r.c, world, 2, below(&r, 2) ? OVER_TCP : OVER_UNIX);
    plan_draw(&r.drawn, &r.seed, world);
    r.c.plan = &r.drawn.plan;
    cluster_epoch(&r.c, 1);
    r.fault = (fault)below(&r, FAULTS);
    r.spec = spec_draw(&r);
    r.in_place = (int)below(&r, 2);
    r.lost = world - 1;
    r.late = below(&r, r.fault == FAULT_LOSS ? r.lost : world);
    r.v = vectors_of(&r, world, r.c.plan);
    r.after = test_random(&r.seed) % (r.v.bytes * 2 + 1);
    for (uint32_t i = 0; i < world; i++)
        if (i != r.late) begin(&r, i);
    r.early = (int)below(&r, 2);
    linger(&r);
    if (!r.early) begin(&r, r.late);
    if (!r.early) wait_for_bytes(&r);
    int committed = 0;
    if (r.fault == FAULT_CONNS) conns_end(&r);
    if (r.fault == FAULT_CANCEL) pyccl_op_cancel(r.ops[(r.late + 1) % world], PYCCL_ERR_CANCELLED);
    if (r.fault == FAULT_LOSS) {
        pyccl_engine_stop(r.c.engine[r.lost], PYCCL_ERR_CLOSED);
        r.c.alive[r.lost] = 0;
    }
    if (r.early) begin(&r, r.late);
    if (r.fault == FAULT_LOSS) settle(&r, &committed);
    if (r.fault == FAULT_LOSS && !committed) {
        vectors rest = vectors_of(&r, world - 1, NULL);
        check_end(&r, world - 1, &rest, NULL);
        vectors_free(&rest);
    } else if (r.fault == FAULT_LOSS) {
        for (uint32_t i = 0; i + 1 < world; i++) {
            CHECK_EQ(pyccl_op_wait(r.ops[i], PATIENCE), PYCCL_OK);
            CHECK(is_right(&r, i, world, &r.v, &r.drawn.plan));
            CHECK_EQ(finish(r.ops[i]), PYCCL_OK);
        }
    } else check_end(&r, world, &r.v, r.c.plan);
    if (r.fault == FAULT_LOSS) CHECK(finish(r.ops[r.lost]) < 0 || committed);
    for (uint32_t i = 0; i < world; i++) free(r.x[i]);
    vectors_free(&r.v);
    cluster_close(&r.c);
    if (test_failures > 0) describe(&r, number);
}

TEST(engine_reductions_end_alike_on_all_whatever_ends_meanwhile) {
    uint64_t seed = test_seed();
    for (int k = 0; k < RUNS && test_failures == 0; k++) one_run(test_random(&seed), k);
}
