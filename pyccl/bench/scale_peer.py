"""A member of ``pyccl bench scale``: reduces the same small tensor again and again, as fast as the others do."""

from __future__ import annotations

import gc
import resource
import time
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

import pyccl
from pyccl._io.address import parse_address
from pyccl.bench import wire
from pyccl.bench.control import Control

CONNECT_TIMEOUT_S: Final = 80.0
OPERATION_TIMEOUT_S: Final = 80.0
BEAT_OPERATIONS: Final = 50


@dataclass(frozen=True, slots=True)
class Settings:
    """What the owner tells a member."""

    master: str
    world: int
    size_bytes: int
    operations: int
    warmup: int


def run(settings: Settings, control: Control) -> None:
    """Join the others, reduce, report."""
    control.say("ready")
    control.wait("go")
    comm = pyccl.Communicator(settings.master)
    comm.connect(CONNECT_TIMEOUT_S, CONNECT_TIMEOUT_S)
    with comm:
        while comm.group_world_size < settings.world:
            control.say("beat")
            comm.update_topology(OPERATION_TIMEOUT_S)
        x = np.full(max(settings.size_bytes // 4, 1), comm.members.index(comm.peer_id), np.float32)
        for _ in range(1 + settings.warmup):  # from the first on all hold the mean, and an average of it is itself
            comm.all_reduce(x, op="avg", timeout=OPERATION_TIMEOUT_S)
        control.say("warm")
        control.wait("measure")
        report = _reduce(comm, x, settings, control)
        right = bool((x == (settings.world - 1) / 2).all())
        control.say("measured", **report, right=right)
        control.wait("end")
        control.say("done")


def _reduce(
    comm: pyccl.Communicator, x: np.ndarray[Any, Any], settings: Settings, control: Control
) -> dict[str, Any]:
    comm.barrier(timeout=OPERATION_TIMEOUT_S)  # all have been told
    to_master = wire.connected_to(*parse_address(settings.master))
    assert to_master, "no connection to the master"
    to_members = wire.sockets().tcp - to_master
    gc.collect()
    gc.disable()
    before = [wire.traffic(inodes) for inodes in (to_members, to_master)]
    used = resource.getrusage(resource.RUSAGE_SELF)
    returns_ns, payload = [time.monotonic_ns()], 0
    for number in range(settings.operations):
        info = comm.all_reduce(x, op="avg", timeout=OPERATION_TIMEOUT_S)
        returns_ns.append(time.monotonic_ns())
        payload += info.tx_bytes
        if number % BEAT_OPERATIONS == 0:
            control.say("beat")
    after = resource.getrusage(resource.RUSAGE_SELF)
    data, asked = (wire.traffic(ids) - was for ids, was in zip((to_members, to_master), before, strict=True))
    gc.enable()
    return {
        "returns_ns": returns_ns, "algorithm": info.algorithm, "connections": len(to_members),
        "cpu_s": after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime,
        "payload_tx_bytes": payload, "data_tx_bytes": data.tx_bytes, "control_tx_bytes": asked.tx_bytes,
    }  # fmt: skip
