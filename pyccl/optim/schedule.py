"""Schedule: which fragment is sent and which is applied after a step. Pure counting.

With P fragments and H = sync_every, a slot has S = H / P steps, one exchange, and one fragment: the number of outer
steps committed so far, mod P. Members agree on that counter, so they agree on the fragment.

    slot 0, fragment 0        slot 1, fragment 1        slot 2, fragment 0 again      (P 2, S 4, delay 1)
    1     2     3     4   |   1     2     3     4   |   1     2     3     4
                send  apply              send  apply               send  apply

Fragment i is applied for the first time after S(i+1) steps, with what it did in S(i+1) - delay, and then every H steps.
A slot whose exchange is not committed leaves the counter as it was: its fragment has the next slot too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pyccl.calls import check_range
from pyccl.errors import UsageError

_STEPS_MAX: Final = 1 << 31


@dataclass(frozen=True, slots=True)
class Schedule:
    """The slots of a run.

    sync_every: H, steps between two exchanges of a fragment. fragments: P, divides H. delay: steps between sending and
    applying, less than a slot has; 0 waits for the exchange.
    """

    sync_every: int
    fragments: int
    delay: int = 0

    def __post_init__(self) -> None:
        check_range("sync_every", self.sync_every, 1, _STEPS_MAX)
        check_range("fragments", self.fragments, 1, _STEPS_MAX)
        if self.sync_every % self.fragments:
            raise UsageError(
                f"sync_every={self.sync_every} is no multiple of the {self.fragments} fragments, which take turns"
            )
        check_range("delay", self.delay, 0, self.slot - 1)  # of the steps of a slot

    @property
    def slot(self) -> int:
        """Steps in a slot."""
        return self.sync_every // self.fragments

    def fragment(self, committed: int) -> int:
        """Whose turn it is after so many committed outer steps."""
        return committed % self.fragments

    def is_due(self, position: int, delay: int | None = None) -> bool:
        """Whether a slot's exchange, unless it has begun, begins after its step `position`, counted from 1.

        delay: of another replica.
        """
        return position >= self.slot - (self.delay if delay is None else delay)

    def ends(self, position: int) -> bool:
        """Whether its result is applied then; it is due by then."""
        return position == self.slot
