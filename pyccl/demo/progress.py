"""What is known of a demo run, and the verdict on it. Pure: reports and times come in, nothing is printed or started.

Invariants: a report is never forgotten or overwritten; the verdict is a function of the recorded facts alone. After
a failed process or a differing digest it names these only: the other requirements cannot hold then.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

LOSS_LIMIT_SHARE: Final = 0.8  # last validation loss, as a share of the unigram entropy


class ExitStatus(enum.IntEnum):
    """Exit statuses of ``pyccl demo``; 2 (bad arguments) is click's."""

    OK = 0
    INTERNAL = 1
    DIGESTS_DIFFER = 3
    LOSS_TOO_HIGH = 4
    NO_KILL_OR_JOIN = 5
    CHILD_FAILED = 6
    STALLED = 7


# When several requirements failed, the first of these is the exit status.
GRAVEST_FIRST: Final[tuple[ExitStatus, ...]] = (
    ExitStatus.DIGESTS_DIFFER,
    ExitStatus.CHILD_FAILED,
    ExitStatus.STALLED,
    ExitStatus.NO_KILL_OR_JOIN,
    ExitStatus.LOSS_TOO_HIGH,
)


class Fate(enum.Enum):
    """How far a peer got."""

    STARTING = "starting"
    TRAINING = "training"
    KILLED = "killed"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True)
