"""Draws a run into a PNG file: validation loss above, members below, the kill and the join marked. Needs
matplotlib, which the extra ``plot`` of a clone brings: pip install '.[plot]'."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pyccl.demo.progress import Run


def save(run: Run, path: Path) -> None:
    """Write the picture.

    Raises:
        OSError: ``path`` cannot be written.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    losses, members = run.losses(), run.membership()
    times_s, _, values = zip(*losses, strict=True) if losses else ((), (), ())
    upper.plot(times_s, values, marker=".", label="validation loss")
    upper.axhline(run.entropy_bits, color="tab:gray", linestyle=":", label="unigram entropy")
    upper.axhline(run.loss_limit, color="tab:green", linestyle="--", label="required at the end")
    upper.set_ylabel("bits per character")
    upper.set_title(f"pyccl demo: {run.plan.peers} peers, {run.plan.rounds} averaging rounds, seed {run.plan.seed}")
    lower.step([time_s for time_s, _ in members], [size for _, size in members], where="post")
    lower.set_ylim(0, run.plan.peers + 1.5)
    lower.set_ylabel("members")
    lower.set_xlabel("seconds")
    for mark, text, colour in ((run.killed, "killed", "tab:red"), (run.joined(), "joined", "tab:purple")):
        if mark is None:
            continue
        label = f"peer {mark.peer} {text} (round {mark.revision})"
        upper.axvline(mark.time_s, color=colour, linewidth=1, label=label)
        lower.axvline(mark.time_s, color=colour, linewidth=1)
    upper.legend()
    figure.savefig(path, dpi=120)
