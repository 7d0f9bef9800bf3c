/* emulator.c: carries IP packets between the hosts of a lab along routes of pipes, delays, losses and caps.
 *
 *     netlab-emulator < CONFIG          started by pyccl.netlab, which makes namespaces and TUN devices and composes routes
 *
 * CONFIG, one item a line; hosts and pipes are numbered from 0 in the order they come:
 *     seed N
 *     grain NS                          rest after each turn: what was sent or fell due meanwhile is handled together
 *     namespace INODE                   its processes are killed at the end
 *     host FD IPV4 IPV6                 FD: inherited, a TUN device with IFF_VNET_HDR; IPV6: of its /64; -: no such address
 *     pipe RATE_BPS QUEUE_NS
 *     route FROM TO STEP...             p3: pipe 3; d75000000: delay in ns; l0.0001: loss; f20000000:50000000: each TCP
 *                                       flow capped to so many bits a second, with a queue of so many ns
 *     start                             answered by "ready"
 * Then "stats" is answered by a line of JSON, and "address HOST IPV4 IPV6", which gives a host others, by "changed": what
 * is on its way still arrives. The end of stdin (our owner is gone, or done) ends all.
 *
 * A packet's times are computed, not measured: it enters its first pipe when it was read, and every other step at the
 * moment the one before let go of it. One heap holds what is on its way, ordered by these moments, so pipes that several
 * hosts share see arrivals in order. Nothing is delivered before its time; how late it was is in the stats.
 * A host may be a router that rewrites addresses (pyccl.netlab.nat): what is behind it does not show here. One thread. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "guard.h"
#include "line.h"
#include "packet.h"

#define NS_PER_S INT64_C(1000000000)
#define HOSTS_MAX 256
#define NAMESPACES_MAX (3 * HOSTS_MAX) /* a host may stand behind two routers */
#define PIPES_MAX 2048
#define STEPS_MAX 32
#define LINE_MAX_SIZE 4096
#define COMMAND_MAX_SIZE 160
#define PREFIX_SIZE 8
#define READS_MAX 64  /* of one host before the others have their turn */
#define WRITES_MAX 64 /* before hosts are read again: what a device does not hold is lost without having been counted */
#define LATE_NS 1000000

enum exit_status { EXIT_ARGUMENTS = 2, EXIT_MEMORY = 3, EXIT_SYSTEM = 4, EXIT_LEFT = 5 };

typedef struct step {
    enum { STEP_PIPE, STEP_DELAY, STEP_LOSS, STEP_CAP } kind;
    union {
        uint32_t pipe;
        int64_t delay_ns;
        double loss;
        line_flows flows;
    };
} step;

typedef struct route {
    uint32_t from, to;
    uint32_t steps_count;
    step *steps; /* NULL: no such route */
    uint64_t key, drawn, lost;
} route;

typedef struct host {
    int fd;
    uint8_t ipv4[PACKET_ADDRESS_SIZE], ipv6[PREFIX_SIZE]; /* as in packet.h; zeros, where nothing is sent: none */
    uint64_t tx_packets, tx_bytes, rx_packets, rx_bytes, unroutable, refused;
} host;

/* A frame as it was read; its segments travel by themselves. */
typedef struct frame {
    uint32_t references;
    uint32_t run;  /* the last one of this turn with segments of it */
    uint64_t turn; /* that `run` belongs to */
    packet_shape shape;
    uint8_t bytes[];
} frame;

typedef struct packet {
    frame *frame;
    route *route;
    uint32_t segment, step;
    struct packet *next; /* of unused ones */
} packet;

/* The heap compares these without touching the packets, which are far apart in memory. */
typedef struct entry {
    int64_t due_ns;
    uint64_t number; /* of two that are due at once the first goes first */
    packet *packet;
} entry;

/* Segments of one frame that arrive in one turn: neighbours, though others may have come between them. */
typedef struct run {
    frame *frame;
    uint32_t first, count, to;
} run;

