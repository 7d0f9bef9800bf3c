"""Replicas of an optimizer as threads of this process, members of groups of one master; and what they did.

    with Replicas(address) as replicas:
        results = replicas.run(3, lambda comm, rank: ...)    # each in a thread, all members before it starts

Every wait is for another thread's event or result, or for what the master is about to tell.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import numpy as np

import pyccl

TIMEOUT_S: Final = 40.0
_GROUPS = itertools.count()

Array = np.ndarray[Any, Any]


class Replicas:
    """One peer group of its own. Ranks are in the order of peer ids."""

    def __init__(self, address: str) -> None:
        self.address, self.group = address, next(_GROUPS)
        self.comms: list[pyccl.Communicator] = []
        self._threads = ThreadPoolExecutor(16)

    def close(self) -> None:
        for comm in self.comms:
            comm.close()
        self._threads.shutdown()

    def communicator(self) -> pyccl.Communicator:
        """Not connected."""
        comm = pyccl.Communicator(self.address, group=self.group)
        self.comms.append(comm)
        return comm

    def members(self, count: int) -> list[pyccl.Communicator]:
        """All of one epoch, in rank order."""
        first, *others = [self.communicator() for _ in range(count)]
        first.connect(TIMEOUT_S)
        joins = {other: self.start(other.connect, TIMEOUT_S) for other in others}
        while first.group_world_size < count:
            inside = [other for other in others if other.peer_id in first.members]
            ended([joins[other] for other in inside])
            ended([self.start(comm.update_topology, TIMEOUT_S) for comm in (first, *inside)])
        ended(list(joins.values()))
        return sorted([first, *others], key=lambda comm: comm.peer_id)

    def start(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return self._threads.submit(call, *arguments)

    def run(self, count: int, train: Callable[[pyccl.Communicator, int], Any]) -> list[Any]:
        """train(comm, rank) by so many members at a time; their results in rank order."""
        return self.together(self.members(count), train)

    def together(
        self, comms: Sequence[pyccl.Communicator], call: Callable[[pyccl.Communicator, int], Any]
    ) -> list[Any]:
        return ended([self.start(call, comm, rank) for rank, comm in enumerate(comms)])


def ended(calls: Sequence[Future[Any]]) -> list[Any]:
    return [call.result(TIMEOUT_S) for call in calls]


def wait_pending(comm: pyccl.Communicator) -> None:
    """Until the master has told this member of a newcomer."""
    until = time.monotonic() + TIMEOUT_S
    while comm._pending_known == 0:
        assert time.monotonic() < until, "no newcomer"
        time.sleep(0.002)


def weights(seed: int = 0) -> dict[str, Array]:
    """Parameters of two layers, the same on all replicas."""
    rng = np.random.default_rng([seed, 77])
    return {"a.weight": rng.standard_normal((5, 3)).astype(np.float32), "b": rng.standard_normal(4).astype(np.float32)}


def move(params: dict[str, Array], seed: int, rank: int, step: int) -> None:
    """An inner step that depends on the weights, on who makes it and when."""
    rng = np.random.default_rng([seed, rank, step])
    for name in sorted(params):
        p = params[name]
        target = rng.standard_normal(p.shape)
        p[...] = (p - 0.05 * (p - target)).astype(p.dtype)


def bits(arrays: Any) -> dict[str, bytes]:
    return {name: np.asarray(array).tobytes() for name, array in arrays.items()}


def copied(arrays: Any) -> dict[str, Array]:
    return {name: np.array(array) for name, array in arrays.items()}
