"""Strangers: accepted connections that have not said who they are. So many at a time, so long, so many log lines.

A flood of connections that say nothing must not keep out those who greet at once: when all places are taken, whoever
comes gets the place of the one who has waited longest, if there is a crowd among those from where most come. So a flood
from one host takes places from itself. What is no crowd counts like one who comes alone: in a flood from everywhere
those behind one router would go first.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import trio

from pyccl._proto.budget import Budget
from pyccl._proto.candidates import place

_CROWD_PART: Final = 8  # who come from one origin are one if they have more than this part of the places
_LINES_BURST: Final = 20
_LINE_EVERY_S: Final = 1.0


def origin(stream: trio.SocketStream) -> str:
    """Where it comes from, as far as that can't be chosen freely. OSError: it has ended."""
    return place(str(stream.socket.getpeername()[0]))


class Places:
    """At most `most` tasks wait in ``place`` at a time, each at most `seconds`."""

    def __init__(self, most: int, seconds: float) -> None:
        self._most, self._seconds = most, seconds
        self._taken: dict[trio.CancelScope, str] = {}  # and from where; the oldest first

    @contextmanager
    def place(self, origin: str = "") -> Iterator[None]:
        """What stands in it is given up when its time has run out or its place is needed."""
        if len(self._taken) >= self._most:
            largest, count = Counter(self._taken.values()).most_common(1)[0]
            is_crowd = count > self._most // _CROWD_PART
            oldest = next(scope for scope, at in self._taken.items() if at == largest or not is_crowd)
            del self._taken[oldest]
            oldest.cancel()
        scope = trio.CancelScope(deadline=trio.current_time() + self._seconds)
        self._taken[scope] = origin
        try:
            with scope:
                yield
        finally:
            self._taken.pop(scope, None)


class Notes:
    """A line for each stranger that was turned away; of a flood only some, with the number of those left out."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._budget = Budget(_LINES_BURST, _LINE_EVERY_S)
        self._left_out = 0

    def tell(self, event: str, cause: object) -> None:
        if not self._budget.take(trio.current_time()):
            self._left_out += 1
            return
        more, self._left_out = self._left_out, 0
        self._log.info("%s cause=%s%s", event, cause, f" left_out={more}" if more else "")
