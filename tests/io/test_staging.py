"""Storage for fetched chunks: memory or a file without a name, and what is said when there is no room."""

from __future__ import annotations

import errno
import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pyccl._io import staging
from pyccl._io.staging import MEMORY_BYTES_MAX, QUEUE_MAX, Bytes, Staging, directory, runs
from pyccl.errors import StagingError

SEED = 20310504
WAIT_S = 60.0


def patient() -> None:
    """What waits for a disk may wait on."""


def staging_of(size_bytes: int) -> Staging:
    return Staging(size_bytes, patient)


def kept(staged: Staging, offset: int, data: Bytes) -> None:
    staged.write(offset, data, patient)


def writers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "pyccl-staging"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert writers() == []


@pytest.fixture(params=["memory", "file"])
def size_bytes(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    if request.param == "file":
        monkeypatch.setattr(staging, "MEMORY_BYTES_MAX", 1000)
    return 100_003


def test_what_was_written_in_any_order_is_read_back(size_bytes: int) -> None:
    data = np.random.default_rng(SEED).integers(0, 256, size_bytes, np.uint8)
    pieces = [(at, min(977, size_bytes - at)) for at in range(0, size_bytes, 977)]
    random.Random(SEED).shuffle(pieces)
    with staging_of(size_bytes) as staged:
        for at, size in pieces:
            kept(staged, at, data[at : at + size])
        staged.flush()
        whole, part = np.empty(size_bytes, np.uint8), np.empty(5000, np.uint8)
        staged.read(0, whole)
        staged.read(321, part)
    assert np.array_equal(whole, data) and np.array_equal(part, data[321:5321])


def test_a_file_has_no_name_and_is_gone_when_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    staged = staging_of(MEMORY_BYTES_MAX + 1)
    assert len(os.listdir("/proc/self/fd")) == before + 1 and list(tmp_path.iterdir()) == []
    staged.close()
    staged.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_little_needs_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    staging_of(MEMORY_BYTES_MAX).close()


def test_a_missing_directory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/nonexistent/here")
    with pytest.raises(StagingError, match=r"/nonexistent/here: No such file.*TMPDIR") as caught:
        staging_of(MEMORY_BYTES_MAX + 1)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_full_disk_is_told_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(StagingError, match=f"{MEMORY_BYTES_MAX + 1} bytes .* {tmp_path}: No space left on device"):
        staging_of(MEMORY_BYTES_MAX + 1)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("call", ["pwrite", "preadv"])
def test_a_disk_that_fails_later_is_named_too(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with staging_of(MEMORY_BYTES_MAX + 1) as staged:
        monkeypatch.setattr(os, call, broken)
        kept(staged, 0, np.zeros(10, np.uint8))
        with pytest.raises(StagingError, match=f"{tmp_path}: Input/output error"):
            staged.flush() if call == "pwrite" else staged.read(0, np.zeros(10, np.uint8))


def test_a_file_that_shrinks_is_an_error_and_no_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", lambda fd, offset, size: None)
    with staging_of(MEMORY_BYTES_MAX + 1) as staged:
        kept(staged, 0, np.zeros(10, np.uint8))
        staged.flush()
        with pytest.raises(StagingError, match="shorter"):
            staged.read(0, np.zeros(20, np.uint8))


def test_short_writes_and_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:7], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:11]], offset))
    data, out = np.arange(100, dtype=np.uint8), np.zeros(100, np.uint8)
    with staging_of(MEMORY_BYTES_MAX + 1) as staged:
        kept(staged, 5, data)
        staged.flush()
        staged.read(5, out)
    assert np.array_equal(data, out)


