"""What must be true of a stress run. Pure: reports of peers and facts about faults come in, violations come out.

* Every reduced value equals, bit for bit, what ``reference_all_reduce`` gives for those who took part.
* Every member of a round saw the same members and epochs; every digest of a revision is the one that follows from the
  reference results of all rounds before it, which the oracle computes itself.
* A member that stays moves from each revision to the next one exactly: no sync hands it another state, no later epoch
  goes on from an older revision than an earlier one had reached.
* Errors are of kinds that the faults explain, and the input is what it was.
* Nobody hangs: the group advances, and each process that may run reports, within `hang_s`.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pyccl.stress import workload
from pyccl.stress.workload import Outcome

KEPT_REVISIONS: Final = 5_000  # a peer that reports later than so many rounds was out long ago
MASTER_GRACE_S: Final = 3.0
OUT_OF_RUN: Final = ("EvictedError", "OutcomeUnknownError")
Roster = tuple[int, tuple[str, ...]]  # epoch, members


@dataclass(frozen=True, slots=True)
class Violation:
    """kind: of the rules above. peer: number of the process, None where the group is meant."""

    kind: str
    peer: int | None
    time_s: float
    text: str

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "peer": self.peer, "time_s": self.time_s, "text": self.text}


@dataclass
class Round:
    """What is known of the round that led from one revision to the next."""

    rosters: dict[int, Roster] = field(default_factory=dict)  # by index of the operation; of who advanced
    bits: dict[tuple[int, tuple[str, ...]], str] = field(default_factory=dict)  # (index, members) -> expected
    done_by: int | None = None  # who told of it first
    exchanges: dict[tuple[str, int], str] = field(default_factory=dict)


@dataclass
class Process:
    """One process of the run, from its start."""

    number: int
    heard_s: float
    peer: str = ""
    member: bool = False
    synced: bool = False  # since it became a member
    rounds: int = 0  # since it became a member
    revision: int = 0  # that it holds
    excuse: str = ""  # why it may find itself evicted
    excused_until_s: float = math.inf
    stopped: bool = False
    ended: bool = False
    evictions: int = 0


class Oracle:
    """Feed it everything in the order it was heard; times are seconds on one clock."""

    def __init__(self, seed: int, hang_s: float, digest: str = "fast") -> None:
        self.seed, self.hang_s, self.digest = seed, hang_s, digest
        self.violations: list[Violation] = []
        self.processes: dict[int, Process] = {}
        self.checked: Counter[str] = Counter()  # what was compared, and how often
        self.errors: Counter[str] = Counter()  # that were explained
        self.advances: list[float] = []  # when the first member told of each revision
        self.retries = 0
        self._numbers: dict[str, int] = {}
        self._rounds: OrderedDict[int, Round] = OrderedDict()
        self._state = workload.new_state(digest)
        self._digests: dict[int, str] = {0: self._state.digest()}
        self._early: dict[int, list[tuple[int, float, str]]] = {}  # digests of revisions not yet derived
        self._reached: dict[int, int] = {}  # epoch -> highest revision of a member that was in it
        self._synced_at: dict[int, int] = {}  # epoch -> lowest revision synced in it
        self._advanced_s = 0.0
        self._master_away_until_s = -math.inf

    # ---- facts

    @property
    def revision(self) -> int:
        """The newest that any member told of."""
        return len(self.advances)

    def started(self, number: int, now_s: float) -> None:
        self.processes[number] = Process(number, now_s)

    def excuse(self, number: int, why: str) -> None:
        """A fault takes it out of the run, or may: until it is a member again it may find itself evicted."""
        process = self.processes[number]
        process.excuse, process.excused_until_s = why, math.inf

    def excuse_ends(self, number: int, at_s: float) -> None:
        """What it does from then on needs no excuse; if it has not been evicted by then it will not be."""
        self.processes[number].excused_until_s = at_s

    def stop(self, number: int) -> None:
        """It does not run and can report nothing."""
        self.processes[number].stopped = True

    def resume(self, number: int, now_s: float) -> None:
        process = self.processes[number]
        process.stopped, process.heard_s = False, max(process.heard_s, now_s)

    def ended(self, number: int, expected: bool, how: str, now_s: float) -> None:
        process = self.processes[number]
        process.ended, process.member = True, False
        if not expected:
            self._violate("crash", number, now_s, how)

    def master_away(self) -> None:
        """No peer may reach it, or it may decide nothing."""
        self._master_away_until_s = math.inf

    def master_back(self, now_s: float) -> None:
        """Calls that waited for it too long by then may tell so a little later."""
        self._master_away_until_s = now_s + MASTER_GRACE_S

    def in_step(self) -> list[int]:
        """Processes that are members, hold the state and are under no fault."""
        return [p.number for p in self.processes.values() if self._is_in_step(p)]

    def _is_in_step(self, process: Process) -> bool:
        return process.rounds > 0 and not process.ended and not process.stopped and not process.excuse

    # ---- reports

    def take(self, number: int, report: Mapping[str, Any]) -> None:
        """One line of a peer. KeyError, TypeError: not of this program."""
        process = self.processes[number]
        process.heard_s = max(process.heard_s, report["t"])
        match report["event"]:
            case "ready":
                process.peer = report["peer"]
                self._numbers[process.peer] = number
            case "member":
                process.member, process.synced, process.rounds = True, False, 0
                process.excuse, process.excused_until_s = "", math.inf
            case "sync":
                self._take_sync(process, report)
            case "round":
                self._take_round(process, report)
            case "failed":
                self._take_error(process, report, report["t"])
            case "refused":
                self._take_refusal(process, report)
            case "leaving":
                process.member, process.rounds = False, 0
            case other:
                raise KeyError(other)

    def _take_sync(self, process: Process, report: Mapping[str, Any]) -> None:
        revision, now_s, epoch = report["revision"], report["t"], report["epoch"]
        if report["liars"]:
            self._violate("liar", process.number, now_s, f"{report['liars']} served wrong bytes to it")
        if process.synced:
            if revision != process.revision:
                self._violate(
                    "lost revision" if revision < process.revision else "skipped revision", process.number, now_s,
                    f"held revision {process.revision}, and a sync put it to {revision}",
                )  # fmt: skip
            elif report["changed"]:
                self._violate(
                    "replaced state", process.number, now_s,
                    f"a sync replaced {report['changed']} of revision {revision}, which it held",
                )  # fmt: skip
        process.synced, process.revision = True, revision
        self._check_order(process, epoch, revision, now_s)
        self._check_digest(process, revision, report["digest"], now_s)

    def _check_order(self, process: Process, epoch: int, revision: int, now_s: float) -> None:
        """No epoch goes on from less than an earlier one had reached. Reports of different peers come in any order."""
        before = max((reached for number, reached in self._reached.items() if number < epoch), default=0)
        if revision < before:
            self._violate(
                "lost revision", process.number, now_s,
                f"synced revision {revision} in epoch {epoch}, but revision {before} was reached in an earlier one",
            )  # fmt: skip
        self._synced_at[epoch] = min(revision, self._synced_at.get(epoch, revision))
        self._reached = {number: r for number, r in self._reached.items() if number > epoch - 64}
        self._synced_at = {number: r for number, r in self._synced_at.items() if number > epoch - 64}

    def _check_digest(self, process: Process, revision: int, digest: str, now_s: float) -> None:
        known = self._digests.get(revision)
        if known is None:
            self._early.setdefault(revision, []).append((process.number, now_s, digest))
        elif known != digest:
            self._violate(
                "digest", process.number, now_s, f"revision {revision} is {digest[:16]} here, {known[:16]} by reference"
            )
        else:
            self.checked["digests"] += 1

    def _take_round(self, process: Process, report: Mapping[str, Any]) -> None:
        revision, now_s, done = report["revision"], report["t"], report["done"]
        if revision < self.revision - KEPT_REVISIONS:
            self._violate("late report", process.number, now_s, f"tells of revision {revision}, at {self.revision}")
            return
        known = self._rounds.setdefault(revision, Round())
        rosters = [(epoch, tuple(members)) for epoch, members in report["rosters"]]
        outcomes = [Outcome(index, bits, *rosters[roster]) for index, bits, roster in report["ops"]]
        for error in report["errors"]:
            self._take_error(process, error, now_s)
        for outcome in outcomes:
            self._check_outcome(process, revision, known, outcome, now_s)
        if report["exchange"] is not None:
            self._check_exchange(process, revision, known, report["exchange"], now_s)
        self.retries += report["retries"]
        if now_s > process.excused_until_s:
            process.excuse = ""
        if not done:
            return
        process.rounds += 1
        process.revision = revision + 1
        for outcome in outcomes:
            mine = (outcome.epoch, outcome.members)
            theirs = known.rosters.setdefault(outcome.index, mine)
            if theirs != mine:
                self._violate(
                    "fork", process.number, now_s,
                    f"round {revision} operation {outcome.index}: {self._who(mine)} here, {self._who(theirs)} at "
                    f"peer {known.done_by}",
                )  # fmt: skip
        if known.done_by is None:
            known.done_by = process.number
            self._advance(revision, outcomes, process, now_s)
        self._reach(max((outcome.epoch for outcome in outcomes), default=0), revision + 1, process, now_s)

    def _reach(self, epoch: int, revision: int, process: Process, now_s: float) -> None:
        self._reached[epoch] = max(revision, self._reached.get(epoch, 0))
        later = [(number, synced) for number, synced in self._synced_at.items() if number > epoch and synced < revision]
        for number, synced in later:
            self._violate(
                "lost revision", process.number, now_s,
                f"reached revision {revision} in epoch {epoch}, but epoch {number} went on from {synced}",
            )  # fmt: skip
            del self._synced_at[number]

    def _advance(self, revision: int, outcomes: Sequence[Outcome], process: Process, now_s: float) -> None:
        """The first that tells of a round: the reference state follows, with the reference's bits."""
        if revision != self._state.revision:
            self._violate(
                "repeated revision" if revision < self._state.revision else "skipped revision", process.number, now_s,
                f"did the round of revision {revision}, but the group is at {self._state.revision}",
            )  # fmt: skip
            return
        known = self._rounds[revision]
        planned = {op.index for op in workload.plan(self.seed, revision)}
        if {outcome.index for outcome in outcomes} != planned:
            self._violate("round", process.number, now_s, f"round {revision} is not what was planned")
            return
        right = [
            Outcome(o.index, known.bits.get((o.index, o.members), o.bits), o.epoch, o.members) for o in outcomes
        ]  # the bits of members that nobody knows were complained of already
        workload.advance(self._state, right)
        self._digests[revision + 1] = self._state.digest()
        self._digests.pop(revision - KEPT_REVISIONS, None)
        if len(self._rounds) > KEPT_REVISIONS:
            self._rounds.popitem(last=False)
        self.advances.append(now_s)
        self._advanced_s = now_s
        for number, at_s, digest in self._early.pop(revision + 1, []):
            self._check_digest(self.processes[number], revision + 1, digest, at_s)

    def _check_outcome(self, process: Process, revision: int, known: Round, outcome: Outcome, now_s: float) -> None:
        key = (outcome.index, outcome.members)
        want = known.bits.get(key)
        if want is None:
            numbers = self._numbers_of(outcome.members)
            if numbers is None or process.peer not in outcome.members:
                self._violate(
                    "members", process.number, now_s,
                    f"round {revision} operation {outcome.index} names members {outcome.members}, not all of this run",
                )  # fmt: skip
                return
            op = workload.plan(self.seed, revision)[outcome.index]
            want = known.bits[key] = workload.bits(workload.expected(self.seed, revision, op, numbers))
        if outcome.bits != want:
            op = workload.plan(self.seed, revision)[outcome.index]
            self._violate(
                "wrong value", process.number, now_s,
                f"round {revision} {op}: bits {outcome.bits}, the reference for {self._who((0, outcome.members))} "
                f"gives {want}",
            )  # fmt: skip
        else:
            self.checked["values"] += 1

    def _check_exchange(
        self, process: Process, revision: int, known: Round, told: Mapping[str, Any], now_s: float
    ) -> None:
        if "error" in told:
            error = told["error"]
            if error["class"] == "PeerLostError":
                self.errors["exchange: PeerLostError"] += 1
                self._check_restored(process, error, now_s)
            else:
                self._take_error(process, error, now_s)
            return
        if not told["kept"]:
            self._violate("input", process.number, now_s, f"the exchange of round {revision} changed its input")
        numbers = self._numbers_of([told["partner"]])
        want = None if numbers is None else self._exchanged(known, numbers[0], revision)
        if told["bits"] != want:
            self._violate("wrong value", process.number, now_s, f"exchange of round {revision} with {told['partner']}")
        else:
            self.checked["exchanges"] += 1

    def _exchanged(self, known: Round, number: int, revision: int) -> str:
        key = ("exchange", number)
        if key not in known.exchanges:
            known.exchanges[key] = workload.bits(workload.exchange_input(self.seed, number, revision))
        return known.exchanges[key]

    def _take_error(self, process: Process, error: Mapping[str, Any], now_s: float) -> None:
        kind = error["class"]
        self._check_restored(process, error, now_s)
        if kind in OUT_OF_RUN and process.excuse:
            self.errors[f"{kind} after {process.excuse}"] += 1
            process.member, process.rounds, process.synced = False, 0, False
            process.evictions += kind == "EvictedError"
            return
        if kind == "MasterUnavailableError" and (process.excuse or now_s <= self._master_away_until_s):
            self.errors[kind] += 1
            return
        if kind:
            self._violate("error", process.number, now_s, f"{kind}: {error['text']}")

    def _take_refusal(self, process: Process, report: Mapping[str, Any]) -> None:
        kind, now_s = report["class"], report["t"]
        if kind == "MasterUnavailableError" and not process.excuse and now_s > self._master_away_until_s:
            self._violate("error", process.number, now_s, f"{kind}: {report['text']}")
            return
        self.errors[f"connect: {kind}"] += 1

    def _check_restored(self, process: Process, error: Mapping[str, Any], now_s: float) -> None:
        if "restored" not in error:
            return
        if error["restored"]:
            self.checked["inputs after errors"] += 1
        else:
            self._violate("input", process.number, now_s, f"not restored after {error['class']}: {error['text']}")

    # ---- progress

    def watch(self, now_s: float, not_before_s: float = 0.0) -> list[Violation]:
        """Hangs as of now; call it when everything that was reported has been taken.

        not_before_s: time counts from here at the earliest (the master itself was stopped until then, say).
        """
        found = []
        silent_s = now_s - max(self._advanced_s, not_before_s)
        running = [p for p in self.processes.values() if not p.ended and not p.stopped]
        if silent_s > self.hang_s and len(running) > 1:
            found.append(Violation("hang", None, now_s, f"no new revision for {silent_s:.1f} s"))
        for process in running:
            silent_s = now_s - max(process.heard_s, not_before_s)
            if silent_s > self.hang_s:
                found.append(Violation("hang", process.number, now_s, f"nothing heard of it for {silent_s:.1f} s"))
        self.violations += found
        return found

    def settled(self, since_s: float, now_s: float) -> bool:
        """Whether, since then, every process that runs is a member in step."""
        running = [p for p in self.processes.values() if not p.ended]
        return self._advanced_s > since_s and all(self._is_in_step(p) and p.heard_s > since_s for p in running)

    def finish(self, now_s: float) -> None:
        """Nothing more will be reported."""
        for revision, told in sorted(self._early.items()):
            number, _, digest = told[0]
            self._violate("digest", number, now_s, f"told of revision {revision} as {digest[:16]}; nobody made it")

    # ---- inside

    def _numbers_of(self, members: Sequence[str]) -> list[int] | None:
        """In rank order; None if one is unknown."""
        known = [self._numbers.get(peer) for peer in sorted(members)]
        numbers = [number for number in known if number is not None]
        return numbers if len(numbers) == len(known) and len(set(members)) == len(members) else None

    def _who(self, roster: Roster) -> str:
        epoch, members = roster
        return f"epoch {epoch} of peers {[self._numbers.get(peer) for peer in members]}"

    def _violate(self, kind: str, peer: int | None, now_s: float, text: str) -> None:
        self.violations.append(Violation(kind, peer, now_s, text))
