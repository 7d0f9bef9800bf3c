"""Where the processes of a benchmark run: on loopback, or on the hosts of a lab of long lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from pyccl.netlab import Lab


class Places(Protocol):
    """By the name of a process."""

    interface: str  # that its address is on

    def address(self, name: str) -> str: ...
    def before(self, name: str) -> Sequence[str]:
        """What its command is put behind."""

    def environment(self, name: str) -> Mapping[str, str]: ...


class Loopback:
    """All of them."""

    host: Final = "127.0.0.1"
    interface: str = "lo"

    def address(self, name: str) -> str:
        return self.host

    def before(self, name: str) -> Sequence[str]:
        return ()

    def environment(self, name: str) -> Mapping[str, str]:
        return {}


class InLab:
    """Each on a host of a lab.

    Args:
        host_of: rank of the host that a process of this name runs on; of the master's too.
    """

    interface: str = Lab.interface_name

    def __init__(self, lab: Lab, host_of: Callable[[str], int]) -> None:
        self._lab, self._host_of = lab, host_of

    def address(self, name: str) -> str:
        return self._lab.addresses[self._host_of(name)]

    def before(self, name: str) -> Sequence[str]:
        return self._lab.before(self._host_of(name))

    def environment(self, name: str) -> Mapping[str, str]:
        return self._lab.environment(self._host_of(name))
