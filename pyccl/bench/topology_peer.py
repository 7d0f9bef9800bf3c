"""A peer of ``pyccl bench topology``: equal shares and an equal ring in turn, then the plan's."""

from __future__ import annotations

import time
from collections.abc import Mapping
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
OPTIMIZE_TIMEOUT_S: Final = 120.0
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
    timeout_s: float
    ahead_ns: int


def run(settings: Settings, control: Control) -> None:
    """Join the others, measure, report."""
    control.say("ready")
    control.wait("go")
    comm = pyccl.Communicator(settings.master)
    comm.connect(CONNECT_TIMEOUT_S, CONNECT_TIMEOUT_S)
    with comm:
        while comm.group_world_size < settings.world:
            comm.update_topology(settings.timeout_s)
        x = np.full(settings.size_bytes // 4, comm.members.index(comm.peer_id), np.float32)
        systems = _reduced(comm, x, settings, control, {EQUAL_DIRECT: "direct", EQUAL_RING: "ring"})
        begun_ns = time.monotonic_ns()
        comm.optimize_topology(OPTIMIZE_TIMEOUT_S)
        measured_s = (time.monotonic_ns() - begun_ns) / NS
        systems |= _reduced(comm, x, settings, control, {PLANNED: "auto"})
        comm.barrier(timeout=settings.timeout_s)
        told = _plans(settings.master)
        control.say("result", systems=systems, measured_s=measured_s, plans=told, epoch=comm.epoch)


def _reduced(
    comm: pyccl.Communicator, x: np.ndarray[Any, Any], settings: Settings, control: Control, systems: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """systems: name -> algorithm; each in turn."""
    told: dict[str, dict[str, Any]] = {name: {"starts_ns": [], "ends_ns": []} for name in systems}
    quantize = "uint8" if settings.coded else None
    for number in range(settings.warmup + settings.iterations):
        for name, algorithm in systems.items():
            control.say("beat")
            start_together(comm, settings.ahead_ns, settings.timeout_s)
            start_ns = time.monotonic_ns()
            info = comm.all_reduce(x, op="avg", quantize=quantize, algorithm=algorithm, timeout=settings.timeout_s)
            end_ns = time.monotonic_ns()
            if number >= settings.warmup:
                told[name]["starts_ns"].append(start_ns)
                told[name]["ends_ns"].append(end_ns)
            told[name]["algorithm"] = info.algorithm
            comm.barrier(timeout=settings.timeout_s)
    return told


def _plans(master: str) -> list[dict[str, Any]]:
    """What the master has logged of plans."""
    status = trio.run(ask_status, *parse_address(master))
    return [event for event in status["events"] if event["event"] == "plan_found"]
