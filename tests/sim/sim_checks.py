"""What must always hold (design.md 4.1-4.5), judged at every event that could break it.

The checks know everything and change nothing.

An operation is named by (group, lineage, space, tag, seq, pair); the lineage is the epoch in which numbers last
restarted, the pair is empty but in an exchange.
Ends that the contract excepts are not judged: those of a peer that leaves or is out (its machine was told to end).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import sim_fsm
from sim_native import lib
from sim_world import S, SimError

from pyccl._proto import member
from pyccl._proto.channel import SPACE_PAIR, participants, user_tag
from pyccl._proto.epoch import Epoch

if TYPE_CHECKING:
    from sim_cluster import SimCluster
    from sim_engine import Attempt, Op
    from sim_peer import SimPeer
    from sim_program import State

OpName = tuple[int, bytes, int, int, int, tuple[bytes, ...]]
EXCUSE_S: Final = 2.0


@dataclass(eq=False)
class Fate:
    """What became of one operation, everywhere."""

    epoch: int = 0  # in which it committed
    bound: set[tuple[bytes, bytes]] = field(default_factory=set)  # incarnations that may not have failed it
    result: frozenset[tuple[Any, ...]] | None = None
    committed: dict[int, str] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    submits: dict[int, int] = field(default_factory=dict)  # process -> cookie


class Checks:
    def __init__(self, cluster: SimCluster) -> None:
        self.cluster, self.world = cluster, cluster.world
        self.fates: dict[OpName, Fate] = {}
        self.epochs: dict[tuple[bytes | None, int, int], tuple[bytes, tuple[Any, ...]]] = {}  # run, group, number
        self.gone: dict[tuple[bytes, bytes], int] = {}  # incarnation -> first epoch without it
        self.last_members: dict[int, Epoch] = {}
        self.cut_counts: dict[bytes, tuple[str, list[tuple[int, int, int]]]] = {}
        self.cut_pairs: dict[bytes, dict[bytes, dict[tuple[bytes, int], int]]] = {}
        self.swaps = self.syncs = 0
        self.states: dict[tuple[int, int, int], int] = {}  # group, lineage, revision -> root
        self.ended = 0  # operations: committed somewhere, or failed
        self.partitions_until = 0  # one side of two that do not reach each other may be any
        self.commits = self.failures = self.evictions = self.mismatches = 0
        self.kinds: dict[str, int] = {}
        self.statuses: dict[str, int] = {}
        self.plans: dict[int, list[bytes]] = {}  # of each group, one behind the other

    def fail(self, text: str) -> None:
        raise SimError(text)

    # ---- operations

    def _fate(self, peer: SimPeer, op: Op) -> Fate:
        assert op.seq is not None
        pair = tuple(sorted((peer.peer, op.partner))) if op.partner else ()
        return self.fates.setdefault((peer.group, op.lineage, op.space, op.tag, op.seq, pair), Fate())

    def started(self, peer: SimPeer, op: Op, attempt: Attempt) -> None:
        fate = self._fate(peer, op)
        self.cluster.faults.on_event("operation_started")
        known = fate.submits.setdefault(peer.index, op.cookie)
        if known != op.cookie:
            self.fail(f"{peer.name} gave one number to two operations: {self._name(op)}")

    def committed(self, peer: SimPeer, op: Op, attempt: Attempt | None) -> None:
        self.commits += 1
        if attempt is None or attempt.result is None:
            self.fail(f"{peer.name} commits {self._name(op)} without a result")
            return
        fate = self._fate(peer, op)
        self._ends(fate, "operation_committed")
        self.world.note("%s commits %s (attempt of epoch %d)", peer.name, self._name(op), attempt.epoch)
        self._pure(peer, op, attempt, fate)
        if fate.committed and (fate.epoch, fate.result) != (attempt.epoch, attempt.result):
            self.fail(
                f"{self._name(op)} committed twice: epoch {fate.epoch} {_show(fate.result)} at "
                f"{list(fate.committed.values())}, epoch {attempt.epoch} {_show(attempt.result)} at {peer.name}"
            )
        fate.epoch, fate.result = attempt.epoch, attempt.result
        assert peer.engine is not None
        members = self.epochs[peer.machine.run, peer.group, peer.engine.number][1]
        # by DONE from all; by verdict: all survivors
        fate.bound.update(key for key in members if key[0] in attempt.members)
        self.swaps += bool(op.partner)
        fate.committed[peer.index] = peer.name
        self._atomic(op, fate)

    def _pure(self, peer: SimPeer, op: Op, attempt: Attempt, fate: Fate) -> None:
        """Exactly one contribution of each that owes one, of this epoch and of this very operation."""
        values = attempt.result or frozenset()
        if peer.engine is not None and {peer.peer} == {*attempt.members} & {*peer.engine.members}:
            values = frozenset(
                v for v in values if v != (-1, peer.index)
            )  # wrong bits, but who else is left to differ?
        wrong = [v for v in values if len(v) != 4 or v[2] != attempt.epoch]
        senders = [v[0] for v in values]
        if wrong or len(set(senders)) != len(senders) or len(senders) != len(attempt.needs):
            self.fail(f"{peer.name} commits {self._name(op)} of epoch {attempt.epoch} as {_show(attempt.result)}")
        for sender, cookie, _, label in values:
            process = self.cluster.peer(sender)
            if process.peer not in attempt.members:
                self.fail(f"{peer.name} commits {self._name(op)} with a value of {process.name}, who is no member")
            if fate.submits.get(sender) != cookie:
                self.fail(f"{peer.name} commits {self._name(op)} with {process.name}'s value for another operation")
            if op.space != 1 and label != op.label and self.cluster.options.strict:
                self.fail(f"{peer.name} commits {op.label} with {process.name}'s {label}: numbers have parted")

    def failed(self, peer: SimPeer, op: Op, status: int, *, own_end: bool) -> None:
        name = sim_fsm.status_name(status)
        self.failures += 1
        self.statuses[name] = self.statuses.get(name, 0) + 1
        if status in (lib.PYCCL_ERR_CLOSED, lib.PYCCL_ERR_EVICTED, lib.PYCCL_ERR_OUTCOME_UNKNOWN) or own_end:
            return
        if op.seq is None:
            return  # it never had a number: nobody can have committed it with us
        self.world.note("%s fails %s: %s", peer.name, self._name(op), name)
        fate = self._fate(peer, op)
        self._ends(fate, "operation_failed")
        fate.failed[peer.index] = name
        self._atomic(op, fate)

    def _ends(self, fate: Fate, event: str) -> None:
        if not fate.committed and not fate.failed:
            self.ended += 1
        self.cluster.faults.on_event(event)

    def _atomic(self, op: Op, fate: Fate) -> None:
        if not fate.committed:
            return
        for index, status in fate.failed.items():
            process = self.cluster.peer(index)
            if (process.peer, process.incarnation) in fate.bound:
                self.fail(
                    f"{self._name(op)} committed in epoch {fate.epoch} at {sorted(fate.committed.values())} "
                    f"and failed at {process.name}: {status}"
                )

    def _name(self, op: Op) -> str:
        return f"op {op.space}/{op.tag}/{op.seq} {op.label}"

    # ---- the shared state

    def advanced(self, peer: SimPeer, state: State) -> None:
        """One revision of a lineage is one state, on all who are in step."""
        known = self.states.setdefault((peer.group, state.lineage, state.revision), state.root)
        if known != state.root and self.cluster.options.strict:
            self.fail(f"{peer.name} has another state of revision {state.revision} than others")

    def synced(self, peer: SimPeer, voter: bool, before: State, after: State) -> None:
        """A sync that all have committed. Programs that differ may part before their mismatch is seen."""
        self.syncs += 1
        self.world.note("%s has state %x, revision %d", peer.name, after.lineage, after.revision)
        if self.cluster.options.strict and voter and before != after:
            self.fail(f"{peer.name} goes from {before} to {after}")
        self.advanced(peer, after)

    # ---- epochs

    def enters(self, peer: SimPeer, effect: member.Enter, counts: list[tuple[int, int, int]]) -> None:
        epoch = effect.epoch
        members = tuple((m.peer, m.incarnation) for m in epoch.members)
        self.cluster.faults.on_event("epoch_entered")
        if len({*epoch.peers}) != len(epoch.members):
            self.fail(f"epoch {epoch.number} holds two incarnations of one peer")
        self.world.note("%s enters epoch %d %s", peer.name, epoch.number, [p.hex()[:8] for p in epoch.peers])
        plans = self.plans.setdefault(peer.group, [b""])
        if (peer.machine.run, peer.group, epoch.number) not in self.epochs and epoch.plan != plans[-1]:
            plans.append(epoch.plan)
        known = self.epochs.setdefault((peer.machine.run, peer.group, epoch.number), (epoch.id, members))
        if known != (epoch.id, members):
            self._two_epochs(peer, epoch, known[0])
            self.epochs[peer.machine.run, peer.group, epoch.number] = (epoch.id, members)
        for key in members:
            if self.gone.get(key, 1 << 62) <= epoch.number:
                self.fail(f"epoch {epoch.number} holds an incarnation that was out in {self.gone[key]}")
        last = self.last_members.get(peer.index)
        if last is not None:
            if epoch.number <= last.number:
                self.fail(f"{peer.name} goes from epoch {last.number} to {epoch.number}")
            for old in last.members:
                if (old.peer, old.incarnation) not in members:
                    self.gone.setdefault((old.peer, old.incarnation), epoch.number)
            if effect.restart and not effect.mismatch:
                ours = sorted(count for count in counts if count[0] != SPACE_PAIR)
                name, same = self.cut_counts.setdefault(epoch.id, (peer.name, ours))
                if same != ours:
                    self.fail(f"at the safe point before epoch {epoch.number} {name} counts {same}, {peer.name} {ours}")
                self._cut_of_pairs(peer, epoch, counts)
        self.last_members[peer.index] = epoch

    def _two_epochs(self, peer: SimPeer, epoch: Epoch, other: bytes) -> None:
        """Without a journal what all members have forgotten, or died with, may come again; never beside the first."""
        unkept = self.cluster.journals_lost or not self.cluster.options.journaled
        beside = [p for p in self.cluster.living() if p.machine.epoch is not None and p.machine.epoch.id == other]
        if not unkept or beside:
            self.fail(f"two epochs {epoch.number} in group {peer.group}")

    def _cut_of_pairs(self, peer: SimPeer, epoch: Epoch, counts: list[tuple[int, int, int]]) -> None:
        """Both of a pair have submitted as many."""
        assert peer.engine is not None
        ours: dict[tuple[bytes, int], int] = {}
        for space, number, count in counts:
            if space == SPACE_PAIR:
                (other,) = set(participants(space, number, peer.engine.members)) - {peer.peer}
                ours[other, user_tag(number)] = count
        known = self.cut_pairs.setdefault(epoch.id, {})
        known[peer.peer] = ours
        for other, theirs in known.items():
            mine = {tag: count for (partner, tag), count in ours.items() if partner == other}
            back = {tag: count for (partner, tag), count in theirs.items() if partner == peer.peer}
            if mine != back:
                text = f"{peer.name} counts {mine} exchanges with {other.hex()[:8]}, which counts {back}"
                self.fail(f"before epoch {epoch.number} {text}")

    def mismatch(self, peer: SimPeer, detail: str) -> None:
        self.mismatches += 1
        if self.cluster.options.strict:
            self.fail(f"{peer.name} is told of a mismatch that nobody caused: {detail}")

    # ---- frames and the master

    def refused(self, peer: SimPeer, sender: bytes, what: object) -> None:
        self.fail(f"{peer.name} refuses what {sender.hex()[:8]} sent: {what!r}")

    def master_log(self, event: str, fields: dict[str, Any]) -> None:
        if event == "connection_refused":
            self.fail(f"the master refuses an honest peer: {fields}")
        elif event == "epoch_committed":
            self.kinds[fields["kind"]] = self.kinds.get(fields["kind"], 0) + 1
        elif event == "peer_lost":
            self._lost(fields["peer"], fields["reason"])
        elif event == "peer_evicted":
            self.evictions += 1

    def _lost(self, short: str, reason: str) -> None:
        """Whoever is given up must have failed in some way of its own."""
        found = [p for p in self.cluster.peers if p.peer.hex().startswith(short)]  # all its incarnations
        apart = "do not reach each other" in reason and self.world.now <= self.partitions_until
        if not apart and not any(self._excused(p) for p in found):
            self.fail(f"the master gives up {short}, which is healthy: {reason}")

    def _excused(self, peer: SimPeer) -> bool:
        return not peer.runs or self.world.now <= peer.excused_until

    def excuse(self, peer: SimPeer, for_s: float) -> None:
        peer.excused_until = max(peer.excused_until, self._late(for_s))

    def excuse_partitions(self, for_s: float) -> None:
        self.partitions_until = max(self.partitions_until, self._late(for_s))

    def _late(self, for_s: float) -> int:
        return self.world.now + int((for_s + EXCUSE_S + 3 * self.cluster.options.peer_timeout) * S)


def _show(result: frozenset[tuple[Any, ...]] | None) -> list[tuple[Any, ...]]:
    return sorted(result or (), key=repr)
