"""Every optimizer on torch parameters of every kind, bit for bit beside the rules as they are written (kinds.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from kinds import FROZEN, TIED, Array, H, Params, Streaming, made, moved
from replicas import Replicas, bits
from test_kinds import FRAGMENTS, MAKE, STEPS, run_of

import pyccl
from pyccl import optim

BRAIN = np.dtype(ml_dtypes.bfloat16)


def tensor_of(array: Array) -> torch.Tensor:
    """Of the same dtype and strides, where torch has them."""
    if array.dtype == BRAIN:
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(array.copy("K") if min(array.strides, default=0) < 0 else array)


def array_of(tensor: torch.Tensor) -> Array:
    """A copy."""
    if tensor.dtype is torch.bfloat16:
        return np.asarray(tensor.detach().float().numpy().astype(BRAIN))
    return np.array(tensor.detach().numpy())


class Kinds(torch.nn.Module):
    """What ``made()`` has, in modules called a, b, ...; ``y.head`` is tied to ``a.turned``, ``z`` is frozen."""

    def __init__(self) -> None:
        super().__init__()
        for name, array in made().items():
            part, _, last = name.partition(".")
            if not hasattr(self, part):
                self.add_module(part, torch.nn.Module())
            parameter = torch.nn.Parameter(tensor_of(array), requires_grad=name != FROZEN)
            getattr(self, part).register_parameter(last, self.a.turned if name == TIED else parameter)
        self.register_buffer("count", torch.zeros(3))

    def named(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.named_parameters(remove_duplicate=False))

    def arrays(self) -> Params:
        return {name: array_of(parameter) for name, parameter in self.named().items()}


class Mover(torch.optim.Optimizer):
    """The inner steps of ``moved``."""

    def __init__(self, kinds: Kinds, seed: int, rank: int) -> None:
        super().__init__(kinds.parameters(), {})
        self.kinds, self.seed, self.rank, self.steps = kinds, seed, rank, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        arrays = self.kinds.arrays()
        arrays[TIED] = arrays["a.turned"]
        moved(arrays, self.seed, self.rank, self.steps)
        for name, parameter in self.kinds.named().items():
            parameter.copy_(tensor_of(arrays[name]))
        self.steps += 1


FORMS: dict[str, Callable[[Kinds], Any]] = {
    "module": lambda kinds: kinds,
    "mapping": lambda kinds: kinds.named(),
    "generator": lambda kinds: kinds.named_parameters(remove_duplicate=False),
}


@pytest.mark.parametrize(
    ("name", "form"), [*((name, "module") for name in MAKE), ("DiLoCo", "mapping"), ("streaming", "generator")]
)
def test_parameters_of_every_kind_follow_the_rules_bit_for_bit(
    replicas: Replicas, seed: int, name: str, form: str
) -> None:
    """With a hook on the inner optimizer, whose code knows nothing of replicas."""

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        kinds, seen = Kinds(), []
        inner = Mover(kinds, seed, rank)
        with MAKE[name](comm, FORMS[form](kinds)) as opt:
            opt.attach(inner)
            for _ in range(STEPS):
                inner.step()
                seen.append((bits(opt.theta), bits(kinds.arrays())))
        assert opt.stats.inner_steps == STEPS
        assert set(opt.theta) == set(kinds.named() if form != "module" else dict(kinds.named_parameters()))
        return seen, comm.peer_id

    told = replicas.run(2, train)
    run = run_of(name, seed, [peer for _, peer in told])
    for step in range(STEPS):
        run.step()
        for rank, (seen, _) in enumerate(told):
            theta, live = seen[step]
            for part in live:
                one = "a.turned" if part == TIED else part
                name_of = part if part in theta else one
                assert theta[name_of] == run.thetas[rank][one].tobytes(), f"theta {part}, {rank} after step {step}"
                assert live[part] == run.w[rank][one].tobytes(), f"live {part}, {rank} after step {step}"


SAVED = MAKE | {
    "feedback": lambda comm, params: optim.DiLoCo(comm, params, H, quantize="fp4_e3m0", error_feedback=True),
    "streaming, feedback": lambda comm, params: optim.StreamingDiLoCo(
        comm, params, H, fragments=FRAGMENTS, delay=1, quantize="uint8", error_feedback=True
    ),
}


@pytest.mark.parametrize("stop", range(1, H + 1))
@pytest.mark.parametrize("name", [name for name in SAVED if name != "heavy-ball"])
def test_a_run_goes_on_from_a_checkpoint_of_any_step_bit_for_bit(
    replicas: Replicas, seed: int, name: str, stop: int, tmp_path: Any
) -> None:
    """Between rounds, in one, and with an exchange under way; through a file of torch's, read without trust in it."""

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        def go_on(opt: optim.OuterOptimizer, inner: Mover, steps: Iterable[int]) -> list[Any]:
            seen = []
            for _ in steps:
                inner.step()
                opt.step()
                seen.append((bits(opt.theta), bits(inner.kinds.arrays())))
            return seen

        kinds = Kinds()
        opt, inner = SAVED[name](comm, kinds), Mover(kinds, seed, rank)
        go_on(opt, inner, range(H + stop))
        path = tmp_path / f"{rank}.pt"
        torch.save({"outer": opt.state_dict(), "model": kinds.state_dict()}, path)
        expected = go_on(opt, inner, range(STEPS - H - stop))
        opt.finish()
        kinds = Kinds()
        opt, again = SAVED[name](comm, kinds), Mover(kinds, seed, rank)
        saved = torch.load(path)
        kinds.load_state_dict(saved["model"])
        opt.load_state_dict(saved["outer"])
        again.steps = H + stop
        assert go_on(opt, again, range(STEPS - H - stop)) == expected
        opt.finish()
        return opt.round

    assert len(set(replicas.run(2, train))) == 1


def test_frozen_parameters_are_brought_in_step_as_well_and_stay_frozen(replicas: Replicas) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> Any:
        kinds = Kinds()
        with torch.no_grad():
            kinds.z.frozen[:] = rank
        optim.StreamingDiLoCo(comm, kinds, H, fragments=[list(names) for names in Streaming.fragments])
        assert not kinds.z.frozen.requires_grad and kinds.b.wide.requires_grad
        return kinds.z.frozen.tolist()

    first, second = replicas.run(2, train)
    assert first == second and first in ([0.0] * 3, [1.0] * 3)
