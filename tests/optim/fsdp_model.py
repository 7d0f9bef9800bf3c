"""What fsdp_worker.py trains: shapes that two ranks cannot halve, and data that a NumPy reference makes too."""

from __future__ import annotations

import numpy as np
import torch

SHAPES = {"first.bias": (4,), "first.weight": (4, 3), "out": (1, 4), "shift": (5,)}


def weights(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([seed, 5])
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def batch(seed: int, island: int, shard: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Of one rank: inputs (8, 3) and targets (8,)."""
    x = np.random.default_rng([seed, island, shard, step]).standard_normal((8, 3)).astype(np.float32)
    return x, x.sum(1)


class Net(torch.nn.Module):
    """out . tanh(first(x)) + sum of shift: `out` has one row, so the second rank holds nothing of it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        values = {name: torch.from_numpy(value) for name, value in weights(seed).items()}
        self.first = torch.nn.Linear(3, 4)
        self.out, self.shift = torch.nn.Parameter(values["out"]), torch.nn.Parameter(values["shift"])
        with torch.no_grad():
            self.first.weight.copy_(values["first.weight"])
            self.first.bias.copy_(values["first.bias"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(self.first(x)) @ self.out.t()).squeeze(1) + self.shift.sum()
