"""Front: where one peer accepts data connections, and by which addresses others may reach it.

    listening     on the address that its user names; else on all, or on loopback alone if nobody else can be in the run
    LOCAL         addresses of our interfaces, first the one that faces the master
    ADVERTISED    what the user knows better
    OBSERVED      behind a router: what the master sees of a connection from our data port. It is held open, so that
                  routers which let anybody in by a mapping once made go on doing so
    MAPPED        behind a router that forwards a port on request (portmap.py)

What changes, as after a move to another network, is told by `changed`. Spec: proto/wire.md 11.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import random
import socket
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Final, Protocol

import trio

from pyccl._io import envelope, tls
from pyccl._io.dialing import FAILURES, connect_to, new_socket, share_port
from pyccl._io.interfaces import addresses_of_interfaces, canonical
from pyccl._io.tls import Credentials, Line, forget, socket_of
from pyccl._proto import limits
from pyccl._proto.candidates import is_loopback, is_private, seen_at
from pyccl._proto.epoch import Address, AddressKind
from pyccl._proto.messages import Reflect, Reflected
from pyccl.errors import RemoteProtocolError

BACKLOG: Final = 128
_REFLECT_S: Final = 5.0
_AGAIN_S: Final = (1.0, 60.0)  # between attempts to be seen, and to have the port mapped
_TRIES: Final = 20  # to find a port that is free for IPv4 and IPv6

log = logging.getLogger("pyccl.front")


@dataclass(frozen=True, slots=True)
class Reach:
    """How a peer wants to be reached, and to reach others. relay: see RELAY."""

    listen: Address | None = None  # None: chosen; port 0: a free one
    advertise: tuple[Address, ...] = ()  # port 0: that of the listener
    relay: str = "auto"


RELAY: Final = ("auto", "never", "only")


class Mapped(Protocol):
    """Of ``portmap.open_mapping``."""

    external: tuple[str, int] | None

    async def changed(self, known: tuple[str, int] | None) -> tuple[str, int] | None: ...


OpenMapping = Callable[[int], AbstractAsyncContextManager[Mapped]]


@dataclass(frozen=True, slots=True)
class MasterAt:
    host: str
    port: int
    credentials: Credentials | None

    async def line(self, *, from_port: int) -> Line:
        """A connection to it from that port of ours; 0: a new one, which others may connect from, too."""
        return await tls.enter(await connect_to(self.host, self.port, shared_port=from_port), self.credentials)


@dataclass(frozen=True, slots=True)
class Name:
    """Who we say that we are."""

    peer: bytes
    incarnation: bytes


async def reflected(line: Line, me: Name) -> Address:
    """Where this new connection seems to come from."""
    await line.send_all(envelope.pack(Reflect(limits.PROTOCOL_VERSION, me.peer, me.incarnation)))
    answer = await envelope.receive(line, limits.BODY_GREETING_MAX_BYTES)
    if not isinstance(answer, Reflected):
        raise RemoteProtocolError("no Reflected")
    return Address(canonical(answer.host), answer.port, AddressKind.OBSERVED)


class Front:
    """Of one peer. Lives in the Trio thread."""

    def __init__(
        self,
        reach: Reach,
        master: MasterAt,
        me: Name,
        nursery: trio.Nursery,
        accept: Callable[[trio.SocketStream], Awaitable[None]],
        changed: Callable[[tuple[Address, ...]], None],
        open_mapping: OpenMapping,
    ) -> None:
        """accept: what a connection is for, to its end."""
        self._reach, self._master, self._me = reach, master, me
        self._nursery, self._accept, self._changed = nursery, accept, changed
        self._open_mapping = open_mapping
        self._listeners: list[trio.SocketListener] = []
        self._loopback: Address | None = None  # that we listen on
        self._bound: Address | None = None  # elsewhere
        self._anywhere = False  # `_bound` stands for every interface
        self._faces_master = ""
        self._observed: Address | None = None
        self._mapped: Address | None = None
        self._seen_as = ""  # by the master, the last time
        self._serving = False
        self._tasks: list[trio.CancelScope] = []
        self.addresses: tuple[Address, ...] = ()

    @property
    def is_behind_router(self) -> bool:
        """The master sees us under another address than our own."""
        return bool(self._seen_as) and not is_loopback(self._seen_as) and self._seen_as != self._faces_master

    @property
    def seen(self) -> str:
        """Where the master sees us, as of a Member."""
        return seen_at(self._seen_as, self._faces_master)

    @property
    def may_punch(self) -> bool:
        """The master sees where we are from outside of this machine."""
        return bool(self._seen_as) and not is_loopback(self._seen_as)

    async def open(self, faces_master: str) -> None:
        """Listen; nobody is accepted before ``welcomed``. faces_master: our end of the connection to it.

        OSError: not at what the user wants.
        """
        self._faces_master = canonical(faces_master)
        if self._master.credentials is None and not is_loopback(self._faces_master):
            log.warning(
                "insecure master=%s:%d: what this run sends is not encrypted; who is on its way can read and alter it",
                self._master.host,
                self._master.port,
            )
        wanted = self._reach.listen
        if wanted is not None:
            await self._listen(wanted.host, wanted.port)
        elif is_loopback(self._faces_master):
            await self._listen(faces_master, 0)
        else:
            await self._listen("", 0)
        self.addresses = self._all()

    async def welcomed(self, faces_master: str, seen_as: str, *, remote: bool) -> None:
        """By the master, now or again, which sees us as that. remote: peers of other machines may come."""
        self._faces_master = canonical(faces_master)
        before, self._seen_as = self._seen_as, canonical(seen_as)
        if not self._serving:
            self._serving = True
            self._nursery.start_soon(trio.serve_listeners, self._accept, list(self._listeners))
        if self._bound is None and remote and self._reach.listen is None:
            await self._listen("", 0)
        self._tell()
        if self.is_behind_router and self._bound is not None and before != self._seen_as:
            self._stop()  # another network, or the first: what was observed and mapped there is over
            self._start(self._be_observed, self._bound.port)
            if is_private(self._faces_master):
                self._start(self._be_mapped, self._bound.port)
        elif not self.is_behind_router:
            self._stop()

    def close(self) -> None:
        for listener in self._listeners:
            listener.socket.close()

    # ---- listening

    async def _listen(self, host: str, port: int) -> None:
        """host "": every address of this machine."""
        hosts = {"": ("0.0.0.0", "::"), "0.0.0.0": ("0.0.0.0",), "::": ("0.0.0.0", "::")}.get(host, (host,))
        for tries in range(_TRIES):
            socks: list[trio.socket.SocketType] = []
            try:
                for each in hosts:
                    with contextlib.suppress(_NoFamilyError):
                        socks.append(await bind_listener(each, socks[0].getsockname()[1] if socks else port))
            except OSError as e:
                for sock in socks:
                    sock.close()
                if e.errno == errno.EADDRINUSE and not port and tries < _TRIES - 1:
                    continue  # free for IPv4 only
                raise
            break
        at = Address(host, int(socks[0].getsockname()[1]))
        if is_loopback(host):
            self._loopback = at
        else:
            self._bound, self._anywhere = at, len(hosts) > 1 or hosts == ("0.0.0.0",)
        listeners = [trio.SocketListener(sock) for sock in socks]
        self._listeners += listeners
        if self._serving:
            self._nursery.start_soon(trio.serve_listeners, self._accept, listeners)
        log.info("listening host=%s port=%d", host or "*", at.port)

    # ---- addresses

    def _all(self) -> tuple[Address, ...]:
        """At most so many; those that the user, a router or the master names are not left out for our interfaces'."""
        port = (self._bound or self._loopback or Address("", 0)).port
        named = [Address(a.host, a.port or port, AddressKind.ADVERTISED) for a in self._reach.advertise]
        named += [] if self._mapped is None else [self._mapped]
        if self._observed is not None and (self._mapped is None or self._mapped[:2] != self._observed[:2]):
            named.append(self._observed)
        local = [] if self._loopback is None else [self._loopback]
        if self._bound is not None:
            hosts = _with_first(self._faces_master, addresses_of_interfaces()) if self._anywhere else [self._bound.host]
            local += [Address(host, self._bound.port) for host in hosts]
        room = max(limits.ADDRESSES_MAX - len(named), 1)
        return tuple(dict.fromkeys([*local[:room], *named]))[: limits.ADDRESSES_MAX]

    def _tell(self) -> None:
        addresses = self._all()
        if addresses != self.addresses:
            self.addresses = addresses
            log.info("addresses %s", " ".join(f"{a.host}:{a.port}" for a in addresses))
            self._changed(addresses)

    # ---- behind a router

    def _start(self, task: Callable[[int], Awaitable[None]], port: int) -> None:
        async def run() -> None:
            with scope:
                await task(port)

        scope = trio.CancelScope()
        self._tasks.append(scope)
        self._nursery.start_soon(run)

    def _stop(self) -> None:
        for scope in self._tasks:
            scope.cancel()
        self._tasks.clear()
        self._observed = self._mapped = None
        self._tell()

    async def _be_observed(self, port: int) -> None:
        """Have a connection from this port to the master, and know how it looks from there."""
        pause_s = _AGAIN_S[0]
        while True:
            line: Line | None = None
            try:
                with trio.fail_after(_REFLECT_S):
                    line = await self._master.line(from_port=port)
                    observed = await reflected(line, self._me)
                socket_of(line).setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                if observed != self._observed:
                    self._observed = observed
                    self._tell()
                pause_s = _AGAIN_S[0]
                await line.receive_some(1)  # until it ends
            except FAILURES as e:
                log.debug("not_observed cause=%s", e)
            finally:
                if line is not None:
                    forget(line)
            await trio.sleep(pause_s * (0.5 + random.random()))
            pause_s = min(2 * pause_s, _AGAIN_S[1])

    async def _be_mapped(self, port: int) -> None:
        """Routers that forward a port on request do so at once; of others nothing is expected later."""
        try:
            async with self._open_mapping(port) as mapping:
                known = mapping.external
                while True:
                    self._mapped = None if known is None else Address(known[0], known[1], AddressKind.MAPPED)
                    self._tell()
                    known = await mapping.changed(known)
        except Exception as e:  # noqa: BLE001  of a router: the peer is reached by other ways
            log.info("port_not_mapped port=%d cause=%s", port, e)
        finally:
            self._mapped = None


class _NoFamilyError(Exception):
    """This machine has no such addresses."""


async def bind_listener(host: str, port: int) -> trio.socket.SocketType:
    """A listening socket, whose port connections of ours may share. OSError, _NoFamilyError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = new_socket(family)
    except OSError as e:
        raise _NoFamilyError from e
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await sock.bind((host, port))
        sock.listen(BACKLOG)
        share_port(sock)  # with connections from it; before bind it would share it with another peer's listener, too
    except OSError as e:
        sock.close()
        if e.errno == errno.EADDRNOTAVAIL and host == "::":  # IPv6 is turned off
            raise _NoFamilyError from e
        raise
    except BaseException:
        sock.close()
        raise
    return sock


def _with_first(host: str, hosts: list[str]) -> list[str]:
    return [host, *(other for other in hosts if other != host)] if host in hosts else hosts
