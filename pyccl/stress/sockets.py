"""Reset connections of a child process from outside: what a router that lost its table does to both ends.

pidfd_getfd(2) gives us the child's own sockets; connect(2) to AF_UNSPEC sends RST and leaves ECONNRESET here. Needs no
more right than a debugger has over its own child.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PIDFD_GETFD: Final = 438  # the same number on every architecture
_SOCKADDR: Final = struct.pack("=H14x", socket.AF_UNSPEC)
_libc: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Connection:
    """A TCP connection of a process, held by us too until it is closed here."""

    sock: socket.socket
    remote: tuple[str, int]

    def reset(self) -> None:
        if _libc.connect(self.sock.fileno(), _SOCKADDR, len(_SOCKADDR)) != 0:
            raise _os_error("connect(AF_UNSPEC)")


@contextlib.contextmanager
def connections(pid: int) -> Iterator[list[Connection]]:
    """All established TCP connections of a process.

    Raises:
        OSError: it is gone, or we may not look into it (ptrace is forbidden here).
    """
    with contextlib.ExitStack() as stack:
        pidfd = os.pidfd_open(pid)
        stack.callback(os.close, pidfd)
        found = []
        for entry in list(Path(f"/proc/{pid}/fd").iterdir()):
            try:
                if not os.readlink(entry).startswith("socket:"):
                    continue
                fd = _libc.syscall(_PIDFD_GETFD, pidfd, int(entry.name), 0)
                if fd < 0:
                    raise _os_error("pidfd_getfd")
            except (FileNotFoundError, OSError) as error:
                if isinstance(error, PermissionError | ProcessLookupError):
                    raise
                continue  # closed since we looked
            sock = stack.enter_context(socket.socket(fileno=fd))
            if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM:
                with contextlib.suppress(OSError):  # a listener
                    found.append(Connection(sock, sock.getpeername()[:2]))
        yield found


def _os_error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")
