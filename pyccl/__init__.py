"""Fault-tolerant peer-to-peer collectives for training over the internet. Start with ``connect``."""

from importlib.metadata import version as _version

from pyccl import aio, optim
from pyccl._io.statesync import SyncInfo
from pyccl.calls import ReduceOp
from pyccl.communicator import Communicator, connect
from pyccl.core import ReduceInfo, Work
from pyccl.errors import (
    AloneError,
    DeadlineError,
    EvictedError,
    MasterUnavailableError,
    MismatchError,
    OutcomeUnknownError,
    PeerLostError,
    PoisonError,
    PycclError,
    RejectedError,
    RemoteProtocolError,
    StagingError,
    StateFileError,
    UsageError,
)
from pyccl.guards import Guard
from pyccl.reference import reference_all_reduce, reference_reduce_scatter
from pyccl.state import SharedState

__version__ = _version("pyccl-p2p")
__all__ = [
    "AloneError",
    "Communicator",
    "DeadlineError",
    "EvictedError",
    "Guard",
    "MasterUnavailableError",
    "MismatchError",
    "OutcomeUnknownError",
    "PeerLostError",
    "PoisonError",
    "PycclError",
    "ReduceInfo",
    "ReduceOp",
    "RejectedError",
    "RemoteProtocolError",
    "SharedState",
    "StagingError",
    "StateFileError",
    "SyncInfo",
    "UsageError",
    "Work",
    "aio",
    "connect",
    "optim",
    "reference_all_reduce",
    "reference_reduce_scatter",
]
