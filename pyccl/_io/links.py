"""Data connections: made here, handed to the engine as file descriptors.

The peer with the lower id dials; when a link has lost its last connection both sides try, so that the one whose
peer is dead learns it (connection refused) without waiting for a silence. Where no connection comes about, one goes
through a third (``_relay_until_up``, on a member that relays ``_carry``) until a direct one stands. To the engine all
are alike. Spec: proto/wire.md 1, 3.1 and 11.
In a secure run both sides prove who they are, and the engine seals with keys that they agreed on (``agreement.py``).

    dialed      at all addresses of the peer, each with a small head start; who greets as that peer is it (``_reach``)
    the other way round   _REVERSE_S later, or at once from behind a router: it may be the one that can't be dialed
    punched     if the master can help (``punching.py``), a moment later, from both sides; a direct one is still sought
    relayed     _RELAY_AFTER_S later; replaced as soon as one of the others stands
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import random
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

import trio

from pyccl._io import agreement, envelope, tcpinfo
from pyccl._io.dialing import FAILURES, NotTakenError, connect, connect_at, connect_to, first_of
from pyccl._io.front import MasterAt, Name
from pyccl._io.meeting import Meetings, owner_of
from pyccl._io.punching import Puncher
from pyccl._io.strangers import Notes, Places, origin
from pyccl._io.tls import Credentials, socket_of
from pyccl._native.handles import Engine, Keys, Relay, RelayEnd
from pyccl._proto import limits
from pyccl._proto.budget import Budget
from pyccl._proto.candidates import is_loopback, lead_home, may_reach, ordered
from pyccl._proto.epoch import NO_ID, Address, AddressKind, Member
from pyccl._proto.messages import Alive, Path, PeerHello, PeerRefused, PeerWelcome, RelayHello, StateHello, clip
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
_RELAY_S: Final = 4.0  # for one relay to be asked, to dial and to pass both greetings on: two fit into LINKS_TIMEOUT_S
_REVERSE_S: Final = 0.5  # so long the one who dials has to make the first connection before the other side tries
_PUNCH_AFTER_S: Final = 0.3  # so long a direct connection has
_PUNCHED_MAX: Final = 16  # connections of one link
_PUNCHES_BURST: Final = 8  # attempts to punch one link, then one every so often
_PUNCH_EVERY_S: Final = 5.0
_CALL_AFTER_S: Final = 0.7  # so long a member that relays has to dial the other before that is called there
_DIRECT_AGAIN_S: Final = 30.0  # between attempts while there is a relayed or a punched connection
_SILENT_AGAIN_S: Final = 30.0  # after a silence: a line may greet and carry nothing, and a way around goes first
_AROUND_S: Final = 3.0  # so long it has

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
    silenced_at: float = -math.inf
    relaying: trio.CancelScope | None = None  # of the task that sees to a relayed connection
    relay: bytes | None = None  # the member that carries our connection
    relayed: socket.socket | None = None  # that connection, a copy of the engine's
    relay_over: trio.Event = field(default_factory=trio.Event)  # it is not needed any more, or has ended
    dials: bool | None = None  # whether it is we who make connections; None: who has the lower id
    reached_at: Address | None = None  # by the last dial that got there
    path: int = Path.DIRECT  # of its connections, the best one
    via: bytes = NO_ID  # who relays it, as far as we know
    punching: trio.CancelScope | None = None
    punches: Budget = field(default_factory=lambda: Budget(_PUNCHES_BURST, _PUNCH_EVERY_S))
    seeks_direct: bool = False  # beside its punched connections
    direct: socket.socket | None = None  # the first that came beside them, a copy of the engine's


@dataclass(frozen=True, slots=True)
class LinkEvents:
    """What the owner wants to know."""

    ready: Callable[[int], None]  # version: linked to all
    failed: Callable[[int, tuple[bytes, ...], str], None]
    refused: Callable[[bytes, str], None]  # nobody listens where the peer was
    up: Callable[[bytes], None]
    state: Callable[[trio.SocketStream, StateHello], Awaitable[None]]  # asked for state files; may close it


@dataclass(frozen=True, slots=True)
class Outside:
    """What helps to reach peers that can't be dialed, beside members. relay: see front.RELAY."""

    relay: str
    master: MasterAt
    seen: Callable[[], str]  # of us, as of a Member
    is_behind_router: Callable[[], bool]
    may_punch: Callable[[], bool]  # the master is there, and not on this machine
    offer: Callable[[bytes, tuple[Address, ...], float], None]  # MemberMachine.punch
    ask_relay: Callable[[bytes, bytes], None]  # MemberMachine.ask_relay
    round_trip_s: Callable[[bytes], float | None]  # to a member, if measured


