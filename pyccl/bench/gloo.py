"""torch's Gloo for the same work in the same processes, over TCP. Imports torch when it is made."""

from __future__ import annotations

import datetime
import importlib
import ipaddress
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pyccl.bench import wire

INSTALL: Final = "--vs gloo needs torch: pip install torch"
DTYPES: Final = ("float32", "float64", "float16", "bfloat16", "int8", "uint8", "int32", "int64")
_OPS: Final = {"sum": "SUM", "avg": "AVG", "prod": "PRODUCT", "min": "MIN", "max": "MAX"}


@dataclass(frozen=True, slots=True)
class Network:
    """This rank's IPv4 address and the interface that it is on: the only one that Gloo gets."""

    address: str
    interface: str


def load(interface: str) -> Any:
    """Import torch; ahead of anything timed."""
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    return importlib.import_module("torch")


class Gloo:
    """A process group over TCP and the tensor that it reduces, which is the memory of `array`.

    Args:
        rank, world: of this process.
        share: gives every rank the number that rank 0 calls it with; it carries the store's address and port.
        array: what ``run`` reduces in place.
        timeout_s: of an operation.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        share: Callable[[int], int],
        array: np.ndarray[Any, Any],
        op: str,
        network: Network,
        timeout_s: float,
    ) -> None:
        torch = load(network.interface)
        self._dist: Any = torch.distributed
        before = wire.sockets()
        # What init_method="tcp://" makes, on a port that is free.
        timeout = datetime.timedelta(seconds=timeout_s)
        self._store = self._open_store(rank, world, share, network.address, timeout)
        self._dist.init_process_group("gloo", store=self._store, rank=rank, world_size=world, timeout=timeout)
        self._tensor: Any = _tensor(torch, array)
        self._op: Any = getattr(self._dist.ReduceOp, _OPS[op])
        self._divisor: int | None = None
        try:
            self.run()
        except RuntimeError:
            if op != "avg":
                raise
            self._op, self._divisor = self._dist.ReduceOp.SUM, world  # before 2.13 Gloo had no AVG
            self.run()
        self.sockets = wire.sockets() - before

    def _open_store(
        self, rank: int, world: int, share: Callable[[int], int], address: str, timeout: datetime.timedelta
    ) -> Any:
        if rank == 0:
            store = self._dist.TCPStore(address, 0, world, True, timeout=timeout, wait_for_workers=False)
            share(int(ipaddress.IPv4Address(address)))
            share(store.port)
            return store
        of_first = str(ipaddress.IPv4Address(share(0)))
        return self._dist.TCPStore(of_first, share(0), world, False, timeout=timeout)

    def run(self) -> None:
        """One all-reduce."""
        self._dist.all_reduce(self._tensor, op=self._op)
        if self._divisor is not None:
            self._tensor.div_(self._divisor)

    def close(self) -> None:
        self._dist.destroy_process_group()


def _tensor(torch: Any, array: np.ndarray[Any, Any]) -> Any:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
