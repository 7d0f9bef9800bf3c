"""Owner of a benchmark's processes: a master of its own on a free port, and the peers; on loopback or in a lab.

Children report in lines of JSON (`control`); ``wait`` collects one event from each of some of them. A child that ends
unasked, an error that it reports or a long silence of all ends the benchmark with a BenchError. Nothing sleeps.
"""

from __future__ import annotations

import enum
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from pyccl._io.address import join_address
from pyccl._io.identity import VARIABLE as IDENTITY
from pyccl.bench.places import Loopback, Places
from pyccl.processes.children import ONE_THREAD, Children, Event, Exited, Line

MASTER: Final = "master"
LISTENING: Final = "listening on "
FINAL: Final = ("result", "done")  # events after which a child may end
SILENCE_S: Final = 90.0  # without a line from any child, unless told otherwise; every call of a child is shorter
AFTERMATH_S: Final = 1.0  # after a failure, for the others to report theirs

Fields = dict[str, Any]


class ExitStatus(enum.IntEnum):
    """Of ``pyccl bench``."""

    OK = 0
    INTERNAL = 1
    ARGUMENTS = 2
    NO_TORCH = 3
    WRONG_VALUES = 4
    NO_LAB = 5
    CHILD_FAILED = 6
    STALLED = 7


class BenchError(Exception):
    """The benchmark has no result. `details`: lines for stderr."""

    def __init__(self, status: ExitStatus, text: str, details: Iterable[str] = ()) -> None:
        super().__init__(text)
        self.status, self.details = status, tuple(details)


