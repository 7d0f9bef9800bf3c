"""Links that go through a third member: three or four Links in one program, A knows no address of B that answers."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
import trio
from listeners import SEEN, listen
from waiting import until

from pyccl._io import envelope, links
from pyccl._native.handles import Relay
from pyccl._proto import limits
from pyccl._proto.epoch import Address, Member
from pyccl._proto.messages import PeerHello, PeerRefused, RelayHello

RUN = b"R" * 16
A, B, R, S = (bytes([n]) * 16 for n in (1, 2, 3, 4))  # A dials; R and S may relay
NAMES = {A: "A", B: "B", R: "R", S: "S"}


def incarnation(peer: bytes) -> bytes:
    return bytes(byte ^ 0xFF for byte in peer)


class HoldingEngine:
    """Keeps the connections it was given, for the test to speak over."""

    def __init__(self) -> None:
        self.held: dict[int, list[socket.socket]] = {}
        self.slots: dict[bytes, int] = {}

    def peer_add(self, peer: bytes) -> int:
        slot = self.slots[peer] = len(self.held)
        self.held[slot] = []
        return slot

    def peer_remove(self, slot: int) -> None:
        for sock in self.held.pop(slot):
            sock.close()

    def conn_add(self, slot: int, fd: int, keys: object = None) -> None:
        self.held[slot].append(socket.socket(fileno=fd))

    def conns(self, slot: int) -> int:
        return len(self.held.get(slot, []))

    def to(self, peer: bytes) -> socket.socket:
        (sock,) = self.held[self.slots[peer]]
        return sock

    def drop(self, peer: bytes) -> None:
        self.held[self.slots[peer]].pop().close()

    def close(self) -> None:
        for slot in list(self.held):
            self.peer_remove(slot)


class FullRelay(Relay):
    def pairs(self) -> int:
        return self.PAIRS_MAX


class Node:
    def __init__(self, peer: bytes) -> None:
        self.peer, self.engine = peer, HoldingEngine()
        self.ready: list[int] = []
        self.failed: list[int] = []
        self.life = trio.CancelScope()
        self.over = trio.Event()
        self.member: Member
        self.links: links.Links

    async def no_state(self, *_: object) -> None:
        raise AssertionError("nobody asked for it")

    async def live(self, relay: Relay, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        listener, address = await listen("127.0.0.1")
        self.member = Member(self.peer, incarnation(self.peer), (address,), SEEN)
        events = links.LinkEvents(
            ready=self.ready.append,
            failed=lambda version, who, why: self.failed.append(version),
            refused=lambda *_: None,
            up=lambda _: None,
            state=self.no_state,
        )
        engine: Any = self.engine
        with self.life:
            async with trio.open_nursery() as nursery:
                self.links = links.Links(RUN, self.member, engine, relay, 1, nursery, events)
                nursery.start_soon(trio.serve_listeners, self.links.accept, [listener])
                task_status.started()
        self.links.stop()
        self.engine.close()  # as a session does
        self.over.set()

    async def die(self) -> None:
        self.life.cancel()
        await self.over.wait()


async def relayed(a: Node, b: Node, relay: bytes) -> tuple[socket.socket, socket.socket]:
    """Both ends of the connection, once it goes through this relay and stands on both."""
    await until(lambda: a.links.relayed() == {B: relay} and b.engine.conns(b.engine.slots[A]) == 1)
    return a.engine.to(B), b.engine.to(A)


async def speak(one: socket.socket, other: socket.socket) -> None:
    """Both ways, more than buffers hold."""
    data = bytes(range(256)) * (1 << 14)

    async def send(sock: trio.SocketStream) -> None:
        await sock.send_all(data)

    async def receive(sock: trio.SocketStream) -> None:
        got = bytearray()
        while len(got) < len(data):
            part = await sock.receive_some(len(data) - len(got))
            assert part
            got += part
        assert got == data

    streams = [trio.SocketStream(trio.socket.from_stdlib_socket(sock.dup())) for sock in (one, other)]
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(send, stream)
                nursery.start_soon(receive, stream)
    for stream in streams:
        await stream.aclose()


async def ended(sock: socket.socket) -> None:
    with trio.fail_after(60):
        await trio.lowlevel.wait_readable(sock)
    with suppress(ConnectionResetError):
        assert sock.recv(1) == b""


@asynccontextmanager
async def nodes(*peers: bytes, **relays: Relay) -> AsyncIterator[list[Node]]:
    made = [Node(peer) for peer in peers]
    try:
        async with trio.open_nursery() as nursery:
            for node in made:
                await nursery.start(node.live, relays.get(NAMES[node.peer], Relay(5.0)))
            yield made
            nursery.cancel_scope.cancel()
    finally:
        for node in made:
            node.engine.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def walled(member: Member, port: int) -> Member:
    """As one knows it whose packets do not arrive there."""
    return replace(member, addresses=(Address("127.0.0.1", port),))


def open_all(made: list[Node], port: int) -> None:
    """One epoch; A and B have wrong addresses of each other."""
    apart = {A: B, B: A}
    for node in made:
        others = [other.member for other in made if other is not node]
        others = [walled(member, port) if member.peer == apart.get(node.peer) else member for member in others]
        node.links.open(1, others)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_RELAY_AFTER_S", 0.05)


def test_two_that_do_not_reach_each_other_speak_through_a_third() -> None:
    async def main() -> None:
        async with nodes(A, B, R) as made:
            a, b, r = made
            open_all(made, free_port())
            await until(lambda: all(node.ready == [1] for node in made))
            await speak(*await relayed(a, b, R))
            assert not a.failed and r.engine.conns(r.engine.slots[A]) == 1

    trio.run(main)


def one_of_two_relays(first_fails: Callable[[list[Node]], Awaitable[None]], **relays: Relay) -> None:
    """R can't, S can: A finds S, whichever it asks first."""

    async def main() -> None:
        async with nodes(A, B, R, S, **relays) as made:
            a, b, _, _ = made
            await first_fails(made)
            await speak(*await relayed(a, b, S))

    trio.run(main)


