"""The master's Trio shell: accepts control and pulse connections and carries out what MasterMachine decides.

Bounds on strangers: so many at a time, so many bytes and seconds until the first message. Bounds on everybody: so many
bytes that wait for one receiver that does not read, so many for all of them (the one with most goes), so many long
messages under way at a time, and so many seconds for each. Spec: proto/wire.md 1, 2.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import trio

from pyccl._io import envelope
from pyccl._io.causes import reason_of
from pyccl._io.journal import Journal
from pyccl._io.strangers import Notes, Places
from pyccl._native.handles import FRAME_BYTES, is_heartbeat_untrusted
from pyccl._proto import limits, master, planning
from pyccl._proto.messages import Message, Pulse
from pyccl._proto.past import Past
from pyccl.errors import RemoteProtocolError

_TICK_S: Final = 0.1
_CLOSE_S: Final = 2.0  # to deliver what was sent before a connection is closed
_DEAD_MS: Final = 15_000  # unacknowledged data: the host is gone
CONNECTIONS_MAX: Final = 4096
_STRANGERS_MAX: Final = 256  # of these, how many that have not said anything
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
    stream: trio.SocketStream
    out: trio.MemorySendChannel[bytes]
    scope: trio.CancelScope
    waiting_bytes: int = 0


class MasterServer:
    """One run's master on one listening socket.

    past: the run, and this start's term; what an earlier master left of it. It is in the journal already.
    needs_majority, adopts: see MasterMachine. waiting_bytes_max, waiting_all_bytes_max: for one receiver that does not
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
        waiting_bytes_max: int = _WAITING_BYTES_MAX,
        waiting_all_bytes_max: int = _WAITING_ALL_BYTES_MAX,
    ) -> None:
        self._past, self._journal = past, journal
        self._needs_majority, self._adopts = needs_majority, adopts
        self._peer_timeout, self._library = peer_timeout, library
        self._machine: master.MasterMachine
        self._to_write: deque[master.Persist] = deque()
        self._write_wanted = trio.Event()
        self._searches: dict[int, master.Search] = {}  # by group: a newer one takes the place of one that waits
        self._search_wanted = trio.Event()
        self._connections_max = connections_max
        self._strangers = Places(min(_STRANGERS_MAX, connections_max // 2 + 1), limits.GREETING_S)
        self._long = envelope.long_places()
        self._waiting_bytes_max, self._waiting_all_bytes_max = waiting_bytes_max, waiting_all_bytes_max
        self._writing: set[_Conn] = set()
        self._waiting_bytes = 0  # of all of them
        self._notes = Notes(log)
        self._conns: dict[int, _Conn] = {}
        self._conn_last = 0
        self._packed: tuple[Message | None, bytes] = None, b""
        self._open = 0

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
            past=self._past,
            now=trio.current_time(),
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tick)
            nursery.start_soon(self._search_plans)
            if self._journal is not None:
                nursery.start_soon(self._keep_journal, self._journal)
            await trio.serve_listeners(self._accept, [listener])

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
                    await trio.to_thread.run_sync(journal.append, [persist.record for persist in batch])
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
                    for _ in batch:
                        self._to_write.popleft()
                    self._perform(self._machine.persisted(batch[-1].ticket, trio.current_time()))

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
        if self._open >= self._connections_max:
            self._notes.tell("connection_refused", f"{self._open} are open")
            await trio.aclose_forcefully(stream)
            return
        self._open += 1
        try:
            async with stream:
                first: Message | None = None
                with self._strangers.place():
                    first = await envelope.receive(stream, limits.BODY_GREETING_MAX_BYTES)
                if isinstance(first, Pulse):
                    await self._pulse(stream, first)
                elif first is not None:
                    await self._control(stream, first)
        except _SENDERS_LOSS as e:
            self._notes.tell("connection_ended", reason_of(e))
        finally:
            self._open -= 1

    async def _pulse(self, stream: trio.SocketStream, pulse: Pulse) -> None:
        """Heartbeats of a peer's engine; they count as a sign of life and nothing else."""
        if pulse.version != limits.PROTOCOL_VERSION or not self._machine.knows(pulse.peer, pulse.incarnation):
            return
        header = b""
        while part := await self._pulse_bytes(stream, FRAME_BYTES - len(header)):
            header += part
            if len(header) < FRAME_BYTES:
                continue
            if not is_heartbeat_untrusted(header) or not self._machine.knows(pulse.peer, pulse.incarnation):
                return
            header = b""
            self._perform(self._machine.heard(pulse.peer, pulse.incarnation, trio.current_time()))

    async def _pulse_bytes(self, stream: trio.SocketStream, size: int) -> bytes:
        """Empty at the end, and after a long silence: a host that is gone never closes. Who lives makes another."""
        with trio.move_on_after(max(_DEAD_MS / 1000, 3 * self._machine.peer_timeout)):
            return bytes(await stream.receive_some(size))
        return b""

    async def _control(self, stream: trio.SocketStream, first: Message) -> None:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAD_MS)
        self._conn_last += 1
        number = self._conn_last
        send, receive = trio.open_memory_channel[bytes](2**31)
        conn = _Conn(stream, send, trio.CancelScope())
        try:
            async with trio.open_nursery() as nursery:
                conn.scope = nursery.cancel_scope
                self._conns[number] = conn
                self._writing.add(conn)
                nursery.start_soon(self._write, conn, receive)
                self._perform(self._machine.connected(number, trio.current_time()))
                try:
                    await self._hear(envelope.Ahead(stream), number, first)
                except _SENDERS_LOSS as e:  # here and not outside: a nursery wraps what leaves it
                    self._notes.tell("connection_ended", reason_of(e))
                    nursery.cancel_scope.cancel()
                if number in self._conns:
                    nursery.cancel_scope.cancel()
        finally:
            self._conns.pop(number, None)
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
            conn.scope.deadline = trio.current_time() + _CLOSE_S

    def _do_stranger_refused(self, effect: master.StrangerRefused) -> None:
        self._notes.tell("connection_refused", effect.reason)

    def _do_persist(self, effect: master.Persist) -> None:
        self._to_write.append(effect)
        self._write_wanted.set()

    def _do_search(self, effect: master.Search) -> None:
        self._searches[effect.group] = effect
        self._search_wanted.set()

    def _do_log(self, effect: master.Log) -> None:
        log.info("%s %s", effect.event, " ".join(f"{key}={value}" for key, value in effect.fields.items()))


_PERFORM: Final[dict[type[master.Effect], Callable[[MasterServer, Any], None]]] = {
    master.Send: MasterServer._do_send,
    master.Close: MasterServer._do_close,
    master.Persist: MasterServer._do_persist,
    master.Search: MasterServer._do_search,
    master.Log: MasterServer._do_log,
    master.StrangerRefused: MasterServer._do_stranger_refused,
}
