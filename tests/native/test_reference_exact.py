"""A second opinion: the oracle and the C core against exact fractions, so that they can't share a mistake."""

from __future__ import annotations

import os
import secrets
from fractions import Fraction
from typing import Any

import exact
import ml_dtypes
import numpy as np
import pytest
from exact import F32, F64, FORMATS, Number

import pyccl
from pyccl._native._pyccl import ffi, lib

TYPES: dict[str, tuple[Any, Any, int]] = {
    "float16": (np.float16, np.uint16, lib.PYCCL_FLOAT16),
    "bfloat16": (ml_dtypes.bfloat16, np.uint16, lib.PYCCL_BFLOAT16),
    "float32": (np.float32, np.uint32, lib.PYCCL_FLOAT32),
    "float64": (np.float64, np.uint64, lib.PYCCL_FLOAT64),
}
OPS = ("sum", "avg", "prod", "min", "max")
HEAD_BYTES = 8


@pytest.fixture
def rng() -> np.random.Generator:
    given = os.environ.get("PYCCL_TEST_SEED")
    seed = int(given) if given else secrets.randbits(31)
    print(f"seed: PYCCL_TEST_SEED={seed}")  # shown if the test failed
    return np.random.default_rng(seed)


def patterns(rng: np.random.Generator, name: str, count: int) -> list[int]:
    """Special ones, any bits, and numbers near one, halfway between two of a shorter type now and then."""
    form = FORMATS[name]
    one = form.bias << form.mantissa_bits
    least = 1 << form.mantissa_bits
    special = [0, 1, least - 1, least, form.infinity - 1, form.infinity, form.infinity | 1, form.nan | 3, one, one + 1]
    width = form.exponent_bits + form.mantissa_bits
    drawn = []
    for _ in range(count):
        kind = rng.integers(4)
        if kind == 0:
            bits = special[rng.integers(len(special))]
        elif kind == 1:
            bits = int(rng.integers(1 << width))
        else:
            bits = one + int(rng.integers(-(6 << form.mantissa_bits), 6 << form.mantissa_bits))
            if kind == 3:
                bits &= ~0 << (form.mantissa_bits // 2)  # sums of such meet ties
        drawn.append(bits | form.sign * int(rng.integers(2)))
    return drawn


def native(name: str, op: str, arrays: list[Any], weights: list[float] | None) -> Any:
    out = np.empty_like(arrays[0])
    pins = [ffi.from_buffer("uint8_t[]", x.view(np.uint8)) for x in (*arrays, out)]
    given = ffi.NULL if weights is None else ffi.new("double[]", weights)
    code = getattr(lib, f"PYCCL_{op.upper()}")
    inputs = ffi.new("void *[]", pins[:-1])
    assert lib.pyccl_reduce(TYPES[name][2], code, inputs, given, len(arrays), out.size, pins[-1]) == 0
    return out


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("op", [*OPS, "avg with weights"])
def test_folds_are_exact_fractions_rounded_once(name: str, op: str, rng: np.random.Generator) -> None:
    dtype, unsigned, _ = TYPES[name]
    count = 200
    for world in (2, 3, 5):
        inputs = [patterns(rng, name, count) for _ in range(world)]
        arrays = [np.array(bits, unsigned).view(dtype) for bits in inputs]
        weights = None
        if op == "avg with weights":
            weights = [float(w) for w in rng.choice([0.0, 1.0, 0.1, 1 / 3, 7.0, 1e-30, 1e20], world)]
            weights[0] = 0.7
        kind = op.split(maxsplit=1)[0]
        fractions = None if weights is None else [Fraction(w) for w in weights]
        expected = [exact.fold(kind, element, FORMATS[name], fractions) for element in zip(*inputs, strict=True)]
        oracle = pyccl.reference_all_reduce(arrays, op=kind, weights=weights).view(unsigned)
        core = native(name, kind, arrays, weights).view(unsigned)
        for i, bits in enumerate(expected):
            told = f"{name} {op} {weights}: {[hex(x[i]) for x in inputs]} -> {bits:#x}"
            assert oracle[i] == bits, f"{told}, the oracle says {oracle[i]:#x}"
            assert core[i] == bits, f"{told}, the core says {core[i]:#x}"


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "float64"])
def test_a_float_alone_is_widened_and_rounded_back_unchanged_but_for_a_nan(name: str) -> None:
    dtype, unsigned, _ = TYPES[name]
    bits = np.arange(0, 1 << 16, 1 if name == "float16" else 7, dtype=np.uint32) << (16 if name == "float32" else 0)
    x = bits.astype(unsigned).view(dtype)
    expected = [exact.encode(exact.decode(int(b), FORMATS[name]), FORMATS[name]) for b in bits]
    assert pyccl.reference_all_reduce([x]).view(unsigned).tolist() == expected
    assert native(name, "sum", [x], None).view(unsigned).tolist() == expected


