"""What a guest of a secure master may take there, what is left for others, and what the operator can take back."""

from __future__ import annotations

import contextlib
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TypeVar

import pytest
import trio
from test_tls import (
    ANN,
    BOB,
    HOST,
    INCARNATION,
    MASTER,
    RUN,
    VERSION,
    answer,
    hello,
    member,
    of,
    operator,
    reason,
    run,
    served,
)

from pyccl._io import agreement, envelope, tls
from pyccl._io.ask import ask
from pyccl._io.front import Reach
from pyccl._io.identity import Identity
from pyccl._io.journal import Journal
from pyccl._io.observer import Observer, ObserverConfig
from pyccl._io.statestore import StateStore
from pyccl._io.tls import Credentials, Ticket
from pyccl._native.handles import Relay
from pyccl._proto import limits
from pyccl._proto.epoch import Address
from pyccl._proto.messages import (
    Alive,
    Arrive,
    Done,
    EpochCommit,
    EpochPropose,
    Evicted,
    Kick,
    Leave,
    Message,
    Observe,
    PeerRefused,
    PeersAsk,
    PeerWelcome,
    Pulse,
    PulseKeys,
    Ready,
    Reflect,
    Reflected,
    Rejected,
    RelayAsk,
    RelayCall,
    RelayHello,
    Relays,
    Status,
    StatusAsk,
    Welcome,
)
from pyccl._proto.past import Past
from pyccl.errors import RejectedError

M = TypeVar("M", bound=Message)
WHOLE_S = 10.0  # peer_timeout of a relay, which is silent in no test


async def opened(port: int, who: Credentials, message: Message, stack: AsyncExitStack) -> tuple[tls.Line, Message]:
    """A connection that stays, and the answer to its first message."""
    line, told = await opened_or_not(port, who, message, stack)
    assert told is not None
    return line, told


async def opened_or_not(
    port: int, who: Credentials, message: Message, stack: AsyncExitStack
) -> tuple[tls.Line, Message | None]:
    line = await tls.reach(HOST, port, who)
    await stack.enter_async_context(tls.socket_of(line))
    await line.send_all(envelope.pack(message))
    return line, await envelope.receive(line)


async def received(line: tls.Line, kind: type[M]) -> M:
    """The next of this kind."""
    while not isinstance(message := await envelope.receive(line), kind):
        assert message is not None
    return message


async def is_over(line: tls.Line) -> bool:
    """Waits until it is."""
    with contextlib.suppress(trio.BrokenResourceError):
        while await line.receive_some(1 << 16):
            pass
    return True


def reflect(who: Credentials) -> Reflect:
    return Reflect(VERSION, who.peer, INCARNATION)


def test_an_identity_holds_so_many_connections_whatever_they_are_for_and_a_kick_ends_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(limits, "OTHERS_OF_IDENTITY_MAX", 5)

    async def main() -> None:
        async with served() as port, AsyncExitStack() as stack:
            me = of(ANN)
            control = await stack.enter_async_context(tls.socket_of(line := await member(port, me)))
            held = []
            for _ in range(5):
                reflecting, told = await opened(port, me, reflect(me), stack)
                assert isinstance(told, Reflected)
                held.append(reflecting)
            for more in (reflect(me), RelayHello(VERSION, RUN, me.peer, INCARNATION, bytes(16), bytes(16))):
                assert await answer(port, me, more) is None
            assert "5 connections of this identity" in caplog.text
            assert isinstance(await answer(port, of(BOB), hello(of(BOB), group=1)), Welcome)
            stranger, told = await opened(port, of(BOB), hello(of(BOB), group=1), stack)
            await held[0].aclose()
            while not isinstance(await answer(port, me, reflect(me)), Reflected):
                pass  # the master has not seen the end of it yet
            assert isinstance(await ask(HOST, port, operator(), Kick(me.peer)), Done)
            for reflecting in held[1:]:
                assert await is_over(reflecting)
            await received(line, Evicted)
            assert await is_over(control)
            await stranger.send_all(envelope.pack(Leave()))  # another's, which stands

    run(main)


