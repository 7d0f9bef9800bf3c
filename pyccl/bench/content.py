"""What the state of a benchmark is made of: bytes that pack to nothing, to a little less, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_BLOCK_BYTES: Final = 4 << 20  # of text, which is then repeated: further than a packed chunk reaches
_WORDS: Final = 20_000


def _random(rng: np.random.Generator, size_bytes: int) -> Bytes:
    return rng.integers(0, 1 << 63, -(-size_bytes // 8), np.int64).view(np.uint8)


def _constant(rng: np.random.Generator, size_bytes: int) -> Bytes:
    return np.full(size_bytes, rng.integers(256), np.uint8)


def _text(rng: np.random.Generator, size_bytes: int) -> Bytes:
    """Words as frequent as those of languages (Zipf)."""
    letters = rng.integers(ord("a"), ord("z") + 1, (_WORDS, 10), np.uint8)
    words = [letters[word, : 2 + word % 9].tobytes() for word in range(_WORDS)]
    drawn = np.minimum(rng.zipf(1.2, _BLOCK_BYTES // 4), _WORDS) - 1
    block = b" ".join([words[word] for word in drawn.tolist()])
    return np.resize(np.frombuffer(block, np.uint8), size_bytes)


def _weights(rng: np.random.Generator, size_bytes: int) -> Bytes:
    return (rng.standard_normal(-(-size_bytes // 4), np.float32) * np.float32(0.02)).view(np.uint8)


def _rounded(rng: np.random.Generator, size_bytes: int) -> Bytes:
    """Weights of bfloat16 that are held as float32."""
    return (_weights(rng, size_bytes).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.uint8)


KINDS: Final[Mapping[str, Callable[[np.random.Generator, int], Bytes]]] = {
    "random": _random,
    "constant": _constant,
    "text": _text,
    "weights": _weights,
    "rounded": _rounded,
}


def content(kind: str, seed: int, size_bytes: int) -> Bytes:
    """`size_bytes` bytes; others of another seed."""
    return KINDS[kind](np.random.default_rng(seed), size_bytes)[:size_bytes]
