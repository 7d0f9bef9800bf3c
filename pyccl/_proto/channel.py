"""Channels: what is numbered together. A tag of all members, or a tag of one pair that exchanges (proto/wire.md 4).

Control messages name a channel by (space, number). In SPACE_PAIR the number carries the two ranks in the member list of
the epoch that the message is about, so that no two pairs can be taken for each other and the master knows whom an
operation concerns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from pyccl._proto import limits
from pyccl.errors import RemoteProtocolError

SPACE_PAIR: Final = 2  # pyccl_space of pyccl.h
_RANK_BITS: Final = 8
_TAG_BITS: Final = 32


def pair_of(space: int, number: int) -> tuple[int, int] | None:
    """The two ranks, the lower one first; None: a channel of all members."""
    if space != SPACE_PAIR:
        return None
    ranks = number >> _TAG_BITS
    return ranks & (limits.MEMBERS_MAX - 1), ranks >> _RANK_BITS


def user_tag(number: int) -> int:
    return number & limits.U32_MAX


def participants(space: int, number: int, members: Sequence[bytes]) -> tuple[bytes, ...]:
    """Whom its operations concern, of the epoch's members in rank order; none if a rank is nobody's."""
    pair = pair_of(space, number)
    if pair is None:
        return tuple(members)
    return tuple([members[rank] for rank in pair]) if pair[1] < len(members) else ()


def check_untrusted(entry: Any) -> None:
    """Judge the channel of a count, key, report or verdict by itself."""
    pair = pair_of(entry.space, entry.tag)
    if pair is None and entry.tag > limits.U32_MAX:
        raise RemoteProtocolError("a tag has 32 bits")
    if pair is not None and not pair[0] < pair[1] < limits.MEMBERS_MAX:
        raise RemoteProtocolError("a pair is two ranks in ascending order")


def check_told_untrusted(told: Sequence[Any], peer: bytes, members: Sequence[bytes]) -> None:
    """Judge the channels that a member speaks of: of pairs only its own."""
    for entry in told:
        if entry.space == SPACE_PAIR and peer not in participants(entry.space, entry.tag, members):
            raise RemoteProtocolError("a member speaks of a pair that it is not of")
