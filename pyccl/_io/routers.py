"""How a router is spoken to about one TCP port: PCP, NAT-PMP and UPnP-IGD behind one interface. Sockets; no policy.

What is answered from anywhere but the router's address is not looked at: PCP and NAT-PMP go over sockets connected to
it, a new one for every question, so that a late answer meets nobody. A malformed answer is none.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import trio

from pyccl._io import pcp, upnp
from pyccl._io.gateway import Gateway
from pyccl._io.httpreply import HttpReply
from pyccl.errors import RemoteProtocolError

T = TypeVar("T")
R = TypeVar("R")
log = logging.getLogger("pyccl.portmap")

_FIRST_PAUSE_S: Final = 0.25  # RFC 6886 3.1; doubles
_TRIES: Final = 4
_SEARCH_PAUSES_S: Final = (0.5, 1.0, 1.5)  # an answer may take MX = 1 s
_HTTP_S: Final = 4.0
_READ_BYTES: Final = 8192
_PORTS_TRIED: Final = 6
_MULTICAST_HOPS: Final = 2


class RefusedError(Exception):
    """The router gives no mapping, or does not answer: the text says which."""


@dataclass(frozen=True, slots=True)
class Lease:
    """What a router forwards to us. lifetime_s None: until it is taken away."""

    host: str
    port: int
    lifetime_s: int | None


class Router(Protocol):
    """One way to speak to the router about one port of ours. All but ``unmap`` raise RefusedError."""

    asked: bool  # whether there may be a mapping

    @property
    def method(self) -> str:
        """Its name, for people."""

    async def find(self) -> None:
        """It answers."""

    async def map(self, lifetime_s: int) -> Lease:
        """After ``find``; again to renew, with the same external port if that can be had."""

    async def is_kept(self, lease: Lease) -> bool:
        """Whether the router still has what it gave last, under the same address."""

    async def unmap(self) -> None:
        """Take the mapping away, as far as the router lets us."""


def routers_for(
    gateway: Gateway, port: int, nonce: bytes, choose_port: Callable[[], int], pcp_port: int, ssdp_port: int
) -> list[Router]:
    """All that fit the gateway's family."""
    found: list[Router] = [PcpRouter(gateway, port, nonce, pcp_port)]
    if gateway.family == socket.AF_INET:
        found += [NatPmpRouter(gateway, port, pcp_port), UpnpRouter(gateway, port, choose_port, ssdp_port)]
    return found


# ---- PCP and NAT-PMP


class _Asker:
    """Questions in datagrams, and the epoch in their answers."""

    def __init__(
        self, gateway: Gateway, port: int, read: Callable[[bytes], pcp.Answer], results: dict[int, str]
    ) -> None:
        self._gateway, self._port, self._read, self._results = gateway, port, read, results
        self._epoch: tuple[int, float] | None = None
        self._kept = True  # as far as the epochs tell, since this was last asked

    async def ask(self, question: bytes, fits: Callable[[pcp.Answer], bool]) -> pcp.Answer:
        """A success that fits. RefusedError."""
        with trio.socket.socket(self._gateway.family, socket.SOCK_DGRAM) as sock:
            try:
                await sock.bind((self._gateway.local, 0))  # a router's link-local address must not choose ours
                await sock.connect(self._gateway.endpoint(self._port))
                for n in range(_TRIES):
                    await sock.send(question)
                    with trio.move_on_after(_FIRST_PAUSE_S * 2**n):
                        return self._judged(await self._answer(sock, fits))
            except OSError as e:
                raise RefusedError(e.strerror or str(e)) from e
        raise RefusedError("no answer")

    def kept(self) -> bool:
        """Whether the router has kept its mappings since this was last asked."""
        kept, self._kept = self._kept, True
        return kept

    async def _answer(self, sock: trio.socket.SocketType, fits: Callable[[pcp.Answer], bool]) -> pcp.Answer:
        while True:
            try:
                answer = self._read(await sock.recv(pcp.ANSWER_BYTES_MAX + 1))
            except RemoteProtocolError as e:
                log.debug("portmap_answer_malformed cause=%s", e)
                continue
            if answer.result != pcp.SUCCESS or fits(answer):
                return answer

    def _judged(self, answer: pcp.Answer) -> pcp.Answer:
        if answer.result == pcp.UNSUPPORTED_VERSION:
            raise RefusedError(self._results[answer.result])
        epoch = answer.epoch_s, trio.current_time()
        if self._epoch is not None and not pcp.kept_mappings(self._epoch, epoch):
            self._kept = False
        self._epoch = epoch
        if answer.result != pcp.SUCCESS:
            raise RefusedError(self._results.get(answer.result, f"refused with code {answer.result}"))
        return answer


