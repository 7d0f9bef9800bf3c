"""How often something may be done for others who ask for it. Pure: time is an argument."""

from __future__ import annotations


class Budget:
    """`burst` times at once, and one more every `every_s` seconds."""

    def __init__(self, burst: int, every_s: float) -> None:
        self._burst, self._every_s = burst, every_s
        self._left, self._at_s = float(burst), 0.0

    def wait_s(self, now_s: float) -> float:
        """Seconds until it may be done again; 0: now."""
        self._left = min(self._burst, self._left + max(0.0, now_s - self._at_s) / self._every_s)
        self._at_s = now_s
        return max(0.0, 1 - self._left) * self._every_s

    def take(self, now_s: float) -> bool:
        """It is done now; False: it may not be."""
        if self.wait_s(now_s) > 0:
            return False
        self._left -= 1
        return True
