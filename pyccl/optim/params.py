"""What the user trains, as named arrays in host memory: NumPy arrays, torch modules, named parameters.

Three kinds of memory meet here:
    live     the user's parameter, in its own dtype, wherever it is; read and written through a ``Leaf``
    vectors  what is exchanged and what the outer optimizer keeps: float32 (float64 for float64 parameters), one
             contiguous vector for each dtype with a view for every name (``Vectors``)
    staging  of a parameter on an accelerator: a pinned host buffer that it is copied to and from

theta of a float16 or bfloat16 parameter is float32 and keeps what an outer step changes below the parameter's
precision. The live weights start a round from theta rounded to their dtype, so that is what a pseudo-gradient is taken
from: a replica that did not move contributes exactly 0. torch is imported nowhere: who passes tensors has it.

Of a DTensor, as FSDP2 makes them, a rank trains and exchanges its own shard; the ranks of all islands that hold the
same shard are a peer group. So a DTensor that is not split among all ranks of its mesh is refused.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

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


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of a DTensor a rank holds. shape: of the whole. place: "dp=1/2": the second along a mesh dimension."""

    shape: tuple[int, ...]
    placements: str
    place: str


class _Form(NamedTuple):
    """Of live memory, in the words of its library: cheap to take and to compare."""

    dtype: Any
    shape: tuple[int, ...]
    device: Any = None
    is_writeable: bool = True
    strides: tuple[int, ...] = ()

    def __str__(self) -> str:
        where = "" if self.device is None or self.device.type == "cpu" else f" on {self.device}"
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}{where}"


class Leaf(ABC):
    """One live parameter in host memory, of any strides.

    dtype: of DTYPES. ``host()`` is its memory now (bfloat16 as uint16), whose place may change between calls. shard:
    where this is one of several that make a parameter.
    """

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...], shard: Shard | None = None) -> None:
        if dtype not in DTYPES:
            raise UsageError(f"{name}: dtype {dtype} is not one of {', '.join(DTYPES)}")
        self.name, self.dtype, self.shape, self.shard = name, dtype, shape, shard

    @property
    def spec(self) -> Spec:
        return Spec(self.name, self.shape, "float64" if self.dtype == "float64" else "float32")

    @property
    def is_wide(self) -> bool:
        """Whether theta has the parameter's own dtype."""
        return self.dtype in ("float32", "float64")

    def check(self) -> None:
        """UsageError: its memory is not what it was when this was made, and what was made for it does not fit."""
        was, now = self._was, self._form()
        if now == was:
            return
        if now[:3] != was[:3]:
            raise UsageError(f"{self.name}: was {was}, is {now}")
        _check_layout(self.name, now)

    @abstractmethod
    def host(self) -> Array: ...

    @abstractmethod
    def kept(self, values: Array) -> Any:
        """A copy of them as a checkpoint of the parameter's library holds it."""

    @abstractmethod
    def _form(self) -> _Form: ...

    def _begin(self) -> None:
        """The end of every constructor."""
        self._was = self._form()
        _check_layout(self.name, self._was)

    def fetch(self) -> None:  # noqa: B027  nothing to do, unless it is elsewhere
        """Start to bring the live values to ``host()``."""

    def store(self) -> None:  # noqa: B027
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
        self._array = array
        self._begin()

    def host(self) -> Array:
        """Not kept: an array that is resized leaves views of it without memory."""
        return self._array.view(np.uint16) if self.dtype == "bfloat16" else self._array

    def kept(self, values: Array) -> Any:
        return values.copy()

    def _form(self) -> _Form:
        array = self._array
        return _Form(array.dtype, array.shape, None, array.flags.writeable, array.strides)


class _TensorLeaf(Leaf):
    """A tensor, or of a DTensor this rank's shard."""

    def __init__(self, name: str, tensor: Any, shard: Shard | None) -> None:
        self._torch: Any = sys.modules["torch"]
        local = _local(tensor)
        super().__init__(name, str(local.dtype).removeprefix("torch."), tuple(local.shape), shard)
        self._tensor = tensor

    def kept(self, values: Array) -> Any:
        """A tensor: ``torch.load`` refuses NumPy arrays unless it is told to trust the file."""
        return self._torch.from_numpy(values.copy())


class TorchLeaf(_TensorLeaf):
    """In host memory, used where it is. Its storage may move between rounds, as under FSDP."""

    def __init__(self, name: str, tensor: Any, shard: Shard | None = None) -> None:
        super().__init__(name, tensor, shard)
        self._begin()

    def host(self) -> Array:
        return _numpy_of(self._torch, _local(self._tensor))

    def _form(self) -> _Form:
        return _form_of(self._tensor, self.shard, in_place=True)

    def store(self) -> None:
        """A backward pass that needs the old values fails instead of using the new ones."""
        if not self._tensor.is_inference():
            self._torch.autograd.graph.increment_version(_local(self._tensor))


