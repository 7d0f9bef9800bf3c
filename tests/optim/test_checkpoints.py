"""state_dict and load_state_dict: a run that stops and goes on is the run that never stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from reference import H
from replicas import Replicas, bits, copied, move, weights

import pyccl
from pyccl.optim import AsyncDiLoCo, DiLoCo, LocalSGD, OuterOptimizer

KINDS: dict[str, Callable[[pyccl.Communicator, Any], OuterOptimizer]] = {
    "local": lambda comm, params: LocalSGD(comm, params, H),
    "diloco": lambda comm, params: DiLoCo(comm, params, H),
    "feedback": lambda comm, params: DiLoCo(comm, params, H, quantize="fp4_e3m0", error_feedback=True),
    "late": lambda comm, params: AsyncDiLoCo(comm, params, H, outer_lr=0.4),
    "eager": lambda comm, params: AsyncDiLoCo(comm, params, H, outer_lr=0.4, eager=True),
}


@pytest.mark.parametrize("stop", [2 * H, 2 * H + 1], ids=["between rounds", "in a round"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(master: str, seed: int, kind: str, stop: int) -> None:
    saved: dict[int, Any] = {}

    def through(comm: pyccl.Communicator, rank: int) -> Any:
        params = weights()
        opt = KINDS[kind](comm, params)
        for step in range(4 * H):
            if step == stop:
                saved[rank] = opt.state_dict(), copied(params)
            move(params, seed, rank, step)
            opt.step()
        return bits(opt.theta), opt.round

    def resumed(comm: pyccl.Communicator, rank: int) -> Any:
        state, live = saved[rank]
        params = weights(seed=9)
        opt = KINDS[kind](comm, params)
        for name, x in live.items():
            params[name][...] = x
        opt.load_state_dict(state)
        for step in range(stop, 4 * H):
            move(params, seed, rank, step)
            opt.step()
        return bits(opt.theta), opt.round

    groups = [Replicas(master), Replicas(master)]
    try:
        whole = groups[0].run(2, through)
        assert groups[1].run(2, resumed) == whole
    finally:
        for group in groups:
            group.close()


def test_a_state_of_other_settings_or_parameters_is_refused(replicas: Replicas) -> None:
    (comm,) = replicas.members(1)
    state = DiLoCo(comm, weights(), H).state_dict()
    for other, match in (
        (DiLoCo(comm, weights(), H, outer_lr=0.5), "outer_lr"),
        (LocalSGD(comm, weights(), H), "optimizer"),
        (DiLoCo(comm, {"b": weights()["b"]}, H), "params"),
    ):
        with pytest.raises(pyccl.UsageError, match=match):
            other.load_state_dict(state)
