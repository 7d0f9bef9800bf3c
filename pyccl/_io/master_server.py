"""The master's Trio shell: accepts control and pulse connections and carries out what MasterMachine decides.

Bounds on strangers: so many at a time, so many bytes and seconds until the first message; their places, and some for
the operator of a secure run, are beside those of all who have said it. Bounds on everybody: so many bytes that wait for
one receiver that does not read, so many for all of them (the one with most goes), so many long messages under way at a
time, and so many seconds for each. Spec: proto/wire.md 1, 2.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

import trio

from pyccl._io import envelope, tls
from pyccl._io.admission import CLOSE_S, OPERATOR_ONLY, PLAIN_REFUSED, Admission, FullError, Run
from pyccl._io.causes import reason_of
from pyccl._io.identity import Identity
from pyccl._io.interfaces import canonical
from pyccl._io.journal import Journal
from pyccl._io.meeting import Meetings, NoRoomError, owner_of
from pyccl._io.probe import Prober
from pyccl._io.sampling import Sampler
from pyccl._io.sealed import SealedStream
from pyccl._io.signing import Signer
from pyccl._io.strangers import Notes, Places, origin
from pyccl._io.tls import Guest, Line
from pyccl._native.handles import CIPHER_AES, FRAME_BYTES, Keys, Relay, is_heartbeat_untrusted
from pyccl._proto import limits, master, planning
from pyccl._proto.invites import RefusedError
from pyccl._proto.master_records import PeerKey
from pyccl._proto.messages import (
    Alive,
    DialTold,
    Hello,
    Message,
    Observe,
    PeerRefused,
    PeerWelcome,
    Probe,
    Pulse,
    PulseKeys,
    Reflect,
    Reflected,
    Rejected,
    RelayHello,
    Sample,
    clip,
)
from pyccl._proto.past import Past, Record
from pyccl.errors import RemoteProtocolError, UsageError

_TICK_S: Final = 0.1
_DEAD_MS: Final = 15_000  # unacknowledged data: the host is gone
CONNECTIONS_MAX: Final = 4096
_STRANGERS_MAX: Final = 256  # beside these, how many that have not said anything
_OPERATORS_MAX: Final = 64  # and how many of the operator, who has to be able to kick whoever has taken all others
BESIDE_MAX: Final = _STRANGERS_MAX + _OPERATORS_MAX
_WAITING_BYTES_MAX: Final = 16 << 20  # to one receiver that does not read
_WAITING_ALL_BYTES_MAX: Final = 256 << 20  # to all of them
_MESSAGE_BYTES: Final = 64  # that a message costs beside its own
WRITE_AGAIN_S: Final = 0.5  # after the journal could not be written
TRIES_PER_LINE: Final = 60  # of the log: one in half a minute
# What a connection may end with besides a clean end; the loss is its sender's.
_SENDERS_LOSS: Final = (RemoteProtocolError, OSError, trio.BrokenResourceError, trio.ClosedResourceError)

log = logging.getLogger("pyccl.master")


@dataclass(slots=True, eq=False)
class _Conn:
    stream: Line
    out: trio.MemorySendChannel[bytes]
    scope: trio.CancelScope
    waiting_bytes: int = 0


class MasterServer:
    """One run's master on one listening socket.

    past: the run, and this start's term; what an earlier master left of it. It is in the journal already.
    needs_majority, adopts: see MasterMachine. identity: it is secure: encrypted connections only, with an invite; None:
    plain ones only. remote: other machines reach it. relay: carries what peers can't send each other; stopped in the
    end. waiting_bytes_max, waiting_all_bytes_max: for one receiver that does not
    read, for all of them.
    """

    def __init__(
        self,
        past: Past,
        journal: Journal | None,
        peer_timeout: float,
        library: str,
        *,
        connections_max: int = CONNECTIONS_MAX,
        needs_majority: bool = False,
        adopts: bool = False,
        identity: Identity | None = None,
        remote: bool = False,
        relay: Relay | None = None,
        waiting_bytes_max: int = _WAITING_BYTES_MAX,
        waiting_all_bytes_max: int = _WAITING_ALL_BYTES_MAX,
    ) -> None:
        self._past, self._journal = past, journal
        self._needs_majority, self._adopts = needs_majority, adopts
        self._remote, self._relay = remote, relay
        self._meetings = None if relay is None else Meetings(relay)
        self._peer_timeout, self._library = peer_timeout, library
        self._machine: master.MasterMachine
        self._to_write: deque[tuple[Record, int | trio.Event]] = deque()  # and who waits: the machine, or a task
        self._write_wanted = trio.Event()
        self._searches: dict[int, master.Search] = {}  # by group: a newer one takes the place of one that waits
        self._search_wanted = trio.Event()
        self._connections_max = connections_max
        self._strangers = Places(_STRANGERS_MAX, limits.GREETING_S)
        self._long = envelope.long_places()
        self._waiting_bytes_max, self._waiting_all_bytes_max = waiting_bytes_max, waiting_all_bytes_max
        self._writing: set[_Conn] = set()
        self._waiting_bytes = 0  # of all of them
        self._notes = Notes(log)
        self._conns: dict[int, _Conn] = {}
        self._pulses: dict[bytes, trio.CancelScope] = {}  # by peer: one each, the newest
        self._conn_last = 0
        self._packed: tuple[Message | None, bytes] = None, b""
        self._open = self._inside = 0  # all; those who have said what they want, but for the operator
        self._reflections: dict[PeerKey, list[trio.CancelScope]] = {}
        self._prober, self._sampler = Prober(self._dialed_by_members), Sampler()
        self._dial_backs: dict[int, trio.MemorySendChannel[tuple[DialTold, ...]]] = {}  # by ticket: who waits for them
        self._dial_back_last = 0
        self._admission: Admission | None = None
        self._signer = None if identity is None else Signer(identity)
        if identity is not None:
            run = Run(lambda: self._machine.run, self._has, self._knows, self._kick, self._durable)
            self._admission = Admission(identity, past.admissions.copy(), run)

    async def serve(self, listener: trio.SocketListener) -> None:
        """Until cancelled."""
        self._machine = master.MasterMachine(
            self._past.run,
            self._past.term,
            self._peer_timeout,
            self._library,
            journaled=self._journal is not None,
            needs_majority=self._needs_majority,
            adopts=self._adopts,
            signer=self._signer,
            remote=self._remote,
            relays=self._relay is not None,
            past=self._past,
            now=trio.current_time(),
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tick)
            nursery.start_soon(self._search_plans)
            if self._journal is not None:
                nursery.start_soon(self._keep_journal, self._journal)
            try:
                await trio.serve_listeners(self._accept, [listener])
            finally:
                if self._relay is not None:
                    self._relay.stop()

    async def _tick(self) -> None:
        while True:
            self._perform(self._machine.tick(trio.current_time()))
            await trio.sleep(_TICK_S)

    async def _keep_journal(self, journal: Journal) -> None:
        """Write what is decided, all that waits at a time, and tell the machine when it is durable."""
        failed = 0
        while True:
            await self._write_wanted.wait()
            self._write_wanted = trio.Event()
            while self._to_write:
                batch = tuple(self._to_write)
                try:
                    await trio.to_thread.run_sync(journal.append, [record for record, _ in batch])
                except OSError as e:
                    if failed % TRIES_PER_LINE == 0:
                        log.error("journal_failed path=%s cause=%s: nothing is decided meanwhile", journal.path, e)
                    failed += 1
                    self._perform(self._machine.not_persisted(reason_of(e), trio.current_time()))
                    await trio.sleep(WRITE_AGAIN_S)
                else:
                    if failed:
                        log.info("journal_written path=%s tries=%d", journal.path, failed + 1)
                        failed = 0
                    for _, waits in batch:
                        self._to_write.popleft()
                        if isinstance(waits, trio.Event):
                            waits.set()
                        else:
                            self._perform(self._machine.persisted(waits, trio.current_time()))

    async def _search_plans(self) -> None:
        """One at a time, in a thread: nothing else waits for it but the safe point that asked."""
        while True:
            await self._search_wanted.wait()
            self._search_wanted = trio.Event()
            while self._searches:
                search = self._searches.pop(next(iter(self._searches)))
                found = await trio.to_thread.run_sync(planning.search, search.job, abandon_on_cancel=True)
                self._perform(self._machine.planned(search.group, search.ticket, found, trio.current_time()))

    # -- connections

    async def _accept(self, stream: trio.SocketStream) -> None:
        """One connection from its first byte to its last. What goes wrong here is its sender's loss only."""
        if self._open >= self._connections_max + BESIDE_MAX:
            self._notes.tell("connection_refused", f"{self._open} are open")
            await trio.aclose_forcefully(stream)
            return
        self._open += 1
        try:
            with trio.CancelScope() as scope, ExitStack() as counted:
                async with stream:
                    line: Line = stream
                    guest: Guest | None = None
                    first: Message | None = None
                    with self._strangers.place(origin(stream)):
                        line, guest = await self._enter(stream)
                        first = await self._first(line, guest, scope, counted)
                    if first is not None and self._is_let_in(guest, first, counted):
                        await self._serve(stream, line, guest, first)
        except _SENDERS_LOSS as e:
            self._notes.tell("connection_ended", reason_of(e))
        finally:
            self._open -= 1

    def _is_let_in(self, guest: Guest | None, first: Message, counted: ExitStack) -> bool:
        """There is room for it, which it has from here on."""
        if guest is not None and self._admission is not None and self._admission.is_for_operator(guest, first):
            return True
        if self._inside >= self._connections_max:
            self._notes.tell("connection_refused", f"{self._inside} are open")
            return False
        self._inside += 1
        counted.callback(self._goes)
        return True

    def _goes(self) -> None:
        self._inside -= 1

    async def _serve(self, stream: trio.SocketStream, line: Line, guest: Guest | None, first: Message) -> None:
        if isinstance(first, Pulse):
            await self._pulse(stream if guest is None else await _sealed(line), first)
        elif isinstance(first, Reflect):
            await self._reflect(line, first)
        elif isinstance(first, RelayHello):
            await self._carry(line, first, guest)
        elif isinstance(first, OPERATOR_ONLY):
            await self._operate(line, first)
        elif isinstance(first, Probe):
            await line.send_all(envelope.pack(await self._prober.answer(stream, first)))
        elif isinstance(first, Sample):
            await self._sampler.serve(line, first)
        else:
            await self._control(line, first, guest)

    async def _enter(self, stream: trio.SocketStream) -> tuple[Line, Guest | None]:
        """The connection as it is spoken on, and who it is from, which a plain one does not say."""
        if not await tls.is_encrypted(stream):
            return stream, None
        if self._admission is None:
            await stream.receive_some(limits.BODY_GREETING_MAX_BYTES)  # or closing would take the answer back
            await stream.send_all(tls.PLAIN_HERE)
            raise RemoteProtocolError("it begins encrypted, and this master is plain")
        return await self._admission.enter(stream)

    async def _first(
        self, line: Line, guest: Guest | None, scope: trio.CancelScope, counted: ExitStack
    ) -> Message | None:
        """The first message of who may come in with it. scope: around the connection, which counts until `counted` is
        closed."""
        connection = None
        if self._admission is not None and guest is not None:
            connection = counted.enter_context(self._admission.connection(guest, scope))
        first = await envelope.receive(line, limits.BODY_GREETING_MAX_BYTES)
        if first is None:
            return None
        try:
            if self._admission is not None:
                if connection is None:
                    raise RefusedError(PLAIN_REFUSED)
                await self._admission.admit(connection, first)
            elif isinstance(first, OPERATOR_ONLY):
                raise RefusedError("this master is plain, and its operator can't be told from others")
        except RefusedError as e:
            await line.send_all(envelope.pack(Rejected(clip(str(e)))))
            raise RemoteProtocolError(str(e)) from e
        except FullError as e:  # no Rejected, which is final
            self._notes.tell("connection_refused", e)
            return None
        return first

    async def _durable(self, records: Sequence[Record]) -> None:
        """Without a journal nothing is, and a master that is started later knows nothing of it."""
        if self._journal is None or not records:
            return
        written = trio.Event()
        self._to_write.extend((record, written) for record in records)
        self._write_wanted.set()
        await written.wait()

    def _knows(self, peer: bytes, incarnation: bytes) -> bool:
        return self._machine.knows(peer, incarnation)

    def _has(self, peer: bytes) -> bool:
        return self._machine.has(peer)

    def _kick(self, peer: bytes) -> bool:
        known = self._machine.has(peer)
        self._perform(self._machine.kick(peer, trio.current_time()))
        return known

    async def _operate(self, line: Line, first: Message) -> None:
        """What the operator wants, one thing after the other."""
        assert self._admission is not None
        message: Message | None = first
        while isinstance(message, OPERATOR_ONLY):
            try:
                answer = await self._admission.obey(message)
            except RefusedError as e:
                answer = Rejected(clip(str(e)))
            await line.send_all(envelope.pack(answer))
            with trio.move_on_after(limits.GREETING_S):
                message = await envelope.receive(line, limits.BODY_GREETING_MAX_BYTES)
                continue
            return

    async def _pulse(self, stream: trio.abc.ReceiveStream, pulse: Pulse) -> None:
        """Heartbeats of a peer's engine; they count as a sign of life and nothing else."""
        if pulse.version != limits.PROTOCOL_VERSION or not self._machine.knows(pulse.peer, pulse.incarnation):
            return
        if (older := self._pulses.get(pulse.peer)) is not None:
            older.cancel()
        with trio.CancelScope() as scope:
            self._pulses[pulse.peer] = scope
            try:
                await self._beats(stream, pulse)
            finally:
                if self._pulses.get(pulse.peer) is scope:
                    del self._pulses[pulse.peer]

    async def _beats(self, stream: trio.abc.ReceiveStream, pulse: Pulse) -> None:
        header = b""
        while part := await self._pulse_bytes(stream, FRAME_BYTES - len(header)):
            header += part
            if len(header) < FRAME_BYTES:
                continue
            if not is_heartbeat_untrusted(header) or not self._machine.knows(pulse.peer, pulse.incarnation):
                return
            header = b""
            self._perform(self._machine.heard(pulse.peer, pulse.incarnation, trio.current_time()))

    async def _pulse_bytes(self, stream: trio.abc.ReceiveStream, size: int) -> bytes:
        """Empty at the end, and after a long silence: a host that is gone never closes. Who lives makes another."""
        with trio.move_on_after(max(_DEAD_MS / 1000, 3 * self._machine.peer_timeout)):
            return bytes(await stream.receive_some(size))
        return b""

    async def _reflect(self, line: Line, first: Reflect) -> None:
        """Tell where it comes from; a peer of the run may hold some of these connections open, which keeps that so,
        for as long as it is in the run."""
        me = first.peer, first.incarnation
        held = self._reflections.setdefault(me, [])
        with trio.CancelScope() as scope:
            held.append(scope)
            try:
                await self._reflect_one(line, me, may_hold=len(held) <= limits.REFLECTIONS_MAX)
            finally:
                held.remove(scope)
                if not held and self._reflections.get(me) is held:
                    del self._reflections[me]

    async def _reflect_one(self, line: Line, me: PeerKey, *, may_hold: bool) -> None:
        sock = tls.socket_of(line)
        host, port = sock.socket.getpeername()[:2]
        if not may_hold:
            raise RemoteProtocolError(f"it holds {limits.REFLECTIONS_MAX} connections to see itself already")
        self._machine.reflected(*me, canonical(str(host)))
        await line.send_all(envelope.pack(Reflected(canonical(str(host)), int(port))))
        if self._machine.knows(*me) or self._machine.observes(*me):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            await line.receive_some(1)

    async def _dialed_by_members(self, host: str, port: int) -> tuple[DialTold, ...]:
        """What members say that were asked to connect there."""
        self._dial_back_last += 1
        ticket = self._dial_back_last
        send, receive = trio.open_memory_channel[tuple[DialTold, ...]](1)
        self._dial_backs[ticket] = send
        try:
            self._perform(self._machine.dial_back(ticket, host, port, trio.current_time()))
            return await receive.receive()
        finally:
            del self._dial_backs[ticket]

    async def _carry(self, line: Line, hello: RelayHello, guest: Guest | None) -> None:
        """One end of a connection between two peers; to us it is bytes from behind the greeting on."""
        ends = (hello.from_peer, hello.from_incarnation), (hello.to_peer, hello.to_incarnation)
        if self._meetings is None or not self._machine.are_to_be_linked(*ends):
            await line.send_all(envelope.pack(PeerRefused("this master does not relay between these two")))
            return

        async def ready() -> trio.SocketStream:
            await line.send_all(envelope.pack(PeerWelcome(limits.PROTOCOL_VERSION)))
            raw = tls.socket_of(line)
            if not isinstance(await envelope.receive(raw, limits.BODY_GREETING_MAX_BYTES), Alive):
                raise RemoteProtocolError("no Alive")  # until then nothing may come behind what is TLS
            return raw

        try:
            if not await self._meetings.meet(hello, ready, b"" if guest is None else owner_of(guest.identity)):
                await line.send_all(envelope.pack(PeerRefused("the other does not come")))
        except NoRoomError as e:
            self._notes.tell("relay_failed", e)
            await line.send_all(envelope.pack(PeerRefused(str(e))))
        except (UsageError, trio.TooSlowError) as e:
            self._notes.tell("relay_failed", e)

    async def _control(self, stream: Line, first: Message, guest: Guest | None) -> None:
        sock = tls.socket_of(stream)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAD_MS)
        address = canonical(str(sock.socket.getpeername()[0]))
        self._conn_last += 1
        number = self._conn_last
        send, receive = trio.open_memory_channel[bytes](2**31)
        conn = _Conn(stream, send, trio.CancelScope())
        try:
            async with trio.open_nursery() as nursery:
                conn.scope = nursery.cancel_scope
                self._conns[number] = conn
                self._writing.add(conn)
                if self._admission is not None and guest is not None and isinstance(first, Hello | Observe):
                    self._admission.came(number, guest, first, address)
                nursery.start_soon(self._write, conn, receive)
                self._perform(self._machine.connected(number, trio.current_time(), address))
                try:
                    await self._hear(envelope.Ahead(stream), number, first)
                except _SENDERS_LOSS as e:  # here and not outside: a nursery wraps what leaves it
                    self._notes.tell("connection_ended", reason_of(e))
                    nursery.cancel_scope.cancel()
                if number in self._conns:
                    nursery.cancel_scope.cancel()
        finally:
            self._conns.pop(number, None)
            if self._admission is not None:
                self._admission.went(number)
            self._writing.discard(conn)
            self._waits(conn, -conn.waiting_bytes)
            self._perform(self._machine.disconnected(number, trio.current_time()))

    async def _hear(self, stream: envelope.Ahead, number: int, first: Message) -> None:
        message: Message | None = first
        while message is not None and number in self._conns:
            self._perform(self._machine.receive(number, message, trio.current_time()))
            message = await envelope.receive(stream, lambda: self._machine.body_bytes_max(number), self._long)

    async def _write(self, conn: _Conn, messages: trio.MemoryReceiveChannel[bytes]) -> None:
        """Ends, and the connection with it, when the channel was closed and everything in it is written."""
        try:
            async for data in messages:
                await conn.stream.send_all(data)
                self._waits(conn, -len(data) - _MESSAGE_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        conn.scope.cancel()

    # -- effects

    def _perform(self, effects: list[master.Effect]) -> None:
        for effect in effects:
            _PERFORM[type(effect)](self, effect)

    def _do_send(self, effect: master.Send) -> None:
        conn = self._conns.get(effect.conn)
        if conn is None or conn not in self._writing:
            return
        if effect.message is not self._packed[0]:  # one message to many comes many times in a row
            self._packed = effect.message, envelope.pack(effect.message)
        data = self._packed[1] if conn.waiting_bytes else self._written_at_once(conn, self._packed[1])
        if not data:
            return
        self._waits(conn, len(data) + _MESSAGE_BYTES)
        conn.out.send_nowait(data)
        if conn.waiting_bytes > self._waiting_bytes_max:
            self._close_slow(conn)
        elif self._waiting_bytes > self._waiting_all_bytes_max:
            self._close_slow(max(self._writing, key=lambda other: other.waiting_bytes))

    @staticmethod
    def _written_at_once(conn: _Conn, data: bytes) -> bytes:
        """What is left when the socket's buffer has taken what it can: nearly always nothing, and no task wakes."""
        if not isinstance(conn.stream, trio.SocketStream):
            return data
        try:
            return data[os.write(conn.stream.socket.fileno(), data) :]  # Trio's sockets never block
        except OSError:
            return data  # the buffer is full, or the connection is broken, which `_write` meets, too

    def _waits(self, conn: _Conn, more_bytes: int) -> None:
        conn.waiting_bytes += more_bytes
        self._waiting_bytes += more_bytes

    def _close_slow(self, conn: _Conn) -> None:
        log.warning("connection_closed cause=slow_receiver waiting_bytes=%d", conn.waiting_bytes)
        self._writing.discard(conn)
        self._waits(conn, -conn.waiting_bytes)  # at once: the next in this moment need not go, too
        conn.scope.cancel()

    def _do_close(self, effect: master.Close) -> None:
        conn = self._conns.pop(effect.conn, None)
        if conn is not None:
            conn.out.close()
            conn.scope.deadline = trio.current_time() + CLOSE_S

    def _do_stranger_refused(self, effect: master.StrangerRefused) -> None:
        self._notes.tell("connection_refused", effect.reason)

    def _do_persist(self, effect: master.Persist) -> None:
        self._to_write.append((effect.record, effect.ticket))
        self._write_wanted.set()

    def _do_search(self, effect: master.Search) -> None:
        self._searches[effect.group] = effect
        self._search_wanted.set()

    def _do_dials_told(self, effect: master.DialsTold) -> None:
        waits = self._dial_backs.get(effect.ticket)
        if waits is not None:  # who asked may have hung up
            waits.send_nowait(effect.told)

    def _do_out(self, effect: master.Out) -> None:
        for scope in self._reflections.get((effect.peer, effect.incarnation), ()):
            scope.cancel()
        if self._meetings is not None:
            self._meetings.forget(effect.peer)

    def _do_log(self, effect: master.Log) -> None:
        log.info("%s %s", effect.event, " ".join(f"{key}={value}" for key, value in effect.fields.items()))


async def _sealed(line: Line) -> SealedStream:
    """What follows a Pulse: no TLS, which the peer's engine does not speak."""
    keys = PulseKeys(secrets.token_bytes(limits.KEY_BYTES), secrets.token_bytes(limits.KEY_BYTES))
    await line.send_all(envelope.pack(keys))
    return SealedStream(tls.socket_of(line), Keys(keys.masters, keys.peers, CIPHER_AES, False))


_PERFORM: Final[dict[type[master.Effect], Callable[[MasterServer, Any], None]]] = {
    master.Send: MasterServer._do_send,
    master.Close: MasterServer._do_close,
    master.Persist: MasterServer._do_persist,
    master.Search: MasterServer._do_search,
    master.DialsTold: MasterServer._do_dials_told,
    master.Out: MasterServer._do_out,
    master.Log: MasterServer._do_log,
    master.StrangerRefused: MasterServer._do_stranger_refused,
}
