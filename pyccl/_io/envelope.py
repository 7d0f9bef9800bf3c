"""Envelopes: one control message on a byte stream (proto/wire.md 2). msgpack lives here and nowhere else.

Reads never take a byte past the envelope: after a handshake the same socket goes on with data frames (`Ahead` is for
connections that carry nothing else). Who listens to
many gives whoever announces a body BODY_S to send it, and a long one takes one of so many places: a crowd that
announces and then dawdles holds no more than these.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import msgpack
import trio

from pyccl._io.strangers import Places
from pyccl._proto import limits
from pyccl._proto.messages import Message, from_wire_untrusted, to_wire
from pyccl.errors import RemoteProtocolError

_LENGTH: Final = struct.Struct(">I")
BODY_S: Final = 60.0  # from the announcement of a body to its end: 4 MiB at 0.6 Mbit/s
AHEAD_BYTES: Final = 4096
LONG_BYTES: Final = 64 << 10  # what members say to each other in a quiet run is a hundredth of it
LONG_MAX: Final = 64  # places for bodies that are longer


def pack(message: Message) -> bytes:
    body: bytes = msgpack.packb(to_wire(message), use_bin_type=True)
    if len(body) > limits.BODY_MAX_BYTES:
        raise ValueError(f"{type(message).__name__} of {len(body)} bytes is longer than an envelope may be")
    return _LENGTH.pack(len(body)) + body


def _array_counter() -> Callable[[list[object]], list[object]]:
    """Gives up at more arrays than any message has: a body of empty ones would become sixty times as many bytes."""
    left = limits.ARRAYS_MAX

    def count(array: list[object]) -> list[object]:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("too many arrays")
        return array

    return count


def unpack_untrusted(body: bytes) -> Message:
    """Judge a body whole. Raises RemoteProtocolError and nothing else."""
    try:
        value = msgpack.unpackb(
            body,
            raw=False,
            list_hook=_array_counter(),
            strict_map_key=True,
            max_map_len=0,
            max_ext_len=0,
            max_str_len=limits.STATUS_CHARS_MAX,
            max_bin_len=limits.PLAN_BYTES_MAX,
            max_array_len=limits.KEYS_MAX,
        )
    except (ValueError, msgpack.UnpackException, RecursionError, MemoryError) as e:
        raise RemoteProtocolError(f"the body is not msgpack that we accept: {type(e).__name__}") from e
    return from_wire_untrusted(value)


async def _exactly(stream: trio.abc.ReceiveStream, size: int) -> bytes:
    """`size` bytes, or b"" at an end of the stream before the first of them."""
    taken = bytearray()
    while len(taken) < size:
        part = await stream.receive_some(size - len(taken))
        if not part:
            if taken:
                raise RemoteProtocolError("the stream ended inside an envelope")
            return b""
        taken += part
    return bytes(taken)


class Ahead(trio.abc.ReceiveStream):
    """Takes what has come, up to AHEAD_BYTES past what is asked for: a short message costs one read, no timer."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream, self._have = stream, b""

    def has(self, size: int) -> bool:
        """So many bytes are here already."""
        return len(self._have) >= size

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if not self._have:
            self._have = bytes(await self._stream.receive_some(max(max_bytes or 0, AHEAD_BYTES)))
        size = len(self._have) if max_bytes is None else max_bytes
        taken, self._have = self._have[:size], self._have[size:]
        return taken

    async def aclose(self) -> None:
        await self._stream.aclose()


def long_places() -> Places:
    """For the bodies that come in on all connections of one listener."""
    return Places(LONG_MAX, BODY_S)


async def receive(
    stream: trio.abc.ReceiveStream,
    body_bytes_max: int | Callable[[], int] = limits.BODY_MAX_BYTES,
    places: Places | None = None,
) -> Message | None:
    """The next message; None at a clean end of the stream. A callable is asked when the length is here.

    places: shared with others that receive; then it is a RemoteProtocolError, too, if the body dawdles.
    """
    head = await _exactly(stream, _LENGTH.size)
    if not head:
        return None
    (size,) = _LENGTH.unpack(head)
    most = body_bytes_max() if callable(body_bytes_max) else body_bytes_max
    if not 1 <= size <= most:
        raise RemoteProtocolError(f"an envelope of {size} bytes; at most {most} are allowed here")
    body: bytes | None = None
    with nullcontext() if isinstance(stream, Ahead) and stream.has(size) else _patience(size, places):
        body = await _exactly(stream, size)
    if body is None:
        raise RemoteProtocolError(f"an envelope of {size} bytes was announced and did not come in time")
    if not body:
        raise RemoteProtocolError("the stream ended inside an envelope")
    return unpack_untrusted(body)


def _patience(size: int, places: Places | None) -> AbstractContextManager[object]:
    if places is None:
        return nullcontext()
    return places.place() if size > LONG_BYTES else trio.move_on_after(BODY_S)
