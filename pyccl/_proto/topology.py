"""Topology: what a group's network was measured to be, how long an all-reduce takes on it, and the best plan for it.

Pure arithmetic: no clock, no randomness; searches are bounded by an `effort` (inner steps) and so deterministic.

    direct  rank i owns the share s[i] of a vector. It sends what it does not own and gets what it owns from all others,
            then the same back: (1 - s[i]) + s[i] (N - 1) vectors each way. Between i and j pass s[i] + s[j], each way.
            Three trips whatever N, one for DONE among them. Two members swap whole vectors: one vector, two trips.
    ring    2 (N - 1) / N vectors pass over every hop, the slowest one sets the pace; 2 (N - 1) trips and one for DONE.

A time is delay + bytes * pace, both linear in what was measured: `Line`. The slowest host or pair sets the pace, so
the best shares are a linear program (`shares.py`), the best ring a bottleneck tour (`ring_order.py`).
Rates are those of payload, each way at the same time. A rate of 0: no link; UNKNOWN: nothing was measured, so nothing
is held against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pyccl._proto.ring_order import best_ring, ring_hops
from pyccl._proto.shares import best_shares, direct_pace, equal_shares

UNKNOWN: Final = math.inf
NEVER: Final = math.inf  # ring_from_bytes: no size is large enough
REFERENCE_BYTES: Final = 64 << 20  # plans are compared by the time they predict for so much
GAIN_LEAST: Final = 0.1  # a plan that predicts less gain than this is within what measurements differ by


@dataclass(frozen=True, slots=True)
class Network:
    """By rank. up, down: bytes per second of a host, all its links together. rate[i][j]: from i to j alone.
    delay[i][j]: one trip, seconds. fold: bytes per second that a host decodes and adds."""

    up: tuple[float, ...]
    down: tuple[float, ...]
    rate: tuple[tuple[float, ...], ...]
    delay: tuple[tuple[float, ...], ...]
    fold: tuple[float, ...]

    def __post_init__(self) -> None:
        world = len(self.up)
        assert world > 0 and world == len(self.down) == len(self.rate) == len(self.delay) == len(self.fold)
        assert all(0 < rate <= UNKNOWN for rate in (*self.up, *self.down, *self.fold))
        for i in range(world):
            assert len(self.rate[i]) == len(self.delay[i]) == world
            assert all(0 <= rate <= UNKNOWN for rate in self.rate[i])
            assert all(0 <= delay < math.inf for delay in self.delay[i])

    @property
    def world(self) -> int:
        return len(self.up)

    def host(self, rank: int) -> float:
        """Direct moves as much one way as the other: the slower way counts."""
        return min(self.up[rank], self.down[rank])

    def pair(self, i: int, j: int) -> float:
        """As `host`, between two."""
        return min(self.rate[i][j], self.rate[j][i])

    def hop(self, i: int, j: int) -> float:
        """A ring's host sends to one and receives from one."""
        return min(self.rate[i][j], self.up[i], self.down[j])


@dataclass(frozen=True, slots=True)
class Line:
    """seconds = delay_s + bytes * pace. pace inf: it can't be done."""

    delay_s: float
    pace: float

    def seconds(self, size_bytes: float) -> float:
        return self.delay_s + size_bytes * self.pace


@dataclass(frozen=True, slots=True)
class Choice:
    """A plan, and what it is predicted to take."""

    shares: tuple[float, ...]  # of direct, adding up to 1
    order: tuple[int, ...]  # of the ring: ranks, from each to the next, the last to the first
    ring_from_bytes: float  # 0: always ring; NEVER
    direct: Line
    ring: Line

    def algorithm(self, size_bytes: float) -> str:
        return "ring" if size_bytes >= self.ring_from_bytes else "direct"

    def seconds(self, size_bytes: float) -> float:
        line = self.ring if size_bytes >= self.ring_from_bytes else self.direct
        return line.seconds(size_bytes)


def direct_line(network: Network, shares: Sequence[float]) -> Line:
    world = network.world
    if world == 1:
        return Line(0.0, 0.0)
    trip = max(max(row) for row in network.delay)
    hosts = [network.host(i) for i in range(world)]
    pairs = [[network.pair(i, j) for j in range(world)] for i in range(world)]
    return Line((2 if world == 2 else 3) * trip, direct_pace(hosts, pairs, network.fold, shares))


def ring_line(network: Network, order: Sequence[int]) -> Line:
    """Of a ring in this order. The longest way of a piece leaves out the shortest two hops that follow each other."""
    world = network.world
    if world == 1:
        return Line(0.0, 0.0)
    hops = ring_hops(order)
    slowest = min(network.hop(i, j) for i, j in hops)
    folding = min(network.fold) * world  # each folds its N-th of the vector at every step
    pace = 2 * (world - 1) / world / slowest if slowest > 0 else math.inf
    trips = [network.delay[i][j] for i, j in hops]
    least = min(a + b for a, b in zip(trips, trips[1:] + trips[:1], strict=True))
    done = max(max(row) for row in network.delay)
    return Line(2 * sum(trips) - least + done, max(pace, (world - 1) / folding))


def choose(network: Network, effort: int) -> Choice:
    """The best plan that is found with so much effort; the same for the same arguments. No effort is too little."""
    world = network.world
    hosts = [network.host(i) for i in range(world)]
    pairs = [[network.pair(i, j) for j in range(world)] for i in range(world)]
    hop_rates = [[network.hop(i, j) for j in range(world)] for i in range(world)]
    shares = best_shares(hosts, pairs, network.fold, effort)
    order = best_ring(hop_rates, network.delay, effort)
    return judged(network, shares, order)


def judged(
    network: Network, shares: Sequence[float], order: Sequence[int], ring_from_bytes: float | None = None
) -> Choice:
    """These shares and this ring on that network. ring_from_bytes None: from the size on from which the ring wins."""
    direct, ring = direct_line(network, shares), ring_line(network, order)
    if ring_from_bytes is None:
        ring_from_bytes = _ring_from(direct, ring, network.world)
    return Choice(tuple(shares), tuple(order), ring_from_bytes, direct, ring)


def default(network: Network) -> Choice:
    """What an epoch without a plan of its own does: equal shares, direct."""
    return judged(network, equal_shares(network.world), range(network.world), NEVER)


def is_better(found: Choice, present: Choice, size_bytes: float = REFERENCE_BYTES) -> bool:
    return found.seconds(size_bytes) < present.seconds(size_bytes) * (1 - GAIN_LEAST)


def _ring_from(direct: Line, ring: Line, world: int) -> float:
    if world < 3 or ring.pace == math.inf:
        return NEVER  # two are a ring already
    if direct.pace == math.inf:
        return 0.0
    if ring.pace >= direct.pace:
        return NEVER
    return max(0.0, (ring.delay_s - direct.delay_s) / (direct.pace - ring.pace))
