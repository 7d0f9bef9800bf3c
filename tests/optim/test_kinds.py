"""Every optimizer on parameters of every kind, bit for bit beside the rules as they are written (kinds.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from kinds import FROZEN, NAMES, TIED, Averaged, Blocking, Eager, Gossip, H, Late, Run, Streaming, made, moved
from replicas import Replicas, bits, copied

import pyccl
from pyccl import optim
from pyccl.optim.gossip import draw_groups

STEPS = 4 * H + 2  # the last round is not complete
FRAGMENTS = [list(names) for names in Streaming.fragments]
MAKE: dict[str, Callable[[pyccl.Communicator, Any], optim.OuterOptimizer]] = {
    "LocalSGD": lambda comm, params: optim.LocalSGD(comm, params, H),
    "DiLoCo": lambda comm, params: optim.DiLoCo(comm, params, H),
    "heavy-ball": lambda comm, params: optim.DiLoCo(comm, params, H, outer_momentum=0.5, nesterov=False),
    "late": lambda comm, params: optim.AsyncDiLoCo(comm, params, H, outer_lr=0.4, outer_momentum=0.5),
    "eager": lambda comm, params: optim.AsyncDiLoCo(comm, params, H, outer_lr=0.4, outer_momentum=0.5, eager=True),
    "streaming": lambda comm, params: optim.StreamingDiLoCo(
        comm, params, H, fragments=FRAGMENTS, delay=1, alpha=Streaming.alpha
    ),
    "NoLoCo": lambda comm, params: optim.NoLoCo(comm, params, H, seed=5),
}
RUNS: dict[str, Callable[[int, int], Run]] = {
    "LocalSGD": Averaged,
    "DiLoCo": Blocking,
    "heavy-ball": lambda world, seed: Blocking(world, seed, mu=0.5, nesterov=False),
    "late": lambda world, seed: Late(world, seed, lr=0.4, mu=0.5),
    "eager": lambda world, seed: Eager(world, seed, lr=0.4, mu=0.5),
    "streaming": lambda world, seed: Streaming(world, seed, lr=0.4),
}


def run_of(name: str, seed: int, peers: Sequence[str]) -> Run:
    """peers: in member order."""
    if name != "NoLoCo":
        return RUNS[name](len(peers), seed)
    return Gossip(
        len(peers), seed, lambda k: [sorted(map(peers.index, group)) for group in draw_groups(5, k, peers, 2)]
    )


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", MAKE)
def test_arrays_of_every_kind_follow_the_rules_bit_for_bit(
    replicas: Replicas, seed: int, name: str, world: int
) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params, seen = made(), []
        opt = MAKE[name](comm, params)
        for step in range(STEPS):
            moved(params, seed, rank, step)
            opt.step()
            seen.append((bits(opt.theta), bits(params)))
        assert {n: (t.shape, t.dtype) for n, t in opt.theta.items()} == {
            n: (p.shape, np.dtype(np.float64 if n == "b.wide" else np.float32)) for n, p in params.items()
        }
        again = copied(opt.theta), comm.peer_id
        opt.finish()
        return seen, *again

    told = replicas.run(world, train)
    run = run_of(name, seed, [peer for *_, peer in told])
    start = made()[FROZEN]
    for step in range(STEPS):
        run.step()
        for rank, (seen, *_) in enumerate(told):
            theta, live = seen[step]
            for part in NAMES:
                assert theta[part] == run.thetas[rank][part].tobytes(), f"theta {part}, {rank} after step {step}"
                assert live[part] == run.w[rank][part].tobytes(), f"live {part}, {rank} after step {step}"
            assert (theta[TIED], live[TIED]) == (theta["a.turned"], live["a.turned"])
    if name != "LocalSGD":  # the mean of three equal numbers may be one that is next to them
        assert all(theta[FROZEN].tobytes() == start.tobytes() for _, theta, _ in told)
