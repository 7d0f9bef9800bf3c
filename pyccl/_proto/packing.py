"""Whether chunks of state should be packed on their way: decided from what was measured, again and again.

Packing pays where the line is the slowest of three that work at the same time: the holders that pack, the line, and the
fetcher that unpacks. The fetcher decides, since it knows the rate of its lines and has chunks of this very state: it
packs one now and then itself, as long as that costs next to nothing (SAMPLING). What comes back packed is a sample too,
and if it comes no faster than the line alone would bring it, the holders are slower than the sample said.
Pure: no clock, no zstd.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

GAIN_MIN: Final = 0.9  # of the time as it is: packing must save more than a tenth
SAMPLING: Final = 0.02  # of the time of a fetch may go into samples
_WINDOW_S: Final = 0.25
_WINDOW_PIECES: Final = 4
_SAMPLES: Final = 8
_TRIAL_WINDOWS: Final = 3  # before the rate at which packed pieces come counts
_FORGIVING: Final = 1.1


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes a second, of all holders together, and ratio: packed to unpacked bytes."""

    line: float
    ratio: float
    pack: float
    unpack: float


def decide(measured: Measured) -> tuple[bool, str]:
    """Whether to pack, and why, for people. The time per byte is that of the slowest stage."""
    plain_s = 1 / measured.line
    stages = {"line": measured.ratio / measured.line, "packing": 1 / measured.pack, "unpacking": 1 / measured.unpack}
    slowest = max(stages, key=lambda stage: stages[stage])
    share = stages[slowest] / plain_s
    text = (
        f"line {measured.line / 1e6:.1f} MB/s, packed to {measured.ratio:.0%} at {measured.pack / 1e6:.0f} MB/s: "
        f"{share:.0%} of the time, by {slowest}"
    )
    return share < GAIN_MIN, text


@dataclass(slots=True)
class _Period:
    """The windows since pieces were last asked for in another way."""

    packed: bool
    windows: int = 0
    seconds: float = 0.0
    wire_bytes: int = 0
    size_bytes: int = 0


class Packing:
    """One fetch. Times are seconds of one clock that never goes back."""

    def __init__(self, holders: int) -> None:
        self.packed = False  # how to ask now
        self.reason = "not measured"
        self._holders = holders
        self._began_s: float | None = None
        self._window_s = 0.0
        self._window: list[tuple[int, int, bool]] = []  # wire bytes, bytes, was asked for packed
        self._period = _Period(packed=False)
        self._line = self._seen_pack = self._own_pack = self._unpack = 0.0  # bytes a second; 0: not known
        self._spent_s = 0.0
        self._samples: deque[tuple[int, int]] = deque(maxlen=_SAMPLES)

    def arrived(self, now: float, wire_bytes: int, size_bytes: int, *, asked_packed: bool) -> None:
        """A piece is here. asked_packed: how it was asked for; a holder may send it as it is all the same."""
        if self._began_s is None:  # what came before the first one is the line's delay
            self._began_s = self._window_s = now
            return
        self._window.append((wire_bytes, size_bytes, asked_packed))
        if asked_packed:
            self._samples.append((size_bytes, wire_bytes))
        seconds = now - self._window_s
        if seconds < _WINDOW_S or len(self._window) < _WINDOW_PIECES:
            return
        self._close_window(seconds)
        self._window_s, self._window = now, []

    def _close_window(self, seconds: float) -> None:
        asked = {entry[2] for entry in self._window}
        if asked != {self.packed}:
            return  # of before and after a change
        if self._period.packed != self.packed:
            self._period = _Period(self.packed)
        period = self._period
        period.windows += 1
        period.seconds += seconds
        period.wire_bytes += sum(entry[0] for entry in self._window)
        period.size_bytes += sum(entry[1] for entry in self._window)
        wire, size = period.wire_bytes / period.seconds, period.size_bytes / period.seconds
        if not self.packed:
            self._line = wire
            self._seen_pack *= _FORGIVING  # what held the holders up may be over
        elif period.windows >= _TRIAL_WINDOWS:
            self._line = max(self._line, wire)
            self._seen_pack = size if size < self._line else 0.0
        self._decide()

    def wants_sample(self, now: float) -> bool:
        """Whether to pack a piece that came as it is, to see what that gives."""
        if self._began_s is None or self._line == 0 or self.packed:
            return False
        if self._own_pack and self._line >= GAIN_MIN * self._own_pack * self._holders:
            return False  # too fast a line, whatever the ratio
        return self._spent_s <= SAMPLING * (now - self._began_s)

    def sampled(self, size_bytes: int, packed_bytes: int, pack_s: float, unpack_s: float) -> None:
        """A piece was packed here, in `pack_s`, and unpacked again."""
        self._spent_s += pack_s + unpack_s
        self._samples.append((size_bytes, min(packed_bytes, size_bytes)))
        self._own_pack = size_bytes / pack_s
        self._unpack = size_bytes / unpack_s
        self._decide()

    def _decide(self) -> None:
        if not self._samples or self._line == 0 or self._own_pack == 0:
            return
        pack = self._own_pack * self._holders
        if self._seen_pack:
            pack = min(pack, self._seen_pack)
        sizes, packed = map(sum, zip(*self._samples, strict=True))
        self.packed, self.reason = decide(Measured(self._line, packed / sizes, pack, self._unpack))
