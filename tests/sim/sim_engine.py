"""What engine.c does around the operation machine, without bytes: links of several connections, attempts, timers.

Data is a set of contributions (peer, submit, epoch, payload); the result of an attempt is the frozen set of all that
its kind needs, sent by everybody to everybody. Everything that concerns outcomes goes through the compiled machine.

Ahead of engine.c, which it should follow: "quiet" (mismatch detection) counts from the last submit, end of an
operation, cut or epoch, not from the last submit alone; or late messages look like missing calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import sim_fsm
from sim_fsm import LATER, PASS, REFUSE, Fsm
from sim_native import lib
from sim_world import CLOSE, Conn, S

if TYPE_CHECKING:
    from sim_peer import SimPeer

U64: Final = (1 << 64) - 1
fsm_next: Final = lib.pyccl_fsm_next
fsm_gate: Final = lib.pyccl_fsm_gate
fsm_tick: Final = lib.pyccl_fsm_tick
COMMIT: Final = lib.PYCCL_ACT_COMMIT
DIFFERS: Final = lib.PYCCL_ACT_DIFFERS
FAIL: Final = lib.PYCCL_ACT_FAIL
LEAVE: Final = lib.PYCCL_ACT_LEAVE
PEER_OPEN: Final = lib.PYCCL_ACT_PEER_OPEN
SEND: Final = lib.PYCCL_ACT_SEND
SETTLE: Final = lib.PYCCL_ACT_SETTLE
START: Final = lib.PYCCL_ACT_START
STOP: Final = lib.PYCCL_ACT_STOP
EAGER_RATE: Final = 0.8
GAP_NS: Final = S

# A frame on its way: (epoch number, epoch tag, control message or None, (space, tag, seq, contribution) or None)
Frame = tuple[int, int, bytes | None, tuple[int, int, int, tuple[Any, ...]] | None]


@dataclass(eq=False)
class Op:
    """One call of a user program."""

    cookie: int
    spec: Any
    label: tuple[int, ...]  # what the program means by it; travels as payload
    deadline: int
    space: int = 0
    tag: int = 0
    kind: int = 0
    root: bytes = b""
    partner: bytes = b""  # of an exchange
    flip: bool = False  # this peer computes wrong bits
    seq: int | None = None  # known once it started or ended with a number
    lineage: bytes = b""
    attempts: int = 0
    status: int | None = None
    result: frozenset[tuple[Any, ...]] | None = None
    members: tuple[bytes, ...] = ()
    then: Callable[[Op], None] | None = None


@dataclass(eq=False)
class Attempt:
    op: Op
    epoch: int
    members: tuple[bytes, ...]
    value: tuple[Any, ...]
    needs: frozenset[int]  # ranks
    to: tuple[int, ...]  # ranks that need ours
    got: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    eager: bool = True
    opened: set[int] = field(default_factory=set)
    sent: dict[int, Conn] = field(default_factory=dict)  # rank -> connection that carries it
    lost: set[int] = field(default_factory=set)
    result: frozenset[tuple[Any, ...]] | None = None


@dataclass(eq=False)
class Link:
    """An engine peer."""

    peer: bytes
    slot: int
    heard: int
    rank: int = -1
    conns: list[Conn] = field(default_factory=list)
    unread: set[Conn] = field(default_factory=set)  # paused until a later epoch
    silent: bool = False
    reset_owed: bool = True


class SimEngine:
    def __init__(self, owner: SimPeer, peer_timeout: float, stall_s: float) -> None:
        self.owner, self.world = owner, owner.world
        self.silence = int(peer_timeout * S)
        self.beat = peer_timeout / 5
        self.fsm = Fsm(self.silence, int(stall_s * S), S // 5)
        self.handle, self.action = self.fsm.handle, self.fsm.action
        self.links: dict[int, Link] = {}
        self.by_id: dict[bytes, Link] = {}
        self.slots = 0
        self.ranks: dict[int, Link] = {}
        self.members: tuple[bytes, ...] = ()
        self.rank, self.number, self.epoch_tag = -1, 0, 0
        self.lineage = b""
        self.ops: dict[int, Op] = {}
        self.attempts: dict[int, Attempt] = {}
        self.early: dict[tuple[int, int, int], list[tuple[int, tuple[Any, ...]]]] = {}  # (space, channel, seq) -> ...
        self.cut_set = self.drained_told = self.acting = self.ending = False
        self.cuts = 0
        self.from_peer = False  # the machine is working on a frame
        self.quiet_since = self.turned = owner.now
        self.tick_due = sim_fsm.NO_TIMER
        self.running = True
        owner.soon(self.beat, self._links_check, engine=True)

    @property
    def frozen(self) -> bool:
        return bool(lib.pyccl_fsm_frozen(self.handle))

    # ---- commands of the control thread

    def peer_add(self, peer: bytes) -> int:
        link = self._link(peer)
        return link.slot

    def _link(self, peer: bytes) -> Link:
        link = self.by_id.get(peer)
        if link is None:
            self.slots += 1
            link = self.by_id[peer] = self.links[self.slots] = Link(peer, self.slots, self.owner.now)
            if peer in self.members and self.rank >= 0:
                link.rank = self.members.index(peer)
                self.ranks[link.rank] = link
                self._send_data(link)
        return link

    def peer_remove(self, slot: int) -> None:
        link = self.links.pop(slot)
        for conn in list(link.conns):
            self._take_down(link, conn)
            conn.close(self.owner, lossy=True)
        del self.by_id[link.peer]
        self.ranks.pop(link.rank, None)
        self._after()

    def conn_add(self, slot: int, conn: Conn) -> None:
        link = self.links[slot]
        link.conns.append(conn)
        conn.adopted[conn.end_of(self.owner)] = True
        link.heard = self.owner.now
        if link.reset_owed:
            link.reset_owed = False
            if link.rank >= 0:
                lib.pyccl_fsm_link_reset(self.handle, link.rank, self.owner.now)
        self._after()
        self._send_data(link)
        self.world.repump(0.0005)

    def conns(self, slot: int) -> int:
        return len(self.links[slot].conns)

    def freeze(self) -> list[tuple[int, int, int, int, int]] | None:
        """None: it has left the run."""
        if lib.pyccl_fsm_freeze(self.handle, self.owner.now) != 0:
            return None
        report = self.fsm.report()
        self._after()
        return report

    def enter(
        self,
        number: int,
        epoch_id: bytes,
        members: tuple[bytes, ...],
        rank: int,
        restart: bool,
        mismatch: bool,
        verdicts: tuple[tuple[int, int, int, int], ...],
    ) -> int:
        self._act()
        rc = self.fsm.epoch(number, epoch_id, members, rank, restart, mismatch, verdicts, self.owner.now)
        if rc != 0:
            return rc
        if restart:
            self.lineage = epoch_id
        self._forget_epoch()
        self.members, self.rank, self.number = members, rank, number
        self.epoch_tag = int.from_bytes(epoch_id[:8], "little")
        for r, peer in enumerate(members):
            if r != rank:
                link = self._link(peer)
                link.rank = r
                self.ranks[r] = link
        self.quiet_since = self.owner.now  # what is retried was submitted now: its OPENs are still on their way
        self._after()
        for link in list(self.links.values()):
            link.unread.clear()
        self.world.repump(0.001)
        return 0

    def _forget_epoch(self) -> None:
        for link in self.links.values():
            link.rank = -1
        self.ranks, self.members, self.rank = {}, (), -1
        self.early.clear()
        self.cut_set = self.drained_told = False

    def set_cut(self, counts: tuple[tuple[int, int, int], ...]) -> bool:
        self.quiet_since = self.owner.now  # what the cut asks for may be submitted from here
        self.cut_set, self.drained_told = self.rank >= 0, False
        self.cuts += 1
        behind = self.fsm.cut(counts, False, self.owner.now)
        self._after()
        return behind

    def uncut(self) -> None:
        self.cut_set = self.drained_told = False
        self.cuts += 1
        self.fsm.cut((), True, self.owner.now)
        self._after()

    def submit(self, op: Op) -> None:
        self.quiet_since = self.owner.now
        self.ops[op.cookie] = op
        rc = lib.pyccl_fsm_submit(self.handle, op.cookie, op.spec, op.deadline, self.owner.now)
        if rc != 0:
            self._end_op(op, rc)
        self._after()

    def cancel(self, op: Op) -> None:
        if op.status is None:
            lib.pyccl_fsm_cancel(self.handle, op.cookie, lib.PYCCL_ERR_CANCELLED, self.owner.now)
            self._after()

    def give_up(self, lost: Sequence[bytes], age_s: float) -> None:
        now, why = self.owner.now, lib.PYCCL_ERR_MASTER_AWAY
        lib.pyccl_fsm_give_up(self.handle, why, b"".join(lost), len(lost), now - int(age_s * S), now)
        self._after()

    def stop(self, why: int) -> None:
        """The process ends well: open operations fail, connections close."""
        if not self.running:
            return
        self.ending = True
        lib.pyccl_fsm_end(self.handle, why)
        self._act()
        self.running = False
        self._forget_epoch()
        for link in self.links.values():
            for conn in link.conns:
                conn.close(self.owner, lossy=True)
            link.conns.clear()

    # ---- connections

    def _take_down(self, link: Link, conn: Conn) -> None:
        if conn not in link.conns:
            return
        link.conns.remove(conn)
        link.unread.discard(conn)
        if link.rank >= 0:
            for attempt in self.attempts.values():
                if attempt.sent.get(link.rank) is conn:
                    del attempt.sent[link.rank]
                    attempt.lost.add(link.rank)
        if not link.conns:
            link.reset_owed = True

    def on_frame(self, peer: bytes, conn: Conn, frame: Any) -> bool:
        """A frame is here; False: it stays unread. (The process runs: pipes see to that.)"""
        end = 0 if conn.owners[0] is self.owner else 1
        if not conn.adopted[end] and not conn.closed[end] and self.running:
            return False  # still in the hands of the handshake
        link = self.by_id.get(peer)
        if not self.running or link is None or conn not in link.conns:
            return True
        self._turn()
        if frame is CLOSE:
            self._conn_down(link, conn)
            return True
        link.heard = self.turned
        if link.silent:
            self._heard(link)
        number, epoch_tag, raw, data = frame
        gate = fsm_gate(self.handle, number, epoch_tag, link.rank >= 0)
        if gate != PASS:
            return self._not_passed(gate, link, conn, frame)
        self.from_peer = True
        if raw is not None:
            self._message(link, raw)
        else:
            self._data(link, *data)
        self._act()
        self.from_peer = False
        self._after()
        return True

    def _not_passed(self, gate: int, link: Link, conn: Conn, frame: Any) -> bool:
        if gate == LATER:
            link.unread.add(conn)
        elif gate == REFUSE:
            self.owner.checks.refused(self.owner, link.peer, frame)
        return gate != LATER

    def _conn_down(self, link: Link, conn: Conn) -> None:
        self._take_down(link, conn)
        conn.close(self.owner, lossy=False)
        self.owner.engine_event(self.owner.on_conn_down, link.slot, len(link.conns))
        if link.conns and link.rank >= 0:
            lib.pyccl_fsm_link_reset(self.handle, link.rank, self.owner.now)
        self._after()
        if link.conns:
            self._send_data(link)

    def _message(self, link: Link, raw: bytes) -> None:
        if self.fsm.receive(raw, link.rank, self.owner.now) != 0:
            self.owner.checks.refused(self.owner, link.peer, raw)

    def _data(self, link: Link, space: int, tag: int, seq: int, value: tuple[Any, ...]) -> None:
        gate, cookie = self.fsm.data(link.rank, space, tag, seq)
        if gate == REFUSE:
            self.owner.checks.refused(self.owner, link.peer, (space, tag, seq, value))
        elif gate == PASS and cookie == 0:
            self.early.setdefault((space, self._channel(space, tag, link.rank), seq), []).append((link.rank, value))
        elif gate == PASS and cookie in self.attempts:
            self._contribution(self.attempts[cookie], link.rank, value)

    # ---- attempts

    def _contribution(self, attempt: Attempt, rank: int, value: tuple[Any, ...]) -> None:
        if self.frozen or rank not in attempt.needs or rank in attempt.got:
            return
        attempt.got[rank] = value
        lib.pyccl_fsm_progress(self.handle, attempt.op.cookie, self.owner.now)
        self._result_if_whole(attempt)

    def _result_if_whole(self, attempt: Attempt) -> None:
        if attempt.result is not None or len(attempt.got) < len(attempt.needs):
            return
        values = set(attempt.got.values())
        if attempt.op.flip:
            values.add((-1, self.owner.index))
        attempt.result = frozenset(values)
        lib.pyccl_fsm_result(self.handle, attempt.op.cookie, hash(attempt.result) & U64, self.owner.now)

    def _start(self, op: Op, seq: int) -> None:
        op.seq, op.lineage = seq, self.lineage
        op.attempts += 1
        others = tuple(r for r in range(len(self.members)) if r != self.rank)
        value, members = (self.owner.index, op.cookie, self.number, op.label), self.members
        partner = self.members.index(op.partner) if op.partner else 0
        if op.partner:
            needs, to = frozenset((self.rank, partner)), (partner,)
            members = tuple(sorted((self.owner.peer, op.partner)))
        elif op.kind == lib.PYCCL_BARRIER:
            needs, to = frozenset[int](), ()
        elif op.kind == lib.PYCCL_BROADCAST:
            root = self.members.index(op.root)
            needs, to = frozenset((root,)), others if root == self.rank else ()
        else:
            needs, to = frozenset(range(len(self.members))), others
        attempt = Attempt(op, self.number, members, value, needs, to)
        attempt.eager = self.world.rng.random() < EAGER_RATE
        self.attempts[op.cookie] = attempt
        self.owner.checks.started(self.owner, op, attempt)
        if self.rank in needs:
            attempt.got[self.rank] = value
        self._result_if_whole(attempt)
        for rank, early in self.early.pop((op.space, self._channel(op.space, op.tag, partner), seq), ()):
            self._contribution(attempt, rank, early)
        for rank in to:
            self._send_attempt(attempt, rank)

    def _channel(self, space: int, tag: int, rank: int) -> int:
        """What is numbered together; `rank`: with whom, where it is a pair."""
        return int(lib.pyccl_channel(space, tag, self.rank, rank))

    def _send_attempt(self, attempt: Attempt, rank: int) -> None:
        link = self.ranks.get(rank)
        if link is None or not link.conns or rank not in attempt.to or rank in attempt.sent or self.frozen:
            return
        if not (attempt.eager or rank in attempt.opened or rank in attempt.lost):
            return
        attempt.lost.discard(rank)
        op = attempt.op
        conn = self._pick(link)
        attempt.sent[rank] = conn
        conn.send(self.owner, (self.number, self.epoch_tag, None, (op.space, op.tag, op.seq, attempt.value)))

    def _send_data(self, link: Link) -> None:
        if link.rank >= 0:
            for attempt in list(self.attempts.values()):
                self._send_attempt(attempt, link.rank)

    def _pick(self, link: Link) -> Conn:
        conns = link.conns
        return conns[0] if len(conns) == 1 else conns[int(self.world.rng.random() * len(conns))]

    # ---- actions

    def _act(self) -> None:
        action = self.action
        if self.acting or not fsm_next(self.handle, action):
            return
        self.acting = True
        self._do(action.type, action)
        while fsm_next(self.handle, action):
            self._do(action.type, action)
        self.acting = False

    def _do(self, kind: int, action: Any) -> None:
        if kind == SEND:
            self._send_message(action.message.rank)
            return
        if kind == SETTLE:
            self.owner.engine_event(self.owner.on_settle)
            return
        if kind == LEAVE:
            self.owner.engine_event(self.owner.on_leave)
            self._forget_epoch()
            return
        op = self.ops.get(action.cookie)
        if op is None:
            return
        attempt = self.attempts.get(action.cookie)
        if kind == START:
            self._start(op, action.seq)
        elif kind == STOP:
            self.attempts.pop(op.cookie, None)
        elif kind == PEER_OPEN and attempt is not None:
            attempt.opened.add(action.rank)
            self._send_attempt(attempt, action.rank)
        elif kind == COMMIT:
            self._commit(op, attempt, action.seq)
        elif kind == FAIL:
            if op.seq is None and action.seq > 0:
                op.seq, op.lineage = action.seq, self.lineage
            self._end_op(op, action.status)
        elif kind == DIFFERS:
            link = self.ranks.get(action.rank)
            if link is not None:
                key = (op.space, self._channel(op.space, op.tag, action.rank), op.seq)
                theirs = sim_fsm.spec_bytes(sim_fsm.ffi.addressof(action, "message", "spec"))
                self.owner.engine_event(self.owner.on_differs, link.slot, key, sim_fsm.spec_bytes(op.spec), theirs)

    def _send_message(self, rank: int) -> None:
        raw = self.fsm.action_message()
        if raw[0] == lib.PYCCL_FRAME_DONE and self.from_peer and self.frozen:
            self.owner.checks.fail(f"{self.owner.name} sends DONE while it is frozen")
        link = self.ranks.get(rank)
        if link is None:
            return
        if not link.conns:
            link.reset_owed = True
            return
        self._pick(link).send(self.owner, (self.number, self.epoch_tag, raw, None))

    def _commit(self, op: Op, attempt: Attempt | None, seq: int) -> None:
        self.owner.checks.committed(self.owner, op, attempt)
        assert attempt is not None
        op.result, op.members = attempt.result, attempt.members
        self._end_op(op, 0)

    def _end_op(self, op: Op, status: int) -> None:
        self.quiet_since = self.owner.now  # a thread goes on: it may submit next
        del self.ops[op.cookie]
        self.attempts.pop(op.cookie, None)
        op.status = status
        if status != 0:
            self.owner.checks.failed(self.owner, op, status, own_end=self.ending)
        if op.then is not None:
            op.then(op)

    # ---- events and time

    def _after(self) -> None:
        """The end of a turn of the engine's loop."""
        self._act()
        if not self.running:
            return
        due = fsm_tick(self.handle, self.owner.now)
        self._act()
        if self.cut_set and not self.drained_told and lib.pyccl_fsm_drained(self.handle):
            self.drained_told = True
            self.owner.engine_event(self.owner.on_drained, self.cuts)
        if due < self.tick_due:
            self.tick_due = due
            self.owner.soon((due - self.owner.now) / S + 1e-6, self._tick, due, engine=True)

    def _tick(self, due: int) -> None:
        if due == self.tick_due and self.running:
            self.tick_due = sim_fsm.NO_TIMER
            self._turn()
            self._after()

    def _turn(self) -> None:
        """After a gap in its own loop it calls nobody silent before its sockets are read."""
        now = self.owner.now
        if now - self.turned > GAP_NS:
            for link in self.links.values():
                link.heard = now
        self.turned = now

    def _heard(self, link: Link) -> None:
        link.heard = self.owner.now
        if link.silent:
            link.silent = False
            self.owner.engine_event(self.owner.on_heard, link.slot)

    def _links_check(self) -> None:
        """Heartbeats are not sent one by one: who could send one now is heard."""
        if not self.running:
            return
        self._turn()
        for link in list(self.links.values()):
            if not link.conns:
                continue
            if link.unread:
                link.heard = self.owner.now
            elif any(self._beats(conn) for conn in link.conns):
                self._heard(link)
            if not link.silent and self.owner.now - link.heard >= self.silence:
                link.silent = True
                self.owner.engine_event(self.owner.on_silent, link.slot)
        self.owner.pulse()
        self._after()
        self.owner.soon(self.beat, self._links_check, engine=True)

    def _beats(self, conn: Conn) -> bool:
        other = conn.owners[1 - conn.end_of(self.owner)]
        runs = conn.whole and other.alive and not other.stopped
        return runs and not self.world.blocked(other, self.owner)

    def blocked(self) -> tuple[list[tuple[int, int, int]], float, bool]:
        lacking = self.fsm.lacking()
        quiet = 0.0 if lib.pyccl_fsm_moves(self.handle) else (self.owner.now - self.quiet_since) / S
        return lacking, quiet, bool(lib.pyccl_fsm_below_cut(self.handle))
