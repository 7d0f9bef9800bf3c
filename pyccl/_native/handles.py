"""Owners of the C handles: Engine and Op. They pin the arrays that C may touch and translate statuses.

Nobody gets an array back while C can still write into it: an Op keeps its buffers until the operation has ended, and
``Op.wait`` called through ``finish`` never returns before that.  Calls release the GIL (cffi does so around each).
Threads: every method may be called from any thread.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from pyccl._native._pyccl import ffi, lib
from pyccl._native.status import ARGUMENT, CANCELLED, OK, PENDING, check

NS: Final = 1_000_000_000
TIMEOUT_S_MAX: Final = 10 * 365 * 86_400.0
CHUNK_BYTES: Final = 1 << 20  # of shared state
WORLD_MAX: Final[int] = lib.PYCCL_WORLD_MAX
FETCH_BYTES_MAX: Final[int] = lib.PYCCL_PIECE_MAX
LONG_RTT_S: Final = 0.005  # from here on losses and idle time cost more than a paced sender does
_EVENTS_AT_ONCE: Final = 64
_TIMED_ELEMENTS: Final = 1 << 16
_TIMED_RUNS: Final = 8
_TIMED_BLOCK: Final = 1024
_USER_TIMEOUT_LEAST_S: Final = 15.0  # of a relayed connection's two halves, as the engine's own
_U32_MAX: Final = (1 << 32) - 1
_SLICE_NS: Final = 100_000_000  # longest stay in C without a look at Python's signal handlers


_NULL: Final = ffi.NULL
_BYTES: Final = ffi.typeof("uint8_t[]")  # parsed once
_OP_ARGS: Final = ffi.typeof("pyccl_op_args *")
_OP_SLOT: Final = ffi.typeof("pyccl_op **")
_OP_INFO: Final = ffi.typeof("pyccl_op_info *")


class Kind:
    ALL_REDUCE: Final[int] = lib.PYCCL_ALL_REDUCE
    BROADCAST: Final[int] = lib.PYCCL_BROADCAST
    BARRIER: Final[int] = lib.PYCCL_BARRIER
    ALL_GATHER: Final[int] = lib.PYCCL_ALL_GATHER
    EXCHANGE: Final[int] = lib.PYCCL_EXCHANGE
    REDUCE_SCATTER: Final[int] = lib.PYCCL_REDUCE_SCATTER


class EventType:
    CONN_DOWN: Final[int] = lib.PYCCL_EVENT_CONN_DOWN
    LINK_SILENT: Final[int] = lib.PYCCL_EVENT_LINK_SILENT
    LINK_HEARD: Final[int] = lib.PYCCL_EVENT_LINK_HEARD
    LINK_REFUSED: Final[int] = lib.PYCCL_EVENT_LINK_REFUSED
    OP: Final[int] = lib.PYCCL_EVENT_OP
    SETTLE: Final[int] = lib.PYCCL_EVENT_SETTLE
    LEAVE: Final[int] = lib.PYCCL_EVENT_LEAVE
    DIFFERS: Final[int] = lib.PYCCL_EVENT_DIFFERS
    DRAINED: Final[int] = lib.PYCCL_EVENT_DRAINED
    STATE: Final[int] = lib.PYCCL_EVENT_STATE
    PULSE_DOWN: Final[int] = lib.PYCCL_EVENT_PULSE_DOWN
    PACK: Final[int] = lib.PYCCL_EVENT_PACK
    LINK_WANTS: Final[int] = lib.PYCCL_EVENT_LINK_WANTS


@dataclass(frozen=True, slots=True)
class Event:
    """pyccl_event of pyccl.h; `mine` and `theirs` are encoded specs, empty unless the type is DIFFERS."""

    type: int
    slot: int
    code: int
    count: int
    value: int
    space: int
    tag: int
    seq: int
    mine: bytes = b""
    theirs: bytes = b""


class Spec(NamedTuple):
    """pyccl_spec of pyccl.h, field by field."""

    kind: int
    dtype: int
    op: int = 0
    codec: int = lib.PYCCL_CODEC_NONE
    algorithm: int = lib.PYCCL_DIRECT
    retry: bool = True
    space: int = lib.PYCCL_SPACE_USER
    guard: int = 0
    tag: int = 0
    block: int = 0
    elements: int = 0  # count
    root: bytes = bytes(16)


class OpInfo(NamedTuple):
    """pyccl_op_info of pyccl.h; peer: the culprit's id, empty where none is known."""

    status: int
    attempts: int
    epoch: int
    seq: int
    tx_bytes: int
    rx_bytes: int
    seconds: float
    peer: bytes
    algorithm: int = lib.PYCCL_DIRECT  # that ran


