"""``pyccl bench memory``: does anything grow? A group runs rounds of every kind of call while one peer comes and goes.

On each tick of the first founder the resident memory, the anonymous memory (what malloc and mmap gave, no files) and
the descriptors of the master and of every peer are read from /proc. After the warm-up a line is fitted to the anonymous
memory. Neighbouring samples depend on each other, which would make the line look far surer than it is: the fit is to
the means of BLOCKS equal spans, and the interval is Student's for these. The second half has a line of its own: what
only fills what it is bounded by is steeper before. First, as many simulated members have come and left as the master
remembers, so that this is full.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from pyccl._proto import limits
from pyccl.bench.conductor import MASTER, BenchError, Conductor, ExitStatus

BLOCKS: Final = 10
HALF_BLOCKS: Final = BLOCKS // 2
STUDENT_T: Final = {BLOCKS: 2.306, HALF_BLOCKS: 3.182}  # two-sided 95 %, two degrees of freedom less than blocks
PEER_TIMEOUT_S: Final = 30.0
COMER: Final = "comer"
PASSERS: Final = "passers"
HOUR_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Plan:
    """peers: founders, who stay; one more comes and goes. round_s: between the starts of two rounds. passers: who have
    come and left before."""

    peers: int = 4
    minutes: float = 60.0
    warm_up_minutes: float = 10.0
    state_bytes: int = 256 << 10
    round_s: float = 1.0
    stay_rounds: int = 3
    away_s: float = 2.0
    sample_s: float = 5.0
    passers: int = limits.GONE_MAX


@dataclass(frozen=True, slots=True)
class Sample:
    """Of one process at one moment, in seconds since the group was complete."""

    at_s: float
    rss_bytes: int
    pss_bytes: int
    anonymous_bytes: int
    descriptors: int

    @staticmethod
    def of(pid: int, at_s: float) -> Sample:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
        rss, pss, anonymous = (_field(rollup, name) for name in ("Rss", "Pss", "Anonymous"))
        return Sample(at_s, rss, pss, anonymous, len(os.listdir(f"/proc/{pid}/fd")))


def _field(rollup: str, wanted: str) -> int:
    for line in rollup.splitlines():
        name, _, value = line.partition(":")
        if name == wanted:
            return int(value.removesuffix("kB")) << 10
    raise ValueError(f"/proc/PID/smaps_rollup has no {wanted}")


@dataclass(frozen=True, slots=True)
class Slope:
    """Bytes an hour: the line's, and half the width of its 95 % interval."""

    bytes_per_hour: float
    plus_minus: float


def slope(times_s: Sequence[float], values: Sequence[float], spans: int = BLOCKS) -> Slope:
    """Least squares over the means of so many equal spans of time, one of STUDENT_T.

    Raises:
        ValueError: there is a span without a sample.
    """
    first, width = times_s[0], (times_s[-1] - times_s[0]) / spans
    blocks: list[list[tuple[float, float]]] = [[] for _ in range(spans)]
    for at, value in zip(times_s, values, strict=True):
        blocks[min(int((at - first) / width), spans - 1) if width > 0 else 0].append((at, value))
    if not all(blocks):
        raise ValueError(f"too few samples for {spans} spans")
    xs = [statistics.fmean(at for at, _ in block) for block in blocks]
    ys = [statistics.fmean(value for _, value in block) for block in blocks]
    line = statistics.linear_regression(xs, ys)
    spread = sum((x - statistics.fmean(xs)) ** 2 for x in xs)
    residue = sum((y - line.slope * x - line.intercept) ** 2 for x, y in zip(xs, ys, strict=True))
    deviation = (residue / (spans - 2) / spread) ** 0.5
    return Slope(line.slope * HOUR_S, STUDENT_T[spans] * deviation * HOUR_S)


