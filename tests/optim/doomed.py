"""A peer that kills itself while its exchange is on the line: ``python doomed.py ADDRESS GROUP OPTIMIZER STEPS``."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, Final

import numpy as np

import pyccl
from pyccl.optim import NoLoCo, StreamingDiLoCo

LARGE: Final = 2_000_000  # elements, so that it is found half sent


def made(optimizer: str, comm: pyccl.Communicator) -> tuple[Any, dict[str, np.ndarray[Any, Any]]]:
    """As on all members."""
    params = {"a": np.zeros(LARGE, np.float32), "b": np.ones(LARGE, np.float32)}
    if optimizer == "streaming":
        return StreamingDiLoCo(comm, params, 4, fragments=2, delay=1, alpha=0.5), params
    return NoLoCo(comm, params, 2), params


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
