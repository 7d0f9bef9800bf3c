"""Observer: what ``pyccl-peer`` does in a run. It holds the shared state and takes part in nothing.

    control   Observe -> Welcome, Members ...   for ever again: a master that was restarted finds it by itself
    follow    one member at a time: its snapshots, each checked whole and made durable before it counts
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
from dataclasses import dataclass
from typing import Final

import trio

from pyccl import errors
from pyccl._io import envelope, statestream
from pyccl._io.absence import Absence
from pyccl._io.backoff import FIRST_S, Backoff
from pyccl._io.causes import reason_of
from pyccl._io.links import listen
from pyccl._io.resolver import Resolver
from pyccl._io.statestore import Kept, StateStore, held, opened
from pyccl._io.statestream import StateServer
from pyccl._io.strangers import Notes, Places
from pyccl._proto import limits
from pyccl._proto.epoch import Address, Member
from pyccl._proto.messages import (
    Alive,
    Evicted,
    Heartbeat,
    Members,
    Message,
    Observe,
    Rejected,
    StateHello,
    StateOffer,
    Welcome,
)
from pyccl._proto.restoring import SHUNNED_S, Sources

_CONNECT_S: Final = 10.0
_GREET_S: Final = 10.0
_STRANGERS_MAX: Final = 64

log = logging.getLogger("pyccl.observer")


@dataclass(frozen=True, slots=True)
class ObserverConfig:
    host: str
    port: int
    group: int
    every: int  # revisions from one kept state to the next
    library: str


class Observer:
    """Run with ``run`` until cancelled. told: called with what people and scripts want to know, a line each."""

    def __init__(self, config: ObserverConfig, store: StateStore, told: Callable[[str], None]) -> None:
        self._config, self._store, self._told = config, store, told
        self.peer, self._incarnation = secrets.token_bytes(limits.ID_BYTES), secrets.token_bytes(limits.ID_BYTES)
        self._addresses: tuple[Address, ...] = ()
        self._run_id: bytes | None = None
        self._members: tuple[Member, ...] = ()
        self._members_changed = trio.Event()
        self._fetched = trio.Event()
        self._server = StateServer(
            lambda: self._run_id, self.peer, self._incarnation, drops=False, sent=self._was_fetched
        )
        self._using = trio.Lock()  # the store
        self._strangers, self._notes = Places(_STRANGERS_MAX, _GREET_S), Notes(log)
        self._absence = Absence(log, f"{config.host}:{config.port}")
        self._sources = Sources()
        self._have = self._last()

    async def run(self) -> None:
        """RejectedError: the master refuses it. RemoteProtocolError: what answers there is no master."""
        trio.socket.set_custom_hostname_resolver(Resolver())
        self._offer_newest()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow)
            nursery.start_soon(self._check)
            await self._control(nursery)

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
                    stream = await trio.open_tcp_stream(self._config.host, self._config.port)
            except (OSError, UnicodeError) as e:
                self._absence.note(reason_of(e))
            except trio.TooSlowError:
                self._absence.note("no answer")
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

    async def _talk(self, stream: trio.SocketStream, nursery: trio.Nursery) -> None:
        """One life of the control connection."""
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if not self._addresses:
            listener, address = await listen(stream.socket.getsockname()[0])
            self._addresses = (address,)
            nursery.start_soon(trio.serve_listeners, self._accept, [listener])
            self._told(f"listening on {address.host}:{address.port}")
        observe = Observe(
            *(limits.PROTOCOL_VERSION, self._config.library, self._config.group),
            *(self.peer, self._incarnation, self._addresses),
        )
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
        peer_timeout = welcome.peer_timeout_ms / 1000
        broken: Exception | None = None
        async with trio.open_nursery() as beating:
            beating.start_soon(self._beat, stream, peer_timeout / limits.HEARTBEATS_PER_TIMEOUT)
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

    async def _beat(self, stream: trio.SocketStream, pause_s: float) -> None:
        while True:
            try:
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
        elif not isinstance(message, Alive | Evicted):
            raise errors.RemoteProtocolError(f"{type(message).__name__} to an observer")

    # ---- serving

    async def _accept(self, stream: trio.SocketStream) -> None:
        try:
            hello: Message | None = None
            with self._strangers.place():
                hello = await envelope.receive(stream, limits.BODY_GREETING_MAX_BYTES)
                if not isinstance(hello, StateHello):
                    raise errors.RemoteProtocolError("the first message is no StateHello")
            if isinstance(hello, StateHello):
                log.info("asked peer=%s", hello.from_peer.hex()[:8])
                await self._server.serve(stream, hello)
        except (errors.RemoteProtocolError, OSError, trio.TooSlowError, trio.BrokenResourceError) as e:
            self._notes.tell("stranger_refused", e)
        finally:
            await trio.aclose_forcefully(stream)

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
        assert self._run_id is not None
        me = Member(self.peer, self._incarnation, self._addresses)
        stream = await statestream.ask(self._run_id, me, source, self._have, self._config.every)
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

    async def _receive(self, stream: trio.SocketStream, offer: StateOffer) -> Kept:
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
