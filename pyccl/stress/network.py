"""What stands between the processes of a run. Faults that cut or bend lines need a network whose `links` is true."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass

from pyccl.processes.namespace import NetworkError


@dataclass(frozen=True, slots=True)
class Bend:
    """What a line does to each frame, either way; 0: nothing.

    A frame is what the kernel hands over at once, up to 64 KiB of one connection: `loss` takes it whole.
    """

    delay_s: float = 0.0
    loss: float = 0.0
    bits_per_s: float = 0.0


class Line(abc.ABC):
    """Between one process and all others. After the process has ended nothing here has any effect."""

    address: str  # of the process

    @abc.abstractmethod
    def cut(self) -> None:
        """Both ways, until `mend`. Nobody is told."""

    @abc.abstractmethod
    def mend(self) -> None: ...

    @abc.abstractmethod
    def block(self, other: Line) -> None:
        """What this process sends to the other one is lost, until `unblock`; the other way goes on."""

    @abc.abstractmethod
    def unblock(self, other: Line) -> None: ...

    @abc.abstractmethod
    def bend(self, bend: Bend, seed: int) -> None:
        """Until `straighten`; one bend at a time."""

    @abc.abstractmethod
    def straighten(self) -> None: ...


class Network(abc.ABC):
    """Places for the master and the peers."""

    name: str
    links: bool  # every process has a line of its own, which can be cut

    @abc.abstractmethod
    def master_options(self) -> Sequence[str]:
        """Of pyccl-master: where it listens at first. Started again, it listens where it did."""

    @abc.abstractmethod
    def place(self, child: str) -> Sequence[str]:
        """Make a place for this child, unless it has one: what comes before its command, replaced by it (exec)."""

    @abc.abstractmethod
    def line(self, child: str) -> Line:
        """Of a child that has a place. Only with `links`."""

    @abc.abstractmethod
    def release(self, child: str) -> None:
        """It has ended and will not come back."""

    @abc.abstractmethod
    def enter(self) -> None:
        """Sockets that the calling thread opens from now on are on this network, on a line of their own."""

    @abc.abstractmethod
    def close(self) -> None: ...


class Loopback(Network):
    """All on 127.0.0.1; nothing is set up and nothing is left behind."""

    name, links = "loopback", False

    def master_options(self) -> Sequence[str]:
        return ["--listen", "127.0.0.1:0"]

    def place(self, child: str) -> Sequence[str]:
        return []

    def line(self, child: str) -> Line:
        raise NetworkError("loopback has no lines")

    def release(self, child: str) -> None:
        pass

    def enter(self) -> None:
        pass

    def close(self) -> None:
        pass
