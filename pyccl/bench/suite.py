"""``pyccl bench all``: runs the other benchmarks as a user does and keeps what they tell, one JSON object each.

A part is a table of docs/performance.md. What cannot run here (no root, no torch, a process that failed) is kept with
its reason, and the rest goes on. Parts that were not asked for stay as an earlier run left them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pyccl.bench.conductor import BenchError, ExitStatus
from pyccl.processes.children import Children, Exited

RUN_S: Final = 600.0  # bound of one run; each has shorter bounds of its own
NOT_HERE: Final = (ExitStatus.NO_TORCH, ExitStatus.NO_LAB)  # no fault of the library

Told = dict[str, Any]  # "command", and what it printed as "told", or "failed" and "status"
Report = dict[str, list[Told]]  # by part


@dataclass(frozen=True, slots=True)
class Run:
    """`arguments` of ``pyccl bench``; gloo: beside Gloo where torch is installed."""

    arguments: str
    gloo: bool = False

    def command(self, with_gloo: bool) -> list[str]:
        return [*self.arguments.split(), *(["--vs", "gloo"] if self.gloo and with_gloo else [])]


@dataclass(frozen=True, slots=True)
class Part:
    full: tuple[Run, ...]
    quick: tuple[Run, ...]


_PACIFIC: Final = "wan --scenario pacific"
_TINY: Final = "wan --scenario lan --world 2 --rate 100mbit --delay 1ms --mib 0.1 --iters 1 --warmup 0"
PARTS: Final[Mapping[str, Part]] = {
    "loopback": Part(
        (
            Run("all-reduce --world 2 --mib 256 --iters 15", gloo=True),
            Run("all-reduce --world 4 --mib 64 --iters 15", gloo=True),
            Run("all-reduce --world 2 --mib 1 --iters 300", gloo=True),
        ),
        (Run("all-reduce --world 2 --mib 0.1 --iters 2"),),
    ),
    "sizes": Part(
        tuple(Run(f"all-reduce --world 2 --mib {mib} --iters 20", gloo=True)
              for mib in (0.004, 0.0625, 0.25, 1, 4, 16, 64)),
        tuple(Run(f"all-reduce --world 2 --mib {mib} --iters 2") for mib in (0.004, 0.0625)),
    ),
    "scale": Part((Run("scale --iters 100"),), (Run("scale --world 2 --world 3 --iters 10"),)),
    "kernels": Part(
        (Run("kernels --dtype float32 --op sum"),), (Run("kernels --mib 0.1 --dtype float32 --op sum"),)
    ),
    "digest": Part((Run("digest"),), (Run("digest --mib 0.1"),)),
    "outer": Part((Run("outer"),), (Run("outer --mib 0.1"),)),
    "encryption": Part(
        (
            Run("encryption --mib 256 --iters 6 --rounds 2"), Run("encryption --mib 64 --iters 6 --rounds 2"),
            Run("encryption --scenario pacific --mib 64 --iters 5 --rounds 2"),
        ),
        (Run("encryption --mib 0.1 --iters 2 --rounds 1"),),
    ),
    "pacific": Part(
        (
            Run(f"{_PACIFIC} --mib 64 --iters 5", gloo=True),
            Run(f"{_PACIFIC} --mib 256 --iters 5"),
            Run(f"{_PACIFIC} --mib 1 --iters 10", gloo=True),
            Run(f"{_PACIFIC} --mib 64 --iters 5 --quantize uint8"),
            Run(f"{_PACIFIC} --mib 64 --iters 5 --quantize fp4_e3m0"),
        ),
        (Run(_TINY), Run(f"{_TINY} --quantize uint8")),
    ),
    "lines": Part(
        (
            Run("wan --scenario lan --mib 64 --iters 5"),
            Run("wan --scenario europe --mib 64 --iters 5"),
            Run("wan --scenario atlantic --mib 64 --iters 5"),
            Run("wan --scenario flowcap --mib 64 --iters 5 --warmup 3"),
            Run("wan --scenario flowcap --world 4 --mib 32 --iters 5 --warmup 3"),
            Run(f"{_PACIFIC} --world 4 --rate 200mbit --mib 64 --iters 5", gloo=True),
            Run(f"{_PACIFIC} --world 4 --rate 200mbit --mib 64 --iters 3 --max-upload 50mbit"),
        ),
        (Run(f"{_TINY} --seed 2"),),
    ),
    "algorithms": Part(
        (
            Run("wan --scenario home --mib 8 --iters 3 --algorithm direct"),
            Run("wan --scenario home --mib 8 --iters 3 --algorithm ring"),
            Run("wan --scenario home --mib 8 --iters 3 --optimize"),
            Run("wan --scenario neighbours --mib 8 --iters 3 --algorithm direct"),
            Run("wan --scenario neighbours --mib 8 --iters 3 --optimize"),
            Run(f"{_PACIFIC} --world 4 --rate 200mbit --mib 64 --iters 3 --algorithm ring"),
            Run(f"{_PACIFIC} --world 8 --rate 50mbit --mib 24 --iters 3 --algorithm direct"),
            Run(f"{_PACIFIC} --world 8 --rate 50mbit --mib 24 --iters 3 --algorithm ring"),
        ),
        (Run(f"{_TINY} --algorithm ring"),),
    ),
    "plans": Part(
        tuple(Run(f"topology --scenario {scenario} --mib {mib} --iters 5") for scenario, mib in (
            ("lan", 64), ("europe", 32), ("atlantic", 32), ("atlantic --world 3", 32), ("pacific", 32),
            ("pacific --world 4", 32), ("flowcap", 32), ("home", 8), ("home", 32), ("home --world 6", 8),
            ("newcomer", 16), ("neighbours", 8),
        )),
        (Run("topology --scenario lan --mib 0.1 --iters 1 --warmup 0"),),
    ),
    "connections": Part(
        tuple(Run(f"{_PACIFIC} --mib 64 --iters 3 --connections {number}")
              for number in (1, 2, 4, 8, 16, 32, 64, "auto")),
        tuple(Run(f"{_TINY} --connections {number}") for number in (1, 2, "auto")),
    ),
    "rtt": Part(
        tuple(Run(f"wan --scenario lan --world 2 --rate 400mbit --delay {ms}ms --mib 16 --iters 5")
              for ms in (0.5, 5, 15, 45, 75)),
        tuple(Run(_TINY.replace("1ms", f"{ms}ms")) for ms in (2, 3)),
    ),
    "changes": Part(
        (
            Run("join"), Run("sync"), Run("loss"), Run("restart"), Run("epoch --iters 3"),
            Run("sync --scenario newcomer --mib 256 --iters 3"),
        ),
        (Run("join --world 2 --iters 1"), Run("loss --mib 0.01 --iters 1 --cause killed")),
    ),
}  # fmt: skip


def run(
    part: Part, quick: bool, with_gloo: bool, children: Children, say: Callable[[str], None]
) -> list[Told]:
    """One benchmark after the other.

    Raises:
        BenchError: one of them hangs.
        Interrupted: a signal asked the program to end.
    """
    return [_one(one.command(with_gloo), children, say) for one in (part.quick if quick else part.full)]


def _one(arguments: list[str], children: Children, say: Callable[[str], None]) -> Told:
    child = " ".join(arguments)
    command = f"pyccl bench {child}"
    say(command)
    children.start(child, "pyccl.processes.leash", ["pyccl.cli.main", "bench", *arguments, "--json"])
    told: Told = {"command": command}
    while not isinstance(event := children.next_event(RUN_S), Exited):
        if event is None:
            raise BenchError(ExitStatus.STALLED, f"{command} has run for {RUN_S:.0f} s")
        told["told"] = json.loads(event.text)
    if event.returncode != 0:
        last = (children.stderr_tail(child) or ["it said nothing"])[-1]
        told |= {"failed": last.partition(": ")[2] or last, "status": event.returncode}
        say(f"  not measured: {told['failed']}")
    children.forget(child)
    return told


def status(report: Report) -> ExitStatus:
    """OK also where something can't run on this machine; else the first failure's."""
    failed = [one["status"] for told in report.values() for one in told if "failed" in one]
    worst = [number for number in failed if number not in NOT_HERE]
    if not worst:
        return ExitStatus.OK
    return ExitStatus(worst[0]) if worst[0] in set(ExitStatus) else ExitStatus.CHILD_FAILED
