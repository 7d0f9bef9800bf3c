"""Storage for fetched chunks: memory or a file without a name, and what is said when there is no room."""

from __future__ import annotations

import errno
import os
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest

from pyccl._io import staging
from pyccl._io.staging import MEMORY_BYTES_MAX, Staging, directory, runs
from pyccl.errors import StagingError

SEED = 20310504


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
    with Staging(size_bytes) as staged:
        for at, size in pieces:
            staged.write(at, data[at : at + size])
        whole, part = np.empty(size_bytes, np.uint8), np.empty(5000, np.uint8)
        staged.read(0, whole)
        staged.read(321, part)
    assert np.array_equal(whole, data) and np.array_equal(part, data[321:5321])


def test_a_file_has_no_name_and_is_gone_when_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    staged = Staging(MEMORY_BYTES_MAX + 1)
    assert len(os.listdir("/proc/self/fd")) == before + 1 and list(tmp_path.iterdir()) == []
    staged.close()
    staged.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_little_needs_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/nonexistent")
    Staging(MEMORY_BYTES_MAX).close()


def test_a_missing_directory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/nonexistent/here")
    with pytest.raises(StagingError, match=r"/nonexistent/here: No such file.*TMPDIR") as caught:
        Staging(MEMORY_BYTES_MAX + 1)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_full_disk_is_told_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(StagingError, match=f"{MEMORY_BYTES_MAX + 1} bytes .* {tmp_path}: No space left on device"):
        Staging(MEMORY_BYTES_MAX + 1)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("call", ["pwrite", "preadv"])
def test_a_disk_that_fails_later_is_named_too(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with Staging(MEMORY_BYTES_MAX + 1) as staged:
        monkeypatch.setattr(os, call, broken)
        with pytest.raises(StagingError, match=f"{tmp_path}: Input/output error"):
            (staged.write if call == "pwrite" else staged.read)(0, np.zeros(10, np.uint8))


def test_a_file_that_shrinks_is_an_error_and_no_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", lambda fd, offset, size: None)
    with Staging(MEMORY_BYTES_MAX + 1) as staged:
        staged.write(0, np.zeros(10, np.uint8))
        with pytest.raises(StagingError, match="shorter"):
            staged.read(0, np.zeros(20, np.uint8))


def test_short_writes_and_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:7], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:11]], offset))
    data, out = np.arange(100, dtype=np.uint8), np.zeros(100, np.uint8)
    with Staging(MEMORY_BYTES_MAX + 1) as staged:
        staged.write(5, data)
        staged.read(5, out)
    assert np.array_equal(data, out)


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
