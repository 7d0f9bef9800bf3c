/* engine_state.c: the state service. Published memory is served to members that ask for parts of it; fetches ask a
 * member and receive straight into the caller's memory.
 *
 * The one who serves keeps a bounded queue of asks per peer and reads the published memory only while it sends. Over a
 * line it answers in frames of CUT_BYTES, which its connections share: each of them has but a part of the line's rate,
 * so that a whole piece on one takes long, and where each carries its own the last ones leave the others idle. The
 * one who asks keeps at most ASKS_SENT_MAX unanswered; when a connection ends it asks again for all that is not here
 * (the answer or the ask may have been on it), so an ask that is queued already is not queued twice. The other side may
 * notice that end later and still answer over the dead connection: what does not come for REPEAT_NS is asked again too.
 * Who asks may say that the answer may be packed. The caller is told, packs, and gives us the bytes: what that means is no
 * matter of ours. Meanwhile the asks behind it go first; if it is asked for again, it is sent as it is. The caller owes no
 * more than ASKS_PACKED_MAX answers for one peer, also for asks that are long served: events are not bounded otherwise.
 * Invariants: a publication that is gone and a fetch that has ended are borrowed by no connection.
 * Threads: the engine's thread only.                               Spec: proto/wire.md 3, STATE frames */
#include <stdlib.h>
#include <string.h>

#include "engine.h"
#include "frame.h"

#define REPEAT_NS INT64_C(1000000000)
#define CUT_BYTES (2 * STATE_UNIT_BYTES)

struct publication {
    owner_kind owner;                /* first */
    publication *next;
    uint64_t sync, size_bytes;
    size_t count;
    pyccl_region regions[];
};

_Static_assert(PYCCL_PIECE_MAX == 16 * STATE_UNIT_BYTES, "a bit for each unit of a fetch");

struct fetch {
    owner_kind owner;                /* first */
    peer *from;
    fetch *prev, *next;
    uint64_t id, sync, offset;
    uint32_t size;
    uint16_t arriving, here;         /* bit k: unit k of it */
    bool asked;
    bool packable, packed;           /* it may come packed; and is asked for in that way, but not when asked for again */
    uint8_t *dst;
};

/* ---- serving ---- */

static publication *publication_find(const pyccl_engine *engine, uint64_t sync) {
    publication *pub = engine->publications;
    while (pub != NULL && pub->sync != sync) pub = pub->next;
    return pub;
}

static bool ask_within(const ask *part, const ask *whole) {
    return part->sync == whole->sync && part->offset >= whole->offset && part->offset - whole->offset <= whole->size &&
           part->size <= whole->size - (part->offset - whole->offset);
}

static void ask_drop(ask *dropped) {
    free(dropped->packed);
    dropped->packed = NULL;
}

/* It is sent as it is. */
static void ask_plain(ask *queued) {
    ask_drop(queued);
    queued->packing = false;
    queued->packed_bytes = 0;
}

static void asks_plain(peer *p, uint64_t sync) {
    for (uint32_t i = 0; i < p->ask_count; i++) {
        ask *queued = &p->asks[(p->ask_head + i) % ASKS_MAX];
        if (queued->sync == sync) ask_plain(queued);
    }
    if (p->ask_count > 0) p->link.wants_send = true;
}

static void tell_packer(pyccl_engine *engine, peer *p, const ask *wanted) {
    p->packs_owed++;
    const pyccl_event event = {.type = PYCCL_EVENT_PACK, .slot = p->link.slot, .value = wanted->sync, .seq = wanted->offset, .count = wanted->size};
    engine_event(engine, &event);
}

