"""What is made of raw times: pure functions, no clock, no process."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

NS: Final = 1_000_000_000
MIB: Final = 1 << 20
GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Summary:
    """Median and spread of some values, in their unit."""

    median: float
    min: float
    max: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def summarize(values: Sequence[float]) -> Summary:
    """Median, least and greatest of at least one value."""
    return Summary(statistics.median(values), min(values), max(values))


def slowest_s(starts_ns: Sequence[Sequence[int]], ends_ns: Sequence[Sequence[int]]) -> list[float]:
    """Seconds of each iteration, from the first rank's start to the last rank's return.

    Args:
        starts_ns, ends_ns: [rank][iteration], on one clock.
    """
    return [
        (max(ends) - min(starts)) / NS
        for starts, ends in zip(zip(*starts_ns, strict=True), zip(*ends_ns, strict=True), strict=True)
    ]


def ring_bytes(world: int, size_bytes: int) -> float:
    """Bytes that each rank must send in an all-reduce where all do the same: 2(N-1)/N of the tensor."""
    return 2 * (world - 1) / world * size_bytes


def bus_gb_per_s(world: int, size_bytes: int, seconds: float) -> float:
    """Bus bandwidth in 1e9 bytes a second: what each rank must send over the time; comparable between world sizes."""
    return ring_bytes(world, size_bytes) / seconds / 1e9


def cpu_s_per_gib(cpu_s: Sequence[Sequence[float]], size_bytes: int) -> float:
    """CPU seconds that all ranks together spend for one GiB of tensor.

    Args:
        cpu_s: [rank][iteration], user plus system time of the whole process.
        size_bytes: of one rank's tensor.
    """
    iterations = len(cpu_s[0])
    return sum(map(sum, cpu_s)) / (size_bytes * iterations / GIB)


def longest_gap_ns(times_ns: Sequence[int], start_ns: int, end_ns: int) -> int | None:
    """Longest pause between neighbours in `times_ns` (ascending) that overlaps start_ns..end_ns; None: none does."""
    gaps = (after - before for before, after in itertools.pairwise(times_ns) if after > start_ns and before < end_ns)
    return max(gaps, default=None)


def gaps_within_ns(times_ns: Sequence[int], start_ns: int, end_ns: int) -> list[int]:
    """Pauses between neighbours in `times_ns` (ascending) that lie inside start_ns..end_ns."""
    inside = [time for time in times_ns if start_ns <= time <= end_ns]
    return [after - before for before, after in itertools.pairwise(inside)]
