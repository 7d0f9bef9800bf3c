/* pace.h: how fast all connections of a long line may send together: what the line has carried while it lost what was too
 * much. A pure machine: counters of TCP and times go in, a rate comes out.
 *
 * Each connection's BBR seeks the line's rate for itself, so that eight of them send more than the line takes and a
 * shallow queue drops the rest, for as long as they are busy. Here windows of a round trip are looked at in which the line had more to
 * send than it took:
 *   more than LOSS_ALLOWED of what was sent were repeats: the rate is what arrived. If that cures nothing in JUDGED
 *       windows and less arrives, the line loses packets whatever is sent: the rate is as before, that share `innocent` for a
 *       while;
 *   no queue stands and the rate is what keeps us: it rises;
 *   a queue stands, by the last rise or because the rate is more than what arrives: less, until it is gone;
 *       Not below what lately left none: then the queue is not ours, our acknowledgements may wait behind what the other end sends;
 *   else a queue stands that may be others': a trial of a little more, kept if so much more arrives and little is lost. It
 *       comes again at once after it paid, else later and later.
 * A spell of work that is too short for such a window is one as a whole: what was repeated of it is known when the next begins, and
 * what arrived in its best part counts, after the last of it was sent too.
 * Until something was too much there is no rate: the kernel's own search is the fastest start. Too much is also a queue that drops
 * nothing, if several links share it and it is longer than the line: results wait behind it. While several links of this host are
 * busy nothing is learned of one of them, but of all together, in the same way, and each has an equal share of that rate.
 * Threads: nothing shared, it belongs to its caller.               Spec: ARCHITECTURE.md, Decisions */
#ifndef PYCCL_PACE_H
#define PYCCL_PACE_H

#include <stdbool.h>
#include <stdint.h>

typedef struct pace_counts {         /* of all connections, since they are there */
    uint64_t delivered;              /* bytes */
    uint64_t sent, repeated;         /* packets, repeats included; of them */
    int64_t rtt_ns, queue_ns;        /* of now: the longest round trip; how much longer the shortest is than the line's own */
} pace_counts;

typedef struct pace {
    struct pace_crowd *crowd;        /* NULL: this is the whole of one */
    struct pace *next;               /* of those in it */
    bool counted, crowded;           /* in it; not alone in it, when it was busy last: a share of `crowd->whole` is in force */
    uint32_t among;                  /* of so many */
    bool known;                      /* `last` is of these connections */
    pace_counts last;
    int64_t noted_ns, mark_ns;       /* when it was noted last; when what arrives is counted from; 0: not yet in this spell */
    uint64_t marked;                 /* had arrived then */
    double arrives;                  /* bytes a second, lately; 0: not known yet */
    double told;                     /* what pace_limit was after the last note */
    double rate;                     /* bytes a second; 0: as fast as they like */
    double peak;                     /* what arrived in the best part of a spell ever: of use until there is a rate */
    double best;                     /* what arrived in the best of the windows since the last change */
    uint32_t deep;                   /* windows, the last of them, with a queue longer than the line while there was no rate */
    uint32_t windows, over;          /* so many; the last of them in which too much was repeated: of one, what arrived may be older */
    double seen;                     /* what arrived before a trial or a cut */
    double before, step;             /* while a trial runs: the rate to go back to, what it adds; before 0: none */
    double raised;                   /* by so much the last time; 0: it has not risen since a queue stood */
    uint32_t drained;                /* times that it was lowered for a queue since there was none */
    double proven;                   /* the highest rate that lately left no queue */
    int64_t proven_ns;               /* until then */
    bool found;                      /* a queue stood since it rose */
    double blamed, restore;          /* after a cut: the share of repeats that it is to cure, the rate that it cut; blamed 0: none */
    uint32_t judged;                 /* windows that it did not cure */
    double innocent;                 /* share of repeats that is not our doing */
    int64_t innocent_ns;             /* until then */
    int64_t calm_ns;                 /* it does not rise before */
    int64_t trial_ns, wait_ns;       /* when the next trial may be; how long after the last */
    bool busy, open;                 /* at the last note; a window has begun */
    bool spell, judged_in;           /* a spell has begun; some window of it was looked at, or the rate changed */
    int64_t spell_ns, last_ns;       /* since then; when it was busy last */
    int64_t lasted_ns;               /* the spell before */
    double spell_best;               /* what arrived in the best part of it */
    int64_t spell_queue_ns;          /* the longest that stood */
    int64_t part_ns;                 /* when the part that is counted began */
    pace_counts at_spell, at_part;
    int64_t from_ns;                 /* no window begins before */
    int64_t start_ns;
    pace_counts start;
} pace;

/* Links of one host whose lines are busy now. Several share its line, and none knows what the others send: paces of their own
 * would only ever yield to who has none. All of them together have one, and each an equal share of it, and of what those leave
 * whose own path is narrower than that. */
typedef struct pace_crowd {
    pace whole;                      /* of all that are busy, while several are */
    pace_counts sum;                 /* of links while they are in company */
    int64_t at_ns;                   /* of the last note */
    pace *first;                     /* of those that are busy */
    uint32_t busy;
    int64_t met_ns;                  /* when several were, the last time: what began before it is judged of none alone; 0: never */
} pace_crowd;

void pace_crowd_init(pace_crowd *crowd);
void pace_init(pace *p, pace_crowd *crowd);
void pace_fini(pace *p);
/* busy: every connection that carries data is full. Returns true when pace_limit has changed, or may have. */
bool pace_note(pace *p, int64_t now_ns, const pace_counts *counts, bool busy);
int64_t pace_lasts(const pace *p, int64_t now_ns, int64_t rtt_ns); /* so long has this spell lasted; 0: none, or it begins now */
double pace_limit(const pace *p);    /* of now, bytes a second; 0: none */
bool pace_is_found(const pace *p);   /* the line, or its connections, take no more */
void pace_pause(pace *p);            /* other connections: counts until now are not comparable with what will be */
/* So many times as many connections carry data: each keeps its share, to show what they bring. */
void pace_widen(pace *p, double factor, int64_t now_ns, int64_t rtt_ns);

#endif