link_verdict state_asked(pyccl_engine *engine, peer *p, const pyccl_frame *frame) {
    ask wanted = {.sync = frame->seq, .offset = frame->offset, .size = (uint32_t)frame->value, .packing = frame->phase == 1};
    uint32_t packed = 0;
    for (uint32_t i = 0; i < p->ask_count; i++) {
        ask *queued = &p->asks[(p->ask_head + i) % ASKS_MAX];
        const bool covered = ask_within(&wanted, queued);
        packed += queued->packing || queued->packed != NULL;
        if (!covered && !ask_within(queued, &wanted)) continue;
        if (covered && wanted.packing) return LINK_GO; /* in whichever way it is queued */
        ask_plain(queued);
        if (!covered) *queued = (ask){.sync = wanted.sync, .offset = wanted.offset, .size = wanted.size};
        p->link.wants_send = true;
        return LINK_GO;
    }
    if (p->ask_count == ASKS_MAX) return LINK_REFUSE;
    if (p->asks == NULL) p->asks = malloc(ASKS_MAX * sizeof *p->asks);
    if (p->asks == NULL) return LINK_REFUSE;
    if (packed >= ASKS_PACKED_MAX || p->packs_owed >= ASKS_PACKED_MAX) wanted.packing = false;
    if (publication_find(engine, wanted.sync) == NULL) wanted.packing = false;
    p->asks[(p->ask_head + p->ask_count++) % ASKS_MAX] = wanted;
    if (wanted.packing) tell_packer(engine, p, &wanted);
    p->link.wants_send = true;
    return LINK_GO;
}

/* The first that does not wait for the packer, brought to the front; false: all do. */
static bool ask_ready(peer *p) {
    for (uint32_t i = 0; i < p->ask_count; i++) {
        ask *at = &p->asks[(p->ask_head + i) % ASKS_MAX], *front = &p->asks[p->ask_head];
        if (at->packing) continue;
        const ask ready = *at;
        *at = *front;
        *front = ready;
        return true;
    }
    return false;
}

static void ask_pop(peer *p) {
    p->ask_head = (p->ask_head + 1) % ASKS_MAX;
    p->ask_count--;
}

void state_drop_asks(peer *p) {
    for (; p->ask_count > 0; ask_pop(p)) ask_drop(&p->asks[p->ask_head]);
}

static bool load_packed(pyccl_engine *engine, peer *p, link_load *load) {
    ask *head = &p->asks[p->ask_head];
    load->frame = (pyccl_frame){.type = PYCCL_FRAME_STATE_PACKED, .seq = head->sync, .offset = head->offset, .length = head->packed_bytes,
                                .value = head->size};
    load->data = load->owned = head->packed;
    ask_pop(p);
    engine_frame_stamp(engine, &load->frame);
    return true;
}

/* The bytes as one run: in place where they lie in one region, else copied. */
static bool published_bytes(const publication *pub, const ask *wanted, link_load *load) {
    uint64_t at = wanted->offset, left = wanted->size;
    if (wanted->offset > pub->size_bytes || left > pub->size_bytes - wanted->offset) return false;
    size_t i = 0;
    while (at >= pub->regions[i].size_bytes) at -= pub->regions[i++].size_bytes;
    if (left <= pub->regions[i].size_bytes - at) {
        load->data = (const uint8_t *)pub->regions[i].data + at;
        load->owner = pub;
        return true;
    }
    uint8_t *copy = malloc(left), *out = copy;
    if (copy == NULL) return false;
    for (; left > 0; i++, at = 0) {
        const uint64_t here = pub->regions[i].size_bytes - at, n = here < left ? here : left;
        if (n > 0) memcpy(out, (const uint8_t *)pub->regions[i].data + at, n);
        out += n;
        left -= n;
    }
    load->data = load->owned = copy;
    return true;
}

