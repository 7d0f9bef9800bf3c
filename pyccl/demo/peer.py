"""One training process of the demo: ``python -m pyccl.demo.peer --master HOST:PORT --stream N ...``.

This is the script a user would write; `train` is all of it that concerns pyccl. Each peer draws its own batches, takes
``--steps`` Adam steps by itself and then averages the parameters with the others (local SGD; Stich, ICLR 2019,
arXiv:1805.09767). Adam's moments stay with their replica.

Rule that the loop keeps: all members make the same sequence of collective calls. A newcomer comes out of ``connect()``
when the members come out of ``update_topology()``, so the loop has its safe point at its top and everybody, old or new,
makes ``sync_shared_state`` its next call; model and revision reach a newcomer that way.

Reports go to stdout, one JSON object a line (`pyccl.demo.progress` reads them). Stdin comes from the orchestrator:
its end means that the orchestrator is gone and ends this process, a line on it lets a waiting newcomer connect.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

import pyccl
from pyccl.demo import corpus, model
from pyccl.processes import leash

BATCH: Final = 128
RATE: Final = 2e-3
VALIDATION_WINDOWS: Final = 4096
FIRST_WAIT_S: Final = 0.02  # pause between looks for the rest of the first members


@dataclass(frozen=True)
class Settings:
    """What the orchestrator tells a peer."""

    master: str
    stream: int  # which batches this peer draws; the peer's number in the demo
    seed: int
    rounds: int
    steps: int  # local steps between two averaging rounds
    wait_for: int  # first world size to wait for; 0 for a newcomer


class Trainer:
    """The local half of the job: batches, steps and validation. Knows no network."""

    def __init__(self, settings: Settings, text: corpus.Corpus, shape: model.Shape | None = None) -> None:
        self.settings, self.text = settings, text
        self.shape = model.Shape() if shape is None else shape
        self.parameters = model.init(self.shape, settings.seed)
        self._grad = model.Parameters.over(self.shape, np.zeros_like(self.parameters.flat))
        self._adam = model.Adam(self.shape.count(), RATE)
        last_start = text.validation.size - self.shape.context - 1
        starts = np.linspace(0, last_start, VALIDATION_WINDOWS).astype(np.int64)
        self._validation = model.windows(text.validation, starts, self.shape.context)

    def local_steps(self, revision: int) -> float:
        """Train from one revision towards the next; mean training loss in bits per character.

        The batches depend on (seed, stream, revision) only, so a run can be replayed.
        """
        rng = np.random.default_rng([self.settings.seed, 1 + self.settings.stream, revision])
        last_start = self.text.train.size - self.shape.context
        total = 0.0
        for _ in range(self.settings.steps):
            starts: npt.NDArray[np.int64] = rng.integers(0, last_start, BATCH)
            inputs, targets = model.windows(self.text.train, starts, self.shape.context)
            total += model.loss_and_grad(self.parameters, inputs, targets, self._grad)
            self._adam.step(self.parameters.flat, self._grad.flat)
        return total / self.settings.steps / math.log(2)

    def validation_loss(self) -> float:
        """Bits per character on windows that are the same for every peer and revision."""
        return model.evaluate(self.parameters, *self._validation)


def train(settings: Settings, trainer: Trainer) -> None:
    """Join, and train until the shared revision reaches ``settings.rounds``."""
    parameters = trainer.parameters
    state = pyccl.SharedState(dict(parameters.views), revision=0)
    with pyccl.connect(settings.master) as comm:
        say("joined", peer_id=comm.peer_id, epoch=comm.epoch, world_size=comm.group_world_size)
        if settings.wait_for == 0 and comm.group_world_size == 1:
            sys.exit("the others were gone when this newcomer joined")
        while comm.group_world_size < settings.wait_for:
            if comm.are_peers_pending():
                comm.update_topology()
            else:
                time.sleep(FIRST_WAIT_S)
        result: dict[str, object] = {"train_loss": None, "mb_per_s": None, "retries": 0}
        while True:
            sync = comm.sync_shared_state(state)
            report_round(comm, state, trainer, {**result, "sync_bytes": sync.rx_bytes})
            if state.revision >= settings.rounds:
                return
            train_loss = trainer.local_steps(state.revision)
            met = comm.barrier()  # so that waiting for stragglers is not counted in MB/s
            info = comm.all_reduce(parameters.flat, op="avg")  # the state's arrays are views of `flat`
            state.revision += 1
            rate = (info.tx_bytes + info.rx_bytes) / max(info.seconds, 1e-6) / 1e6
            retries = met.attempts - 1 + info.attempts - 1
            result = {"train_loss": train_loss, "mb_per_s": rate, "retries": retries}
            if comm.are_peers_pending():
                comm.update_topology()


def report_round(
    comm: pyccl.Communicator, state: pyccl.SharedState, trainer: Trainer, figures: Mapping[str, object]
) -> None:
    """Tell the orchestrator where this peer stands. One member validates, in turn; at both ends all do."""
    revision = state.revision
    at_an_end = revision in (0, trainer.settings.rounds)
    my_turn = comm.members[revision % len(comm.members)] == comm.peer_id
    say(
        "round",
        revision=revision,
        digest=state.digest(),
        validation_loss=trainer.validation_loss() if at_an_end or my_turn else None,
        epoch=comm.epoch,
        world_size=comm.group_world_size,
        **figures,
    )


def say(event: str, **fields: object) -> None:
    """Print one report line."""
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


def parse(arguments: list[str] | None = None) -> Settings:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="pyccl.demo.peer", description="One peer of `pyccl demo`, which starts it.")
    parser.add_argument("--master", required=True, metavar="HOST:PORT")
    for name in ("stream", "seed", "rounds", "steps", "wait-for"):
        parser.add_argument(f"--{name}", type=int, required=True, metavar="N")
    return Settings(**vars(parser.parse_args(arguments)))


def main() -> None:
    """Run one peer."""
    settings = parse()
    go = threading.Event()
    leash.hold(on_line=go.set)
    trainer = Trainer(settings, corpus.load())
    if settings.wait_for == 0:
        say("ready")
        go.wait()
    train(settings, trainer)


if __name__ == "__main__":
    main()