typedef struct emulator {
    uint64_t seed;
    int64_t grain_ns;
    host hosts[HOSTS_MAX];
    line_pipe pipes[PIPES_MAX];
    route *routes; /* [from][to], hosts_count of each */
    ino_t namespaces[NAMESPACES_MAX];
    uint32_t hosts_count, pipes_count, namespaces_count;
    entry *heap;
    packet *unused;
    size_t heap_size, heap_capacity;
    uint64_t number;
    run runs[WRITES_MAX];
    uint32_t runs_count;
    uint64_t turn, delivered, late, late_sum_ns;
    int64_t late_max_ns;
    bool realtime;
} emulator;

static void fail(enum exit_status status, const char *what) {
    fprintf(stderr, "netlab-emulator: %s\n", what);
    exit(status);
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * NS_PER_S + now.tv_nsec;
}

/* ---- what is on its way: a binary heap */

static bool before(const entry *a, const entry *b) {
    return a->due_ns != b->due_ns ? a->due_ns < b->due_ns : a->number < b->number;
}

static void heap_push(emulator *e, packet *p, int64_t due_ns) {
    if (e->heap_size == e->heap_capacity) {
        e->heap_capacity = e->heap_capacity == 0 ? 4096 : 2 * e->heap_capacity;
        e->heap = realloc(e->heap, e->heap_capacity * sizeof *e->heap);
        if (e->heap == NULL) fail(EXIT_MEMORY, "out of memory");
    }
    entry pushed = {.due_ns = due_ns, .number = e->number++, .packet = p};
    size_t i = e->heap_size++;
    for (; i > 0 && before(&pushed, &e->heap[(i - 1) / 2]); i = (i - 1) / 2) e->heap[i] = e->heap[(i - 1) / 2];
    e->heap[i] = pushed;
}

static entry heap_pop(emulator *e) {
    entry top = e->heap[0], last = e->heap[--e->heap_size];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < e->heap_size; i = child) {
        if (child + 1 < e->heap_size && before(&e->heap[child + 1], &e->heap[child])) child++;
        if (!before(&e->heap[child], &last)) break;
        e->heap[i] = e->heap[child];
    }
    e->heap[i] = last;
    return top;
}

static packet *packet_new(emulator *e) {
    packet *p = e->unused;
    if (p != NULL)
        e->unused = p->next;
    else if ((p = malloc(sizeof *p)) == NULL)
        fail(EXIT_MEMORY, "out of memory");
    return p;
}

static void frame_release(frame *f) {
    if (--f->references == 0) free(f);
}

static void packet_drop(emulator *e, packet *p) {
    frame_release(p->frame);
    p->next = e->unused;
    e->unused = p;
}

/* ---- delivery */

static void run_write(emulator *e, const run *r) {
    frame *f = r->frame;
    uint8_t head[PACKET_HEAD_MAX];
    uint32_t head_size, payload_at, payload_size;
    packet_join(f->bytes, &f->shape, r->first, r->count, head, &head_size, &payload_at, &payload_size);
    struct iovec parts[2] = {{head, head_size}, {f->bytes + payload_at, payload_size}};
    host *to = &e->hosts[r->to];
    ssize_t written = writev(to->fd, parts, 2);
    if (written == (ssize_t)(head_size + payload_size)) {
        to->rx_packets += r->count;
        to->rx_bytes += (head_size - PACKET_VNET_SIZE) * (uint64_t)r->count + payload_size;
    } else {
        to->refused += r->count; /* its interface is down */
    }
    frame_release(f);
}

/* The packet's segment becomes part of a run; there is room for one more. */

static void deliver(emulator *e, packet *p, int64_t late_ns) {
    e->delivered++;
    e->late += late_ns > LATE_NS;
    e->late_sum_ns += (uint64_t)late_ns;
    if (late_ns > e->late_max_ns) e->late_max_ns = late_ns;
    frame *f = p->frame;
    run *r = f->turn == e->turn ? &e->runs[f->run] : NULL;
    if (r != NULL && r->first + r->count == p->segment) {
        r->count++;
    } else {
        f->references++;
        f->turn = e->turn;
        f->run = e->runs_count++;
        e->runs[f->run] = (run){.frame = f, .first = p->segment, .count = 1, .to = p->route->to};
    }
    packet_drop(e, p);
}

