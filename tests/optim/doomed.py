"""A peer that kills itself while its exchange is on the line: ``python doomed.py ADDRESS GROUP OPTIMIZER STEPS``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Final

import numpy as np

import pyccl
from pyccl.optim import AsyncDiLoCo, NoLoCo, OuterOptimizer, StreamingDiLoCo

LARGE: Final = 2_000_000  # elements, so that it is found half sent
MAKE: Final[dict[str, Callable[[pyccl.Communicator, Any], OuterOptimizer]]] = {
    "streaming": lambda comm, params: StreamingDiLoCo(comm, params, 4, fragments=2, delay=1, alpha=0.5),
    "streaming-fp4": lambda comm, params: StreamingDiLoCo(
        comm, params, 4, fragments=2, delay=1, quantize="fp4_e3m0", error_feedback=True
    ),
    "late-uint8": lambda comm, params: AsyncDiLoCo(comm, params, 2, quantize="uint8", error_feedback=True),
    "eager": lambda comm, params: AsyncDiLoCo(comm, params, 2, outer_lr=0.4, outer_momentum=0.5, eager=True),
    "noloco": lambda comm, params: NoLoCo(comm, params, 2),
    "noloco-3": lambda comm, params: NoLoCo(comm, params, 2, group_size=3),
}


def made(optimizer: str, comm: pyccl.Communicator) -> tuple[Any, dict[str, np.ndarray[Any, Any]]]:
    """As on all members."""
    params = {"a": np.zeros(LARGE, np.float32), "b": np.ones(LARGE, np.float32)}
    return MAKE[optimizer](comm, params), params


def train(opt: Any, params: dict[str, np.ndarray[Any, Any]], rank: int, steps: int) -> None:
    for _ in range(steps):
        for name in params:
            params[name] += np.float32(0.01 * (rank + 1))
        opt.step()


def main() -> None:
    address, group, optimizer, steps = sys.argv[1:]
    with pyccl.connect(address, group=int(group)) as comm:
        opt, params = made(optimizer, comm)
        train(opt, params, 5, int(steps))
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
