"""Tables and plots of docs/optimizers.md, from what `losses.py` and `blocked.py` kept. Needs matplotlib.

    python tools/experiments/report.py [--losses docs/optimizers-losses.json] [--blocked docs/optimizers-blocked.json]
                                       [--plots docs]

Prints the tables as Markdown; writes optimizers-loss.png and optimizers-time.png into the folder of `--plots`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from variants import ALL

BASELINE = "every step"
DRAWN = (BASELINE, "LocalSGD", "DiLoCo", "late", "eager", "streaming, overlap, fp4", "NoLoCo")


@dataclass(frozen=True, slots=True)
class Losses:
    """Of a variant, over its seeds; bytes, rounds and kills are means. curve: inner steps -> mean."""

    name: str
    seeds: tuple[int, ...]
    each: tuple[float, ...]
    merged: tuple[float, ...]
    rounds: float
    tx_bytes: float
    tx_bytes_peak: float
    kills: float
    curve: Mapping[int, float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.each)

    @property
    def spread(self) -> float:
        """Standard deviation of the seeds; 0 of one."""
        return statistics.stdev(self.each) if len(self.each) > 1 else 0.0


def _whole(run: Mapping[str, Any]) -> Mapping[str, Any]:
    """With kills a replica tells of its own life: what one that was there all the time would tell."""
    rounds = len(run["present"])
    return {**run, "rounds": rounds, "tx_bytes": run["tx_bytes"] * rounds / run["rounds"]}


def losses_of(name: str, runs: Mapping[str, Any]) -> Losses | None:
    """None: there is no run of it."""
    keys = sorted(key for key in runs if key.rpartition("/")[0] == name)
    mine = [runs[key] for key in keys]
    if not mine:
        return None
    mine = [_whole(run) if run["kills"] else run for run in mine]
    steps = sorted({step for run in mine for step, _ in run["curve"]})
    points = {step: [loss for run in mine for at, loss in run["curve"] if at == step] for step in steps}

    def mean(of: str) -> float:
        return statistics.fmean(run[of] for run in mine)

    return Losses(
        name, tuple(int(key.rpartition("/")[2]) for key in keys), tuple(run["loss"] for run in mine),
        tuple(run["merged"] for run in mine if run["merged"] is not None), mean("rounds"), mean("tx_bytes"),
        mean("tx_bytes_peak"), statistics.fmean(len(run["kills"]) for run in mine),
        {step: statistics.fmean(found) for step, found in points.items()},
    )  # fmt: skip


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def paired(found: Losses, baseline: Losses) -> list[float]:
    """Shares by which it is above the baseline, seed by seed."""
    base = dict(zip(baseline.seeds, baseline.each, strict=True))
    return [loss / base[seed] - 1 for seed, loss in zip(found.seeds, found.each, strict=True) if seed in base]


def table_of_losses(found: Sequence[Losses]) -> str:
    baseline = next(one for one in found if one.name == BASELINE)
    rows = []
    for one in found:
        above = paired(one, baseline)
        note = f", merged {statistics.fmean(one.merged):.4f}" if one.merged else ""
        note += f", {one.kills:.0f} kills" if one.kills else ""
        rows.append([
            one.name, f"{one.mean:.4f} ± {one.spread:.4f}{note}",
            "" if one is baseline else f"{statistics.fmean(above):+.1%}",
            f"{one.rounds:.0f}", f"{one.tx_bytes / 1e6:.2f}", f"{one.tx_bytes_peak / 1e3:.0f}", str(len(one.each)),
        ])  # fmt: skip
    return table(["", "validation loss", "beside every step", "rounds", "MB sent", "KB at once", "seeds"], rows)


def middle(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The one with the median of what was waited; of an even number the lower one."""
    return sorted(runs, key=lambda run: float(run["blocked"]))[(len(runs) - 1) // 2]


def table_of_blocked(found: Mapping[str, Any]) -> str:
    rows = []
    for variant in ALL:
        runs = found.get(variant.name)
        if runs is None:
            continue
        run, waited = middle(runs), [one["blocked"] for one in runs]
        seconds = run["seconds"]
        spread = f"; {min(waited):.2f} to {max(waited):.2f}" if len(waited) > 1 else ""
        rows.append([
            variant.name, f"{run['steps']:.0f}", f"{run['tx_bytes'] / 1e6:.1f}", f"{run['line_s']:.2f}",
            f"{run['blocked']:.2f} ({run['blocked'] / seconds:.1%}){spread}", f"{run['hidden']:.1f}",
            f"{1 - run['steps'] * run['step_s'] / seconds:.1%}", str(len(runs)),
        ])  # fmt: skip
    head = [
        "", "inner steps", "MB sent", "line alone, s", "`step()` waited, s", "hidden, s", "not in inner steps", "runs"
    ]  # fmt: skip
    return table(head, rows)


def _figure(columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.5 * columns, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def draw_losses(found: Mapping[str, Losses], path: Path) -> None:
    """Left: against tokens, i.e. inner steps. Right: at the end, against what a replica sent."""
    figure, (curves, ends) = _figure(2)
    for name in DRAWN:
        if name in found:
            curve = found[name].curve
            curves.plot(list(curve), list(curve.values()), label=name)
    curves.set(xlabel="inner steps", ylabel="validation loss, nats per character", title="Loss against steps")
    curves.set_yscale("log")
    curves.legend()
    for one in found.values():
        if " H 1" not in one.name or "H 10" in one.name:
            at = (one.tx_bytes / 1e6, one.mean)
            ends.errorbar(*at, yerr=one.spread, marker="o", capsize=2)
            ends.annotate(one.name, at, fontsize=6, xytext=(4, 2), textcoords="offset points")
    ends.set(xscale="log", xlabel="MB sent by a replica", title="Loss at the end against traffic")
    figure.savefig(path, dpi=80)


def draw_times(found: Mapping[str, Losses], runs: Mapping[str, Any], path: Path) -> None:
    """Losses of one measurement over the seconds of the other: an inner step takes what it took on the line."""
    figure, (curves, shares) = _figure(2)
    for name in DRAWN:
        if name in found and name in runs:
            step_s = runs[name]["seconds"] / runs[name]["steps"]
            curve = found[name].curve
            curves.plot([step * step_s / 60 for step in curve], list(curve.values()), label=name)
    curves.set(xlabel="minutes on atlantic", ylabel="validation loss, nats per character", title="Loss against time")
    curves.set(xscale="log", yscale="log")
    curves.legend()
    names = [variant.name for variant in ALL if variant.name in runs]
    shares.barh(names, [100 * runs[name]["blocked"] / runs[name]["seconds"] for name in names])
    shares.invert_yaxis()
    shares.set(xlabel="% of the time", title="Waiting for others on atlantic")
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", type=Path, default=Path("docs/optimizers-losses.json"))
    parser.add_argument("--blocked", type=Path, default=Path("docs/optimizers-blocked.json"))
    parser.add_argument("--plots", type=Path, default=Path("docs"))
    args = parser.parse_args()
    runs = json.loads(args.losses.read_text())["runs"]
    blocked = json.loads(args.blocked.read_text())["runs"] if args.blocked.exists() else {}
    every = [losses_of(variant.name, runs) for variant in ALL]
    found = {one.name: one for one in every if one is not None}
    print(table_of_losses(list(found.values())), end="\n\n")
    print(table_of_blocked(blocked))
    draw_losses(found, args.plots / "optimizers-loss.png")
    draw_times(found, {name: middle(runs) for name, runs in blocked.items()}, args.plots / "optimizers-time.png")


if __name__ == "__main__":
    main()