/* Take a packet as far as it gets at the moment `at`, which is when it came to its next step. */
static void advance(emulator *e, packet *p, int64_t at) {
    route *way = p->route;
    uint32_t size = packet_size(&p->frame->shape, p->segment);
    int64_t due_ns = at;
    while (p->step < way->steps_count) {
        step *s = &way->steps[p->step];
        if (due_ns > at && s->kind != STEP_DELAY) break; /* its turn comes */
        p->step++;
        bool passes = true;
        switch (s->kind) {
        case STEP_PIPE: passes = line_pipe_enter(&e->pipes[s->pipe], at, size, &due_ns); break;
        case STEP_DELAY: due_ns += s->delay_ns; break;
        case STEP_LOSS:
            passes = !line_lost(way->key, way->drawn++, s->loss);
            way->lost += !passes;
            break;
        case STEP_CAP:
            if (p->frame->shape.flow != 0)
                passes = line_flows_enter(&s->flows, p->frame->shape.flow, at, size, &due_ns);
            break;
        }
        if (!passes) {
            packet_drop(e, p);
            return;
        }
    }
    heap_push(e, p, due_ns);
}

/* What is due, as much as is good at once. False: there is more. */
static bool turn(emulator *e) {
    int64_t now = now_ns();
    e->turn++;
    e->runs_count = 0;
    while (e->heap_size > 0 && e->heap[0].due_ns <= now && e->runs_count < WRITES_MAX) {
        entry next = heap_pop(e);
        if (next.packet->step == next.packet->route->steps_count)
            deliver(e, next.packet, now - next.due_ns);
        else
            advance(e, next.packet, next.due_ns);
    }
    for (uint32_t i = 0; i < e->runs_count; i++) run_write(e, &e->runs[i]);
    return e->runs_count < WRITES_MAX;
}

/* ---- what hosts send */

static route *route_of(emulator *e, uint32_t from, const uint8_t *address) {
    static const uint8_t zeros[PREFIX_SIZE]; /* that an IPv4 address begins with, too */
    bool is_6 = memcmp(address, zeros, PREFIX_SIZE) != 0;
    for (uint32_t to = 0; to < e->hosts_count; to++) {
        const host *h = &e->hosts[to];
        if (is_6 ? memcmp(h->ipv6, address, PREFIX_SIZE) == 0 : memcmp(h->ipv4, address, PACKET_ADDRESS_SIZE) == 0) {
            route *way = &e->routes[from * e->hosts_count + to];
            return way->steps == NULL ? NULL : way;
        }
    }
    return NULL;
}

static void accept_frame(emulator *e, uint32_t from, const uint8_t *bytes, size_t size) {
    host *sender = &e->hosts[from];
    packet_shape shape;
    route *way;
    if (!packet_parse(bytes, size, &shape) || (way = route_of(e, from, shape.to)) == NULL) {
        sender->unroutable++;
        return;
    }
    frame *f = malloc(sizeof *f + size);
    if (f == NULL) fail(EXIT_MEMORY, "out of memory");
    f->references = shape.segments;
    f->turn = 0; /* none */
    f->shape = shape;
    memcpy(f->bytes, bytes, size);
    int64_t now = now_ns();
    for (uint32_t i = 0; i < shape.segments; i++) {
        packet *p = packet_new(e);
        *p = (packet){.frame = f, .route = way, .segment = i};
        sender->tx_packets++;
        sender->tx_bytes += packet_size(&shape, i);
        advance(e, p, now);
    }
}

static void take_in(emulator *e, uint32_t from) {
    static uint8_t bytes[PACKET_FRAME_MAX];
    for (int i = 0; i < READS_MAX; i++) {
        ssize_t size = read(e->hosts[from].fd, bytes, sizeof bytes);
        if (size < 0 && errno == EINTR) continue;
        if (size <= 0) return; /* none left, or the interface is down */
        accept_frame(e, from, bytes, (size_t)size);
    }
}

