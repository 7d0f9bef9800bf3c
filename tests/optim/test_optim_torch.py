"""Modules of torch: attached to an inner optimizer, nothing else in the loop changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from replicas import Replicas, bits

import pyccl
from pyccl.optim import DiLoCo, LocalSGD


def test_a_module_trains_with_a_hook_on_its_inner_optimizer(replicas: Replicas) -> None:
    """Beside the same run with torch's own SGD as outer optimizer, on plain tensors."""
    rounds, every = 3, 4

    def model() -> torch.nn.Module:
        generator = torch.Generator().manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        return module

    def inner_step(module: torch.nn.Module, adam: torch.optim.Optimizer, rank: int, step: int) -> None:
        generator = torch.Generator().manual_seed(1000 * rank + step)
        x = torch.randn(8, 4, generator=generator)
        adam.zero_grad()
        (module(x) - x.sum(1, keepdim=True)).square().mean().backward()
        adam.step()

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        module = model()
        adam = torch.optim.AdamW(module.parameters(), lr=0.05)
        with DiLoCo(comm, module, every) as opt:
            opt.attach(adam)
            for step in range(rounds * every):
                inner_step(module, adam, rank, step)
        inner_step(module, adam, rank, 0)  # detached: not counted
        assert (opt.round, opt.stats.inner_steps) == (rounds, rounds * every)
        return {name: np.array(x) for name, x in opt.theta.items()}

    told = replicas.run(2, train)
    assert bits(told[0]) == bits(told[1])
    outer, replicas_ = model(), [model(), model()]
    adams = [torch.optim.AdamW(m.parameters(), lr=0.05) for m in replicas_]
    sgd = torch.optim.SGD(outer.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    for round_ in range(rounds):
        for rank, (module, adam) in enumerate(zip(replicas_, adams, strict=True)):
            for step in range(every):
                inner_step(module, adam, rank, round_ * every + step)
        for p, *live in zip(outer.parameters(), *(m.parameters() for m in replicas_), strict=True):
            p.grad = torch.stack([p.detach() - w.detach() for w in live]).mean(0)
        sgd.step()
        for module in replicas_:
            module.load_state_dict(outer.state_dict())
    for name, p in outer.named_parameters():
        np.testing.assert_allclose(told[0][name], p.detach().numpy(), rtol=1e-4, atol=1e-5)


class Normed(torch.nn.Sequential):
    """Trained on data that differ from replica to replica."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))

    def train_on(self, seed: int) -> None:
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(seed)) + seed
        for p in self.parameters():
            p.grad = None
        (self(x) - x.sum(1, keepdim=True)).square().mean().backward()
        with torch.no_grad():
            for p in self.parameters():
                p.sub_(p.grad, alpha=0.05)

    def statistics(self) -> list[list[float]]:
        return [b.tolist() for _, b in self.named_buffers() if b.is_floating_point()]


def test_buffers_stay_with_their_replica_and_statistics_are_measured_anew_on_theta(replicas: Replicas) -> None:
    """As docs/optimizers.md tells to."""
    batches = list(torch.randn(4, 32, 3, generator=torch.Generator().manual_seed(9)))

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        model, alone = Normed(), Normed()
        opt = DiLoCo(comm, model, 3)
        for step in range(2):
            model.train_on(10 * rank + step)
            alone.train_on(10 * rank + step)
            opt.step()
        assert model.statistics() == alone.statistics()
        model.train_on(10 * rank + 2)
        before = model.statistics()
        assert opt.step()
        assert model.statistics() == before
        shown = copy.deepcopy(model)
        shown.load_state_dict({name: torch.from_numpy(x) for name, x in opt.theta.items()}, strict=False)
        torch.optim.swa_utils.update_bn(batches, shown)
        seen = torch.nn.functional.linear(
            torch.cat(batches), *(torch.from_numpy(opt.theta[f"0.{name}"]) for name in ("weight", "bias"))
        )
        np.testing.assert_allclose(shown.statistics()[0], seen.mean(0), rtol=1e-4, atol=1e-5)
        assert model.statistics() == before
        return before, shown.statistics(), bits(opt.theta)

    (first, measured, theta), (second, *same) = replicas.run(2, train)
    assert first != second and same == [measured, theta]


def test_local_sgd_averages_buffers_that_are_passed_as_parameters(replicas: Replicas) -> None:
    def floats(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, b) for name, b in model.named_buffers() if b.is_floating_point())

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        model = Normed()
        opt = LocalSGD(comm, [*model.named_parameters(), *floats(model)], 2)
        model.train_on(rank)
        opt.step()
        model.train_on(rank)
        before = model.statistics()
        assert opt.step()
        return before, model.statistics()

    (first, mean), (second, same) = replicas.run(2, train)
    assert first != second and mean == same
    for of_all, *shares in zip(mean, first, second, strict=True):
        np.testing.assert_allclose(of_all, np.mean(shares, axis=0), rtol=1e-6)
