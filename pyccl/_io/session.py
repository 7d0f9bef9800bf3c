"""Session: one incarnation of a communicator in the run. A Trio program in a thread of its own.

It joins three parties that must not know each other: the member machine (decides), the engine (moves data) and the
user's threads (call and wait). All machine inputs happen in the Trio thread, one after the other; effects are carried
out in order before the next input.

    user threads --run_sync_soon--> machine <-- control connection, engine events, timers
    user threads <--Waiter--------- effects --> engine, links, control connection

The view (epoch, members) is an immutable object that user threads read; collectives never come through here.
"""

from __future__ import annotations

import logging
import random
import socket
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from pyccl import errors
from pyccl._io import envelope, tcpinfo, tls
from pyccl._io.absence import Absence
from pyccl._io.backoff import Backoff
from pyccl._io.causes import reason_of
from pyccl._io.front import Front, MasterAt, Name, Reach
from pyccl._io.links import AUTO_CONNECTIONS, LinkEvents, LinkPath, Links, Outside
from pyccl._io.linktable import LinkTable
from pyccl._io.observed import Observed
from pyccl._io.packer import Bytes, Packer
from pyccl._io.portmap import open_mapping
from pyccl._io.probe import dial
from pyccl._io.resolver import Resolver
from pyccl._io.tls import Credentials, Line, socket_of
from pyccl._native import status
from pyccl._native.handles import Engine, Event, EventType, Op, Relay
from pyccl._proto import limits, member
from pyccl._proto import plan as plans
from pyccl._proto.epoch import Address, Member
from pyccl._proto.messages import (
    CAUSE_PROTOCOL,
    CAUSE_REFUSED,
    CAUSE_SILENT,
    Count,
    Key,
    Message,
    OpReport,
    Path,
    Pulse,
    Welcome,
)

STALL_S: Final = 30.0
MASTER_TIMEOUT_S: Final = 20.0  # less than STALL_S, whose error would name the wrong cause
MISMATCH_GRACE_S: Final = 5.0
_TICK_S: Final = 0.1
_TRAFFIC_S: Final = 1.0  # over which traffic is counted: what comes in a burst after a loss is no rate
_SLICE_S: Final = 0.1  # longest wait of a user thread without a look at Python's signal handlers
_ATTEMPT_LEAST_S: Final = 1.0  # to connect to the master of a run we are in
_ATTEMPT_MOST_S: Final = 10.0
_REFUSED: Final = (errors.RejectedError, errors.RemoteProtocolError)
_LEAVE_S: Final = 2.0
_ENDING_S: Final = 10.0  # more than it ever takes from the engine's end to the thread's
_EPOCHS_KEPT: Final = 64  # member lists of past epochs, for the info of operations that ended in them

log = logging.getLogger("pyccl.session")


@dataclass(frozen=True, slots=True)
class SessionConfig:
    host: str
    port: int
    group: int
    connections: int | None  # None: chosen by the path
    library: str
    credentials: Credentials | None = None  # None: the master is spoken to in plain
    max_upload: int = 0  # bytes per second; 0: no cap
    max_download: int = 0
    reach: Reach = field(default_factory=Reach)
    mismatch_grace: float = MISMATCH_GRACE_S
    stall_timeout: float = STALL_S
    master_timeout: float = MASTER_TIMEOUT_S  # an operation that can't go on without an absent master waits so long

    @property
    def relay_max(self) -> int:
        """Bytes per second that it carries for others, which come and go: half of the lower cap; 0: no cap."""
        return min([cap for cap in (self.max_upload, self.max_download) if cap], default=0) // 2


@dataclass(frozen=True, slots=True)
class View:
    """What the user sees of an epoch."""

    epoch: int
    epoch_id: bytes
    members: tuple[bytes, ...]
    world_size: int


class Waiter:
    """A user thread that waits for the session. Interruptible by Ctrl-C; fulfilled once."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._error: BaseException | None = None

    def finish(self, error: BaseException | None = None) -> None:
        if not self._event.is_set():
            self._error = error
            self._event.set()

    @property
    def finished(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raise what it was failed with."""
        if self._error is not None:
            raise self._error

    def wait(self, timeout: float) -> bool:
        """True: fulfilled; raises what it was failed with. False: the time ran out.

        In slices: a Ctrl-C that the system hands to another thread, or just before the wait, does not end a wait.
        """
        until = time.monotonic() + timeout
        while not self._event.wait(min(_SLICE_S, max(0.0, until - time.monotonic()))):
            if time.monotonic() >= until:
                return False
        self.check()
        return True


