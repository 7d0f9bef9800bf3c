"""The line emulator's process: finds or builds ``netlab-emulator`` (native/netlab), configures it, asks it for counts.

An installed package has the program beside this file. In a clone it is compiled with ``cc`` when it is first needed,
into build/netlab under the hash of its sources, so it is never stale.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pyccl.netlab.scenario import Cap, Delay, Loss, Pipe, Scenario, Step
from pyccl.processes.namespace import NetworkError

PROGRAM: Final = "netlab-emulator"
# So long it rests after each turn, as a card's interrupt waits for more: a hundredth of the shortest delay, and no less
# than what is worth waking up for. A frame may enter its line, and a packet arrive, so much later.
GRAIN_NS: Final = (20_000, 250_000)
GRAIN_SHARE: Final = 100
END_S: Final = 20.0  # it gives itself ten to end the lab's processes
_ROOT: Final = Path(__file__).resolve().parents[2]
_FLAGS: Final = ("-std=c11", "-O2", "-D_GNU_SOURCE")


def program() -> Path:
    """The emulator's executable. NetworkError: there is none and it can't be compiled."""
    installed = Path(__file__).with_name(PROGRAM)
    if installed.exists():
        return installed
    sources = sorted((_ROOT / "native" / "netlab").glob("*.[ch]"))
    if not sources:
        raise NetworkError(f"{installed} is missing, and there are no sources to build it from: install pyccl again")
    digest = hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    built = _ROOT / "build" / "netlab" / f"{PROGRAM}-{digest}"
    if not built.exists():
        _compile([source for source in sources if source.suffix == ".c"], built)
    return built


def _compile(sources: Sequence[Path], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    compiler = shlex.split(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:  # two may build at once
        made = Path(scratch) / PROGRAM
        try:
            done = subprocess.run(
                [*compiler, *_FLAGS, *map(str, sources), "-o", str(made)], capture_output=True, text=True, check=False
            )
        except FileNotFoundError as error:
            raise NetworkError(f"the line emulator needs a C compiler: {compiler[0]} not found") from error
        if done.returncode != 0:
            raise NetworkError(f"the line emulator does not compile: {done.stderr.strip()}")
        made.replace(target)


@dataclass(frozen=True, slots=True)
class HostCount:
    """IP packets and bytes of a line: tx came from its host or LAN, rx was delivered to it.

    unroutable: to nobody here. refused: it was cut. overrun: frames that its device dropped, since the emulator did not
    read in time.
    """

    tx_packets: int
    tx_bytes: int
    rx_packets: int
    rx_bytes: int
    unroutable: int
    refused: int
    overrun: int = 0


@dataclass(frozen=True, slots=True)
class PipeCount:
    """What a direction of a line let in, and what its full queue dropped."""

    name: str
    packets: int
    bytes: int
    dropped: int


@dataclass(frozen=True, slots=True)
class RouteCount:
    """From one line to another, by number: drawn as lost, and dropped by the queue of a flow's cap."""

    source: int
    target: int
    lost: int
    capped: int


@dataclass(frozen=True, slots=True)
class Counts:
    """Since the lab was built. hosts: of each line, `Scenario.sites` in order.

    late: packets that were delivered more than 1 ms after their time; it says whether this machine kept up.
    cpu_s: of the emulator; the kernel's work on what it delivers is in it.
    realtime: it runs before all ordinary processes.
    """

    hosts: tuple[HostCount, ...]
    pipes: tuple[PipeCount, ...]
    routes: tuple[RouteCount, ...]
    delivered: int
    late: int
    late_mean_ns: int
    late_max_ns: int
    cpu_s: float
    realtime: bool

    @property
    def lost(self) -> int:
        return sum(route.lost for route in self.routes)

    @property
    def dropped(self) -> int:
        """By queues."""
        return sum(pipe.dropped for pipe in self.pipes) + sum(route.capped for route in self.routes)

    @property
    def overrun(self) -> int:
        return sum(host.overrun for host in self.hosts)

    def punctuality(self) -> str:
        """Whether the machine kept up with the lines, in a sentence."""
        latest_ms = self.late_max_ns / 1e6
        told = f"{self.late} of {self.delivered} packets more than 1 ms late, the latest {latest_ms:.1f} ms"
        if self.overrun:
            told += f", {self.overrun} frames lost since the emulator had no time to read them"
        return told if self.realtime else f"{told}; the emulator has no real-time priority here"


