/* pace.c: see pace.h.                                              Spec: ARCHITECTURE.md, Decisions */
#include "pace.h"

#include <stddef.h>

#define LOSS_ALLOWED 0.02
#define MUCH 0.15                    /* the line has become slower: what arrived before says nothing */
#define CURED 0.7                    /* of the share of repeats: a cut that leaves more has not helped */
#define JUDGED 3
#define INNOCENT_NS INT64_C(30000000000)
#define PACKETS_MIN 50               /* in a window: fewer say nothing of a share of repeats, and it goes on */
#define PACKETS_FEW 10               /* where nothing was repeated: a rate too low must rise, however little is sent then */
#define WINDOW_MIN_NS INT64_C(50000000)
#define WINDOW_LONGER 32             /* at most */
#define WINDOW_LONGER_LOSSY 8        /* where something was repeated */
#define SETTLE_RTTS 2                /* what was lost before a change is repeated for so long */
#define BOUND 0.85                   /* of the rate arrives: nothing else limits it */
#define RAISE 0.05                   /* at first */
#define RAISE_GROWS 1.25
#define RAISE_GROWS_SPELL 2.0        /* by one in an operation it would take a dozen of them to double */
#define CALM_NS INT64_C(1000000000)  /* after the queue of a rise */
#define STEP 0.1
#define STEP_MAX 0.4
#define STEP_GROWS 1.5
#define PAID 0.5                     /* of a trial's step, that arrives in addition */
#define WIDEN_RTTS 6                 /* new connections begin slowly */
#define OVER 1.04                    /* of what arrives */
#define UNDER 0.98                   /* so that the queue goes, slowly */
#define OVER_WINDOWS 3
#define DRAINS 3
#define DRAIN_MOST 0.95              /* is left */
#define PEAK_MOST 0.8                /* is left of what once arrived, when there was no rate: the line has carried that */
#define CUT_MOST 0.5                 /* is left: what arrived may be little because others of this host fill the line */
#define PROVEN 0.97                  /* of the rate arrives, and no queue stands: the line takes it */
#define PROVEN_LEFT 0.95             /* of it leaves no queue behind */
#define PROVEN_NS INT64_C(30000000000)
#define STANDS_NS INT64_C(10000000)  /* a queue of so long, and of this part of a round trip */
#define STANDS_RTTS 16
#define DEEP_WINDOWS 3
#define DEEP_BYTES 150e3             /* of the line's own round trip: a few packets of each connection are a queue in less */
#define DEEP_SHARE 0.5               /* of it is ours: the rest may be the other end's */
#define DEEP_LEFT 0.7                /* of the rate, at least, while it goes */
#define WAIT_MIN_NS INT64_C(1000000000)
#define WAIT_MAX_NS INT64_C(16000000000)
#define RATE_MIN 16384.0
#define NARROW_RTTS 3                /* of a spell: before it connections begin */
#define NARROW_ROOM 1.25             /* of what arrives: it may become more */
#define STALE_RTTS 4
#define STALE_NS INT64_C(100000000)
#define SPELL_RTTS 2                 /* of rest end a spell: what was lost in it has been repeated */
#define SPELL_LOSS_ALLOWED 0.005     /* what its last packets lose costs a round trip and more */
#define SPELL_PACKETS_MIN 100
#define SPELL_PACKETS_MANY 500       /* of fewer a loss or two say nothing */
#define SPELL_PARTS 1.5              /* what arrived took so many: the line was full, and what its best part had was the line's doing */
#define PART_RTTS 2                  /* in a round trip */
#define PART_MIN_NS INT64_C(40000000)

void pace_init(pace *p, pace_crowd *crowd) { *p = (pace){.crowd = crowd, .wait_ns = WAIT_MIN_NS}; }

void pace_crowd_init(pace_crowd *crowd) {
    *crowd = (pace_crowd){0};
    pace_init(&crowd->whole, NULL);
}

