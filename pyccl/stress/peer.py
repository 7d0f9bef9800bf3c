"""One process of a stress run: ``python -m pyccl.stress.peer SETTINGS``, started by `conductor`, settings in JSON.

It does what a training script does: safe point, sync, collectives, deterministic advance, again; out of the run it
connects again. It reports bits, members and errors on stdout, one JSON object a line, and judges nothing but whether
its own inputs are what they were. The first line on stdin lets it connect, the second asks it to leave; the end of
stdin ends it.
"""

from __future__ import annotations

import faulthandler
import json
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace
from typing import Any, Final, NoReturn

import numpy as np

import pyccl
from pyccl.cli import log as logs
from pyccl.processes import leash
from pyccl.stress import workload
from pyccl.stress.workload import Array, Op, Outcome

CALL_TIMEOUT_S: Final = 600.0  # the conductor's watchdog comes first
UNCONDITIONAL_EVERY: Final = 9  # rounds between safe points that nobody waits for
# What is planted, to see that it is found: by one peer, or by all (the others would mend it, it is rare).
CANARIES: Final = (
    "wrong-value",
    "lost-revision",
    "repeated-revision",
    "forked-state",
    "unrestored-input",
    "unknown-epoch",
    "hang",
)
CANARIES_OF_ALL: Final = ("lost-revision", "repeated-revision", "unrestored-input")
CANARY_REVISION: Final = 25
UNKNOWN_EPOCHS: Final = 1_000_000  # beyond any that the master decides on


@dataclass(frozen=True)
class Settings:
    """What the conductor tells a peer. canary: what this peer does wrong on purpose, to see that it is found."""

    master: str
    number: int
    seed: int
    digest: str = "fast"
    canary: str = ""


class OutOfRunError(Exception):
    """This peer is no member any more and has to connect again."""


class Peer:
    def __init__(self, settings: Settings, go: threading.Event, leaving: threading.Event) -> None:
        self._settings, self._go, self._leaving = settings, go, leaving
        self._comm = pyccl.Communicator(settings.master)
        self._state = workload.new_state(settings.digest)

    def run(self) -> None:
        """Until asked to leave."""
        say("ready", peer=self._comm.peer_id)
        self._go.wait()
        while not self._leaving.is_set():
            try:
                self._comm.connect(timeout=CALL_TIMEOUT_S)
            except (pyccl.RejectedError, pyccl.EvictedError, pyccl.MasterUnavailableError) as error:
                say("refused", **told(error))
                continue
            say("member", epoch=self._comm.epoch, members=self._comm.members)
            try:
                self._take_part()
            except OutOfRunError:
                continue
        self._comm.close()
        say("leaving")

    def _take_part(self) -> None:
        while not self._leaving.is_set():
            try:
                if self._comm.group_world_size < 2:
                    self._comm.update_topology(CALL_TIMEOUT_S)
                    continue
                sync = self._comm.sync_shared_state(self._state, timeout=CALL_TIMEOUT_S)
                revision = self._state.revision
                say(
                    "sync", revision=revision, digest=self._state.digest(), epoch=self._comm.epoch,
                    changed=sync.changed, rx_bytes=sync.rx_bytes, liars=sync.liars,
                )  # fmt: skip
                self._round(sync.members)
                if revision % UNCONDITIONAL_EVERY == 0 or self._comm.are_peers_pending():
                    self._comm.update_topology(CALL_TIMEOUT_S)
            except pyccl.PycclError as error:
                self._failed(error)

    def _failed(self, error: pyccl.PycclError) -> None:
        """Outside of the operations of a round."""
        say("failed", **told(error))
        if isinstance(error, pyccl.EvictedError | pyccl.OutcomeUnknownError):
            raise OutOfRunError from error

    # ---- a round

    def _round(self, members: tuple[str, ...]) -> None:
        seed, revision = self._settings.seed, self._state.revision
        started = time.monotonic()
        self._misbehave(revision)
        calls = [Call(self._comm, self._settings, revision, op) for op in self._ordered(revision)]
        for call in calls:
            call.start()
        with_whom = workload.partner(seed, revision, members, self._comm.peer_id)
        exchange = None if with_whom is None else self._exchange(with_whom, revision)
        for call in calls:
            call.finish()
        outcomes = [call.outcome for call in calls if call.outcome is not None]
        errors = [call.error for call in calls if call.error is not None]
        done = len(outcomes) == len(calls)
        if done and not self._is_canary("lost-revision", revision):
            workload.advance(self._state, outcomes)
            if self._is_canary("repeated-revision", revision):
                workload.advance(self._state, outcomes)
            if self._is_canary("forked-state", revision):
                self._state.arrays["weights"][0] ^= 1
        if self._is_canary("unknown-epoch", revision):
            outcomes = [replace(outcome, epoch=outcome.epoch + UNKNOWN_EPOCHS) for outcome in outcomes]
        rosters = list(dict.fromkeys((outcome.epoch, outcome.members) for outcome in outcomes))
        say(
            "round", revision=revision, done=done, seconds=time.monotonic() - started, rosters=rosters,
            ops=[(o.index, o.bits, rosters.index((o.epoch, o.members))) for o in outcomes],
            retries=sum(call.attempts - 1 for call in calls if call.outcome is not None),
            moved_bytes=sum(call.moved_bytes for call in calls), errors=errors, exchange=exchange,
        )  # fmt: skip
        if any(error["class"] in ("EvictedError", "OutcomeUnknownError") for error in errors):
            raise OutOfRunError

    def _ordered(self, revision: int) -> list[Op]:
        seed = self._settings.seed
        return workload.order(seed, revision, self._settings.number, workload.plan(seed, revision))

    def _exchange(self, with_whom: str, revision: int) -> dict[str, Any]:
        """Of no consequence for the state: only the two know how it ended."""
        x = workload.exchange_input(self._settings.seed, self._settings.number, revision)
        before, out = x.copy(), np.empty_like(x)
        try:
            info = self._comm.exchange(x, out=out, partner=with_whom, tag=revision % 3, timeout=CALL_TIMEOUT_S)
        except pyccl.PycclError as error:
            return {"partner": with_whom, "error": {**told(error), "restored": same(x, before)}}
        return {"partner": with_whom, "bits": workload.bits(out), "attempts": info.attempts, "kept": same(x, before)}

    def _is_canary(self, name: str, revision: int) -> bool:
        return self._settings.canary == name and revision == CANARY_REVISION

    def _misbehave(self, revision: int) -> None:
        if self._is_canary("hang", revision):
            threading.Event().wait()


