"""How long to wait before the next attempt to reach the master."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

FIRST_S: Final = 0.05
MOST_S: Final = 1.0  # so that all are back within 2 s of a master that was restarted
TIMEOUT_SHARE: Final = 0.25  # of peer_timeout; with the jitter a pause is at most 0.375 of it


class Backoff:
    """Doubles from pause to pause, with jitter, until a connection has lived.

    Args:
        uniform: a random number of 0..1.
    """

    def __init__(self, uniform: Callable[[], float]) -> None:
        self._uniform = uniform
        self._pause_s, self._most_s = FIRST_S, MOST_S

    def bound(self, peer_timeout: float) -> None:
        """A peer whose line breaks again and again must be heard within the time-out, or it is taken for silent."""
        self._most_s = min(MOST_S, peer_timeout * TIMEOUT_SHARE)
        self._pause_s = min(self._pause_s, self._most_s)

    def connected_for(self, seconds: float) -> None:
        """An attempt succeeded; the connection has ended by now."""
        if seconds > self._most_s:
            self._pause_s = min(FIRST_S, self._most_s)

    def next_pause(self) -> float:
        pause_s = self._pause_s * (0.5 + self._uniform())
        self._pause_s = min(self._pause_s * 2, self._most_s)
        return pause_s
