"""The child's side of the pipes: commands come in on stdin, reports go out on stdout, one JSON object a line.

A child ends with its owner, whatever ends the owner: the end of stdin ends it, and the kernel kills it when its parent
dies, which also reaches a child that is stopped (SIGSTOP) and could not notice the end of its stdin.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
from typing import Final

from pyccl.processes.leash import OWNER_GONE

_PR_SET_PDEATHSIG: Final = 1


class Control:
    """Make one per child, first thing."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._changed = threading.Condition()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        threading.Thread(target=self._listen, daemon=True, name="control").start()

    def _listen(self) -> None:
        for line in sys.stdin:
            with self._changed:
                self._told.add(line.strip())
                self._changed.notify_all()
        os._exit(OWNER_GONE)

    def told(self, word: str) -> bool:
        """Whether the owner has said `word`."""
        return word in self._told

    def wait(self, word: str) -> None:
        """Return when the owner has said `word`; it ends this process if it never does."""
        with self._changed:
            self._changed.wait_for(lambda: word in self._told)

    def say(self, event: str, **fields: object) -> None:
        """Report to the owner."""
        sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
        sys.stdout.flush()
