"""How often something may be done that others cause. Pure: time is an argument."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Budget:
    """`burst` times at once, and one more every `every_s` seconds."""

    burst: int
    every_s: float
    _left: float = field(init=False)
    _at_s: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self._left = float(self.burst)

    def wait_s(self, now_s: float) -> float:
        """Seconds until it may be done again; 0: now."""
        self._left = min(self.burst, self._left + max(0.0, now_s - self._at_s) / self.every_s)
        self._at_s = now_s
        return max(0.0, 1 - self._left) * self.every_s

    def take(self, now_s: float) -> bool:
        """It is done now; False: it may not be."""
        if self.wait_s(now_s) > 0:
            return False
        self._left -= 1
        return True
