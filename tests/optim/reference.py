"""References that know nothing of networks: trajectories of theta, written down plainly in NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from replicas import Array, bits, copied, move, weights

import pyccl

H: Final = 3
F32 = np.float32
Params = dict[str, Array]


class Outer:
    """SGD as torch makes it, on named float32 arrays."""

    def __init__(self, theta: Params, lr: float, mu: float, nesterov: bool) -> None:
        self.theta, self.b = copied(theta), {name: np.zeros_like(x) for name, x in theta.items()}
        self.lr, self.mu, self.nesterov = F32(lr), F32(mu), nesterov

    def step(self, g: Params) -> None:
        for name, t in self.theta.items():
            self.b[name] = self.mu * self.b[name] + g[name]
            d = g[name] + self.mu * self.b[name] if self.nesterov else self.b[name]
            self.theta[name] = t - self.lr * d

    def copy(self) -> Outer:
        new = Outer(self.theta, float(self.lr), float(self.mu), self.nesterov)
        new.lr, new.mu, new.b = self.lr, self.mu, copied(self.b)
        return new


class Late:
    """One round late; the outer optimizers differ only if eager. finish(): the last mean, without new steps."""

    def __init__(self, world: int, lr: float, mu: float, eager: bool) -> None:
        self.outers = [Outer(weights(), lr, mu, True) for _ in range(world)]
        self.eager = eager
        self.flying: dict[int, Params] = {}  # rank -> its share, in member order

    def round(self, ranks: Sequence[int], seed: int, round_: int) -> None:
        """ranks: who takes part, in member order."""
        self._step({rank: local(self.outers[rank].theta, seed, rank, round_) for rank in ranks})

    def finish(self) -> None:
        self._step({rank: {n: np.zeros_like(x) for n, x in o.theta.items()} for rank, o in enumerate(self.outers)})

    def _step(self, shares: dict[int, Params]) -> None:
        if self.flying:
            late, world = mean(list(self.flying.values())), F32(len(self.flying))
            for rank, fresh in shares.items():
                g = late
                if self.eager and rank in self.flying:
                    g = {n: late[n] + (fresh[n] - self.flying[rank][n]) / world for n in late}
                elif self.eager:
                    g = {n: (late[n] * world + fresh[n]) / (world + F32(1)) for n in late}
                self.outers[rank].step(g)
        self.flying = shares


def mean(shares: list[Params]) -> Params:
    return {name: pyccl.reference_all_reduce([share[name] for share in shares], op="avg") for name in shares[0]}


def local(theta: Params, seed: int, rank: int, round_: int) -> Params:
    """theta - w after a round's inner steps."""
    w = copied(theta)
    for step in range(H):
        move(w, seed, rank, round_ * H + step)
    return {name: theta[name] - w[name] for name in theta}


def same(found: list[Params], expected: list[Params]) -> None:
    assert len(found) == len(expected)
    for round_, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert bits(f) == bits(e), f"round {round_}"
