"""Saved states: what is kept, who is followed, and which one a group goes on with when nobody votes. Pure.

observer   follows one member at a time (`Sources`), wants so many revisions at a time (`wants`), keeps the last files
           and always the newest revision (`newest`, `to_drop`), and offers that
sync       nobody votes (`asks_first`): members ask the observers they know, each looks for the best offer (`best`), all
           tell each other, one takes it into its arrays (`taker`), and the election is held as ever
afterwards a state from a file that nobody else has agreed to does not vote (`after_sync`): it may be stale

Files, offers and bytes are `_io`'s (statestore, observed, observer, statesync). Spec: proto/wire.md 6, 7.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Protocol, TypeVar

from pyccl._proto.election import Record, nobody_votes
from pyccl._proto.epoch import Member

SHUNNED_S: Final = 60.0  # a member whose file was none


class Kept(Protocol):
    """A whole file."""

    @property
    def revision(self) -> int: ...

    @property
    def written_ns(self) -> int: ...


class Offer(Protocol):
    """Of an observer."""

    @property
    def revision(self) -> int: ...

    @property
    def name(self) -> str: ...


K = TypeVar("K", bound=Kept)
O = TypeVar("O", bound=Offer)  # noqa: E741


# ---- an observer


def newest(kept: Iterable[K]) -> K | None:
    """By revision; the latest written of equal ones."""
    return max(kept, key=lambda one: (one.revision, one.written_ns), default=None)


def to_drop(kept: Sequence[K], keep: int) -> list[K]:
    """All but the last `keep` (the latest written last), and but the newest: a stale state may have gone on since."""
    stays = newest(kept)
    return [one for one in kept[:-keep] if one is not stays]


def wants(have: int, every: int, revision: int) -> bool:
    """Whether who follows wants it. have: the last revision + 1, 0: none. A lower revision, too: the run has begun
    anew, or gone back to an older state."""
    told = revision + 1
    return have == 0 or told < have or told >= have + max(every, 1)


class Sources:
    """Members in turn, but for those whose file was no state."""

    def __init__(self) -> None:
        self._turn = 0
        self._shunned: dict[bytes, float] = {}  # incarnations, and until when

    def next(self, members: Sequence[Member], now: float) -> Member | None:
        self._shunned = {incarnation: until for incarnation, until in self._shunned.items() if until > now}
        usable = [member for member in members if member.incarnation not in self._shunned]
        if not usable:
            return None
        self._turn += 1
        return usable[(self._turn - 1) % len(usable)]

    def shun(self, member: Member, now: float) -> None:
        self._shunned[member.incarnation] = now + SHUNNED_S


# ---- a sync


def asks_first(records: Sequence[Record]) -> bool:
    """Whether observers are to be asked before the election."""
    return nobody_votes(records) and any(record.asks for record in records)


def best(offers: Iterable[O]) -> O | None:
    """The newest that this member is offered."""
    return min(offers, key=lambda offer: (-offer.revision, offer.name), default=None)


def taker(members: Sequence[bytes], told: Sequence[int], newest_held: int) -> tuple[int, bytes | None]:
    """(least revision that somebody must hold then, who takes what it is offered; None: members hold as new a state).

    told: of each member in order, the revision + 1 of its best offer; 0: it has none. What is on offer must be held
    even if nobody takes it: whoever held it may be lost before the election.
    """
    most = max(told, default=0)
    return max(0, most - 1), members[told.index(most)] if most - 1 > newest_held else None


def after_sync(restored: bool, *, alone: bool) -> tuple[bool, bool]:
    """(restored, votes) of a member after a sync that was committed.

    A copy from a file may be stale: while nobody else has agreed to it, whoever brings a newer one is heard.
    """
    restored = restored and alone
    return restored, not restored
