/* engine_early.c: pieces of operations that a peer has submitted and we have not.
 *
 * A peer may send PYCCL_EAGER_MAX bytes of such pieces. They are kept until the operation starts here (then they are
 * delivered as if they had just arrived) or the epoch ends. A piece that is still arriving when its operation starts
 * is delivered when it is whole.
 * Invariant: peer->early_bytes counts what is kept and counted, no more than PYCCL_EAGER_MAX; it goes back when the
 * operation starts, before our OPEN leaves, so that it is never above what the sender counts.
 * Threads: the engine's thread only.                               Spec: proto/wire.md 3.5 */
#include <stdlib.h>
#include <string.h>

#include "engine.h"

struct early_piece {
    early_piece *next;               /* in its bucket */
    peer *from;
    pyccl_frame frame;
    uint8_t *data;                   /* piece_alloc(frame.length); a connection writes it until `whole` */
    bool whole, counted;
};

static early_piece **bucket_of(pyccl_engine *engine, uint8_t space, uint32_t tag, uint64_t seq) {
    const uint64_t mixed = (((uint64_t)space << 32 | tag) * UINT64_C(0x9E3779B97F4A7C15)) ^ (seq * UINT64_C(0xC2B2AE3D27D4EB4F));
    return &engine->early[(mixed >> 32) % EARLY_BUCKETS];
}

static early_piece **bucket_of_frame(pyccl_engine *engine, const pyccl_frame *frame) {
    return bucket_of(engine, frame->space, frame->tag, frame->seq);
}

static void uncount(early_piece *piece) {
    if (!piece->counted) return;
    piece->counted = false;
    piece->from->early_bytes -= piece->frame.length;
}

static void early_free(pyccl_engine *engine, early_piece *piece) {
    uncount(piece);
    piece->from->early_count--;
    piece_free(engine, piece->data, piece->frame.length);
    free(piece);
}

static void unlink_piece(pyccl_engine *engine, const early_piece *piece) {
    early_piece **at = bucket_of_frame(engine, &piece->frame);
    while (*at != piece) at = &(*at)->next;
    *at = piece->next;
}

static bool same_piece(const early_piece *piece, const peer *from, const pyccl_frame *frame) {
    return piece->from == from && piece->frame.seq == frame->seq && piece->frame.tag == frame->tag &&
           piece->frame.space == frame->space && piece->frame.phase == frame->phase && piece->frame.offset == frame->offset;
}

link_verdict early_begin(pyccl_engine *engine, peer *p, pyccl_conn *conn) {
    const pyccl_frame *frame = &conn->frame;
    early_piece **bucket = bucket_of_frame(engine, frame);
    bool repeated = false; /* it is arriving on another connection, which may be a dead one: keep both */
    for (const early_piece *piece = *bucket; piece != NULL; piece = piece->next) {
        if (!same_piece(piece, p, frame)) continue;
        if (piece->whole) return LINK_GO; /* discarded */
        repeated = true;
    }
    if (p->early_count >= EARLY_PIECES_MAX) return LINK_REFUSE;
    if (!repeated && p->early_bytes + frame->length > PYCCL_EAGER_MAX) return LINK_REFUSE;
    early_piece *piece = calloc(1, sizeof *piece);
    uint8_t *data = piece_alloc(engine, frame->length);
    if (piece == NULL || data == NULL) { /* it will not be sent again: better lose the link than wait for ever */
        free(piece);
        free(data);
        return LINK_REFUSE;
    }
    *piece = (early_piece){.next = *bucket, .from = p, .frame = *frame, .data = data, .counted = !repeated};
    *bucket = piece;
    p->early_count++;
    if (piece->counted) p->early_bytes += frame->length;
    conn->sink = (link_sink){.kind = SINK_EARLY, .dst = data, .note = piece};
    return LINK_GO;
}

/* op: the operation, if it runs here by now; else NULL. */
link_verdict early_end(pyccl_engine *engine, peer *p, pyccl_conn *conn, pyccl_op *op) {
    early_piece *piece = conn->sink.note;
    conn->sink = (link_sink){.kind = SINK_NONE};
    piece->whole = true;
    if (op == NULL || op->attempt == NULL) return LINK_GO; /* a second whole copy does no harm: it is delivered once */
    const bool fits = ops_deliver(engine, p, op, &piece->frame, &piece->data);
    unlink_piece(engine, piece);
    early_free(engine, piece);
    return fits ? LINK_GO : LINK_REFUSE;
}

void early_cancel(pyccl_engine *engine, pyccl_conn *conn) {
    early_piece *piece = conn->sink.note;
    conn->sink = (link_sink){.kind = SINK_NONE};
    conn->at = NULL;
    unlink_piece(engine, piece);
    early_free(engine, piece);
}

/* Take one whole piece of the operation out of the bucket, and give back what the operation was counted for. partner: who
 * sends it, in an exchange; other pairs have the same space, tags and numbers. */
static early_piece *take_whole(early_piece **bucket, const pyccl_spec *spec, uint64_t seq, const peer *partner) {
    early_piece *found = NULL;
    for (early_piece **at = bucket; *at != NULL;) {
        early_piece *piece = *at;
        const bool ours = piece->frame.seq == seq && piece->frame.tag == spec->tag && piece->frame.space == spec->space &&
                          (spec->space != PYCCL_SPACE_PAIR || piece->from == partner);
        if (ours) uncount(piece);
        if (ours && piece->whole && found == NULL) {
            *at = piece->next;
            found = piece;
        } else at = &piece->next;
    }
    return found;
}

void early_replay(pyccl_engine *engine, pyccl_op *op, uint64_t seq) {
    early_piece **bucket = bucket_of(engine, op->args.spec.space, op->args.spec.tag, seq);
    const peer *partner = engine->ranks[op->attempt->schedule.root];
    early_piece *piece;
    while ((piece = take_whole(bucket, &op->args.spec, seq, partner)) != NULL) {
        peer *from = piece->from;
        const bool fits = from->rank < 0 || ops_deliver(engine, from, op, &piece->frame, &piece->data);
        early_free(engine, piece);
        if (!fits) engine_refuse(engine, from);
    }
}

/* Connections that are writing a piece must have been taken off it: see engine_forget_epoch, engine_close_links. */
static void clear_from(pyccl_engine *engine, const peer *from) {
    for (int i = 0; i < EARLY_BUCKETS; i++)
        for (early_piece **at = &engine->early[i]; *at != NULL;) {
            early_piece *piece = *at;
            if (from != NULL && piece->from != from) {
                at = &piece->next;
                continue;
            }
            *at = piece->next;
            early_free(engine, piece);
        }
}

void early_clear(pyccl_engine *engine) { clear_from(engine, NULL); }
void early_clear_peer(pyccl_engine *engine, const peer *p) {
    if (p->early_count > 0) clear_from(engine, p);
}
