"""Draws a run into a PNG file: revisions per second above, faults by kind on the same time below. Needs matplotlib."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pyccl.stress.oracle import Oracle
from pyccl.stress.report import Record


def save(record: Record, oracle: Oracle, title: str, path: Path) -> None:
    """Write the picture.

    Raises:
        OSError: ``path`` cannot be written.
    """
    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    rates = Counter(int(at_s - record.start_s) for at_s in oracle.advances)
    seconds = range(int(record.end_s - record.start_s) + 1)
    upper.step(seconds, [rates[second] for second in seconds], where="post", label="revisions per second")
    for phase in record.phases[1:]:
        upper.axvline(phase.start_s - record.start_s, color="tab:gray", linestyle=":")
        upper.annotate(phase.name, (phase.start_s - record.start_s, 1), xycoords=("data", "axes fraction"), va="bottom")
    for violation in oracle.violations:
        upper.axvline(violation.time_s - record.start_s, color="tab:red", label=f"violation: {violation.kind}")
    upper.set_ylim(0)
    upper.set_title(title, pad=16)
    upper.legend(loc="lower right")
    kinds = sorted({mark.kind for mark in record.faults})
    for mark in record.faults:
        at_s, length_s = mark.at_s - record.start_s, max(mark.until_s - mark.at_s, 0.05)
        lower.barh(kinds.index(mark.kind), length_s, left=at_s, height=0.5, color=f"C{kinds.index(mark.kind) % 10}")
        lower.plot(at_s, kinds.index(mark.kind), "|", color=f"C{kinds.index(mark.kind) % 10}", markersize=14)
    costs = {cost.kind: cost for cost in record.costs(oracle.advances)}
    labels = [f"{kind} ({costs[kind].count}, longest stall {costs[kind].longest_stall_s:.1f} s)" for kind in kinds]
    lower.set_yticks(range(len(kinds)), labels)
    lower.set_xlabel("seconds")
    figure.savefig(path, dpi=110)
