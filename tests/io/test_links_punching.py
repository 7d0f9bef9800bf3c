"""When Links offers to punch: a master that tells where connections come from, and a peer that can't be dialed."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
import trio
from listeners import listen

from pyccl._io import envelope, links, punching
from pyccl._io.front import MasterAt
from pyccl._native.handles import Relay
from pyccl._proto.epoch import NO_ID, Address, Member
from pyccl._proto.messages import Reflect, Reflected

A, B = b"\1" * 16, b"\2" * 16
BRICKS = Address("127.0.0.1", 1)
HANG_S = 60.0


class Unlinked:
    """An engine that is given no connection."""

    def peer_add(self, peer: bytes) -> int:
        return 0

    def peer_remove(self, slot: int) -> None:
        return

    def conns(self, slot: int) -> int:
        return 0


async def reflect(stream: trio.SocketStream) -> None:
    async with stream:
        assert isinstance(await envelope.receive(stream), Reflect)
        host, port = stream.socket.getpeername()
        await stream.send_all(envelope.pack(Reflected(host, port)))
        with suppress(trio.BrokenResourceError):  # such connections are reset
            await stream.receive_some()


class Offered:
    """By A, to B; each from new ports."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[tuple[Address, ...]](math.inf)

    def note(self, to: bytes, endpoints: tuple[Address, ...], rtt_s: float) -> None:
        assert to == B
        self._send.send_nowait(endpoints)

    async def next(self) -> tuple[Address, ...]:
        return await self._receive.receive()


def run(main: Callable[[links.Links, Offered], Awaitable[None]], may: Callable[[], bool] = lambda: True) -> None:
    async def limited() -> None:
        offered = Offered()
        listener, master = await listen("127.0.0.1")
        outside = links.Outside(
            "never", MasterAt(master.host, master.port, None), addresses=lambda: (), is_behind_router=lambda: False,
            may_punch=may, offer=offered.note, ask_relay=lambda *_: None, round_trip_s=lambda _: None,
        )  # fmt: skip
        no_state: Any = None  # nobody asks for it
        events = links.LinkEvents(
            ready=lambda _: None, failed=lambda *_: None, refused=lambda *_: None, up=lambda _: None, state=no_state
        )
        engine: Any = Unlinked()
        me, other = (Member(peer, NO_ID, (BRICKS,)) for peer in (A, B))
        with trio.fail_after(HANG_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.serve_listeners, reflect, [listener])
                made = links.Links(NO_ID, me, engine, Relay(5.0), 1, nursery, events, outside=outside)
                made.open(1, [other])
                await main(made, offered)
                made.stop()
                nursery.cancel_scope.cancel()

    trio.run(limited)


def test_an_offer_that_nobody_takes_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(punching, "_IDLE_S", 0.01)

    async def main(made: links.Links, offered: Offered) -> None:
        assert len({await offered.next() for _ in range(3)}) == 3

    run(main)


def test_what_was_offered_before_the_master_came_back_is_offered_anew_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(punching, "_IDLE_S", math.inf)

    async def main(made: links.Links, offered: Offered) -> None:
        lost = await offered.next()
        made.master_is_back()
        assert await offered.next() != lost

    run(main)


def test_who_may_not_punch_yet_does_so_when_it_may() -> None:
    asked = 0

    def may() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2

    async def main(made: links.Links, offered: Offered) -> None:
        await offered.next()

    run(main, may)
