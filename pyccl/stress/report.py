"""What a run cost: counts, costs of faults by kind, rates, memory. Pure but for `Memory.of`."""

from __future__ import annotations

import bisect
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from pyccl.stress.oracle import Oracle

AFTER_S: Final = 1.0  # a fault is charged with pauses that overlap it, or begin so soon after it


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one process."""

    rss_bytes: int
    descriptors: int

    @staticmethod
    def of(pid: int) -> Memory | None:
        """None: it has ended."""
        try:
            status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
            descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        except (FileNotFoundError, ProcessLookupError):
            return None
        kib = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")]
        return Memory(kib[0] << 10, descriptors) if kib else None  # a zombie has none


@dataclass
class Mark:
    """One fault, as it was. Times on the clock of the run."""

    number: int
    kind: str
    victim: int | None
    at_s: float
    until_s: float
    detail: str = ""


@dataclass
class Phase:
    name: str
    start_s: float
    first_revision: int
    end_s: float = 0.0
    last_revision: int = 0

    @property
    def seconds(self) -> float:
        return max(self.end_s - self.start_s, 0.0)

    @property
    def rounds_per_s(self) -> float:
        return (self.last_revision - self.first_revision) / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Of all faults of a kind: how many, the longest pause between two revisions of the group, operations run again."""

    kind: str
    count: int
    longest_stall_s: float
    median_stall_s: float
    retries: int


class Record:
    """Collects; see `to_json`."""

    def __init__(self, start_s: float, kinds: Sequence[str]) -> None:
        self.start_s, self.end_s, self.kinds = start_s, start_s, list(kinds)
        self.phases: list[Phase] = []
        self.faults: list[Mark] = []
        self.postponed = 0
        self.late_resumes = 0  # of peers that were to be stopped for less than the time-out
        self.lag_s = 0.0  # the longest from a report to its being judged
        self.samples: list[tuple[float, Memory, dict[int, Memory]]] = []
        self.traces: dict[str, list[str]] = {}  # stderr: of every master, of peers there at the end or that crashed
        self.operations = 0  # all-reduces that succeeded, each counted on every peer
        self.moved: list[tuple[float, int]] = []  # bytes sent and received by all peers, per second
        self.retries: list[tuple[float, int]] = []

    def begin(self, name: str, now_s: float, revision: int) -> Phase:
        self.phases.append(Phase(name, now_s, revision, now_s, revision))
        return self.phases[-1]

    def fault(self, kind: str, victim: int | None, at_s: float, until_s: float) -> Mark:
        self.faults.append(Mark(len(self.faults), kind, victim, at_s, until_s))
        return self.faults[-1]

    def round(self, at_s: float, moved_bytes: int, retries: int, operations: int) -> None:
        self.operations += operations
        second = int(at_s - self.start_s)
        if self.moved and self.moved[-1][0] == second:
            self.moved[-1] = (second, self.moved[-1][1] + moved_bytes)
        else:
            self.moved.append((second, moved_bytes))
        if retries:
            self.retries.append((at_s, retries))

    def phase(self, name: str) -> Phase | None:
        return next((phase for phase in self.phases if phase.name == name), None)

    def rate_ratio(self) -> float | None:
        """Rounds per second under faults, as a share of those without."""
        calm, faulty = self.phase("calm"), self.phase("faults")
        return faulty.rounds_per_s / calm.rounds_per_s if calm and faulty and calm.rounds_per_s else None

    def costs(self, advances: Sequence[float]) -> list[Cost]:
        """advances: times of the group's revisions, ascending."""
        advances = sorted(advances)
        costs = []
        for kind in dict.fromkeys(mark.kind for mark in self.faults):
            marks = [mark for mark in self.faults if mark.kind == kind]
            stalls = [longest_gap(advances, mark.at_s, mark.until_s + AFTER_S) for mark in marks]
            retries = sum(
                count
                for at_s, count in self.retries
                if any(mark.at_s <= at_s <= mark.until_s + AFTER_S for mark in marks)
            )
            costs.append(Cost(kind, len(marks), max(stalls), statistics.median(stalls), retries))
        return sorted(costs, key=lambda cost: cost.kind)

    def memory(self) -> dict[str, Any]:
        """At the first and the last sample; of peers that were there at both, and of all."""
        if not self.samples:
            return {}
        (_, master, first), (_, master_last, last) = self.samples[0], self.samples[-1]
        both = sorted(first.keys() & last.keys())
        return {
            "master": {"start": asdict(master), "end": asdict(master_last)},
            "peers_start": _summary(first.values()),
            "peers_end": _summary(last.values()),
            "peers_throughout": {
                str(number): {"start": asdict(first[number]), "end": asdict(last[number])} for number in both
            },
        }

    def to_json(self, oracle: Oracle) -> dict[str, Any]:
        return {
            "ok": not oracle.violations,
            "violations": [self._violation(v.to_json()) for v in oracle.violations],
            "hangs": sum(v.kind == "hang" for v in oracle.violations),
            "revisions": oracle.revision,
            "operations": self.operations,
            "checked": dict(oracle.checked),
            "explained_errors": dict(oracle.errors),
            "retries": oracle.retries,
            "processes": len(oracle.processes),
            "phases": [
                {"name": p.name, "seconds": p.seconds, "rounds": p.last_revision - p.first_revision,
                 "rounds_per_s": p.rounds_per_s} for p in self.phases
            ],
            "rate_against_fault_free": self.rate_ratio(),
            "costs": [asdict(cost) for cost in self.costs(oracle.advances)],
            "faults": [
                {**asdict(mark), "at_s": mark.at_s - self.start_s, "until_s": mark.until_s - self.start_s}
                for mark in self.faults
            ],
            "faults_postponed": self.postponed,
            "late_resumes": self.late_resumes,
            "memory": self.memory(),
            "memory_samples": [
                {"at_s": at_s - self.start_s, "master_rss_bytes": master.rss_bytes, **_summary(peers.values())}
                for at_s, master, peers in self.samples
            ],
            "judged_after_s": self.lag_s,
            "seconds": self.end_s - self.start_s,
        }  # fmt: skip

    def _violation(self, told: dict[str, Any]) -> dict[str, Any]:
        return {**told, "time_s": told["time_s"] - self.start_s}


