"""When Links offers to punch: a master that tells where connections come from, and a peer that can't be dialed."""

from __future__ import annotations

import math
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
import trio
from listeners import SEEN, listen
from waiting import until

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

    def next_nowait(self) -> tuple[Address, ...]:
        return self._receive.receive_nowait()


def run(main: Callable[[links.Links, Offered], Awaitable[None]], may: Callable[[], bool] = lambda: True) -> None:
    async def limited() -> None:
        offered = Offered()
        listener, master = await listen("127.0.0.1")
        outside = links.Outside(
            "never", MasterAt(master.host, master.port, None), seen=lambda: SEEN, is_behind_router=lambda: False,
            may_punch=may, offer=offered.note, ask_relay=lambda *_: None, round_trip_s=lambda _: None,
        )  # fmt: skip
        no_state: Any = None  # nobody asks for it
        events = links.LinkEvents(
            ready=lambda _: None, failed=lambda *_: None, refused=lambda *_: None, up=lambda _: None, state=no_state
        )
        engine: Any = Unlinked()
        me, other = (Member(peer, NO_ID, (BRICKS,), SEEN) for peer in (A, B))
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


def test_a_link_is_punched_so_often_and_then_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(punching, "_IDLE_S", 0.0)
    monkeypatch.setattr(links, "_BACKOFF_S", (0.0, 0.0))
    monkeypatch.setattr(links, "_PUNCH_EVERY_S", math.inf)
    asked = 0

    def may() -> bool:
        nonlocal asked
        asked += 1
        return True

    async def main(made: links.Links, offered: Offered) -> None:
        for _ in range(links._PUNCHES_BURST):
            await offered.next()
        tried = asked
        await until(lambda: asked > tried + 10)
        with pytest.raises(trio.WouldBlock):
            offered.next_nowait()

    run(main, may)


@pytest.mark.parametrize(("host", "began"), [("169.254.169.254", False), ("db.internal", False), ("127.0.0.1", True)])
def test_endpoints_that_are_no_address_of_the_peer_s_are_not_connected_to(
    host: str, began: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[bytes] = []
    monkeypatch.setattr(punching.Puncher, "begin", lambda _, peer, *rest: begun.append(peer))

    async def main(made: links.Links, offered: Offered) -> None:
        await offered.next()
        made.punch_begins(B, (BRICKS, Address(host, 22)), 0.0)
        assert begun == [B] * began

    run(main)


def test_a_port_that_refuses_is_tried_ever_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever port of its own host a peer names."""
    sleeps: list[float] = []
    enough = trio.CancelScope()

    async def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        if len(sleeps) == 6:
            enough.cancel()
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr(trio, "sleep", sleep)

    async def main() -> None:
        refusing, address = await listen("127.0.0.1")
        await refusing.aclose()
        async with trio.open_nursery() as nursery:
            unused: Any = None
            puncher = punching.Puncher(unused, unused, nursery, unused, unused)
            port = punching._Port(0, socket.AF_INET, address, unused)
            with enough:
                await puncher._connect(B, port, address)

    trio.run(main)
    assert sleeps == [punching._REFUSED_S * 2**n for n in range(6)]


def test_who_may_not_punch_yet_does_so_when_it_may() -> None:
    asked = 0

    def may() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2

    async def main(made: links.Links, offered: Offered) -> None:
        await offered.next()

    run(main, may)