bool state_load_next(pyccl_engine *engine, peer *p, link_load *load) {
    if (p->rank < 0 || !ask_ready(p)) return false;
    ask *head = &p->asks[p->ask_head], wanted = *head;
    if (head->packed != NULL) return load_packed(engine, p, load);
    if (!p->link.near && wanted.size > CUT_BYTES) wanted.size = CUT_BYTES;
    const publication *pub = publication_find(engine, wanted.sync);
    load->frame = (pyccl_frame){.type = PYCCL_FRAME_STATE_DATA, .seq = wanted.sync, .offset = wanted.offset, .length = wanted.size};
    if (pub == NULL || !published_bytes(pub, &wanted, load)) {
        load->frame.type = PYCCL_FRAME_STATE_NONE;
        load->frame.length = 0;
        wanted.size = head->size;
    }
    head->offset += wanted.size;
    head->size -= wanted.size;
    if (head->size == 0) ask_pop(p);
    engine_frame_stamp(engine, &load->frame);
    return true;
}

/* ---- fetching ---- */

/* Bits of the units from byte `at` to byte `end`, the last of which may be shorter. */
static uint16_t unit_bits(uint32_t at, uint32_t end) {
    const uint32_t first = at / STATE_UNIT_BYTES, last = (end + STATE_UNIT_BYTES - 1) / STATE_UNIT_BYTES;
    return (uint16_t)((UINT32_C(1) << last) - (UINT32_C(1) << first));
}

static uint16_t frame_units(const fetch *f, const pyccl_frame *frame) {
    const uint32_t at = (uint32_t)(frame->offset - f->offset);
    return frame->type == PYCCL_FRAME_STATE_PACKED ? unit_bits(0, f->size) : unit_bits(at, at + frame->length);
}

static void fetch_unlink(peer *p, fetch *f) {
    if (f->asked) p->asked--;
    if (f->prev != NULL) f->prev->next = f->next;
    else p->fetch_first = f->next;
    if (f->next != NULL) f->next->prev = f->prev;
    else p->fetch_last = f->prev;
}

/* After this nothing writes to its memory. The caller is told, unless it has cancelled it. */
static void fetch_end_with(pyccl_engine *engine, peer *p, fetch *f, pyccl_status status, uint32_t packed_bytes) {
    if (f->arriving != 0) link_disown(&p->link, f);
    fetch_unlink(p, f);
    const pyccl_event event = {.type = PYCCL_EVENT_STATE, .slot = p->link.slot, .code = status, .value = f->id, .count = packed_bytes};
    if (status != PYCCL_ERR_CANCELLED) engine_event(engine, &event);
    free(f);
}

static void fetch_end(pyccl_engine *engine, peer *p, fetch *f, pyccl_status status) { fetch_end_with(engine, p, f, status, 0); }

/* Ask for each run of units that is neither here nor on its way. */
static void fetch_ask(pyccl_engine *engine, peer *p, const fetch *f) {
    for (uint32_t at = 0; at < f->size;) {
        uint32_t end = at;
        while (end < f->size && ((f->arriving | f->here) & unit_bits(end, end + 1)) == 0) end += STATE_UNIT_BYTES;
        if (end > f->size) end = f->size;
        pyccl_frame frame = {.type = PYCCL_FRAME_STATE_ASK, .phase = f->packed ? 1 : 0, .seq = f->sync, .offset = f->offset + at,
                             .value = end - at};
        engine_frame_stamp(engine, &frame);
        if (end > at) link_control_push(&p->link, &frame, NULL);
        at = end > at ? end : at + STATE_UNIT_BYTES;
    }
}

static void fetches_ask(pyccl_engine *engine, peer *p) {
    p->fetch_ns = engine->env.now_ns;
    for (fetch *f = p->fetch_first; f != NULL && p->asked < ASKS_SENT_MAX; f = f->next) {
        if (f->asked) continue;
        f->asked = true;
        p->asked++;
        fetch_ask(engine, p, f);
    }
}

static fetch *fetch_find(const peer *p, const pyccl_frame *frame) {
    fetch *f = p->fetch_first;
    while (f != NULL && (f->sync != frame->seq || !f->asked || frame->offset < f->offset || frame->offset - f->offset >= f->size)) f = f->next;
    return f;
}

