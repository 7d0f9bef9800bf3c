"""The codecs in NumPy and in C, written apart from one document, give the same bytes; and what docs/codecs.md promises.

Replay a failure with PYCCL_TEST_SEED=<the seed it printed>.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import pyccl
from pyccl import calls, codecs, reference
from pyccl._native._pyccl import ffi, lib

FLOATS: dict[str, tuple[int, Any]] = {
    "float16": (lib.PYCCL_FLOAT16, np.float16),
    "bfloat16": (lib.PYCCL_BFLOAT16, ml_dtypes.bfloat16),
    "float32": (lib.PYCCL_FLOAT32, np.float32),
    "float64": (lib.PYCCL_FLOAT64, np.float64),
}
_LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38}
NUMBERS = {name: getattr(lib, f"PYCCL_CODEC_{name.upper()}") for name in codecs.CODECS}
KINDS = ("bits", "few", "normal", "spread")
every_codec = pytest.mark.parametrize("codec", codecs.CODECS)
every_float = pytest.mark.parametrize("name", FLOATS)
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


@pytest.fixture
def rng() -> np.random.Generator:
    given = os.environ.get("PYCCL_TEST_SEED")
    seed = int(given) if given else secrets.randbits(31)
    print(f"seed: PYCCL_TEST_SEED={seed}")  # shown if the test failed
    return np.random.default_rng(seed)


def pin(array: Any) -> Any:
    return ffi.from_buffer("uint8_t[]", array.view(np.uint8))


def c_encode(x: Any, codec: str, block: int, code: int) -> bytes:
    out = np.empty(lib.pyccl_codec_size(NUMBERS[codec], block, x.size), np.uint8)
    assert lib.pyccl_codec_encode(NUMBERS[codec], code, block, pin(x), x.size, pin(out)) == lib.PYCCL_OK
    return out.tobytes()


def c_decode(data: bytes, codec: str, block: int, code: int, out: Any) -> None:
    held = np.frombuffer(data, np.uint8).copy()
    assert lib.pyccl_codec_decode(NUMBERS[codec], code, block, pin(held), out.size, pin(out)) == lib.PYCCL_OK


def draw(rng: np.random.Generator, dtype: Any, count: int, kind: str) -> Any:
    """bits: NaN payloads, infinities, denormals too; few: ties of every codec and zeros; spread: all exponents."""
    if kind == "bits":
        return rng.integers(0, 256, count * np.dtype(dtype).itemsize, dtype=np.uint8).view(dtype)
    if kind == "few":
        return rng.choice(
            np.array([-0.0, 0.0, 0.5, -1.5, 127.0, 448.0, -336.0, 3.5, 63.5, 29.0, -464.0]), count
        ).astype(dtype)
    exponents = rng.integers(-149, 128, count if kind == "spread" else 1)
    with np.errstate(all="ignore"):
        return (rng.standard_normal(count) * 2.0**exponents).astype(dtype)


def decoded_as(wide: Any, codec: str, name: str, dtype: Any) -> Any:
    """What the C decoder makes of float32: cut to the finite range of the dtype (not bfloat16), rounded to it."""
    with np.errstate(all="ignore"):
        limit = np.float32(_LARGEST.get(name, np.finfo(np.float32).max))
        cut = wide if codec == "bfloat16" else np.clip(wide, -limit, limit)
        return reference._from_float32(cut, np.dtype(dtype))


@every_codec
@every_float
def test_c_and_numpy_give_the_same_bytes(name: str, codec: str, rng: np.random.Generator) -> None:
    code, dtype = FLOATS[name]
    for round_ in range(40):
        block = int(rng.choice([1, 7, 64, 1024, 4096]))
        count = int(rng.integers(0, 3000 if block > 7 else 200))
        x = draw(rng, dtype, count, KINDS[round_ % len(KINDS)])
        with np.errstate(all="ignore"):
            expected = codecs.encode(reference._to_float32(x), codec, block)
        assert c_encode(x, codec, block, code) == expected, f"round {round_} block {block}"
        hostile = bytearray(rng.bytes(len(expected)))
        for data in (expected, bytes(hostile)):
            out = np.empty(count, dtype)
            c_decode(data, codec, block, code, out)
            wide = codecs.decode(data, codec, block, count)
            assert out.tobytes() == decoded_as(wide, codec, name, dtype).tobytes(), f"round {round_} block {block}"


@every_codec
def test_any_scale_and_any_code_decode_alike(codec: str, rng: np.random.Generator) -> None:
    known = codecs.CODECS[codec]
    count = 2 * 65536 // known.code_bits * 8 // 16
    every_code = np.arange(65536, dtype=np.uint16).tobytes()[: count * known.code_bits // 8]
    heads = [0, 1, 0x100, 0x7F7FFF00, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x80000000, 0xBF800000, 0x3F800001]
    for head in heads + [int(bits) & 0x7FFFFF00 for bits in rng.integers(0, 2**31, 20)]:
        data = np.full(known.head_bytes // 4, head, "<u4").tobytes() + every_code
        assert len(data) == codecs.size_bytes(codec, count, count)
        out = np.empty(count, np.float32)
        c_decode(data, codec, count, lib.PYCCL_FLOAT32, out)
        assert out.tobytes() == codecs.decode(data, codec, count, count).tobytes(), f"head {head:#x}"


def test_fp8_and_bfloat16_are_the_numbers_of_ml_dtypes(rng: np.random.Generator) -> None:
    every = np.arange(256, dtype=np.uint8)
    numbers = codecs.decode(_one() + every.tobytes(), "fp8_e4m3", 256, 256)
    assert np.array_equal(numbers, every.view(ml_dtypes.float8_e4m3fn).astype(np.float32), equal_nan=True)
    x = (rng.standard_normal(10_000) * 2.0 ** rng.integers(-12, 6, 10_000)).astype(np.float32)
    x[0] = 448.0  # scale 1
    x = np.clip(x, -448.0, 448.0)
    assert codecs.encode(x, "fp8_e4m3", x.size) == _one() + x.astype(ml_dtypes.float8_e4m3fn).tobytes()
    assert codecs.encode(x, "bfloat16", 64) == x.astype(ml_dtypes.bfloat16).tobytes()


def _one() -> bytes:
    return np.float32(1).tobytes()


def test_the_three_lists_of_codecs_are_one() -> None:
    assert list(NUMBERS.values()) == list(range(1, len(NUMBERS) + 1))
    assert calls._CODECS == NUMBERS
    assert lib.pyccl_codec_size(len(NUMBERS) + 1, 64, 1) == 0
    for name, number in NUMBERS.items():
        for count in (0, 1, 2, 63, 64, 65, 127, 4097):
            assert lib.pyccl_codec_size(number, 64, count) == codecs.size_bytes(name, 64, count), (name, count)


# ---- what docs/codecs.md promises


def bounds(codec: str, x: Any, data: bytes) -> Any:
    """The largest error of each element of a block, as in docs/codecs.md."""
    size, peak = np.abs(x.astype(np.float64)), np.abs(x.astype(np.float64)).max()
    head = np.frombuffer(data[: codecs.CODECS[codec].head_bytes], "<f4").astype(np.float64)
    if codec == "uint8":
        decoded = codecs.decode(data, codec, x.size, x.size)
        return head[1] * (0.5 + 2.0**-14) + np.spacing(np.abs(decoded)).astype(np.float64) / 2
    if codec == "int8":
        return np.full(x.size, max(head[0] * (0.5 + 2.0**-16), 2.0**-126))
    if codec == "fp8_e4m3":
        return np.maximum(np.maximum(size * (2.0**-4 + 2.0**-22), head[0] * (2.0**-10 + 2.0**-28)), 2.0**-135)
    if codec == "fp4_e3m0":
        return np.maximum(size / 3, peak / 128) + 2.0**-150
    return np.maximum(size * 2.0**-8, 2.0**-134)


def finite_blocks(rng: np.random.Generator) -> list[Any]:
    drawn = [rng.standard_normal(200), rng.standard_cauchy(200), rng.integers(-4, 5, 200), np.full(200, 0.7)]
    blocks = [x * 2.0**exponent for exponent in range(-149, 127, 3) for x in drawn]
    return [np.clip(block, -3.38e38, 3.38e38).astype(np.float32) for block in blocks]


@every_codec
def test_errors_are_within_the_documented_bounds(codec: str, rng: np.random.Generator) -> None:
    for x in finite_blocks(rng):
        data = c_encode(x, codec, x.size, lib.PYCCL_FLOAT32)
        decoded = codecs.decode(data, codec, x.size, x.size).astype(np.float64)
        error, bound = np.abs(x.astype(np.float64) - decoded), bounds(codec, x, data)
        worst = int(np.argmax(error - bound))
        assert error[worst] <= bound[worst], (x[worst], decoded[worst], bound[worst])


@every_codec
def test_encoding_what_was_decoded_changes_nothing(codec: str, rng: np.random.Generator) -> None:
    for x in finite_blocks(rng):
        peak, spread = float(np.abs(x).max()), float(x.max()) - float(x.min())
        if codec == "fp4_e3m0" and 0 < peak < 2.0**-120:
            continue
        if codec == "uint8" and spread > 0 and (peak > 64 * spread or spread < 2.0**-116):
            continue
        data = codecs.encode(x, codec, x.size)
        decoded = codecs.decode(data, codec, x.size, x.size)
        assert codecs.encode(decoded, codec, x.size) == data, (peak, spread)


@every_codec
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_nan_or_an_infinity_is_never_hidden(codec: str, bad: float) -> None:
    x = np.ones(192, np.float32)
    x[70] = bad
    decoded = codecs.decode(codecs.encode(x, codec, 64), codec, 64, x.size)
    if codec == "bfloat16":  # it passes, alone
        assert np.array_equal(decoded, x, equal_nan=True)
        return
    assert np.isnan(decoded[64:128]).all()
    np.testing.assert_allclose(decoded[np.r_[:64, 128:192]], 1, rtol=2**-14)


def test_fp4_gives_the_examples_of_its_definition() -> None:
    x = np.array([2, -1.4, 0.1, 0.01, -0.0], np.float32)
    data = codecs.encode(x, "fp4_e3m0", 64)
    assert data.hex() == "00000040" + "e7" + "03" + "00"
    assert codecs.decode(data, "fp4_e3m0", 64, 5).tolist() == [2.0, -1.0, 0.125, 0.0, 0.0]


def test_the_tables_of_the_documentation_say_what_the_codecs_cost() -> None:
    """| codec | head | bits | bits per element with blocks of 64 | 1024 | 4096 | ..."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "codecs.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")
    ]
    told = {row[0]: row[1:] for row in rows if len(row) == 6}
    assert told.keys() == codecs.CODECS.keys()
    for name, (head, bits, *per_element) in told.items():
        known = codecs.CODECS[name]
        assert (int(head), int(bits)) == (known.head_bytes, known.code_bits), name
        for block, shown in zip((64, 1024, 4096), per_element, strict=True):
            assert float(shown) == round(8 * known.block_bytes(block) / block, 3), (name, block)


# ---- in an all-reduce


@every_codec
def test_two_members_round_once_and_more_round_twice(codec: str, rng: np.random.Generator) -> None:
    block = 64
    inputs = [rng.standard_normal(1000).astype(np.float32) for _ in range(5)]

    def coded(x: Any) -> Any:
        return codecs.decode(codecs.encode(x, codec, block), codec, block, x.size)

    for world in (1, 2, 3, 5):
        got = pyccl.reference_all_reduce(inputs[:world], op="sum", quantize=codec, quantize_block=block)
        folded = coded(inputs[0])
        for x in inputs[1:world]:
            folded = folded + coded(x)
        assert got.tobytes() == (coded(folded) if world > 2 else folded).tobytes()
