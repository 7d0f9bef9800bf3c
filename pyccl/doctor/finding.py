"""One thing that was looked at: what was found, how bad it is, what to do about it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Final


class Level(enum.IntEnum):
    """From nothing to do to nothing will work."""

    OK = 0
    NOTE = 1  # as it is, and worth knowing
    WARNING = 2  # it works, slowly or not always
    ERROR = 3  # it does not work


@dataclass(frozen=True, slots=True)
class Finding:
    """advice: "" where nothing is to be done. data: for programs; what is in the text, as values."""

    name: str
    level: Level
    text: str
    advice: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "level": self.level.name.lower(),
            "text": self.text,
            "advice": self.advice,
            "data": self.data,
        }


EXIT: Final = {Level.OK: 0, Level.NOTE: 0, Level.WARNING: 1, Level.ERROR: 3}


def worst(findings: list[Finding]) -> Level:
    return max((finding.level for finding in findings), default=Level.OK)
