/* engine_state.c: the state service. Published memory is served to members that ask for parts of it; fetches ask a
 * member and receive straight into the caller's memory.
 *
 * The one who serves keeps a bounded queue of asks per peer and reads the published memory only while it sends. The
 * one who asks keeps at most ASKS_SENT_MAX unanswered; when a connection ends it asks again for all that is not here
 * (the answer or the ask may have been on it), so an ask that is queued already is not queued twice. The other side may
 * notice that end later and still answer over the dead connection: what does not come for REPEAT_NS is asked again too.
 * Invariants: a publication that is gone and a fetch that has ended are borrowed by no connection.
 * Threads: the engine's thread only.                               Spec: proto/wire.md 3, STATE frames */
#include <stdlib.h>
#include <string.h>

#include "engine.h"

#define REPEAT_NS INT64_C(1000000000)

struct publication {
    owner_kind owner;                /* first */
    publication *next;
    uint64_t sync, size_bytes;
    size_t count;
    pyccl_region regions[];
};

typedef enum fetch_state { FETCH_WAITING, FETCH_ASKED, FETCH_ARRIVING } fetch_state;

struct fetch {
    owner_kind owner;                /* first */
    peer *from;
    fetch *prev, *next;
    uint64_t id, sync, offset;
    uint32_t size;
    fetch_state state;
    uint8_t *dst;
};

/* ---- serving ---- */

static publication *publication_find(const pyccl_engine *engine, uint64_t sync) {
    publication *pub = engine->publications;
    while (pub != NULL && pub->sync != sync) pub = pub->next;
    return pub;
}

link_verdict state_asked(pyccl_engine *engine, peer *p, const pyccl_frame *frame) {
    (void)engine;
    const ask wanted = {.sync = frame->seq, .offset = frame->offset, .size = (uint32_t)frame->value};
    for (uint32_t i = 0; i < p->ask_count; i++) {
        const ask *queued = &p->asks[(p->ask_head + i) % ASKS_MAX];
        if (queued->sync == wanted.sync && queued->offset == wanted.offset && queued->size == wanted.size) return LINK_GO;
    }
    if (p->ask_count == ASKS_MAX) return LINK_REFUSE;
    if (p->asks == NULL) p->asks = malloc(ASKS_MAX * sizeof *p->asks);
    if (p->asks == NULL) return LINK_REFUSE;
    p->asks[(p->ask_head + p->ask_count++) % ASKS_MAX] = wanted;
    p->link.wants_send = true;
    return LINK_GO;
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
    if (p->ask_count == 0 || p->rank < 0) return false;
    const ask wanted = p->asks[p->ask_head];
    p->ask_head = (p->ask_head + 1) % ASKS_MAX;
    p->ask_count--;
    const publication *pub = publication_find(engine, wanted.sync);
    load->frame = (pyccl_frame){.type = PYCCL_FRAME_STATE_DATA, .seq = wanted.sync, .offset = wanted.offset, .length = wanted.size};
    if (pub == NULL || !published_bytes(pub, &wanted, load)) {
        load->frame.type = PYCCL_FRAME_STATE_NONE;
        load->frame.length = 0;
    }
    engine_frame_stamp(engine, &load->frame);
    return true;
}

/* ---- fetching ---- */

static void fetch_unlink(peer *p, fetch *f) {
    if (f->state != FETCH_WAITING) p->asked--;
    if (f->prev != NULL) f->prev->next = f->next;
    else p->fetch_first = f->next;
    if (f->next != NULL) f->next->prev = f->prev;
    else p->fetch_last = f->prev;
}

/* After this nothing writes to its memory. */
static void fetch_end(pyccl_engine *engine, peer *p, fetch *f, pyccl_status status, bool tell) {
    if (f->state == FETCH_ARRIVING) link_disown(&p->link, f);
    fetch_unlink(p, f);
    const pyccl_event event = {.type = PYCCL_EVENT_STATE, .slot = p->link.slot, .code = status, .value = f->id};
    if (tell) engine_event(engine, &event);
    free(f);
}

