/* link.h: one peer is one link, a link is up to PYCCL_CONNS_MAX connected stream sockets that share its frames.
 *
 * Moves bytes and cuts them into frames; what a frame means is the engine's (link_hooks). Control frames wait in one
 * FIFO per link and go before data; data is not queued but taken from load_next() when a connection has room, so that
 * whichever connection drains fastest carries most. EPOLLOUT is armed only while a send came back short.
 * Bytes go through a `link_transport`: the plain one is TCP as it is, the other one seals them (seal.h).
 *
 * Invariants
 *  - memory that is not the link's own (load.data, sink.dst) is marked with its owner; after link_disown(owner) no
 *    connection reads or writes it: half-sent frames go on from a private copy, half-received ones are discarded;
 *  - a connection that is down keeps its structure until link_bury(), so a batch of epoll events may name it safely;
 *  - hooks may close any connection; loops here look at `fd` again after each hook;
 *  - where a rate is capped: a link that had to stop is `starved`, a connection that may not read is `held`, and env's
 *    tx_due or rx_due says when they go on (link_feed). Control frames never wait for a cap.
 * Threads: the engine's thread only.                               Spec: proto/wire.md 1, 3 */
#ifndef PYCCL_LINK_H
#define PYCCL_LINK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "../include/pyccl.h"
#include "lanes.h"
#include "pace.h"
#include "seal.h"
#include "throttle.h"

#define LINK_STAGE_BYTES 4096        /* received ahead of the payload that is expected */
#define LINK_HEAD_BYTES 4096         /* headers and small payloads that leave in one send */
#define LINK_INLINE_MAX 1024         /* payloads up to this are copied beside their header */
#define LINK_SINK_BYTES 65536        /* what is discarded is read into this much memory */

typedef struct pyccl_conn pyccl_conn;
typedef struct pyccl_link pyccl_link;

typedef enum link_verdict {
    LINK_GO = 1,                     /* read on: the payload goes to conn->sink */
    LINK_PAUSE = 2,                  /* leave the frame unread until link_resume() */
    LINK_REFUSE = 3                  /* protocol error */
} link_verdict;

typedef struct link_load {           /* a frame for the data queue */
    pyccl_frame frame;
    const uint8_t *data;
    const void *owner;               /* whose memory `data` is; NULL: `owned` */
    uint8_t *owned;                  /* to be freed when sent */
} link_load;

typedef struct link_sink {           /* where a payload goes; all zero: it is discarded */
    uint8_t kind;                    /* of the engine; 0: discarded */
    uint8_t *dst;
    const void *owner;               /* whose memory `dst` is; NULL: `owned` or the connection's own */
    uint8_t *owned;                  /* freed by link_sink_drop() unless the engine took it */
    void *note;                      /* of the engine */
    uint64_t piece;                  /* of the engine */
} link_sink;

typedef struct link_hooks {
    /* A header arrived that is valid by itself: judge it and set conn->sink, which is zero now. */
    link_verdict (*frame_begin)(void *ctx, pyccl_conn *conn);
    link_verdict (*frame_end)(void *ctx, pyccl_conn *conn);
    void (*refused)(void *ctx, pyccl_link *link);                /* close its connections */
    bool (*load_next)(void *ctx, pyccl_link *link, pyccl_conn *conn, link_load *load);
    void (*wants_conns)(void *ctx, pyccl_link *link);            /* more than there are: link->lanes.use */
    void (*moved)(void *ctx, const void *owner);                 /* bytes from or to the owner's memory moved */
} link_hooks;

typedef struct link_env {            /* what all links of an engine share */
    const link_hooks *hooks;
    void *ctx;
    int epoll_fd;
    int64_t now_ns;
    int64_t user_timeout_ms;         /* TCP_USER_TIMEOUT */
    int64_t long_rtt_ns;             /* see pyccl_engine_options */
    uint32_t lanes;                  /* see pyccl_engine_options */
    uint32_t long_links;             /* that have connections: they share the host's line */
    lanes_turn turn;                 /* of the long ones to try another number of connections */
    pace_crowd crowd;                /* of those that are busy */
    uint64_t long_acked;             /* bytes that arrived over them, as far as was looked */
    throttle tx, rx;                 /* of all bytes that leave and come */
    int64_t tx_due, rx_due;          /* some link is starved, some connection held, until then; else INT64_MAX */
    bool broken;                     /* some connection is broken: the engine takes it down when nothing iterates */
    pyccl_conn *grave;
    uint8_t discard[LINK_SINK_BYTES];
} link_env;

typedef struct link_transport {      /* as sendmsg and recvmsg: bytes moved, or -1 and errno; recv 0: EOF */
    ssize_t (*send)(pyccl_conn *conn, const struct iovec *iov, int count);
    ssize_t (*recv)(pyccl_conn *conn, const struct iovec *iov, int count);
} link_transport;

#define LINK_HUNG_UP (-2)                /* given up by us: what stands in it is not worth reading */

