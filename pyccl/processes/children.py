"""Child processes with their output as events, and the promise that none outlives its owner.

One thread per pipe reads lines into one queue; the owner's thread alone acts on them. Signals that would end the
program are turned into events too, so cleaning up is never cut short by an exception at an arbitrary line. Children run
in sessions of their own: Ctrl-C in a terminal reaches the owner, and the owner ends them.
"""

from __future__ import annotations

import collections
import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import IO, Any, Final, Self

ENDING_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STDERR_LINES_MAX: Final = 200  # kept per child unless the owner says otherwise, to be shown if it fails
GRACE_S: Final = 3.0  # from SIGTERM to SIGKILL
# One BLAS thread per process: the processes share the cores already.
ONE_THREAD: Final = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "BLIS", "VECLIB_MAXIMUM")}


@dataclass(frozen=True)
class Line:
    """A line that a child printed on stdout."""

    child: str
    text: str


@dataclass(frozen=True)
class Exited:
    """A child ended and all it had printed was read."""

    child: str
    returncode: int


class Interrupted(BaseException):
    """A signal asked the program to end; like KeyboardInterrupt, not an Exception."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


Event = Line | Exited


class Children:
    """Owner of child processes; use as a context manager in the main thread."""

    def __init__(self, stderr_lines_max: int = STDERR_LINES_MAX) -> None:
        self._stderr_lines_max = stderr_lines_max
        self._events: queue.SimpleQueue[Event | Interrupted] = queue.SimpleQueue()
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._stderr: dict[str, collections.deque[str]] = {}
        self._threads: dict[str, tuple[threading.Thread, threading.Thread]] = {}
        self._handlers_before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in ENDING_SIGNALS:
            self._handlers_before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._end_all()
        finally:
            for number, handler in self._handlers_before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._events.put(Interrupted(number))  # SimpleQueue.put is safe in a signal handler

    def start(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
    ) -> None:
        """Run ``python -m module`` as the child ``name``; ``-P`` keeps the working directory off its import path.

        before: a command that runs the rest in its own place (exec), as ``ip netns exec NAME`` does.
        """
        if name in self._processes:
            raise ValueError(f"child {name!r} was started before")
        process = subprocess.Popen(
            [*before, sys.executable, "-P", "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self._processes[name] = process
        self._stderr[name] = collections.deque(maxlen=self._stderr_lines_max)
        errors = threading.Thread(target=self._read_stderr, args=(name, process.stderr), daemon=True)
        output = threading.Thread(target=self._read_stdout, args=(name, process, errors), daemon=True)
        self._threads[name] = (errors, output)
        for thread in (errors, output):
            thread.start()

    def _read_stderr(self, name: str, stream: IO[str]) -> None:
        for text in stream:
            self._stderr[name].append(text.rstrip("\n"))

    def _read_stdout(self, name: str, process: subprocess.Popen[str], errors: threading.Thread) -> None:
        assert process.stdout is not None
        for text in process.stdout:
            if text.endswith("\n"):  # a killed child may leave half a line
                self._events.put(Line(name, text[:-1]))
        errors.join()
        self._events.put(Exited(name, process.wait()))

    def next_event(self, timeout_s: float) -> Event | None:
        """Wait for the next event; ``None`` after ``timeout_s``.

        Raises:
            Interrupted: a signal asked the program to end.
        """
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if isinstance(event, Interrupted):
            raise event
        return event

    def kill(self, name: str) -> None:
        """SIGKILL, without any notice to the child."""
        self.signal(name, signal.SIGKILL)

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal; nothing happens to a child that is gone already."""
        self._processes[name].send_signal(number)

    def __contains__(self, name: object) -> bool:
        """Whether it was started and not yet forgotten."""
        return name in self._processes

    def forget(self, name: str) -> None:
        """Release what a child left behind whose ``Exited`` was taken: pipes, threads, lines of stderr."""
        _close_pipes(self._processes.pop(name), self._threads.pop(name))
        del self._stderr[name]

    def tell(self, name: str, line: str) -> None:
        """Write a line to the child's stdin; a child that is gone already hears nothing."""
        stdin = self._processes[name].stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its Exited event tells the story
            stdin.write(line + "\n")
            stdin.flush()

    def pid(self, name: str) -> int:
        """Process id of a child."""
        return self._processes[name].pid

    def stderr_tail(self, name: str) -> list[str]:
        """Last lines that the child wrote to stderr."""
        return list(self._stderr[name])

    def _end_all(self) -> None:
        """End and reap every child: ask, wait, then kill."""
        running = [process for process in self._processes.values() if process.poll() is None]
        for process in running:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGCONT)  # one that is stopped hears nothing
        deadline = time.monotonic() + GRACE_S
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for name, process in self._processes.items():
            _close_pipes(process, self._threads[name])


def _close_pipes(process: subprocess.Popen[str], readers: Iterable[threading.Thread]) -> None:
    """Of a child that has ended."""
    for thread in readers:
        thread.join(GRACE_S)
    for stream in (process.stdin, process.stdout, process.stderr):
        assert stream is not None
        with contextlib.suppress(BrokenPipeError):  # unread input of a child that is gone
            stream.close()
