"""A live parameter that is not what it was: told before this replica contributes anything; nothing is lost by it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kinds import H
from replicas import Replicas, bits, move
from test_kinds import MAKE

import pyccl
from pyccl import optim

F32 = np.float32
STEPS = 4 * H
MAKERS = MAKE | {
    "streaming": lambda comm, params: optim.StreamingDiLoCo(comm, params, H, fragments=2, delay=1, alpha=0.25)
}


@pytest.mark.parametrize("at", [2 * H, 3 * H - 2, 3 * H - 1], ids=["begins", "sends", "ends"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_run_goes_on_when_the_parameter_is_mended(master: str, seed: int, name: str, at: int) -> None:
    """Seed and members of two runs are the same; in one of them rank 1 has a smaller array for a moment."""

    def train(comm: pyccl.Communicator, rank: int, *, spoilt: bool) -> Any:
        params = {"a": np.ones(2000, F32), "b": np.ones(3, F32)}
        opt = MAKERS[name](comm, params)
        for step in range(STEPS):
            move(params, seed, rank, step)
            if spoilt and step == at and rank == 1:
                kept = params["a"].copy()
                params["a"].resize(4, refcheck=False)
                for call in (opt.step, opt.finish) if name in ("late", "eager", "streaming") else (opt.step,):
                    with pytest.raises(pyccl.UsageError, match=r"a: was float32\[2000\], is float32\[4\]"):
                        call()
                params["a"].resize(2000, refcheck=False)
                params["a"][:] = kept
            opt.step()
        return bits(opt.theta), bits(params), opt.round, opt.stats.inner_steps, opt.stats.rollbacks

    told = []
    for spoilt in (False, True):
        replicas = Replicas(master)
        try:
            told.append(replicas.run(2, lambda comm, rank, spoilt=spoilt: train(comm, rank, spoilt=spoilt)))
        finally:
            replicas.close()
    assert told[0] == told[1]


def test_a_step_with_another_array_in_the_dict_is_told(replicas: Replicas) -> None:
    (comm,) = replicas.members(1)
    params = {"a": np.zeros(3, F32)}
    opt = optim.DiLoCo(comm, params, 1, min_peers=1)
    params["a"] = params["a"] + F32(1)
    with pytest.raises(pyccl.UsageError, match="a: the dict has another array"):
        opt.step()
    assert opt.round == 0
