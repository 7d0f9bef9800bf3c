/* test_op_walk.c: the exhaustive walk: three members, one operation, or an exchange of two of them beside it or alone, every
 * interleaving, on the shipped op_fsm.c.
 *
 * The machine is included as source, so that one machine can be written down (save) and set up again (load). A state is
 * three machines, a bag of frames in flight (many connections: any order), the master and its control messages. Depth
 * first with a set of 128-bit hashes of the states seen; a bad state prints the steps that led to it.
 *
 * What the harness plays
 *   engine  a contribution is one DATA frame; with those of all participants in, the result is held; its hash names the set
 *   guards  what members find is the variant's: of their own input at the submit, of contributions and shares with the result
 *   master  the rules of the model: suspicion -> ballot -> every survivor freezes and reports -> verdict and epoch in one
 *           step -> EpochCommit reaches each survivor at any later time. Control links are FIFO.
 *   faults  each with a budget: crash of the victim (C, or A), its false suspicion (it runs on, fenced, until told), a suspicion revoked, a
 *           deadline anywhere, leaving, a reset link (frames lost per direction or none; later repeated), late frames
 * Not played separately
 *   Frames of the crashed C that get lost: a frame that is not delivered before its receiver freezes has no effect any
 *   more, so "delivered never" is among the orders of delivery already.
 * Reduction: a frame that its reader will drop now and for ever (reader frozen, epoch over, operation ended) is delivered
 * at once, alone, and must change nothing; with late frames on, one such frame may instead be kept and come at any time.
 * Checks: see judge() and stuck(). Mutations (canaries) break a rule on purpose; the walk must notice.
 *
 *     OP_WALK_ALL=1         the largest walks too (up to 5 million states and 20 s each, under 300 MB)
 *     OP_WALK_SHORT=1       those of less than 300,000 states only, as under sanitizers
 *     OP_WALK_SHOW=1        prints the trace that each canary leads to
 *     test_op_walk NAME     tests whose name contains NAME; each prints the number of states */
#include "../src/op_fsm.c"

#include <stdarg.h>
#include <stdio.h>
#include <time.h>

#include "test.h"

/* Walks of more states than this are left out, and say so. */
static size_t states_allowed(void) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    size_t normal = 300000;                /* slow builds */
#else
    size_t normal = 2500000;
#endif
    if (getenv("OP_WALK_SHORT") != NULL) return 300000;
    return getenv("OP_WALK_ALL") != NULL ? SIZE_MAX : normal;
}

enum { N = 3, A = 0, B = 1, C = 2, EPOCHS = 6, BAG = 44, ACTS = 96, DEPTH = 400 };
enum { UP, CRASHED, LEFT, EVICTED };
enum { NEVER, OK, FAILED_, UNKNOWN };
enum { ALL3 = 7, OPS = 2, ALL_ = 0, PAIR = 1 };            /* an operation k has the cookie k + 1 */
enum { AT_START = 1, AT_DEADLINE = 100, AT_LEAVE = 200 };
enum { NOT_FINITE = N + 1 };               /* nobody's contribution is refused, and what they make is not finite */

/* Deadline, crash ... what may happen in a variant, and the rule a canary breaks. */
typedef struct variant {
    const char *name;
    uint8_t submit, retry;                 /* submit: 1: at any time, 0: all have                      */
    uint8_t crash, suspect, revoke, deadline, leave, reset, late, tell, split, differ;
    uint8_t pair, alone, lose_a;           /* pair: members of an exchange, or 0; alone: no collective beside it; the victim is A */
    uint8_t early;                         /* so many operations may be ahead of a member, or more than there are: 0 */
    uint8_t guard, refuse, whole;          /* refuse: whose own input is refused; whole: results come together all the same (it owned all shares) */
    uint8_t accuses[3], doubts[3];         /* [member]: member + 1 whose contribution, whose share it refuses; or NOT_FINITE */
    int mutation;
} variant;

enum {
    SOUND, REPORT_WITHOUT_FREEZE, ABORT_WHILE_FROZEN, DATA_WHILE_FROZEN, STALE_EPOCH, ABORT_AFTER_DONE, MAJORITY_COMMITS, FORGET_TOMBSTONE,
    VERDICT_FORGETS_COMMIT, DROP_RECORD, RESET_WITHOUT_REPEAT, PREPARE_WITHOUT_DATA, HALF_A_PAIR_PREPARES, VERDICT_IN_NEW_RANKS, THIRD_IS_ASKED, ROOM_IS_NOT_ASKED,
    OPEN_REFUSES_NOTHING, DONE_COMPLAINS_OF_NOTHING, COMPLAINTS_OF_THE_LOST_STAY, ACCUSED_STAYS, REFUSED_ONCE, COMPLAINT_IS_REPORTED, BLAMES_WHO_TELLS
};

typedef struct op_bits {
    uint8_t submitted;
    uint8_t tag, next_seq, told, dirty;                                  /* the machine's tag          */
    uint8_t op, opened, done, settled, result, asked, leave, abort, blamed, have_spec, spec_rank, owner_rank, attempts, cookie, hash[N];
    uint8_t refusing, complaining, suspects, accused, complaint;         /* of a guard                 */
    uint8_t deferred, deferred_status, ahead_of;                         /* deferred: its place, from 1; ahead_of: who has not submitted it */
    uint8_t started, data;                                               /* the engine                 */
    uint8_t outcome, status, out_ep, out_set, culprit;                   /* culprit: 0 none, else member + 1 */
} op_bits;

typedef struct member {
    uint8_t life, ep, frozen, expired, tell;
    op_bits o[OPS];
} member;

typedef struct frame_bits { uint8_t type, k, path, ep; uint16_t value; } frame_bits; /* k: operation; path: from << 4 | to */

typedef struct state {
    member m[N];
    uint8_t crash, suspect, revoke, deadline, leave, reset, late;        /* budgets left               */
    uint8_t resync[N];                                                   /* [i]: to whom i must repeat */
    uint8_t cur, susp, false_susp, ballot, S, rep, sent, flush, need, settle, told_settle[N];
    uint8_t mem[EPOCHS], verdict[EPOCHS][OPS], rp[N][OPS], rh[N][OPS];
    uint8_t gone_ok[OPS];                  /* one that is gone had committed it                */
    uint8_t poisoned;                      /* epochs in which somebody has failed by a guard   */
    uint8_t bags, has_kept;
    frame_bits kept, bag[BAG];
} state;

enum { A_SUBMIT, A_FRAME, A_KEPT, A_FLUSH, A_REPORT, A_COMMIT, A_EVICT, A_SUSPECT, A_START_FLUSH, A_SETTLE, A_TICK, A_TELL, A_RESYNC, FAULTS,
       A_DEADLINE = FAULTS, A_LEAVE, A_CRASH, A_FALSE, A_REVOKE, A_RESET };
static const char *const STEP[] = {"submits", "frame", "late frame", "freezes and reports", "report arrives of", "enters the epoch", "is told it is evicted",
    "suspected", "flush starts", "settle request of", "ticks", "tells", "repeats to", "DEADLINE at", "LEAVES", "CRASH of", "FALSE SUSPICION of",
    "SUSPICION REVOKED of", "LINK RESET"};
static const char *const FRAME[] = {"?", "OPEN", "DATA", "DONE", "ABORT", "ASK", "ANSWER", "SETTLED"};
typedef struct step { uint8_t kind, i, j, n; } step;

static const variant *now;
static pyccl_fsm *machine;                 /* one, loaded with whoever moves */
static const char *bad;                    /* set: the first rule broken     */
static char bad_text[160];
static uint64_t commits, failures, poisonings, deferrals; /* seen in the walk: it is not empty; deferrals: for want of room */

static void broken(const char *text) { if (bad == NULL) bad = text; }
static void brokenf(const char *format, ...) {
    if (bad != NULL) return;
    va_list args;
    va_start(args, format);
    vsnprintf(bad_text, sizeof bad_text, format, args);
    va_end(args);
    bad = bad_text;
}

static int pop(unsigned x) { return __builtin_popcount(x); }
static uint32_t rank_of(uint8_t members, int i) { return (uint32_t)pop(members & ((1u << i) - 1)); }
static int member_of(uint8_t members, uint32_t rank) {
    for (int i = 0; i < N; i++)
        if (members >> i & 1 && rank-- == 0) return i;
    PYCCL_ASSERT(0);
    return 0;
}

static int victim(void) { return now->lose_a ? A : C; }

/* Whom operation k concerns, of these members. */
static uint8_t concerned(int k, uint8_t members) { return k == PAIR ? members & now->pair : members; }
static int runs(int k, int i) { return k == PAIR ? now->pair >> i & 1 : !now->alone; }

static uint8_t space_of(int k) { return k == PAIR ? PYCCL_SPACE_PAIR : PYCCL_SPACE_USER; }

/* Of operation k, among members of which both of a pair are. */
static uint64_t channel_for(int k, uint8_t members) {
    const int first = now->pair & 1 ? A : B, second = now->pair & 4 ? C : B;
    return k == PAIR ? pyccl_channel(PYCCL_SPACE_PAIR, 0, rank_of(members, first), rank_of(members, second)) : 0;
}

static pyccl_spec the_spec(int k) {
    if (k == PAIR) {
        pyccl_spec spec = {.kind = PYCCL_EXCHANGE, .dtype = PYCCL_FLOAT32, .algorithm = PYCCL_DIRECT, .retry = 1, .space = PYCCL_SPACE_PAIR, .count = 8};
        uint8_t both = 0;
        for (int i = 0; i < N; i++)
            if (now->pair >> i & 1) both ^= (uint8_t)(0x10 + i);
        memset(spec.root, both, sizeof spec.root);
        return spec;
    }
    return (pyccl_spec){.kind = PYCCL_ALL_REDUCE, .dtype = PYCCL_FLOAT32, .op = PYCCL_SUM, .algorithm = PYCCL_DIRECT, .retry = now->retry, .guard = now->guard, .count = 8};
}

/* ---- what guards find ---- */

static int refuses_own(int k, int i) { return k == ALL_ && now->refuse >> i & 1; }

/* Of the DONE of member i in an attempt of these members. */
static uint32_t complaint_of(int i, uint8_t members) {
    const int of = now->accuses[i], share = now->doubts[i];
    const uint32_t accused = of == NOT_FINITE ? PYCCL_CULPRIT_NOBODY : of && members >> (of - 1) & 1 ? rank_of(members, of - 1) + 1 : 0;
    return accused + (share && members >> (share - 1) & 1 ? rank_of(members, share - 1) + 1 : 0) * PYCCL_COMPLAINT_RESULT;
}

static uint8_t complainers(uint8_t members) {
    uint8_t found = 0;
    for (int i = 0; i < N; i++)
        if (members >> i & 1 && complaint_of(i, members)) found |= (uint8_t)(1 << i);
    return found;
}

static int is_poisoned(uint8_t members) { return (now->refuse & members) || complainers(members); }