class PcpRouter:
    """RFC 6887; of IPv6, too, where it opens the firewall."""

    method: Final = "pcp"

    def __init__(self, gateway: Gateway, port: int, nonce: bytes, pcp_port: int) -> None:
        self.asked = False
        self._client, self._port, self._nonce = gateway.local, port, nonce
        self._asker = _Asker(gateway, pcp_port, pcp.read_pcp_untrusted, pcp.PCP_RESULTS)
        self._external: tuple[str, int] | None = None

    async def find(self) -> None:
        await self._asker.ask(pcp.pcp_announce(self._client), lambda answer: answer.mapped is None)

    async def map(self, lifetime_s: int) -> Lease:
        self.asked = True
        wanted = self._external or ("", self._port)
        question = pcp.pcp_map(self._client, self._nonce, self._port, wanted, lifetime_s)
        mapped = (await self._asker.ask(question, self._is_mine)).mapped
        assert mapped is not None, "_is_mine"
        self._asker.kept()
        self._external = mapped.host, mapped.port
        return _checked(Lease(mapped.host, mapped.port, mapped.lifetime_s))

    async def is_kept(self, lease: Lease) -> bool:
        await self.find()  # its epoch begins anew with another address, too
        return self._asker.kept()

    async def unmap(self) -> None:
        question = pcp.pcp_map(self._client, self._nonce, self._port, None, 0)
        with contextlib.suppress(RefusedError):
            await self._asker.ask(question, lambda answer: answer.mapped is not None)

    def _is_mine(self, answer: pcp.Answer) -> bool:
        mapped = answer.mapped
        return mapped is not None and mapped.nonce == self._nonce and mapped.internal_port == self._port


class NatPmpRouter:
    """RFC 6886."""

    method: Final = "nat-pmp"

    def __init__(self, gateway: Gateway, port: int, pcp_port: int) -> None:
        self.asked = False
        self._port = port
        self._asker = _Asker(gateway, pcp_port, pcp.read_nat_pmp_untrusted, pcp.NAT_PMP_RESULTS)
        self._external = port

    async def find(self) -> None:
        await self._address()

    async def map(self, lifetime_s: int) -> Lease:
        host = await self._address()
        self.asked = True
        mapped = (await self._asker.ask(pcp.nat_pmp_map(self._port, self._external, lifetime_s), self._is_mine)).mapped
        assert mapped is not None, "_is_mine"
        self._asker.kept()
        self._external = mapped.port
        return _checked(Lease(host, mapped.port, mapped.lifetime_s))

    async def is_kept(self, lease: Lease) -> bool:
        return await self._address() == lease.host and self._asker.kept()

    async def unmap(self) -> None:
        with contextlib.suppress(RefusedError):
            await self._asker.ask(pcp.nat_pmp_map(self._port, 0, 0), lambda answer: answer.mapped is not None)

    async def _address(self) -> str:
        return (await self._asker.ask(pcp.nat_pmp_address(), lambda answer: bool(answer.host))).host

    def _is_mine(self, answer: pcp.Answer) -> bool:
        return answer.mapped is not None and answer.mapped.internal_port == self._port


# ---- UPnP


