"""``pyccl bench encryption``: an all-reduce in plain runs and in secure ones, in turn: both meet the same machine.

Each round starts a master and peers of its own, plain ones and then secure ones; times of all rounds count together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pyccl.bench import all_reduce
from pyccl.bench.figures import Summary, summarize


@dataclass(frozen=True, slots=True)
class Side:
    """Plain, or sealed: seconds of an iteration, bytes sent per rank and iteration, CPU seconds of all ranks for each
    GiB of one rank's tensor, the last two means over the rounds."""

    name: str
    seconds: Summary
    raw_seconds: tuple[float, ...]
    wire_tx_bytes: float
    cpu_s_per_gib: float

    def to_json(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds.to_json(),
            "raw_seconds": list(self.raw_seconds),
            "wire_tx_bytes_per_rank": self.wire_tx_bytes,
            "cpu_s_per_gib": self.cpu_s_per_gib,
        }


@dataclass(frozen=True, slots=True)
class Result:
    plan: all_reduce.Plan
    where: str
    rounds: int
    plain: Side
    sealed: Side

    @property
    def ratio(self) -> float:
        """Median sealed over median plain."""
        return self.sealed.seconds.median / self.plain.seconds.median

    def to_json(self) -> dict[str, Any]:
        return {
            "world": self.plan.world, "size_bytes": self.plan.size_bytes, "where": self.where, "rounds": self.rounds,
            "plain": self.plain.to_json(), "sealed": self.sealed.to_json(), "ratio_of_medians": self.ratio,
        }  # fmt: skip


def measure(
    plan: all_reduce.Plan, rounds: int, where: str, reduce: Callable[[all_reduce.Plan], all_reduce.Result]
) -> Result:
    """reduce: one measurement. BenchError as of `all_reduce.measure`."""
    found: dict[bool, list[all_reduce.Result]] = {False: [], True: []}
    for number in range(rounds):
        for secure in (False, True) if number % 2 == 0 else (True, False):
            found[secure].append(reduce(replace(plan, secure=secure)))
    return Result(found[False][0].plan, where, rounds, _side("plain", found[False]), _side("sealed", found[True]))


def _side(name: str, results: list[all_reduce.Result]) -> Side:
    systems = [result.systems[0] for result in results]
    raw = tuple(second for system in systems for second in system.raw_seconds)
    return Side(
        name, summarize(raw), raw,
        sum(system.wire_tx_bytes for system in systems) / len(systems),
        sum(system.cpu_s_per_gib for system in systems) / len(systems),
    )  # fmt: skip
