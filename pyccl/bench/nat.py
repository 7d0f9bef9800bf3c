"""``pyccl bench nat``: two peers behind routers of two kinds, for each pair of kinds: how they get connected, how fast.

The master is on a host with a public address and relays. Each pair has a lab and processes of its own. Runs are secure,
as those of users are, unless plain ones are asked for.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from pyccl.bench.conductor import MASTER, BenchError, Conductor, ExitStatus
from pyccl.bench.places import InLab
from pyccl.netlab import Lab, NetworkError, Scenario, parse
from pyccl.netlab.scenario import Nat
from pyccl.processes.children import Children

DIRECT, MAPPED, PUNCHED, RELAYED = "direct", "mapped", "punched", "relayed"
PEER_TIMEOUT_S: Final = 10.0
PEERS: Final = ("peer 1", "peer 2")  # ranks of their hosts
PAIRS: Final = tuple(itertools.combinations_with_replacement(Nat, 2))
_KEPT_GOING: Final = (ExitStatus.CHILD_FAILED, ExitStatus.STALLED)


def expected(a: Nat, b: Nat) -> tuple[str, ...]:
    """How peers behind these may be connected, the likeliest first.

    Which one it is of several depends on who comes first, since all are tried at once. A port that a router maps may be
    the one that the master saw as well: who dials that is connected directly.
    """
    kinds = {a, b}
    mapped = (MAPPED, DIRECT) if Nat.UPNP in kinds else ()
    if Nat.OPEN in kinds:
        return (DIRECT, *mapped[:1])
    if Nat.FULL_CONE in kinds:
        return (DIRECT, *mapped[:1], PUNCHED)
    if Nat.SYMMETRIC in kinds:
        return mapped or (RELAYED,)
    return (*mapped, PUNCHED)


@dataclass(frozen=True, slots=True)
class Plan:
    """delay: one way, between any two lines. repeat: of each pair. secure: encrypted, with an invite."""

    pairs: tuple[tuple[Nat, Nat], ...] = PAIRS
    delay: str = "10ms"
    size_bytes: int = 1 << 20
    repeat: int = 1
    secure: bool = True


@dataclass(frozen=True, slots=True)
class Run:
    """One meeting of two peers.

    first, path: how they were connected at first and in the end; "none": not at all. connect_s: from the first one's
    start until both have all connections; reduce_s: of the first all-reduce, the slower peer's. wrong: values of two
    all-reduces. error: why there is no more.
    """

    first: str = "none"
    path: str = "none"
    connect_s: float = 0.0
    reduce_s: float = 0.0
    wrong: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Cell:
    """What came of a pair of kinds."""

    a: Nat
    b: Nat
    runs: tuple[Run, ...]

    @property
    def is_as_expected(self) -> bool:
        return all(run.path in expected(self.a, self.b) and run.wrong == 0 for run in self.runs)

    @property
    def paths(self) -> tuple[str, ...]:
        """In the end, each once."""
        return tuple(dict.fromkeys(run.path for run in self.runs))

    @property
    def connect_s(self) -> float | None:
        """Median. None: they were never connected."""
        times = [run.connect_s for run in self.runs if not run.error]
        return statistics.median(times) if times else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"expected": expected(self.a, self.b), "is_as_expected": self.is_as_expected}


@dataclass(frozen=True, slots=True)
class Result:
    plan: Plan
    cells: tuple[Cell, ...]

    def to_json(self) -> dict[str, Any]:
        return {"plan": asdict(self.plan), "cells": [cell.to_json() for cell in self.cells]}


def scenario(kinds: Iterable[Nat], delay: str) -> Scenario:
    """A host with a public address, then one for each of these."""
    hosts = "".join(f"[[host]]\nname = 'peer{i}'\nnat = '{kind}'\n" for i, kind in enumerate(kinds))
    return parse(f"[[host]]\nname = 'master'\n{hosts}[[router]]\nname = 'internet'\ndelay = '{delay}'\n", "nat")


def measure(plan: Plan, told: Callable[[Cell], None]) -> Result:
    """Meet them all, one pair after the other; `told` hears of each.

    Raises:
        BenchError: no lab can be had here, or a peer was given bad arguments.
    """
    cells = []
    for a, b in plan.pairs:
        cells.append(Cell(a, b, tuple(_run(plan, a, b) for _ in range(plan.repeat))))
        told(cells[-1])
    return Result(plan, tuple(cells))


def _run(plan: Plan, a: Nat, b: Nat) -> Run:
    try:
        with Lab(scenario((a, b), plan.delay)) as lab, Children() as children:
            return meet(Conductor(children, InLab(lab, _host_of)), plan, expected(a, b))
    except NetworkError as error:
        raise BenchError(ExitStatus.NO_LAB, str(error)) from error
    except BenchError as error:
        if error.status not in _KEPT_GOING:
            raise
        return Run(error=str(error))


def meet(conductor: Conductor, plan: Plan, paths: Sequence[str]) -> Run:
    """Two peers, and a master that relays. paths: what they wait for. BenchError: one of them failed."""
    told = {"size_bytes": plan.size_bytes, "secure": plan.secure, "paths": list(paths)}
    with tempfile.TemporaryDirectory(prefix="pyccl-bench-") as directory:
        identity = Path(directory, "identity.pem") if plan.secure else None
        conductor.start_master(PEER_TIMEOUT_S, identity=identity, relay=True)
        conductor.start_all(PEERS, "nat", lambda number: {"number": number, **told})
        found = conductor.wait("done", PEERS).values()
    first, path = ({fields[name] for fields in found} for name in ("first", "path"))
    return Run(
        first=" / ".join(sorted(first)),
        path=" / ".join(sorted(path)),
        connect_s=max(fields["connect_s"] for fields in found),
        reduce_s=max(fields["reduce_s"] for fields in found),
        wrong=sum(fields["wrong"] for fields in found),
    )


def _host_of(name: str) -> int:
    return 0 if name == MASTER else int(name.rpartition(" ")[2])