@dataclass(frozen=True, slots=True)
class Addresses:
    """That packets to a site have. ipv6: its /64, as "2a0e:78:0:1::". "": none."""

    ipv4: str
    ipv6: str = ""

    def __str__(self) -> str:
        """In the emulator's words."""
        return f"{self.ipv4 or '-'} {self.ipv6 or '-'}"


class Emulator:
    """The running process. It ends when this one does, and ends the processes in its namespaces then."""

    def __init__(
        self, scenario: Scenario, devices: Sequence[int], addresses: Sequence[Addresses], namespaces: Sequence[int]
    ) -> None:
        """devices, addresses: a TUN descriptor and what it has of each site. namespaces: inode numbers.

        Raises:
            NetworkError: it does not start.
        """
        self._pipes: dict[str, int] = {}
        config = "\n".join(self._config(scenario, devices, addresses, namespaces))
        self._process = subprocess.Popen(
            [str(program())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            pass_fds=devices, start_new_session=True,
        )  # fmt: skip
        try:
            if self._ask(config) != "ready\n":
                raise self._failure()
        except BaseException:
            self._process.kill()
            self._process.communicate()
            raise

    def _config(
        self, scenario: Scenario, devices: Sequence[int], addresses: Sequence[Addresses], namespaces: Sequence[int]
    ) -> list[str]:
        ranks = [site[0] for site in scenario.sites]
        numbers = range(len(ranks))
        pairs = [(a, b) for a in numbers for b in numbers if a != b]
        routes = {(a, b): scenario.route(ranks[a], ranks[b]) for a, b in pairs}
        shortest_ns = min(scenario.delay_ns(ranks[a], ranks[b]) for a, b in pairs)
        grain_ns = min(max(shortest_ns // GRAIN_SHARE, GRAIN_NS[0]), GRAIN_NS[1])
        lines = [f"seed {scenario.seed}", f"grain {grain_ns}"]
        lines += [f"namespace {inode}" for inode in namespaces]
        lines += [f"host {fd} {own}" for fd, own in zip(devices, addresses, strict=True)]
        for steps in routes.values():
            for step in steps:
                if isinstance(step, Pipe) and step.name not in self._pipes:
                    self._pipes[step.name] = len(self._pipes)
                    lines.append(f"pipe {step.line.rate} {step.line.queue_ns}")
        lines += [f"route {a} {b} {' '.join(map(self._word, steps))}" for (a, b), steps in routes.items()]
        return [*lines, "start"]

    def _word(self, step: Step) -> str:
        if isinstance(step, Pipe):
            return f"p{self._pipes[step.name]}"
        if isinstance(step, Delay):
            return f"d{step.ns}"
        if isinstance(step, Loss):
            return f"l{step.share!r}"
        assert isinstance(step, Cap)
        return f"f{step.line.rate}:{step.line.queue_ns}"

    def _ask(self, text: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(text + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return ""
        return self._process.stdout.readline()

    def _failure(self) -> NetworkError:
        self._process.kill()
        return NetworkError(f"the line emulator ended: {self._process.communicate()[1].strip()}")

    def change(self, site: int, addresses: Addresses) -> None:
        """From now on it has these. NetworkError: the emulator has ended."""
        if self._ask(f"address {site} {addresses}") != "changed\n":
            raise self._failure()

    def counts(self) -> Counts:
        """NetworkError: it has ended."""
        line = self._ask("stats")
        if not line:
            raise self._failure()
        told: dict[str, Any] = json.loads(line)
        return Counts(
            hosts=tuple(HostCount(**host) for host in told["hosts"]),
            pipes=tuple(PipeCount(name, **pipe) for name, pipe in zip(self._pipes, told["pipes"], strict=True)),
            routes=tuple(RouteCount(way["from"], way["to"], way["lost"], way["capped"]) for way in told["routes"]),
            **{name: told[name] for name in ("delivered", "late", "late_mean_ns", "late_max_ns", "cpu_s", "realtime")},
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        """It kills what is in its namespaces and ends. NetworkError: it could not."""
        try:
            _, errors = self._process.communicate(timeout=END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            _, errors = self._process.communicate()
        if self._process.returncode != 0:
            raise NetworkError(f"the line emulator ended with {self._process.returncode}: {errors.strip()}")
