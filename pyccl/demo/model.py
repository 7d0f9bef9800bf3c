"""A character model small enough for one core: embeddings of the last characters, one hidden layer, a softmax.

Pure NumPy: no file, clock, network or global state; randomness comes in as seeds. Invariant: all parameters are views
of one flat float32 vector, so averaging ``flat`` averages the model, and writing ``flat`` writes the model.

    codes (batch, context) -> embedding -> (batch, context * width) -> tanh(. W1 + b1) -> . W2 + b2 -> softmax

Source: Bengio, Ducharme, Vincent, Jauvin, "A neural probabilistic language model", JMLR 3, 2003. Optimizer: Adam,
Kingma and Ba, ICLR 2015, arXiv:1412.6980.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pyccl.demo.corpus import VOCABULARY_SIZE

Floats = npt.NDArray[np.floating[Any]]
Codes = npt.NDArray[np.uint8]
EVALUATE_CHUNK: Final = 1024  # windows per forward pass of `evaluate`; bounds its memory


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; equal on all peers."""

    context: int = 16
    width: int = 32
    hidden: int = 512
    vocabulary: int = VOCABULARY_SIZE

    def arrays(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter, in the order in which they lie in the flat vector."""
        return {
            "embedding": (self.vocabulary, self.width),
            "hidden_weight": (self.context * self.width, self.hidden),
            "hidden_bias": (self.hidden,),
            "output_weight": (self.hidden, self.vocabulary),
            "output_bias": (self.vocabulary,),
        }

    def count(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for shape in self.arrays().values())


@dataclass(frozen=True)
class Parameters:
    """One flat vector and its named views."""

    shape: Shape
    flat: Floats  # (count,)
    views: Mapping[str, Floats]

    @staticmethod
    def over(shape: Shape, flat: Floats) -> Parameters:
        """Name the pieces of ``flat`` without copying."""
        if flat.shape != (shape.count(),):
            raise ValueError(f"flat has shape {flat.shape}, the model needs ({shape.count()},)")
        views: dict[str, Floats] = {}
        start = 0
        for name, dims in shape.arrays().items():
            end = start + math.prod(dims)
            views[name] = flat[start:end].reshape(dims)
            start = end
        return Parameters(shape, flat, views)


def init(shape: Shape, seed: int, dtype: npt.DTypeLike = np.float32) -> Parameters:
    """Draw a fresh model; the same seed gives the same bits everywhere."""
    rng = np.random.default_rng([seed, 0])
    parameters = Parameters.over(shape, np.zeros(shape.count(), dtype=dtype))
    fan_ins = {"embedding": 1, "hidden_weight": shape.context * shape.width, "output_weight": shape.hidden}
    for name, fan_in in fan_ins.items():
        view = parameters.views[name]
        view[...] = rng.standard_normal(view.shape) * fan_in**-0.5
    return parameters


def windows(codes: Codes, starts: npt.NDArray[np.int64], context: int) -> tuple[Codes, Codes]:
    """Cut ``(inputs (batch, context), targets (batch,))``: the target is the character right after its window."""
    index = starts[:, None] + np.arange(context + 1)
    cut = codes[index]
    return cut[:, :-1], cut[:, -1]


def _forward(parameters: Parameters, inputs: Codes) -> tuple[Floats, Floats, Floats]:
    view = parameters.views
    features = view["embedding"][inputs].reshape(inputs.shape[0], -1)  # (batch, context * width)
    hidden = np.tanh(features @ view["hidden_weight"] + view["hidden_bias"])  # (batch, hidden)
    logits = hidden @ view["output_weight"] + view["output_bias"]  # (batch, vocabulary)
    logits -= logits.max(axis=1, keepdims=True)
    return features, hidden, logits


def loss_and_grad(parameters: Parameters, inputs: Codes, targets: Codes, grad: Parameters) -> float:
    """Mean cross-entropy in nats per character; its gradient is written into ``grad``."""
    view, out = parameters.views, grad.views
    batch = inputs.shape[0]
    features, hidden, logits = _forward(parameters, inputs)
    rows = np.arange(batch)
    picked = logits[rows, targets].astype(np.float64)
    delta = np.exp(logits)  # becomes d loss / d logits
    total = delta.sum(axis=1, keepdims=True)
    loss = float(np.mean(np.log(total[:, 0].astype(np.float64)) - picked))
    delta /= total
    delta[rows, targets] -= 1
    delta /= batch
    np.matmul(hidden.T, delta, out=out["output_weight"])
    delta.sum(axis=0, out=out["output_bias"])
    delta_hidden = (delta @ view["output_weight"].T) * (1 - hidden * hidden)
    np.matmul(features.T, delta_hidden, out=out["hidden_weight"])
    delta_hidden.sum(axis=0, out=out["hidden_bias"])
    delta_features = (delta_hidden @ view["hidden_weight"].T).reshape(-1, parameters.shape.width)
    # Scatter-add by a one-hot product: np.add.at is several times slower here.
    one_hot = np.zeros((parameters.shape.vocabulary, delta_features.shape[0]), dtype=delta_features.dtype)
    one_hot[inputs.reshape(-1), np.arange(delta_features.shape[0])] = 1
    np.matmul(one_hot, delta_features, out=out["embedding"])
    return loss


def evaluate(parameters: Parameters, inputs: Codes, targets: Codes) -> float:
    """Mean cross-entropy in bits per character."""
    total = 0.0
    for start in range(0, inputs.shape[0], EVALUATE_CHUNK):
        part = slice(start, start + EVALUATE_CHUNK)
        _, _, logits = _forward(parameters, inputs[part])
        picked = logits[np.arange(logits.shape[0]), targets[part]]
        total += float((np.log(np.exp(logits).sum(axis=1)) - picked).sum(dtype=np.float64))
    return total / len(inputs) / math.log(2)


class Adam:
    """Adam over a flat vector. Its moments belong to one replica and are not averaged."""

    def __init__(self, count: int, rate: float) -> None:
        self.rate, self.beta1, self.beta2, self.epsilon = rate, 0.9, 0.99, 1e-8
        self.mean = np.zeros(count, dtype=np.float32)
        self.square = np.zeros(count, dtype=np.float32)
        self.steps = 0

    def step(self, flat: Floats, grad: Floats) -> None:
        """Update ``flat`` in place; ``grad`` is used up."""
        self.steps += 1
        self.mean *= self.beta1
        self.mean += (1 - self.beta1) * grad
        self.square *= self.beta2
        grad *= grad
        grad *= 1 - self.beta2
        self.square += grad
        size = self.rate * math.sqrt(1 - self.beta2**self.steps) / (1 - self.beta1**self.steps)
        np.sqrt(self.square, out=grad)
        grad += self.epsilon
        np.divide(self.mean, grad, out=grad)
        grad *= size
        flat -= grad