/* Nothing has moved there, or nobody had a look. */
static bool is_stale(const pace *p) { return p->crowd->at_ns - p->noted_ns > STALE_RTTS * p->last.rtt_ns + STALE_NS; }

/* Its own path, or who receives, takes less than an equal share. */
static bool is_narrow(const pace *p, double equal) { return is_stale(p) || (p->arrives > 0 && p->arrives < BOUND * equal); }

double pace_limit(const pace *p) {
    if (!p->crowded) return p->rate;
    const double rate = p->crowd->whole.rate, equal = rate / p->among;
    if (!p->counted || is_narrow(p, equal)) return equal;
    double left = rate;
    uint32_t others = p->among > p->crowd->busy ? p->among - p->crowd->busy : 0; /* may be about to begin */
    for (const pace *of = p->crowd->first; of != NULL; of = of->next) {
        if (!is_narrow(of, equal)) others++;
        else if (!is_stale(of)) left -= NARROW_ROOM * of->arrives < equal ? NARROW_ROOM * of->arrives : equal;
    }
    return left / others;
}

bool pace_is_found(const pace *p) {
    const pace *judged = p->crowded ? &p->crowd->whole : p;
    return judged->rate == 0 || (judged->found && judged->before == 0 && judged->blamed == 0);
}

static bool stands(const pace_counts *c) { return c->queue_ns > STANDS_NS + c->rtt_ns / STANDS_RTTS; }

/* Longer than the line itself. What a link alone sends waits there without harm: mostly nothing comes back that depends on it. */
static bool is_deep(const pace *p, const pace_counts *c) {
    const double own_ns = (double)(c->rtt_ns - c->queue_ns);
    return p->crowd == NULL && stands(c) && (double)c->queue_ns > own_ns && p->best * own_ns / 1e9 >= DEEP_BYTES;
}

static void crowd_leave(pace *p) {
    if (!p->counted) return;
    pace **at = &p->crowd->first;
    while (*at != p) at = &(*at)->next;
    *at = p->next;
    p->crowd->busy--;
    p->counted = false;
}

static void crowd_enter(pace *p) {
    p->next = p->crowd->first;
    p->crowd->first = p;
    p->crowd->busy++;
    p->counted = true;
}

void pace_fini(pace *p) { crowd_leave(p); }

void pace_pause(pace *p) {
    crowd_leave(p);
    p->busy = p->open = p->spell = p->known = false;
}

static void rate_set(pace *p, double rate, int64_t now_ns, int64_t rtt_ns) {
    p->rate = rate < RATE_MIN ? RATE_MIN : rate;
    p->from_ns = now_ns + SETTLE_RTTS * rtt_ns;
    p->best = 0;
    p->windows = p->over = 0;
    p->open = false;
    p->judged_in = true;
}

/* ---- trials ---- */

static void trial_begin(pace *p, double arrived, double step, int64_t now_ns, int64_t rtt_ns) {
    p->before = p->rate;
    p->seen = arrived;
    p->step = step;
    rate_set(p, p->rate * (1 + step), now_ns, rtt_ns);
}

static void trial_fail(pace *p, int64_t now_ns, int64_t rtt_ns) {
    const double before = p->before;
    p->before = 0;
    p->trial_ns = now_ns + p->wait_ns;
    p->wait_ns = 2 * p->wait_ns < WAIT_MAX_NS ? 2 * p->wait_ns : WAIT_MAX_NS;
    rate_set(p, before, now_ns, rtt_ns);
}

static void trial_paid(pace *p, double arrived, int64_t now_ns, int64_t rtt_ns) {
    const double more = p->step * STEP_GROWS;
    p->wait_ns = WAIT_MIN_NS;
    trial_begin(p, arrived, more < STEP_MAX ? more : STEP_MAX, now_ns, rtt_ns);
}

