"""Calls that all members make together, for tests whose members share a process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

HANG_S = 120.0


def both(*calls: Callable[[], Any]) -> list[Any]:
    """At once: what is collective."""
    results: list[Any] = [None] * len(calls)

    def work(at: int) -> None:
        try:
            results[at] = calls[at]()
        except BaseException as e:  # noqa: BLE001  it is raised below
            results[at] = e

    threads = [threading.Thread(target=work, args=(at,), daemon=True) for at in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
        assert not thread.is_alive()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
