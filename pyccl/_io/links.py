"""Data connections: made here, handed to the engine as file descriptors.

The peer with the lower id dials; when a link has lost its last connection both sides try, so that the one whose
peer is dead learns it (connection refused) without waiting for a silence. Where no connection comes about, one goes
through a third member (``_relay_until_up``, on the third ``_carry``) until a direct one stands. To the engine all are
alike. Spec: proto/wire.md 1 and 3.1.
Places for later: another way to reach a peer (punching) is another body of ``_connect``; sealing wraps what ``_greet``
agrees on before the descriptor goes to the engine.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import logging
import os
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
from pyccl._native.handles import Engine, Relay
from pyccl._proto import limits
from pyccl._proto.epoch import Address, Member
from pyccl._proto.messages import PeerHello, PeerRefused, PeerWelcome, RelayHello, StateHello, clip
from pyccl.errors import PycclError, RemoteProtocolError, UsageError

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
_RELAY_AFTER_S: Final = 1.0  # so long a direct connection has; who would not dial at first leaves a relay to the other
_RELAY_S: Final = 3.0  # for one relay to be asked, to dial and to pass both greetings on: two fit into LINKS_TIMEOUT_S
_DIRECT_AGAIN_S: Final = 30.0  # between attempts while there is a relayed connection
_TCP_ESTABLISHED: Final = 1

Hello = PeerHello | StateHello | RelayHello

log = logging.getLogger("pyccl.links")


@dataclass(slots=True)
class _Peer:
    member: Member
    slot: int
    dialing: set[trio.CancelScope] = field(default_factory=set)  # one for each task that tries to connect
    refused_at: deque[float] = field(default_factory=lambda: deque(maxlen=_REFUSALS_MAX))
    shunned: bool = False
    wanted: int = 0  # connections that the engine has asked for
    silent: bool = False  # its connections stand, and nothing comes over them
    relaying: trio.CancelScope | None = None  # of the task that sees to a relayed connection
    relay: bytes | None = None  # the member that carries our connection
    relayed: socket.socket | None = None  # that connection, a copy of the engine's
    relay_over: trio.Event = field(default_factory=trio.Event)  # it is not needed any more, or has ended


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
        self,
        run: bytes,
        me: Member,
        engine: Engine,
        relay: Relay,
        connections: int | None,
        nursery: trio.Nursery,
        events: LinkEvents,
    ) -> None:
        """relay: for the connections of others; ``serve`` stops it."""
        self._run, self._me, self._engine = run, me, engine
        self._relay, self._dialing_for_others = relay, 0
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
        if record.relayed is not None and not _is_established(record.relayed):
            record.relay_over.set()
        if self._me.peer < peer:
            self._dial(record, max(record.wanted, self._count_for(record.member)) - left)
        elif left == 0:
            self._dial(record, 1)

    def silent(self, slot: int) -> None:
        """Nothing comes over its connections, though they stand: there may be a way around."""
        peer = self.peer_of(slot)
        if peer is not None:
            self._peers[peer].silent = True
            self._seek_relay(self._peers[peer])

    def heard(self, slot: int) -> None:
        peer = self.peer_of(slot)
        if peer is not None:
            self._peers[peer].silent = False

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

    def relayed(self) -> dict[bytes, bytes]:
        """Peers -> the member that carries our connection there."""
        return {id_: record.relay for id_, record in self._peers.items() if record.relay is not None}

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
        self._relay.forget(peer)
        for other in self._peers.values():
            if other.relay == peer:  # who is out of the run carries nothing of it
                other.relay_over.set()

    def _stop_dialing(self, peer: _Peer) -> None:
        for scope in peer.dialing:
            scope.cancel()
        if peer.relaying is not None:
            peer.relaying.cancel()

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
        self._seek_relay(peer)

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
                            peer.relay_over.set()
                            return
                        peer.dialing.add(scope)
                except ConnectionRefusedError as e:
                    if self._is_known(peer) and self._engine.conns(peer.slot) == 0:
                        self._events.refused(peer.member.peer, str(e))
                except (OSError, trio.TooSlowError, trio.BrokenResourceError, PycclError) as e:
                    log.debug("dial_failed peer=%s cause=%s", peer.member.peer.hex()[:8], e)
                if peer.relay is not None:
                    with trio.move_on_after(_DIRECT_AGAIN_S):
                        await peer.relay_over.wait()
                await trio.sleep(pause * (0.5 + random.random()))
                pause = min(pause * 2, _BACKOFF_S[1])

    async def _greet(
        self, stream: trio.SocketStream, member: Member, kind: type[PeerHello | RelayHello] = PeerHello
    ) -> bool:
        me = self._me
        hello = kind(limits.PROTOCOL_VERSION, self._run, me.peer, me.incarnation, member.peer, member.incarnation)
        try:
            await stream.send_all(envelope.pack(hello))
            answer = await envelope.receive(stream, limits.BODY_GREETING_MAX_BYTES)
            if isinstance(answer, PeerWelcome):
                return True
            reason = answer.reason if isinstance(answer, PeerRefused) else "no answer"
            what = "relay" if kind is RelayHello else "link"
            log.info("%s_refused peer=%s reason=%r", what, member.peer.hex()[:8], reason)
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
        peer.silent = False
        self._events.up(peer.member.peer)
        self._check_ready()
        return True

    # -- through a third member

    def _seek_relay(self, peer: _Peer) -> None:
        if peer.relaying is None and not peer.shunned and self._is_cut_off(peer):
            peer.relaying = trio.CancelScope()
            self._nursery.start_soon(self._relay_until_up, peer, peer.relaying)

    def _is_cut_off(self, peer: _Peer) -> bool:
        return peer.silent or self._engine.conns(peer.slot) == 0

    async def _relay_until_up(self, peer: _Peer, scope: trio.CancelScope) -> None:
        """One connection through one member after the other, until a direct one stands or the peer is forgotten."""
        pause = _BACKOFF_S[0]
        try:
            with scope:
                await trio.sleep(_RELAY_AFTER_S * (1 if self._me.peer < peer.member.peer else 2))
                while self._is_cut_off(peer):
                    for through in self._relays_to(peer):
                        stream = await self._ask_relay(through, peer)
                        if stream is not None:
                            await self._stay_relayed(peer, through, stream)
                            pause = _BACKOFF_S[0]
                            break
                    await trio.sleep(pause * (0.5 + random.random()))
                    pause = min(pause * 2, _BACKOFF_S[1])
        finally:
            peer.relaying = None

    def _relays_to(self, peer: _Peer) -> list[_Peer]:
        """Whom we reach ourselves; pairs begin with different ones, so that no relay carries them all."""
        able = [
            other
            for other in self._peers.values()
            if other is not peer and other.relay is None and not other.shunned and not self._is_cut_off(other)
        ]
        pair = self._me.peer + peer.member.peer
        return sorted(able, key=lambda other: hashlib.sha256(pair + other.member.peer).digest())

    async def _ask_relay(self, through: _Peer, peer: _Peer) -> trio.SocketStream | None:
        """A connection that has greeted the peer."""
        try:
            with trio.fail_after(_RELAY_S):
                stream = await _connect(through.member.addresses)
                if await self._greet(stream, peer.member, RelayHello) and await self._greet(stream, peer.member):
                    return stream
        except (OSError, trio.TooSlowError, trio.BrokenResourceError, PycclError) as e:
            log.debug("relay_failed peer=%s relay=%s cause=%s", _short(peer), _short(through), e)
        return None

    async def _stay_relayed(self, peer: _Peer, through: _Peer, stream: trio.SocketStream) -> None:
        with socket.socket(fileno=os.dup(stream.socket.fileno())) as relayed:
            if not (self._is_cut_off(peer) and self._is_known(through)):
                stream.socket.close()
                return
            if not self._adopt(peer, stream):
                return
            peer.relay, peer.relayed, peer.relay_over = through.member.peer, relayed, trio.Event()
            log.info("link_relayed peer=%s relay=%s", _short(peer), _short(through))
            try:
                while True:
                    with trio.move_on_after(_DIRECT_AGAIN_S):
                        await peer.relay_over.wait()
                        break
                    self._dial(peer, 1)  # of a link that fell silent nobody dials: its connections stand
            finally:
                peer.relay = peer.relayed = None
                log.info("relay_ended peer=%s relay=%s", _short(peer), _short(through))
                with contextlib.suppress(OSError):  # it has ended already
                    relayed.shutdown(socket.SHUT_RDWR)  # the engine repeats what it carried over what is left

    async def _carry(self, stream: trio.SocketStream, hello: RelayHello) -> None:
        """Be the relay; what becomes of the connection then is not ours to read."""
        ends: tuple[_Peer, _Peer] | None = None
        with self._early.place():
            ends = (
                await self._learn_of(hello.from_peer, hello.from_incarnation),
                await self._learn_of(hello.to_peer, hello.to_incarnation),
            )
        if ends is None:
            raise RemoteProtocolError("a relay was wanted between members that we do not know")
        dialer, other = ends
        if self._relay.pairs() + self._dialing_for_others >= Relay.PAIRS_MAX:
            await stream.send_all(envelope.pack(PeerRefused("this relay carries all that it can")))
            return
        self._dialing_for_others += 1
        try:
            with trio.fail_after(_RELAY_S):
                onward = await _connect(other.member.addresses)
        except (OSError, trio.TooSlowError) as e:
            await stream.send_all(envelope.pack(PeerRefused(clip(f"the relay does not reach it either: {e}"))))
            return
        finally:
            self._dialing_for_others -= 1
        try:
            await stream.send_all(envelope.pack(PeerWelcome(limits.PROTOCOL_VERSION)))
            if not (self._is_known(dialer) and self._is_known(other)):
                return
            fds = stream.socket.detach(), onward.socket.detach()
            self._relay.add(*fds, dialer.member.peer, other.member.peer)
        except (UsageError, OSError) as e:
            log.warning("relay_failed cause=%s", e)
            return
        finally:
            await trio.aclose_forcefully(onward)
        log.info("relays from=%s to=%s pairs=%d", _short(dialer), _short(other), self._relay.pairs())

    # -- from others

    async def serve(self, listener: trio.SocketListener) -> None:
        try:
            await trio.serve_listeners(self._accept, [listener])
        finally:
            self._relay.stop()

    async def _accept(self, stream: trio.SocketStream) -> None:
        peer: _Peer | None = None
        try:
            hello: Hello | None = None
            with self._strangers.place():
                hello = await self._hear_out(stream)
            if isinstance(hello, StateHello):
                await self._events.state(stream, hello)
            elif isinstance(hello, RelayHello):
                await self._carry(stream, hello)
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

    async def _hear_out(self, stream: trio.SocketStream) -> Hello | None:
        """The greeting of an accepted connection, if it is for us."""
        hello = await envelope.receive(stream, limits.BODY_GREETING_MAX_BYTES)
        if isinstance(hello, StateHello):
            return hello
        if not isinstance(hello, PeerHello | RelayHello):
            raise RemoteProtocolError("the first message is no PeerHello")
        to_us = (hello.to_peer, hello.to_incarnation) == (self._me.peer, self._me.incarnation)
        if hello.version != limits.PROTOCOL_VERSION:
            reason = f"protocol version {hello.version}; this peer speaks {limits.PROTOCOL_VERSION}"
        elif hello.run != self._run or to_us != isinstance(hello, PeerHello) or hello.from_peer == hello.to_peer:
            reason = "you look for somebody else"
        else:
            return hello
        await stream.send_all(envelope.pack(PeerRefused(reason)))
        return None

    async def _match(self, stream: trio.SocketStream, hello: PeerHello) -> _Peer:
        """The peer that it is from."""
        peer = await self._learn_of(hello.from_peer, hello.from_incarnation)
        await stream.send_all(envelope.pack(PeerWelcome(limits.PROTOCOL_VERSION)))
        return peer

    async def _learn_of(self, peer: bytes, incarnation: bytes) -> _Peer:
        """Once the master has told us of it."""
        while True:
            record = self._peers.get(peer)
            if record is not None and record.member.incarnation == incarnation:
                if record.shunned:
                    raise RemoteProtocolError("it has broken the protocol too often")
                return record
            await self._changed.wait()


def _is_established(sock: socket.socket) -> bool:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_ESTABLISHED


def _short(peer: _Peer) -> str:
    return peer.member.peer.hex()[:8]


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
