"""Floats by their definition: bits stand for a fraction, and every operation is exact and then rounded once.

Python's Fraction alone, no NumPy and no floats: what it has in common with the oracle and with the C core is IEEE 754.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final


@dataclass(frozen=True)
class Format:
    exponent_bits: int
    mantissa_bits: int

    @property
    def infinity(self) -> int:
        return ((1 << self.exponent_bits) - 1) << self.mantissa_bits

    @property
    def nan(self) -> int:
        """The canonical one."""
        return self.infinity | 1 << (self.mantissa_bits - 1)

    @property
    def sign(self) -> int:
        return 1 << (self.exponent_bits + self.mantissa_bits)

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1


F16: Final = Format(5, 10)
BF16: Final = Format(8, 7)
F32: Final = Format(8, 23)
F64: Final = Format(11, 52)
FORMATS: Final = {"float16": F16, "bfloat16": BF16, "float32": F32, "float64": F64}


@dataclass(frozen=True)
class Number:
    """kind: "nan", "inf" or "finite". A zero has a sign, too."""

    kind: str
    negative: bool = False
    size: Fraction = Fraction(0)

    @property
    def value(self) -> Fraction:
        assert self.kind == "finite"
        return -self.size if self.negative else self.size


NAN: Final = Number("nan")


def finite(value: Fraction, zero_negative: bool = False) -> Number:
    return Number("finite", value < 0 or (value == 0 and zero_negative), abs(value))


def decode(bits: int, form: Format) -> Number:
    negative, rest = bool(bits & form.sign), bits & (form.sign - 1)
    if rest >= form.infinity:
        return NAN if rest > form.infinity else Number("inf", negative)
    exponent, mantissa = rest >> form.mantissa_bits, rest & ((1 << form.mantissa_bits) - 1)
    if exponent > 0:
        mantissa |= 1 << form.mantissa_bits
    power = max(exponent, 1) - form.bias - form.mantissa_bits
    return Number("finite", negative, mantissa * Fraction(2) ** power)


def encode(number: Number, form: Format) -> int:
    """Rounded to nearest, ties to even, denormals kept, overflow to infinity."""
    if number.kind == "nan":
        return form.nan
    sign = form.sign if number.negative else 0
    if number.kind == "inf":
        return sign | form.infinity
    return sign | min(_encode_size(number.size, form), form.infinity)


def _encode_size(size: Fraction, form: Format) -> int:
    """Patterns of one sign are in the order of their numbers, so a carry leads to the next exponent by itself."""
    if size == 0:
        return 0
    exponent_least = 1 - form.bias
    exponent = max(exponent_of(size), exponent_least)
    steps = round(size / Fraction(2) ** (exponent - form.mantissa_bits))  # Python's round: ties to even
    return ((exponent - exponent_least) << form.mantissa_bits) + steps


def exponent_of(size: Fraction) -> int:
    """The greatest power of two that is not above it, which is above 0."""
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    return exponent - 1 if size < Fraction(2) ** exponent else exponent


def rounded(number: Number, form: Format) -> Number:
    return decode(encode(number, form), form)


def add(x: Number, y: Number, form: Format) -> Number:
    if "nan" in (x.kind, y.kind):
        return NAN
    if "inf" in (x.kind, y.kind):
        if x.kind == y.kind and x.negative != y.negative:
            return NAN
        return x if x.kind == "inf" else y
    return rounded(finite(x.value + y.value, x.negative and y.negative), form)


def multiply(x: Number, y: Number, form: Format) -> Number:
    if "nan" in (x.kind, y.kind):
        return NAN
    negative = x.negative != y.negative
    if "inf" in (x.kind, y.kind):
        return NAN if is_zero(x) or is_zero(y) else Number("inf", negative)
    return rounded(Number("finite", negative, x.size * y.size), form)


def divide(x: Number, y: Number, form: Format) -> Number:
    """By a finite number above zero, which is all that anything here divides by."""
    assert y.kind == "finite" and y.value > 0
    return x if x.kind != "finite" else rounded(Number("finite", x.negative, x.size / y.size), form)


def is_zero(x: Number) -> bool:
    return x.kind == "finite" and x.size == 0


def order(x: Number) -> tuple[int, Fraction, bool]:
    """A key that puts -inf below all, +inf above, and -0 below +0."""
    if x.kind == "inf":
        return (-1 if x.negative else 1, Fraction(0), False)
    return (0, x.value, not x.negative)


def fold(op: str, inputs: Sequence[int], form: Format, weights: Sequence[Fraction] | None = None) -> int:
    """One element of an all-reduce: the members' bits in rank order -> the bits that all get. design.md 4.2"""
    wide = F64 if form is F64 else F32
    values = [decode(bits, form) for bits in inputs]
    if any(x.kind == "nan" for x in values):
        return form.nan  # whatever is done with it
    if op in ("min", "max"):
        return encode((min if op == "min" else max)(values, key=order), form)
    total = Fraction(len(values))
    if weights is not None:
        values = [multiply(x, rounded(finite(w), wide), wide) for x, w in zip(values, weights, strict=True)]
        total = Fraction(0)
        for weight in weights:
            total = rounded(finite(total + weight), F64).value
    result = values[0]
    for x in values[1:]:
        result = (multiply if op == "prod" else add)(result, x, wide)
    if op == "avg":
        result = divide(result, rounded(finite(total), wide), wide)
    return encode(result, form)
