"""state_dict and load_state_dict: a run that stops and goes on is the run that never stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from reference import H
from replicas import Replicas, bits, copied, move, weights

import pyccl
from pyccl.optim import AsyncDiLoCo, DiLoCo, LocalSGD, OuterOptimizer, StreamingDiLoCo

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


MORE_KINDS = KINDS | {
    "streaming": lambda comm, params: StreamingDiLoCo(
        comm, params, 2, fragments=2, quantize="uint8", error_feedback=True
    )
}
F32 = np.float32


def every_entry(state: Any) -> list[tuple[str, ...]]:
    """Paths of all that a state consists of; not of what this optimizer has none of."""
    found: list[tuple[str, ...]] = []
    for name, part in state.items():
        if isinstance(part, dict):
            found += [(name, *path) for path in every_entry(part)]
        if part is not None and not (isinstance(part, dict) and not part):
            found.append((name,))
    return found


def with_entry(state: Any, path: tuple[str, ...], change: Callable[[dict[str, Any], str], None]) -> Any:
    changed = dict(state)
    if len(path) == 1:
        change(changed, path[0])
    else:
        changed[path[0]] = with_entry(state[path[0]], path[1:], change)
    return changed


def damaged(state: Any) -> list[Any]:
    """Without each entry, with each one replaced by something else, and arrays of wrong shapes and dtypes."""
    found = [None, {}, [], 7]
    for path in every_entry(state):
        if path[0] != "settings" or len(path) == 1:  # settings that differ are refused in a test of their own
            found.append(with_entry(state, path, lambda part, name: part.pop(name)))
        others: list[Any] = ["foreign", [3], -1, {}, np.zeros(1, F32), np.zeros((9, 9), F32), [0, 0, 0, "0"], [-1] * 4]
        found += [with_entry(state, path, lambda part, name, x=x: part.__setitem__(name, x)) for x in others]
    wide = with_entry(state, ("theta", "b"), lambda part, name: part.__setitem__(name, part[name].astype(np.float64)))
    return [*found, wide, with_entry(state, ("inner_steps",), lambda part, name: part.__setitem__(name, 1 << 40))]


@pytest.mark.parametrize("kind", MORE_KINDS)
def test_a_damaged_state_is_refused_and_nothing_has_changed(replicas: Replicas, kind: str) -> None:
    (comm,) = replicas.members(1)
    state = MORE_KINDS[kind](comm, weights(seed=1)).state_dict()
    params = weights()
    opt = MORE_KINDS[kind](comm, params)
    before = opt.state_dict()
    for bad in damaged(state):
        with pytest.raises(pyccl.UsageError, match="load_state_dict"):
            opt.load_state_dict(bad)
        assert bits(params) == bits(weights()) == bits(opt.theta)
        assert repr(opt.state_dict()) == repr(before)
    opt.load_state_dict(state)
    assert bits(opt.theta) == bits(weights(seed=1))


def test_the_part_that_a_damaged_state_lacks_is_named(replicas: Replicas) -> None:
    (comm,) = replicas.members(1)
    opt = DiLoCo(comm, weights(), H)
    state = opt.state_dict()
    for part, match in (
        ({"theta": {"b": np.zeros(4, F32)}}, "theta/a.weight is missing"),
        ({"theta": state["theta"] | {"b": np.zeros(1, F32)}}, r"theta/b is float32\[1\], float32\[4\] is needed"),
        ({"counters": [3]}, r"counters is \[3\], 4 counts are needed"),
        ({"inner_steps": H}, f"inner_steps={H}"),
    ):
        with pytest.raises(pyccl.UsageError, match=match):
            opt.load_state_dict(state | part)
