"""What an operation is, as 40 bytes (proto/wire.md 3.2): decoded here only to tell people in what two of them differ.

Numbers are those of native/include/pyccl.h; tests compare the two lists. Names follow the public API.
"""

from __future__ import annotations

import enum
import struct
from typing import Final, NamedTuple

from pyccl._proto import limits
from pyccl.errors import RemoteProtocolError

_LAYOUT: Final = struct.Struct("<8BIIQ16s")
assert _LAYOUT.size == limits.SPEC_BYTES


class Kind(enum.IntEnum):
    ALL_REDUCE = 1
    BROADCAST = 2
    BARRIER = 3
    ALL_GATHER = 4
    EXCHANGE = 5
    REDUCE_SCATTER = 6


class Dtype(enum.IntEnum):
    INT32 = 1
    INT64 = 2
    FLOAT32 = 3
    FLOAT64 = 4
    UINT8 = 5
    INT8 = 6
    UINT16 = 7
    INT16 = 8
    UINT32 = 9
    UINT64 = 10
    FLOAT16 = 11
    BFLOAT16 = 12


class ReduceOp(enum.IntEnum):
    SUM = 1
    AVG = 2
    PROD = 3
    MIN = 4
    MAX = 5


class Algorithm(enum.IntEnum):
    AUTO = 0
    DIRECT = 1
    RING = 2


class Spec(NamedTuple):
    """Fields in the order of the wire. Numbers stay plain: a spec of a newer peer must still be printable."""

    kind: int
    dtype: int
    op: int
    codec: int
    algorithm: int
    retry: int
    space: int
    guard: int
    tag: int
    block: int
    length: int  # elements; "count" on the wire, which is a method of every tuple
    root: bytes


_ENUMS: Final[dict[str, type[enum.IntEnum]]] = {
    "kind": Kind,
    "dtype": Dtype,
    "op": ReduceOp,
    "algorithm": Algorithm,
}


def decode_untrusted(data: bytes) -> Spec:
    """RemoteProtocolError unless there are 40 bytes; unknown numbers are kept as they are."""
    if len(data) != limits.SPEC_BYTES:
        raise RemoteProtocolError(f"a spec has {limits.SPEC_BYTES} bytes, not {len(data)}")
    return Spec(*_LAYOUT.unpack(data))


def field_name(field: str) -> str:
    """The name users know: that of the header and of the API."""
    return "count" if field == "length" else field


def _limits(spec: Spec) -> bytes:
    """Of a guard; they stand behind a row. Broadcasts and exchanges have a whole root."""
    return spec.root[8:] if spec.kind in (Kind.ALL_REDUCE, Kind.REDUCE_SCATTER) else b""


def show(spec: Spec, field: str) -> str:
    """One field of a spec for people."""
    value = getattr(spec, field)
    if field == "guard" and value and _limits(spec):
        limits_told = zip(("abs", "norm"), struct.unpack("<ff", _limits(spec)), strict=True)
        return "finite" + "".join(f"_{name}_{limit:g}" for name, limit in limits_told if limit)
    if isinstance(value, bytes):
        return value.hex()[:8] if any(value) else "none"
    try:
        return _ENUMS[field](value).name.lower()
    except (KeyError, ValueError):
        return str(value)


def differing_fields(mine: Spec, theirs: Spec) -> tuple[str, ...]:
    """A shape that makes other rows of a reduce_scatter shows as "root", where the length of a row stands."""


    def differs(field: str) -> bool:
        if field == "root":
            return mine.root[: 16 - len(_limits(mine))] != theirs.root[: 16 - len(_limits(theirs))]
        if field == "guard":
            return (mine.guard, _limits(mine)) != (theirs.guard, _limits(theirs)) and mine.kind == theirs.kind
        return bool(getattr(mine, field) != getattr(theirs, field))

    return tuple(field for field in Spec._fields if differs(field))
