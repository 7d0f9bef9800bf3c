"""Rates, times and sizes as people write them: ``"400mbit"``, ``"75ms"``, ``"256kB"``. Pure."""

from __future__ import annotations

import re
from typing import Final

_FORM: Final = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?) ?([a-zA-Z]+)")
RATES: Final = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}  # a second
TIMES: Final = {"us": 10**3, "ms": 10**6, "s": 10**9}  # in ns
SIZES: Final = {"B": 1, "kB": 10**3, "MB": 10**6, "KiB": 1 << 10, "MiB": 1 << 20}
RATE_MAX: Final = 1000 * 10**9
TIME_MAX: Final = 60 * 10**9


class UnitError(ValueError):
    """This is no rate, time or size; the text says what is."""


def _read(text: object, units: dict[str, int], what: str, example: str) -> int | None:
    found = _FORM.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise UnitError(f"{text!r} is no {what}: write a number and a unit, as {example!r}")
    unit = found[2].lower() if units is RATES else found[2]
    if unit not in units:
        return None
    return round(float(found[1]) * units[unit])


def _refuse(text: object, units: dict[str, int], what: str) -> UnitError:
    return UnitError(f"{text!r} is no {what}: its unit must be one of {', '.join(units)}")


def rate_bps(text: object) -> int:
    """Bits a second; the unit in any case. UnitError: no such text, nothing or more than RATE_MAX."""
    value = _read(text, RATES, "rate", "400mbit")
    if value is None:
        raise _refuse(text, RATES, "rate")
    if not 0 < value <= RATE_MAX:
        raise UnitError(f"{text!r}: a rate is more than nothing and at most {RATE_MAX // 10**9}gbit")
    return value


def time_ns(text: object) -> int:
    """Nanoseconds. UnitError: no such text, or more than TIME_MAX."""
    value = _read(text, TIMES, "time", "75ms")
    if value is None:
        raise _refuse(text, TIMES, "time")
    if value > TIME_MAX:
        raise UnitError(f"{text!r}: a time is at most {TIME_MAX // 10**9}s")
    return value


def queue_ns(text: object, rate: int | None) -> int:
    """What a queue holds, in ns at the rate of what drains it. It may be given as a size. UnitError: neither."""
    value = _read(text, SIZES, "queue", "50ms")
    if value is None:
        try:
            return time_ns(text)
        except UnitError:
            raise _refuse(text, TIMES | SIZES, "queue") from None
    return 0 if rate is None else value * 8 * 10**9 // rate


def share(value: object) -> float:
    """A probability: 0 to 1. UnitError: something else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UnitError(f"{value!r} is no probability: write a number from 0 to 1, as 1e-4")
    return float(value)


def show_rate(rate: int | None) -> str:
    """As it may be written, None: unlimited."""
    if rate is None:
        return "unlimited"
    unit = max((unit for unit in RATES if RATES[unit] <= rate), key=RATES.__getitem__)
    return f"{rate / RATES[unit]:g}{unit}"


def show_time(ns: int) -> str:
    """As it may be written."""
    if ns == 0:
        return "0ms"
    unit = max((unit for unit in TIMES if TIMES[unit] <= ns), key=TIMES.__getitem__, default="us")
    return f"{ns / TIMES[unit]:g}{unit}"
