"""state_dict() and finish() where what is in flight fails: who saves changes nothing, who finishes waits for nobody."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from everyone import EVERYONE
from reference import H
from replicas import TIMEOUT_S, Replicas, bits, copied, move, wait_pending, weights

import pyccl
from pyccl.optim import AsyncDiLoCo, OuterOptimizer


def steps(opt: OuterOptimizer, params: Any, seed: int, rank: int, which: range) -> None:
    for step in which:
        move(params, seed, rank, step)
        opt.step()


def taken_out(comm: pyccl.Communicator) -> None:
    comm._session.leave_because(pyccl.EvictedError("for a test"))  # type: ignore[union-attr]


@pytest.mark.parametrize("savers", [{0}, {1}, {0, 1}])
@pytest.mark.parametrize("eager", [False, True])
def test_saving_poison_in_flight_raises_nothing_and_the_round_fails_where_it_ends(
    replicas: Replicas, seed: int, savers: set[int], eager: bool
) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = AsyncDiLoCo(comm, params, H, outer_lr=0.4, guard="finite", eager=eager)
        steps(opt, params, seed, rank, range(2 * H - 1))
        move(params, seed, rank, 2 * H - 1)
        if rank == 1:
            params["b"][2] = np.nan
        opt.step()
        move(params, seed, rank, 2 * H)
        live, theta = bits(params), bits(opt.theta)
        if rank in savers:
            state = opt.state_dict()
            assert state["late"]["numbers"][0] == 0  # no mean to apply
            assert bits(state["theta"]) == theta
        assert (bits(params), bits(opt.theta), opt.round) == (live, theta, 1)
        opt.step()
        move(params, seed, rank, 2 * H + 1)
        opt.step()
        move(params, seed, rank, 2 * H + 2)
        with pytest.raises(pyccl.PoisonError):
            opt.step()
        assert bits(params) == bits(opt.theta) == theta
        steps(opt, params, seed, rank, range(3 * H, 6 * H))
        opt.finish()
        return opt.round, opt.contributions, opt.stats.rollbacks, None if eager else bits(opt.theta)

    told = replicas.run(2, train)
    assert told[0] == told[1] and told[0][:3] == (4, 8, 1)


def test_saving_a_state_that_differs_raises_nothing_and_all_are_told_where_the_round_ends(
    replicas: Replicas, seed: int
) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = AsyncDiLoCo(comm, params, H, outer_lr=0.4)
        steps(opt, params, seed, rank, range(2 * H - 1))
        if rank == 1:
            opt.theta["b"][0] += 1.0
        steps(opt, params, seed, rank, range(2 * H - 1, 3 * H - 1))
        if rank == 0:
            opt.state_dict()
        with pytest.raises(pyccl.MismatchError) as caught:
            steps(opt, params, seed, rank, range(3 * H - 1, 3 * H))
        steps(opt, params, seed, rank, range(3 * H, 6 * H))
        return caught.value.fields, opt.round, bits(opt.theta)

    members = replicas.members(3)
    told = replicas.together(members, train)
    assert told[0] == told[1] == told[2] and told[0][0] == ("theta",)


@pytest.mark.parametrize("call", ["state_dict", "finish"])
@pytest.mark.parametrize("kind", ["late", "eager", "streaming"])
def test_who_is_taken_out_of_the_run_saves_and_finishes_and_comes_back_with_its_steps(
    replicas: Replicas, seed: int, kind: str, call: str
) -> None:
    """Its share is on the way, that of the other is not."""
    begun, gone = threading.Event(), threading.Event()

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = EVERYONE[kind](comm, params)
        sent = 2 if kind == "streaming" else H  # inner steps until then
        if rank == 0:
            steps(opt, params, seed, rank, range(1))
            begun.set()
            assert gone.wait(TIMEOUT_S)
            steps(opt, params, seed, rank, range(1, sent))
            if call == "finish":
                opt.finish()  # alone
                assert (opt.round, opt.stats.rollbacks) == (0, 1)
        else:
            steps(opt, params, seed, rank, range(sent))
            move(params, seed, rank, sent)
            before = bits(opt.theta)
            assert begun.wait(TIMEOUT_S)  # in step with this one, and knows it
            taken_out(comm)
            told = getattr(opt, call)()
            assert bits(opt.theta) == before and (told is None) == (call == "finish")
            assert (opt.round, opt.stats.rollbacks) == (0, int(call == "finish"))
            gone.set()
        step = sent
        while opt.round < 3:
            steps(opt, params, seed, rank, range(step, step + 1))
            step += 1
        opt.finish()
        return opt.round, comm.group_world_size, opt.stats.rollbacks, bits(opt.theta) if kind != "eager" else None

    first, second = replicas.run(2, train)
    assert first[:2] == second[:2] and first[1] == 2 and first[3] == second[3]
    assert first[2] >= 1 and second[2] >= 1


def test_a_gossiping_replica_that_is_taken_out_of_the_run_finishes_and_comes_back_with_its_steps(
    replicas: Replicas, seed: int
) -> None:
    begun, gone = threading.Event(), threading.Event()

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = EVERYONE["noloco"](comm, params)
        steps(opt, params, seed, rank, range(1))
        if rank == 1:
            assert begun.wait(TIMEOUT_S)
            taken_out(comm)
            opt.finish()  # the other makes no step before
            gone.set()
        else:
            begun.set()
            assert gone.wait(TIMEOUT_S)
        step = 1
        while opt.round < 6:  # it is let in with the fourth
            if rank == 0 and opt.round == 2 and comm.group_world_size == 1:
                wait_pending(comm)
            steps(opt, params, seed, rank, range(step, step + 1))
            step += 1
        opt.finish()
        return opt.round, comm.group_world_size

    assert replicas.run(2, train) == [(6, 2)] * 2


@pytest.mark.parametrize("eager", [False, True])
def test_finish_late_with_too_few_skips_the_step_and_waits_for_nobody(
    replicas: Replicas, seed: int, eager: bool
) -> None:
    """The other leaves instead of sending its second share."""
    launched = threading.Event()

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = AsyncDiLoCo(comm, params, H, outer_lr=0.4, eager=eager)
        steps(opt, params, seed, rank, range(2 * H - 1))
        if rank == 1:
            assert launched.wait(TIMEOUT_S)
            comm.close()
            return None
        steps(opt, params, seed, rank, range(2 * H - 1, 2 * H))
        launched.set()
        theta = copied(opt.theta)
        move(params, seed, rank, 2 * H)
        opt.finish()
        opt.finish()
        assert bits(params) == bits(opt.theta) == bits(theta)
        return opt.round, opt.stats.rounds, opt.stats.rollbacks

    assert replicas.run(2, train)[0] == (1, 1, 1)


def test_a_round_whose_exchange_can_not_begin_is_counted_beside_the_one_that_was_applied(
    replicas: Replicas, seed: int
) -> None:
    """Late: with the end of a round the mean of the one before is there; this peer is taken out before it sends."""
    gone = threading.Event()

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = AsyncDiLoCo(comm, params, H, outer_lr=0.4)
        steps(opt, params, seed, rank, range(2 * H - 1))
        if rank == 0:
            assert gone.wait(TIMEOUT_S)
        else:
            assert opt._flight is not None and opt._flight.ends_well()
            taken_out(comm)
            gone.set()
        steps(opt, params, seed, rank, range(2 * H - 1, 2 * H))
        counted = opt.stats.rounds, opt.stats.rollbacks
        while opt.round < 4:
            steps(opt, params, seed, rank, range(1))
        opt.finish()
        return counted, opt.shared.digest()

    first, second = replicas.run(2, train)
    assert first[1] == second[1]
    assert first[0] == (1, 0) and second[0] == (1, 1)
