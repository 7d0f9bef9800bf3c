"""One member of the group that ``pyccl bench join``, ``sync`` and ``loss`` watch: a loop of small all-reduces.

Members look after each all-reduce whether somebody waits, and if so go to the safe point and synchronise the state.
Every completion of an all-reduce is recorded with its time; `churn` finds the pauses. The founders and those who come
later run the same code, as in a training script. Element 0 of the vector says who was told to stop: all see the sum,
so all stop after the same operation.
"""

from __future__ import annotations

import resource
import time
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

import pyccl
from pyccl.bench import wire
from pyccl.bench.content import content
from pyccl.bench.control import Control

CONNECT_TIMEOUT_S: Final = 60.0
BEAT_S: Final = 5.0
ALONE_S: Final = 0.001  # between two looks for a newcomer
STATUS: Final = Path("/proc/self/status")
STEADY_ROUNDS: Final = 20  # all-reduces without a change of membership after which a member calls itself steady


@dataclass(frozen=True, slots=True)
class Settings:
    """What the owner tells a member."""

    master: str
    founders: int  # size of the group to wait for; 0: comes later
    size_bytes: int  # of the vector that is reduced
    state_bytes: int
    seed: int  # of the state's content before the first sync
    data: str  # a kind of `content`
    leave_after: int  # all-reduces after which it leaves; 0: stays until told to stop
    timeout_s: float  # of a sync, and of all else


def run(settings: Settings, control: Control) -> None:
    """Join, synchronise, reduce until told to stop."""
    state = pyccl.SharedState({"state": content(settings.data, settings.seed, settings.state_bytes)})
    control.say("ready")
    control.wait("go")
    comm = pyccl.Communicator(settings.master)
    others = wire.sockets()
    started_ns = time.monotonic_ns()
    comm.connect(CONNECT_TIMEOUT_S, CONNECT_TIMEOUT_S)
    member_ns = time.monotonic_ns()
    with comm:
        while comm.group_world_size < settings.founders:
            comm.update_topology(settings.timeout_s)
        before_bytes = memory_bytes("VmRSS", STATUS.read_text(encoding="ascii"))
        cpu_s = _cpu_s()
        sync = comm.sync_shared_state(state, timeout=settings.timeout_s)
        synced_ns, cpu_s = time.monotonic_ns(), _cpu_s() - cpu_s
        control.say(
            "joined", started_ns=started_ns, member_ns=member_ns, synced_ns=synced_ns, rx_bytes=sync.rx_bytes,
            chunk_bytes=sync.chunk_bytes, packing=sync.packing, changed=len(sync.changed), holders=len(sync.holders),
            sync_s=sync.seconds, cpu_s=cpu_s, wire_rx_bytes=wire.traffic((wire.sockets() - others).tcp).rx_bytes,
        )  # fmt: skip
        ends_ns, served = _loop(comm, state, settings, control)
    peak_bytes = memory_bytes("VmHWM", STATUS.read_text(encoding="ascii"))
    control.say(
        "done", ends_ns=ends_ns.tolist(), served=served, digest=state.digest(), extra_bytes=peak_bytes - before_bytes,
    )  # fmt: skip


def memory_bytes(field: str, status: str) -> int:
    """A field of /proc/PID/status: VmRSS is what is resident now, VmHWM the most that ever was."""
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.removesuffix("kB")) << 10
    raise ValueError(f"/proc/self/status has no {field}")


def _loop(
    comm: pyccl.Communicator, state: pyccl.SharedState, settings: Settings, control: Control
) -> tuple[array[int], list[dict[str, float]]]:
    """Completion times of the all-reduces, and time, bytes sent and CPU time of each later sync."""
    ends_ns: array[int] = array("q")
    served: list[dict[str, float]] = []
    x = np.zeros(max(settings.size_bytes // 4, 1), np.float32)
    total = np.empty_like(x)
    world = changed_at = 0
    beat_ns = time.monotonic_ns()
    while True:
        x[0] = control.told("stop")
        try:
            comm.all_reduce(x, out=total, timeout=settings.timeout_s)
        except pyccl.AloneError:  # the only founder, while no newcomer is in
            np.copyto(total, x)
            time.sleep(ALONE_S)
        ends_ns.append(time.monotonic_ns())
        if comm.group_world_size != world:
            world = comm.group_world_size
            changed_at = len(ends_ns)
            control.say("world", members=world, at_ns=ends_ns[-1])
        if len(ends_ns) == changed_at + STEADY_ROUNDS:
            control.say("steady", members=world)
        if total[0] > 0 or len(ends_ns) == settings.leave_after:
            return ends_ns, served
        if ends_ns[-1] - beat_ns > BEAT_S * 1e9:
            beat_ns = ends_ns[-1]
            control.say("beat")
        if comm.are_peers_pending():
            comm.update_topology(settings.timeout_s)
            cpu_s = _cpu_s()
            sync = comm.sync_shared_state(state, timeout=settings.timeout_s)
            served.append({"at_ns": time.monotonic_ns(), "tx_bytes": sync.tx_bytes, "cpu_s": _cpu_s() - cpu_s})


def _cpu_s() -> float:
    """User and system time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
