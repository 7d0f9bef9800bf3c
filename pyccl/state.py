"""SharedState: named arrays plus a revision that all peers of a group hold bit-identically between rounds.

Digests, all over little-endian bytes (proto/wire.md 6):
    chunk   XXH3-128 of each MiB of an array's bytes
    layout  SHA-256 of (name, dtype, shape) of every array, by name; first 16 bytes
    root    SHA-256 of (layout, revision, the chunk digests of every array, by name); first 16 bytes
Lineage is not part of the root: it says whose state this is, not what it holds.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pyccl._native.handles import CHUNK_BYTES, chunk_digests
from pyccl.errors import UsageError

ARRAYS_MAX: Final = 65_536
NAME_BYTES_MAX: Final = 1024
REVISION_MAX: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class StateDigest:
    """The Merkle tree of one moment of a state."""

    layout: bytes
    root: bytes
    table: bytes  # 16 bytes a chunk: arrays by name, chunks in order


class SharedState:
    """References to the caller's arrays, by name, and the number of the revision that they hold.

    Args:
        arrays: name -> C-contiguous, writable NumPy array of any dtype without Python objects; not copied.
            ``sync_shared_state`` may replace their bytes; the caller changes them between rounds.
        revision: 0..2**63-1. Add the same to it on all peers after every deterministic advance of the arrays.
    Raises:
        UsageError: a name or an array is not of that kind, or two arrays share memory.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray[Any, Any]], revision: int = 0) -> None:
        if not arrays:
            raise UsageError("a shared state needs at least one array")
        if len(arrays) > ARRAYS_MAX:
            raise UsageError(f"{len(arrays)} arrays, at most {ARRAYS_MAX} are allowed")
        for name, array in arrays.items():
            _check_array(name, array)
        _check_disjoint(arrays)
        self._arrays = dict(sorted(arrays.items()))
        self.revision = revision
        self.lineage = bytes(16)  # zero until the first committed sync
        self.voter: bytes | None = None  # the incarnation that took part in the group's last committed sync

    @property
    def revision(self) -> int:
        return self._revision

    @revision.setter
    def revision(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= int(value) <= REVISION_MAX:
            raise UsageError(f"a revision is a number of 0..2**63-1, not {value!r}")
        self._revision = int(value)

    @property
    def arrays(self) -> Mapping[str, np.ndarray[Any, Any]]:
        """The caller's arrays in the order of their names."""
        return self._arrays

    @property
    def size_bytes(self) -> int:
        return sum(array.nbytes for array in self._arrays.values())

    def digest(self) -> str:
        """32 hex characters that are equal on two peers when names, dtypes, shapes, bytes and revision are."""
        return self.tree().root.hex()

    def tree(self) -> StateDigest:
        """Hash everything as it is now."""
        table = b"".join(chunk_digests(array) for array in self._arrays.values())
        layout = self.layout()
        return StateDigest(layout, state_root(layout, self._revision, table), table)

    def layout(self) -> bytes:
        """What must agree before bytes can be compared."""
        digest = hashlib.sha256()
        for name, array in self._arrays.items():
            encoded, dtype = name.encode(), array.dtype.str.encode()
            digest.update(struct.pack("<III", len(encoded), len(dtype), array.ndim) + encoded + dtype)
            digest.update(struct.pack(f"<{array.ndim}Q", *array.shape))
        return digest.digest()[:16]

    def __repr__(self) -> str:
        return f"<SharedState revision {self.revision}, {len(self._arrays)} arrays, {self.size_bytes} bytes>"


def state_root(layout: bytes, revision: int, table: bytes) -> bytes:
    return hashlib.sha256(layout + struct.pack("<Q", revision) + table).digest()[:16]


def chunks_of(size_bytes: int) -> int:
    return -(-size_bytes // CHUNK_BYTES)


def _check_array(name: object, array: object) -> None:
    if not isinstance(name, str) or not 1 <= len(name.encode()) <= NAME_BYTES_MAX:
        raise UsageError(f"the name of an array is text of 1..{NAME_BYTES_MAX} bytes, not {name!r}")
    if not isinstance(array, np.ndarray):
        raise UsageError(f"{name}: a NumPy array is needed, not {type(array).__name__}")
    if array.dtype.hasobject:
        raise UsageError(f"{name}: dtype {array.dtype} holds Python objects")
    if not array.flags.c_contiguous:
        raise UsageError(f"{name}: the array is not C-contiguous")
    if not array.flags.writeable:
        raise UsageError(f"{name}: the array is read-only")


def _check_disjoint(arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    spans = sorted((a.__array_interface__["data"][0], a.nbytes, name) for name, a in arrays.items() if a.nbytes)
    for (start, size, name), (after, _, other) in itertools.pairwise(spans):
        if start + size > after:
            raise UsageError(f"{name} and {other} share memory")
