"""Records that Python writes and opens: those of the engine's vectors, streams of any length, attackers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from pyccl._io.sealed import PLAIN_MAX, SealedStream
from pyccl._native.handles import CIPHER_AES, CIPHER_CHACHA, Keys
from pyccl.errors import RemoteProtocolError

VECTORS = Path(__file__).resolve().parents[2] / "proto" / "vectors" / "seals.txt"
THERE, BACK = bytes(range(32)), bytes(range(100, 132))  # of the vectors
HANG_S = 30.0


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        with trio.fail_after(HANG_S):
            await main()

    trio.run(limited)


@asynccontextmanager
async def line(
    cipher: int = CIPHER_AES,
) -> AsyncIterator[tuple[SealedStream, trio.SocketStream, trio.SocketStream, SealedStream]]:
    """Who dials, the line's two ends in the test's hands, who accepts."""
    near, tap = trio.socket.socketpair()
    source, far = trio.socket.socketpair()
    dialer = SealedStream(trio.SocketStream(near), Keys(THERE, BACK, cipher, True))
    acceptor = SealedStream(trio.SocketStream(far), Keys(BACK, THERE, cipher, False))
    async with dialer, acceptor, trio.SocketStream(tap) as middle, trio.SocketStream(source) as onward:
        yield dialer, middle, onward, acceptor


async def taken(middle: trio.SocketStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += await middle.receive_some(size - len(data))
    return data


async def record(dialer: SealedStream, middle: trio.SocketStream, plain: bytes) -> bytes:
    await dialer.send_all(plain)
    return await taken(middle, 4 + len(plain) + 16)


@pytest.mark.parametrize("cipher", [CIPHER_AES, CIPHER_CHACHA])
def test_it_writes_what_the_engine_writes_and_opens_it(cipher: int) -> None:
    rows = [row.split() for row in VECTORS.read_text().splitlines()]
    (golden,) = [row for row in rows if row[0] == str(cipher) and row[3] == "first"]

    async def main() -> None:
        async with line(cipher) as (dialer, middle, onward, acceptor):
            written = await record(dialer, middle, b"first")
            assert written.hex() == golden[4]
            for byte in written:  # one by one
                await onward.send_all(bytes([byte]))
            assert await acceptor.receive_some(2) == b"fi"
            assert await acceptor.receive_some() == b"rst"

    run(main)


def test_a_stream_of_many_records_comes_whole_and_ends() -> None:
    data = bytes(range(251)) * 4000  # many records, none of them at a border of the data

    async def main() -> None:
        one, other = trio.socket.socketpair()
        dialer = SealedStream(trio.SocketStream(one), Keys(THERE, BACK, CIPHER_AES, True))
        acceptor = SealedStream(trio.SocketStream(other), Keys(BACK, THERE, CIPHER_AES, False))
        assert len(data) > 10 * PLAIN_MAX

        async def send() -> None:
            await dialer.send_all(data)
            await dialer.aclose()

        got = b""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            while part := await acceptor.receive_some(10_000):
                got += part
        assert got == data
        await acceptor.aclose()

    run(main)


@pytest.mark.parametrize(
    "altered",
    [
        lambda a, b: a[:-1] + bytes([a[-1] ^ 1]),
        lambda a, b: a[:6] + bytes([a[6] ^ 0x80]) + a[7:],
        lambda a, b: b + a,
        lambda a, b: b"\5\0\0\2" + a[4:],
        lambda a, b: b"\0\0\0\1" + a[4:],
        lambda a, b: b"\xff\xff\xff\1" + a[4:],
    ],
    ids=["tag", "text", "swapped", "type", "empty", "too long"],
)
def test_what_was_altered_does_not_open(altered: Callable[[bytes, bytes], bytes]) -> None:
    async def main() -> None:
        async with line() as (dialer, middle, onward, acceptor):
            first, second = [await record(dialer, middle, text) for text in (b"first", b"other")]
            await onward.send_all(altered(first, second))
            with pytest.raises(RemoteProtocolError):
                await acceptor.receive_some()

    run(main)


def test_what_was_sent_twice_or_back_or_cut_does_not_open() -> None:
    async def main() -> None:
        async with line() as (dialer, middle, onward, acceptor):
            first = await record(dialer, middle, b"first")
            await middle.send_all(first)  # back to who sent it
            with pytest.raises(RemoteProtocolError, match="does not open"):
                await dialer.receive_some()
            await onward.send_all(first + first)
            assert await acceptor.receive_some() == b"first"
            with pytest.raises(RemoteProtocolError, match="does not open"):
                await acceptor.receive_some()
        async with line() as (dialer, middle, onward, acceptor):
            first = await record(dialer, middle, b"first")
            await onward.send_all(first[:-1])
            await onward.send_eof()
            with pytest.raises(RemoteProtocolError, match="inside a record"):
                await acceptor.receive_some()

    run(main)


def test_keys_that_were_renewed_open_nothing_from_before_and_old_ones_nothing_since() -> None:
    shared, said = b"x" * 32, b"both keys"

    async def main() -> None:
        async with line() as (dialer, middle, onward, acceptor):
            before = await record(dialer, middle, b"first")
            await onward.send_all(before)
            assert await acceptor.receive_some() == b"first"
            for side in (dialer, acceptor):
                side.renew(shared, said)
            since = await record(dialer, middle, b"other")
            await onward.send_all(since)
            assert await acceptor.receive_some() == b"other"
            stolen = acceptor._rx._secret, acceptor._tx._secret
        async with line() as (_, _, onward, thief):  # of what was agreed on at first
            await onward.send_all(since)
            with pytest.raises(RemoteProtocolError, match="does not open"):
                await thief.receive_some()
        for data, opens in ((since, True), (before, False)):
            source, far = trio.socket.socketpair()
            thief = SealedStream(trio.SocketStream(far), Keys(stolen[1], stolen[0], CIPHER_AES, False))
            async with trio.SocketStream(source) as onward, thief:
                await onward.send_all(data)
                if opens:
                    assert await thief.receive_some() == b"other"
                    continue
                with pytest.raises(RemoteProtocolError, match="does not open"):
                    await thief.receive_some()

    run(main)


@pytest.mark.parametrize(("shared", "said"), [(b"y" * 32, b"both keys"), (b"x" * 32, b"other keys")])
def test_who_agreed_on_something_else_has_other_keys(shared: bytes, said: bytes) -> None:
    async def main() -> None:
        async with line() as (dialer, middle, onward, acceptor):
            dialer.renew(b"x" * 32, b"both keys")
            acceptor.renew(shared, said)
            await onward.send_all(await record(dialer, middle, b"first"))
            with pytest.raises(RemoteProtocolError, match="does not open"):
                await acceptor.receive_some()

    run(main)
