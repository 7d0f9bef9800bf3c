"""What is trained: small character models on the standard library's source text, several replicas of one at once.

    codes (CONTEXT) -> embeddings side by side -> linear -> BLOCKS of x + relu(linear(norm(x))) -> linear(norm(x))

Weights and gradients of R replicas are the rows of two matrices, (R, n), and every operation runs on all rows, which
costs much less than R models one after the other. Rows never mix. Randomness comes in as seeds.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812

from pyccl.demo.corpus import VOCABULARY_SIZE

CONTEXT, EMBEDDING, WIDTH, BLOCKS = 16, 12, 96, 5
CLIP: Final = 1.0
WARM: Final = 50  # steps, a round, of a replica that came in late: fresh moments make large ones

# Rows are apart from one another in memory, which torch thinks slow; it is not, for so small ones.
warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout contract")

Array = np.ndarray[Any, Any]
Tensors = Mapping[str, torch.Tensor]


def shapes() -> dict[str, tuple[int, ...]]:
    """Of one replica: 75,661 parameters."""
    found: dict[str, tuple[int, ...]] = {
        "letters": (VOCABULARY_SIZE, EMBEDDING), "inward": (CONTEXT * EMBEDDING, WIDTH), "inward_bias": (WIDTH,),
    }  # fmt: skip
    for i in range(BLOCKS):
        found |= {f"h.{i}.weight": (WIDTH, WIDTH), f"h.{i}.bias": (WIDTH,)}
    return found | {"outward": (WIDTH, VOCABULARY_SIZE), "outward_bias": (VOCABULARY_SIZE,)}


def _views(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """(R, n) -> name -> (R, *shape), of the same memory."""
    every = shapes()
    parts = rows.split([math.prod(shape) for shape in every.values()], dim=1)
    return {name: part.view(-1, *shape) for (name, shape), part in zip(every.items(), parts, strict=True)}


def loss_of(p: Tensors, codes: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(R, batch, CONTEXT) codes and (R, batch), the next ones -> nats per character, (R,)."""
    count, batch, _ = codes.shape
    of_row = torch.arange(count)[:, None, None] * VOCABULARY_SIZE
    x = F.embedding(codes + of_row, p["letters"].reshape(-1, EMBEDDING)).view(count, batch, -1)
    x = torch.baddbmm(p["inward_bias"][:, None], x, p["inward"])  # (R, batch, WIDTH)
    for i in range(BLOCKS):
        x = x + torch.baddbmm(p[f"h.{i}.bias"][:, None], F.layer_norm(x, (WIDTH,)), p[f"h.{i}.weight"]).relu()
    logits = torch.baddbmm(p["outward_bias"][:, None], F.layer_norm(x, (WIDTH,)), p["outward"])
    each = F.cross_entropy(logits.view(-1, VOCABULARY_SIZE), targets.reshape(-1), reduction="none")
    return each.view(count, batch).mean(dim=1)


class Models:
    """R replicas that begin equal, each with an AdamW of its own, which is never exchanged."""

    def __init__(self, replicas: int, seed: int, lr: float, steps: int) -> None:
        """lr: the highest; steps: of the whole run, for its course: linear warm-up, then a cosine to a tenth."""
        count = sum(math.prod(shape) for shape in shapes().values())
        self._rows, self._grads = torch.zeros(replicas, count), torch.zeros(replicas, count)
        self._lr, self._steps = lr, steps
        self._rows.grad = self._grads
        grads = _views(self._grads)
        self._leaves = {name: view.detach().requires_grad_() for name, view in _views(self._rows).items()}
        generator = torch.Generator().manual_seed(seed)
        for name, leaf in self._leaves.items():
            leaf.grad = grads[name]
            _initialize(name, leaf.detach(), generator)
        self._adam = torch.optim.AdamW([self._rows], lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def parameters(self, replica: int) -> dict[str, torch.Tensor]:
        """Its weights where they are."""
        return {name: leaf.detach()[replica] for name, leaf in self._leaves.items()}

    def grads(self, replica: int) -> Array:
        """(n,), where they are."""
        array: Array = self._grads[replica].numpy()
        return array

    def backward(self, codes: torch.Tensor, targets: torch.Tensor) -> None:
        """Of every row, with its own part of the batch."""
        self._grads.zero_()
        loss_of(self._leaves, codes, targets).sum().backward()  # type: ignore[no-untyped-call]

    def step(self, number: int, since: int | None) -> None:
        """number: inner steps before this one; since: of them, those since this replica came in late, if it did."""
        norms = torch.linalg.vector_norm(self._grads, dim=1, keepdim=True)
        self._grads.mul_(torch.clamp(CLIP / (norms + 1e-6), max=1.0))
        warm = max(1, self._steps // 20)
        late = min(1.0, max(0, number - warm) / max(1, self._steps - warm))
        share = (number + 1) / warm if number < warm else 0.55 + 0.45 * math.cos(math.pi * late)
        fresh = 1.0 if since is None else min(1.0, (since + 1) / WARM)
        self._adam.param_groups[0]["lr"] = self._lr * share * fresh
        self._adam.step()


def _initialize(name: str, leaf: torch.Tensor, generator: torch.Generator) -> None:
    """Equal rows; what is added to the residual stream, less; biases stay 0."""
    if leaf.dim() > 2:
        std = 1.0 if name == "letters" else leaf.shape[1] ** -0.5 * (0.5 if name.startswith("h.") else 1.0)
        leaf[:] = torch.empty(leaf.shape[1:]).normal_(std=std, generator=generator)


def windows(text: Array, starts: Array) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, batch) starts -> (R, batch, CONTEXT) characters, and (R, batch), those that come next."""
    cut = torch.from_numpy(text[starts[..., None] + np.arange(CONTEXT + 1)].astype(np.int64))
    return cut[..., :-1], cut[..., -1]


def draw(text: Array, batch: int, streams: Sequence[np.random.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch for every replica, from streams of their own."""
    return windows(text, np.stack([rng.integers(0, len(text) - CONTEXT, batch) for rng in streams]))


def validate(weights: Mapping[str, Array | torch.Tensor], text: Array, count: int) -> float:
    """Nats per character over `count` windows, the same each time."""
    starts = np.linspace(0, len(text) - CONTEXT - 1, count).astype(np.int64)[None]
    p = {name: torch.as_tensor(array)[None] for name, array in weights.items()}
    with torch.no_grad():
        return float(loss_of(p, *windows(text, starts)))
