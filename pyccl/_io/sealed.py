"""A connection whose bytes are records as the engine writes them (proto/wire.md 10), for what stays in Python.

It enters no epoch, and has 2^24 records at most under one key: `renew` is for whoever knows when an epoch begins.
"""

from __future__ import annotations

import struct
from typing import Final

import trio
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from pyccl._native.handles import CIPHER_AES, Keys
from pyccl.errors import RemoteProtocolError

_HEAD: Final = struct.Struct("<I")  # u24 length, u8 type
_HEAD_BYTES: Final = 4
_TAG_BYTES: Final = 16
PLAIN_MAX: Final = (1 << 16) - _HEAD_BYTES - _TAG_BYTES
_RECORDS_MAX: Final = 1 << 24
_BYTES: Final = 1 << 24  # the type of a record, in its place
_KEY_INFO: Final = b"pyccl record key 1"
_RENEWED_INFO: Final = b"pyccl state 1"
_SECRET_BYTES: Final = 32
_RECEIVE_BYTES: Final = 1 << 17


class _Half:
    """One direction."""

    def __init__(self, secret: bytes, cipher: int, *, dialed: bool) -> None:
        self._cipher, self._dialed = cipher, dialed
        self._begin(secret)

    def _begin(self, secret: bytes) -> None:
        key = HKDFExpand(hashes.SHA256(), 32, _KEY_INFO).derive(secret)
        self._aead = AESGCM(key) if self._cipher == CIPHER_AES else ChaCha20Poly1305(key)
        self._secret, self._count = secret, 0

    def renew(self, shared: bytes, said: bytes) -> None:
        self._begin(HKDF(hashes.SHA256(), _SECRET_BYTES, salt=self._secret, info=_RENEWED_INFO + said).derive(shared))

    def _next(self, head: bytes) -> tuple[bytes, bytes]:
        """Nonce and associated data of the next record."""
        count = struct.pack("<Q", self._count)
        self._count += 1
        return bytes(4) + count, head + struct.pack("<BQ", self._dialed, 0) + count

    def seal(self, plain: bytes | memoryview) -> bytes:
        if self._count >= _RECORDS_MAX:
            raise trio.BrokenResourceError("no more records under one key: the connection is to be made anew")
        head = _HEAD.pack(len(plain) | _BYTES)
        nonce, known = self._next(head)
        return head + self._aead.encrypt(nonce, plain, known)

    def open_untrusted(self, head: bytes, sealed: bytes) -> bytes:
        nonce, known = self._next(head)
        try:
            return self._aead.decrypt(nonce, sealed, known)
        except InvalidTag as e:
            raise RemoteProtocolError("a record does not open: it was altered on its way") from e


class SealedStream(trio.abc.Stream):
    """`stream` from here on, with the keys agreed on for it. RemoteProtocolError: what comes does not open."""

    def __init__(self, stream: trio.SocketStream, keys: Keys) -> None:
        self.transport_stream: Final = stream
        self._tx = _Half(keys.tx, keys.cipher, dialed=keys.dialed)
        self._rx = _Half(keys.rx, keys.cipher, dialed=not keys.dialed)
        self._come, self._plain = bytearray(), b""

    def renew(self, shared: bytes, said: bytes) -> None:
        """Other keys from the next record on, each way, of the old ones and what both sides agreed on (`said`: how)."""
        self._tx.renew(shared, said)
        self._rx.renew(shared, said)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        with memoryview(data) as view:
            for at in range(0, len(view), PLAIN_MAX):
                await self.transport_stream.send_all(self._tx.seal(view[at : at + PLAIN_MAX]))

    async def wait_send_all_might_not_block(self) -> None:
        await self.transport_stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if not self._plain:
            self._plain = await self._record()
        size = len(self._plain) if max_bytes is None else max_bytes
        taken, self._plain = self._plain[:size], self._plain[size:]
        return taken

    async def _record(self) -> bytes:
        """What is in the next one; b"" at an end between two."""
        if not await self._have(_HEAD_BYTES):
            return b""
        head = bytes(self._come[:_HEAD_BYTES])
        size = _HEAD.unpack(head)[0] ^ _BYTES
        if not 1 <= size <= PLAIN_MAX:
            raise RemoteProtocolError("what comes is no record of sealed bytes")
        end = _HEAD_BYTES + size + _TAG_BYTES
        await self._have(end)
        sealed = bytes(self._come[_HEAD_BYTES:end])
        del self._come[:end]
        return self._rx.open_untrusted(head, sealed)

    async def _have(self, size: int) -> bool:
        while len(self._come) < size:
            part = await self.transport_stream.receive_some(_RECEIVE_BYTES)
            if not part and self._come:
                raise RemoteProtocolError("the connection ended inside a record")
            if not part:
                return False
            self._come += part
        return True

    async def aclose(self) -> None:
        await self.transport_stream.aclose()


Channel = trio.SocketStream | SealedStream


def socket_of(channel: Channel) -> trio.SocketStream:
    return channel if isinstance(channel, trio.SocketStream) else channel.transport_stream
