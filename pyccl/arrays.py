"""The caller's arrays as memory that the engine can use: NumPy, buffer protocol, DLPack, torch. No copies.

Every kind ends as a Buffer: the bytes, and which of our dtypes they hold. bfloat16 has no NumPy dtype of its own: it
comes as ``ml_dtypes.bfloat16`` or as a torch tensor. A torch tensor on an accelerator is staged: the engine works on a
copy in host memory, which goes back to the tensor when the operation has succeeded.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pyccl._native._pyccl import lib
from pyccl.errors import UsageError

Array = np.ndarray[Any, Any]

DTYPES: Final[dict[str, int]] = {
    "int8": lib.PYCCL_INT8,
    "int16": lib.PYCCL_INT16,
    "int32": lib.PYCCL_INT32,
    "int64": lib.PYCCL_INT64,
    "uint8": lib.PYCCL_UINT8,
    "uint16": lib.PYCCL_UINT16,
    "uint32": lib.PYCCL_UINT32,
    "uint64": lib.PYCCL_UINT64,
    "float16": lib.PYCCL_FLOAT16,
    "bfloat16": lib.PYCCL_BFLOAT16,
    "float32": lib.PYCCL_FLOAT32,
    "float64": lib.PYCCL_FLOAT64,
}
FLOATS: Final = frozenset({"float16", "bfloat16", "float32", "float64"})
_NATIVE: Final = {np.dtype(name): name for name in DTYPES if name != "bfloat16"}  # dtype.name is slow to make


@dataclass(slots=True)
class Buffer:
    """Memory of the caller, or its copy in host memory. Holding it keeps the memory alive.

    array: C-contiguous, shows its bytes by the buffer protocol. put_back: of a copy, writes it to the caller's array,
    which begins at `origin`.
    """

    array: Array
    dtype: str
    put_back: Callable[[], None] | None = None
    origin: int = 0

    @property
    def address(self) -> int:
        """Where the caller's array begins."""
        return self.origin if self.put_back is not None else int(self.array.__array_interface__["data"][0])

    @property
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self.array.shape
        return shape

    @property
    def code(self) -> int:
        return DTYPES[self.dtype]

    @property
    def count(self) -> int:
        return self.array.size

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS


def as_buffer(name: str, value: Any, *, writable: bool) -> Buffer:
    """The caller's memory. UsageError: not an array, not contiguous, read-only where it must not be, or its dtype."""
    if isinstance(value, np.ndarray):
        return _checked(name, value, _NATIVE.get(value.dtype) or value.dtype.name, writable)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _of_torch(name, torch, value, writable)
    try:
        array: Array = np.asarray(memoryview(value))
    except (TypeError, ValueError, BufferError):
        array = _of_dlpack(name, value)
    return _checked(name, array, array.dtype.name, writable)


def _checked(name: str, array: Array, dtype: str, writable: bool) -> Buffer:
    if not array.dtype.isnative:
        raise UsageError(f"{name}: dtype {array.dtype} is of foreign byte order")
    if dtype not in DTYPES:
        raise UsageError(f"{name}: dtype {dtype} is not one of {', '.join(DTYPES)}")
    if not array.flags.c_contiguous:
        raise UsageError(f"{name}: the array is not C-contiguous")
    if writable and not array.flags.writeable:
        raise UsageError(f"{name}: the array is read-only")
    if dtype == "bfloat16":
        array = array.view(np.uint16)  # the buffer protocol has no name for it
    return Buffer(array, dtype)


def _of_torch(name: str, torch: Any, tensor: Any, writable: bool) -> Buffer:
    """A tensor in host memory shares it. Written as under ``torch.no_grad()``: autograd does not follow.

    A leaf that requires grad (a parameter) takes the new values; what autograd computed from others it could not
    follow is refused. Either way a backward pass that needs the old values fails instead of using the new ones.
    """
    if tensor.layout is not torch.strided:
        raise UsageError(f"{name}: a {tensor.layout} tensor is no dense array")
    if tensor.device.type == "meta":
        raise UsageError(f"{name}: a tensor on the meta device holds no data")
    if writable and tensor.requires_grad and not tensor.is_leaf:
        raise UsageError(f"{name}: autograd computed this tensor and can't follow a write to it: pass {name}.detach()")
    detached = tensor.detach()
    if tensor.device.type == "cpu":
        buffer = _of_host_tensor(name, torch, detached, writable)
        if writable and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
        return buffer
    if not detached.is_contiguous():
        raise UsageError(f"{name}: the array is not C-contiguous")
    host = detached.to("cpu")
    staged = _of_host_tensor(name, torch, host, writable)
    return Buffer(staged.array, staged.dtype, lambda: detached.copy_(host), int(detached.data_ptr()))


def _of_host_tensor(name: str, torch: Any, tensor: Any, writable: bool) -> Buffer:
    is_bfloat16 = tensor.dtype is torch.bfloat16
    try:
        array: Array = (tensor.view(torch.int16) if is_bfloat16 else tensor).numpy()
    except (TypeError, RuntimeError) as e:  # a dtype or a view (conjugate, negative) that NumPy can't show
        raise UsageError(f"{name}: {e}") from e
    return _checked(name, array, "bfloat16" if is_bfloat16 else array.dtype.name, writable)


def _of_dlpack(name: str, value: Any) -> Array:
    """Read-only unless the producer says otherwise, which it can from DLPack 1.0 on."""
    if not hasattr(value, "__dlpack__"):
        raise UsageError(f"{name}: an array is needed, not {type(value).__name__}")
    try:
        array: Array = np.from_dlpack(value)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as e:
        raise UsageError(f"{name}: {type(value).__name__} does not give its memory: {e}") from e
    return array


def check_out(x: Buffer, out: Buffer) -> None:
    """`out` is of the shape and dtype of `x` and is the same memory or apart from it."""
    if out is x:
        return
    if out.shape != x.shape or out.dtype != x.dtype:
        raise UsageError(f"out is {out.dtype}{list(out.shape)}, x is {x.dtype}{list(x.shape)}")
    size, at, to = x.array.nbytes, x.address, out.address
    if at != to and at < to + size and to < at + size:
        raise UsageError("out overlaps x in part")


def numpy_dtype(buffer: Buffer) -> Any:
    """The NumPy dtype of a new array of this kind. UsageError: bfloat16 without the package ml_dtypes."""
    if buffer.dtype != "bfloat16":
        return np.dtype(buffer.dtype)
    try:
        return np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    except ImportError:
        raise UsageError("bfloat16 in NumPy needs the package ml_dtypes: pip install ml_dtypes") from None
