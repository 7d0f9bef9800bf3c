"""The master's shell: receivers that do not read, and members that announce what they do not send."""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from pyccl._io import envelope, master_server
from pyccl._io.envelope import LONG_MAX
from pyccl._io.journal import Journal
from pyccl._io.master_server import TRIES_PER_LINE, MasterServer
from pyccl._proto import limits
from pyccl._proto.epoch import Address, AddressKind
from pyccl._proto.messages import (
    Alive,
    EpochCommit,
    EpochPropose,
    Heartbeat,
    Hello,
    Members,
    Observe,
    Punch,
    PunchAsk,
    Ready,
    Reflect,
    Reflected,
    Welcome,
)
from pyccl._proto.past import Past, Record

HANG_S = 60.0
BUFFER_BYTES = 4096  # of each socket: what a test makes wait, waits in the master
BEATS = 100


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        with trio.fail_after(HANG_S):
            await main()

    trio.run(limited)


class Served:
    """A master on loopback, and connections to it."""

    def __init__(self, port: int, open_: AsyncExitStack) -> None:
        self._port, self._open = port, open_
        self._last = 0

    async def connect(self) -> trio.SocketStream:
        sock = trio.socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        try:
            await sock.connect(("127.0.0.1", self._port))
        except BaseException:
            sock.close()
            raise
        return await self._open.enter_async_context(trio.SocketStream(sock))

    def ids(self) -> tuple[bytes, bytes]:
        self._last += 1
        return struct.pack(">QQ", 1, self._last), struct.pack(">QQ", 2, self._last)

    async def observer(self) -> trio.SocketStream:
        """Welcome."""
        stream = await self.connect()
        await stream.send_all(envelope.pack(Observe(limits.PROTOCOL_VERSION, "test", 0, *self.ids())))
        assert isinstance(await envelope.receive(stream), Welcome)
        assert isinstance(await envelope.receive(stream), Members)
        return stream

    async def founder(self, group: int) -> trio.SocketStream:
        """The one member of its group."""
        stream = await self.connect()
        hello = Hello(limits.PROTOCOL_VERSION, "test", group, *self.ids(), (Address("127.0.0.1", 1),))
        await stream.send_all(envelope.pack(hello))
        while True:
            message = await envelope.receive(stream)
            if isinstance(message, EpochPropose):
                await stream.send_all(envelope.pack(Ready(message.epoch.number, message.version)))
            if isinstance(message, EpochCommit):
                return stream


    async def reflected(self, peer: bytes, incarnation: bytes, host: str) -> Address:
        """What the master says of a connection of this peer's from this address of ours."""
        sock = trio.socket.socket()
        await sock.bind((host, 0))
        await sock.connect(("127.0.0.1", self._port))
        async with trio.SocketStream(sock) as stream:
            await stream.send_all(envelope.pack(Reflect(limits.PROTOCOL_VERSION, peer, incarnation)))
            told = await envelope.receive(stream)
        assert isinstance(told, Reflected)
        return Address(told.host, told.port, AddressKind.OBSERVED)


@asynccontextmanager
async def served(
    waiting_bytes_max: int = 1 << 30,
    waiting_all_bytes_max: int = 1 << 30,
    journal: Journal | None = None,
    connections_max: int = 4096,
) -> AsyncIterator[Served]:
    server = MasterServer(
        Past(b"R" * 16, 1 << 32), journal, 60.0, "test", needs_majority=True,
        waiting_bytes_max=waiting_bytes_max, waiting_all_bytes_max=waiting_all_bytes_max,
        connections_max=connections_max,
    )  # fmt: skip
    sock = trio.socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)  # of those that are accepted, too
    await sock.bind(("127.0.0.1", 0))
    sock.listen(128)
    async with AsyncExitStack() as open_, trio.open_nursery() as nursery:
        nursery.start_soon(server.serve, trio.SocketListener(sock))
        yield Served(sock.getsockname()[1], open_)
        nursery.cancel_scope.cancel()


async def beat_until_cut_off(stream: trio.SocketStream) -> None:
    """Each is answered, and no answer is read."""
    try:
        while True:
            await stream.send_all(envelope.pack(Heartbeat()) * BEATS)
    except trio.BrokenResourceError:
        pass


