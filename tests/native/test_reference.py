"""The NumPy oracle and the C kernels, written apart from one document, give the same bytes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import pyccl
from pyccl import reference
from pyccl._native._pyccl import ffi, lib

SEED = 20310504
DTYPES: dict[str, tuple[int, Any]] = {
    "int8": (lib.PYCCL_INT8, np.int8),
    "int16": (lib.PYCCL_INT16, np.int16),
    "int32": (lib.PYCCL_INT32, np.int32),
    "int64": (lib.PYCCL_INT64, np.int64),
    "uint8": (lib.PYCCL_UINT8, np.uint8),
    "uint16": (lib.PYCCL_UINT16, np.uint16),
    "uint32": (lib.PYCCL_UINT32, np.uint32),
    "uint64": (lib.PYCCL_UINT64, np.uint64),
    "float16": (lib.PYCCL_FLOAT16, np.float16),
    "bfloat16": (lib.PYCCL_BFLOAT16, ml_dtypes.bfloat16),
    "float32": (lib.PYCCL_FLOAT32, np.float32),
    "float64": (lib.PYCCL_FLOAT64, np.float64),
}
_LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38}
FLOATS = ("float16", "bfloat16", "float32", "float64")
OPS = {"sum": lib.PYCCL_SUM, "avg": lib.PYCCL_AVG, "prod": lib.PYCCL_PROD, "min": lib.PYCCL_MIN, "max": lib.PYCCL_MAX}
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def _bytes(array: Any) -> Any:
    return ffi.from_buffer("uint8_t[]", array.view(np.uint8))


def _random(rng: np.random.Generator, dtype: Any, count: int, kind: str) -> Any:
    """bits: any pattern, so NaN payloads, infinities and denormals too; few: many equal values and signed zeros."""
    item = np.dtype(dtype).itemsize
    if kind == "bits":
        return rng.integers(0, 256, count * item, dtype=np.uint8).view(dtype)
    if kind == "few":
        return rng.choice(np.array([-0.0, 0.0, 1.0, -1.0, 3.0]), count).astype(dtype)
    return (rng.standard_normal(count) * 10.0 ** rng.integers(-3, 4)).astype(dtype)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_fold_gives_the_bytes_of_the_oracle(name: str, op: str) -> None:
    if op == "avg" and name not in FLOATS:
        with pytest.raises(pyccl.UsageError):
            pyccl.reference_all_reduce([np.zeros(1, DTYPES[name][1])] * 2, op=op)
        return
    code, dtype = DTYPES[name]
    rng = np.random.default_rng(SEED)
    for world in (1, 2, 3, 5):
        for kind in ("bits", "few", "normal"):
            count = int(rng.integers(0, 2000))
            inputs = [_random(rng, dtype, count, kind) for _ in range(world)]
            for weights in (None, [1.0] * world, list(rng.random(world))) if op == "avg" else (None,):
                out = np.empty(count, dtype)
                given = ffi.NULL if weights is None else ffi.new("double[]", weights)
                pins = ffi.new("void *[]", [_bytes(x) for x in inputs])
                assert lib.pyccl_reduce(code, OPS[op], pins, given, world, count, _bytes(out)) == 0
                expected = pyccl.reference_all_reduce(inputs, op=op, weights=weights)
                assert out.tobytes() == expected.tobytes(), f"seed={SEED} {name} {op} world={world} {kind} {weights}"


@pytest.mark.parametrize("name", FLOATS)
def test_codec_gives_the_bytes_of_the_oracle(name: str) -> None:
    code, dtype = DTYPES[name]
    rng = np.random.default_rng(SEED)
    for round_ in range(60):
        count, block = int(rng.integers(0, 9000)), int(rng.choice([1, 7, 64, 4096]))
        scale = 10.0 ** rng.integers(-44, 38)
        x = _random(rng, dtype, count, "bits" if round_ % 3 == 0 else "few" if round_ % 3 == 1 else "normal")
        if round_ % 3 == 2:
            x = (x.astype(np.float64) * scale).astype(dtype)
        with np.errstate(all="ignore"):
            blocks = reference._uint8_encode(reference._to_float32(x), block)
            expected = b"".join(
                np.array([low, step], np.float32).tobytes() + codes.tobytes() for low, step, codes in blocks
            )
            limit = np.float32(_LARGEST.get(name, np.finfo(np.float32).max))  # the C decoder cuts to the dtype's range
            wide = np.clip(reference._uint8_decode(blocks), -limit, limit)
            decoded = reference._from_float32(wide, np.dtype(dtype))
        encoded = np.empty(lib.pyccl_codec_size(1, block, count), np.uint8)
        assert lib.pyccl_codec_encode(1, code, block, _bytes(x), count, _bytes(encoded)) == 0
        assert encoded.tobytes() == expected, f"seed={SEED} {name} round={round_}"
        out = np.empty(count, dtype)
        assert lib.pyccl_codec_decode(1, code, block, _bytes(encoded), count, _bytes(out)) == 0
        assert out.tobytes() == decoded.tobytes(), f"seed={SEED} {name} round={round_}"


def test_codec_error_is_within_the_documented_bound() -> None:
    rng = np.random.default_rng(SEED)
    for exponent in range(-30, 30, 3):
        x = (rng.standard_normal(4096) * 2.0**exponent).astype(np.float32)
        low, scale, codes = reference._encode_block(x)
        decoded = reference._decode_block(low, scale, codes)
        bound = np.float64(scale) * (0.5 + 2.0**-14) + np.spacing(np.abs(decoded)) / 2
        assert (np.abs(np.float64(x) - np.float64(decoded)) <= bound).all(), f"seed={SEED} exponent={exponent}"


def test_a_block_with_a_nan_decodes_to_nan_and_its_neighbour_does_not() -> None:
    x = np.ones(128, np.float32)
    x[70] = np.nan
    with np.errstate(all="ignore"):
        decoded = reference._uint8_decode(reference._uint8_encode(x, 64))
    assert np.isnan(decoded[64:]).all()
    assert (decoded[:64] == 1).all()


def test_two_members_round_once_and_three_round_twice() -> None:
    rng = np.random.default_rng(SEED)
    inputs = [rng.standard_normal(1000).astype(np.float32) for _ in range(3)]
    exact = sum(x.astype(np.float64) for x in inputs[:2])
    two = pyccl.reference_all_reduce(inputs[:2], op="sum", quantize="uint8", quantize_block=64)
    steps = [reference._encode_block(x[:64])[1] for x in inputs[:2]]
    assert np.abs(two[:64] - exact[:64]).max() <= sum(float(s) for s in steps) * 0.501
    three = pyccl.reference_all_reduce(inputs, op="sum", quantize="uint8", quantize_block=64)
    assert len(np.unique(three[:64])) <= 256


@pytest.mark.parametrize(
    "arguments",
    [
        {"inputs": []},
        {"inputs": [np.zeros(2), np.zeros(3)]},
        {"inputs": [np.zeros(2), np.zeros(2, np.float32)]},
        {"inputs": [np.zeros(2)], "op": "median"},
        {"inputs": [np.zeros(2)], "algorithm": "tree"},
        {"inputs": [np.zeros(2, np.int32)], "quantize": "uint8"},
        {"inputs": [np.zeros(2)], "quantize": "int3"},
        {"inputs": [np.zeros(2)], "weights": [1.0]},
        {"inputs": [np.zeros(2)], "op": "avg", "weights": [0.0]},
        {"inputs": [np.zeros(2)], "op": "avg", "weights": [-1.0]},
        {"inputs": [np.zeros(2, np.float32)], "op": "avg", "weights": [1e39]},
        {"inputs": [np.zeros(2, np.float32)], "op": "avg", "weights": [1e-60]},
        {"inputs": [np.zeros(2)], "op": "avg", "weights": [1e39], "quantize": "uint8"},
        {"inputs": [np.zeros(2)], "op": "avg", "weights": [1.0, 1.0]},
    ],
)
def test_bad_arguments_are_usage_errors(arguments: dict[str, Any]) -> None:
    with pytest.raises(pyccl.UsageError):
        pyccl.reference_all_reduce(**arguments)