class Plan:
    """What a run shall do."""

    peers: int = 4
    rounds: int = 48
    steps: int = 60
    seed: int = 1
    kill: bool = True
    join: bool = True

    @property
    def kill_revision(self) -> int:
        """Revision at which one peer is killed."""
        return max(1, self.rounds // 3)

    @property
    def join_revision(self) -> int:
        """Revision at which the newcomer is told to connect."""
        return max(2, self.rounds * 2 // 3)

    @property
    def victim(self) -> int:
        """Number of the peer that is killed."""
        return 1

    @property
    def newcomer(self) -> int:
        """Number of the peer that joins."""
        return self.peers


T = TypeVar("T")


@dataclass(frozen=True)
class RoundReport:
    """One peer's view of one revision."""

    revision: int
    digest: str
    epoch: int
    world_size: int
    retries: int  # operations of this round that ran again in another epoch
    sync_bytes: int
    train_loss: float | None
    validation_loss: float | None
    mb_per_s: float | None
    time_s: float  # since the start of the run

    @staticmethod
    def parse(fields: Mapping[str, Any], time_s: float) -> RoundReport:
        """Check the fields of a ``round`` line.

        Raises:
            ValueError: a field is missing or has another type.
        """
        values: dict[str, Any] = {"time_s": time_s}
        for name in ("revision", "epoch", "world_size", "retries", "sync_bytes"):
            values[name] = _checked(fields, name, int)
        values["digest"] = _checked(fields, "digest", str)
        for name in ("train_loss", "validation_loss", "mb_per_s"):
            values[name] = None if fields.get(name) is None else _checked(fields, name, float)
        return RoundReport(**values)


def _checked(fields: Mapping[str, Any], name: str, kind: type[T]) -> T:
    value = fields.get(name)
    if not isinstance(value, kind):
        raise ValueError(f"report field {name!r} is {value!r}, not {kind.__name__}")
    return value


@dataclass
class Peer:
    """One peer process."""

    number: int
    peer_id: str = ""
    fate: Fate = Fate.STARTING
    reports: list[RoundReport] = field(default_factory=list)

    @property
    def last(self) -> RoundReport | None:
        """Newest report."""
        return self.reports[-1] if self.reports else None


@dataclass(frozen=True)
class Mark:
    """A moment to show in the plot: the kill, the join."""

    revision: int
    time_s: float
    peer: int


@dataclass(frozen=True)
class DigestCheck:
    """All digests of all peers, compared revision by revision."""

    compared: int  # digests that had at least one other peer's beside them
    revisions: int  # revisions at which at least two peers reported
    differences: tuple[str, ...]  # one sentence each


@dataclass(frozen=True)
class Verdict:
    """The outcome: a status and the reasons, none if all is well."""

    status: ExitStatus
    reasons: tuple[str, ...]


@dataclass
class Run:
    """Facts of one run."""

    plan: Plan
    entropy_bits: float
    peers: dict[int, Peer] = field(default_factory=dict)
    killed: Mark | None = None
    told_to_join: Mark | None = None
    failures: list[tuple[ExitStatus, str]] = field(default_factory=list)
    seconds: float = 0.0

    def observe(self, number: int, fields: Mapping[str, Any], time_s: float) -> None:
        """Take in one line of a peer.

        Raises:
            ValueError: the line does not have the agreed form.
        """
        peer = self.peers[number]
        event = fields.get("event")
        if event == "ready":
            return
        if event == "joined":
            peer.peer_id = _checked(fields, "peer_id", str)
        elif event == "round":
            peer.reports.append(RoundReport.parse(fields, time_s))
        else:
            raise ValueError(f"unknown event {event!r}")
        if peer.fate is Fate.STARTING:
            peer.fate = Fate.TRAINING

    def fail(self, status: ExitStatus, reason: str) -> None:
        """Record a failure that reports do not show, such as a process that died."""
        self.failures.append((status, reason))

    @property
    def revision(self) -> int:
        """Newest revision that any peer reported; -1 before the first."""
        return max((peer.last.revision for peer in self.peers.values() if peer.last is not None), default=-1)

    @property
    def retries(self) -> int:
        """Operations that ran again, each counted at every peer that ran it again."""
        return sum(report.retries for peer in self.peers.values() for report in peer.reports)

    def losses(self) -> list[tuple[float, int, float]]:
        """``(time_s, revision, bits per character)`` of validation, one for each revision, oldest first."""
        first: dict[int, tuple[float, int, float]] = {}
        for peer in self.peers.values():
            for report in peer.reports:
                if report.validation_loss is not None and report.revision not in first:
                    first[report.revision] = (report.time_s, report.revision, report.validation_loss)
        return [first[revision] for revision in sorted(first)]

    def loss_at(self, revision: int) -> float | None:
        """Validation loss at one revision."""
        return next((loss for _, at, loss in self.losses() if at == revision), None)

    def membership(self) -> list[tuple[float, int]]:
        """``(time_s, world size)`` in the order of reports."""
        reports = (report for peer in self.peers.values() for report in peer.reports)
        return sorted((report.time_s, report.world_size) for report in reports)

    def joined(self) -> Mark | None:
        """Where the newcomer came in, once it reported."""
        peer = self.peers.get(self.plan.newcomer)
        if peer is None or not peer.reports:
            return None
        return Mark(peer.reports[0].revision, peer.reports[0].time_s, peer.number)

    def check_digests(self) -> DigestCheck:
        """Compare every digest of every peer at every revision."""
        at: dict[int, dict[int, list[str]]] = {}
        for peer in self.peers.values():
            for report in peer.reports:
                at.setdefault(report.revision, {}).setdefault(peer.number, []).append(report.digest)
        compared, revisions, differences = 0, 0, []
        for revision, holders in sorted(at.items()):
            digests = [digest for held in holders.values() for digest in held]
            if len(holders) > 1:
                compared += len(digests)
                revisions += 1
            if len(set(digests)) > 1:
                listing = ", ".join(f"peer {number} {held[0][:12]}" for number, held in sorted(holders.items()))
                differences.append(f"digests differ at revision {revision}: {listing}")
        return DigestCheck(compared, revisions, tuple(differences))

    def _gaps(self) -> list[str]:
        """Revisions that a surviving peer should have reported and did not."""
        gaps = []
        for peer in self.peers.values():
            if peer.fate is Fate.KILLED or not peer.reports:
                continue
            seen = [report.revision for report in peer.reports]
            first = 0 if peer.number < self.plan.peers else seen[0]
            if seen != list(range(first, self.plan.rounds + 1)):
                gaps.append(f"peer {peer.number} did not report every revision from {first} to {self.plan.rounds}")
        return gaps

    def _churn_failures(self) -> list[str]:
        failures = []
        if self.plan.kill and self.killed is None:
            failures.append("the kill did not happen")
        if self.plan.join:
            newcomer = self.peers.get(self.plan.newcomer)
            if newcomer is None or not newcomer.reports:
                failures.append("the newcomer did not join")
            elif newcomer.reports[0].revision < 1:
                failures.append("the newcomer did not receive the run's revision")
        return failures

    def _loss_failures(self) -> list[str]:
        first, last = self.loss_at(0), self.loss_at(self.plan.rounds)
        if first is None or last is None:
            return ["the first or the last validation loss is missing"]
        if not last <= self.loss_limit:
            return [f"validation loss {last:.3f} is above {self.loss_limit:.3f} bits/char"]
        return []

    @property
    def loss_limit(self) -> float:
        """Highest acceptable last loss, bits per character."""
        return LOSS_LIMIT_SHARE * self.entropy_bits

    def verdict(self) -> Verdict:
        """Judge the finished run."""
        digests = self.check_digests()
        found = list(self.failures)
        found += [(ExitStatus.DIGESTS_DIFFER, reason) for reason in digests.differences]
        if not found:
            found += [(ExitStatus.DIGESTS_DIFFER, reason) for reason in self._gaps()]
            if digests.compared == 0:
                found.append((ExitStatus.DIGESTS_DIFFER, "no digests could be compared"))
            found += [(ExitStatus.NO_KILL_OR_JOIN, reason) for reason in self._churn_failures()]
            found += [(ExitStatus.LOSS_TOO_HIGH, reason) for reason in self._loss_failures()]
        statuses = {status for status, _ in found}
        status = next((status for status in GRAVEST_FIRST if status in statuses), None)
        if status is None:
            status = ExitStatus.INTERNAL if found else ExitStatus.OK
        return Verdict(status, tuple(reason for _, reason in found))

    def to_json(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        verdict, digests, joined = self.verdict(), self.check_digests(), self.joined()
        return {
            "ok": verdict.status is ExitStatus.OK,
            "exit_status": int(verdict.status),
            "reasons": list(verdict.reasons),
            "peers": self.plan.peers,
            "rounds": self.plan.rounds,
            "seed": self.plan.seed,
            "seconds": round(self.seconds, 3),
            "loss": {
                "unit": "bits/char",
                "first": self.loss_at(0),
                "last": self.loss_at(self.plan.rounds),
                "unigram_entropy": self.entropy_bits,
                "limit": self.loss_limit,
            },
            "digests": {
                "compared": digests.compared,
                "revisions": digests.revisions,
                "differences": list(digests.differences),
            },
            "retries": self.retries,
            "killed": _mark_json(self.killed),
            "joined": _mark_json(joined),
            "validation": [
                {"time_s": round(time_s, 3), "revision": revision, "loss": loss}
                for time_s, revision, loss in self.losses()
            ],
            "membership": [{"time_s": round(time_s, 3), "world_size": size} for time_s, size in self.membership()],
        }


def _mark_json(mark: Mark | None) -> dict[str, Any] | None:
    if mark is None:
        return None
    return {"peer": mark.peer, "revision": mark.revision, "time_s": round(mark.time_s, 3)}
