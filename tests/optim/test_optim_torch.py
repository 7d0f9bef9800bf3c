"""Modules of torch: attached to an inner optimizer, nothing else in the loop changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from replicas import Replicas, bits

import pyccl
from pyccl.optim import DiLoCo


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
