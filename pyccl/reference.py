"""The oracle: what all_reduce and reduce_scatter give, bit for bit, in NumPy and without the C core.

Written from proto/wire.md 3.3 and 3.7 (codecs: codecs.py, from 3.6), to be compared with what the engine gives on every
dtype, operation, world, algorithm and codec. It is slow and means to be obvious.
"""

from __future__ import annotations

import itertools
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
    ring: Sequence[int] | None = None,
    shares: Sequence[int] | None = None,
) -> Array:
    """The exact bits that every member's ``all_reduce`` gives.

    Args:
        inputs: one array of each member, in rank order (bytewise order of peer ids); equal shapes and dtypes.
            bfloat16 as ``ml_dtypes.bfloat16``.
        op, quantize, quantize_block: as for ``Communicator.all_reduce``.
        algorithm: "direct" folds in rank order, "ring" along the ring, but not with two members; "auto" is "direct"
            here. What an ``all_reduce`` with "auto" took its info tells.
        ring, shares: of the epoch's plan, for "ring": the ranks in the order of the ring (None: rank order) and the
            weights of their shares (None: equal ones).
        weights: for "avg", one per input; None stands for 1.0 each.
    Returns:
        A new array of the same shape and dtype.
    Raises:
        UsageError: what ``all_reduce`` refuses, weights whose total can't divide included.
    Source: the fold orders and roundings of proto/wire.md 3.6, 3.7.
    """
    arrays = [np.ascontiguousarray(x) for x in inputs]
    _check(arrays, op, quantize, algorithm, weights)
    order = _ring_order(len(arrays), ring)
    shape, dtype = arrays[0].shape, arrays[0].dtype
    flat = [x.reshape(-1) for x in arrays]
    scales = _scales(weights)
    in_ring = algorithm == "ring" and len(arrays) > 2
    block = 1 if quantize is None else quantize_block
    cut = _cut(flat[0].size, len(arrays), block, shares) if in_ring else []
    with np.errstate(all="ignore"):
        if quantize is None:
            folded = _reduce_along(order, cut, flat, op, scales) if in_ring else _reduce(flat, op, scales)
            return folded.reshape(shape)
        decoded = [_coded(_to_float32(x), quantize, quantize_block) for x in flat]
        folded = _reduce_along(order, cut, decoded, op, scales) if in_ring else _reduce(decoded, op, scales)
        if len(arrays) > 2:  # two members swap and fold on both sides: nothing is rounded a second time
            folded = _coded(folded, quantize, quantize_block)
        return _from_float32(folded, dtype).reshape(shape)


def reference_reduce_scatter(
    inputs: Sequence[Array],
    *,
    op: str = "sum",
    quantize: str | None = None,
    algorithm: str = "auto",
    weights: Sequence[float] | None = None,
    quantize_block: int = QUANTIZE_BLOCK,
    ring: Sequence[int] | None = None,
) -> list[Array]:
    """The exact bits that ``reduce_scatter`` gives to each member, in rank order.

    Args: as ``reference_all_reduce``; at least one dimension.
    Raises: as ``reference_all_reduce``.
    """
    arrays = [np.ascontiguousarray(x) for x in inputs]
    _check(arrays, op, quantize, algorithm, weights)
    order, world = _ring_order(len(arrays), ring), len(arrays)
    if np.ndim(inputs[0]) == 0:
        raise UsageError("the inputs have no axis that could be split")
    in_ring = algorithm == "ring" and world > 2
    scales = _scales(weights)
    parts = []
    for owner, part in enumerate(_parts(arrays)):
        turn = _turn(order, owner) if in_ring else list(range(world))
        parts.append(_reduce_part(part, turn, op, quantize, scales, quantize_block))
    return parts


def _parts(arrays: Sequence[Array]) -> list[list[Array]]:
    """[rank][input]"""
    split = [np.array_split(x, len(arrays)) for x in arrays]
    return [list(part) for part in zip(*split, strict=True)]