def test_a_relay_that_does_not_know_the_other_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_RELAY_S", 0.5)

    async def fail(made: list[Node]) -> None:
        a, b, r, s = made
        port = free_port()
        r.links.open(1, [a.member, s.member])
        s.links.open(1, [a.member, b.member, r.member])
        b.links.open(1, [a.member, s.member])
        a.links.open(1, [walled(b.member, port), r.member, s.member])

    one_of_two_relays(fail)


def test_a_relay_that_carries_all_that_it_can_is_passed_over() -> None:
    async def fail(made: list[Node]) -> None:
        open_all(made, free_port())

    one_of_two_relays(fail, R=FullRelay(5.0))


def test_when_the_relay_dies_another_takes_over() -> None:
    async def fail(made: list[Node]) -> None:
        a, b, r, s = made
        port = free_port()
        r.links.open(1, [a.member, b.member])
        b.links.open(1, [walled(a.member, port), r.member, s.member])
        a.links.open(1, [walled(b.member, port), r.member])
        ends = await relayed(a, b, R)
        s.links.open(1, [a.member, b.member])
        a.links.open(2, [walled(b.member, port), r.member, s.member])
        await until(lambda: a.ready == [1, 2])
        await r.die()
        for end in ends:
            await ended(end)
        for here, there in ((a, B), (a, R), (b, A), (b, R)):  # as their engines would
            here.engine.drop(there)
            here.links.conn_down(here.engine.slots[there], 0)

    one_of_two_relays(fail)


def test_a_direct_connection_takes_the_place_of_the_relayed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_DIRECT_AGAIN_S", 0.05)

    async def main() -> None:
        async with nodes(A, B, R) as made:
            a, b, _ = made
            port = free_port()
            open_all(made, port)
            ends = await relayed(a, b, R)

            async def forward(stream: trio.SocketStream) -> None:  # the wall has a door now
                await b.links.accept(stream)

            sock = trio.socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            await sock.bind(("127.0.0.1", port))
            sock.listen(5)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.serve_listeners, forward, [trio.SocketListener(sock)])
                for end in ends:
                    await ended(end)
                await until(lambda: not a.links.relayed() and b.engine.conns(b.engine.slots[A]) == 2)
                for node, other in ((a, B), (b, A)):
                    node.engine.held[node.engine.slots[other]].pop(0).close()  # as their engines would
                await speak(a.engine.to(B), b.engine.to(A))
                nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.mark.parametrize("gone", [A, B])
def test_a_relay_carries_nothing_for_whom_it_is_told_to_forget(gone: bytes) -> None:
    async def main() -> None:
        async with nodes(A, B, R) as made:
            a, b, r = made
            open_all(made, free_port())
            ends = await relayed(a, b, R)
            r.links.keep([peer for peer in (A, B) if peer != gone])
            for end in ends:
                await ended(end)

    trio.run(main)