# ---- codec uint8, proto/wire.md 3.6


def number(x: Any) -> Number:
    return exact.decode(int(np.array(x, np.float32).view(np.uint32)), F32)


def drawn_blocks(rng: np.random.Generator) -> list[Any]:
    """Finite float32: every size that there is, offsets much larger than the spread, denormals, the limits."""
    most = np.finfo(np.float32).max
    blocks = [np.array(x, np.float32) for x in ([-most, most, 0, 1], [most, -0.0], [-0.0, 0.0], [1e-45, 0], [5.0] * 3)]
    for exponent in range(-149, 128, 6):
        values = rng.uniform(-1, 1, 24) * 2.0**exponent
        blocks.append(values.astype(np.float32))
        blocks.append((values + 2.0 ** min(exponent + int(rng.integers(1, 30)), 127)).astype(np.float32))
    with np.errstate(over="ignore"):
        return [block for block in blocks if np.isfinite(block).all()]


def coded(block: Any) -> tuple[Number, Number, list[int], list[Number]]:
    """low, scale, codes and decoded elements, of the core."""
    encoded = np.empty(HEAD_BYTES + block.size, np.uint8)
    x, out = (ffi.from_buffer("uint8_t[]", a.view(np.uint8)) for a in (block, encoded))
    assert lib.pyccl_codec_encode(1, lib.PYCCL_FLOAT32, block.size, x, block.size, out) == 0
    decoded = np.empty_like(block)
    back = ffi.from_buffer("uint8_t[]", decoded.view(np.uint8))
    assert lib.pyccl_codec_decode(1, lib.PYCCL_FLOAT32, block.size, out, block.size, back) == 0
    low, scale = encoded[:HEAD_BYTES].view(np.float32)
    return number(low), number(scale), encoded[HEAD_BYTES:].tolist(), [number(d) for d in decoded]


def ulp(x: Fraction) -> Fraction:
    """A unit in the last place of a float32 of this size."""
    bits = min(exact.encode(exact.finite(abs(x)), F32), F32.infinity - 2)
    return exact.decode(bits + 1, F32).value - exact.decode(bits, F32).value


def sixteen_bits(x: Number) -> Fraction:
    """To 16 significant bits, ties to even."""
    step = Fraction(2) ** (exact.exponent_of(x.size) - 15)
    return round(x.value / step) * step


def test_codes_are_those_of_exact_fractions_rounded_step_by_step(rng: np.random.Generator) -> None:
    half = exact.finite(Fraction(1, 2))
    for block in drawn_blocks(rng):
        values = [number(x) for x in block]
        low, scale, codes, _ = coded(block)
        least, greatest = (pick(x.value for x in values) for pick in (min, max))
        assert (low.value, low.negative) == (least, least < 0)
        if least == greatest:
            assert is_plus_zero(scale) and not any(codes)
            continue
        spread = exact.rounded(exact.finite(greatest - least), F64)
        single = exact.rounded(exact.divide(spread, exact.finite(Fraction(255)), F64), F32)
        wanted = max(sixteen_bits(single) if single.value else Fraction(0), Fraction(2) ** -125)
        assert scale.value == wanted, block
        inverse = exact.divide(exact.finite(Fraction(1)), exact.multiply(scale, half, F32), F32)
        for x, code in zip(values, codes, strict=True):
            minus_low = exact.finite(-exact.multiply(low, half, F32).value)
            difference = exact.add(exact.multiply(x, half, F32), minus_low, F32)
            assert code == round(exact.multiply(difference, inverse, F32).value), (block, x)


def is_plus_zero(x: Number) -> bool:
    return exact.is_zero(x) and not x.negative


def test_decoding_is_one_exact_sum_rounded_once_and_within_the_bound(rng: np.random.Generator) -> None:
    most = exact.decode(F32.infinity - 1, F32).value
    for block in drawn_blocks(rng):
        low, scale, codes, decoded = coded(block)
        for x, code, got in zip(block, codes, decoded, strict=True):
            sum_ = low.value + code * scale.value
            if scale.value <= Fraction(2) ** 120:
                assert got == exact.rounded(exact.finite(sum_), F32), (block, x)
            assert abs(got.value) <= most
            bound = scale.value * (Fraction(1, 2) + Fraction(1, 1 << 14)) + ulp(got.value) / 2
            assert abs(number(x).value - got.value) <= bound, (block, x)
