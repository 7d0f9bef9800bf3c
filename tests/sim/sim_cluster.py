"""A whole run from one seed: a master, peers, their programs, faults; then everything heals and must come to rest.

SimCluster(seed, draw_options(seed)).run()     raises SimError with the way to replay it
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any, Final

from sim_checks import Checks
from sim_master import Disk, SimMaster
from sim_peer import SimPeer
from sim_program import Background, Gossip, Program, Thread
from sim_world import S, SimError, World

from pyccl._proto.epoch import Address
from pyccl._proto.member import State

HEAL_S: Final = 150.0  # bound on the way back to rest; the longest timers of the machines are 60 s
ROUNDS_AFTER: Final = 3
FAULT_KINDS: Final = (
    *("crash", "leave", "stop", "hold", "silence", "pair", "uplink", "reset_data", "reset_control"),
    *("master_stop", "master_cut", "master_crash", "disk_full", "join", "restart", "tangle"),
)


@dataclass(frozen=True)
class Options:
    peers: int = 4
    groups: int = 1
    connections: int = 2
    journaled: bool = True
    sync_s: float = 0.01  # at most, for a write to be durable
    peer_timeout: float = 1.0
    mismatch_grace: float = 1.0  # as peer_timeout: what a link does not bring for that long is reported as silence
    stall_s: float = 30.0
    unreachable_s: float = 60.0
    master_timeout_s: float = 20.0
    delay_s: float = 0.004
    spike_rate: float = 0.0
    spike_s: float = 0.3
    think_s: float = 0.1
    chaos_s: float = 20.0
    fault_rate: float = 0.5  # per second
    faults: tuple[str, ...] = FAULT_KINDS
    peers_max: int = 10
    deadline_rate: float = 0.0  # operations whose deadline is short at one peer
    cancel_rate: float = 0.0
    flip_rate: float = 0.0  # results that are wrong at one peer
    mismatch_rate: float = 0.0
    strict: bool = True  # no program does anything that the others do not
    meets: bool = True
    background: bool = False  # a second thread that does not mind safe points
    wire_check: bool = False


def draw_options(seed: int) -> Options:
    """Everything about the run but its events."""
    rng = random.Random(f"options {seed}")
    count = rng.choice((0, 2, 3, 5, len(FAULT_KINDS), len(FAULT_KINDS)))
    strict = rng.random() < 0.7
    peer_timeout = rng.choice((1.0, 1.0, 2.0))
    return Options(
        peers=rng.randint(2, 6),
        groups=rng.choice((1, 1, 1, 2)),
        connections=rng.randint(1, 3),
        sync_s=rng.choice((0.001, 0.02, 0.5)),
        peer_timeout=peer_timeout,
        mismatch_grace=peer_timeout,
        stall_s=rng.choice((30.0, 30.0, 4.0)),
        unreachable_s=60.0 if strict else rng.choice((60.0, 3.0)),
        master_timeout_s=rng.choice((20.0, 1.0)),
        delay_s=rng.choice((0.001, 0.004, 0.03)),
        spike_rate=rng.choice((0.0, 0.01, 0.05)),
        spike_s=rng.choice((0.1, 0.4)),
        think_s=rng.choice((0.01, 0.05, 0.3)),
        chaos_s=rng.choice((8.0, 15.0, 25.0)),
        fault_rate=rng.choice((0.2, 0.5, 1.0, 2.0, 4.0)),
        faults=tuple(rng.sample(FAULT_KINDS, count)),
        deadline_rate=rng.choice((0.0, 0.0, 0.02, 0.1, 0.2)),
        cancel_rate=rng.choice((0.0, 0.0, 0.03)),
        flip_rate=rng.choice((0.0, 0.0, 0.0, 0.02)),
        mismatch_rate=0.0 if strict else rng.choice((0.0, 0.02, 0.05)),
        strict=strict,
        background=strict and rng.random() < 0.5,  # while it submits no mismatch of the first is seen
    )


class SimCluster:
    """One run. ``bug`` names what is broken on purpose, for the canaries (test_sim_canary.py)."""

    def __init__(self, seed: int, options: Options, bug: str = "", trace_max: int | None = 150) -> None:
        self.seed, self.options, self.bug = seed, options, bug
        self.world = World(seed, trace_max)
        self.world.delay_s = options.delay_s
        self.world.spike_rate, self.world.spike_s = options.spike_rate, options.spike_s
        self.rng = self.world.rng
        self.chaos = True
        self.peers: list[SimPeer] = []
        self.programs: dict[int, Program] = {}
        self.threads: dict[int, list[Thread]] = {}
        self._by_address: dict[Address, SimPeer] = {}
        self.checks = Checks(self)
        self.disk = Disk(self.world)
        self.master = SimMaster(self, self.disk)
        for _ in range(options.peers):
            self.world.at(self.rng.random() * 0.5, self.add)
        if options.faults:
            self._next_fault()

    # ---- processes

    def add(self, again: SimPeer | None = None) -> SimPeer:
        """A newcomer; or the same peer in a new incarnation."""
        group = again.group if again is not None else self.rng.randrange(self.options.groups)
        peer_id = again.peer if again is not None else self.rng.randbytes(16)
        name = f"p{len(self.peers)}" if again is None else f"{again.name}'"
        peer = SimPeer(self, name, group, peer_id, self.rng.randbytes(16))
        self.peers.append(peer)
        assert self.peer(peer.index) is peer
        self._by_address[peer.address] = peer
        program = self.programs[peer.index] = Program(peer)
        threads: list[Thread] = [program, *([Background(peer), Gossip(peer)] if self.options.background else [])]
        self.threads[peer.index] = threads
        peer.on_joined = lambda: [thread.soon() for thread in threads]
        self.world.note("%s starts: id %s, group %d", name, peer_id.hex()[:8], group)
        return peer

    def peer(self, index: int) -> SimPeer:
        return self.peers[index - 1]  # the master is process 0

    def peer_at(self, address: Address) -> SimPeer:
        return self._by_address[address]

    def ended(self, peer: SimPeer) -> None:
        """Out of the run: some come back as newcomers."""
        if self.chaos and self.rng.random() < 0.5 and len(self.peers) < 2 * self.options.peers_max:
            again = peer if self.rng.random() < 0.5 else None
            self.world.at(self.rng.random() * 2, self.add, again)

    def living(self) -> list[SimPeer]:
        return [peer for peer in self.peers if peer.runs]

    # ---- faults

    def _next_fault(self) -> None:
        self.world.at(self.rng.expovariate(self.options.fault_rate), self._fault)

    def _fault(self) -> None:
        if not self.chaos:
            return
        living = self.living()
        if living:
            self.do_fault(self.rng.choice(self.options.faults), self.rng.choice(living))
        self._next_fault()

    def do_fault(self, kind: str, peer: SimPeer, for_s: float | None = None) -> None:
        timeout, rng = self.options.peer_timeout, self.rng
        length_s = for_s if for_s is not None else timeout * rng.choice((0.3, 0.9, 1.5, 3.0)) * (0.5 + rng.random())
        self.world.note("fault %s at %s for %.2f s", kind, peer.name, length_s)
        match kind:
            case "crash":
                peer.crash()
            case "restart":
                peer.crash()
                self.world.at(rng.random(), self.add, peer)
            case "leave":
                if peer.machine.state is State.MEMBER:
                    peer.leave()
            case "stop":
                self.checks.excuse(peer, length_s)
                peer.stop()
                self.world.at(length_s, peer.resume)
            case "hold":
                self.checks.excuse(peer, length_s)
                peer.hold()
                self.world.at(length_s, peer.resume)
            case "silence":
                self.checks.excuse(peer, length_s)
                self.world.cut(peer, None, length_s)
            case "pair":
                other = rng.choice(self.living())
                if other is not peer:
                    self.checks.excuse(peer, length_s)
                    self.checks.excuse(other, length_s)
                    self.world.cut(peer, other, length_s)
            case "uplink":
                self.checks.excuse(peer, length_s)  # a silent member that others wait for may go
                self.world.cut(peer, self.master, length_s)
            case "reset_data":
                peer.reset_data(rng.choice((0.3, 1.0)))
            case "reset_control":
                peer.reset_control()
            case "master_stop":
                self.master.stop()
                self.world.at(length_s, self.master.resume)
            case "master_cut":
                self.world.cut(self.master, None, length_s)
            case "master_crash" if rng.random() < 0.5:
                self.crash_master(length_s)
            case "master_crash":  # in the middle of a decision
                self.disk.doom_s = length_s
            case "disk_full":
                self.disk.full = True
                self.world.at(length_s, setattr, self.disk, "full", False)
            case "join":
                if len(self.living()) < self.options.peers_max:
                    self.add()
            case "tangle":  # several at once, as when a host goes down
                for other in self.living():
                    if rng.random() < 0.4:
                        self.do_fault(rng.choice(("crash", "reset_data", "stop", "silence", "reset_control")), other)

    def crash_master(self, for_s: float) -> None:
        """It is away, and another starts from the same journal."""
        if self.master.alive:
            self.master.crash()
            self.world.at(for_s, self._start_master)

    def _start_master(self) -> None:
        self.world.note("a master starts")
        self.master = SimMaster(self, self.disk)

    # ---- the whole run

    def run(self) -> SimCluster:
        try:
            self._run()
        except SimError as exc:
            raise SimError(f"{exc}\n{self.replay_line()}") from None
        except Exception as exc:
            raise SimError(f"{type(exc).__name__}: {exc}\n{self.replay_line()}") from exc
        return self

    def _run(self) -> None:
        self.world.run(self.options.chaos_s)
        self.heal()
        if not self.converge(HEAL_S):
            raise SimError("it does not come to rest:\n" + "\n".join(self.describe()))

    def heal(self) -> None:
        """No further faults. What lasts a while still lasts; a process that was stopped for ever is started."""
        self.chaos = False
        self.world.note("no more faults")
        if not self.living():
            self.add()

    def converge(self, within_s: float) -> bool:
        """All who run stand in one epoch, have no call open since then and go on working."""
        open_then = [op for threads in self.threads.values() for thread in threads for op in thread.open]
        done_then = {peer.index: self.programs[peer.index].rounds_done for peer in self.peers}
        check_at = self.world.now

        def at_rest() -> bool:
            nonlocal check_at
            if self.world.now < check_at:
                return False
            check_at = self.world.now + S // 4
            living = self.living()
            if any(op.status is None for op in open_then if self._owner(op).runs):
                return False
            return all(self._settled(p) and self._worked(p, done_then.get(p.index, 0)) for p in living)

        return self.world.run(self.world.now_s + within_s, at_rest)

    def _owner(self, op: Any) -> SimPeer:
        return self.peer(op.cookie >> 32)

    def _worked(self, peer: SimPeer, done: int) -> bool:
        return self.programs[peer.index].rounds_done >= done + ROUNDS_AFTER

    def _settled(self, peer: SimPeer) -> bool:
        """It and everybody of its group who runs, and nobody else, are the members of its epoch."""
        epoch = peer.machine.epoch
        others = [p for p in self.living() if p.group == peer.group]
        return (
            epoch is not None
            and sorted(epoch.peers) == sorted(p.peer for p in others)
            and all(p.machine.epoch is not None and p.machine.epoch.id == epoch.id for p in others)
        )

    # ---- for people

    def describe(self) -> list[str]:
        out = [f"master: {self.master.machine.status()['groups']}"]
        for peer in self.living():
            program = self.programs[peer.index]
            epoch = peer.machine.epoch
            members = [p.hex()[:8] for p in epoch.peers] if epoch else []
            calls = [(op.space, op.tag, op.seq, op.attempts) for op in sorted(program.open, key=lambda op: op.cookie)]
            links = {} if peer.engine is None else peer.engine.by_id
            out.append(
                f"{peer.name} {peer.peer.hex()[:8]} {peer.machine.state.name}/{peer.machine.link.name} epoch "
                f"{peer.number} of {members} frozen={peer.engine is not None and peer.engine.frozen} "
                f"rounds={program.rounds_done} sync={program.needs_sync} topology={peer.topology is not None} "
                f"open={calls} links={[(k.hex()[:8], len(v.conns), v.rank) for k, v in links.items()]}"
            )
        return out

    def replay_line(self) -> str:
        bug = f" (planted bug: {self.bug})" if self.bug else ""
        return (
            f"replay: pytest tests/sim --seed {self.seed}{bug}\n{self.options}\nat {self.world.now / S:.4f} s, "
            f"{self.world.events} events; the last of the trace:\n{self.world.trace_text()}"
        )


def simulate(seed: int, bug: str = "", trace_max: int | None = 150, **changes: Any) -> SimCluster:
    return SimCluster(seed, replace(draw_options(seed), **changes), bug, trace_max).run()
