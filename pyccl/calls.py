"""Calls: what the arguments of a collective mean. Checked here, once for the blocking and the Trio communicator.

Arguments go in, a ``Call`` comes out: nothing is sent, nothing waits. A UsageError comes from here.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np

from pyccl import errors, units
from pyccl._io.address import shown
from pyccl._native._pyccl import lib
from pyccl._native.handles import TIMEOUT_S_MAX, Kind, Spec
from pyccl._proto import limits
from pyccl._proto.election import Strategy
from pyccl.arrays import Buffer, as_buffer, check_out, numpy_dtype
from pyccl.codecs import CODECS, codec_of
from pyccl.guards import Guard, parse_guard
from pyccl.state import SharedState

OPERATION_TIMEOUT_S: Final = 1800.0
REACH_TIMEOUT_S: Final = 30.0
CONNECT_TIMEOUT_S: Final = 3600.0
_IN_FLIGHT_MAX: Final = 1024
_TAG_PENDING: Final = 0  # of the library's own tags; those of state sync: _io/statesync.py

Array = np.ndarray[Any, Any]


class ReduceOp(enum.StrEnum):
    """What an all-reduce computes, element by element."""

    SUM = "sum"
    AVG = "avg"
    PROD = "prod"
    MIN = "min"
    MAX = "max"


_OPS: Final[dict[str, int]] = {
    ReduceOp.SUM: lib.PYCCL_SUM,
    ReduceOp.AVG: lib.PYCCL_AVG,
    ReduceOp.PROD: lib.PYCCL_PROD,
    ReduceOp.MIN: lib.PYCCL_MIN,
    ReduceOp.MAX: lib.PYCCL_MAX,
}
_AVG: Final[int] = lib.PYCCL_AVG
ALGORITHMS: Final[dict[str, int]] = {"auto": lib.PYCCL_AUTO, "direct": lib.PYCCL_DIRECT, "ring": lib.PYCCL_RING}
_STRATEGIES: Final[dict[str, Strategy]] = {
    "enforce_popular": Strategy.ENFORCE_POPULAR,
    "receive_only": Strategy.RECEIVE_ONLY,
    "send_only": Strategy.SEND_ONLY,
}
_RATE_BPS_MIN: Final = 10**6  # slower than this, heartbeats of many peers would come late
_CODECS: Final[dict[str, int]] = {name: getattr(lib, f"PYCCL_CODEC_{name.upper()}") for name in CODECS}


class Call(NamedTuple):
    """An operation whose arguments are right. src and dst: None where nothing is read or written."""

    what: str  # the method, for messages
    spec: Spec
    src: Buffer | None
    dst: Buffer | None
    timeout_s: float
    weight: float = 1.0  # not of the spec: each member has its own


def all_reduce(
    x: Any,
    op: ReduceOp | str,
    out: Any,
    tag: int,
    quantize: str | None,
    algorithm: str,
    weight: float,
    retry: bool,
    timeout: float,
    quantize_block: int,
    guard: Guard | str | None,
) -> Call:
    source = as_buffer("x", x, writable=out is None)
    target = source if out is None else as_buffer("out", out, writable=True)
    code = _reduce_op(op, source)
    check_out(source, target)
    codec, block = _codec(quantize, quantize_block, source)
    spec = Spec(
        Kind.ALL_REDUCE, source.code, code, codec, _algorithm(algorithm), retry=bool(retry), tag=_tag(tag),
        block=block, elements=source.count,
    )  # fmt: skip
    spec = _guarded(spec, guard, source)
    return Call("all_reduce", spec, source, target, seconds("timeout", timeout), _weight(weight, code))


def broadcast(me: bytes, x: Any, root: str, tag: int, retry: bool, timeout: float) -> Call:
    source = parse_peer(root)
    at_root = source == me
    buffer = as_buffer("x", x, writable=not at_root)
    spec = Spec(Kind.BROADCAST, buffer.code, retry=bool(retry), tag=_tag(tag), elements=buffer.count, root=source)
    return Call("broadcast", spec, buffer, None if at_root else buffer, seconds("timeout", timeout))


@dataclass(frozen=True, slots=True)
class Gathered:
    """What an all_gather returns: an array of `dtype` and `shape` from each member."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def empty(self, world_size: int) -> Array:
        return np.empty((world_size, *self.shape), self.dtype)


