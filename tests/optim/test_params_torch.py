"""torch modules and tensors as parameters: memory used where it is, ties, bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from changed import refused_after

import pyccl
from pyccl.optim.params import Params


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = torch.nn.LayerNorm(3)


def test_a_modules_parameters_are_used_in_place_and_tied_ones_once() -> None:
    module = Tied()
    params = Params(module)
    assert params.names == ("embedding.weight", "norm.bias", "norm.weight")
    assert params.aliases == {} and params.ties == {"head.weight": "embedding.weight"}
    values = params.vectors()
    params.read(values)
    assert np.array_equal(values.views["embedding.weight"], module.embedding.weight.detach().numpy())
    address = module.embedding.weight.data_ptr()
    values.vectors[0][:] = 3
    params.write(values)
    assert module.head.weight.data_ptr() == address and bool((module.head.weight == 3).all())
    assert module.head.weight.requires_grad and module.head.weight.grad is None
    both = Params([("a", module.embedding.weight), ("b", module.head.weight)])
    assert both.names == ("a",) and both.aliases == both.ties == {"b": "a"}
    module.other = torch.nn.Linear(3, 5, bias=False)
    module.other.weight = torch.nn.Parameter(module.embedding.weight.detach())  # another parameter, the same memory
    module.third = module.other
    assert Params(module).ties == dict.fromkeys(("head.weight", "other.weight", "third.weight"), "embedding.weight")


def test_a_backward_pass_that_needs_the_values_before_a_write_fails() -> None:
    module = torch.nn.Linear(2, 2)
    params = Params(module)
    values = params.vectors()
    loss = (module.weight * module.weight).sum()
    params.write(values)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bfloat16_and_transposed_tensors() -> None:
    x = torch.randn(4, 6).to(torch.bfloat16).t()
    params = Params([("x", x)])
    values, g = params.vectors(), params.vectors()
    params.read(values)
    assert np.array_equal(values.views["x"], x.float().numpy())
    values.views["x"][:] += np.float32(0.3)
    params.write(values)
    assert torch.equal(x, torch.from_numpy(values.views["x"]).to(torch.bfloat16))
    params.pseudo_gradient(values, g)
    assert not g.vectors[0].any()


def test_memory_that_moved_between_rounds_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where FSDP frees and fills the storage of a parameter."""
    parameter = torch.nn.Parameter(torch.ones(3))
    params = Params([("p", parameter)])
    parameter.data = torch.full((3,), 5.0)
    values = params.vectors()
    params.read(values)
    assert values.views["p"].tolist() == [5.0] * 3


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: torch.zeros(3, dtype=torch.int32), "dtype int32"),
        (lambda: torch.zeros(1).expand(4), "share memory"),
        (lambda: torch.zeros(3, device="meta"), "holds no dense array"),
        (lambda: torch.zeros(3, 3).to_sparse(), "holds no dense array"),
    ],
    ids=["integers", "expanded", "meta", "sparse"],
)
def test_tensors_that_can_not_be_parameters_are_refused(make: Any, match: str) -> None:
    with pytest.raises(pyccl.UsageError, match=match):
        Params([("x", make())])


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.ones(4), r"p: was float32\[2000\], is float32\[4\]"),
        (torch.ones(4000), r"p: was float32\[2000\], is float32\[4000\]"),
        (torch.ones(2000).half(), r"p: was float32\[2000\], is float16\[2000\]"),
        (torch.ones(1).expand(2000), "p: several of its elements share memory"),
    ],
    ids=["smaller", "larger", "half", "expanded"],
)
def test_a_parameter_whose_data_is_of_another_form_is_neither_read_nor_written(value: torch.Tensor, match: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2000))
    params = Params([("p", parameter)])
    out = refused_after(lambda: setattr(parameter, "data", value), params, match)
    parameter.data = torch.full((4000,), 3.0)[::2]
    params.read(out)
    assert bool((out.vectors[0] == 3).all())
