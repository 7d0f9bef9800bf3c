"""Parameters of every kind at once, and what each optimizer makes of them, written down without pyccl.optim.

All replicas of a run are here, in member order, as plain arrays: ``Run.step()`` makes an inner step of each and what
follows from it. theta is float32 (float64 for float64 parameters); sums are in that dtype, in member order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from replicas import Array, move

Params = dict[str, Array]
H = 4  # inner steps of a round
FROZEN = "z.frozen"  # moved by no inner step
NAMES = ("a.rows", "a.turned", "b.wide", "c.narrow", "d.brain", "e.scalar", "f.empty", "g.brain_scalar", FROZEN)
TIED = "y.head"  # one piece of memory with "a.turned"


def made() -> Params:
    """Strides of all sorts, four dtypes, no dimension, no elements, and two names for one array."""
    rng = np.random.default_rng(11)
    whole = rng.standard_normal((6, 8)).astype(np.float32)
    params: dict[str, Any] = {
        "a.rows": whole[::2, 6], "a.turned": whole[:, :5].T, "b.wide": rng.standard_normal((3, 2)),
        "c.narrow": rng.standard_normal(7).astype(np.float16)[::-1],
        "d.brain": rng.standard_normal((2, 3)).astype(ml_dtypes.bfloat16),
        "e.scalar": np.array(0.25, np.float32), "f.empty": np.zeros((0, 3), np.float32),
        "g.brain_scalar": np.array(-1.5, ml_dtypes.bfloat16), FROZEN: rng.standard_normal(3).astype(np.float32),
    }  # fmt: skip
    return params | {TIED: params["a.turned"]}


def moved(params: Params, seed: int, rank: int, step: int) -> None:
    """An inner step of all that is trained."""
    move({name: array for name, array in params.items() if name != FROZEN}, seed, rank, step)


def wide(x: Array) -> Array:
    return x.astype(np.float64 if x.dtype == np.float64 else np.float32)


def mean(shares: Sequence[Array]) -> Array:
    total = shares[0].copy()
    for share in shares[1:]:
        total = total + share
    return np.asarray(total / total.dtype.type(len(shares)))


class Run:
    """w: of each replica, live. thetas: of each; those of all are one where it is shared."""

    def __init__(self, world: int, seed: int, lr: float = 0.7, mu: float = 0.9, nesterov: bool = True) -> None:
        self.world, self.seed, self.lr, self.mu, self.nesterov = world, seed, lr, mu, nesterov
        self.w = [made() for _ in range(world)]
        self.thetas = [self.of(0, wide) for _ in range(world)]
        self.b = [{name: np.zeros_like(t) for name, t in theta.items()} for theta in self.thetas]
        self.steps = 0

    def of(self, rank: int, function: Callable[[Array], Array]) -> Params:
        return {name: function(self.w[rank][name]) for name in NAMES}

    def step(self) -> None:
        for rank, w in enumerate(self.w):
            moved(w, self.seed, rank, self.steps)
        self.steps += 1
        if self.steps % H == 0:
            self.exchange()

    def exchange(self) -> None:
        raise NotImplementedError

    def g(self, rank: int, name: str) -> Array:
        """theta, as the live weights can hold it, less these."""
        live, theta = self.w[rank][name], self.thetas[rank][name]
        return np.asarray(wide(theta.astype(live.dtype)) - wide(live))

    def gs(self, rank: int) -> Params:
        return {name: self.g(rank, name) for name in NAMES}

    def sgd(self, rank: int, name: str, g: Array) -> None:
        """As torch.optim.SGD."""
        lr, mu = g.dtype.type(self.lr), g.dtype.type(self.mu)
        b = self.b[rank][name] = mu * self.b[rank][name] + g
        self.thetas[rank][name] = np.asarray(self.thetas[rank][name] - lr * (g + mu * b if self.nesterov else b))

    def begin(self) -> None:
        for w, theta in zip(self.w, self.thetas, strict=True):
            for name in NAMES:
                w[name][...] = theta[name].astype(w[name].dtype)


class Averaged(Run):
    """LocalSGD."""

    def exchange(self) -> None:
        for name in NAMES:
            average = mean([wide(w[name]) for w in self.w])
            for theta in self.thetas:
                theta[name] = average
        self.begin()


class Blocking(Run):
    """DiLoCo."""

    def exchange(self) -> None:
        means = {name: mean([self.g(rank, name) for rank in range(self.world)]) for name in NAMES}
        for rank in range(self.world):
            for name, g in means.items():
                self.sgd(rank, name, g)
        self.begin()


class Late(Run):
    """AsyncDiLoCo."""

    eager = False
    flying: Sequence[Params] = ()

    def exchange(self) -> None:
        fresh = [self.gs(rank) for rank in range(self.world)]
        for rank in range(self.world if self.flying else 0):
            for name in NAMES:
                g = mean([share[name] for share in self.flying])
                if self.eager:
                    g = g + (fresh[rank][name] - self.flying[rank][name]) / g.dtype.type(self.world)
                self.sgd(rank, name, np.asarray(g))
        self.flying = fresh
        self.begin()


class Eager(Late):
    eager = True


class Streaming(Run):
    """StreamingDiLoCo: two fragments, sent one step before they are applied."""

    alpha, fragments, committed = 0.25, (NAMES[::2], NAMES[1::2]), 0

    def step(self) -> None:
        for rank, w in enumerate(self.w):
            moved(w, self.seed, rank, self.steps)
        self.steps += 1
        names = self.fragments[self.committed % 2]
        if self.steps % (H // 2) == 1:
            self.sent = [{name: self.g(rank, name) for name in names} for rank in range(self.world)]
            return
        for name in names:
            g = mean([share[name] for share in self.sent])
            for rank, w in enumerate(self.w):
                self.sgd(rank, name, g)
                theta = self.thetas[rank][name]
                keep, take = g.dtype.type(self.alpha), g.dtype.type(1 - self.alpha)
                w[name][...] = (keep * wide(w[name]) + take * theta).astype(w[name].dtype)
        self.committed += 1


class Gossip(Run):
    """NoLoCo. pairs: round -> who steps with whom; mu is its alpha, lr its beta and gamma."""

    def __init__(self, world: int, seed: int, pairs: Callable[[int], Sequence[Sequence[int]]]) -> None:
        super().__init__(world, seed, lr=0.7, mu=0.5)
        self.pairs = pairs

    def exchange(self) -> None:
        before = [dict(theta) for theta in self.thetas]
        shift = [{name: -g for name, g in self.gs(rank).items()} for rank in range(self.world)]
        for group in self.pairs(self.steps // H - 1):
            for rank in group:
                for name in NAMES:
                    kind, phi = before[rank][name].dtype.type, before[rank][name]
                    total = shift[group[0]][name].copy()
                    middle = before[group[0]][name].copy()
                    for other in group[1:]:
                        total, middle = total + shift[other][name], middle + before[other][name]
                    v = kind(0.5) * self.b[rank][name] + kind(0.7 / len(group)) * total
                    if len(group) > 1:
                        v = v - kind(0.7) * (phi - middle / kind(len(group)))
                    self.b[rank][name], self.thetas[rank][name] = np.asarray(v), np.asarray(phi + v)
        self.begin()