/* ---- the owner */

static void bad_line(const char *line) {
    fprintf(stderr, "netlab-emulator: bad line: %s\n", line);
    exit(EXIT_ARGUMENTS);
}

static void print_stats(emulator *e) {
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    printf("{\"hosts\":[");
    for (uint32_t i = 0; i < e->hosts_count; i++) {
        host *h = &e->hosts[i];
        printf("%s{\"tx_packets\":%" PRIu64 ",\"tx_bytes\":%" PRIu64 ",\"rx_packets\":%" PRIu64 ",\"rx_bytes\":%" PRIu64
               ",\"unroutable\":%" PRIu64 ",\"refused\":%" PRIu64 "}",
               i == 0 ? "" : ",", h->tx_packets, h->tx_bytes, h->rx_packets, h->rx_bytes, h->unroutable, h->refused);
    }
    printf("],\"pipes\":[");
    for (uint32_t i = 0; i < e->pipes_count; i++) {
        line_pipe *pipe = &e->pipes[i];
        printf("%s{\"packets\":%" PRIu64 ",\"bytes\":%" PRIu64 ",\"dropped\":%" PRIu64 "}", i == 0 ? "" : ",", pipe->packets,
               pipe->bytes, pipe->dropped);
    }
    printf("],\"routes\":[");
    const char *separator = "";
    for (uint32_t i = 0; i < e->hosts_count * e->hosts_count; i++) {
        route *way = &e->routes[i];
        uint64_t capped = 0;
        if (way->steps == NULL) continue;
        for (uint32_t k = 0; k < way->steps_count; k++)
            if (way->steps[k].kind == STEP_CAP) capped += way->steps[k].flows.dropped;
        printf("%s{\"from\":%" PRIu32 ",\"to\":%" PRIu32 ",\"lost\":%" PRIu64 ",\"capped\":%" PRIu64 "}", separator, way->from,
               way->to, way->lost, capped);
        separator = ",";
    }
    printf("],\"delivered\":%" PRIu64 ",\"late\":%" PRIu64 ",\"late_mean_ns\":%" PRIu64 ",\"late_max_ns\":%" PRId64
           ",\"cpu_s\":%.6f,\"realtime\":%s}\n",
           e->delivered, e->late, e->delivered == 0 ? 0 : e->late_sum_ns / e->delivered, e->late_max_ns,
           (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) + 1e-6 * (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec),
           e->realtime ? "true" : "false");
    fflush(stdout);
}

static bool parse_addresses(host *h, const char *ipv4, const char *ipv6) {
    uint8_t made[2][PACKET_ADDRESS_SIZE] = {{0}};
    char mapped[80];
    snprintf(mapped, sizeof mapped, "::ffff:%s", ipv4);
    if (strcmp(ipv4, "-") != 0 && inet_pton(AF_INET6, mapped, made[0]) != 1) return false;
    if (strcmp(ipv6, "-") != 0 && inet_pton(AF_INET6, ipv6, made[1]) != 1) return false;
    memcpy(h->ipv4, made[0], sizeof h->ipv4);
    memcpy(h->ipv6, made[1], sizeof h->ipv6);
    return true;
}

static void obey(emulator *e, const char *line) {
    uint32_t number;
    char ipv4[64], ipv6[64];
    if (strcmp(line, "stats") == 0) {
        print_stats(e);
        return;
    }
    if (sscanf(line, "address %" SCNu32 " %63s %63s", &number, ipv4, ipv6) != 3 || number >= e->hosts_count ||
        !parse_addresses(&e->hosts[number], ipv4, ipv6))
        bad_line(line);
    printf("changed\n");
    fflush(stdout);
}

/* False: the owner is gone, or done. */
static bool hear_owner(emulator *e) {
    static char line[COMMAND_MAX_SIZE];
    static size_t size;
    char bytes[256];
    ssize_t got = read(STDIN_FILENO, bytes, sizeof bytes);
    if (got <= 0) return got < 0 && errno == EINTR;
    for (ssize_t i = 0; i < got; i++) {
        if (bytes[i] != '\n') {
            if (size < sizeof line - 1) line[size++] = bytes[i];
            continue;
        }
        line[size] = '\0';
        size = 0;
        obey(e, line);
    }
    return true;
}

