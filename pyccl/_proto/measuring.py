"""Measuring: which links to measure when, and what a network is, from what its members have told of it.

    round   pairs that have no member in common measure at the same time, both ways: an edge colouring of the missing
            pairs, so that nobody's line is shared. Of all pairs of N members N - 1 rounds (N odd: N)
    thin    pairs whose rate fewer connections could carry measure again with these: on a slow line many hold up one
            another, each with a piece that is begun. If that is no slower, they are enough
    odd     so do pairs far slower than the fastest of one of both, with all connections: what keeps a processor busy
            meanwhile makes a pair slower, nothing makes it faster, and one slow pair may turn a plan into a ring
    crowd   then everybody receives from several at once: what a host's line takes, all its links together
    fan-in  who sent far more in the crowd than came to it receives from several alone: they divide what they send among
            all, so that less comes to a fast line than it takes

Members choose the rounds for themselves from the same facts, so they must all come to the same answer: pure, and in
order of rank. What a member tells counts for its own links only, is bounded, and can't make a plan wrong, only slow.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

from pyccl._proto import limits
from pyccl._proto.messages import Measured
from pyccl._proto.shares import Bundle, Matrix
from pyccl._proto.topology import UNKNOWN, Cpu, Network

CROWD_MAX: Final = 8  # members that one receives from at once
FAN_INS_MAX: Final = 2  # of one call
ROUNDS_MAX: Final = 16  # of one call: with 17 members and more the rest is measured by the next

ENOUGH: Final = 0.9  # of the rate of many is what few must reach
_ODD: Final = 0.5  # of the rate of the fastest pair
_SLOWED: Final = 0.75  # of its rate alone is what a pair makes in the crowd that shares a line
_LESS: Final = 0.75  # of what it sends comes to who may take more
_SHARED: Final = 0.7  # of the fastest alone is what a host makes with several, if only its own links are on the line

Pair = tuple[int, int]  # ranks, the lower first


def rounds(world: int, missing: Collection[Pair]) -> list[list[Pair]]:
    """Rounds of disjoint pairs, at most ROUNDS_MAX, in the order of a tournament in which everybody meets everybody."""
    wanted = set(missing)
    out: list[list[Pair]] = []
    busy: list[set[int]] = []
    for pair in _tournament(world):
        if pair not in wanted:
            continue
        at = next((k for k, ranks in enumerate(busy) if not ranks & set(pair)), len(busy))
        if at == len(busy):
            out.append([])
            busy.append(set())
        out[at].append(pair)
        busy[at].update(pair)
    return out[:ROUNDS_MAX]


def is_odd(rate: float, fastest: float) -> bool:
    """Whether a pair of one member, of whose pairs one made `fastest`, is worth measuring again."""
    return 0 < rate < _ODD * fastest


def _tournament(world: int) -> list[Pair]:
    """All pairs, by rounds of the circle method: the last stays, the others go round."""
    size = world + world % 2
    pairs = []
    for turn in range(size - 1):
        circle = [size - 1, *((turn + k) % (size - 1) for k in range(size - 1))]
        for k in range(size // 2):
            low, high = sorted((circle[k], circle[size - 1 - k]))
            if high < world:
                pairs.append((low, high))
    return pairs


def crowd(world: int, rank: int) -> list[int]:
    """From whom this rank receives while all do: those nearest before and behind it, as many for everybody."""
    if world - 1 <= CROWD_MAX:
        return [other for other in range(world) if other != rank]
    near = [step for k in range(1, CROWD_MAX // 2 + 1) for step in (k, -k)]
    return sorted((rank + step) % world for step in near)


def may_take_more(sent: float, came: float) -> bool:
    """Of one member in the crowd, bytes per second: whether what comes is less than its line may take."""
    return came < _LESS * sent


def fan_ins(sent_by_rank: Mapping[int, float]) -> list[int]:
    """Who receives from several alone, one after the other: of those who want to, those who send most."""
    return sorted(sent_by_rank, key=lambda rank: (-sent_by_rank[rank], rank))[:FAN_INS_MAX]


def partner(pairs: Sequence[Pair], rank: int) -> int | None:
    """Whom this rank meets in a round."""
    return next((b if rank == a else a for a, b in pairs if rank in (a, b)), None)


# ---- what members have told -----------------------------------------------------------------------------------------


def network(members: Sequence[bytes], told: Mapping[bytes, Measured]) -> Network | None:
    """By rank; None: nobody has told anything of another. No more comes to a host than others say that they can send
    it, whatever it says. Hosts that nobody measured count as the middle one of those that were: a newcomer neither owns
    all nor nothing."""
    world, rank_of = len(members), {peer: rank for rank, peer in enumerate(members)}
    rate = [[UNKNOWN] * world for _ in range(world)]
    crowded = [[0.0] * world for _ in range(world)]
    trip: list[list[float | None]] = [[None] * world for _ in range(world)]
    cpu, came = [Cpu()] * world, [0.0] * world
    for peer, message in told.items():
        i = rank_of.get(peer)
        if i is None:
            continue
        cpu[i] = Cpu(*(float(rate) if rate else UNKNOWN for rate in (message.move, message.fold, message.code)))
        came[i] = float(message.down)
        for row in message.links:
            j = rank_of.get(row.peer)
            if j is None or i == j:
                continue
            if row.rate:
                rate[i][j] = float(row.rate)
            crowded[i][j] = row.crowd
            if row.rtt_us:
                trip[i][j] = row.rtt_us / 2e6
    alone = [[r if r < UNKNOWN else 0.0 for r in row] for row in rate]
    up = [max(sum(crowded[i]), *alone[i]) for i in range(world)]
    to, crowded_to = _turned(alone), _turned(crowded)
    down = [max(min(came[j], sum(sorted(to[j])[-CROWD_MAX:])), sum(crowded_to[j]), *to[j]) for j in range(world)]
    if not any(up):
        return None
    rates = _past_relays(rate, _relayed(rank_of, told))
    bundles = (*_bundles(alone, crowded), *_bundles(to, crowded_to))
    return Network(_filled(up), _filled(down), rates, _delays(trip), tuple(cpu), bundles)


def _turned(rows: Matrix) -> list[list[float]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _bundles(alone: Matrix, crowded: Matrix) -> list[Bundle]:
    """Of a host that in the crowd made far less, with all those to whom the crowd slowed it, than with the fastest of
    them alone: others were on that line. So it counts for what it got there."""
    found = []
    for i, (fast, slowed) in enumerate(zip(alone, crowded, strict=True)):
        far = tuple(j for j, rate in enumerate(slowed) if 0 < rate < _SLOWED * fast[j])
        together = sum(slowed[j] for j in far)
        if far and together < _SHARED * max(fast[j] for j in far):
            found.append((i, far, together))
    return found


def _relayed(rank_of: Mapping[bytes, int], told: Mapping[bytes, Measured]) -> set[Pair]:
    """Pairs of which at least one says so."""
    said = ((rank_of.get(peer), rank_of.get(row.peer)) for peer, m in told.items() for row in m.links if row.relayed)
    return {(min(i, j), max(i, j)) for i, j in said if i is not None and j is not None and i != j}


def _past_relays(rate: Sequence[Sequence[float]], relayed: Collection[Pair]) -> tuple[tuple[float, ...], ...]:
    """A relay carries the bytes of its pair twice, on a line that it needs for its own. So such a pair counts as none
    as long as there are members without one, who can own everything; else as half as fast as it was measured."""
    part = 0.5 if len({rank for pair in relayed for rank in pair}) == len(rate) else 0.0

    def past(i: int, j: int) -> float:
        if (min(i, j), max(i, j)) not in relayed:
            return rate[i][j]
        return part * rate[i][j] if part else 0.0

    return tuple(tuple(past(i, j) for j in range(len(rate))) for i in range(len(rate)))


def _filled(rates: Sequence[float]) -> tuple[float, ...]:
    known = sorted(rate for rate in rates if rate > 0)
    middle = known[(len(known) - 1) // 2] if known else UNKNOWN
    return tuple(rate if rate > 0 else middle for rate in rates)


def _delays(trip: Sequence[Sequence[float | None]]) -> tuple[tuple[float, ...], ...]:
    """A pair's is the lesser of what both say; of those nobody measured the middle one."""
    world = len(trip)
    known = sorted(delay for row in trip for delay in row if delay is not None)
    middle = known[len(known) // 2] if known else 0.0

    def between(i: int, j: int) -> float:
        both = [delay for delay in (trip[i][j], trip[j][i]) if delay is not None]
        return 0.0 if i == j else min(both, default=middle)

    return tuple(tuple(between(i, j) for j in range(world)) for i in range(world))


def clip_rate(rate: float) -> int:
    """Bytes per second as the wire has it; 0: nothing arrived, which is no measurement."""
    return min(max(int(rate), 0), limits.RATE_MAX)
