"""What arrays hold and what collectives must make of them, bit for bit: NumPy, one step after the other.

Agent and test draw the same input from (seed, peer's index), so no array ever travels between them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

Array = np.ndarray[Any, Any]

DTYPES: Final = ("int32", "int64", "float32", "float64")
OPS: Final = ("sum", "avg", "prod", "min", "max")
FLOATS: Final = ("float32", "float64")

_BITS: Final = {"float32": np.uint32, "float64": np.uint64}
_LAYOUT: Final = {  # unsigned type, mask of sign and mantissa, place of the exponent, exponent of 1
    "float32": (np.uint32, 0x807FFFFF, 23, 127),
    "float64": (np.uint64, 0x800FFFFFFFFFFFFF, 52, 1023),
}
_CANONICAL_NAN: Final = {"float32": 0x7FC00000, "float64": 0x7FF8000000000000}
# Bit patterns that are easy to get wrong: NaNs of both signs and kinds, infinities, zeros, denormals, limits.
_SPECIAL: Final = {
    "float32": (
        0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF812345, 0x7F800000, 0xFF800000, 0x00000000, 0x80000000,
        0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x3F800000, 0xBF800000,
    ),
    "float64": (
        0x7FF8000000000000, 0xFFF8000000000000, 0x7FF0000000000001, 0xFFF0000000012345, 0x7FF0000000000000,
        0xFFF0000000000000, 0x0000000000000000, 0x8000000000000000, 0x0000000000000001, 0x8000000000000001,
        0x000FFFFFFFFFFFFF, 0x0010000000000000, 0x7FEFFFFFFFFFFFFF, 0xFFEFFFFFFFFFFFFF, 0x3FF0000000000000,
        0xBFF0000000000000,
    ),
}  # fmt: skip


def draw(seed: int, index: int, count: int, dtype: str, kind: str = "plain") -> Array:
    """The input of the peer `index`. kind: "plain", or "special": the bit patterns above, mixed; "flat": quick."""
    if kind == "flat":
        return np.full(count, index + 1, dtype)
    rng = np.random.default_rng([seed, index])
    if kind == "special":
        patterns = np.array(_SPECIAL[dtype], _BITS[dtype])
        return patterns[rng.integers(len(patterns), size=count)].view(dtype)
    if dtype in FLOATS:  # any sign and mantissa, exponents from 2**-7 to 2**8: sums round, products do not overflow
        bits, keep, shift, bias = _LAYOUT[dtype]
        raw = rng.integers(0, np.iinfo(bits).max, count, bits, endpoint=True)
        exponents = (raw & bits(15)) + bits(bias - 7)
        return (raw & bits(keep) | exponents << bits(shift)).view(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, count, dtype=dtype, endpoint=True)  # sums and products wrap


def fold(op: str, inputs: Sequence[Array]) -> Array:
    """What every member must hold after an all-reduce of `inputs`, which stand in rank order."""
    step = _STEPS[op]
    with np.errstate(all="ignore"):
        result = inputs[0].copy()
        for array in inputs[1:]:
            result = step(result, array)
        if op == "avg":
            result = result / result.dtype.type(len(inputs))
    return _canonical(result)


def _canonical(array: Array) -> Array:
    if array.dtype.name in FLOATS:
        array.view(_BITS[array.dtype.name])[np.isnan(array)] = _CANONICAL_NAN[array.dtype.name]
    return array


def _ordered(
    pick: Callable[[Array, Array], Array], zeros: Callable[[Array, Array], Array]
) -> Callable[[Array, Array], Array]:
    """min or max: NaN wins, and of two zeros the sign decides."""

    def step(x: Array, y: Array) -> Array:
        if x.dtype.name not in FLOATS:
            return pick(x, y)
        bits = _BITS[x.dtype.name]
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
