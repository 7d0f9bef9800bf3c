"""One shared state in one file: safetensors, with a manifest in its header. Any safetensors library reads the arrays.

    u64 length of the header, little-endian | header, JSON, padded with spaces to a multiple of 8 | the arrays' bytes
    header    {"__metadata__": {"pyccl": manifest as JSON text}, name: {"dtype", "shape", "data_offsets"}, ...}
    manifest  format, revision, lineage, digest kind, root, layout; of each array dtype, shape, whether its content must
              be equal and the SHA-256 of its chunk digests; "seal": SHA-256 of the manifest without it

The header is a pure function of the manifest, so that a reader compares it whole: no bit of the file is unchecked.
One file and not two: one rename replaces arrays and manifest together.

A file is written under another name in its directory (``.NAME.new``, locked), made durable, and then renamed: whoever
is killed meanwhile leaves the old file. The next save takes that name over.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from pyccl.errors import StateFileError, UsageError

FORMAT: Final = 1
HEADER_BYTES_MAX: Final = 100_000_000  # of safetensors
_LENGTH: Final = struct.Struct("<Q")
_METADATA: Final = "__metadata__"
_KEY: Final = "pyccl"
_ALIGNMENT: Final = 8
_WRITE_BYTES: Final = 8 << 20
_SIZE_MAX: Final = 1 << 48  # of one dimension, and bytes of an array
_DIMENSIONS_MAX: Final = 64  # of NumPy
_REVISION_MAX: Final = (1 << 63) - 1
_LINEAGE_BYTES: Final = 16
_HASH_BYTES: Final = 32
_CODES: Final[Mapping[str, str]] = {  # NumPy's name of a dtype: safetensors' name
    "bool": "BOOL", "int8": "I8", "uint8": "U8", "int16": "I16", "uint16": "U16", "int32": "I32", "uint32": "U32",
    "int64": "I64", "uint64": "U64", "float16": "F16", "float32": "F32", "float64": "F64", "complex64": "C64",
    "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
_OF_ML_DTYPES: Final = frozenset({"bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"})

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
StrPath = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Entry:
    """One array. table: SHA-256 of its chunk digests, hex."""

    dtype: str
    shape: tuple[int, ...]
    equal: bool
    table: str

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * dtype_bytes(self.dtype)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a file holds. lineage, root, layout (of ``SharedState.layout``): hex. arrays: by name, in their order."""

    revision: int
    lineage: str
    digest: str
    root: str
    layout: str
    arrays: Mapping[str, Entry]

    def to_json(self) -> str:
        """Sealed."""
        plain = {
            "format": FORMAT,
            "revision": self.revision,
            "lineage": self.lineage,
            "digest": self.digest,
            "root": self.root,
            "layout": self.layout,
            "arrays": {name: [e.dtype, list(e.shape), e.equal, e.table] for name, e in self.arrays.items()},
        }
        return _json(plain | {"seal": _seal(plain)})

    def header(self) -> bytes:
        """The file up to the first array."""
        plain: dict[str, Any] = {_METADATA: {_KEY: self.to_json()}}
        for name, (start, size) in self.places().items():
            entry = self.arrays[name]
            plain[name] = {
                "dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, start + size],
            }  # fmt: skip
        text = _json(plain).encode()
        text += b" " * (-(_LENGTH.size + len(text)) % _ALIGNMENT)
        return _LENGTH.pack(len(text)) + text

    def places(self) -> dict[str, tuple[int, int]]:
        """(offset behind the header, size) of each array. Wide dtypes first: so all are aligned."""
        places, at = {}, 0
        for name in sorted(self.arrays, key=lambda name: (-dtype_bytes(self.arrays[name].dtype), name)):
            places[name] = at, self.arrays[name].size_bytes
            at += self.arrays[name].size_bytes
        return places


def _json(plain: object) -> str:
    return json.dumps(plain, separators=(",", ":"))


def _seal(plain: object) -> str:
    return hashlib.sha256(_json(plain).encode()).hexdigest()


# ---- dtypes


def dtype_name(name: str, dtype: np.dtype[Any]) -> str:
    """NumPy's name of it. UsageError: safetensors has no place for array `name`."""
    if dtype.name not in _CODES or not dtype.isnative:
        raise UsageError(f"{name}: a state file can't hold dtype {dtype}; {', '.join(_CODES)} (little-endian) it can")
    return dtype.name


def dtype_bytes(name: str) -> int:
    """Of one element; without ml_dtypes, too."""
    if name in _OF_ML_DTYPES:
        return 2 if name == "bfloat16" else 1
    return np.dtype(name).itemsize


def dtype_of(name: str) -> np.dtype[Any]:
    """StateFileError: ml_dtypes is missing."""
    if name not in _OF_ML_DTYPES:
        return np.dtype(name)
    try:
        made: np.dtype[Any] = np.dtype(getattr(importlib.import_module("ml_dtypes"), name))
    except ImportError as e:
        raise StateFileError(f"arrays of dtype {name} need the package ml_dtypes: pip install ml_dtypes") from e
    return made


# ---- writing


def write(path: StrPath, manifest: Manifest, arrays: Mapping[str, Bytes]) -> None:
    """The file of this name is this state, durably, when it returns; or else what it was before.

    StateFileError: another save of it is under way. OSError: no room, no such directory...
    """
    final = os.path.realpath(path)
    directory, name = os.path.split(final)
    new = os.path.join(directory, f".{name}.new")
    with _locked(new) as fd:
        try:
            write_to(fd, manifest, arrays)
            os.fsync(fd)
            os.rename(new, final)
        except OSError as e:
            with contextlib.suppress(OSError):
                os.unlink(new)
            raise OSError(e.errno, e.strerror, final) from e
        except BaseException:  # Ctrl-C
            os.unlink(new)
            raise
        sync_directory(directory)


