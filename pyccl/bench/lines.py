"""What the lines of a scenario allow, and what that means for who measures over them. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Final

from pyccl._proto import topology as planner
from pyccl._proto.ring_order import ring_hops
from pyccl.bench.conductor import BenchError, ExitStatus
from pyccl.netlab import Scenario
from pyccl.netlab.scenario import IPv6, Nat, Pipe

EFFORT: Final = 10_000_000
TIMEOUT_LEAST_S: Final = 60.0
AHEAD_NS: Final = 20_000_000
AHEAD_ROUND_TRIPS: Final = 2
PATIENCE: Final = 8  # times what the lines allow equal shares: losses leave one connection a sixth of a long line

Pair = tuple[int, int]  # ranks: from, to


def master_rank(scenario: Scenario) -> int:
    """The first host that all others can dial at its address in `Lab.addresses`.

    Raises:
        BenchError: there is none.
    """
    for rank, host in enumerate(scenario.hosts):
        others = [other.ipv6 for other in scenario.hosts]
        spoken = IPv6.ONLY not in others if host.ipv6 is not IPv6.ONLY else IPv6.NONE not in others
        if host.nat is Nat.OPEN and spoken:
            return rank
    raise BenchError(
        ExitStatus.ARGUMENTS,
        f"scenario {scenario.name}: no host for the master: one with a public address that all others reach",
    )


def ahead_ns(scenario: Scenario) -> int:
    """So far ahead is the moment at which all start: the last of them hears of it before."""
    return AHEAD_NS + AHEAD_ROUND_TRIPS * scenario.rtt_ns


def need_relay(scenario: Scenario) -> bool:
    """Some kinds of NAT reach one another through the master alone."""
    return any(host.nat is not Nat.OPEN for host in scenario.hosts)


def need_gloo(scenario: Scenario) -> None:
    """Gloo dials IPv4 addresses as they are.

    Raises:
        BenchError: not all hosts have a public one.
    """
    for host in scenario.hosts:
        if host.nat is not Nat.OPEN or host.ipv6 is IPv6.ONLY:
            raise BenchError(ExitStatus.ARGUMENTS, f"--vs gloo: host {host.name!r} has no public IPv4 address")


def timeout_s(scenario: Scenario, size_bytes: int) -> float:
    """For one all-reduce, of whatever system and algorithm: a hang is an error, slowness is not."""
    world = len(scenario.hosts)
    ring = set(ring_hops(range(world)))
    slowest_s = 0.0
    for rate, pairs in _pipes(scenario):
        vectors = max(len(pairs) * 2 / world, len(pairs & ring) * 2 * (world - 1) / world)
        slowest_s = max(slowest_s, vectors * size_bytes * 8 / rate)
    for pair in itertools.permutations(range(world), 2):
        cap = scenario.flow_cap(*pair)
        if cap is not None:
            slowest_s = max(slowest_s, 2 * (world - 1) / world * size_bytes * 8 / cap)
    return TIMEOUT_LEAST_S + PATIENCE * (slowest_s + 2 * world * scenario.rtt_ns / 1e9)


def transfer_timeout_s(scenario: Scenario, size_bytes: int) -> float:
    """As `timeout_s`, for so much from any host to any other."""
    rates = [scenario.rate(*pair) for pair in itertools.permutations(range(len(scenario.hosts)), 2)]
    slowest_s = max((size_bytes * 8 / rate for rate in rates if rate is not None), default=0.0)
    return TIMEOUT_LEAST_S + PATIENCE * slowest_s


def bound_s(scenario: Scenario, size_bytes: int) -> float:
    """No plan is faster: the planner's time for lines of these rates and delays, each host's its own; and what direct
    or a ring must bring over each line that several share, whatever the shares or the order. 0.0: nothing is bounded.
    """
    best = planner.choose(network_of(scenario), EFFORT)
    world = len(scenario.hosts)
    direct_s, ring_s = best.direct.least_s(size_bytes), best.ring.least_s(size_bytes)
    for rate, pairs in _pipes(scenario):
        vector_s = size_bytes * 8 / rate
        # Between i and j pass the shares of both: least if who has the fewest partners over this line owns everything.
        direct_s = max(direct_s, min(sum(rank in pair for pair in pairs) for rank in range(world)) * vector_s)
        ring_s = max(ring_s, _least_hops(world, pairs) * 2 * (world - 1) / world * vector_s)
    return min(direct_s, ring_s)


def network_of(scenario: Scenario) -> planner.Network:
    """The lines as the planner would like to know them. What several pairs share counts whole for each."""
    ranks = range(len(scenario.hosts))
    return planner.Network(
        up=tuple(_bytes_s(host.up.rate) for host in scenario.hosts),
        down=tuple(_bytes_s(host.down.rate) for host in scenario.hosts),
        rate=tuple(tuple(_bytes_s(scenario.rate(i, j)) if i != j else planner.UNKNOWN for j in ranks) for i in ranks),
        delay=tuple(tuple(scenario.delay_ns(i, j) / 1e9 if i != j else 0.0 for j in ranks) for i in ranks),
        cpu=(planner.Cpu(),) * len(ranks),
    )


def _pipes(scenario: Scenario) -> list[tuple[int, set[Pair]]]:
    """The rate of each line that has one, bits a second, and the ordered pairs whose packets it carries."""
    crossed: dict[str, tuple[int, set[Pair]]] = {}
    for pair in itertools.permutations(range(len(scenario.hosts)), 2):
        for step in scenario.route(*pair):
            if isinstance(step, Pipe) and step.line.rate is not None:
                crossed.setdefault(step.name, (step.line.rate, set()))[1].add(pair)
    return list(crossed.values())


def _least_hops(world: int, pairs: Collection[Pair]) -> int:
    """Of any ring over a line with these pairs: 1 where they are all from one part of the hosts to the rest, as those
    of a line that parts a network in two are. 0: a ring may do without it."""
    senders, receivers = {a for a, _ in pairs}, {b for _, b in pairs}
    parts = not senders & receivers and senders | receivers == set(range(world))
    return int(parts and len(pairs) == len(senders) * len(receivers))


def _bytes_s(rate: int | None) -> float:
    return planner.UNKNOWN if rate is None else rate / 8
