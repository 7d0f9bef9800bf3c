"""One command on every host of a lab: what it printed, how it ended, what the lines did meanwhile."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from pyccl.netlab.emulator import Counts
from pyccl.netlab.lab import Lab
from pyccl.netlab.scenario import Scenario

Printed = Callable[[str, str, bool], None]  # host, line, whether it is of stderr


@dataclass(slots=True)
class HostResult:
    """status: as of subprocess.Popen, negative for a signal; None: the time was over. seconds: until it ended."""

    host: str
    rank: int
    status: int | None = None
    seconds: float = 0.0
    stdout: list[str] = field(default_factory=list)
    stderr: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Result:
    scenario: Scenario
    argv: tuple[str, ...]
    hosts: tuple[HostResult, ...]
    counts: Counts

    @property
    def timed_out(self) -> bool:
        return any(host.status is None for host in self.hosts)

    @property
    def succeeded(self) -> bool:
        return all(host.status == 0 for host in self.hosts)

    def to_json(self) -> dict[str, Any]:
        return {
            "scenario": self.scenario.name,
            "command": list(self.argv),
            "timed_out": self.timed_out,
            "hosts": [asdict(host) for host in self.hosts],
            "lines": asdict(self.counts),
        }


def run(scenario: Scenario, argv: Sequence[str], time_limit_s: float | None, printed: Printed) -> Result:
    """Build the lab, run the command on all hosts at once, wait, and take everything away.

    Args:
        time_limit_s: after it those that still run are killed; None: wait for ever.
        printed: is told every line, in threads.

    Raises:
        NetworkError: no lab can be had here.
    """
    with Lab(scenario) as lab:
        deadline_s = None if time_limit_s is None else time.monotonic() + time_limit_s
        watched = [_Watched(lab, rank, argv, printed) for rank in range(lab.world)]
        for one in watched:
            one.wait(deadline_s)
        counts = lab.counts()
    for one in watched:  # what they left running is gone now, so their pipes end
        one.finish()
    return Result(scenario, tuple(argv), tuple(one.result for one in watched), counts)


class _Watched:
    """A command's process and the threads that read it."""

    def __init__(self, lab: Lab, rank: int, argv: Sequence[str], printed: Printed) -> None:
        self.result = HostResult(lab.scenario.hosts[rank].name, rank)
        self._printed = printed
        self._start_s = time.monotonic()
        self._process = lab.start(
            rank, argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            encoding="utf-8", errors="replace",
        )  # fmt: skip
        streams = ((self._process.stdout, self.result.stdout), (self._process.stderr, self.result.stderr))
        self._threads = [threading.Thread(target=self._read, args=stream, daemon=True) for stream in streams]
        self._threads.append(threading.Thread(target=self._time, daemon=True))
        for thread in self._threads:
            thread.start()

    def _read(self, stream: IO[str], lines: list[str]) -> None:
        with stream:
            for text in stream:
                lines.append(text.rstrip("\n"))
                self._printed(self.result.host, lines[-1], lines is self.result.stderr)

    def _time(self) -> None:
        self._process.wait()
        self.result.seconds = time.monotonic() - self._start_s

    def wait(self, deadline_s: float | None) -> None:
        left_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
        try:
            self.result.status = self._process.wait(left_s)
        except subprocess.TimeoutExpired:
            self.result.status = None

    def finish(self) -> None:
        for thread in self._threads:
            thread.join()