@dataclass(frozen=True, slots=True)
class BlockedView:
    lacking: tuple[tuple[int, int, int], ...]  # (space, channel, seq) open here and not opened by a participant
    quiet_s: float
    below_cut: bool


def _ns(seconds: float) -> int:
    return int(min(seconds, TIMEOUT_S_MAX) * NS)


def _spec_bytes(spec: Any) -> bytes:
    out = ffi.new("uint8_t[]", lib.PYCCL_SPEC_SIZE)
    lib.pyccl_spec_encode(spec, out)
    return bytes(ffi.buffer(out))


def _free_unless_forked(owner: int) -> Callable[[Any], None]:
    """The destructor of an engine: in a forked child its thread does not exist and can't be joined."""

    def free(engine: Any, getpid: Callable[[], int] = os.getpid, free: Any = lib.pyccl_engine_free) -> None:
        if getpid() == owner:
            free(engine)

    return free


@dataclass(frozen=True, slots=True)
class RelayEnd:
    """pyccl_relay_end. owner: empty: the peer itself."""

    fd: int
    peer: bytes
    owner: bytes = b""


class Relay:
    """A C thread that carries bytes between pairs of sockets; it needs no GIL. Close it with ``stop``."""

    PAIRS_MAX: Final[int] = lib.PYCCL_RELAY_PAIRS_MAX
    OWNED_MAX: Final[int] = lib.PYCCL_RELAY_OWNED_MAX

    def __init__(self, peer_timeout: float, max_bytes_s: int = 0) -> None:
        """The thread starts with the first pair. peer_timeout: of the peers, which beat more often; a pair that is
        silent for longer than they would stand is reset. max_bytes_s: of all that it carries; 0: no cap."""
        self._max_bytes_s = max_bytes_s
        self._user_timeout_ms = min(int(1000 * max(3 * peer_timeout, _USER_TIMEOUT_LEAST_S)), _U32_MAX)
        self._relay: Any = None

    def add(self, one: RelayEnd, other: RelayEnd) -> None:
        """Hand over two connected sockets; they are the relay's from here on, also when this raises.

        UsageError: all pairs are there that there may be, or all of an owner. OSError.
        """
        if self._relay is None:
            slot = ffi.new("pyccl_relay **")
            started = lib.pyccl_relay_new(self._user_timeout_ms, self._max_bytes_s, slot)
            if started < 0:
                os.close(one.fd)
                os.close(other.fd)
                check(started, "relay")
            self._relay = slot[0]
        check(lib.pyccl_relay_add(self._relay, _ends(one, other)), "relay")

    def room(self, one: RelayEnd, other: RelayEnd) -> int:
        """How many more such pairs it would take; the sockets do not matter."""
        if self._relay is None:
            return self.OWNED_MAX
        return int(lib.pyccl_relay_room(self._relay, _ends(one, other)))

    def forget(self, peer: bytes) -> None:
        """Reset the pairs of this peer."""
        if self._relay is not None:
            lib.pyccl_relay_forget(self._relay, peer)

    def pairs(self) -> int:
        return 0 if self._relay is None else int(lib.pyccl_relay_pairs(self._relay))

    def stop(self) -> None:
        """Reset all pairs and end the thread. Idempotent; never in a forked child, which has no such thread."""
        relay, self._relay = self._relay, None
        if relay is not None:
            lib.pyccl_relay_free(relay)


def _ends(one: RelayEnd, other: RelayEnd) -> Any:
    return ffi.new("pyccl_relay_end[2]", [(end.fd, end.peer, end.owner or end.peer) for end in (one, other)])


CIPHER_AES: Final[int] = lib.PYCCL_CIPHER_AES_256_GCM
CIPHER_CHACHA: Final[int] = lib.PYCCL_CIPHER_CHACHA20_POLY1305


