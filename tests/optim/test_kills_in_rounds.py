"""kill -9 in the middle of exchanges: survivors go on with the same bits, those of a mean over one membership."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from replicas import TIMEOUT_S
from worker import sha, shift

import pyccl
from pyccl.optim import rules

WORLD: Final = 3
ROUNDS: Final = 5
VICTIM: Final = 1
_GROUPS = itertools.count(1000)


def run(master: str, seed: int, kind: str, count: int, kill: dict[str, Any], **more: Any) -> list[list[dict[str, Any]]]:
    """What each worker told, in rank order."""
    told = {
        "address": master, "group": next(_GROUPS), "kind": kind, "world": WORLD, "seed": seed, "rounds": ROUNDS,
        "count": count, "options": {}, **more,
    }  # fmt: skip
    workers = [
        subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("worker.py")),
             json.dumps({**told, "rank": rank, "kill": kill if rank == VICTIM else None})],
            stdout=subprocess.PIPE, text=True,
        )
        for rank in range(WORLD)
    ]  # fmt: skip
    try:
        outs = [worker.communicate(timeout=TIMEOUT_S)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0, -9, 0]
    return [[json.loads(line) for line in out.splitlines()] for out in outs]


class Candidates:
    """Reference trajectories, one for each choice of whether the dying one still took part in its last exchange."""

    def __init__(self, told: list[list[dict[str, Any]]], seed: int, count: int) -> None:
        ids = [lines[0]["peer"] for lines in told]
        self.order = sorted(range(WORLD), key=lambda rank: ids[rank])
        self.seed, self.count = seed, count

    def mean(self, theta: Any, round_: int, with_victim: bool) -> Any:
        """Of theta - w; theta + shift - theta rounds, so it is not just -shift."""
        ranks = [rank for rank in self.order if with_victim or rank != VICTIM]
        shares = [theta - (theta + shift(self.seed, rank, round_, self.count)) for rank in ranks]
        return pyccl.reference_all_reduce(shares, op="avg")

    def diloco(self, last: int) -> list[str]:
        """theta after each round, the victim's last exchange being that of round `last`."""
        theta, b = np.zeros(self.count, np.float32), np.zeros(self.count, np.float32)
        seen = []
        for round_ in range(ROUNDS):
            rules.outer_sgd(theta, b, self.mean(theta, round_, round_ <= last), lr=0.7, mu=0.9, nesterov=True)
            seen.append(sha(theta))
        return seen

    def late(self, last: int) -> list[str]:
        theta, b = np.zeros(self.count, np.float32), np.zeros(self.count, np.float32)
        seen, flying = [], None
        for round_ in range(ROUNDS + 1):
            g = self.mean(theta, round_, round_ <= last) if round_ < ROUNDS else None
            if flying is not None:
                rules.outer_sgd(theta, b, flying, lr=0.7, mu=0.9, nesterov=True)
            flying = g
            seen.append(sha(theta))
        return seen


@pytest.mark.parametrize(
    ("kill", "count", "took_part"),
    [
        ({"phase": "submit", "when": "before"}, 1000, {False}),
        ({"phase": "data", "when": "after", "bytes": 1 << 20}, 1 << 20, {False, True}),
        ({"phase": "commit", "when": "before", "nth": 2}, 1000, {True}),  # the vow's is the first,
    ],
    ids=["before its exchange", "in the middle of it", "as it holds the result"],
)
def test_survivors_of_a_round_go_on_with_one_mean(
    master: str, seed: int, kill: dict[str, Any], count: int, took_part: set[bool]
) -> None:
    told = run(master, seed, "DiLoCo", count, dict(kill))
    candidates = Candidates(told, seed, count)
    allowed = [candidates.diloco(2 if part else 1) for part in took_part]
    for rank in (0, 2):
        assert [line["theta"] for line in told[rank] if "round" in line] in allowed
        assert told[rank][-1] == {**told[0][-1], "retries": told[rank][-1]["retries"]}
        assert told[rank][-1]["rounds"] == ROUNDS


@pytest.mark.parametrize("nth", [1, 3, 6])
def test_pieces_of_one_exchange_are_means_over_the_same_replicas(master: str, seed: int, nth: int) -> None:
    """Eight pieces; a death at the n-th: those before it have ended with three, and are done again."""
    count = 1 << 18
    kill = {"phase": "data", "when": "after", "nth": nth, "bytes": 1 << 14}
    told = run(master, seed, "DiLoCo", count, kill, piece_bytes=count // 2)
    candidates = Candidates(told, seed, count)
    for rank in (0, 2):
        thetas = [line["theta"] for line in told[rank] if "round" in line]
        assert thetas in [candidates.diloco(last) for last in (1, 2)]
        assert told[rank][-1]["digest"] == told[0][-1]["digest"]


def test_quantized_pieces_too(master: str, seed: int) -> None:
    kill = {"phase": "data", "when": "after", "nth": 2, "bytes": 1 << 14}
    told = run(master, seed, "DiLoCo", 1 << 18, kill, piece_bytes=1 << 18, options={"quantize": "uint8"})
    assert told[0][-1]["digest"] == told[2][-1]["digest"] and told[0][-1]["rounds"] == ROUNDS


@pytest.mark.parametrize(
    ("kill", "count"),
    [
        ({"phase": "submit", "when": "before"}, 1000),
        ({"phase": "data", "when": "after", "bytes": 1 << 20}, 1 << 20),
    ],
    ids=["before its exchange", "while it is in flight"],
)
def test_late_an_exchange_in_flight_ends_among_the_survivors(
    master: str, seed: int, kill: dict[str, Any], count: int
) -> None:
    told = run(master, seed, "AsyncDiLoCo", count, dict(kill))
    candidates = Candidates(told, seed, count)
    allowed = [candidates.late(last) for last in (1, 2)]
    for rank in (0, 2):
        assert [*(line["theta"] for line in told[rank] if "round" in line), told[rank][-1]["end"]] in allowed
        assert told[rank][-1]["digest"] == told[0][-1]["digest"]


def test_local_sgd_averages_among_the_survivors(master: str, seed: int) -> None:
    told = run(master, seed, "LocalSGD", 1000, {"phase": "submit", "when": "before"})
    candidates = Candidates(told, seed, 1000)
    theta, seen = np.zeros(1000, np.float32), []
    for round_ in range(ROUNDS):
        ranks = [rank for rank in candidates.order if round_ < 2 or rank != VICTIM]
        theta = pyccl.reference_all_reduce([theta + shift(seed, rank, round_, 1000) for rank in ranks], op="avg")
        seen.append(sha(theta))
    for rank in (0, 2):
        assert [line["theta"] for line in told[rank] if "round" in line] == seen
