"""A simulated peer process: the real MemberMachine, and what _io/session.py and _io/links.py do around it.

Two threads as in production: the engine (``engine=True`` in ``soon``; runs unless the process is stopped) and the
control thread (also waits while it is held, as Python is by a long call that keeps the GIL).

Ahead of session.py, which it should follow: before a report it looks whether its calls are still blocked.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from sim_engine import SimEngine
from sim_native import lib
from sim_world import CLOSE, SENT_KEPT, Conn, Process, S

from pyccl._proto import member
from pyccl._proto.epoch import Address, Member
from pyccl._proto.limits import PAUSE_S
from pyccl._proto.member import Link, MemberMachine, State
from pyccl._proto.messages import (
    CAUSE_PROTOCOL,
    CAUSE_REFUSED,
    CAUSE_SILENT,
    Alive,
    Arrive,
    Blocked,
    Count,
    Entered,
    Heartbeat,
    Key,
    LinkMeasure,
    Measured,
    OpReport,
    Report,
    Settle,
    Unblocked,
    Withdraw,
    from_wire_untrusted,
    to_wire,
)
from pyccl.errors import RemoteProtocolError

if TYPE_CHECKING:
    from sim_checks import Checks
    from sim_cluster import SimCluster

TICK_S: Final = 0.1
LINKS_TIMEOUT_S: Final = 10.0
GREET_S: Final = 10.0
DIAL_S: Final = 5.0
LEAVE_S: Final = 2.0
MEASURE_RATE: Final = 0.1  # of the safe points before which a member tells of its lines
LINES_LAST_S: Final = 10.0  # so long are they as they are
CONTROL_BACKOFF_S: Final = (0.05, 1.0)
DIAL_BACKOFF_S: Final = (0.05, 1.0)
REPEATABLE: Final = (Arrive, Withdraw, Report, Settle, Blocked, Unblocked, Entered)  # they name their epoch


@dataclass(eq=False)
class Dial:
    """One task that tries to connect."""

    pause: float = DIAL_BACKOFF_S[0]
    over: bool = False
    conn: Conn | None = None


@dataclass(eq=False)
class Known:
    member: Member
    slot: int
    dialing: list[Dial] = field(default_factory=list)


class SimPeer(Process):
    def __init__(self, cluster: SimCluster, name: str, group: int, peer: bytes, incarnation: bytes) -> None:
        super().__init__(cluster.world, name)
        self.cluster, self.group, self.peer, self.incarnation = cluster, group, peer, incarnation
        self.options = cluster.options
        self.checks: Checks = cluster.checks
        self.address = Address("sim", 1 + self.index)
        self.machine = MemberMachine(peer, incarnation, group, (self.address,), "sim")
        self.engine: SimEngine | None = None
        self.over: str = ""  # why the session ended
        self.excused_until = 0  # an eviction before then has a reason
        self.control: Conn | None = None
        self.control_pause = CONTROL_BACKOFF_S[0]
        self.pending = 0
        self.waiting = 0  # blocked calls of the program
        self.topology: Callable[[str], None] | None = None
        self.on_joined: Callable[[], object] | None = None
        self.messages_out = 0  # to the master, but heartbeats
        self._arrived_at = self._down_since = self._needed_since = self._ticked_at = 0.0
        self._told: deque[Any] = deque(maxlen=SENT_KEPT)
        self._effects: deque[member.Effect] = deque()
        self._performing = False
        self._events: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._cut_version = self._cut_number = 0
        self._cookies = self.index << 32
        self._known: dict[bytes, Known] = {}
        self._strangers: list[tuple[SimPeer, Dial, Conn]] = []
        self._wanted_version: int | None = None
        self._wanted: tuple[bytes, ...] = ()
        self.soon(0.0, self._dial_master)
        self.soon(TICK_S, self._tick)

    @property
    def runs(self) -> bool:
        return self.alive and not self.over

    @property
    def number(self) -> int:
        return self.machine.epoch.number if self.machine.epoch is not None else 0

    def cookie(self) -> int:
        """Names a submit of this process, in the whole cluster."""
        self._cookies += 1
        return self._cookies

    # ---- the end

    def crash(self) -> None:
        """kill -9: the kernel closes everything; part of what was sent may still arrive."""
        self.world.note("%s crashes", self.name)
        self.alive = False
        self._hang_up()
        if self.engine is not None:
            self.engine.running = False
            for link in self.engine.links.values():
                for conn in link.conns:
                    conn.close(self, lossy=True)

    def finish(self, why: str, status: int = lib.PYCCL_ERR_CLOSED) -> None:
        """The session's thread ends, and with it engine and connections."""
        if self.over:
            return
        self.over = why
        self.world.note("%s is out: %s", self.name, why)
        self._hang_up()
        if self.engine is not None:
            self.engine.stop(status)
        topology, self.topology, self.on_joined = self.topology, None, None
        if topology is not None:
            topology(why)
        self.cluster.ended(self)

    def _hang_up(self) -> None:
        if self.control is not None:
            self.control.close(self, lossy=False)
            self.control = None

    def leave(self) -> None:
        self.world.note("%s leaves", self.name)
        self.excused_until = 1 << 62
        self.feed(self.machine.leave(self.now_s))
        self.soon(LEAVE_S if self.control is not None else 0.0, self.finish, "left")

    # ---- the control connection

    def _dial_master(self) -> None:
        master = self.cluster.master
        if self.over or self.machine.state is State.ENDED or self.control is not None:
            return
        if not master.alive or self.world.apart(self, master):
            self._dial_master_again()
            return
        self.control = Conn(self.world, (self, master), (self._from_master, master.deliver), engine=False)
        master.accepted.append(self.control)
        self._down_since = self.now_s
        self.feed(self.machine.connected(self.now_s))

    def _dial_master_again(self) -> None:
        self.soon(self.control_pause * (0.5 + self.world.rng.random()), self._dial_master)
        self.control_pause = min(self.control_pause * 2, CONTROL_BACKOFF_S[1])

    def _from_master(self, conn: Conn, message: Any) -> bool:
        if conn is not self.control or self.over:
            return True
        if message is CLOSE:
            conn.close(self, lossy=False)
            self.control = None
            self.world.note("%s lost the master", self.name)
            if self.machine.state is State.ENDED:
                self.finish("left")
                return True
            self.feed(self.machine.disconnected(self.now_s))
            self._dial_master_again()
            return True
        if not isinstance(message, Alive):
            self.world.note("%s <- %s", self.name, message)
        try:
            effects = self.machine.receive(message, self.now_s)
        except RemoteProtocolError as exc:
            self.checks.fail(f"{self.name} refuses a message of an honest master: {exc}: {message}")
            return True
        self.feed(effects)
        if self.machine.run is not None and self.engine is None and not self.over:
            self.engine = SimEngine(self, self.machine.peer_timeout, self.options.stall_s)
        return True

    def pulse(self) -> None:
        """From the engine's thread; a connection of its own, which outlives the control connection."""
        if not self.world.blocked(self, self.cluster.master):
            self.world.at(self.world.latency(), self.cluster.master.pulse, self)

    # ---- effects, in order; what they lead to queues behind

    def feed(self, effects: list[member.Effect]) -> None:
        self._effects.extend(effects)
        if self._performing:
            return
        self._performing = True
        while self._effects:
            self._perform(self._effects.popleft())
        self._performing = False

    def _perform(self, effect: member.Effect) -> None:
        machine, engine, now = self.machine, self.engine, self.now_s
        match effect:
            case member.Send(message):
                if self.control is not None:
                    assert not self.options.wire_check or from_wire_untrusted(to_wire(message)) == message
                    if not isinstance(message, Heartbeat):
                        self.messages_out += 1
                        if isinstance(message, REPEATABLE):
                            self._told.append(message)
                        self.world.note("%s -> %s", self.name, message)
                    self.control.send(self, message)
            case member.OpenLinks(version, _, peers):
                self._open(version, peers)
            case member.KeepLinks(peers):
                for peer in sorted(set(self._known) - set(peers)):
                    self._forget(peer)
            case member.SetCut(version, counts):
                assert engine is not None
                self._cut_version = version
                self._cut_number += 1
                if engine.set_cut(counts):
                    self.feed(machine.behind(version, self._counts(), now))
            case member.ClearCut():
                assert engine is not None
                self._cut_number += 1
                engine.uncut()
            case member.Freeze(ballot):
                assert engine is not None
                self._watch_blocked(now)  # a report that says "blocked" of a call that has ended makes a false mismatch
                ops = engine.freeze()
                if ops is None:
                    self.on_leave()
                    return
                self.feed(machine.frozen(ballot, tuple(OpReport(*op) for op in ops), now))
            case member.Enter():
                self._enter(effect)
            case member.Joined():
                joined, self.on_joined = self.on_joined, None
                if joined is not None:
                    joined()
            case member.NeedCounts():
                self.feed(machine.arrive(self._counts(), now))
            case member.SafePointDone(error, _):
                waiter, self.topology = self.topology, None
                if waiter is not None:
                    waiter("" if error is None else "mismatch")
            case member.PendingChanged(count):
                self.pending = count
            case member.MismatchNotice(detail):
                self.checks.mismatch(self, detail)
            case member.Ended(kind, reason):
                if kind != "left":
                    self.finish(f"{kind}: {reason}", lib.PYCCL_ERR_EVICTED)

    def _enter(self, effect: member.Enter) -> None:
        engine, epoch = self.engine, effect.epoch
        assert engine is not None
        self.checks.enters(self, effect, engine.fsm.counts())
        rc = engine.enter(
            *(epoch.number, epoch.id, epoch.peers, effect.rank), effect.restart, effect.mismatch, effect.verdicts
        )
        if rc == lib.PYCCL_ERR_OUTCOME_UNKNOWN:
            self.on_leave()
            return
        if rc != 0:
            self.checks.fail(f"{self.name} can't obey epoch {epoch.number}: status {rc}, verdicts {effect.verdicts}")
            return
        self.feed(self.machine.entered(epoch.number, self.now_s))

    def _counts(self) -> tuple[Count, ...]:
        assert self.engine is not None
        return tuple(Count(*count) for count in self.engine.fsm.counts())

    # ---- calls of the program

    def arrive(self, waiter: Callable[[str], None]) -> None:
        """waiter("") when it ended well, else with the reason."""
        if self.machine.state is not State.MEMBER or self.over:
            waiter(self.over or "not connected")
            return
        self.topology = waiter
        self._arrived_at = self.now_s
        if self.options.measures and self.world.rng.random() < MEASURE_RATE:
            self.feed(self.machine.measured(self._lines(), self.now_s))
        self.feed(self.machine.arrive(self._counts(), self.now_s))

    def _lines(self) -> Measured:
        """Of its links to some of the others: each host has a rate for a while, and some pairs are not measured."""
        assert self.machine.epoch is not None
        when, rng = int(self.now_s / LINES_LAST_S), self.world.rng
        rows = []
        for peer in self.machine.epoch.peers:
            lines = [random.Random(f"line {id_.hex()} {when}") for id_ in (peer, self.peer)]
            rates = [line.choice((10**6, 10**7, 10**8)) for line in lines]
            if peer != self.peer and rng.random() < 0.8:
                alone = 0 if rng.random() < 0.05 else min(rates)
                rows.append(LinkMeasure(peer, alone, alone // 3, rng.randrange(200_000)))
        return Measured(*(rng.choice((0, 10**9)) for _ in range(4)), tuple(rows))

    def withdraw(self, waiter: Callable[[str], None], why: str) -> None:
        if self.topology is waiter:
            self.topology = None
            self.feed(self.machine.withdraw(self.now_s))
            waiter(why)

    # ---- engine events and time

    def engine_event(self, handler: Callable[..., None], *args: Any) -> None:
        """From the engine's thread to the control thread, in order."""
        self._events.append((handler, args))
        if len(self._events) == 1:
            self.soon(self.world.rng.random() * 0.002, self._pump)

    def _pump(self) -> None:
        while self._events:
            handler, args = self._events.popleft()
            if not self.over:
                handler(*args)

    def _peer_of(self, slot: int) -> bytes | None:
        return next((peer for peer, known in self._known.items() if known.slot == slot), None)

    def _suspect(self, peer: bytes | None, cause: str, detail: str) -> None:
        if peer is not None and not self.over:
            self.feed(self.machine.suspect(peer, cause, detail, self.now_s))

    def on_silent(self, slot: int) -> None:
        self._suspect(self._peer_of(slot), CAUSE_SILENT, "nothing heard")

    def on_refused(self, slot: int) -> None:
        self._suspect(self._peer_of(slot), CAUSE_PROTOCOL, "it broke the protocol")

    def on_heard(self, slot: int) -> None:
        peer = self._peer_of(slot)
        if peer is not None:
            self.feed(self.machine.trust(peer, self.now_s))

    def on_settle(self) -> None:
        self.feed(self.machine.settle(self.now_s))

    def on_leave(self) -> None:
        self.excused_until = 1 << 62
        self.finish("outcome unknown")

    def on_differs(self, slot: int, key: tuple[int, int, int], mine: bytes, theirs: bytes) -> None:
        peer = self._peer_of(slot)
        if peer is not None:
            self.feed(self.machine.differs(Key(*key), peer, mine, theirs, self.now_s))

    def on_drained(self, cuts: int) -> None:
        if cuts == self._cut_number:
            self.feed(self.machine.drained(self._cut_version, self.now_s))

    def _tick(self) -> None:
        if self.over:
            return
        self.soon(TICK_S, self._tick)
        now = self.now_s
        if now - self._ticked_at > PAUSE_S:  # we were stopped ourselves: nobody made us wait meanwhile
            self._down_since = self._needed_since = self._arrived_at = now
        self._ticked_at = now
        if self.engine is None or self.machine.state is State.ENDED:
            return
        self.feed(self.machine.tick(now))
        self._watch_blocked(now)
        self._watch_master(now)

    def _watch_blocked(self, now: float) -> None:
        assert self.engine is not None
        grace = self.options.mismatch_grace
        at_safe_point = self.topology is not None and now - self._arrived_at >= grace
        if not at_safe_point and (self.waiting == 0 or self.topology is not None):
            self.feed(self.machine.unblocked(now))
            return
        if self.now - self.engine.quiet_since < int(grace * S):  # at the most it is quiet for so long
            self.feed(self.machine.unblocked(now))
            return
        lacking, quiet_s, below = self.engine.blocked()
        if quiet_s >= grace and (at_safe_point or lacking):
            self.feed(self.machine.blocked(tuple(Key(*key) for key in lacking), below, now))
        else:
            self.feed(self.machine.unblocked(now))

    def _watch_master(self, now: float) -> None:
        assert self.engine is not None
        away = self.machine.master_is_away(now)
        if not (away and self.machine.needs_master):
            self._needed_since = now
        elif now - self._needed_since >= self.options.master_timeout_s:
            self.engine.give_up(self.machine.lost, self.options.master_timeout_s)
        if not away:
            self._down_since = now
        elif self.topology is not None and now - self._down_since >= self.options.unreachable_s:
            self.withdraw(self.topology, "the master is away")

    # ---- links: as _io/links.py

    def _open(self, version: int, members: Iterable[Member]) -> None:
        members = tuple(members)
        assert self.engine is not None
        self._wanted_version, self._wanted = version, tuple(m.peer for m in members)
        for entry in members:
            known = self._know(entry)
            if self.engine.conns(known.slot) == 0 and self.peer < entry.peer:
                self._dial(known, self.options.connections)
        self._check_ready()
        if self._wanted_version is not None:
            self.soon(LINKS_TIMEOUT_S, self._expire, version)

    def _check_ready(self) -> None:
        if self._wanted_version is None or self.engine is None:
            return
        if all(p in self._known and self.engine.conns(self._known[p].slot) for p in self._wanted):
            version, self._wanted_version = self._wanted_version, None
            self.feed(self.machine.links_ready(version, self.now_s))

    def _expire(self, version: int) -> None:
        if self._wanted_version != version or self.over or self.engine is None:
            return
        missing = sorted(p for p in self._wanted if p not in self._known or not self.engine.conns(self._known[p].slot))
        self._wanted_version = None
        self.feed(self.machine.links_failed(version, tuple(missing), "no data connection", self.now_s))

    def _know(self, entry: Member) -> Known:
        known = self._known.get(entry.peer)
        if known is not None and known.member.incarnation == entry.incarnation:
            return known
        if known is not None:
            self._forget(entry.peer)
        assert self.engine is not None
        known = self._known[entry.peer] = Known(entry, self.engine.peer_add(entry.peer))
        waiting, self._strangers = self._strangers, []
        for stranger, dial, conn in waiting:
            self._greet(stranger, dial, conn, self.peer, self.incarnation)
        return known

    def _forget(self, peer: bytes) -> None:
        known = self._known.pop(peer)
        for dial in known.dialing:
            dial.over = True
        assert self.engine is not None
        self.engine.peer_remove(known.slot)

    def on_conn_down(self, slot: int, left: int) -> None:
        peer = self._peer_of(slot)
        if peer is None:
            return
        known = self._known[peer]
        if self.peer < peer:
            self._dial(known, self.options.connections - left)
        elif left == 0:
            self._dial(known, 1)

    def _dial(self, known: Known, count: int) -> None:
        for _ in range(count - len(known.dialing)):
            dial = Dial()
            known.dialing.append(dial)
            self._try(known, dial)

    def _try(self, known: Known, dial: Dial) -> None:
        """A SYN leaves; what comes of it is seen a latency later."""
        if not dial.over and not self.over:
            self.soon(self.world.latency(), self._tried, known, dial)

    def _try_again(self, known: Known, dial: Dial, after_s: float) -> None:
        self.soon(after_s + dial.pause * (0.5 + self.world.rng.random()), self._try, known, dial)
        dial.pause = min(dial.pause * 2, DIAL_BACKOFF_S[1])

    def _tried(self, known: Known, dial: Dial) -> None:
        if dial.over or self.over or self.engine is None:
            return
        target = self.cluster.peer_at(known.member.addresses[0])
        if self.world.apart(self, target):
            self._try_again(known, dial, DIAL_S)
        elif not target.runs:
            if self.engine.conns(known.slot) == 0:
                self._suspect(known.member.peer, CAUSE_REFUSED, "connection refused")
            self._try_again(known, dial, 0.0)
        else:
            ends = (self._data_for(known.member.peer), target._data_for(self.peer))
            conn = Conn(self.world, (self, target), ends, engine=True)
            dial.conn = conn
            to = known.member
            target.soon(self.world.latency(), target._greet, self, dial, conn, to.peer, to.incarnation)
            self.soon(DIAL_S, self._dial_expires, known, dial, conn)

    def _data_for(self, peer: bytes) -> Callable[[Conn, Any], bool]:
        def deliver(conn: Conn, item: Any) -> bool:
            return self.engine is None or self.engine.on_frame(peer, conn, item)

        return deliver

    def _greet(self, dialer: SimPeer, dial: Dial, conn: Conn, peer: bytes, incarnation: bytes) -> None:
        """A PeerHello is here. An unknown sender is kept: the EpochPropose that names it may be on its way."""
        known = self._known.get(dialer.peer)
        if self.over or (peer, incarnation) != (self.peer, self.incarnation):
            conn.close(self, lossy=False)
        elif known is not None and known.member.incarnation == dialer.incarnation:
            if not conn.whole:
                return
            dialer.soon(self.world.latency(), dialer._welcomed, self.peer, dial, conn)
            self._adopt(known, conn)
        else:
            entry = (dialer, dial, conn)
            self._strangers.append(entry)
            self.soon(GREET_S, lambda: self._strangers.remove(entry) if entry in self._strangers else None)

    def _welcomed(self, peer: bytes, dial: Dial, conn: Conn) -> None:
        known = self._known.get(peer)
        if dial.over or dial.conn is not conn or self.over or known is None or dial not in known.dialing:
            conn.close(self, lossy=False)
            return
        if conn.closed[1]:  # the other end is gone again: the greeting fails
            dial.conn = None
            conn.close(self, lossy=False)
            self._try_again(known, dial, 0.0)
            return
        dial.over = True
        known.dialing.remove(dial)
        self._adopt(known, conn)

    def _dial_expires(self, known: Known, dial: Dial, conn: Conn) -> None:
        if dial.over or dial.conn is not conn:
            return
        dial.conn = None
        conn.close(self, lossy=False)
        self._try_again(known, dial, 0.0)

    def _adopt(self, known: Known, conn: Conn) -> None:
        assert self.engine is not None
        self.engine.conn_add(known.slot, conn)
        self.feed(self.machine.trust(known.member.peer, self.now_s))
        self._check_ready()

    # ---- faults

    def reset_data(self, share: float) -> None:
        """Some of its data connections break."""
        if self.engine is None:
            return
        for link in list(self.engine.links.values()):
            for conn in list(link.conns):
                if self.world.rng.random() < share:
                    conn.reset()

    def repeat_later(self, after_s: float) -> None:
        """What it has just sent arrives once more, when those who get it have gone on to another epoch."""
        if self.engine is not None:
            for link in self.engine.links.values():
                for conn in link.conns:
                    frames = [*conn.pipes[conn.end_of(self)].sent]
                    self.soon(after_s, self._repeat_frames, link.peer, frames, engine=True)
        self.soon(after_s, self._repeat_messages, [*self._told])

    def _repeat_frames(self, peer: bytes, frames: list[Any]) -> None:
        link = None if self.engine is None else self.engine.by_id.get(peer)
        if link is None or not link.conns:
            return
        conn = link.conns[0]
        other = conn.owners[1 - conn.end_of(self)]
        assert isinstance(other, SimPeer)
        for frame in frames:
            if other.engine is not None and frame[0] < other.engine.number:
                conn.send(self, frame)

    def _repeat_messages(self, messages: list[Any]) -> None:
        if self.control is None or self.machine.link is not Link.UP:
            return
        for message in messages:
            if message.epoch < self.number:
                self.control.send(self, message)

    def reset_control(self) -> None:
        if self.control is not None:
            self.world.note("control connection of %s breaks", self.name)
            self.control.reset()
