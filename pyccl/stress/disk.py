"""Make the kernel refuse a process to write files, as a full disk does, and allow it again. Sockets and pipes go on."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator


def fill(pid: int) -> None:
    """A file may not grow beyond its first byte: write(2) says EFBIG."""
    _limit(pid, 1)


def empty(pid: int) -> None:
    """As much as it was allowed at most."""
    _limit(pid, resource.prlimit(pid, resource.RLIMIT_FSIZE)[1])


@contextlib.contextmanager
def full_for_children() -> Iterator[None]:
    """A child that is started in it can write no file from its first moment on; meanwhile we can't either."""
    fill(os.getpid())
    try:
        yield
    finally:
        empty(os.getpid())


def _limit(pid: int, size_bytes: int) -> None:
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size_bytes, hard))