/* The rule of wire.md 3.8 in members instead of ranks; member + 1, or 0: nobody. */
static int poisoner_among(uint8_t members) {
    const uint8_t complain = complainers(members);
    int named = NOT_FINITE;
    if (now->refuse & members) return __builtin_ctz(now->refuse & members) + 1;
    for (int i = 0; i < N; i++)
        if (complain >> i & 1 && now->accuses[i] && now->accuses[i] < named && members >> (now->accuses[i] - 1) & 1) named = now->accuses[i];
    for (int i = 0; i < N && named == NOT_FINITE; i++)
        for (int j = 0; j < N; j++)
            if (complain >> j & 1 && now->doubts[j] == i + 1 && members >> i & 1 && !(complain >> i & 1)) named = i + 1;
    return named == NOT_FINITE ? 0 : named;
}

/* In a byte, as a frame and a member's state hold it. */
static uint8_t complaint_bits(uint32_t complaint) {
    const uint32_t accused = complaint % PYCCL_COMPLAINT_RESULT;
    return (uint8_t)((accused == PYCCL_CULPRIT_NOBODY ? NOT_FINITE : accused) | complaint / PYCCL_COMPLAINT_RESULT << 4);
}

static uint32_t complaint_from(uint8_t bits) {
    return ((bits & 15) == NOT_FINITE ? (uint32_t)PYCCL_CULPRIT_NOBODY : bits & 15u) + (bits >> 4) * (uint32_t)PYCCL_COMPLAINT_RESULT;
}

static void epoch_id(uint8_t ep, uint8_t id[16]) {
    memset(id, 0, 16);
    id[0] = (uint8_t)(0x40 + ep);
}

static uint32_t epoch_members(uint8_t members, uint8_t out[N * 16]) {
    uint32_t world = 0;
    for (int i = 0; i < N; i++)
        if (members >> i & 1) memset(out + 16 * world++, 0x10 + i, 16);
    return world;
}

/* ---- one machine, written down and set up again ---- */

static uint8_t set_bits(const rank_set *set) { return (uint8_t)set->word[0]; }

static uint8_t status_code(int32_t status) { return (uint8_t)-status; }

static void save_op(const pyccl_fsm *fsm, const fsm_tag *tag, op_bits *o) {
    const fsm_op *op = tag->ops;
    o->tag = 1;
    o->next_seq = (uint8_t)tag->next_seq;
    o->told = (uint8_t)tag->told;
    o->dirty = tag->dirty;
    if (op == NULL) return;
    PYCCL_ASSERT(op->tag_next == NULL && op->seq == 0 && !op->have_other && !op->told_differs);
    o->op = (uint8_t)(op->state + 1);
    o->opened = set_bits(&op->opened);
    o->done = set_bits(&op->done);
    o->settled = set_bits(&op->settled);
    o->result = op->result;
    o->asked = op->asked;
    o->leave = op->leave_ns != 0;
    o->abort = status_code(op->abort_status);
    o->blamed = op->culprit[0] ? (uint8_t)(op->culprit[0] - 0x10 + 1) : 0;
    o->attempts = (uint8_t)op->attempts;
    o->cookie = (uint8_t)op->cookie;
    if (op->state == EARLY) {
        o->have_spec = op->have_spec;
        o->spec_rank = (uint8_t)op->spec_rank;
        o->owner_rank = (uint8_t)op->owner_rank;
    }
    o->refusing = set_bits(&op->refusing);
    o->complaining = set_bits(&op->complaining);
    o->suspects = set_bits(&op->suspects);
    o->accused = (uint8_t)op->accused;
    o->complaint = complaint_bits(op->complaint);
    for (uint32_t r = 0; now->early && r < fsm->world; r++)
        if (!set_has(&op->submitted, r)) o->ahead_of |= (uint8_t)(1 << r);
    for (uint32_t r = 0; r < fsm->world && r < N; r++)
        if (o->done >> r & 1 || (r == fsm->rank && op->result)) o->hash[r] = (uint8_t)op->hash[r];
}

static int op_of_space(uint8_t space) { return space == PYCCL_SPACE_PAIR ? PAIR : ALL_; }

static void save(const pyccl_fsm *fsm, member *m) {
    PYCCL_ASSERT(fsm->queue_count == 0 && fsm->tag_count <= OPS && fsm->deferred_count <= OPS && fsm->cutting == 0);
    size_t live = 0;
    m->frozen = fsm->frozen;
    m->tell = fsm->tell_ns_at != 0;
    for (int k = 0; k < OPS; k++) {        /* what is the machine's is written anew */
        op_bits *o = &m->o[k], kept = *o;
        memset(o, 0, sizeof *o);
        o->submitted = kept.submitted;
        o->started = kept.started;
        o->data = kept.data;
        o->outcome = kept.outcome;
        o->status = kept.status;
        o->out_ep = kept.out_ep;
        o->out_set = kept.out_set;
        o->culprit = kept.culprit;
    }
    uint8_t place = 0;
    for (const lane *l = fsm->lanes; l != NULL; l = l->next) {
        op_bits *o = &m->o[op_of_space(l->first->spec.space)];
        PYCCL_ASSERT(l->count == 1);
        o->deferred = ++place;
        o->deferred_status = status_code(l->first->status);
    }
    for (const fsm_tag *tag = fsm->tags; tag != NULL; tag = tag->next) {
        op_bits *o = &m->o[op_of_space(tag->space)];
        PYCCL_ASSERT(!o->tag);
        save_op(fsm, tag, o);
        live += o->op == RUNNING + 1 || o->op == PREPARED + 1;
    }
    PYCCL_ASSERT(fsm->live_count == live);
}

static void load_op(pyccl_fsm *fsm, const op_bits *o, int k, int self, uint32_t partner) {
    fsm_tag *tag = tag_get(fsm, space_of(k), 0, partner);
    tag->next_seq = o->next_seq;
    tag->told = o->told;
    tag->dirty = o->dirty;
    if (o->dirty) {
        tag->dirty_next = fsm->dirty;
        fsm->dirty = tag;
    }
    if (!o->op) return;
    fsm_op *op = op_new(fsm, tag, 0, (op_state)(o->op - 1));
    op->spec = the_spec(k);
    op->deadline_ns = AT_DEADLINE;
    op->opened.word[0] = o->opened;
    op->done.word[0] = o->done;
    op->settled.word[0] = o->settled;
    op->submitted.word[0] = (uint8_t)~o->ahead_of; /* without a limit nobody's: 4,096 bind none of these */
    op->result = o->result;
    op->asked = o->asked;
    op->leave_ns = o->leave ? AT_LEAVE : 0;
    op->abort_status = -(int32_t)o->abort;
    if (o->blamed) memset(op->culprit, 0x10 + o->blamed - 1, sizeof op->culprit);
    op->have_spec = o->have_spec;
    op->spec_rank = o->spec_rank;
    op->owner_rank = o->owner_rank;
    op->attempts = o->attempts;
    op->cookie = o->cookie;
    op->refused = (uint8_t)refuses_own(k, self);
    op->refusing.word[0] = o->refusing;
    op->complaining.word[0] = o->complaining;
    op->suspects.word[0] = o->suspects;
    op->accused = o->accused;
    op->complaint = complaint_from(o->complaint);
    for (uint32_t r = 0; r < fsm->world; r++) op->hash[r] = o->hash[r];
    if (op->state == RUNNING || op->state == PREPARED) live_add(fsm, op);
    if (op->state == EARLY) fsm->early[op->owner_rank]++;
    ahead_add(fsm, op);
}

static int partner_in_pair(int self) { return __builtin_ctz((unsigned)(now->pair & ~(1 << self))); }

static void load(pyccl_fsm *fsm, const member *m, uint8_t members, int self) {
    free_tags(fsm);
    memset(fsm->ahead, 0, sizeof fsm->ahead);
    free_deferred(fsm, 0);
    pyccl_map_clear(&fsm->cookie_map);
    fsm->live_first = fsm->live_last = NULL;
    fsm->live_count = 0;
    fsm->queue_head = fsm->queue_count = 0;
    uint8_t ids[N * 16];
    pyccl_epoch epoch = {.number = m->ep + 1u, .world = epoch_members(members, ids), .rank = rank_of(members, self), .members = ids};
    epoch_id(m->ep, epoch.id);
    adopt(fsm, &epoch);
    fsm->left = 0;                         /* the member that used this machine last may have; who is loaded has not */
    fsm->frozen = m->frozen;
    fsm->tell_ns_at = m->tell ? AT_START : 0;
    for (int k = 0; k < OPS; k++) {
        const op_bits *o = &m->o[k];
        if (o->tag) load_op(fsm, o, k, self, k == PAIR ? rank_of(members, partner_in_pair(self)) : 0);
    }
    for (int place = 1; place <= OPS; place++)
        for (int k = 0; k < OPS; k++) {
            const op_bits *o = &m->o[k];
            if (o->deferred != place) continue;
            const deferred item = {.cookie = o->deferred_status ? 0 : k + 1u, .spec = the_spec(k), .refused = (uint8_t)refuses_own(k, self),
                                   .deadline_ns = AT_DEADLINE, .status = -(int32_t)o->deferred_status};
            const uint32_t partner = partner_of(fsm, &item.spec);
            PYCCL_ASSERT(defer(fsm, partner < fsm->world ? tag_find(fsm, space_of(k), 0, partner) : NULL, &item) == PYCCL_OK);
        }
    fsm->room = 0;
}

/* The machine of member i as the state has it; in the twin test the one that was never written down. */
static pyccl_fsm *twins[N];
static int use_twins;
static void turn_to(const state *s, int i) {
    if (use_twins) machine = twins[i];
    else load(machine, &s->m[i], s->mem[s->m[i].ep], i);
}

/* ---- frames in flight ---- */

static void put(state *s, uint8_t type, int k, int from, int to, uint8_t ep, uint16_t value) {
    if (s->m[to].life != UP || s->resync[from] >> to & 1) return;  /* gone, or into a dead link: lost */
    if (s->bags == BAG) { broken("the bag is full: raise BAG"); return; }
    frame_bits f = {type, (uint8_t)k, (uint8_t)(from << 4 | to), ep, value};
    int at = s->bags++;
    while (at > 0 && memcmp(&s->bag[at - 1], &f, sizeof f) > 0) { s->bag[at] = s->bag[at - 1]; at--; }
    s->bag[at] = f;
}

/* What an ABORT or ANSWER names, and a complaint, go into the upper byte: a hash is below 16. */
static uint16_t value_of(const pyccl_message *message) {
    const uint64_t named = message->value >> 8;
    switch (message->type) {
    case PYCCL_FRAME_SETTLED: return (uint16_t)message->seq;
    case PYCCL_FRAME_ABORT:
    case PYCCL_FRAME_ANSWER:
        if (now->mutation == BLAMES_WHO_TELLS) return message->value & 255;
        return (uint16_t)((message->value & 255) | (named == PYCCL_CULPRIT_NOBODY ? 255 : named) << 8);
    default:
        PYCCL_ASSERT(named == 0);
        return (uint16_t)(message->value | (uint64_t)complaint_bits(message->complaint) << 8);
    }
}

