"""A line that delays, loses and slows down: ``python -m pyccl.stress.bend IF IF DELAY_S LOSS BITS_PER_S SEED``.

Carries frames between two interfaces, the only way from one to the other, where the kernel has no netem. Frames keep
their segmentation headers (PACKET_VNET_HDR), so one may hold 64 KiB of a connection. Ends when stdin does.
"""

from __future__ import annotations

import collections
import contextlib
import random
import select
import socket
import sys
import time
from typing import Final

from pyccl.processes import leash
from pyccl.stress.network import Bend

QUEUE_S: Final = 0.1  # of a slow line; what comes when it is full is lost
QUEUE_MIN_BYTES: Final = 1 << 18  # a few of the largest frames always fit
FRAME_MAX_BYTES: Final = (1 << 16) + 64
BUFFER_BYTES: Final = 1 << 23
_SOL_PACKET: Final = 263
_PACKET_VNET_HDR: Final = 15
_PACKET_IGNORE_OUTGOING: Final = 23
_ETH_P_ALL: Final = 3
_SO_RCVBUFFORCE: Final = 33


class Direction:
    """Frames one way, in order: pure, time is an argument."""

    def __init__(self, bend: Bend, rng: random.Random) -> None:
        self._bend, self._rng = bend, rng
        self._free_s = 0.0  # when the line has sent what it took so far
        self._queue: collections.deque[tuple[float, bytes]] = collections.deque()

    def take(self, frame: bytes, now_s: float) -> None:
        bend = self._bend
        if self._rng.random() < bend.loss:
            return
        start_s = max(now_s, self._free_s)
        if bend.bits_per_s:
            if start_s - now_s > max(QUEUE_S, QUEUE_MIN_BYTES * 8 / bend.bits_per_s):
                return
            start_s += len(frame) * 8 / bend.bits_per_s
        self._free_s = start_s
        self._queue.append((start_s + bend.delay_s, frame))

    def next_s(self) -> float | None:
        return self._queue[0][0] if self._queue else None

    def due(self, now_s: float) -> list[bytes]:
        frames = []
        while self._queue and self._queue[0][0] <= now_s:
            frames.append(self._queue.popleft()[1])
        return frames


def open_interface(name: str) -> socket.socket:
    """Takes every frame that comes in there, and sends frames out."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    sock.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    sock.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, BUFFER_BYTES)
    sock.bind((name, _ETH_P_ALL))
    sock.setblocking(False)
    return sock


def carry(a: socket.socket, b: socket.socket, bend: Bend, rng: random.Random) -> None:
    """For ever."""
    ways = {a: (b, Direction(bend, rng)), b: (a, Direction(bend, rng))}
    while True:
        now_s = time.monotonic()
        waits = [next_s - now_s for _, way in ways.values() if (next_s := way.next_s()) is not None]
        readable, _, _ = select.select([a, b], [], [], max(0.0, min(waits)) if waits else None)
        now_s = time.monotonic()
        for sock in readable:
            ways[sock][1].take(sock.recv(FRAME_MAX_BYTES), now_s)
        for out, way in ways.values():
            for frame in way.due(now_s):
                _send(out, frame)


def _send(out: socket.socket, frame: bytes) -> None:
    with contextlib.suppress(OSError):  # the interface is full or down: what a line does with a frame then
        out.send(frame)


def main() -> None:
    """Run one line."""
    leash.hold()
    interfaces = [open_interface(name) for name in sys.argv[1:3]]
    delay_s, loss, bits_per_s = (float(text) for text in sys.argv[3:6])
    print("ready", flush=True)
    carry(interfaces[0], interfaces[1], Bend(delay_s, loss, bits_per_s), random.Random(int(sys.argv[6])))


if __name__ == "__main__":
    main()
