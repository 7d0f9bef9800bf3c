"""Two communicators in this process; their calls meet in two threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Final, Self

import pyccl

TIMEOUT_S: Final = 60.0


class Pair:
    """comms: in rank order."""

    def __init__(self, address: str) -> None:
        self._threads = ThreadPoolExecutor(2)
        first, second = (pyccl.Communicator(address) for _ in range(2))
        first.connect(TIMEOUT_S)
        joined = self._threads.submit(second.connect, TIMEOUT_S)
        while first.group_world_size < 2:
            first.update_topology(TIMEOUT_S)
        joined.result(TIMEOUT_S)
        self.comms = sorted((first, second), key=lambda comm: comm.peer_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for comm in self.comms:
            comm.close()
        self._threads.shutdown()

    def both(self, call: Callable[[pyccl.Communicator, Any], Any], *arguments: Any) -> list[Any]:
        """call(comm, argument) on both members at a time; arguments in rank order."""
        calls = [self._threads.submit(call, *each) for each in zip(self.comms, arguments, strict=True)]
        return [call.result(TIMEOUT_S) for call in calls]

    def all_reduce(self, *arrays: Any, **keywords: Any) -> None:
        """In place on both."""
        self.both(lambda comm, x: comm.all_reduce(x, **keywords), *arrays)
