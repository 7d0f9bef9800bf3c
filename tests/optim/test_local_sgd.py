"""LocalSGD: means of live weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from replicas import Replicas, bits, copied, move, weights

import pyccl
from pyccl.optim import LocalSGD


@pytest.mark.parametrize("world", [2, 3])
def test_the_live_weights_become_the_mean_after_every_sync_every_steps(
    replicas: Replicas, seed: int, world: int
) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> list[Any]:
        params, seen = weights(), []
        with LocalSGD(comm, params, sync_every=3) as opt:
            for step in range(6):
                move(params, seed, rank, step)
                before = copied(params)
                assert opt.step() == (step % 3 == 2)
                seen.append((before, copied(params), copied(opt.theta), opt.round))
            assert (opt.stats.rounds, opt.stats.inner_steps, opt.stats.rollbacks) == (2, 6, 0)
            assert opt.stats.bytes > 0 < opt.stats.seconds_blocked
        return seen

    told = replicas.run(world, train)
    for step in range(6):
        for name in weights():
            if step % 3 < 2:
                assert all(seen[step][0][name].tobytes() == seen[step][1][name].tobytes() for seen in told)
                continue
            mean = pyccl.reference_all_reduce([seen[step][0][name] for seen in told], op="avg")
            assert all(seen[step][1][name].tobytes() == mean.tobytes() for seen in told)
            assert all(seen[step][2][name].tobytes() == mean.tobytes() for seen in told)
        assert {seen[step][3] for seen in told} == {(step + 1) // 3}
    assert len({str(bits(seen[-1][1])) for seen in told}) == 1
    assert np.isfinite(told[0][-1][1]["b"]).all()
