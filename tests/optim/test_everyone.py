"""Membership with every optimizer: members that come back, and newcomers whom the program lets in itself."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from everyone import EVERYONE, OWN_THETA
from reference import H
from replicas import TIMEOUT_S, Replicas, ended, move, wait_pending, weights

import pyccl

ROUNDS = 9


@pytest.mark.parametrize("at", [0, H - 1], ids=["as a round begins", "as it ends"])
@pytest.mark.parametrize("kind", EVERYONE)
def test_who_was_taken_out_of_the_run_comes_back_as_a_newcomer(
    replicas: Replicas, seed: int, kind: str, at: int
) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = EVERYONE[kind](comm, params)
        thrown_out, step = False, 0
        while opt.round < ROUNDS:
            move(params, seed, rank, step)
            if rank == 1 and opt.round >= 2 and step % H == at and not thrown_out:
                thrown_out = True
                comm._session.leave_because(pyccl.EvictedError("for a test"))  # type: ignore[union-attr]
            if rank != 1 and opt.round == 5 and comm.group_world_size < 3:
                wait_pending(comm)  # so that it is back before the last round
            opt.step()
            step += 1
        opt.finish()
        assert all(np.isfinite(array).all() for array in opt.theta.values())
        return (opt.round, comm.group_world_size), opt.shared.digest(), opt.stats.rounds, opt.stats.rollbacks

    told = replicas.run(3, train)
    assert len({ends for ends, *_ in told}) == 1 and told[0][0][1] == 3
    assert kind in OWN_THETA or len({digest for _, digest, *_ in told}) == 1
    (_, _, first, *_), (_, _, second, lost), (_, _, third, *_) = told
    assert first == third > second > 2
    assert [rollbacks for *_, rollbacks in told] == [0, lost, 0] and lost <= 1
    assert lost == 1 or kind == "noloco"  # which makes its step alone before it finds out


@pytest.mark.parametrize("at", [0, 1, H - 1])
@pytest.mark.parametrize("kind", EVERYONE)
def test_a_safe_point_of_the_programs_own_lets_a_newcomer_in_anywhere_in_a_round(
    replicas: Replicas, seed: int, kind: str, at: int
) -> None:
    """After so many inner steps of the second round."""
    members, third = replicas.members(2), replicas.communicator()
    joining = threading.Event()

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params, step = weights(seed=rank), 0  # theta is that of one of the founders
        opt = EVERYONE[kind](comm, params)
        while opt.round < 6:
            if rank < 2 and step == H + at:
                joining.set()
                wait_pending(comm)
                comm.update_topology(TIMEOUT_S)
            move(params, seed, rank, step)
            opt.step()
            step += 1
        opt.finish()
        return (opt.round, comm.group_world_size), opt.shared.digest(), opt.stats.rollbacks

    def join() -> Any:
        assert joining.wait(TIMEOUT_S)
        third.connect(TIMEOUT_S)
        return train(third, 2)

    told = ended([*(replicas.start(train, c, r) for r, c in enumerate(members)), replicas.start(join)])
    assert {(ends, rollbacks) for ends, _, rollbacks in told} == {(told[0][0], 0)} and told[0][0][1] == 3
    assert kind in OWN_THETA or len({digest for _, digest, _ in told}) == 1
