"""Envelopes that dawdle: who announces a body and does not send it holds nothing for long."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MemoryReceiveStream, MemorySendStream, MockClock, memory_stream_one_way_pair

from pyccl._io import envelope
from pyccl._io.envelope import AHEAD_BYTES, BODY_S, LONG_BYTES, LONG_MAX
from pyccl._io.strangers import Places
from pyccl._proto.messages import Message, Status
from pyccl.errors import RemoteProtocolError

LONG = Status("x" * (2 * LONG_BYTES))


def run(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main, clock=MockClock(autojump_threshold=0))


async def drip(stream: MemorySendStream, data: bytes, pause_s: float) -> None:
    """One byte at a time."""
    for byte in data:
        await stream.send_all(bytes([byte]))
        await trio.sleep(pause_s)


def test_a_greeting_that_comes_byte_by_byte_is_given_up_with_its_place() -> None:
    async def main() -> None:
        send, receive = memory_stream_one_way_pair()
        places, got = Places(3, 10.0), []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip, send, envelope.pack(Status("x" * 100)), 1.0)
            with places.place():
                got.append(await envelope.receive(receive))
            assert not got and trio.current_time() - started == 10.0
            nursery.cancel_scope.cancel()

    started = 0.0

    async def timed() -> None:
        nonlocal started
        started = trio.current_time()
        await main()

    run(timed)


@pytest.mark.parametrize("message", [Status("short"), LONG], ids=["short", "long"])
def test_a_body_that_comes_byte_by_byte_is_an_error_after_its_time(message: Message) -> None:
    async def main() -> None:
        send, receive = memory_stream_one_way_pair()
        started = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip, send, envelope.pack(message), BODY_S / 8)
            with pytest.raises(RemoteProtocolError, match="did not come in time"):
                await envelope.receive(receive, places=envelope.long_places())
            assert trio.current_time() - started == pytest.approx(BODY_S * 1.5, abs=BODY_S / 8 + 1e-6)
            nursery.cancel_scope.cancel()

    run(main)


def test_a_crowd_that_announces_long_bodies_holds_so_many_and_keeps_nobody_from_sending_one() -> None:
    async def main() -> None:
        places, cut = envelope.long_places(), []
        announcement = struct.pack(">I", 4 * LONG_BYTES) + b"\x92"

        async def announce(number: int) -> None:
            send, receive = memory_stream_one_way_pair()
            await send.send_all(announcement)
            try:
                await envelope.receive(receive, places=places)
            except RemoteProtocolError:
                cut.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(LONG_MAX + 5):
                nursery.start_soon(announce, number)
                await trio.testing.wait_all_tasks_blocked()
            assert cut == [0, 1, 2, 3, 4], "the oldest make room"
            send, receive = memory_stream_one_way_pair()
            nursery.start_soon(send.send_all, envelope.pack(LONG))
            assert await envelope.receive(receive, places=places) == LONG
            assert cut == [0, 1, 2, 3, 4, 5]
            await _short_ones_take_no_place(places)
            assert cut == [0, 1, 2, 3, 4, 5]
            nursery.cancel_scope.cancel()

    run(main)


async def _short_ones_take_no_place(places: Places) -> None:
    send, receive = memory_stream_one_way_pair()
    for _ in range(10):
        await send.send_all(envelope.pack(Status("short")))
        assert await envelope.receive(receive, places=places) == Status("short")


def test_a_body_without_places_has_the_time_that_its_reader_gives() -> None:
    async def main() -> None:
        send, receive = memory_stream_one_way_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_late, send)
            assert await envelope.receive(receive) == Status("late")

    async def _late(send: MemorySendStream) -> None:
        data = envelope.pack(Status("late"))
        await send.send_all(data[:7])
        await trio.sleep(10 * BODY_S)
        await send.send_all(data[7:])

    run(main)


def test_an_end_inside_an_envelope_is_told_from_dawdling() -> None:
    async def ended(data: bytes) -> MemoryReceiveStream:
        send, receive = memory_stream_one_way_pair()
        await send.send_all(data)
        await send.aclose()
        return receive

    async def main() -> None:
        whole = envelope.pack(Status("x"))
        for cut in (2, 4, 6):
            with pytest.raises(RemoteProtocolError, match="ended inside"):
                await envelope.receive(await ended(whole[:cut]), places=envelope.long_places())
        assert await envelope.receive(await ended(b"")) is None

    run(main)


class CountingStream(trio.abc.ReceiveStream):
    """Gives what it has in parts of at most `most` bytes, as a socket would."""

    def __init__(self, data: bytes, most: int) -> None:
        self._data, self._most = data, most
        self.reads = 0

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        self.reads += 1
        size = min(self._most, len(self._data) if max_bytes is None else max_bytes)
        part, self._data = self._data[:size], self._data[size:]
        return part

    async def aclose(self) -> None: ...


@pytest.mark.parametrize("most", [1, 7, AHEAD_BYTES, 1 << 20])
def test_reading_ahead_gives_every_message_however_the_bytes_come(most: int) -> None:
    async def main() -> None:
        messages = [Status("x"), Status(""), LONG, Status("y" * AHEAD_BYTES), Status("z")]
        ahead = envelope.Ahead(CountingStream(b"".join(map(envelope.pack, messages)), most))
        for message in messages:
            assert await envelope.receive(ahead, places=envelope.long_places()) == message
        assert await envelope.receive(ahead) is None

    run(main)


def test_reading_ahead_takes_short_messages_that_have_come_together_in_one_read() -> None:
    async def main() -> None:
        stream = CountingStream(envelope.pack(Status("short")) * 10, 1 << 20)
        ahead = envelope.Ahead(stream)
        for _ in range(10):
            assert await envelope.receive(ahead) == Status("short")
        assert stream.reads == 1

    run(main)
