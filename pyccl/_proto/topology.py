"""Topology: what a group's network was measured to be, how long an all-reduce takes on it, and the best plan for it.

Pure arithmetic: no clock, no randomness; searches are bounded by an `effort` (inner steps) and so deterministic.

    direct  rank i owns the share s[i] of a vector. It sends what it does not own and gets what it owns from all others,
            then the same back: (1 - s[i]) + s[i] (N - 1) vectors each way. Between i and j pass s[i] + s[j], each way.
            Three trips whatever N, one for DONE among them. Two members swap whole vectors: one vector, two trips.
    ring    2 (N - 1) / N vectors pass over every hop, the slowest one sets the pace; 2 (N - 1) trips and one for DONE.

A time is delay + bytes * pace and what is under way at the end: `Line`. The slowest host or pair sets the pace, so the
best shares are a linear program (`shares.py`), the best ring a bottleneck tour (`ring_order.py`).
Rates are those of payload, each way at the same time. A rate of 0: no link; UNKNOWN: nothing was measured, so nothing
is held against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from pyccl._proto import limits
from pyccl._proto.ring_order import best_ring, ring_hops
from pyccl._proto.shares import Bundle, Work, best_shares, direct_pace, equal_shares

UNKNOWN: Final = math.inf
NEVER: Final = math.inf  # ring_from_bytes: no size is large enough
REFERENCE_BYTES: Final = 64 << 20  # plans are compared by the time they predict for so much, and for a sixteenth of it
SMALL_BYTES: Final = REFERENCE_BYTES // 16
PIECE_BYTES: Final = 2 * limits.PLAN_PIECE_MAX  # of a plan that does not say
PIECE_S: Final = 0.01  # a piece takes the slowest host no longer, if it can be as short: what is begun is not finished
LANES: Final = 8  # connections that a long link begins with; each has a piece under way
LANE_S: Final = 0.1  # that a piece of the usual length may be under way on one, or two round trips
LANES_LEAST: Final = 2  # one alone stands still with each loss
CODED: Final = 0.252  # of float32 on the lines: codes of 8 bits and the heads of their blocks
OWNER_BUSY: Final = 0.5  # of the time at most, where few own all for a slow host's sake
GAIN_LEAST: Final = 0.1  # a plan that predicts less gain than this is within what measurements differ by
NOISE: Final = (
    1.4  # times: lines that losses or busy processors are in the way of differ by so much when they are measured
)
RING_GAIN_LEAST: Final = 0.25  # of a ring over direct: two lines of the model, each wrong by as much as this


@dataclass(frozen=True, slots=True)
class Cpu:
    """Bytes per second that one thread of a host gets done: sends or receives; reads to add; has coded or decoded."""

    move: float = UNKNOWN
    fold: float = UNKNOWN
    code: float = UNKNOWN


@dataclass(frozen=True, slots=True)
class Network:
    """By rank. up, down: bytes per second of a host, all its links together. rate[i][j]: from i to j alone.
    delay[i][j]: one trip, seconds. bundles: lines that a host's share with others', and what it got of them."""

    up: tuple[float, ...]
    down: tuple[float, ...]
    rate: tuple[tuple[float, ...], ...]
    delay: tuple[tuple[float, ...], ...]
    cpu: tuple[Cpu, ...]
    bundles: tuple[Bundle, ...] = ()

    def __post_init__(self) -> None:
        world = len(self.up)
        assert world > 0 and world == len(self.down) == len(self.rate) == len(self.delay) == len(self.cpu)
        assert all(0 < rate <= UNKNOWN for rate in (*self.up, *self.down))
        assert all(0 < rate <= UNKNOWN for cpu in self.cpu for rate in (cpu.move, cpu.fold, cpu.code))
        assert all(i not in others and 0 < rate < UNKNOWN for i, others, rate in self.bundles)
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

    def works(self, part: float = 1.0) -> list[Work]:
        """Of direct. part: what is on the lines of each byte of a vector; less than 1: it and the sum are coded."""
        return [_work(cpu, self.world, part) for cpu in self.cpu]

    def hop(self, i: int, j: int) -> float:
        """A ring's host sends to one and receives from one."""
        return min(self.rate[i][j], self.up[i], self.down[j])


@dataclass(frozen=True, slots=True)
class Line:
    """seconds = delay_s + bytes * pace + lag. pace inf: it can't be done.

    Lag: pieces that share a line end together, and only then do their sums come back: min(bytes, lag_bytes) * lag_pace.
    """

    delay_s: float
    pace: float
    lag_bytes: float = 0.0
    lag_pace: float = 0.0

    def seconds(self, size_bytes: float) -> float:
        return self.least_s(size_bytes) + min(size_bytes, self.lag_bytes) * self.lag_pace

    def least_s(self, size_bytes: float) -> float:
        """What no pieces, however short, go below."""
        return self.delay_s + size_bytes * self.pace


