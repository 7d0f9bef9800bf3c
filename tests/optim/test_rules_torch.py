"""The outer step beside torch.optim.SGD, whose semantics it has."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyccl.optim import rules


@pytest.mark.parametrize(("mu", "nesterov"), [(0.9, True), (0.5, False), (0.0, False)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ten_steps_are_those_of_torch(dtype: type[np.floating], mu: float, nesterov: bool) -> None:
    rng = np.random.default_rng(5)
    theta = rng.standard_normal(1000).astype(dtype)
    b = np.zeros_like(theta) if mu else None
    parameter = torch.nn.Parameter(torch.from_numpy(theta.copy()))
    sgd = torch.optim.SGD([parameter], lr=0.7, momentum=mu, nesterov=nesterov)
    for _ in range(10):
        g = rng.standard_normal(1000).astype(dtype)
        parameter.grad = torch.from_numpy(g.copy())
        sgd.step()
        rules.outer_sgd(theta, b, g, lr=0.7, mu=mu, nesterov=nesterov)
        close = 20 * np.finfo(dtype).eps  # torch may fuse a product and a sum
        np.testing.assert_allclose(theta, parameter.detach().numpy(), rtol=close, atol=close * 20)
