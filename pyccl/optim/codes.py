"""Codecs of quantized exchanges: vectors to bytes and back, and the mean of several, by the core's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pyccl._native._pyccl import ffi, lib
from pyccl._native.status import check
from pyccl.arrays import DTYPES
from pyccl.errors import UsageError
from pyccl.reference import QUANTIZE_BLOCK

Array = np.ndarray[Any, Any]


def encode(x: Array, codec: str) -> Array:
    """(n,) float32 or float64 -> the bytes that travel, uint8."""
    number = _number(codec)
    out = np.empty(int(lib.pyccl_codec_size(number, QUANTIZE_BLOCK, x.size)), np.uint8)
    status = lib.pyccl_codec_encode(number, DTYPES[x.dtype.name], QUANTIZE_BLOCK, _bytes(x), x.size, _bytes(out))
    check(status, "encode")
    return out


def decode(encoded: Array, codec: str, out: Array) -> None:
    """Into (n,) float32 or float64."""
    _check_size(encoded, codec, out)
    arguments = (_number(codec), DTYPES[out.dtype.name], QUANTIZE_BLOCK, _bytes(encoded), out.size, _bytes(out))
    check(lib.pyccl_codec_decode(*arguments), "decode")


def average(encoded: Sequence[Array], codec: str, out: Array) -> None:
    """The mean of what these decode to: added in float32, in this order, and divided once."""
    for share in encoded:
        _check_size(share, codec, out)
    pins = [_bytes(share) for share in encoded]
    inputs = ffi.new("uint8_t *[]", pins)
    mean = out if out.dtype == np.float32 else np.empty(out.shape, np.float32)
    target = ffi.cast("float *", _bytes(mean))
    status = lib.pyccl_codec_reduce(
        _number(codec), lib.PYCCL_AVG, QUANTIZE_BLOCK, inputs, ffi.NULL, len(pins), out.size, target
    )
    check(status, "average")
    if mean is not out:
        np.copyto(out, mean)


def magnitude(x: Array) -> tuple[float, float]:
    """(greatest |x|, sum of squares) of floats; NaN, or an infinity and NaN, where they are not finite."""
    peak, squares = ffi.new("double *"), ffi.new("double *")
    check(lib.pyccl_magnitude(DTYPES[x.dtype.name], _bytes(x), x.size, peak, squares), "magnitude")
    return float(peak[0]), float(squares[0])


def _check_size(encoded: Array, codec: str, out: Array) -> None:
    size = int(lib.pyccl_codec_size(_number(codec), QUANTIZE_BLOCK, out.size))
    if encoded.nbytes != size:
        raise UsageError(f"{codec}: {encoded.nbytes} bytes, {size} are needed for {out.size} numbers")


def _number(codec: str) -> int:
    return int(getattr(lib, f"PYCCL_CODEC_{codec.upper()}"))


def _bytes(array: Array) -> Any:
    return ffi.from_buffer("uint8_t[]", array.view(np.uint8))
