"""Which ways between hosts show what each pipe and each flow's cap of a scenario carries. Pure.

What is sent from one host to another gets through at the rate of the narrowest pipe on its way, and shows nothing of
the wider ones. So each pipe is looked at where nothing is as narrow as it; if there is no such way, where nothing is
narrower: what is as narrow is shown together with it, none of them carries less and one of them no more. A flow of TCP
is capped besides.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from pyccl.netlab.scenario import Cap, Pipe, Scenario, Step

Way = tuple[int, int]  # ranks: from, to


@dataclass(frozen=True, slots=True)
class Hidden:
    """A pipe or cap that is the narrowest on no way. at_most: bits a second that one host gets there."""

    name: str
    rate: int
    at_most: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Cover:
    """Ways to be measured, by UDP and by a flow of TCP, and the names of the narrowest pipes, or caps, on each."""

    pipes: Mapping[Way, tuple[str, ...]]
    caps: Mapping[Way, tuple[str, ...]]
    hidden: tuple[Hidden, ...]


def neighbours(world: int) -> list[Way]:
    """Each host to the next."""
    return [(rank, (rank + 1) % world) for rank in range(world)]


def cover(scenario: Scenario) -> Cover:
    """Ways of neighbours where anything limits them, and others: no more than there are pipes and caps."""
    world = len(scenario.hosts)
    ways = {way: _Limits(scenario.route(*way)) for way in itertools.permutations(range(world), 2)}
    pipes, hidden_pipes = _choose({way: limits.pipes for way, limits in ways.items()}, {}, neighbours(world))
    caps, hidden_caps = _choose(
        {way: limits.caps for way, limits in ways.items()},
        {way: limits.pipes for way, limits in ways.items()},
        neighbours(world),
    )
    return Cover(pipes, caps, (*hidden_pipes, *hidden_caps))


class _Limits:
    """Of one way: bits a second by name."""

    def __init__(self, route: Iterable[Step]) -> None:
        self.pipes: Final[dict[str, int]] = {}
        self.caps: Final[dict[str, int]] = {}
        for step in route:
            if isinstance(step, Pipe) and step.line.rate is not None:
                self.pipes[step.name] = step.line.rate
            elif isinstance(step, Cap) and step.line.rate is not None:
                self.caps[step.name] = step.line.rate


def _choose(
    wanted: Mapping[Way, Mapping[str, int]], others: Mapping[Way, Mapping[str, int]], first: Iterable[Way]
) -> tuple[dict[Way, tuple[str, ...]], list[Hidden]]:
    """others: what limits a way and is not looked for."""
    shown: dict[Way, tuple[str, ...]] = {}  # the narrowest of what is wanted, where nothing else is narrower
    alone: dict[str, set[Way]] = {}
    beside: dict[str, set[Way]] = {}  # something else is as narrow
    at_most: dict[str, int] = {}
    rates: dict[str, int] = {}
    for way, limits in wanted.items():
        rates |= limits
        every = [*limits.values(), *others.get(way, {}).values()]
        for name, rate in limits.items():
            at_most[name] = max(at_most.get(name, 0), min(every))
            if rate == min(every):
                shown[way] = (*shown.get(way, ()), name)
                (alone if every.count(rate) == 1 else beside).setdefault(name, set()).add(way)
    shows = {name: alone.get(name) or beside.get(name, set()) for name in rates}
    chosen = [way for way in first if way in shown]
    left = {name: None for name in rates if shows[name] and shows[name].isdisjoint(chosen)}  # in the order of the ways
    while left:
        best = min(shows[next(iter(left))], key=lambda way: (-sum(way in shows[name] for name in left), way))
        chosen.append(best)
        left = {name: None for name in left if best not in shows[name]}
    hidden = [Hidden(name, rate, at_most[name]) for name, rate in rates.items() if not shows[name]]
    return {way: shown[way] for way in chosen}, hidden
