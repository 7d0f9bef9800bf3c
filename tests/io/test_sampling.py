"""How fast a connection to a master goes: what is measured, and that it costs the master and its members little."""

from __future__ import annotations

import contextlib
import logging
import math
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from test_links import until
from trio.testing import MockClock

from pyccl._io import envelope, sampling
from pyccl._io.identity import Identity
from pyccl._io.master_server import MasterServer
from pyccl._io.sampling import Sampler, measure, rate
from pyccl._io.tls import Credentials, Ticket
from pyccl._proto import limits
from pyccl._proto.messages import Alive, Heartbeat, Hello, Message, Rejected, Sample, Sampled, Welcome
from pyccl._proto.past import Past
from pyccl.errors import MasterUnavailableError, RejectedError, RemoteProtocolError

HOST, RUN = "127.0.0.1", b"R" * 16
MIB = 1 << 20
UP, DOWN = (Sample(limits.PROTOCOL_VERSION, upwards) for upwards in (True, False))
WHOLE_S = limits.SAMPLE_BYTES / limits.SAMPLE_BYTES_PER_S


# ---- the rate


def test_a_rate_is_that_of_the_later_half() -> None:
    slow_start = [(1.0, 1 * MIB), (1.5, 2 * MIB), (1.75, 3 * MIB), (2.0, 4 * MIB)]
    assert rate(slow_start, 2.0) == 4 * MIB


def test_what_stands_still_in_the_end_counts() -> None:
    assert rate([(0.1, MIB), (0.2, 2 * MIB)], 2.0) == pytest.approx(MIB / 1.9)
    assert rate([(0.5, MIB)], 2.0) == MIB / 2
    assert rate([], 2.0) == 0.0
    assert rate([(0.0, MIB)], 0.0) == 0.0


# ---- the master's part, in virtual time


