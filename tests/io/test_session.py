"""What a session makes of a message that overtakes an event of its engine. No master, no thread of the session."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from pyccl import errors
from pyccl._io import tls
from pyccl._io.links import LinkEvents, Links
from pyccl._io.session import Session, SessionConfig
from pyccl._native._pyccl import lib
from pyccl._native.handles import Engine, EventType, Kind, Op, Relay, Spec
from pyccl._proto import limits
from pyccl._proto.epoch import NO_ID, Member, make_epoch
from pyccl._proto.member import MemberMachine
from pyccl._proto.messages import KIND_JOIN, KIND_LOSS, EpochCommit, Flush, Message, Welcome

IDS = tuple(bytes([n]) * 16 for n in (1, 2, 3))
MEMBERS = tuple(Member(peer, b"i" * 16, ()) for peer in IDS)
EPOCH = make_epoch(1, NO_ID, 1, MEMBERS)
AFTER = make_epoch(2, EPOCH.id, 1, MEMBERS[:2])
PATIENCE_S = 60.0
SETTLE_S = 0.05

FLUSH = Flush(1, EPOCH.number, AFTER.number, IDS[:2])
COMMIT = EpochCommit(AFTER, KIND_LOSS, (), "", 2, True)


@pytest.mark.parametrize(("up", "down", "most"), [(0, 0, 0), (8, 0, 4), (0, 6, 3), (8, 6, 3), (6, 8, 3)])
def test_what_is_relayed_has_half_of_the_lower_cap(up: int, down: int, most: int) -> None:
    assert SessionConfig("", 0, 0, None, "", max_upload=up, max_download=down).relay_max == most


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    """The first has a link to each of the others; they have none to each other."""
    engines = [Engine(peer, SETTLE_S, PATIENCE_S) for peer in IDS]
    for other, peer in zip(engines[1:], IDS[1:], strict=True):
        ours, theirs = socket.socketpair()
        engines[0].conn_add(engines[0].peer_add(peer), ours.detach())
        other.conn_add(other.peer_add(IDS[0]), theirs.detach())
    yield engines
    for engine in engines:
        engine.stop(lib.PYCCL_ERR_CLOSED)


def leave_the_run(engines: list[Engine]) -> None:
    """A barrier that the first has prepared and nobody else can: past its deadline its outcome can't be learned."""
    for rank, engine in enumerate(engines[1:], 1):
        engine.enter(EPOCH.number, EPOCH.id, IDS, rank, True, False, ())
    begun: list[Op] = []
    for engine in engines:
        engine.submit(Spec(Kind.BARRIER, lib.PYCCL_UINT8), None, None, PATIENCE_S, begun)
    until = time.monotonic() + PATIENCE_S
    while engines[0].blocked().lacking and time.monotonic() < until:
        pass
    begun[0].cancel()
    assert begun[0].wait(PATIENCE_S) == lib.PYCCL_ERR_OUTCOME_UNKNOWN


@pytest.mark.parametrize("message", [FLUSH, COMMIT], ids=["flush", "commit"])
def test_message_that_overtakes_the_engines_leave_finds_the_session_out_of_the_run(
    engines: list[Engine], message: Message
) -> None:
    async def go() -> None:
        session = Session(SessionConfig("127.0.0.1", 1, 0, None, "test"), IDS[0], MEMBERS[0].incarnation)
        machine = session._machine = MemberMachine(IDS[0], MEMBERS[0].incarnation, 0, (), "test")
        session.engine = engines[0]
        session._out, sent = trio.open_memory_channel[Message](100)
        nothing = LinkEvents(*[lambda *args: None] * 5)
        async with trio.open_nursery() as nursery:
            session._links = Links(b"r" * 16, MEMBERS[0], engines[0], Relay(5.0), 1, nursery, nothing)
            session._feed(machine.connected(0.0))
            session._feed(machine.receive(Welcome(limits.PROTOCOL_VERSION, "", b"r" * 16, 1, 50, False), 0.0))
            session._feed(machine.receive(EpochCommit(EPOCH, KIND_JOIN, (), "", 3, True), 0.0))
            leave_the_run(engines)
            before = sent.statistics().current_buffer_used
            session._feed(machine.receive(message, 0.0))
            assert sent.statistics().current_buffer_used == before, "a report, or an Entered"
            assert isinstance(session.error, errors.OutcomeUnknownError)
            assert session._scope.cancel_called
            events = engines[0].events()
            assert [e.type for e in events if e.type in (EventType.SETTLE, EventType.LEAVE)] == [
                EventType.SETTLE,
                EventType.LEAVE,
            ]

    trio.run(go)


def test_a_pulse_whose_handshake_is_swallowed_is_begun_anew(
    engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def go() -> None:
        session = Session(SessionConfig("127.0.0.1", 1, 0, None, "test"), IDS[0], MEMBERS[0].incarnation)
        machine = session._machine = MemberMachine(IDS[0], MEMBERS[0].incarnation, 0, (), "test")
        machine.connected(0.0)
        machine.receive(Welcome(limits.PROTOCOL_VERSION, "", b"r" * 16, 1, 50, False), 0.0)
        session.engine = engines[0]
        again, begun = trio.Event(), 0

        async def swallowed(host: str, port: int, credentials: object) -> trio.SocketStream:
            nonlocal begun
            begun += 1
            if begun == 2:
                again.set()
            await trio.sleep_forever()
            raise AssertionError

        monkeypatch.setattr(tls, "reach", swallowed)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session._pulse)
            with trio.fail_after(PATIENCE_S):
                await again.wait()
            nursery.cancel_scope.cancel()

    trio.run(go, clock=trio.testing.MockClock(autojump_threshold=0))