struct pyccl_conn {
    pyccl_link *link;
    const link_transport *transport;
    seal *seal;                      /* NULL: the plain transport */
    int fd;                          /* -1: down */
    uint32_t index;                  /* in link->conns */
    uint32_t interest;               /* epoll events armed */
    int broken;                      /* errno of a failed send, -1 for EOF, LINK_HUNG_UP; 0: fine */
    bool blocked;                    /* the last send came back short */
    bool passed;                     /* it was given no data, since it is far slower than the others */
    double rate;                     /* bytes a second that its congestion control lets go; 0: not known */
    int unsent_max;                  /* bytes that may wait in its socket, and leave in one send */
    int64_t revived_ns;              /* when it began to seek its rate, or was made to anew */
    bool seeks_freely;               /* nothing is lost, and it would lose nothing that it should keep */
    bool held;                       /* no room in env->rx, EPOLLIN is off */
    bool paused;                     /* `frame` waits for a later epoch, EPOLLIN is off */
    int64_t sent_ns;
    int64_t heard_ns;                /* as of the link */
    pyccl_conn *grave_next;
    /* receiving */
    pyccl_frame frame;
    bool in_payload;
    uint32_t left;                   /* payload bytes to come */
    uint8_t *at;                     /* where they go; NULL: discard */
    link_sink sink;
    uint8_t small[PYCCL_SPEC_SIZE];  /* payload of OPEN */
    uint32_t header_have, stage_at, stage_have;
    uint8_t header[PYCCL_FRAME_SIZE];
    uint8_t stage[LINK_STAGE_BYTES];
    /* sending: head, then data */
    uint32_t head_len, head_sent, data_len, data_sent;
    const uint8_t *data;
    const void *data_owner;
    uint8_t *data_owned;
    uint8_t head[LINK_HEAD_BYTES];
};

typedef struct link_control {
    pyccl_frame frame;
    uint8_t spec[PYCCL_SPEC_SIZE];   /* OPEN only */
} link_control;

struct pyccl_link {
    link_env *env;
    uint8_t id[PYCCL_ID_SIZE];
    uint32_t slot;
    pyccl_conn *conns[PYCCL_CONNS_MAX];
    uint32_t conn_count;
    uint32_t data_end;               /* connections below this index carry data: the first lanes.use of them */
    uint32_t carriers;               /* of them */
    bool is_counted;                 /* in env->long_links */
    uint64_t acked;                  /* by the connections that there are, when it was last looked */
    lanes lanes;
    pace pace;
    bool paced;                      /* it has given some connection a share */
    double flow;                     /* what those that carry data may send together, when it was looked at last */
    int64_t looked_ns;               /* when what the kernel counts was looked at last */
    int64_t rtt_ns;                  /* of the last connection, when it came; 0: not known */
    int64_t wanted_ns;               /* when more connections were asked for last */
    bool told_use;                   /* link_use was called: what it said is wanted on a short line too */
    uint32_t turn;                   /* connection that is asked first: under a cap each in its turn, else always the same,
                                        so that small operations find warm ones */
    bool near;                       /* its connections are loopback: a trip costs next to nothing, CPU and caches are scarce */
    bool starved;                    /* there was no room in env->tx */
    bool wants_send;                 /* something may be there to send and some connection has room */
    link_control *control;           /* ring */
    size_t control_head, control_count, control_cap;
    int64_t heard_ns;                /* since then it is silent; also when we did not listen */
    int64_t received_ns;             /* when something came */
    uint64_t tx_bytes, rx_bytes;
};

void link_init(pyccl_link *link, link_env *env, const uint8_t id[PYCCL_ID_SIZE], uint32_t slot);
void link_fini(pyccl_link *link);    /* its connections must be down */

/* Takes fd on success only. ERR_LIMIT: PYCCL_CONNS_MAX are there; ERR_OS; ERR_NOMEM. */
pyccl_status link_conn_add(pyccl_link *link, int fd, const pyccl_conn_keys *keys, pyccl_conn **out); /* keys: NULL: plain */
void link_conn_enter(pyccl_conn *conn, uint64_t number, const uint8_t id[16]);  /* what leaves is sealed for this epoch */
void link_enter(pyccl_link *link, uint64_t number, const uint8_t id[16]);       /* on all of its connections */
void link_conn_close(pyccl_conn *conn);          /* frees what it owns, not the structure: see link_bury */
void link_bury(link_env *env);

void link_use(pyccl_link *link, uint32_t conns); /* so many carry data from now on; 0: as many as is found out */

void link_control_push(pyccl_link *link, const pyccl_frame *frame, const pyccl_spec *spec);
void link_control_clear(pyccl_link *link);

void link_pump(pyccl_link *link);                /* send while there is something and there is room */
void link_conn_writable(pyccl_conn *conn);       /* EPOLLOUT */
void link_conn_readable(pyccl_conn *conn);       /* EPOLLIN: read within a budget */
void link_conn_drain(pyccl_conn *conn);          /* read all there is: the connection is ending */
void link_feed(pyccl_link *link, bool tx, bool rx); /* there may be room again */
void link_conn_resume(pyccl_conn *conn);         /* judge the paused frame again */
void link_conn_heartbeat(pyccl_conn *conn);      /* if it is idle */
void link_sink_drop(pyccl_conn *conn);           /* discard the rest of the payload that is arriving */
void link_disown(pyccl_link *link, const void *owner);
/* What `from` .. from+bytes held of the owner's lies at `to` now: frames that are half sent go on from there. */
void link_redirect(pyccl_link *link, const void *owner, const uint8_t *from, uint64_t bytes, const uint8_t *to);
bool link_reads(const pyccl_link *link, const uint8_t *from, uint64_t bytes);   /* some frame is half sent from there */
/* Bytes that the other end's TCP has, on the connections that stand: acknowledged, or behind a hole, where they count when
 * they arrive and not when it is filled. */
bool link_conn_has_unread(const pyccl_conn *conn);                 /* bytes came that nobody has looked at */
/* Nothing came over it for so long, not even heartbeats; or TCP repeats, and nothing was acknowledged. */
bool link_conn_is_dead(const pyccl_conn *conn, int64_t silence_ns);
uint64_t link_delivered(const pyccl_link *link);
void link_excuse(pyccl_link *link, bool all);    /* connections that we did not listen to, or all of them, count as heard now */

#endif
