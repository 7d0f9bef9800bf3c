"""Update rules of the outer optimizers: arrays in, arrays out; no communication, no state of their own.

All work in place, element by element, in the dtype of theta (float32, or float64 for float64 parameters), with NumPy's
own loops and nothing that contracts a product and a sum: the same input gives the same bits on every machine. Arrays
are walked in blocks that stay in a core's cache, so that an outer step reads and writes memory once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

Array = np.ndarray[Any, Any]

BLOCK: Final = 1 << 15  # elements: four float32 arrays of it fit into a core's L2 cache


def outer_sgd(theta: Array, momentum: Array | None, g: Array, *, lr: float, mu: float, nesterov: bool) -> None:
    """One step of SGD as torch.optim.SGD makes it (dampening 0, no weight decay); g points uphill and is subtracted.

        b <- mu*b + g;  d = g + mu*b if nesterov, else b;  theta <- theta - lr*d

    Args:
        theta, momentum, g: (n,) contiguous, of one floating dtype; theta and momentum are changed, g is not. momentum
            is zero before the first step, which makes it g; None where mu is 0: d = g then.
    """
    kind = theta.dtype.type
    rate, keep = kind(lr), kind(mu)
    scratch = np.empty(min(BLOCK, theta.size), theta.dtype)
    for at in range(0, theta.size, BLOCK):
        t, u = theta[at : at + BLOCK], g[at : at + BLOCK]
        d = scratch[: t.size]
        if momentum is None:
            np.multiply(u, rate, out=d)
        else:
            b = momentum[at : at + BLOCK]
            np.multiply(b, keep, out=b)
            np.add(b, u, out=b)
            if nesterov:
                np.multiply(b, keep, out=d)
                np.add(u, d, out=d)
                np.multiply(d, rate, out=d)
            else:
                np.multiply(b, rate, out=d)
        np.subtract(t, d, out=t)


def average(shares: Sequence[Array], out: Array) -> None:
    """The mean: shares added in the order given, the sum divided once.

    Args:
        shares: at least one, each (n,) of the dtype of `out`.
        out: (n,), no share.
    """
    count = out.dtype.type(len(shares))
    for at in range(0, out.size, BLOCK):
        total = out[at : at + BLOCK]
        np.copyto(total, shares[0][at : at + BLOCK])
        for share in shares[1:]:
            np.add(total, share[at : at + BLOCK], out=total)
        np.divide(total, count, out=total)


def eager(late: Array, g: Array, g_before: Array, world: int, out: Array) -> None:
    """The own share fresh, those of the others one round old: out = late + (g - g_before) / world.

    Args:
        late: (n,) the mean of the round before, over `world` replicas, this one's `g_before` among them.
        g: (n,) this replica's pseudo-gradient of this round.
        out: (n,), may be `late`.
    """
    count = late.dtype.type(world)
    scratch = np.empty(min(BLOCK, late.size), late.dtype)
    for at in range(0, late.size, BLOCK):
        part = slice(at, at + BLOCK)
        d = scratch[: late[part].size]
        np.subtract(g[part], g_before[part], out=d)
        np.divide(d, count, out=d)
        np.add(late[part], d, out=out[part])


def eager_joining(late: Array, g: Array, world: int, out: Array) -> None:
    """``eager`` of a replica that has no share in `late`: out = (world * late + g) / (world + 1)."""
    kind = late.dtype.type
    for at in range(0, late.size, BLOCK):
        part = slice(at, at + BLOCK)
        total = late[part] * kind(world)
        np.add(total, g[part], out=total)
        np.divide(total, kind(world + 1), out=out[part])
