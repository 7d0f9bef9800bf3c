"""What Linux tells of a TCP connection (struct tcp_info of linux/tcp.h), and no library does."""

from __future__ import annotations

import socket
import struct
from typing import Final

from trio.socket import SocketType

_ESTABLISHED: Final = 1
_RETRANSMITS: Final = 2  # offset of a byte
_UNACKED: Final = 24
_LAST_ACK_RECV: Final = 56  # milliseconds
_ROUND_TRIP: Final = 68  # microseconds
_SIZE: Final = 72
_REPEATS_LEAST: Final = 2  # in a row: else what was sent after a pause had no time to be acknowledged


def is_established(sock: socket.socket) -> bool:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _ESTABLISHED


def round_trip_s(sock: SocketType) -> float:
    """As TCP has measured it."""
    return _number(_read(sock), _ROUND_TRIP) / 1e6


def unanswered_s(sock: SocketType) -> float:
    """Since when not even the other side's kernel has acknowledged anything, while it was sent something; else 0."""
    info = _read(sock)
    stands = _number(info, _UNACKED) > 0 and info[_RETRANSMITS] >= _REPEATS_LEAST
    return _number(info, _LAST_ACK_RECV) / 1000 if stands else 0.0


def _read(sock: SocketType) -> bytes:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SIZE)


def _number(info: bytes, at: int) -> int:
    return int(struct.unpack_from("=I", info, at)[0])