void pace_widen(pace *p, double factor, int64_t now_ns, int64_t rtt_ns) {
    if (p->crowded) { /* its part of what all have */
        pace_widen(&p->crowd->whole, 1 + (factor - 1) / p->among, now_ns, rtt_ns);
        return;
    }
    if (p->rate == 0) return;
    const double rate = p->before > 0 ? p->before : p->rate;
    p->before = p->blamed = 0;
    p->raised = (1 + p->raised) * factor - 1;
    rate_set(p, rate * factor, now_ns, rtt_ns);
    p->from_ns = now_ns + WIDEN_RTTS * rtt_ns;
}

/* ---- cuts ---- */

static void cut(pace *p, double arrived, double repeats, int64_t now_ns, int64_t rtt_ns) {
    const double most = p->rate * (1 - (repeats - p->innocent) / 2);
    if (p->blamed == 0) p->restore = p->rate;
    p->blamed = repeats;
    p->seen = arrived;
    p->judged = 0;
    p->raised = p->proven = 0;
    p->calm_ns = now_ns + CALM_NS;
    p->wait_ns = WAIT_MIN_NS;
    p->trial_ns = now_ns + p->wait_ns;
    const double rate = UNDER * (p->rate > 0 && most < arrived ? most : arrived), least = p->rate > 0 ? CUT_MOST * p->rate : PEAK_MOST * p->peak;
    rate_set(p, rate > least ? rate : least, now_ns, rtt_ns);
}

/* Repeats go on after a cut. What is too much for a line is lost there, and as much arrives as before. */
static void judge(pace *p, double arrived, double repeats, int64_t now_ns, int64_t rtt_ns) {
    if (repeats < CURED * p->blamed) {
        cut(p, arrived, repeats, now_ns, rtt_ns);
        return;
    }
    if (++p->judged < JUDGED) return;
    if (p->best > p->seen * (1 - p->blamed / 2)) {
        cut(p, p->best, repeats, now_ns, rtt_ns);
        return;
    }
    p->innocent = repeats;
    p->innocent_ns = now_ns + INNOCENT_NS;
    p->blamed = 0;
    p->rate = p->restore;
    p->best = 0;
}

/* ---- windows ---- */

static int64_t window_ns(const pace_counts *c) { return c->rtt_ns > WINDOW_MIN_NS ? c->rtt_ns : WINDOW_MIN_NS; }

/* A queue that stands though a higher rate made none a moment ago is not of our doing: it may be what the other end sends,
 * which our acknowledgements wait behind. */
static bool is_proven(const pace *p, int64_t now_ns) { return p->rate <= PROVEN_LEFT * p->proven && now_ns < p->proven_ns; }

static void prove(pace *p, double arrived, int64_t now_ns) {
    if (arrived < PROVEN * p->rate || (now_ns < p->proven_ns && p->rate < p->proven)) return;
    p->proven = p->rate;
    p->proven_ns = now_ns + PROVEN_NS;
}

/* Without a queue the line is not full. */
static void rise(pace *p, double arrived, int64_t now_ns, int64_t rtt_ns) {
    p->found = false;
    p->drained = 0;
    if (arrived < BOUND * p->rate || now_ns < p->calm_ns) return;
    const double more = p->raised * (p->judged_in ? RAISE_GROWS : RAISE_GROWS_SPELL);
    p->raised = more < RAISE ? RAISE : more < STEP_MAX ? more : STEP_MAX;
    rate_set(p, p->rate * (1 + p->raised), now_ns, rtt_ns);
}

/* Of what arrives, so that our part of the queue is gone after CALM_NS. */
static double emptying(const pace_counts *c) {
    const double left = 1 - DEEP_SHARE * (double)c->queue_ns / (double)CALM_NS;
    return left > DEEP_LEFT ? left : DEEP_LEFT;
}

