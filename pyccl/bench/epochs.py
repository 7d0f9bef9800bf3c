"""``pyccl bench epoch``: what a change of epoch costs a master with many peers; the peers are simulated by `crowd`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from pyccl.bench.conductor import MASTER, Conductor
from pyccl.bench.crowd import CHANGES
from pyccl.bench.figures import Summary, summarize

CROWD: Final = "crowd"
PEER_TIMEOUT_S: Final = 300.0  # the crowd sends no heartbeats


@dataclass(frozen=True, slots=True)
class Plan:
    peers: int = 1000
    iterations: int = 5


@dataclass(frozen=True, slots=True)
class Changes:
    """groups: their sizes. cpu_s, wall_s: name of the change -> [iteration], of all groups' changes together, or of the
    first one's alone."""

    plan: Plan
    groups: tuple[int, ...]
    cpu_s: dict[str, tuple[float, ...]]
    wall_s: dict[str, tuple[float, ...]]

    def summary(self, change: str, name: str) -> Summary:
        return summarize(getattr(self, name)[change])

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": asdict(self.plan),
            "groups": list(self.groups),
            **{
                change: {name: self.summary(change, name).to_json() for name in ("cpu_s", "wall_s")}
                for change in CHANGES
            },
            "raw": {"cpu_s": self.cpu_s, "wall_s": self.wall_s},
        }


def measure(plan: Plan, conductor: Conductor) -> Changes:
    """Raises:
    BenchError: a process failed.
    """
    conductor.start_master(PEER_TIMEOUT_S)
    told = {"master_pid": conductor.pid(MASTER), "peers": plan.peers, "iterations": plan.iterations}
    conductor.start_all([CROWD], "crowd", lambda number: told)
    groups = conductor.wait("founded", [CROWD])[CROWD]["groups"]
    figures = conductor.wait("done", [CROWD])[CROWD]["figures"]
    return Changes(
        plan,
        tuple(groups),
        *({change: tuple(row[column] for row in figures[change]) for change in CHANGES} for column in (0, 1)),
    )
