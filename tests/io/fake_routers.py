"""Routers by script, on loopback: PCP, NAT-PMP and UPnP-IGD with the faults that real ones have."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from functools import partial

import trio

from pyccl._io.gateway import Gateway
from pyccl._io.portmap import Terms

HOST = "127.0.0.1"
OTHER_HOST = "127.0.0.2"
OUTER = "203.0.113.7"
GATEWAY = Gateway(HOST, "lo", HOST)


class Fake:
    """What tests wait for."""

    def __init__(self) -> None:
        self._news = trio.Event()

    def told(self) -> None:
        news, self._news = self._news, trio.Event()
        news.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Looks again after every answer."""
        while not holds():
            await self._news.wait()


@dataclass
class FakePcp(Fake):
    """Both protocols of one port. Knobs may be turned while it runs."""

    speaks: tuple[int, ...] = (0, 2)
    host: str = HOST
    outer: str = OUTER
    lifetime_s: int = 3600
    result: int = 0  # of a MAP
    is_deaf: bool = False
    answers_from_elsewhere: bool = False
    noise: tuple[bytes, ...] = ()  # sent before every answer
    drops: int = 0  # requests that get lost
    taken: set[int] = field(default_factory=set)  # external ports of others
    table: dict[int, int] = field(default_factory=dict)  # internal: external
    maps: list[tuple[int, int, int, int]] = field(default_factory=list)  # asked for: version, internal, external, time
    epoch_from_s: float = 0.0
    port: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def restart(self) -> None:
        self.table.clear()
        self.epoch_from_s = trio.current_time()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self.epoch_from_s = trio.current_time() - 1000
        with udp(self.host) as sock, udp(OTHER_HOST) as elsewhere:
            await sock.bind((self.host, 0))
            await elsewhere.bind((OTHER_HOST, sock.getsockname()[1]))
            self.port = sock.getsockname()[1]
            task_status.started()
            while True:
                data, source = await sock.recvfrom(2048)
                if self.drops:
                    self.drops -= 1
                    continue
                answer = b"" if self.is_deaf else self._answer(data)
                for datagram in (*self.noise, answer):
                    if datagram:
                        await (elsewhere if self.answers_from_elsewhere else sock).sendto(datagram, source)
                self.told()

    def _answer(self, data: bytes) -> bytes:
        epoch_s = int(trio.current_time() - self.epoch_from_s)
        version, opcode = data[0], data[1]
        if version not in self.speaks:
            if version == 2:
                return struct.pack("!BBHI", 0, 0x80 | opcode, 1, epoch_s)
            return struct.pack("!BBBBII12x", 2, 0x80 | opcode, 0, 1, 0, epoch_s)
        if opcode == 0:
            if version == 2:
                return struct.pack("!BBBBII12x", 2, 0x80, 0, 0, 0, epoch_s)
            return struct.pack("!BBHI4s", 0, 0x80, 0, epoch_s, socket.inet_aton(self.outer))
        if version == 2:
            nonce, internal, wanted = data[24:36], *struct.unpack_from("!HH", data, 40)
            asked_s = struct.unpack_from("!I", data, 4)[0]
        else:
            nonce, (internal, wanted, asked_s) = b"", struct.unpack_from("!HHI", data, 4)
        self.maps.append((version, internal, wanted, asked_s))
        given, lifetime_s = 0, 0
        if self.result == 0 and asked_s == 0:
            self.table.pop(internal, None)
        elif self.result == 0:
            given = self.table[internal] = wanted if wanted not in self.taken else wanted + 1
            lifetime_s = min(asked_s, self.lifetime_s)
        if version == 2:
            head = struct.pack("!BBBBII12x", 2, 0x81, 0, self.result, lifetime_s, epoch_s)
            is_ipv6 = ":" in self.outer
            packed = socket.inet_pton(socket.AF_INET6 if is_ipv6 else socket.AF_INET, self.outer)
            outer = packed if is_ipv6 else bytes(10) + b"\xff\xff" + packed
            return head + struct.pack("!12sB3xHH16s", nonce, 6, internal, given, outer)
        return struct.pack("!BBHIHHI", 0, 0x82, self.result, epoch_s, internal, given, lifetime_s)