static frame_bits take(state *s, int n) {
    frame_bits f = s->bag[n];
    memmove(&s->bag[n], &s->bag[n + 1], (size_t)(s->bags - n - 1) * sizeof f);
    memset(&s->bag[--s->bags], 0, sizeof f);
    return f;
}

/* ---- the engine ---- */

static int64_t clock_of(const member *m) { return m->expired ? AT_DEADLINE : AT_START; }

static uint8_t result_hash(int self, uint8_t set) { return (uint8_t)(now->differ && self == now->differ - 1 ? 8 | set : set); }

static void have_all(state *s, int self, int k) {
    member *m = &s->m[self];
    op_bits *o = &m->o[k];
    const uint8_t all = concerned(k, s->mem[m->ep]);
    if (now->mutation == PREPARE_WITHOUT_DATA && o->started && pop(o->data) >= 2) pyccl_fsm_result(machine, k + 1u, ALL3, clock_of(m));
    if (!o->started || (o->data & all) != all) return;
    const fsm_op *op = pyccl_map_get(&machine->cookie_map, k + 1u);
    if (k == ALL_ && now->guard && op != NULL && op->state == RUNNING) {
        if (op->result) return;            /* it was told: DATA has come twice */
        pyccl_fsm_complain(machine, k + 1u, complaint_of(self, all));
    }
    pyccl_fsm_result(machine, k + 1u, result_hash(self, o->data), clock_of(m));
}

/* Whose input is refused keeps it. */
static int contributes(int k, int self) { return !refuses_own(k, self) || now->whole; }

/* One commits in epoch ep. by_verdict: what its report and those of the others led to. */
static void guard_commits(const state *s, int self, uint8_t ep, int by_verdict) {
    if (now->refuse & s->mem[ep]) broken("a commit of what a member's own guard refuses");
    if (s->m[self].o[ALL_].complaining) broken("one commits what it knows is refused");  /* as before this step */
    if (complainers(s->mem[ep]) & (by_verdict ? s->mem[ep + 1] : ALL3)) broken("a commit of what a guard refuses, though nobody was lost with it");
}

/* One fails by a guard: there is reason in its epoch, or somebody has had one before; and the rule names this one. */
static void guard_fails(state *s, int self, int culprit) {
    const uint8_t ep = s->m[self].ep, members = s->mem[ep];
    int right = is_poisoned(members) && culprit == poisoner_among(members);
    for (int e = 0; e < ep; e++) {
        const int named = poisoner_among(s->mem[e]);
        if (s->poisoned >> e & 1) right |= culprit == (named && members >> (named - 1) & 1 ? named : 0);  /* of one that is lost no rank can be told */
    }
    if (!right) broken("fails by a guard that has refused nothing, or names another than the rule");
    s->poisoned |= (uint8_t)(1 << ep);
    poisonings++;
}

static void ends(state *s, int self, int k, uint8_t outcome, int32_t status, uint8_t attempt_ep) {
    op_bits *o = &s->m[self].o[k];
    if (o->outcome != NEVER) broken("an operation ended twice");
    *(outcome == OK ? &commits : &failures) += 1;
    o->outcome = outcome;
    o->status = status_code(status);
    o->out_ep = attempt_ep;
    o->out_set = outcome == OK ? o->data : 0;
    o->started = o->data = 0;
}

/* Carry out what the machine asks for. verdict_ep: in fsm_epoch the epoch before, else N_A. */
enum { N_A = 255 };
static void carry_out(state *s, int self, uint8_t verdict_ep) {
    member *m = &s->m[self];
    pyccl_action a;
    while (pyccl_fsm_next(machine, &a)) {
        const uint8_t members = s->mem[m->ep];
        const int k = a.type == PYCCL_ACT_SEND ? op_of_space(a.message.space) : a.cookie ? (int)a.cookie - 1 : 0;
        op_bits *o = &m->o[k];
        switch (a.type) {
        case PYCCL_ACT_SEND:
            if (m->frozen && a.message.type != PYCCL_FRAME_ANSWER && verdict_ep == N_A) brokenf("a frozen member sends %s", FRAME[a.message.type]);
            if (!(concerned(k, members) >> member_of(members, a.message.rank) & 1)) brokenf("%s goes to one whom it does not concern", FRAME[a.message.type]);
            if (k == ALL_ && a.message.type == PYCCL_FRAME_DONE && now->refuse & members) broken("DONE though one refuses its own input");
            put(s, a.message.type, k, self, member_of(members, a.message.rank), m->ep, value_of(&a.message));
            break;
        case PYCCL_ACT_START:
            o->started = 1;
            if (contributes(k, self)) o->data |= (uint8_t)(1 << self);
            for (int j = 0; j < N && contributes(k, self); j++)
                if (j != self && concerned(k, members) >> j & 1) put(s, PYCCL_FRAME_DATA, k, self, j, m->ep, 0);
            have_all(s, self, k);
            break;
        case PYCCL_ACT_STOP:
            o->started = o->data = 0;
            break;
        case PYCCL_ACT_COMMIT:
            if (verdict_ep == N_A) {
                if (m->frozen) broken("a frozen member commits");
                /* A verdict over this epoch is out and this member reported for it: it is not free to commit any more. */
                if (s->cur > m->ep && s->mem[s->cur] >> self & 1) broken("a survivor commits by frames after the verdict");
            }
            if (k == ALL_) guard_commits(s, self, verdict_ep == N_A ? m->ep : verdict_ep, verdict_ep != N_A);
            ends(s, self, k, OK, 0, verdict_ep == N_A ? m->ep : verdict_ep);
            if (now->mutation == DROP_RECORD && machine->tags != NULL && machine->tags->ops != NULL) op_drop(machine, machine->tags->ops);
            break;
        case PYCCL_ACT_FAIL:
            o->culprit = a.peer[0] ? (uint8_t)(a.peer[0] - 0x10 + 1) : 0;
            if (a.status == PYCCL_ERR_POISON) guard_fails(s, self, o->culprit);
            ends(s, self, k, a.status == PYCCL_ERR_OUTCOME_UNKNOWN ? UNKNOWN : FAILED_, a.status, m->ep);
            break;
        case PYCCL_ACT_RESEND:
            if ((o->started || o->data) && contributes(k, self)) put(s, PYCCL_FRAME_DATA, k, self, member_of(members, a.rank), m->ep, 0);
            break;
        case PYCCL_ACT_SETTLE:
            s->settle |= (uint8_t)(1 << self);
            s->told_settle[self] = m->ep;
            break;
        case PYCCL_ACT_LEAVE:
            m->life = LEFT;
            break;
        case PYCCL_ACT_DIFFERS:
            broken("equal specs differ");
            break;
        default: break;
        }
    }
}

/* ---- a frame arrives ---- */

static pyccl_message unpack(frame_bits f, uint8_t members) {
    pyccl_message message = {.type = f.type, .space = space_of(f.k), .rank = rank_of(members, f.path >> 4)};
    if (f.type == PYCCL_FRAME_SETTLED) message.seq = f.value;
    else message.value = f.value & 255;
    if (f.type == PYCCL_FRAME_OPEN) message.spec = the_spec(f.k);
    if (f.type == PYCCL_FRAME_ABORT || f.type == PYCCL_FRAME_ANSWER) message.value |= (f.value >> 8 == 255 ? (uint64_t)PYCCL_CULPRIT_NOBODY : f.value >> 8) << 8;
    else if (f.type != PYCCL_FRAME_SETTLED) message.complaint = complaint_from((uint8_t)(f.value >> 8));
    if (now->mutation == OPEN_REFUSES_NOTHING && f.type == PYCCL_FRAME_OPEN) message.complaint = 0;
    if (now->mutation == DONE_COMPLAINS_OF_NOTHING && f.type == PYCCL_FRAME_DONE) message.complaint = 0;
    return message;
}

static void accept_frame(state *s, int self, frame_bits f) {
    member *m = &s->m[self];
    op_bits *o = &m->o[f.k];
    uint8_t members = s->mem[m->ep];
    int from = f.path >> 4;
    if (f.type == PYCCL_FRAME_DATA) {
        uint64_t cookie = 0;
        pyccl_gate gate = pyccl_fsm_data(machine, rank_of(members, from), space_of(f.k), 0, 0, &cookie);
        if (gate == PYCCL_GATE_REFUSE) broken("DATA refused");
        if (gate != PYCCL_GATE_PASS) return;
        if (cookie != (o->started ? f.k + 1u : 0u)) broken("DATA passes to an operation that does not run");
        o->data |= (uint8_t)(1 << from);
        have_all(s, self, f.k);
        return;
    }
    pyccl_message message = unpack(f, members);
    pyccl_status rc = pyccl_fsm_receive(machine, &message, clock_of(m));
    if (rc != PYCCL_OK) brokenf("%s of a member that follows the rules is refused: %s", FRAME[f.type], pyccl_status_name(rc));
    if (now->mutation == MAJORITY_COMMITS && f.type == PYCCL_FRAME_DONE && machine->live_first != NULL && machine->live_first->state == PREPARED &&
        !machine->frozen && pop(set_bits(&machine->live_first->done)) * 2 > (int)machine->world)
        op_commit(machine, machine->live_first, 0);
}

/* Judge the epoch as the engine does, then take it in. Returns the gate's word. */
static pyccl_gate deliver(state *s, int self, frame_bits f) {
    member *m = &s->m[self];
    int from = f.path >> 4;
    uint8_t id[16];
    epoch_id(f.ep, id);
    turn_to(s, self);
    pyccl_gate gate = pyccl_fsm_gate(machine, f.ep + 1u, id[0], s->mem[m->ep] >> from & 1);
    if (gate == PYCCL_GATE_REFUSE) broken("a frame is refused at the gate");
    if (gate == PYCCL_GATE_DROP && now->mutation == STALE_EPOCH && s->mem[m->ep] >> from & 1) gate = PYCCL_GATE_PASS;
    if (gate == PYCCL_GATE_PASS) {
        uint8_t frozen = machine->frozen;
        int thaw = (now->mutation == ABORT_WHILE_FROZEN && f.type == PYCCL_FRAME_ABORT) ||
                   (now->mutation == DATA_WHILE_FROZEN && (f.type == PYCCL_FRAME_DATA || f.type == PYCCL_FRAME_OPEN));
        if (thaw) machine->frozen = m->frozen = 0;
        accept_frame(s, self, f);
        carry_out(s, self, N_A);
        if (thaw) machine->frozen = frozen;
    }
    save(machine, m);
    return gate;
}

/* ---- the master ---- */

static void flush_start(state *s) {
    s->ballot = 0;
    s->rep = s->sent = s->flush = s->S = 0;
    memset(s->rp, 0, sizeof s->rp);
    memset(s->rh, 0, sizeof s->rh);
    s->need = 1;
    uint8_t S = s->mem[s->cur] & (uint8_t)~s->susp;
    if (S == 0) return;
    s->ballot = 1;
    s->S = s->flush = S;
    s->need = 0;
}