def _reduce_part(
    part: list[Array],
    turn: list[int],
    op: str,
    quantize: str | None,
    scales: list[float] | None,
    quantize_block: int,
) -> Array:
    """Of its owner: what travels is encoded, the result does not travel. turn: the ranks in the order of the fold."""
    shape, dtype = part[0].shape, part[0].dtype
    flat = [part[rank].reshape(-1) for rank in turn]
    turned, divisor = _turned(scales, turn)
    with np.errstate(all="ignore"):
        if quantize is None:
            return _reduce(flat, op, turned, divisor).reshape(shape)
        decoded = [_coded(_to_float32(x), quantize, quantize_block) for x in flat]
        return _from_float32(_reduce(decoded, op, turned, divisor), dtype).reshape(shape)


def _scales(weights: Sequence[float] | None) -> list[float] | None:
    return None if weights is None or all(w == 1.0 for w in weights) else [float(w) for w in weights]


# ---- ring -----------------------------------------------------------------------------------------------------------


def _ring_order(world: int, ring: Sequence[int] | None) -> list[int]:
    order = list(range(world)) if ring is None else [int(rank) for rank in ring]
    if sorted(order) != list(range(world)):
        raise UsageError(f"ring={order} is no order of {world} members")
    return order


def _cut(count: int, world: int, block: int, shares: Sequence[int] | None) -> list[slice]:
    """The share of each rank: whole blocks."""
    if shares is not None and (len(shares) != world or min(shares) < 0 or sum(shares) == 0):
        raise UsageError(f"shares={list(shares)} are no weights of {world} members")
    blocks = -(-count // block)
    if shares is None:
        sizes = [blocks // world + (rank < blocks % world) for rank in range(world)]
        starts = [sum(sizes[:rank]) for rank in range(world + 1)]
    else:
        starts = [blocks * sum(shares[:rank]) // sum(shares) for rank in range(world + 1)]
    return [slice(min(a * block, count), min(b * block, count)) for a, b in itertools.pairwise(starts)]


def _reduce_along(
    order: list[int], cut: list[slice], flat: Sequence[Array], op: str, weights: Sequence[float] | None
) -> Array:
    parts = []
    for owner, at in enumerate(cut):
        turn = _turn(order, owner)
        turned, divisor = _turned(weights, turn)
        parts.append(_reduce([flat[rank][at] for rank in turn], op, turned, divisor))
    return np.concatenate(parts)


def _turn(order: list[int], owner: int) -> list[int]:
    """A share begins behind its owner in the ring and ends there."""
    place = order.index(owner) + 1
    return order[place:] + order[:place]


def _turned(weights: Sequence[float] | None, turn: list[int]) -> tuple[list[float] | None, float | None]:
    """The weights in that order; the divisor is that of rank order."""
    return (None, None) if weights is None else ([weights[rank] for rank in turn], _sum64(weights))


def _check(
    arrays: Sequence[Array], op: str, quantize: str | None, algorithm: str, weights: Sequence[float] | None
) -> None:
    if not arrays:
        raise UsageError("at least one input is needed")
    if any(x.shape != arrays[0].shape or x.dtype != arrays[0].dtype for x in arrays):
        raise UsageError("the inputs differ in shape or dtype")
    if op not in OPS:
        raise UsageError(f"op={op!r} is not one of {', '.join(OPS)}")
    if algorithm not in ("auto", "direct", "ring"):
        raise UsageError(f"algorithm={algorithm!r} is not 'auto', 'direct' or 'ring'")
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


def _reduce(
    flat: Sequence[Array], op: str, weights: Sequence[float] | None, divisor: float | None = None
) -> Array:
    """((x0 . x1) . x2) ...: one rounding for each operation, float16 and bfloat16 in float32 with one at the end.
    divisor: None stands for the sum of the weights in this order."""
    dtype = flat[0].dtype
    if not _is_float(dtype):
        return _fold(flat, op)
    wide = flat if dtype in (np.float32, np.float64) else [_to_float32(x) for x in flat]
    kind = wide[0].dtype.type
    if op != "avg":
        folded = _fold(wide, op)
    else:
        terms = wide if weights is None else [x * kind(w) for x, w in zip(wide, weights, strict=True)]
        total = float(len(wide)) if weights is None else _sum64(weights) if divisor is None else divisor
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
