"""Where fetched chunks wait until all members have theirs: a little memory, or else a file without a name.

The file's space is taken before the first chunk is asked for, so a full disk is found out then. Its directory is
$TMPDIR if that is set, else /var/tmp, else what `tempfile` chooses (often memory, which is what a file is to save).

A disk may stand still for longer than the sources have been asked for, so a thread of its own writes: at most
QUEUE_MAX chunks wait for it. What fails there is raised by the next `write` or `flush`.
Threads: one caller; the writer is its own, and gone after `close`.
"""

from __future__ import annotations

import os
import queue
import tempfile
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import IO, Any, Final, Self

import numpy as np

from pyccl.errors import StagingError

MEMORY_BYTES_MAX: Final = 32 << 20  # more than this goes into a file
QUEUE_MAX: Final = 24  # chunks that wait for the disk, or are being written
_POLL_S: Final = 0.1
_VAR_TMP: Final = "/var/tmp"

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Staging:
    """`size_bytes` of storage, written in any order, flushed, and then read. Use as a context manager.

    Args:
        check: is called now and then while the disk is waited for; what it raises ends the wait.

    Raises:
        StagingError: from here and every method but `close`: there is no such storage, or it failed.
    """

    def __init__(self, size_bytes: int, check: Callable[[], None]) -> None:
        self._memory: Bytes | None = None
        self._file: IO[bytes] | None = None
        self._size_bytes, self._check = size_bytes, check
        self._directory = ""
        self._writer: threading.Thread | None = None
        self._asked: queue.SimpleQueue[tuple[int, Bytes, Callable[[], None]] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()  # of the next two
        self._waiting = 0  # chunks, with the one that is being written
        self._failed: OSError | None = None  # the writer's; it writes nothing more then
        self._closing = False
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

    def write(self, offset: int, chunk: Bytes, then: Callable[[], None]) -> None:
        """Keep these bytes at this place. They may change again once then() was called, in another thread perhaps; it
        is not called if this raises, nor after `close`."""
        if self._file is None:
            assert self._memory is not None
            self._memory[offset : offset + chunk.nbytes] = chunk
            then()
            return
        if self._writer is None:
            writer = threading.Thread(target=self._work, args=(self._file,), name="pyccl-staging", daemon=True)
            writer.start()
            self._writer = writer
        self._wait(QUEUE_MAX - 1)
        with self._changed:
            self._waiting += 1
        self._asked.put((offset, chunk, then))

    def flush(self) -> None:
        """Wait until all that was written can be read."""
        self._wait(0)

    def _wait(self, most: int) -> None:
        """Until at most so many chunks wait for the disk."""
        while True:
            with self._changed:
                done = self._changed.wait_for(lambda: self._failed is not None or self._waiting <= most, _POLL_S)
            if self._failed is not None:
                raise self._error(self._failed) from self._failed
            if done:
                return
            self._check()

    def _work(self, file: IO[bytes]) -> None:
        while (asked := self._asked.get()) is not None and not self._closing and self._failed is None:
            failed: OSError | None = None
            try:
                _write_all(file.fileno(), *asked[:2])
                asked[2]()
            except OSError as e:
                failed = e
            with self._changed:
                self._waiting -= 1
                self._failed = failed
                self._changed.notify_all()

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
        """Free the storage; what was not written yet never will be. Idempotent."""
        self._memory = None
        if self._writer is not None:
            self._closing = True
            self._asked.put(None)
            self._writer.join()
            self._writer = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _write_all(fd: int, offset: int, chunk: Bytes) -> None:
    rest = chunk.data
    while rest:
        written = os.pwrite(fd, rest, offset)
        offset, rest = offset + written, rest[written:]


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