@dataclass
class FakeIgd(Fake):
    """UPnP. table: external port to (client, internal port, lease)."""

    version: int = 2
    outer: str = OUTER
    answers_from_elsewhere: bool = False
    permanent_only: bool = False
    has_add_any: bool = True
    location: str = "http://{host}:{port}/root.xml"
    body: bytes | None = None  # instead of any SOAP answer, with status 200
    is_stuck: bool = False  # accepts, and says nothing
    table: dict[int, tuple[str, int, int]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    http_port: int = 0
    ssdp_port: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_tcp, self._serve, 0, host=HOST))
            self.http_port = listeners[0].socket.getsockname()[1]
            with udp(HOST) as sock, udp(OTHER_HOST) as elsewhere:
                await sock.bind((HOST, self.ssdp_port))
                await elsewhere.bind((OTHER_HOST, 0))
                self.ssdp_port = sock.getsockname()[1]
                task_status.started()
                while True:
                    data, source = await sock.recvfrom(2048)
                    found = re.search(rb"\r\nST: ([^\r]+)", data)
                    assert found is not None and data.startswith(b"M-SEARCH * HTTP/1.1\r\n")
                    location = self.location.format(host=HOST, port=self.http_port)
                    answer = f"HTTP/1.1 200 OK\r\nST: {found[1].decode()}\r\nLOCATION: {location}\r\n\r\n"
                    await (elsewhere if self.answers_from_elsewhere else sock).sendto(answer.encode(), source)

    async def _serve(self, stream: trio.SocketStream) -> None:
        request = b""
        with contextlib.suppress(trio.BrokenResourceError):
            while not request.endswith(b"</s:Envelope>\r\n" if request.startswith(b"POST") else b"\r\n\r\n"):
                data = await stream.receive_some(4096)
                if not data:
                    return
                request += data
            if self.is_stuck:
                await trio.sleep_forever()
            if request.startswith(b"GET"):
                await stream.send_all(http(200, self._description()))
                return
            await stream.send_all(self._call(request.decode()))
            self.told()

    def _description(self) -> bytes:
        return (
            "<root><device><serviceList><service>"
            f"<serviceType>urn:schemas-upnp-org:service:WANIPConnection:{self.version}</serviceType>"
            "<controlURL>/ctl</controlURL></service></serviceList></device></root>"
        ).encode()

    def _call(self, request: str) -> bytes:
        action = _found(r'SOAPAction: "[^#]+#(\w+)"', request)
        self.calls.append(action)
        if self.body is not None:
            return http(200, self.body)
        if action == "GetExternalIPAddress":
            return soap(f"<NewExternalIPAddress>{self.outer}</NewExternalIPAddress>")
        external = int(_found(r"<NewExternalPort>(\d+)<", request))
        if action == "GetSpecificPortMappingEntry":
            if external not in self.table:
                return upnp_error(714)
            client, internal, _ = self.table[external]
            entry = f"<NewInternalPort>{internal}</NewInternalPort><NewInternalClient>{client}</NewInternalClient>"
            return soap(entry)
        if action == "DeletePortMapping":
            del self.table[external]
            return soap("")
        return self._add(action, external, request)

    def _add(self, action: str, external: int, request: str) -> bytes:
        wanted = (
            _found(r"<NewInternalClient>([^<]+)<", request),
            int(_found(r"<NewInternalPort>(\d+)<", request)),
            int(_found(r"<NewLeaseDuration>(\d+)<", request)),
        )
        if self.permanent_only and wanted[2] != 0:
            return upnp_error(725)
        is_taken = external in self.table and self.table[external][:2] != wanted[:2]
        if action == "AddAnyPortMapping":
            if not self.has_add_any:
                return upnp_error(401)
            external += is_taken
        elif is_taken:
            return upnp_error(718)
        self.table[external] = wanted
        return soap(f"<NewReservedPort>{external}</NewReservedPort>")


@contextlib.asynccontextmanager
async def routers(pcp: FakePcp | None = None, igd: FakeIgd | None = None) -> AsyncIterator[Terms]:
    """Both run; without one, nothing listens on its port."""
    async with trio.open_nursery() as nursery:
        with udp(HOST) as unused:
            await unused.bind((HOST, 0))
            terms = Terms(pcp_port=unused.getsockname()[1], ssdp_port=unused.getsockname()[1])
        if pcp is not None:
            await nursery.start(pcp.run)
            terms = replace(terms, pcp_port=pcp.port)
        if igd is not None:
            await nursery.start(igd.run)
            terms = replace(terms, ssdp_port=igd.ssdp_port)
        yield terms
        nursery.cancel_scope.cancel()


def udp(host: str) -> trio.socket.SocketType:
    return trio.socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)


def http(status: int, body: bytes) -> bytes:
    return f"HTTP/1.1 {status} x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def soap(inner: str) -> bytes:
    return http(200, f'<s:Envelope xmlns:s="x"><s:Body>{inner}</s:Body></s:Envelope>'.encode())


def upnp_error(code: int) -> bytes:
    inner = f"<errorCode>{code}</errorCode><errorDescription>scripted</errorDescription>"
    return http(500, f'<s:Envelope xmlns:s="x"><s:Body><s:Fault>{inner}</s:Fault></s:Body></s:Envelope>'.encode())


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found is not None, text
    return found[1]
