"""How the members of an epoch share the work: shares of unequal size, and the ring. Pure values; spec: proto/wire.md 4.

A plan is made for the members of one epoch, in rank order, travels in ``Epoch.plan`` and so is part of the epoch's id.
When the members change, ``carry`` makes the plan of the others out of it, everywhere the same.
Invariant: a Plan that ``decode_untrusted`` returned encodes to the same bytes again.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pyccl._proto import limits
from pyccl.errors import RemoteProtocolError

NO_PLAN: Final = b""  # equal shares, the ring in rank order, and only where it is asked for
NEVER: Final = limits.U64_MAX
PACE_DIRECT: Final = 1_000_000
_VERSION: Final = 1
_HEAD: Final = struct.Struct("<BBHQI")  # version, flags, members, ring_from_bytes, ring_pace; then what the flags say
_HAS_SHARES: Final = 1
_HAS_RING: Final = 2
_HAS_PIECE: Final = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """shares: weights of what the ranks own, not all 0; empty: equal. ring: every rank once; empty: rank order.
    ring_from_bytes: from this input size on a reduction with algorithm "auto" takes the ring; NEVER: none does.
    piece_bytes: a power of two, limits.PLAN_PIECE_MIN..MAX, of the pieces of shares; 0: 2 * PLAN_PIECE_MAX.
    ring_pace: what a byte more costs there, in millionths of what it costs direct: less than PACE_DIRECT."""

    shares: tuple[int, ...] = ()
    ring: tuple[int, ...] = ()
    ring_from_bytes: int = NEVER
    piece_bytes: int = 0
    ring_pace: int = 0

    def encode(self, members: int) -> bytes:
        """Our own bug if it does not fit so many members."""
        reason = _reason_to_refuse(self, members)
        assert reason is None, reason
        if self == Plan():
            return NO_PLAN
        flags = (_HAS_SHARES if self.shares else 0) | (_HAS_RING if self.ring else 0)
        flags |= _HAS_PIECE if self.piece_bytes else 0
        head = _HEAD.pack(_VERSION, flags, members, self.ring_from_bytes, self.ring_pace)
        piece = struct.pack("<I", self.piece_bytes) if self.piece_bytes else b""
        return head + piece + struct.pack(f"<{len(self.shares)}I{len(self.ring)}H", *self.shares, *self.ring)


def decode_untrusted(data: bytes, members: int) -> Plan:
    """RemoteProtocolError unless these are the bytes of a plan for so many members."""
    if data == NO_PLAN:
        return Plan()
    if len(data) < _HEAD.size:
        raise RemoteProtocolError(f"a plan of {len(data)} bytes")
    version, flags, world, ring_from_bytes, ring_pace = _HEAD.unpack_from(data)
    if version != _VERSION or flags > (_HAS_SHARES | _HAS_RING | _HAS_PIECE) or world != members:
        raise RemoteProtocolError(f"plan version {version}, flags {flags}, for {world} members of {members}")
    share_count, ring_count = (members if flags & flag else 0 for flag in (_HAS_SHARES, _HAS_RING))
    piece_count = 1 if flags & _HAS_PIECE else 0
    layout = struct.Struct(f"<{piece_count + share_count}I{ring_count}H")
    if len(data) != _HEAD.size + layout.size:
        raise RemoteProtocolError(f"a plan for {members} members has not {len(data)} bytes")
    numbers = layout.unpack_from(data, _HEAD.size)
    piece_bytes, numbers = (numbers[0], numbers[1:]) if piece_count else (0, numbers)
    plan = Plan(numbers[:share_count], numbers[share_count:], ring_from_bytes, piece_bytes, ring_pace)
    reason = _reason_to_refuse(plan, members)
    if reason is None and piece_count and piece_bytes == 0:
        reason = "a piece of 0 bytes"
    if reason is None and plan == Plan():
        reason = "a plan that says nothing is empty"
    if reason is not None:
        raise RemoteProtocolError(reason)
    return plan


def carry(plan: Plan, before: Sequence[bytes], after: Sequence[bytes]) -> Plan:
    """The plan of other members (peer ids in rank order): who stays keeps weight and place in the ring; who is new gets
    the mean weight, at least 1, and stands at the end of the ring, the lower id first."""
    rank_after = {peer: rank for rank, peer in enumerate(after)}
    rank_before = {peer: rank for rank, peer in enumerate(before)}
    new = [rank for rank, peer in enumerate(after) if peer not in rank_before]
    shares: tuple[int, ...] = ()
    if plan.shares:
        mean = max(1, sum(plan.shares) // len(plan.shares))
        shares = tuple(plan.shares[rank_before[peer]] if peer in rank_before else mean for peer in after)
        if not any(shares):
            shares = ()  # those who owned everything are gone
    ring: tuple[int, ...] = ()
    if plan.ring:
        stay = [rank_after[before[rank]] for rank in plan.ring if before[rank] in rank_after]
        ring = (*stay, *new)
    return Plan(shares, ring, plan.ring_from_bytes, plan.piece_bytes, plan.ring_pace)


def carry_bytes(data: bytes, before: Sequence[bytes], after: Sequence[bytes]) -> bytes:
    """As ``carry``, of a plan that was judged."""
    return carry(decode_untrusted(data, len(before)), before, after).encode(len(after))


def is_piece(size_bytes: int) -> bool:
    return limits.PLAN_PIECE_MIN <= size_bytes <= limits.PLAN_PIECE_MAX and size_bytes & (size_bytes - 1) == 0


def _reason_to_refuse(plan: Plan, members: int) -> str | None:
    if plan.shares and (len(plan.shares) != members or not any(plan.shares)):
        return f"a plan for {members} members whose shares are {len(plan.shares)}, or all 0"
    if plan.shares and not all(0 <= share <= limits.U32_MAX for share in plan.shares):
        return "a share beyond 2**32 - 1"
    if plan.ring and sorted(plan.ring) != list(range(members)):
        return f"a ring that is no order of {members} members"
    if not 0 <= plan.ring_from_bytes <= NEVER:
        return f"ring_from_bytes={plan.ring_from_bytes}"
    if plan.piece_bytes and not is_piece(plan.piece_bytes):
        return f"pieces of {plan.piece_bytes} bytes"
    if not 0 <= plan.ring_pace < PACE_DIRECT:
        return f"ring_pace={plan.ring_pace}"
    return None