class FakeLine:
    """Of who asks. reads, writes: whether it does; data: it wants to send so many bytes."""

    def __init__(self, *, reads: bool = True, data: int = 0) -> None:
        self._reads, self._data = reads, data
        self.sent = b""
        self.is_over = False

    async def send_all(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if not self._reads and data == sampling._FILLER:
            await trio.sleep_forever()
        self.sent += data

    async def receive_some(self, most: int) -> bytes:
        await trio.lowlevel.checkpoint()
        if not self._data:
            await trio.sleep_forever()
        size = min(most, self._data, 1448)
        self._data -= size
        return bytes(size)

    def messages(self) -> list[Message]:
        found, left = [], self.sent
        while left:
            (size,) = struct.unpack_from(">I", left)
            found.append(envelope.unpack_untrusted(left[4 : 4 + size]))
            left = left[4 + size :]
        return found


@pytest.fixture
def over(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(line: FakeLine) -> None:
        line.is_over = True

    monkeypatch.setattr(sampling, "forget", forget)


def virtual(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main, clock=MockClock(autojump_threshold=0))


async def serve(sampler: Sampler, line: FakeLine, sample: Sample) -> None:
    await sampler.serve(line, sample)  # type: ignore[arg-type]


@pytest.mark.parametrize("sample", [UP, DOWN])
def test_a_master_goes_no_faster_than_it_wants_and_others_have_their_turn(sample: Sample, over: None) -> None:
    async def main() -> None:
        line, turns = FakeLine(data=2 * limits.SAMPLE_BYTES), 0

        async def others() -> None:
            nonlocal turns
            while True:
                await trio.sleep(0.001)
                turns += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(others)
            started_s = trio.current_time()
            await (sampling._take(line) if sample.upwards else sampling._give(line))  # type: ignore[arg-type]
            nursery.cancel_scope.cancel()
        assert trio.current_time() - started_s == pytest.approx(WHOLE_S, abs=0.02)
        assert turns > 100
        if sample.upwards:
            told = [message.size_bytes for message in line.messages() if isinstance(message, Sampled)]
            assert told == sorted(told) and told[-1] == limits.SAMPLE_BYTES
            assert max(b - a for a, b in zip([0, *told], told, strict=False)) < 2 * limits.SAMPLE_CHUNK_BYTES
        else:
            assert len(line.sent) == limits.SAMPLE_BYTES

    virtual(main)


@pytest.mark.parametrize("sample", [UP, DOWN])
def test_who_dawdles_is_hung_up_on(sample: Sample, over: None) -> None:
    async def main() -> None:
        line, started_s = FakeLine(reads=False), trio.current_time()
        await serve(Sampler(), line, sample)
        assert trio.current_time() - started_s == pytest.approx(limits.SAMPLE_HELD_S)
        assert line.is_over

    virtual(main)


def test_one_is_measured_at_a_time_a_few_wait_and_others_are_sent_away(over: None) -> None:
    async def main() -> None:
        sampler = Sampler()
        lines = [FakeLine() for _ in range(limits.SAMPLES_WAITING_MAX + 2)]
        async with trio.open_nursery() as nursery:
            for line in lines:
                nursery.start_soon(serve, sampler, line, UP)
                await trio.sleep(0.1)
            assert lines[0].messages() == [Sampled(0)]
            assert lines[-1].messages() == [Rejected("others are being measured: ask again")]
            assert not any(line.sent for line in lines[1:-1])
            await trio.sleep(limits.SAMPLE_HELD_S - 0.1 * len(lines) + 0.01)
            assert lines[0].is_over and lines[1].messages() == [Sampled(0)]
            assert not lines[2].sent
            nursery.cancel_scope.cancel()

    virtual(main)


def test_a_master_is_asked_so_often_and_no_more(over: None) -> None:
    async def main() -> None:
        sampler = Sampler()

        async def asked() -> Message:
            line = FakeLine(data=1)
            await serve(sampler, line, UP)
            return line.messages()[0]

        answers = [await asked() for _ in range(4 * limits.SAMPLES_BURST)]
        begun = [answer for answer in answers if answer == Sampled(0)]
        allowed = limits.SAMPLES_BURST + math.ceil(len(begun) * limits.SAMPLE_HELD_S / limits.SAMPLE_EVERY_S)
        assert limits.SAMPLES_BURST <= len(begun) <= allowed
        assert isinstance(answers[-1], Rejected) and "ask again in" in answers[-1].reason
        await trio.sleep(limits.SAMPLE_EVERY_S)
        assert await asked() == Sampled(0)  # who was sent away has not kept its turn

    virtual(main)


def test_another_version_is_sent_away(over: None) -> None:
    async def main() -> None:
        line = FakeLine()
        await serve(Sampler(), line, Sample(limits.PROTOCOL_VERSION + 1, True))
        (answer,) = line.messages()
        assert isinstance(answer, Rejected) and "version" in answer.reason

    virtual(main)


# ---- both, on loopback


@asynccontextmanager
async def served(identity: Identity | None = None) -> AsyncIterator[int]:
    (listener,) = await trio.open_tcp_listeners(0, host=HOST)
    server = MasterServer(Past(RUN, 1 << 32), None, 5.0, "test", identity=identity)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve, listener)
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("upwards", [False, True])
def test_a_rate_is_measured_each_way(upwards: bool, secure: bool) -> None:
    identity = Identity.new()  # the operator's: it needs no invite

    async def main() -> None:
        async with served(identity if secure else None) as port:
            credentials = Credentials(identity, b"s" * 16, Ticket(identity.public, b"")) if secure else None
            found = await measure(HOST, port, credentials, upwards=upwards)
            assert limits.SAMPLE_CHUNK_BYTES <= found.size_bytes <= limits.SAMPLE_BYTES
            assert 0 < found.bytes_per_s < 2 * limits.SAMPLE_BYTES_PER_S

    trio.run(main)


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("upwards", [False, True])
def test_the_end_of_a_sample_is_nothing_to_log(upwards: bool, secure: bool, caplog: pytest.LogCaptureFixture) -> None:
    identity = Identity.new()
    caplog.set_level(logging.INFO, "pyccl.master")

    async def main() -> None:
        async with served(identity if secure else None) as port:
            credentials = Credentials(identity, b"s" * 16, Ticket(identity.public, b"")) if secure else None
            for _ in range(2):  # when the second is served the first is over
                await measure(HOST, port, credentials, upwards=upwards)
            stream = await trio.open_tcp_stream(HOST, port)
            await stream.send_all(b"\xff" * 64)
            async with stream:
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.receive_some(1)
            await until(lambda: "connection_ended" in caplog.text)  # of others it is
            ends = [record.getMessage() for record in caplog.records if record.name == "pyccl.master"]
            assert len([text for text in ends if text.startswith("connection_")]) == 1

    trio.run(main)


def test_a_secure_master_measures_nothing_for_who_has_no_invite() -> None:
    async def main() -> None:
        master = Identity.new()
        async with served(master) as port:
            stranger = Credentials(Identity.new(), b"s" * 16, Ticket(master.public, b""))
            for upwards in (False, True):
                with pytest.raises(RejectedError, match="no invite"):
                    await measure(HOST, port, stranger, upwards=upwards)
            with pytest.raises(RejectedError, match="encrypted connections only"):
                await measure(HOST, port, None, upwards=True)

    trio.run(main)


@pytest.mark.parametrize("upwards", [False, True])
def test_a_master_answers_its_peers_meanwhile(upwards: bool) -> None:
    async def main() -> None:
        async with served() as port, await trio.open_tcp_stream(HOST, port) as peer:
            await peer.send_all(envelope.pack(Hello(limits.PROTOCOL_VERSION, "test", 0, b"p" * 16, b"i" * 16)))
            assert isinstance(await envelope.receive(peer), Welcome)
            answered = 0

            async def beat() -> None:
                nonlocal answered
                while True:
                    await peer.send_all(envelope.pack(Heartbeat()))
                    while not isinstance(await envelope.receive(peer), Alive):
                        pass
                    answered += 1

            async with trio.open_nursery() as nursery:
                nursery.start_soon(beat)
                await measure(HOST, port, None, upwards=upwards)
                nursery.cancel_scope.cancel()
            assert answered > 20

    trio.run(main)


@pytest.mark.parametrize("upwards", [False, True])
def test_a_sample_that_ends_in_the_middle_is_no_rate(upwards: bool) -> None:
    async def main() -> None:
        async def stop(stream: trio.SocketStream) -> None:
            async with stream:
                await envelope.receive(stream)
                begun = envelope.pack(Sampled(0))
                await stream.send_all(begun + (envelope.pack(Sampled(16_384)) if upwards else bytes(100_000)))
                await stream.send_eof()
                await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            (listener,) = await trio.open_tcp_listeners(0, host=HOST)
            nursery.start_soon(trio.serve_listeners, stop, [listener])
            with pytest.raises(RemoteProtocolError, match="it ended in the middle"):
                await measure(HOST, listener.socket.getsockname()[1], None, upwards=upwards)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_who_is_no_master_is_found_out() -> None:
    async def main() -> None:
        async def lie(stream: trio.SocketStream) -> None:
            async with stream:
                await envelope.receive(stream)
                await stream.send_all(envelope.pack(Sampled(0)) + envelope.pack(Sampled(0)))
                await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            (listener,) = await trio.open_tcp_listeners(0, host=HOST)
            nursery.start_soon(trio.serve_listeners, lie, [listener])
            port = listener.socket.getsockname()[1]
            with pytest.raises(RemoteProtocolError, match="goes on"):
                await measure(HOST, port, None, upwards=True)
            nursery.cancel_scope.cancel()
        with pytest.raises(MasterUnavailableError):
            await measure(HOST, port, None, upwards=True)

    trio.run(main)
