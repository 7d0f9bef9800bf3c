"""Make the kernel refuse a process to write files, as a full disk does, and allow it again. Sockets and pipes go on."""

from __future__ import annotations

import resource


def fill(pid: int) -> None:
    """A file may not grow beyond its first byte: write(2) says EFBIG."""
    _limit(pid, 1)


def empty(pid: int) -> None:
    """As much as it was allowed at most."""
    _limit(pid, resource.prlimit(pid, resource.RLIMIT_FSIZE)[1])


def _limit(pid: int, size_bytes: int) -> None:
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size_bytes, hard))
