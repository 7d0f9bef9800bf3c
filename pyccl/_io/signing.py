"""What a secure master signs: the commits and terms that its members may tell the next master of its key.

    signature  Ed25519, by the master's identity, over "pyccl master 1", run id, group u32 LE, the message's envelope
               with an empty signature

The message's type is in its envelope, so neither can be taken for the other. Who decides by it: _proto/takeover.py.
Spec: proto/wire.md 5.13.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Final

from pyccl._io import envelope
from pyccl._io.identity import Identity, is_signed
from pyccl._proto.messages import EpochCommit, Term

_CONTEXT: Final = b"pyccl master 1"


class Signer:
    """See ``takeover.Signer``."""

    def __init__(self, identity: Identity) -> None:
        self._identity: Final = identity

    def sign(self, run: bytes, group: int, message: EpochCommit | Term) -> bytes:
        return self._identity.sign(_said(run, group, message))

    def is_signed(self, run: bytes, group: int, message: EpochCommit | Term) -> bool:
        return is_signed(self._identity.public, message.signature, _said(run, group, message))


def _said(run: bytes, group: int, message: EpochCommit | Term) -> bytes:
    return _CONTEXT + run + struct.pack("<I", group) + envelope.pack(replace(message, signature=b""))
