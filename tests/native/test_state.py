"""Digests of shared state against the same construction written anew with hashlib and the reference xxhash."""

from __future__ import annotations

import hashlib
import os
import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import xxhash

import pyccl
from pyccl import state as state_module

SEED = 20310504
MIB = 1 << 20
DIGESTS = ["fast", "sha256"]
Arrays = dict[str, np.ndarray[Any, Any]]


def expected_table(arrays: Arrays, unequal: tuple[str, ...], digest: str) -> bytes:
    def hash_one(chunk: bytes) -> bytes:
        return xxhash.xxh3_128_digest(chunk) if digest == "fast" else hashlib.sha256(chunk).digest()

    table = b""
    for name in sorted(set(arrays) - set(unequal), key=str.encode):
        data = arrays[name].tobytes()
        table += b"".join(hash_one(data[at : at + MIB]) for at in range(0, len(data), MIB))
    return table


def expected_root(arrays: Arrays, unequal: tuple[str, ...], digest: str, revision: int) -> str:
    layout = b""
    for name in sorted(arrays, key=str.encode):
        array, encoded = arrays[name], name.encode()
        layout += struct.pack("<IIII", len(encoded), len(array.dtype.str), array.ndim, name in unequal)
        layout += encoded + array.dtype.str.encode() + struct.pack(f"<{array.ndim}Q", *array.shape)
    number = {"fast": 1, "sha256": 2}[digest]
    head = hashlib.sha256(layout).digest() + struct.pack("<QQ", number, revision)
    return hashlib.sha256(head + expected_table(arrays, unequal, digest)).hexdigest()


def random_arrays(rng: np.random.Generator, big: int = 0) -> Arrays:
    arrays: Arrays = {"big": rng.integers(0, 256, big, np.uint8)} if big else {}
    for number in range(int(rng.integers(1, 6))):
        shape = [int(size) for size in rng.integers(0, 9, int(rng.integers(0, 4)))]
        dtype = np.dtype(str(rng.choice(["<f4", ">i4", "<f8", "|b1", "<u2", "<M8[s]", "<c16", "|S5"])))
        count = int(np.prod(shape, dtype=np.int64))
        data = rng.integers(0, 2, count * dtype.itemsize, np.uint8)
        arrays[f"{'äzZ_.'[number]}{number}"] = data.view(dtype).reshape(shape)
    return arrays


@pytest.mark.parametrize("digest", DIGESTS)
@pytest.mark.parametrize("case", range(20))
def test_the_digest_is_what_the_document_says(digest: str, case: int) -> None:
    rng = np.random.default_rng([SEED, case])
    arrays = random_arrays(rng, big=int(rng.choice([0, 1, MIB - 1, MIB, MIB + 1, 3 * MIB + 17])))
    unequal = tuple(name for name in arrays if rng.random() < 0.3)
    revision = int(rng.integers(0, 1 << 63))
    state = pyccl.SharedState(arrays, revision, allow_content_inequality=unequal, digest=digest)
    assert state.tree().table == expected_table(arrays, unequal, digest), (SEED, case)
    assert state.digest() == expected_root(arrays, unequal, digest, revision), (SEED, case)


@pytest.mark.parametrize("processors", [1, 2, 5])
def test_threads_hash_the_chunks_in_order(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(processors)))
    arrays = random_arrays(np.random.default_rng(SEED), big=20 * MIB + 3)
    state = pyccl.SharedState(arrays, 3, digest="sha256")
    assert state.tree().table == expected_table(arrays, (), "sha256")


@pytest.mark.parametrize("digest", DIGESTS)
def test_every_difference_shows(digest: str) -> None:
    def made(revision: int = 1, **changes: Any) -> pyccl.SharedState:
        arrays = {"w": np.arange(12, dtype=np.float32), "rng": np.arange(4, dtype=np.uint8)} | changes.pop("arrays", {})
        return pyccl.SharedState(arrays, revision, digest=digest, **changes)

    flipped = np.arange(12, dtype=np.float32)
    flipped.view(np.uint8)[47] ^= 1
    others = [
        made(revision=2),
        made(arrays={"w": flipped}),
        made(arrays={"w": np.arange(12, dtype=np.float32).reshape(3, 4)}),
        made(arrays={"w": np.arange(12, dtype=np.float32).view(np.int32)}),
        made(arrays={"more": np.zeros(0, np.float32)}),
        made(allow_content_inequality=["rng"]),
        made(allow_content_inequality=["w"]),
        made(allow_content_inequality=["rng", "w"]),
    ]
    digests = [state.digest() for state in [made(), *others]]
    assert len(set(digests)) == len(digests) and made().digest() == digests[0]
    assert (
        pyccl.SharedState({"w": flipped}, digest="fast").digest()
        != pyccl.SharedState({"w": flipped}, digest="sha256").digest()
    )


def test_what_may_differ_is_not_hashed() -> None:
    w, one, other = np.arange(9.0), np.zeros(3), np.ones(3)
    digests = {
        pyccl.SharedState({"w": w, "rng": rng}, allow_content_inequality={"rng"}).digest() for rng in (one, other)
    }
    assert len(digests) == 1


def test_one_bit_of_a_chunk_is_found_by_each_digest() -> None:
    chunk = np.random.default_rng(SEED).integers(0, 256, MIB, np.uint8)
    for kind in state_module.DIGESTS.values():
        digest = kind.table([chunk])
        assert len(digest) == kind.size_bytes and kind.matches(chunk, digest)
        spoiled = chunk.copy()
        spoiled[MIB - 1] ^= 128
        assert not kind.matches(spoiled, digest)


def test_types_that_are_only_bytes_to_numpy_are_different_layouts_all_the_same() -> None:
    """Their type strings are equal: "<V1" and "<V2" are what NumPy makes of a type that is not its own."""
    names = ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e4m3b11fnuz", "int4", "uint4"]
    foreign = [np.zeros(4, getattr(ml_dtypes, name)) for name in names]
    assert len({array.dtype.str for array in foreign}) == 1
    bytes_alone, halves = np.zeros(4, "V1"), np.zeros(4, "V2")
    bfloats = np.zeros(4, ml_dtypes.bfloat16)
    assert bfloats.dtype.str[1:] == halves.dtype.str[1:] == "V2"
    arrays = [*foreign, bytes_alone, halves, bfloats, np.zeros(4, np.float16)]
    assert len({pyccl.SharedState({"x": array}).digest() for array in arrays}) == len(arrays)
