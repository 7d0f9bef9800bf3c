"""How fast one connection between who asks a master and the master goes, each way. Both sides.

    Sample(upwards)  ->  Sampled(0), then bytes without meaning: 4 MiB, or what goes in 2 s
    upwards          each 16 KiB that the master has read is answered: Sampled(so many); who asks reads the clock

It is no way to keep a master or its line busy: one at a time, at most 3 s of half a minute, no faster than a fixed
rate, in chunks between which everybody else has their turn. Spec: proto/wire.md 12.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import trio

from pyccl._io import envelope, tls
from pyccl._io.causes import reason_of
from pyccl._io.tls import Credentials, Line, forget
from pyccl._proto import limits
from pyccl._proto.budget import Budget
from pyccl._proto.messages import Rejected, Sample, Sampled
from pyccl.errors import MasterUnavailableError, RejectedError, RemoteProtocolError

_FILLER: Final = os.urandom(limits.SAMPLE_CHUNK_BYTES)  # nothing on the way makes it shorter
_LATE_S: Final = 0.01  # of lateness that is made up for
_ENDED: Final = "it ended in the middle"
# What a connection may end with.
_ENDS: Final = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)

Marks = list[tuple[float, int]]  # seconds since the beginning, and how many bytes had arrived then


def rate(marks: Sequence[tuple[float, int]], over_s: float) -> float:
    """Bytes per second of the later half, since a connection begins slowly. over_s: when it was over."""
    if not marks:
        return 0.0
    _, size = marks[-1]
    half_s, half = next((at_s, so_far) for at_s, so_far in marks if 2 * so_far >= size)
    if half < size and half_s < over_s:
        return (size - half) / (over_s - half_s)
    return size / over_s if over_s > 0 else 0.0


# ---- the master


class Sampler:
    """Of a master."""

    def __init__(self) -> None:
        self._budget = Budget(limits.SAMPLES_BURST, limits.SAMPLE_EVERY_S)
        self._turn = trio.Lock()

    async def serve(self, line: Line, sample: Sample) -> None:
        """To the end of the connection."""
        reason = await self._refusal(sample)
        if reason:
            await line.send_all(envelope.pack(Rejected(reason)))
            return
        try:
            # Who asks hangs up when it has heard enough: that is no news.
            with contextlib.suppress(*_ENDS), trio.move_on_after(limits.SAMPLE_HELD_S):
                await line.send_all(envelope.pack(Sampled(0)))
                await (_take(line) if sample.upwards else _give(line))
                await line.receive_some(1)  # until who asks has heard it all
        finally:
            forget(line)  # or the kernel would go on sending what waits
            self._turn.release()

    async def _refusal(self, sample: Sample) -> str:
        """Why it is not taken; "": it is, and it is its turn."""
        if sample.version != limits.PROTOCOL_VERSION:
            return f"protocol version {sample.version}; this master speaks {limits.PROTOCOL_VERSION}"
        if self._turn.statistics().tasks_waiting < limits.SAMPLES_WAITING_MAX:
            with trio.move_on_after(limits.SAMPLE_HELD_S):
                await self._turn.acquire()
        if self._turn.statistics().owner is not trio.lowlevel.current_task():
            return "others are being measured: ask again"
        now_s = trio.current_time()
        if self._budget.take(now_s):
            return ""
        self._turn.release()
        return f"it was measured often: ask again in {math.ceil(self._budget.wait_s(now_s))} s"


async def _take(line: Line) -> None:
    pace, received, told = _Pace(), 0, 0
    while received < limits.SAMPLE_BYTES:
        part = await line.receive_some(min(limits.SAMPLE_CHUNK_BYTES, limits.SAMPLE_BYTES - received))
        if not part:
            return
        received += len(part)
        if received - told >= limits.SAMPLE_CHUNK_BYTES or received == limits.SAMPLE_BYTES:
            await line.send_all(envelope.pack(Sampled(received)))
            told = received
        await pace.after(len(part))


async def _give(line: Line) -> None:
    pace = _Pace()
    for _ in range(limits.SAMPLE_BYTES // limits.SAMPLE_CHUNK_BYTES):
        await line.send_all(_FILLER)
        await pace.after(limits.SAMPLE_CHUNK_BYTES)


class _Pace:
    def __init__(self) -> None:
        self._due_s = trio.current_time()

    async def after(self, size_bytes: int) -> None:
        """Until so many more may go. Others have their turn in any case."""
        now_s = trio.current_time()
        self._due_s = max(self._due_s, now_s - _LATE_S) + size_bytes / limits.SAMPLE_BYTES_PER_S
        await trio.sleep_until(self._due_s)


# ---- who asks


@dataclass(frozen=True, slots=True)
class Rate:
    """Of one connection, one way. size_bytes: that arrived."""

    bytes_per_s: float
    size_bytes: int


async def measure(host: str, port: int, credentials: Credentials | None, *, upwards: bool) -> Rate:
    """Within limits.SAMPLE_S from when the master begins.

    MasterUnavailableError: none answers. RejectedError: it refuses, perhaps for now. RemoteProtocolError: it is none.
    """
    try:
        line = await tls.reach(host, port, credentials)
        try:
            await line.send_all(envelope.pack(Sample(limits.PROTOCOL_VERSION, upwards)))
            await _begun(line)
            marks: Marks = []
            started_s = trio.current_time()
            with trio.move_on_after(limits.SAMPLE_S) as scope:
                await (_send(line, marks, started_s) if upwards else _receive(line, marks, started_s))
            over_s = limits.SAMPLE_S if scope.cancelled_caught else trio.current_time() - started_s
        finally:
            forget(line)
    except _ENDS as e:
        raise MasterUnavailableError(f"no master answers at {host}:{port}: {reason_of(e)}") from e
    return Rate(rate(marks, over_s), marks[-1][1] if marks else 0)


async def _begun(line: Line) -> None:
    answer = await envelope.receive(line, limits.BODY_GREETING_MAX_BYTES)
    if isinstance(answer, Rejected):
        raise RejectedError(answer.reason)
    if answer != Sampled(0):
        raise RemoteProtocolError(f"no Sampled, but {type(answer).__name__}")


async def _receive(line: Line, marks: Marks, started_s: float) -> None:
    received = 0
    while received < limits.SAMPLE_BYTES:
        part = await line.receive_some(limits.SAMPLE_CHUNK_BYTES)
        if not part:
            raise RemoteProtocolError(_ENDED)
        received += len(part)
        marks.append((trio.current_time() - started_s, received))


async def _send(line: Line, marks: Marks, started_s: float) -> None:
    """As much as goes, while the master tells how much has come."""
    failed: Exception | None = None

    async def fill() -> None:
        try:
            for _ in range(limits.SAMPLE_BYTES // limits.SAMPLE_CHUNK_BYTES):
                await line.send_all(_FILLER)
        except _ENDS:
            pass  # who reads notices, too

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fill)
        try:
            while not marks or marks[-1][1] < limits.SAMPLE_BYTES:
                answer = await envelope.receive(line, limits.BODY_GREETING_MAX_BYTES)
                if answer is None:
                    raise RemoteProtocolError(_ENDED)
                if not isinstance(answer, Sampled) or answer.size_bytes <= (marks[-1][1] if marks else 0):
                    raise RemoteProtocolError("no Sampled that goes on")
                marks.append((trio.current_time() - started_s, answer.size_bytes))
        except (*_ENDS, RemoteProtocolError) as e:  # raised outside: a nursery wraps what leaves it
            failed = e
        nursery.cancel_scope.cancel()
    if failed is not None:
        raise failed