class SlowDisk:
    """Each write waits until it is let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failure: OSError | None = None) -> None:
        self.let, self.began, self.written, self._failure = threading.Semaphore(0), threading.Event(), 0, failure
        self._pwrite = os.pwrite
        monkeypatch.setattr(os, "pwrite", self)

    def __call__(self, fd: int, data: memoryview, offset: int) -> int:
        self.began.set()
        assert self.let.acquire(timeout=WAIT_S)
        if self._failure is not None:
            raise self._failure
        self.written += 1
        return self._pwrite(fd, data, offset)


@pytest.fixture
def slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SlowDisk]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(staging, "_POLL_S", 0.001)
    return lambda failure=None: SlowDisk(monkeypatch, failure)


def test_a_disk_that_stands_still_holds_up_nobody_until_the_queue_is_full(
    slow_disk: Callable[..., SlowDisk],
) -> None:
    """Then the writer waits, asking whether it should, and each chunk is given back when it is written."""
    disk, asked = slow_disk(), 0
    free: list[int] = []

    def check() -> None:
        nonlocal asked
        asked += 1
        if asked == 3:
            disk.let.release()

    with Staging(MEMORY_BYTES_MAX + 1, check) as staged:
        for number in range(QUEUE_MAX):
            staged.write(number * 4, np.full(4, number, np.uint8), lambda number=number: free.append(number))  # type: ignore[misc]
        assert (asked, disk.written, free) == (0, 0, [])
        staged.write(QUEUE_MAX * 4, np.full(4, QUEUE_MAX, np.uint8), lambda: free.append(QUEUE_MAX))
        assert asked >= 3 and disk.written == 1 and free == [0]
        disk.let.release(QUEUE_MAX)
        staged.flush()
        assert free == list(range(QUEUE_MAX + 1))
        out = np.zeros(4 * (QUEUE_MAX + 1), np.uint8)
        staged.read(0, out)
    assert out.tolist() == [number for number in range(QUEUE_MAX + 1) for _ in range(4)]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_what_fails_in_the_background_is_raised_by_the_next_call(
    slow_disk: Callable[..., SlowDisk], tmp_path: Path, code: int
) -> None:
    disk, text = slow_disk(OSError(code, os.strerror(code))), f"{tmp_path}: {os.strerror(code)}"
    free: list[int] = []
    with Staging(MEMORY_BYTES_MAX + 1, disk.let.release) as staged:  # let through by who waits
        for number in range(QUEUE_MAX):
            staged.write(0, np.zeros(4, np.uint8), lambda number=number: free.append(number))  # type: ignore[misc]
        with pytest.raises(StagingError, match=text) as caught:
            kept(staged, 0, np.zeros(4, np.uint8))
        assert isinstance(caught.value.__cause__, OSError)
        for call in (staged.flush, lambda: kept(staged, 0, np.zeros(4, np.uint8))):
            with pytest.raises(StagingError, match=text):
                call()
    assert free == [] and disk.written == 0


@pytest.mark.parametrize("call", ["write", "flush"])
def test_a_wait_for_the_disk_ends_with_what_check_raises(slow_disk: Callable[..., SlowDisk], call: str) -> None:
    """And closing writes nothing more than what was begun."""
    disk = slow_disk()

    def over() -> None:
        raise TimeoutError("over")

    staged = Staging(MEMORY_BYTES_MAX + 1, over)
    for _ in range(QUEUE_MAX):
        kept(staged, 0, np.zeros(4, np.uint8))
    with pytest.raises(TimeoutError, match="over"):
        staged.flush() if call == "flush" else kept(staged, 0, np.zeros(4, np.uint8))
    assert disk.began.wait(WAIT_S)
    closing = threading.Thread(target=staged.close)
    closing.start()
    while not staged._closing:
        pass
    disk.let.release(QUEUE_MAX + 1)
    closing.join(WAIT_S)
    assert not closing.is_alive() and writers() == [] and disk.written == 1


def test_the_directory_is_tmpdir_then_var_tmp_then_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/chosen")
    assert directory() == "/chosen"
    monkeypatch.delenv("TMPDIR")
    assert directory() == "/var/tmp"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert directory() == tempfile.gettempdir()


def test_neighbours_in_an_array_are_joined() -> None:
    assert runs([("a", 0, 10), ("a", 10, 5), ("a", 20, 5), ("b", 0, 5), ("b", 5, 1)]) == [
        ("a", 0, 15), ("a", 20, 5), ("b", 0, 6),
    ]  # fmt: skip
    assert runs([]) == []
