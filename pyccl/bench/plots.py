"""The plots of docs/performance.md, from what ``pyccl bench all`` kept. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pyccl.bench.figures import MIB
from pyccl.bench.suite import Report

Runs = list[dict[str, Any]]


def _connections(axes: Axes, runs: Runs) -> None:
    fixed = [run for run in runs if run["settings"]["connections"] != "auto"]
    numbers = [run["settings"]["connections"] for run in fixed]
    axes.plot(numbers, [run["rates"]["pyccl"]["mbit_s"] for run in fixed], marker="o", label="so many connections")
    for run in runs:
        if run["settings"]["connections"] == "auto":
            axes.axhline(run["rates"]["pyccl"]["mbit_s"], color="tab:orange", linestyle="--", label="auto")
    axes.axhline(runs[0]["scenario"]["hosts"][0]["up_bps"] / 1e6, color="tab:gray", linestyle=":", label="the line")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="connections of a pair", ylabel="Mbit/s", title="Rate against connections", ylim=(0, None))
    axes.legend()


def _by(axes: Axes, runs: Runs, x: Callable[[dict[str, Any]], float]) -> None:
    """Median, least and most of each system against x."""
    for name in ("pyccl", "gloo"):
        points = sorted((x(run), run["systems"][name]["seconds"]) for run in runs if name in run["systems"])
        if points:
            xs = [at for at, _ in points]
            axes.plot(xs, [time["median"] for _, time in points], marker="o", label=name)
            axes.fill_between(xs, [time["min"] for _, time in points], [time["max"] for _, time in points], alpha=0.2)
    axes.set_ylabel("seconds")
    axes.legend()


def _sizes(axes: Axes, runs: Runs) -> None:
    _by(axes, runs, lambda run: float(run["settings"]["size_bytes"] / MIB))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set(xlabel="MiB", title="Time against size, 2 processes, loopback")


def _rtt(axes: Axes, runs: Runs) -> None:
    _by(axes, runs, lambda run: float(run["scenario"]["rtt_ms"]))
    settings = runs[0]["settings"]
    axes.set(xlabel="round trip, ms", title=f"Time against round trip, {settings['size_bytes'] / MIB:g} MiB, 2 peers")
    axes.set_ylim(bottom=0)


def _scale(axes: Axes, runs: Runs) -> None:
    sizes = runs[0]["sizes"]
    worlds = [size["world"] for size in sizes]
    axes.plot(worlds, [size["seconds"]["median"] * 1e3 for size in sizes], marker="o", label="time")
    axes.plot(worlds, [size["cpu_s"] * 1e3 for size in sizes], marker="s", label="CPU of all members")
    per_pair = sizes[-1]["cpu_s_per_pair"] * 1e3
    axes.plot(worlds, [per_pair * n * (n - 1) for n in worlds], ":", color="tab:gray", label="ordered pairs")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="members", ylabel="ms for each all-reduce", title="A small all-reduce against members, loopback")
    axes.legend()


def _share(axes: Axes, runs: Runs) -> None:
    bars = [
        (f"{run['scenario']['name']}, {run['settings']['world']} peers, {name}", run["rates"][name]["line_share"])
        for run in runs
        for name in run["systems"]
        if run["rates"][name]["line_share"] is not None and run["settings"]["quantize"] is None
    ]
    labels = [f"{label} ({number})" for number, (label, _) in enumerate(bars)]
    axes.barh(labels, [100 * share for _, share in bars])
    axes.invert_yaxis()
    axes.set(xlabel="% of the line's rate", title="Share of the slowest line's rate", xlim=(0, 100))


def _codecs(axes: Axes, runs: Runs) -> None:
    run = runs[0]
    errors = {error["codec"]: error["rms"] for error in run["codec_errors"] if error["data"] == "normal"}
    best: dict[tuple[str, str], float] = {}
    for rate in run["rates"]:
        way, _, codec = rate["what"].partition(" ")
        if codec in errors and rate["place"] == "cache" and rate["dtype"] == "float32":
            best[way, codec] = max(best.get((way, codec), 0.0), rate["gib_per_s"]["median"])
    places = range(len(errors))
    for at, way in ((-0.2, "encode"), (0.2, "decode")):
        axes.bar([place + at for place in places], [best[way, codec] for codec in errors], 0.4, label=way)
    axes.set_xticks(list(places), list(errors))
    axes.set(ylabel="GiB/s of float32, one core", title="Codecs: speed from cache, and error of normal data")
    axes.set_ylim(top=1.3 * max(best.values()))
    axes.legend(loc="upper left")
    beside = axes.twinx()
    beside.plot(list(places), list(errors.values()), "k_", markersize=24)
    beside.set_yscale("log")
    beside.set_ylabel("rms error / rms (dashes)")


# name -> the part it draws, or several, and how
PLOTS: Final[Mapping[str, tuple[tuple[str, ...], Callable[[Axes, Runs], None]]]] = {
    "connections": (("connections",), _connections),
    "sizes": (("sizes",), _sizes),
    "rtt": (("rtt",), _rtt),
    "scale": (("scale",), _scale),
    "share": (("pacific", "lines"), _share),
    "codecs": (("kernels",), _codecs),
}


def save(report: Report, directory: Path) -> dict[str, str]:
    """Draw what there is into performance-NAME.png.

    Returns:
        name -> file name.

    Raises:
        OSError: a file cannot be written.
    """
    drawn = {}
    for name, (parts, draw) in PLOTS.items():
        runs = [told["told"] for part in parts for told in report.get(part, []) if "told" in told]
        if not runs:
            continue
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.subplots(), runs)
        drawn[name] = f"performance-{name}.png"
        figure.savefig(directory / drawn[name], dpi=100)
    return drawn