class DeviceLeaf(_TensorLeaf):
    """On an accelerator, staged through a host buffer, pinned for CUDA, where copies run in the background.

    Not run on an accelerator yet: tests have a stand-in.
    """

    def __init__(self, name: str, tensor: Any, shard: Shard | None = None) -> None:
        super().__init__(name, tensor, shard)
        local = _local(tensor)
        self.device = local.device
        self._is_cuda = self.device.type == "cuda"
        self._staging = self._torch.empty(self.shape, dtype=local.dtype, device="cpu", pin_memory=self._is_cuda)
        self._host = _numpy_of(self._torch, self._staging)
        self._begin()

    def host(self) -> Array:
        return self._host

    def _form(self) -> _Form:
        return _form_of(self._tensor, self.shard, in_place=False)

    def fetch(self) -> None:
        self._staging.copy_(_local(self._tensor), non_blocking=self._is_cuda)

    def store(self) -> None:
        _local(self._tensor).copy_(self._staging, non_blocking=self._is_cuda)


def _local(tensor: Any) -> Any:
    """What this rank holds of it, in the memory where it is now: FSDP may move a shard. Autograd does not follow."""
    return tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor.detach()


def _form_of(tensor: Any, shard: Shard | None, *, in_place: bool) -> _Form:
    """in_place: used where it is, so that its strides matter. A whole one is not detached: each step asks."""
    local = tensor if shard is None else _local(tensor)
    return _Form(local.dtype, local.shape, local.device, True, local.stride() if in_place else ())


