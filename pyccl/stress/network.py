"""What stands between the processes of a run. Faults that cut or bend lines need a network whose `links` is true."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Network(Protocol):
    """Places for the master and the peers."""

    name: str
    links: bool  # every process has a line of its own, which can be cut

    def master_options(self) -> Sequence[str]:
        """Of pyccl-master: where it listens."""

    def command_of(self, child: str) -> Sequence[str]:
        """What comes before the command of this child, so that it runs in its place; replaced by it (exec)."""


class Loopback:
    """All on 127.0.0.1; nothing is set up and nothing is left behind."""

    name, links = "loopback", False

    def master_options(self) -> Sequence[str]:
        return ["--listen", "127.0.0.1:0"]

    def command_of(self, child: str) -> Sequence[str]:
        return []