@dataclass(frozen=True, slots=True)
class Keys:
    """pyccl_conn_keys. tx, rx: 32 bytes, secrets of what is sent and of what comes."""

    tx: bytes = field(repr=False)
    rx: bytes = field(repr=False)
    cipher: int
    dialed: bool


@contextmanager
def _keys_in_c(keys: Keys) -> Iterator[object]:
    given = ffi.new("pyccl_conn_keys *", [keys.tx, keys.rx, keys.cipher, keys.dialed])
    try:
        yield given
    finally:
        ffi.buffer(given)[:] = bytes(ffi.sizeof("pyccl_conn_keys"))


def cipher_best() -> int:
    """The cipher that this processor is faster with."""
    return int(lib.pyccl_cipher_best())


class Engine:
    """One data plane: a C thread with its links and operations. Close it with ``stop``."""

    def __init__(
        self, self_id: bytes, peer_timeout: float, stall_timeout: float,
        max_upload: int = 0, max_download: int = 0, lanes: int = 0,
    ) -> None:  # fmt: skip
        """max_upload, max_download: bytes per second of all data connections together; 0: no cap.

        lanes: connections of a link that carry data at first, more where that pays; 0: all there are.
        """
        options = ffi.new("pyccl_engine_options *")
        ffi.memmove(options.self_id, self_id, 16)
        options.heartbeat_ns = _ns(peer_timeout / 5)
        options.long_rtt_ns = _ns(LONG_RTT_S)
        options.silence_ns = _ns(peer_timeout)
        options.lanes = lanes
        options.max_tx_bytes_s, options.max_rx_bytes_s = max_upload, max_download
        options.fsm.settle_ns = _ns(peer_timeout)
        options.fsm.stall_ns = _ns(stall_timeout)
        options.fsm.tell_ns = _ns(0.2)
        slot = ffi.new("pyccl_engine **")
        check(lib.pyccl_engine_new(options, slot), "engine")
        self._engine = ffi.gc(slot[0], _free_unless_forked(os.getpid()))
        self.fd: int = lib.pyccl_engine_fd(self._engine)
        self._ops: set[Op] = set()  # not released: C may write into their arrays, whoever still knows of them
        self._ops_lock = threading.Lock()
        self._abandoned: deque[Op] = deque()
        self._published: dict[int, object] = {}
        self._fetches: dict[int, object] = {}

    def stop(self, why: int) -> None:
        """End the thread and close all connections; open operations fail with `why`. Idempotent."""
        lib.pyccl_engine_stop(self._engine, why)
        self._published.clear()
        self._fetches.clear()
        self._release_abandoned()

    def events(self) -> list[Event]:
        """Take what has happened; clears the eventfd."""
        out = ffi.new("pyccl_event[]", _EVENTS_AT_ONCE)
        taken: list[Event] = []
        while True:
            count = lib.pyccl_engine_events(self._engine, out, _EVENTS_AT_ONCE)
            for i in range(count):
                e = out[i]
                differs = e.type == EventType.DIFFERS
                mine = _spec_bytes(ffi.addressof(e, "mine")) if differs else b""
                theirs = _spec_bytes(ffi.addressof(e, "theirs")) if differs else b""
                taken.append(Event(e.type, e.slot, e.code, e.count, e.value, e.space, e.tag, e.seq, mine, theirs))
            if count < _EVENTS_AT_ONCE:
                return taken

    # -- links

    def peer_add(self, peer: bytes) -> int:
        slot = ffi.new("uint32_t *")
        check(lib.pyccl_engine_peer_add(self._engine, peer, slot), "peer_add")
        return int(slot[0])

    def peer_remove(self, slot: int) -> None:
        check(lib.pyccl_engine_peer_remove(self._engine, slot), "peer_remove")

    def conn_add(self, slot: int, fd: int, keys: Keys | None = None) -> None:
        """Hand over a connected socket; the engine owns it from here, also when this raises. keys: it is sealed."""
        if keys is None:
            check(lib.pyccl_engine_conn_add(self._engine, slot, fd), "conn_add")
            return
        with _keys_in_c(keys) as given:
            check(lib.pyccl_engine_conn_add_sealed(self._engine, slot, fd, given), "conn_add_sealed")

    def pulse(self, fd: int, keys: Keys | None = None) -> None:
        """Send heartbeats over a connected socket, which the engine owns from here, also when this raises."""
        if keys is None:
            check(lib.pyccl_engine_pulse(self._engine, fd, ffi.NULL), "pulse")
            return
        with _keys_in_c(keys) as given:
            check(lib.pyccl_engine_pulse(self._engine, fd, given), "pulse")

    def conns(self, slot: int) -> int:
        """Connections of the link that stand; 0 also for a slot that was removed."""
        stats = self._link_stats(slot)
        return 0 if stats is None else int(stats.conns)

    def use(self, slot: int, conns: int) -> None:
        """So many connections of the link carry our data, EventType.LINK_WANTS if there are fewer; 0: it finds out."""
        check(lib.pyccl_engine_link_use(self._engine, slot, conns), "link_use")

    def received(self, slot: int) -> int:
        """Bytes received on the link so far; 0 for a slot that was removed."""
        stats = self._link_stats(slot)
        return 0 if stats is None else int(stats.rx_bytes)

    def delivered(self, slot: int) -> tuple[int, bool]:
        """Bytes that the other end's TCP has of ours, on the connections that stand, and whether the line is known to
        take no more than it gets now; (0, True) for a slot that was removed."""
        stats = self._link_stats(slot)
        return (0, True) if stats is None else (int(stats.delivered_bytes), bool(stats.full))

    def work(self, slot: int) -> tuple[int, float]:
        """Bytes sent and received on all links, and the processor time in seconds of the thread that does it; zeros for
        a slot that was removed."""
        stats = self._link_stats(slot)
        return (0, 0.0) if stats is None else (int(stats.moved_bytes), int(stats.cpu_ns) / NS)

    def _link_stats(self, slot: int) -> Any:
        """pyccl_link_stats; None for a slot that was removed."""
        stats = ffi.new("pyccl_link_stats *")
        status = lib.pyccl_engine_link_stats(self._engine, slot, stats)
        if status == ARGUMENT:
            return None
        check(status, "link_stats")
        return stats

    # -- epochs

    def freeze(self) -> list[tuple[int, int, int, int, int]]:
        """Freeze every open operation; returns what is known of each: (space, channel, seq, state, hash).

        OutcomeUnknownError, here and from ``enter``: it has left the run, whether EventType.LEAVE was taken or not.
        """
        cap, count = 256, ffi.new("size_t *")
        while True:
            out = ffi.new("pyccl_op_report[]", cap)
            check(lib.pyccl_engine_freeze(self._engine, out, cap, count), "freeze")
            if count[0] <= cap:
                return [(r.space, r.tag, r.seq, r.state, r.hash) for r in out[0 : count[0]]]
            cap = count[0]

    def enter(
        self,
        number: int,
        epoch_id: bytes,
        members: Sequence[bytes],
        rank: int,
        restart: bool,
        mismatch: bool,
        verdicts: Sequence[tuple[int, int, int, int]],
        shares: Sequence[int] = (),
        ring: Sequence[int] = (),
        ring_from_bytes: int = (1 << 64) - 1,
        piece_bytes: int = 0,
        ring_pace: int = 0,
    ) -> None:
        """Apply the verdicts and enter the epoch in one step. The last five: pyccl_plan; empty is NULL."""
        packed = ffi.from_buffer("uint8_t[]", b"".join(members))
        epoch = ffi.new("pyccl_epoch *")
        epoch.number, epoch.world, epoch.rank = number, len(members), rank
        epoch.restart, epoch.mismatch, epoch.members = restart, mismatch, packed
        ffi.memmove(epoch.id, epoch_id, 16)
        weights = ffi.new("uint32_t[]", shares) if shares else _NULL
        order = ffi.new("uint32_t[]", ring) if ring else _NULL
        plan = ffi.new("pyccl_plan *", (weights, order, ring_from_bytes, piece_bytes, ring_pace))
        epoch.plan = plan
        given = ffi.new("pyccl_op_verdict[]", max(1, len(verdicts)))
        for i, (space, tag, seq, verdict) in enumerate(verdicts):
            given[i].space, given[i].tag, given[i].seq, given[i].verdict = space, tag, seq, verdict
        check(lib.pyccl_engine_epoch(self._engine, epoch, given, len(verdicts)), "enter epoch")

    def counts(self) -> list[tuple[int, int, int]]:
        """Submits per (space, channel) since numbers restarted."""
        cap, count = 256, ffi.new("size_t *")
        while True:
            out = ffi.new("pyccl_op_count[]", cap)
            check(lib.pyccl_engine_counts(self._engine, out, cap, count), "counts")
            if count[0] <= cap:
                return [(c.space, c.tag, c.count) for c in out[0 : count[0]]]
            cap = count[0]

    def cut(self, counts: Sequence[tuple[int, int, int]]) -> bool:
        """Numbers below the cut run in this epoch, later ones wait. True: counts of ours are above it."""
        given = ffi.new("pyccl_op_count[]", max(1, len(counts)))
        for i, (space, tag, count) in enumerate(counts):
            given[i].space, given[i].tag, given[i].count = space, tag, count
        behind = ffi.new("int *")
        check(lib.pyccl_engine_cut(self._engine, given, len(counts), 0, behind), "cut")
        return bool(behind[0])

    def uncut(self) -> None:
        check(lib.pyccl_engine_cut(self._engine, ffi.NULL, 0, 1, ffi.new("int *")), "uncut")

    def give_up(self, why: int, lost: Sequence[bytes], age_s: float) -> None:
        """What was submitted so long ago, is not prepared and needs a master to go on fails with this status."""
        check(lib.pyccl_engine_give_up(self._engine, why, b"".join(lost), len(lost), _ns(age_s)), "give_up")

    def blocked(self) -> BlockedView:
        cap = 64
        out, count = ffi.new("pyccl_op_lack[]", cap), ffi.new("size_t *")
        waiters, quiet, below = ffi.new("uint32_t *"), ffi.new("int64_t *"), ffi.new("int *")
        check(lib.pyccl_engine_blocked(self._engine, out, cap, count, waiters, quiet, below), "blocked")
        lacking = tuple([(k.space, k.tag, k.seq) for k in out[0 : min(cap, count[0])]])
        return BlockedView(lacking, quiet[0] / NS, bool(below[0]))

    # -- operations

    def submit(
        self,
        spec: Spec,
        src: object | None,
        dst: object | None,
        timeout: float,
        begun: list[Op],
        put_back: Callable[[], None] | None = None,
        user: int = 0,
        weight: float = 1.0,
    ) -> Op:
        """Start an operation on C-contiguous buffers; they belong to the engine until the operation has ended.

        It stands in `begun` before it starts: who is interrupted before this returns can still give it up. Where
        `dst` is a copy of the caller's array, `put_back` takes the result there; ``Op.finish`` calls it.
        user: unless 0, an EventType.OP with this value tells of its end.
        """
        to = _NULL if dst is None else ffi.from_buffer(_BYTES, dst, require_writable=True)
        at = to if src is dst else _NULL if src is None else ffi.from_buffer(_BYTES, src)
        to_bytes = 0 if dst is None else len(to)
        args = ffi.new(_OP_ARGS, (spec, at, to, to_bytes, weight, max(1, _ns(timeout)), user, user != 0))
        if self._abandoned:
            self._release_abandoned()
        slot = ffi.new(_OP_SLOT)
        op = Op(self, slot, (at, to), put_back)
        op.keeps = dst is None and spec.kind in (Kind.ALL_GATHER, Kind.REDUCE_SCATTER) and spec.elements > 0
        with self._ops_lock:
            self._ops.add(op)
        begun.append(op)
        try:
            status = lib.pyccl_op_submit(self._engine, args, slot)
            if status < 0:
                check(status, "submit")
        except BaseException:
            if slot[0] == _NULL:
                self.forget(op)
            raise
        return op

    def abandon(self, op: Op) -> None:
        """Nobody will wait for it: it runs on, and is released some time after its end. No locks: for destructors."""
        self._abandoned.append(op)

    def _release_abandoned(self) -> None:
        ended: list[Op] = []
        with self._ops_lock:
            for _ in range(len(self._abandoned)):
                op = self._abandoned.popleft()
                (ended if op.done() else self._abandoned).append(op)
        for op in ended:
            op.release()

    def forget(self, op: Op) -> bool:
        """The caller releases it; False: somebody else has."""
        with self._ops_lock:
            known = op in self._ops
            self._ops.discard(op)
        return known

    # -- shared state

    def publish(self, sync: int, buffers: Sequence[object]) -> None:
        """Serve these buffers, one behind the other, to members that ask for `sync`, until ``unpublish``."""
        pins = [ffi.from_buffer("uint8_t[]", b) for b in buffers]
        regions = ffi.new("pyccl_region[]", max(1, len(pins)))
        for i, pin in enumerate(pins):
            regions[i].data, regions[i].size_bytes = pin, len(pin)
        check(lib.pyccl_state_publish(self._engine, sync, regions, len(pins)), "publish")
        self._published[sync] = pins

    def unpublish(self, sync: int) -> None:
        """Its memory is the caller's again; of a stopped engine it is already."""
        lib.pyccl_state_unpublish(self._engine, sync)
        self._published.pop(sync, None)

    def fetch(self, slot: int, sync: int, offset: int, dst: object, fetch: int, packed: bool) -> None:
        """Ask a holder for bytes; EventType.STATE with value=fetch ends it; count: how many packed ones came."""
        pin = ffi.from_buffer("uint8_t[]", dst, require_writable=True)
        self._fetches[fetch] = pin
        try:
            check(lib.pyccl_state_fetch(self._engine, slot, sync, offset, len(pin), pin, fetch, packed), "fetch")
        except BaseException:
            self._fetches.pop(fetch, None)
            raise

    def packed(self, slot: int, sync: int, offset: int, size_bytes: int, data: bytes) -> None:
        """Answer EventType.PACK; b"": as it is. Nothing happens if nobody waits for it any more."""
        lib.pyccl_state_packed(self._engine, slot, sync, offset, size_bytes, data, len(data))

    def fetched(self, fetch: int) -> None:
        """The event of this fetch came: its buffer is the caller's again."""
        self._fetches.pop(fetch, None)

    def cancel_fetch(self, fetch: int) -> bool:
        """True: its buffer is the caller's again and no event comes. False: it has ended, its event is on its way."""
        if lib.pyccl_state_cancel(self._engine, fetch) != OK:
            return False
        self._fetches.pop(fetch, None)
        return True

    def forget_fetches(self) -> None:
        """Their buffers are the caller's again; no event of theirs comes any more."""
        lib.pyccl_state_forget(self._engine)
        self._fetches.clear()