def _numpy_of(torch: Any, tensor: Any) -> Array:
    array: Array = (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array.view(np.uint16) if tensor.dtype is torch.bfloat16 else array


def _check_layout(name: str, form: _Form) -> None:
    if not form.is_writeable:
        raise UsageError(f"{name}: the array is read-only")
    if 0 not in form.shape and any(step == 0 and n > 1 for n, step in zip(form.shape, form.strides, strict=False)):
        raise UsageError(f"{name}: several of its elements share memory (an expanded array)")


class Params:
    """The user's parameters in the order of their names.

    Args:
        given: a mapping name -> NumPy array or torch tensor, a torch module, or (name, parameter) pairs. Floats:
            float32, float64, float16, bfloat16 (torch, or ``ml_dtypes``). Arrays of any strides, used without copies.
            Tied parameters (one piece of memory under several names) are exchanged once, under the first of the names,
            and have a theta under each of them; of a module under the one of ``named_parameters()``. Frozen ones
            take part as all others: newcomers get them.
            They are written to in place and keep shape and dtype: see ``check``.
            A module's buffers (statistics of BatchNorm) are left alone: docs/optimizers.md, "Who takes part".
            Of a DTensor: this rank's shard. A module under FSDP2 goes back to its shards, here and where they change.
    Raises:
        UsageError: no parameters, no names, a dtype, read-only, memory that parameters share in part, or a DTensor of
            which several ranks hold the same elements.
    """

    def __init__(self, given: Any) -> None:
        self._sharded_modules = _sharded_modules(given)
        self._reshard()  # gathered ones, as a forward pass without a backward pass leaves them, are in no exchange
        named = sorted(_named(given).items())
        self._entries = (given, named) if isinstance(given, dict) else ({}, [])
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
        self.ties = self.aliases | {  # and those that named_parameters() leaves out; fragments go by any of them
            name: self.aliases.get(first, first) for name, first in _left_out(given).items()
        }
        _check_disjoint(leaves)
        self.leaves: tuple[Leaf, ...] = tuple(leaves)
        self._by_name = {leaf.name: leaf for leaf in leaves}

    @property
    def names(self) -> tuple[str, ...]:
        """Without tied ones."""
        return tuple(self._by_name)

    def check(self) -> None:
        """Whether the live parameters are still those that were given; cheap.

        UsageError: one has another shape or dtype now, is elsewhere or read-only; or a dict that was given has another
        array in its place, so that what is trained is not what is exchanged.
        """
        given, entries = self._entries
        for name, value in entries:
            if given.get(name, value) is not value:
                raise UsageError(
                    f"{name}: the dict has another array now than it had; write to that one in place, "
                    f"as in params[{name!r}][...] = values"
                )
        self._checked(self._by_name)

    def vectors(self, names: Iterable[str] | None = None) -> Vectors:
        """Zeros for these parameters (all unless given), in their order here."""
        return Vectors(leaf.spec for leaf in self._chosen(names))

    def read(self, out: Vectors) -> None:
        """The live values of the names that `out` has."""
        chosen = self._checked(out.views)
        self._fetch(chosen)
        for leaf in chosen:
            leaf.read(out.views[leaf.name])

    def write(self, values: Vectors) -> None:
        """Set the live values of the names that `values` has."""
        chosen = self._checked(values.views)
        for leaf in chosen:
            leaf.write(values.views[leaf.name])
            leaf.store()
        self._settle(chosen)
        self._reshard()  # or the next forward pass would use the old values

    def pseudo_gradient(self, theta: Vectors, out: Vectors) -> None:
        """out = theta - live, for the names that `out` has."""
        chosen = self._checked(out.views)
        self._fetch(chosen)
        for leaf in chosen:
            leaf.pseudo_gradient(theta.views[leaf.name], out.views[leaf.name])

    def kept(self, vectors: Vectors) -> dict[str, Any]:
        """Copies for a checkpoint: tensors for parameters that are tensors, NumPy arrays for others."""
        return {name: self._by_name[name].kept(view) for name, view in vectors.views.items()}

    def layout(self) -> str:
        """What must be equal on all members: names, dtypes and shapes."""
        return ";".join(
            f"{leaf.name}:{leaf.dtype}{list(leaf.shape)}"
            + (f" of {list(leaf.shard.shape)} {leaf.shard.placements}" if leaf.shard else "")
            for leaf in self.leaves
        )

    def shards(self) -> str:
        """Which of the shards this rank has, equal on all members too; "" where nothing is sharded."""
        return " ".join(sorted({leaf.shard.place for leaf in self.leaves if leaf.shard}))

    def sizes(self) -> dict[str, int]:
        """Elements of each parameter; all shards of one count, so that ranks that share it cut fragments alike."""
        return {leaf.name: math.prod(leaf.shard.shape if leaf.shard else leaf.shape) for leaf in self.leaves}

    def _chosen(self, names: Iterable[str] | None) -> list[Leaf]:
        return list(self.leaves) if names is None else [self._by_name[name] for name in names]

    def _checked(self, names: Iterable[str]) -> list[Leaf]:
        chosen = self._chosen(names)
        for leaf in chosen:
            leaf.check()
        return chosen

    def _fetch(self, leaves: Sequence[Leaf]) -> None:
        for leaf in leaves:
            leaf.fetch()
        self._settle(leaves)

    def _reshard(self) -> None:
        for module in self._sharded_modules:
            module.reshard()

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


def _left_out(given: Any) -> dict[str, str]:
    """Names of a torch module's tied parameters that ``named_parameters()`` leaves out, and those that it has."""
    if not hasattr(given, "named_parameters"):
        return {}
    first = {id(parameter): name for name, parameter in given.named_parameters()}
    named = [(name, first[id(p)]) for name, p in given.named_parameters(remove_duplicate=False)]
    return {name: known for name, known in named if name != known}


def _leaf(name: str, value: Any) -> tuple[Leaf, Any]:
    """And what is equal for tied parameters; None for one without memory."""
    if isinstance(value, np.ndarray):
        leaf: Leaf = NumpyLeaf(name, value)
        place = (value.__array_interface__["data"][0], value.shape, value.strides, value.dtype.name)
        return leaf, place if value.size else None
    torch: Any = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        raise UsageError(f"{name}: a NumPy array or a torch tensor is needed, not {type(value).__name__}")
    shard = _shard(name, value) if hasattr(value, "to_local") else None
    local = _local(value)
    if local.layout is not torch.strided or local.device.type == "meta":
        raise UsageError(f"{name}: a {local.layout} tensor on {local.device.type} holds no dense array")
    leaf = TorchLeaf(name, value, shard) if local.device.type == "cpu" else DeviceLeaf(name, value, shard)
    place = (local.data_ptr(), tuple(local.shape), tuple(local.stride()), leaf.dtype)
    return leaf, place if local.numel() else None


def _shard(name: str, tensor: Any) -> Shard:
    """Of a DTensor. UsageError: ranks hold the same elements, or parts of a sum.

    Copies of the same elements would take part in exchanges of their own, and differ from each other where one of these
    goes another way than the other: of other members, or rounded in another block of codes.
    """
    mesh, placements = tensor.device_mesh, tuple(tensor.placements)
    at = mesh.get_coordinate()
    if at is None:
        raise UsageError(f"{name}: this rank is not in the mesh of the DTensor")
    names = mesh.mesh_dim_names or [str(dim) for dim in range(len(mesh.shape))]
    for dim, size, placement in zip(names, mesh.shape, placements, strict=True):
        if placement.is_partial() or (size > 1 and not placement.is_shard()):
            raise UsageError(
                f"{name}: a DTensor that is {placement} over the {size} ranks of mesh dimension {dim!r}; of each rank "
                "its shard is exchanged, so that it must be Shard there"
            )
    place = ",".join(f"{dim}={i}/{size}" for dim, i, size in zip(names, at, mesh.shape, strict=True))
    return Shard(tuple(tensor.shape), ",".join(map(str, placements)), place)


def _sharded_modules(given: Any) -> list[Any]:
    """Those of a torch module that FSDP2 manages."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if kind is None or not hasattr(given, "modules") else [m for m in given.modules() if isinstance(m, kind)]


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
