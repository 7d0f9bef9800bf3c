"""``pyccl bench all-reduce``: the time of an all-reduce, alternating with torch's Gloo where asked.

The time of an iteration is that of the slowest rank: from the first rank's start, at a moment that all agreed on, to
the last rank's return. Bytes on the wire are the kernel's counts on the sockets of each system (what pyccl's ranks send
to agree and to meet is among its own).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from pyccl.bench.conductor import BenchError, Conductor, ExitStatus
from pyccl.bench.figures import GIB, NS, Summary, bus_gb_per_s, cpu_s_per_gib, slowest_s, summarize

TIMEOUT_S: Final = 60.0  # of one operation
SILENCE_BEYOND_S: Final = 30.0  # of all ranks: each says something between operations
PEER_TIMEOUT_S: Final = 30.0  # a machine that measures may be busy; nobody is to be evicted for that


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    size_bytes: of each rank's tensor. warmup: rounds before those that count. ahead_ns: how far ahead the moment is
    that all ranks agree on to start at. secure: the run is, and its connections are sealed. relay: the master does.
    optimize: ahead of all, by optimize_topology. max_upload, max_download: caps of each rank, pyccl only. timeout_s: of
    one operation; 0: the usual one.
    """

    world: int = 2
    size_bytes: int = 64 << 20
    iterations: int = 10
    warmup: int = 2
    dtype: str = "float32"
    op: str = "sum"
    quantize: str | None = None
    connections: int | str = "auto"
    algorithm: str = "auto"
    in_place: bool = True
    gloo: bool = False
    ahead_ns: int = 1_000_000
    secure: bool = False
    relay: bool = False
    optimize: bool = False
    max_upload: str | None = None
    max_download: str | None = None
    timeout_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SystemResult:
    """Figures of one system; raw times: seconds of each iteration, and [rank][iteration] of each rank."""

    name: str
    seconds: Summary
    wire_tx_bytes: float  # per rank and iteration, mean over the ranks
    wire_tx_bytes_max: float  # of the rank that sent most
    bus_gb_per_s: float  # at the median
    cpu_s_per_gib: float
    raw_seconds: tuple[float, ...]
    rank_seconds: tuple[tuple[float, ...], ...]
    details: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds.to_json(),
            "wire_tx_bytes_per_rank": self.wire_tx_bytes,
            "wire_tx_bytes_max": self.wire_tx_bytes_max,
            "bus_gb_per_s": self.bus_gb_per_s,
            "cpu_s_per_gib": self.cpu_s_per_gib,
            "raw_seconds": list(self.raw_seconds),
            "rank_median_seconds": [summarize(times).median for times in self.rank_seconds],
            "rank_raw_seconds": [list(times) for times in self.rank_seconds],
            **self.details,
        }


@dataclass(frozen=True, slots=True)
class Result:
    plan: Plan
    systems: tuple[SystemResult, ...]

    @property
    def algorithm(self) -> str:
        """That ran, and in brackets that was asked for if it is another."""
        ran = str(self.systems[0].details["algorithm"])
        return ran if ran == self.plan.algorithm else f"{ran} ({self.plan.algorithm})"

    @property
    def ratio(self) -> float | None:
        """Median of pyccl over median of Gloo."""
        if len(self.systems) < 2:
            return None
        return self.systems[0].seconds.median / self.systems[1].seconds.median

    @property
    def cpu_ratio(self) -> float | None:
        """CPU seconds of pyccl over those of Gloo."""
        if len(self.systems) < 2 or self.systems[1].cpu_s_per_gib == 0:
            return None
        return self.systems[0].cpu_s_per_gib / self.systems[1].cpu_s_per_gib

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": asdict(self.plan),
            "systems": {system.name: system.to_json() for system in self.systems},
            "ratio_of_medians": self.ratio,
            "ratio_of_cpu": self.cpu_ratio,
        }


