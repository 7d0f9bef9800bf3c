"""What the user trains, as named arrays in host memory: NumPy arrays, torch modules, named parameters.

Three kinds of memory meet here:
    live     the user's parameter, in its own dtype, wherever it is; read and written through a ``Leaf``
    vectors  what is exchanged and what the outer optimizer keeps: float32 (float64 for float64 parameters), one
             contiguous vector for each dtype with a view for every name (``Vectors``)
    staging  of a parameter on an accelerator: a pinned host buffer that it is copied to and from

theta of a float16 or bfloat16 parameter is float32 and keeps what an outer step changes below the parameter's
precision. The live weights start a round from theta rounded to their dtype, so that is what a pseudo-gradient is taken
from: a replica that did not move contributes exactly 0. torch is imported nowhere: who passes tensors has it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pyccl.errors import UsageError
from pyccl.optim.rules import difference

Array = np.ndarray[Any, Any]

DTYPES: Final = ("float32", "float64", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Spec:
    """A named array of the outer optimizer. dtype: "float32" or "float64"."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


class Vectors:
    """Named arrays end to end: one vector of zeros for each dtype, and a view for each name.

    vectors: (n,) contiguous; float32 before float64; a dtype that no array has is left out.
    views: name -> array of the shape of the Spec, in the order given.
    """

    def __init__(self, specs: Iterable[Spec]) -> None:
        self.specs = tuple(specs)
        whole = {
            dtype: np.zeros(sum(spec.size for spec in self.specs if spec.dtype == dtype), dtype)
            for dtype in ("float32", "float64")
            if any(spec.dtype == dtype for spec in self.specs)
        }
        self.vectors: tuple[Array, ...] = tuple(whole.values())
        self.views: dict[str, Array] = {}
        at = dict.fromkeys(whole, 0)
        for spec in self.specs:
            start = at[spec.dtype]
            at[spec.dtype] += spec.size
            self.views[spec.name] = whole[spec.dtype][start : start + spec.size].reshape(spec.shape)

    def like(self) -> Vectors:
        """Zeros of the same layout."""
        return Vectors(self.specs)

    def copy_from(self, other: Vectors) -> None:
        """Of the same layout."""
        for mine, theirs in zip(self.vectors, other.vectors, strict=True):
            np.copyto(mine, theirs)

    def fill(self, value: float) -> None:
        for vector in self.vectors:
            vector.fill(value)

    @property
    def size_bytes(self) -> int:
        return sum(vector.nbytes for vector in self.vectors)


class Leaf:
    """One live parameter in host memory, of any strides.

    dtype: of DTYPES. ``host()`` is its memory now (bfloat16 as uint16), whose place may change between calls.
    """

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        if dtype not in DTYPES:
            raise UsageError(f"{name}: dtype {dtype} is not one of {', '.join(DTYPES)}")
        self.name, self.dtype, self.shape = name, dtype, shape

    @property
    def spec(self) -> Spec:
        return Spec(self.name, self.shape, "float64" if self.dtype == "float64" else "float32")

    @property
    def is_wide(self) -> bool:
        """Whether theta has the parameter's own dtype."""
        return self.dtype in ("float32", "float64")

    def host(self) -> Array:
        raise NotImplementedError

    def fetch(self) -> None:
        """Start to bring the live values to ``host()``."""

    def store(self) -> None:
        """Start to bring ``host()`` to the live values."""

    # ---- between live memory and an array of the outer optimizer

    def read(self, out: Array) -> None:
        """The live values as float32 or float64."""
        np.copyto(out, _widened(self.host(), self.dtype))

    def write(self, values: Array) -> None:
        """Round these to the live dtype and put them there."""
        host = self.host()
        host[...] = _rounded_bfloat16(values) if self.dtype == "bfloat16" else values

    def pseudo_gradient(self, theta: Array, out: Array) -> None:
        """out = theta - live, theta rounded to the live dtype."""
        if self.is_wide:
            difference(theta, self.host(), out)
            return
        self.read(out)
        np.subtract(self.rounded(theta), out, out=out)

    def rounded(self, theta: Array) -> Array:
        """theta as the live weights can hold it, as float32 or float64."""
        if self.is_wide:
            return theta
        narrow = _rounded_bfloat16(theta) if self.dtype == "bfloat16" else theta.astype(np.float16)
        return _widened(narrow, self.dtype)


