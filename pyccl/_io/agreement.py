"""Keys of one connection between two peers of a secure run, agreed between them alone. Spec: proto/wire.md 10.

    -> hello, PeerOffer(X25519 key, cipher)         hello: PeerHello, RelayHello or StateHello; it names both
    <- PeerOffer, PeerProof(identity, salt, signature)
    -> PeerProof

Each signs a hash of hello and both offers, and which side it is: with keys made for this connection a proof is worth
nothing on another. A peer id is a hash of its identity, so it is known whose signature it has to be; the master
and a relay can't make it. Both offers say which cipher is faster there; it is AES-GCM if it is for both.

On a state connection, whose records know no epochs, who serves offers another key in each new one: `Renewal`.
"""

from __future__ import annotations

import hashlib
from typing import Final

import trio
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from pyccl._io import envelope
from pyccl._io.identity import is_signed, peer_id
from pyccl._io.sealed import SealedStream
from pyccl._io.tls import Credentials
from pyccl._native.handles import CIPHER_AES, CIPHER_CHACHA, Keys, cipher_best
from pyccl._proto import limits
from pyccl._proto.messages import Message, PeerOffer, PeerProof, PeerRefused
from pyccl.errors import RemoteProtocolError

_CONTEXT: Final = b"pyccl link 1"
_DIALER, _ACCEPTOR = b" dialer", b" acceptor"
_SECRET_BYTES: Final = 32


async def dial(stream: trio.abc.Stream, hello: Message, to: bytes, me: Credentials) -> Keys | str:
    """Greet the peer `to`; text: why it refuses. RemoteProtocolError: it is not that peer, or breaks the protocol."""
    ours, mine = _offer()
    await stream.send_all(envelope.pack(hello) + envelope.pack(mine))
    theirs = await envelope.receive(stream, limits.BODY_GREETING_MAX_BYTES)
    if isinstance(theirs, PeerRefused):
        return theirs.reason
    if theirs is None:
        return "no answer"
    if not isinstance(theirs, PeerOffer):
        raise RemoteProtocolError("no PeerOffer: it wants no encryption")
    said = _said(hello, mine, theirs)
    await _check_proof(stream, to, said + _ACCEPTOR)
    keys = _keys(ours, theirs, said, _cipher(mine, theirs), dialed=True)
    await stream.send_all(envelope.pack(_proof(me, said + _DIALER)))
    return keys


async def accept(stream: trio.abc.Stream, hello: Message, from_peer: bytes, me: Credentials) -> Keys:
    """Answer this greeting, if it is from that peer. RemoteProtocolError: it is not."""
    return (await accept_whose(stream, hello, from_peer, me))[0]


async def accept_whose(
    stream: trio.abc.Stream, hello: Message, from_peer: bytes, me: Credentials
) -> tuple[Keys, bytes]:
    """As ``accept``, and the identity of that peer."""
    theirs = await envelope.receive(stream, limits.BODY_GREETING_MAX_BYTES)
    if not isinstance(theirs, PeerOffer):
        raise RemoteProtocolError("no PeerOffer: it wants no encryption")
    ours, mine = _offer()
    said = _said(hello, theirs, mine)
    keys = _keys(ours, theirs, said, _cipher(theirs, mine), dialed=False)
    await stream.send_all(envelope.pack(mine) + envelope.pack(_proof(me, said + _ACCEPTOR)))
    return keys, await _check_proof(stream, from_peer, said + _DIALER)


class Renewal:
    """Of the keys of a connection that has some, by who serves on it. Those before and those after open nothing of each
    other's; the proofs of its beginning hold, for nobody else could seal the offers."""

    def __init__(self) -> None:
        self._ours, self.offer = _offer()

    def use(self, channel: SealedStream, answer: PeerOffer) -> None:
        """RemoteProtocolError: it is no answer."""
        channel.renew(_shared(self._ours, answer), self.offer.key + answer.key)


async def answer_renewal(channel: SealedStream, offer: PeerOffer) -> None:
    """RemoteProtocolError: it is no offer."""
    ours, mine = _offer()
    shared = _shared(ours, offer)
    await channel.send_all(envelope.pack(mine))
    channel.renew(shared, offer.key + mine.key)


def _offer() -> tuple[X25519PrivateKey, PeerOffer]:
    ours = X25519PrivateKey.generate()
    return ours, PeerOffer(ours.public_key().public_bytes_raw(), cipher_best())


def _said(hello: Message, dialer: PeerOffer, acceptor: PeerOffer) -> bytes:
    return _CONTEXT + hashlib.sha256(b"".join(map(envelope.pack, (hello, dialer, acceptor)))).digest()


def _proof(me: Credentials, signed: bytes) -> PeerProof:
    return PeerProof(me.identity.public, me.salt, me.identity.sign(signed))


async def _check_proof(stream: trio.abc.Stream, peer: bytes, signed: bytes) -> bytes:
    """Whose the peer is."""
    proof = await envelope.receive(stream, limits.BODY_GREETING_MAX_BYTES)
    if not isinstance(proof, PeerProof):
        raise RemoteProtocolError("no PeerProof")
    if peer_id(proof.identity, proof.salt) != peer or not is_signed(proof.identity, proof.signature, signed):
        raise RemoteProtocolError("it does not prove to be the peer that it says it is")
    return proof.identity


def _cipher(one: PeerOffer, other: PeerOffer) -> int:
    return CIPHER_AES if one.cipher == other.cipher == CIPHER_AES else CIPHER_CHACHA


def _keys(ours: X25519PrivateKey, theirs: PeerOffer, said: bytes, cipher: int, *, dialed: bool) -> Keys:
    both = HKDF(hashes.SHA256(), 2 * _SECRET_BYTES, salt=said, info=_CONTEXT).derive(_shared(ours, theirs))
    dialers, acceptors = both[:_SECRET_BYTES], both[_SECRET_BYTES:]
    return Keys(dialers, acceptors, cipher, True) if dialed else Keys(acceptors, dialers, cipher, False)


def _shared(ours: X25519PrivateKey, theirs: PeerOffer) -> bytes:
    try:
        return ours.exchange(X25519PublicKey.from_public_bytes(theirs.key))
    except ValueError as e:  # a point of small order
        raise RemoteProtocolError("the key of a PeerOffer is no key") from e