/* The verdict on operation k; 0: again. */
static uint8_t verdict_on(const state *s, int k) {
    int any = 0, committed = 0, all = 1, hash = -1, differ = 0;
    const uint8_t asked = now->mutation == THIRD_IS_ASKED ? s->S : concerned(k, s->S);
    for (int i = 0; i < N; i++) {
        if (!(asked >> i & 1)) continue;
        uint8_t r = s->rp[i][k];
        if (now->mutation == VERDICT_FORGETS_COMMIT && r == PYCCL_STATE_COMMITTED) r = PYCCL_STATE_RUNNING;
        any |= r != 0;
        committed |= r == PYCCL_STATE_COMMITTED;
        all &= r == PYCCL_STATE_PREPARED || r == PYCCL_STATE_COMMITTED;
        if (r == PYCCL_STATE_PREPARED || r == PYCCL_STATE_COMMITTED) {
            differ |= hash >= 0 && hash != s->rh[i][k];
            hash = s->rh[i][k];
        }
    }
    if (now->mutation == HALF_A_PAIR_PREPARES && k == PAIR) all = any;
    return any && (committed || all) ? (differ ? PYCCL_VERDICT_FAIL : PYCCL_VERDICT_COMMIT) : 0;
}

static void decide(state *s) {
    if (s->cur + 1 == EPOCHS) { broken("too many epochs: raise EPOCHS"); return; }
    for (int k = 0; k < OPS; k++) s->verdict[s->cur + 1][k] = verdict_on(s, k);
    s->cur++;
    s->mem[s->cur] = s->S;
    s->ballot = s->S = s->rep = s->sent = s->flush = s->need = 0;
    memset(s->rp, 0, sizeof s->rp);
    memset(s->rh, 0, sizeof s->rh);
    s->susp &= s->mem[s->cur];
    if (s->susp) flush_start(s);
}

static void report_arrives(state *s, int i) {
    s->sent &= (uint8_t)~(1 << i);
    s->rep |= (uint8_t)(1 << i);
    if (s->rep == s->S) decide(s);
}

/* ---- steps ---- */

static void act_epoch(state *s, int i) {
    member *m = &s->m[i];
    uint8_t old = m->ep, members = s->mem[old + 1], ids[N * 16];
    pyccl_epoch epoch = {.number = old + 2u, .world = epoch_members(members, ids), .rank = rank_of(members, i), .members = ids};
    pyccl_op_verdict verdicts[OPS];
    size_t count = 0;
    epoch_id((uint8_t)(old + 1), epoch.id);
    for (int k = 0; k < OPS; k++)
        if (s->verdict[old + 1][k])
            verdicts[count++] = (pyccl_op_verdict){.space = space_of(k), .verdict = s->verdict[old + 1][k], .tag = channel_for(k, s->mem[old + (now->mutation == VERDICT_IN_NEW_RANKS)])};
    if (now->mutation == FORGET_TOMBSTONE && machine->tags != NULL && machine->tags->ops != NULL && machine->tags->ops->state == FAILED)
        op_drop(machine, machine->tags->ops);
    fsm_op *op = machine->live_first;
    const rank_set complaining = op != NULL ? op->complaining : (rank_set){{0}};
    const uint32_t accused = op != NULL ? op->accused : 0;
    if (op != NULL && now->mutation == REFUSED_ONCE) op->refused = 0;
    pyccl_status rc = pyccl_fsm_epoch(machine, &epoch, verdicts, count, clock_of(m));
    if (now->mutation == COMPLAINTS_OF_THE_LOST_STAY && machine->live_first != NULL) machine->live_first->complaining = complaining;
    if (now->mutation == ACCUSED_STAYS && machine->live_first != NULL) machine->live_first->accused = accused;
    if (rc != PYCCL_OK) { broken("a member can't obey the EpochCommit"); return; }
    m->ep++;
    for (int k = 0; k < OPS; k++)
        if (!m->o[k].started) m->o[k].data = 0;  /* what came early belonged to the old epoch */
    s->settle &= (uint8_t)~(1 << i);
    s->told_settle[i] = 0;
    carry_out(s, i, old);
}

static void act_deadline(state *s, int i) {
    (void)s;
    fsm_op *op = machine->live_first;
    if (now->mutation == ABORT_AFTER_DONE && op != NULL && op->state == PREPARED) op->state = RUNNING;
    pyccl_fsm_tick(machine, AT_DEADLINE);
    carry_out(s, i, N_A);
}

static void gone(state *s, int i, uint8_t life) {
    uint8_t outcome[OPS];
    for (int k = 0; k < OPS; k++) {
        outcome[k] = s->m[i].o[k].outcome;
        s->gone_ok[k] |= outcome[k] == OK;
    }
    memset(&s->m[i], 0, sizeof s->m[i]);
    s->m[i].life = life;
    for (int k = 0; k < OPS; k++) s->m[i].o[k].outcome = life == LEFT ? outcome[k] : 0;
    s->settle &= (uint8_t)~(1 << i);
    s->sent &= (uint8_t)~(1 << i);  /* its control link is gone too */
    s->flush &= (uint8_t)~(1 << i);
    s->told_settle[i] = s->resync[i] = 0;
    for (int j = 0; j < N; j++) s->resync[j] &= (uint8_t)~(1 << i);
}

static void lose(state *s, int from, int to) {
    for (int n = 0; n < s->bags;)
        if (s->bag[n].path == (from << 4 | to)) take(s, n);
        else n++;
}

static void apply(state *s, step a) {
    int i = a.i;
    member *m = &s->m[i];
    pyccl_spec spec = the_spec(a.kind == A_SUBMIT ? a.j : 0);
    if (m->life == UP) turn_to(s, i);
    switch (a.kind) {
    case A_SUBMIT:
        m->o[a.j].submitted = 1;
        if (now->mutation == ROOM_IS_NOT_ASKED) machine->options.early_max = PYCCL_EARLY_MAX;
        if (pyccl_fsm_submit_weighted(machine, a.j + 1u, &spec, 1, refuses_own(a.j, i), AT_DEADLINE, clock_of(m)) != PYCCL_OK) broken("submit refused");
        deferrals += machine->lanes != NULL && !m->frozen;
        machine->options.early_max = now->early ? now->early : PYCCL_EARLY_MAX;
        carry_out(s, i, N_A);
        break;
    case A_FRAME: deliver(s, i, take(s, a.n)); return;
    case A_KEPT: {
        frame_bits f = s->kept;
        memset(&s->kept, 0, sizeof s->kept);
        s->has_kept = 0;
        member before = *m;
        uint8_t bags = s->bags;
        deliver(s, i, f);
        if (now->mutation == SOUND && f.type != PYCCL_FRAME_ASK && (memcmp(&before, m, sizeof before) != 0 || bags != s->bags)) broken("a late frame has an effect");
        return;
    }
    case A_FLUSH: {
        if (now->mutation != REPORT_WITHOUT_FREEZE) pyccl_fsm_freeze(machine, clock_of(m));
        pyccl_op_report reports[OPS];
        fsm_op *op = now->mutation == COMPLAINT_IS_REPORTED ? machine->live_first : NULL;
        const rank_set complaining = op != NULL ? op->complaining : (rank_set){{0}};
        if (op != NULL) memset(&op->complaining, 0, sizeof op->complaining);
        const size_t count = pyccl_fsm_report(machine, reports, OPS);
        if (op != NULL) op->complaining = complaining;
        memset(s->rp[i], 0, sizeof s->rp[i]);
        memset(s->rh[i], 0, sizeof s->rh[i]);
        for (size_t r = 0; r < count; r++) {
            const int k = op_of_space(reports[r].space);
            if (reports[r].tag != channel_for(k, s->mem[m->ep])) broken("a report on another pair");
            s->rp[i][k] = reports[r].state;
            s->rh[i][k] = (uint8_t)reports[r].hash;
        }
        s->flush &= (uint8_t)~(1 << i);
        s->sent |= (uint8_t)(1 << i);
        save(machine, m);
        if (!now->split) report_arrives(s, i);
        return;
    }
    case A_REPORT: report_arrives(s, i); return;
    case A_COMMIT: act_epoch(s, i); break;
    case A_EVICT:
        pyccl_fsm_end(machine, PYCCL_ERR_EVICTED);
        pyccl_action dropped;
        while (pyccl_fsm_next(machine, &dropped)) {}
        gone(s, i, EVICTED);
        return;
    case A_SUSPECT: s->susp |= (uint8_t)(1 << i); flush_start(s); return;
    case A_START_FLUSH: flush_start(s); return;
    case A_SETTLE:
        s->settle &= (uint8_t)~(1 << i);
        if (!s->ballot && s->told_settle[i] == s->cur) flush_start(s);
        s->told_settle[i] = 0;
        return;
    case A_TICK: act_deadline(s, i); break;
    case A_TELL: pyccl_fsm_tick(machine, clock_of(m)); carry_out(s, i, N_A); break;
    case A_RESYNC:
        s->resync[i] &= (uint8_t)~(1 << a.j);
        if (s->mem[m->ep] >> a.j & 1 && now->mutation != RESET_WITHOUT_REPEAT) pyccl_fsm_link_reset(machine, rank_of(s->mem[m->ep], a.j), clock_of(m));
        carry_out(s, i, N_A);
        break;
    case A_DEADLINE: s->deadline--; m->expired = 1; act_deadline(s, i); break;
    case A_LEAVE:
        s->leave--;
        pyccl_fsm_tick(machine, AT_LEAVE);
        carry_out(s, i, N_A);
        if (m->life != LEFT || (m->o[ALL_].outcome != UNKNOWN && m->o[PAIR].outcome != UNKNOWN)) broken("it did not leave with OUTCOME_UNKNOWN");
        gone(s, i, LEFT);
        return;
    case A_CRASH: s->crash--; gone(s, i, CRASHED); return;
    case A_FALSE: s->suspect--; s->false_susp |= (uint8_t)(1 << i); s->susp |= (uint8_t)(1 << i); flush_start(s); return;
    case A_REVOKE: s->revoke--; s->false_susp &= (uint8_t)~(1 << i); s->susp &= (uint8_t)~(1 << i); flush_start(s); return;
    case A_RESET:
        s->reset--;
        if (a.n & 1) lose(s, i, a.j);
        if (a.n & 2) lose(s, a.j, i);
        s->resync[i] |= (uint8_t)(1 << a.j);
        s->resync[a.j] |= (uint8_t)(1 << i);
        return;
    default: PYCCL_ASSERT(0);
    }
    save(machine, m);
}

static int newer(const state *s, frame_bits f) { return f.ep > s->m[f.path & 15].ep; }

/* 1: whatever happens its reader will do nothing with it. */
static int doomed(const state *s, frame_bits f) {
    const member *m = &s->m[f.path & 15];
    if (m->life != UP || f.ep < m->ep) return 1;
    if (f.ep > m->ep) return !(s->mem[f.ep] >> (f.path & 15) & 1);  /* fenced: it will never get there */
    if (m->frozen) return f.type != PYCCL_FRAME_ASK;
    const uint8_t op = m->o[f.k].op;
    if (op == COMMITTED + 1) return f.type != PYCCL_FRAME_ASK && f.type != PYCCL_FRAME_SETTLED;
    if (op == FAILED + 1 && now->early) return f.type == PYCCL_FRAME_DATA || f.type == PYCCL_FRAME_ANSWER; /* the others show that they submitted */
    if (op == FAILED + 1) return f.type == PYCCL_FRAME_DONE || f.type == PYCCL_FRAME_DATA || f.type == PYCCL_FRAME_ABORT || f.type == PYCCL_FRAME_ANSWER;
    if (op == PREPARED + 1) return f.type == PYCCL_FRAME_OPEN || f.type == PYCCL_FRAME_DATA;
    return 0;
}

