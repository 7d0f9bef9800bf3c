"""zstd for chunks of state: what a holder packs, and what a fetcher takes from others.

A holder packs what it is asked to in one thread of its own, while the engine sends; zstd lets go of the GIL.
Threads: ``Packer.ask`` may be called from any; it never blocks.                       Spec: proto/wire.md 3, State
"""

from __future__ import annotations

import bisect
import itertools
import logging
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import zstandard

from pyccl._native.handles import Engine

LEVEL: Final = 1  # twice as fast as 3, and next to as short for numbers
_QUEUE_MAX: Final = 1024
_WINDOW_MAX: Final = 1 << 20
_TICK_S: Final = 1e-6

log = logging.getLogger("pyccl.statesync")

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def pack(data: Bytes) -> bytes:
    """A zstd frame that states its content size."""
    return zstandard.ZstdCompressor(level=LEVEL).compress(data.data)


def unpack_untrusted(packed: Bytes, size_bytes: int) -> Bytes | None:
    """The bytes, if it is a frame of exactly so many; never more memory than these."""
    frame = packed.tobytes()
    try:
        told = zstandard.get_frame_parameters(frame)
        if told.content_size != size_bytes or told.window_size > _WINDOW_MAX or told.dict_id != 0:
            return None
        found = zstandard.ZstdDecompressor(max_window_size=_WINDOW_MAX).decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError:
        return None
    return np.frombuffer(found, np.uint8) if len(found) == size_bytes else None


def sample(data: Bytes) -> tuple[int, float, float]:
    """(packed bytes, seconds to pack, seconds to unpack), of CPU time: what others take meanwhile is chance."""
    started = time.thread_time()
    packed = pack(data)
    between = time.thread_time()
    unpack_untrusted(np.frombuffer(packed, np.uint8), data.nbytes)
    return len(packed), max(between - started, _TICK_S), max(time.thread_time() - between, _TICK_S)


class Packer:
    """Packs parts of one publication for those who ask. `close` before the memory is anybody else's."""

    def __init__(self, engine: Engine, sync: int, arrays: Sequence[Bytes]) -> None:
        self._engine, self._sync, self._arrays = engine, sync, arrays
        self._ends = list(itertools.accumulate(array.nbytes for array in arrays))
        self._lock = threading.Lock()  # of the next two
        self._closed = False
        self._thread: threading.Thread | None = None
        self._asked: queue.SimpleQueue[tuple[int, int, int] | None] = queue.SimpleQueue()

    def ask(self, slot: int, offset: int, size_bytes: int) -> None:
        """It is answered later; at once, to be sent as it is, if too many wait."""
        with self._lock:
            if not self._closed and self._asked.qsize() < _QUEUE_MAX:
                if self._thread is None:
                    self._start()
                if self._thread is not None:
                    self._asked.put((slot, offset, size_bytes))
                    return
        self._engine.packed(slot, self._sync, offset, size_bytes, b"")

    def close(self) -> None:
        """Nothing is read from the arrays any more; what waits is answered: to be sent as it is."""
        with self._lock:
            self._closed = True
        if self._thread is not None:
            self._asked.put(None)
            self._thread.join()

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name="pyccl-packer", daemon=True)
        try:
            thread.start()
        except RuntimeError as e:  # the process may have no more of them
            log.warning("packer_not_started cause=%s: state is sent as it is", e)
            self._closed = True
        else:
            self._thread = thread

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            slot, offset, size_bytes = asked
            packed = b"" if self._closed else self._packed(offset, size_bytes)
            self._engine.packed(slot, self._sync, offset, size_bytes, packed if len(packed) < size_bytes else b"")

    def _packed(self, offset: int, size_bytes: int) -> bytes:
        data = self._part(offset, size_bytes)
        try:
            return b"" if data is None else pack(data)
        except (MemoryError, zstandard.ZstdError) as e:
            log.warning("packing_failed cause=%r: sent as it is", e)
            return b""

    def _part(self, offset: int, size_bytes: int) -> Bytes | None:
        """Those bytes, if they lie in one array."""
        at = bisect.bisect_right(self._ends, offset)
        if at == len(self._ends) or offset + size_bytes > self._ends[at]:
            return None
        start = offset - (self._ends[at] - self._arrays[at].nbytes)
        return self._arrays[at][start : start + size_bytes]