link_verdict state_data_begin(pyccl_engine *engine, peer *p, pyccl_conn *conn) {
    (void)engine;
    const pyccl_frame *frame = &conn->frame;
    fetch *f = fetch_find(p, frame);
    if (f == NULL) return LINK_GO; /* forgotten here, or a repetition: discarded */
    const uint32_t at = (uint32_t)(frame->offset - f->offset), left = f->size - at;
    const bool whole_units = at % STATE_UNIT_BYTES == 0 && (frame->length % STATE_UNIT_BYTES == 0 || frame->length == left);
    if (!whole_units || frame->length > left) return LINK_REFUSE;
    const uint16_t units = frame_units(f, frame);
    if (((f->arriving | f->here) & units) != 0) return LINK_GO; /* if that one dies we ask again */
    f->arriving |= units;
    conn->sink = (link_sink){.kind = SINK_FETCH, .dst = f->dst + at, .owner = f, .note = f};
    return LINK_GO;
}

link_verdict state_packed_begin(peer *p, pyccl_conn *conn) {
    fetch *f = fetch_find(p, &conn->frame);
    if (f == NULL || !f->packable || f->arriving != 0 || f->here != 0) return LINK_GO; /* it was, when it was asked for */
    if (conn->frame.offset != f->offset || conn->frame.value != f->size) return LINK_REFUSE;
    f->arriving = frame_units(f, &conn->frame);
    conn->sink = (link_sink){.kind = SINK_FETCH, .dst = f->dst, .owner = f, .note = f};
    return LINK_GO;
}

void state_data_end(pyccl_engine *engine, peer *p, pyccl_conn *conn) {
    fetch *f = conn->sink.note;
    const uint16_t units = frame_units(f, &conn->frame);
    const uint32_t packed_bytes = conn->frame.type == PYCCL_FRAME_STATE_PACKED ? conn->frame.length : 0;
    conn->sink = (link_sink){.kind = SINK_NONE};
    f->arriving &= (uint16_t)~units;
    f->here |= units;
    if (f->here != unit_bits(0, f->size)) return;
    fetch_end_with(engine, p, f, PYCCL_OK, packed_bytes);
    fetches_ask(engine, p);
}

void state_data_cancel(pyccl_conn *conn) {
    fetch *f = conn->sink.note;
    f->arriving &= (uint16_t)~frame_units(f, &conn->frame);
}

void state_none(pyccl_engine *engine, peer *p, const pyccl_frame *frame) {
    fetch *f = fetch_find(p, frame);
    if (f == NULL) return;
    fetch_end(engine, p, f, PYCCL_ERR_ARGUMENT);
    fetches_ask(engine, p);
}

void state_end_fetches(pyccl_engine *engine, peer *p, pyccl_status status) {
    while (p->fetch_first != NULL) fetch_end(engine, p, p->fetch_first, status);
}

void state_moved(pyccl_engine *engine, const fetch *f) { f->from->fetch_ns = engine->env.now_ns; }

static void ask_again(pyccl_engine *engine, peer *p) {
    for (fetch *f = p->fetch_first; f != NULL; f = f->next) {
        if (!f->asked) continue;
        f->asked = f->packed = false;
        p->asked--;
    }
    fetches_ask(engine, p);
}

int64_t state_check(pyccl_engine *engine, peer *p) {
    if (p->asked == 0) return INT64_MAX;
    if (engine->env.now_ns - p->fetch_ns >= REPEAT_NS) ask_again(engine, p);
    return p->fetch_ns + REPEAT_NS;
}

void state_conn_lost(pyccl_engine *engine, peer *p) {
    if (p->link.conn_count == 0) state_end_fetches(engine, p, PYCCL_ERR_PEER_LOST);
    else ask_again(engine, p);
}

