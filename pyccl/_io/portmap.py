"""A port of ours that the router makes reachable from outside, for as long as somebody wants it.

    async with open_mapping(48149) as mapping:
        mapping.external            # ("203.0.113.7", 48149), or None while the router has lost it
        await mapping.changed(...)  # to tell others

All protocols look for the router at once; those that find it are asked for a mapping one after the other, as they
answer: many routers speak several, over one table. A task renews at half of the lifetime, and looks every ``check_s``
whether the router restarted, lost the mapping or has another address: then it asks anew, or looks for the router anew.
On exit, also by cancellation, the mapping is taken away. Of a process that is killed it stays for the lifetime, and on
a router with permanent mappings only, for ever (UPnP error 725: seldom).
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from pyccl._io import pcp, upnp
from pyccl._io.gateway import Gateway, find_gateway
from pyccl._io.routers import Lease, RefusedError, Router, routers_for

log = logging.getLogger("pyccl.portmap")

Endpoint = tuple[str, int]
_RENEW_MIN_S: Final = 5.0  # whatever lifetime a router gives
_REMOVE_S: Final = 2.0
_PORT_MIN: Final = 1024  # of those that are tried when ours is taken


class NoMappingError(Exception):
    """No router maps the port. reasons: by method ("pcp", "nat-pmp", "upnp"), why; or by "gateway": there is none."""

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__("; ".join(f"{method}: {reason}" for method, reason in reasons.items()))
        self.reasons = reasons


@dataclass(frozen=True, slots=True)
class Terms:
    """How a mapping is made and kept, seconds."""

    lifetime_s: int = 3600
    search_s: float = 6.0  # until a mapping stands, or there is none
    check_s: float = 30.0
    pcp_port: int = pcp.PORT
    ssdp_port: int = upnp.SSDP_PORT


class Mapping:
    """What the router forwards to us at the moment."""

    def __init__(self, port: int, method: str, lease: Lease) -> None:
        self.port, self.method = port, method
        self.lifetime_s = lease.lifetime_s
        self.external: Endpoint | None = lease.host, lease.port
        self._news = trio.Event()

    async def changed(self, known: Endpoint | None) -> Endpoint | None:
        """``external`` as soon as it is not ``known``."""
        while self.external == known:
            await self._news.wait()
        return self.external

    def update(self, method: str, lease: Lease | None) -> None:
        """For who keeps it."""
        before, self.method = self.external, method
        self.external = None if lease is None else (lease.host, lease.port)
        if lease is not None:
            self.lifetime_s = lease.lifetime_s
        if self.external != before:
            log.info("portmap_changed port=%d method=%s external=%s", self.port, method, self.external)
            news, self._news = self._news, trio.Event()
            news.set()


@contextlib.asynccontextmanager
async def open_mapping(
    port: int,
    *,
    family: socket.AddressFamily = socket.AF_INET,
    gateway: Gateway | None = None,
    terms: Terms | None = None,
) -> AsyncIterator[Mapping]:
    """A mapping of TCP ``port`` of this host, kept while the block runs. For Trio.

    Args:
        family: of the outer address; with IPv6 it is ours, and the router's firewall is opened (PCP only).
        gateway: instead of the default route's.

    NoMappingError: there is none, or it gives none. Errors of the block come in an exception group.
    """
    terms = terms or Terms()
    gateway = gateway or find_gateway(family)
    if gateway is None:
        raise NoMappingError({"gateway": "there is no default route through a router"})
    nonce = secrets.token_bytes(pcp.NONCE_BYTES)
    routers = routers_for(gateway, port, nonce, _choose_port, terms.pcp_port, terms.ssdp_port)
    try:
        router, lease = await _obtain(routers, terms)
        mapping = Mapping(port, router.method, lease)
        log.info("portmap_opened port=%d method=%s external=%s", port, router.method, mapping.external)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_keep, mapping, routers, router, lease, terms)
            try:
                yield mapping
            finally:
                nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _REMOVE_S):
            async with trio.open_nursery() as nursery:
                for other in routers:
                    if other.asked:
                        nursery.start_soon(other.unmap)


def _choose_port() -> int:
    return _PORT_MIN + secrets.randbelow(65_536 - _PORT_MIN)


async def _obtain(routers: Sequence[Router], terms: Terms) -> tuple[Router, Lease]:
    """The first mapping that is given. NoMappingError."""
    reasons = {router.method: "too slow" for router in routers}
    got: tuple[Router, Lease] | None = None
    send, receive = trio.open_memory_channel[tuple[Router, str | None]](len(routers))

    async def find(router: Router, send: trio.MemorySendChannel[tuple[Router, str | None]]) -> None:
        async with send:
            try:
                await router.find()
            except RefusedError as e:
                await send.send((router, str(e)))
            else:
                await send.send((router, None))

    with trio.move_on_after(terms.search_s):
        async with trio.open_nursery() as nursery, receive:
            async with send:
                for router in routers:
                    nursery.start_soon(find, router, send.clone())
            async for router, reason in receive:
                if reason is not None:
                    reasons[router.method] = reason
                    continue
                try:
                    got = router, await router.map(terms.lifetime_s)
                except RefusedError as e:
                    reasons[router.method] = str(e)
                    continue
                nursery.cancel_scope.cancel()
                break
    if got is None:
        raise NoMappingError(reasons)
    return got


async def _keep(mapping: Mapping, routers: Sequence[Router], router: Router, lease: Lease, terms: Terms) -> None:
    """Renews, and asks anew for what was lost. Never ends."""
    since_s = trio.current_time()
    while True:
        await trio.sleep(min(terms.check_s, max(_renew_s(lease) - (trio.current_time() - since_s), 0.0)))
        try:
            is_due = trio.current_time() - since_s >= _renew_s(lease)
            if not is_due and mapping.external is not None and await router.is_kept(lease):
                continue
            lease = await router.map(terms.lifetime_s)
        except RefusedError as refused:
            log.info("portmap_failed port=%d method=%s cause=%s next=search", mapping.port, router.method, refused)
            try:
                router, lease = await _obtain(routers, terms)
            except NoMappingError as e:
                # The router may be starting. What it gave is taken for lost when its time is up.
                if lease.lifetime_s is not None and trio.current_time() - since_s >= lease.lifetime_s:
                    mapping.update(router.method, None)
                log.info("portmap_lost port=%d cause=%s next=check", mapping.port, e)
                await trio.sleep(_RENEW_MIN_S)
                continue
        since_s = trio.current_time()
        mapping.update(router.method, lease)


def _renew_s(lease: Lease) -> float:
    """From a mapping to its renewal."""
    return float("inf") if lease.lifetime_s is None else max(lease.lifetime_s / 2, _RENEW_MIN_S)