def _widened(live: Array, dtype: str) -> Array:
    if dtype == "bfloat16":
        return (live.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return live if dtype in ("float32", "float64") else live.astype(np.float32)


def _rounded_bfloat16(x: Array) -> Array:
    """Bits of it, rounded to nearest even; NaN is the canonical one."""
    bits = np.ascontiguousarray(x).view(np.uint32).reshape(x.shape)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


class NumpyLeaf(Leaf):
    def __init__(self, name: str, array: Array) -> None:
        super().__init__(name, array.dtype.name, array.shape)
        if not array.dtype.isnative:
            raise UsageError(f"{name}: dtype {array.dtype} is of foreign byte order")
        if not array.flags.writeable:
            raise UsageError(f"{name}: the array is read-only")
        _check_strides(name, array.shape, array.strides)
        self._host = array.view(np.uint16) if self.dtype == "bfloat16" else array

    def host(self) -> Array:
        return self._host


class TorchLeaf(Leaf):
    """A tensor in host memory, used where it is. Its storage may move between rounds, as under FSDP."""

    def __init__(self, name: str, tensor: Any) -> None:
        self._torch: Any = sys.modules["torch"]
        super().__init__(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        _check_strides(name, tensor.shape, tensor.stride())
        self._tensor = tensor

    def host(self) -> Array:
        return _numpy_of(self._torch, self._tensor.detach())

    def store(self) -> None:
        """A backward pass that needs the old values fails instead of using the new ones."""
        if not self._tensor.is_inference():
            self._torch.autograd.graph.increment_version(self._tensor)


class DeviceLeaf(Leaf):
    """A tensor on an accelerator, staged through a host buffer, pinned for CUDA, where copies run in the background.

    Not run on an accelerator yet: tests have a stand-in.
    """

    def __init__(self, name: str, tensor: Any, *, pinned: bool = True) -> None:
        torch: Any = sys.modules["torch"]
        super().__init__(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        self.device = tensor.device
        self._tensor, self._is_cuda = tensor, self.device.type == "cuda"
        self._staging = torch.empty(self.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned and self._is_cuda)
        self._host = _numpy_of(torch, self._staging)

    def host(self) -> Array:
        return self._host

    def fetch(self) -> None:
        self._staging.copy_(self._tensor.detach(), non_blocking=self._is_cuda)

    def store(self) -> None:
        self._tensor.detach().copy_(self._staging, non_blocking=self._is_cuda)


def _numpy_of(torch: Any, tensor: Any) -> Array:
    array: Array = (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array.view(np.uint16) if tensor.dtype is torch.bfloat16 else array


def _check_strides(name: str, shape: Sequence[int], strides: Sequence[int]) -> None:
    if any(step == 0 and length > 1 for length, step in zip(shape, strides, strict=True)):
        raise UsageError(f"{name}: several of its elements share memory (an expanded array)")


class Params:
    """The user's parameters in the order of their names.

    Args:
        given: a mapping name -> NumPy array or torch tensor, a torch module, or (name, parameter) pairs. Floats:
            float32, float64, float16, bfloat16 (torch, or ``ml_dtypes``). Arrays of any strides, used without copies.
            Tied parameters (one piece of memory under several names) are exchanged once, under the first of the names.
    Raises:
        UsageError: no parameters, no names, a dtype, read-only, or memory that parameters share in part.
    """

    def __init__(self, given: Any) -> None:
        named = sorted(_named(given).items())
        self.aliases: dict[str, str] = {}  # a tied name -> the name that stands for it
        leaves: list[Leaf] = []
        seen: dict[Any, str] = {}
        for name, value in named:
            leaf, place = _leaf(name, value)
            if place is not None and place in seen:
                self.aliases[name] = seen[place]
                continue
            if place is not None:
                seen[place] = name
            leaves.append(leaf)
        _check_disjoint(leaves)
        self.leaves: tuple[Leaf, ...] = tuple(leaves)
        self._by_name = {leaf.name: leaf for leaf in leaves}

    @property
    def names(self) -> tuple[str, ...]:
        """Without tied ones."""
        return tuple(self._by_name)

    def vectors(self, names: Iterable[str] | None = None) -> Vectors:
        """Zeros for these parameters (all unless given), in their order here."""
        return Vectors(leaf.spec for leaf in self._chosen(names))

    def read(self, out: Vectors) -> None:
        """The live values of the names that `out` has."""
        chosen = self._chosen(out.views)
        self._fetch(chosen)
        for leaf in chosen:
            leaf.read(out.views[leaf.name])

    def write(self, values: Vectors) -> None:
        """Set the live values of the names that `values` has."""
        chosen = self._chosen(values.views)
        for leaf in chosen:
            leaf.write(values.views[leaf.name])
            leaf.store()
        self._settle(chosen)

    def pseudo_gradient(self, theta: Vectors, out: Vectors) -> None:
        """out = theta - live, for the names that `out` has."""
        chosen = self._chosen(out.views)
        self._fetch(chosen)
        for leaf in chosen:
            leaf.pseudo_gradient(theta.views[leaf.name], out.views[leaf.name])

    def layout(self) -> str:
        """What must be equal on all members: names, dtypes and shapes."""
        return ";".join(f"{leaf.name}:{leaf.dtype}{list(leaf.shape)}" for leaf in self.leaves)

    def _chosen(self, names: Iterable[str] | None) -> list[Leaf]:
        return list(self.leaves) if names is None else [self._by_name[name] for name in names]

    def _fetch(self, leaves: Sequence[Leaf]) -> None:
        for leaf in leaves:
            leaf.fetch()
        self._settle(leaves)

    def _settle(self, leaves: Sequence[Leaf]) -> None:
        """Copies to and from accelerators have ended."""
        for device in {leaf.device for leaf in leaves if isinstance(leaf, DeviceLeaf)}:
            if device.type == "cuda":
                sys.modules["torch"].cuda.synchronize(device)


def _named(given: Any) -> dict[str, Any]:
    if hasattr(given, "named_parameters"):
        given = list(given.named_parameters())
    if isinstance(given, Mapping):
        pairs = list(given.items())
    else:
        try:
            pairs = [(name, value) for name, value in given]
        except (TypeError, ValueError):
            raise UsageError(
                "params: a mapping of names to arrays, a torch module or (name, parameter) pairs are needed"
            ) from None
    named: dict[str, Any] = {}
    for name, value in pairs:
        if not isinstance(name, str) or not name:
            raise UsageError(f"params: {name!r} is no name")
        if name in named:
            raise UsageError(f"params: two parameters are called {name}")
        named[name] = value
    if not named:
        raise UsageError("params: there are none")
    return named


def _leaf(name: str, value: Any) -> tuple[Leaf, Any]:
    """And what is equal for tied parameters; None for one without memory."""
    if isinstance(value, np.ndarray):
        leaf: Leaf = NumpyLeaf(name, value)
        place = (value.__array_interface__["data"][0], value.shape, value.strides, value.dtype.name)
        return leaf, place if value.size else None
    torch: Any = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        raise UsageError(f"{name}: a NumPy array or a torch tensor is needed, not {type(value).__name__}")
    if hasattr(value, "to_local"):  # a DTensor: this rank's shard; the peer group is the shard's
        value = value.to_local()
    if value.layout is not torch.strided or value.device.type == "meta":
        raise UsageError(f"{name}: a {value.layout} tensor on {value.device.type} holds no dense array")
    leaf = TorchLeaf(name, value) if value.device.type == "cpu" else DeviceLeaf(name, value)
    place = (value.data_ptr(), tuple(value.shape), tuple(value.stride()), leaf.dtype)
    return leaf, place if value.numel() else None


def _check_disjoint(leaves: Iterable[Leaf]) -> None:
    arrays = [(leaf.name, leaf.host()) for leaf in leaves if not isinstance(leaf, DeviceLeaf)]
    spans = sorted((*_bounds(array), name, i) for i, (name, array) in enumerate(arrays) if array.size)
    end, before = 0, -1
    for start, stop, name, i in spans:
        if start < end and np.shares_memory(arrays[i][1], arrays[before][1]):
            raise UsageError(f"params: {name} and {arrays[before][0]} share memory in part")
        if stop > end:
            end, before = stop, i


def _bounds(array: Array) -> tuple[int, int]:
    """Addresses of the first byte and behind the last."""
    at = int(array.__array_interface__["data"][0])
    steps = [(length - 1) * step for length, step in zip(array.shape, array.strides, strict=True)]
    return at + sum(s for s in steps if s < 0), at + sum(s for s in steps if s > 0) + array.itemsize
