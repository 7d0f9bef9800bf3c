"""Update rules of the outer optimizers: arrays in, arrays out; no communication, no state of their own.

All work in place, element by element, in the dtype of theta (float32, or float64 for float64 parameters), and nothing
contracts a product and a sum: the same input gives the same bits on every machine. They are kernels of the core
(native/src/outer.c): one pass over memory, in IEEE mode even in a thread that flushes denormals. What a newcomer alone
computes, once, is NumPy in blocks that stay in a core's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from pyccl._native._pyccl import ffi, lib
from pyccl._native.status import check
from pyccl.arrays import DTYPES
from pyccl.errors import UsageError

Array = np.ndarray[Any, Any]

BLOCK: Final = 1 << 15  # elements: four float32 arrays of it fit into a core's L2 cache


def outer_sgd(theta: Array, momentum: Array | None, g: Array, *, lr: float, mu: float, nesterov: bool) -> None:
    """One step of SGD as torch.optim.SGD makes it (dampening 0, no weight decay); g points uphill and is subtracted.

        b <- mu*b + g;  d = g + mu*b if nesterov, else b;  theta <- theta - lr*d

    Args:
        theta, momentum, g: (n,) contiguous, of one floating dtype; theta and momentum are changed, g is not. momentum
            is zero before the first step, which makes it g; None where mu is 0: d = g then.
    """
    check_vectors("outer_sgd", [theta] if momentum is None else [theta, momentum], g)
    b = ffi.NULL if momentum is None else pinned(momentum)
    dtype = DTYPES[theta.dtype.name]
    check(lib.pyccl_outer_sgd(dtype, pinned(theta), b, pinned(g), theta.size, lr, mu, nesterov), "outer_sgd")


def difference(a: Array, b: Array, out: Array) -> None:
    """out = a - b. Any shape and strides, equal shapes; one pass where all are contiguous float32."""
    if not a.shape == b.shape == out.shape:
        raise UsageError(f"difference: arrays of the shapes {a.shape}, {b.shape} and {out.shape}")
    if not out.flags.writeable:
        raise UsageError("difference: the array that is to be changed is read-only")
    if all(x.dtype == np.float32 and x.flags.c_contiguous and x.flags.aligned for x in (a, b, out)):
        x, y, z = (ffi.from_buffer("float[]", array.reshape(-1)) for array in (a, b, out))
        lib.pyccl_difference(x, y, out.size, z)
    else:
        np.subtract(a, b, out=out)


def eager(late: Array, g: Array, g_before: Array, world: int) -> None:
    """The own share fresh, those of the others one round old: late += (g - g_before) / world.

    Args:
        late: (n,) the mean of the round before, over `world` replicas, this one's `g_before` among them; changed.
        g: (n,) this replica's pseudo-gradient of this round. All contiguous, of one floating dtype.
    """
    check_vectors("eager", [late], g, g_before)
    pins = map(pinned, (late, g, g_before))
    check(lib.pyccl_eager(DTYPES[late.dtype.name], *pins, late.size, world), "eager")


def eager_joining(late: Array, g: Array, world: int, out: Array) -> None:
    """``eager`` of a replica that has no share in `late`: out = (world * late + g) / (world + 1)."""
    kind = late.dtype.type
    for at in range(0, late.size, BLOCK):
        part = slice(at, at + BLOCK)
        total = late[part] * kind(world)
        np.add(total, g[part], out=total)
        np.divide(total, kind(world + 1), out=out[part])


def mix(live: Array, theta: Array, alpha: float) -> None:
    """live <- alpha live + (1 - alpha) theta, in place; with alpha 0 theta's bits. (n,) each, of one floating dtype."""
    check_vectors("mix", [live], theta)
    check(lib.pyccl_mix(DTYPES[live.dtype.name], pinned(live), pinned(theta), live.size, alpha), "mix")


def pinned(array: Array) -> Any:
    """Its memory for a call of the core, as long as what this returns lives."""
    return ffi.from_buffer("uint8_t[]", array.view(np.uint8))


def check_vectors(what: str, changed: Sequence[Array], *others: Array) -> None:
    """The core is told one dtype and one size for all of them, and believes it."""
    first = changed[0]
    for array in (*changed, *others):
        if (array.dtype, array.size) != (first.dtype, first.size):
            told = f"{first.dtype}[{first.size}] and {array.dtype}[{array.size}]"
            raise UsageError(f"{what}: arrays of one dtype and size are needed, not {told}")
        if not array.flags.c_contiguous or not array.flags.aligned:
            raise UsageError(f"{what}: contiguous arrays are needed")
    if not all(array.flags.writeable for array in changed):
        raise UsageError(f"{what}: an array that is to be changed is read-only")
