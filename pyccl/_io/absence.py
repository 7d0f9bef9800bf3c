"""What a process logs of a master that it does not reach: each cause once, however often it tries."""

from __future__ import annotations

import logging
from typing import Final

_CAUSES_MAX: Final = 8  # of one absence: some are text from outside


class Absence:
    """From the first failure to ``over``."""

    def __init__(self, log: logging.Logger, address: str) -> None:
        self._log, self._address = log, address
        self._told: set[str] = set()
        self.cause = "no answer"  # the last

    def note(self, cause: object) -> None:
        self.cause = text = str(cause)
        if text not in self._told and len(self._told) < _CAUSES_MAX:
            self._told.add(text)
            self._log.warning("master_away address=%s cause=%r next=try_again", self._address, text)

    def over(self) -> None:
        """It has answered."""
        if self._told:
            self._told.clear()
            self._log.info("master_back address=%s", self._address)
