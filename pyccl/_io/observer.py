"""Observer: what ``pyccl-peer`` does in a run. It holds the shared state and takes part in nothing.

    control   Observe -> Welcome, Members ...   for ever again: a master that was restarted finds it by itself
    follow    one member at a time: its snapshots, each checked whole and made durable before it counts
    relay     if it is to: connections between peers that the master names (wire.md 11)
    serve     members whose group has lost its state ask for the newest revision; also while the master is away
    check     what was fetched from here is read once more: damaged since, it is set aside for the next older whole one.
              Not before it is offered: who asks waits for seconds only, and would go on without it

It decides nothing: which state a group goes on with is the election of its members (proto/wire.md 6).
"""

from __future__ import annotations

import logging
import os
import random
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from pyccl import errors
from pyccl._io import agreement, envelope, statestream, tls
from pyccl._io.absence import Absence
from pyccl._io.address import join_address
from pyccl._io.backoff import FIRST_S, Backoff
from pyccl._io.causes import reason_of
from pyccl._io.dialing import FAILURES
from pyccl._io.front import Front, MasterAt, Name, Reach
from pyccl._io.meeting import MEET_S, Meetings, NoRoomError, owner_of
from pyccl._io.portmap import open_mapping
from pyccl._io.resolver import Resolver
from pyccl._io.statestore import Kept, StateStore, held, opened
from pyccl._io.statestream import StateServer
from pyccl._io.strangers import Notes, Places, origin
from pyccl._io.tls import Credentials, Line, socket_of
from pyccl._native.handles import Relay
from pyccl._proto import limits
from pyccl._proto.epoch import Address, Member
from pyccl._proto.messages import (
    Addresses,
    Alive,
    Evicted,
    Heartbeat,
    Members,
    Message,
    Observe,
    PeerRefused,
    PeerWelcome,
    Rejected,
    RelayFor,
    RelayHello,
    RelayOver,
    StateHello,
    StateOffer,
    Welcome,
)
from pyccl._proto.restoring import SHUNNED_S, Sources

_CONNECT_S: Final = 10.0
_GREET_S: Final = 10.0
_STRANGERS_MAX: Final = 64

Pair = frozenset[tuple[bytes, bytes]]

log = logging.getLogger("pyccl.observer")


@dataclass(frozen=True, slots=True)
class ObserverConfig:
    host: str
    port: int
    group: int
    every: int  # revisions from one kept state to the next
    library: str
    credentials: Credentials | None = None  # None: the master is spoken to in plain
    reach: Reach = field(default_factory=Reach)
    relay_max: int | None = None  # bytes per second that it relays; 0: no cap; None: it does not


def _pair(one: Member, other: Member) -> Pair:
    return frozenset({(one.peer, one.incarnation), (other.peer, other.incarnation)})


