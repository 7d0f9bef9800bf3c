"""Beside what torchft (pytorch.org's fault-tolerant training, BSD) recorded of its DiLoCo with fragments.

Its ``diloco_regression_test.py`` trains two layers of one weight each, which begin at 1.0, on two replicas: the inner
step subtracts 2, the outer optimizer is plain SGD with learning rate 2, every fragment is exchanged every 6 steps, for
delays of 0 and 1 and a mixing alpha of 0, 0.5 and 1. Live and global weights after each inner step are kept in
``test_fixtures/*.json``. Here the same run goes through pyccl's public API. Expected numbers are by formula; a few
that were recorded are there as literals, to hold the formula.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from replicas import TIMEOUT_S, Replicas, ended

import pyccl
from pyccl.optim import StreamingDiLoCo

LAYERS = ("layers.0.weight", "layers.1.weight")
H, SLOT, INNER, OUTER_LR, START = 6, 3, 2.0, 2.0, 1.0
STEPS = 21  # seven outer steps, as in torchft today; older recordings end after five
CASES = [(delay, alpha) for delay in (0, 1) for alpha in (0.0, 0.5, 1.0)]


def formula(delay: int, alpha: float) -> tuple[list[list[float]], list[list[float]]]:
    """Live and global weights of both layers, before the first step and after each."""
    live, whole, sent = [START, START], [START, START], 0.0
    history, whole_history = [[*live]], [[*whole]]
    for step in range(1, STEPS + 1):
        live = [w - INNER for w in live]
        fragment = (step - 1) // SLOT % 2
        if step % SLOT == (SLOT - delay) % SLOT:
            sent = whole[fragment] - live[fragment]
        if step % SLOT == 0:
            whole[fragment] -= OUTER_LR * sent
            live[fragment] = (1 - alpha) * whole[fragment] + alpha * live[fragment]
        history.append([*live])
        whole_history.append([*whole])
    return history, whole_history


# (delay, alpha): {step: (live of layer 0, live of layer 1)} and the same of global weights, from test_mocked_updates_N
RECORDED: dict[tuple[int, float], tuple[dict[int, tuple[float, float]], dict[int, tuple[float, float]]]] = {
    (0, 0.0): ({3: (-11, -5), 6: (-17, -23), 9: (-35, -29), 15: (-59, -53)}, {3: (-11, 1), 12: (-35, -47)}),
    (0, 0.5): ({3: (-8, -5), 6: (-14, -17), 9: (-24.5, -23), 15: (-40.25, -38)}, {9: (-29, -23), 12: (-29, -35)}),
    (0, 1.0): ({3: (-5, -5), 15: (-29, -29)}, {3: (-11, 1), 6: (-11, -23), 12: (-23, -23)}),
    (1, 0.5): ({3: (-6, -5), 6: (-12, -15), 9: (-21.5, -21), 15: (-35.75, -35)}, {6: (-7, -19), 15: (-38, -31)}),
    (1, 1.0): ({3: (-5, -5), 15: (-29, -29)}, {3: (-7, 1), 9: (-23, -19), 12: (-23, -23)}),
}


@pytest.mark.parametrize(("delay", "alpha"), RECORDED)
def test_the_formula_has_the_recorded_numbers(delay: int, alpha: float) -> None:
    live, whole = formula(delay, alpha)
    for formed, recorded in zip((live, whole), RECORDED[delay, alpha], strict=True):
        assert {step: tuple(formed[step]) for step in recorded} == recorded


@pytest.mark.parametrize("fragments", [2, [["layers.0.*"], ["layers.1.*"]]], ids=["2", "by name"])
@pytest.mark.parametrize(("delay", "alpha"), CASES)
def test_weights_are_those_of_torchft(replicas: Replicas, delay: int, alpha: float, fragments: Any) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params = {name: np.full((1, 1), START, np.float32) for name in LAYERS}
        opt = StreamingDiLoCo(
            comm, params, H, fragments=fragments, delay=delay, alpha=alpha, outer_lr=OUTER_LR, outer_momentum=0.0,
        )  # fmt: skip
        live, whole = [[START, START]], [[START, START]]
        for _ in range(STEPS):
            for name in LAYERS:
                params[name] -= np.float32(INNER)
            opt.step()
            live.append([params[name].item() for name in LAYERS])
            whole.append([opt.theta[name].item() for name in LAYERS])
        assert opt.round == 7
        return live, whole

    for told in replicas.run(2, train):
        assert told == formula(delay, alpha)  # halves and quarters: exact


def test_a_replica_that_dies_and_returns_differs_from_torchft_as_documented(replicas: Replicas) -> None:
    """``test_diloco_mocked_failure_recovery``: one of the two dies after two outer steps, and comes back.

    torchft's survivor waits for it before it exchanges, and goes on as if nothing had been: global weights -35 and -47
    after the next two outer steps. The newcomer gets the survivor's live weights. Ours undoes the slot in which it was
    alone, and a newcomer begins with theta: nobody's progress counts twice.
    """

    def steps(opt: StreamingDiLoCo, params: dict[str, Any], count: int) -> list[list[float]]:
        for _ in range(count):
            for name in LAYERS:
                params[name] -= np.float32(INNER)
            opt.step()
        return [[where[name].item() for name in LAYERS] for where in (params, opt.theta)]

    def begin(comm: pyccl.Communicator) -> tuple[StreamingDiLoCo, dict[str, Any]]:
        params = {name: np.full((1, 1), START, np.float32) for name in LAYERS}
        return StreamingDiLoCo(comm, params, H, fragments=2, outer_lr=OUTER_LR, outer_momentum=0.0), params

    def survive(comm: pyccl.Communicator, rank: int) -> Any:
        opt, params = begin(comm)
        told = [steps(opt, params, 2 * SLOT)]
        if rank == 1:
            comm.close()
            return told
        told.append(steps(opt, params, SLOT))  # alone: waits here
        told.append(steps(opt, params, 2 * SLOT))
        assert [outcome.committed for outcome in opt.outcomes] == [True, True, False, True, True]
        return told

    def come_back(comm: pyccl.Communicator) -> Any:
        comm.connect(TIMEOUT_S)
        opt, params = begin(comm)
        return [steps(opt, params, 0), steps(opt, params, 2 * SLOT)]

    survivor, dies = replicas.members(2)
    runs = [replicas.start(survive, comm, rank) for rank, comm in enumerate((survivor, dies))]
    assert ended(runs[1:]) == [[[[-17, -23], [-11, -23]]]]
    returned = replicas.start(come_back, replicas.communicator())
    assert ended(runs[:1]) == [
        [
            [[-17, -23], [-11, -23]],
            [[-11, -29], [-11, -23]],  # undone: layer 0 is at theta, layer 1 keeps its steps
            [[-29, -53], [-23, -53]],  # 23 = 11 + 2 * 6; 53 = 23 + 2 * (18 + 12) / 2
        ]
    ]
    assert ended([returned]) == [[[[-11, -23], [-11, -23]], [[-29, -53], [-23, -53]]]]
