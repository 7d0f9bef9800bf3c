"""``pyccl bench topology``: what optimize_topology makes of an all-reduce over a lab's lines, and what it predicted.

The same group reduces with equal shares and round an equal ring, in turn, and after optimize_topology by its plan.
Beside them stand the time that the plan predicts and the bound: what the lines' true rates and delays allow, without a
codec.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from pyccl._proto import topology as planner
from pyccl.bench import lines
from pyccl.bench.all_reduce import PEER_TIMEOUT_S, SILENCE_BEYOND_S
from pyccl.bench.conductor import BenchError, Conductor, ExitStatus
from pyccl.bench.figures import Summary, slowest_s, summarize
from pyccl.bench.places import InLab
from pyccl.bench.topology_peer import EQUAL_RING, OPTIMIZE_TIMEOUT_S, PLANNED
from pyccl.bench.wan import host_of
from pyccl.netlab import Lab, NetworkError, Scenario
from pyccl.processes.children import Children


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure. size_bytes: of each peer's float32 tensor; warmup: rounds before those that count, each time;
    coded: as uint8, of which there is no bound. timeout_s: of one operation; 0: what the lines make of it."""

    size_bytes: int = 8 << 20
    iterations: int = 5
    warmup: int = 2
    coded: bool = False
    timeout_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Result:
    """predicted_s: for the plan, or for what was there before where nothing found would better it; None: nothing was
    measured, or nothing is known of that algorithm with codes. bound_s: 0.0: no line bounds anything."""

    scenario: Scenario
    plan: Plan
    seconds: dict[str, Summary]
    algorithms: dict[str, str]
    measured_s: float  # that optimize_topology took
    predicted_s: float | None
    bound_s: float
    plans: list[dict[str, Any]]  # what the master logged of them

    @property
    def to_bound(self) -> float | None:
        return self.seconds[PLANNED].median / self.bound_s if self.bound_s > 0 and not self.plan.coded else None

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
        BenchError: no lab can be had here, no host is there that all can dial, or a process failed.
    """
    world, timeout_s = len(scenario.hosts), plan.timeout_s or lines.timeout_s(scenario, plan.size_bytes)
    plan = replace(plan, timeout_s=timeout_s)
    where = partial(host_of, lines.master_rank(scenario))
    names = [f"peer {number}" for number in range(world)]
    try:
        with Lab(scenario) as lab:
            conductor = Conductor(children, InLab(lab, where))
            conductor.silence_s = OPTIMIZE_TIMEOUT_S + timeout_s + SILENCE_BEYOND_S
            conductor.start_master(PEER_TIMEOUT_S, relay=lines.need_relay(scenario))
            settings = asdict(plan) | {"world": world, "ahead_ns": lines.ahead_ns(scenario)}
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
    predicted_s = _predicted_s(plan, algorithms[PLANNED], reports[0]["plans"], reports[0]["epoch"])
    bound_s = lines.bound_s(scenario, plan.size_bytes)
    return Result(scenario, plan, seconds, algorithms, measured_s, predicted_s, bound_s, reports[0]["plans"])


def _predicted_s(plan: Plan, algorithm: str, plans: list[dict[str, Any]], epoch: int) -> float | None:
    """plans: in the order in which they were found. What was found when this epoch had begun is not in force."""
    found = [each for each in plans if each["epoch"] < epoch]
    if not found or (plan.coded and algorithm != "direct"):
        return None
    kind = "coded" if plan.coded else algorithm
    line = found[-1][kind if found[-1]["adopt"] else f"present_{kind}"]
    return planner.Line(*line).seconds(plan.size_bytes)
