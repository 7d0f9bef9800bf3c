"""Links of a secure run: members come in, also through a relay; strangers do not, and hold up nobody."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from listeners import SEEN, listen
from waiting import until

from pyccl._io import agreement, envelope, links
from pyccl._io.identity import Identity
from pyccl._io.tls import Credentials, Ticket
from pyccl._native.handles import Keys, Relay
from pyccl._proto import limits
from pyccl._proto.epoch import Address, Member
from pyccl._proto.messages import (
    Message,
    PeerHello,
    PeerOffer,
    PeerProof,
    PeerRefused,
    PeerWelcome,
    RelayHello,
    StateHello,
)
from pyccl.errors import RemoteProtocolError

RUN = b"R" * 16
HANG_S = 60.0
VECTORS = Path(__file__).resolve().parents[2] / "proto" / "vectors" / "frames.txt"
FRAMES = [
    bytes.fromhex(line.split()[2])
    for line in VECTORS.read_text(encoding="utf-8").splitlines()
    if line and line[0] != "#" and line.split()[1] == "ok"
]


def credentials() -> Credentials:
    return Credentials(Identity.new(), b"s" * 16, Ticket(bytes(32), b""))


CAST = sorted((credentials() for _ in range(3)), key=lambda one: one.peer)
ANN, BOB, RAY = CAST  # ann dials
EVE = credentials()


def incarnation(peer: bytes) -> bytes:
    return bytes(byte ^ 0xFF for byte in peer)


class Engine:
    """Keeps the connections and keys it was given."""

    def __init__(self) -> None:
        self.slots: dict[bytes, int] = {}
        self.held: dict[int, list[tuple[socket.socket, Keys | None]]] = {}

    def peer_add(self, peer: bytes) -> int:
        slot = self.slots[peer] = len(self.held)
        self.held[slot] = []
        return slot

    def peer_remove(self, slot: int) -> None:
        for sock, _ in self.held.pop(slot):
            sock.close()

    def conn_add(self, slot: int, fd: int, keys: Keys | None = None) -> None:
        self.held[slot].append((socket.socket(fileno=fd), keys))

    def conns(self, slot: int) -> int:
        return len(self.held.get(slot, []))

    def all(self) -> list[tuple[socket.socket, Keys | None]]:
        return [each for conns in self.held.values() for each in conns]


class Node:
    def __init__(self, who: Credentials, nursery: trio.Nursery, *, plain: bool = False) -> None:
        self.who, self.engine, self.nursery, self._plain = who, Engine(), nursery, plain

    async def start(self) -> Node:
        listener, self.address = await listen("127.0.0.1")
        self.member = Member(self.who.peer, incarnation(self.who.peer), (self.address,), SEEN)
        events = links.LinkEvents(
            ready=lambda _: None, failed=lambda *_: None, refused=lambda *_: None, up=lambda _: None, state=_no_state
        )
        engine: Any = self.engine
        self.links = links.Links(
            RUN, self.member, engine, Relay(5.0), 1, self.nursery, events, credentials=None if self._plain else self.who
        )
        self.nursery.start_soon(trio.serve_listeners, self.links.accept, [listener])
        return self

    def close(self) -> None:
        self.links.stop()
        self.drop_all()

    def drop_all(self) -> None:
        for slot in list(self.engine.held):
            self.engine.peer_remove(slot)


async def _no_state(stream: trio.SocketStream, hello: StateHello) -> None:
    raise AssertionError("nobody asked for it")


def run(main: Callable[[trio.Nursery], Awaitable[None]]) -> None:
    async def limited() -> None:
        with trio.fail_after(HANG_S):
            async with trio.open_nursery() as nursery:
                await main(nursery)
                nursery.cancel_scope.cancel()

    trio.run(limited)


def hello(from_: Credentials, to: Node) -> PeerHello:
    return PeerHello(
        *(limits.PROTOCOL_VERSION, RUN, from_.peer, incarnation(from_.peer)), to.who.peer, incarnation(to.who.peer)
    )


async def dialed(to: Node) -> trio.SocketStream:
    return await trio.open_tcp_stream(to.address.host, to.address.port)


def same(one: Keys | None, other: Keys | None) -> bool:
    return one is not None and other is not None and (one.tx, one.rx) == (other.rx, other.tx)


def test_members_agree_on_keys_that_are_others_on_each_connection() -> None:
    async def main(nursery: trio.Nursery) -> None:
        ann, bob = [await Node(who, nursery).start() for who in (ANN, BOB)]
        bob.links.open(1, [ann.member])
        ann.links.open(1, [bob.member])
        ann.links.grow(0, 3)
        await until(lambda: len(ann.engine.all()) == len(bob.engine.all()) == 3)
        for _, keys in ann.engine.all():
            assert sum(same(keys, others) for _, others in bob.engine.all()) == 1
        assert len({keys.tx for _, keys in ann.engine.all() if keys is not None}) == 3
        ann.close()
        bob.close()

    run(main)


def test_a_relay_gets_none_of_the_keys_and_carries_both_ends_to_each_other() -> None:
    async def main(nursery: trio.Nursery) -> None:
        ann, bob, ray = [await Node(who, nursery).start() for who in CAST]
        unreachable = [replace(each.member, addresses=(Address("127.0.0.1", 1),)) for each in (ann, bob)]
        ann.links.open(1, [unreachable[1], ray.member])
        bob.links.open(1, [unreachable[0], ray.member])
        ray.links.open(1, [ann.member, bob.member])
        await until(lambda: ann.links.relayed() == {BOB.peer: RAY.peer})
        await until(lambda: bob.engine.conns(bob.engine.slots[ANN.peer]) == 1)
        ((here, mine),) = ann.engine.held[ann.engine.slots[BOB.peer]]
        ((there, theirs),) = bob.engine.held[bob.engine.slots[ANN.peer]]
        assert same(mine, theirs)
        assert all(keys is not None and mine is not None and keys.tx not in (mine.tx, mine.rx)
                   for _, keys in ray.engine.all())  # fmt: skip
        here.sendall(b"through the relay")
        far = trio.SocketStream(trio.socket.from_stdlib_socket(there.dup()))
        assert await far.receive_some(17) == b"through the relay"
        await far.aclose()
        for node in (ann, bob, ray):
            node.close()

    run(main)


async def no_invite(to: Node, nursery: trio.Nursery) -> None:
    """A peer as of a plain run, that knows who is expected."""
    async with await dialed(to) as stream:
        await stream.send_all(envelope.pack(hello(ANN, to)) + envelope.pack(PeerWelcome(limits.PROTOCOL_VERSION)))
        assert await stream.receive_some() == b""


async def unknown_peer(to: Node, nursery: trio.Nursery) -> None:
    """With an identity, of whom the master has not told."""
    async with await dialed(to) as stream:
        try:
            assert isinstance(await agreement.dial(stream, hello(EVE, to), to.who.peer, EVE), str)
        except trio.BrokenResourceError:  # its offer was not even read
            return


async def wrong_key(to: Node, nursery: trio.Nursery) -> None:
    """As a member that it is not: it has all that the line shows."""
    async with await dialed(to) as stream:
        await agreement.dial(stream, hello(ANN, to), to.who.peer, EVE)  # the other proves itself first
        assert await stream.receive_some() == b""


async def replayed(to: Node, nursery: trio.Nursery) -> None:
    """What a member has sent once, from the first byte to the last."""
    said: list[bytes] = []
    async with await dialed(to) as stream:
        genuine = stream.send_all

        async def kept(data: bytes) -> None:
            said.append(data)
            await genuine(data)

        stream.send_all = kept  # type: ignore[method-assign,assignment]
        assert isinstance(await agreement.dial(stream, hello(ANN, to), to.who.peer, ANN), Keys)
        await until(lambda: len(to.engine.all()) == 1)
        to.drop_all()
        to.links._peers.clear()
        to.links.open(2, [Member(ANN.peer, incarnation(ANN.peer))])
    async with await dialed(to) as stream:
        await stream.send_all(b"".join(said))
        assert isinstance(await envelope.receive(stream), PeerOffer)
        assert isinstance(await envelope.receive(stream), PeerProof)
        assert await stream.receive_some() == b""


async def rubbish(to: Node, nursery: trio.Nursery) -> None:
    offer = envelope.pack(hello(ANN, to))
    for data in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00", b"\xff" * 100, offer + b"\0\0\0\5rubbish",
                 offer + envelope.pack(PeerOffer(bytes(32), 1))):  # fmt: skip
        async with await dialed(to) as stream:
            await stream.send_all(data)
            try:
                while await stream.receive_some():
                    pass
            except trio.BrokenResourceError:  # it is closed with unread bytes
                continue


async def another_run(to: Node, nursery: trio.Nursery) -> None:
    async with await dialed(to) as stream:
        told = PeerHello(
            *(limits.PROTOCOL_VERSION, b"Q" * 16, ANN.peer, incarnation(ANN.peer)),
            *(to.who.peer, incarnation(to.who.peer)),
        )
        await stream.send_all(envelope.pack(told))
        assert isinstance(await envelope.receive(stream), PeerRefused)


async def frames_in_clear(to: Node, nursery: trio.Nursery) -> None:
    """As the engine of a plain run would send them, with a greeting before them and without."""
    for start in (b"", envelope.pack(hello(ANN, to))):
        async with await dialed(to) as stream:
            with suppress(trio.BrokenResourceError):  # it is closed with unread bytes
                await stream.send_all(start + b"".join(FRAMES))
                assert await stream.receive_some() == b""


@pytest.mark.parametrize(
    "stranger",
    [no_invite, unknown_peer, wrong_key, replayed, rubbish, another_run, frames_in_clear],
    ids=lambda each: each.__name__,
)
def test_strangers_get_no_connection_and_members_do(
    stranger: Callable[[Node, trio.Nursery], Awaitable[None]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(links, "_GREET_S", 1.0)

    async def main(nursery: trio.Nursery) -> None:
        bob = await Node(BOB, nursery).start()
        bob.links.open(1, [Member(ANN.peer, incarnation(ANN.peer))])
        await stranger(bob, nursery)
        assert bob.engine.all() == []
        ann = await Node(ANN, nursery).start()
        ann.links.open(1, [bob.member])
        await until(lambda: len(ann.engine.all()) == len(bob.engine.all()) == 1)
        assert same(ann.engine.all()[0][1], bob.engine.all()[0][1])
        ann.close()
        bob.close()

    run(main)
    if stranger not in (unknown_peer, another_run):  # who waits in vain is no attacker
        assert "stranger_refused" in caplog.text


def test_strangers_who_say_nothing_or_stop_in_the_middle_take_nobodys_place(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def main(nursery: trio.Nursery) -> None:
        bob = await Node(BOB, nursery).start()
        bob.links.open(1, [Member(ANN.peer, incarnation(ANN.peer))])
        strangers = [await dialed(bob) for _ in range(600)]
        starts = b"", b"\0\0", envelope.pack(hello(ANN, bob)), envelope.pack(hello(EVE, bob))
        try:
            for number, stranger in enumerate(strangers):
                with suppress(trio.BrokenResourceError):  # it was put out to make room
                    await stranger.send_all(starts[number % len(starts)])
            ann = await Node(ANN, nursery).start()
            ann.links.open(1, [bob.member])
            await until(lambda: len(ann.engine.all()) == len(bob.engine.all()) == 1)
            assert len(bob.links._strangers._taken) <= links._STRANGERS_MAX
            assert len(bob.links._early._taken) <= links._EARLY_MAX
        finally:
            for stranger in strangers:
                await trio.aclose_forcefully(stranger)
        ann.close()
        bob.close()

    run(main)


def test_who_dials_a_stranger_in_a_members_place_hands_nothing_over() -> None:
    async def main(nursery: trio.Nursery) -> None:
        ann = await Node(ANN, nursery).start()
        met: list[str] = []
        listener, address = await listen("127.0.0.1")

        async def impostor(stream: trio.SocketStream) -> None:
            async with stream:
                greeting = await envelope.receive(stream)
                assert isinstance(greeting, PeerHello)
                try:
                    await agreement.accept(stream, greeting, ANN.peer, EVE)
                except RemoteProtocolError as e:
                    met.append(str(e))

        nursery.start_soon(trio.serve_listeners, impostor, [listener])
        ann.links.open(1, [Member(BOB.peer, incarnation(BOB.peer), (address,), SEEN)])
        await until(lambda: len(met) >= 3)  # it tries again and again
        assert ann.engine.all() == [] and set(met) == {"no PeerProof"}

    run(main)


# ---- some of the run are plain: they have the same ids of everything, as nobody has who does not lie


@asynccontextmanager
async def overheard(to: Node) -> AsyncIterator[tuple[Member, list[bytes]]]:
    """The node as it is dialed through a wire, and what its dialer has said there, by connection."""
    said: list[bytes] = []

    async def carry(near: trio.SocketStream) -> None:
        number = len(said)
        said.append(b"")

        async def there() -> None:
            with suppress(trio.BrokenResourceError):
                async for part in near:
                    said[number] += part
                    await far.send_all(part)
            both.cancel_scope.cancel()

        async def back() -> None:
            with suppress(trio.BrokenResourceError):
                async for part in far:
                    await near.send_all(part)
            both.cancel_scope.cancel()

        async with near, await dialed(to) as far, trio.open_nursery() as both:
            both.start_soon(there)
            both.start_soon(back)

    listener, address = await listen("127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, carry, [listener])
        yield replace(to.member, addresses=(address,)), said
        nursery.cancel_scope.cancel()


def messages(data: bytes) -> list[Message]:
    found = []
    while data:
        size = int.from_bytes(data[:4], "big")
        found.append(envelope.unpack_untrusted(data[4 : 4 + size]))
        data = data[4 + size :]
    return found


def test_a_secure_member_gives_nothing_to_one_that_wants_no_encryption(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def main(nursery: trio.Nursery) -> None:
        ann, bob = await Node(ANN, nursery).start(), await Node(BOB, nursery, plain=True).start()
        bob.links.open(1, [replace(ann.member, addresses=())])
        async with overheard(bob) as (there, said):
            ann.links.open(1, [there])
            await until(lambda: caplog.text.count("it wants no encryption") >= 2)  # it tries again and again
            assert ann.engine.all() == []
            for each in said:
                assert [type(message) for message in messages(each)] in ([], [PeerHello, PeerOffer])
        ann.close()
        bob.close()

    run(main)


def test_a_plain_member_gets_nothing_from_a_secure_one(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(links, "_GREET_S", 0.2)

    async def main(nursery: trio.Nursery) -> None:
        ann, bob = await Node(ANN, nursery, plain=True).start(), await Node(BOB, nursery).start()
        bob.links.open(1, [replace(ann.member, addresses=())])
        async with overheard(bob) as (there, said):
            ann.links.open(1, [there])
            await until(lambda: caplog.text.count("no answer") >= 2)
            assert ann.engine.all() == bob.engine.all() == []
            assert all([type(message) for message in messages(each)] in ([], [PeerHello]) for each in said)
        ann.close()
        bob.close()

    run(main)


@pytest.mark.parametrize("plain", ["relay", "members"])
def test_a_relay_of_the_other_kind_joins_nobody(
    plain: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(links, "_GREET_S", 0.2)
    monkeypatch.setattr(links, "_RELAY_S", 0.5)
    monkeypatch.setattr(links, "_RELAY_AFTER_S", 0.0)

    async def main(nursery: trio.Nursery) -> None:
        ann, bob, ray = [
            await Node(who, nursery, plain=(who is RAY) == (plain == "relay")).start() for who in CAST
        ]
        unreachable = [replace(each.member, addresses=(Address("127.0.0.1", 1),)) for each in (ann, bob)]
        async with overheard(ray) as (there, said):
            ray.links.open(1, [replace(ann.member, addresses=()), bob.member])
            ann.links.offered((there,))
            ann.links.open(1, [unreachable[1]])
            bob.links.open(1, [unreachable[0]])
            asked = f"relay_failed peer={BOB.peer.hex()[:8]} relay={RAY.peer.hex()[:8]}"
            refused = f"relay_refused peer={BOB.peer.hex()[:8]}"
            await until(lambda: caplog.text.count(asked) + caplog.text.count(refused) >= 2)
            assert not ann.links.relayed() and ann.engine.conns(ann.engine.slots[BOB.peer]) == 0
            assert bob.engine.all() == []
            kinds = [RelayHello, PeerOffer] if plain == "relay" else [RelayHello]
            assert all([type(message) for message in messages(each)] in ([], kinds) for each in said)
        for node in (ann, bob, ray):
            node.close()

    run(main)
