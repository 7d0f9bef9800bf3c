"""One peer of the group that ``pyccl bench memory`` watches: rounds of every kind of call, a few a second, for hours.

A round is plain, quantized and many concurrent all-reduces, one under a tag that was never used before, an exchange, an
advance of the shared state and its sync, and a safe point where somebody waits. The comer stays for some rounds, leaves
and comes back with another state, over and over, in one process. Nothing is recorded here: what grows is the library's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

import pyccl
from pyccl.bench.control import Control

CALL_TIMEOUT_S: Final = 60.0
PLAIN: Final = 16384  # elements of float32
MANY: Final = 8  # concurrent operations
FIRST_FRESH_TAG: Final = 100
ID_BYTES: Final = 16

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Settings:
    """What the owner tells a peer."""

    master: str
    founders: int
    number: int  # 0 .. founders - 1, or more for the comer
    state_bytes: int
    round_s: float  # from the start of a round to the next
    stay_rounds: int  # of the comer
    away_s: float
    sample_s: float

    @property
    def comes_and_goes(self) -> bool:
        return self.number >= self.founders


def run(settings: Settings, control: Control) -> None:
    """Take part until told to stop."""
    peer = _Peer(settings, control)
    control.say("ready")
    control.wait("go")
    if settings.comes_and_goes:
        peer.come_and_go()
    else:
        peer.stay()


class _Peer:
    def __init__(self, settings: Settings, control: Control) -> None:
        self._settings, self._control = settings, control
        self._comm = pyccl.Communicator(settings.master)
        numbers = np.full(max(settings.state_bytes // 4, PLAIN), settings.number, np.float32)
        self._state = pyccl.SharedState({"weights": numbers})
        self._x, self._out = np.zeros(PLAIN, np.float32), np.zeros(PLAIN, np.float32)
        self._many = [np.zeros(64 << i, np.float32) for i in range(MANY)]
        self._swap_out = np.zeros(1000, np.uint64)
        self._partner: str | None = None
        self._rounds = 0

    def stay(self) -> None:
        """A founder: there throughout."""
        settings, control = self._settings, self._control
        with self._comm as comm:
            while comm.group_world_size < settings.founders:
                comm.update_topology(CALL_TIMEOUT_S)
            self._partner = self._find_partner()
            self._sync()
            control.say("joined")
            ticked_s = time.monotonic()
            while not self._round(control.told("stop")):
                if time.monotonic() - ticked_s >= settings.sample_s:
                    ticked_s += settings.sample_s
                    control.say("tick", rounds=self._rounds)
        control.say("done", rounds=self._rounds, digest=self._state.digest())

    def come_and_go(self) -> None:
        settings, control = self._settings, self._control
        visits = 0
        while not control.told("stop"):
            self._comm.connect(CALL_TIMEOUT_S, CALL_TIMEOUT_S)
            self._state.arrays["weights"][:] = self._settings.number + visits  # what it left with is not what it brings
            self._state.revision = 0
            self._sync()
            visits += 1
            for _ in range(settings.stay_rounds):
                self._round(False)
            self._comm.close()
            time.sleep(settings.away_s)
        control.say("done", visits=visits)

    def _find_partner(self) -> str | None:
        """Of the founders, who stay: 0 and 1, 2 and 3, ..."""
        me = np.zeros(1 + ID_BYTES, np.uint8)
        me[0], me[1:] = self._settings.number, np.frombuffer(bytes.fromhex(self._comm.peer_id), np.uint8)
        ids = {int(row[0]): row[1:].tobytes().hex() for row in self._comm.all_gather(me, timeout=CALL_TIMEOUT_S)}
        return ids.get(self._settings.number ^ 1)

    def _round(self, stop: bool) -> bool:
        """Whether a member was told to stop: all see the same sum."""
        comm, started_s = self._comm, time.monotonic()
        self._rounds += 1
        works = [
            comm.all_reduce_async(array, tag=1 + i, timeout=CALL_TIMEOUT_S) for i, array in enumerate(self._many)
        ]
        fresh = FIRST_FRESH_TAG + self._state.revision  # equal on all, never used before
        works.append(comm.all_reduce_async(self._out, tag=fresh, quantize="uint8", timeout=CALL_TIMEOUT_S))
        for work in works:
            work.wait()
        self._x[0] = stop
        comm.all_reduce(self._x, out=self._out, timeout=CALL_TIMEOUT_S)
        comm.all_gather(self._many[0], timeout=CALL_TIMEOUT_S)
        if self._partner is not None:
            swap_in = np.full(1000, self._rounds, np.uint64)
            comm.exchange(swap_in, out=self._swap_out, partner=self._partner, timeout=CALL_TIMEOUT_S)
        for array in self._many:
            array[:] = 1
        weights = self._state.arrays["weights"]
        weights[:PLAIN] += 1
        self._state.revision += 1
        self._sync()
        stopped = bool(self._out[0] > 0)
        if not stopped:
            time.sleep(max(0.0, started_s + self._settings.round_s - time.monotonic()))
            if comm.are_peers_pending():
                comm.update_topology(CALL_TIMEOUT_S)
                self._sync()
        return stopped

    def _sync(self) -> None:
        self._comm.sync_shared_state(self._state, timeout=CALL_TIMEOUT_S)
