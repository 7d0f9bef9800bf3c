"""``pyccl bench scale``: what an all-reduce of a small tensor costs as the group grows, on loopback.

For each number of members a master and so many processes, which reduce one tensor after the other without a pause. Told
apart by socket: what goes to other members (the tensor's bytes are `payload`, the rest is frames' heads, completion and
heartbeats) and what goes to the master, which no operation needs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

from pyccl.bench.conductor import MASTER, BenchError, Conductor, ExitStatus
from pyccl.bench.crowd import cpu_s
from pyccl.bench.figures import NS, Summary, summarize
from pyccl.bench.memory import Sample

PEER_TIMEOUT_S: Final = 120.0  # a machine with two cores and many members is busy; nobody is to be evicted for that


@dataclass(frozen=True, slots=True)
class Plan:
    """size_bytes: of each member's float32 tensor; warmup: operations before those that count."""

    worlds: tuple[int, ...] = (2, 4, 8, 16, 32)
    size_bytes: int = 4096
    operations: int = 200
    warmup: int = 20


@dataclass(frozen=True, slots=True)
class Scaled:
    """One size of group. Bytes and CPU: for each operation; of each member where not told otherwise.

    seconds: from the last member's return to the last one's of the next operation. cpu_s: of all members together.
    data_bytes: to other members, without the tensor's payload. master_cpu_s, control_bytes: of and to the master while
    the operations ran. memory_bytes: anonymous, when they have run; start_bytes: before the member connected.
    """

    world: int
    algorithm: str
    seconds: Summary
    cpu_s: float
    payload_bytes: float
    data_bytes: float
    control_bytes: float
    master_cpu_s: float
    connections: int
    memory_bytes: Summary
    start_bytes: Summary
    master_memory_bytes: int
    raw_seconds: tuple[float, ...]

    @property
    def cpu_s_per_pair(self) -> float:
        """For each operation and ordered pair of members: what stays the same if each message costs the same."""
        return self.cpu_s / (self.world * (self.world - 1))

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"cpu_s_per_pair": self.cpu_s_per_pair}


@dataclass(frozen=True, slots=True)
class Result:
    plan: Plan
    sizes: tuple[Scaled, ...]

    def to_json(self) -> dict[str, Any]:
        return {"settings": asdict(self.plan), "sizes": [size.to_json() for size in self.sizes]}


def measure(plan: Plan, conduct: Callable[[Callable[[Conductor], Scaled]], Scaled]) -> Result:
    """One size of group after the other, each with processes of its own.

    Args:
        conduct: calls its argument with a new conductor, and ends the processes.

    Raises:
        BenchError: a process failed, or members held different or wrong values.
    """
    return Result(plan, tuple(conduct(partial(_measure_one, plan, world)) for world in plan.worlds))


def _measure_one(plan: Plan, world: int, conductor: Conductor) -> Scaled:
    conductor.start_master(PEER_TIMEOUT_S)
    names = [f"rank {number}" for number in range(world)]
    told = {"world": world, "size_bytes": plan.size_bytes, "operations": plan.operations, "warmup": plan.warmup}
    for name in names:
        conductor.start(name, "scale", told)
    conductor.wait("ready", names)
    start = [Sample.of(conductor.pid(name), 0).anonymous_bytes for name in names]
    conductor.tell(names, "go")
    conductor.wait("warm", names)
    master_cpu_s = cpu_s(conductor.pid(MASTER))
    conductor.tell(names, "measure")
    reports = list(conductor.wait("measured", names).values())
    master_cpu_s = cpu_s(conductor.pid(MASTER)) - master_cpu_s
    memory = [Sample.of(conductor.pid(name), 0).anonymous_bytes for name in names]
    master_memory = Sample.of(conductor.pid(MASTER), 0).anonymous_bytes
    conductor.tell(names, "end")
    conductor.wait("done", names)
    if not all(report["right"] for report in reports):
        raise BenchError(ExitStatus.WRONG_VALUES, f"{world} members: a result is wrong")
    returns_ns = [max(times) for times in zip(*(report["returns_ns"] for report in reports), strict=True)]
    seconds = [(after - before) / NS for before, after in itertools.pairwise(returns_ns)]

    def mean(field: str) -> float:
        return float(sum(report[field] for report in reports)) / world / plan.operations

    return Scaled(
        world=world,
        algorithm=reports[0]["algorithm"],
        seconds=summarize(seconds),
        cpu_s=mean("cpu_s") * world,
        payload_bytes=mean("payload_tx_bytes"),
        data_bytes=mean("data_tx_bytes") - mean("payload_tx_bytes"),
        control_bytes=mean("control_tx_bytes"),
        master_cpu_s=master_cpu_s / plan.operations,
        connections=max(report["connections"] for report in reports),
        memory_bytes=summarize(memory),
        start_bytes=summarize(start),
        master_memory_bytes=master_memory,
        raw_seconds=tuple(seconds),
    )
