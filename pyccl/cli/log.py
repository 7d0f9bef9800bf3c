"""Log lines of the daemons: UTC time, level, logger, then the event with key=value pairs."""

from __future__ import annotations

import logging
import time
from typing import Final

LEVELS: Final = ("debug", "info", "warning", "error")


def printable(text: str) -> str:
    """Foreign text as one line that moves no cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Formatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  the name is logging's
        return printable(super().formatMessage(record))


def without_traceback(record: logging.LogRecord) -> bool:
    """Trio tells ten times a second of an accept that fails, as for want of descriptors: a line each will do."""
    record.exc_info = None
    return True


def configure(level: str) -> None:
    formatter = _Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("trio.serve_listeners").addFilter(without_traceback)
