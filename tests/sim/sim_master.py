"""The simulated master process: the real MasterMachine, and what _io/master_server.py does around it.

Its journal is a `Disk`, which outlives it. What was written and is not durable yet may be there after a crash, or not.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sim_world import CLOSE, Conn, Process, World

from pyccl._io import journal
from pyccl._io.identity import Identity
from pyccl._io.signing import Signer
from pyccl._proto import master, planning
from pyccl._proto.past import (
    Began,
    Past,
    Record,
    make_term,
    record_from_plain,
    record_to_plain,
    start_of,
)

if TYPE_CHECKING:
    from sim_cluster import SimCluster
    from sim_peer import SimPeer

TICK_S: Final = 0.1
WRITE_AGAIN_S: Final = 0.5
SEARCH_S: Final = 3.0  # longer than a safe point waits
EFFORT: Final = 5_000  # enough for some plan
SIGNER: Final = Signer(Identity(Ed25519PrivateKey.from_private_bytes(bytes(32))))  # of all masters


class Disk:
    """The journal's file: the records that are durable, and those of which a crash may lose any byte."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.past = Past(b"R" * 16)
        self.written: list[Record] = []
        self.full = False
        self.doom_s: float | None = None  # the next write ends in a crash, for so long

    def crashed(self) -> None:
        """Of what was written and not synced a part is there, from the front: the real reader finds out which."""
        rng = self.world.rng
        framed, digest = journal._frame(self.past.to_plain(), journal._seed())
        data = journal._HEADER + framed
        durable = len(data)
        for record in self.written:
            framed, digest = journal._frame(record_to_plain(record), digest)
            data += framed
        self.written = []
        whole = rng.random() < 0.3
        kept = len(data) if whole else rng.randint(durable, len(data))
        self.past, size, _ = journal._parse(data[:kept], Path("journal"))
        self.world.note("the journal holds %d of %d bytes behind what was durable", size - durable, len(data) - durable)

    def lose(self) -> None:
        """The journal is gone, and the next master begins another run."""
        self.past = Past(self.world.rng.randbytes(16))

    def begin_term(self, nonce: int) -> Past | None:
        """What a master starts from, its start in it; None: there is no room for it, and it is to try again."""
        began = Began(make_term(start_of(self.past.term) + 1, nonce))
        past = self.past.copy()
        past.apply(began)
        if self.full:
            self.written = [began]
            return None
        self.past, self.written = past, []
        return past

    def sync(self, count: int) -> None:
        for record in self.written[:count]:
            self.past.apply(record_from_plain(record_to_plain(record)))
        del self.written[:count]


class SimMaster(Process):
    def __init__(self, cluster: SimCluster, disk: Disk, past: Past, *, adopts: bool = False) -> None:
        """past: with its start, durable.

        adopts: on the operator's word that the journal of the members' run is lost.
        """
        super().__init__(cluster.world, "master", 0)
        self.cluster, self.disk, self.adopts = cluster, disk, adopts
        journaled = cluster.options.journaled
        self.machine = master.MasterMachine(
            past.run,
            past.term,
            cluster.options.peer_timeout,
            "sim",
            journaled=journaled,
            needs_majority=not journaled,
            adopts=adopts or not journaled,
            signer=SIGNER if cluster.options.secure else None,
            past=past,
            now=self.now_s,
        )
        self._to_write: deque[master.Persist] = deque()
        self._is_writing = False
        self.accepted: list[Conn] = []
        self._numbers: dict[Conn, int] = {}
        self._conns: dict[int, Conn] = {}
        self._last = 0
        self.soon(TICK_S, self._tick)

    def deliver(self, conn: Conn, message: Any) -> bool:
        now = self.now_s
        number = self._numbers.get(conn)
        if message is CLOSE:
            conn.close(self, lossy=False)
            if number is not None and self._conns.pop(number, None) is not None:
                self._perform(self.machine.disconnected(number, now))
            return True
        if number is None:
            self._last += 1
            number = self._numbers[conn] = self._last
            self._conns[number] = conn
            self._perform(self.machine.connected(number, now))
        if number in self._conns:
            self._perform(self.machine.receive(number, message, now))
        return True

    def pulse(self, peer: SimPeer) -> None:
        self._do(self._pulse, (peer,), False)

    def _pulse(self, peer: SimPeer) -> None:
        if self.machine.knows(peer.peer, peer.incarnation):
            self._perform(self.machine.heard(peer.peer, peer.incarnation, self.now_s))

    def crash(self) -> None:
        """kill -9: the kernel closes everything, unsent messages are lost in part."""
        self.world.note("the master crashes")
        self.alive = False
        for conn in self.accepted:
            if not conn.closed[conn.end_of(self)]:
                conn.close(self, lossy=True)
        self.disk.crashed()

    # ---- the journal: as _keep_journal of master_server.py

    def _write(self) -> None:
        """The write leaves at once; that it is durable is known later, in a thread's time."""
        if self._is_writing or not self._to_write:
            return
        batch = tuple(self._to_write)
        self.disk.written = [persist.record for persist in batch]  # anew after a failure, of which a part may be there
        if self.disk.full:
            self._perform(self.machine.not_persisted("no space left", self.now_s))
            self.soon(WRITE_AGAIN_S, self._write)
            return
        self._is_writing = True
        self.cluster.faults.on_event("journal_written")
        doom_s, self.disk.doom_s = self.disk.doom_s, None
        if doom_s is not None:
            self.soon(self.world.rng.random() * self.cluster.options.sync_s, self.cluster.crash_master, doom_s)
        self.soon(self.world.rng.random() * self.cluster.options.sync_s, self._synced, batch, engine=True)

    def _synced(self, batch: tuple[master.Persist, ...]) -> None:
        self._is_writing = False
        self.disk.sync(len(batch))
        for _ in batch:
            self._to_write.popleft()
        self._perform(self.machine.persisted(batch[-1].ticket, self.now_s))
        self._write()

    def _searched(self, search: master.Search) -> None:
        found = planning.search(replace(search.job, effort=min(search.job.effort, EFFORT)))
        self._perform(self.machine.planned(search.group, search.ticket, found, self.now_s))

    def _tick(self) -> None:
        self.soon(TICK_S, self._tick)
        self._perform(self.machine.tick(self.now_s))

    def _perform(self, effects: list[master.Effect]) -> None:
        for effect in effects:
            match effect:
                case master.Send(number, message):
                    conn = self._conns.get(number)
                    if conn is not None:
                        conn.send(self, message)
                case master.Close(number):
                    conn = self._conns.pop(number, None)
                    if conn is not None:
                        conn.close(self, lossy=False)
                        self._perform(self.machine.disconnected(number, self.now_s))
                case master.Persist():
                    self._to_write.append(effect)
                    self._write()
                case master.Search():
                    self.soon(self.world.rng.random() * SEARCH_S, self._searched, effect)
                case master.Log(event, fields):
                    self.world.note("master: %s %s", event, fields)
                    self.cluster.checks.master_log(event, fields)
                    self.cluster.faults.on_event(event)
