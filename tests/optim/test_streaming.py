"""StreamingDiLoCo through the public API, bit for bit beside a reference that knows nothing of networks."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from replicas import TIMEOUT_S, Replicas, bits, copied, ended, move
from streaming_run import FRAGMENTS, Params, Reference, same, trained, weights

import pyccl
from pyccl.optim import StreamingDiLoCo

F32 = np.float32


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    ("delay", "alpha", "options"),
    [
        (0, 0.0, {}),
        (1, 0.25, {}),
        (2, 0.5, {"outer_momentum": 0.5, "nesterov": False}),
        (1, 1.0, {"outer_momentum": 0.0, "outer_lr": 0.7}),
    ],
    ids=["blocking", "late and mixed", "heavy ball", "plain, never taken in"],
)
def test_weights_follow_the_reference_bit_for_bit(
    replicas: Replicas, seed: int, world: int, delay: int, alpha: float, options: dict[str, Any]
) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        with StreamingDiLoCo(comm, params, 6, fragments=FRAGMENTS, delay=delay, alpha=alpha, **options) as opt:
            seen = trained(opt, params, seed, rank, range(20))
            assert (opt.round, opt.stats.rounds, opt.stats.rollbacks, len(opt.outcomes)) == (6, 6, 0, 6)
            return seen, opt.shared.digest()

    told = replicas.run(world, train)
    short = {"outer_momentum": "mu", "outer_lr": "lr", "nesterov": "nesterov"}
    rules = {short[name]: value for name, value in options.items()}
    reference = Reference(range(world), seed, sync_every=6, delay=delay, alpha=alpha, **rules)
    for step in range(20):
        reference.step(step)
        for rank, (seen, _) in enumerate(told):
            same(seen, reference, rank, step)
    assert len({digest for _, digest in told}) == 1


@pytest.mark.parametrize("codec", ["fp4_e3m0", "uint8"])
@pytest.mark.parametrize("feedback", [False, True])
def test_quantized_shares_are_rounded_once_and_averaged_in_float32(
    replicas: Replicas, seed: int, codec: str, feedback: bool
) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        with StreamingDiLoCo(
            comm, params, 4, fragments=FRAGMENTS, delay=1, quantize=codec, error_feedback=feedback
        ) as opt:
            return trained(opt, params, seed, rank, range(12))

    told = replicas.run(3, train)
    reference = Reference(range(3), seed, sync_every=4, delay=1, codec=codec, feedback=feedback)
    for step in range(12):
        reference.step(step)
        for rank, seen in enumerate(told):
            same(seen, reference, rank, step)


def test_check_values_of_the_rule(replicas: Replicas) -> None:
    """optimizers.md 4: w moves by -0.1 a step; sent after step 3, mixed after step 4."""
    (comm,) = replicas.members(1)
    params = {"w": np.zeros(1)}
    opt = StreamingDiLoCo(
        comm, params, 4, fragments=1, delay=1, alpha=0.25, outer_lr=1.0, outer_momentum=0.0, min_peers=1
    )
    for _ in range(4):
        params["w"] -= 0.1
        opt.step()
    assert opt.theta["w"][0] == pytest.approx(-0.3)
    assert params["w"][0] == pytest.approx(-0.325)


def test_inner_steps_run_while_a_fragment_travels(replicas: Replicas, seed: int) -> None:
    """Rank 1 sends nothing before rank 0 has made the steps that hide the exchange."""
    ahead = threading.Event()

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = StreamingDiLoCo(comm, params, 5, fragments=1, delay=3)
        for step in range(5):
            if rank == 1 and step == 1:
                assert ahead.wait(TIMEOUT_S)
            if rank == 0 and step == 4:
                ahead.set()
            move(params, seed, rank, step)
            opt.step()
        assert rank == 1 or opt.stats.seconds_hidden > 0
        return bits(opt.theta)

    first, second = replicas.run(2, train)
    reference = Reference(range(2), seed, sync_every=5, fragments=[["a.weight", "b", "c"]], delay=3)
    for step in range(5):
        reference.step(step)
    assert first == second == bits(reference.theta)


def test_member_lost_while_an_exchange_runs_is_in_no_mean(replicas: Replicas, seed: int) -> None:
    """The others have sent the second slot's fragment; rank 2 leaves instead of sending it."""
    sent = threading.Barrier(3)

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params, seen = weights(), []
        opt = StreamingDiLoCo(comm, params, 6, fragments=FRAGMENTS, delay=1, alpha=0.5)
        for step in range(12):
            if step == 4 and rank == 2:
                sent.wait(TIMEOUT_S)
                comm.close()
                return None
            seen += trained(opt, params, seed, rank, range(step, step + 1))
            if step == 4:
                sent.wait(TIMEOUT_S)
        return seen, [(o.fragment, o.committed, o.world_size, o.round) for o in opt.outcomes], opt.contributions

    told = replicas.run(3, train)
    reference = Reference(range(3), seed, sync_every=6, delay=1, alpha=0.5)
    for step in range(12):
        reference.step(step, lambda rank, late=step >= 5: rank < 2 or not late)
        for rank in range(2):
            same(told[rank][0], reference, rank, step)
    for rank in range(2):
        assert told[rank][1:] == ([(0, True, 3, 1), (1, True, 2, 2), (0, True, 2, 3), (1, True, 2, 4)], 9)


