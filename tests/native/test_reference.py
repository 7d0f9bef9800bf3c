"""The NumPy oracle and the C kernels, written apart from one document, give the same bytes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import pyccl
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
