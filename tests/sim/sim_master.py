"""The simulated master process: the real MasterMachine, and what _io/master_server.py does around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sim_world import CLOSE, Conn, Process

from pyccl._proto import master

if TYPE_CHECKING:
    from sim_cluster import SimCluster
    from sim_peer import SimPeer

TICK_S: Final = 0.1


class SimMaster(Process):
    def __init__(self, cluster: SimCluster) -> None:
        super().__init__(cluster.world, "master")
        self.cluster = cluster
        self.machine = master.MasterMachine(b"R" * 16, 1, cluster.options.peer_timeout, "sim")
        if cluster.bug == "blames_others":
            self.machine._silent_since = lambda: 0.0  # type: ignore[method-assign]
        self._numbers: dict[Conn, int] = {}
        self._conns: dict[int, Conn] = {}
        self._last = 0
        self.soon(TICK_S, self._tick)

    def deliver(self, conn: Conn, message: Any) -> bool:
        now = self.world.now_s
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
            self._perform(self.machine.heard(peer.peer, peer.incarnation, self.world.now_s))

    def _tick(self) -> None:
        self.soon(TICK_S, self._tick)
        self._perform(self.machine.tick(self.world.now_s))

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
                        self._perform(self.machine.disconnected(number, self.world.now_s))
                case master.Log(event, fields):
                    self.world.note("master: %s %s", event, fields)
                    self.cluster.checks.master_log(event, fields)
