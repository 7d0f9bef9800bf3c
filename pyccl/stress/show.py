"""What a person sees while it runs: lines that stay, and one line that is drawn anew in a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import IO, Final

from rich.console import Console
from rich.live import Live
from rich.text import Text

from pyccl.stress.conductor import Screen
from pyccl.stress.oracle import Oracle
from pyccl.stress.report import Record

EVERY_S: Final = 10.0  # between lines where there is no terminal


class PlainScreen:
    """A line now and then."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self._next_s = stream, 0.0

    def say(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def update(self, record: Record, oracle: Oracle, now_s: float) -> None:
        if now_s >= self._next_s:
            self._next_s = now_s + EVERY_S
            self.say(headline(record, oracle, now_s))


class LiveScreen:
    """The line stands at the bottom."""

    def __init__(self, console: Console, live: Live) -> None:
        self._console, self._live, self._next_s = console, live, 0.0

    def say(self, text: str) -> None:
        self._console.print(Text(text))

    def update(self, record: Record, oracle: Oracle, now_s: float) -> None:
        if now_s >= self._next_s:
            self._next_s = now_s + 0.25
            self._live.update(Text(headline(record, oracle, now_s)))


@contextlib.contextmanager
def open_screen(stream: IO[str]) -> Iterator[Screen]:
    """Choose by whether ``stream`` is a terminal."""
    console = Console(file=stream)
    if not console.is_terminal:
        yield PlainScreen(stream)
        return
    with Live(console=console, refresh_per_second=4) as live:
        yield LiveScreen(console, live)


def headline(record: Record, oracle: Oracle, now_s: float) -> str:
    return (
        f"{now_s - record.start_s:6.1f} s  revision {oracle.revision}, {len(oracle.in_step())} peers in step, "
        f"{len(record.faults)} faults, {oracle.checked['values']} values checked, {len(oracle.violations)} violations"
    )