/* Doomed frames, and a member's last words to the dead: taken at once. Fills `late` with the frames that may be kept. */
static void sweep(state *s, frame_bits *late, int *lates) {
    *lates = 0;
    for (int n = 0; n < s->bags && bad == NULL;) {
        frame_bits f = s->bag[n];
        /* With a rule broken they are no longer harmless: then they come in any order like all others. */
        int harmless = now->mutation == SOUND || s->m[f.path & 15].life != UP || f.ep != s->m[f.path & 15].ep;
        if (!doomed(s, f) || !harmless) { n++; continue; }
        take(s, n);
        member *m = &s->m[f.path & 15];
        if (m->life != UP) continue;
        if (s->late && (*lates == 0 || memcmp(&late[*lates - 1], &f, sizeof f) != 0)) late[(*lates)++] = f;
        if (now->mutation != SOUND) continue;  /* a canary may have kept it as a late one */
        member before = *m;
        uint8_t bags = s->bags;
        pyccl_gate gate = deliver(s, f.path & 15, f);
        if (newer(s, f) != (gate == PYCCL_GATE_LATER)) broken("a frame of a newer epoch is not left unread");
        if (memcmp(&before, m, sizeof before) != 0 || bags != s->bags) brokenf("%s changes what may not change", FRAME[f.type]);
    }
}

static step *list_end;  /* of the list that steps() fills */
static void list(uint8_t kind, int i, int j, int n) { *list_end++ = (step){kind, (uint8_t)i, (uint8_t)j, (uint8_t)n}; }

static int steps(const state *s, step *out, int *free_steps) {
    list_end = out;
    for (int i = 0; i < N; i++) {
        const member *m = &s->m[i];
        uint8_t bit = (uint8_t)(1 << i);
        int in = s->mem[s->cur] >> i & 1;
        if (s->sent & bit && now->split) list(A_REPORT, i, 0, 0);
        if (m->life != UP) {
            if (in && !(s->susp & bit)) list(A_SUSPECT, i, 0, 0);
            continue;
        }
        int may_tick = 0;
        for (int k = 0; k < OPS; k++) {
            const op_bits *o = &m->o[k];
            if (!o->submitted && runs(k, i)) list(A_SUBMIT, i, k, 0);
            may_tick |= o->op == RUNNING + 1 || (o->op == PREPARED + 1 && !o->asked) || (o->deferred && !o->deferred_status);
        }
        if (m->ep < s->cur) {
            if (s->mem[m->ep + 1] & bit) list(A_COMMIT, i, 0, 0);
            else list(A_EVICT, i, 0, 0);
        } else if (s->flush & bit) list(A_FLUSH, i, 0, 0);
        if (s->settle & bit) list(A_SETTLE, i, 0, 0);
        if (m->expired && may_tick) list(A_TICK, i, 0, 0);
        if (now->tell && m->tell && !m->frozen) list(A_TELL, i, 0, 0);
        for (int j = 0; j < N; j++)
            if (s->resync[i] >> j & 1) list(A_RESYNC, i, j, 0);
    }
    if (s->need && !s->ballot && (s->mem[s->cur] & ~s->susp)) list(A_START_FLUSH, 0, 0, 0);
    for (int n = 0; n < s->bags; n++) {
        if (n > 0 && memcmp(&s->bag[n - 1], &s->bag[n], sizeof s->bag[n]) == 0) continue;
        if (newer(s, s->bag[n])) continue;
        list(A_FRAME, s->bag[n].path & 15, s->bag[n].path >> 4, n);
    }
    if (s->has_kept && s->m[s->kept.path & 15].life == UP) list(A_KEPT, s->kept.path & 15, s->kept.path >> 4, 0);
    *free_steps = (int)(list_end - out);
    for (int i = 0; i < N; i++) {
        const member *m = &s->m[i];
        uint8_t bit = (uint8_t)(1 << i);
        if (m->life != UP) continue;
        int open = 0, asks = 0;
        for (int k = 0; k < OPS; k++) {
            open |= m->o[k].submitted && m->o[k].outcome == NEVER;
            asks |= m->o[k].op == PREPARED + 1 && m->o[k].asked;
        }
        if (s->deadline && !m->expired && open) list(A_DEADLINE, i, 0, 0);
        if (s->leave && asks) list(A_LEAVE, i, 0, 0);
        if (s->crash && i == victim()) list(A_CRASH, i, 0, 0);
        if (s->suspect && i == victim() && s->mem[s->cur] & bit && !(s->susp & bit)) list(A_FALSE, i, 0, 0);
        if (s->revoke && s->susp & bit && s->ballot) list(A_REVOKE, i, 0, 0);
        /* Members differ by rank only, so one pair stands for all; with C singled out by a fault, two pairs do; beside an
         * exchange, and where guards find something, all do. */
        const int all_pairs = now->pair || is_poisoned(ALL3);
        for (int j = i + 1; s->reset && j < N; j++)
            if (s->m[j].life == UP && (all_pairs || (i == A && (j == B || now->crash || now->suspect || now->differ))))
                for (int n = 0; n < 4; n++)  /* what is lost: bit 0 there, bit 1 back */
                    if (n != 2 || all_pairs || now->crash || now->suspect || now->differ) list(A_RESET, i, j, n);
    }
    PYCCL_ASSERT(list_end - out <= ACTS);
    return (int)(list_end - out);
}

/* ---- what must hold ---- */

static int survivor(const state *s, int i) {  /* of the run as the master sees it: up, and not fenced */
    return s->m[i].life == UP && s->mem[s->cur] >> i & 1;
}

static int is_by_guard(const op_bits *o) { return o->outcome == FAILED_ && o->status == status_code(PYCCL_ERR_POISON); }
static int is_lost(const state *s, int named, uint8_t ep) { return !(s->mem[ep] >> (named - 1) & 1); }

/* What has happened so far has to explain how the collective fails at a survivor; of a guard see guard_fails. */
static int may_fail_with(const state *s, const op_bits *o) {
    switch (-(int)o->status) {
    case PYCCL_ERR_POISON: return 1;
    case PYCCL_ERR_DEADLINE: return s->deadline < now->deadline;
    case PYCCL_ERR_PEER_LOST: return !now->retry && s->mem[s->cur] != ALL3;
    case PYCCL_ERR_ALONE: return pop(s->mem[s->cur]) == 1;
    case PYCCL_ERR_RESULT_DIFFERS: return now->differ && !is_poisoned(s->mem[o->out_ep]);  /* a complaint wins, whatever the hashes */
    default: return 0;
    }
}

static void judge_op(const state *s, int k) {
    for (int i = 0; i < N; i++) {
        const op_bits *a = &s->m[i].o[k];
        if (s->m[i].life != UP || !runs(k, i)) continue;
        if (a->outcome == OK && a->out_set != concerned(k, s->mem[a->out_ep])) broken("a commit without exactly the contributions of its epoch");
        if (a->status == status_code(PYCCL_ERR_RESULT_DIFFERS) && a->culprit != 0 && k == ALL_ && a->culprit != now->differ)
            broken("another peer than the one that differs is named");
        if (k == ALL_ && a->outcome == FAILED_ && survivor(s, i) && !may_fail_with(s, a)) broken("a failure without cause");
        if (k == PAIR && a->status == status_code(PYCCL_ERR_PEER_LOST) &&
            (a->culprit == 0 || a->culprit == i + 1 || !((now->pair & ~s->mem[s->cur]) >> (a->culprit - 1) & 1)))
            broken("an exchange is lost through one who is still there, or not of it");
        if (s->gone_ok[k] && a->outcome == FAILED_ && survivor(s, i)) broken("a survivor fails what one that is gone had committed");
        for (int j = i + 1; j < N; j++) {
            const op_bits *b = &s->m[j].o[k];
            if (!survivor(s, i) || !survivor(s, j) || !runs(k, j)) continue;
            if ((a->outcome == OK && b->outcome == FAILED_) || (a->outcome == FAILED_ && b->outcome == OK)) broken("mixed outcome: one survivor commits, another fails");
            if (a->outcome == OK && b->outcome == OK && (a->out_ep != b->out_ep || a->out_set != b->out_set)) broken("survivors commit different attempts");
            if (is_by_guard(a) && is_by_guard(b) && a->culprit != b->culprit && !(a->culprit == 0 && is_lost(s, b->culprit, a->out_ep)) &&
                !(b->culprit == 0 && is_lost(s, a->culprit, b->out_ep))) broken("survivors name different ones whose input a guard refuses");
        }
    }
}

static void judge(const state *s) {
    for (int k = 0; k < OPS; k++) judge_op(s, k);
}

/* Without any fault but the loss of somebody else an exchange does not fail. */
static int nothing_hurts_the_pair(void) {
    const variant *v = now;
    return v->pair && !v->deadline && !v->leave && !v->differ && !(v->pair >> victim() & 1);
}

static void stuck(const state *s) {
    for (int i = 0; i < N; i++) {
        if (!survivor(s, i)) continue;
        if (s->m[i].frozen) brokenf("%c stays frozen", 'A' + i);
        if (s->m[i].ep != s->cur) brokenf("%c stays in an old epoch", 'A' + i);
        for (int k = 0; k < OPS; k++) {
            const op_bits *o = &s->m[i].o[k];
            if (!runs(k, i)) continue;
            if (o->outcome == NEVER) brokenf("%c is stuck: its operation never ends", 'A' + i);
            if (k == PAIR && o->outcome != OK && nothing_hurts_the_pair()) brokenf("the exchange of %c fails though nothing hurts the pair", 'A' + i);
            if (!now->tell || o->op != COMMITTED + 1 || s->m[i].tell || s->reset || s->deadline != now->deadline) continue;
            int all = 1;
            for (int j = 0; j < N; j++) all &= !runs(k, j) || s->m[j].o[k].outcome == OK;
            if (all) brokenf("%c keeps a record that all have settled", 'A' + i);
        }
    }
}

/* ---- the search ---- */

typedef struct key { uint64_t a, b; } key;
static size_t last_states;
static key *table;
static size_t table_cap, table_count;

static uint64_t mix(uint64_t x) {
    x = (x ^ x >> 32) * UINT64_C(0xD6E8FEB86659FD93);
    return x ^ x >> 29;
}

