"""Conversations with strangers: whatever they say, what comes of it is what is documented, and nothing else is sent.

As in test_untrusted_bytes.py, of whole greetings and answers instead of single decoders.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import json
import math
import ssl
import struct
from collections.abc import Awaitable, Callable
from typing import Any, Final

import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from untrusted import CERTIFICATE, PARTS, PLAIN, RUN_KEY, THOROUGH, TOKENS, Bytes, mutated, only

from pyccl._io import agreement, envelope, front, links, probe, sampling, statestream, tls
from pyccl._io.dialing import FAILURES
from pyccl._io.front import Name
from pyccl._io.identity import Identity
from pyccl._io.sealed import PLAIN_MAX, SealedStream
from pyccl._io.tls import Credentials, Door, Ticket
from pyccl._native.handles import CIPHER_AES, Keys, Relay
from pyccl._proto import limits
from pyccl._proto.epoch import AddressKind, Member
from pyccl._proto.messages import (
    Challenge,
    DialTold,
    Join,
    Message,
    PeerHello,
    PeerOffer,
    PeerProof,
    PeerRefused,
    PeerWelcome,
    Probed,
    PulseKeys,
    Reflected,
    Rejected,
    RelayHello,
    Sample,
    Sampled,
    StateHello,
    StateNone,
    StateOffer,
)
from pyccl.doctor import network
from pyccl.errors import RejectedError, RemoteProtocolError

TICKET: Final = Ticket(RUN_KEY, TOKENS[0])


class Talk(trio.abc.Stream):
    """A connection over which these bytes come, in parts of these lengths, and then its end. Keeps what is sent."""

    def __init__(self, data: bytes, parts: list[int]) -> None:
        self._source = Bytes(data, list(parts))
        self.sent = bytearray()
        self.taken = False
        self.socket, self.transport_stream = self, self

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return await self._source.receive_some(max_bytes)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.sent += data

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()

    # Of the socket and of TLS, what is asked for.

    def getpeername(self) -> tuple[str, int]:
        return "192.0.2.1", 1

    def detach(self) -> int:
        self.taken = True
        return -1

    def close(self) -> None:
        return

    def setsockopt(self, *_: object) -> None:
        return

    def getsockname(self) -> tuple[str, int]:
        return "::ffff:192.0.2.1", 5

    def getpeercert(self, *, binary_form: bool) -> bytes:
        return CERTIFICATE if binary_form else b""

    def messages(self) -> list[Message]:
        """That were sent, and nothing else was."""
        found, data = [], bytes(self.sent)
        while data:
            size = struct.unpack_from(">I", data)[0]
            found.append(envelope.unpack_untrusted(data[4 : 4 + size]))
            data = data[4 + size :]
        return found


def carried_out(main: Callable[[], Awaitable[Any]]) -> Any:
    """Waiting takes no time."""
    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


class Slots:
    """An engine that is given what comes."""

    def __init__(self) -> None:
        self.given = 0

    def peer_add(self, peer: bytes) -> int:
        return 0

    def conn_add(self, slot: int, fd: int, keys: object = None) -> None:
        self.given += 1

    def conns(self, slot: int) -> int:
        return self.given


RUN: Final = b"R" * 16
OURS, THEIRS = (
    Credentials(Identity(Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32)), bytes(16), TICKET) for n in (1, 2)
)
US, THEM, THIRD = Member(OURS.peer, b"u" * 16), Member(THEIRS.peer, b"t" * 16), Member(b"3" * 16, b"3" * 16)
ENDS: Final = THEM.peer, THEM.incarnation, US.peer, US.incarnation
HELLO: Final = PeerHello(limits.PROTOCOL_VERSION, RUN, *ENDS)
OFFER: Final = PeerOffer(bytes([9]) + bytes(31), CIPHER_AES)
PROOF: Final = PeerProof(THEIRS.identity.public, THEIRS.salt, bytes(64))
GREETINGS: Final = [
    envelope.pack(HELLO),
    envelope.pack(HELLO) + envelope.pack(OFFER) + envelope.pack(PROOF),
    envelope.pack(HELLO) + envelope.pack(PeerOffer(bytes(32), CIPHER_AES)),  # a point of small order
    envelope.pack(PeerHello(limits.PROTOCOL_VERSION, b"Q" * 16, *ENDS)),
    envelope.pack(RelayHello(limits.PROTOCOL_VERSION, RUN, *ENDS[:2], THIRD.peer, THIRD.incarnation)),
    envelope.pack(StateHello(limits.PROTOCOL_VERSION, RUN, *ENDS, 0, 0)),
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    tls.PLAIN_HERE,
]


def connects(data: bytes, parts: list[int], *, secure: bool) -> None:
    """To a peer, who has what it may have."""
    stream, engine = Talk(data, parts), Slots()

    async def main() -> None:
        async def state(_stream: object, _hello: StateHello) -> None:
            return

        events = links.LinkEvents(
            ready=lambda _: None, failed=lambda *_: None, refused=lambda *_: None, up=lambda _: None, state=state
        )
        async with trio.open_nursery() as nursery:
            fake: Any = engine
            credentials = OURS if secure else None
            ours = links.Links(RUN, US, fake, Relay(5.0), 1, nursery, events, credentials=credentials)
            for member in (THEM, THIRD):
                ours._know(member)
            any_stream: Any = stream
            await ours.accept(any_stream)
            nursery.cancel_scope.cancel()

    carried_out(main)
    sent = stream.messages()
    if secure:  # nobody proves to be the other, and nothing but what agrees on keys, or refuses, is said in clear
        assert not engine.given and all(isinstance(message, PeerRefused | PeerOffer | PeerProof) for message in sent)
    else:
        assert all(isinstance(message, PeerRefused | PeerWelcome) for message in sent)
        if engine.given:
            hello = envelope.unpack_untrusted(data[4 : 4 + struct.unpack_from(">I", data)[0]])
            assert isinstance(hello, PeerHello) and hello.run == RUN
            assert (hello.from_peer, hello.from_incarnation, hello.to_peer, hello.to_incarnation) == ENDS


@pytest.mark.parametrize("secure", [True, False])
def test_connection_to_a_peer_with_a_greeting(secure: bool) -> None:
    for data in GREETINGS:
        connects(data, [], secure=secure)


@pytest.mark.parametrize("secure", [True, False])
@THOROUGH
@given(mutated(GREETINGS), PARTS)
def test_connection_to_a_peer(secure: bool, data: bytes, parts: list[int]) -> None:
    connects(data, parts, secure=secure)


ANSWERS: Final = [
    b"".join(map(envelope.pack, messages))
    for messages in (
        [PeerWelcome(limits.PROTOCOL_VERSION)], [PeerRefused("no")], [OFFER, PROOF], [Rejected("no")],
        [PulseKeys(bytes(32), bytes(32))], [Challenge(limits.PROTOCOL_VERSION, bytes(32))], [Reflected("192.0.2.1", 5)],
        [Probed("192.0.2.1", 5, 1 << 40, True, "", (DialTold(bytes(16), "refused"),))],
        [Probed("a.name", 5, 1 << 40, False, "refused", ())],
        [Sampled(0), Sampled(1 << 14), Sampled(1 << 22)], [Sampled(0), Sampled(9), Sampled(9), Sampled(1 << 22)],
        [Sampled(0), Sampled(limits.SAMPLE_BYTES)],
        [StateNone()], [StateOffer(5, 1 << 62, bytes(32))],
    )
]  # fmt: skip


async def _keys(line: Any) -> None:
    assert isinstance(await agreement.dial(line, HELLO, THEM.peer, OURS), str)  # which nobody proves to be


async def _accepted(line: Any) -> None:
    await agreement.accept(line, HELLO, THEM.peer, OURS)
    raise AssertionError("nobody proves to be the other")


async def _reflected(line: Any) -> None:
    seen_as = await front.reflected(line, Name(US.peer, US.incarnation))
    assert 1 <= seen_as.port <= limits.PORT_MAX and seen_as.kind == AddressKind.OBSERVED


async def _probed(line: Any) -> None:
    seen = await probe._asked(line, 5, 0.001, lambda: 1e9)
    assert math.isfinite(seen.offset_s) and ipaddress.ip_address(seen.observed[0])


async def _sampled(line: Any) -> None:
    marks: sampling.Marks = []
    await sampling._begun(line)
    await sampling._send(line, marks, trio.current_time())
    assert 0 <= sampling.rate(marks, trio.current_time()) < math.inf
    assert all(before < after for (_, before), (_, after) in itertools.pairwise(marks))


async def _downwards(line: Any) -> None:
    await sampling._begun(line)
    await sampling._receive(line, [], trio.current_time())


async def _joined(line: Any) -> None:
    await tls._join(line, Credentials(OURS.identity, OURS.salt, Ticket(RUN_PUBLIC, TOKENS[0])))


RUN_PUBLIC: Final = Ed25519PrivateKey.from_private_bytes(RUN_KEY).public_key().public_bytes_raw()
REFUSALS: Final = RemoteProtocolError, RejectedError
ASKING: Final[dict[str, tuple[Callable[[Any], Awaitable[object]], tuple[type[BaseException], ...]]]] = {
    "a peer, for keys": (_keys, (RemoteProtocolError,)),
    "a dialer, for keys": (_accepted, (RemoteProtocolError,)),
    "a peer": (links._welcomed, (RemoteProtocolError,)),
    "a master, where we are": (_reflected, FAILURES),
    "a master, whether we are reached": (_probed, REFUSALS),
    "a master, how fast upwards": (_sampled, REFUSALS),
    "a master, how fast downwards": (_downwards, REFUSALS),
    "a master, to come in": (_joined, REFUSALS),
    "a master, for keys of a pulse": (tls.leave, REFUSALS),
    "a holder, for its state": (statestream.next_offer, (RemoteProtocolError,)),
}


def answered(asks: str, data: bytes, parts: list[int]) -> None:
    ask, errors = ASKING[asks]

    async def main() -> None:
        with contextlib.suppress(*errors):
            await ask(Talk(data, parts))

    carried_out(main)


@pytest.mark.parametrize("asks", ASKING)
def test_answer_to_any_question_of(asks: str) -> None:
    for data in [*ANSWERS, *GREETINGS, *(first + more for first in ANSWERS for more in ANSWERS)]:
        answered(asks, data, [])


@pytest.mark.parametrize("asks", ASKING)
@THOROUGH
@given(mutated(ANSWERS), PARTS)
def test_answer_of(asks: str, data: bytes, parts: list[int]) -> None:
    answered(asks, data, parts)


@THOROUGH
@given(st.binary(max_size=3000), PARTS)
def test_bytes_of_who_is_measured(data: bytes, parts: list[int]) -> None:
    """They mean nothing; when they have ended it is the turn of the next."""

    async def main() -> None:
        sampler = sampling.Sampler()
        for _ in range(2):
            line: Any = Talk(data, parts)
            await sampler.serve(line, Sample(limits.PROTOCOL_VERSION, upwards=True))
            assert line.messages() == [Sampled(0)]  # less than a chunk came

    carried_out(main)


def client_hello() -> bytes:
    come, goes = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        tls._client_context().wrap_bio(come, goes).do_handshake()
    return goes.read()


DOOR: Final = Door(Identity(Ed25519PrivateKey.from_private_bytes(RUN_KEY)))


@THOROUGH
@given(mutated([client_hello()]), PARTS)
def test_beginning_of_tls(data: bytes, parts: list[int]) -> None:
    async def main() -> None:
        stream: Any = Talk(data, parts)
        with pytest.raises((RemoteProtocolError, trio.BrokenResourceError)):
            await DOOR.enter(stream, bytes(32))

    carried_out(main)


SIGNATURE: Final = OURS.identity.sign(tls._signed(RUN_PUBLIC, bytes(32), OURS.salt, TOKENS[0]))
JOIN: Final = envelope.pack(Join(OURS.identity.public, OURS.salt, TOKENS[0], SIGNATURE))


@THOROUGH
@given(mutated([JOIN, JOIN + envelope.pack(HELLO), envelope.pack(HELLO)]))
def test_join(data: bytes) -> None:
    """Inside TLS. Who comes in is who signed."""
    guests = []

    async def main() -> None:
        near, far = trio.testing.memory_stream_pair()
        client: Any = trio.SSLStream(near, tls._client_context(), https_compatible=True)

        async def come() -> None:
            await client.do_handshake()
            assert isinstance(await envelope.receive(client), Challenge)
            await client.send_all(data)
            await near.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(come)
            far_: Any = far
            with contextlib.suppress(RemoteProtocolError, trio.BrokenResourceError):
                guests.append((await DOOR.enter(far_, bytes(32)))[1])

    carried_out(main)
    assert (guests != []) == data.startswith(JOIN)
    assert all((guest.identity, guest.peer, guest.token) == (OURS.identity.public, OURS.peer, TOKENS[0])
               for guest in guests)  # fmt: skip


PLAIN_TEXT: Final = bytes(range(256)) * 3
SECRETS: Final = bytes(32), bytes([1]) * 32


def records() -> list[bytes]:
    """Of one direction: one after the other, and the same two in one."""

    async def main(lengths: list[int]) -> bytes:
        line: Any = Talk(b"", [])
        stream = SealedStream(line, Keys(*SECRETS, CIPHER_AES, True))
        at = 0
        for length in lengths:
            await stream.send_all(PLAIN_TEXT[at : at + length])
            at += length
        return bytes(line.sent)

    return [trio.run(main, lengths) for lengths in ([100, 600, 68], [768], [1] * 20)]


@THOROUGH
@given(mutated(records()), PARTS)
def test_sealed_records(data: bytes, parts: list[int]) -> None:
    """What is read was written, from its beginning on."""
    got = bytearray()

    async def main() -> None:
        line: Any = Talk(data, parts)
        stream = SealedStream(line, Keys(*SECRETS[::-1], CIPHER_AES, False))
        with contextlib.suppress(RemoteProtocolError):
            while part := await stream.receive_some():
                got.extend(part)

    trio.run(main)
    assert PLAIN_TEXT.startswith(bytes(got))


@pytest.mark.parametrize("head", [0, 1, 1 << 24, 1 << 24 | PLAIN_MAX + 1, 3 << 24 | 5, 0xFFFF_FFFF])
def test_sealed_record_of_another_type_or_length_is_refused_at_its_head(head: int) -> None:
    line: Any = Talk(struct.pack("<I", head), [])
    with pytest.raises(RemoteProtocolError, match="no record of sealed bytes"):
        trio.run(SealedStream(line, Keys(*SECRETS, CIPHER_AES, False)).receive_some)


MEMBER: Final = {"peer": "ab", "addresses": ["192.0.2.1:5", "[::1]:6"], "seen": "192.0.2.1"}
STATUS: Final[dict[str, Any]] = {"groups": [{"members": [MEMBER]}]}


@THOROUGH
@given(st.data())
def test_members_of_a_status(data: st.DataObject) -> None:
    whole: Any = [json.loads(json.dumps(STATUS))]
    at, key = whole, 0
    while isinstance(at[key], list | dict) and at[key] and data.draw(st.booleans()):
        at = at[key]
        key = data.draw(st.sampled_from(sorted(at)) if isinstance(at, dict) else st.integers(0, len(at) - 1))
    at[key] = data.draw(PLAIN | st.sampled_from(["h:" + "9" * 30, "h:-1", "h:" + "9" * 5000, ":", "h:\u0665"]))
    if isinstance(whole[0], dict):
        only(RemoteProtocolError, lambda: network.members_untrusted(whole[0]))


@pytest.mark.parametrize("port", [-1, 0, 65_536 + 1, 1 << 40, 10**30])
def test_port_that_is_none_is_not_dialed(port: int) -> None:
    """As a status may name it."""
    assert trio.run(probe.dial, "127.0.0.1", port) == "there is no such port"


@pytest.mark.parametrize("host", ["", "\0", "a\0b", "a" * 300, "..", "\ud800", "192.0.2.1 ", "fe80::1%nowhere", "%"])
def test_host_that_is_none_is_not_reached(host: str) -> None:
    assert trio.run(probe.dial, host, 1)
