"""A process is killed (-9) while its share is on the line: the others agree on what became of it, and go on."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doomed import made, train
from replicas import TIMEOUT_S, Replicas, bits

import pyccl

DOOMED = Path(__file__).with_name("doomed.py")


@contextmanager
def doomed(replicas: Replicas, optimizer: str, steps: int) -> Iterator[list[pyccl.Communicator]]:
    """Two members here, when the one that is about to kill itself is the third."""
    members = replicas.members(2)
    command = [sys.executable, "-P", str(DOOMED), replicas.address, str(replicas.group), optimizer, str(steps)]
    process = subprocess.Popen(command)
    try:
        while members[0].group_world_size < 3:
            replicas.together(members, lambda comm, _: comm.update_topology(TIMEOUT_S))
        yield members
        assert process.wait(TIMEOUT_S) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("steps", [1, 3])
def test_streaming_agrees_on_the_exchange_of_who_was_killed(replicas: Replicas, steps: int) -> None:
    """It dies when it has sent a fragment, before that is applied; in the first slot, and in the second."""

    def go_on(comm: pyccl.Communicator, rank: int) -> Any:
        opt, params = made("streaming", comm)
        train(opt, params, rank, 2)
        first = float(opt.theta["a"][0])
        train(opt, params, rank, 6)
        return opt.shared.digest(), [(o.fragment, o.committed, o.world_size) for o in opt.outcomes], first

    with doomed(replicas, "streaming", steps) as members:
        first, second = replicas.together(members, go_on)
    assert first[:2] == second[:2]
    sizes = [world_size for *_, world_size in first[1]]
    assert [fragment for fragment, *_ in first[1]] == [0, 1, 0, 1] and all(committed for _, committed, _ in first[1])
    assert sizes[steps // 2] in (2, 3) and sizes[steps // 2 + 1 :] == [2] * (3 - steps // 2)
    shares = {2: [1, 2], 3: [1, 2, 6]}[sizes[0]]  # what each had moved when it sent the first fragment
    assert first[2] == second[2] == pytest.approx(0.4 * 1.9 * 0.01 * sum(shares) / len(shares), rel=1e-5)


def test_noloco_leaves_out_the_partner_that_was_killed(replicas: Replicas) -> None:
    """It dies when its second round has begun and its phi is on the way."""

    def go_on(comm: pyccl.Communicator, rank: int) -> Any:
        opt, params = made("noloco", comm)
        train(opt, params, rank, 10)
        return comm.peer_id, list(opt.outcomes), opt.theta

    with doomed(replicas, "noloco", 2) as members:
        told = replicas.together(members, go_on)
    ids = {peer for peer, *_ in told}
    for peer, outcomes, theta in told:
        assert [o.round for o in outcomes] == list(range(5))
        assert not outcomes[0].lost and set(outcomes[1].lost) <= set(outcomes[1].group) - ids
        assert all(set(o.lost) == set(o.group) - ids for o in outcomes[2:])
        assert all(peer in o.group for o in outcomes)
        assert all(set(o.group) == ids and not o.lost for o in outcomes[3:])
        assert all(np.isfinite(array).all() for array in theta.values())


@pytest.mark.parametrize(
    ("kind", "steps"),
    [("streaming-fp4", 1), ("streaming-fp4", 3), ("late-uint8", 2), ("late-uint8", 4), ("noloco-3", 4)],
)
def test_survivors_agree_on_what_was_in_flight(replicas: Replicas, kind: str, steps: int) -> None:
    """A fragment of its first slot, of its second; the share of its first round, of its second; phi of its third. In
    groups of three the survivors have each other in every round, and so one phi."""

    def go_on(comm: pyccl.Communicator, rank: int) -> Any:
        opt, params = made(kind, comm)
        train(opt, params, rank, 12)
        opt.finish()
        assert all(np.isfinite(array).all() for array in opt.theta.values())
        return bits(opt.theta), opt.round, opt.contributions, opt.stats.rollbacks, comm.group_world_size

    with doomed(replicas, kind, steps) as members:
        first, second = replicas.together(members, go_on)
    assert first == second
    assert first[1:] == (6, first[2], 0, 2) and 12 <= first[2] <= 14


class Eager:
    """Two survivors, and a third until its last exchange, in one number: all elements of "a" are alike."""

    def __init__(self, last: int) -> None:
        """last: the round whose exchange the third takes part in, of 0, 1, ...; -1: in none."""
        theta, b, before = np.zeros(2), np.zeros(2), np.zeros(2)
        late, world = 0.0, 0
        for round_ in range(7):
            own = -0.02 * np.array([1.0, 2.0]) * (round_ < 6)  # theta - w; at the end there are no new steps
            if world:
                g = late + (own - before) / world
                b = 0.5 * b + g
                theta = theta - 0.4 * (g + 0.5 * b)
            shares = [*own, -0.12] if round_ <= last else own
            late, world, before = float(np.mean(shares)), len(shares), own
        self.theta = theta


@pytest.mark.parametrize("steps", [2, 4])
def test_eager_survivors_step_with_one_mean_and_their_own_newest_share(replicas: Replicas, steps: int) -> None:
    def go_on(comm: pyccl.Communicator, rank: int) -> Any:
        opt, params = made("eager", comm)
        train(opt, params, rank, 12)
        opt.finish()
        return float(opt.theta["a"][0]), opt.round, opt.contributions

    with doomed(replicas, "eager", steps) as members:
        told = replicas.together(members, go_on)
    took_part = told[0][2] - 12
    assert took_part in {2: (0, 1), 4: (1, 2)}[steps]
    expected = Eager(took_part - 1).theta
    for rank in range(2):
        assert told[rank] == (pytest.approx(expected[rank], rel=1e-4), 6, told[0][2])
