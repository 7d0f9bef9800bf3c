"""The master's journal: what must outlive it, in one append-only file. It decides nothing; see _proto/past.py.

    "pyccl journal 3\n"                                          16 bytes, the format's version
    record    u32 length | u32 CRC-32 of these 4 bytes | body, msgpack | 16 bytes SHA-256(digest before, body) | a5 5a
    the first record is the whole state, those behind it are what was decided since

The digests form a chain from the header on, so that nothing in the middle can change, be missing or come twice.

What a crash can leave behind is a tail that ends early or that holds a sector never written; nothing was sent that
depends on it, and it is cut off. Whatever else does not check was stored once and is broken now: the file is refused.

A write that fails leaves the file in doubt. So the next one writes a whole new file beside it and renames it, as does
one that finds the file grown too long. The file in use is locked (flock), the new one before it takes the name. Nobody
can know its name before that: where others may write, too, what they put there would be written through, or be in the
way. What a crash leaves of it is removed when the journal is opened again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgpack

from pyccl._proto.past import Past, Record, record_from_plain, record_to_plain

FORMAT: Final = 3
_MAGIC: Final = b"pyccl journal "
_HEADER: Final = _MAGIC + b"%d\n" % FORMAT
_HEAD: Final = struct.Struct("<II")
_DIGEST_BYTES: Final = 16
_END: Final = b"\xa5\x5a"  # so that the last sector of a whole record is never all zero
_SECTOR_BYTES: Final = 512
_GROWN_BYTES: Final = 1 << 20
_NEW_NAME: Final = re.compile(r"\.[0-9a-f]{16}\.new")  # behind the journal's own
_GROWN_TIMES: Final = 4  # rewritten at this many times the size of the state alone


class JournalError(Exception):
    """The journal can't be used; the text says why and what to do."""


class Journal:
    """Opened, locked and read. One thread at a time."""

    def __init__(self, path: Path, fd: int, past: Past | None, size: int, digest: bytes) -> None:
        self.path = path
        self.past = past  # None: a new one, to be begun
        self._fd = fd
        self._size, self._digest = size, digest
        self._whole_bytes = size  # of the file when it was last written whole
        self._in_doubt = past is None

    @classmethod
    def open(cls, path: Path, *, forget: bool = False) -> Journal:
        """Lock and read it, made if need be; a torn tail is cut off. JournalError, OSError.

        forget: whatever it holds, sound or not, is to be replaced by ``begin``.
        """
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = _open_locked(path)
        try:
            _remove_leftovers(path)
            data = b"" if forget else _read(fd)
            if not data:
                return cls(path, fd, None, 0, b"")
            past, size, digest = _parse(data, path)
            if size < len(data):
                os.ftruncate(fd, size)
                os.fsync(fd)
            os.lseek(fd, size, os.SEEK_SET)
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, past, size, digest)

    def begin(self, past: Past) -> None:
        """Start over from this state: a new run, or one taken over."""
        self._rewrite(past)

    def append(self, records: Sequence[Record]) -> None:
        """Durable when it returns. OSError: perhaps not; to be called again with the same records first."""
        assert self.past is not None
        data, digest = b"", self._digest
        for record in records:
            framed, digest = _frame(record_to_plain(record), digest)
            data += framed
        grown = self._size + len(data) > max(_GROWN_BYTES, _GROWN_TIMES * self._whole_bytes)
        if self._in_doubt or grown:
            past = self.past.copy()
            for record in records:
                past.apply(record)
            self._rewrite(past)
            return
        self._in_doubt = True
        _write(self._fd, data)
        os.fsync(self._fd)
        self._in_doubt = False
        self._digest = digest
        self._size += len(data)
        for record in records:
            self.past.apply(record)

    def close(self) -> None:
        os.close(self._fd)

    def _rewrite(self, past: Past) -> None:
        new = self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}.new")
        framed, digest = _frame(past.to_plain(), _seed())
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _write(fd, _HEADER + framed)
            os.fsync(fd)
            os.rename(new, self.path)
        except BaseException:
            os.close(fd)
            with contextlib.suppress(OSError):
                new.unlink()
            raise
        os.close(self._fd)
        self._fd = fd
        self._in_doubt = True  # until the name is durable, too
        _sync_directory(self.path.parent)
        self._in_doubt = False
        self.past, self._digest = past, digest
        self._size = self._whole_bytes = len(_HEADER) + len(framed)