/* To what was before the first step up, or below what arrives; as nothing is lost, not far below what was before the step: one
 * window may have little for other reasons. The queue may be others': it is waited for DRAINS times. A deep one is emptied at once,
 * and nothing is judged meanwhile. */
static void drain(pace *p, int64_t now_ns, const pace_counts *c) {
    const bool deep = is_deep(p, c);
    const double before = p->rate / (1 + p->raised), arrives = (deep ? emptying(c) : UNDER) * (p->best < p->rate ? p->best : p->rate);
    const double least = (deep ? DEEP_LEFT : DRAIN_MOST) * before;
    const double below = arrives > least ? arrives : least;
    const bool back = !deep && p->raised > 0 && p->raised <= RAISE;
    p->raised = 0;
    p->drained++;
    p->calm_ns = now_ns + CALM_NS;
    p->trial_ns = now_ns + p->wait_ns;
    rate_set(p, back ? before : below, now_ns, c->rtt_ns);
    if (deep) p->from_ns = p->calm_ns;
}

/* A queue that drops nothing, but each result waits behind it: as too much as what is lost. */
static void search(pace *p, int64_t now_ns, const pace_counts *c) {
    p->deep = is_deep(p, c) ? p->deep + 1 : 0;
    if (p->deep < DEEP_WINDOWS) return;
    p->deep = 0;
    p->found = true;
    p->rate = p->best;
    drain(p, now_ns, c);
}

static void window_end(pace *p, int64_t now_ns, double arrived, double repeats, double allowed, const pace_counts *c) {
    if (repeats < p->innocent) p->innocent = repeats;
    if (now_ns >= p->innocent_ns) p->innocent = 0;
    p->best = arrived > p->best ? arrived : p->best;
    p->windows++;
    if (repeats > p->innocent + allowed) {
        if (p->before > 0) trial_fail(p, now_ns, c->rtt_ns);
        else if (p->blamed > 0) judge(p, arrived, repeats, now_ns, c->rtt_ns);
        else if (++p->over > 1) cut(p, repeats > MUCH && p->rate > 0 ? arrived : p->best, repeats, now_ns, c->rtt_ns);
        return;
    }
    p->over = 0;
    p->blamed = 0;
    if (p->rate == 0) {
        search(p, now_ns, c);
        return;
    }
    if (p->before > 0) {
        if (arrived >= p->seen * (1 + PAID * p->step)) trial_paid(p, arrived, now_ns, c->rtt_ns);
        else trial_fail(p, now_ns, c->rtt_ns);
        return;
    }
    if (!stands(c)) {
        prove(p, arrived, now_ns);
        rise(p, arrived, now_ns, c->rtt_ns);
        return;
    }
    p->found = true;
    const bool lasts = p->windows >= OVER_WINDOWS;
    if (lasts && p->best < BOUND * p->rate) p->proven = 0; /* the line has become slower */
    const bool ours = lasts && !is_proven(p, now_ns) && (p->drained < DRAINS || p->rate > OVER * p->best);
    if (p->raised > 0 || ours) drain(p, now_ns, c);
    else if (now_ns >= p->trial_ns && arrived >= BOUND * p->rate) trial_begin(p, arrived, STEP, now_ns, c->rtt_ns);
}

/* ---- spells ---- */

static int64_t part_ns(const pace_counts *c) {
    const int64_t part = c->rtt_ns / PART_RTTS;
    return part > PART_MIN_NS ? part : PART_MIN_NS;
}

/* Several links were busy then: what is lost and waits is not of this one alone. */
static bool was_met(const pace *p, int64_t from_ns) { return p->crowd != NULL && p->crowd->met_ns >= from_ns; }

