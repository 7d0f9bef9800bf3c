"""docs/performance.md out of what ``pyccl bench all`` kept: the text of performance.template.md with tables and plots.

Every figure comes from the report, and every row names its command. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from pyccl.bench.churn import CAUSES
from pyccl.bench.figures import MIB
from pyccl.bench.show import seconds
from pyccl.bench.suite import PARTS, Report, Told
from pyccl.bench.topology_peer import EQUAL_DIRECT, EQUAL_RING, PLANNED

_PLACE: Final = re.compile(r"^\{\{(table|plot) ([a-z]+)\}\}$", re.MULTILINE)
_NOTHING: Final = "Nothing was measured yet: `pyccl bench all --only {}`."
Row = list[str]


def _command(told: Told) -> str:
    return f"`{told['command']}`"


def _time(summary: Mapping[str, float]) -> str:
    return f"{seconds(summary['median'])} ({seconds(summary['min'])} to {seconds(summary['max'])})"


def _all_reduce(run: dict[str, Any]) -> list[Row]:
    ours, theirs = run["systems"]["pyccl"], run["systems"].get("gloo")
    row = [_time(ours["seconds"]), f"{ours['bus_gb_per_s']:.2f}", f"{ours['cpu_s_per_gib']:.2f}"]
    if theirs is None:
        return [[*row, "", "", ""]]
    return [[*row, _time(theirs["seconds"]), f"{run['ratio_of_medians']:.2f}", f"{run['ratio_of_cpu']:.2f}"]]


def _wan(run: dict[str, Any]) -> list[Row]:
    rows = []
    for name, system in run["systems"].items():
        rate, lines = run["rates"][name], run["lines"]
        share = "" if rate["line_share"] is None else f"{rate['line_share']:.0%}"
        dropped = sum(pipe["dropped"] for pipe in lines["pipes"]) + sum(way["capped"] for way in lines["routes"])
        late = f"{dropped / max(lines['delivered'] + dropped, 1):.1%}, {lines['late'] / max(lines['delivered'], 1):.1%}"
        what = f"{name}, {system['algorithm']}" if "algorithm" in system else name
        rows.append([
            what, _time(system["seconds"]), f"{rate['mbit_s']:.0f}", share, f"{system['cpu_s_per_gib']:.1f}", late
        ])  # fmt: skip
    return rows


def _plans(run: dict[str, Any]) -> list[Row]:
    systems, predicted_s = run["systems"], run["predicted_s"]
    direct, ring, planned = (_time(systems[name]["seconds"]) for name in (EQUAL_DIRECT, EQUAL_RING, PLANNED))
    told = ["", ""] if predicted_s is None else [seconds(predicted_s), f"{run['predicted_to_planned']:.2f}"]
    to_bound = run["planned_to_bound"]
    bound = [seconds(run["bound_s"]), "-" if to_bound is None else f"{to_bound:.2f}"]
    return [[direct, ring, systems[PLANNED]["algorithm"], planned, *told, *bound, seconds(run["optimize_s"])]]


def _scale(run: dict[str, Any]) -> list[Row]:
    return [
        [
            str(size["world"]), _time(size["seconds"]), seconds(size["cpu_s"]), seconds(size["cpu_s_per_pair"]),
            f"{size['payload_bytes']:.0f}", f"{size['data_bytes']:.0f}", f"{size['control_bytes']:.1f}",
            seconds(size["master_cpu_s"]), f"{size['memory_bytes']['median'] / MIB:.1f}",
            f"{size['start_bytes']['median'] / MIB:.1f}", f"{size['master_memory_bytes'] / MIB:.1f}",
        ]
        for size in run["sizes"]
    ]  # fmt: skip


def _kernels(run: dict[str, Any]) -> list[Row]:
    rows = []
    errors = {error["codec"]: error for error in run["codec_errors"] if error["data"] == "normal"}
    for rate in run["rates"]:
        codec = rate["what"].partition(" ")[2]
        error = errors.get(codec)
        lost = "" if error is None else f"{error['rms']:.1e}"
        rows.append([
            f"{rate['what']} {rate['op']}".strip(), rate["kernel"], rate["place"],
            f"{rate['gib_per_s']['median']:.1f}", lost, "" if error is None else f"{error['bits']:.2f}",
        ])  # fmt: skip
    return rows


def _digest(run: dict[str, Any]) -> list[Row]:
    return [
        [f"{rate['what']} {rate['kernel']}".strip(), rate["place"], f"{rate['gib_per_s']['median']:.1f}"]
        for rate in run["rates"]
    ]


def _outer(run: dict[str, Any]) -> list[Row]:
    return [[rate["what"], f"{rate['gib_per_s']['median']:.1f}", f"{rate['of_copy']:.0%}"] for rate in run["rates"]]


def _encryption(run: dict[str, Any]) -> list[Row]:
    plain, sealed = run["plain"], run["sealed"]
    cpu = (f"{system['cpu_s_per_gib']:.2f}" for system in (plain, sealed))
    return [[_time(plain["seconds"]), _time(sealed["seconds"]), f"{run['ratio_of_medians']:.2f}", *cpu]]


def _changes(run: dict[str, Any]) -> list[Row]:
    kind = run["bench"]
    if kind == "join":
        return [["connected and in step", _time(run["total_s"])], ["longest stall of a member", _time(run["stall_s"])]]
    if kind == "sync":
        rate = run["sync_mb_per_s"]["median"]
        return [["state in step", _time(run["sync_s"])], ["its rate", f"{rate:.0f} MB/s, {rate * 8:.0f} Mbit/s"]]
    if kind == "loss":
        return [
            [f"{cause}: longest gap of a survivor", _time(run[cause]["gap_s"])] for cause in CAUSES if cause in run
        ]
    if kind == "restart":
        return [["longest gap without a master", _time(run["gap_s"])], ["back to next join", _time(run["join_s"])]]
    changes = {
        "loss": "each group loses a member", "join": "each gains one",
        "loss_alone": "one group loses a member", "join_alone": "one gains one",
    }  # fmt: skip
    return [[f"{what}, CPU of the master", _time(run[name]["cpu_s"])] for name, what in changes.items()]


_REDUCED: Final = ("pyccl: median (least to most)", "bus GB/s", "CPU s/GiB", "Gloo", "time, pyccl / Gloo", "CPU, ratio")
_OVER_LINES: Final = (
    "", "median (least to most)", "Mbit/s", "of the line", "CPU s/GiB", "dropped by queues, late",
)  # fmt: skip
TABLES: Final[Mapping[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], list[Row]]]]] = {
    "loopback": (_REDUCED, _all_reduce),
    "sizes": (_REDUCED, _all_reduce),
    "scale": (
        (
            "members", "an all-reduce", "CPU of all", "CPU for each ordered pair", "payload sent by each, B",
            "beside it, B", "to the master, B", "CPU of the master", "memory of each, MiB", "before it connected",
            "of the master",
        ),
        _scale,
    ),
    "kernels": (("", "instructions", "from", "GiB/s", "rms error / rms", "bits"), _kernels),
    "digest": (("", "from", "GiB/s"), _digest),
    "outer": (("", "GiB/s", "of a copy"), _outer),
    "encryption": (("plain", "sealed", "ratio", "CPU s/GiB, plain", "sealed"), _encryption),
    "pacific": (_OVER_LINES, _wan),
    "lines": (_OVER_LINES, _wan),
    "algorithms": (_OVER_LINES, _wan),
    "plans": (
        (
            "direct, equal shares", "equal ring", "plan", "by the plan", "predicted", "predicted / measured",
            "the lines allow", "measured / allowed", "to find it",
        ),
        _plans,
    ),
    "connections": (_OVER_LINES, _wan),
    "rtt": (_OVER_LINES, _wan),
    "changes": (("", "median (least to most)"), _changes),
}  # fmt: skip
assert TABLES.keys() == PARTS.keys()


def table(part: str, report: Report) -> str:
    """Markdown: a row for each figure, the command in the first one of its run; the machine behind it."""
    if part not in report:
        return _NOTHING.format(part)
    head, rows_of = TABLES[part]
    rows: list[Row] = [["command", *head], ["---"] * (1 + len(head))]
    machines: dict[str, None] = {}
    for told in report[part]:
        if "failed" in told:
            rows.append([_command(told), f"not measured: {told['failed']}", *[""] * (len(head) - 1)])
            continue
        run = told["told"]
        for number, row in enumerate(rows_of(run)):
            rows.append([_command(told) if number == 0 else "…", *row])
        machines[_machine(run)] = None
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([*lines, *(f"\n{machine}" for machine in machines)])


def _machine(run: dict[str, Any]) -> str:
    machine = run["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version is not None)
    return f"{machine['cpu']}, {machine['cores']} cores, {machine['kernel']}; {versions}."


def page(template: str, report: Report, plots: Mapping[str, str]) -> str:
    """The whole document.

    Args:
        plots: name -> file name of those that could be drawn.
    """

    def filled(place: re.Match[str]) -> str:
        kind, name = place[1], place[2]
        if kind == "table":
            return table(name, report)
        return f"![{name}]({plots[name]})" if name in plots else f"No plot: of `{name}` nothing was measured."

    return _PLACE.sub(filled, template)
