"""A whole run from one seed: a master, peers, their programs, faults; then everything heals and must come to rest.

SimCluster(seed, draw_options(seed)).run()     raises SimError with the way to replay it
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from sim_checks import Checks
from sim_faults import Faults
from sim_master import WRITE_AGAIN_S, Disk, SimMaster
from sim_options import Options, draw_options
from sim_peer import SimPeer
from sim_program import Background, Gossip, Program, Thread
from sim_saved import Saved, SavedProgram
from sim_world import S, SimError, World

from pyccl._proto.epoch import Address
from pyccl._proto.past import NONCE_BITS

HEAL_S: Final = 150.0  # bound on the way back to rest; the longest timers of the machines are 60 s
ROUNDS_AFTER: Final = 3
CHAOS_TIMES: Final = 4  # a seed whose faults and operations take longer than this is no run
KILLED_WAITING_RATE: Final = 0.1  # of masters that wait for room on the disk, each time they try
OPERATOR_S: Final = 15.0  # a person looks so often, and decides what only a person can if it has not changed since


class SimCluster:
    """One run."""

    def __init__(self, seed: int, options: Options, trace_max: int | None = 150) -> None:
        self.seed, self.options = seed, options
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
        self.journals_lost = 0
        self.starts_refused = 0  # how often a full disk kept a master from starting
        self.peers_most = 0  # at a time
        self.faults = Faults(self)
        self._start_master(False)
        self.saved = Saved(self) if options.observers else None
        self._stuck: set[tuple[int, int]] = set()  # peers at epochs, when the operator looked
        self.world.at(OPERATOR_S, self._operate)
        for _ in range(options.peers):
            self.world.at(self.rng.random() * 0.5, self.come)  # a fault may have brought one before

    # ---- processes

    def add(self, again: SimPeer | None = None) -> SimPeer:
        """A newcomer; or the same peer in a new incarnation."""
        group = again.group if again is not None else self.rng.randrange(self.options.groups)
        peer_id = again.peer if again is not None else self.rng.randbytes(16)
        name = f"p{len(self.peers)}" if again is None else f"{again.name}'"
        peer = SimPeer(self, name, group, peer_id, self.rng.randbytes(16))
        self.peers.append(peer)
        self.peers_most = max(self.peers_most, len(self.living()))
        assert self.peer(peer.index) is peer
        self._by_address[peer.address] = peer
        program = self.programs[peer.index] = Program(peer) if self.saved is None else SavedProgram(peer)
        threads: list[Thread] = [program, *([Background(peer), Gossip(peer)] if self.options.background else [])]
        self.threads[peer.index] = threads
        peer.on_joined = lambda: [thread.soon() for thread in threads]
        self.world.note("%s starts: id %s, group %d", name, peer_id.hex()[:8], group)
        return peer

    def come(self, again: SimPeer | None = None) -> None:
        """Unless too many are there already; as somebody new if another incarnation runs."""
        living = self.living()
        if again is not None and any(peer.peer == again.peer for peer in living):
            again = None
        if len(living) < self.options.peers_max:
            self.add(again)

    def peer(self, index: int) -> SimPeer:
        return self.peers[index - 1]  # the master is process 0

    def peer_at(self, address: Address) -> SimPeer:
        return self._by_address[address]

    def ended(self, peer: SimPeer) -> None:
        """Out of the run: some come back as newcomers."""
        if self.chaos and self.rng.random() < 0.5 and len(self.peers) < 2 * self.options.peers_max:
            again = peer if self.rng.random() < 0.5 else None
            self.world.at(self.rng.random() * 2, self.come, again)

    def living(self) -> list[SimPeer]:
        return [peer for peer in self.peers if peer.runs]

    # ---- faults

    def do_fault(self, kind: str, peer: SimPeer, for_s: float | None = None) -> None:
        self.faults.do(kind, peer, for_s)

    def crash_master(self, for_s: float, *, journal_lost: bool = False) -> None:
        """It is away, and another starts from the same journal, or from none on the operator's word."""
        if self.master.alive:
            self.master.crash()
            if journal_lost:
                self.world.note("its journal is gone")
                self.journals_lost += 1
                self.disk.lose()
            self.world.at(for_s, self._start_master, journal_lost)

    def _start_master(self, journal_lost: bool, nonce: int | None = None) -> None:
        if not self.options.journaled:  # it knows nothing of those before it
            self.disk.lose()
        nonce = self.rng.getrandbits(NONCE_BITS) if nonce is None else nonce
        past = self.disk.begin_term(nonce)
        if past is None:
            self.starts_refused += 1
            killed = self.rng.random() < KILLED_WAITING_RATE
            self.world.note("a master can't write its start%s", ", and is killed" if killed else "")
            if killed:
                self.disk.crashed()
            self.world.at(WRITE_AGAIN_S, self._start_master, journal_lost, None if killed else nonce)
            return
        adopts = journal_lost and any(peer.number > 0 for peer in self.living())
        self.world.note("a master starts%s", ", which is to take over a run" if adopts else "")
        self.master = SimMaster(self, self.disk, past, adopts=adopts)

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
        options = self.options
        self.world.run(options.chaos_s)
        while self._is_too_small():
            if self.world.now_s > CHAOS_TIMES * options.chaos_s:
                raise SimError(f"only {self.faults.count} faults and {self.checks.ended} operations")
            self.world.run(self.world.now_s + 5.0)
        self.heal()
        if not self.converge(HEAL_S):
            raise SimError("it does not come to rest:\n" + "\n".join(self.describe()))

    def _is_too_small(self) -> bool:
        return self.faults.count < self.options.faults_min or self.checks.ended < self.options.operations_min

    def heal(self) -> None:
        """No further faults. What lasts a while still lasts; a process that was stopped for ever is started."""
        self.chaos = False
        self.world.note("no more faults")
        while len(self.living()) < max(1, self.options.peers_min):
            self.add()

    def _operate(self) -> None:
        """Without a journal some of it needs a person: a master that waits for members who are all dead is started as
        one of a new run; members who are too few to go on, or of a run that is no more, connect anew."""
        self.world.at(OPERATOR_S, self._operate)
        if not self.journals_lost and self.options.journaled:
            return
        members = [peer for peer in self.living() if peer.number > 0]
        if self.master.adopts and not members:
            self.crash_master(0.0)
        stuck_before, self._stuck = self._stuck, set()
        for peer in members:
            if not peer.machine._standing.undecided and peer.machine.run == self.master.machine.run:
                continue
            self._stuck.add((peer.index, peer.number))
            if (peer.index, peer.number) in stuck_before:
                peer.leave()
                self.world.at(3.0, self.come, peer)

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
        return (
            f"replay: tools/sim --seed {self.seed}\n{self.options}\nat {self.world.now / S:.4f} s, "
            f"{self.world.events} events; the last of the trace:\n{self.world.trace_text()}"
        )


def simulate(seed: int, trace_max: int | None = 150, **changes: Any) -> SimCluster:
    return SimCluster(seed, replace(draw_options(seed), **changes), trace_max).run()
