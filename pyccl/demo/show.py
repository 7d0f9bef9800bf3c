"""What a person sees of a run: a live table in a terminal, plain lines elsewhere, and the summary."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import IO, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pyccl.demo.progress import LOSS_LIMIT_SHARE, Mark, Peer, Run


class Screen(Protocol):
    """Where progress is shown."""

    def update(self, run: Run, now_s: float) -> None:
        """Show the present state; called often."""

    def say(self, text: str) -> None:
        """Show one line that stays."""


class PlainScreen:
    """One line for each new revision."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._shown = -1

    def update(self, run: Run, now_s: float) -> None:
        """Print a line when a revision is new and validated."""
        losses = run.losses()
        if losses and losses[-1][1] > self._shown:
            self._shown = losses[-1][1]
            self.say(f"{now_s:6.1f} s  {headline(run)}")

    def say(self, text: str) -> None:
        """Print a line."""
        self._stream.write(text + "\n")
        self._stream.flush()


class LiveScreen:
    """A table that is drawn anew."""

    def __init__(self, console: Console, live: Live) -> None:
        self._console, self._live = console, live

    def update(self, run: Run, now_s: float) -> None:
        """Draw the table."""
        self._live.update(table(run, now_s))

    def say(self, text: str) -> None:
        """Print a line above the table."""
        self._console.print(Text(text))


@contextlib.contextmanager
def open_screen(stream: IO[str]) -> Iterator[Screen]:
    """Choose by whether ``stream`` is a terminal."""
    console = Console(file=stream)
    if not console.is_terminal:
        yield PlainScreen(stream)
        return
    with Live(console=console, refresh_per_second=8) as live:
        yield LiveScreen(console, live)


def headline(run: Run) -> str:
    """Round, members, epoch, loss and rate in one line."""
    reports = (peer.last for peer in run.peers.values() if peer.last is not None)
    newest = max(reports, key=lambda report: report.revision, default=None)
    if newest is None:
        return "waiting for the first round"
    losses = run.losses()
    loss = f"{losses[-1][2]:.3f}" if losses else "-"
    return (
        f"round {newest.revision:3d}/{run.plan.rounds}  members {newest.world_size}  epoch {newest.epoch}  "
        f"validation {loss} bits/char  {_rate(newest.mb_per_s)} MB/s"
    )


def table(run: Run, now_s: float) -> RenderableType:
    """All peers, one row each, under a headline."""
    rows = Table("peer", "id", "state", "round", "epoch", "members", "train bits/char", "MB/s", "retries")
    for peer in sorted(run.peers.values(), key=lambda peer: peer.number):
        rows.add_row(*_row(peer))
    return Group(Text(f"{now_s:5.1f} s  {headline(run)}"), rows)


def _row(peer: Peer) -> tuple[str, ...]:
    last = peer.last
    retries = sum(report.retries for report in peer.reports)
    start = (str(peer.number), peer.peer_id[:8], peer.fate.value)
    if last is None:
        return (*start, "", "", "", "", "", "")
    loss = "" if last.train_loss is None else f"{last.train_loss:.3f}"
    return (*start, str(last.revision), str(last.epoch), str(last.world_size), loss, _rate(last.mb_per_s), str(retries))


def _rate(mb_per_s: float | None) -> str:
    return "-" if mb_per_s is None else f"{mb_per_s:.0f}"


def summary(run: Run) -> list[str]:
    """The last lines: each requirement with its figures, then the outcome."""
    verdict, digests, joined = run.verdict(), run.check_digests(), run.joined()
    first, last = run.loss_at(0), run.loss_at(run.plan.rounds)
    newcomer = run.peers.get(run.plan.newcomer)
    required = f"required {run.loss_limit:.3f} = {LOSS_LIMIT_SHARE} x unigram entropy {run.entropy_bits:.3f}"
    agreement = f"{len(digests.differences)} revisions differ" if digests.differences else "all equal"
    lines = [
        f"validation loss  {_bits(first)} at first, {_bits(last)} at last (bits/char); {required}",
        f"digests          {digests.compared} compared at {digests.revisions} revisions, {agreement}",
        f"retries          {run.retries} (operations that ran again after the loss, over all peers)",
        f"killed           {_mark(run.killed)}",
        f"joined           {_mark(joined)}",
    ]
    if joined is not None and newcomer is not None:
        lines[-1] += f", received {newcomer.reports[0].sync_bytes / 1e6:.2f} MB of model"
    lines += [f"FAILED           {reason}" for reason in verdict.reasons]
    outcome = "ok" if not verdict.reasons else verdict.status.name.lower().replace("_", " ")
    return [*lines, f"result           {outcome}, exit status {int(verdict.status)}, {run.seconds:.1f} s"]


def _bits(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"


def _mark(mark: Mark | None) -> str:
    return "nobody" if mark is None else f"peer {mark.peer} at round {mark.revision} after {mark.time_s:.1f} s"