def test_all_connections_of_an_identity_are_counted_those_too_that_say_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(limits, "CONNECTIONS_OF_IDENTITY_MAX", 4)

    async def main() -> None:
        async with served() as port, AsyncExitStack() as stack:
            for _ in range(4):
                await stack.enter_async_context(tls.socket_of(await tls.reach(HOST, port, of(ANN))))
            while await answer(port, of(ANN), StatusAsk(VERSION)) is not None:
                pass  # the master has not heard the last of them yet
            assert await answer(port, of(ANN), hello(of(ANN))) is None
            assert "4 connections of this identity" in caplog.text
            assert isinstance(await answer(port, of(BOB), hello(of(BOB))), Welcome)

    run(main)


def test_who_is_in_the_run_comes_back_where_its_identity_has_all_that_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that say nothing, as of those who reconnect, too, and a newcomer that has taken its place."""
    monkeypatch.setattr(limits, "CONNECTIONS_OF_IDENTITY_MAX", 5)
    monkeypatch.setattr(limits, "CONTROLS_OF_IDENTITY_MAX", 1)

    async def main() -> None:
        async with served() as port, AsyncExitStack() as stack:
            mine, other = peers_of(ANN, 2)
            lines = await epoch_of(port, [mine], stack)
            await tls.socket_of(lines[0]).aclose()
            while True:  # until the master has seen the end of it
                _, told = await opened_or_not(port, other, hello(other, group=1), stack)
                if told is not None:
                    break
            assert isinstance(told, Welcome)
            for _ in range(4):
                await stack.enter_async_context(tls.socket_of(await tls.reach(HOST, port, mine)))
            while await answer(port, other, reflect(other)) is not None:
                pass  # the master has not heard the last of them yet
            assert isinstance(await answer(port, mine, Pulse(VERSION, mine.peer, INCARNATION)), PulseKeys)
            assert isinstance(await answer(port, mine, hello(mine)), Welcome)
            late = Credentials(ANN, b"l" * 16, mine.ticket)
            for message in (hello(late), Pulse(VERSION, mine.peer, INCARNATION)):
                assert await answer(port, late, message) is None  # not in the run, and in another's name

    run(main)


def test_a_peer_holds_so_many_reflections_for_as_long_as_it_is_in_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REFLECTIONS_MAX", 3)

    async def main() -> None:
        async with served() as port, AsyncExitStack() as stack:
            me = of(ANN)
            control = await member(port, me)
            await stack.enter_async_context(tls.socket_of(control))
            held = [(await opened(port, me, reflect(me), stack))[0] for _ in range(3)]
            for _ in range(5):
                assert await answer(port, me, reflect(me)) is None
            await held.pop().aclose()
            while await answer(port, me, reflect(me)) is None:
                pass  # the master has not seen the end of it yet
            await control.send_all(envelope.pack(Leave()))
            for line in held:
                assert await is_over(line)

    run(main)


def test_an_operator_comes_in_where_guests_have_taken_every_place_and_makes_room() -> None:
    async def main() -> None:
        async with served(connections_max=4) as port, AsyncExitStack() as stack:
            me = of(ANN)
            await stack.enter_async_context(tls.socket_of(await member(port, me)))
            held = [(await opened(port, me, reflect(me), stack))[0] for _ in range(3)]
            for _ in range(2):
                assert await answer(port, of(BOB), hello(of(BOB))) is None
            for _ in range(6):  # more than there are places
                told = (await opened(port, operator(), PeersAsk(), stack))[1]
                assert isinstance(told, Status) and me.peer.hex() in told.json
            assert isinstance(await ask(HOST, port, operator(), Kick(me.peer)), Done)
            for line in held:
                assert await is_over(line)
            while not isinstance(await answer(port, of(BOB), hello(of(BOB))), Welcome):
                pass  # the last of them has not ended yet

    run(main)


def test_who_has_dropped_its_connection_is_kicked_all_the_same(tmp_path: Path) -> None:
    async def main() -> None:
        journal = Journal.open(tmp_path / "journal")
        journal.begin(Past(RUN, 1 << 32))
        ann, bob, observer = of(ANN), of(BOB), of(Identity.new())
        other = Credentials(ANN, b"z" * 16, Ticket(MASTER.public, ann.ticket.token))
        observe = Observe(VERSION, "test", 0, observer.peer, INCARNATION)
        async with served(journal=journal) as port, AsyncExitStack() as stack:
            (await member(port, ann)).transport_stream.socket.close()
            await opened(port, bob, hello(bob, group=1), stack)
            (await opened(port, observer, observe, stack))[0].transport_stream.socket.close()
            assert isinstance(await ask(HOST, port, operator(), Kick(ann.peer)), Done)
            for who in (ann, other):
                assert "kicked" in await reason(port, who)
            assert isinstance(await ask(HOST, port, operator(), Kick(observer.peer)), Done)
            assert "kicked" in await reason(port, observer, observe)
        async with served(journal=journal) as port:  # another master, to which it has not come back
            assert "kicked" in await reason(port, ann)
            assert isinstance(await ask(HOST, port, operator(), Kick(bob.peer)), Done)
            assert "kicked" in await reason(port, bob)
            with pytest.raises(RejectedError, match="no such peer"):
                await ask(HOST, port, operator(), Kick(other.peer))
        journal.close()

    run(main)


# ---- a master that relays


async def epoch_of(port: int, peers: list[Credentials], stack: AsyncExitStack) -> list[tls.Line]:
    """All of them in one, and their control connections."""
    first = await member(port, peers[0])
    lines = [first] + [(await opened(port, who, hello(who), stack))[0] for who in peers[1:]]
    await stack.enter_async_context(tls.socket_of(first))
    await first.send_all(envelope.pack(Arrive(1)))
    for line in lines:
        message = await received(line, EpochPropose)
        await line.send_all(envelope.pack(Ready(message.epoch.number, message.version)))
    for line in lines:
        assert len((await received(line, EpochCommit)).epoch.members) == len(peers)
    return lines


def relay_hello(one: Credentials, other: Credentials) -> RelayHello:
    return RelayHello(VERSION, RUN, one.peer, INCARNATION, other.peer, INCARNATION)


async def relayed(
    port: int, one: Credentials, other: Credentials, stack: AsyncExitStack, refused: list[Message | None] | None = None
) -> list[trio.SocketStream]:
    """Both ends of a pair; empty: it was refused. refused: what those were told."""
    ends: list[trio.SocketStream] = []

    async def come(who: Credentials, message: RelayHello) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            line = await tls.reach(HOST, port, who)
            await stack.enter_async_context(tls.socket_of(line))
            await line.send_all(envelope.pack(message))
            told = await envelope.receive(line)
            if isinstance(told, PeerWelcome):
                await tls.socket_of(line).send_all(envelope.pack(Alive()))
                ends.append(tls.socket_of(line))
            else:
                assert told is None or isinstance(told, PeerRefused | Rejected), told
                if refused is not None:
                    refused.append(told)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(come, one, relay_hello(one, other))
        nursery.start_soon(come, other, relay_hello(other, one))
    return ends


async def is_carried(ends: list[trio.SocketStream]) -> bool:
    with contextlib.suppress(trio.BrokenResourceError):
        await ends[0].send_all(b"x")
        return await ends[1].receive_some(1) == b"x"
    return False


def peers_of(identity: Identity, count: int) -> list[Credentials]:
    ticket = of(identity).ticket
    return [Credentials(identity, bytes([n]) * 16, ticket) for n in range(count)]


def test_what_a_relay_carries_ends_with_a_kick_and_what_others_have_goes_on() -> None:
    async def main() -> None:
        relay = Relay(WHOLE_S)
        async with served(relay=relay) as port, AsyncExitStack() as stack:
            ann, bob, carol = of(ANN), of(BOB), of(Identity.new())
            await epoch_of(port, [ann, bob, carol], stack)
            pairs = [await relayed(port, *two, stack) for two in ((ann, bob), (carol, ann), (bob, carol))]
            for ends in pairs:
                assert await is_carried(ends)
            assert isinstance(await ask(HOST, port, operator(), Kick(ann.peer)), Done)
            assert not await is_carried(pairs[0]) and not await is_carried(pairs[1])
            assert await is_carried(pairs[2]) and relay.pairs() == 1
            assert "does not relay" in str(await answer(port, bob, relay_hello(bob, ann)))

    run(main)


def test_a_guest_has_two_pairs_of_the_same_peers_and_leaves_a_relay_half_of_all() -> None:
    async def main() -> None:
        relay = Relay(WHOLE_S)
        async with served(relay=relay) as port, AsyncExitStack() as stack:
            mine, others = peers_of(ANN, 9), peers_of(BOB, 2)
            await epoch_of(port, mine + others, stack)
            for _ in range(4):
                assert await is_carried(await relayed(port, mine[0], mine[1], stack))
            assert relay.pairs() == 2
            refused: list[Message | None] = []
            for i, one in enumerate(mine):
                for other in mine[:i]:
                    await relayed(port, one, other, stack, refused)
            told = PeerRefused("this relay carries all that it can, or may of the same owner")
            assert refused and refused == [told] * len(refused) and len(refused) % 2 == 0  # both, before any Welcome
            assert relay.pairs() == Relay.PAIRS_MAX // 2
            one, other = mine[:2]
            assert await is_carried(await relayed(port, one, other, stack))  # in place of its own oldest
            assert await is_carried(await relayed(port, *others, stack))
            waits = of(Identity.new())  # is in no epoch
            await opened(port, waits, hello(waits), stack)
            assert "does not relay" in str(await answer(port, others[0], relay_hello(others[0], waits)))

    run(main)


def test_what_an_observer_relays_ends_with_a_kick(tmp_path: Path) -> None:
    async def main() -> None:
        told: list[str] = []
        async with served() as port, AsyncExitStack() as stack, trio.open_nursery() as nursery:
            ann, bob, relays = of(ANN), of(BOB), of(Identity.new())
            reach = Reach(listen=Address(HOST, 0))
            config = ObserverConfig(HOST, port, 7, 1, "test", relays, reach, relay_max=0)
            store = StateStore(tmp_path, 1)
            stack.callback(store.close)
            observer = Observer(config, store, told.append)
            lines = await epoch_of(port, [ann, bob], stack)
            nursery.start_soon(observer.run)
            while not (offered := await received(lines[0], Relays)).relays:
                pass
            (member_,) = offered.relays
            await lines[0].send_all(envelope.pack(RelayAsk(bob.peer, member_.peer)))
            assert await received(lines[1], RelayCall) == RelayCall(ann.peer, member_.peer)
            ends: list[trio.SocketStream] = []

            async def come(who: Credentials, other: Credentials) -> None:
                stream = await trio.open_tcp_stream(HOST, member_.addresses[0].port)
                await stack.enter_async_context(stream)
                await agreement.dial(stream, relay_hello(who, other), member_.peer, who)
                assert isinstance(await envelope.receive(stream), PeerWelcome)
                ends.append(stream)

            async with trio.open_nursery() as both:
                both.start_soon(come, ann, bob)
                both.start_soon(come, bob, ann)
            assert await is_carried(ends)
            assert isinstance(await ask(HOST, port, operator(), Kick(ann.peer)), Done)
            for stream in ends:
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some(1)
            nursery.cancel_scope.cancel()

    run(main)
