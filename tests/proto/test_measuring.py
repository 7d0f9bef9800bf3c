"""Which links are measured when, and what a network is from what members told. A seed is its test's id."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest

from pyccl._proto import measuring, topology
from pyccl._proto.messages import LinkMeasure, Measured
from pyccl._proto.topology import UNKNOWN, Cpu


def peer_id(n: int) -> bytes:
    return bytes([n]) * 16


def every_pair(world: int) -> set[tuple[int, int]]:
    return set(itertools.combinations(range(world), 2))


@pytest.mark.parametrize("world", [2, 3, 4, 5, 8, 13, 15, 16])
def test_everybody_meets_everybody_in_the_fewest_rounds(world: int) -> None:
    rounds = measuring.rounds(world, every_pair(world))
    assert len(rounds) == world - 1 + world % 2
    assert sorted(itertools.chain.from_iterable(rounds)) == sorted(every_pair(world))


@pytest.mark.parametrize("seed", range(20))
def test_nobody_is_in_two_pairs_of_a_round_and_only_missing_pairs_are_measured(seed: int) -> None:
    rng = random.Random(seed)
    world = rng.randint(2, 40)
    missing = {pair for pair in every_pair(world) if rng.random() < 0.3}
    rounds = measuring.rounds(world, missing)
    met = list(itertools.chain.from_iterable(rounds))
    assert len(rounds) <= measuring.ROUNDS_MAX
    assert len(set(met)) == len(met) and set(met) <= missing
    assert len(rounds) == measuring.ROUNDS_MAX or set(met) == missing
    for pairs in rounds:
        ranks = list(itertools.chain.from_iterable(pairs))
        assert len(set(ranks)) == len(ranks) and pairs
        for rank in range(world):
            other = measuring.partner(pairs, rank)
            assert (other is not None) == (rank in ranks)
            assert other is None or measuring.partner(pairs, other) == rank


@pytest.mark.parametrize("world", [2, 3, 9, 10, 30])
def test_in_the_crowd_all_receive_from_as_many_as_they_send_to(world: int) -> None:
    crowds = [measuring.crowd(world, rank) for rank in range(world)]
    for rank, crowd in enumerate(crowds):
        assert len(set(crowd)) == len(crowd) == min(world - 1, measuring.CROWD_MAX) and rank not in crowd
        assert sum(rank in other for other in crowds) == len(crowd)


def test_a_host_is_as_fast_as_all_its_links_together_a_pair_as_it_was_alone() -> None:
    a, b, c = (peer_id(n) for n in (1, 2, 3))
    told = {
        a: Measured(1100, 900, 0, 0, (LinkMeasure(b, 100, 40, 20_000), LinkMeasure(c, 30, 25, 80_000))),
        b: Measured(0, 0, 0, 0, (LinkMeasure(a, 90, 50, 30_000), LinkMeasure(c, 30, 15, 0))),
        c: Measured(0, 800, 700, 0, (LinkMeasure(a, 60, 40, 60_000), LinkMeasure(b, 60, 50, 0))),
    }
    network = measuring.network((a, b, c), told)
    assert network is not None
    assert network.rate[0][1] == 100.0 and network.rate[1][0] == 90.0 and network.rate[1][2] == 30.0
    assert network.up == (100.0, 90.0, 90.0)  # c: 40 + 50 in the crowd, 60 alone
    assert network.down == (90.0, 100.0, 40.0)  # a: 50 + 40; b: 40 + 50, 100 alone; c: 25 + 15, 30 alone
    assert network.cpu == (Cpu(1100.0, 900.0), Cpu(), Cpu(UNKNOWN, 800.0, 700.0))
    assert network.delay[0] == (0.0, 0.01, 0.03) and network.delay[2][0] == 0.03
    assert network.delay[1][2] == 0.03  # not measured: the middle one of all that were


def test_hosts_behind_one_line_count_for_what_they_got_of_it_together() -> None:
    """a and b are in one place with 1000 between them and 40 to the world; c, d, e have 100 each."""
    peers = tuple(peer_id(n) for n in range(1, 6))

    def rates(i: int, j: int) -> tuple[int, int]:
        if {i, j} == {0, 1}:
            return 1000, 900
        if i < 2 or j < 2:
            return 40, 6  # alone; a sixth of the line in the crowd, as c, d, e get it the other way
        return 100, 40

    told = {
        peers[i]: Measured(0, 0, 0, 0, tuple(LinkMeasure(peers[j], *rates(i, j), 0) for j in range(5) if j != i))
        for i in range(5)
    }
    network = measuring.network(peers, told)
    assert network is not None
    assert set(network.bundles) == {(0, (2, 3, 4), 18.0), (1, (2, 3, 4), 18.0)}
    choice = topology.choose(network, 10**6)
    out = sum(choice.shares[i] + choice.shares[j] for i in (0, 1) for j in (2, 3, 4))
    assert choice.direct.pace >= out / 40  # the line carries all of it
    assert choice.shares[:2] == pytest.approx((0, 0)) and choice.direct.pace == pytest.approx(1 / 18)
    blind = topology.choose(replace(network, bundles=()), 10**6)
    assert blind.direct.pace < out / 40


def test_a_fast_line_is_as_fast_as_what_it_received_alone() -> None:
    """Three with 100 up each, which they divide among three in the crowd, and one with 400 both ways."""
    peers = tuple(peer_id(n) for n in range(1, 5))

    def told(received: int) -> dict[bytes, Measured]:
        slow = {peer: tuple(LinkMeasure(to, 100, 33, 0) for to in peers if to != peer) for peer in peers[:3]}
        fast = tuple(LinkMeasure(to, 400, 133, 0) for to in peers[:3])
        return {peer: Measured(0, 0, 0, 100, rows) for peer, rows in slow.items()} | {
            peers[3]: Measured(0, 0, 0, received, fast)
        }

    seen, crowd = measuring.network(peers, told(300)), measuring.network(peers, told(99))
    assert seen is not None and crowd is not None
    assert (seen.down[3], crowd.down[3]) == (300.0, 100.0)
    assert topology.choose(seen, 10**6).shares == (0, 0, 0, 1)
    assert topology.choose(crowd, 10**6).shares == (0.25,) * 4
    liar = measuring.network(peers, told(10**12))
    assert liar is not None and liar.down == seen.down  # no more than the others send it


def test_who_sends_most_receives_alone_and_nobody_to_whom_enough_came() -> None:
    assert measuring.may_take_more(400.0, 100.0) and not measuring.may_take_more(100.0, 90.0)
    assert measuring.fan_ins({0: 5.0, 2: 9.0, 1: 5.0}) == [2, 0]
    assert measuring.fan_ins({}) == []


def test_a_host_with_a_line_of_its_own_is_in_no_bundle() -> None:
    peers = tuple(peer_id(n) for n in range(1, 5))
    told = {
        peers[i]: Measured(0, 0, 0, 0, tuple(LinkMeasure(peers[j], 100, 30, 0) for j in range(4) if j != i))
        for i in range(4)
    }
    network = measuring.network(peers, told)
    assert network is not None and network.bundles == ()


def test_a_host_that_nobody_measured_counts_as_the_middle_one() -> None:
    peers = tuple(peer_id(n) for n in range(1, 5))
    told = {
        peers[0]: Measured(0, 0, 0, 0, (LinkMeasure(peers[1], 10, 0, 0), LinkMeasure(peers[2], 30, 0, 0))),
        peers[1]: Measured(0, 0, 0, 0, (LinkMeasure(peers[0], 20, 0, 0),)),
    }
    network = measuring.network(peers, told)
    assert network is not None
    assert network.down[:3] == (20.0, 10.0, 30.0) and network.down[3] == 20.0
    assert network.rate[3][0] == network.rate[0][3] == UNKNOWN
    assert all(math.isfinite(delay) for row in network.delay for delay in row)


def relayed_pairs(world: int, *pairs: tuple[int, int]) -> measuring.Network:
    """Who is named first in a pair has told of the relay; all was measured, at 100."""
    told = {
        peer_id(n): Measured(
            *(0,) * 4, tuple(LinkMeasure(peer_id(m), 100, 0, 0, 3 * ((n, m) in pairs)) for m in range(world) if m != n)
        )
        for n in range(world)
    }
    network = measuring.network(tuple(peer_id(n) for n in range(world)), told)
    assert network is not None
    return network


def test_a_relayed_pair_counts_as_none_while_others_can_own_everything() -> None:
    network = relayed_pairs(3, (2, 0))
    assert network.pair(0, 2) == network.rate[0][2] == network.rate[2][0] == 0.0
    assert network.pair(0, 1) == network.pair(1, 2) == 100.0
    assert network.up == network.down == (100.0,) * 3
    assert topology.choose(network, 10**5).shares == (0.0, 1.0, 0.0)  # the relay owns all


def test_where_everybody_is_in_a_relayed_pair_these_count_half() -> None:
    network = relayed_pairs(4, (0, 1), (3, 2))
    assert network.pair(0, 1) == network.pair(2, 3) == 50.0 and network.pair(1, 2) == 100.0
    assert math.isfinite(topology.choose(network, 10**5).direct.pace)


def test_of_strangers_and_of_itself_nobody_can_tell_anything() -> None:
    a, b, gone = (peer_id(n) for n in (1, 2, 9))
    assert measuring.network((a, b), {}) is None
    assert measuring.network((a, b), {a: Measured(0, 5, 0, 0, (LinkMeasure(gone, 10, 10, 10),))}) is None
    assert measuring.network((a, b), {gone: Measured(0, 5, 0, 0, (LinkMeasure(a, 10, 10, 10),))}) is None
    assert measuring.network((a, b), {a: Measured(0, 5, 0, 0, (LinkMeasure(a, 10, 10, 10),))}) is None


def test_a_rate_on_the_wire_is_bounded() -> None:
    assert [measuring.clip_rate(rate) for rate in (-1.0, 0.0, 12.9, 1e30)] == [0, 0, 12, 10**13]