static void fetches_ask(pyccl_engine *engine, peer *p) {
    p->fetch_ns = engine->env.now_ns;
    for (fetch *f = p->fetch_first; f != NULL && p->asked < ASKS_SENT_MAX; f = f->next) {
        if (f->state != FETCH_WAITING) continue;
        f->state = FETCH_ASKED;
        p->asked++;
        pyccl_frame frame = {.type = PYCCL_FRAME_STATE_ASK, .seq = f->sync, .offset = f->offset, .value = f->size};
        engine_frame_stamp(engine, &frame);
        link_control_push(&p->link, &frame, NULL);
    }
}

static fetch *fetch_find(const peer *p, const pyccl_frame *frame) {
    fetch *f = p->fetch_first;
    while (f != NULL && (f->sync != frame->seq || f->offset != frame->offset || f->state == FETCH_WAITING)) f = f->next;
    return f;
}

link_verdict state_data_begin(pyccl_engine *engine, peer *p, pyccl_conn *conn) {
    (void)engine;
    fetch *f = fetch_find(p, &conn->frame);
    if (f == NULL) return LINK_GO; /* forgotten here, or a repetition: discarded */
    if (conn->frame.length != f->size) return LINK_REFUSE;
    if (f->state == FETCH_ARRIVING) return LINK_GO; /* if that one dies we ask again */
    f->state = FETCH_ARRIVING;
    conn->sink = (link_sink){.kind = SINK_FETCH, .dst = f->dst, .owner = f, .note = f};
    return LINK_GO;
}

void state_data_end(pyccl_engine *engine, peer *p, pyccl_conn *conn) {
    fetch *f = conn->sink.note;
    conn->sink = (link_sink){.kind = SINK_NONE};
    fetch_end(engine, p, f, PYCCL_OK, true);
    fetches_ask(engine, p);
}

void state_data_cancel(pyccl_conn *conn) {
    fetch *f = conn->sink.note;
    f->state = FETCH_ASKED;
}

void state_none(pyccl_engine *engine, peer *p, const pyccl_frame *frame) {
    fetch *f = fetch_find(p, frame);
    if (f == NULL || f->state == FETCH_ARRIVING) return;
    fetch_end(engine, p, f, PYCCL_ERR_ARGUMENT, true);
    fetches_ask(engine, p);
}

void state_end_fetches(pyccl_engine *engine, peer *p, pyccl_status status) {
    while (p->fetch_first != NULL) fetch_end(engine, p, p->fetch_first, status, true);
}

void state_moved(pyccl_engine *engine, const fetch *f) { f->from->fetch_ns = engine->env.now_ns; }

static void ask_again(pyccl_engine *engine, peer *p) {
    for (fetch *f = p->fetch_first; f != NULL; f = f->next) {
        if (f->state != FETCH_ASKED) continue;
        f->state = FETCH_WAITING;
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
    p->ask_count = p->ask_head = 0;
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
    for (peer *p = engine->peers; p != NULL; p = p->next) link_disown(&p->link, pub);
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
    if (p->rank < 0 || p->link.conn_count == 0) fetch_end(engine, p, f, PYCCL_ERR_PEER_LOST, true);
    else fetches_ask(engine, p);
}

pyccl_status pyccl_state_fetch(pyccl_engine *engine, uint32_t slot, uint64_t sync, uint64_t offset, uint32_t size_bytes,
                               void *dst, uint64_t id) {
    if (size_bytes == 0 || size_bytes > PYCCL_PIECE_MAX || dst == NULL || offset > UINT64_MAX - size_bytes) return PYCCL_ERR_ARGUMENT;
    fetch *f = malloc(sizeof *f);
    if (f == NULL) return PYCCL_ERR_NOMEM;
    *f = (fetch){.owner = OWNER_FETCH, .id = id, .sync = sync, .offset = offset, .size = size_bytes, .dst = dst};
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
        fetch_end(engine, p, f, PYCCL_ERR_CANCELLED, false);
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
        while (p->fetch_first != NULL) fetch_end(engine, p, p->fetch_first, PYCCL_ERR_CANCELLED, false);
}

pyccl_status pyccl_state_forget(pyccl_engine *engine) {
    command c = {.run = run_forget};
    engine_run(engine, &c);
    return c.status;
}
