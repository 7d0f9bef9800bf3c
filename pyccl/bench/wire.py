"""The TCP sockets of this process and the bytes that the kernel has counted on them: what really went over the wire.

Two libraries in one process are told apart by when their sockets came up. Linux only.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

# struct tcp_info of linux/tcp.h: tcpi_bytes_received, tcpi_bytes_sent (payload, repeats included)
_RECEIVED_AT: Final = 128
_SENT_AT: Final = 200
_INFO_SIZE: Final = 256
_U64: Final = struct.Struct("=Q")


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes sent and received by some sockets."""

    tx_bytes: int
    rx_bytes: int

    def __sub__(self, earlier: Traffic) -> Traffic:
        return Traffic(self.tx_bytes - earlier.tx_bytes, self.rx_bytes - earlier.rx_bytes)


@dataclass(frozen=True, slots=True)
class Sockets:
    """Inode numbers of this process' sockets: connected TCP, and Unix (any kind)."""

    tcp: frozenset[int]
    unix: frozenset[int]

    def __sub__(self, earlier: Sockets) -> Sockets:
        return Sockets(self.tcp - earlier.tcp, self.unix - earlier.unix)


def sockets() -> Sockets:
    """The sockets that are open now."""
    tcp, unix = set(), set()
    for inode, fd in _descriptors():
        with _duplicate(fd) as sock:
            if sock.family == socket.AF_UNIX:
                unix.add(inode)
            elif _is_connected_tcp(sock):
                tcp.add(inode)
    return Sockets(frozenset(tcp), frozenset(unix))


def connected_to(host: str, port: int) -> frozenset[int]:
    """Inode numbers of this process' TCP sockets whose other end is there."""
    found = set()
    for inode, fd in _descriptors():
        with _duplicate(fd) as sock:
            if _is_connected_tcp(sock) and sock.getpeername()[:2] == (host, port):
                found.add(inode)
    return frozenset(found)


def traffic(inodes: frozenset[int]) -> Traffic:
    """What has gone over these sockets so far, as far as they are open still."""
    tx_bytes = rx_bytes = 0
    for inode, fd in _descriptors():
        if inode in inodes:
            with _duplicate(fd) as sock:
                info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_SIZE)
            if len(info) < _SENT_AT + _U64.size:
                raise OSError("this kernel's TCP_INFO has no byte counters (Linux 4.19 or newer has)")
            tx_bytes += _U64.unpack_from(info, _SENT_AT)[0]
            rx_bytes += _U64.unpack_from(info, _RECEIVED_AT)[0]
    return Traffic(tx_bytes, rx_bytes)


def shared_memory() -> list[str]:
    """Files of shared memory that are mapped here: /dev/shm and memfd."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        paths = {line.split(maxsplit=5)[5].strip() for line in maps if len(line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if path.startswith(("/dev/shm/", "/memfd:")))


def _descriptors() -> Iterable[tuple[int, int]]:
    """(inode, descriptor) of each socket, one descriptor for each inode."""
    found: dict[int, int] = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:  # the directory's own descriptor, or closed meanwhile
            continue
        if target.startswith("socket:["):
            found.setdefault(int(target[8:-1]), int(entry))
    return found.items()


def _duplicate(fd: int) -> socket.socket:
    return socket.socket(fileno=os.dup(fd))


def _is_connected_tcp(sock: socket.socket) -> bool:
    if sock.type != socket.SOCK_STREAM or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    try:
        sock.getpeername()
    except OSError:
        return False
    return True