/* ---- configuration */

static step parse_step(const emulator *e, const char *text, const char *line) {
    step s = {0};
    uint64_t first, second;
    int end = -1;
    switch (text[0]) {
    case 'p':
        s.kind = STEP_PIPE;
        if (sscanf(text, "p%" SCNu32 "%n", &s.pipe, &end) != 1 || s.pipe >= e->pipes_count) bad_line(line);
        break;
    case 'd':
        s.kind = STEP_DELAY;
        if (sscanf(text, "d%" SCNd64 "%n", &s.delay_ns, &end) != 1 || s.delay_ns < 0) bad_line(line);
        break;
    case 'l':
        s.kind = STEP_LOSS;
        if (sscanf(text, "l%lf%n", &s.loss, &end) != 1 || !(s.loss >= 0 && s.loss <= 1)) bad_line(line);
        break;
    case 'f':
        s.kind = STEP_CAP;
        if (sscanf(text, "f%" SCNu64 ":%" SCNu64 "%n", &first, &second, &end) != 2 || first == 0 || second > INT64_MAX / 2)
            bad_line(line);
        s.flows = (line_flows){.rate_bps = first, .queue_ns = (int64_t)second};
        break;
    default: bad_line(line);
    }
    if (end < 0 || text[end] != '\0') bad_line(line);
    return s;
}

static void parse_route(emulator *e, const char *line, char *steps) {
    uint32_t from, to;
    int end = 0;
    if (sscanf(steps, "%" SCNu32 " %" SCNu32 "%n", &from, &to, &end) != 2 || from >= e->hosts_count || to >= e->hosts_count)
        bad_line(line);
    if (e->routes == NULL) e->routes = calloc((size_t)e->hosts_count * e->hosts_count, sizeof *e->routes);
    step *made = calloc(STEPS_MAX, sizeof *made);
    if (e->routes == NULL || made == NULL) fail(EXIT_MEMORY, "out of memory");
    route *way = &e->routes[from * e->hosts_count + to];
    if (way->steps != NULL) bad_line(line);
    *way = (route){.from = from, .to = to, .steps = made, .key = line_key(e->seed, from, to)};
    char *rest = NULL;
    for (char *text = strtok_r(steps + end, " ", &rest); text != NULL; text = strtok_r(NULL, " ", &rest)) {
        if (way->steps_count == STEPS_MAX) bad_line(line);
        made[way->steps_count++] = parse_step(e, text, line);
    }
}

/* False: it was the last one. */
static bool parse_line(emulator *e, char *line) {
    char copy[LINE_MAX_SIZE], ipv4[64], ipv6[64];
    uint64_t first, second;
    int fd;
    snprintf(copy, sizeof copy, "%s", line);
    if (strcmp(line, "start") == 0) return false;
    if (sscanf(line, "seed %" SCNu64, &e->seed) == 1) return true;
    if (sscanf(line, "grain %" SCNd64, &e->grain_ns) == 1) return true;
    if (sscanf(line, "namespace %" SCNu64, &first) == 1) {
        if (e->namespaces_count == NAMESPACES_MAX) bad_line(copy);
        e->namespaces[e->namespaces_count++] = (ino_t)first;
    } else if (sscanf(line, "host %d %63s %63s", &fd, ipv4, ipv6) == 3) {
        host made = {.fd = fd};
        if (e->hosts_count == HOSTS_MAX || e->routes != NULL || !parse_addresses(&made, ipv4, ipv6)) bad_line(copy);
        e->hosts[e->hosts_count++] = made;
    } else if (sscanf(line, "pipe %" SCNu64 " %" SCNu64, &first, &second) == 2) {
        if (e->pipes_count == PIPES_MAX || second > INT64_MAX / 2) bad_line(copy);
        e->pipes[e->pipes_count++] = (line_pipe){.rate_bps = first, .queue_ns = (int64_t)second};
    } else if (strncmp(line, "route ", 6) == 0) {
        parse_route(e, copy, line + 6);
    } else {
        bad_line(copy);
    }
    return true;
}

