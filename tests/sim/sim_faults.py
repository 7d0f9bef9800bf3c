"""What goes wrong, when, and which phase of the protocol it meets.

Half of the faults come at any time, the others lie in wait for an event of the protocol, or most would meet an idle
group.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from sim_world import S

from pyccl._proto.member import State
from pyccl._proto.messages import OpState

if TYPE_CHECKING:
    from sim_cluster import SimCluster
    from sim_peer import SimPeer

JUMPS_S: Final = (0.1, 0.3, 1.5, 5.0, 30.0)  # of a clock, forwards; one above 1 s is noticed
AMBUSHES: Final = (
    *("peer_pending", "epoch_proposed", "ballot_opened", "journal_written", "epoch_committed"),
    *("epoch_entered", "operation_started", "operation_committed", "sync_started"),
)
PHASES: Final = (
    *("no master", "founding", "join", "safe point", "flush", "journal", "epoch change"),
    *("running", "prepared", "part committed", "state sync", "idle"),
)


class Faults:
    def __init__(self, cluster: SimCluster) -> None:
        self.cluster, self.world, self.options, self.rng = cluster, cluster.world, cluster.options, cluster.rng
        self.count = 0
        self.met: Counter[tuple[str, str]] = Counter()  # (kind, phase)
        self.ambush = ""
        if self.options.faults:
            self._next()

    def _next(self) -> None:
        self.world.at(self.rng.expovariate(self.options.fault_rate), self._due)

    def _due(self) -> None:
        if not self.cluster.chaos:
            return
        if self.ambush or self.rng.random() < 0.5:
            self.ambush = ""
            self._strike()
        else:
            self.ambush = self.rng.choice(AMBUSHES)
        self._next()

    def on_event(self, name: str) -> None:
        if name == self.ambush:
            self.ambush = ""
            self.world.at(self.rng.random() * self.rng.choice((0.0005, 0.005, 0.05)), self._strike)

    def _strike(self) -> None:
        living = self.cluster.living()
        if self.cluster.chaos and living:
            self.do(self.rng.choice(self.options.faults), self.rng.choice(living))
            self.world.at(self.rng.random() * 2, self._refill)

    def _refill(self) -> None:
        if self.cluster.chaos and len(self.cluster.living()) < self.options.peers_min:
            self.cluster.add()

    def do(self, kind: str, peer: SimPeer, for_s: float | None = None) -> None:
        timeout, rng = self.options.peer_timeout, self.rng
        length_s = for_s if for_s is not None else timeout * rng.choice((0.3, 0.9, 1.5, 3.0)) * (0.5 + rng.random())
        phases = self.phases(peer)
        self.world.note("fault %s at %s for %.2f s, which meets: %s", kind, peer.name, length_s, ", ".join(phases))
        strikes = self._of_peer(kind, peer, length_s) or self._of_path(kind, peer, length_s)
        if strikes or self._of_master(kind, length_s) or self._of_saved(kind, length_s):
            self.count += 1
            self.met.update((kind, phase) for phase in phases)

    def _end_twin(self, twin: SimPeer) -> None:
        """Or another one of its identity, if it has ended and two are left: a twin may have had a twin."""
        others = [peer for peer in self.cluster.living() if peer.peer == twin.peer and peer is not twin]
        if len(others) > 1 and not twin.runs:
            twin = others[-1]
        twin.crash()

    # ---- each returns whether it has done something

    def _of_peer(self, kind: str, peer: SimPeer, length_s: float) -> bool:
        rng, cluster = self.rng, self.cluster
        match kind:
            case "crash":
                peer.crash()
            case "restart":
                peer.crash()
                self.world.at(rng.random(), cluster.come, peer)
            case "twin" if len(cluster.living()) < self.options.peers_max:
                # started twice by mistake: one of them goes in the end
                other = cluster.add(peer)
                self.world.at(length_s, self._end_twin, rng.choice((peer, other)))
            case "leave" if peer.machine.state is State.MEMBER:
                peer.leave()
            case "join":
                cluster.come()
            case "stop" | "hold":
                cluster.checks.excuse(peer, length_s)
                (peer.stop if kind == "stop" else peer.hold)()
                self.world.at(length_s, peer.resume)
            case "slow":
                peer.slow_s = self.options.peer_timeout * rng.choice((0.05, 0.3))
                self.world.at(length_s * 3, setattr, peer, "slow_s", 0.0)
            case "clock":
                peer.skew += int(rng.choice(JUMPS_S) * S)
            case "tangle":  # several at once, as when a host goes down
                for other in cluster.living():
                    if rng.random() < 0.4:
                        self.do(rng.choice(("crash", "reset_data", "stop", "silence", "reset_control")), other)
            case _:
                return False
        return True

    def _of_path(self, kind: str, peer: SimPeer, length_s: float) -> bool:
        world, checks, master = self.world, self.cluster.checks, self.cluster.master
        match kind:
            case "silence":
                world.cut(peer, None, length_s)
            case "mute":
                world.cut_way(peer, None, length_s)
            case "deaf":
                world.cut_way(None, peer, length_s)
                checks.excuse_partitions(length_s)
            case "pair" | "pair_way":
                other = self.rng.choice(self.cluster.living())
                if other is peer:
                    return False
                checks.excuse(other, length_s)
                (world.cut if kind == "pair" else world.cut_way)(peer, other, length_s)
            case "uplink":  # a silent member that others wait for may go
                world.cut(peer, master, length_s)
            case "uplink_way":
                world.cut_way(*self.rng.choice(((peer, master), (master, peer))), length_s)
            case "reset_data":
                peer.reset_data(self.rng.choice((0.3, 1.0)))
                return True
            case "reset_control":
                peer.reset_control()
                return True
            case "stale":
                peer.repeat_later(self.rng.random() * 8)
                return True
            case _:
                return False
        checks.excuse(peer, length_s)
        return True

    def _of_master(self, kind: str, length_s: float) -> bool:
        cluster = self.cluster
        match kind:
            case "master_stop":
                cluster.master.stop()
                self.world.at(length_s, cluster.master.resume)
            case "master_cut":
                self.world.cut(cluster.master, None, length_s)
            case "master_clock":
                cluster.master.skew += int(self.rng.choice(JUMPS_S) * S)
            case "master_crash" if self.rng.random() < 0.5:
                cluster.crash_master(length_s)
            case "master_crash":  # in the middle of a decision
                cluster.disk.doom_s = length_s
            case "journal_lost" if cluster.master.alive:
                cluster.crash_master(length_s, journal_lost=True)
            case "disk_full" | "disk_full_crash" if self.options.journaled:
                cluster.disk.full = True
                self.world.at(length_s, setattr, cluster.disk, "full", False)
                if kind == "disk_full_crash":  # killed, and mostly started again, while it can't write
                    crash_s = self.rng.random() * length_s
                    self.world.at(crash_s, cluster.crash_master, self.rng.random() * (length_s - crash_s))
            case _:
                return False
        return True

    def _of_saved(self, kind: str, length_s: float) -> bool:
        return self.cluster.saved is not None and self.cluster.saved.strike(kind, length_s)

    # ---- what it meets

    def phases(self, peer: SimPeer) -> list[str]:
        """Where the peer's group stands in the protocol."""
        cluster, found = self.cluster, set[str]()
        master, peers = cluster.master, [p for p in cluster.living() if p.group == peer.group]
        if not master.alive or master.stopped or master.index in self.world.mute:
            found.add("no master")
        for group in master.machine.status()["groups"]:
            if group["group"] == peer.group:
                standing = {
                    "founding": not group["founded"],
                    "join": group["pending"],
                    "safe point": group["proposal"],
                    "flush": group["ballot"],
                    "journal": group["deciding"],
                    "epoch change": any(p.number not in (0, group["epoch"]) for p in peers),
                }
                found.update(phase for phase, holds in standing.items() if holds)
        states: dict[tuple[int, int, int], set[int]] = {}
        for one in peers:
            if one.engine is not None and one.engine.running:
                for space, tag, seq, state, _ in one.engine.fsm.report():
                    states.setdefault((space, tag, seq), set()).add(state)
                if one.engine.attempts:
                    found.add("running")
            if cluster.programs[one.index].syncing:
                found.add("state sync")
        for state in states.values():
            if OpState.PREPARED in state:
                found.add("part committed" if OpState.COMMITTED in state else "prepared")
        return [phase for phase in PHASES if phase in found] or ["idle"]
