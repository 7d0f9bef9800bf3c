"""An optimizer of every kind, with rounds of H inner steps, as a test of what they have in common makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from reference import H

import pyccl
from pyccl.optim import AsyncDiLoCo, DiLoCo, LocalSGD, NoLoCo, OuterOptimizer, StreamingDiLoCo

EVERYONE: Final[dict[str, Callable[[pyccl.Communicator, Any], OuterOptimizer]]] = {
    "local": lambda comm, params: LocalSGD(comm, params, H),
    "diloco": lambda comm, params: DiLoCo(comm, params, H),
    "late": lambda comm, params: AsyncDiLoCo(comm, params, H, outer_lr=0.4, outer_momentum=0.5),
    "eager": lambda comm, params: AsyncDiLoCo(comm, params, H, outer_lr=0.4, outer_momentum=0.5, eager=True),
    "streaming": lambda comm, params: StreamingDiLoCo(
        comm, params, 2 * H, fragments=2, delay=1, alpha=0.5, quantize="fp4_e3m0", error_feedback=True
    ),
    "noloco": lambda comm, params: NoLoCo(comm, params, H, seed=1),
}
OWN_THETA: Final = ("eager", "noloco")  # where members' thetas differ by design