def test_too_few_roll_back_one_fragment_and_repeat_it_with_who_comes(replicas: Replicas, seed: int) -> None:
    """min_peers 3: rank 2 leaves in the second slot; a newcomer takes part when the same fragment goes again."""
    sent, gone, newcomer = threading.Barrier(3), threading.Event(), replicas.communicator()

    def go_on(opt: StreamingDiLoCo, params: Params, rank: int, steps: range) -> Any:
        return trained(opt, params, seed, rank, steps), [
            (o.fragment, o.committed, o.world_size, o.round) for o in opt.outcomes
        ]

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = StreamingDiLoCo(comm, params, 6, fragments=FRAGMENTS, delay=1, alpha=0.5, min_peers=3)
        seen = trained(opt, params, seed, rank, range(4))
        if rank == 2:
            sent.wait(TIMEOUT_S)
            comm.close()
            gone.set()
            return None
        seen += trained(opt, params, seed, rank, range(4, 5))
        sent.wait(TIMEOUT_S)
        more, outcomes = go_on(opt, params, rank, range(5, 12))
        return seen + more, outcomes

    def join() -> Any:
        assert gone.wait(TIMEOUT_S)
        newcomer.connect(TIMEOUT_S)
        params = weights()
        params["b"] += 1.0  # replaced
        opt = StreamingDiLoCo(newcomer, params, 6, fragments=FRAGMENTS, delay=1, alpha=0.5, min_peers=3)
        return go_on(opt, params, 7, range(6, 12))

    members = replicas.members(3)
    calls = [replicas.start(train, comm, rank) for rank, comm in enumerate(members)]
    calls.append(replicas.start(join))
    told = ended(calls)
    reference = Reference(range(3), seed, sync_every=6, delay=1, alpha=0.5)
    for step in range(12):
        reference.step(step, lambda rank, late=step >= 5: rank != 2 or not late, least=3)
        if step == 5:
            assert reference.committed == 1
            reference.join(7, [comm.peer_id for comm in members[:2]], newcomer.peer_id)
        for rank in range(2):
            same(told[rank][0], reference, rank, step)
        if step > 5:
            same(told[3][0], reference, 7, step - 6)
    for rank in range(2):
        assert told[rank][1] == [(0, True, 3, 1), (1, False, 2, 1), (1, True, 3, 2), (0, True, 3, 3)]
    assert told[3][1] == [(1, True, 3, 2), (0, True, 3, 3)]


def test_newcomer_takes_theta_buffers_counter_and_turn_at_a_slot_boundary(replicas: Replicas, seed: int) -> None:
    waits, newcomer = threading.Event(), replicas.communicator()

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = StreamingDiLoCo(comm, params, 4, fragments=FRAGMENTS, delay=1, alpha=0.25)
        step, seen = 0, []
        while comm.group_world_size < 3:
            seen += trained(opt, params, seed, rank, range(step, step + 1))
            step += 1
            if step == 6:
                waits.set()
        assert step % 2 == 0, "let in within a slot"
        seen += trained(opt, params, seed, rank, range(step, step + 6))
        return step, seen, opt.shared.digest()

    def join() -> Any:
        assert waits.wait(TIMEOUT_S)
        newcomer.connect(TIMEOUT_S)
        params = weights()
        opt = StreamingDiLoCo(newcomer, params, 4, fragments=FRAGMENTS, delay=1, alpha=0.25)
        began = opt.round, copied(opt.theta), copied(params)
        return began, trained(opt, params, seed, 7, range(6)), opt.shared.digest()

    members = replicas.members(2)
    calls = [replicas.start(train, comm, rank) for rank, comm in enumerate(members)]
    began, joined, digest = replicas.start(join).result(TIMEOUT_S)
    (when, first, *_), (_, second, _) = told = ended(calls)
    assert {digest} == {d for _, _, d in told}
    reference = Reference(range(2), seed, sync_every=4, delay=1, alpha=0.25)
    for step in range(when):
        reference.step(step)
        same(first, reference, 0, step)
        same(second, reference, 1, step)
    assert began[0] == reference.committed == when // 2
    assert bits(began[1]) == bits(began[2]) == bits(reference.theta)
    reference.join(7, [comm.peer_id for comm in members], newcomer.peer_id)
    for step in range(when, when + 6):
        for rank, w in reference.w.items():
            move(w, seed, rank, step - when if rank == 7 else step)
        reference.step_counted()
        same(first, reference, 0, step)
        same(second, reference, 1, step)
        same(joined, reference, 7, step - when)


