"""What a secure master signs: every field counts, and the bytes are those of proto/wire.md 5.13."""

from __future__ import annotations

import struct
from dataclasses import fields, replace
from typing import Any, TypeVar

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pyccl._io import envelope
from pyccl._io.identity import Identity
from pyccl._io.signing import Signer
from pyccl._proto import limits
from pyccl._proto.epoch import NO_ID, Address, Member, make_epoch
from pyccl._proto.messages import KIND_LOSS, KIND_SETTLE, EpochCommit, OpVerdict, Term, to_wire

M = TypeVar("M", EpochCommit, Term)
RUN, GROUP = b"R" * 16, 7
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SIGNER = Signer(Identity(KEY))
EPOCH = make_epoch(3, b"p" * 16, 1 << 32, (Member(b"a" * 16, b"b" * 16, (Address("h", 1),)),))
COMMIT = EpochCommit(EPOCH, KIND_LOSS, (OpVerdict(0, 1, 2, 1),), "detail", 2, True)
TERM = Term(5 << 32)


def signed(message: M) -> M:
    return replace(message, signature=SIGNER.sign(RUN, GROUP, message))


@pytest.mark.parametrize("message", [COMMIT, TERM])
def test_a_signature_is_over_context_run_group_and_the_unsigned_envelope(message: EpochCommit | Term) -> None:
    plain = to_wire(message)
    assert plain[-1] == b""
    body = msgpack.packb(plain)
    said = b"pyccl master 1" + RUN + struct.pack("<I", GROUP) + struct.pack(">I", len(body)) + body
    assert signed(message).signature == KEY.sign(said)
    assert SIGNER.is_signed(RUN, GROUP, signed(message))
    assert SIGNER.sign(RUN, GROUP, signed(message)) == signed(message).signature, "whatever it holds now"


def test_a_commit_that_has_travelled_is_signed_still() -> None:
    there = envelope.unpack_untrusted(envelope.pack(signed(COMMIT))[4:])
    assert isinstance(there, EpochCommit) and SIGNER.is_signed(RUN, GROUP, there)


def test_nothing_else_has_the_signature_of_a_commit() -> None:
    others: dict[str, list[Any]] = {
        "epoch": [
            make_epoch(4, b"p" * 16, 1 << 32, EPOCH.members),
            make_epoch(3, NO_ID, 1 << 32, EPOCH.members),
            make_epoch(3, b"p" * 16, 2 << 32, EPOCH.members),
            make_epoch(3, b"p" * 16, 1 << 32, (Member(b"a" * 16, b"c" * 16, (Address("h", 1),)),)),
            make_epoch(3, b"p" * 16, 1 << 32, (Member(b"a" * 16, b"b" * 16, (Address("h", 2),)),)),
        ],
        "kind": [KIND_SETTLE],
        "verdicts": [(), (OpVerdict(0, 1, 2, 2),)],
        "detail": ["", "detaiL"],
        "world_size": [3],
        "journaled": [False],
        "signature": [b"", bytes(limits.SIGNATURE_BYTES), signed(TERM).signature, signed(COMMIT).signature[:-1]],
    }
    assert set(others) == {field.name for field in fields(EpochCommit)}
    for name, values in others.items():
        for value in values:
            assert not SIGNER.is_signed(RUN, GROUP, replace(signed(COMMIT), **{name: value})), (name, value)
    assert not SIGNER.is_signed(b"S" * 16, GROUP, signed(COMMIT))
    assert not SIGNER.is_signed(RUN, GROUP + 1, signed(COMMIT))
    assert not SIGNER.is_signed(RUN, GROUP, replace(signed(TERM), term=TERM.term + 1))
    assert not Signer(Identity.new()).is_signed(RUN, GROUP, signed(COMMIT))