static key hash_state(const state *s) {
    uint64_t words[(sizeof *s + 7) / 8] = {0};
    size_t used = offsetof(state, bag) + (size_t)s->bags * sizeof s->bag[0];
    memcpy(words, s, used);
    key k = {UINT64_C(0x9E3779B97F4A7C15), UINT64_C(0xC2B2AE3D27D4EB4F)};
    for (size_t i = 0; i < (used + 7) / 8; i++) {
        k.a = mix(k.a ^ words[i]) * UINT64_C(0x9FB21C651E98DF25);
        k.b = (k.b ^ words[i]) * UINT64_C(0xA24BAED4963EE407);
        k.b ^= k.b >> 27;
    }
    k.a = mix(k.a);
    k.b = mix(k.b);
    k.a += k.a == 0;
    return k;
}

static int seen(key k) {
    if (table_count * 4 >= table_cap * 3) {
        size_t cap = table_cap ? table_cap * 2 : 1 << 16;
        key *grown = calloc(cap, sizeof *grown);
        PYCCL_ASSERT(grown != NULL);
        for (size_t i = 0; i < table_cap; i++) {
            if (table[i].a == 0) continue;
            size_t at = table[i].a & (cap - 1);
            while (grown[at].a != 0) at = (at + 1) & (cap - 1);
            grown[at] = table[i];
        }
        free(table);
        table = grown;
        table_cap = cap;
    }
    size_t at = k.a & (table_cap - 1);
    for (; table[at].a != 0; at = (at + 1) & (table_cap - 1))
        if (table[at].a == k.a && table[at].b == k.b) return 1;
    table[at] = k;
    table_count++;
    return 0;
}

typedef struct level {
    state s;
    step taken;
    frame_bits frame;
    uint16_t count, next, parent;          /* parent: the level it came from; siblings lie between */
    step acts[ACTS];
} level;
static level *path;

static void print_path(int depth) {
    static const char *const OP[] = {"-", "early", "running", "prepared", "committed", "failed"};
    static int way[DEPTH];
    int length = 0;
    for (int d = depth; d > 0; d = path[d].parent) way[length++] = d;
    for (int n = 1; n <= length; n++) {
        const level *l = &path[way[length - n]];
        step a = l->taken;
        printf("  %3d ", n);
        if (a.kind == A_FRAME || a.kind == A_KEPT) printf("%c->%c %s%s%s e%d value %d+%d", 'A' + a.j, 'A' + a.i, a.kind == A_KEPT ? "late " : "", l->frame.k == PAIR ? "exchange " : "", FRAME[l->frame.type], l->frame.ep, l->frame.value & 255, l->frame.value >> 8);
        else if (a.kind == A_START_FLUSH) printf("%s", STEP[a.kind]);
        else printf("%s %c", STEP[a.kind], 'A' + a.i);
        if (a.kind == A_RESYNC || a.kind == A_RESET) printf(" %c (%d)", 'A' + a.j, a.n);
        printf("   ");
        for (int i = 0; i < N; i++) {
            const member *m = &l->s.m[i];
            if (m->life != UP) printf(" %c[gone]", 'A' + i);
            else printf(" %c[e%d", 'A' + i, m->ep);
            for (int k = 0; k < OPS && m->life == UP; k++)
                if (runs(k, i)) printf(" %s%s", OP[m->o[k].op], m->o[k].outcome == OK ? " OK" : m->o[k].outcome == FAILED_ ? " FAIL" : "");
            if (m->life == UP) printf("%s]", m->frozen ? " frozen" : "");
        }
        printf("\n");
    }
}

static int enter_state(const state *s) { return !seen(hash_state(s)); }

static void push(int *depth, int parent, const state *s, step taken, frame_bits frame) {
    PYCCL_ASSERT(*depth + 1 < DEPTH);
    level *l = &path[++*depth];
    l->s = *s;
    l->taken = taken;
    l->frame = frame;
    l->parent = (uint16_t)parent;
    l->next = l->count = 0;
}

static void start_state(state *s) {
    memset(s, 0, sizeof *s);
    s->mem[0] = ALL3;
    s->crash = now->crash;
    s->suspect = now->suspect;
    s->revoke = now->revoke;
    s->deadline = now->deadline;
    s->leave = now->leave;
    s->reset = now->reset;
    s->late = now->late;
    for (int i = 0; i < N && !now->submit; i++)
        for (int k = 0; k < OPS; k++)
            if (runs(k, i)) apply(s, (step){A_SUBMIT, (uint8_t)i, (uint8_t)k, 0});
}

/* Walks everything; returns the rule broken, or NULL when all states were seen and none is bad. */
static const char *walk(const variant *v, int verbose) {
    now = v;
    bad = NULL;
    commits = failures = poisonings = deferrals = 0;
    pyccl_fsm_options options = {.settle_ns = AT_LEAVE - AT_DEADLINE, .tell_ns = v->tell ? 0 : INT64_C(1) << 40, .early_max = v->early};
    PYCCL_ASSERT(pyccl_fsm_new(&options, &machine) == PYCCL_OK);
    path = malloc(DEPTH * sizeof *path);
    PYCCL_ASSERT(path != NULL);
    table = NULL;
    table_cap = table_count = 0;
    uint64_t transitions = 0, ends_seen = 0;
    int depth = -1, deepest = 0;
    static state t;
    clock_t began = clock();
    start_state(&t);
    frame_bits late[BAG];
    int lates = 0;
    sweep(&t, late, &lates);
    enter_state(&t);
    push(&depth, 0, &t, (step){0}, (frame_bits){0});
    while (depth >= 0 && bad == NULL) {
        level *l = &path[depth];
        if (l->next == 0 && l->count == 0) {
            int free_steps = 0;
            l->count = (uint16_t)steps(&l->s, l->acts, &free_steps);
            judge(&l->s);
            if (free_steps == 0) {
                ends_seen++;
                stuck(&l->s);
            }
            if (bad != NULL) break;
        }
        if (l->next == l->count) { depth--; continue; }
        step a = l->acts[l->next++];
        int parent = depth;
        frame_bits frame = a.kind == A_FRAME ? l->s.bag[a.n] : l->s.kept;
        t = l->s;
        transitions++;
        apply(&t, a);
        sweep(&t, late, &lates);
        if (bad != NULL) { push(&depth, parent, &t, a, frame); break; }
        for (int k = -1; k < lates && !t.has_kept; k++) {  /* -1: no frame is kept for later */
            state u = t;
            if (k >= 0) { u.kept = late[k]; u.has_kept = 1; u.late--; }
            if (k >= 0 && enter_state(&u)) push(&depth, parent, &u, a, frame);
        }
        if (enter_state(&t)) push(&depth, parent, &t, a, frame);
        if (depth > deepest) deepest = depth;
    }
    double seconds = (double)(clock() - began) / CLOCKS_PER_SEC;
    last_states = table_count;
    printf("  %-52s %9zu states %10llu steps %8llu ends, depth %3d, %5.1f s: %s\n", v->name, table_count, (unsigned long long)transitions,
           (unsigned long long)ends_seen, deepest, seconds, bad != NULL ? bad : "exhausted");
    if (bad != NULL && verbose) print_path(depth);
    free(table);
    free(path);
    pyccl_fsm_free(machine);
    return bad;
}

/* ---- what the walk is made of ---- */

/* Random runs, once with machines written down and set up again at every step and once with machines left alone. */
static void machines_left_alone_do_the_same(const variant *v) {
    static state played[2][200];
    const pyccl_fsm_options options = {.settle_ns = AT_LEAVE - AT_DEADLINE, .tell_ns = 0, .early_max = v->early};
    uint64_t seed = 20310504, compared = 0;
    now = v;
    for (int run = 0; run < 3000; run++, seed++) {
        int length[2];
        for (use_twins = 0; use_twins < 2; use_twins++) {
            uint64_t random = seed;
            pyccl_fsm *spare = NULL;
            REQUIRE(pyccl_fsm_new(&options, &spare) == PYCCL_OK);
            machine = spare;
            bad = NULL;
            state *s = &played[use_twins][0];
            start_state(s);
            for (int i = 0; i < N && use_twins; i++) {
                REQUIRE(pyccl_fsm_new(&options, &twins[i]) == PYCCL_OK);
                load(twins[i], &s->m[i], ALL3, i);
            }
            int n = 0;
            for (; n < 199; n++) {
                step list_[ACTS];
                frame_bits late[BAG];
                int lates = 0, free_steps = 0, count = steps(s, list_, &free_steps);
                if (count == 0) break;
                uint64_t pick = test_random(&random);
                if (free_steps > 0 && pick % 8 != 0) count = free_steps;  /* faults are rare */
                s[1] = s[0];
                s++;
                apply(s, list_[test_random(&random) % (uint64_t)count]);
                sweep(s, late, &lates);
            }
            length[use_twins] = n;
            CHECK(bad == NULL);
            if (bad != NULL) printf("  %s\n", bad);
            for (int i = 0; i < N && use_twins; i++) pyccl_fsm_free(twins[i]);
            pyccl_fsm_free(spare);
        }
        use_twins = 0;
        CHECK_EQ(length[0], length[1]);
        for (int n = 0; n <= length[0] && n <= length[1]; n++) {
            compared++;
            CHECK(memcmp(&played[0][n], &played[1][n], sizeof(state)) == 0);
        }
    }
    CHECK(compared > 50000);
}

TEST(op_walk_save_and_load_keep_all_that_a_machine_does) {
    machines_left_alone_do_the_same(&(variant){.name = "", .submit = 1, .retry = 1, .crash = 1, .revoke = 1, .suspect = 1, .deadline = 2, .reset = 1, .tell = 1});
    machines_left_alone_do_the_same(&(variant){.name = "", .submit = 1, .retry = 1, .crash = 1, .revoke = 1, .suspect = 1, .deadline = 2, .reset = 1, .tell = 1, .pair = 6, .lose_a = 1});
}

/* ---- the walks ---- */

/* least: what it has at least to see, so that a walk that has become empty is noticed. */
static void holds(const variant *v, size_t least) {
    if (least > states_allowed()) {
        printf("  %-52s left out, has more than %zu states\n", v->name, least);
        return;
    }
    const char *found = walk(v, 1);
    CHECK(found == NULL);
    CHECK(last_states >= least);
}

#define HOLDS(least, ...) holds(&(variant){__VA_ARGS__}, (least))

TEST(op_walk_all_commit_when_nothing_fails) {
    HOLDS(7000, .name = "submits at any time", .submit = 1, .retry = 1);
    CHECK(commits > 0 && failures == 0);
    HOLDS(7000, .name = "records told and freed", .tell = 1, .retry = 1);
    CHECK(failures == 0);
    HOLDS(7000, .name = "one result differs", .submit = 1, .retry = 1, .differ = 2);
    CHECK(commits == 0 && failures > 0);
}

TEST(op_walk_outcome_is_atomic_when_a_member_crashes) {
    HOLDS(13000, .name = "crash", .retry = 1, .crash = 1);
    HOLDS(16000, .name = "crash, submits at any time", .submit = 1, .retry = 1, .crash = 1);
    HOLDS(16000, .name = "crash, retry=0", .submit = 1, .crash = 1);
    HOLDS(24000, .name = "crash, reports travel", .submit = 1, .retry = 1, .crash = 1, .split = 1);
    HOLDS(38000, .name = "crash, a late frame", .submit = 1, .retry = 1, .crash = 1, .late = 1);
    HOLDS(13000, .name = "crash, one result differs", .retry = 1, .crash = 1, .differ = 1);
}