def longest_gap(times: Sequence[float], start_s: float, end_s: float) -> float:
    """The longest between two neighbours that overlaps the span; times ascending. 0 where there is none."""
    first = max(bisect.bisect_left(times, start_s) - 1, 0)
    last = bisect.bisect_right(times, end_s)
    return max((b - a for a, b in itertools.pairwise(times[first : last + 1])), default=0.0)


def _summary(memories: Any) -> dict[str, float]:
    rss = [memory.rss_bytes for memory in memories]
    return {"count": len(rss), "median_rss_bytes": statistics.median(rss), "max_rss_bytes": max(rss)}


def lines(record: Record, oracle: Oracle, seed: int) -> list[str]:
    """For a person."""
    told = []
    if record.faults:
        told.append(f"{'fault':14} {'count':>5} {'longest stall':>14} {'median':>8} {'retries':>8}")
        told += [
            f"{c.kind:14} {c.count:5d} {c.longest_stall_s:12.2f} s {c.median_stall_s:6.2f} s {c.retries:8d}"
            for c in record.costs(oracle.advances)
        ]
    for phase in record.phases:
        rounds = phase.last_revision - phase.first_revision
        told.append(f"{phase.name:14} {rounds} rounds in {phase.seconds:.1f} s: {phase.rounds_per_s:.1f} per second")
    ratio = record.rate_ratio()
    told.append(f"throughput     {'-' if ratio is None else f'{ratio:.0%}'} of the fault-free rate")
    told.append(
        f"operations     {record.operations} all-reduces, {oracle.checked['exchanges']} exchanges, "
        f"{oracle.retries} retries, {len(oracle.processes)} processes"
    )
    told.append(
        f"checked        {oracle.checked['values']} values, {oracle.checked['digests']} digests of {oracle.revision} "
        f"revisions, {oracle.checked['inputs after errors']} inputs after errors"
    )
    told += [f"explained      {count} x {what}" for what, count in sorted(oracle.errors.items())]
    told += _memory_lines(record)
    told += [
        f"VIOLATION      {v.time_s - record.start_s:.1f} s  {v.kind}  {_peer(v.peer)}{v.text}"
        for v in oracle.violations
    ]
    hangs = sum(v.kind == "hang" for v in oracle.violations)
    told.append(
        f"result         {len(oracle.violations) - hangs} violations, {hangs} hangs, {len(record.faults)} faults, "
        f"seed {seed}, {record.end_s - record.start_s:.1f} s"
    )
    return told


def _peer(number: int | None) -> str:
    return "" if number is None else f"peer {number}: "


def _memory_lines(record: Record) -> list[str]:
    memory = record.memory()
    if not memory:
        return []
    a, b = memory["peers_start"], memory["peers_end"]
    return [
        f"memory         master {_change(memory['master'])}",
        *(
            f"memory         peer {number}, there throughout: {_change(span)}"
            for number, span in memory["peers_throughout"].items()
        ),
        f"memory         peers, median {_mib(a['median_rss_bytes'])} -> {_mib(b['median_rss_bytes'])} MiB",
    ]


def _change(span: dict[str, dict[str, int]]) -> str:
    a, b = span["start"], span["end"]
    return f"{_mib(a['rss_bytes'])} -> {_mib(b['rss_bytes'])} MiB, {a['descriptors']} -> {b['descriptors']} descriptors"


def _mib(size_bytes: float) -> str:
    return f"{size_bytes / (1 << 20):.1f}"