class Session:
    """Start with ``start``; ends by itself when the run is left, or by ``close``."""

    def __init__(self, config: SessionConfig, peer: bytes, incarnation: bytes) -> None:
        self.config = config
        self.peer, self.incarnation = peer, incarnation
        self.engine: Engine | None = None
        self.view = View(0, bytes(16), (), 0)
        self.pending = 0
        self.error: errors.PycclError | None = None  # set once, when out of the run
        self.sync_given_up = False  # by the caller of the sync_shared_state that runs
        self._machine: member.MemberMachine | None = None
        self._thread: threading.Thread | None = None
        self._closing = False
        self._token: trio.lowlevel.TrioToken | None = None
        self._joined, self._closed = Waiter(), Waiter()
        self._topology: Waiter | None = None
        self._watched: dict[int, Waiter] = {}
        self._watch_last, self._watch_lock = 0, threading.Lock()
        self._members: dict[int, tuple[bytes, ...]] = {}
        self._mismatch: tuple[str, tuple[str, ...], tuple[str, ...]] = ("", (), ())
        self.blocked: set[object] = set()  # one for each caller that waits in an operation: for mismatch detection
        self._fetches: dict[int, Callable[[int, int], None]] = {}
        self._packers: dict[int, Packer] = {}  # sync -> who packs what is published under it
        self._fetch_last = 0
        self._fetch_lock = threading.Lock()
        self.table = LinkTable()
        self.observed = Observed(self, peer, incarnation)
        # below: only touched in the Trio thread
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._links: Links | None = None
        self._front: Front | None = None
        self._out: trio.MemorySendChannel[Message] | None = None
        self._hung_up = trio.Event()
        self._effects: deque[member.Effect] = deque()
        self._performing = False
        self._cut_version, self._cut_number = 0, 0
        self._arrived_at = 0.0
        self._down_since = self._needed_since = 0.0
        self._traffic_at = 0.0
        self._pulse_wanted = trio.Event()
        self._absence = Absence(log, f"{config.host}:{config.port}")
        self._ended_by = ""  # why the last control connection did, if not by the master

    # ---- called by user threads --------------------------------------------------------------------------------------

    def launch(self, joined: Waiter, reach_timeout: float) -> None:
        """Begin to join the run; `joined` is fulfilled as a member, or with why not. Then, or before, ``close``."""
        self._joined, self._reach_timeout = joined, reach_timeout
        thread = threading.Thread(target=self._thread_main, name="pyccl-control", daemon=True)
        thread.start()
        self._thread = thread  # now others may join it

    def close(self) -> None:
        """Leave the run and end the thread. Idempotent, callable from any thread, waits at most a few seconds."""
        self.leave_soon()
        if self._thread is not None and threading.current_thread() is not self._thread:
            self._thread.join()

    def leave_soon(self) -> None:
        """As ``close``, without waiting for the end."""
        self._closing = True  # for a thread that has not begun
        self._soon(self._leave)

    def leave_because(self, error: errors.PycclError) -> None:
        """As ``leave_soon``; later calls raise `error`."""
        if self.error is None:
            self.error = error
        self.leave_soon()

    def arrive(self, waiter: Waiter, unreachable_timeout: float) -> None:
        """Stand at the safe point until the next epoch, or until the master has been away too long."""
        self._soon(lambda: self._arrive(waiter, unreachable_timeout), waiter)

    def withdraw(self, waiter: Waiter) -> None:
        """Go back from the safe point, if still there."""
        self._soon(lambda: self._withdraw(waiter))

    def watch(self, waiter: Waiter) -> int:
        """It is fulfilled when the operation submitted with this number has ended, and when the session has."""
        with self._watch_lock:
            self._watch_last += 1
            number = self._watch_last
            if self._thread is not None and not self._closed.finished:
                self._watched[number] = waiter
                return number
        waiter.finish()
        return number

    def unwatch(self, number: int) -> None:
        self._watched.pop(number, None)

    def cancel_soon(self, op: Op) -> None:
        """As ``op.cancel()``, which waits for the engine's thread, but without waiting."""
        self._soon(op.cancel)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A user thread, or task, is blocked in an operation."""
        token = object()
        try:
            self.blocked.add(token)
            yield
        finally:
            self.blocked.discard(token)

    def need_engine(self) -> Engine:
        """The data plane, as long as there is one."""
        engine = self.engine
        if engine is None:
            raise self.error or errors.UsageError("the communicator is closed")
        return engine

    def check_sync(self) -> None:
        """For the thread that fetches state: raises when there is no use in going on."""
        if self.error is not None:
            raise self.error
        if self.sync_given_up:
            raise errors.PeerLostError("sync_shared_state: given up here")

    def last_error(self) -> errors.PycclError:
        """Why the run was left. For an operation that ended because of it: the reason is there, or on its way."""
        if self.error is None:
            self._closed.wait(_ENDING_S)
        return self.error or errors.UsageError("the communicator is closed")

    def members_of(self, epoch: int) -> tuple[bytes, ...]:
        return self._members.get(epoch, self.view.members)

    def mismatch_error(self, what: str) -> errors.MismatchError:
        detail, peers, fields = self._mismatch
        return errors.MismatchError(f"{what}: {detail or 'the members called different things'}", peers, fields)

    def slot_of(self, peer: bytes) -> int | None:
        links = self._links
        return None if links is None else links.slot_of(peer)

    def fetch(
        self, slot: int, sync: int, offset: int, dst: object, then: Callable[[int, int], None], *, packed: bool
    ) -> int:
        """Read published state from a holder; `then(status, packed bytes)` is called in the Trio thread when it ended.
        packed: it may come so; 0 packed bytes: it did not. Its number."""
        engine = self.need_engine()
        with self._fetch_lock:
            self._fetch_last += 1
            fetch = self._fetch_last
            self._fetches[fetch] = then
        try:
            engine.fetch(slot, sync, offset, dst, fetch, packed)
        except errors.UsageError:  # the holder was removed, or the engine stopped, since the caller looked
            self._fetches.pop(fetch, None)
            then(status.PEER_LOST, 0)
        return fetch

    def publish(self, sync: int, arrays: Sequence[Bytes]) -> None:
        """Serve these bytes, one array behind the other, as they are or packed, until ``unpublish``."""
        engine = self.need_engine()
        engine.publish(sync, arrays)
        self._packers[sync] = Packer(engine, sync, arrays)

    def unpublish(self, sync: int, engine: Engine) -> None:
        """The memory is the caller's again. engine: that it was published on, which may have stopped since."""
        try:
            self._packers.pop(sync).close()
        finally:  # Ctrl-C may break off the wait for the packer; what that still reads goes to nobody then
            engine.unpublish(sync)

    def cancel_fetch(self, fetch: int) -> bool:
        """True: its buffer is the caller's again and its `then` is not called. False: it was, or is about to be."""
        engine = self.engine
        if engine is None or not engine.cancel_fetch(fetch):
            return False
        self._fetches.pop(fetch, None)
        return True

    def forget_fetches(self) -> None:
        """Their buffers are the caller's again, and none of their `then` is called any more."""
        engine = self.engine
        if engine is not None:
            engine.forget_fetches()
            self._fetches.clear()

    def start_soon(self, task: Callable[[], Awaitable[None]], waiter: Waiter) -> None:
        """Run `task` in the Trio thread, which fulfils the waiter; if that is over, the waiter is told so."""

        def start() -> None:
            if self._nursery is None or self._scope.cancel_called:
                waiter.finish(self.error or errors.UsageError("the communicator is closed"))
            else:
                self._nursery.start_soon(task)

        self._soon(start, waiter)

    def place(self) -> tuple[bytes, Member] | None:
        """(run, what others know us by), once there is one."""
        machine, front = self._machine, self._front
        if machine is None or machine.run is None or front is None:
            return None
        return machine.run, Member(self.peer, self.incarnation, machine.addresses, front.seen)

    def soon(self, call: Callable[[], None]) -> bool:
        """Run it in the Trio thread. False: that is over."""
        return self._soon(call)

    def _soon(self, call: Callable[[], None], waiter: Waiter | None = None) -> bool:
        """Run `call` in the Trio thread; if that is over, the waiter is told so."""
        error = self.error or errors.UsageError("the communicator is closed")
        token = self._token
        try:
            if token is None:
                raise trio.RunFinishedError
            token.run_sync_soon(call)
        except trio.RunFinishedError:
            if waiter is not None:
                waiter.finish(error)
            return False
        return True

    # ---- the Trio thread ---------------------------------------------------------------------------------------------

    def _thread_main(self) -> None:
        error: BaseException | None = None
        try:
            trio.run(self._main)
        except BaseException as e:  # a bug of ours must not leave threads waiting for ever
            log.exception("session_failed peer=%s", self.peer.hex()[:8])
            error = errors.PycclError(f"internal error: {e!r}")
            error.__cause__ = e
        finally:
            final = self.error or error or errors.UsageError("the communicator is closed")
            if self.error is None:
                self.error = final if isinstance(final, errors.PycclError) else None
            if self.engine is not None:
                self.engine.stop(status.EVICTED if isinstance(final, errors.EvictedError) else status.CLOSED)
                self.engine = self._links = None  # it is freed, with its descriptors, once no operation refers to it
            for then in list(self._fetches.values()):
                then(status.CLOSED, 0)
            self._fetches.clear()
            for waiter in (self._joined, self._topology):
                if waiter is not None:
                    waiter.finish(final)
            with self._watch_lock:
                self._closed.finish()
                watched, self._watched = self._watched, {}
            for waiter in watched.values():
                waiter.finish()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        trio.socket.set_custom_hostname_resolver(Resolver())
        if self._closing:  # from here on whoever closes has the token
            self._scope.cancel()
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(self._control)
                    nursery.start_soon(self._tick)
        finally:
            if self._links is not None:
                self._links.stop()
            if self._front is not None:
                self._front.close()

    def _finish(self, error: errors.PycclError) -> None:
        """Out of the run: the thread ends, and with it everything it made."""
        if self.error is None:
            self.error = error
        self._scope.cancel()

    # -- the control connection

    async def _control(self) -> None:
        """Connect, talk, connect again: for ever once we were welcome, for `reach_timeout` before."""
        started, welcome = trio.current_time(), False
        backoff = Backoff(random.random)
        address = f"{self.config.host}:{self.config.port}"
        cause: object = "no answer"
        while True:
            left = started + self._reach_timeout - trio.current_time()
            try:
                with trio.fail_after(self._attempt_s() if welcome else max(0.001, left)):
                    stream = await tls.reach(self.config.host, self.config.port, self.config.credentials)
            except (OSError, UnicodeError, trio.BrokenResourceError) as e:  # UnicodeError: a name that IDNA refuses
                cause = reason_of(e)
            except trio.TooSlowError:
                pass  # what was said before says more
            except _REFUSED as e:
                if not welcome:
                    self._finish(type(e)(f"{address}: {e}"))
                    return
                cause = e  # who is on the line now may be somebody else tomorrow
            else:
                met, silent = trio.current_time(), False
                self._down_since = met
                try:
                    if welcome:
                        await self._talk(stream)
                    else:
                        with trio.CancelScope(deadline=started + self._reach_timeout) as scope:
                            await self._talk(stream, on_welcome=lambda: setattr(scope, "deadline", float("inf")))
                        silent = scope.cancelled_caught
                    if not silent:
                        cause = self._ended_by or "it closed the connection"
                    elif cause == "no answer":  # else the time ran out in one more attempt
                        cause = "something listens there and does not answer"
                except errors.RemoteProtocolError as e:
                    if self._machine is None or self._machine.run is None:
                        self._finish(errors.RemoteProtocolError(f"{address} does not speak pyccl: {e}"))
                        return
                    cause = f"it broke the protocol: {e}"
                if self._machine is not None:
                    self._feed(self._machine.disconnected(trio.current_time()))
                    welcome = welcome or self._machine.run is not None
                if self._machine is not None and self._machine.run is not None:
                    backoff.bound(self._machine.peer_timeout)
                backoff.connected_for(trio.current_time() - met)
            if welcome:
                started = trio.current_time()
            elif trio.current_time() >= started + self._reach_timeout:
                self._finish(errors.MasterUnavailableError(f"no master at {address}: {cause}"))
                return
            if not (self._closing or self._scope.cancel_called):
                self._absence.note(cause)
            await trio.sleep(backoff.next_pause())

    def _attempt_s(self) -> float:
        """SYNs are repeated at intervals that double, too: rather begin anew."""
        assert self._machine is not None
        return min(_ATTEMPT_MOST_S, max(_ATTEMPT_LEAST_S, self._machine.peer_timeout / 2))

    async def _talk(self, stream: Line, on_welcome: Callable[[], None] = lambda: None) -> None:
        """One life of the control connection. Returns when it ended."""
        sock = socket_of(stream)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 15_000)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        machine = await self._prepare(sock)
        send, receive = trio.open_memory_channel[Message](2**31)
        broken: errors.RemoteProtocolError | None = None
        self._ended_by = ""
        with send, receive:
            async with sock, trio.open_nursery() as nursery:
                self._out, self._hung_up = send, trio.Event()
                nursery.start_soon(self._write, stream, receive, nursery.cancel_scope)
                try:
                    self._feed(machine.connected(trio.current_time()))
                    while True:
                        message = await envelope.receive(stream)
                        if message is None:
                            break
                        self._feed(machine.receive(message, trio.current_time()))
                        if isinstance(message, Welcome):
                            on_welcome()
                            self._absence.over()
                            await self._welcome(nursery, sock)
                except (trio.BrokenResourceError, trio.ClosedResourceError) as e:
                    self._ended_by = reason_of(e)
                except errors.RemoteProtocolError as e:
                    broken = e  # raised outside: a nursery wraps what leaves it
                finally:
                    self._out = None
                    self._hung_up.set()
                    nursery.cancel_scope.cancel()
        if broken is not None:
            raise broken

    async def _write(
        self, stream: Line, messages: trio.MemoryReceiveChannel[Message], scope: trio.CancelScope
    ) -> None:
        try:
            async for message in messages:
                await stream.send_all(envelope.pack(message))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            scope.cancel()

    async def _prepare(self, stream: trio.SocketStream) -> member.MemberMachine:
        """On the first contact: listen where the master's side of the network can reach us."""
        if self._machine is None:
            assert self._nursery is not None
            config, me = self.config, Name(self.peer, self.incarnation)
            master = MasterAt(config.host, config.port, config.credentials)
            front = Front(config.reach, master, me, self._nursery, self._accept, self._readdress, open_mapping)
            try:
                await front.open(stream.socket.getsockname()[0])
            except OSError as e:
                wanted = config.reach.listen
                if wanted is None:
                    raise
                self._finish(errors.UsageError(f"listen: {wanted.host}:{wanted.port}: {e.strerror}"))
                raise trio.ClosedResourceError from e
            self._front = front
            self._machine = member.MemberMachine(
                self.peer, self.incarnation, self.config.group, front.addresses, self.config.library
            )
        return self._machine

    async def _accept(self, stream: trio.SocketStream) -> None:
        assert self._links is not None  # nobody is accepted before there are some
        await self._links.accept(stream)

    def _readdress(self, addresses: tuple[Address, ...]) -> None:
        assert self._machine is not None
        self._feed(self._machine.readdress(addresses, trio.current_time()))

    def _outside(self, machine: member.MemberMachine, front: Front) -> Outside:
        config = self.config
        return Outside(
            config.reach.relay,
            MasterAt(config.host, config.port, config.credentials),
            seen=lambda: front.seen,
            is_behind_router=lambda: front.is_behind_router,
            may_punch=lambda: self._out is not None and front.may_punch,
            offer=lambda to, at, rtt_s: self._feed(machine.punch(to, at, rtt_s, trio.current_time())),
            ask_relay=lambda to, relay: self._feed(machine.ask_relay(to, relay, trio.current_time())),
            round_trip_s=self.table.round_trip_s,
        )

    async def _welcome(self, nursery: trio.Nursery, sock: trio.SocketStream) -> None:
        """Now peer_timeout is known: start the engine (once), and the pulse of this control connection."""
        machine, outer, front = self._machine, self._nursery, self._front
        assert machine is not None and machine.run is not None and outer is not None and front is not None
        if self.engine is None:
            config = self.config
            self.engine = Engine(
                self.peer, machine.peer_timeout, config.stall_timeout, config.max_upload, config.max_download,
                AUTO_CONNECTIONS if config.connections is None else 0,
            )  # fmt: skip
            me = Member(self.peer, self.incarnation, machine.addresses)
            events = LinkEvents(
                ready=lambda version: self._feed(machine.links_ready(version, trio.current_time())),
                failed=lambda version, who, why: self._feed(
                    machine.links_failed(version, who, why, trio.current_time())
                ),
                refused=lambda peer, why: self._feed(machine.suspect(peer, CAUSE_REFUSED, why, trio.current_time())),
                up=lambda peer: self._feed(machine.trust(peer, trio.current_time())),
                state=self.observed.serve,
            )
            relay = Relay(machine.peer_timeout, config.relay_max)
            self._links = Links(
                *(machine.run, me, self.engine, relay, config.connections, outer, events, config.credentials),
                self._outside(machine, front),
            )
            outer.start_soon(self._pump)
        await front.welcomed(sock.socket.getsockname()[0], machine.observed, remote=machine.remote)
        assert self._links is not None
        self._links.master_is_back()
        nursery.start_soon(self._pulse)
        nursery.start_soon(self._hang_up_on_silence, machine, sock.socket, nursery.cancel_scope)

    async def _hang_up_on_silence(
        self, machine: member.MemberMachine, sock: trio.socket.SocketType, connection: trio.CancelScope
    ) -> None:
        """Hang up when every heartbeat of a peer_timeout went without an answer, or, sooner, when nothing was even
        acknowledged.

        TCP repeats into a line that was cut at intervals that double, and so is silent for as long again after it is
        whole; a new connection gets through at once, and where an address changed nothing else ever does. Then the peer
        must be back before the master gives it up. A master that is stopped finds it when it goes on.
        """
        timeout, looks = machine.peer_timeout, 0
        while looks < 2:  # between two, what came while this process was stopped is read
            await trio.sleep(timeout / limits.HEARTBEATS_PER_TIMEOUT / 2)
            silent_s, unanswered_s = machine.master_silent_s(trio.current_time()), tcpinfo.unanswered_s(sock)
            silent = silent_s >= timeout or unanswered_s >= timeout * limits.HANG_UP_TIMEOUTS
            looks = looks + 1 if silent else 0
        self._ended_by = f"silent for {max(silent_s, unanswered_s):.1f} s"
        connection.cancel()

    async def _pulse(self) -> None:
        """Keep a pulse connection while the control connection lives: heartbeats that need no GIL."""
        assert self.engine is not None
        while True:
            self._pulse_wanted = trio.Event()
            try:
                with trio.fail_after(self._attempt_s()):
                    await self._pulse_over(self.engine)
                await self._pulse_wanted.wait()
            except (OSError, trio.BrokenResourceError, trio.TooSlowError, *_REFUSED) as e:
                log.debug("pulse_failed cause=%s", reason_of(e))
            await trio.sleep(1.0)

    async def _pulse_over(self, engine: Engine) -> None:
        stream = await tls.reach(self.config.host, self.config.port, self.config.credentials)
        async with socket_of(stream) as sock:
            await stream.send_all(envelope.pack(Pulse(limits.PROTOCOL_VERSION, self.peer, self.incarnation)))
            keys = None if self.config.credentials is None else await tls.leave(stream)
            engine.pulse(sock.socket.detach(), keys)

    # -- effects

    def _feed(self, effects: list[member.Effect]) -> None:
        """Carry out effects in order; effects that lead to further inputs queue theirs behind."""
        self._effects.extend(effects)
        if self._performing:
            return
        self._performing = True
        try:
            while self._effects:
                effect = self._effects.popleft()
                _PERFORM[type(effect)](self, effect)
        finally:
            self._performing = False

    def _do_send(self, effect: member.Send) -> None:
        if self._out is not None:
            self._out.send_nowait(effect.message)

    def _do_open_links(self, effect: member.OpenLinks) -> None:
        assert self._links is not None
        self._links.open(effect.version, effect.peers)

    def _do_keep_links(self, effect: member.KeepLinks) -> None:
        assert self._links is not None
        self._links.keep(effect.peers)

    def _do_set_cut(self, effect: member.SetCut) -> None:
        assert self.engine is not None and self._machine is not None
        self._cut_version = effect.version
        self._cut_number += 1
        if self.engine.cut(effect.counts):
            self._feed(self._machine.behind(effect.version, self._counts(), trio.current_time()))

    def _do_clear_cut(self, effect: member.ClearCut) -> None:
        assert self.engine is not None
        self._cut_number += 1
        self.engine.uncut()

    def _do_freeze(self, effect: member.Freeze) -> None:
        assert self.engine is not None and self._machine is not None
        self._watch_blocked(trio.current_time())  # what the report goes with must not be older than it
        try:
            ops = tuple([OpReport(*op) for op in self.engine.freeze()])
        except errors.OutcomeUnknownError:
            self._left()
            return
        self._feed(self._machine.frozen(effect.ballot, ops, trio.current_time()))

    def _do_enter(self, effect: member.Enter) -> None:
        assert self.engine is not None and self._machine is not None
        epoch = effect.epoch
        # Before the engine: operations may end in it at once, and their callers look here.
        self._members[epoch.number] = epoch.peers
        for number in sorted(self._members)[:-_EPOCHS_KEPT]:
            del self._members[number]
        self.view = View(epoch.number, epoch.id, epoch.peers, effect.world_size)
        plan = plans.decode_untrusted(epoch.plan, len(epoch.peers))  # judged with the epoch
        try:
            self.engine.enter(
                *(epoch.number, epoch.id, epoch.peers, effect.rank, effect.restart, effect.mismatch, effect.verdicts),
                *(plan.shares, plan.ring, plan.ring_from_bytes, plan.piece_bytes, plan.ring_pace),
            )
        except errors.OutcomeUnknownError:
            self._left()
            return
        except errors.UsageError as e:  # what the master decided can't be obeyed: we hold other facts than it thinks
            self._finish(errors.RemoteProtocolError(f"the master's epoch {epoch.number} contradicts what is here: {e}"))
            return
        log.info("epoch_entered number=%d world=%d peer=%s", epoch.number, len(epoch.peers), self.peer.hex()[:8])
        self.observed.enter(epoch.number)
        self._feed(self._machine.entered(epoch.number, trio.current_time()))

    def _do_joined(self, effect: member.Joined) -> None:
        self._joined.finish()

    def _do_need_counts(self, effect: member.NeedCounts) -> None:
        assert self._machine is not None
        self._feed(self._machine.arrive(self._counts(), trio.current_time()))

    def _do_safe_point_done(self, effect: member.SafePointDone) -> None:
        waiter, self._topology = self._topology, None
        if waiter is not None:
            waiter.finish(None if effect.error is None else self.mismatch_error("update_topology"))

    def _do_pending(self, effect: member.PendingChanged) -> None:
        self.pending = effect.count

    def _do_mismatch(self, effect: member.MismatchNotice) -> None:
        self._mismatch = (effect.detail, effect.peers, effect.fields)
        log.warning("mismatch detail=%s", effect.detail)

    def _do_ended(self, effect: member.Ended) -> None:
        log.info("run_ended peer=%s kind=%s reason=%s", self.peer.hex()[:8], effect.kind, effect.reason)
        kinds: dict[str, type[errors.PycclError]] = {
            "rejected": errors.RejectedError,
            "evicted": errors.EvictedError,
        }
        if effect.kind in kinds:
            self._finish(kinds[effect.kind](effect.reason))

    def _do_peer_moved(self, effect: member.PeerMoved) -> None:
        assert self._links is not None
        self._links.moved(effect.peer)

    def _do_offer_punch(self, effect: member.OfferPunch) -> None:
        assert self._links is not None
        self._links.punch_offered(effect.peer, effect.count)

    def _do_begin_punch(self, effect: member.BeginPunch) -> None:
        assert self._links is not None
        self._links.punch_begins(effect.peer, effect.endpoints, effect.delay_s)

    def _do_meet(self, effect: member.MeetAtRelay) -> None:
        assert self._links is not None
        self._links.called(effect.peer, effect.relay)

    def _do_dial_back(self, effect: member.DialBack) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._dial_back, effect)

    async def _dial_back(self, effect: member.DialBack) -> None:
        reason = await dial(effect.host, effect.port)
        assert self._machine is not None
        self._feed(self._machine.dialed(effect.ticket, reason, trio.current_time()))

    def _do_relays(self, effect: member.RelaysChanged) -> None:
        assert self._links is not None
        self._links.offered(effect.relays)

    def _do_observers(self, effect: member.ObserversChanged) -> None:
        self.observed.know(effect.observers)

    def _counts(self) -> tuple[Count, ...]:
        assert self.engine is not None
        return tuple([Count(*count) for count in self.engine.counts()])

    # -- calls

    def _arrive(self, waiter: Waiter, unreachable_timeout: float) -> None:
        machine = self._machine
        if self.error is not None or machine is None or machine.state is not member.State.MEMBER:
            waiter.finish(self.error or errors.UsageError("the communicator is not connected"))
            return
        if self._topology is not None:
            waiter.finish(errors.UsageError("another call is in update_topology() already"))
            return
        self._topology, self._unreachable_timeout = waiter, unreachable_timeout
        self._arrived_at = trio.current_time()
        news = self.table.news(self.view.members, self._indirect())
        if news is not None:
            self._feed(machine.measured(news, trio.current_time()))
        self._feed(machine.arrive(self._counts(), trio.current_time()))

    def _indirect(self) -> dict[bytes, tuple[int, bytes]]:
        """Members that we are not linked to as directly as can be."""
        paths = self._links.paths() if self._links is not None else {}
        return {peer: (link.path, link.via) for peer, link in paths.items() if link.path != Path.DIRECT}

    def paths(self) -> dict[bytes, LinkPath]:
        """Any thread."""
        links = self._links
        return {} if links is None else links.paths()

    def _withdraw(self, waiter: Waiter) -> None:
        if self._topology is waiter and self._machine is not None:
            self._topology = None
            self._feed(self._machine.withdraw(trio.current_time()))

    def _leave(self) -> None:
        """Tell the master, give it a moment to hear it, and end."""
        if self._nursery is None or self._scope.cancel_called:
            self._scope.cancel()
            return
        if self._machine is not None:
            self._feed(self._machine.leave(trio.current_time()))
        self._nursery.start_soon(self._linger)

    async def _linger(self) -> None:
        if self._out is not None:
            with trio.move_on_after(_LEAVE_S):
                await self._hung_up.wait()  # the master answers Leave by closing the connection
        self._scope.cancel()

    # -- engine events and time

    async def _pump(self) -> None:
        assert self.engine is not None
        while True:
            await trio.lowlevel.wait_readable(self.engine.fd)
            for event in self.engine.events():
                handler = _EVENTS.get(event.type)
                if handler is not None:
                    handler(self, event)

    def _on_op(self, event: Event) -> None:
        waiter = self._watched.pop(event.value, None)
        if waiter is not None:
            waiter.finish()

    def _on_conn_down(self, event: Event) -> None:
        assert self._links is not None
        self._links.conn_down(event.slot, event.count)

    def _suspect(self, slot: int, cause: str, detail: str) -> None:
        assert self._links is not None and self._machine is not None
        peer = self._links.peer_of(slot)
        if peer is not None:
            log.warning("peer_suspected peer=%s cause=%s detail=%s", peer.hex()[:8], cause, detail)
            self._feed(self._machine.suspect(peer, cause, detail, trio.current_time()))

    def _on_silent(self, event: Event) -> None:
        assert self._links is not None
        self._links.silent(event.slot)
        self._suspect(event.slot, CAUSE_SILENT, "nothing heard on any data connection")

    def _on_refused(self, event: Event) -> None:
        assert self._links is not None and self.engine is not None
        self._suspect(event.slot, CAUSE_PROTOCOL, "it sent what proto/wire.md forbids")
        if self._links.conn_refused(event.slot) and self.engine.conns(event.slot) > 0:
            self._on_heard(event)  # a new connection stood before this event was read

    def _on_heard(self, event: Event) -> None:
        assert self._links is not None and self._machine is not None
        self._links.heard(event.slot)
        peer = self._links.peer_of(event.slot)
        if peer is not None:
            self._feed(self._machine.trust(peer, trio.current_time()))

    def _on_settle(self, event: Event) -> None:
        assert self._machine is not None
        self._feed(self._machine.settle(trio.current_time()))

    def _on_leave(self, event: Event) -> None:
        self._left()

    def _left(self) -> None:
        """The engine has left the run and knows no operation any more. A message may tell us before its event does."""
        self._finish(errors.OutcomeUnknownError("left the run: the outcome of an operation could not be learned"))

    def _on_differs(self, event: Event) -> None:
        assert self._links is not None and self._machine is not None
        peer = self._links.peer_of(event.slot)
        if peer is not None and event.value == self.view.epoch:
            key = Key(event.space, event.tag, event.seq)
            self._feed(self._machine.differs(key, peer, event.mine, event.theirs, trio.current_time()))

    def _on_drained(self, event: Event) -> None:
        if event.value == self._cut_number and self._machine is not None:  # not of a cut that was raised meanwhile
            self._feed(self._machine.drained(self._cut_version, trio.current_time()))

    def _on_state(self, event: Event) -> None:
        assert self.engine is not None
        self.engine.fetched(event.value)
        then = self._fetches.pop(event.value, None)
        if then is not None:
            then(event.code, event.count)

    def _on_pack(self, event: Event) -> None:
        assert self.engine is not None
        packer = self._packers.get(event.value)
        if packer is None:  # it was published for a moment longer
            self.engine.packed(event.slot, event.value, event.seq, event.count, b"")
        else:
            packer.ask(event.slot, event.seq, event.count)

    def _on_link_wants(self, event: Event) -> None:
        assert self._links is not None
        self._links.grow(event.slot, event.count)

    def _on_pulse_down(self, event: Event) -> None:
        self._pulse_wanted.set()

    async def _tick(self) -> None:
        last = trio.current_time()
        while True:
            await trio.sleep(_TICK_S)
            now = trio.current_time()
            if now - last > limits.PAUSE_S:  # we were stopped ourselves: nobody made us wait meanwhile
                self._down_since = self._needed_since = self._arrived_at = now
            last = now
            if self._machine is None or self.engine is None:
                continue
            self._feed(self._machine.tick(now))
            self._watch_blocked(now)
            self._watch_master(now)
            self._watch_traffic()

    def _watch_blocked(self, now: float) -> None:
        """Tell the master when every call here waits for something another member has not done."""
        assert self.engine is not None and self._machine is not None
        grace = self.config.mismatch_grace
        at_safe_point = self._topology is not None and now - self._arrived_at >= grace
        if not at_safe_point and (not self.blocked or self._topology is not None):
            self._feed(self._machine.unblocked(now))
            return
        seen = self.engine.blocked()
        if seen.quiet_s >= grace and (at_safe_point or seen.lacking):
            lacking = tuple([Key(*key) for key in seen.lacking])
            self._feed(self._machine.blocked(lacking, seen.below_cut, now))
        else:
            self._feed(self._machine.unblocked(now))

    def _watch_traffic(self) -> None:
        """Operations show what the links carry."""
        assert self.engine is not None and self._links is not None
        now = time.monotonic()
        if not (self.blocked or self._watched) or now - self._traffic_at < _TRAFFIC_S:
            return
        self._traffic_at = now
        slots = {peer: self._links.slot_of(peer) for peer in self.view.members}
        self.table.carried({p: self.engine.delivered(slot)[0] for p, slot in slots.items() if slot is not None}, now)

    def _watch_master(self, now: float) -> None:
        """A safe point needs the master, and so does an operation with a lost peer; none waits for one that stays away.

        Time counts from the call: how long the master was away before it says nothing of whether it is back by now.
        """
        assert self._machine is not None and self.engine is not None
        away = self._machine.master_is_away(now)
        if not (away and self._machine.needs_master):
            self._needed_since = now
        elif now - self._needed_since >= self.config.master_timeout:
            self.engine.give_up(status.MASTER_AWAY, self._machine.lost, self.config.master_timeout)
        if not away:
            self._down_since = now
        elif self._topology is not None and now - max(self._down_since, self._arrived_at) >= self._unreachable_timeout:
            waiter = self._topology
            self._withdraw(waiter)
            away_s = self._unreachable_timeout
            waiter.finish(
                errors.MasterUnavailableError(f"the master has been away for {away_s:g} s: {self._absence.cause}")
            )