def test_nothing_goes_through_a_relay_that_is_out_of_the_run() -> None:
    async def main() -> None:
        async with nodes(A, B, R) as made:
            a, b, _ = made
            open_all(made, free_port())
            _, end = await relayed(a, b, R)
            a.links.keep([B])
            await ended(end)
            await until(lambda: not a.links.relayed())

    trio.run(main)


def test_a_silent_connection_is_gone_around() -> None:
    async def main() -> None:
        async with nodes(A, B, R) as made:
            a, b, _ = made
            for node in made:
                node.links.open(1, [other.member for other in made if other is not node])
            await until(lambda: all(node.ready == [1] for node in made))
            slot = a.engine.slots[B]
            a.links.moved(walled(b.member, free_port()))
            a.links.silent(slot)
            await until(lambda: a.links.relayed() == {B: R})
            await until(lambda: b.engine.conns(b.engine.slots[A]) == 2)
            await speak(a.engine.held[slot][1], b.engine.held[b.engine.slots[A]][1])

    trio.run(main)


def test_a_relay_around_a_silence_is_given_up_for_a_new_direct_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_DIRECT_AGAIN_S", 0.05)

    async def main() -> None:
        async with nodes(A, B, R) as made:
            a, b, _ = made
            for node in made:
                node.links.open(1, [other.member for other in made if other is not node])
            await until(lambda: all(node.ready == [1] for node in made))
            ends = [(node.engine, node.engine.slots[other]) for node, other in ((a, B), (b, A))]
            a.links.moved(walled(b.member, free_port()))
            a.links.silent(a.engine.slots[B])
            await until(lambda: a.links.relayed() == {B: R})
            a.links.moved(b.member)  # the first, the relayed and the new one: nobody takes them away here
            await until(lambda: all(engine.conns(slot) == 3 for engine, slot in ends) and not a.links.relayed())

    trio.run(main)


def test_who_wants_no_relay_is_none_either() -> None:
    async def main() -> None:
        async with nodes(A, B, R, S) as made:
            a, b, r, _ = made
            r.links._mode = "never"
            open_all(made, free_port())
            await speak(*await relayed(a, b, S))
            hello = RelayHello(limits.PROTOCOL_VERSION, RUN, A, incarnation(A), B, incarnation(B))
            (at,) = r.member.addresses
            async with await trio.open_tcp_stream(at.host, at.port) as stream:
                await stream.send_all(envelope.pack(hello))
                told = await envelope.receive(stream)
            assert isinstance(told, PeerRefused) and "relay='never'" in told.reason

    trio.run(main)


@pytest.mark.parametrize(
    ("hello", "answer"),
    [
        (RelayHello(limits.PROTOCOL_VERSION, RUN, A, incarnation(A), R, incarnation(R)), "somebody else"),
        (RelayHello(limits.PROTOCOL_VERSION, RUN, A, incarnation(A), A, incarnation(A)), "somebody else"),
        (RelayHello(limits.PROTOCOL_VERSION, b"r" * 16, A, incarnation(A), B, incarnation(B)), "somebody else"),
        (RelayHello(limits.PROTOCOL_VERSION + 1, RUN, A, incarnation(A), B, incarnation(B)), "protocol version"),
        (PeerHello(limits.PROTOCOL_VERSION, RUN, A, incarnation(A), B, incarnation(B)), "somebody else"),
        (RelayHello(limits.PROTOCOL_VERSION, RUN, A, incarnation(A), B, incarnation(B)), "does not reach it either"),
        (RelayHello(limits.PROTOCOL_VERSION, RUN, A, incarnation(A), B, incarnation(S)), ""),
        (RelayHello(limits.PROTOCOL_VERSION, RUN, A, incarnation(S), B, incarnation(B)), ""),
    ],
)
def test_a_relay_serves_members_alone(
    hello: RelayHello | PeerHello, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """answer: part of the reason; "": it hangs up, since these members may yet be told of."""
    monkeypatch.setattr(links, "_GREET_S", 0.1)

    async def main() -> None:
        async with nodes(R) as (r,):
            port = free_port()
            nowhere = (Address("127.0.0.1", port),)
            r.links.open(1, [Member(peer, incarnation(peer), nowhere, SEEN) for peer in (A, B)])
            (at,) = r.member.addresses
            async with await trio.open_tcp_stream(at.host, at.port) as stream:
                await stream.send_all(envelope.pack(hello))
                told = await envelope.receive(stream)
            if answer:
                assert isinstance(told, PeerRefused) and answer in told.reason
            else:
                assert told is None

    trio.run(main)
