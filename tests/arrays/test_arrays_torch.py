"""torch tensors in every collective: in place, without copies, beside members that use NumPy."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  gives NumPy the dtype bfloat16
import numpy as np
import pytest
import torch
from pair import TIMEOUT_S, Pair

import pyccl
from pyccl.arrays import as_buffer

COUNT = 4099
DTYPES = (
    "float32", "float64", "float16", "bfloat16",
    "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
)  # fmt: skip
MIB = 1 << 20


def numbers(rank: int, dtype: str) -> np.ndarray[Any, Any]:
    """Thirds, so that sums of floats round."""
    return (np.arange(COUNT) % 61 * (rank + 1) / 3).astype(dtype)


def tensor_of(x: np.ndarray[Any, Any]) -> torch.Tensor:
    """Its memory."""
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_beside_a_numpy_array_gets_the_bits_of_the_oracle(pair: Pair, dtype: str) -> None:
    for quantize in (None, "uint8") if "float" in dtype else (None,):
        memory, array = numbers(0, dtype), numbers(1, dtype)
        tensor = tensor_of(memory)
        expected = pyccl.reference_all_reduce([memory, array], quantize=quantize)
        pair.all_reduce(tensor, array, quantize=quantize)
        assert memory.tobytes() == array.tobytes() == expected.tobytes()  # the tensor's storage is NumPy's


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_goes_into_an_out_tensor_and_the_input_stays(pair: Pair, dtype: str) -> None:
    inputs = [numbers(rank, dtype) for rank in range(2)]
    expected = pyccl.reference_all_reduce(inputs, op="max")
    outs = [np.zeros(COUNT, dtype) for _ in range(2)]
    given = [(tensor_of(x), tensor_of(out)) for x, out in zip(inputs, outs, strict=True)]
    pair.both(lambda comm, xs: comm.all_reduce(xs[0], out=xs[1], op="max"), *given)
    for rank in range(2):
        assert outs[rank].tobytes() == expected.tobytes()
        assert inputs[rank].tobytes() == numbers(rank, dtype).tobytes()


def test_part_of_a_storage_is_reduced_and_the_rest_is_left_alone(pair: Pair) -> None:
    whole, array = torch.arange(10.0), np.ones((2, 3), np.float32)
    pair.all_reduce(whole[3:9].view(2, 3), array)
    assert whole.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 9]
    scalar, other = torch.tensor(2.0), np.full((), 3, np.float32)
    pair.all_reduce(scalar, other)
    assert scalar.item() == other == 5.0


def test_other_collectives_take_tensors(pair: Pair) -> None:
    x, y = torch.full((2, 3), 1.5, dtype=torch.bfloat16), torch.full((2, 3), 2.5, dtype=torch.bfloat16)
    for gathered in pair.both(lambda comm, a: comm.all_gather(a), x, y):
        assert gathered.shape == (2, 2, 3) and gathered.dtype.name == "bfloat16"
        assert gathered[0, 0, 0] == 1.5 and gathered[1, 1, 2] == 2.5
    pair.both(lambda comm, a: comm.broadcast(a, root=pair.comms[0].peer_id), x, y)
    assert torch.equal(y, x)
    pair.both(lambda comm, a: comm.all_reduce_many([a, torch.ones(3)], op="avg", max_in_flight=2), x, y)
    assert torch.equal(y, x)


# ---- autograd


def test_a_parameter_takes_the_new_values_and_a_backward_that_needs_the_old_ones_fails(pair: Pair) -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    loss = (parameter * parameter).sum()
    pair.all_reduce(parameter, np.array([10.0, 20.0], np.float32))
    assert parameter.tolist() == [11.0, 22.0]
    assert parameter.requires_grad and parameter.is_leaf and parameter.grad is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    (parameter * parameter).sum().backward()
    assert parameter.grad is not None and parameter.grad.tolist() == [22.0, 44.0]


def test_reading_a_parameter_leaves_its_graph_alone(pair: Pair) -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    loss = (parameter * parameter).sum()
    out = torch.zeros(2)
    pair.both(
        lambda comm, x: comm.all_reduce(x, out=out if x is parameter else None), parameter, np.ones(2, np.float32)
    )
    loss.backward()
    assert out.tolist() == [2.0, 3.0] and parameter.grad is not None and parameter.grad.tolist() == [2.0, 4.0]


def test_what_autograd_computed_is_an_input_but_no_target(pair: Pair) -> None:
    leaf = torch.ones(3, requires_grad=True)
    (comm, _) = pair.comms
    for tracked in (leaf * 2, leaf[:2], leaf.view(3, 1)):
        for refused in (
            lambda x=tracked: comm.all_reduce(x),
            lambda x=tracked: comm.all_reduce(x.detach().clone(), out=x),
            lambda x=tracked: comm.broadcast(x, root=pair.comms[1].peer_id),
        ):
            with pytest.raises(pyccl.UsageError, match=r"detach\(\)"):
                refused()
    doubled, other = leaf * 2, np.ones(3, np.float32)
    pair.all_reduce(doubled.detach(), other)
    assert doubled.tolist() == [3.0, 3.0, 3.0]
    with torch.no_grad():
        pair.all_reduce(leaf[:2], np.ones(2, np.float32))
    assert leaf.tolist() == [2.0, 2.0, 1.0]
    with torch.inference_mode():
        inferred = torch.ones(3)
    pair.all_reduce(inferred, other)
    assert inferred.tolist() == [4.0, 4.0, 4.0]


# ---- refused


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: torch.zeros(4, 6).t(), "not C-contiguous"),
        (lambda: torch.zeros(8)[::2], "not C-contiguous"),
        (lambda: torch.zeros(1).expand(4), "not C-contiguous"),
        (lambda: torch.zeros(4, 6, dtype=torch.bfloat16).t(), "not C-contiguous"),
        (lambda: torch.zeros(4, device="meta"), "meta device"),
        (lambda: torch.zeros(4, dtype=torch.bool), "dtype bool"),
        (lambda: torch.zeros(4, dtype=torch.complex64), "dtype complex64"),
        (lambda: torch.zeros(4, dtype=torch.float8_e4m3fn), "Float8_e4m3fn"),
        (lambda: torch.zeros(4, dtype=torch.complex64).conj().imag, "negative"),
        (lambda: torch.zeros(4, 4).to_sparse(), "no dense array"),
    ],
    ids=["transposed", "strided", "expanded", "bfloat16", "meta", "bool", "complex", "float8", "negative", "sparse"],
)
def test_a_tensor_that_is_no_plain_memory_is_refused(pair: Pair, make: Any, match: str) -> None:
    (comm, _) = pair.comms
    for refused in (
        lambda: comm.all_reduce(make()),
        lambda: comm.all_reduce(torch.zeros(4), out=make()),
        lambda: comm.all_gather(make()),
        lambda: comm.broadcast(make(), root=comm.peer_id),
    ):
        with pytest.raises(pyccl.UsageError, match=match):
            refused()


def test_out_that_overlaps_in_part_is_refused(pair: Pair) -> None:
    whole = torch.zeros(10)
    with pytest.raises(pyccl.UsageError, match="overlaps"):
        pair.comms[0].all_reduce(whole[:6], out=whole[4:])


# ---- no copies


def test_the_memory_of_a_tensor_is_used_as_it_is() -> None:
    tracemalloc.start()
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.uint64):
            tensor = torch.empty(256 * MIB // dtype.itemsize, dtype=dtype)
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            assert as_buffer("x", tensor, writable=True).address == tensor.data_ptr()
            _, peak = tracemalloc.get_traced_memory()
            assert peak - before < MIB
    finally:
        tracemalloc.stop()


def test_an_all_reduce_of_256_mib_takes_no_more_memory_for_tensors_than_for_numpy_arrays() -> None:
    """Resident memory at its peak, over what was resident before: what the engine needs is in both."""
    grown = {}
    for kind in ("numpy", "torch"):
        told = subprocess.run(
            [sys.executable, "-P", str(Path(__file__).with_name("memory.py")), kind, "256"],
            check=True, capture_output=True, text=True, timeout=5 * TIMEOUT_S,
        )  # fmt: skip
        grown[kind] = json.loads(told.stdout)["grown_bytes"]
    assert grown["torch"] < grown["numpy"] + 64 * MIB, grown


# ---- accelerators: staged through host memory


class OnDevice(torch.Tensor):
    """Says that it is on an accelerator and gives its bytes as copies only. No accelerator takes part in this test."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)

    def to(self, device: str) -> torch.Tensor:  # type: ignore[override]
        assert device == "cpu"
        return self.as_subclass(torch.Tensor).clone()

    def numpy(self) -> Any:
        raise TypeError("can't convert a tensor on another device to numpy")