static void spell_end(pace *p, int64_t now_ns, const pace_counts *c) {
    const pace_counts *was = &p->at_spell, whole = {.rtt_ns = c->rtt_ns, .queue_ns = p->spell_queue_ns};
    const uint64_t sent = c->sent > was->sent ? c->sent - was->sent : 0;
    const double parts_s = SPELL_PARTS * (double)part_ns(c) / 1e9;
    p->spell = false;
    p->mark_ns = 0;
    p->arrives = 0;
    p->lasted_ns = p->last_ns - p->spell_ns;
    const bool shared = p->crowded; /* what arrived is what its share let through */
    if (!was_met(p, p->spell_ns)) p->crowded = false; /* nobody came */
    if (shared || p->judged_in || was_met(p, p->spell_ns) || sent < SPELL_PACKETS_MIN || c->delivered < was->delivered || c->repeated < was->repeated) return;
    if ((double)(c->delivered - was->delivered) < p->spell_best * parts_s) return;
    p->over = 1; /* it is known when what was repeated was sent */
    p->best = 0;
    const double allowed = sent < SPELL_PACKETS_MANY ? LOSS_ALLOWED : SPELL_LOSS_ALLOWED;
    window_end(p, now_ns, p->spell_best, (double)(c->repeated - was->repeated) / (double)sent, allowed, &whole);
}

static void spell_begin(pace *p, int64_t now_ns, const pace_counts *c) {
    p->spell = true;
    p->judged_in = false;
    p->spell_ns = p->part_ns = now_ns;
    p->at_spell = p->at_part = *c;
    p->spell_best = 0;
    p->spell_queue_ns = 0;
}

static void spell_part(pace *p, int64_t now_ns, const pace_counts *c) {
    if (c->queue_ns > p->spell_queue_ns) p->spell_queue_ns = c->queue_ns;
    if (now_ns - p->part_ns < part_ns(c) || c->delivered < p->at_part.delivered) return;
    const double arrived = (double)(c->delivered - p->at_part.delivered) / ((double)(now_ns - p->part_ns) / 1e9);
    if (arrived > p->spell_best) p->spell_best = arrived;
    if (arrived > p->peak && !p->crowded) p->peak = arrived;
    p->part_ns = now_ns;
    p->at_part = *c;
}

int64_t pace_lasts(const pace *p, int64_t now_ns, int64_t rtt_ns) {
    return p->spell && now_ns < p->last_ns + SPELL_RTTS * rtt_ns ? now_ns - p->spell_ns : 0;
}

static void spell_note(pace *p, int64_t now_ns, const pace_counts *c, bool busy) {
    if (p->spell && now_ns >= p->last_ns + SPELL_RTTS * c->rtt_ns) spell_end(p, now_ns, c);
    if (!p->spell && busy) spell_begin(p, now_ns, c);
    if (p->spell) spell_part(p, now_ns, c);
    if (busy) p->last_ns = now_ns;
}

static void window_note(pace *p, int64_t now_ns, const pace_counts *c, bool busy) {
    if (busy && !p->busy && p->from_ns < now_ns + c->rtt_ns) p->from_ns = now_ns + c->rtt_ns; /* nothing of this spell arrives before */
    if (busy != p->busy) p->open = false;
    p->busy = busy;
    if (!busy || now_ns < p->from_ns) return;
    const int64_t length = window_ns(c);
    const bool lossless = c->repeated == p->start.repeated;
    const uint64_t packets = p->start.sent + (lossless ? PACKETS_FEW : PACKETS_MIN);
    const int64_t longest = (lossless ? WINDOW_LONGER : WINDOW_LONGER_LOSSY) * length;
    if (p->open && now_ns - p->start_ns < (c->sent < packets ? longest : length)) return;
    const pace_counts was = p->start;
    const double seconds = (double)(now_ns - p->start_ns) / 1e9;
    const bool whole = p->open && !was_met(p, p->start_ns);
    p->open = true;
    p->start_ns = now_ns;
    p->start = *c;
    if (!whole || c->sent < packets || c->delivered < was.delivered || c->repeated < was.repeated) return;
    const double repeats = (double)(c->repeated - was.repeated) / (double)(c->sent - was.sent);
    p->judged_in = true;
    window_end(p, now_ns, (double)(c->delivered - was.delivered) / seconds, repeats, LOSS_ALLOWED, c);
}