void state_clear(pyccl_engine *engine, peer *p) {
    state_drop_asks(p);
    state_end_fetches(engine, p, PYCCL_ERR_PEER_LOST);
}

void state_fini(pyccl_engine *engine) {
    while (engine->publications != NULL) {
        publication *pub = engine->publications;
        engine->publications = pub->next;
        free(pub);
    }
}

/* ---- the public functions, carried out by the thread ---- */

typedef struct publish_command {
    command command;
    publication *publication;
    uint64_t sync;
} publish_command;

static void run_publish(pyccl_engine *engine, command *c) {
    publication *pub = ((publish_command *)c)->publication;
    c->status = publication_find(engine, pub->sync) != NULL ? PYCCL_ERR_ARGUMENT : PYCCL_OK;
    if (c->status != PYCCL_OK) return;
    pub->next = engine->publications;
    engine->publications = pub;
}

pyccl_status pyccl_state_publish(pyccl_engine *engine, uint64_t sync, const pyccl_region *regions, size_t count) {
    uint64_t total = 0;
    if (count > 0 && regions == NULL) return PYCCL_ERR_ARGUMENT;
    for (size_t i = 0; i < count; i++) {
        if (regions[i].size_bytes > UINT64_MAX - total) return PYCCL_ERR_ARGUMENT;
        if (regions[i].data == NULL && regions[i].size_bytes > 0) return PYCCL_ERR_ARGUMENT;
        total += regions[i].size_bytes;
    }
    if (count > (SIZE_MAX - sizeof(publication)) / sizeof *regions) return PYCCL_ERR_ARGUMENT;
    publication *pub = malloc(sizeof *pub + count * sizeof *regions);
    if (pub == NULL) return PYCCL_ERR_NOMEM;
    *pub = (publication){.owner = OWNER_PUBLICATION, .sync = sync, .size_bytes = total, .count = count};
    if (count > 0) memcpy(pub->regions, regions, count * sizeof *regions);
    publish_command c = {.command = {.run = run_publish}, .publication = pub};
    engine_run(engine, &c.command);
    if (c.command.status != PYCCL_OK) free(pub);
    return c.command.status;
}

static void run_unpublish(pyccl_engine *engine, command *c) {
    publication **at = &engine->publications;
    while (*at != NULL && (*at)->sync != ((publish_command *)c)->sync) at = &(*at)->next;
    c->status = *at != NULL ? PYCCL_OK : PYCCL_ERR_ARGUMENT;
    if (*at == NULL) return;
    publication *pub = *at;
    *at = pub->next;
    for (peer *p = engine->peers; p != NULL; p = p->next) {
        link_disown(&p->link, pub);
        asks_plain(p, pub->sync); /* nobody will pack them now */
    }
    free(pub);
}

pyccl_status pyccl_state_unpublish(pyccl_engine *engine, uint64_t sync) {
    publish_command c = {.command = {.run = run_unpublish}, .sync = sync};
    engine_run(engine, &c.command);
    return c.command.status;
}

typedef struct fetch_command {
    command command;
    uint32_t slot;
    fetch *fetch;
} fetch_command;

static void run_fetch(pyccl_engine *engine, command *c) {
    fetch *f = ((fetch_command *)c)->fetch;
    peer *p = engine_peer(engine, ((fetch_command *)c)->slot);
    if (p == NULL) {
        c->status = PYCCL_ERR_ARGUMENT;
        return;
    }
    f->from = p;
    f->prev = p->fetch_last;
    if (f->prev != NULL) f->prev->next = f;
    else p->fetch_first = f;
    p->fetch_last = f;
    if (p->rank < 0 || p->link.conn_count == 0) fetch_end(engine, p, f, PYCCL_ERR_PEER_LOST);
    else fetches_ask(engine, p);
}

