"""An attacker who holds every line of this program: what its sessions dial goes through here, is kept, can be altered.

    wire = Wire(monkeypatch)          # from here on, connections to masters, members and observers
    wire.arm("flip", Units(DATA, SEALED))   # one such unit
    wire.sever(DATA)                  # all such connections
    wire.captured()                   # all that went by

Units are what one side writes at a time and can be told apart on the line: envelopes of greetings, TLS records, records
of sealed connections (proto/wire.md 2, 9, 10). What a connection is for shows in its first one. To who is relayed the
line to the relay is the relay: what is done to units there one that is malicious could do.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import pytest
import trio

from pyccl._io import dialing, envelope, front, links
from pyccl._io.punching import Puncher
from pyccl._proto.epoch import Address
from pyccl._proto.messages import PeerHello, RelayHello, StateHello

HOST: Final = "127.0.0.1"
GREETING, TLS, SEALED, OTHER = "greeting", "tls", "sealed", "other"
KINDS: Final = ("flip", "replay", "swap", "leave out", "cut")
DATA, FOLLOWED, RELAYED, MASTER, PUNCHED = "data", "followed", "relayed", "master", "punched"
_PURPOSES: Final = {PeerHello: DATA, StateHello: FOLLOWED, RelayHello: RELAYED}
_TLS_DATA: Final = 23
_TLS_LEAST: Final = 20  # of what is no part of a handshake


@dataclass(frozen=True)
class Units:
    """Of connections of one purpose, of one kind; least, most: bytes of one."""

    purpose: str
    kind: str
    least: int = 0
    most: int = 1 << 24

    def has(self, purpose: str, kind: str, whole: bytes) -> bool:
        if (purpose, kind) != (self.purpose, self.kind) or not self.least <= len(whole) <= self.most:
            return False
        return kind != TLS or (whole[0] == _TLS_DATA and len(whole) >= _TLS_LEAST)


class _Line:
    """One connection. purpose: shows in its first unit. over: it has ended."""

    def __init__(self, near: socket.socket, far: socket.socket, purpose: str = "") -> None:
        self.ends, self.purpose = (near, far), purpose
        self.over = threading.Event()

    def begins(self, kind: str, whole: bytes) -> None:
        if not self.purpose:
            self.purpose = MASTER if kind == TLS else _PURPOSES.get(type(envelope.unpack_untrusted(whole[4:])), OTHER)


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
        self._armed: tuple[str, Units] | None = None
        self._skipped = 0
        self.struck = threading.Event()
        self.struck_line: _Line | None = None
        self._socks: list[socket.socket] = []
        self._lines: list[_Line] = []
        self._holes: dict[frozenset[int], socket.socket] = {}  # the end that nobody has come for yet
        self._monkeypatch = monkeypatch
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

    def arm(self, how: str, units: Units, skipped: int = 0) -> None:
        """Do this to one such unit, on whatever connection and way it comes, behind so many others. "": see it pass."""
        with self._lock:
            self.struck.clear()
            self._armed, self._skipped = (how, units), skipped

    def sever(self, purpose: str) -> None:
        with self._lock:
            ends = [sock for line in self._lines if line.purpose == purpose for sock in line.ends]
        for sock in ends:
            _end(sock)

    def allow_punching_alone(self) -> None:
        """No peer is reached where it listens. Who connects from one port to another meets who connects back."""

        class Through(Puncher):
            async def _connect(puncher, peer: bytes, port: Any, endpoint: Address) -> None:  # noqa: N805
                sock = self._through_hole(frozenset((port.seen_as.port, endpoint.port)))
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
                puncher._nursery.start_soon(puncher._connected, peer, stream)

        async def unreachable(*who: object) -> trio.SocketStream:
            raise OSError("unreachable")

        self._monkeypatch.setattr(links, "connect_at", unreachable)
        self._monkeypatch.setattr(front.Front, "may_punch", True)
        self._monkeypatch.setattr(links, "Puncher", Through)

    def _through_hole(self, ports: frozenset[int]) -> socket.socket:
        """An end of the connection between these two; whoever comes second gets the other."""
        with self._lock:
            if ports in self._holes:
                return self._holes.pop(ports)
            ours, near = _pair()
            self._holes[ports], far = _pair()
        self._join(near, far, PUNCHED)
        return ours

    def close(self) -> None:
        with self._lock:
            socks, self._socks = [*self._socks, *self._holes.values()], []
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
                self._join(near, far)

    def _join(self, near: socket.socket, far: socket.socket, purpose: str = "") -> None:
        line = _Line(near, far, purpose)
        with self._lock:
            self._socks += near, far
            self._lines.append(line)
        for source, sink in ((near, far), (far, near)):
            source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._pass, args=(line, source, sink), daemon=True).start()

    def _pass(self, line: _Line, source: socket.socket, sink: socket.socket) -> None:
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
                    line.begins(kind, whole)
                    how = self._strikes(line, kind, whole)
                    if how == "swap":
                        held = whole
                        continue
                    out, held = _SENT[how](whole) + held, b""
                    sink.sendall(out)
                    if how == "cut":
                        raise OSError("cut")
        _end(source)
        _end(sink)
        line.over.set()

    def _strikes(self, line: _Line, kind: str, whole: bytes) -> str:
        with self._lock:
            if self._armed is None or not self._armed[1].has(line.purpose, kind, whole):
                return ""
            if self._skipped:
                self._skipped -= 1
                return ""
            how, self._armed, self.struck_line = self._armed[0], None, line
            self.struck.set()
            return how


def _pair() -> tuple[socket.socket, socket.socket]:
    """Of TCP, as the engine takes them."""
    with socket.create_server((HOST, 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        return one, listener.accept()[0]


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
