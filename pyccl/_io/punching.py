"""Punching: connections between two peers of which neither can be dialed, each behind a router that lets answers in.

    offer     from new ports of ours, each seen by the master on a connection from it (``Reflect``): Punch
    begin     the master tells both at what moment to connect to what the other was seen as: PunchGo. Each router then
              has let a packet out before, or while, the other's comes in: TCP's simultaneous open, or a plain one

A router that gives each destination a port of its own was seen with the wrong one, and nothing comes of it. One offer
to a peer at a time, and so many connections of one attempt. Spec: proto/wire.md 11.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

from pyccl._io import tcpinfo
from pyccl._io.dialing import FAILURES, new_socket, share_port
from pyccl._io.front import MasterAt, Name, reflected
from pyccl._io.tls import Line, forget, socket_of
from pyccl._proto import limits
from pyccl._proto.epoch import Address

_REFLECT_S: Final = 4.0
_CONNECT_S: Final = 2.5  # SYNs go out at 0 and 1 s of it, and behind each refusal
_REFUSED_S: Final = 0.05  # before the next one; doubled each time
_IDLE_S: Final = limits.PUNCH_S  # until the other has offered, too

log = logging.getLogger("pyccl.punching")


@dataclass(slots=True)
class _Port:
    number: int
    family: int
    seen_as: Address
    line: Line  # from it to the master; its end would be the mapping's


@dataclass(slots=True)
class _Offer:
    ports: list[_Port] = field(default_factory=list)
    begun: bool = False
    over: trio.Event = field(default_factory=trio.Event)


class Puncher:
    """Of one peer. Lives in the Trio thread.

    told: called with the peer, our endpoints and the seconds of a round trip to the master: tell it so.
    """

    def __init__(
        self,
        master: MasterAt,
        me: Name,
        nursery: trio.Nursery,
        told: Callable[[bytes, tuple[Address, ...], float], None],
        connected: Callable[[bytes, trio.SocketStream], Awaitable[None]],
    ) -> None:
        self._master, self._me, self._nursery = master, me, nursery
        self._told, self._connected = told, connected
        self._offers: dict[bytes, _Offer] = {}

    async def punch(self, peer: bytes, count: int) -> None:
        """One attempt; returns when it has ended, or that which is under way."""
        under_way = self._offers.get(peer)
        if under_way is not None:
            await under_way.over.wait()
            return
        offer = self._offers[peer] = _Offer()
        try:
            with trio.move_on_after(_REFLECT_S):
                async with trio.open_nursery() as nursery:
                    for _ in range(min(count, limits.PUNCHES_MAX)):
                        nursery.start_soon(self._open_port, offer)
            if not offer.ports:
                return
            round_trip_s = tcpinfo.round_trip_s(socket_of(offer.ports[0].line).socket)
            self._told(peer, tuple(port.seen_as for port in offer.ports), round_trip_s)
            with trio.move_on_after(_IDLE_S):
                await offer.over.wait()
        finally:
            del self._offers[peer]
            offer.over.set()
            for port in offer.ports:
                forget(port.line)

    def abandon(self) -> None:
        """All attempts that have not begun."""
        for offer in self._offers.values():
            if not offer.begun:
                offer.over.set()

    def begin(self, peer: bytes, endpoints: Sequence[Address], delay_s: float) -> None:
        """What was offered to that peer is to be connected with these, one each."""
        offer = self._offers.get(peer)
        if offer is not None and offer.ports and not offer.begun and not offer.over.is_set():
            offer.begun = True
            self._nursery.start_soon(self._connect_all, peer, offer, tuple(endpoints), delay_s)

    async def _open_port(self, offer: _Offer) -> None:
        """A port that nobody else uses, and what it looks like."""
        line: Line | None = None
        try:
            line = await self._master.line(from_port=0)
            seen_as = await reflected(line, self._me)
        except FAILURES as e:
            log.debug("port_not_observed cause=%s", e)
            if line is not None:
                forget(line)
            return
        except BaseException:
            if line is not None:
                forget(line)
            raise
        sock = socket_of(line).socket
        offer.ports.append(_Port(int(sock.getsockname()[1]), int(sock.family), seen_as, line))

    async def _connect_all(
        self, peer: bytes, offer: _Offer, endpoints: tuple[Address, ...], delay_s: float
    ) -> None:
        await trio.sleep(delay_s)
        try:
            async with trio.open_nursery() as nursery:
                for port, endpoint in zip(offer.ports, endpoints, strict=False):
                    nursery.start_soon(self._connect, peer, port, endpoint)
        finally:
            offer.over.set()

    async def _connect(self, peer: bytes, port: _Port, endpoint: Address) -> None:
        pause_s = _REFUSED_S
        with trio.move_on_after(_CONNECT_S):
            while True:
                sock = new_socket(port.family)
                try:
                    share_port(sock)
                    await sock.bind(("::" if port.family == socket.AF_INET6 else "0.0.0.0", port.number))
                    await sock.connect((endpoint.host, endpoint.port))
                except (OSError, UnicodeError) as e:  # refused: it has not begun yet
                    log.debug("punch_failed peer=%s endpoint=%s:%d cause=%s", peer.hex()[:8], *endpoint[:2], e)
                    sock.close()
                    await trio.sleep(pause_s)
                    pause_s *= 2
                except BaseException:
                    sock.close()
                    raise
                else:
                    break
            self._nursery.start_soon(self._connected, peer, trio.SocketStream(sock))
