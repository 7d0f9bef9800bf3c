"""``pyccl bench digest``: digests of shared state, 16 bytes for each MiB, on one thread; others to compare with.

Rates are GiB hashed a second. "cache" hashes one chunk again and again, "memory" the size that is asked for.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pyccl._native._pyccl import ffi, lib
from pyccl._native.handles import CHUNK_BYTES
from pyccl.bench.figures import Summary
from pyccl.bench.kernels import SAMPLE_S, kernel, kernels_here, sample
from pyccl.bench.machine import is_installed

OWN: Final = "pyccl chunks"
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Rate:
    """GiB hashed a second."""

    what: str
    kernel: str
    place: str  # "cache" or "memory"
    gib_per_s: Summary

    def to_json(self) -> dict[str, Any]:
        return {
            "what": self.what, "kernel": self.kernel, "place": self.place, "gib_per_s": self.gib_per_s.to_json()
        }  # fmt: skip


def measure(memory_bytes: int, sample_s: float = SAMPLE_S) -> list[Rate]:
    """pyccl's digests with each instruction set; xxhash's package, where installed; SHA-256 and BLAKE2b."""
    rates: list[Rate] = []
    for place, size_bytes in (("cache", CHUNK_BYTES), ("memory", max(memory_bytes, CHUNK_BYTES))):
        data = np.random.default_rng(1).integers(0, 256, size_bytes, np.uint8)
        own = _own(data)
        for name in kernels_here():
            with kernel(name):
                rates.append(Rate(OWN, name, place, sample(own, data.nbytes, sample_s)))
        for what, run in _others(data).items():
            rates.append(Rate(what, "", place, sample(run, data.nbytes, sample_s)))
    return rates


def _own(data: Array) -> Callable[[], object]:
    pin = ffi.from_buffer("uint8_t[]", data)
    out = ffi.new("uint8_t[]", -(-data.nbytes // CHUNK_BYTES) * 16)
    return lambda: lib.pyccl_chunk_digests(pin, data.nbytes, CHUNK_BYTES, out)


def _others(data: Array) -> dict[str, Callable[[], object]]:
    chunks = [data[start : start + CHUNK_BYTES].data for start in range(0, data.nbytes, CHUNK_BYTES)]

    def chunkwise(hash_one: Callable[[Any], object]) -> Callable[[], object]:
        return lambda: [hash_one(chunk) for chunk in chunks]

    others = {
        "hashlib sha256": chunkwise(lambda chunk: hashlib.sha256(chunk).digest()),
        "hashlib blake2b": chunkwise(lambda chunk: hashlib.blake2b(chunk).digest()),
    }
    if is_installed("xxhash"):
        others = {"xxhash xxh3_128": chunkwise(importlib.import_module("xxhash").xxh3_128_digest), **others}
    return others
