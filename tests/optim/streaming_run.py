"""StreamingDiLoCo, written down without networks: what each replica's weights are after every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from replicas import Array, bits, copied, move

import pyccl
from pyccl.codecs import decode, encode
from pyccl.optim import StreamingDiLoCo
from pyccl.reference import QUANTIZE_BLOCK

F32 = np.float32
Params = dict[str, Array]
FRAGMENTS = [["a.weight", "c"], ["b"]]
LR, MU = 0.4, 0.9  # the defaults


def weights() -> Params:
    rng = np.random.default_rng(77)
    shapes = {"a.weight": (5, 3), "b": (4,), "c": (2, 2, 2)}
    return {name: rng.standard_normal(shape).astype(F32) for name, shape in shapes.items()}


def coded(shares: Sequence[Array], names: Sequence[str], codec: str) -> list[Array]:
    """Each share, a fragment's vector, as all decode it."""
    return [decode(encode(share, codec, QUANTIZE_BLOCK), codec, QUANTIZE_BLOCK, share.size) for share in shares]


class Reference:
    """All replicas of a run, an inner step of each at a time."""

    def __init__(
        self, replicas: Sequence[int], seed: int, *, sync_every: int, fragments: Sequence[Sequence[str]] = FRAGMENTS,
        delay: int | Sequence[int] = 0, alpha: float = 0.0, codec: str | None = None, feedback: bool = False,
        lr: float = LR, mu: float = MU, nesterov: bool = True,
    ) -> None:  # fmt: skip
        self.seed, self.fragments, self.alpha = seed, [sorted(f) for f in fragments], F32(alpha)
        self.delays = dict(zip(replicas, [delay] * len(replicas) if isinstance(delay, int) else delay, strict=True))
        self.slot, self.codec, self.feedback = sync_every // len(fragments), codec, feedback
        self.lr, self.mu, self.nesterov = F32(lr), F32(mu), nesterov
        self.theta, self.b = weights(), {name: np.zeros_like(x) for name, x in weights().items()}
        self.w: dict[int, Params] = {rank: weights() for rank in replicas}
        self.order = list(replicas)  # of the peers' ids, and so of additions
        self.lost: dict[tuple[int, int], Array] = {}
        self.sent: dict[int, Array] = {}
        self.committed = self.position = 0

    @property
    def which(self) -> int:
        """Whose slot it is."""
        return self.committed % len(self.fragments)

    @property
    def names(self) -> list[str]:
        return self.fragments[self.which]

    def flat(self, arrays: Params) -> Array:
        return np.concatenate([arrays[name].reshape(-1) for name in self.names])

    def step(self, number: int, takes_part: Callable[[int], bool] = lambda _: True, least: int = 1) -> None:
        """One inner step of all; where a slot ends, its exchange, by those who take part, if they are enough."""
        for rank, w in self.w.items():
            move(w, self.seed, rank, number)
        self.step_counted(takes_part, least)

    def step_counted(self, takes_part: Callable[[int], bool] = lambda _: True, least: int = 1) -> None:
        """The inner steps have been made."""
        self.position += 1
        self.send([rank for rank, delay in self.delays.items() if self.position >= self.slot - delay])
        if self.position == self.slot:
            self.w = {rank: w for rank, w in self.w.items() if takes_part(rank)}
            self.end_slot(len(self.w) >= least)

    def finish(self) -> None:
        """All send what they have not sent, and the slot ends."""
        self.send(list(self.w))
        self.end_slot(True)

    def send(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            if rank in self.w and rank not in self.sent:
                g = self.flat(self.theta) - self.flat(self.w[rank])
                self.sent[rank] = g + self.lost.get((rank, self.which), np.zeros_like(g)) if self.feedback else g

    def end_slot(self, committed: bool) -> None:
        if committed:
            ranks = [rank for rank in self.order if rank in self.w]
            shares = [self.sent[rank] for rank in ranks]
            if self.codec is not None:
                shares = coded(shares, self.names, self.codec)
                for rank, own in zip(ranks, shares, strict=True):
                    self.lost[rank, self.which] = self.sent[rank] - own
            self.outer_step(pyccl.reference_all_reduce(shares, op="avg"))
        keep = self.alpha if committed else F32(0)
        for w in self.w.values():
            for name in self.names:
                w[name] = keep * w[name] + (F32(1) - keep) * self.theta[name] if keep else self.theta[name].copy()
        self.committed += committed
        self.position, self.sent = 0, {}

    def join(self, rank: int, before: Sequence[str], peer: str) -> None:
        """before: the ids of those who are there, in their order."""
        self.w[rank], self.delays[rank] = copied(self.theta), self.delays[self.order[0]]
        self.order = [r for r in self.order if r in self.w]
        self.order.insert(sum(other < peer for other in before), rank)

    def outer_step(self, g: Array) -> None:
        at = 0
        for name in self.names:
            t, u = self.theta[name], g[at : at + self.theta[name].size].reshape(self.theta[name].shape)
            at += t.size
            b = self.b[name] = self.mu * self.b[name] + u
            self.theta[name] = t - self.lr * (u + self.mu * b if self.nesterov else b)


def trained(opt: StreamingDiLoCo, params: Params, seed: int, rank: int, steps: range) -> list[tuple[Params, Params]]:
    """theta and live weights after each step."""
    seen = []
    for step in steps:
        move(params, seed, rank, step)
        opt.step()
        seen.append((copied(opt.theta), copied(params)))
    return seen


def same(found: Sequence[tuple[Params, Params]], reference: Reference, rank: int, step: int) -> None:
    assert bits(found[step][0]) == bits(reference.theta), f"theta after step {step}"
    assert bits(found[step][1]) == bits(reference.w[rank]), f"live weights of {rank} after step {step}"
