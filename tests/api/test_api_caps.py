"""max_upload and max_download of a communicator, however it is made: what they let through bounds time from below."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import pytest
import trio
from masters import started_master

import pyccl
from pyccl import aio

UPLOAD: Final = 500_000  # bytes a second
DOWNLOAD: Final = 1_000_000  # the two differ, so that neither can stand for the other
CAPS: Final = {"max_upload": "4mbit", "max_download": "8mbit"}
SIZE: Final = 400_000
BURST_S: Final = 0.05  # of the rate that may move at once; see throttle.c, and what link.c reads beyond
TIMEOUT_S: Final = 60.0


def connected(address: str) -> pyccl.Communicator:
    return pyccl.connect(address, timeout=TIMEOUT_S, **CAPS)


def made(address: str) -> pyccl.Communicator:
    comm = pyccl.Communicator(address, **CAPS)
    comm.connect(TIMEOUT_S)
    return comm


def uncapped(address: str) -> pyccl.Communicator:
    return pyccl.connect(address, timeout=TIMEOUT_S)


def in_turn(make: Callable[[str], pyccl.Communicator], address: str, *, first: bool) -> float:
    """A broadcast of each of two members; how long one's own took, within which all of it left and arrived."""
    data = np.zeros(SIZE, np.uint8)
    with make(address) as comm:
        while comm.group_world_size < 2:
            comm.update_topology(TIMEOUT_S)
        (partner,) = set(comm.members) - {comm.peer_id}
        roots = (comm.peer_id, partner) if first else (partner, comm.peer_id)
        infos = [comm.broadcast(data, root=root, timeout=TIMEOUT_S) for root in roots]
    return infos[0 if first else 1].seconds


async def connected_in_trio(address: str) -> float:
    async with aio.connect(address, timeout=TIMEOUT_S, **CAPS) as comm:
        return await in_turn_in_trio(comm)


async def made_in_trio(address: str) -> float:
    async with aio.Communicator(address, **CAPS) as comm:
        return await in_turn_in_trio(comm)


async def in_turn_in_trio(comm: aio.Communicator) -> float:
    data = np.zeros(SIZE, np.uint8)
    while comm.group_world_size < 2:
        await comm.update_topology(TIMEOUT_S)
    (partner,) = set(comm.members) - {comm.peer_id}
    mine, _ = [await comm.broadcast(data, root=root, timeout=TIMEOUT_S) for root in (comm.peer_id, partner)]
    return mine.seconds


WAYS: Final[dict[str, Callable[[str], float]]] = {
    "connect": lambda address: in_turn(connected, address, first=True),
    "Communicator": lambda address: in_turn(made, address, first=True),
    "aio.connect": lambda address: trio.run(connected_in_trio, address),
    "aio.Communicator": lambda address: trio.run(made_in_trio, address),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_more_leaves_or_comes_than_the_caps_allow(way: str) -> None:
    with started_master() as address, ThreadPoolExecutor(2) as threads:
        capped = threads.submit(WAYS[way], address)
        other = threads.submit(in_turn, uncapped, address, first=False)
        up_s, down_s = capped.result(2 * TIMEOUT_S), other.result(2 * TIMEOUT_S)
    assert up_s >= SIZE / UPLOAD - BURST_S
    assert down_s >= SIZE / DOWNLOAD - BURST_S  # its sender has no cap: it waits for a receiver that reads no faster
