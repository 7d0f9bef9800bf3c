"""Simulated members that come and leave, one after the other, before ``pyccl bench memory`` looks at anything.

A master remembers who is out, so many at most: once that is full it must not grow any more, however many come and go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import trio

from pyccl._proto.member import State
from pyccl.bench.control import Control
from pyccl.bench.crowd import CHANGE_TIMEOUT_S, SimulatedMember

GROUP: Final = 1  # not that of the members who are watched
BEAT_EVERY: Final = 128


@dataclass(frozen=True, slots=True)
class Settings:
    """What the owner tells them."""

    master: str
    passers: int


async def _pass(master: str) -> None:
    """Found the group, leave it, and wait until the master has hung up."""
    entered = trio.Event()
    one = SimulatedMember(GROUP, lambda: entered.set() if one.machine.state is State.MEMBER else None)
    with trio.fail_after(CHANGE_TIMEOUT_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(one.run, master)
            await entered.wait()
            await one.leave()


async def _pass_all(settings: Settings, control: Control) -> None:
    for number in range(settings.passers):
        if number % BEAT_EVERY == 0:
            control.say("beat")
        await _pass(settings.master)


def run(settings: Settings, control: Control) -> None:
    """Come and leave so often."""
    control.say("ready")
    control.wait("go")
    trio.run(_pass_all, settings, control)
    control.say("done")
