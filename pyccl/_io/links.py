"""Data connections: made here, handed to the engine as file descriptors.

The peer with the lower id dials; when a link has lost its last connection both sides try, so that the one whose
peer is dead learns it (connection refused) without waiting for a silence. Spec: proto/wire.md 1 and 3.1.
Places for later: another way to reach a peer (punching, relay) is another body of ``_connect``; sealing wraps what
``_greet`` agrees on before the descriptor goes to the engine.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import random
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

import trio

from pyccl._io import envelope
from pyccl._io.causes import causes_of
from pyccl._io.strangers import Notes, Places
from pyccl._native.handles import Engine
from pyccl._proto import limits
from pyccl._proto.epoch import Address, Member
from pyccl._proto.messages import PeerHello, PeerRefused, PeerWelcome, StateHello
from pyccl.errors import PycclError, RemoteProtocolError

LINKS_TIMEOUT_S: Final = 10.0
_GREET_S: Final = 10.0
_DIAL_S: Final = 5.0
_STRANGERS_MAX: Final = 64  # accepted connections that have not greeted yet
_EARLY_MAX: Final = 256  # that have, as a peer that we have not learned of yet
_BACKOFF_S: Final = (0.05, 1.0)
AUTO_CONNECTIONS: Final = 8  # of a line that is no loopback, to begin with: the engine asks for more where they pay
_GROW_S: Final = 1.0  # so long the one who dials has to grow a link before the other side does
_REFUSALS_MAX: Final = 10  # of one peer within _REFUSALS_S: it is not linked to any more, and the master decides
_REFUSALS_S: Final = 60.0

log = logging.getLogger("pyccl.links")


@dataclass(slots=True)
class _Peer:
    member: Member
    slot: int
    dialing: set[trio.CancelScope] = field(default_factory=set)  # one for each task that tries to connect
    refused_at: deque[float] = field(default_factory=lambda: deque(maxlen=_REFUSALS_MAX))
    shunned: bool = False
    wanted: int = 0  # connections that the engine has asked for


@dataclass(frozen=True, slots=True)
class LinkEvents:
    """What the owner wants to know."""

    ready: Callable[[int], None]  # version: linked to all
    failed: Callable[[int, tuple[bytes, ...], str], None]
    refused: Callable[[bytes, str], None]  # nobody listens where the peer was
    up: Callable[[bytes], None]
    state: Callable[[trio.SocketStream, StateHello], Awaitable[None]]  # asked for state files; may close it


def is_loopback(host: str) -> bool:
    """Whether it is an address of this machine's own; names are not looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def auto_connections(host: str) -> int:
    """How many connections to a peer at first: processors limit a loopback, windows and losses limit a long line."""
    return 1 if is_loopback(host) or host == "localhost" else AUTO_CONNECTIONS


def _new_socket(family: int) -> trio.socket.SocketType:
    """A TCP socket with CUBIC from before the handshake: one that started with BBR paces for ever.

    Where the handshake shows a long line, the engine turns BBR on.
    """
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    with contextlib.suppress(OSError):  # a kernel without CUBIC works as well
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
    return sock


async def _connect_to(host: str, port: int) -> trio.SocketStream:
    """A connection to the first of the host's addresses that takes one, each within its part of the time to dial."""
    found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    failed: list[OSError] = []
    for family, _, _, _, address in found:
        sock = _new_socket(family)
        try:
            with trio.fail_after(_DIAL_S / (len(found) + 1)):
                await sock.connect(address)
            return trio.SocketStream(sock)
        except (OSError, trio.TooSlowError) as e:
            sock.close()
            failed.append(e if isinstance(e, OSError) else TimeoutError(f"no answer from {address[0]}"))
        except BaseException:
            sock.close()
            raise
    try:
        if len(failed) == 1:
            raise failed[0]
        raise OSError(f"{host}: no address of it takes a connection") from ExceptionGroup(host, failed)
    finally:
        failed.clear()  # or the exception holds this frame, which holds it, until garbage is collected