@dataclass(frozen=True, slots=True)
class _Greeted:
    keys: Keys | None  # of a secure run


@dataclass(frozen=True, slots=True)
class _Reached:
    stream: trio.SocketStream
    keys: Keys | None
    at: Address

    def discard(self) -> None:
        self.stream.socket.close()


@dataclass(frozen=True, slots=True)
class LinkPath:
    """How a peer is connected. via: who relays it; NO_ID: nobody, not known, or the master."""

    path: int
    via: bytes
    connections: int


def auto_connections(host: str) -> int:
    """How many connections to a peer at first: processors limit a loopback, windows and losses limit a long line."""
    return 1 if is_loopback(host) or host == "localhost" else AUTO_CONNECTIONS


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
        credentials: Credentials | None = None,
        outside: Outside | None = None,
    ) -> None:
        """relay: for the connections of others; ``stop`` ends it. credentials: of a secure run, where everybody has
        some and connections are sealed."""
        self._outside = outside
        self._mode = "auto" if outside is None else outside.relay
        self._puncher: Puncher | None = None
        if outside is not None:
            name = Name(me.peer, me.incarnation)
            self._puncher = Puncher(outside.master, name, nursery, outside.offer, self._punched)
        self._offering: tuple[Member, ...] = ()  # that relay, and are no members
        self._relay_round_trips: dict[bytes, float] = {}
        self._meetings = Meetings(relay)
        self._credentials = credentials
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
            if self._engine.conns(peer.slot) > 0:
                continue
            if self._dials(peer):
                self._dial(peer, self._count_for(member))
            else:
                self._nursery.start_soon(self._dial_if_not_dialed, peer)
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
        if record.relayed is not None and not tcpinfo.is_established(record.relayed):
            record.relay_over.set()
        if (
            left > 0
            and record.direct is not None
            and record.path < Path.PUNCHED
            and not tcpinfo.is_established(record.direct)
        ):
            self._drop_direct(record)
            record.path = Path.PUNCHED
            self._seek_direct(record)
        if left > 0 and record.path == Path.PUNCHED:
            self._punch_more(record)
            return
        if record.seeks_direct and left == 0:  # who waits to try a direct one again does it now
            self._drop_direct(record)
            record.seeks_direct = False
            self._cancel_dials(record)
        if self._dials(record):
            self._dial(record, max(record.wanted, self._count_for(record.member)) - left)
        elif left == 0:
            self._dial(record, 1)

    def silent(self, slot: int) -> None:
        """Nothing comes over its connections, though they stand. A new one may get through where an address changed or
        a router forgot the old ones, which the engine closes for it then; or there is a way around."""
        peer = self.peer_of(slot)
        if peer is None:
            return
        record, now = self._peers[peer], trio.current_time()
        record.silent = True
        if self._engine.conns(slot) == 0:
            self._dial(record, 1)
            return
        if record.relay is not None:
            record.relay_over.set()
        again = now < record.silenced_at + _SILENT_AGAIN_S
        record.silenced_at = now
        self._cancel_dials(record)  # also those that wait for the next attempt beside a lesser way
        self._seek_ways(record)
        self._nursery.start_soon(self._dial_if_silent, record, _AROUND_S if again else 0.0)

    async def _dial_if_silent(self, peer: _Peer, after_s: float) -> None:
        await trio.sleep(after_s)
        if self._is_known(peer) and peer.silent:
            self._dial(peer, 1)

    def heard(self, slot: int) -> None:
        """Something comes over them again."""
        peer = self.peer_of(slot)
        if peer is not None and self._peers[peer].silent:
            record = self._peers[peer]
            record.silent = False
            wanted = max(record.wanted, self._count_for(record.member))
            if not record.seeks_direct and self._engine.conns(slot) >= wanted:
                self._cancel_dials(record)

    def grow(self, slot: int, count: int) -> None:
        """The engine would use so many connections. Where both sides would, the one who dials makes them."""
        peer = self.peer_of(slot)
        if peer is None:
            return
        record = self._peers[peer]
        record.wanted = max(record.wanted, count)
        log.info("link_grows peer=%s connections=%d wanted=%d", peer.hex()[:8], self._engine.conns(slot), count)
        if record.path == Path.PUNCHED:
            self._punch_more(record)
        elif self._dials(record):
            self._dial(record, count - self._engine.conns(slot))
        elif record.path != Path.RELAYED:
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

    def paths(self) -> dict[bytes, LinkPath]:
        """Of all peers that there are connections to. Any thread."""
        found = {id_: (record, self._engine.conns(record.slot)) for id_, record in list(self._peers.items())}
        return {id_: LinkPath(*self._path_of(record), count) for id_, (record, count) in found.items() if count}

    def moved(self, member: Member) -> None:
        """It is reached at other addresses."""
        record = self._peers.get(member.peer)
        if record is not None and record.member.incarnation == member.incarnation:
            self._readdress(record, member)

    def master_is_back(self) -> None:
        """On a new connection: what we offered on the old one may never have arrived."""
        if self._puncher is not None:
            self._puncher.abandon()

    def offered(self, relays: tuple[Member, ...]) -> None:
        """These relay, and are no members; see messages.Relays."""
        self._offering = relays

    # -- records

    def _path_of(self, peer: _Peer) -> tuple[int, bytes]:
        return (Path.RELAYED, peer.relay) if peer.relay is not None else (peer.path, peer.via)

    def _readdress(self, peer: _Peer, member: Member) -> None:
        if peer.member == member:
            return
        peer.member, peer.reached_at = member, None
        count = len(peer.dialing)
        self._cancel_dials(peer)  # also those that wait for the next attempt beside a lesser way: all begin anew
        if count or self._is_cut_off(peer) or peer.path >= Path.PUNCHED:
            self._dial(peer, max(count, 1))

    def _dials(self, peer: _Peer) -> bool:
        return self._me.peer < peer.member.peer if peer.dials is None else peer.dials

    def _know(self, member: Member) -> _Peer:
        record = self._peers.get(member.peer)
        if record is not None and record.member.incarnation == member.incarnation:
            self._readdress(record, member)
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
        self._drop_direct(record)
        self._stop_dialing(record)
        self._engine.peer_remove(record.slot)
        self._meetings.forget(peer)
        for other in self._peers.values():
            if other.relay == peer:  # who is out of the run carries nothing of it
                other.relay_over.set()

    def _drop_direct(self, peer: _Peer) -> None:
        if peer.direct is not None:
            peer.direct.close()
        peer.direct = None

    def _cancel_dials(self, peer: _Peer) -> None:
        for scope in peer.dialing:
            scope.cancel()
        peer.dialing.clear()

    def _stop_dialing(self, peer: _Peer) -> None:
        self._cancel_dials(peer)
        for other in (peer.relaying, peer.punching):
            if other is not None:
                other.cancel()

    def _count_for(self, member: Member) -> int:
        if self._connections is not None:
            return self._connections
        addresses = self._candidates(member)
        return auto_connections(addresses[0].host) if addresses else 1

    def _candidates(self, member: Member) -> list[Address]:
        return ordered(member, self._mine())

    def _mine(self) -> Member:
        """We, as seen now."""
        return self._me if self._outside is None else replace(self._me, seen=self._outside.seen())

    def _leads_home(self, peer: _Peer) -> bool:
        behind_router = self._outside is not None and self._outside.is_behind_router()
        return lead_home(peer.member, self._mine(), behind_router=behind_router)

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
            mode = "" if self._mode == "auto" else f", with relay={self._mode!r}"
            self._events.failed(version, missing, f"no data connection within {LINKS_TIMEOUT_S:.0f} s{mode}")

    # -- connections

    def _dial(self, peer: _Peer, count: int) -> None:
        if peer.shunned:
            return
        for _ in range(count - len(peer.dialing) if self._mode != "only" else 0):
            scope = trio.CancelScope()
            peer.dialing.add(scope)
            self._nursery.start_soon(self._dial_until_up, peer, scope)
        self._seek_ways(peer)

    async def _dial_if_not_dialed(self, peer: _Peer) -> None:
        """The other side would, and may not be able to: from behind a router we had better not wait for it."""
        at_once = self._outside is not None and self._outside.is_behind_router()
        await trio.sleep(0.0 if at_once else _REVERSE_S)
        if self._is_known(peer) and self._engine.conns(peer.slot) == 0:
            self._dial(peer, 1)

    async def _dial_until_up(self, peer: _Peer, scope: trio.CancelScope) -> None:
        """One connection, tried until it stands or the peer is forgotten."""
        pause = _BACKOFF_S[0]
        with scope:
            while True:
                try:
                    with trio.fail_after(_DIAL_S):
                        where = self._candidates(peer.member)
                        reached = await first_of(where, partial(self._reach, peer), _Reached.discard)
                    peer.dialing.discard(scope)
                    path = Path.MAPPED if reached.at.kind == AddressKind.MAPPED else Path.DIRECT
                    first = not self._is_direct(peer)
                    if self._adopt(peer, reached.stream, reached.keys, path):
                        self._has_reached(peer, reached.at, first=first)
                        return
                    peer.dialing.add(scope)
                except ConnectionRefusedError as e:
                    if self._leads_home(peer):
                        self._was_refused(peer, e)
                except (OSError, trio.TooSlowError) as e:
                    log.debug("dial_failed peer=%s cause=%s", peer.member.peer.hex()[:8], e)
                if peer.relay is not None:
                    with trio.move_on_after(_DIRECT_AGAIN_S):
                        await peer.relay_over.wait()
                elif peer.path == Path.PUNCHED and not self._is_cut_off(peer):
                    await trio.sleep(_DIRECT_AGAIN_S)
                await trio.sleep(pause * (0.5 + random.random()))
                pause = min(pause * 2, _BACKOFF_S[1])

    async def _reach(self, peer: _Peer, at: Address) -> _Reached:
        """A connection to this address that has greeted the peer, and nobody else."""
        try:
            stream = await connect_at(peer.member, self._mine(), at)
        except ConnectionRefusedError as e:
            if at == peer.reached_at:
                self._was_refused(peer, e)  # where it was; that others do not answer says nothing
            raise
        path = Path.MAPPED if at.kind == AddressKind.MAPPED else Path.DIRECT
        greeted = await self._greet(stream, self._hello_to(peer.member, path), peer.member.peer)
        if greeted is None:
            raise NotTakenError("refused")
        return _Reached(stream, greeted.keys, at)

    def _was_refused(self, peer: _Peer, error: ConnectionRefusedError) -> None:
        if self._is_known(peer) and self._engine.conns(peer.slot) == 0:
            self._events.refused(peer.member.peer, str(error))

    def _is_direct(self, peer: _Peer) -> bool:
        return peer.path < Path.PUNCHED and not self._is_cut_off(peer)

    def _has_reached(self, peer: _Peer, at: Address, *, first: bool) -> None:
        """By a direct connection of ours. If the other side should have made the first, it could not."""
        peer.reached_at = at
        peer.relay_over.set()
        if first:
            if peer.dials is None and not self._dials(peer):
                peer.dials = True
            peer.wanted = max(peer.wanted, self._count_for(peer.member))
            self._nursery.start_soon(self._grow_later, peer)

    def _was_reached(self, peer: _Peer, *, first: bool) -> None:
        """By a direct connection of the other side, while all that we dial is in vain."""
        peer.relay_over.set()
        if peer.dials is None and peer.reached_at is None and peer.dialing and first:
            peer.dials = False
            self._cancel_dials(peer)

    def _hello_to(self, member: Member, path: int = Path.DIRECT, via: bytes = NO_ID) -> PeerHello:
        me, to = self._me, (member.peer, member.incarnation)
        return PeerHello(limits.PROTOCOL_VERSION, self._run, me.peer, me.incarnation, *to, path, via)

    def _relay_hello(self, member: Member) -> RelayHello:
        me = self._me
        return RelayHello(
            limits.PROTOCOL_VERSION, self._run, me.peer, me.incarnation, member.peer, member.incarnation
        )

    async def _greet(
        self, stream: trio.SocketStream, hello: PeerHello | RelayHello, answers: bytes
    ) -> _Greeted | None:
        """Tell who answers, the peer or a relay, who is wanted. None: refused, and closed."""
        keys = None
        try:
            if self._credentials is None:
                await stream.send_all(envelope.pack(hello))
                reason = await _welcomed(stream)
            else:
                agreed = await agreement.dial(stream, hello, answers, self._credentials)
                keys, reason = (None, agreed) if isinstance(agreed, str) else (agreed, "")
                if keys is not None and isinstance(hello, RelayHello):
                    reason = await _welcomed(stream)
            if not reason:
                return _Greeted(keys)
            what = "relay" if isinstance(hello, RelayHello) else "link"
            log.info("%s_refused peer=%s reason=%r", what, hello.to_peer.hex()[:8], reason)
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        await trio.aclose_forcefully(stream)
        return None

    def _adopt(
        self, peer: _Peer, stream: trio.SocketStream, keys: Keys | None, path: int, via: bytes = NO_ID
    ) -> bool:
        """Hand it to the engine. False: the link still has no connection."""
        if not self._is_known(peer) or peer.shunned:
            stream.socket.close()
            return True
        before, direct = (peer.path, peer.via), None
        if path < Path.PUNCHED and peer.path == Path.PUNCHED and not self._is_cut_off(peer):
            direct = socket.socket(fileno=os.dup(stream.socket.fileno()))
        cut_off = self._is_cut_off(peer)
        if cut_off or path <= peer.path:
            peer.path, peer.via = path, via  # first: an operation may end over it, and its caller ask, before we go on
        try:
            self._engine.conn_add(peer.slot, stream.socket.detach(), keys)
        except (OSError, PycclError) as e:  # above all: the link has all the connections that it may have
            peer.path, peer.via = before
            if direct is not None:
                direct.close()
            log.info("connection_not_taken peer=%s cause=%s", peer.member.peer.hex()[:8], e)
            return self._engine.conns(peer.slot) > 0
        if direct is not None or cut_off:  # what stood is gone, or goes now
            self._drop_direct(peer)
        if cut_off:
            peer.seeks_direct = False
        peer.direct = direct or peer.direct
        peer.silent = False
        self._events.up(peer.member.peer)
        self._check_ready()
        return True

    def _seek_ways(self, peer: _Peer) -> None:
        """Beside dialing."""
        if peer.shunned or not self._is_cut_off(peer):
            return
        if peer.relaying is None and self._mode != "never":
            peer.relaying = trio.CancelScope()
            self._nursery.start_soon(self._relay_until_up, peer, peer.relaying)
        self._punch_soon(peer, _PUNCH_AFTER_S, lambda: 1 if self._is_cut_off(peer) else 0)

    # -- punched

    def _punch_soon(self, peer: _Peer, pause_s: float, count: Callable[[], int]) -> None:
        """count: of connections that are missing then."""
        if self._outside is None or peer.punching is not None or self._mode == "only" or peer.shunned:
            return
        peer.punching = trio.CancelScope()
        self._nursery.start_soon(self._punch, peer, peer.punching, pause_s, count)

    async def _punch(self, peer: _Peer, scope: trio.CancelScope, pause_s: float, count: Callable[[], int]) -> None:
        """One attempt; of a link without a connection again and again, if less often: addresses change, offers get
        lost."""
        assert self._outside is not None and self._puncher is not None
        try:
            with scope:
                await trio.sleep(pause_s)
                pause = _BACKOFF_S[0]
                while (wanted := count()) > 0 and self._is_known(peer):
                    if self._outside.may_punch() and peer.punches.take(trio.current_time()):
                        await self._puncher.punch(peer.member.peer, wanted)
                    if not self._is_cut_off(peer):
                        break
                    await trio.sleep(pause * (0.5 + random.random()))
                    pause = min(pause * 2, _BACKOFF_S[1])
        finally:
            peer.punching = None

    def _punch_more(self, peer: _Peer) -> None:
        """As many as the link may have; one side sees to it."""
        if self._me.peer < peer.member.peer:
            most = min(max(peer.wanted, self._count_for(peer.member)), _PUNCHED_MAX)
            self._punch_soon(peer, 0.0, lambda: most - self._engine.conns(peer.slot))

    def punch_offered(self, peer: bytes, count: int) -> None:
        """By that peer: it does what we should, too, if the link lacks connections."""
        record = self._peers.get(peer)
        if record is not None and (self._is_cut_off(record) or self._path_of(record)[0] >= Path.PUNCHED):
            self._punch_soon(record, 0.0, lambda: count)

    def punch_begins(self, peer: bytes, endpoints: tuple[Address, ...], delay_s: float) -> None:
        """endpoints: where the master has seen that peer, as it says; which is judged here, too."""
        record = self._peers.get(peer)
        if self._puncher is None or record is None:
            return
        if all(may_reach(endpoint.host, record.member, self._mine()) for endpoint in endpoints):
            self._puncher.begin(peer, endpoints, delay_s)
        else:
            log.info("punch_refused peer=%s", _short(record))

    async def _punched(self, to: bytes, stream: trio.SocketStream) -> None:
        """A connection that both sides have made: who has the lower id greets."""
        record = self._peers.get(to)
        if record is None:
            await trio.aclose_forcefully(stream)
        elif self._me.peer > to:
            await self.accept(stream)
        else:
            try:
                with trio.fail_after(_DIAL_S):
                    greeted = await self._greet(stream, self._hello_to(record.member, Path.PUNCHED), to)
            except FAILURES as e:
                log.info("punched_in_vain peer=%s cause=%s", _short(record), e)
                return
            if greeted is not None and self._adopt(record, stream, greeted.keys, Path.PUNCHED):
                log.info("link_punched peer=%s connections=%d", _short(record), self._engine.conns(record.slot))
                self._seek_direct(record)
                if record.path == Path.PUNCHED:
                    self._nursery.start_soon(self._punch_more_later, record)

    def _seek_direct(self, peer: _Peer) -> None:
        """Beside a punched connection: one side may reach the other all the same, be it the one that had not dialed yet
        or one whose dials were lost so far."""
        if not self._is_known(peer):
            return
        peer.relay_over.set()
        if peer.path == Path.PUNCHED and not (peer.seeks_direct and peer.dialing):
            peer.seeks_direct = True
            self._cancel_dials(peer)
            self._dial(peer, 1)

    async def _punch_more_later(self, peer: _Peer) -> None:
        await trio.sleep(_GROW_S)
        if self._is_known(peer) and peer.path == Path.PUNCHED:
            self._punch_more(peer)

    # -- through a third

    def _is_cut_off(self, peer: _Peer) -> bool:
        return peer.silent or self._engine.conns(peer.slot) == 0

    async def _relay_until_up(self, peer: _Peer, scope: trio.CancelScope) -> None:
        """One connection through one member after the other, until a direct one stands or the peer is forgotten."""
        pause = _BACKOFF_S[0]
        try:
            with scope:
                first_s = _RELAY_AFTER_S if self._mode == "auto" else 0.0
                await trio.sleep(first_s + (0.0 if self._me.peer < peer.member.peer else _RELAY_AFTER_S))
                while self._is_cut_off(peer):
                    for through in await self._relays_to(peer):
                        found = await self._ask_relay(through, peer)
                        if found is not None:
                            await self._stay_relayed(peer, through.peer, *found)
                            pause = _BACKOFF_S[0]
                            break
                    await trio.sleep(pause * (0.5 + random.random()))
                    pause = min(pause * 2, _BACKOFF_S[1])
        finally:
            peer.relaying = None

    async def _relays_to(self, peer: _Peer) -> list[Member]:
        """Those that offer it, the nearest first; then members that we reach ourselves, as far as measured the nearest
        first. Else pairs begin with different ones, so that no relay carries them all."""
        able = [
            other
            for other in self._peers.values()
            if other is not peer and other.relay is None and not other.shunned and not self._is_cut_off(other)
        ]
        pair = self._me.peer + peer.member.peer

        def order(member: Member) -> tuple[float, bytes]:
            known = None if self._outside is None else self._outside.round_trip_s(member.peer)
            return (float("inf") if known is None else known), hashlib.sha256(pair + member.peer).digest()

        return [*await self._offering_by_nearness(), *sorted((other.member for other in able), key=order)]

    async def _offering_by_nearness(self) -> list[Member]:
        """How near one is a connection tells, once."""
        if len(self._offering) > 1:
            with trio.move_on_after(_DIAL_S):
                async with trio.open_nursery() as nursery:
                    for relay in self._offering:
                        if relay.peer not in self._relay_round_trips:
                            nursery.start_soon(self._measure_relay, relay)
        return sorted(self._offering, key=lambda relay: self._relay_round_trips.get(relay.peer, float("inf")))

    async def _measure_relay(self, relay: Member) -> None:
        since = trio.current_time()
        with contextlib.suppress(*FAILURES):
            if relay.peer == NO_ID:
                assert self._outside is not None
                stream = await connect_to(self._outside.master.host, self._outside.master.port)
            else:
                stream = await connect(relay, self._mine())
            await trio.aclose_forcefully(stream)
            self._relay_round_trips[relay.peer] = trio.current_time() - since

    async def _come_to_relay(self, through: Member, peer: _Peer) -> trio.SocketStream | None:
        """A connection to the relay, joined there with one to the peer. FAILURES."""
        if through.peer != NO_ID:
            stream = await connect(through, self._mine())
            welcome = await self._greet(stream, self._relay_hello(peer.member), through.peer)
            return None if welcome is None else stream
        assert self._outside is not None
        line = await self._outside.master.line(from_port=0)  # which has proven itself
        try:
            await line.send_all(envelope.pack(self._relay_hello(peer.member)))
            reason = await _welcomed(line)
            if not reason:
                raw = socket_of(line)
                await raw.send_all(envelope.pack(Alive()))
                return raw
        except BaseException:
            await trio.aclose_forcefully(socket_of(line))
            raise
        log.info("relay_refused peer=%s reason=%r", _short(peer), reason)
        await trio.aclose_forcefully(socket_of(line))
        return None

    async def _ask_relay(self, through: Member, peer: _Peer) -> tuple[trio.SocketStream, Keys | None] | None:
        """A connection that has greeted the peer, and the keys agreed with it, not with the relay."""
        stream: trio.SocketStream | None = None
        try:
            with trio.fail_after(_RELAY_S):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._call_there, through, peer)
                    try:
                        stream = await self._come_to_relay(through, peer)
                    except FAILURES as e:  # not outside: a nursery wraps what leaves it
                        log.debug("relay_failed peer=%s relay=%s cause=%s", _short(peer), through.peer.hex()[:8], e)
                    nursery.cancel_scope.cancel()
                if stream is None:
                    return None
                hello = self._hello_to(peer.member, Path.RELAYED, through.peer)
                greeted = await self._greet(stream, hello, peer.member.peer)
                return None if greeted is None else (stream, greeted.keys)
        except FAILURES as e:
            log.debug("relay_failed peer=%s relay=%s cause=%s", _short(peer), through.peer.hex()[:8], e)
        return None

    async def _call_there(self, through: Member, peer: _Peer) -> None:
        """The peer, by the master; a member that relays may reach it by itself."""
        if through.peer in self._peers:
            await trio.sleep(_CALL_AFTER_S)
        if self._outside is not None:
            self._outside.ask_relay(peer.member.peer, through.peer)

    def called(self, peer: bytes, relay: bytes) -> None:
        """That peer waits for us at this relay."""
        record, through = self._peers.get(peer), self._relay_named(relay)
        if record is not None and through is not None and self._is_cut_off(record) and self._mode != "never":
            self._nursery.start_soon(self._meet, record, through)

    def _relay_named(self, relay: bytes) -> Member | None:
        known = self._peers.get(relay)
        return known.member if known else next((m for m in self._offering if m.peer == relay), None)

    async def _meet(self, peer: _Peer, through: Member) -> None:
        stream: trio.SocketStream | None = None
        try:
            with trio.fail_after(_RELAY_S):
                stream = await self._come_to_relay(through, peer)
        except FAILURES as e:
            log.debug("relay_failed peer=%s relay=%s cause=%s", _short(peer), through.peer.hex()[:8], e)
        if stream is not None:
            await self.accept(stream)

    async def _stay_relayed(
        self, peer: _Peer, through: bytes, stream: trio.SocketStream, keys: Keys | None
    ) -> None:
        with socket.socket(fileno=os.dup(stream.socket.fileno())) as relayed:
            if not (self._is_cut_off(peer) and self._relay_named(through) is not None):
                stream.socket.close()
                return
            if not self._adopt(peer, stream, keys, Path.RELAYED, through):
                return
            peer.relay, peer.relayed, peer.relay_over = through, relayed, trio.Event()
            log.info("link_relayed peer=%s relay=%s", _short(peer), through.hex()[:8])
            try:
                while True:
                    with trio.move_on_after(_DIRECT_AGAIN_S):
                        await peer.relay_over.wait()
                        break
                    self._dial(peer, 1)
                    self._punch_soon(peer, 0.0, lambda: 1)
            finally:
                peer.relay = peer.relayed = None
                log.info("relay_ended peer=%s relay=%s", _short(peer), through.hex()[:8])
                with contextlib.suppress(OSError):  # it has ended already
                    relayed.shutdown(socket.SHUT_RDWR)  # the engine repeats what it carried over what is left

    async def _carry(self, stream: trio.SocketStream, hello: RelayHello) -> None:
        """Be the relay; what becomes of the connection then is not ours to read."""
        ends: tuple[_Peer, _Peer] | None = None
        owner = b""
        with self._early.place(origin(stream)):
            dialer = await self._learn_of(hello.from_peer, hello.from_incarnation)
            other = await self._learn_of(hello.to_peer, hello.to_incarnation)
            if self._credentials is not None:
                _, identity = await agreement.accept_whose(stream, hello, hello.from_peer, self._credentials)
                owner = owner_of(identity)
            ends = dialer, other
        if ends is None or not all(map(self._is_known, ends)):
            raise RemoteProtocolError("a relay was wanted between members that we do not know")
        dialer, other = ends
        if self._relay.pairs() + self._dialing_for_others >= Relay.PAIRS_MAX:
            await stream.send_all(envelope.pack(PeerRefused("this relay carries all that it can")))
            return
        self._dialing_for_others += 1
        try:
            onward = await self._reach_or_meet(stream, hello, owner, other)
        finally:
            self._dialing_for_others -= 1
        if onward is None:
            return
        try:
            await stream.send_all(envelope.pack(PeerWelcome(limits.PROTOCOL_VERSION)))
            if not (self._is_known(dialer) and self._is_known(other)):
                return
            self._relay.add(
                RelayEnd(stream.socket.detach(), dialer.member.peer, owner),
                RelayEnd(onward.socket.detach(), other.member.peer),
            )
        except (UsageError, OSError) as e:
            log.warning("relay_failed cause=%s", e)
            return
        finally:
            await trio.aclose_forcefully(onward)
        log.info("relays from=%s to=%s pairs=%d", _short(dialer), _short(other), self._relay.pairs())

    async def _reach_or_meet(
        self, stream: trio.SocketStream, hello: RelayHello, owner: bytes, other: _Peer
    ) -> trio.SocketStream | None:
        """A connection to who is wanted. None: it came here itself, and both are joined, or the dialer was refused."""
        found: list[trio.SocketStream] = []
        met, reasons = trio.Event(), ["the other does not come"]

        async def dial() -> None:
            try:
                with trio.fail_after(_RELAY_S):
                    onward = await connect(other.member, self._mine())
            except (OSError, trio.TooSlowError) as e:
                reasons.append(f"the relay does not reach it either: {e}")
                if isinstance(e, ConnectionRefusedError) and not met.is_set():
                    nursery.cancel_scope.cancel()
                return
            if met.is_set():
                await trio.aclose_forcefully(onward)
                return
            found.append(onward)
            nursery.cancel_scope.cancel()

        async def ready() -> trio.SocketStream:
            await stream.send_all(envelope.pack(PeerWelcome(limits.PROTOCOL_VERSION)))
            return stream

        joined = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dial)
            try:
                joined = await self._meetings.meet(hello, ready, owner, met)
            except FAILURES as e:
                reasons.append(str(e))
            if joined:
                nursery.cancel_scope.cancel()
        if not joined and not found:
            await stream.send_all(envelope.pack(PeerRefused(clip(reasons[-1]))))
        return found[0] if found else None

    # -- from others

    def stop(self) -> None:
        """Nothing is relayed or punched any more. Breaks the cycle that would keep the engine's descriptors."""
        self._relay.stop()
        self._puncher = None
        for record in self._peers.values():
            self._drop_direct(record)

    async def accept(self, stream: trio.SocketStream) -> None:
        """A connection from anybody."""
        matched: tuple[_Peer, Keys | None] | None = None
        hello: Hello | None = None
        try:
            with self._strangers.place(origin(stream)):
                hello = await self._hear_out(stream)
            if isinstance(hello, StateHello):
                await self._events.state(stream, hello)
            elif isinstance(hello, RelayHello):
                await self._carry(stream, hello)
            elif hello is not None:
                with self._early.place(origin(stream)):
                    matched = await self._match(stream, hello)
        except (RemoteProtocolError, OSError, trio.BrokenResourceError, trio.ClosedResourceError) as e:
            self._notes.tell("stranger_refused", e)
        finally:
            if matched is None:
                await trio.aclose_forcefully(stream)
        if matched is not None and isinstance(hello, PeerHello):
            peer, keys = matched
            first = not self._is_direct(peer)
            if self._adopt(peer, stream, keys, hello.path, hello.via):
                if hello.path == Path.PUNCHED:
                    self._seek_direct(peer)
                elif hello.path < Path.PUNCHED:
                    self._was_reached(peer, first=first)

    async def _hear_out(self, stream: trio.SocketStream) -> Hello | None:
        """The greeting of an accepted connection, if it is for us."""
        hello = await envelope.receive(stream, limits.BODY_GREETING_MAX_BYTES)
        if isinstance(hello, StateHello):
            return hello
        if not isinstance(hello, PeerHello | RelayHello):
            raise RemoteProtocolError("the first message is no PeerHello")
        to_us = (hello.to_peer, hello.to_incarnation) == (self._me.peer, self._me.incarnation)
        is_relayed = isinstance(hello, RelayHello) or hello.path == Path.RELAYED  # or is to be, by us
        if hello.version != limits.PROTOCOL_VERSION:
            reason = f"protocol version {hello.version}; this peer speaks {limits.PROTOCOL_VERSION}"
        elif hello.run != self._run or to_us != isinstance(hello, PeerHello) or hello.from_peer == hello.to_peer:
            reason = "you look for somebody else"
        elif self._mode == ("never" if is_relayed else "only"):
            reason = f"it is connected with relay={self._mode!r}"
        else:
            return hello
        await stream.send_all(envelope.pack(PeerRefused(reason)))
        return None

    async def _match(self, stream: trio.SocketStream, hello: PeerHello) -> tuple[_Peer, Keys | None]:
        """The peer that it is from, and what was agreed with it."""
        peer = await self._learn_of(hello.from_peer, hello.from_incarnation)
        if self._credentials is not None:
            return peer, await agreement.accept(stream, hello, hello.from_peer, self._credentials)
        await stream.send_all(envelope.pack(PeerWelcome(limits.PROTOCOL_VERSION)))
        return peer, None

    async def _learn_of(self, peer: bytes, incarnation: bytes) -> _Peer:
        """Once the master has told us of it."""
        while True:
            record = self._peers.get(peer)
            if record is not None and record.member.incarnation == incarnation:
                if record.shunned:
                    raise RemoteProtocolError("it has broken the protocol too often")
                return record
            await self._changed.wait()


async def _welcomed(stream: trio.abc.Stream) -> str:
    """Why not; empty: it is."""
    answer = await envelope.receive(stream, limits.BODY_GREETING_MAX_BYTES)
    if isinstance(answer, PeerWelcome):
        return ""
    return (isinstance(answer, PeerRefused) and answer.reason) or "no answer"


def _short(peer: _Peer) -> str:
    return peer.member.peer.hex()[:8]