@dataclass(frozen=True, slots=True)
class Choice:
    """A plan, and what it is predicted to take."""

    shares: tuple[float, ...]  # of direct, adding up to 1
    order: tuple[int, ...]  # of the ring: ranks, from each to the next, the last to the first
    ring_from_bytes: float  # 0: always ring; NEVER
    direct: Line
    ring: Line
    piece_bytes: int = PIECE_BYTES
    coded: Line = Line(0.0, 0.0)  # direct, with a codec of 8 bits

    def algorithm(self, size_bytes: float) -> str:
        return "ring" if size_bytes >= self.ring_from_bytes else "direct"

    def seconds(self, size_bytes: float) -> float:
        line = self.ring if size_bytes >= self.ring_from_bytes else self.direct
        return line.seconds(size_bytes)


def few(rate: float, rtt_s: float) -> int:
    """Connections that a line of this rate needs: with more of them each piece only takes longer."""
    return max(LANES_LEAST, math.ceil(rate * max(LANE_S, 2 * rtt_s) / PIECE_BYTES))


def _lanes(network: Network) -> int:
    """In use by the slowest host on each of its links."""
    slowest = min(*network.up, *network.down)
    return LANES if slowest == UNKNOWN else min(LANES, few(slowest, 2 * max(max(row) for row in network.delay)))


def _work(cpu: Cpu, world: int, part: float) -> Work:
    """An engine has one thread for what it sends, receives, adds and codes."""
    coded = 1 / cpu.code if part < 1 else 0.0
    if world == 2:  # own vector coded, both decoded, added
        return 2 * part / cpu.move + 2 / cpu.fold + 3 * coded, 0.0
    return 2 * part / cpu.move + 2 * coded, 2 * (world - 2) * part / cpu.move + world * (1 / cpu.fold + coded)


def direct_line(network: Network, shares: Sequence[float], piece_bytes: int = PIECE_BYTES, part: float = 1.0) -> Line:
    """part: as `Network.works`."""
    world = network.world
    if world == 1:
        return Line(0.0, 0.0)
    trip = max(max(row) for row in network.delay)
    hosts = [network.host(i) / part for i in range(world)]
    pairs = [[network.pair(i, j) / part for j in range(world)] for i in range(world)]
    bundles = [(i, others, rate / part) for i, others, rate in network.bundles]
    pace = direct_pace(hosts, pairs, network.works(part), shares, bundles)
    if world == 2:  # whole vectors are swapped: nothing comes back
        return Line(2 * trip, pace)
    lag = max(max((1 - s) / network.down[i], (world - 1) * s / network.up[i]) for i, s in enumerate(shares))
    return Line(3 * trip, pace, float(_lanes(network) * (world - 1) * piece_bytes), lag)


def ring_line(network: Network, order: Sequence[int], piece_bytes: int = PIECE_BYTES) -> Line:
    """Of a ring in this order. The longest way of a piece leaves out the shortest two hops that follow each other."""
    world = network.world
    if world == 1:
        return Line(0.0, 0.0)
    hops = ring_hops(order)
    slowest = min(network.hop(i, j) for i, j in hops)
    passes = 2 * (world - 1) / world  # vectors that each sends, and receives; half of them are added to its own
    work = max(passes * (2 / cpu.move + 1 / cpu.fold) for cpu in network.cpu)
    pace = max(work, passes / slowest if slowest > 0 else math.inf)
    trips = [network.delay[i][j] for i, j in hops]
    least = min(a + b for a, b in zip(trips, trips[1:] + trips[:1], strict=True))
    done = max(max(row) for row in network.delay)
    lag = sum(1 / network.hop(i, j) for i, j in hops) if slowest > 0 else 0.0  # of a piece's way round
    begun = float(_lanes(network) * piece_bytes)
    return Line(2 * sum(trips) - least + done, pace, begun, lag)


def best_piece(network: Network) -> int:
    """Short on slow lines, so that contributions and results overlap; long where processors are the limit."""
    slowest = min(network.host(rank) for rank in range(network.world))
    piece = PIECE_BYTES
    while piece > limits.PLAN_PIECE_MIN and piece > slowest * PIECE_S:
        piece //= 2
    return piece


def choose(network: Network, effort: int) -> Choice:
    """The best plan that is found with so much effort; the same for the same arguments. No effort is too little."""
    world = network.world
    hosts = [network.host(i) for i in range(world)]
    pairs = [[network.pair(i, j) for j in range(world)] for i in range(world)]
    hop_rates = [[network.hop(i, j) for j in range(world)] for i in range(world)]
    shares = best_shares(hosts, pairs, network.works(), effort, network.bundles)
    shares = _sure(network, _few_owners(network, shares))
    order = best_ring(hop_rates, network.delay, effort)
    return judged(network, shares, order, piece_bytes=best_piece(network))


