"""Each process in a network namespace of its own, all joined by a bridge in one more. Needs root, iproute2, nsenter.

    peer 3: eth0 (10.77.1.4) ── v3 ┐
    peer 4: eth0 (10.77.1.5) ── v4 ┼ bridge `hub`           bent:  eth0 ── v3 ┄ relay (bend.py) ┄ b3 ── c3 ─ hub
    master: eth0 (10.77.0.1) ── v0 ┘

The namespaces have no names and go with the last process in them (`processes.namespace`), whatever ended the harness.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Final

from pyccl.processes.namespace import Namespace, NetworkError, need_tools
from pyccl.stress.network import Bend, Line, Network

MASTER: Final = "master"
MASTER_PORT: Final = 48148
GUEST: Final = "guest"  # where our own sockets are
_PREFIX_BITS: Final = 16
_HOSTS: Final = 1 << 15
_NOBODY: Final = "02:00:00:00:00:01"  # a hardware address that no interface has


class NamespaceLine(Line):
    """One place and what leads to it."""

    def __init__(self, hub: Namespace, number: int, address: str) -> None:
        self.address = address
        self._hub, self._number = hub, number
        self._closed = False
        self._relay: subprocess.Popen[str] | None = None
        self.handover: threading.Thread | None = None
        self.inside = Namespace()
        hub.ip(
            f"link add name v{number} type veth peer name eth0 netns {self.inside.path}",
            f"link set v{number} master hub",
            f"link set v{number} up",
        )
        self.inside.ip(f"addr add {address}/{_PREFIX_BITS} dev eth0", "link set lo up", "link set eth0 up")

    def cut(self) -> None:
        if not self._closed:
            self._hub.ip(f"link set v{self._number} down")

    def mend(self) -> None:
        if not self._closed:
            self._hub.ip(f"link set v{self._number} up")

    def block(self, other: Line) -> None:
        if not self._closed:
            self.inside.ip(f"neigh replace {other.address} lladdr {_NOBODY} dev eth0 nud permanent")

    def unblock(self, other: Line) -> None:
        if not self._closed:
            self.inside.ip(f"neigh del {other.address} dev eth0")

    def bend(self, bend: Bend, seed: int) -> None:
        if self._closed:
            return
        n = self._number
        self._hub.ip(
            f"link add name b{n} type veth peer name c{n}",
            f"link set c{n} master hub",
            f"link set b{n} up",
            f"link set c{n} up",
        )
        arguments = [f"v{n}", f"b{n}", str(bend.delay_s), str(bend.loss), str(bend.bits_per_s), str(seed)]
        self._relay = subprocess.Popen(
            [*self._hub.command(), sys.executable, "-P", "-m", "pyccl.stress.bend", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self.handover = threading.Thread(target=self._hand_over, args=(self._relay,))
        self.handover.start()

    def _hand_over(self, relay: subprocess.Popen[str]) -> None:
        """The straight way goes on until the relay is there, and nobody waits for a process to start."""
        assert relay.stdout is not None
        if relay.stdout.readline() == "ready\n":
            self._hub.ip(f"link set v{self._number} nomaster")

    def straighten(self) -> None:
        """NetworkError: the relay ended by itself."""
        if self._relay is None or self.handover is None:
            return
        ended = self._relay.poll()
        self._relay.kill()
        self.handover.join()
        self._relay.communicate()
        self._relay = self.handover = None
        self._hub.ip(f"link del b{self._number}", f"link set v{self._number} master hub")
        if ended is not None:
            raise NetworkError(f"the relay of a bent line ended with {ended}")

    def close(self) -> None:
        if not self._closed:
            self.straighten()
            self._closed = True
            self._hub.ip(f"link del v{self._number}")
            self.inside.close()


class Namespaces(Network):
    """Raises NetworkError where there are no rights or no tools for it."""

    name, links = "namespaces", True

    def __init__(self) -> None:
        need_tools()
        self._lines: dict[str, NamespaceLine] = {}
        self._placed = 0
        self._hub = Namespace()
        try:
            self._hub.ip("link add name hub type bridge", "link set hub up")
            for child in (MASTER, GUEST):
                self.place(child)
        except BaseException:
            self.close()
            raise

    def master_options(self) -> Sequence[str]:
        return ["--listen", f"{self._lines[MASTER].address}:{MASTER_PORT}", "--insecure"]

    def place(self, child: str) -> Sequence[str]:
        line = self._lines.get(child)
        if line is None:
            number = self._placed
            self._placed += 1
            host = number % _HOSTS
            address = f"10.77.{host // 250}.{host % 250 + 1}"
            line = self._lines[child] = NamespaceLine(self._hub, number, address)
        return line.inside.command()

    def line(self, child: str) -> Line:
        return self._lines[child]

    def release(self, child: str) -> None:
        self._lines.pop(child).close()

    def enter(self) -> None:
        self._lines[GUEST].inside.enter()

    def close(self) -> None:
        for child in list(self._lines):
            with contextlib.suppress(NetworkError):  # the namespaces go in any case
                self.release(child)
        self._hub.close()
