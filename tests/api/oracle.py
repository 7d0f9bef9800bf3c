"""What arrays hold and what collectives must make of them, bit for bit: NumPy, one step after the other.

Agent and test draw the same input from (seed, peer's index), so no array ever travels between them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

Array = np.ndarray[Any, Any]

INTEGERS: Final = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
FLOATS: Final = ("float16", "float32", "float64")
DTYPES: Final = INTEGERS + FLOATS
OPS: Final = ("sum", "avg", "prod", "min", "max")


@dataclass(frozen=True)
class _Float:
    """How a float's bits lie."""

    bits: type[np.unsignedinteger[Any]]
    exponent_bits: int
    mantissa_bits: int

    @property
    def size(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def infinity(self) -> int:
        return ((1 << self.exponent_bits) - 1) << self.mantissa_bits

    @property
    def nan(self) -> int:
        """The canonical one: quiet, positive, no payload."""
        return self.infinity | 1 << (self.mantissa_bits - 1)

    @property
    def specials(self) -> list[int]:
        """What is easy to get wrong: NaNs of both kinds, infinities, zeros, denormals, limits, one; of both signs."""
        one = ((1 << (self.exponent_bits - 1)) - 1) << self.mantissa_bits
        denormal_max, least, most = (1 << self.mantissa_bits) - 1, 1 << self.mantissa_bits, self.infinity - 1
        positive = [self.nan, self.infinity | 1, self.infinity, 0, 1, denormal_max, least, most, one]
        return [*positive, *(pattern | 1 << (self.size - 1) for pattern in positive)]


_FLOATS: Final = {
    "float16": _Float(np.uint16, 5, 10),
    "float32": _Float(np.uint32, 8, 23),
    "float64": _Float(np.uint64, 11, 52),
}


def draw(seed: int, index: int, count: int, dtype: str, kind: str = "plain") -> Array:
    """The input of the peer `index`. kind: "plain", or "special": the bit patterns above, mixed; "flat": quick."""
    if kind == "flat":
        return np.full(count, index + 1, dtype)
    rng = np.random.default_rng([seed, index])
    if dtype in FLOATS:
        layout = _FLOATS[dtype]
        if kind == "special":
            patterns = np.array(layout.specials, layout.bits)
            return patterns[rng.integers(len(patterns), size=count)].view(dtype)
        # any sign and mantissa, exponents from 2**-7 to 2**8: sums round, products do not overflow (but of float16)
        raw = rng.integers(0, np.iinfo(layout.bits).max, count, layout.bits, endpoint=True)
        exponents = (raw & layout.bits(15)) + layout.bits((1 << (layout.exponent_bits - 1)) - 8)
        keep = layout.bits(((1 << layout.size) - 1) & ~layout.infinity)
        return (raw & keep | exponents << layout.bits(layout.mantissa_bits)).view(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, count, dtype=dtype, endpoint=True)  # sums and products wrap


def fold(op: str, inputs: Sequence[Array]) -> Array:
    """What every member must hold after an all-reduce of `inputs`, which stand in rank order."""
    dtype, step = inputs[0].dtype, _STEPS[op]
    wide = np.dtype("float32") if dtype == np.float16 else dtype  # accumulated there, rounded once
    with np.errstate(all="ignore"):
        result = inputs[0].astype(wide)
        for array in inputs[1:]:
            result = step(result, array.astype(wide))
        if op == "avg":
            result = result / wide.type(len(inputs))
        return _canonical(result.astype(dtype))


def _canonical(array: Array) -> Array:
    if array.dtype.name in FLOATS:
        layout = _FLOATS[array.dtype.name]
        array.view(layout.bits)[np.isnan(array)] = layout.nan
    return array


def _ordered(
    pick: Callable[[Array, Array], Array], zeros: Callable[[Array, Array], Array]
) -> Callable[[Array, Array], Array]:
    """min or max: NaN wins, and of two zeros the sign decides."""

    def step(x: Array, y: Array) -> Array:
        if x.dtype.name not in FLOATS:
            return pick(x, y)
        bits = _FLOATS[x.dtype.name].bits
        equal = zeros(x.view(bits), y.view(bits)).view(x.dtype)  # equal values differ in the sign of a zero only
        return _canonical(np.where(x == y, equal, pick(x, y)))  # NumPy's minimum and maximum propagate NaN

    return step


_STEPS: Final[dict[str, Callable[[Array, Array], Array]]] = {
    "sum": np.add,
    "avg": np.add,
    "prod": np.multiply,
    "min": _ordered(np.minimum, np.bitwise_or),
    "max": _ordered(np.maximum, np.bitwise_and),
}


def sha(array: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"").hexdigest()
