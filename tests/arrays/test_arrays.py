"""What is taken for an array without torch: buffer protocol, DLPack of several kinds. No copies."""

from __future__ import annotations

import array
import gc
import mmap
from typing import Any

import numpy as np
import pytest
from capsules import Producer
from pair import Pair

import pyccl
from pyccl.arrays import as_buffer

COUNT = 1001
CUDA = 2  # a device type of dlpack.h


def numbers(rank: int, dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    return (np.arange(COUNT) * (rank + 1)).astype(dtype)


class NumpyProducer:
    """NumPy's own DLPack, without the buffer protocol."""

    def __init__(self, x: np.ndarray[Any, Any]) -> None:
        self.x = x

    def __dlpack__(self, **keywords: Any) -> Any:
        return self.x.__dlpack__(**keywords)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.x.__dlpack_device__()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int8, np.uint16, np.int64])
@pytest.mark.parametrize("kind", ["numpy's", "versioned"])
def test_writable_dlpack_is_reduced_in_place_beside_a_numpy_array(pair: Pair, kind: str, dtype: Any) -> None:
    mine, theirs = numbers(0, dtype), numbers(1, dtype)
    expected = pyccl.reference_all_reduce([mine, theirs])
    given = NumpyProducer(mine) if kind == "numpy's" else Producer(mine, (1, 0))
    assert as_buffer("x", given, writable=True).address == mine.ctypes.data
    pair.all_reduce(given, theirs)
    assert mine.tobytes() == theirs.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("version", "read_only"), [((0, 8), False), ((1, 0), True)], ids=["before 1.0", "marked read-only"]
)
def test_dlpack_that_may_not_be_written_is_an_input_but_no_target(
    pair: Pair, version: tuple[int, int], read_only: bool
) -> None:
    mine, theirs = numbers(0), numbers(1)
    given, out = Producer(mine, version, read_only), np.zeros(COUNT, np.float32)
    for refused in (
        lambda: pair.comms[0].all_reduce(given),
        lambda: pair.comms[0].all_reduce(mine, out=given),
        lambda: pair.comms[0].broadcast(given, root=pair.comms[1].peer_id),
    ):
        with pytest.raises(pyccl.UsageError, match="read-only"):
            refused()
    assert as_buffer("x", given, writable=False).address == mine.ctypes.data
    pair.both(lambda comm, x: comm.all_reduce(x, out=out if x is given else theirs), given, theirs)
    assert np.array_equal(mine, numbers(0))
    assert out.tobytes() == theirs.tobytes() == (numbers(0) + numbers(1)).tobytes()


def test_memory_of_a_dlpack_producer_is_held_until_the_operation_has_ended_and_then_given_back(pair: Pair) -> None:
    given, other = Producer(numbers(0), (1, 0)), numbers(1)
    work = pair.comms[0].all_reduce_async(given)
    gc.collect()
    assert given.given == 1 and given.taken_back == 0
    pair.comms[1].all_reduce(other)
    work.wait()
    gc.collect()
    assert given.taken_back == 1


def test_dlpack_that_fails_or_is_strided_is_a_usage_error(pair: Pair) -> None:
    class Broken:
        def __dlpack__(self, **keywords: Any) -> Any:
            raise BufferError("on another device")

        def __dlpack_device__(self) -> tuple[int, int]:
            return CUDA, 0

    (comm, _) = pair.comms
    for given, match in (
        (Broken(), "Broken does not give its memory"),
        (Producer(numbers(0), (1, 0), device=CUDA), "Producer does not give its memory"),
        (Producer(numbers(0), (2, 0)), "Producer does not give its memory"),
        (Producer(numbers(0)[::2], (1, 0)), "not C-contiguous"),
        (Producer(np.zeros((3, 4), np.float32).T, (1, 0)), "not C-contiguous"),
    ):
        with pytest.raises(pyccl.UsageError, match=match):
            comm.all_reduce(given)


def test_buffers_of_any_owner_are_reduced_in_place(pair: Pair) -> None:
    items, plain = array.array("d", range(COUNT)), np.arange(COUNT, dtype=np.float64)
    pair.all_reduce(items, plain)
    assert items.tolist() == plain.tolist() == [2.0 * i for i in range(COUNT)]
    raw, counted = bytearray(range(256)), np.arange(256, dtype=np.uint8)
    pair.all_reduce(raw, counted, op="max")
    assert bytes(raw) == bytes(counted) == bytes(range(256))
    with mmap.mmap(-1, 4096) as mapped:
        mapped[:] = b"\3" * 4096
        pair.all_reduce(memoryview(mapped).cast("i"), np.full(1024, 5, np.int32))
        assert mapped[:] == np.full(1024, 5 + 0x03030303, np.int32).tobytes()
        gc.collect()  # the operation's view of it, or it could not be closed


@pytest.mark.parametrize("kind", ["numpy", "dlpack"])
def test_other_collectives_take_the_same_arrays(pair: Pair, kind: str) -> None:
    x, y = numbers(0), numbers(1)
    given = x if kind == "numpy" else Producer(x, (1, 0))
    gathered = pair.both(lambda comm, a: comm.all_gather(a), given, y)
    assert all(np.array_equal(g, [numbers(0), numbers(1)]) for g in gathered)
    root = pair.comms[1].peer_id
    pair.both(lambda comm, a: comm.broadcast(a, root=root), given, y)
    assert np.array_equal(x, numbers(1))
    pair.both(lambda comm, a: comm.all_reduce_many([a, np.ones(3)], op="avg"), given, y)
    assert np.array_equal(x, numbers(1))
