"""Encrypted connections to the master: TLS 1.3 with pinned Ed25519 keys, and who comes in proves who they are.

    TCP, TLS: the master shows the certificate of its key, which must be the one of the invite; no CA is asked
    -> Challenge(nonce)                     all of this inside TLS, before the messages of proto/wire.md 4
    <- Join(identity, salt, token, signature over: context, the master's key, nonce, salt, SHA-256 of the token)

Python's ssl asks for no client certificate without a CA to judge it by, so a signature does what it would do. It names
the master's key, which TLS has proven, and its nonce: it is worth nothing on another connection or to another master.
A connection that begins with a TLS record is meant encrypted, one that begins with an envelope is meant plain: a
mix-up is told to both sides. Spec: proto/wire.md 9.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import ssl
from dataclasses import dataclass, field
from typing import Final

import trio

from pyccl._io import envelope
from pyccl._io.identity import Identity, is_signed, key_of_certificate_untrusted, peer_id
from pyccl._native.handles import CIPHER_AES, Keys
from pyccl._proto import limits
from pyccl._proto.messages import Challenge, Join, Message, PulseKeys, Rejected
from pyccl.errors import RejectedError, RemoteProtocolError

Line = trio.SocketStream | trio.SSLStream[trio.SocketStream]

_CONTEXT: Final = b"pyccl join 1"
_HANDSHAKE: Final = 0x16  # the type of a TLS record that opens a connection; an envelope begins with 0
# The fatal alert unrecognized_name. No name is sent, so nothing else makes a server say it: the master is a plain one.
PLAIN_HERE: Final = bytes([21, 3, 3, 0, 2, 2, 112])
_PLAIN_REASON: Final = "TLSV1_UNRECOGNIZED_NAME"


@dataclass(frozen=True, slots=True)
class Ticket:
    """What an invite gives its holder. key: the master's."""

    key: bytes
    token: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who comes in to which master. With its master's own identity it is the operator and needs no token."""

    identity: Identity
    salt: bytes
    ticket: Ticket

    @property
    def peer(self) -> bytes:
        return peer_id(self.identity.public, self.salt)


@dataclass(frozen=True, slots=True)
class Guest:
    """Who has proven to be what, and the invite they show, which is not judged yet."""

    identity: bytes
    peer: bytes
    token: bytes = field(repr=False)


def socket_of(line: Line) -> trio.SocketStream:
    return line if isinstance(line, trio.SocketStream) else line.transport_stream


def forget(line: Line) -> None:
    """Close it at once and for good: what lingers would keep the port from that host, and what waits would be sent."""
    sock = socket_of(line).socket
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    sock.close()


# ---- who comes


async def reach(host: str, port: int, credentials: Credentials | None) -> Line:
    """A connection to the master; None: a plain one.

    OSError, UnicodeError, trio.BrokenResourceError: none. RemoteProtocolError: what answers is not the master of the
    invite. RejectedError: it is a plain one.
    """
    return await enter(await trio.open_tcp_stream(host, port), credentials)


async def enter(stream: trio.SocketStream, credentials: Credentials | None) -> Line:
    """As ``reach``, on a connection that stands already."""
    if credentials is None:
        return stream
    line = trio.SSLStream(stream, _client_context(), https_compatible=True)
    try:
        await _handshake(line)
        await _join(line, credentials)
    except BaseException:
        await trio.aclose_forcefully(line)
        raise
    return line


async def leave(line: Line) -> Keys:
    """The master has taken a Pulse, and reads records behind it, which these keys seal. RemoteProtocolError,
    RejectedError."""
    answer = await envelope.receive(line, limits.BODY_GREETING_MAX_BYTES)
    if isinstance(answer, Rejected):
        raise RejectedError(answer.reason)
    if not isinstance(answer, PulseKeys):
        raise RemoteProtocolError("no PulseKeys")
    return Keys(answer.peers, answer.masters, CIPHER_AES, True)


async def _handshake(line: trio.SSLStream[trio.SocketStream]) -> None:
    try:
        await line.do_handshake()
    except trio.BrokenResourceError as e:
        cause = e.__cause__
        if not isinstance(cause, ssl.SSLError) or isinstance(cause, ssl.SSLEOFError):
            raise
        if cause.reason == _PLAIN_REASON:
            raise RejectedError("that master is not encrypted (on loopback, or --insecure), and an invite is") from e
        raise RemoteProtocolError(f"it does not speak TLS 1.3: {cause.reason}") from e


async def _join(line: trio.SSLStream[trio.SocketStream], credentials: Credentials) -> None:
    ticket, me = credentials.ticket, credentials.identity
    der = line.getpeercert(binary_form=True)
    if der is None or key_of_certificate_untrusted(der) != ticket.key:
        raise RemoteProtocolError("what answers is not the master of the invite: it has another key")
    challenge = await envelope.receive(line, limits.BODY_GREETING_MAX_BYTES)
    if isinstance(challenge, Rejected):
        raise RejectedError(challenge.reason)
    if not isinstance(challenge, Challenge):
        raise RemoteProtocolError("no Challenge")
    if challenge.version != limits.PROTOCOL_VERSION:
        raise RejectedError(f"protocol version {challenge.version}; this pyccl speaks {limits.PROTOCOL_VERSION}")
    signature = me.sign(_signed(ticket.key, challenge.nonce, credentials.salt, ticket.token))
    await line.send_all(envelope.pack(Join(me.public, credentials.salt, ticket.token, signature)))


def _signed(master: bytes, nonce: bytes, salt: bytes, token: bytes) -> bytes:
    return _CONTEXT + master + nonce + salt + hashlib.sha256(token).digest()


def _client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # `_join` compares the key, which TLS has made the master prove
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


# ---- who is come to


async def is_encrypted(stream: trio.SocketStream) -> bool:
    """Whether the first byte, which is left there, begins TLS. OSError."""
    first = await stream.socket.recv(1, trio.socket.MSG_PEEK)
    return len(first) == 1 and first[0] == _HANDSHAKE


class Door:
    """A master's side. nonce: 32 new random bytes each time."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._context = _server_context(identity)

    async def enter(self, stream: trio.SocketStream, nonce: bytes) -> tuple[Line, Guest]:
        """RemoteProtocolError, trio.BrokenResourceError: they do not prove who they are."""
        line = trio.SSLStream(stream, self._context, server_side=True, https_compatible=True)
        await line.do_handshake()
        await line.send_all(envelope.pack(Challenge(limits.PROTOCOL_VERSION, nonce)))
        join: Message | None = await envelope.receive(line, limits.BODY_GREETING_MAX_BYTES)
        if not isinstance(join, Join):
            raise RemoteProtocolError("no Join")
        if not is_signed(join.identity, join.signature, _signed(self._identity.public, nonce, join.salt, join.token)):
            raise RemoteProtocolError("the signature of a Join is wrong")
        return line, Guest(join.identity, peer_id(join.identity, join.salt), join.token)


def _server_context(identity: Identity) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # nobody resumes a session: each connection proves anew who is there
    memory = os.memfd_create("pyccl-certificate", os.MFD_CLOEXEC)  # ssl reads files only, and a key belongs on no disk
    with os.fdopen(memory, "wb", buffering=0) as file:
        file.write(identity.certificate())
        context.load_cert_chain(f"/proc/self/fd/{memory}")
    return context
