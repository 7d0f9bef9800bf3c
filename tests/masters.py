"""A master as a process, for tests whose peers are in this one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_LISTENING: Final = "listening on "
_END_S: Final = 60.0


@contextmanager
def started_master(*options: str, listen: str = "127.0.0.1:0") -> Iterator[str]:
    """Its address."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "pyccl.cli.master", "--listen", listen, *options],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().removeprefix(_LISTENING).strip()
    finally:
        process.terminate()
        process.communicate(timeout=_END_S)
