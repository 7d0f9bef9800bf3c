"""Where fetched chunks wait until all members have theirs: a little memory, or else a file without a name.

The file's space is taken before the first chunk is asked for, so a full disk is found out then. Its directory is
$TMPDIR if that is set, else /var/tmp, else what `tempfile` chooses (often memory, which is what a file is to save).
Threads: one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from types import TracebackType
from typing import IO, Any, Final, Self

import numpy as np

from pyccl.errors import StagingError

MEMORY_BYTES_MAX: Final = 32 << 20  # more than this goes into a file
_VAR_TMP: Final = "/var/tmp"

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Staging:
    """`size_bytes` of storage, written in any order and then read. Use as a context manager; raises StagingError."""

    def __init__(self, size_bytes: int) -> None:
        self._memory: Bytes | None = None
        self._file: IO[bytes] | None = None
        self._size_bytes = size_bytes
        self._directory = ""
        if size_bytes <= MEMORY_BYTES_MAX:
            self._memory = np.empty(size_bytes, np.uint8)
            return
        try:
            self._directory = directory()
            self._file = tempfile.TemporaryFile(dir=self._directory, prefix="pyccl-", buffering=0)  # noqa: SIM115
            os.posix_fallocate(self._file.fileno(), 0, size_bytes)
        except OSError as e:
            self.close()
            raise self._error(e) from e

    def write(self, offset: int, chunk: Bytes) -> None:
        """Keep these bytes at this place."""
        if self._file is None:
            assert self._memory is not None
            self._memory[offset : offset + chunk.nbytes] = chunk
            return
        rest = chunk.data
        try:
            while rest:
                written = os.pwrite(self._file.fileno(), rest, offset)
                offset, rest = offset + written, rest[written:]
        except OSError as e:
            raise self._error(e) from e

    def read(self, offset: int, into: Bytes) -> None:
        """Fill `into` with the bytes from `offset` on."""
        if self._file is None:
            assert self._memory is not None
            into[:] = self._memory[offset : offset + into.nbytes]
            return
        rest = into.data
        try:
            while rest:
                count = os.preadv(self._file.fileno(), [rest], offset)
                if count == 0:
                    raise OSError("the file is shorter than what was written to it")
                offset, rest = offset + count, rest[count:]
        except OSError as e:
            raise self._error(e) from e

    def _error(self, error: OSError) -> StagingError:
        reason = error.strerror or str(error)
        where = self._directory or "a temporary directory"
        return StagingError(
            f"{self._size_bytes} bytes of shared state can't be staged in {where}: {reason}; "
            "TMPDIR chooses another directory"
        )

    def close(self) -> None:
        """Free the storage. Idempotent."""
        self._memory = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def directory() -> str:
    """Where a file of staged state is put."""
    chosen = os.environ.get("TMPDIR")
    if chosen:
        return chosen
    return _VAR_TMP if os.access(_VAR_TMP, os.W_OK | os.X_OK) else tempfile.gettempdir()


def runs(places: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """(array, offset in it, size) of chunks that are staged one behind the other: neighbours in an array joined."""
    joined: list[tuple[str, int, int]] = []
    for name, offset, size in places:
        if joined and (joined[-1][0], sum(joined[-1][1:])) == (name, offset):
            joined[-1] = (name, joined[-1][1], joined[-1][2] + size)
        else:
            joined.append((name, offset, size))
    return joined
