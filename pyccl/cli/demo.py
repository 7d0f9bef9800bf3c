"""``pyccl demo``: options, screen and exit status of the main job."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import click

from pyccl.demo.orchestrator import Orchestrator
from pyccl.demo.progress import ExitStatus, Plan, Run
from pyccl.demo.show import open_screen, summary
from pyccl.processes.children import Children, Interrupted

PNG = click.Path(dir_okay=False, path_type=Path)
EPILOG = """\b
Exit status:
  0  the loss fell far enough and every digest of every peer agreed
  1  internal error
  2  bad arguments
  3  digests differ, or are missing
  4  the last validation loss is above 0.8 x the unigram entropy
  5  the kill or the join did not happen
  6  the master or a peer failed
  7  nothing happened for a minute
  128 + n  ended by signal n (Ctrl-C: 130)

Example: pyccl demo --plot demo.png
"""


@click.command(epilog=EPILOG)
@click.option("--peers", type=click.IntRange(2, 8), default=Plan.peers, show_default=True, help="Peers at the start.")
@click.option("--rounds", type=click.IntRange(6), default=Plan.rounds, show_default=True, help="Averaging rounds.")
@click.option("--seed", type=click.IntRange(0), default=Plan.seed, show_default=True, help="Seed of model and batches.")
@click.option("--kill/--no-kill", default=True, help="Kill one peer (SIGKILL) at a third of the rounds.")
@click.option("--join/--no-join", default=True, help="Let a new peer join at two thirds.")
@click.option("--plot", "plot_path", type=PNG, metavar="FILE.png", help="Draw loss and membership.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout; progress goes to stderr.")
def demo(peers: int, rounds: int, seed: int, kill: bool, join: bool, plot_path: Path | None, as_json: bool) -> None:
    """Train a small language model with several processes, kill one, let one join.

    The text is the source of Python's standard library. A master and the peers run on this machine; every
    few local steps the peers average their parameters and compare the digests of their state.
    """
    if kill and peers < 3:
        raise click.UsageError("--kill needs at least 3 peers (or give --no-kill)")
    save_plot = None if plot_path is None else _plotter(plot_path)
    run = _run(Plan(peers=peers, rounds=rounds, seed=seed, kill=kill, join=join), as_json)
    status = run.verdict().status
    if save_plot is not None:
        try:
            save_plot(run)
        except OSError as error:
            click.echo(f"pyccl demo: cannot write {plot_path}: {error}", err=True)
            status = status or ExitStatus.INTERNAL
    for line in summary(run):
        click.echo(line, err=as_json)
    if as_json:
        click.echo(json.dumps(run.to_json()))
    sys.exit(int(status))


def _plotter(path: Path) -> Callable[[Run], None]:
    """Refuse before the run what would fail after it."""
    if path.suffix.lower() != ".png":
        raise click.UsageError(f"--plot: {path} does not end in .png")
    if not path.absolute().parent.is_dir():
        raise click.UsageError(f"--plot: there is no directory {path.absolute().parent}")
    try:
        from pyccl.demo import plot  # noqa: PLC0415  matplotlib is optional
    except ImportError as error:
        raise click.UsageError(f"--plot needs matplotlib: pip install matplotlib ({error})") from error
    return lambda run: plot.save(run, path)


def _run(plan: Plan, as_json: bool) -> Run:
    stream = sys.stderr if as_json else sys.stdout
    try:
        with open_screen(stream) as screen, Children() as children:
            orchestrator = Orchestrator(plan, screen, children)
            orchestrator.execute()
    except Interrupted as interrupted:
        click.echo(f"pyccl demo: ended by signal {interrupted.signal_number}", err=True)
        sys.exit(128 + interrupted.signal_number)
    return orchestrator.run
