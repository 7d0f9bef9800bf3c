"""Who joins, leaves, differs or is too few: every row of the table of failures in docs/optimizers.md."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import H, Late, Outer, Params, local, mean, same
from replicas import TIMEOUT_S, Replicas, bits, copied, ended, move, wait_pending, weights

import pyccl
from pyccl.optim import AsyncDiLoCo, DiLoCo, LocalSGD, OuterOptimizer
from pyccl.optim.exchange import Exchange, Outcome


def one_round(opt: OuterOptimizer, params: Params, seed: int, rank: int, round_: int) -> Params:
    """Its inner steps, and theta after it."""
    for step in range(H):
        move(params, seed, rank, round_ * H + step)
        opt.step()
    return copied(opt.theta)


class Joining:
    """Two members train; a third connects before the last step of round `at`, and trains when it is in."""

    def __init__(self, replicas: Replicas, make: Any, seed: int, at: int, first: int, rounds: int) -> None:
        self.make, self.seed, self.at, self.first, self.rounds = make, seed, at, first, rounds
        self.connecting = threading.Event()
        self.launched = threading.Barrier(2)  # the exchange of the round before, on both: it must not tell of the third
        self.members = replicas.members(2)
        self.third = replicas.communicator()
        calls = [replicas.start(self.stay, comm, rank) for rank, comm in enumerate(self.members)]
        calls.append(replicas.start(self.join))
        self.thetas, self.ends = zip(*ended(calls), strict=True)
        self.ids = [comm.peer_id for comm in (*self.members, self.third)]

    def stay(self, comm: pyccl.Communicator, rank: int) -> Any:
        params, seen = weights(), []
        opt = self.make(comm, params)
        for round_ in range(self.rounds):
            if round_ == self.at:
                self.launched.wait(TIMEOUT_S)
                self.connecting.set()
                wait_pending(comm)
            seen.append(one_round(opt, params, self.seed, rank, round_))
        opt.finish()
        return seen, (copied(opt.theta), opt.shared.digest(), opt.stats.rounds, opt.contributions)

    def join(self) -> Any:
        assert self.connecting.wait(TIMEOUT_S)
        self.third.connect(TIMEOUT_S)
        params = weights(seed=1)  # whatever it holds, it gets the members' theta
        opt = self.make(self.third, params)
        seen = [copied(opt.theta)]
        assert bits(params) == bits(opt.theta)
        seen += [one_round(opt, params, self.seed, 2, round_) for round_ in range(self.first, self.rounds)]
        opt.finish()
        return seen, (copied(opt.theta), opt.shared.digest(), opt.stats.rounds, opt.contributions)

    def shares(self, thetas: list[Params], round_: int) -> list[Params]:
        """In member order."""
        ranks = range(3) if round_ >= self.first else range(2)
        order = sorted(ranks, key=lambda rank: self.ids[rank])
        return [local(thetas[rank], self.seed, rank, round_) for rank in order]


def test_a_newcomer_takes_theta_momentum_and_counter_and_counts_from_its_first_round_on(
    replicas: Replicas, seed: int
) -> None:
    joined = Joining(replicas, lambda comm, params: DiLoCo(comm, params, H), seed, at=1, first=2, rounds=5)
    outer, expected = Outer(weights(), 0.7, 0.9, True), []
    for round_ in range(5):
        outer.step(mean(joined.shares([outer.theta] * 3, round_)))
        expected.append(copied(outer.theta))
    for rank in range(2):
        same(joined.thetas[rank], expected)
    same(joined.thetas[2], expected[1:])
    assert len({digest for _, digest, *_ in joined.ends}) == 1
    assert [rounds for *_, rounds, _ in joined.ends] == [5, 5, 3]
    assert {contributions for *_, contributions in joined.ends} == {2 * 2 + 3 * 3}


def test_a_newcomer_of_local_sgd_begins_with_the_last_mean(replicas: Replicas, seed: int) -> None:
    joined = Joining(replicas, lambda comm, params: LocalSGD(comm, params, H), seed, at=0, first=1, rounds=3)
    theta, expected = weights(), []
    for round_ in range(3):
        moved = [{n: theta[n] - g[n] for n in theta} for g in joined.shares([theta] * 3, round_)]
        theta = mean(moved)
        expected.append(theta)
    for found, wanted in zip(joined.thetas, (expected, expected, expected), strict=True):
        for f, e in zip(found, wanted, strict=True):
            for name in f:
                np.testing.assert_allclose(f[name], e[name], rtol=0, atol=1e-5)
    assert len({digest for _, digest, *_ in joined.ends}) == 1
    assert {contributions for *_, contributions in joined.ends} == {2 + 2 * 3}


@pytest.mark.parametrize("eager", [False, True])
def test_a_newcomer_one_round_late_also_gets_the_mean_that_it_is_no_part_of(
    replicas: Replicas, seed: int, eager: bool
) -> None:
    """Seen with the exchange of round 1, which ends with round 2: it trains from round 3 on."""

    def make(comm: pyccl.Communicator, params: Params) -> AsyncDiLoCo:
        return AsyncDiLoCo(comm, params, H, outer_lr=0.4, outer_momentum=0.5, eager=eager)

    joined = Joining(replicas, make, seed, at=1, first=3, rounds=6)
    donor = next((rank for rank in range(2) if eager and bits(joined.thetas[2][0]) == bits(joined.thetas[rank][2])), 0)
    late = Late(3, 0.4, 0.5, eager)
    for round_ in range(6):
        if round_ == 3:
            late.outers[2] = late.outers[donor].copy()
        ranks = [0, 1, 2] if round_ >= 3 else [0, 1]
        late.round(sorted(ranks, key=lambda rank: joined.ids[rank]), seed, round_)
        for rank in ranks:
            at = round_ - 2 if rank == 2 else round_
            assert bits(joined.thetas[rank][at]) == bits(late.outers[rank].theta), f"rank {rank}, round {round_}"
    late.finish()
    for rank in range(3):
        assert bits(joined.ends[rank][0]) == bits(late.outers[rank].theta)
    assert {contributions for *_, contributions in joined.ends} == {3 * 2 + 3 * 3}


@pytest.mark.parametrize("kind", [LocalSGD, DiLoCo, AsyncDiLoCo])
def test_one_alone_rolls_back_and_waits_and_goes_on_with_who_comes(
    replicas: Replicas, seed: int, kind: type[OuterOptimizer]
) -> None:
    first, second = replicas.members(2)
    third = replicas.communicator()
    left = threading.Event()

    def stays(comm: pyccl.Communicator) -> Any:
        params = weights()
        opt = kind(comm, params, H)
        for round_ in range(2):
            one_round(opt, params, seed, 0, round_)
        assert left.wait(TIMEOUT_S)
        before = copied(opt.theta), opt.round
        rounds = 0
        while opt.stats.rollbacks == 0:  # late, it finds out a round later
            rounds += 1
            moved = copied(params)
            for step in range(H):
                move(moved, seed, 0, step)
            one_round(opt, params, seed, 0, 0)
        assert opt.round <= before[1] + rounds - 1
        assert bits(params) == bits(moved if kind is LocalSGD else opt.theta)
        assert comm.group_world_size == 2
        for round_ in range(3):
            one_round(opt, params, seed, 0, round_)
        opt.finish()
        return opt.shared.digest(), opt.round

    def leaves(comm: pyccl.Communicator) -> None:
        params = weights()
        opt = kind(comm, params, H)
        for round_ in range(2):
            one_round(opt, params, seed, 1, round_)
        comm.close()
        left.set()

    def comes() -> Any:
        assert left.wait(TIMEOUT_S)
        third.connect(TIMEOUT_S)
        params = weights(seed=1)
        opt = kind(third, params, H)
        for round_ in range(3):
            one_round(opt, params, seed, 2, round_)
        opt.finish()
        return opt.shared.digest(), opt.round

    calls = [replicas.start(stays, first), replicas.start(leaves, second), replicas.start(comes)]
    stayed, _, came = ended(calls)
    assert stayed == came


def test_settings_that_differ_are_named_on_all_founders(replicas: Replicas) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> Any:
        with pytest.raises(pyccl.MismatchError) as caught:
            DiLoCo(comm, weights(), 3 + (rank == 2), outer_lr=0.7 if rank < 2 else 0.5)
        return caught.value.fields, caught.value.peers, str(caught.value)

    comms = replicas.members(3)
    for fields, peers, text in replicas.together(comms, train):
        assert fields == ("outer_lr", "sync_every") and peers == (comms[2].peer_id,)
        assert f"outer_lr is 0.7 on {comms[0].peer_id[:8]}" in text


@pytest.mark.parametrize("other", ["lr", "optimizer", "parameters"])
def test_a_newcomer_with_other_settings_leaves_and_the_run_goes_on(replicas: Replicas, seed: int, other: str) -> None:
    members, third = replicas.members(2), replicas.communicator()
    joining = threading.Event()

    def stay(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = DiLoCo(comm, params, H)
        for round_ in range(4):
            if round_ == 1:
                joining.set()
                wait_pending(comm)
            one_round(opt, params, seed, rank, round_)
        return opt.shared.digest(), opt.round, comm.group_world_size

    def join() -> Any:
        assert joining.wait(TIMEOUT_S)
        third.connect(TIMEOUT_S)
        make = {
            "lr": lambda: DiLoCo(third, weights(), H, outer_lr=0.1),
            "optimizer": lambda: LocalSGD(third, weights(), H),
            "parameters": lambda: DiLoCo(third, {"a": np.zeros(3, np.float32)}, H),
        }[other]
        with pytest.raises(pyccl.MismatchError) as caught:
            make()
        with pytest.raises(pyccl.UsageError, match=r"not connected|closed"):
            third.barrier()
        return caught.value.fields, caught.value.peers

    *stayed, (fields, peers) = ended(
        [*(replicas.start(stay, c, r) for r, c in enumerate(members)), replicas.start(join)]
    )
    assert stayed[0] == stayed[1] and stayed[0][1:] == (4, 2)
    assert peers == (third.peer_id,)
    assert {"lr": "outer_lr", "optimizer": "optimizer", "parameters": "params"}[other] in fields


@pytest.mark.parametrize("part", ["theta", "momentum"])
@pytest.mark.parametrize("kind", [DiLoCo, AsyncDiLoCo])
def test_a_member_whose_bits_differ_is_named_on_all_and_brought_in_step(
    replicas: Replicas, seed: int, kind: type[DiLoCo], part: str
) -> None:
    comms = replicas.members(3)
    odd = comms[1].peer_id

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = kind(comm, params, H)
        caught: list[pyccl.MismatchError] = []
        for round_ in range(6):
            if round_ == 3 and rank == 1:
                opt.shared.arrays[f"{part}/b"].view(np.uint32)[0] ^= 1 << 20  # more than an outer step rounds away
            try:
                one_round(opt, params, seed, rank, round_)
            except pyccl.MismatchError as e:
                caught.append(e)
                assert bits(params) == bits(opt.theta)
        opt.finish()
        (error,) = caught
        return error.peers, error.fields, opt.shared.digest(), opt.round

    told = replicas.together(comms, train)
    peers, fields, _, rounds = told[0]
    assert all(t == told[0] for t in told) and peers == (odd,)
    assert part in fields and rounds >= 4


def test_a_safe_point_of_the_programs_own_lets_a_newcomer_in_as_well(replicas: Replicas, seed: int) -> None:
    members, third = replicas.members(2), replicas.communicator()
    joining = threading.Event()

    def stay(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = DiLoCo(comm, params, H)
        one_round(opt, params, seed, rank, 0)
        joining.set()
        wait_pending(comm)
        comm.update_topology(TIMEOUT_S)
        assert comm.group_world_size == 3
        one_round(opt, params, seed, rank, 1)
        return opt.shared.digest(), opt.round

    def join() -> Any:
        assert joining.wait(TIMEOUT_S)
        third.connect(TIMEOUT_S)
        params = weights(seed=1)
        opt = DiLoCo(third, params, H)
        one_round(opt, params, seed, 2, 1)
        return opt.shared.digest(), opt.round

    told = ended([*(replicas.start(stay, c, r) for r, c in enumerate(members)), replicas.start(join)])
    assert told[0] == told[1] == told[2] and told[0][1] == 2


def test_alone_with_min_peers_1_it_is_an_outer_optimizer_on_one_replica(replicas: Replicas, seed: int) -> None:
    (comm,) = replicas.members(1)
    params = weights()
    opt = DiLoCo(comm, params, H, min_peers=1)
    outer = Outer(weights(), 0.7, 0.9, True)
    for round_ in range(3):
        theta = one_round(opt, params, seed, 0, round_)
        outer.step(local(outer.theta, seed, 0, round_))
        assert bits(theta) == bits(outer.theta)
    assert (opt.round, opt.stats.bytes) == (3, 0)


@pytest.mark.parametrize("kind", [DiLoCo, AsyncDiLoCo])
def test_an_observer_keeps_the_states_of_rounds_although_nobody_joins(
    replicas: Replicas, seed: int, kind: type[DiLoCo], tmp_path: Path
) -> None:
    comms = replicas.members(2)
    command = [sys.executable, "-P", "-m", "pyccl.cli.peer", replicas.address, "--dir", str(tmp_path)]
    observer = subprocess.Popen([*command, "--group", str(replicas.group)], stdout=subprocess.PIPE, text=True)
    kept = threading.Event()

    def train(comm: pyccl.Communicator, rank: int) -> int:
        params = weights()
        opt = kind(comm, params, H)
        until = time.monotonic() + TIMEOUT_S
        while not (rank or comm._is_watched):
            assert time.monotonic() < until, "no observer"
            time.sleep(0.002)
        stop = np.zeros(1, np.uint8)
        while not stop[0]:
            one_round(opt, params, seed, rank, opt.round)
            stop[0] = kept.is_set() or time.monotonic() > until
            comm.all_reduce(stop, op="max")  # both leave the loop after the same round
        return opt.stats.syncs

    def read() -> str:
        assert observer.stdout is not None
        for line in observer.stdout:
            if "revision" in line:
                kept.set()
                return line
        raise AssertionError("the observer kept nothing")

    try:
        line = replicas.start(read)
        assert min(replicas.together(comms, train)) > 1
        line.result(TIMEOUT_S)
    finally:
        observer.kill()
        observer.communicate(timeout=TIMEOUT_S)


def failing_at(monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """The n-th exchange of each member can't be completed."""
    inner, counts = Exchange.wait, Counter[str]()

    def wait(self: Exchange) -> Outcome:
        outcome = inner(self)
        counts[self.comm.peer_id] += 1
        if counts[self.comm.peer_id] == nth:
            raise pyccl.DeadlineError("for a test")
        return outcome

    monkeypatch.setattr(Exchange, "wait", wait)


