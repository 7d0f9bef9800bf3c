"""Replicas of an experiment, in a process: they train in step, each with a communicator and an optimizer of its own.

What the process sends to the experiment: ("in", 0) when its replicas are members, ("round", rounds) after every
exchange, at last ("done", [Told of each replica]); of none where the run had ended before they came in.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Final, TypeVar

import numpy as np
import torch
from model import Models, draw, validate
from variants import Variant

import pyccl
from pyccl.demo import corpus
from pyccl.optim import NoLoCo, OuterOptimizer

WAIT_S: Final = 3600.0  # for the others, on a machine that does something else meanwhile
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Settings:
    """Of all runs. batch: windows of a step, over all replicas. curve_every: inner steps between two validations.
    curve_windows, windows: to validate on, meanwhile and at the end. kills_step_s: least duration of an inner step
    where replicas are killed: a round of 50 takes 12 s then, and a kill every five rounds is one a minute."""

    steps: int = 3000
    batch: int = 128
    lr: float = 6e-3
    curve_every: int = 100
    curve_windows: int = 4096
    windows: int = 16384
    kills_step_s: float = 0.24


@dataclass(slots=True)
class Told:
    """Of one replica. loss: of its weights at the end, nats per character; None: another replica tells it, it has the
    same. merged: of the mean of all. curve: (inner steps, loss), of the first member."""

    loss: float | None = None
    merged: float | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)
    rounds: int = 0
    tx_bytes: int = 0
    tx_bytes_peak: int = 0
    syncs: int = 0
    retries: int = 0
    rollbacks: int = 0


class EveryStep:
    """The baseline: gradients are averaged at every step."""

    def __init__(self, comm: pyccl.Communicator) -> None:
        self._comm, self.tx_bytes, self.rounds = comm, 0, 0

    def average(self, grads: np.ndarray[Any, Any]) -> None:
        self.tx_bytes += self._comm.all_reduce(grads, op="avg", timeout=WAIT_S).tx_bytes
        self.rounds += 1


class Replicas:
    """Those of one process. life: how often those of these streams were killed before."""

    def __init__(
        self, pipe: Connection, address: str, variant: Variant, settings: Settings, seed: int, streams: Sequence[int],
        life: int,
    ) -> None:  # fmt: skip
        self._pipe, self._variant, self._settings = pipe, variant, settings
        self._text, self._models = corpus.load(), Models(len(streams), seed, settings.lr, settings.steps)
        self._batches = [np.random.default_rng([seed, stream, life]) for stream in streams]
        self._weights = [self._models.parameters(row) for row in range(len(streams))]
        self._told = [Told() for _ in streams]
        self._threads = ThreadPoolExecutor(len(streams))
        self._comms = self._together(lambda _: pyccl.Communicator(address), streams)
        self._together(lambda comm: self._come_in(comm, life), self._comms)
        self._outers: list[OuterOptimizer] = []
        self._every: list[EveryStep] = []
        self._is_late = life > 0 and self._comms[0].group_world_size == 1  # the others have ended, and left
        if self._is_late:
            return
        pipe.send(("in", 0))
        if variant.optimizer is None:
            self._every = [EveryStep(comm) for comm in self._comms]
        else:
            self._outers = self._together(variant.make, self._comms, self._weights)

    def _together(self, function: Callable[..., T], *arguments: Iterable[Any]) -> list[T]:
        """Each replica in a thread: they wait for one another."""
        return list(self._threads.map(function, *arguments))

    def _come_in(self, comm: pyccl.Communicator, life: int) -> None:
        """A killed one's successor comes in while the others train; else all begin together."""
        comm.connect(timeout=WAIT_S)
        while life == 0 and comm.group_world_size < self._variant.peers:
            comm.update_topology(timeout=WAIT_S)

    def run(self) -> None:
        if self._is_late:
            self._pipe.send(("done", []))
            return
        number = begun_at = self._rounds_done()
        while (self._rounds_done() if self._variant.kill_every else number) < self._settings.steps:
            step_began = time.monotonic()
            batch = self._settings.batch // self._variant.peers
            self._models.backward(*draw(self._text.train, batch, self._batches))
            self._together(lambda every, row: every.average(self._models.grads(row)), self._every, itertools.count())
            self._models.step(number, number - begun_at if begun_at else None)
            if self._variant.kill_every:
                time.sleep(max(0.0, step_began + self._settings.kills_step_s - time.monotonic()))
            number += 1
            if any(self._together(self._step, self._outers, self._told)):
                self._pipe.send(("round", self._outers[0].round))
                if self._variant.kill_every:
                    number = self._rounds_done()  # one that was rolled back does not count
            if number % self._settings.curve_every == 0 and (row := self._first()) is not None:
                self._told[row].curve.append((number, self._score(row, self._settings.curve_windows)))
        self._together(lambda outer: outer.finish(), self._outers)
        self._pipe.send(("done", self._conclude()))
        self._together(lambda comm: comm.barrier(timeout=WAIT_S), self._comms)  # nobody leaves before all are done
        self._together(lambda comm: comm.close(), self._comms)

    def _rounds_done(self) -> int:
        """In inner steps of the whole batch, so that all runs have the same tokens: where replicas come and go, a round
        of three of four is three quarters of one."""
        if not self._variant.kill_every:
            return 0
        return self._outers[0].contributions * self._variant.sync_every // self._variant.peers

    def _step(self, outer: OuterOptimizer, told: Told) -> bool:
        sent = outer.stats.tx_bytes
        is_round = outer.step()
        told.tx_bytes_peak = max(told.tx_bytes_peak, outer.stats.tx_bytes - sent)
        return is_round

    def _first(self) -> int | None:
        """The run's first member, if it is of this process."""
        first = self._comms[0].members[0]
        return next((row for row, comm in enumerate(self._comms) if comm.peer_id == first), None)

    def _score(self, row: int, count: int) -> float:
        weights = self._outers[row].theta if self._outers else self._weights[row]
        return validate(weights, self._text.validation, count)

    def _conclude(self) -> list[Told]:
        first, count = self._first(), self._settings.windows
        for row, told in enumerate(self._told):
            if row == first or self._variant.is_per_replica:
                told.loss = self._score(row, count)
        for told, every in zip(self._told, self._every, strict=bool(self._every)):
            told.rounds, told.tx_bytes = every.rounds, every.tx_bytes
            told.tx_bytes_peak = every.tx_bytes // every.rounds
        for told, outer in zip(self._told, self._outers, strict=bool(self._outers)):
            stats = outer.stats
            told.rounds, told.tx_bytes, told.syncs = stats.rounds, stats.tx_bytes, stats.syncs
            told.retries, told.rollbacks = stats.retries, stats.rollbacks
        gossips = [outer for outer in self._outers if isinstance(outer, NoLoCo)]
        self._together(lambda outer: outer.merge(), gossips)
        if gossips and first is not None:
            self._told[first].merged = self._score(first, count)
        return self._told


def run(
    pipe: Connection, address: str, variant: Variant, settings: Settings, seed: int, streams: Sequence[int], life: int
) -> None:
    """What the process does, unless the experiment ends first."""
    threading.Thread(target=_end_with_the_experiment, daemon=True).start()
    torch.set_num_threads(1)
    Replicas(pipe, address, variant, settings, seed, streams, life).run()
    pipe.send(("cpu", time.process_time()))
    pipe.close()
    os._exit(0)  # the forked interpreter has nothing to clean up


def _end_with_the_experiment() -> None:
    experiment = multiprocessing.parent_process()
    assert experiment is not None
    experiment.join()
    os._exit(1)
