"""StreamingDiLoCo and NoLoCo on torch modules: blocks by name, tied weights, a hook instead of ``step()``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from replicas import Replicas

import pyccl
from pyccl.optim import NoLoCo, StreamingDiLoCo


class Net(torch.nn.Module):
    """A language model's shape: embedding, blocks, norm, and a head that is the embedding again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.wte = torch.nn.Embedding(7, 4)
        self.h = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()) for _ in range(4))
        self.ln_f = torch.nn.LayerNorm(4)
        self.head = torch.nn.Linear(4, 7, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.wte(x)
        for block in self.h:
            y = y + block(y)
        return self.head(self.ln_f(y))


def train(net: Net, inner: torch.optim.Optimizer, seed: int, rank: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(seed + rank)
    for _ in range(steps):
        x = torch.randint(7, (8, 5), generator=generator)
        loss = torch.nn.functional.cross_entropy(net(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        inner.zero_grad()
        loss.backward()
        inner.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_a_module_are_exchanged_by_a_hook(replicas: Replicas, seed: int, dtype: torch.dtype) -> None:
    def run(comm: pyccl.Communicator, rank: int) -> Any:
        net = Net().to(dtype)
        inner = torch.optim.AdamW(net.parameters(), lr=1e-2)
        opt = StreamingDiLoCo(comm, net, 4, fragments="strided:2", delay=1)
        opt.attach(inner)
        before = {name: array.copy() for name, array in opt.theta.items()}
        train(net, inner, seed, rank, 2)
        moved = {name for name, array in opt.theta.items() if array.tobytes() != before[name].tobytes()}
        live = {name: p.detach().float().numpy().copy() for name, p in net.named_parameters()}
        at_theta = {
            name for name, p in live.items() if np.array_equal(p, torch.from_numpy(opt.theta[name]).to(dtype).float())
        }
        train(net, inner, seed, rank, 2)
        return moved, at_theta, opt.fragments, opt.round, opt.shared.digest()

    (moved, at_theta, fragments, rounds, digest), other = replicas.run(2, run)
    assert other == (moved, at_theta, fragments, rounds, digest)
    assert {name.split(".")[1] for name in fragments[0] if name.startswith("h.")} == {"0", "2"}
    assert {name.split(".")[1] for name in fragments[1] if name.startswith("h.")} == {"1", "3"}
    tied = {"head.weight", "wte.weight"}
    assert sum(bool(tied & set(names)) for names in fragments) == 1
    first = set(fragments[0]) | (tied if tied & set(fragments[0]) else set())
    assert moved <= first and {n for n in moved if n.startswith("h.")} == {n for n in first if n.startswith("h.")}
    assert at_theta >= {n for n in first if n.startswith("h.")} and rounds == 2


def test_a_tied_parameter_of_a_module_goes_by_any_of_its_names(replicas: Replicas) -> None:
    (comm,) = replicas.members(1)
    for name in ("wte.weight", "head.weight", "head*"):
        opt = StreamingDiLoCo(comm, Net(), 2, fragments=[[name, "ln_f*"], ["h.*"]])
        assert opt.fragments[0] == ("ln_f.bias", "ln_f.weight", "wte.weight") and "head.weight" not in opt.theta
    with pytest.raises(pyccl.UsageError, match=r"in more than one of them: wte.weight \(0, 1\)"):
        StreamingDiLoCo(comm, Net(), 2, fragments=[["wte.weight", "ln_f*"], ["h.*", "head.weight"]])


def test_replicas_of_a_module_gossip_and_merge(replicas: Replicas, seed: int) -> None:
    def run(comm: pyccl.Communicator, rank: int) -> Any:
        net = Net()
        inner = torch.optim.AdamW(net.parameters(), lr=1e-2)
        opt = NoLoCo(comm, net, 3, seed=seed)
        opt.attach(inner)
        train(net, inner, seed, rank, 6)
        own = net.ln_f.weight.detach().clone()
        opt.merge()
        assert net.head.weight is net.wte.weight
        return own.numpy(), {name: p.detach().numpy().tobytes() for name, p in net.named_parameters()}, opt.round

    told = replicas.run(3, run)
    assert len({own.tobytes() for own, *_ in told}) > 1  # two that were a pair in every round are equal
    assert told[0][1] == told[1][1] == told[2][1]
    assert {rounds for *_, rounds in told} == {2}
    mean = pyccl.reference_all_reduce([own for own, *_ in told], op="avg")
    assert told[0][1]["ln_f.weight"] == mean.tobytes()