def all_gather(x: Any, tag: int, retry: bool, timeout: float) -> tuple[Call, Gathered]:
    buffer = as_buffer("x", x, writable=False)
    gathered = Gathered(tuple(buffer.shape), numpy_dtype(buffer))
    spec = Spec(Kind.ALL_GATHER, buffer.code, retry=bool(retry), tag=_tag(tag), elements=buffer.count)
    return Call("all_gather", spec, buffer, None, seconds("timeout", timeout)), gathered


@dataclass(frozen=True, slots=True)
class Scattered:
    """What a reduce_scatter returns: the rows of a member, of `dtype`, each of the shape `shape[1:]`."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def empty(self, rank: int, world_size: int) -> Array:
        """For the part of one member, as numpy.array_split cuts."""
        rows, longer = divmod(self.shape[0], world_size)
        return np.empty((rows + (rank < longer), *self.shape[1:]), self.dtype)


def reduce_scatter(
    x: Any,
    op: ReduceOp | str,
    tag: int,
    quantize: str | None,
    algorithm: str,
    weight: float,
    retry: bool,
    timeout: float,
    quantize_block: int,
    guard: Guard | str | None,
) -> tuple[Call, Scattered]:
    buffer = as_buffer("x", x, writable=False)
    shape = tuple(buffer.shape)
    if not shape:
        raise errors.UsageError("x has no axis that could be split")
    code = _reduce_op(op, buffer)
    codec, block = _codec(quantize, quantize_block, buffer)
    row = max(1, math.prod(shape[1:]))
    spec = Spec(
        Kind.REDUCE_SCATTER, buffer.code, code, codec, _algorithm(algorithm), retry=bool(retry), tag=_tag(tag),
        block=block, elements=buffer.count, root=row.to_bytes(8, "little") + bytes(8),
    )  # fmt: skip
    spec = _guarded(spec, guard, buffer)
    call = Call("reduce_scatter", spec, buffer, None, seconds("timeout", timeout), _weight(weight, code))
    return call, Scattered(shape, numpy_dtype(buffer))


def exchange(me: bytes, x: Any, out: Any, partner: str, tag: int, timeout: float) -> Call:
    other = parse_peer(partner)
    if other == me:
        raise errors.UsageError(f"partner={partner!r} is this peer itself")
    source = as_buffer("x", x, writable=out is None)
    target = source if out is None else as_buffer("out", out, writable=True)
    check_out(source, target)
    pair = bytes(a ^ b for a, b in zip(me, other, strict=True))
    spec = Spec(
        Kind.EXCHANGE, source.code, space=lib.PYCCL_SPACE_PAIR, tag=_tag(tag), elements=source.count, root=pair
    )  # fmt: skip
    return Call("exchange", spec, source, target, seconds("timeout", timeout))


def barrier(tag: int, timeout: float) -> Call:
    spec = Spec(Kind.BARRIER, lib.PYCCL_UINT8, tag=_tag(tag))
    return Call("barrier", spec, None, None, seconds("timeout", timeout))


def are_peers_pending(count: int, timeout: float) -> tuple[Call, Array]:
    """The array holds the greatest count of all members afterwards."""
    counts = np.array([count], np.int32)
    spec = Spec(
        Kind.ALL_REDUCE, lib.PYCCL_INT32, lib.PYCCL_MAX, space=lib.PYCCL_SPACE_INTERNAL, tag=_TAG_PENDING, elements=1
    )
    buffer = as_buffer("counts", counts, writable=True)
    return Call("are_peers_pending", spec, buffer, buffer, timeout), counts


def gather_bytes(what: str, mine: bytes, out: Array, tag: int, timeout: float) -> Call:
    """All-gather of a few bytes on the library's own tags, in a call of this name."""
    spec = Spec(Kind.ALL_GATHER, lib.PYCCL_UINT8, space=lib.PYCCL_SPACE_INTERNAL, tag=tag, elements=len(mine))
    source, target = as_buffer("mine", mine, writable=False), as_buffer("out", out, writable=True)
    return Call(what, spec, source, target, timeout)


def check_many(max_in_flight: int, options: dict[str, Any]) -> None:
    check_range("max_in_flight", max_in_flight, 1, _IN_FLIGHT_MAX)
    if "out" in options:
        raise errors.UsageError("all_reduce_many works in place: it takes no out")


