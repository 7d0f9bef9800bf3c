"""NoLoCo through the public API, bit for bit beside a reference that knows nothing of networks."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from replicas import TIMEOUT_S, Array, Replicas, bits, copied, ended, move, weights

import pyccl
from pyccl.optim import NoLoCo
from pyccl.optim.gossip import draw_groups

F32 = np.float32
Params = dict[str, Array]
ALPHA, BETA, GAMMA = F32(0.5), F32(0.7), F32(0.7)
M = 3  # inner steps of a round


class Reference:
    """All replicas of a run by peer id; rank says whose inner steps a replica makes."""

    def __init__(self, ranks: Mapping[str, int], seed: int, groups_seed: int, size: int = 2) -> None:
        self.ranks, self.seed, self.groups_seed, self.size = dict(ranks), seed, groups_seed, size
        self.phi = {peer: weights() for peer in ranks}
        self.v: dict[str, Params] = {peer: {n: np.zeros_like(x) for n, x in weights().items()} for peer in ranks}
        self.rounds = 0

    def round(self, groups: Sequence[Sequence[str]] | None = None) -> None:
        """groups: with whom each steps, where that is not as drawn."""
        w = copies(self.phi)
        for peer, rank in self.ranks.items():
            for step in range(self.rounds * M, (self.rounds + 1) * M):
                move(w[peer], self.seed, rank, step)
        before = copies(self.phi)
        for group in groups or draw_groups(self.groups_seed, self.rounds, self.ranks, self.size):
            for peer in group:
                for name, p in before[peer].items():
                    moved = added_up([w[other][name] - before[other][name] for other in group])
                    pull = p - added_up([before[other][name] for other in group]) / F32(len(group))
                    v = ALPHA * self.v[peer][name] + F32(0.7 / len(group)) * moved
                    v = self.v[peer][name] = v - GAMMA * pull if len(group) > 1 else v
                    self.phi[peer][name] = p + v
        self.rounds += 1

    def leave(self, peer: str) -> None:
        for table in (self.ranks, self.phi, self.v):
            del table[peer]  # type: ignore[attr-defined]


def copies(of: Mapping[str, Params]) -> dict[str, Params]:
    return {peer: copied(params) for peer, params in of.items()}


def added_up(shares: Sequence[Array]) -> Array:
    total = shares[0].copy()
    for share in shares[1:]:
        total = total + share
    return total


def trained(opt: NoLoCo, params: Params, seed: int, rank: int, rounds: range) -> list[Params]:
    """phi after each round."""
    seen = []
    for step in range(rounds.start * M, rounds.stop * M):
        move(params, seed, rank, step)
        if opt.step():
            assert bits(params) == bits(opt.theta)
            seen.append(copied(opt.theta))
    return seen


@pytest.mark.parametrize(("world", "size"), [(2, 2), (3, 2), (4, 2), (5, 3)])
def test_replicas_follow_the_reference_bit_for_bit(replicas: Replicas, seed: int, world: int, size: int) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        with NoLoCo(comm, params, M, seed=seed, group_size=size) as opt:
            seen = trained(opt, params, seed, rank, range(5))
            assert (opt.round, opt.stats.rounds, opt.shared.revision) == (5, 5, 5)
            assert not any(outcome.lost for outcome in opt.outcomes)
            assert opt.contributions == sum(len(outcome.group) for outcome in opt.outcomes)
            return comm.peer_id, seen

    told = replicas.run(world, train)
    reference = Reference({peer: rank for rank, (peer, _) in enumerate(told)}, seed, seed, size)
    for number in range(5):
        reference.round()
        for peer, seen in told:
            assert bits(seen[number]) == bits(reference.phi[peer]), f"{peer} after round {number}"
    assert (len({str(bits(seen[-1])) for _, seen in told}) > 1) == (world > size)  # some may have met each time


def test_mean_of_the_replicas_follows_heavy_ball_diloco(replicas: Replicas, seed: int) -> None:
    """Inner steps that do not depend on the weights: then the mean may be followed by itself. optimizers.md 5 (1)."""
    moves = np.random.default_rng(seed).standard_normal((4, 6, 8)).astype(F32)  # (rank, round, element)

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = {"w": np.ones(8, F32)}
        opt = NoLoCo(comm, params, 1, seed=seed)
        for number in range(6):
            params["w"] += moves[rank, number]
            opt.step()
        return copied(opt.theta)["w"]

    phi, v = np.ones(8), np.zeros(8)
    for number in range(6):
        v = 0.5 * v + 0.7 * moves[:, number].mean(axis=0)
        phi = phi + v
    np.testing.assert_allclose(np.mean(replicas.run(4, train), axis=0), phi, rtol=1e-5, atol=1e-5)


def test_merge_makes_one_model_of_all(replicas: Replicas, seed: int) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = NoLoCo(comm, params, M, seed=seed)
        (*_, last) = trained(opt, params, seed, rank, range(3))
        merged = copied(opt.merge())
        assert bits(params) == bits(merged) == bits(opt.theta)
        again = trained(opt, params, seed, rank, range(3, 5))
        return comm.peer_id, last, merged, again

    told = replicas.run(3, train)
    for name in weights():
        mean = pyccl.reference_all_reduce([last[name] for _, last, _, _ in told], op="avg")
        assert all(merged[name].tobytes() == mean.tobytes() for _, _, merged, _ in told)
    reference = Reference({peer: rank for rank, (peer, *_) in enumerate(told)}, seed, seed)
    for _ in range(3):
        reference.round()
    reference.phi = {peer: copied(merged) for peer, _, merged, _ in told}
    for number in range(2):  # training goes on, with the momenta that were there
        reference.round()
        assert all(bits(again[number]) == bits(reference.phi[peer]) for peer, *_, again in told)


def test_phi_of_the_partner_comes_while_inner_steps_run(replicas: Replicas, seed: int) -> None:
    meet = threading.Barrier(2)

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = NoLoCo(comm, params, M, seed=seed)
        trained(opt, params, seed, rank, range(2))
        move(params, seed, rank, 2 * M)
        assert not opt.step()
        opt.finish()  # in the middle of the round
        tx_bytes, (early,) = opt.stats.tx_bytes, opt._swaps
        meet.wait(TIMEOUT_S)
        trained(opt, params, seed, rank, range(2, 3))
        assert opt.stats.seconds_hidden > 0
        return copied(early.recv.views), tx_bytes, comm.peer_id

    members = replicas.members(2)
    told = replicas.together(members, train)
    reference = Reference({peer: rank for rank, (*_, peer) in enumerate(told)}, seed, seed)
    reference.round()
    reference.round()
    for (early, _, _), (_, _, other) in zip(told, told[::-1], strict=True):
        assert bits(early) == bits(reference.phi[other])


def test_partner_that_leaves_in_a_round_is_left_out_and_drawn_no_more(replicas: Replicas, seed: int) -> None:
    """Rank 3 makes no end to its second round: its partner of then waits for what it moved."""

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = NoLoCo(comm, params, M, seed=seed)
        seen = trained(opt, params, seed, rank, range(1))
        if rank == 3:
            move(params, seed, rank, M)
            opt.step()
            comm.close()
            return comm.peer_id, seen, []
        seen += trained(opt, params, seed, rank, range(1, 6))
        return comm.peer_id, seen, [(o.round, o.group, o.lost) for o in opt.outcomes]

    told = replicas.run(4, train)
    gone = told[3][0]
    reference = Reference({peer: rank for rank, (peer, *_) in enumerate(told)}, seed, seed)
    reference.round()
    reference.leave(gone)
    for number in range(1, 6):
        stepped = []
        for peer, _, outcomes in told[:3]:
            round_, group, lost = outcomes[number]
            assert round_ == number and peer in group
            assert set(lost) == ({gone} & set(group))
            stepped.append(tuple(p for p in group if p not in lost))
        if number >= 3:
            assert all(gone not in outcomes[number][1] for _, _, outcomes in told[:3])
        if number == 1:
            assert sum(gone in outcomes[number][1] for _, _, outcomes in told[:3]) == 1
        reference.round(sorted(set(stepped)))
        for peer, seen, _ in told[:3]:
            assert bits(seen[number]) == bits(reference.phi[peer]), f"{peer} after round {number}"


def test_last_one_left_goes_on_alone(replicas: Replicas, seed: int) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = NoLoCo(comm, params, M, seed=seed)
        seen = trained(opt, params, seed, rank, range(1 + 3 * (rank == 0)))
        if rank == 1:
            comm.close()
        return comm.peer_id, seen

    told = replicas.run(2, train)
    reference = Reference({peer: rank for rank, (peer, _) in enumerate(told)}, seed, seed)
    reference.round()
    reference.leave(told[1][0])
    for number in range(1, 4):
        reference.round()
        assert bits(told[0][1][number]) == bits(reference.phi[told[0][0]])


def test_newcomer_takes_phi_of_a_member_and_no_momentum(replicas: Replicas, seed: int) -> None:
    waits, newcomer = threading.Event(), replicas.communicator()

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = NoLoCo(comm, params, M, seed=seed)
        seen: list[Params] = []
        while comm.group_world_size < 3:
            seen += trained(opt, params, seed, rank, range(len(seen), len(seen) + 1))
            if len(seen) == 2:
                waits.set()
        when = len(seen)
        seen += trained(opt, params, seed, rank, range(when, when + 4))
        return comm.peer_id, seen, when

    def join() -> Any:
        assert waits.wait(TIMEOUT_S)
        newcomer.connect(TIMEOUT_S)
        params = weights()
        params["b"] += 1.0
        opt = NoLoCo(newcomer, params, M, seed=seed)
        began = opt.round, copied(opt.theta), copied(params)
        assert not any(np.any(view) for name, view in opt.shared.arrays.items() if name.startswith("momentum/"))
        return began, trained(opt, params, seed, 7, range(opt.round, opt.round + 4))

    members = replicas.members(2)
    calls = [replicas.start(train, comm, rank) for rank, comm in enumerate(members)]
    (began_at, theta, live), joined = replicas.start(join).result(TIMEOUT_S)
    told = ended(calls)
    when = told[0][2]
    assert began_at == when == told[1][2]
    reference = Reference({peer: rank for rank, (peer, *_) in enumerate(told)}, seed, seed)
    for number in range(when):
        reference.round()
        assert all(bits(seen[number]) == bits(reference.phi[peer]) for peer, seen, _ in told)
    assert bits(theta) == bits(live) and bits(theta) in [bits(phi) for phi in reference.phi.values()]
    me = newcomer.peer_id
    reference.ranks[me], reference.phi[me] = 7, copied(theta)
    reference.v[me] = {name: np.zeros_like(x) for name, x in theta.items()}
    for number in range(when, when + 4):
        reference.round()
        assert all(bits(seen[number]) == bits(reference.phi[peer]) for peer, seen, _ in told)
        assert bits(joined[number - when]) == bits(reference.phi[me])


def test_loaded_run_goes_on_as_if_it_had_never_stopped(replicas: Replicas, seed: int) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params, again = weights(), weights()
        opt = NoLoCo(comm, params, M, seed=seed)
        trained(opt, params, seed, rank, range(2))
        state = opt.state_dict()
        expected = trained(opt, params, seed, rank, range(2, 5))
        opt.finish()
        resumed = NoLoCo(comm, again, M, seed=seed)
        resumed.load_state_dict(state)
        assert bits(again) == bits(resumed.theta)
        found = trained(resumed, again, seed, rank, range(2, 5))
        return [bits(phi) for phi in expected] == [bits(phi) for phi in found], bits(expected[-1])

    told = replicas.run(3, train)
    assert all(equal for equal, _ in told)
    assert len({str(last) for _, last in told}) > 1  # two that were a pair in every round are equal


def test_members_with_another_seed_are_told(replicas: Replicas) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> Any:
        with pytest.raises(pyccl.MismatchError) as caught:
            NoLoCo(comm, weights(), M, seed=rank)
        return caught.value.fields

    assert replicas.run(2, train) == [("seed",), ("seed",)]


def test_unstable_values_are_warned_of_with_the_numbers(replicas: Replicas) -> None:
    (comm,) = replicas.members(1)
    with pytest.warns(UserWarning, match=r"gamma=1\.2.* = 0\.38 among many members"):
        NoLoCo(comm, weights(), M, alpha=0.9, gamma=1.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NoLoCo(comm, weights(), M)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"beta": "0.7"}, "beta='0.7'"),
        ({"gamma": float("inf")}, "gamma=inf"),
        ({"group_size": 1}, "group_size=1"),
        ({"group_size": 2.0}, r"group_size=2\.0"),
        ({"seed": -1}, "seed=-1"),
        ({"sync_every": 0}, "sync_every=0"),
    ],
)
def test_wrong_arguments_are_refused(replicas: Replicas, options: dict[str, Any], told: str) -> None:
    (comm,) = replicas.members(1)
    with pytest.raises(pyccl.UsageError, match=told):
        NoLoCo(comm, weights(), **{"sync_every": M, **options})
