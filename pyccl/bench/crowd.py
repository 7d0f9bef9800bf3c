"""Many members in one process, for ``pyccl bench epoch``: real control connections and member machines, no engine.

What the engine and the links would answer is answered at once: links are there, operations are drained, a flush finds
OPERATIONS that run. So nearly all the time goes into the master, which is what is measured. A change of epoch comes to
all groups at the same moment: a member of each leaves, then a newcomer comes to each. And then to the first alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from pyccl._io import envelope
from pyccl._proto import limits, member
from pyccl._proto.epoch import Address
from pyccl._proto.member import MemberMachine, State
from pyccl._proto.messages import OpReport, OpState, Welcome
from pyccl.bench.control import Control
from pyccl.bench.figures import NS

CHANGES: Final = ("loss", "join", "loss_alone", "join_alone")
CHANGE_TIMEOUT_S: Final = 60.0
OPERATIONS: Final = 4  # that each member has open when another leaves
IDLE_S: Final = 0.1  # the master has used no processor time for so long: the change is over
TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
FIELDS_BEFORE_TIMES: Final = 11  # of /proc/PID/stat, after the name


@dataclass(frozen=True, slots=True)
class Settings:
    """What the owner tells the crowd."""

    master: str
    master_pid: int
    peers: int
    iterations: int


class SimulatedMember:
    """A member machine on a control connection."""

    def __init__(self, group: int, changed: Callable[[], None]) -> None:
        peer, incarnation = os.urandom(limits.ID_BYTES), os.urandom(limits.ID_BYTES)
        self.machine = MemberMachine(peer, incarnation, group, (Address("127.0.0.1", 1),), "bench")
        self.at_safe_point = False
        self._changed = changed
        self._out: bytearray = bytearray()
        self._stream: trio.SocketStream

    async def run(self, address: str, task_status: trio.TaskStatus[None]) -> None:
        """Until it has left; started when the master knows it."""
        host, port = address.rsplit(":", 1)
        async with await trio.open_tcp_stream(host, int(port)) as self._stream:
            self._perform(self.machine.connected(trio.current_time()))
            await self._flush()
            while (message := await envelope.receive(self._stream)) is not None:
                self._perform(self.machine.receive(message, trio.current_time()))
                await self._flush()
                if isinstance(message, Welcome):
                    task_status.started()
                self._changed()
                if self.machine.state is State.ENDED:
                    return

    async def arrive(self) -> None:
        self.at_safe_point = True
        self._perform(self.machine.arrive((), trio.current_time()))
        await self._flush()

    async def leave(self) -> None:
        self._perform(self.machine.leave(trio.current_time()))
        await self._flush()  # the master hangs up then

    async def _flush(self) -> None:
        data, self._out = bytes(self._out), bytearray()
        if data:
            await self._stream.send_all(data)

    def _perform(self, effects: list[member.Effect]) -> None:
        machine, now = self.machine, trio.current_time()
        for effect in effects:
            match effect:
                case member.Send(message):
                    self._out += envelope.pack(message)
                case member.OpenLinks(version, _, _):
                    self._perform(machine.links_ready(version, now))
                case member.SetCut(version, _):
                    self._perform(machine.drained(version, now))
                case member.Freeze(ballot):
                    ops = tuple(OpReport(0, 0, seq, OpState.RUNNING, 0) for seq in range(OPERATIONS))
                    self._perform(machine.frozen(ballot, ops, now))
                case member.Enter(epoch, _, _, _, _, _):
                    self._perform(machine.entered(epoch.number, now))
                case member.NeedCounts():
                    self._perform(machine.arrive((), now))
                case member.SafePointDone():
                    self.at_safe_point = False
                case member.Ended("evicted" | "rejected", reason):
                    raise RuntimeError(f"the master has ended a member: {reason}")


class _Crowd:
    def __init__(self, settings: Settings, nursery: trio.Nursery) -> None:
        self._settings, self._nursery = settings, nursery
        self._changed = trio.Event()
        self.groups: list[list[SimulatedMember]] = []

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def come(self, group: int) -> SimulatedMember:
        one = SimulatedMember(group, self._change)
        await self._nursery.start(one.run, self._settings.master)
        return one

    async def until(self, reached: Callable[[], bool]) -> None:
        with trio.fail_after(CHANGE_TIMEOUT_S):
            while not reached():
                await self._changed.wait()

    async def found(self, beat: Callable[[], None]) -> None:
        for group, size in enumerate(group_sizes(self._settings.peers)):
            self.groups.append([await self.come(group)])
            await self.until(lambda: self.groups[-1][0].machine.state is State.MEMBER)
            newcomers = [await self.come(group) for _ in range(size - 1)]
            await self._safe_point(group, newcomers)
            beat()

    async def _safe_point(self, group: int, newcomers: list[SimulatedMember]) -> None:
        members = self.groups[group]
        await self.until(lambda: all(one.machine.pending == len(newcomers) for one in members))
        for one in members:
            await one.arrive()
        members += newcomers
        await self.until(lambda: self._agreed(group))

    def _agreed(self, group: int) -> bool:
        """All are in the same epoch, which has nobody else, and at no safe point."""
        machines = [one.machine for one in self.groups[group]]
        first = machines[0].epoch
        if first is None or len(first.members) != len(machines):
            return False
        same = all(machine.epoch is not None and machine.epoch.id == first.id for machine in machines)
        return same and not any(one.at_safe_point for one in self.groups[group])

    async def lose_one_each(self, groups: int) -> None:
        """Of the first so many groups."""
        async with trio.open_nursery() as nursery:
            for members in self.groups[:groups]:
                nursery.start_soon(members.pop().leave)
        await self.until(lambda: all(self._agreed(group) for group in range(groups)))

    async def gain_one_each(self, groups: int) -> None:
        newcomers = [await self.come(group) for group in range(groups)]
        async with trio.open_nursery() as nursery:
            for group, newcomer in enumerate(newcomers):
                nursery.start_soon(self._safe_point, group, [newcomer])


def group_sizes(peers: int) -> list[int]:
    """As few groups as hold them, of about the same size."""
    count = -(-peers // limits.MEMBERS_MAX)
    return [peers // count + (group < peers % count) for group in range(count)]


def cpu_s(pid: int) -> float:
    """User and system time of a process, in steps of the kernel's clock tick (10 ms)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return sum(map(int, fields[FIELDS_BEFORE_TIMES : FIELDS_BEFORE_TIMES + 2])) / TICKS_PER_S


