"""A peer of ``pyccl bench nat``: joins, reduces with the other one, says how they are connected."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

import numpy as np

import pyccl
from pyccl.bench.control import Control
from pyccl.bench.invited import invite

CONNECT_TIMEOUT_S: Final = 80.0
OPERATION_TIMEOUT_S: Final = 60.0
SETTLE_S: Final = 75.0  # for the first connection to be replaced by one of those that are expected
PAUSE_S: Final = 0.1  # between two looks


@dataclass(frozen=True, slots=True)
class Settings:
    """What the owner tells a peer. number: 0 or 1. paths: one of these it waits for. secure: the run is."""

    master: str
    number: int
    size_bytes: int
    paths: list[str]
    secure: bool


def run(settings: Settings, control: Control) -> None:
    """Join and reduce; again, if the connection is not of the kind that is expected, until it is or time is over."""
    steps = np.arange(max(settings.size_bytes // 4, 1), dtype=np.float32) % 1024  # whose sums are exact
    own, out = steps + settings.number, np.empty_like(steps)
    master = invite(settings.master) if settings.secure else settings.master
    control.say("ready")
    control.wait("go")
    start_s = time.monotonic()
    comm = pyccl.Communicator(master)
    comm.connect(CONNECT_TIMEOUT_S, CONNECT_TIMEOUT_S)
    with comm:
        while comm.group_world_size < 2:
            comm.update_topology(OPERATION_TIMEOUT_S)
        linked_s, first = time.monotonic(), comm.peers[0].path
        comm.all_reduce(own, out=out, timeout=OPERATION_TIMEOUT_S)
        reduced_s = time.monotonic()
        path, settled = first, np.zeros(1, np.float32)
        while settled[0] < 2:  # both know at once when both are content
            path = comm.peers[0].path
            content = path in settings.paths or time.monotonic() - start_s > SETTLE_S
            settled[0] = content
            comm.all_reduce(settled, timeout=OPERATION_TIMEOUT_S)
            if settled[0] < 2:
                time.sleep(PAUSE_S)
        comm.all_reduce(own, timeout=OPERATION_TIMEOUT_S)
        want = 2 * steps + 1
        wrong = int((out != want).sum() + (own != want).sum())
    control.say(
        "done", first=first, path=path, wrong=wrong, connect_s=linked_s - start_s, reduce_s=reduced_s - linked_s,
    )  # fmt: skip