def on_device(values: list[float]) -> torch.Tensor:
    return torch.tensor(values).as_subclass(OnDevice)


def test_a_tensor_on_a_device_gets_the_result_when_the_operation_is_waited_for(pair: Pair) -> None:
    (first, second) = pair.comms
    x, y, out = on_device([1.0, 2.0]), np.array([10.0, 20.0], np.float32), on_device([0.0, 0.0])
    version = x._version
    work = first.all_reduce_async(x)
    second.all_reduce(y)
    assert x.tolist() == [1.0, 2.0]
    work.wait()
    assert x.tolist() == y.tolist() == [11.0, 22.0] and x._version > version
    x.zero_()
    work.wait()  # the second time it only tells
    assert x.tolist() == [0.0, 0.0]
    pair.both(lambda comm, a: comm.all_reduce(a, out=out if comm is first else None, op="avg"), x, y)
    assert (x.tolist(), out.tolist()) == ([0.0, 0.0], [5.5, 11.0])
    pair.both(lambda comm, a: comm.all_reduce_many([a, np.ones(2)], max_in_flight=1), x, y)
    assert x.tolist() == [5.5, 11.0]
    y[:] = 7
    pair.both(lambda comm, a: comm.broadcast(a, root=second.peer_id), x, y)
    assert x.tolist() == [7.0, 7.0]
    assert pair.both(lambda comm, a: comm.all_gather(a), x, y)[0].tolist() == [[7.0, 7.0]] * 2


def test_a_tensor_on_a_device_keeps_its_input_when_the_operation_fails(pair: Pair) -> None:
    (first, second) = pair.comms
    x, y = on_device([1.0, 2.0]), np.zeros(2, np.float32)

    def reduce(comm: pyccl.Communicator, array: Any) -> str:
        with pytest.raises(pyccl.UsageError, match="weight"):
            comm.all_reduce(array, op="avg", weight=0.0)
        return "refused"

    assert pair.both(reduce, x, y) == ["refused"] * 2
    assert x.tolist() == [1.0, 2.0]
    whole = on_device([0.0] * 4)
    with pytest.raises(pyccl.UsageError, match="overlaps"):
        first.all_reduce(whole[:3], out=whole[1:])
    with pytest.raises(pyccl.UsageError, match="not C-contiguous"):
        second.all_reduce(whole[::2])
