"""An epoch: an agreed membership, and the hash that names it. Pure values; spec: proto/wire.md 4.

Invariant: an Epoch whose ``check_untrusted`` passed has the id of its own content, so two processes that hold the
same id hold the same history of members, back to the first epoch.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

from pyccl._proto import plan as plans
from pyccl.errors import RemoteProtocolError

NO_ID: Final = bytes(16)


class AddressKind:
    """How a peer comes by an address of its own."""

    LOCAL: Final = 0  # of one of its interfaces
    ADVERTISED: Final = 1  # its user says so
    OBSERVED: Final = 2  # what the master sees of a connection from its data port
    MAPPED: Final = 3  # a router forwards it, on request


class Address(NamedTuple):
    """Where a peer accepts data connections."""

    host: str
    port: int
    kind: int = AddressKind.LOCAL


@dataclass(frozen=True, slots=True)
class Member:
    """One process of an epoch. The incarnation is the capability by which its data connections are accepted.

    addresses: by its own word. seen: the host that the master sees its control connection come from; "": not yet.
    """

    peer: bytes
    incarnation: bytes
    addresses: tuple[Address, ...] = ()
    seen: str = ""


@dataclass(frozen=True, slots=True)
class Epoch:
    """Members stand in strict bytewise order of their peer ids: a rank is an index into this list, everywhere."""

    number: int
    id: bytes
    previous: bytes
    term: int
    members: tuple[Member, ...]
    plan: bytes = plans.NO_PLAN

    def check_untrusted(self) -> None:
        """Judge an epoch that came from outside: RemoteProtocolError unless order, plan and id are right."""
        if self.number < 1:
            raise RemoteProtocolError("epoch number 0 is never committed")
        if not self.members:
            raise RemoteProtocolError(f"epoch {self.number} has no members")
        peers = self.peers
        if any(a >= b for a, b in itertools.pairwise(peers)):
            raise RemoteProtocolError(f"the members of epoch {self.number} are not in order")
        plans.decode_untrusted(self.plan, len(peers))
        if self.id != epoch_id(self.previous, self.term, self.number, self.members, self.plan):
            raise RemoteProtocolError(f"epoch {self.number} does not have the id of its content")

    @property
    def peers(self) -> tuple[bytes, ...]:
        return tuple([member.peer for member in self.members])

    @property
    def stands(self) -> tuple[tuple[int, bytes], tuple[int, bytes]]:
        """From where a member can go on: in the epoch, or one commit behind it."""
        return (self.number, self.id), (self.number - 1, self.previous)

    def rank_of(self, peer: bytes) -> int | None:
        return next((rank for rank, member in enumerate(self.members) if member.peer == peer), None)

    def has(self, peer: bytes, incarnation: bytes) -> bool:
        """Whether exactly this start of that peer takes part: an older or newer one does not count."""
        return any(member.peer == peer and member.incarnation == incarnation for member in self.members)


def epoch_id(previous: bytes, term: int, number: int, members: tuple[Member, ...], plan: bytes) -> bytes:
    """The id of proto/wire.md 4. Addresses are left out: how to reach a member is not who it is."""
    digest = hashlib.sha256(previous + struct.pack("<QQI", term, number, len(members)))
    for member in members:
        digest.update(member.peer + member.incarnation)
    digest.update(plan)
    return digest.digest()[:16]


def make_epoch(
    number: int, previous: bytes, term: int, members: tuple[Member, ...], plan: bytes = plans.NO_PLAN
) -> Epoch:
    """Put the members in order and give the epoch its id. Our own bug if two of them share a peer id."""
    ordered = tuple(sorted(members, key=lambda member: member.peer))
    epoch = Epoch(number, epoch_id(previous, term, number, ordered, plan), previous, term, ordered, plan)
    epoch.check_untrusted()
    return epoch
