"""``pyccl bench wan``: the time of an all-reduce over the lines of a lab, alternating with torch's Gloo where asked.

What `all_reduce` measures, with a peer on each host and the master beside the first one that all can dial. The moment
at which all start is far enough ahead for the last of them to hear of it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from pyccl.bench import all_reduce, lines
from pyccl.bench.conductor import MASTER, BenchError, Conductor, ExitStatus
from pyccl.bench.figures import ring_bytes
from pyccl.bench.places import InLab
from pyccl.netlab import Counts, Lab, NetworkError, Scenario
from pyccl.processes.children import Children


@dataclass(frozen=True, slots=True)
class Rate:
    """Of one system at the median time.

    mbit_s: what each peer must send where all do the same, 2(N-1)/N of the tensor, over the time. line_share: what one
    did send of the slowest host's rate: the same for a tensor that is sent as it is, less with a codec. None: no host's
    line has a rate.
    """

    system: str
    mbit_s: float
    line_share: float | None


@dataclass(frozen=True, slots=True)
class Result:
    scenario: Scenario
    reduced: all_reduce.Result
    rates: tuple[Rate, ...]
    counts: Counts

    def to_json(self) -> dict[str, Any]:
        return self.reduced.to_json() | {
            "scenario": {"name": self.scenario.name, "description": self.scenario.description, **_told(self.scenario)},
            "rates": {rate.system: {"mbit_s": rate.mbit_s, "line_share": rate.line_share} for rate in self.rates},
            "lines": asdict(self.counts),
        }


def _told(scenario: Scenario) -> dict[str, Any]:
    return {
        "rtt_ms": scenario.rtt_ns / 1e6,
        "loss": scenario.loss(0, 1),
        "seed": scenario.seed,
        "hosts": [{"name": host.name, "up_bps": host.up.rate, "down_bps": host.down.rate} for host in scenario.hosts],
    }


def measure(scenario: Scenario, plan: all_reduce.Plan, children: Children) -> Result:
    """Build the lab, measure in it, take it away.

    Args:
        plan: its world is that of the scenario, its time-out what the lines make of it unless that is given.

    Raises:
        BenchError: no lab can be had here, no host is there that all can dial, or as `all_reduce.measure`.
    """
    master = lines.master_rank(scenario)
    if plan.gloo:
        lines.need_gloo(scenario)
    plan = replace(
        plan, world=len(scenario.hosts), ahead_ns=lines.ahead_ns(scenario),
        relay=lines.need_relay(scenario), timeout_s=plan.timeout_s or lines.timeout_s(scenario, plan.size_bytes),
    )  # fmt: skip
    try:
        with Lab(scenario) as lab:
            reduced = all_reduce.measure(plan, Conductor(children, InLab(lab, partial(host_of, master))))
            counts = lab.counts()
    except NetworkError as error:
        raise BenchError(ExitStatus.NO_LAB, str(error)) from error
    return Result(scenario, reduced, tuple(_rate(scenario, reduced.plan, system) for system in reduced.systems), counts)


def host_of(master: int, name: str) -> int:
    """master: rank of the host that it is on; a peer's name ends in its own."""
    return master if name == MASTER else int(name.rpartition(" ")[2])


def _rate(scenario: Scenario, plan: all_reduce.Plan, system: all_reduce.SystemResult) -> Rate:
    due_bytes = ring_bytes(plan.world, plan.size_bytes)
    seconds = system.seconds.median
    limits = [line.rate for host in scenario.hosts for line in (host.up, host.down) if line.rate is not None]
    sent_bytes = due_bytes
    if plan.quantize is not None and "payload_tx_bytes_per_rank" in system.details:
        payloads = system.details["payload_tx_bytes_per_rank"]
        sent_bytes = sum(payloads) / len(payloads)
    share = sent_bytes * 8 / seconds / min(limits) if limits else None
    return Rate(system.name, due_bytes * 8 / seconds / 1e6, share)
