/* fuzz_fsm.c: the operation machine against members that send it anything: no assertion of its own fails, each operation ends
 * once at most, and what is refused is refused with ERR_FRAME. Input: commands of the caller (submit, result, cancel, freeze,
 * epoch, time) and messages of the others, in any order, with any fields. */
#include "../src/frame.h"
#include "fuzz.h"

enum { WORLD = 3, TAGS = 3, COOKIES = 64 };

typedef struct run {
    pyccl_fsm *fsm;
    uint8_t ids[WORLD][16];
    uint64_t number, cookies;
    int64_t now;
    bool open[COOKIES + 1], started[COOKIES + 1], left;
} run;

static void actions(run *r) {
    pyccl_action action;
    while (pyccl_fsm_next(r->fsm, &action)) {
        if (action.type == PYCCL_ACT_START) r->started[action.cookie] = true;
        if (action.type == PYCCL_ACT_STOP) r->started[action.cookie] = false;
        if (action.type == PYCCL_ACT_LEAVE) r->left = true;
        if (action.type == PYCCL_ACT_SEND) HOLDS(action.message.rank < WORLD && action.message.rank != 0);
        if (action.type != PYCCL_ACT_COMMIT && action.type != PYCCL_ACT_FAIL) continue;
        HOLDS(action.cookie >= 1 && action.cookie <= COOKIES && r->open[action.cookie]);
        HOLDS(action.type == PYCCL_ACT_COMMIT ? r->started[action.cookie] : action.status < 0);
        r->open[action.cookie] = r->started[action.cookie] = false;
    }
}

static void enter(run *r, bool restart, bool mismatch) {
    pyccl_epoch epoch = {.number = r->number + 1, .world = WORLD, .restart = restart || mismatch, .mismatch = mismatch, .members = r->ids[0]};
    epoch.id[0] = (uint8_t)epoch.number;
    if (pyccl_fsm_epoch(r->fsm, &epoch, NULL, 0, r->now) == PYCCL_OK) {
        r->number++;
        memset(r->started, 0, sizeof r->started);
    }
    actions(r);
}

static pyccl_spec spec_of(uint8_t what) {
    pyccl_spec spec = {.kind = PYCCL_ALL_REDUCE, .dtype = PYCCL_FLOAT32, .op = PYCCL_SUM, .algorithm = PYCCL_DIRECT, .retry = 1,
                       .tag = what % TAGS, .count = 4, .guard = what >> 4 & 1};
    if (what & 32) {
        spec.kind = PYCCL_BROADCAST;
        spec.op = spec.guard = 0;
        memset(spec.root, 1 + what % (WORLD + 1), sizeof spec.root);
    }
    if (what & 64) {
        spec.kind = PYCCL_EXCHANGE;
        spec.op = spec.guard = 0;
        spec.space = PYCCL_SPACE_PAIR;
        memset(spec.root, 1 ^ (2 + what % (WORLD - 1)), sizeof spec.root);
    }
    return spec;
}

static void message(run *r, fuzz_input *in) {
    pyccl_message m = {.type = fuzz_u8(in) % 12, .rank = 1 + fuzz_u8(in) % (WORLD - 1), .weight = 1};
    const uint8_t what = fuzz_u8(in);
    m.spec = spec_of(what);
    m.space = m.spec.space;
    m.tag = m.spec.tag;
    m.seq = what & 128 ? fuzz_u64(in) : fuzz_u8(in) % 8;
    m.value = what & 8 ? fuzz_u64(in) : fuzz_u8(in) % 64;
    if (m.type == PYCCL_FRAME_OPEN) m.complaint = m.spec.guard && (what & 4);
    if (m.type == PYCCL_FRAME_DONE && what & 4) m.complaint = fuzz_u8(in) % 5 + fuzz_u8(in) % 5 * PYCCL_COMPLAINT_RESULT;
    if (m.type == PYCCL_FRAME_ABORT && (m.value & 255) == 0) m.value++; /* the header's decoder refuses it */
    if (m.type == PYCCL_FRAME_ANSWER && m.value != 0 && (m.value & 255) == 0) m.value++;
    const pyccl_status rc = pyccl_fsm_receive(r->fsm, &m, r->now);
    HOLDS(rc == PYCCL_OK || rc == PYCCL_ERR_FRAME);
    actions(r);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_input in = {data, size};
    const pyccl_fsm_options options = {.settle_ns = 100, .stall_ns = 50, .tell_ns = 10, .open_max = 4, .early_max = 8};
    run r = {.now = 1};
    for (int i = 0; i < WORLD; i++) memset(r.ids[i], i + 1, 16);
    HOLDS(pyccl_fsm_new(&options, &r.fsm) == PYCCL_OK);
    enter(&r, true, false);
    while (in.left > 0 && !r.left) {
        const uint8_t what = fuzz_u8(&in), which = fuzz_u8(&in);
        const uint64_t cookie = 1 + which % COOKIES;
        pyccl_op_report reports[8];
        switch (what % 16) {
        case 0:
        case 1: {
            const pyccl_spec spec = spec_of(which);
            if (r.cookies == COOKIES || !frame_spec_valid(&spec)) break;
            r.cookies++;
            r.open[r.cookies] = true;
            if (pyccl_fsm_submit_weighted(r.fsm, r.cookies, &spec, 1, spec.guard && what & 16, r.now + 200 + what, r.now) != PYCCL_OK)
                r.open[r.cookies] = false;
            break;
        }
        case 2:
            if (r.started[cookie]) pyccl_fsm_result(r.fsm, cookie, what / 16, r.now);
            break;
        case 3: pyccl_fsm_cancel(r.fsm, cookie, PYCCL_ERR_CANCELLED, r.now); break;
        case 4:
            if (pyccl_fsm_freeze(r.fsm, r.now) == PYCCL_OK) (void)pyccl_fsm_report(r.fsm, reports, 8);
            break;
        case 5: enter(&r, false, which % 2); break;
        case 6:
            r.now += which;
            (void)pyccl_fsm_tick(r.fsm, r.now);
            break;
        case 7: pyccl_fsm_link_reset(r.fsm, 1 + which % (WORLD - 1), r.now); break;
        case 8: {
            uint64_t of = 0;
            (void)pyccl_fsm_data(r.fsm, 1 + which % (WORLD - 1), which % 3, which % TAGS, fuzz_u8(&in), &of);
            HOLDS(of <= COOKIES && (of == 0 || r.open[of]));
            break;
        }
        default: message(&r, &in);
        }
        actions(&r);
    }
    pyccl_fsm_end(r.fsm, PYCCL_ERR_CLOSED);
    actions(&r);
    for (uint64_t i = 1; i <= COOKIES && !r.left; i++) HOLDS(!r.open[i]);
    pyccl_fsm_free(r.fsm);
    return 0;
}