@dataclass(frozen=True, slots=True)
class Track:
    """One process from start to end."""

    name: str
    samples: tuple[Sample, ...]  # after the warm-up
    warm_up: tuple[Sample, ...]

    def slope(self, name: str = "anonymous_bytes") -> Slope:
        return self._slope(self.samples, name, BLOCKS)

    def late_slope(self, name: str = "anonymous_bytes") -> Slope:
        """Of the second half."""
        middle = (self.samples[0].at_s + self.samples[-1].at_s) / 2
        return self._slope([sample for sample in self.samples if sample.at_s >= middle], name, HALF_BLOCKS)

    @staticmethod
    def _slope(samples: Sequence[Sample], name: str, spans: int) -> Slope:
        return slope([sample.at_s for sample in samples], [getattr(sample, name) for sample in samples], spans)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **{name: asdict(self.slope(name)) for name in ("anonymous_bytes", "rss_bytes", "pss_bytes")},
            "second_half": {"anonymous_bytes": asdict(self.late_slope())},
            "descriptors": [self.samples[0].descriptors, self.samples[-1].descriptors],
            "warm_up": [asdict(sample) for sample in self.warm_up],
            "samples": [asdict(sample) for sample in self.samples],
        }


@dataclass(frozen=True, slots=True)
class Tracks:
    """cpu_share: of one core, all processes together."""

    plan: Plan
    tracks: tuple[Track, ...]
    rounds: int
    visits: int
    cpu_share: float

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": asdict(self.plan), "rounds": self.rounds, "visits": self.visits, "cpu_share": self.cpu_share,
            "processes": [track.to_json() for track in self.tracks],
        }  # fmt: skip


def measure(plan: Plan, conductor: Conductor) -> Tracks:
    """Watch for `plan.minutes`.

    Raises:
        BenchError: a process failed, or it was too short to fit a line.
    """
    with tempfile.TemporaryDirectory(prefix="pyccl-bench-") as directory:
        return _measure(plan, conductor, Path(directory) / "journal")


def _measure(plan: Plan, conductor: Conductor, journal: Path) -> Tracks:
    conductor.start_master(PEER_TIMEOUT_S, journal)
    conductor.start_all([PASSERS], "passers", lambda _: {"passers": plan.passers})
    conductor.wait("done", [PASSERS])
    founders = [f"founder {number}" for number in range(plan.peers)]
    conductor.start_all(founders, "memory", lambda number: _settings(plan, number))
    conductor.wait("joined", founders)
    conductor.start_all([COMER], "memory", lambda number: _settings(plan, plan.peers))
    everybody = [MASTER, *founders, COMER]
    start_s, cpu_s = time.monotonic(), _cpu_s(conductor, everybody)
    samples: dict[str, list[Sample]] = {name: [] for name in everybody}
    at_s = 0.0
    while at_s < plan.minutes * 60:
        conductor.wait("tick", founders[:1])
        at_s = time.monotonic() - start_s
        for name in everybody:
            samples[name].append(Sample.of(conductor.pid(name), at_s))
    cpu_share = (_cpu_s(conductor, everybody) - cpu_s) / at_s
    conductor.tell([COMER], "stop")
    visits = conductor.wait("done", [COMER])[COMER]["visits"]
    conductor.tell(founders[:1], "stop")
    told = conductor.wait("done", founders)
    if len({fields["digest"] for fields in told.values()}) != 1:
        raise BenchError(ExitStatus.WRONG_VALUES, "the members hold different states")
    tracks = tuple(_track(name, samples[name], plan.warm_up_minutes * 60) for name in everybody)
    try:
        for track in tracks:
            track.slope()
            track.late_slope()
    except (ValueError, IndexError):
        raise BenchError(ExitStatus.INTERNAL, f"too few samples for a line: {len(tracks[0].samples)}") from None
    return Tracks(plan, tracks, told[founders[0]]["rounds"], visits, cpu_share)


def _settings(plan: Plan, number: int) -> dict[str, object]:
    return {
        "founders": plan.peers, "number": number, "state_bytes": plan.state_bytes, "round_s": plan.round_s,
        "stay_rounds": plan.stay_rounds, "away_s": plan.away_s, "sample_s": plan.sample_s,
    }  # fmt: skip


def _track(name: str, samples: Sequence[Sample], warm_up_s: float) -> Track:
    return Track(
        name,
        tuple(sample for sample in samples if sample.at_s >= warm_up_s),
        tuple(sample for sample in samples if sample.at_s < warm_up_s),
    )


def _cpu_s(conductor: Conductor, names: Sequence[str]) -> float:
    """User and system time of these processes so far."""
    ticks = 0
    for name in names:
        fields = Path(f"/proc/{conductor.pid(name)}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
