"""``pyccl bench topology``: what optimize_topology makes of an all-reduce over a lab's lines, and what it predicted.

The same group reduces with equal shares, round an equal ring and, after optimize_topology, by its plan. Beside them
stand the time that the plan predicts and the bound: the planner's, told the lines' true rates and delays.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from pyccl._proto import topology as planner
from pyccl.bench.all_reduce import PEER_TIMEOUT_S
from pyccl.bench.conductor import MASTER, BenchError, Conductor, ExitStatus
from pyccl.bench.figures import Summary, slowest_s, summarize
from pyccl.bench.places import InLab
from pyccl.bench.topology_peer import EQUAL_RING, PLANNED
from pyccl.bench.wan import AHEAD_NS, AHEAD_ROUND_TRIPS
from pyccl.netlab import Lab, NetworkError, Scenario
from pyccl.processes.children import Children

EFFORT: Final = 10_000_000


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure. size_bytes: of each peer's float32 tensor; warmup: rounds before those that count, each time;
    coded: as uint8, which the bound knows nothing of."""

    size_bytes: int = 8 << 20
    iterations: int = 5
    warmup: int = 2
    coded: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """predicted_s: for the plan, or for what was there before where nothing found would better it; None: nothing was
    measured."""

    scenario: Scenario
    plan: Plan
    seconds: dict[str, Summary]
    algorithms: dict[str, str]
    measured_s: float  # that optimize_topology took
    predicted_s: float | None
    bound_s: float
    plans: list[dict[str, Any]]  # what the master logged of them

    @property
    def to_bound(self) -> float:
        return self.seconds[PLANNED].median / self.bound_s

    @property
    def predicted_to_planned(self) -> float | None:
        return None if self.predicted_s is None else self.predicted_s / self.seconds[PLANNED].median

    @property
    def ring_to_planned(self) -> float:
        return self.seconds[EQUAL_RING].median / self.seconds[PLANNED].median

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": asdict(self.plan) | {"scenario": self.scenario.name, "world": len(self.scenario.hosts)},
            "systems": {
                name: {"seconds": seconds.to_json(), "algorithm": self.algorithms[name]}
                for name, seconds in self.seconds.items()
            },
            "optimize_s": self.measured_s,
            "plans": self.plans,
            "predicted_s": self.predicted_s,
            "bound_s": self.bound_s,
            "predicted_to_planned": self.predicted_to_planned,
            "planned_to_bound": self.to_bound,
            "equal_ring_to_planned": self.ring_to_planned,
        }


def measure(scenario: Scenario, plan: Plan, children: Children) -> Result:
    """Build the lab, measure in it, take it away.

    Raises:
        BenchError: no lab can be had here, or a process failed.
    """
    world = len(scenario.hosts)
    ahead_ns = AHEAD_NS + AHEAD_ROUND_TRIPS * scenario.rtt_ns
    names = [f"peer {number}" for number in range(world)]
    try:
        with Lab(scenario) as lab:
            conductor = Conductor(children, InLab(lab, lambda name: 0 if name == MASTER else int(name.split()[1])))
            conductor.start_master(PEER_TIMEOUT_S)
            settings = asdict(plan) | {"world": world, "ahead_ns": ahead_ns}
            conductor.start_all(names, "topology", lambda number: settings)
            reports = list(conductor.wait("result", names).values())
    except NetworkError as error:
        raise BenchError(ExitStatus.NO_LAB, str(error)) from error
    systems = list(reports[0]["systems"])
    seconds = {
        name: summarize(
            slowest_s(*([report["systems"][name][at] for report in reports] for at in ("starts_ns", "ends_ns")))
        )
        for name in systems
    }
    algorithms = {name: reports[0]["systems"][name]["algorithm"] for name in systems}
    measured_s = max(report["measured_s"] for report in reports)
    predicted_s = None
    for found in reports[0]["plans"]:
        kind = "coded" if plan.coded and algorithms[PLANNED] == "direct" else algorithms[PLANNED]
        line = found[("" if found["adopt"] else "present_") + kind]
        predicted_s = planner.Line(*line).seconds(plan.size_bytes)
    best = planner.choose(network_of(scenario), EFFORT)
    bound_s = min(best.direct.least_s(plan.size_bytes), best.ring.least_s(plan.size_bytes))
    return Result(scenario, plan, seconds, algorithms, measured_s, predicted_s, bound_s, reports[0]["plans"])


def network_of(scenario: Scenario) -> planner.Network:
    """The lines as the planner would like to know them. What several pairs share counts whole for each."""
    ranks = range(len(scenario.hosts))
    return planner.Network(
        up=tuple(_bytes_s(host.up.rate) for host in scenario.hosts),
        down=tuple(_bytes_s(host.down.rate) for host in scenario.hosts),
        rate=tuple(tuple(_bytes_s(scenario.rate(i, j)) if i != j else planner.UNKNOWN for j in ranks) for i in ranks),
        delay=tuple(tuple(scenario.delay_ns(i, j) / 1e9 if i != j else 0.0 for j in ranks) for i in ranks),
        cpu=(planner.Cpu(),) * len(ranks),
    )


def _bytes_s(rate: int | None) -> float:
    return planner.UNKNOWN if rate is None else rate / 8