TEST(op_walk_outcome_is_atomic_at_a_deadline) {
    HOLDS(273000, .name = "deadline", .submit = 1, .retry = 1, .deadline = 1);
    HOLDS(533000, .name = "deadline, may leave", .retry = 1, .deadline = 1, .leave = 1);
}

TEST(op_walk_outcome_is_atomic_at_a_deadline_and_a_crash) {
    HOLDS(452000, .name = "crash, deadline, submits at any time", .submit = 1, .retry = 1, .crash = 1, .deadline = 1);
    HOLDS(430000, .name = "crash, deadline, retry=0", .crash = 1, .deadline = 1);
    HOLDS(714000, .name = "crash, deadline, may leave", .retry = 1, .crash = 1, .deadline = 1, .leave = 1);
    HOLDS(431000, .name = "crash, deadline, one result differs", .retry = 1, .crash = 1, .deadline = 1, .differ = 2);
}

TEST(op_walk_a_late_frame_has_no_effect) {
    HOLDS(2104000, .name = "crash, deadline, a late frame", .retry = 1, .crash = 1, .deadline = 1, .late = 1);
    HOLDS(145000, .name = "false suspicion, a late frame", .retry = 1, .suspect = 1, .late = 1);
}

TEST(op_walk_an_evicted_member_has_no_effect) {
    HOLDS(49000, .name = "false suspicion", .submit = 1, .retry = 1, .suspect = 1);
    HOLDS(1065000, .name = "false suspicion, deadline", .retry = 1, .suspect = 1, .deadline = 1);
}

TEST(op_walk_a_revoked_suspicion_restarts_the_ballot) {
    HOLDS(256000, .name = "suspicion revoked", .submit = 1, .retry = 1, .suspect = 1, .revoke = 1);
    HOLDS(417000, .name = "suspicion revoked, reports travel", .retry = 1, .suspect = 1, .revoke = 1, .split = 1);
    HOLDS(3091000, .name = "suspicion revoked, deadline", .retry = 1, .suspect = 1, .revoke = 1, .deadline = 1);
}

TEST(op_walk_a_link_that_comes_back_repeats_enough) {
    HOLDS(174000, .name = "link reset", .submit = 1, .retry = 1, .reset = 1);
    HOLDS(466000, .name = "link reset, crash", .retry = 1, .reset = 1, .crash = 1);
    HOLDS(322000, .name = "link reset, one result differs", .retry = 1, .reset = 1, .differ = 3);
    HOLDS(154000, .name = "link reset, records told and freed", .retry = 1, .reset = 1, .tell = 1);
    HOLDS(1295000, .name = "link reset, false suspicion", .retry = 1, .reset = 1, .suspect = 1);
}

TEST(op_walk_a_link_that_comes_back_at_a_deadline) {
    HOLDS(3843000, .name = "link reset, deadline", .retry = 1, .reset = 1, .deadline = 1);
}

TEST(op_walk_two_deadlines) {
    HOLDS(1950000, .name = "two deadlines", .retry = 1, .deadline = 2);
}

TEST(op_walk_records_live_long_enough_for_who_asks) {
    HOLDS(3492000, .name = "deadline, records told and freed", .retry = 1, .deadline = 1, .tell = 1);
}

/* Pairs: 3 is A and B, 5 A and C, 6 B and C. When C is lost the ranks stay, when A is lost those of B and C move. */

TEST(op_walk_exchange_concerns_the_pair_alone) {
    HOLDS(30, .name = "exchange", .submit = 1, .pair = 5, .alone = 1);
    CHECK(commits > 0 && failures == 0);
    HOLDS(40, .name = "exchange, records told and freed", .submit = 1, .tell = 1, .pair = 5, .alone = 1);
    CHECK(failures == 0);
    HOLDS(350, .name = "exchange, the third crashes", .submit = 1, .crash = 1, .pair = 3, .alone = 1);
    CHECK(failures == 0);
    HOLDS(1500, .name = "exchange, the third crashes, ranks move, reports travel", .submit = 1, .crash = 1, .late = 1, .split = 1, .pair = 6, .alone = 1, .lose_a = 1);
    CHECK(failures == 0);
    HOLDS(4500, .name = "exchange, the third is suspected, revoked", .submit = 1, .suspect = 1, .revoke = 1, .late = 1, .pair = 6, .alone = 1, .lose_a = 1);
    CHECK(failures == 0);
    HOLDS(5000, .name = "exchange, the third crashes, link reset", .submit = 1, .crash = 1, .reset = 1, .pair = 6, .alone = 1, .lose_a = 1);
    CHECK(failures == 0);
}

TEST(op_walk_exchange_is_atomic_when_the_partner_is_lost_or_gives_up) {
    HOLDS(450, .name = "exchange, the partner crashes", .submit = 1, .crash = 1, .late = 1, .split = 1, .pair = 6, .alone = 1);
    CHECK(commits > 0 && failures > 0);
    HOLDS(7500, .name = "exchange, the partner is suspected, revoked", .submit = 1, .suspect = 1, .revoke = 1, .late = 1, .split = 1, .pair = 5, .alone = 1, .lose_a = 1);
    HOLDS(6000, .name = "exchange, the partner crashes, deadlines, leaving", .submit = 1, .crash = 1, .deadline = 2, .leave = 1, .pair = 6, .alone = 1);
    HOLDS(90000, .name = "exchange, the third crashes, deadlines, leaving", .submit = 1, .crash = 1, .deadline = 2, .leave = 1, .late = 1, .pair = 6, .alone = 1, .lose_a = 1);
    HOLDS(17000, .name = "exchange, the partner crashes, deadline, link reset", .submit = 1, .crash = 1, .deadline = 1, .reset = 1, .pair = 5, .alone = 1);
    HOLDS(30, .name = "exchange, one result differs", .submit = 1, .differ = 2, .pair = 6, .alone = 1);
    CHECK(commits == 0 && failures > 0);
}

TEST(op_walk_exchange_beside_a_collective) {
    HOLDS(170000, .name = "exchange beside a collective", .retry = 1, .pair = 3);
    CHECK(commits > 0 && failures == 0);
    HOLDS(240000, .name = "exchange beside a collective, the partner crashes", .retry = 1, .crash = 1, .pair = 6);
    HOLDS(340000, .name = "exchange beside a collective, the third crashes", .retry = 1, .crash = 1, .pair = 6, .lose_a = 1);
    HOLDS(960000, .name = "exchange beside a collective, the third suspected", .retry = 1, .suspect = 1, .pair = 6, .lose_a = 1);
}

/* One operation may be ahead of a member: who has called the collective first waits with the exchange, and the other way
 * round, until the other is known to have called what it called itself. */
TEST(op_walk_submits_without_room_wait) {
    HOLDS(200000, .name = "room for one, submits at any time", .submit = 1, .retry = 1, .pair = 3, .early = 1);
    CHECK(commits > 0 && failures == 0 && deferrals > 0);
    HOLDS(370000, .name = "room for one, the partner crashes", .submit = 1, .retry = 1, .crash = 1, .pair = 6, .early = 1);
    CHECK(commits > 0 && deferrals > 0);
    HOLDS(480000, .name = "room for one, the third crashes", .submit = 1, .retry = 1, .crash = 1, .pair = 6, .lose_a = 1, .early = 1);
    CHECK(commits > 0 && deferrals > 0);
}

/* What guards find: refuse 1 is A's own input, 2 B's, 4 C's; accuses {0, 0, 2}: C finds B's contribution refused. C is who is lost. */

TEST(op_walk_guard_that_refuses_nothing_is_as_none) {
    HOLDS(24000, .name = "crash, reports travel, no guard", .submit = 1, .retry = 1, .crash = 1, .split = 1);
    const size_t without = last_states;
    HOLDS(24000, .name = "guarded, crash, reports travel", .submit = 1, .retry = 1, .crash = 1, .split = 1, .guard = 1);
    CHECK(last_states == without && commits > 0 && poisonings == 0);
}

TEST(op_walk_guard_fails_on_all_and_all_name_the_same) {
#define POISONS(least, ...) do { HOLDS(least, .submit = 1, .retry = 1, .guard = 1, __VA_ARGS__); CHECK(commits == 0 && failures > 0 && failures == poisonings); } while (0)
    POISONS(1100, .name = "own input of B refused", .refuse = 2);
    POISONS(3700, .name = "own input of B refused, results all the same", .refuse = 2, .whole = 1);
    POISONS(400, .name = "own input of A and B refused", .refuse = 3);
    POISONS(7800, .name = "A complains of C, C of B", .accuses = {3, 0, 2});
    POISONS(7800, .name = "B complains of itself and the share of A", .accuses = {0, 2, 0}, .doubts = {0, 1, 0});
    POISONS(7800, .name = "B doubts A, C doubts B, A is not finite", .accuses = {NOT_FINITE, 0, 0}, .doubts = {0, 1, 2});
    POISONS(7800, .name = "A doubts C, B doubts A, one result differs", .doubts = {3, 1, 0}, .differ = 2);
}

/* Who is lost takes its complaint along, and those of others about it; what stays is said again. */
TEST(op_walk_guard_and_a_member_that_is_lost) {
    HOLDS(39000, .name = "own input of C refused, which crashes", .submit = 1, .retry = 1, .crash = 1, .split = 1, .late = 1, .guard = 1, .refuse = 4, .whole = 1);
    CHECK(commits > 0 && poisonings > 0);
    HOLDS(39000, .name = "own input of A and B refused, A crashes", .submit = 1, .retry = 1, .crash = 1, .split = 1, .late = 1, .guard = 1, .refuse = 3, .whole = 1, .lose_a = 1);
    CHECK(commits == 0 && failures == poisonings);
    HOLDS(82000, .name = "C complains of B and crashes", .submit = 1, .retry = 1, .crash = 1, .split = 1, .late = 1, .guard = 1, .accuses = {0, 0, 2});
    CHECK(commits > 0 && poisonings > 0);
    HOLDS(24000, .name = "A complains of C, which crashes, B of A", .submit = 1, .retry = 1, .crash = 1, .split = 1, .guard = 1, .accuses = {3, 1, 0});
    CHECK(commits == 0 && failures == poisonings);
    HOLDS(24000, .name = "A crashes, of which C complains, B doubts C", .submit = 1, .retry = 1, .crash = 1, .split = 1, .guard = 1, .accuses = {0, 0, 1}, .doubts = {0, 3, 0}, .lose_a = 1);
    CHECK(commits == 0 && failures == poisonings);
    HOLDS(24000, .name = "B is not finite, C doubts A and crashes", .submit = 1, .retry = 1, .crash = 1, .split = 1, .guard = 1, .accuses = {0, NOT_FINITE, 0}, .doubts = {0, 0, 1});
    CHECK(commits == 0 && failures == poisonings);
    HOLDS(16000, .name = "C doubts A and crashes, retry=0", .submit = 1, .crash = 1, .guard = 1, .doubts = {0, 0, 1});
    CHECK(poisonings > 0 && failures > poisonings);
    HOLDS(178000, .name = "C complains of B and is suspected", .submit = 1, .retry = 1, .suspect = 1, .late = 1, .guard = 1, .accuses = {0, 0, 2});
    CHECK(commits > 0 && poisonings > 0);
    HOLDS(258000, .name = "C and B complain, suspicion of C revoked", .submit = 1, .retry = 1, .suspect = 1, .revoke = 1, .guard = 1, .accuses = {0, 3, 2});
    HOLDS(128000, .name = "own input of B refused, suspicion of C revoked", .submit = 1, .retry = 1, .suspect = 1, .revoke = 1, .guard = 1, .refuse = 2, .whole = 1);
    CHECK(commits == 0 && failures == poisonings);
}