class Op:
    """One operation. Its buffers stay pinned until it has ended; ``release`` gives the handle back."""

    def __init__(self, engine: Engine, slot: Any, pins: tuple[Any, ...], put_back: Callable[[], None] | None) -> None:
        self._engine: Engine | None = engine  # kept alive until the release
        self._put_back = put_back
        self._slot, self._pins = slot, pins  # slot: pyccl_op **, filled by the submit
        self._free_lock = threading.RLock()  # who looks at the handle in ``done`` keeps it from being freed meanwhile
        self.keeps = False  # it has no dst: its result stays here until ``take``
        self.ended: OpInfo | None = None  # set by ``finish``

    @property
    def _handle(self) -> Any:
        return self._slot[0]

    def done(self) -> bool:
        with self._free_lock:
            handle = self._handle
            return handle == _NULL or bool(lib.pyccl_op_done(handle))

    def abandon(self) -> None:
        """Nobody will wait for it: it runs on, and the engine releases it some time after its end."""
        engine = self._engine
        if engine is not None:
            engine.abandon(self)

    def wait(self, timeout: float) -> int:
        """Wait without the GIL, looking at Python's signals ten times a second: status, or PENDING in the end."""
        left = _ns(timeout)
        while True:
            part = min(left, _SLICE_NS)
            status = int(lib.pyccl_op_wait(self._slot[0], max(part, 0)))
            left -= part
            if status != PENDING or left <= 0:
                return status

    def cancel(self, why: int = CANCELLED) -> None:
        """Before DONE the operation fails with `why`; after it, it is settled at once. Then ``finish``."""
        with self._free_lock:
            if self._handle != _NULL:  # its waiter may have released it meanwhile
                lib.pyccl_op_cancel(self._handle, why)

    def finish(self) -> OpInfo:
        """Stay until the operation has ended, whatever is raised meanwhile; then free it and tell what it was."""
        interrupt: BaseException | None = None
        while self.ended is None:
            try:
                self.ended = self._info()
                if self.ended is None:
                    self.wait(3600.0)
            except BaseException as e:  # noqa: BLE001  Ctrl-C: C may still write into the array, so stay
                interrupt = e
        if not self.keeps or self.ended.status != OK:
            self.release()
        put_back, self._put_back = self._put_back, None
        if put_back is not None and self.ended.status == OK:
            put_back()
        if interrupt is not None:
            raise interrupt
        return self.ended

    def take(self, out: object) -> None:
        """Copy the result that a finished operation of `keeps` holds; then ``release`` it."""
        pin = ffi.from_buffer("uint8_t[]", out, require_writable=True)
        check(lib.pyccl_op_take(self._handle, pin, len(pin)), "take")

    def _info(self) -> OpInfo | None:
        """None: it has not ended."""
        out = ffi.new(_OP_INFO)
        lib.pyccl_op_info_get(self._slot[0], out)
        status = out.status
        if status == PENDING:
            return None
        peer = b"" if status == OK else bytes(ffi.buffer(out.peer))
        return OpInfo(
            status, out.attempts, out.epoch_number, out.seq, out.tx_bytes, out.rx_bytes, out.elapsed_ns / NS,
            peer if any(peer) else b"", out.algorithm,
        )  # fmt: skip

    def release(self) -> None:
        """Free a handle whose operation has ended. Idempotent."""
        engine = self._engine
        if engine is None or not engine.forget(self):
            return
        with self._free_lock:
            handle, self._slot[0] = self._slot[0], _NULL
            self._pins = ()
            lib.pyccl_op_free(handle)
        self._engine = None