/* Beside other links that are busy: their loss and queue are not this one's doing. Those that were busy at the same time will be
 * again: who begins alone waits for them for a round trip. */
static void crowd_note(pace *p, int64_t now_ns, const pace_counts *c, bool busy) {
    const bool was = p->crowded;
    crowd_leave(p);
    if (busy) {
        crowd_enter(p);
        if (p->crowd->busy > 1) {
            p->crowded = true;
            p->among = p->crowd->busy;
            p->crowd->met_ns = now_ns;
        } else if (now_ns >= p->spell_ns + c->rtt_ns) p->crowded = false;
    }
    if (p->crowded) {
        p->open = false;
        p->busy = busy;
    } else if (was) p->from_ns = now_ns + SETTLE_RTTS * c->rtt_ns;
}

/* Whether what it loses says nothing of the line that all share: its own path is full, which others' are not. */
static bool is_apart(const pace *p) {
    const double equal = p->crowd->whole.rate / p->among;
    if (!p->counted || !is_narrow(p, equal)) return false;
    for (const pace *of = p->crowd->first; of != NULL; of = of->next)
        if (!is_narrow(of, equal)) return true;
    return false;
}

static void arrives_note(pace *p, int64_t now_ns, const pace_counts *c) {
    if (now_ns < p->spell_ns + NARROW_RTTS * c->rtt_ns || (p->mark_ns > 0 && now_ns - p->mark_ns < window_ns(c))) return;
    if (p->mark_ns > 0 && c->delivered >= p->marked && p->busy)
        p->arrives = (double)(c->delivered - p->marked) / ((double)(now_ns - p->mark_ns) / 1e9);
    p->mark_ns = now_ns;
    p->marked = c->delivered;
}

/* What this link has done since its last note is done by all of them together. A queue stands in the line that they share if
 * it does for each. What arrived before it began to work came at other times than theirs. */
static void crowd_sum(pace *p, int64_t now_ns, const pace_counts *c) {
    pace_counts *sum = &p->crowd->sum;
    if (p->crowded && p->known && c->delivered >= p->last.delivered && c->sent >= p->last.sent && c->repeated >= p->last.repeated) {
        if (p->spell_ns < now_ns) sum->delivered += c->delivered - p->last.delivered;
        if (!is_apart(p)) {
            sum->sent += c->sent - p->last.sent;
            sum->repeated += c->repeated - p->last.repeated;
        }
    }
    p->known = true;
    p->last = *c;
    p->noted_ns = p->crowd->at_ns = now_ns;
    if (p->spell) arrives_note(p, now_ns, c);
    if (p->crowd->first == NULL) return;
    sum->rtt_ns = c->rtt_ns;
    sum->queue_ns = INT64_MAX;
    for (const pace *of = p->crowd->first; of != NULL; of = of->next) {
        if (is_stale(of)) continue;
        if (of->last.rtt_ns > sum->rtt_ns) sum->rtt_ns = of->last.rtt_ns;
        if (of->last.queue_ns < sum->queue_ns) sum->queue_ns = of->last.queue_ns;
    }
}

bool pace_note(pace *p, int64_t now_ns, const pace_counts *c, bool busy) {
    pace *whole = &p->crowd->whole;
    spell_note(p, now_ns, c, busy);
    crowd_note(p, now_ns, c, busy);
    if (!p->crowded) window_note(p, now_ns, c, busy);
    crowd_sum(p, now_ns, c);
    const bool several = p->crowd->busy > 1;
    spell_note(whole, now_ns, &p->crowd->sum, several);
    window_note(whole, now_ns, &p->crowd->sum, several);
    const double told = p->told;
    p->told = pace_limit(p);
    return p->told != told;
}
