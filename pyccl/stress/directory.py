"""A directory for the files of one run, gone after it. What a killed run left behind goes when the next one starts."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

PREFIX: Final = "pyccl-stress-"
_NEW: Final = ".new-pyccl-stress-"


@contextlib.contextmanager
def own_directory(parent: Path | None = None) -> Iterator[Path]:
    """Empty, and locked by this process. parent: the system's place for temporary files unless given."""
    parent = parent or Path(tempfile.gettempdir())
    _remove_stale(parent)
    new = Path(tempfile.mkdtemp(prefix=_NEW, dir=parent))
    fd = os.open(new, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_EX)
    path = new.rename(parent / f"{PREFIX}{new.name.removeprefix(_NEW)}")  # without a lock, this name says: stale
    try:
        yield path
    finally:
        shutil.rmtree(path)
        os.close(fd)


def _remove_stale(parent: Path) -> None:
    for path in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or gone meanwhile
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if path.stat().st_uid == os.geteuid():
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path)
            finally:
                os.close(fd)