async def _connect(addresses: Iterable[Address]) -> trio.SocketStream:
    """A TCP connection to the first address that answers."""
    error: OSError = ConnectionRefusedError("the peer names no address")
    for address in addresses:
        try:
            return await _connect_to(address.host, address.port)
        except UnicodeError as e:  # a name that IDNA refuses: foreign text, and no OSError
            error = OSError(f"{address.host!r} is no name of a host: {e}")
        except OSError as e:
            refused = all(isinstance(cause, ConnectionRefusedError) for cause in causes_of(e))
            error = ConnectionRefusedError(str(e)) if refused else e
    try:
        raise error
    finally:
        del error  # as above


class Links:
    """All data links of one session. Lives in the Trio thread."""

    def __init__(
        self, run: bytes, me: Member, engine: Engine, connections: int | None, nursery: trio.Nursery, events: LinkEvents
    ) -> None:
        self._run, self._me, self._engine = run, me, engine
        self._connections, self._nursery, self._events = connections, nursery, events
        self._peers: dict[bytes, _Peer] = {}
        self._version: int | None = None  # of the OpenLinks that is not answered yet
        self._wanted: frozenset[bytes] = frozenset()
        self._timeout = trio.CancelScope()
        self._strangers, self._early = Places(_STRANGERS_MAX, _GREET_S), Places(_EARLY_MAX, _GREET_S)
        self._notes = Notes(log)
        self._changed = trio.Event()  # a peer became known

    # -- what the member machine asks for

    def open(self, version: int, members: Iterable[Member]) -> None:
        """Be linked to all of `members`; the answer is an event."""
        members = tuple(members)
        self._timeout.cancel()
        self._version, self._wanted = version, frozenset(m.peer for m in members)
        for member in members:
            peer = self._know(member)
            if self._engine.conns(peer.slot) == 0 and self._me.peer < member.peer:
                self._dial(peer, self._count_for(member))
        self._check_ready()
        if self._version is not None:
            self._timeout = trio.CancelScope()
            self._nursery.start_soon(self._expire, version, self._timeout)

    def keep(self, peers: Iterable[bytes]) -> None:
        """Close the links to everybody else."""
        for peer in set(self._peers) - set(peers):
            self._forget(peer)

    def conn_down(self, slot: int, left: int) -> None:
        """The engine lost a connection: make another. With none left, both sides dial."""
        peer = self.peer_of(slot)
        if peer is None:
            return
        record = self._peers[peer]
        if self._me.peer < peer:
            self._dial(record, max(record.wanted, self._count_for(record.member)) - left)
        elif left == 0:
            self._dial(record, 1)

    def grow(self, slot: int, count: int) -> None:
        """The engine would use so many connections. Where both sides would, the one who dials makes them."""
        peer = self.peer_of(slot)
        if peer is None:
            return
        record = self._peers[peer]
        record.wanted = max(record.wanted, count)
        log.info("link_grows peer=%s connections=%d wanted=%d", peer.hex()[:8], self._engine.conns(slot), count)
        if self._me.peer < peer:
            self._dial(record, count - self._engine.conns(slot))
        else:
            self._nursery.start_soon(self._grow_later, record)

    async def _grow_later(self, peer: _Peer) -> None:
        await trio.sleep(_GROW_S)
        if self._is_known(peer):
            self._dial(peer, peer.wanted - self._engine.conns(peer.slot))

    def conn_refused(self, slot: int) -> bool:
        """The engine closed the link for what came over it. True: it is to be made again, as a lost one; not for ever.

        A flipped bit or a stranger with a stolen greeting must cost no member its place, but who sends nothing else
        would hold up the others' operations for as long as it is taken back.
        """
        peer = self.peer_of(slot)
        if peer is None:
            return False
        record, now = self._peers[peer], trio.current_time()
        record.refused_at.append(now)
        if len(record.refused_at) == _REFUSALS_MAX and now - record.refused_at[0] < _REFUSALS_S:
            log.warning("peer_shunned peer=%s refused=%d", peer.hex()[:8], _REFUSALS_MAX)
            record.shunned = True
            self._stop_dialing(record)
        else:
            self.conn_down(slot, self._engine.conns(slot))
        return not record.shunned

    def peer_of(self, slot: int) -> bytes | None:
        return next((id_ for id_, record in self._peers.items() if record.slot == slot), None)

    def slot_of(self, peer: bytes) -> int | None:
        record = self._peers.get(peer)
        return None if record is None else record.slot

    # -- records

    def _know(self, member: Member) -> _Peer:
        record = self._peers.get(member.peer)
        if record is not None and record.member.incarnation == member.incarnation:
            return record
        if record is not None:  # the same peer started anew: nothing of its old life is kept
            self._forget(member.peer)
        record = _Peer(member, self._engine.peer_add(member.peer))
        self._peers[member.peer] = record
        self._changed.set()
        self._changed = trio.Event()
        return record

    def _is_known(self, peer: _Peer) -> bool:
        """Whether it was not forgotten meanwhile: its slot in the engine is gone then."""
        return self._peers.get(peer.member.peer) is peer

    def _forget(self, peer: bytes) -> None:
        record = self._peers.pop(peer)
        self._stop_dialing(record)
        self._engine.peer_remove(record.slot)

    def _stop_dialing(self, peer: _Peer) -> None:
        for scope in peer.dialing:
            scope.cancel()

    def _count_for(self, member: Member) -> int:
        if self._connections is not None:
            return self._connections
        return auto_connections(member.addresses[0].host) if member.addresses else 1

    def _check_ready(self) -> None:
        if self._version is None:
            return
        if all(p in self._peers and self._engine.conns(self._peers[p].slot) > 0 for p in self._wanted):
            version, self._version = self._version, None
            self._timeout.cancel()
            self._events.ready(version)

    async def _expire(self, version: int, scope: trio.CancelScope) -> None:
        with scope:
            await trio.sleep(LINKS_TIMEOUT_S)
            if self._version != version:
                return
            missing = tuple(
                sorted(p for p in self._wanted if p not in self._peers or not self._engine.conns(self._peers[p].slot))
            )
            # the version stays open: should a link come up after all, `ready` takes the complaint back
            self._events.failed(version, missing, f"no data connection within {LINKS_TIMEOUT_S:.0f} s")

    # -- connections

    def _dial(self, peer: _Peer, count: int) -> None:
        if peer.shunned:
            return
        for _ in range(count - len(peer.dialing)):
            scope = trio.CancelScope()
            peer.dialing.add(scope)
            self._nursery.start_soon(self._dial_until_up, peer, scope)

    async def _dial_until_up(self, peer: _Peer, scope: trio.CancelScope) -> None:
        """One connection, tried until it stands or the peer is forgotten."""
        pause = _BACKOFF_S[0]
        with scope:
            while True:
                try:
                    with trio.fail_after(_DIAL_S):
                        stream = await _connect(peer.member.addresses)
                        with_hello = await self._greet(stream, peer.member)
                    if with_hello:
                        peer.dialing.discard(scope)
                        if self._adopt(peer, stream):
                            return
                        peer.dialing.add(scope)
                except ConnectionRefusedError as e:
                    if self._is_known(peer) and self._engine.conns(peer.slot) == 0:
                        self._events.refused(peer.member.peer, str(e))
                except (OSError, trio.TooSlowError, trio.BrokenResourceError, PycclError) as e:
                    log.debug("dial_failed peer=%s cause=%s", peer.member.peer.hex()[:8], e)
                await trio.sleep(pause * (0.5 + random.random()))
                pause = min(pause * 2, _BACKOFF_S[1])

    async def _greet(self, stream: trio.SocketStream, member: Member) -> bool:
        me = self._me
        hello = PeerHello(
            limits.PROTOCOL_VERSION, self._run, me.peer, me.incarnation, member.peer, member.incarnation
        )
        try:
            await stream.send_all(envelope.pack(hello))
            answer = await envelope.receive(stream, limits.BODY_GREETING_MAX_BYTES)
            if isinstance(answer, PeerWelcome):
                return True
            reason = answer.reason if isinstance(answer, PeerRefused) else "no answer"
            log.info("link_refused peer=%s reason=%r", member.peer.hex()[:8], reason)
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        await trio.aclose_forcefully(stream)
        return False

    def _adopt(self, peer: _Peer, stream: trio.SocketStream) -> bool:
        """Hand it to the engine. False: the link still has no connection."""
        if not self._is_known(peer) or peer.shunned:
            stream.socket.close()
            return True
        try:
            self._engine.conn_add(peer.slot, stream.socket.detach())
        except (OSError, PycclError) as e:  # above all: the link has all the connections that it may have
            log.info("connection_not_taken peer=%s cause=%s", peer.member.peer.hex()[:8], e)
            return self._engine.conns(peer.slot) > 0
        self._events.up(peer.member.peer)
        self._check_ready()
        return True

    async def serve(self, listener: trio.SocketListener) -> None:
        await trio.serve_listeners(self._accept, [listener])

    async def _accept(self, stream: trio.SocketStream) -> None:
        peer: _Peer | None = None
        try:
            hello: PeerHello | StateHello | None = None
            with self._strangers.place():
                hello = await self._hear_out(stream)
            if isinstance(hello, StateHello):
                await self._events.state(stream, hello)
            elif hello is not None:
                with self._early.place():
                    peer = await self._match(stream, hello)
        except (RemoteProtocolError, OSError, trio.BrokenResourceError, trio.ClosedResourceError) as e:
            self._notes.tell("stranger_refused", e)
        finally:
            if peer is None:
                await trio.aclose_forcefully(stream)
        if peer is not None:
            self._adopt(peer, stream)

    async def _hear_out(self, stream: trio.SocketStream) -> PeerHello | StateHello | None:
        """The greeting of an accepted connection, if it is for us."""
        hello = await envelope.receive(stream, limits.BODY_GREETING_MAX_BYTES)
        if isinstance(hello, StateHello):
            return hello
        if not isinstance(hello, PeerHello):
            raise RemoteProtocolError("the first message is no PeerHello")
        if hello.version != limits.PROTOCOL_VERSION:
            reason = f"protocol version {hello.version}; this peer speaks {limits.PROTOCOL_VERSION}"
        elif hello.run != self._run or (hello.to_peer, hello.to_incarnation) != (self._me.peer, self._me.incarnation):
            reason = "you look for somebody else"
        else:
            return hello
        await stream.send_all(envelope.pack(PeerRefused(reason)))
        return None

    async def _match(self, stream: trio.SocketStream, hello: PeerHello) -> _Peer:
        """The peer that it is from, once we have learned of it from the master."""
        while True:
            peer = self._peers.get(hello.from_peer)
            if peer is not None and peer.member.incarnation == hello.from_incarnation:
                if peer.shunned:
                    raise RemoteProtocolError("it has broken the protocol too often")
                await stream.send_all(envelope.pack(PeerWelcome(limits.PROTOCOL_VERSION)))
                return peer
            await self._changed.wait()


async def listen(host: str) -> tuple[trio.SocketListener, Address]:
    """A listening socket on a free port of `host`."""
    sock = _new_socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        await sock.bind((host, 0))
        sock.listen(128)
    except BaseException:
        sock.close()
        raise
    return trio.SocketListener(sock), Address(host, int(sock.getsockname()[1]))
