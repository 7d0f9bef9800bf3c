"""SharedState: named arrays plus a revision that all peers of a group hold bit-identically between rounds.

Digests, all over little-endian bytes (proto/wire.md 6); the arrays are in the order of their names:
    chunk   of each MiB of an array's bytes: XXH3-128 (16 bytes) or SHA-256 (32 bytes), as ``digest`` says
    table   the chunk digests of every array whose content must be equal
    layout  SHA-256 of (name, dtype, shape, may the content differ) of every array
    root    SHA-256 of (layout, digest number, revision, table)
Lineage is not part of the root: it says whose state this is, not what it holds.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pyccl._native.handles import CHUNK_BYTES, chunk_digests
from pyccl.errors import StateFileError, UsageError
from pyccl.statefile import Entry, Manifest, StateFile, StrPath, dtype_name, dtype_of, write, write_to

ARRAYS_MAX: Final = 65_536
NAME_BYTES_MAX: Final = 1024
REVISION_MAX: Final = (1 << 63) - 1
_THREADS_MAX: Final = 8
_THREADS_FROM_BYTES: Final = 8 << 20  # below it starting threads costs more than they save
_READ_BYTES: Final = 8 * CHUNK_BYTES

Array = np.ndarray[Any, Any]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, slots=True)
class ChunkDigest:
    """A way to hash chunks. table(arrays): the digests of all chunks, `size_bytes` each, arrays one after the other."""

    name: str
    number: int  # on the wire
    size_bytes: int
    table: Callable[[Sequence[Bytes]], bytes]

    def matches(self, chunk: Bytes, digest: bytes) -> bool:
        """Whether these are the bytes; `chunk` is at most CHUNK_BYTES long."""
        return self.table([chunk]) == digest


def _fast_table(arrays: Sequence[Bytes]) -> bytes:
    return b"".join(chunk_digests(array) for array in arrays)


def _sha256_table(arrays: Sequence[Bytes]) -> bytes:
    """hashlib releases the GIL, so threads share the chunks of a large state."""
    chunks = [array[at : at + CHUNK_BYTES].data for array in arrays for at in range(0, array.nbytes, CHUNK_BYTES)]
    threads = min(len(os.sched_getaffinity(0)), _THREADS_MAX)
    if threads == 1 or sum(chunk.nbytes for chunk in chunks) < _THREADS_FROM_BYTES:
        return b"".join(map(_sha256, chunks))
    pool = ThreadPoolExecutor(threads, thread_name_prefix="pyccl-digest")
    try:
        return b"".join(pool.map(_sha256, chunks))
    finally:
        pool.shutdown(cancel_futures=True)


def _sha256(chunk: memoryview) -> bytes:
    return hashlib.sha256(chunk).digest()


FAST: Final = ChunkDigest("fast", 1, 16, _fast_table)
SHA256: Final = ChunkDigest("sha256", 2, 32, _sha256_table)
DIGESTS: Final[Mapping[str, ChunkDigest]] = {kind.name: kind for kind in (FAST, SHA256)}


@dataclass(frozen=True, slots=True)
class StateDigest:
    """The Merkle tree of one moment of a state."""

    layout: bytes
    root: bytes
    table: bytes


class _Load:
    """Called on the class it makes a new state, called on a state it fills that one; see ``SharedState._load_new``."""

    def __get__(self, state: SharedState | None, owner: type[SharedState]) -> Callable[[StrPath], SharedState]:
        return owner._load_new if state is None else state._load_into


class SharedState:
    """References to the caller's arrays, by name, and the number of the revision that they hold.

    Args:
        arrays: name -> C-contiguous, writable NumPy array of any dtype without Python objects; not copied. Of a torch
            tensor in host memory: ``t.detach().numpy()``.
            ``sync_shared_state`` may replace their bytes; the caller changes them between rounds, and not while a
            sync runs: what is served then does not match its digest, and others leave this peer as a source.
        revision: 0..2**63-1. Add the same to it on all peers after every deterministic advance of the arrays.
        allow_content_inequality: names of arrays whose bytes may differ between peers (a random generator's state,
            say). Names, dtypes and shapes must agree, as must this list; the bytes are in no digest and never travel:
            every peer, a newcomer too, keeps its own.
        digest: how chunks are hashed, equal on all peers. "fast" (XXH3-128) finds accidents; "sha256" (full SHA-256)
            also finds forgeries, for runs whose peers do not trust each other.
    Raises:
        UsageError: a name or an array is not of that kind, two arrays share memory, or an option is not known.
    """

    def __init__(
        self,
        arrays: Mapping[str, Array],
        revision: int = 0,
        *,
        allow_content_inequality: Iterable[str] = (),
        digest: str = "fast",
    ) -> None:
        if not arrays:
            raise UsageError("a shared state needs at least one array")
        if len(arrays) > ARRAYS_MAX:
            raise UsageError(f"{len(arrays)} arrays, at most {ARRAYS_MAX} are allowed")
        for name, array in arrays.items():
            _check_array(name, array)
        _check_disjoint(arrays)
        if not isinstance(digest, str) or digest not in DIGESTS:
            raise UsageError(f"digest={digest!r} is not one of {', '.join(DIGESTS)}")
        self._arrays = dict(sorted(arrays.items()))
        self._unequal = _names_of(allow_content_inequality, self._arrays)
        self.chunk_digest = DIGESTS[digest]
        self.revision = revision
        self.lineage = bytes(16)  # zero until the first committed sync
        self.voter: bytes | None = None  # the incarnation that took part in the group's last committed sync
        self.restored = False  # from a file, and since then no sync with anybody else: perhaps a stale copy

    @property
    def revision(self) -> int:
        return self._revision

    @revision.setter
    def revision(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= int(value) <= REVISION_MAX:
            raise UsageError(f"a revision is a number of 0..2**63-1, not {value!r}")
        self._revision = int(value)

    @property
    def arrays(self) -> Mapping[str, Array]:
        """The caller's arrays in the order of their names."""
        return self._arrays

    @property
    def compared(self) -> Mapping[str, Bytes]:
        """The bytes, without a copy, of the arrays whose content must be equal, in the order of their names."""
        return {
            name: array.reshape(-1).view(np.uint8) for name, array in self._arrays.items() if name not in self._unequal
        }

    @property
    def size_bytes(self) -> int:
        return sum(array.nbytes for array in self._arrays.values())

    def digest(self) -> str:
        """64 hex characters: equal on two peers when names, dtypes, shapes, revision, options and bytes are (the bytes
        of arrays in ``allow_content_inequality`` do not count)."""
        return self.tree().root.hex()

    # ---- on disk

    def save(self, path: StrPath) -> None:
        """Write arrays (those of ``allow_content_inequality`` too), revision, lineage, digests to a file, atomically.

        A safetensors file; its header carries a manifest. Durable when it returns; whoever is killed before leaves what
        was there. Nothing is copied in memory. The arrays must not change meanwhile. To read it: ``load``.

        Raises:
            UsageError: the dtype of an array has no place in safetensors (structures, strings, dates, complex128,
                big-endian). bfloat16 and the float8s of ``ml_dtypes`` have. Or an array is called "__metadata__".
            StateFileError: another process is saving to this path.
            OSError: no room, no such directory... What was there is there.
        """
        manifest, whole = self._manifest()
        write(path, manifest, whole)

    def save_to(self, fd: int) -> None:
        """As ``save``, into an empty file that is open; not durable."""
        manifest, whole = self._manifest()
        write_to(fd, manifest, whole)

    def _manifest(self) -> tuple[Manifest, dict[str, Bytes]]:
        """And the bytes it is of."""
        if "__metadata__" in self._arrays:
            raise UsageError("__metadata__: a state file can't hold an array of this name")
        dtypes = {name: dtype_name(name, array.dtype) for name, array in self._arrays.items()}
        whole = self._bytes_of(self._arrays)
        tables = self._tables(whole)
        entries = {
            name: Entry(dtypes[name], array.shape, name not in self._unequal, _sha256(memoryview(tables[name])).hex())
            for name, array in self._arrays.items()
        }
        root = self.root_of(self._revision, b"".join(tables[name] for name in self.compared))
        told = self.lineage.hex(), self.chunk_digest.name, root.hex(), self.layout().hex()
        return Manifest(self._revision, *told, entries), whole

    def _bytes_of(self, names: Iterable[str]) -> dict[str, Bytes]:
        return {name: self._arrays[name].reshape(-1).view(np.uint8) for name in names}

    load = _Load()

    @classmethod
    def _load_new(cls, path: StrPath) -> SharedState:
        """``SharedState.load(path)``: a new state as ``save`` wrote it, in arrays of its own, every byte checked.

        ``state.load(path)`` fills the arrays of `state` instead, which must have the names, dtypes, shapes and options
        of the file, and returns it; the file is checked whole before the first array changes. Needs no memory beside
        the arrays. A loaded state has no vote in the first sync, but if nobody has, the newest revision wins.

        Raises:
            StateFileError: the file is torn, truncated, altered, foreign, or of another layout than `state`.
            OSError: it can't be read (FileNotFoundError...).
        """
        with StateFile(path) as file:
            try:
                arrays = {name: np.empty(e.shape, dtype_of(e.dtype)) for name, e in file.manifest.arrays.items()}
                unequal = [name for name, entry in file.manifest.arrays.items() if not entry.equal]
                state = cls(
                    arrays, file.manifest.revision, allow_content_inequality=unequal, digest=file.manifest.digest
                )
            except (ValueError, StateFileError) as e:  # UsageError is a ValueError
                raise file.error(str(e)) from e
            state._read(file, arrays)
        return state

    def _load_into(self, path: StrPath) -> SharedState:
        return self._fill(path, self._arrays)

    def load_shared(self, path: StrPath) -> SharedState:
        """As ``state.load``, without the arrays whose content may differ: those in the file are another peer's."""
        return self._fill(path, self.compared)

    def _fill(self, path: StrPath, names: Iterable[str]) -> SharedState:
        with StateFile(path) as file:
            self._check_same_layout(file)
            check_state_file(file)
            interrupt = None
            while True:
                try:
                    self._read(file, names)
                    break
                except KeyboardInterrupt as e:  # comes through when the arrays are whole
                    interrupt = e
                except (StateFileError, OSError) as e:
                    raise file.error(f"it changed while it was read, and the arrays hold only part of it: {e}") from e
        if interrupt is not None:
            raise interrupt
        return self

    def _read(self, file: StateFile, names: Iterable[str]) -> None:
        """Fill these arrays, check them, and take what the manifest says of them."""
        whole = self._bytes_of(names)
        for name, array in whole.items():
            file.read(name, 0, array)
        _check_digests(file, self._tables(whole), self.layout())
        self.revision = file.manifest.revision
        self.lineage = bytes.fromhex(file.manifest.lineage)
        self.voter, self.restored = None, True

    def _check_same_layout(self, file: StateFile) -> None:
        mine = {name: (a.dtype.name, a.shape, name not in self._unequal) for name, a in self._arrays.items()}
        theirs = {name: (e.dtype, e.shape, e.equal) for name, e in file.manifest.arrays.items()}
        differ = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
        if differ:
            name = differ[0]
            told = "{} {}{}".format
            here = told(*mine[name][:2], "" if mine[name][2] else ", may differ") if name in mine else "missing"
            there = told(*theirs[name][:2], "" if theirs[name][2] else ", may differ") if name in theirs else "missing"
            raise file.error(f"{len(differ)} arrays are not as here; {name} is {there} there, {here} here")
        if file.manifest.digest != self.chunk_digest.name:
            raise file.error(f'its digest is "{file.manifest.digest}", here it is "{self.chunk_digest.name}"')

    def _tables(self, whole: Mapping[str, Bytes]) -> dict[str, bytes]:
        """The chunk digests of each array."""
        table, tables, at = self.chunk_digest.table(list(whole.values())), {}, 0
        for name, array in whole.items():
            size = -(-array.nbytes // CHUNK_BYTES) * self.chunk_digest.size_bytes
            tables[name] = table[at : at + size]
            at += size
        return tables

    # ---- digests

    def tree(self) -> StateDigest:
        """Hash everything as it is now."""
        table = self.chunk_digest.table(list(self.compared.values()))
        return StateDigest(self.layout(), self.root_of(self._revision, table), table)

    def root_of(self, revision: int, table: bytes) -> bytes:
        """The root of a state of this layout with these chunk digests."""
        return _root(self.layout(), self.chunk_digest, revision, table)

    def layout(self) -> bytes:
        """What must agree before bytes can be compared."""
        return hashlib.sha256(b"".join(self.layout_entries())).digest()

    def layout_entries(self) -> list[bytes]:
        """What the layout says of each array, in the order of their names."""
        entries = []
        for name, array in self._arrays.items():
            encoded, dtype = name.encode(), _type_string(array.dtype).encode()
            lengths = struct.pack("<IIII", len(encoded), len(dtype), array.ndim, name in self._unequal)
            entries.append(lengths + encoded + dtype + struct.pack(f"<{array.ndim}Q", *array.shape))
        return entries

    def __repr__(self) -> str:
        return f"<SharedState revision {self.revision}, {len(self._arrays)} arrays, {self.size_bytes} bytes>"


def _type_string(dtype: np.dtype[Any]) -> str:
    """NumPy's. Foreign types share some, such as "<V2" of bfloat16, and have their names instead."""
    is_foreign = dtype.type.__module__ != np.__name__
    return dtype.str[0] + dtype.name if is_foreign else dtype.str


def check_state_file(file: StateFile) -> None:
    """StateFileError: it does not hold, whole, what its manifest says. Needs a window of memory, whatever its size."""
    kind = DIGESTS.get(file.manifest.digest)
    if kind is None:
        raise file.error(f"its digest {file.manifest.digest!r} is not one of {', '.join(DIGESTS)}")
    buffer, tables = np.empty(_READ_BYTES, np.uint8), {}
    for name, (_, size) in file.places.items():
        parts = []
        for at in range(0, size, _READ_BYTES):
            block = buffer[: min(_READ_BYTES, size - at)]
            file.read(name, at, block)
            parts.append(kind.table([block]))
        tables[name] = b"".join(parts)
    _check_digests(file, tables, bytes.fromhex(file.manifest.layout))


def _check_digests(file: StateFile, tables: Mapping[str, bytes], layout: bytes) -> None:
    """Whether these are the chunk digests that the manifest stands for; all compared arrays are among them."""
    manifest = file.manifest
    for name, table in tables.items():
        if _sha256(memoryview(table)).hex() != manifest.arrays[name].table:
            raise file.error(f"array {name} is damaged: its bytes do not match their digest")
    compared = sorted(name for name, entry in manifest.arrays.items() if entry.equal)
    root = _root(layout, DIGESTS[manifest.digest], manifest.revision, b"".join(tables[name] for name in compared))
    if root.hex() != manifest.root:
        raise file.error("its digest is not that of its arrays")


def _root(layout: bytes, kind: ChunkDigest, revision: int, table: bytes) -> bytes:
    return hashlib.sha256(layout + struct.pack("<QQ", kind.number, revision) + table).digest()


def _names_of(given: Iterable[str], arrays: Mapping[str, Array]) -> frozenset[str]:
    if isinstance(given, str | bytes):
        raise UsageError(f"allow_content_inequality is a collection of names, not {given!r}")
    try:
        names = frozenset(given)
    except TypeError:  # not iterable, or something in it is not hashable
        raise UsageError(f"allow_content_inequality is a collection of names, not {given!r}") from None
    unknown = sorted(repr(name) for name in names if name not in arrays)
    if unknown:
        raise UsageError(f"allow_content_inequality: there is no array {', '.join(unknown)}")
    return names


def _check_array(name: object, array: object) -> None:
    if not isinstance(name, str) or not 1 <= len(_utf8(name)) <= NAME_BYTES_MAX:
        raise UsageError(f"the name of an array is text of 1..{NAME_BYTES_MAX} bytes, not {name!r}")
    if not isinstance(array, np.ndarray):
        raise UsageError(f"{name}: a NumPy array is needed, not {type(array).__name__}")
    if array.dtype.hasobject:
        raise UsageError(f"{name}: dtype {array.dtype} holds Python objects")
    if not array.flags.c_contiguous:
        raise UsageError(f"{name}: the array is not C-contiguous")
    if not array.flags.writeable:
        raise UsageError(f"{name}: the array is read-only")


def _utf8(name: str) -> bytes:
    """Empty for what is no text (a lone surrogate)."""
    try:
        return name.encode()
    except UnicodeEncodeError:
        return b""


def _check_disjoint(arrays: Mapping[str, Array]) -> None:
    spans = sorted((a.__array_interface__["data"][0], a.nbytes, name) for name, a in arrays.items() if a.nbytes)
    for (start, size, name), (after, _, other) in itertools.pairwise(spans):
        if start + size > after:
            raise UsageError(f"{name} and {other} share memory")
