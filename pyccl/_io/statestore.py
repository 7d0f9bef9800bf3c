"""A directory of state files: the last N that came, and always the newest revision; only whole ones count.

state-REVISION-ROOT.safetensors    as ``SharedState.save`` writes them; ROOT: the first digits of the digest
.incoming                          one that is on its way
NAME.damaged                       was found torn or altered: set aside for people, never read again
.lock                              locked by the one process that uses the directory
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyccl._io.statestream import Snapshot
from pyccl._proto import restoring
from pyccl.errors import PycclError, StateFileError
from pyccl.state import check_state_file
from pyccl.statefile import StateFile, sync_directory

_PREFIX: Final = "state-"
_SUFFIX: Final = ".safetensors"
_DAMAGED: Final = ".damaged"
_ROOT_DIGITS: Final = 16

log = logging.getLogger("pyccl.statestore")


@dataclass(frozen=True, slots=True)
class Kept:
    """A whole file. layout: see ``SharedState.layout``."""

    path: Path
    revision: int
    root: str
    layout: bytes
    written_ns: int


class StoreError(PycclError):
    """The directory can't be used."""


class StateStore:
    """Opened, locked and looked through. One thread at a time."""

    def __init__(self, directory: Path, keep: int) -> None:
        """Every file is read and checked. StoreError: another process uses it. OSError."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory, self._keep = directory, keep
        self._lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise StoreError(f"{directory}: another process keeps states there") from None
        self.kept: list[Kept] = []  # the latest written last
        for path in sorted(directory.glob(f"{_PREFIX}*{_SUFFIX}")):
            self._look_at(path)
        self.kept.sort(key=lambda kept: kept.written_ns)

    def close(self) -> None:
        os.close(self._lock)

    def _look_at(self, path: Path) -> None:
        try:
            self.kept.append(whole(path))
        except StateFileError as e:
            _set_aside(path, e)

    def check(self, kept: Kept) -> bool:
        """False: it is no longer what was kept, and was set aside. The file is read once more."""
        if kept not in self.kept:
            return True  # it went, for a later one
        try:
            found = whole(kept.path)
            if (found.revision, found.root) != (kept.revision, kept.root):
                raise StateFileError(f"{kept.path}: another state, of revision {found.revision}")
        except (StateFileError, OSError) as e:
            if not isinstance(e, StateFileError | FileNotFoundError) and e.errno != errno.EIO:
                log.warning("state_not_checked path=%s cause=%s", kept.path, e)  # no descriptor, perhaps
                return True
            self.kept.remove(kept)
            _set_aside(kept.path, e)
            return False
        return True

    def forget(self, kept: Kept, cause: OSError) -> None:
        """Somebody has removed it."""
        log.error("state_gone path=%s cause=%s", kept.path, cause.strerror)
        self.kept.remove(kept)

    @property
    def newest(self) -> Kept | None:
        """What is offered."""
        return restoring.newest(self.kept)

    def incoming(self) -> int:
        """An empty file to receive into. The caller closes it."""
        return os.open(self.directory / ".incoming", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def take(self, fd: int, revision: int) -> Kept:
        """What was received is checked whole, made durable, and gets a name; older files go. StateFileError: it is no
        whole state, or of another revision."""
        path = self.directory / ".incoming"
        found = whole(path)
        if found.revision != revision:
            raise StateFileError(f"revision {found.revision} was offered as {revision}")
        os.fsync(fd)
        name = f"{_PREFIX}{found.revision:020}-{found.root[:_ROOT_DIGITS]}{_SUFFIX}"
        os.rename(path, self.directory / name)
        sync_directory(str(self.directory))
        kept = Kept(self.directory / name, found.revision, found.root, found.layout, found.written_ns)
        self.kept = [other for other in self.kept if other.path != kept.path] + [kept]
        self._prune()
        return kept

    def refuse(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.directory / ".incoming")

    def _prune(self) -> None:
        for kept in restoring.to_drop(self.kept, self._keep):
            kept.path.unlink(missing_ok=True)
            self.kept.remove(kept)


def _set_aside(path: Path, cause: Exception) -> None:
    log.error("state_damaged path=%s cause=%s; it is set aside", path, cause)
    with contextlib.suppress(FileNotFoundError):
        path.rename(path.with_name(path.name + _DAMAGED))


def whole(path: Path) -> Kept:
    """StateFileError: it is not."""
    with StateFile(path) as file:
        check_state_file(file)
        manifest = file.manifest
        return Kept(path, manifest.revision, manifest.root, bytes.fromhex(manifest.layout), os.stat(path).st_mtime_ns)


def held(store: StateStore) -> str:
    """For people and scripts."""
    newest = store.newest
    return "nothing" if newest is None else f"revision {newest.revision} {newest.path}"


def opened(kept: Kept) -> Snapshot:
    return Snapshot(os.open(kept.path, os.O_RDONLY | os.O_CLOEXEC), kept.revision, kept.layout)
