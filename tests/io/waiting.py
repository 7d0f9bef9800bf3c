"""For what happens in another thread, or on a socket, and tells nobody."""

from __future__ import annotations

from collections.abc import Callable

import trio

HANG_S = 60.0


async def until(true: Callable[[], object], seconds: float = HANG_S) -> None:
    with trio.fail_after(seconds):
        while not true():  # noqa: ASYNC110
            await trio.sleep(0.005)
