"""An attacker who holds every line of this program: what its sessions dial goes through here, is kept, can be altered.

    wire = Wire(monkeypatch)          # from here on, connections to masters, members and observers
    wire.arm("flip", SEALED)          # one such unit
    wire.captured()                   # all that went by

Units are what one side writes at a time and can be told apart on the line: envelopes of greetings, TLS records, records
of sealed connections (proto/wire.md 2, 9, 10).
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any, Final

import pytest
import trio

from pyccl._io import dialing, front, links

HOST: Final = "127.0.0.1"
GREETING, TLS, SEALED, OTHER = "greeting", "tls", "sealed", "other"
KINDS: Final = ("flip", "replay", "swap", "leave out", "cut")
_TLS_DATA: Final = 23
_UNIT_LEAST: Final = {SEALED: 1000, TLS: 20}  # of peers no heartbeat, with the master also one


def unit(come: bytes) -> tuple[str, int] | None:
    """What begins here, and how long it is; None: not enough has come."""
    if len(come) < 5:
        return None
    if come[:2] == b"\0\0":
        return GREETING, 4 + int(struct.unpack_from(">I", come)[0])
    if 20 <= come[0] <= _TLS_DATA and come[1] == 3 and come[2] != 0:
        return TLS, 5 + int(struct.unpack_from(">H", come, 3)[0])
    if come[3] in (1, 2) and come[2] == 0:
        return SEALED, 4 + int.from_bytes(come[:3], "little") + 16
    return OTHER, len(come)


class Wire:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._captured: list[bytes] = []
        self.kinds: set[str] = set()
        self.splits = True  # False: a plain run, whose frames are no units
        self._taps: dict[tuple[str, int], int] = {}
        self._lock = threading.Lock()
        self._armed: tuple[str, str] | None = None
        self.struck = threading.Event()
        self._socks: list[socket.socket] = []
        open_tcp_stream, connect_to = trio.open_tcp_stream, dialing.connect_to

        async def opened(host: str, port: int, **options: Any) -> trio.SocketStream:
            return await open_tcp_stream(*self._through(host, port), **options)

        async def connected(host: str, port: int, **options: Any) -> trio.SocketStream:
            return await connect_to(*self._through(host, port), **options)

        monkeypatch.setattr(trio, "open_tcp_stream", opened)
        for module in (dialing, front, links):
            monkeypatch.setattr(module, "connect_to", connected)

    def captured(self) -> bytes:
        with self._lock:
            return b"".join(self._captured)

    def arm(self, how: str, kind: str) -> None:
        """Do this to one unit of this kind, on whatever connection and way it comes."""
        with self._lock:
            self.struck.clear()
            self._armed = how, kind

    def close(self) -> None:
        with self._lock:
            socks, self._socks = self._socks, []
        for sock in socks:
            _end(sock)
            sock.close()

    def _through(self, host: str, port: int) -> tuple[str, int]:
        with self._lock:
            if (host, port) not in self._taps:
                listener = socket.create_server((HOST, 0))
                self._socks.append(listener)
                self._taps[host, port] = listener.getsockname()[1]
                threading.Thread(target=self._serve, args=(listener, (host, port)), daemon=True).start()
            return HOST, self._taps[host, port]

    def _serve(self, listener: socket.socket, to: tuple[str, int]) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = listener.accept()
                try:
                    far = socket.create_connection(to)
                except OSError:
                    near.close()
                    continue
                with self._lock:
                    self._socks += near, far
                for source, sink in ((near, far), (far, near)):
                    source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        come, held = b"", b""
        with contextlib.suppress(OSError):
            while part := source.recv(1 << 17):
                with self._lock:
                    self._captured.append(part)
                if not self.splits:
                    sink.sendall(part)
                    continue
                come += part
                while (found := unit(come)) is not None and len(come) >= found[1]:
                    kind, size = found
                    whole, come = come[:size], come[size:]
                    self.kinds.add(kind)
                    how = self._strikes(kind, whole)
                    if how == "swap":
                        held = whole
                        continue
                    out, held = _SENT[how](whole) + held, b""
                    sink.sendall(out)
                    if how == "cut":
                        raise OSError("cut")
        _end(source)
        _end(sink)

    def _strikes(self, kind: str, whole: bytes) -> str:
        with self._lock:
            if self._armed is None or self._armed[1] != kind or len(whole) < _UNIT_LEAST[kind]:
                return ""
            if kind == TLS and whole[0] != _TLS_DATA:
                return ""
            how, self._armed = self._armed[0], None
            self.struck.set()
            return how


def _end(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _flipped(whole: bytes) -> bytes:
    at = len(whole) // 2
    return whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :]


_SENT: Final[dict[str, Callable[[bytes], bytes]]] = {
    "": lambda whole: whole,
    "flip": _flipped,
    "replay": lambda whole: whole + whole,
    "leave out": lambda _: b"",
    "cut": lambda whole: whole[: len(whole) // 2],
}
