"""C statuses become exceptions here and nowhere else."""

from __future__ import annotations

import errno
import os
from typing import Final

from pyccl import errors
from pyccl._native._pyccl import ffi, lib

OK: Final[int] = lib.PYCCL_OK
PENDING: Final[int] = lib.PYCCL_PENDING
CLOSED: Final[int] = lib.PYCCL_ERR_CLOSED
EVICTED: Final[int] = lib.PYCCL_ERR_EVICTED
PEER_LOST: Final[int] = lib.PYCCL_ERR_PEER_LOST
MASTER_AWAY: Final[int] = lib.PYCCL_ERR_MASTER_AWAY
CANCELLED: Final[int] = lib.PYCCL_ERR_CANCELLED
ARGUMENT: Final[int] = lib.PYCCL_ERR_ARGUMENT

_TEXTS: Final[dict[int, tuple[type[errors.PycclError], str]]] = {
    lib.PYCCL_ERR_ARGUMENT: (errors.UsageError, "the engine does not take these arguments"),
    lib.PYCCL_ERR_LIMIT: (errors.UsageError, "too many different tags are in use"),
    lib.PYCCL_ERR_CLOSED: (errors.UsageError, "the communicator is closed or not connected"),
    lib.PYCCL_ERR_PEER_LOST: (errors.PeerLostError, "a participant was lost"),
    lib.PYCCL_ERR_ALONE: (errors.AloneError, "nobody else is left in the group"),
    lib.PYCCL_ERR_EVICTED: (errors.EvictedError, "this peer was taken out of the run"),
    lib.PYCCL_ERR_DEADLINE: (errors.DeadlineError, "the operation's time ran out"),
    lib.PYCCL_ERR_STALLED: (errors.DeadlineError, "the operation started and then made no progress"),
    lib.PYCCL_ERR_CANCELLED: (errors.PeerLostError, "the operation was given up"),
    lib.PYCCL_ERR_OUTCOME_UNKNOWN: (
        errors.OutcomeUnknownError,
        "the result was complete here, but whether the others committed it can't be learned",
    ),
    lib.PYCCL_ERR_MASTER_AWAY: (errors.MasterUnavailableError, "a peer is lost, and no master that may settle it"),
    lib.PYCCL_ERR_MISMATCH: (errors.MismatchError, "the members called different operations"),
    lib.PYCCL_ERR_RESULT_DIFFERS: (errors.MismatchError, "the members hold different result bits"),
    lib.PYCCL_ERR_POISON: (errors.PoisonError, "the guard refuses what a member contributed"),
    lib.PYCCL_ERR_FRAME: (errors.RemoteProtocolError, "a peer broke the protocol"),
}


def error_of(status: int, what: str, peer: str | None = None, detail: str = "") -> BaseException:
    """The exception for a negative status. `peer`: 32 hex characters of the culprit, where one is known."""
    if status == lib.PYCCL_ERR_NOMEM:
        return MemoryError(f"{what}: out of memory")
    if status == lib.PYCCL_ERR_OS:
        return OSError(ffi.errno or errno.EIO, f"{what}: {os.strerror(ffi.errno or errno.EIO)}")
    if status == lib.PYCCL_ERR_POISON and peer is None:
        detail = detail or "nobody is to be named; finite contributions may add up to infinity"
    kind, text = _TEXTS.get(status, (errors.PycclError, f"unknown status {status}"))
    message = f"{what}: {text}" + (f" (peer {peer[:8]})" if peer else "") + (f": {detail}" if detail else "")
    if kind is errors.PeerLostError:
        return errors.PeerLostError(message, peer=peer)
    if kind is errors.PoisonError:
        return errors.PoisonError(message, peer=peer)
    if kind is errors.MismatchError:
        fields = ("result",) if status == lib.PYCCL_ERR_RESULT_DIFFERS else ()
        return errors.MismatchError(message, peers=(peer,) if peer else (), fields=fields)
    return kind(message)


def check(status: int, what: str) -> None:
    if status < 0:
        raise error_of(status, what)