def measure(plan: Plan, conductor: Conductor) -> Result:
    """Start a master and the ranks, and make figures of what they report.

    Raises:
        BenchError: a process failed, a result was wrong, or Gloo did not use TCP alone.
    """
    itemsize = 8  # every dtype divides it
    plan = replace(
        plan, size_bytes=max(plan.size_bytes // itemsize, 1) * itemsize, timeout_s=plan.timeout_s or TIMEOUT_S
    )
    conductor.silence_s = plan.timeout_s * (2 if plan.optimize else 1) + SILENCE_BEYOND_S
    with tempfile.TemporaryDirectory(prefix="pyccl-bench-") as directory:
        identity = Path(directory, "identity.pem") if plan.secure else None
        conductor.start_master(PEER_TIMEOUT_S, identity=identity, relay=plan.relay)
        return _measure(plan, conductor)


def _measure(plan: Plan, conductor: Conductor) -> Result:
    names = [f"rank {number}" for number in range(plan.world)]
    places = conductor.places
    conductor.start_all(
        names, "all-reduce",
        lambda number: asdict(plan) | {"address": places.address(names[number]), "interface": places.interface},
    )  # fmt: skip
    reports = conductor.wait("result", names)
    ranks = [report["systems"] for report in sorted(reports.values(), key=lambda report: report["rank"])]
    for system in ranks[0]:
        _judge(system, [rank[system] for rank in ranks])
    return Result(plan, tuple(_result(plan, system, [rank[system] for rank in ranks]) for system in ranks[0]))


def _judge(system: str, ranks: list[dict[str, Any]]) -> None:
    """Refuse figures of a run that did the wrong thing."""
    deviation = max(rank["deviation"] for rank in ranks)
    if deviation > 1:
        raise BenchError(ExitStatus.WRONG_VALUES, f"{system}: a result is wrong by {deviation:.3g} x what is allowed")
    if system == "pyccl" and len({rank["result_digest"] for rank in ranks}) > 1:
        raise BenchError(ExitStatus.WRONG_VALUES, "pyccl: the ranks hold different bits")
    for transport in (rank["transport"] for rank in ranks if "transport" in rank):
        if transport["unix_sockets"] or transport["shared_memory"] or not transport["carried_by_tcp"]:
            raise BenchError(ExitStatus.CHILD_FAILED, f"{system} did not move its data over TCP alone: {transport}")


def _result(plan: Plan, system: str, ranks: list[dict[str, Any]]) -> SystemResult:
    starts = [rank["starts_ns"] for rank in ranks]
    ends = [rank["ends_ns"] for rank in ranks]
    seconds = slowest_s(starts, ends)
    cpu = [[u + s for u, s in zip(rank["user_s"], rank["system_s"], strict=True)] for rank in ranks]
    sent = [rank["wire_tx_bytes"] for rank in ranks]
    per_gib = plan.size_bytes * plan.iterations / GIB
    details: dict[str, Any] = {
        "cpu_user_s_per_gib": sum(sum(rank["user_s"]) for rank in ranks) / per_gib,
        "cpu_system_s_per_gib": sum(sum(rank["system_s"]) for rank in ranks) / per_gib,
        "wire_rx_bytes_per_rank": sum(rank["wire_rx_bytes"] for rank in ranks) / len(ranks),
        "tcp_sockets_per_rank": [rank["tcp_sockets"] for rank in ranks],
        "deviation": max(rank["deviation"] for rank in ranks),
    }
    if "transport" in ranks[0]:
        details["transport"] = [rank["transport"] for rank in ranks]
    if "payload_tx_bytes" in ranks[0]:
        details["payload_tx_bytes_per_rank"] = [summarize(rank["payload_tx_bytes"]).median for rank in ranks]
        details["attempts_max"] = max(rank["attempts_max"] for rank in ranks)
        details["algorithm"] = ranks[0]["algorithm"]
    median = summarize(seconds)
    return SystemResult(
        name=system,
        seconds=median,
        wire_tx_bytes=sum(sent) / len(sent),
        wire_tx_bytes_max=max(sent),
        bus_gb_per_s=bus_gb_per_s(plan.world, plan.size_bytes, median.median),
        cpu_s_per_gib=cpu_s_per_gib(cpu, plan.size_bytes),
        raw_seconds=tuple(seconds),
        rank_seconds=tuple(
            tuple((end - start) / NS for start, end in zip(*pair, strict=True))
            for pair in zip(starts, ends, strict=True)
        ),
        details=details,
    )
