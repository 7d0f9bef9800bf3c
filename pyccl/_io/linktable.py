"""LinkTable: what a member knows of its links to the others: measured in rounds (`measure.py`), confirmed by traffic.

Traffic proves what a line carries at least. So it raises a rate, and a rate that it comes near to stays good without
being measured again; that it is less says nothing.
Threads: the session's and the one that measures; a lock joins them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from pyccl._proto import limits, measuring
from pyccl._proto.epoch import NO_ID
from pyccl._proto.messages import LinkMeasure, Measured, Path
from pyccl._proto.topology import Cpu

FRESH_S: Final = 600.0  # a rate that nothing has confirmed for so long is measured again
_CONFIRMS: Final = 0.5  # of the rate that is known
_NEWS: Final = 0.2  # so much more or less is worth a message
_DIRECT: Final = (Path.DIRECT, NO_ID)
_NONE: Final[Mapping[bytes, tuple[int, bytes]]] = {}


@dataclass(frozen=True, slots=True)
class _Known:
    rate: float = 0.0  # bytes per second sent; 0: not measured
    crowd: float = 0.0  # while it sent to others, too
    rtt_s: float = 0.0
    at: float = float("-inf")


class LinkTable:
    """Of one session, by peer id. Times are of ``time.monotonic``."""

    def __init__(self) -> None:
        self._known: dict[bytes, _Known] = {}
        self._cpu, self._down = Cpu(0.0, 0.0, 0.0), 0.0
        self._counted: tuple[float, Mapping[bytes, int]] = (0.0, {})
        self._told = Measured(0, 0, 0, 0, ())
        self._lock = threading.Lock()

    def lacks(self, peer: bytes, now: float) -> bool:
        known = self._known.get(peer)
        return known is None or now - known.at >= FRESH_S

    def round_trip_s(self, peer: bytes) -> float | None:
        """None: not measured."""
        known = self._known.get(peer)
        return known.rtt_s if known is not None and known.rtt_s > 0 else None

    def measured(self, peer: bytes, rate: float, rtt_s: float, now: float) -> None:
        """In a round. A rate of 0 is none: it is measured again the next time."""
        if rate > 0:
            self._change(peer, rate=rate, rtt_s=rtt_s, at=now)

    def crowded(self, peer: bytes, rate: float) -> None:
        self._change(peer, crowd=rate)

    def received(self, rate: float) -> None:
        """From several at once, while nobody else received; 0: not measured."""
        self._down = rate

    def works(self, cpu: Cpu) -> None:
        """What this host's processor was measured to do; rates of 0: not known, the last one stays."""
        self._cpu = Cpu(cpu.move or self._cpu.move, cpu.fold or self._cpu.fold, cpu.code or self._cpu.code)

    def carried(self, delivered: Mapping[bytes, int], now: float) -> None:
        """So many bytes of ours the others have by now."""
        (before, counted), self._counted = self._counted, (now, delivered)
        if now <= before:
            return
        rates = {peer: (count - counted[peer]) / (now - before) for peer, count in delivered.items() if peer in counted}
        for peer, rate in rates.items():
            known = self._known.get(peer)
            if known is not None and 0 < known.rate * _CONFIRMS <= rate:
                self._change(peer, rate=max(rate, known.rate), at=now)
        crowd = {peer: known.crowd for peer, known in self._known.items() if known.crowd > 0}
        are_all_busy = all(rates.get(peer, 0.0) >= _CONFIRMS * rate for peer, rate in crowd.items())
        if crowd and are_all_busy and sum(rates.values()) > sum(crowd.values()):
            for peer, rate in rates.items():
                self._change(peer, crowd=rate)

    def news(self, members: Sequence[bytes], paths: Mapping[bytes, tuple[int, bytes]] = _NONE) -> Measured | None:
        """What the master is to be told of the links to these; None: little has changed since the last time.

        paths: of members that we are not linked to directly: how, and who relays it if we know.
        """
        with self._lock:
            all_ = {**dict.fromkeys(paths, _Known()), **self._known}
        known = sorted((peer, known) for peer, known in all_.items() if peer in members)
        links = tuple(
            LinkMeasure(
                *(peer, measuring.clip_rate(k.rate), measuring.clip_rate(k.crowd)),
                min(round(k.rtt_s * 1e6), limits.RTT_US_MAX),
                *paths.get(peer, _DIRECT),
            )
            for peer, k in known
        )
        told = {link.peer: link for link in self._told.links}
        mended = any(link.path != Path.DIRECT and link.peer not in paths for link in self._told.links)
        down = measuring.clip_rate(self._down)
        same = all(link.peer in told and not _differs(link, told[link.peer]) for link in links)
        if same and not mended and not _is_news(down, self._told.down):
            return None
        rates = (self._cpu.move, self._cpu.fold, self._cpu.code)
        move, fold, code = map(measuring.clip_rate, rates)
        self._told = Measured(move, fold, code, down, links)
        return self._told

    def keep(self, members: Sequence[bytes]) -> None:
        """Forget who has left: whoever comes back may be elsewhere."""
        with self._lock:
            staying = {peer: known for peer, known in self._known.items() if peer in members}
            if len(staying) < len(self._known):
                self._down = 0.0  # they may have been what it came from
            self._known = staying

    def _change(self, peer: bytes, **changes: float) -> None:
        with self._lock:
            self._known[peer] = replace(self._known.get(peer, _Known()), **changes)


def _differs(a: LinkMeasure, b: LinkMeasure) -> bool:
    rates = (a.rate, b.rate), (a.crowd, b.crowd)
    return (a.path, a.via) != (b.path, b.via) or any(_is_news(x, y) for x, y in rates)


def _is_news(rate: float, told: float) -> bool:
    return abs(rate - told) > _NEWS * max(rate, told)