/* Byte by byte, so that nothing of what comes after "start" is taken. */
static void read_config(emulator *e) {
    char line[LINE_MAX_SIZE];
    size_t size = 0;
    for (;;) {
        ssize_t got = read(STDIN_FILENO, &line[size], 1);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) fail(EXIT_ARGUMENTS, "no \"start\"");
        if (line[size] != '\n') {
            if (++size == sizeof line) fail(EXIT_ARGUMENTS, "a line is too long");
            continue;
        }
        line[size] = '\0';
        size = 0;
        if (line[0] != '\0' && !parse_line(e, line)) return;
    }
}

/* As exact as the machine allows: other work shall not make packets late. */
static bool be_punctual(void) {
    struct sched_param param = {.sched_priority = 10};
    (void)prctl(PR_SET_TIMERSLACK, 1L);
    return sched_setscheduler(0, SCHED_FIFO, &param) == 0;
}

/* Until one of them has something or it is so late; INT64_MAX: until one has. */
static void wait_until(struct pollfd *watched, nfds_t count, int64_t until_ns) {
    struct timespec wait = {0};
    int64_t now = now_ns();
    if (until_ns > now && until_ns != INT64_MAX)
        wait = (struct timespec){.tv_sec = (until_ns - now) / NS_PER_S, .tv_nsec = (until_ns - now) % NS_PER_S};
    int ready = ppoll(watched, count, until_ns == INT64_MAX ? NULL : &wait, NULL);
    if (ready < 0 && errno != EINTR) fail(EXIT_SYSTEM, "ppoll");
    if (ready <= 0)
        for (nfds_t i = 0; i < count; i++) watched[i].revents = 0;
}

static void carry(emulator *e) {
    static struct pollfd watched[HOSTS_MAX + 1];
    watched[0] = (struct pollfd){.fd = STDIN_FILENO, .events = POLLIN};
    for (uint32_t i = 0; i < e->hosts_count; i++) {
        watched[i + 1] = (struct pollfd){.fd = e->hosts[i].fd, .events = POLLIN};
        int flags = fcntl(e->hosts[i].fd, F_GETFL);
        if (flags < 0 || fcntl(e->hosts[i].fd, F_SETFL, flags | O_NONBLOCK) != 0) fail(EXIT_SYSTEM, "a host's device");
    }
    bool behind = false;
    for (int64_t turned_ns = 0;;) {
        /* A rest first: whoever sends would wake us for every frame, which costs more than the frame. */
        int64_t rested_ns = turned_ns + e->grain_ns;
        if (!behind && now_ns() < rested_ns) {
            wait_until(watched, 1, rested_ns);
            if (watched[0].revents != 0 && !hear_owner(e)) return;
            if (now_ns() < rested_ns) continue;
        }
        wait_until(watched, e->hosts_count + 1, behind ? 0 : e->heap_size > 0 ? e->heap[0].due_ns : INT64_MAX);
        if (watched[0].revents != 0 && !hear_owner(e)) return;
        for (uint32_t i = 0; i < e->hosts_count; i++)
            if (watched[i + 1].revents & POLLIN) take_in(e, i);
        behind = !turn(e);
        turned_ns = now_ns();
    }
}

int main(void) {
    static emulator e;
    pid_t owner = getppid();
    signal(SIGPIPE, SIG_IGN);
    read_config(&e);
    if (e.routes == NULL) fail(EXIT_ARGUMENTS, "no route");
    e.realtime = be_punctual();
    printf("ready\n");
    fflush(stdout);
    carry(&e);
    size_t left = guard_end_all(e.namespaces, e.namespaces_count, owner);
    if (left > 0) {
        fprintf(stderr, "netlab-emulator: %zu processes of the lab could not be ended\n", left);
        return EXIT_LEFT;
    }
    return EXIT_SUCCESS;
}