def chunk_digests(buffer: object) -> bytes:
    """16 bytes of XXH3-128 for each CHUNK_BYTES of the buffer."""
    pin = ffi.from_buffer("uint8_t[]", buffer)
    out = ffi.new("uint8_t[]", max(1, -(-len(pin) // CHUNK_BYTES) * 16))
    lib.pyccl_chunk_digests(pin, len(pin), CHUNK_BYTES, out)
    return bytes(ffi.buffer(out, -(-len(pin) // CHUNK_BYTES) * 16))


def fold_rate() -> float:
    """Bytes per second that this process reads when it folds float32."""
    arrays = [ffi.new("float[]", _TIMED_ELEMENTS) for _ in range(2)]
    inputs = ffi.new("void *[]", arrays)
    least_s = _least_s(
        lambda: lib.pyccl_reduce(lib.PYCCL_FLOAT32, lib.PYCCL_SUM, inputs, _NULL, 2, _TIMED_ELEMENTS, arrays[0])
    )
    return float(2 * ffi.sizeof(arrays[0]) / least_s)


def code_rate() -> float:
    """Bytes per second of float32 that this process codes as uint8, or decodes: the mean of both."""
    values = ffi.new("float[]", _TIMED_ELEMENTS)
    kind = lib.PYCCL_CODEC_UINT8, lib.PYCCL_FLOAT32, _TIMED_BLOCK
    codes = ffi.new("uint8_t[]", int(lib.pyccl_codec_size(kind[0], _TIMED_BLOCK, _TIMED_ELEMENTS)))
    encode_s = _least_s(lambda: lib.pyccl_codec_encode(*kind, values, _TIMED_ELEMENTS, codes))
    decode_s = _least_s(lambda: lib.pyccl_codec_decode(*kind, codes, _TIMED_ELEMENTS, values))
    return float(2 * ffi.sizeof(values) / (encode_s + decode_s))


def _least_s(run: Callable[[], int]) -> float:
    """Of a few short runs."""
    best = float("inf")
    for _ in range(_TIMED_RUNS):
        begun = time.perf_counter()
        status = run()
        best = min(best, time.perf_counter() - begun)
        check(status, "timed")
    return best


FRAME_BYTES: Final[int] = lib.PYCCL_FRAME_SIZE


def is_heartbeat_untrusted(header: bytes) -> bool:
    """Whether these FRAME_BYTES are a well-formed HEARTBEAT."""
    frame = ffi.new("pyccl_frame *")
    status: int = lib.pyccl_frame_decode_untrusted(header, frame)
    return status == OK and frame.type == lib.PYCCL_FRAME_HEARTBEAT


__all__ = ["OK", "PENDING", "Engine", "Event", "EventType", "Kind", "Op", "OpInfo", "Spec", "chunk_digests"]