class Call:
    """One all-reduce on its way, with a copy of what went in."""

    def __init__(self, comm: pyccl.Communicator, settings: Settings, revision: int, op: Op) -> None:
        self._comm, self._settings, self._op, self._revision = comm, settings, op, revision
        self._x = workload.make_input(settings.seed, settings.number, revision, op)
        self._before = self._x.copy()
        self._out: Array = self._x if op.in_place else np.empty_like(self._x)
        self._work: pyccl.Work | None = None
        self.outcome: Outcome | None = None
        self.error: dict[str, Any] | None = None
        self.attempts, self.moved_bytes = 0, 0

    def start(self) -> None:
        op = self._op
        try:
            self._work = self._comm.all_reduce_async(
                self._x, op.op, out=None if op.in_place else self._out, tag=op.tag, quantize=op.quantize,
                quantize_block=op.quantize_block, weight=workload.weight(self._settings.number) if op.weighted else 1.0,
                timeout=CALL_TIMEOUT_S,
            )  # fmt: skip
        except pyccl.PycclError as error:
            self._end_with(error)

    def finish(self) -> None:
        if self._work is None:
            return
        try:
            info = self._work.wait()
        except pyccl.PycclError as error:
            self._end_with(error)
            return
        if self._is_canary("wrong-value"):
            self._out.view(np.uint8)[-1] ^= 1
        if not self._op.in_place and not same(self._x, self._before):
            self.error = {"index": self._op.index, "class": "", "text": "the input was changed", "restored": False}
        self.outcome = Outcome(self._op.index, workload.bits(self._out), info.epoch, info.members)
        self.attempts, self.moved_bytes = info.attempts, info.tx_bytes + info.rx_bytes

    def _end_with(self, error: pyccl.PycclError) -> None:
        if self._settings.canary == "unrestored-input":
            self._x.view(np.uint8)[0] ^= 1
        self.error = {"index": self._op.index, **told(error), "restored": same(self._x, self._before)}

    def _is_canary(self, name: str) -> bool:
        return self._settings.canary == name and self._revision == CANARY_REVISION and self._op.index == 0


def same(a: Array, b: Array) -> bool:
    return a.tobytes() == b.tobytes()


def told(error: BaseException) -> dict[str, Any]:
    return {"class": type(error).__name__, "text": str(error)}


def say(event: str, **fields: object) -> None:
    """Print one report line."""
    sys.stdout.write(json.dumps({"event": event, "t": time.monotonic(), **fields}, separators=(",", ":")) + "\n")
    sys.stdout.flush()


def main() -> NoReturn:
    """Run one peer."""
    go, leaving = threading.Event(), threading.Event()

    def on_line() -> None:
        (leaving if go.is_set() else go).set()

    leash.hold(on_line)
    faulthandler.register(signal.SIGUSR1)  # the conductor asks for stacks when it sees a hang
    logs.configure("info")
    Peer(Settings(**json.loads(sys.argv[1])), go, leaving).run()
    sys.exit(0)


if __name__ == "__main__":
    main()
