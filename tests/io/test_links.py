"""Links against a fake engine: what foreign data and a late connection may do, and what not."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import trio
import waiting
from listeners import SEEN, listen

from pyccl._io import dialing, envelope, links
from pyccl._native.handles import Relay
from pyccl._proto import limits
from pyccl._proto.epoch import NO_ID, Address, Member
from pyccl._proto.messages import Path, PeerHello, PeerWelcome, StateHello
from pyccl.errors import UsageError

until = functools.partial(waiting.until, seconds=20.0)

RUN = b"R" * 16
ME = Member(b"\x01" * 16, b"a" * 16, seen=SEEN)
OTHER = b"\x02" * 16


class FakeEngine:
    """Counts connections; more than `most` of a link are refused as the engine refuses them."""

    def __init__(self, most: int = 64) -> None:
        self.most = most
        self.links: dict[int, int] = {}
        self.congestion_controls: list[bytes] = []  # of the connections that were handed over

    def peer_add(self, peer: bytes) -> int:
        slot = len(self.links)
        self.links[slot] = 0
        return slot

    def peer_remove(self, slot: int) -> None:
        del self.links[slot]

    def on_conn_add(self) -> None:
        """The engine has the connection, and an operation may end over it."""

    def conn_add(self, slot: int, fd: int, keys: object = None) -> None:
        with socket.socket(fileno=fd) as handed:
            name = handed.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        self.congestion_controls.append(name.rstrip(b"\0"))
        if self.links[slot] == self.most:
            raise UsageError("conn_add: too many")
        self.links[slot] += 1
        self.on_conn_add()

    def conns(self, slot: int) -> int:
        return self.links.get(slot, 0)


class Heard:
    def __init__(self) -> None:
        self.ready: list[int] = []
        self.failed: list[int] = []
        self.asked: list[StateHello] = []

    def events(self) -> links.LinkEvents:
        return links.LinkEvents(
            ready=self.ready.append,
            failed=lambda version, who, why: self.failed.append(version),
            refused=lambda *_: None,
            up=lambda *_: None,
            state=self.state,
        )

    async def state(self, stream: trio.SocketStream, hello: StateHello) -> None:
        self.asked.append(hello)


def make(engine: FakeEngine, heard: Heard, nursery: trio.Nursery) -> links.Links:
    engine_: Any = engine
    return links.Links(RUN, ME, engine_, Relay(5.0), 1, nursery, heard.events())


@contextlib.asynccontextmanager
async def met(engine: FakeEngine, heard: Heard) -> AsyncIterator[tuple[links.Links, Address]]:
    """Links that know of the other, and where they accept connections."""
    listener, address = await listen("127.0.0.1")
    async with trio.open_nursery() as nursery:
        made = make(engine, heard, nursery)
        made.open(1, [Member(OTHER, b"b" * 16)])
        nursery.start_soon(trio.serve_listeners, made.accept, [listener])
        yield made, address
        nursery.cancel_scope.cancel()


def answer(other: Member, engine: FakeEngine, listener: trio.SocketListener, nursery: trio.Nursery) -> None:
    """The other's links, which know of us."""
    engine_: Any = engine
    serving = links.Links(RUN, other, engine_, Relay(5.0), 1, nursery, Heard().events())
    serving.open(1, [ME])
    nursery.start_soon(trio.serve_listeners, serving.accept, [listener])


@contextlib.asynccontextmanager
async def greeting(
    address: Address, path: int = Path.DIRECT, via: bytes = NO_ID, sender: bytes = OTHER
) -> AsyncIterator[None]:
    """A connection of the other, which was welcome."""
    async with await trio.open_tcp_stream(address.host, address.port) as stream:
        hello = PeerHello(limits.PROTOCOL_VERSION, RUN, sender, b"b" * 16, ME.peer, ME.incarnation, path, via)
        await stream.send_all(envelope.pack(hello))
        assert isinstance(await envelope.receive(stream), PeerWelcome)
        yield


@pytest.mark.parametrize("host", ["a" * 64, "a..b", ".", "\u0640"])
def test_a_host_name_that_no_resolver_takes_is_a_failed_dial(host: str) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            made = make(FakeEngine(), Heard(), nursery)
            made.open(1, [Member(OTHER, b"b" * 16, (Address(host, 1),), SEEN)])
            await trio.sleep(0.3)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_connections_beyond_the_limit_cost_nobody_but_themselves() -> None:
    async def main() -> None:
        engine = FakeEngine(most=2)
        async with met(engine, Heard()) as (_, address):
            for _ in range(4):
                async with greeting(address):
                    pass
            await until(lambda: len(engine.congestion_controls) == 4)
            assert engine.conns(0) == 2

    trio.run(main)


def test_a_connection_s_path_is_known_before_an_operation_can_end_over_it() -> None:
    async def main() -> None:
        engine, seen = FakeEngine(most=3), []
        async with met(engine, Heard()) as (made, address):
            engine.on_conn_add = lambda: seen.append(made.paths()[OTHER])  # type: ignore[method-assign]
            ways = [(Path.RELAYED, b"r" * 16), (Path.RELAYED, b"s" * 16), (Path.DIRECT, NO_ID), (Path.DIRECT, NO_ID)]
            for count, way in enumerate(ways, 1):
                async with greeting(address, *way):
                    await until(lambda: len(engine.congestion_controls) >= count)  # noqa: B023  it is awaited here
            assert [(link.path, link.via) for link in seen] == ways[:3]

    trio.run(main)


