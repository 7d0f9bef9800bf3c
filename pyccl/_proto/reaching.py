"""The master's part where two peers do not reach each other: it brings their offers to punch together.

Punching: both connect to the other's address, as the master sees it, at the same moment, so that each one's router has
let a packet out before the other's comes in. An address is a host at which the master has seen who names it, or nothing
comes of the offer. It keeps offers for PUNCH_S and decides nothing else. Spec: proto/wire.md 11.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from pyccl._proto import limits
from pyccl._proto.candidates import place
from pyccl._proto.master_records import PeerKey
from pyccl._proto.messages import Punch, PunchGo


@dataclass(frozen=True, slots=True)
class _Offer:
    punch: Punch
    until: float


class Offers:
    """At most one of each peer to each other."""

    def __init__(self) -> None:
        self._by_pair: dict[tuple[PeerKey, PeerKey], _Offer] = {}

    def add(self, sender: PeerKey, to: PeerKey, punch: Punch, now: float) -> Punch | None:
        """The other's offer, if that is there: both are taken then."""
        self._by_pair = {pair: offer for pair, offer in self._by_pair.items() if offer.until > now}
        other = self._by_pair.pop((to, sender), None)
        if other is not None:
            self._by_pair.pop((sender, to), None)
            return other.punch
        self._by_pair[sender, to] = _Offer(punch, now + limits.PUNCH_S)
        return None


def are_shown(punch: Punch, places: Collection[str]) -> bool:
    """Whether who offers it was seen at all of its endpoints' places: nobody has others connect to a third."""
    return all((at := place(endpoint.host)) != "" and at in places for endpoint in punch.endpoints)


def begin(offer: Punch, other: Punch, peer: bytes) -> PunchGo:
    """To who made `offer`: that it begins when `peer`, who made the other one, does. It takes each half its round
    trip to hear of it."""
    count = min(len(offer.endpoints), len(other.endpoints))
    slowest_us = max(offer.rtt_us, other.rtt_us)
    delay_us = (slowest_us - offer.rtt_us) // 2 + _MARGIN_US
    return PunchGo(peer, other.endpoints[:count], min(delay_us, limits.RTT_US_MAX))


_MARGIN_US: Final = round(limits.PUNCH_MARGIN_S * 1e6)
