"""Which array of a shared state the members disagree about: found in three all-gathers of a few KiB.

    1  hashes of blocks of BLOCK arrays, in the order of their names: the first block that differs
    2  hashes of the arrays of that block: the first array that differs
    3  that array: name, dtype, shape, whether its content may differ

Every member draws the same conclusions from the same gathered bytes, so all of them take the same steps. Up to the
first difference all have the same arrays, so that the lowest name there is one that others lack, or that differs.
Spec: proto/wire.md 6.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pyccl.errors import RemoteProtocolError

BLOCK: Final = 256  # arrays of a block, and blocks of a state
ENTRY_BYTES: Final = 2048  # of an array in step 3
_HASH_BYTES: Final = 8
_LENGTHS: Final = struct.Struct("<IIII")


@dataclass(frozen=True, slots=True)
class Entry:
    """What is said of an array."""

    name: str
    dtype: str  # NumPy's type string, or the name of a foreign type
    shape: tuple[int, ...]
    content_may_differ: bool


def block_hashes(entries: Sequence[bytes]) -> bytes:
    """entries: of all arrays, as they enter the layout."""
    return b"".join(_hash(b"".join(entries[at * BLOCK : (at + 1) * BLOCK])) for at in range(BLOCK))


def entry_hashes(entries: Sequence[bytes], block: int) -> bytes:
    here = entries[block * BLOCK : (block + 1) * BLOCK]
    return b"".join(map(_hash, here)) + _hash(b"") * (BLOCK - len(here))


def first_difference(hashes: Iterable[bytes]) -> int | None:
    """Where the hashes of several members differ first; None: nowhere."""
    columns = zip(*(_split(row) for row in hashes), strict=True)
    return next((at for at, column in enumerate(columns) if len(set(column)) > 1), None)


def padded(entries: Sequence[bytes], at: int) -> bytes:
    """ENTRY_BYTES: the array with this number, or zeros where there is none."""
    entry = entries[at] if at < len(entries) else b""
    return entry.ljust(ENTRY_BYTES, b"\0")


def decode_untrusted(data: bytes) -> Entry | None:
    """What `padded` made. RemoteProtocolError: it is not that."""
    if len(data) != ENTRY_BYTES:
        raise RemoteProtocolError(f"an array of a layout in {len(data)} bytes")
    name_bytes, dtype_bytes, dimensions, may_differ = _LENGTHS.unpack_from(data)
    end = _LENGTHS.size + name_bytes + dtype_bytes + 8 * dimensions
    if not any(data):
        return None
    if end > ENTRY_BYTES or may_differ > 1 or any(data[end:]):
        raise RemoteProtocolError("an array of a layout is out of range")
    at = _LENGTHS.size + name_bytes
    try:
        name, dtype = data[_LENGTHS.size : at].decode(), data[at : at + dtype_bytes].decode()
    except UnicodeDecodeError:
        raise RemoteProtocolError("an array of a layout is no text") from None
    shape = struct.unpack_from(f"<{dimensions}Q", data, at + dtype_bytes)
    return Entry(name, dtype, shape, bool(may_differ))


def describe(entries: Mapping[bytes, Entry | None]) -> tuple[tuple[str, ...], str]:
    """(fields, text) of the array that differs; ((), "") where none does."""
    present = [entry for entry in entries.values() if entry is not None]
    if not present:
        return (), ""
    name = min((entry.name for entry in present), key=str.encode)
    lacking = [peer for peer, entry in entries.items() if entry is None or entry.name != name]
    if lacking:
        return ("name",), f"there is no array {name!r} on {_short(lacking)}"
    kinds: dict[str, Mapping[bytes, object]] = {
        "dtype": {peer: entry.dtype for peer, entry in entries.items() if entry is not None},
        "shape": {peer: entry.shape for peer, entry in entries.items() if entry is not None},
        "allow_content_inequality": {p: entry.content_may_differ for p, entry in entries.items() if entry is not None},
    }
    differing = {field: values for field, values in kinds.items() if len(set(values.values())) > 1}
    said = "; ".join(f"{field} {_values(values)}" for field, values in differing.items())
    return tuple(differing), f"array {name!r}: {said}" if said else ""


def _values(values: Mapping[bytes, object]) -> str:
    distinct = dict.fromkeys(values.values())
    return ", ".join(f"{value!r} on {_short([p for p in values if values[p] == value])}" for value in distinct)


def _short(peers: Iterable[bytes]) -> str:
    return " ".join(peer.hex()[:8] for peer in peers)


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:_HASH_BYTES]


def _split(row: bytes) -> list[bytes]:
    if len(row) != BLOCK * _HASH_BYTES:
        raise RemoteProtocolError(f"hashes of a layout in {len(row)} bytes")
    return [row[at : at + _HASH_BYTES] for at in range(0, len(row), _HASH_BYTES)]