def test_member_whose_theta_differs_is_named_and_all_go_on(replicas: Replicas, seed: int) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = StreamingDiLoCo(comm, params, 4, fragments=FRAGMENTS, delay=1)
        trained(opt, params, seed, rank, range(2))
        if rank == 1:
            opt.theta["b"][0] += 1.0
        with pytest.raises(pyccl.MismatchError) as caught:
            trained(opt, params, seed, rank, range(2, 4))
        assert bits(params) == bits(opt.theta)
        trained(opt, params, seed, rank, range(4, 8))
        return caught.value.peers, caught.value.fields, opt.shared.digest(), opt.round

    members = replicas.members(3)
    told = replicas.together(members, train)
    assert all((peers, fields) == ((members[1].peer_id,), ("theta",)) for peers, fields, *_ in told)
    assert len({digest for *_, digest, _ in told}) == 1 and {rounds for *_, rounds in told} == {3}


def test_finish_applies_what_is_in_flight(replicas: Replicas, seed: int) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = StreamingDiLoCo(comm, params, 4, fragments=1, delay=2)
        trained(opt, params, seed, rank, range(3))
        assert opt.round == 0
        opt.finish()
        assert opt.round == 1
        return bits(opt.theta), bits(params)

    (theta, live), (theta_b, live_b) = replicas.run(2, train)
    assert theta == theta_b == live == live_b


@pytest.mark.parametrize("at", [3, 4, 5])
def test_loaded_run_goes_on_as_if_it_had_never_stopped(replicas: Replicas, seed: int, at: int) -> None:
    """at: steps before it stops: between slots, within one, and between sending and applying."""

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params, again = weights(), weights()
        options: dict[str, Any] = {
            "fragments": FRAGMENTS, "delay": 1, "alpha": 0.25, "quantize": "uint8", "error_feedback": True,
        }  # fmt: skip
        opt = StreamingDiLoCo(comm, params, 6, **options)
        trained(opt, params, seed, rank, range(at))
        state, live = opt.state_dict(), copied(params)
        expected = trained(opt, params, seed, rank, range(at, 12))
        for name, array in live.items():
            again[name][...] = array
        resumed = StreamingDiLoCo(comm, params=again, sync_every=6, **options)
        for name, array in live.items():
            again[name][...] = array
        resumed.load_state_dict(state)
        found = trained(resumed, again, seed, rank, range(at, 12))
        for (theta, w), (theta_, w_) in zip(expected, found, strict=True):
            assert (bits(theta), bits(w)) == (bits(theta_), bits(w_))
        return opt.round, resumed.round

    assert replicas.run(2, train) == [(4, 4), (4, 4)]


def test_members_with_other_fragments_are_told(replicas: Replicas) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> Any:
        with pytest.raises(pyccl.MismatchError) as caught:
            StreamingDiLoCo(comm, weights(), 6, fragments=FRAGMENTS if rank else FRAGMENTS[::-1])
        return caught.value.fields

    assert replicas.run(2, train) == [("fragments",), ("fragments",)]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"fragments": [["a.weight"], ["b"]]}, "in none of them, and so never synchronised: c"),
        ({"fragments": 4}, "fragments=4: there are 3 parameters"),
        ({"fragments": 3, "sync_every": 4}, "no multiple of the 3 fragments"),
        ({"fragments": 2, "delay": 3}, r"delay=3: a whole number of 0\.\.2"),
        ({"fragments": 2, "alpha": 1.5}, "alpha=1.5"),
        ({"fragments": 2, "alpha": float("nan")}, "alpha=nan"),
        ({"fragments": 2, "outer_lr": 0.0}, "outer_lr=0.0"),
        ({"fragments": 2, "quantize": "fp3"}, "quantize='fp3'"),
    ],
)
def test_wrong_arguments_are_refused(replicas: Replicas, options: dict[str, Any], told: str) -> None:
    (comm,) = replicas.members(1)
    with pytest.raises(pyccl.UsageError, match=told):
        StreamingDiLoCo(comm, weights(), **{"sync_every": 6, **options})
