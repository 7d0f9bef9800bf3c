"""Slots of StreamingDiLoCo that end early, go on from a checkpoint, or are sent at different steps by each replica."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from replicas import TIMEOUT_S, Replicas, bits, copied, move
from streaming_run import FRAGMENTS, Params, Reference, same, trained, weights

import pyccl
from pyccl.optim import StreamingDiLoCo
from pyccl.optim.streaming import SlotOutcome


@pytest.mark.parametrize(
    ("delays", "options"),
    [((0, 2), {}), ((2, 0, 1), {"quantize": "fp4_e3m0", "error_feedback": True})],
    ids=["two", "three with feedback"],
)
def test_each_replica_may_send_at_a_step_of_its_own(
    replicas: Replicas, seed: int, delays: tuple[int, ...], options: dict[str, Any]
) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = StreamingDiLoCo(comm, params, 6, fragments=FRAGMENTS, delay=delays[rank], alpha=0.5, **options)
        return trained(opt, params, seed, rank, range(20)), opt.shared.digest()

    told = replicas.run(len(delays), train)
    ranks = range(len(delays))
    codec = {"codec": options["quantize"], "feedback": True} if options else {}
    reference = Reference(ranks, seed, sync_every=6, delay=delays, alpha=0.5, **codec)
    for step in range(20):
        reference.step(step)
        for rank in ranks:
            same(told[rank][0], reference, rank, step)
    assert len({digest for _, digest in told}) == 1


# ---- finish


@pytest.mark.parametrize("delays", [(4, 1), (0, 3), (4, 4)])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_finish_ends_the_slot_for_those_who_have_sent_and_for_those_who_have_not(
    replicas: Replicas, seed: int, delays: tuple[int, int], alpha: float
) -> None:
    """After step 3 of 6; then two slots more, of which the last is whole: nothing is left to finish."""

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = StreamingDiLoCo(comm, params, 12, fragments=FRAGMENTS, delay=delays[rank], alpha=alpha)
        trained(opt, params, seed, rank, range(3))
        opt.finish()
        seen = [(copied(opt.theta), copied(params))]
        opt.finish()
        seen += trained(opt, params, seed, rank, range(3, 15))
        opt.finish()
        seen.append((copied(opt.theta), copied(params)))
        return seen, list(opt.outcomes), opt.stats.rollbacks

    told = replicas.run(2, train)
    reference = Reference(range(2), seed, sync_every=12, delay=delays, alpha=alpha)
    for step in range(3):
        reference.step(step)
    reference.finish()
    for at in range(14):
        if 0 < at < 13:
            reference.step(at + 2)
        for rank in range(2):
            same(told[rank][0], reference, rank, at)
    for _, *ended in told:
        assert ended == [[SlotOutcome(k % 2, True, 2, k + 1) for k in range(3)], 0]


@pytest.mark.parametrize("delays", [(0, 0), (2, 1)])
def test_finish_does_nothing_where_nobody_has_sent_and_waits_for_nobody(
    replicas: Replicas, seed: int, delays: tuple[int, int]
) -> None:
    """After step 3 of 6, by one of the two alone."""

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = StreamingDiLoCo(comm, params, 12, fragments=FRAGMENTS, delay=delays[rank])
        seen = trained(opt, params, seed, rank, range(3))
        if rank == 0:
            opt.finish()
        return seen + trained(opt, params, seed, rank, range(3, 8)), list(opt.outcomes)

    told = replicas.run(2, train)
    reference = Reference(range(2), seed, sync_every=12, delay=delays)
    for step in range(8):
        reference.step(step)
        for rank, (seen, outcomes) in enumerate(told):
            same(seen, reference, rank, step)
            assert outcomes == [SlotOutcome(0, True, 2, 1)]


def test_finish_undoes_the_slot_of_one_that_is_alone_and_waits_for_nobody(replicas: Replicas, seed: int) -> None:
    """The other leaves before it sends."""
    stepped = threading.Event()

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = StreamingDiLoCo(comm, params, 12, fragments=FRAGMENTS, delay=4, alpha=0.5)
        if rank == 1:
            trained(opt, params, seed, rank, range(1))
            assert stepped.wait(TIMEOUT_S)
            comm.close()
            return None
        live = trained(opt, params, seed, rank, range(3))[-1][1]
        stepped.set()
        opt.finish()
        assert bits(opt.theta) == bits(weights())
        assert bits(params) == bits({**live, **{name: weights()[name] for name in FRAGMENTS[0]}})
        return opt.round, list(opt.outcomes), opt.stats.rollbacks

    told, _ = replicas.run(2, train)
    assert told == (0, [SlotOutcome(0, False, 1, 0)], 1)


def test_finish_with_poison_in_flight_fails_on_all(replicas: Replicas, seed: int) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = StreamingDiLoCo(comm, params, 6, fragments=FRAGMENTS, delay=2, guard="finite")
        for step in range(2):
            move(params, seed, rank, step)
            if step == 0 and rank == 1:
                params["c"][0] = np.nan
            opt.step()
        with pytest.raises(pyccl.PoisonError):
            opt.finish()
        assert bits(opt.theta) == bits(weights())
        assert all(params[name].tobytes() == opt.theta[name].tobytes() for name in FRAGMENTS[0])
        trained(opt, params, seed, rank, range(2, 8))
        return list(opt.outcomes), opt.stats.rollbacks, opt.shared.digest()

    first, second = replicas.run(2, train)
    assert first == second
    assert first[:2] == ([SlotOutcome(0, False, 0, 0), SlotOutcome(0, True, 2, 1), SlotOutcome(1, True, 2, 2)], 1)


# ---- checkpoints


def loaded(comm: pyccl.Communicator, state: Any, live: Params, delay: int) -> tuple[StreamingDiLoCo, Params]:
    params = copied(live)
    opt = StreamingDiLoCo(comm, params, 8, fragments=FRAGMENTS, delay=delay, alpha=0.25)
    for name, array in live.items():
        params[name][...] = array  # the constructor has brought all in step
    opt.load_state_dict(state)
    return opt, params


def saved(comm: pyccl.Communicator, seed: int, rank: int, delay: int, steps: int) -> tuple[Any, Params]:
    """And what is in flight has ended."""
    params = weights()
    opt = StreamingDiLoCo(comm, params, 8, fragments=FRAGMENTS, delay=delay, alpha=0.25)
    trained(opt, params, seed, rank, range(steps))
    state, live = opt.state_dict(), copied(params)
    opt.finish()
    return state, live


@pytest.mark.parametrize(
    ("before", "after"),
    [(3, (1, 1)), (3, (0, 3)), (2, (0, 0)), (0, (3, 3)), (1, (1, 3)), (0, (3, 0))],
    ids=["less", "less on one", "none", "more", "more on one", "some on one"],
)
@pytest.mark.parametrize("steps", [2, 6], ids=["first slot", "second slot"])
def test_a_slot_that_goes_on_with_another_delay_is_sent_once(
    replicas: Replicas, seed: int, before: int, after: tuple[int, int], steps: int
) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> Any:
        state, live = saved(comm, seed, rank, before, steps)
        opt, params = loaded(comm, state, live, after[rank])
        return trained(opt, params, seed, rank, range(steps, 16)), opt.stats.rounds

    told = replicas.run(2, train)
    reference = Reference(range(2), seed, sync_every=8, delay=before, alpha=0.25)
    for step in range(16):
        if step == steps:
            reference.delays = dict(enumerate(after))
        reference.step(step)
        for rank, (seen, rounds) in enumerate(told):
            assert rounds == 4 - steps // 4
            if step >= steps:
                same(seen, reference, rank, step - steps)


@pytest.mark.parametrize("delays", [(0, 0), (3, 3), (0, 3)], ids=["not sent", "in flight", "of one"])
def test_finish_applies_what_was_in_flight_of_a_state_that_was_just_loaded(
    replicas: Replicas, seed: int, delays: tuple[int, int]
) -> None:
    """Whatever the delay is by then."""

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        state, live = saved(comm, seed, rank, delays[rank], 2)
        opt, params = loaded(comm, state, live, 0)
        opt.finish()
        opt.finish()
        return [(copied(opt.theta), copied(params))], list(opt.outcomes)

    told = replicas.run(2, train)
    reference = Reference(range(2), seed, sync_every=8, delay=delays, alpha=0.25)
    for step in range(2):
        reference.step(step)
    if any(delays):
        reference.finish()
    for rank, (seen, outcomes) in enumerate(told):
        same(seen, reference, rank, 0)
        assert outcomes == ([SlotOutcome(0, True, 2, 1)] if any(delays) else [])


def test_finish_alone_after_loading_waits_for_nobody(replicas: Replicas, seed: int) -> None:
    state, live = replicas.run(2, lambda comm, rank: saved(comm, seed, rank, 3, 2))[0]
    alone = Replicas(replicas.address)
    try:
        (comm,) = alone.members(1)
        opt, params = loaded(comm, state, live, 3)
        opt.finish()
        assert list(opt.outcomes) == [SlotOutcome(0, False, 1, 0)]
        assert bits(opt.theta) == bits(weights()) and params["b"].tobytes() == live["b"].tobytes()
    finally:
        alone.close()


def test_a_state_has_fewer_inner_steps_than_a_slot(replicas: Replicas, seed: int) -> None:
    (comm,) = replicas.members(1)
    params = weights()
    opt = StreamingDiLoCo(comm, params, 8, fragments=2, delay=3, min_peers=1)
    trained(opt, params, seed, 0, range(3))
    state = opt.state_dict()
    for steps in (0, 4, 5, 7, 8):  # 0: nothing is in flight then
        with pytest.raises(pyccl.UsageError, match=f"inner_steps={steps}"):
            opt.load_state_dict(state | {"inner_steps": steps})
    opt.load_state_dict(state)
    assert opt.step()