def _sure(network: Network, shares: tuple[float, ...]) -> tuple[float, ...]:
    """Equal, unless these gain too where what differs by no more than noise is the same."""
    equal, same = equal_shares(network.world), _levelled(network)
    gains = direct_line(same, shares).pace < direct_line(same, equal).pace * (1 - GAIN_LEAST)
    return shares if gains else equal


def _levelled(network: Network) -> Network:
    """Each rate as the greatest that it is within NOISE of: of hosts one way, of pairs, of processors."""
    columns = zip(*((cpu.move, cpu.fold, cpu.code) for cpu in network.cpu), strict=True)
    rates = _level([rate for row in network.rate for rate in row])
    return replace(
        network,
        up=tuple(_level(network.up)),
        down=tuple(_level(network.down)),
        rate=tuple(tuple(rates[i : i + network.world]) for i in range(0, len(rates), network.world)),
        cpu=tuple(Cpu(*row) for row in zip(*map(_level, columns), strict=True)),
    )


def _level(rates: Sequence[float]) -> list[float]:
    levels: list[float] = []
    for rate in sorted((rate for rate in set(rates) if rate < UNKNOWN), reverse=True):
        if not levels or rate * NOISE < levels[-1]:
            levels.append(rate)
    return [next((top for top in levels if rate <= top <= rate * NOISE), rate) for rate in rates]


def _few_owners(network: Network, shares: tuple[float, ...]) -> tuple[float, ...]:
    """Where a slow host that owns nothing sets the pace: as few owners as are no slower and half at rest. Its links to
    several share its line unevenly, each at a pace of its own; one link has it alone."""
    slow = min(range(network.world), key=network.host)
    if network.world <= 2 or shares[slow] > 0 or network.host(slow) == UNKNOWN:
        return shares
    pace = direct_line(network, shares).pace
    owners = sorted(
        (rank for rank, share in enumerate(shares) if share > 0),
        key=lambda rank: (-network.pair(rank, slow), -network.host(rank)),
    )
    works = network.works()
    for count in range(1, len(owners)):
        part, chosen = 1 / count, owners[:count]
        busiest = max(
            max((1 + (network.world - 2) * part) / network.host(rank), works[rank][0] + works[rank][1] * part)
            for rank in chosen
        )
        made = tuple(part if rank in chosen else 0.0 for rank in range(network.world))
        if busiest <= OWNER_BUSY * pace and direct_line(network, made).pace <= pace * (1 + GAIN_LEAST):
            return made
    return shares


def judged(
    network: Network,
    shares: Sequence[float],
    order: Sequence[int],
    ring_from_bytes: float | None = None,
    piece_bytes: int = PIECE_BYTES,
) -> Choice:
    """These shares and this ring on that network. ring_from_bytes None: from the size on from which the ring wins by
    RING_GAIN_LEAST: one pair that was measured while a processor was busy slows direct, and hardly a ring."""
    direct, ring = direct_line(network, shares, piece_bytes), ring_line(network, order, piece_bytes)
    if ring_from_bytes is None:
        ring_from_bytes = _ring_from(direct, ring, network.world)
    coded = direct_line(network, shares, piece_bytes, CODED)
    return Choice(tuple(shares), tuple(order), ring_from_bytes, direct, ring, piece_bytes, coded)


def default(network: Network) -> Choice:
    """What an epoch without a plan of its own does: equal shares, direct."""
    return judged(network, equal_shares(network.world), range(network.world), NEVER)


def is_better(found: Choice, present: Choice) -> bool:
    """Of large and of small operations neither takes longer, and one gains what counts as a gain. With a codec, where
    processors count for more than lines, it is not so much slower either."""
    sizes = (SMALL_BYTES, REFERENCE_BYTES)
    gains = [found.seconds(size) < present.seconds(size) * (1 - GAIN_LEAST) for size in sizes]
    if any(found.coded.seconds(size) > present.coded.seconds(size) * (1 + GAIN_LEAST) for size in sizes):
        return False
    return any(gains) and all(found.seconds(size) <= present.seconds(size) for size in sizes)


def _ring_from(direct: Line, ring: Line, world: int) -> float:
    if world < 3 or ring.pace == math.inf:
        return NEVER  # two are a ring already
    if direct.pace == math.inf:
        return 0.0
    left = 1 - RING_GAIN_LEAST
    direct = Line(direct.delay_s * left, direct.pace * left, direct.lag_bytes, direct.lag_pace * left)
    if ring.pace >= direct.pace:
        return NEVER
    low, high = 0.0, max(direct.lag_bytes, ring.lag_bytes)
    behind = ring.seconds(high) - direct.seconds(high)
    if behind >= 0:  # from here on both are straight
        return high + behind / (direct.pace - ring.pace)
    while ring.seconds(low) > direct.seconds(low) and high - low > 1:
        middle = (low + high) / 2
        low, high = (low, middle) if ring.seconds(middle) <= direct.seconds(middle) else (middle, high)
    return low if ring.seconds(low) <= direct.seconds(low) else high