_PERFORM: Final[dict[type[member.Effect], Callable[[Session, Any], None]]] = {
    member.Send: Session._do_send,
    member.OpenLinks: Session._do_open_links,
    member.KeepLinks: Session._do_keep_links,
    member.SetCut: Session._do_set_cut,
    member.ClearCut: Session._do_clear_cut,
    member.Freeze: Session._do_freeze,
    member.Enter: Session._do_enter,
    member.Joined: Session._do_joined,
    member.NeedCounts: Session._do_need_counts,
    member.SafePointDone: Session._do_safe_point_done,
    member.PendingChanged: Session._do_pending,
    member.ObserversChanged: Session._do_observers,
    member.PeerMoved: Session._do_peer_moved,
    member.OfferPunch: Session._do_offer_punch,
    member.BeginPunch: Session._do_begin_punch,
    member.MeetAtRelay: Session._do_meet,
    member.DialBack: Session._do_dial_back,
    member.RelaysChanged: Session._do_relays,
    member.MismatchNotice: Session._do_mismatch,
    member.Ended: Session._do_ended,
}
_EVENTS: Final[dict[int, Callable[[Session, Event], None]]] = {
    EventType.CONN_DOWN: Session._on_conn_down,
    EventType.LINK_SILENT: Session._on_silent,
    EventType.LINK_HEARD: Session._on_heard,
    EventType.LINK_REFUSED: Session._on_refused,
    EventType.OP: Session._on_op,
    EventType.SETTLE: Session._on_settle,
    EventType.LEAVE: Session._on_leave,
    EventType.DIFFERS: Session._on_differs,
    EventType.DRAINED: Session._on_drained,
    EventType.STATE: Session._on_state,
    EventType.PACK: Session._on_pack,
    EventType.PULSE_DOWN: Session._on_pulse_down,
    EventType.LINK_WANTS: Session._on_link_wants,
}
__all__ = ["Session", "SessionConfig", "View", "Waiter"]
