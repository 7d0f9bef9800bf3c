"""Members that a master asks to dial who has asked it (Probe): whom it asks, how often, and what they tell. Pure.

A member is asked for no more than one connection, to the address that the master itself saw, if that is a public one
and not where the member is. So often and no more. Spec: proto/wire.md 12.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from pyccl._proto import limits
from pyccl._proto.budget import Budget
from pyccl._proto.candidates import is_public, place
from pyccl._proto.master_records import PeerKey
from pyccl._proto.messages import DialTold


@dataclass(slots=True)
class _Open:
    until_s: float
    told: dict[PeerKey, DialTold | None]  # by whom was asked; None: it has not answered

    def is_over(self, now_s: float) -> bool:
        return now_s >= self.until_s or None not in self.told.values()


class DialBacks:
    """A master's part. Tickets are the shell's, each given once."""

    def __init__(self) -> None:
        self._budget = Budget(limits.DIAL_BACKS_BURST, limits.DIAL_BACK_EVERY_S)
        self._open: dict[int, _Open] = {}
        self._turn = 0

    def begin(self, ticket: int, host: str, members: Iterable[tuple[PeerKey, str]], now_s: float) -> list[PeerKey]:
        """Who is to dial, in what order does not matter.

        members: that can be asked, and where each is seen. It is not looked at before it is known that some may be.
        """
        chosen: list[PeerKey] = []
        if is_public(host) and self._budget.take(now_s):
            chosen = self._chosen(host, members)
            self._turn += 1
        self._open[ticket] = _Open(now_s + limits.DIAL_TOLD_S, dict.fromkeys(chosen))
        return chosen

    def told(self, ticket: int, by: PeerKey, reason: str) -> None:
        """What nobody asked for, or no longer, has no effect."""
        entry = self._open.get(ticket)
        if entry is not None and by in entry.told:
            entry.told[by] = DialTold(by[0], reason)

    def over(self, now_s: float) -> list[tuple[int, tuple[DialTold, ...]]]:
        """Those that all have answered, or that have waited long enough: each is told once."""
        over = [ticket for ticket, entry in self._open.items() if entry.is_over(now_s)]
        return [(ticket, tuple(t for t in self._open.pop(ticket).told.values() if t is not None)) for ticket in over]

    def _chosen(self, host: str, members: Iterable[tuple[PeerKey, str]]) -> list[PeerKey]:
        """From as many places as there are, others each time. A neighbour says nothing of how others fare."""
        not_from = "", place(host)
        able = [(key, at) for key, seen in members if (at := place(seen)) not in not_from]  # see candidates.may_dial
        first = self._turn % len(able) if able else 0
        places: dict[str, list[PeerKey]] = {}
        for key, at in able[first:] + able[:first]:
            places.setdefault(at, []).append(key)
        by_turns = itertools.chain.from_iterable(itertools.zip_longest(*places.values()))
        return [key for key in by_turns if key is not None][: limits.DIALERS_MAX]
