"""A peer of ``pyccl bench topology``: equal shares, an equal ring, then optimize_topology and what its plan brings."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import trio

import pyccl
from pyccl._io.address import parse_address
from pyccl._io.ask import ask_status
from pyccl.bench.control import Control
from pyccl.bench.figures import NS
from pyccl.bench.reduce_peer import start_together

CONNECT_TIMEOUT_S: Final = 60.0
OPERATION_TIMEOUT_S: Final = 80.0
EQUAL_DIRECT, EQUAL_RING, PLANNED = "equal direct", "equal ring", "planned"


@dataclass(frozen=True, slots=True)
class Settings:
    """What the owner tells a peer."""

    master: str
    world: int
    size_bytes: int
    iterations: int
    warmup: int
    coded: bool
    ahead_ns: int


def run(settings: Settings, control: Control) -> None:
    """Join the others, measure, report."""
    control.say("ready")
    control.wait("go")
    comm = pyccl.Communicator(settings.master)
    comm.connect(CONNECT_TIMEOUT_S, CONNECT_TIMEOUT_S)
    with comm:
        while comm.group_world_size < settings.world:
            comm.update_topology(OPERATION_TIMEOUT_S)
        x = np.full(settings.size_bytes // 4, comm.members.index(comm.peer_id), np.float32)
        systems = {
            EQUAL_DIRECT: _reduced(comm, x, settings, control, "direct"),
            EQUAL_RING: _reduced(comm, x, settings, control, "ring"),
        }
        begun_ns = time.monotonic_ns()
        comm.optimize_topology(OPERATION_TIMEOUT_S)
        measured_s = (time.monotonic_ns() - begun_ns) / NS
        systems[PLANNED] = _reduced(comm, x, settings, control, "auto")
        comm.barrier(timeout=OPERATION_TIMEOUT_S)
        control.say("result", systems=systems, measured_s=measured_s, plans=_plans(settings.master))


def _reduced(
    comm: pyccl.Communicator, x: np.ndarray[Any, Any], settings: Settings, control: Control, algorithm: str
) -> dict[str, Any]:
    starts_ns, ends_ns, ran = [], [], ""
    for _ in range(settings.warmup + settings.iterations):
        control.say("beat")
        start_together(comm, settings.ahead_ns)
        starts_ns.append(time.monotonic_ns())
        ran = comm.all_reduce(
            x, op="avg", quantize="uint8" if settings.coded else None, algorithm=algorithm, timeout=OPERATION_TIMEOUT_S
        ).algorithm
        ends_ns.append(time.monotonic_ns())
        comm.barrier(timeout=OPERATION_TIMEOUT_S)
    return {"starts_ns": starts_ns[settings.warmup :], "ends_ns": ends_ns[settings.warmup :], "algorithm": ran}


def _plans(master: str) -> list[dict[str, Any]]:
    """What the master has logged of plans."""
    status = trio.run(ask_status, *parse_address(master))
    return [event for event in status["events"] if event["event"] == "plan_found"]
