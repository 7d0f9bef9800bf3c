"""Ties a child process to the one that started it: when its stdin ends, it ends.

That covers what `children.Children` cannot: an owner killed with SIGKILL. ``python -m pyccl.processes.leash MODULE
ARGS...`` runs a module that knows nothing of this, such as the master. A child that is stopped (SIGSTOP) at that moment
can read no stdin: the kernel kills it.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable
from typing import Final

OWNER_GONE: Final = 70  # exit status
_PR_SET_PDEATHSIG: Final = 1


def hold(on_line: Callable[[], None] = lambda: None) -> None:
    """Watch stdin in a thread: ``on_line`` for what comes in, the end of this process when it closes."""

    def watch() -> None:
        while os.read(0, 4096):
            on_line()
        os._exit(OWNER_GONE)

    # Counts from the end of the thread that started us: `Children` starts from the main thread only.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    threading.Thread(target=watch, daemon=True, name="leash").start()


def main() -> None:
    """Run the module named on the command line."""
    del sys.argv[0]
    hold()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
