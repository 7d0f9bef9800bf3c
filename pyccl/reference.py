"""The oracle: what an all-reduce gives, bit for bit, in NumPy and without the C core.

Written from proto/wire.md 3.7 (codecs: codecs.py, from 3.6), to be compared with what the engine gives on every dtype,
operation, world and codec. It is slow and means to be obvious.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from pyccl import codecs
from pyccl.codecs import Float32
from pyccl.errors import UsageError

Array = np.ndarray[Any, Any]

OPS: Final = ("sum", "avg", "prod", "min", "max")
QUANTIZE_BLOCK: Final = 1024  # elements that share one scale, unless the caller says otherwise
_NAN_BITS: Final = {2: 0x7E00, 4: 0x7FC00000, 8: 0x7FF8000000000000}
_UINT: Final = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def reference_all_reduce(
    inputs: Sequence[Array],
    *,
    op: str = "sum",
    quantize: str | None = None,
    algorithm: str = "auto",
    weights: Sequence[float] | None = None,
    quantize_block: int = QUANTIZE_BLOCK,
) -> Array:
    """The exact bits that every member's ``all_reduce`` gives.

    Args:
        inputs: one array of each member, in rank order (bytewise order of peer ids); equal shapes and dtypes.
            bfloat16 as ``ml_dtypes.bfloat16``.
        op, quantize, quantize_block: as for ``Communicator.all_reduce``.
        algorithm: "auto" or "direct", which fold in rank order.
        weights: for "avg", one per input; None stands for 1.0 each.
    Returns:
        A new array of the same shape and dtype.
    Raises:
        UsageError: what ``all_reduce`` refuses, weights whose total can't divide included.
    Source: the fold orders and roundings of proto/wire.md 3.6, 3.7.
    """
    arrays = [np.ascontiguousarray(x) for x in inputs]
    _check(arrays, op, quantize, algorithm, weights)
    shape, dtype = arrays[0].shape, arrays[0].dtype
    flat = [x.reshape(-1) for x in arrays]
    scales = None if weights is None or all(w == 1.0 for w in weights) else [float(w) for w in weights]
    with np.errstate(all="ignore"):
        if quantize is None:
            return _reduce(flat, op, scales).reshape(shape)
        folded = _reduce([_coded(_to_float32(x), quantize, quantize_block) for x in flat], op, scales)
        if len(arrays) > 2:  # two members swap and fold on both sides: nothing is rounded a second time
            folded = _coded(folded, quantize, quantize_block)
        return _from_float32(folded, dtype).reshape(shape)


def _check(
    arrays: Sequence[Array], op: str, quantize: str | None, algorithm: str, weights: Sequence[float] | None
) -> None:
    if not arrays:
        raise UsageError("at least one input is needed")
    if any(x.shape != arrays[0].shape or x.dtype != arrays[0].dtype for x in arrays):
        raise UsageError("the inputs differ in shape or dtype")
    if op not in OPS:
        raise UsageError(f"op={op!r} is not one of {', '.join(OPS)}")
    if algorithm not in ("auto", "direct"):
        raise UsageError(f"algorithm={algorithm!r} is not 'auto' or 'direct'")
    floats = _is_float(arrays[0].dtype)
    if op == "avg" and not floats:
        raise UsageError(f"op='avg' needs floats, not {arrays[0].dtype}")
    if quantize is not None:
        codecs.codec_of(quantize)
        if not floats:
            raise UsageError(f"quantize={quantize!r} needs floats, not {arrays[0].dtype}")
    if weights is not None:
        if op != "avg" or len(weights) != len(arrays):
            raise UsageError("weights are for 'avg', one per input")
        kind = np.float64 if arrays[0].dtype == np.float64 and quantize is None else np.float32
        with np.errstate(all="ignore"):
            seen = [float(kind(w)) for w in weights]
            total = float(kind(_sum64(weights)))
        if not all(np.isfinite(w) and w >= 0 for w in seen) or not 0 < total < np.inf:
            raise UsageError(f"weights are finite, not negative, and their total is so and not 0, in {kind.__name__}")


def _coded(x: Float32, codec: str, block: int) -> Float32:
    """What its codes decode to."""
    return codecs.decode(codecs.encode(x, codec, block), codec, block, x.size)


def _is_bfloat16(dtype: np.dtype[Any]) -> bool:
    return dtype.name == "bfloat16"


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or _is_bfloat16(dtype)


# ---- folds ----------------------------------------------------------------------------------------------------------


def _reduce(flat: Sequence[Array], op: str, weights: Sequence[float] | None) -> Array:
    """((x0 . x1) . x2) ...: one rounding for each operation, float16 and bfloat16 in float32 with one at the end."""
    dtype = flat[0].dtype
    if not _is_float(dtype):
        return _fold(flat, op)
    wide = flat if dtype in (np.float32, np.float64) else [_to_float32(x) for x in flat]
    kind = wide[0].dtype.type
    if op != "avg":
        folded = _fold(wide, op)
    else:
        terms = wide if weights is None else [x * kind(w) for x, w in zip(wide, weights, strict=True)]
        total = float(len(wide)) if weights is None else _sum64(weights)
        folded = _fold(terms, "sum") / kind(total)
    return _canonical(folded) if dtype == wide[0].dtype else _from_float32(folded, dtype)


def _sum64(values: Sequence[float]) -> float:
    total = 0.0
    for value in values:  # in order: sum() compensates from Python 3.12 on
        total += value
    return total


def _fold(values: Sequence[Array], op: str) -> Array:
    folded = values[0].copy()
    for x in values[1:]:
        if op == "sum":
            folded = folded + x
        elif op == "prod":
            folded = folded * x
        else:
            folded = _extreme(folded, x, op)
    return folded


def _extreme(a: Array, b: Array, op: str) -> Array:
    """Minimum or maximum that propagates NaN and orders -0 below +0."""
    out = (np.minimum if op == "min" else np.maximum)(a, b)
    if out.dtype.kind == "f":
        zeros = (a == 0) & (b == 0)
        negative = np.signbit(a) | np.signbit(b) if op == "min" else np.signbit(a) & np.signbit(b)
        out = np.where(zeros, np.where(negative, -0.0, 0.0).astype(out.dtype), out)
    return out


def _canonical(x: Array) -> Array:
    """Every NaN as the one quiet NaN."""
    bits = x.view(_UINT[x.dtype.itemsize]).copy()
    bits[np.isnan(x)] = _NAN_BITS[x.dtype.itemsize]
    return bits.view(x.dtype)


def _to_float32(x: Array) -> Float32:
    """Exact for the shorter floats, rounded once for float64."""
    if _is_bfloat16(x.dtype):
        return (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32)


def _from_float32(x: Float32, dtype: np.dtype[Any]) -> Array:
    """Rounded once, to nearest even; NaN canonical."""
    if _is_bfloat16(dtype):
        return codecs.bfloat16_bits(x).view(dtype)
    return _canonical(x.astype(dtype))
