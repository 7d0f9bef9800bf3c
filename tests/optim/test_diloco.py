"""DiLoCo and AsyncDiLoCo through the public API, bit for bit beside references that know nothing of networks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from reference import H, Late, Outer, Params, local, mean, same
from replicas import Array, Replicas, bits, copied, move, weights

import pyccl
from pyccl.codecs import decode, encode
from pyccl.optim import AsyncDiLoCo, DiLoCo, LocalSGD, OuterOptimizer, StreamingDiLoCo
from pyccl.optim.exchange import Exchange, Outcome
from pyccl.reference import QUANTIZE_BLOCK


def trained(opt: Any, params: Params, seed: int, rank: int, rounds: int, first: int = 0) -> list[Params]:
    """theta after each round."""
    seen = []
    for step in range(first * H, (first + rounds) * H):
        move(params, seed, rank, step)
        if opt.step():
            seen.append(copied(opt.theta))
            assert bits(params) == bits(opt.theta)
    return seen


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    ("lr", "mu", "nesterov"), [(0.7, 0.9, True), (0.7, 0.5, False), (0.7, 0.0, True)], ids=["nesterov", "heavy", "sgd"]
)
def test_theta_follows_the_reference_bit_for_bit(
    replicas: Replicas, seed: int, world: int, lr: float, mu: float, nesterov: bool
) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        with DiLoCo(comm, params, H, outer_lr=lr, outer_momentum=mu, nesterov=nesterov) as opt:
            return trained(opt, params, seed, rank, 4), opt.shared.digest(), opt.shared.revision

    outer, expected = Outer(weights(), lr, mu, nesterov), []
    for round_ in range(4):
        outer.step(mean([local(outer.theta, seed, rank, round_) for rank in range(world)]))
        expected.append(copied(outer.theta))
    told = replicas.run(world, train)
    for seen, digest, revision in told:
        same(seen, expected)
        assert (digest, revision) == (told[0][1], 4)


def test_with_lr_1_and_no_momentum_it_is_local_sgd_but_for_rounding(replicas: Replicas, seed: int) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params, others = weights(), weights()
        seen = trained(LocalSGD(comm, params, H), params, seed, rank, 3)
        plain = DiLoCo(comm, others, H, outer_lr=1.0, outer_momentum=0.0, nesterov=False)
        return seen, trained(plain, others, seed, rank, 3)

    for averaged, stepped in replicas.run(3, train):
        for a, b in zip(averaged, stepped, strict=True):
            for name in a:
                np.testing.assert_allclose(a[name], b[name], rtol=0, atol=2e-6)


# ---- one round late


@pytest.mark.parametrize("world", [2, 3])
def test_late_theta_follows_the_reference_bit_for_bit(replicas: Replicas, seed: int, world: int) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = AsyncDiLoCo(comm, params, H, outer_lr=0.4, outer_momentum=0.5)
        seen = trained(opt, params, seed, rank, 5)
        opt.finish()
        return [*seen, copied(opt.theta)], copied(params), opt.round

    late, expected = Late(world, 0.4, 0.5, eager=False), []
    for round_ in range(5):
        late.round(range(world), seed, round_)
        expected.append(copied(late.outers[0].theta))
    late.finish()
    for seen, params, rounds in replicas.run(world, train):
        same(seen, [*expected, late.outers[0].theta])
        assert bits(params) == bits(seen[-1]) and rounds == 5


@pytest.mark.parametrize("world", [2, 3])
def test_eager_replicas_follow_the_reference_each_with_its_own_theta(replicas: Replicas, seed: int, world: int) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = AsyncDiLoCo(comm, params, H, outer_lr=0.4, outer_momentum=0.5, eager=True)
        seen = trained(opt, params, seed, rank, 5)
        opt.finish()
        return [*seen, copied(opt.theta)]

    late = Late(world, 0.4, 0.5, eager=True)
    expected: list[list[Params]] = [[] for _ in range(world)]
    for round_ in range(5):
        late.round(range(world), seed, round_)
        for rank in range(world):
            expected[rank].append(copied(late.outers[rank].theta))
    late.finish()
    told = replicas.run(world, train)
    for rank in range(world):
        same(told[rank], [*expected[rank], late.outers[rank].theta])
    assert bits(told[0][-1]) != bits(told[1][-1])


@pytest.mark.parametrize("eager", [False, True])
def test_late_a_member_that_left_is_in_the_means_it_took_part_in(replicas: Replicas, seed: int, eager: bool) -> None:
    """Rank 2 takes part in the exchange of the first round, which is over when it goes; the next is of two."""

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = AsyncDiLoCo(comm, params, H, outer_lr=0.4, outer_momentum=0.5, eager=eager)
        if rank == 2:
            trained(opt, params, seed, rank, 1)
            opt.finish()
            comm.close()
            return []
        seen = trained(opt, params, seed, rank, 4)
        opt.finish()
        assert opt.contributions == 3 + 3 * 2
        return [*seen, copied(opt.theta)]

    late = Late(3, 0.4, 0.5, eager)
    expected: list[list[Params]] = [[], []]
    for round_ in range(4):
        late.round(range(3 if round_ == 0 else 2), seed, round_)
        for rank in range(2):
            expected[rank].append(copied(late.outers[rank].theta))
    late.outers.pop()
    late.finish()
    told = replicas.run(3, train)
    for rank in range(2):
        same(told[rank], [*expected[rank], late.outers[rank].theta])


def test_finish_puts_theta_into_the_live_weights_with_nothing_in_flight_too(replicas: Replicas, seed: int) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> None:
        params = weights()
        opt = AsyncDiLoCo(comm, params, H)
        for rounds in (0, 2):
            trained(opt, params, seed, rank, rounds)
            for _ in range(2):
                move(params, seed, rank, 0)
                opt.step()
                opt.finish()
                assert bits(params) == bits(opt.theta)
        assert opt.round == 2

    replicas.run(2, train)


@pytest.mark.parametrize("kind", ["local", "diloco", "late", "streaming"])
def test_a_round_whose_exchange_failed_counts_as_rolled_back(
    replicas: Replicas, seed: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: Counter[str] = Counter()
    wait = Exchange.wait

    def second_fails(exchange: Exchange) -> Outcome:
        outcome = wait(exchange)
        waits[exchange.comm.peer_id] += 1
        if waits[exchange.comm.peer_id] == 2:
            raise pyccl.DeadlineError("for a test")
        return outcome

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params, raised = weights(), 0
        make: dict[str, Callable[[], OuterOptimizer]] = {
            "local": lambda: LocalSGD(comm, params, H),
            "diloco": lambda: DiLoCo(comm, params, H),
            "late": lambda: AsyncDiLoCo(comm, params, H),
            "streaming": lambda: StreamingDiLoCo(comm, params, H, fragments=1),
        }
        opt = make[kind]()
        for step in range(4 * H):
            move(params, seed, rank, step)
            try:
                opt.step()
            except pyccl.DeadlineError:
                raised += 1
        opt.finish()
        return opt.stats.rollbacks, opt.stats.rounds, raised, bits(opt.theta)

    monkeypatch.setattr(Exchange, "wait", second_fails)
    told = replicas.run(2, train)
    assert told[0] == told[1] and told[0][:3] == (1, 3, int(kind in ("local", "diloco")))


# ---- quantized


def through(x: Array, codec: str) -> Array:
    flat = x.reshape(-1)
    return decode(encode(flat, codec, QUANTIZE_BLOCK), codec, QUANTIZE_BLOCK, flat.size).reshape(x.shape)


@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize(("codec", "world"), [("fp4_e3m0", 2), ("fp4_e3m0", 3), ("uint8", 3)])
def test_quantized_shares_are_rounded_once_each_and_averaged_in_float32(
    replicas: Replicas, seed: int, codec: str, world: int, feedback: bool
) -> None:
    """All names are one vector for the codec, in the order of the names."""

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = {"w": weights()["a.weight"]}
        opt = DiLoCo(comm, params, H, quantize=codec, error_feedback=feedback)
        return trained(opt, params, seed, rank, 4), opt.stats

    start = {"w": weights()["a.weight"]}
    outer, expected = Outer(start, 0.7, 0.9, True), []
    lost = [np.zeros_like(start["w"]) for _ in range(world)]
    for round_ in range(4):
        sent = [local(outer.theta, seed, rank, round_)["w"] + lost[rank] for rank in range(world)]
        decoded = [through(x, codec) for x in sent]
        if feedback:
            lost = [x - y for x, y in zip(sent, decoded, strict=True)]
        outer.step(mean([{"w": x} for x in decoded]))
        expected.append(copied(outer.theta))
    for seen, _ in replicas.run(world, train):
        same(seen, expected)
