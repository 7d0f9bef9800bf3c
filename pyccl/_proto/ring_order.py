"""In which order a ring visits its members: the tour whose slowest hop is fastest; of several, that of shortest trips.

Up to EXACT_MAX members the best tour is found. The greatest rate r at which hops of at least r still make a tour is
found by bisection over the rates, each step a reachability over (set of visited, last); then the shortest trips among
hops of at least r by Held and Karp's recursion. Beyond, or with little effort, a local search: tours grown from several
starts, improved by swapping sections (3-opt without reversal, since rates have a direction) and reversing them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

EXACT_MAX: Final = 12
_GAIN_LEAST_S: Final = 1e-9  # of trips: less is rounding, and might be gained for ever

Matrix = Sequence[Sequence[float]]
Order = tuple[int, ...]
Cost = tuple[float, float]  # 1 / rate of the slowest hop, trips: the less the better


def ring_hops(order: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(order, [*order[1:], order[0]], strict=True))


def ring_cost(rates: Matrix, delays: Matrix, order: Sequence[int]) -> Cost:
    hops = ring_hops(order)
    slowest = min(rates[i][j] for i, j in hops)
    return (1 / slowest if slowest > 0 else math.inf), sum(delays[i][j] for i, j in hops)


def best_ring(rates: Matrix, delays: Matrix, effort: int) -> Order:
    """A tour that begins with rank 0. Hops of rate 0 are avoided where a tour without them was found."""
    world = len(rates)
    if world <= 3 and all(rates[i][j] == rates[j][i] for i in range(world) for j in range(i)):
        return tuple(range(world))  # the only one
    if world <= EXACT_MAX and world * world << world - 1 <= effort:
        return _exact(rates, delays)
    return _searched(rates, delays, effort)


# ---- exact ----------------------------------------------------------------------------------------------------------


def _exact(rates: Matrix, delays: Matrix) -> Order:
    world = len(rates)
    levels = sorted({rates[i][j] for i in range(world) for j in range(world) if i != j})
    low, high = 0, len(levels) - 1  # at levels[low] there is a tour
    while low < high:
        middle = (low + high + 1) // 2
        if _has_tour(rates, levels[middle]):
            low = middle
        else:
            high = middle - 1
    return _shortest(rates, delays, levels[low])


def _has_tour(rates: Matrix, least: float) -> bool:
    """Over hops of at least this rate. ends[s]: where a path from 0 through exactly the set s can end, as bits."""
    world = len(rates)
    into = [sum(1 << i for i in range(world) if i != j and rates[i][j] >= least) for j in range(world)]
    full = (1 << world) - 1
    ends = [0] * (full + 1)
    ends[1] = 1
    for visited in range(1, full, 2):
        here = ends[visited]
        if here:
            for j in range(1, world):
                if not visited >> j & 1 and here & into[j]:
                    ends[visited | 1 << j] |= 1 << j
    return bool(ends[full] & into[0])


def _shortest(rates: Matrix, delays: Matrix, least: float) -> Order:
    """Of the tours over hops of at least this rate, of which there is one, that with the shortest trips."""
    world = len(rates)
    full = (1 << world) - 1
    steps = [[j for j in range(1, world) if j != i and rates[i][j] >= least] for i in range(world)]
    best: list[dict[int, tuple[float, int]]] = [{} for _ in range(full + 1)]  # set -> last -> (trips, the one before)
    best[1][0] = (0.0, 0)
    for visited in range(1, full, 2):
        for last, (trips, _) in best[visited].items():
            for j in steps[last]:
                if not visited >> j & 1:
                    there, through = best[visited | 1 << j], trips + delays[last][j]
                    if j not in there or through < there[j][0]:
                        there[j] = through, last
    closed = [(trips + delays[last][0], last) for last, (trips, _) in best[full].items() if rates[last][0] >= least]
    _, last = min(closed)
    order, visited = [], full
    while visited:
        order.append(last)
        before = best[visited][last][1]
        visited &= ~(1 << last)
        last = before
    return tuple(reversed(order))


# ---- local search ---------------------------------------------------------------------------------------------------


def _searched(rates: Matrix, delays: Matrix, effort: int) -> Order:
    """Tours grown from rank 0, 1, ..., each improved until nothing helps or the effort is spent; one in any case."""
    world = len(rates)
    best: tuple[Cost, Order] | None = None
    for start in range(world):
        search = _Search(rates, delays, _grown(rates, delays, start), effort - world * world)
        search.run()
        effort = search.effort
        cost = ring_cost(rates, delays, search.order)
        if best is None or cost < best[0]:
            best = cost, tuple(search.order)
        if effort <= 0:
            break
    assert best is not None
    at = best[1].index(0)
    return best[1][at:] + best[1][:at]


def _grown(rates: Matrix, delays: Matrix, start: int) -> list[int]:
    """Each goes on to the one it reaches fastest."""
    left = set(range(len(rates))) - {start}
    order = [start]
    while left:
        last = order[-1]
        following = max(left, key=lambda j: (rates[last][j], -delays[last][j], -j))
        order.append(following)
        left.remove(following)
    return order


class _Search:
    """First the rate: take the slowest hop out of the tour as long as that makes only faster ones. Then the trips: swap
    sections as long as no hop gets slower than the slowest."""

    def __init__(self, rates: Matrix, delays: Matrix, order: list[int], effort: int) -> None:
        self._rates, self._delays, self.order, self.effort = rates, delays, order, effort

    def run(self) -> None:
        while self.effort > 0 and self._faster():
            pass
        moved = True
        while self.effort > 0 and moved:
            moved = any(self._shorter(at) for at in range(len(self.order)))

    def _turned(self, last: int) -> list[int]:
        """The tour, beginning behind its hop number `last`."""
        return [*self.order[last + 1 :], *self.order[: last + 1]]

    def _slowest(self) -> tuple[float, int]:
        return min((self._rates[i][j], k) for k, (i, j) in enumerate(ring_hops(self.order)))

    def _faster(self) -> bool:
        least, at = self._slowest()
        tour = self._turned(at)  # the slowest hop goes from its end to its beginning
        changed = self._swapped_faster(tour, least) or self._reversed_faster(tour, least)
        if changed:
            self.order = changed
        return bool(changed)

    def _swapped_faster(self, tour: list[int], least: float) -> list[int]:
        """a b c -> a c b, in which the hop from c to a is gone, and no section has changed its direction."""
        rates, world = self._rates, len(tour)
        first, last = tour[0], tour[-1]
        ends = [k for k in range(1, world) if rates[last][tour[k]] > least]  # where b may begin: behind c
        starts = [k for k in range(2, world) if rates[tour[k - 1]][first] > least]  # where c may begin: b's end meets a
        self.effort -= world
        for k in ends:
            row = rates[tour[k - 1]]
            for m in starts:
                if m > k and row[tour[m]] > least:
                    return [*tour[:k], *tour[m:], *tour[k:m]]
            self.effort -= len(starts)
            if self.effort <= 0:
                break
        return []

    def _reversed_faster(self, tour: list[int], least: float) -> list[int]:
        """a b -> a b', where the hop from b's end to a is gone and the hops within b have changed their direction."""
        rates = self._rates
        first, last = tour[0], tour[-1]
        for k in range(len(tour) - 1, 0, -1):
            if rates[tour[k - 1]][last] > least and rates[tour[k]][first] > least:
                return [*tour[:k], *tour[k:][::-1]]
            if rates[tour[k]][tour[k - 1]] <= least:
                break
        self.effort -= len(tour)
        return []

    def _shorter(self, at: int) -> bool:
        """A swap that takes out hop number `at`, with shorter trips and no hop slower than the slowest."""
        rates, delays, least, world = self._rates, self._delays, self._slowest()[0], len(self.order)
        tour = self._turned(at)
        first, last = tour[0], tour[-1]
        for k in range(1, world - 1):
            if rates[last][tour[k]] < least:
                continue
            self.effort -= world - k
            for m in range(k + 1, world):
                a, b, c, d = tour[k - 1], tour[k], tour[m - 1], tour[m]
                gone = delays[last][first] + delays[a][b] + delays[c][d]
                gain = gone - delays[last][b] - delays[a][d] - delays[c][first]
                if gain > _GAIN_LEAST_S and rates[a][d] >= least and rates[c][first] >= least:
                    self.order = [*tour[:k], *tour[m:], *tour[k:m]]
                    return True
            if self.effort <= 0:
                break
        return False