pyccl_status pyccl_state_fetch(pyccl_engine *engine, uint32_t slot, uint64_t sync, uint64_t offset, uint32_t size_bytes,
                               void *dst, uint64_t id, int packed) {
    if (size_bytes == 0 || size_bytes > PYCCL_PIECE_MAX || dst == NULL || offset > UINT64_MAX - size_bytes) return PYCCL_ERR_ARGUMENT;
    fetch *f = malloc(sizeof *f);
    if (f == NULL) return PYCCL_ERR_NOMEM;
    *f = (fetch){.owner = OWNER_FETCH, .id = id, .sync = sync, .offset = offset, .size = size_bytes, .dst = dst,
                 .packed = packed != 0, .packable = packed != 0};
    fetch_command c = {.command = {.run = run_fetch}, .slot = slot, .fetch = f};
    engine_run(engine, &c.command);
    if (c.command.status != PYCCL_OK) free(f);
    return c.command.status;
}

typedef struct cancel_command {
    command command;
    uint64_t id;
} cancel_command;

static void run_cancel(pyccl_engine *engine, command *c) {
    c->status = PYCCL_ERR_ARGUMENT;
    for (peer *p = engine->peers; p != NULL; p = p->next) {
        fetch *f = p->fetch_first;
        while (f != NULL && f->id != ((cancel_command *)c)->id) f = f->next;
        if (f == NULL) continue;
        fetch_end(engine, p, f, PYCCL_ERR_CANCELLED);
        fetches_ask(engine, p); /* its place among those asked is free */
        c->status = PYCCL_OK;
        return;
    }
}

pyccl_status pyccl_state_cancel(pyccl_engine *engine, uint64_t id) {
    cancel_command c = {.command = {.run = run_cancel}, .id = id};
    engine_run(engine, &c.command);
    return c.command.status;
}

static void run_forget(pyccl_engine *engine, command *c) {
    (void)c;
    for (peer *p = engine->peers; p != NULL; p = p->next)
        while (p->fetch_first != NULL) fetch_end(engine, p, p->fetch_first, PYCCL_ERR_CANCELLED);
}

pyccl_status pyccl_state_forget(pyccl_engine *engine) {
    command c = {.run = run_forget};
    engine_run(engine, &c);
    return c.status;
}

typedef struct packed_command {
    command command;
    uint32_t slot;
    ask ask;
} packed_command;

static void run_packed(pyccl_engine *engine, command *c) {
    ask *packed = &((packed_command *)c)->ask;
    peer *p = engine_peer(engine, ((packed_command *)c)->slot);
    c->status = PYCCL_ERR_ARGUMENT;
    if (p != NULL && p->packs_owed > 0) p->packs_owed--;
    for (uint32_t i = 0; p != NULL && i < p->ask_count; i++) {
        ask *queued = &p->asks[(p->ask_head + i) % ASKS_MAX];
        if (!queued->packing || queued->sync != packed->sync || queued->offset != packed->offset || queued->size != packed->size) continue;
        *queued = *packed;
        packed->packed = NULL; /* the queue's now */
        p->link.wants_send = true;
        c->status = PYCCL_OK;
        return;
    }
}

pyccl_status pyccl_state_packed(pyccl_engine *engine, uint32_t slot, uint64_t sync, uint64_t offset, uint32_t size_bytes,
                                const void *data, uint32_t bytes) {
    if (bytes >= size_bytes || (bytes > 0 && data == NULL)) return PYCCL_ERR_ARGUMENT;
    packed_command c = {.command = {.run = run_packed}, .slot = slot,
                        .ask = {.sync = sync, .offset = offset, .size = size_bytes, .packed_bytes = bytes}};
    if (bytes > 0) {
        c.ask.packed = malloc(bytes);
        if (c.ask.packed == NULL) return PYCCL_ERR_NOMEM;
        memcpy(c.ask.packed, data, bytes);
    }
    engine_run(engine, &c.command);
    ask_drop(&c.ask);
    return c.command.status;
}