def read_past(path: Path) -> Past:
    """What a journal holds that another process may be writing right now. JournalError, OSError."""
    return _parse(path.read_bytes(), path)[0]


def _seed() -> bytes:
    return hashlib.sha256(_HEADER).digest()[:_DIGEST_BYTES]


def _frame(plain: list[Any], before: bytes) -> tuple[bytes, bytes]:
    """(record, its digest)."""
    body: bytes = msgpack.packb(plain, use_bin_type=True)
    length = struct.pack("<I", len(body))
    digest = hashlib.sha256(before + body).digest()[:_DIGEST_BYTES]
    return length + struct.pack("<I", zlib.crc32(length)) + body + digest + _END, digest


def _parse(data: bytes, path: Path) -> tuple[Past, int, bytes]:
    """(state, bytes that count, last digest)."""
    if not data.startswith(_HEADER):
        raise JournalError(f"{path}: {_reason_for_header(data)}")
    at, digest, past = len(_HEADER), _seed(), None
    while at < len(data):
        body, end, next_digest = _record_at(data, at, digest)
        if body is None:
            if past is not None and _is_torn(data, at, end):
                break
            raise JournalError(
                f"{path}: damaged at byte {at} of {len(data)}, in what was stored once. Bring back a sound copy; "
                "without one the run can't be continued (--new-run starts another, its members must connect anew)"
            )
        try:
            plain = msgpack.unpackb(body, raw=False, strict_map_key=True)
            if past is None:
                past = Past.from_plain(plain)
            else:
                past.apply(record_from_plain(plain))
        except (ValueError, msgpack.UnpackException) as e:
            raise JournalError(f"{path}: the record at byte {at} is sound, but this version can't read it: {e}") from e
        at, digest = end, next_digest
    if past is None:
        raise JournalError(f"{path}: it ends behind its header; it was cut by something other than a crash")
    return past, at, digest


def _reason_for_header(data: bytes) -> str:
    line = data.partition(b"\n")[0]
    version = line.removeprefix(_MAGIC)
    if line.startswith(_MAGIC) and version.isdigit() and len(version) < 9:
        return f"written in format {int(version)} of another pyccl, this one reads {FORMAT}"
    return "not a journal of pyccl-master"


def _record_at(data: bytes, at: int, before: bytes) -> tuple[bytes | None, int, bytes]:
    """(body, end, digest); body None: there is no whole record here, and it would end at `end` if that is known."""
    start = at + _HEAD.size
    if start > len(data):
        return None, start, b""
    length, check = _HEAD.unpack_from(data, at)
    if check != zlib.crc32(data[at : at + 4]):
        return None, start, b""
    end = start + length + _DIGEST_BYTES + len(_END)
    if end > len(data):
        return None, end, b""
    body = data[start : start + length]
    digest = hashlib.sha256(before + body).digest()[:_DIGEST_BYTES]
    if data[end - len(_END) - _DIGEST_BYTES : end] != digest + _END:
        return None, end, b""
    return body, end, digest


def _is_torn(data: bytes, at: int, end: int) -> bool:
    """Whether a crash during the last write explains it: the file ends early, or a sector of it was never written."""
    if end > len(data):
        return True
    first = at
    while first < end:
        last = min((first // _SECTOR_BYTES + 1) * _SECTOR_BYTES, end)
        if not any(data[first:last]):
            return True
        first = last
    return False


def _open_locked(path: Path) -> int:
    """The file of this name, locked: one that was replaced meanwhile is let go."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise JournalError(f"{path}: another master uses it") from None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _remove_leftovers(path: Path) -> None:
    """Whose lock we hold: nobody writes one now."""
    for entry in path.parent.iterdir():
        if entry.name.startswith(path.name) and _NEW_NAME.fullmatch(entry.name, len(path.name)):
            with contextlib.suppress(OSError):  # somebody else's
                entry.unlink()


def _read(fd: int) -> bytes:
    parts = []
    while part := os.read(fd, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def _write(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
