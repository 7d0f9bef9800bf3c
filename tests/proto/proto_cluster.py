"""A whole cluster in one process: one MasterMachine, N MemberMachines, in-memory queues, a stub engine, one seed.

Each connection is a pair of queues that keep their order; which queue moves next is drawn from the seed, and so are
the faults. Data links are a table of who can reach whom. After every event the harness checks what must always hold.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pyccl._proto import master, member, planning
from pyccl._proto.epoch import Epoch
from pyccl._proto.member import MemberMachine, State
from pyccl._proto.messages import (
    Count,
    LinkMeasure,
    Measured,
    Message,
    OpReport,
    OpState,
    from_wire_untrusted,
    to_wire,
)

PEER_TIMEOUT_S = 1.0
TICK_S = 0.1


@dataclass
class Pipe:
    """One control connection."""

    node: Node
    conn: int
    up: deque[Message] = field(default_factory=deque)
    down: deque[Message] = field(default_factory=deque)
    closed_by_master: bool = False


@dataclass
class Node:
    """A process: its machine, and a stub of links and engine."""

    name: int
    machine: MemberMachine
    pipe: Pipe | None = None
    alive: bool = True
    silent: bool = False  # stopped: neither reads nor sends, connections stay open
    ended: member.Ended | None = None
    epochs: list[Epoch] = field(default_factory=list)
    answers: deque[tuple[str, tuple[object, ...]]] = field(default_factory=deque)  # of links and engine, to come
    counts: dict[int, int] = field(default_factory=dict)  # tag -> submitted
    wants_safe_point: bool = False
    safe_points: int = 0
    suspected: set[bytes] = field(default_factory=set)

    @property
    def runs(self) -> bool:
        return self.alive and not self.silent and self.ended is None


class Cluster:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.now = 0.0
        self.master = master.MasterMachine(b"R" * 16, 1, PEER_TIMEOUT_S, "test", journaled=False)
        self.nodes: list[Node] = []
        self.pipes: dict[int, Pipe] = {}
        self.conns = 0
        self.cut: set[frozenset[bytes]] = set()  # pairs of peers whose data links are cut
        self.searches: list[master.Search] = []
        self.history: dict[int, Epoch] = {}  # number -> the one epoch
        self.gone: dict[tuple[bytes, bytes], int] = {}  # evicted incarnation -> last epoch before that
        self.log: list[str] = []

    # ---- people come and go

    def add(self) -> Node:
        name = len(self.nodes)
        machine = MemberMachine(self.rng.randbytes(16), self.rng.randbytes(16), 0, (), "test")
        self.nodes.append(Node(name, machine))
        return self.nodes[-1]

    def crash(self, node: Node) -> None:
        node.alive = False
        self.reset_control(node)

    def reset_control(self, node: Node) -> None:
        pipe, node.pipe = node.pipe, None
        if pipe is None:
            return
        del self.pipes[pipe.conn]
        self.to_master(self.master.disconnected(pipe.conn, self.now))
        if node.alive and node.ended is None:
            self.to_node(node, node.machine.disconnected(self.now))

    def leave(self, node: Node) -> None:
        self.to_node(node, node.machine.leave(self.now))

    # ---- one event

    def step(self) -> None:
        """One thing that can happen now happens; if none can, time passes."""
        choices: list[tuple[Callable[[Any], None], Pipe | Node | master.Search]] = []
        for pipe in self.pipes.values():
            if pipe.up:
                choices.append((self._deliver_up, pipe))
            if pipe.down and not pipe.node.silent:
                choices.append((self._deliver_down, pipe))
        choices.extend((self._searched, search) for search in self.searches)
        choices.extend((self._answer, node) for node in self.nodes if node.runs and node.answers)
        if choices and self.rng.random() < 0.97:
            do, what = self.rng.choice(choices)
            do(what)
        else:
            self._tick()
        self.check()

    def _deliver_up(self, pipe: Pipe) -> None:
        self.to_master(self.master.receive(pipe.conn, pipe.up.popleft(), self.now))

    def _deliver_down(self, pipe: Pipe) -> None:
        message = pipe.down.popleft()
        if pipe.node.alive and pipe.node.ended is None:
            self.to_node(pipe.node, pipe.node.machine.receive(message, self.now))
        if pipe.closed_by_master and not pipe.down and pipe.conn in self.pipes:
            self.reset_control(pipe.node)

    def _answer(self, node: Node) -> None:
        name, args = node.answers.popleft()
        self.to_node(node, getattr(node.machine, name)(*args, self.now))

    def _searched(self, search: master.Search) -> None:
        self.searches.remove(search)
        self.to_master(self.master.planned(search.group, search.ticket, planning.search(search.job), self.now))

    def _tick(self) -> None:
        self.now += TICK_S
        self.to_master(self.master.tick(self.now))
        for node in self.nodes:
            if not node.runs:
                continue
            if node.pipe is None:
                self.conns += 1
                node.pipe = self.pipes[self.conns] = Pipe(node, self.conns)
                self.to_master(self.master.connected(self.conns, self.now))
                self.to_node(node, node.machine.connected(self.now))
            self.to_node(node, node.machine.tick(self.now))
            if node.runs and node.machine.state is State.MEMBER:
                self.to_master(self.master.heard(node.machine.peer, node.machine.incarnation, self.now))
                self._watch_links(node)
                self._call(node)

    def _watch_links(self, node: Node) -> None:
        assert node.machine.epoch is not None
        for peer in node.machine.epoch.peers:
            if peer == node.machine.peer:
                continue
            cause = self._fault(node, peer)
            if cause and peer not in node.suspected:
                node.suspected.add(peer)
                self.to_node(node, node.machine.suspect(peer, cause, "", self.now))
            elif not cause and peer in node.suspected:
                node.suspected.discard(peer)
                self.to_node(node, node.machine.trust(peer, self.now))

    def _fault(self, node: Node, peer: bytes) -> str:
        other = next((n for n in self.nodes if n.machine.peer == peer), None)
        if other is None or not other.alive or other.ended is not None:
            return "refused"
        return "silent" if other.silent or frozenset({peer, node.machine.peer}) in self.cut else ""

    def _call(self, node: Node) -> None:
        """The user's program: submits, and meets the others at safe points."""
        tag = self.rng.randrange(3)
        if self.rng.random() < 0.3:
            node.counts[tag] = node.counts.get(tag, 0) + 1
        if not node.wants_safe_point and self.rng.random() < 0.5:
            node.wants_safe_point = True
            if self.rng.random() < 0.3:
                self.to_node(node, node.machine.measured(self._measured(node), self.now))
            self.to_node(node, node.machine.arrive(self._counts(node), self.now))
        elif node.wants_safe_point and self.rng.random() < 0.01:
            node.wants_safe_point = False
            self.to_node(node, node.machine.withdraw(self.now))

    def _measured(self, node: Node) -> Measured:
        assert node.machine.epoch is not None
        others = [peer for peer in node.machine.epoch.peers if peer != node.machine.peer]
        drawn = [[self.rng.randrange(limit) for limit in (10**8, 10**8, 10**6)] for _ in others]
        links = tuple(LinkMeasure(peer, *numbers) for peer, numbers in zip(others, drawn, strict=True))
        return Measured(*(self.rng.randrange(10**9) for _ in range(4)), links)

    def _counts(self, node: Node) -> tuple[Count, ...]:
        return tuple(Count(0, tag, submitted) for tag, submitted in sorted(node.counts.items()))

    # ---- effects

    def to_master(self, effects: list[master.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, master.Search):
                self.searches.append(effect)
            elif isinstance(effect, master.Log):
                self.log.append(f"{self.now:.1f} {effect.event} {effect.fields}")
            elif isinstance(effect, master.Send):
                assert from_wire_untrusted(to_wire(effect.message)) == effect.message
                if effect.conn in self.pipes:
                    self.pipes[effect.conn].down.append(effect.message)
            elif isinstance(effect, master.Close) and effect.conn in self.pipes:
                self.pipes[effect.conn].closed_by_master = True
                ours = ("Ready", "Arrive", "Report", "Behind", "Differs", "a link is measured")
                assert not effect.reason.startswith(ours), effect
                assert "not legal" not in effect.reason, effect
                if not self.pipes[effect.conn].down:
                    self.reset_control(self.pipes[effect.conn].node)

    def to_node(self, node: Node, effects: list[member.Effect]) -> None:
        for effect in effects:
            self._perform(node, effect)

    def _perform(self, node: Node, effect: member.Effect) -> None:
        machine = node.machine
        match effect:
            case member.Send(message):
                assert from_wire_untrusted(to_wire(message)) == message
                if node.pipe is not None:
                    node.pipe.up.append(message)
            case member.OpenLinks(version, _, peers):
                failed = tuple(m.peer for m in peers if self._fault(node, m.peer))
                node.answers.append(
                    ("links_failed", (version, failed, "no answer")) if failed else ("links_ready", (version,))
                )
            case member.SetCut(version, counts):
                mine = self._counts(node)
                cut = {(c.space, c.tag): c.submitted for c in counts}
                if any(c.submitted > cut.get((c.space, c.tag), 0) for c in mine):
                    node.answers.append(("behind", (version, mine)))
                else:
                    node.answers.append(("drained", (version,)))
            case member.Freeze(ballot):
                state = self.rng.choice((OpState.RUNNING, OpState.PREPARED, OpState.FAILED))
                node.answers.append(("frozen", (ballot, (OpReport(0, 0, 0, state, 7),))))
            case member.Enter(epoch, verdicts, restart, _, rank, _):
                assert epoch.members[rank].incarnation == machine.incarnation
                node.epochs.append(epoch)
                if restart:
                    node.counts = {}
                assert not (len(node.epochs) == 1 and verdicts)
                node.suspected &= set(epoch.peers)
                node.answers.append(("entered", (epoch.number,)))
            case member.NeedCounts():
                self.to_node(node, machine.arrive(self._counts(node), self.now))
            case member.SafePointDone(error, _):
                assert error is None
                node.wants_safe_point = False
                node.safe_points += 1
            case member.Ended():
                node.ended = effect
                pipe, node.pipe = node.pipe, None
                if pipe is not None:  # the shell flushes what was queued, then closes
                    self.pipes.pop(pipe.conn, None)
                    for message in pipe.up:
                        self.to_master(self.master.receive(pipe.conn, message, self.now))
                    self.to_master(self.master.disconnected(pipe.conn, self.now))

    # ---- what must always hold

    def check(self) -> None:
        for node in self.nodes:
            numbers = [epoch.number for epoch in node.epochs]
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True
            for epoch in node.epochs[-1:]:
                known = self.history.setdefault(epoch.number, epoch)
                assert known == epoch, f"two epochs {epoch.number}: {self.replay_line()}"

    def replay_line(self) -> str:
        return f"replay: pytest tests/proto/test_cluster.py -k 'seed{self.seed}'\n" + "\n".join(self.log[-40:])

    # ---- liveness

    def agreed(self) -> bool:
        """All who run are members of one and the same epoch, and nobody else is in it."""
        running = [node for node in self.nodes if node.runs]
        ids = {node.machine.epoch.id if node.machine.epoch else None for node in running}
        if len(ids) != 1 or None in ids:
            return False
        epoch = running[0].machine.epoch
        assert epoch is not None
        return sorted(epoch.peers) == sorted(node.machine.peer for node in running)