async def _until_idle(pid: int) -> None:
    before = -1.0
    while before != (before := cpu_s(pid)):  # noqa: ASYNC110  another process, which tells nobody
        await trio.sleep(IDLE_S)


async def _measure(settings: Settings, control: Control) -> dict[str, list[list[float]]]:
    figures: dict[str, list[list[float]]] = {name: [] for name in CHANGES}  # [iteration]: CPU of the master, wall; s
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        crowd = _Crowd(settings, nursery)
        await crowd.found(lambda: control.say("beat"))
        control.say("founded", groups=[len(members) for members in crowd.groups])
        for _ in range(settings.iterations):
            for name in CHANGES:
                change = crowd.gain_one_each if name.startswith("join") else crowd.lose_one_each
                await _until_idle(settings.master_pid)
                cpu, start_ns = cpu_s(settings.master_pid), time.monotonic_ns()
                await change(1 if name.endswith("alone") else len(crowd.groups))
                wall_s = (time.monotonic_ns() - start_ns) / NS
                await _until_idle(settings.master_pid)
                figures[name].append([cpu_s(settings.master_pid) - cpu, wall_s])
                control.say("beat")
    return figures


def run(settings: Settings, control: Control) -> None:
    """Found the groups, change their epochs, report."""
    control.say("ready")
    control.wait("go")
    control.say("done", figures=trio.run(_measure, settings, control))