def write_to(fd: int, manifest: Manifest, arrays: Mapping[str, Bytes]) -> None:
    """Into an empty file; its space is taken first. Copies nothing."""
    header = manifest.header()
    if len(header) - _LENGTH.size > HEADER_BYTES_MAX:
        raise UsageError(f"the names of {len(arrays)} arrays make a header of {len(header)} bytes; it may have 10^8")
    places = manifest.places()
    os.posix_fallocate(fd, 0, len(header) + sum(size for _, size in places.values()))
    _write(fd, memoryview(header))
    for name in places:
        _write(fd, arrays[name].data)


def _write(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data[:_WRITE_BYTES]) :]


@contextlib.contextmanager
def _locked(path: str) -> Iterator[int]:
    """An empty file of this name that nobody else writes."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            if not _lock(fd):
                raise StateFileError(f"{path}: another save is under way")
            if _is_at(fd, path):  # else who had it renamed it, between open and lock
                os.ftruncate(fd, 0)
                yield fd
                return
        finally:
            os.close(fd)


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def sync_directory(path: str) -> None:
    """Names in it are durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- reading


class StateFile:
    """An open file whose header is sound. What the arrays hold is for the reader to check against ``manifest``."""

    def __init__(self, path: StrPath) -> None:
        """StateFileError: no state file, torn or damaged. OSError: it can't be read."""
        self.path = os.fspath(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.size_bytes = os.fstat(self._fd).st_size
            self.manifest, self._start = self._parse()
        except BaseException:
            self.close()
            raise
        self.places = self.manifest.places()

    def _parse(self) -> tuple[Manifest, int]:
        """(manifest, where the arrays begin)."""
        if self.size_bytes < _LENGTH.size:
            raise self.error(f"{self.size_bytes} bytes are no state file")
        (length,) = _LENGTH.unpack(self._read(0, _LENGTH.size))
        if length > HEADER_BYTES_MAX:
            raise self.error("not a safetensors file")
        if _LENGTH.size + length > self.size_bytes:
            raise self.error(f"cut off within its header: {self.size_bytes} bytes")
        header = self._read(0, _LENGTH.size + length)
        try:
            manifest = _manifest_untrusted(header[_LENGTH.size :])
        except (StateFileError, ValueError, RecursionError) as e:
            raise self.error(str(e)) from e
        if manifest.header() != header:
            raise self.error("its header does not belong to its manifest")
        expected = len(header) + sum(size for _, size in manifest.places().values())
        if self.size_bytes != expected:
            raise self.error(f"{self.size_bytes} bytes, revision {manifest.revision} takes {expected}")
        return manifest, len(header)

    def _read(self, offset: int, size: int) -> bytes:
        data = bytearray(size)
        self._read_into(offset, memoryview(data))
        return bytes(data)

    def read(self, name: str, offset: int, into: Bytes) -> None:
        """Fill `into` with the bytes of the array from `offset` on."""
        self._read_into(self._start + self.places[name][0] + offset, into.data)

    def _read_into(self, offset: int, rest: memoryview) -> None:
        while rest:
            count = os.preadv(self._fd, [rest], offset)
            if count == 0:
                raise self.error("it became shorter while it was read")
            offset, rest = offset + count, rest[count:]

    def error(self, reason: str) -> StateFileError:
        return StateFileError(f"{self.path}: {reason}")

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _manifest_untrusted(header: bytes) -> Manifest:
    """StateFileError, ValueError: it is none. Whether the header says the same is for the caller to compare."""
    plain = json.loads(header)
    metadata = plain.get(_METADATA) if isinstance(plain, dict) else None
    text = metadata.get(_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise StateFileError("a safetensors file, but none that pyccl has written")
    told = json.loads(text)
    if not isinstance(told, dict):
        raise StateFileError("its manifest is damaged")
    if told.get("format") != FORMAT:
        raise StateFileError(f"written in format {told.get('format')!r} of another pyccl, this one reads {FORMAT}")
    seal = told.pop("seal", None)
    if seal != _seal(told):
        raise StateFileError("its manifest is damaged: the seal does not match")
    try:
        arrays = {
            name: Entry(str(dtype), tuple(map(int, shape)), bool(equal), str(table))
            for name, (dtype, shape, equal, table) in told["arrays"].items()
        }
        lineage, digest, root, layout = (str(told[name]) for name in ("lineage", "digest", "root", "layout"))
        made = Manifest(int(told["revision"]), lineage, digest, root, layout, arrays)
        possible = (
            all(entry.dtype in _CODES and _is_possible(entry) for entry in arrays.values()),
            0 <= made.revision <= _REVISION_MAX,
            len(bytes.fromhex(made.lineage)) == _LINEAGE_BYTES,
            len(bytes.fromhex(made.layout)) == _HASH_BYTES,
        )
        if not all(possible):
            raise StateFileError("its manifest tells what no state has")
        return made
    except (KeyError, TypeError, AttributeError, OverflowError) as e:
        raise StateFileError("its manifest lacks what it must have") from e


def _is_possible(entry: Entry) -> bool:
    """The product of many sizes is a number that takes long to make and can't be told."""
    if len(entry.shape) > _DIMENSIONS_MAX or not all(0 <= size <= _SIZE_MAX for size in entry.shape):
        return False
    return entry.size_bytes <= _SIZE_MAX