class UpnpRouter:
    """IGD 1 and 2.

    choose_port: an external port to try when another host has the one before.
    """

    method: Final = "upnp"

    def __init__(self, gateway: Gateway, port: int, choose_port: Callable[[], int], ssdp_port: int) -> None:
        self.asked = False
        self._gateway, self._port, self._ssdp_port = gateway, port, ssdp_port
        self._choose_port = choose_port
        self._service: upnp.Service | None = None
        self._external = port

    async def find(self) -> None:
        location = await self._search()
        status, body = await self._http(location, upnp.get_request(location))
        if status != 200:
            raise RefusedError(f"no description: HTTP status {status}")
        try:
            services = upnp.read_description_untrusted(body, location)
        except RemoteProtocolError as e:
            raise RefusedError(f"a description that can't be used: {e}") from e
        reason = "it describes no service that maps ports"
        for service in services:  # a router may describe several, of which one is connected
            try:
                await self._address(service)
            except RefusedError as e:
                reason = str(e)
            else:
                self._service = service
                return
        raise RefusedError(reason)

    async def map(self, lifetime_s: int) -> Lease:
        service = self._found()
        host = await self._address(service)
        may_choose = service.type == upnp.SERVICE_TYPES[0] and not self.asked  # AddAny...: the router takes a free port
        lease_s = lifetime_s
        for _ in range(_PORTS_TRIED):
            self.asked = True
            action = "AddAnyPortMapping" if may_choose else "AddPortMapping"
            try:
                values = await self._call(service, action, self._mapping(lease_s))
            except upnp.FaultError as e:
                if e.code == upnp.PERMANENT_LEASES_ONLY and lease_s:
                    lease_s = 0
                elif e.code in (upnp.INVALID_ACTION, upnp.OPTIONAL_ACTION) and may_choose:
                    may_choose = False
                elif e.code == upnp.CONFLICT:
                    self._external = self._choose_port()
                else:
                    raise RefusedError(str(e)) from e
                continue
            if may_choose:
                self._external = _understood(upnp.port_of_untrusted, values)
            return _checked(Lease(host, self._external, lease_s or None))
        raise RefusedError(f"none of {_PORTS_TRIED} external ports was free")

    async def is_kept(self, lease: Lease) -> bool:
        service = self._found()
        if await self._address(service) != lease.host:
            return False
        try:
            return await self._is_ours(service)
        except upnp.FaultError as e:
            return e.code != upnp.NO_SUCH_ENTRY  # others say that we may not ask

    async def unmap(self) -> None:
        service = self._service
        if service is None:
            return
        # Not what is another host's: we may have been cancelled before the router told us so.
        with contextlib.suppress(RefusedError, upnp.FaultError):
            if await self._is_ours(service):
                await self._call(service, "DeletePortMapping", self._entry())

    def _found(self) -> upnp.Service:
        assert self._service is not None, "find() comes first"
        return self._service

    def _entry(self) -> list[tuple[str, str]]:
        return [("NewRemoteHost", ""), ("NewExternalPort", str(self._external)), ("NewProtocol", "TCP")]

    def _mapping(self, lease_s: int) -> list[tuple[str, str]]:
        return [
            *self._entry(),
            ("NewInternalPort", str(self._port)),
            ("NewInternalClient", self._gateway.local),
            ("NewEnabled", "1"),
            ("NewPortMappingDescription", upnp.DESCRIPTION),
            ("NewLeaseDuration", str(lease_s)),
        ]

    async def _is_ours(self, service: upnp.Service) -> bool:
        """upnp.FaultError, RefusedError."""
        entry = await self._call(service, "GetSpecificPortMappingEntry", self._entry())
        return (entry.get("NewInternalClient"), entry.get("NewInternalPort")) == (self._gateway.local, str(self._port))

    async def _address(self, service: upnp.Service) -> str:
        try:
            values = await self._call(service, "GetExternalIPAddress", ())
            return _understood(upnp.address_of_untrusted, values)
        except upnp.FaultError as e:
            raise RefusedError(str(e)) from e

    async def _call(self, service: upnp.Service, action: str, arguments: Iterable[tuple[str, str]]) -> dict[str, str]:
        """upnp.FaultError, RefusedError."""
        status, body = await self._http(service.control, upnp.call_request(service, action, arguments))
        return _understood(lambda answer: upnp.read_call_untrusted(*answer), (status, body))

    async def _search(self) -> upnp.Url:
        """Where the router's description is."""
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            try:
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, _MULTICAST_HOPS)
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(self._gateway.local))
                await sock.bind((self._gateway.local, 0))
                for pause_s in _SEARCH_PAUSES_S:
                    for search in upnp.searches():
                        for host in (upnp.SSDP_GROUP, self._gateway.host):  # multicast gets lost on many a WLAN
                            with contextlib.suppress(OSError):
                                await sock.sendto(search, (host, self._ssdp_port))
                    with trio.move_on_after(pause_s):
                        return await self._first_found(sock)
            except OSError as e:
                raise RefusedError(e.strerror or str(e)) from e
        raise RefusedError("no answer")

    async def _first_found(self, sock: trio.socket.SocketType) -> upnp.Url:
        while True:
            data, source = await sock.recvfrom(upnp.SSDP_BYTES_MAX + 1)
            if source[0] != self._gateway.host:
                continue
            try:
                return upnp.read_found_untrusted(data, self._gateway.host)
            except RemoteProtocolError as e:
                log.debug("portmap_answer_malformed cause=%s", e)

    async def _http(self, url: upnp.Url, request: bytes) -> tuple[int, bytes]:
        """Status and body."""
        reply = HttpReply()
        try:
            with trio.fail_after(_HTTP_S):
                stream = await trio.open_tcp_stream(url.host, url.port, local_address=self._gateway.local)
                async with stream:
                    await stream.send_all(request)
                    while data := await stream.receive_some(_READ_BYTES):
                        if reply.feed(data):
                            return reply.status, reply.body
                    reply.end()
                    return reply.status, reply.body
        except trio.TooSlowError as e:
            raise RefusedError(f"{url.host}:{url.port} did not answer within {_HTTP_S:g} s") from e
        except (OSError, trio.BrokenResourceError) as e:
            raise RefusedError(f"{url.host}:{url.port}: {e}") from e
        except RemoteProtocolError as e:
            raise RefusedError(str(e)) from e


def _understood(read: Callable[[T], R], what: T) -> R:
    try:
        return read(what)
    except RemoteProtocolError as e:
        raise RefusedError(f"an answer that can't be used: {e}") from e


def _checked(lease: Lease) -> Lease:
    """RefusedError: an address at which nobody can reach us."""
    address = ipaddress.ip_address(lease.host)
    if address.is_unspecified or address.is_multicast or address.is_loopback or lease.lifetime_s == 0:
        raise RefusedError(f"it gives {lease.host} port {lease.port} for {lease.lifetime_s} s")
    return lease
