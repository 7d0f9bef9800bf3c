"""What arrays hold, and how to compare what became of them. What that must be: ``pyccl.reference_all_reduce``.

Agent and test draw the same input from (seed, index), so no array ever travels between them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes  # noqa: F401  gives NumPy the dtype bfloat16
import numpy as np

Array = np.ndarray[Any, Any]

INTEGERS: Final = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
FLOATS: Final = ("float16", "bfloat16", "float32", "float64")
DTYPES: Final = INTEGERS + FLOATS
OPS: Final = ("sum", "avg", "prod", "min", "max")
KINDS: Final = ("plain", "special", "few", "bits", "scaled")  # "flat" is for those who want it quick


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
    def one(self) -> int:
        return ((1 << (self.exponent_bits - 1)) - 1) << self.mantissa_bits

    @property
    def specials(self) -> list[int]:
        """What is easy to get wrong: NaNs of both kinds with payloads, infinities, zeros, denormals, limits, one and
        its neighbours; of both signs."""
        quiet = 1 << (self.mantissa_bits - 1)
        nans = [self.infinity | quiet, self.infinity | quiet | 5, self.infinity | 1, self.infinity | (2 * quiet - 1)]
        denormal_max, least, most = (1 << self.mantissa_bits) - 1, 1 << self.mantissa_bits, self.infinity - 1
        positive = [*nans, self.infinity, 0, 0, 1, denormal_max, least, most, self.one - 1, self.one, self.one + 1]
        return [*positive, *(pattern | 1 << (self.size - 1) for pattern in positive)]


_FLOATS: Final = {
    "float16": _Float(np.uint16, 5, 10),
    "bfloat16": _Float(np.uint16, 8, 7),
    "float32": _Float(np.uint32, 8, 23),
    "float64": _Float(np.uint64, 11, 52),
}


def draw(seed: int, index: int, count: int, dtype: str, kind: str = "plain") -> Array:
    """The input of the peer `index`.

    kind: "plain": sums round, products do not overflow (but of float16); integers wrap. "special": the patterns above,
    or an integer's limits. "few": zeros of both signs and few numbers, so that many are equal. "bits": any bits at
    all. "scaled": normally distributed times a power of two that may lead to denormals or overflow. "flat": quick.
    """
    if kind == "flat":
        return np.full(count, index + 1, dtype)
    rng = np.random.default_rng([seed, index])
    if kind == "bits":
        return rng.integers(0, 256, count * np.dtype(dtype).itemsize, np.uint8).view(dtype)
    if kind == "few":
        numbers = [-0.0, 0.0, 1.0, -1.0, 3.0] if dtype in FLOATS else [0, 1, 2, 3]
        return rng.choice(np.array(numbers), count).astype(dtype)
    return _draw_float(rng, count, dtype, kind) if dtype in FLOATS else _draw_integer(rng, count, dtype, kind)


def _draw_integer(rng: np.random.Generator, count: int, dtype: str, kind: str) -> Array:
    limits = np.iinfo(dtype)
    if kind == "special":
        patterns = np.array([limits.min, limits.min + 1, 0, 1, limits.max - 1, limits.max], dtype)
        return patterns[rng.integers(len(patterns), size=count)]
    return rng.integers(limits.min, limits.max, count, dtype=dtype, endpoint=True)


def _draw_float(rng: np.random.Generator, count: int, dtype: str, kind: str) -> Array:
    layout = _FLOATS[dtype]
    if kind == "special":
        patterns = np.array(layout.specials, layout.bits)
        return patterns[rng.integers(len(patterns), size=count)].view(dtype)
    if kind == "scaled":
        reach = (1 << (layout.exponent_bits - 1)) + layout.mantissa_bits // 2
        scale = 2.0 ** int(rng.integers(-reach, min(reach, 1000)))
        with np.errstate(all="ignore"):
            return (rng.standard_normal(count) * scale).astype(dtype)
    # any sign and mantissa, exponents from 2**-7 to 2**8
    raw = rng.integers(0, np.iinfo(layout.bits).max, count, layout.bits, endpoint=True)
    exponents = (raw & layout.bits(15)) + layout.bits((1 << (layout.exponent_bits - 1)) - 8)
    keep = layout.bits(((1 << layout.size) - 1) & ~layout.infinity)
    return (raw & keep | exponents << layout.bits(layout.mantissa_bits)).view(dtype)


def sha(array: Array) -> str:
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data if array.size else b"").hexdigest()