@pytest.mark.parametrize("kind", [LocalSGD, DiLoCo])
def test_an_exchange_that_can_not_be_completed_raises_and_the_round_does_not_count(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch, seed: int, kind: type[OuterOptimizer]
) -> None:
    failing_at(monkeypatch, 2)

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = kind(comm, params, H)
        one_round(opt, params, seed, rank, 0)
        before, live = copied(opt.theta), copied(params)
        for step in range(H, 2 * H):
            move(live, seed, rank, step)
        with pytest.raises(pyccl.DeadlineError):
            one_round(opt, params, seed, rank, 1)
        assert bits(opt.theta) == bits(before) and opt.round == 1
        assert bits(params) == bits(live if kind is LocalSGD else before)
        return one_round(opt, params, seed, rank, 2), opt.shared.digest(), opt.round

    told = replicas.run(2, train)
    assert told[0][1:] == told[1][1:] and told[0][2] == 2
    if kind is DiLoCo:
        outer = Outer(weights(), 0.7, 0.9, True)
        for round_ in (0, 2):
            outer.step(mean([local(outer.theta, seed, rank, round_) for rank in range(2)]))
        assert bits(told[0][0]) == bits(outer.theta)


def test_late_an_exchange_that_can_not_be_completed_is_an_outer_step_less(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    failing_at(monkeypatch, 2)

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = AsyncDiLoCo(comm, params, H, outer_lr=0.4, outer_momentum=0.5)
        return [one_round(opt, params, seed, rank, round_) for round_ in range(5)]

    late, expected = Late(2, 0.4, 0.5, eager=False), []
    for round_ in range(5):
        if round_ == 2:
            late.flying = {}
        late.round(range(2), seed, round_)
        expected.append(copied(late.outers[0].theta))
    for seen in replicas.run(2, train):
        same(seen, expected)
