"""docs/nat.md: the template beside this file with the tables of a run of ``pyccl bench nat``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from typing import Final

from pyccl.bench.machine import Machine
from pyccl.bench.nat import Cell, Plan, Result, expected
from pyccl.netlab.scenario import Nat

TEMPLATE: Final = "nat.template.md"


def page(result: Result, machine: Machine) -> str:
    """The whole file."""
    kinds = [kind for kind in Nat if any(kind in (cell.a, cell.b) for cell in result.cells)]
    cells = {frozenset((cell.a, cell.b)): cell for cell in result.cells}
    repeat = result.plan.repeat
    words = {
        "machine": str(machine),
        "command": _command(result.plan),
        "runs": "secure, with all connections encrypted" if result.plan.secure else "plain (`--insecure`)",
        "delay": result.plan.delay,
        "repeat": "measured once" if repeat == 1 else f"median of {repeat}",
        "table cells": _table(kinds, lambda a, b: _measured(cells[frozenset((a, b))])),
        "table expected": _table(tuple(Nat), lambda a, b: " or ".join(expected(a, b))),
    }
    text = resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    for name, value in words.items():
        text = text.replace(f"{{{{{name}}}}}", value)
    return text


def _command(plan: Plan) -> str:
    """But for what has no place in the page: a part of the kinds."""
    default = Plan()
    words = ["pyccl bench nat"]
    words += [] if plan.delay == default.delay else [f"--delay {plan.delay}"]
    words += [] if plan.repeat == default.repeat else [f"--repeat {plan.repeat}"]
    words += [] if plan.secure else ["--insecure"]
    return " ".join([*words, "--write docs/nat.md"])


def _measured(cell: Cell) -> str:
    paths = ", ".join(cell.paths)
    if not cell.is_as_expected:
        paths = f"**{paths}**"
    return paths if cell.connect_s is None else f"{paths} {cell.connect_s:.2f} s"


def _table(kinds: Sequence[Nat], text: Callable[[Nat, Nat], str]) -> str:
    """Of unordered pairs: the lower left half."""
    rows = [["", *kinds], ["---"] * (1 + len(kinds))]
    for number, a in enumerate(kinds):
        cells = [text(b, a) if place <= number else "" for place, b in enumerate(kinds)]
        rows.append([a, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