class Conductor:
    """Starts and hears the processes of one benchmark; `children` ends them."""

    def __init__(
        self, children: Children, places: Places | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """places: where they run; loopback unless given."""
        self._children, self._clock = children, clock
        self.places = Loopback() if places is None else places
        self.silence_s = SILENCE_S
        self._heard: dict[str, list[Fields]] = {}
        self._may_end: set[str] = set()
        self._finished: set[str] = set()
        self._address = ""
        self._masters: list[str] = []
        self._master_options: list[str] = []
        self._environment: dict[str, str] = {}  # of the master and the peers

    def start_master(
        self,
        peer_timeout_s: float,
        journal: Path | None = None,
        identity: Path | None = None,
        relay: bool = False,
    ) -> None:
        """identity: where that of a secure master is to be, and of all peers, which are its operators then."""
        if identity is not None:
            self._environment = {IDENTITY: str(identity)}
        self._master_options = ["--log-level", "warning", "--peer-timeout", str(peer_timeout_s)]
        self._master_options += ["--journal", str(journal)] if journal is not None else ["--no-journal"]
        if relay:
            self._master_options.append("--relay")
        if identity is not None:
            self._master_options.append("--secure")
        elif self.places.address(MASTER) != Loopback.host:
            self._master_options.append("--insecure")
        self._start_master(join_address(self.places.address(MASTER), 0))

    def kill_master(self) -> None:
        self.kill(self._masters[-1])

    def restart_master(self) -> None:
        """Where the last one listened, with its journal; it listens when this returns."""
        address, self._address = self._address, ""
        self._start_master(address)

    def _start_master(self, listen: str) -> None:
        name = f"{MASTER} {len(self._masters)}" if self._masters else MASTER
        self._masters.append(name)
        self._heard[name] = []
        arguments = ["pyccl.cli.master", "--listen", listen, *self._master_options]
        environment = {**self._environment, **self.places.environment(MASTER)}
        self._children.start(name, "pyccl.processes.leash", arguments, environment, self.places.before(MASTER))
        while not self._address:
            self._take_one(self.silence_s)

    def start(self, name: str, task: str, settings: Mapping[str, object]) -> None:
        """Start a peer; it loads what it needs, says "ready" and waits for "go"."""
        told = json.dumps({"task": task, "master": self._address, **settings})
        self._heard[name] = []
        environment = {**ONE_THREAD, **self._environment, **self.places.environment(name)}
        self._children.start(name, "pyccl.bench.peer", [told], environment, self.places.before(name))

    def tell(self, names: Iterable[str], word: str) -> None:
        for name in names:
            self._children.tell(name, word)

    def start_all(self, names: Iterable[str], task: str, settings: Callable[[int], Mapping[str, object]]) -> None:
        """Start several peers and let them go at the same moment, when all are ready."""
        names = tuple(names)
        for number, name in enumerate(names):
            self.start(name, task, settings(number))
        self.wait("ready", names)
        self.tell(names, "go")

    def pid(self, name: str) -> int:
        return self._children.pid(name)

    def may_end(self, name: str) -> None:
        """From here the end of this child is no failure."""
        self._may_end.add(name)

    def kill(self, name: str) -> None:
        self._may_end.add(name)
        self._children.kill(name)

    def wait(
        self, event: str, names: Iterable[str], where: Callable[[Fields], bool] = lambda fields: True
    ) -> dict[str, Fields]:
        """Take the next `event` that satisfies `where` from each child; what else they say is kept for later.

        Raises:
            BenchError: a child failed, or none said anything for `silence_s`.
            Interrupted: a signal asked the program to end.
        """
        found: dict[str, Fields] = {}
        missing = set(names)
        deadline = self._clock() + self.silence_s
        while True:
            for name in sorted(missing):
                fields = _pop(self._heard[name], event, where)
                if fields is not None:
                    found[name] = fields
            missing -= set(found)
            if not missing:
                return found
            if self._take_one(deadline - self._clock()):
                deadline = self._clock() + self.silence_s

    def _take_one(self, timeout_s: float) -> bool:
        """Take in one event of a child; False if it was of no interest."""
        event = self._children.next_event(max(timeout_s, 0.0))
        if event is None:
            raise self._failure(ExitStatus.STALLED, f"no report for {self.silence_s:.0f} s")
        fault = self._take(event)
        if fault is not None:
            self._hear_out(fault)
        return isinstance(event, Line)

    def _take(self, event: Event) -> BenchError | None:
        if isinstance(event, Exited):
            if event.child in self._may_end or (event.child in self._finished and event.returncode == 0):
                return None
            how = f"signal {-event.returncode}" if event.returncode < 0 else f"status {event.returncode}"
            return BenchError(ExitStatus.CHILD_FAILED, f"{event.child} ended early with {how}")
        if event.child in self._masters:
            if event.text.startswith(LISTENING):
                self._address = event.text.removeprefix(LISTENING).strip()
            return None
        fields = json.loads(event.text)
        if fields["event"] == "error":
            status = ExitStatus.ARGUMENTS if fields["usage"] else ExitStatus.CHILD_FAILED
            return BenchError(status, f"{event.child}: {fields['text']}")
        if fields["event"] in FINAL:
            self._finished.add(event.child)
        self._heard[event.child].append(fields)
        return None

    def _hear_out(self, first: BenchError) -> None:
        """Of the failures that come in one after the other the one that names a usage error says most."""
        worst, deadline = first, self._clock() + AFTERMATH_S
        while worst.status is not ExitStatus.ARGUMENTS and (left_s := deadline - self._clock()) > 0:
            event = self._children.next_event(left_s)
            fault = None if event is None else self._take(event)
            if fault is not None and (fault.status is ExitStatus.ARGUMENTS or ": " in str(fault)):
                worst = fault
                break
        raise self._failure(worst.status, str(worst))

    def _failure(self, status: ExitStatus, text: str) -> BenchError:
        if status is ExitStatus.ARGUMENTS:  # the text says all
            return BenchError(status, text)
        return BenchError(
            status, text, (f"{name}: {line}" for name in self._heard for line in self._children.stderr_tail(name))
        )


def _pop(heard: list[Fields], event: str, where: Callable[[Fields], bool]) -> Fields | None:
    for i, fields in enumerate(heard):
        if fields["event"] == event and where(fields):
            return heard.pop(i)
    return None
