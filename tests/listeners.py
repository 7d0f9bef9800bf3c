"""Listening as peers do, for tests without a session."""

from __future__ import annotations

import trio

from pyccl._io.front import bind_listener
from pyccl._proto.epoch import Address

SEEN = "127.0.0.1"  # where a master on this machine sees all


async def listen(host: str) -> tuple[trio.SocketListener, Address]:
    """On a free port."""
    listener = trio.SocketListener(await bind_listener(host, 0))
    return listener, Address(host, int(listener.socket.getsockname()[1]))
