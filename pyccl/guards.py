"""Guards: what a reduction refuses to take from a member (proto/wire.md 3.8)."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Final

from pyccl import errors

_FLOAT32: Final = struct.Struct("<f")
_LEAST: Final = 2.0**-149
_MOST: Final = (2 - 2.0**-23) * 2.0**127


@dataclass(frozen=True, slots=True)
class Guard:
    """Contributions with a NaN or an infinity, or beyond a limit, fail the operation on all members (``PoisonError``).

    max_abs: greatest absolute value of an element. max_norm: greatest Euclidean norm of a whole contribution. None:
    any. Positive, rounded to float32; where ``quantize`` is used they hold for what the codes decode to, too: leave
    room for that rounding. Equal on all members.

    A member looks at its own contribution before it sends anything, so ``Guard(max_norm=m)`` is exact for members that
    do what they should. The others look at what arrives: at every element, and at the norm of what they own a share
    of, so that one that lies gets a norm of at most ``m * sqrt(world_size)`` past them (of two: ``m``).
    """

    max_abs: float | None = None
    max_norm: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_abs", "max_norm"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _limit(name, value))

    def encoded(self) -> bytes:
        """The two limits as they travel."""
        return _FLOAT32.pack(self.max_abs or 0.0) + _FLOAT32.pack(self.max_norm or 0.0)

    def refuses(self, peak: float, squares: float) -> bool:
        """A whole contribution whose greatest |x| and sum of squares these are; both NaN where it is not finite."""
        if not math.isfinite(peak) or (self.max_abs is not None and peak > self.max_abs):
            return True
        return self.max_norm is not None and squares > self.max_norm**2


FINITE: Final = Guard()


def parse_guard(guard: Guard | str | None) -> Guard | None:
    """UsageError unless it is None, "finite" or a Guard."""
    if guard is None or isinstance(guard, Guard):
        return guard
    if guard != "finite":
        raise errors.UsageError(f'guard={guard!r}: None, "finite" or a Guard is needed')
    return FINITE


def _limit(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise errors.UsageError(f"{name}={value!r}: a number is needed")
    if not _LEAST <= float(value) <= _MOST:
        raise errors.UsageError(f"{name}={value!r}: a positive number within float32 is needed")
    rounded: float = _FLOAT32.unpack(_FLOAT32.pack(float(value)))[0]
    return rounded
