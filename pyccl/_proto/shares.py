"""Shares of a direct all-reduce that make its slowest host, pair or fold as fast as can be.

With s[i] >= 0 adding up to 1, find the least T (the pace, seconds per byte of a vector) such that

    host i       1 + (N - 2) s[i] <= T h[i]       what it moves each way
    pair i, j    s[i] + s[j]      <= T r[i][j]
    work i       a[i] + b[i] s[i] <= T            what its processor does: moves, folds, codes
    bundle i, F  sum of s[i] + s[j], j in F, <= T b    what i and those far from it exchange, on a line of others too

A pair without a link (r = 0) leaves both its members with s = 0: nothing passes between them then.
Hosts alone have a closed form: every host moves at least one vector, so T >= 1 / min h, and the sum of the first lines
gives T >= (2 N - 2) / sum h; the greater of the two is reached. With pairs, work and bundles it is a linear program: a
dual simplex that starts from the hosts' lines and is given the pairs' lines as they are found violated (few ever are).
It stops when its effort is spent; whatever it then has is made feasible, so there always is an answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Final

_TOLERANCE: Final = 1e-9
_EVEN: Final = 1e-7  # so much slower may the shares get by evening them out
_PERTURBATION: Final = 1e-10  # of the costs, so that no two columns tie and no pivot repeats

Matrix = Sequence[Sequence[float]]
Bundle = tuple[int, tuple[int, ...], float]  # a rank, others, bytes per second each way between it and all of them
Work = tuple[float, float]  # seconds of a processor for each byte of a vector: whatever is owned, and for what is owned


def equal_shares(world: int) -> tuple[float, ...]:
    return (1.0 / world,) * world


def direct_pace(
    hosts: Sequence[float],
    pairs: Matrix,
    works: Sequence[Work],
    shares: Sequence[float],
    bundles: Sequence[Bundle] = (),
) -> float:
    """T of these shares; inf if some pair that has no link needs one."""
    world = len(hosts)
    if world == 1:
        return 0.0
    pace = max(base + each * share for (base, each), share in zip(works, shares, strict=True))
    if world == 2:  # whole vectors are swapped, and folded on both sides
        least = min(*hosts, pairs[0][1])
        return math.inf if least == 0 else max(1 / least, pace)
    for i, others, rate in bundles:
        pace = max(pace, (len(others) * shares[i] + sum(shares[j] for j in others)) / rate)
    for i, share in enumerate(shares):
        pace = max(pace, (1 + (world - 2) * share) / hosts[i])
        row = pairs[i]
        for j in range(i):
            if share + shares[j] > 0:
                pace = max(pace, (share + shares[j]) / row[j] if row[j] > 0 else math.inf)
    return pace


def best_shares(
    hosts: Sequence[float], pairs: Matrix, works: Sequence[Work], effort: int, bundles: Sequence[Bundle] = ()
) -> tuple[float, ...]:
    """The shares of least pace; of several, those that load hosts most evenly. Equal where none can do: everybody
    lacks a link."""
    world = len(hosts)
    cut_off = {rank for i in range(world) for j in range(i) if pairs[i][j] == 0 for rank in (i, j)}
    if world <= 2 or len(cut_off) == world:
        return equal_shares(world)
    even = _without(cut_off, _by_hosts(hosts))
    found, bound = _program(hosts, pairs, works, cut_off, effort, bundles)
    if direct_pace(hosts, pairs, works, even, bundles) <= bound * (1 + _EVEN):
        return even
    equal = _without(cut_off, equal_shares(world))
    best = min((even, found, equal), key=lambda shares: direct_pace(hosts, pairs, works, shares, bundles))
    return _evened(lambda shares: direct_pace(hosts, pairs, works, shares, bundles), best, even)


def _without(cut_off: Collection[int], shares: Sequence[float]) -> tuple[float, ...]:
    """All of it to the others."""
    kept = [0.0 if rank in cut_off else share for rank, share in enumerate(shares)]
    return _to_one(kept if any(kept) else [float(rank not in cut_off) for rank in range(len(shares))])


def _by_hosts(hosts: Sequence[float]) -> tuple[float, ...]:
    """The closed form. Where the slowest host sets the pace others have room to spare: they own as much as each other,
    or all that they have room for, since the links of the slowest get equal parts of its line."""
    world = len(hosts)
    least = min(hosts)
    if world <= 2 or least == math.inf:
        return equal_shares(world)
    known = [host if host < math.inf else max(h for h in hosts if h < math.inf) for host in hosts]
    pace = max(1 / least, (2 * world - 2) / sum(known))
    room = [max(0.0, (pace * host - 1) / (world - 2)) for host in known]
    left, shares = 1.0, [0.0] * world
    for k, rank in enumerate(sorted(range(world), key=room.__getitem__)):
        shares[rank] = min(room[rank], left / (world - k))
        left -= shares[rank]
    return _to_one(shares)


def _to_one(shares: Sequence[float]) -> tuple[float, ...]:
    positive = [max(0.0, share) for share in shares]
    total = sum(positive)
    return tuple(share / total for share in positive) if total > 0 else equal_shares(len(shares))


def _evened(
    pace_of: Callable[[tuple[float, ...]], float], best: tuple[float, ...], even: tuple[float, ...]
) -> tuple[float, ...]:
    """A corner of the program may give all to one host although others have room: as near to `even` as is no slower.

    The pace is convex along the line from the one to the other, and least at its beginning.
    """
    limit = pace_of(best) * (1 + _EVEN)
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        if pace_of(_between(best, even, middle)) <= limit:
            low = middle
        else:
            high = middle
    return _between(best, even, low)


def _between(a: tuple[float, ...], b: tuple[float, ...], part: float) -> tuple[float, ...]:
    return tuple(x + part * (y - x) for x, y in zip(a, b, strict=True))


# ---- the linear program ---------------------------------------------------------------------------------------------


def _program(
    hosts: Sequence[float],
    pairs: Matrix,
    works: Sequence[Work],
    cut_off: Collection[int],
    effort: int,
    bundles: Sequence[Bundle],
) -> tuple[tuple[float, ...], float]:
    """(shares, a pace that none is below). The shares reach it unless the effort ran out."""
    world = len(hosts)
    finite = [rate for rate in (*hosts, *(rate for row in pairs for rate in row)) if 0 < rate < math.inf]
    finite += [rate for _, _, rate in bundles]
    finite += [1 / (base + each) for base, each in works if base + each > 0]
    if not finite:
        return _without(cut_off, equal_shares(world)), 0.0
    unit = max(finite)  # rates become at most 1, and T about 1 or more
    simplex = _Simplex(world + 1)
    pace = world  # the column of T
    simplex.add({rank: -1.0 for rank in range(world) if rank not in cut_off}, -1.0)  # theirs cost, and gain nothing
    for i in range(world):
        if hosts[i] < math.inf:
            simplex.add({i: world - 2.0, pace: -hosts[i] / unit}, -1.0)
        base, each = works[i]
        if base + each > 0:
            simplex.add({i: each * unit, pace: -1.0}, -base * unit)
    for i, others, rate in bundles:
        simplex.add({i: float(len(others)), **dict.fromkeys(others, 1.0), pace: -rate / unit}, 0.0)
    asked: set[tuple[int, int]] = set()
    while True:
        effort -= simplex.solve(effort)
        values = simplex.values()
        effort -= world * world
        if effort <= 0:
            break
        found = _violated(values, pairs, unit, asked)
        if not found:
            break
        for i, j in found:
            asked.add((i, j))
            simplex.add({i: 1.0, j: 1.0, pace: -pairs[i][j] / unit}, 0.0)
    return _without(cut_off, values[:world]), values[pace] / unit


def _violated(
    values: Sequence[float], pairs: Matrix, unit: float, asked: set[tuple[int, int]]
) -> list[tuple[int, int]]:
    """For each rank the pair with a lower one that is over its limit by most."""
    world = len(values) - 1
    found = []
    for i in range(1, world):
        known = [j for j in range(i) if 0 < pairs[i][j] < math.inf and (i, j) not in asked]
        overs = [(values[i] + values[j] - values[world] * pairs[i][j] / unit, j) for j in known]
        over, j = max(overs, default=(0.0, 0))
        if over > _TOLERANCE:
            found.append((i, j))
    return found


class _Simplex:
    """Minimise the last of `count` variables, all >= 0, under lines a x <= b that may be added after a solution.

    A dual simplex over the condensed tableau: a row for each basic variable, a column for each other one,
        basic[k] = value[k] - sum over columns of row[k][c] * outer[c]
    Costs are >= 0 from the start and stay so; rows with a negative value are mended until there is none.
    Variables 0..count-1 are x, the others the slacks of the lines in order.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._outer = list(range(count))
        self._cost = [_PERTURBATION * (1 + c / count) for c in range(count - 1)] + [1.0]
        self._basic: list[int] = []
        self._row: list[list[float]] = []
        self._value: list[float] = []

    def add(self, line: dict[int, float], bound: float) -> None:
        place = {variable: c for c, variable in enumerate(self._outer)}
        new, value = [0.0] * self._count, bound
        rows = {variable: k for k, variable in enumerate(self._basic) if variable in line}
        for variable, factor in line.items():
            if variable in place:
                new[place[variable]] += factor
            else:
                k = rows[variable]
                value -= factor * self._value[k]
                new = [a - factor * b for a, b in zip(new, self._row[k], strict=True)]
        self._basic.append(self._count + len(self._basic))
        self._row.append(new)
        self._value.append(value)

    def solve(self, effort: int) -> int:
        """Pivot until it is solved, or so many cells were changed. How many were."""
        spent = 0
        while spent <= effort:
            k = min(range(len(self._value)), key=self._value.__getitem__)
            if self._value[k] >= -_TOLERANCE:
                break
            row = self._row[k]
            ratios = [(self._cost[c] / -a, c) for c, a in enumerate(row) if a < -_TOLERANCE]
            assert ratios, "T large enough solves every line"
            self._pivot(k, min(ratios)[1])
            spent += len(self._row) * self._count
        return spent

    def values(self) -> list[float]:
        out = [0.0] * self._count
        for variable, value in zip(self._basic, self._value, strict=True):
            if variable < self._count:
                out[variable] = value
        return out

    def _pivot(self, k: int, c: int) -> None:
        """Basic variable k and outer variable c change places."""
        row, at = self._row[k], self._row[k][c]
        new = [a / at for a in row]
        new[c] = 1 / at
        value = self._value[k] / at
        for other, cells in enumerate(self._row):
            factor = cells[c]
            if other != k and factor != 0.0:
                cells[c] = 0.0
                self._row[other] = [a - factor * b for a, b in zip(cells, new, strict=True)]
                self._value[other] -= factor * value
        factor, self._cost[c] = self._cost[c], 0.0
        self._cost = [max(0.0, a - factor * b) for a, b in zip(self._cost, new, strict=True)]
        self._row[k], self._value[k] = new, value
        self._basic[k], self._outer[c] = self._outer[c], self._basic[k]