class Observer:
    """Run with ``run`` until cancelled. told: called with what people and scripts want to know, a line each."""

    def __init__(self, config: ObserverConfig, store: StateStore, told: Callable[[str], None]) -> None:
        self._config, self._store, self._told = config, store, told
        credentials = config.credentials
        self.peer = secrets.token_bytes(limits.ID_BYTES) if credentials is None else credentials.peer
        self._incarnation = secrets.token_bytes(limits.ID_BYTES)
        self._addresses: tuple[Address, ...] = ()
        self._front: Front | None = None
        self._relay: Relay | None = None  # once the master has said how often peers beat
        self._meetings: Meetings | None = None
        self._may_meet: dict[Pair, float] = {}  # two peers, and until when
        self._may_meet_changed = trio.Event()
        self._run_id: bytes | None = None
        self._members: tuple[Member, ...] = ()
        self._members_changed = trio.Event()
        self._fetched = trio.Event()
        self._server = StateServer(
            lambda: self._run_id, self.peer, self._incarnation,
            drops=False, sent=self._was_fetched, credentials=credentials,
        )  # fmt: skip
        self._using = trio.Lock()  # the store
        self._strangers, self._notes = Places(_STRANGERS_MAX, _GREET_S), Notes(log)
        self._absence = Absence(log, f"{config.host}:{config.port}")
        self._sources = Sources()
        self._have = self._last()

    async def run(self) -> None:
        """RejectedError: the master refuses it. RemoteProtocolError: what answers there is no master."""
        trio.socket.set_custom_hostname_resolver(Resolver())
        self._offer_newest()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._follow)
                nursery.start_soon(self._check)
                await self._control(nursery)
        finally:
            if self._front is not None:
                self._front.close()
            if self._relay is not None:
                self._relay.stop()

    def _last(self) -> int:
        """What was kept last, its revision + 1; 0: nothing."""
        last = max(self._store.kept, key=lambda kept: kept.written_ns, default=None)
        return 0 if last is None else last.revision + 1

    def _offer_newest(self) -> None:
        while (newest := self._store.newest) is not None:
            try:
                self._server.offer(opened(newest))
            except FileNotFoundError as e:
                self._store.forget(newest, e)
            except OSError as e:  # no descriptor: what was offered before is better than nothing
                log.warning("state_not_opened path=%s cause=%s", newest.path, e.strerror)
                return
            else:
                return
        self._server.offer(None)

    def _was_fetched(self) -> None:
        self._fetched.set()

    async def _check(self) -> None:
        while True:
            await self._fetched.wait()
            self._fetched = trio.Event()
            async with self._using:
                while (newest := self._store.newest) is not None:
                    if await trio.to_thread.run_sync(self._store.check, newest):
                        break
                    self._have = self._last()
                    self._offer_newest()
                    self._told(f"holding {held(self._store)}")

    # ---- the master

    async def _control(self, nursery: trio.Nursery) -> None:
        backoff = Backoff(random.random)
        while True:
            try:
                with trio.fail_after(_CONNECT_S):
                    stream = await tls.reach(self._config.host, self._config.port, self._config.credentials)
            except (OSError, UnicodeError, trio.BrokenResourceError) as e:
                self._absence.note(reason_of(e))
            except trio.TooSlowError:
                self._absence.note("no answer")
            except (errors.RejectedError, errors.RemoteProtocolError) as e:
                if self._run_id is None:
                    raise
                log.warning("master_refused cause=%s", e)
            else:
                met = trio.current_time()
                try:
                    await self._talk(stream, nursery)
                    self._absence.note("it closed the connection")
                except trio.TooSlowError:
                    self._absence.note("it is silent")
                except (OSError, trio.BrokenResourceError) as e:
                    self._absence.note(reason_of(e))
                except (errors.RejectedError, errors.RemoteProtocolError) as e:
                    if self._run_id is None:
                        raise
                    log.warning("master_refuses cause=%s", e)
                finally:
                    await trio.aclose_forcefully(stream)
                backoff.connected_for(trio.current_time() - met)
            await trio.sleep(backoff.next_pause())

    async def _talk(self, stream: Line, nursery: trio.Nursery) -> None:
        """One life of the control connection."""
        sock = socket_of(stream)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        local = sock.socket.getsockname()[0]
        if self._front is None:
            config = self._config
            master, me = MasterAt(config.host, config.port, config.credentials), Name(self.peer, self._incarnation)
            front = Front(config.reach, master, me, nursery, self._accept, self._readdress, open_mapping)
            await front.open(local)
            self._front, self._addresses = front, front.addresses
            self._told("listening on " + " ".join(join_address(a.host, a.port) for a in front.addresses))
        observe = Observe(
            *(limits.PROTOCOL_VERSION, self._config.library, self._config.group),
            *(self.peer, self._incarnation, self._addresses),
            relays=self._config.relay_max is not None,
        )
        told = self._addresses
        await stream.send_all(envelope.pack(observe))
        with trio.fail_after(_GREET_S):
            welcome = await envelope.receive(stream)
        if isinstance(welcome, Rejected):
            raise errors.RejectedError(welcome.reason)
        if welcome is None:
            return
        if not isinstance(welcome, Welcome):
            raise errors.RemoteProtocolError(f"{type(welcome).__name__} in answer to Observe")
        self._run_id = welcome.run
        self._absence.over()
        self._told(f"observing run {welcome.run.hex()[:8]} as {self.peer.hex()}")
        await self._front.welcomed(local, welcome.observed, remote=welcome.remote)
        peer_timeout = welcome.peer_timeout_ms / 1000
        if self._meetings is None and self._config.relay_max is not None:
            self._relay = Relay(peer_timeout, self._config.relay_max)
            self._meetings = Meetings(self._relay)
        broken: Exception | None = None
        async with trio.open_nursery() as beating:
            beating.start_soon(self._beat, stream, peer_timeout / limits.HEARTBEATS_PER_TIMEOUT, told)
            try:
                while True:
                    with trio.fail_after(peer_timeout):
                        message = await envelope.receive(stream)
                    if message is None:
                        break
                    self._hear(message)
            except (errors.RemoteProtocolError, trio.TooSlowError, trio.BrokenResourceError) as e:
                broken = e  # raised outside: a nursery wraps what leaves it
            beating.cancel_scope.cancel()
        if broken is not None:
            raise broken

    def _readdress(self, addresses: tuple[Address, ...]) -> None:
        self._addresses = addresses

    async def _beat(self, stream: Line, pause_s: float, told: tuple[Address, ...]) -> None:
        while True:
            try:
                if told != self._addresses:
                    told = self._addresses
                    await stream.send_all(envelope.pack(Addresses(told)))
                await stream.send_all(envelope.pack(Heartbeat()))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return  # who reads notices, too
            await trio.sleep(pause_s)

    def _hear(self, message: Message) -> None:
        if isinstance(message, Members):
            log.info("members epoch=%d count=%d", message.epoch, len(message.members))
            self._members = message.members
            self._server.know(message.members)
            self._members_changed.set()
            self._members_changed = trio.Event()
        elif isinstance(message, RelayFor):
            now = trio.current_time()
            self._may_meet = {pair: until for pair, until in self._may_meet.items() if until > now}
            self._may_meet[_pair(message.one, message.other)] = now + limits.PUNCH_S
            self._may_meet_changed.set()
            self._may_meet_changed = trio.Event()
        elif isinstance(message, RelayOver):
            out = set(message.peers)
            self._may_meet = {
                pair: until for pair, until in self._may_meet.items() if out.isdisjoint(peer for peer, _ in pair)
            }
            if self._meetings is not None:
                for peer in message.peers:
                    self._meetings.forget(peer)
        elif not isinstance(message, Alive | Evicted):
            raise errors.RemoteProtocolError(f"{type(message).__name__} to an observer")

    # ---- serving

    async def _accept(self, stream: trio.SocketStream) -> None:
        try:
            hello: Message | None = None
            with self._strangers.place(origin(stream)):
                hello = await envelope.receive(stream, limits.BODY_GREETING_MAX_BYTES)
                if not isinstance(hello, StateHello | RelayHello):
                    raise errors.RemoteProtocolError("the first message is neither StateHello nor RelayHello")
            if isinstance(hello, RelayHello):
                await self._carry(stream, hello)
            elif isinstance(hello, StateHello):
                log.info("asked peer=%s", hello.from_peer.hex()[:8])
                await self._server.serve(stream, hello)
        except FAILURES as e:
            self._notes.tell("stranger_refused", e)
        finally:
            await trio.aclose_forcefully(stream)

    async def _carry(self, stream: trio.SocketStream, hello: RelayHello) -> None:
        """One end of a connection between two peers, which both come here."""
        ends = Member(hello.from_peer, hello.from_incarnation), Member(hello.to_peer, hello.to_incarnation)
        is_allowed = False
        with self._strangers.place(origin(stream)), trio.move_on_after(MEET_S):
            while self._meetings is not None and not (is_allowed := _pair(*ends) in self._may_meet):
                await self._may_meet_changed.wait()  # the master's word may be on its way
        if self._meetings is None or not is_allowed or hello.run != self._run_id:
            await stream.send_all(envelope.pack(PeerRefused("this observer does not relay between these two")))
            return
        owner = b""
        with trio.fail_after(MEET_S):
            if self._config.credentials is not None:
                _, identity = await agreement.accept_whose(stream, hello, hello.from_peer, self._config.credentials)
                owner = owner_of(identity)
        if _pair(*ends) not in self._may_meet:
            raise errors.RemoteProtocolError("one of the two has left the run meanwhile")

        async def ready() -> trio.SocketStream:
            await stream.send_all(envelope.pack(PeerWelcome(limits.PROTOCOL_VERSION)))
            return stream

        reason = "the other does not come"
        try:
            if await self._meetings.meet(hello, ready, owner):
                return
        except NoRoomError as e:
            reason = str(e)
        await stream.send_all(envelope.pack(PeerRefused(reason)))

    # ---- following

    async def _follow(self) -> None:
        """One member at a time, another when it ends or serves what is no state."""
        while True:
            changed = self._members_changed
            source = self._sources.next(self._members, trio.current_time())
            if source is None:
                with trio.move_on_after(SHUNNED_S):
                    await changed.wait()
                continue
            try:
                await self._take_from(source)
            except errors.StateFileError as e:
                log.error("state_refused peer=%s cause=%s", source.peer.hex()[:8], e)
                self._sources.shun(source, trio.current_time())
            except (errors.RemoteProtocolError, OSError, trio.TooSlowError, trio.BrokenResourceError) as e:
                log.info("source_lost peer=%s cause=%r", source.peer.hex()[:8], e)
            await trio.sleep(FIRST_S * (1 + random.random()))

    async def _take_from(self, source: Member) -> None:
        assert self._run_id is not None and self._front is not None
        me = Member(self.peer, self._incarnation, self._addresses, self._front.seen)
        stream = await statestream.ask(
            self._run_id, me, source, self._have, self._config.every, self._config.credentials
        )
        async with stream:
            log.info("following peer=%s", source.peer.hex()[:8])
            while True:
                offer = await statestream.next_offer(stream)
                if source not in self._members:
                    return
                if offer is not None:
                    kept = await self._receive(stream, offer)
                    self._have = kept.revision + 1
                    self._offer_newest()
                    self._told(f"kept revision {kept.revision} {kept.path}")

    async def _receive(self, stream: trio.abc.ReceiveStream, offer: StateOffer) -> Kept:
        """Durable when it returns. StateFileError: other bytes than what was offered."""
        fd = self._store.incoming()
        try:
            await statestream.receive_file(stream, offer, fd)
            async with self._using:
                return await trio.to_thread.run_sync(self._store.take, fd, offer.revision)
        except BaseException:
            self._store.refuse()
            raise
        finally:
            os.close(fd)