async def answered(stream: trio.SocketStream) -> None:
    await stream.send_all(envelope.pack(Heartbeat()))
    assert isinstance(await envelope.receive(stream), Alive)


def test_who_does_not_read_what_it_asks_for_is_cut_off_and_nobody_else() -> None:
    async def main() -> None:
        async with served(waiting_bytes_max=1 << 16) as master:
            other, greedy = await master.observer(), await master.observer()
            await beat_until_cut_off(greedy)
            await answered(other)
            await answered(await master.observer())

    run(main)


def test_a_connection_too_many_is_closed_and_who_is_there_stays() -> None:
    async def main() -> None:
        async with served(connections_max=4) as master:
            members = [await master.founder(group) for group in range(4)]
            for _ in range(20):
                stream = await master.connect()
                await stream.send_all(envelope.pack(Observe(limits.PROTOCOL_VERSION, "test", 0, *master.ids())))
                assert await stream.receive_some(1) == b""
            for stream in members:
                await answered(stream)
            await members[0].aclose()
            while True:  # it has not seen the end yet
                with contextlib.suppress(trio.BrokenResourceError, AssertionError):
                    await answered(await master.observer())
                    break

    run(main)


def test_when_all_together_do_not_read_too_much_the_one_with_most_is_cut_off() -> None:
    async def main() -> None:
        async with served(waiting_all_bytes_max=1 << 20) as master:
            modest, greedy = await master.observer(), await master.observer()
            for _ in range(20):  # what waits for it stays below the greedy one's
                await modest.send_all(envelope.pack(Heartbeat()) * BEATS)
            await beat_until_cut_off(greedy)
            for _ in range(20 * BEATS):
                assert isinstance(await envelope.receive(modest), Alive)
            await answered(modest)

    run(main)


def test_members_that_announce_long_messages_and_send_none_are_cut_off_from_the_oldest_on() -> None:
    async def main() -> None:
        async with served() as master:
            quiet = await master.founder(0)
            streams = [await master.founder(group) for group in range(1, LONG_MAX + 4)]
            for stream in streams:
                await stream.send_all(struct.pack(">I", limits.BODY_MAX_BYTES) + b"\x92")
                await answered(quiet)
            for stream in streams[:3]:
                assert await _ended(stream)
            await answered(quiet)

    run(main)


async def _ended(stream: trio.SocketStream) -> bool:
    try:
        while await stream.receive_some(1 << 16):
            pass
    except trio.BrokenResourceError:
        pass
    return True


def test_what_a_peer_was_told_of_its_connections_it_may_offer_to_punch_wherever_they_come_from() -> None:
    async def main() -> None:
        async with served() as master:
            me, other = master.ids(), master.ids()
            streams = [await master.connect() for _ in range(2)]
            for ids, stream in zip((me, other), streams, strict=True):
                await stream.send_all(envelope.pack(Hello(limits.PROTOCOL_VERSION, "test", 0, *ids)))
                assert isinstance(await envelope.receive(stream), Welcome)
            seen_as = await master.reflected(*me, "127.0.0.2")
            await streams[0].send_all(envelope.pack(Punch(other[0], (seen_as,), 0)))
            while not isinstance(asked := await envelope.receive(streams[1]), PunchAsk):
                pass
            assert asked == PunchAsk(me[0], 1)

    run(main)


def test_a_disk_that_stays_full_is_told_in_a_line_for_many_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(master_server, "WRITE_AGAIN_S", 0.0)
    caplog.set_level(logging.INFO, "pyccl.master")
    journal = Journal.open(tmp_path / "journal")
    journal.begin(Past(b"R" * 16, 1 << 32))
    append, failed = journal.append, 0

    def full(records: Sequence[Record]) -> None:
        nonlocal failed
        if failed <= TRIES_PER_LINE:
            failed += 1
            raise OSError(28, "No space left on device")
        append(records)

    monkeypatch.setattr(journal, "append", full)

    async def main() -> None:
        async with served(journal=journal) as master:
            await master.founder(0)

    run(main)
    journal.close()
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("journal_")]
    written = f"journal_written path={journal.path} tries={TRIES_PER_LINE + 2}"
    assert len([line for line in told if "path=" in line and "No space left" in line]) == 2 and written in told, told