def sync_shared_state(state: SharedState, strategy: str) -> Strategy:
    if not isinstance(state, SharedState):
        raise errors.UsageError(f"a SharedState is needed, not {type(state).__name__}")
    if not isinstance(strategy, str) or strategy not in _STRATEGIES:
        raise errors.UsageError(f"strategy={strategy!r} is not one of {', '.join(_STRATEGIES)}")
    return _STRATEGIES[strategy]


def check_range(name: str, value: object, low: int, high: int) -> None:
    if type(value) is int and low <= value <= high:
        return
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= int(value) <= high:
        raise errors.UsageError(f"{name}={shown(value)}: a whole number of {low}..{high} is needed")


def rate(name: str, value: object) -> int:
    """A cap in bytes per second, 0 for none, from text like "50mbit"."""
    if value is None:
        return 0
    try:
        bps = units.rate_bps(value)
    except units.UnitError as error:
        raise errors.UsageError(f"{name}={value!r}: {error}") from error
    if bps < _RATE_BPS_MIN:
        raise errors.UsageError(f"{name}={value!r}: less than {units.show_rate(_RATE_BPS_MIN)} is no useful rate")
    return bps // 8


def seconds(name: str, value: object) -> float:
    """A time to wait; so long a one that no clock or lock minds it, where more is asked for."""
    if type(value) is float and 0 < value <= TIMEOUT_S_MAX:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not float(value) > 0:
        raise errors.UsageError(f"{name}={value!r}: a positive number of seconds is needed")
    return min(float(value), TIMEOUT_S_MAX)


def parse_peer(peer: str) -> bytes:
    try:
        parsed = bytes.fromhex(peer)
    except (TypeError, ValueError):
        parsed = b""
    if len(parsed) != limits.ID_BYTES:
        raise errors.UsageError(f"{peer!r} is no peer id: 32 hex characters are needed")
    return parsed


def _tag(tag: int) -> int:
    check_range("tag", tag, 0, limits.U32_MAX)
    return int(tag)


def _reduce_op(op: ReduceOp | str, x: Buffer) -> int:
    """op of the spec."""
    code = _OPS.get(op) if isinstance(op, str) else None
    if code is None:
        raise errors.UsageError(f"op={op!r} is not one of {', '.join(ReduceOp)}")
    if code == _AVG and not x.is_float:
        raise errors.UsageError(f"op='avg' needs floats, not {x.dtype}: sum them and divide as you need")
    return code


def _algorithm(algorithm: str) -> int:
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        raise errors.UsageError(f"algorithm={algorithm!r} is not one of {', '.join(ALGORITHMS)}")
    return ALGORITHMS[algorithm]


def _guarded(spec: Spec, guard: Guard | str | None, x: Buffer) -> Spec:
    parsed = parse_guard(guard)
    if parsed is None:
        return spec
    if not x.is_float:
        raise errors.UsageError(f"guard={guard!r} needs floats, not {x.dtype}")
    if spec.algorithm == lib.PYCCL_RING:
        raise errors.UsageError("guard: in a ring nobody sees what a member contributes; algorithm='direct' is needed")
    return spec._replace(algorithm=lib.PYCCL_DIRECT, guard=1, root=spec.root[:8] + parsed.encoded())


def _codec(quantize: str | None, block: int, x: Buffer) -> tuple[int, int]:
    """(codec, block) of the spec."""
    if quantize is None:
        return lib.PYCCL_CODEC_NONE, 0
    codec_of(quantize)
    if not x.is_float:
        raise errors.UsageError(f"quantize={quantize!r} needs floats, not {x.dtype}")
    check_range("quantize_block", block, lib.PYCCL_BLOCK_MIN, lib.PYCCL_BLOCK_MAX)
    if block & (block - 1):
        raise errors.UsageError(f"quantize_block={block}: a power of two is needed")
    return _CODECS[quantize], int(block)


def _weight(weight: float, op: int) -> float:
    if type(weight) is float and weight == 1.0:
        return weight
    if isinstance(weight, bool) or not isinstance(weight, int | float | np.number):
        raise errors.UsageError(f"weight={weight!r}: a number is needed")
    if not 0 <= float(weight) < float("inf"):
        raise errors.UsageError(f"weight={weight!r}: finite and not negative is needed")
    if op != _AVG and float(weight) != 1.0:
        raise errors.UsageError(f"weight={weight!r}: weights are for op='avg' only")
    return float(weight)
