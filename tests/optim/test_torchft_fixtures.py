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
from replicas import Replicas

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