def test_a_connection_that_is_not_taken_leaves_the_path_as_it_was() -> None:
    async def main() -> None:
        engine = FakeEngine(most=1)
        async with met(engine, Heard()) as (made, address):
            for count, via in enumerate((b"r" * 16, b"s" * 16), 1):
                async with greeting(address, Path.RELAYED, via):
                    await until(lambda: len(engine.congestion_controls) >= count)  # noqa: B023  it is awaited here
            assert made.paths()[OTHER].via == b"r" * 16

    trio.run(main)


def test_a_direct_connection_takes_the_place_of_a_punched_one_though_only_we_can_make_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other is the one who dials, and behind a firewall: without the punched one we would try after a while."""
    monkeypatch.setattr(links, "_REVERSE_S", math.inf)
    monkeypatch.setattr(links, "_GROW_S", 0.01)
    dialer = b"\x00" * 16

    async def main() -> None:
        engine, there = FakeEngine(), FakeEngine()
        listener, address = await listen("127.0.0.1")
        others, its = await listen("127.0.0.1")
        other = Member(dialer, b"b" * 16, (its,), SEEN)
        async with trio.open_nursery() as nursery:
            answer(other, there, others, nursery)
            made = make(engine, Heard(), nursery)
            made.open(1, [other])
            nursery.start_soon(trio.serve_listeners, made.accept, [listener])
            async with greeting(address, Path.PUNCHED, sender=dialer):
                await until(lambda: engine.conns(0) >= 2)
                assert made.paths()[dialer] == links.LinkPath(Path.DIRECT, NO_ID, 2)
                direct = made._peers[dialer].direct
                assert direct is not None
                direct.shutdown(socket.SHUT_RDWR)  # it goes, and the punched one stays: it is sought again
                engine.links[0] -= 1
                made.conn_down(0, 1)
                assert made.paths()[dialer].path == Path.PUNCHED
                await until(lambda: made.paths()[dialer].path == Path.DIRECT)
                made.grow(0, 4)  # what it did once it does again
                await until(lambda: engine.conns(0) >= 4)
            made.stop()
            nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_both_ends_of_a_loopback_connection_use_cubic(host: str) -> None:
    async def main() -> None:
        here, there, heard = FakeEngine(), FakeEngine(), Heard()
        listener, address = await listen(host)
        other = Member(OTHER, b"b" * 16, (address,), SEEN)
        async with trio.open_nursery() as nursery:
            answer(other, there, listener, nursery)
            make(here, heard, nursery).open(1, [other])
            await until(lambda: bool(here.congestion_controls and there.congestion_controls))
            nursery.cancel_scope.cancel()
        assert here.congestion_controls + there.congestion_controls == [b"cubic", b"cubic"]

    trio.run(main)


@pytest.mark.parametrize("dials", [True, False])
def test_a_link_grows_to_what_the_engine_asks_for_and_no_further(dials: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_GROW_S", 0.01)  # how long the side that does not dial leaves it to the other

    async def main() -> None:
        engine, there = FakeEngine(), FakeEngine()
        listener, address = await listen("127.0.0.1")
        other = Member(OTHER if dials else b"\x00" * 16, b"b" * 16, (address,), SEEN)
        async with trio.open_nursery() as nursery:
            answer(other, there, listener, nursery)
            made = make(engine, Heard(), nursery)
            made.open(1, [other])
            made.grow(0, 5)
            made.grow(0, 3)
            made.grow(7, 9)  # a link that is gone
            await until(lambda: engine.conns(0) >= 5)
            assert not made._peers[other.peer].dialing
            nursery.cancel_scope.cancel()
        assert engine.conns(0) == 5

    trio.run(main)


def test_a_link_that_comes_up_after_the_time_ran_out_is_reported_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "LINKS_TIMEOUT_S", 0.2)

    async def main() -> None:
        engine, heard = FakeEngine(), Heard()
        closed = socket.create_server(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        closed.close()
        async with trio.open_nursery() as nursery:
            made = make(engine, heard, nursery)
            made.open(7, [Member(OTHER, b"b" * 16, (Address("127.0.0.1", port),), SEEN)])
            await until(lambda: heard.failed, seconds=5)
            assert heard.ready == []

            async def accept(stream: trio.SocketStream) -> None:
                async with stream:
                    await envelope.receive(stream)
                    await stream.send_all(envelope.pack(PeerWelcome(limits.PROTOCOL_VERSION)))
                    await trio.sleep_forever()

            sock = trio.socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            await sock.bind(("127.0.0.1", port))
            sock.listen(5)
            nursery.start_soon(trio.serve_listeners, accept, [trio.SocketListener(sock)])
            await until(lambda: heard.ready, seconds=5)
            assert heard.ready == [7] and heard.failed == [7]
            nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.mark.parametrize("addresses", [1, 2])
def test_a_refused_connection_leaves_nothing_for_the_garbage_collector(addresses: int) -> None:
    """Members dial whoever has left: what that leaves would stay until the next full collection, which is rare."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # and nobody listens
        port = sock.getsockname()[1]

        async def main() -> None:
            try:
                await dialing.connect(replace(ME, addresses=(Address("127.0.0.1", port),) * addresses), ME)
            except ConnectionRefusedError:
                pass
            else:
                pytest.fail("it was not refused")

        gc.collect()
        gc.disable()
        try:
            trio.run(main)
            # Not isinstance: some objects of torch warn when asked for their class.
            left = [e for e in gc.get_objects() if type(e) is ConnectionRefusedError]
        finally:
            gc.enable()
        assert left == []