TEST(op_walk_guard_at_a_deadline) {
    HOLDS(42000, .name = "own input of B refused, deadlines, leaving, crash", .submit = 1, .retry = 1, .deadline = 2, .crash = 1, .leave = 1, .guard = 1, .refuse = 2);
    HOLDS(116000, .name = "own input of B refused, suspicion revoked, deadline", .retry = 1, .suspect = 1, .revoke = 1, .deadline = 1, .guard = 1, .refuse = 2);
    HOLDS(144000, .name = "own input of B refused, crash, deadline, late, retry=0", .submit = 1, .crash = 1, .deadline = 1, .late = 1, .guard = 1, .refuse = 2);
    HOLDS(84000, .name = "own input of C refused, deadline, crash", .submit = 1, .retry = 1, .deadline = 1, .crash = 1, .guard = 1, .refuse = 4, .whole = 1);
    HOLDS(537000, .name = "A complains of C, deadline, leaving", .retry = 1, .deadline = 1, .leave = 1, .guard = 1, .accuses = {3, 0, 0});
    HOLDS(722000, .name = "C complains of B and crashes, deadline, leaving", .retry = 1, .deadline = 1, .crash = 1, .leave = 1, .guard = 1, .accuses = {0, 0, 2});
    HOLDS(3141000, .name = "A complains of C, suspicion of C revoked, deadline", .retry = 1, .suspect = 1, .revoke = 1, .deadline = 1, .guard = 1, .accuses = {3, 0, 0});
    HOLDS(436000, .name = "B complains of C, which crashes, deadline", .retry = 1, .deadline = 1, .crash = 1, .guard = 1, .accuses = {0, 3, 0});
}

TEST(op_walk_guard_beside_an_exchange) {
    HOLDS(126000, .name = "own input of A refused beside an exchange, C crashes", .submit = 1, .retry = 1, .crash = 1, .pair = 3, .guard = 1, .refuse = 1);
    CHECK(commits > 0 && poisonings > 0 && failures == poisonings);
    HOLDS(99000, .name = "own input of A refused, room for one", .submit = 1, .retry = 1, .crash = 1, .pair = 3, .early = 1, .guard = 1, .refuse = 1);
    CHECK(commits > 0 && poisonings > 0 && failures == poisonings && deferrals > 0);
}

TEST(op_walk_guard_and_a_link_that_comes_back) {
    HOLDS(96000, .name = "own input of B refused, link reset, crash", .submit = 1, .retry = 1, .reset = 1, .crash = 1, .guard = 1, .refuse = 2);
    HOLDS(194000, .name = "own input of A refused, which is suspected, link reset", .retry = 1, .reset = 1, .suspect = 1, .guard = 1, .refuse = 1, .lose_a = 1);
    HOLDS(386000, .name = "own input of B refused, link reset, deadline", .retry = 1, .reset = 1, .deadline = 1, .guard = 1, .refuse = 2);
    HOLDS(344000, .name = "own input of C refused, link reset", .submit = 1, .retry = 1, .reset = 1, .tell = 1, .guard = 1, .refuse = 4);
    HOLDS(646000, .name = "C is not finite and crashes, link reset", .retry = 1, .reset = 1, .crash = 1, .guard = 1, .accuses = {0, 0, NOT_FINITE});
    CHECK(last_states < 646000 || (commits > 0 && poisonings > 0 && failures == poisonings));  /* left out where builds are slow */
}

/* ---- canaries: a walk that can't find these finds nothing ---- */

static void finds(const variant *v) { CHECK(walk(v, getenv("OP_WALK_SHOW") != NULL) != NULL); }
#define FINDS(...) finds(&(variant){__VA_ARGS__})

TEST(op_walk_finds_a_report_without_freeze) { FINDS(.name = "canary: reports without freezing", .retry = 1, .crash = 1, .mutation = REPORT_WITHOUT_FREEZE); }
TEST(op_walk_finds_an_abort_taken_while_frozen) { FINDS(.name = "canary: ABORT taken while frozen", .retry = 1, .crash = 1, .deadline = 1, .mutation = ABORT_WHILE_FROZEN); }
TEST(op_walk_finds_data_taken_while_frozen) { FINDS(.name = "canary: OPEN and DATA taken while frozen", .retry = 1, .crash = 1, .mutation = DATA_WHILE_FROZEN); }
TEST(op_walk_finds_a_stale_epoch_accepted) { FINDS(.name = "canary: a frame of the old epoch is accepted", .retry = 1, .crash = 1, .late = 1, .mutation = STALE_EPOCH); }
TEST(op_walk_finds_an_abort_after_done) { FINDS(.name = "canary: ABORT after DONE", .retry = 1, .deadline = 1, .mutation = ABORT_AFTER_DONE); }
TEST(op_walk_finds_a_commit_on_the_majority) { FINDS(.name = "canary: commits on DONE of the majority", .retry = 1, .deadline = 1, .mutation = MAJORITY_COMMITS); }
TEST(op_walk_finds_a_forgotten_tombstone) { FINDS(.name = "canary: tombstone forgotten in a loss epoch", .retry = 1, .crash = 1, .deadline = 1, .mutation = FORGET_TOMBSTONE); }
TEST(op_walk_finds_a_verdict_that_forgets_a_commit) { FINDS(.name = "canary: verdict forgets a commit", .retry = 1, .crash = 1, .mutation = VERDICT_FORGETS_COMMIT); }
TEST(op_walk_finds_a_record_dropped_at_once) { FINDS(.name = "canary: commit record dropped at once", .retry = 1, .crash = 1, .mutation = DROP_RECORD); }
TEST(op_walk_finds_a_reset_without_repetition) { FINDS(.name = "canary: link reset without repetition", .retry = 1, .reset = 1, .mutation = RESET_WITHOUT_REPEAT); }
TEST(op_walk_finds_a_verdict_on_half_a_pair) { FINDS(.name = "canary: a verdict that asks one of the pair", .submit = 1, .crash = 1, .mutation = HALF_A_PAIR_PREPARES, .pair = 3, .alone = 1); }
TEST(op_walk_finds_a_verdict_in_the_ranks_of_the_new_epoch) { FINDS(.name = "canary: a verdict in the ranks of the new epoch", .submit = 1, .crash = 1, .mutation = VERDICT_IN_NEW_RANKS, .pair = 6, .alone = 1, .lose_a = 1); }
TEST(op_walk_finds_a_verdict_that_asks_the_third) { FINDS(.name = "canary: a verdict that asks the third", .submit = 1, .crash = 1, .mutation = THIRD_IS_ASKED, .pair = 6, .alone = 1); }
TEST(op_walk_finds_a_result_without_all_contributions) { FINDS(.name = "canary: prepared without all contributions", .retry = 1, .mutation = PREPARE_WITHOUT_DATA); }
TEST(op_walk_finds_a_submit_that_asks_for_no_room) { FINDS(.name = "canary: a submit that asks for no room", .submit = 1, .retry = 1, .pair = 3, .early = 1, .mutation = ROOM_IS_NOT_ASKED); }
#define FINDS_GUARD(...) FINDS(.submit = 1, .retry = 1, .guard = 1, __VA_ARGS__)
TEST(op_walk_finds_a_refusal_in_open_unheard) { FINDS_GUARD(.name = "canary: an OPEN that refuses is a plain one", .refuse = 2, .mutation = OPEN_REFUSES_NOTHING); }
TEST(op_walk_finds_a_refusal_in_open_unheard_with_a_result) { FINDS_GUARD(.name = "canary: an OPEN that refuses is a plain one, results", .refuse = 2, .whole = 1, .mutation = OPEN_REFUSES_NOTHING); }
TEST(op_walk_finds_a_complaint_unheard) { FINDS_GUARD(.name = "canary: a DONE that complains is a plain one", .accuses = {0, 0, 2}, .mutation = DONE_COMPLAINS_OF_NOTHING); }
TEST(op_walk_finds_a_complaint_of_one_that_is_lost) { FINDS_GUARD(.name = "canary: the complaint of one that is lost stays", .crash = 1, .accuses = {0, 0, 2}, .mutation = COMPLAINTS_OF_THE_LOST_STAY); }
TEST(op_walk_finds_one_named_by_one_that_is_lost) { FINDS_GUARD(.name = "canary: whom one that is lost accused is named", .crash = 1, .accuses = {0, 2, 1}, .mutation = ACCUSED_STAYS); }
TEST(op_walk_finds_a_refusal_that_is_said_once) { FINDS_GUARD(.name = "canary: a refusal is not said again", .crash = 1, .refuse = 2, .whole = 1, .mutation = REFUSED_ONCE); }
TEST(op_walk_finds_a_complaint_in_a_report) { FINDS_GUARD(.name = "canary: what is complained of is reported prepared", .crash = 1, .accuses = {0, 3, 0}, .mutation = COMPLAINT_IS_REPORTED); }
TEST(op_walk_finds_one_blamed_who_only_tells) { FINDS_GUARD(.name = "canary: who tells is blamed", .crash = 1, .refuse = 2, .mutation = BLAMES_WHO_TELLS); }
TEST(op_walk_save_and_load_keep_what_guards_say) {
    machines_left_alone_do_the_same(&(variant){.name = "", .submit = 1, .retry = 1, .crash = 1, .revoke = 1, .suspect = 1, .deadline = 2, .reset = 1, .tell = 1, .guard = 1, .refuse = 5, .whole = 1});
    machines_left_alone_do_the_same(&(variant){.name = "", .submit = 1, .retry = 1, .crash = 1, .revoke = 1, .suspect = 1, .reset = 1, .tell = 1, .guard = 1, .refuse = 1, .whole = 1, .lose_a = 1, .accuses = {0, 3, NOT_FINITE}});
    machines_left_alone_do_the_same(&(variant){.name = "", .submit = 1, .retry = 1, .crash = 1, .revoke = 1, .suspect = 1, .deadline = 1, .reset = 1, .tell = 1, .guard = 1, .lose_a = 1, .accuses = {2, 0, NOT_FINITE}, .doubts = {0, 3, 1}});
}
TEST(op_walk_save_and_load_keep_what_waits_for_room) {
    machines_left_alone_do_the_same(&(variant){.name = "", .submit = 1, .retry = 1, .crash = 1, .revoke = 1, .suspect = 1, .deadline = 2, .reset = 1, .tell = 1, .pair = 6, .lose_a = 1, .early = 1});
}
