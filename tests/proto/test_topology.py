"""The planner: examples whose answer is known, and brute force on small networks. A seed is its test's id."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from scipy import optimize

from pyccl._proto import ring_order, shares, topology
from pyccl._proto.planning import plan_of
from pyccl._proto.topology import NEVER, UNKNOWN, Choice, Cpu, Line, Network

MBIT = 125_000.0  # bytes per second
MANY = 10_000_000


def network(
    up: list[float],
    down: list[float] | None = None,
    rate: list[list[float]] | None = None,
    delay: float | list[list[float]] = 0.01,
    fold: list[float] | None = None,
    move: list[float] | None = None,
    code: float = UNKNOWN,
) -> Network:
    world = len(up)
    rates = rate or [[UNKNOWN] * world for _ in range(world)]
    delays = delay if isinstance(delay, list) else [[delay] * world for _ in range(world)]
    unknown = [UNKNOWN] * world
    cpu = tuple(Cpu(*rates, code) for rates in zip(move or unknown, fold or unknown, strict=True))
    return Network(tuple(up), tuple(down or up), tuple(map(tuple, rates)), tuple(map(tuple, delays)), cpu)


def random_network(seed: int, world: int) -> Network:
    """Hosts on different lines, pairs that are slower than those in about half of the cases, slow processors too."""
    rng = random.Random(seed)
    up = [rng.choice([20, 50, 100, 400, 1000]) * rng.uniform(0.8, 1.2) for _ in range(world)]
    down = [rng.choice([50, 100, 400]) * rng.uniform(0.8, 1.2) for _ in range(world)]
    slow = rng.choice([0.0, 0.3, 0.8])
    rate = [
        [min(up[i], down[j]) * (rng.uniform(0.02, 0.9) if rng.random() < slow else 1.0) for j in range(world)]
        for i in range(world)
    ]
    delay = [[rng.uniform(0.0, 0.1) for _ in range(world)] for _ in range(world)]
    fold = [rng.uniform(50, 500) if rng.random() < 0.3 else UNKNOWN for _ in range(world)]
    move = [rng.uniform(20, 500) if rng.random() < 0.3 else UNKNOWN for _ in range(world)]
    return network(up, down, rate, delay, fold, move)


def parts(of: Network) -> tuple[list[float], list[list[float]]]:
    ranks = range(of.world)
    return [of.host(i) for i in ranks], [[of.pair(i, j) for j in ranks] for i in ranks]


def pace_by_corners(of: Network) -> float:
    """The linear program by trying every corner: N lines that hold with equality, and the sum."""
    hosts, pairs = parts(of)
    world = of.world
    lines: list[tuple[list[float], float]] = []  # a (s, T) <= b
    for i in range(world):
        unit = [float(k == i) for k in range(world)]
        lines.append(([*(-u for u in unit), 0.0], 0.0))
        lines.append(([*((world - 2) * u for u in unit), -hosts[i]], -1.0))
        move, fold = of.cpu[i].move, of.cpu[i].fold
        lines.append(([*((2 * (world - 2) / move + world / fold) * u for u in unit), -1.0], -2 / move))
        for j in [j for j in range(i) if pairs[i][j] < math.inf]:
            lines.append(([*(float(k in (i, j)) for k in range(world)), -pairs[i][j]], 0.0))  # noqa: PERF401
    total = ([1.0] * world + [0.0], 1.0)
    corners = [[total, *tight] for tight in itertools.combinations(lines, world)]
    a = np.array([[line for line, _ in corner] for corner in corners])
    b = np.array([[bound for _, bound in corner] for corner in corners])
    regular = np.abs(np.linalg.det(a)) > 1e-9
    points = np.linalg.solve(a[regular], b[regular][..., None])[..., 0]
    every, bounds = np.array([line for line, _ in lines]), np.array([bound for _, bound in lines])
    allowed = (points @ every.T <= bounds + 1e-9).all(axis=1)
    return float(points[allowed, -1].min())


def test_three_fast_hosts_and_a_home_line_beat_an_equal_ring_by_half() -> None:
    """The scenario `home`: three of 400/400 Mbit/s, one of 50/20."""
    home = network([400 * MBIT] * 3 + [20 * MBIT], [400 * MBIT] * 3 + [50 * MBIT])
    choice = topology.choose(home, MANY)
    assert choice.shares == (1.0, 0.0, 0.0, 0.0)  # one link has the slow line alone
    assert choice.direct.pace == pytest.approx(1 / (20 * MBIT))
    assert choice.ring_from_bytes == NEVER
    size = 64 << 20
    ring = topology.ring_line(home, range(4))
    assert ring.least_s(size) / choice.direct.least_s(size) == pytest.approx(1.5, rel=0.01)
    equal = topology.default(home)
    assert equal.direct.pace == pytest.approx(1.5 / (20 * MBIT))
    assert topology.is_better(choice, equal) and not topology.is_better(equal, choice)


def test_what_differs_by_noise_alone_is_shared_equally() -> None:
    """150 Mbit/s each, as losses let them be measured: without levels the second would own next to nothing."""
    up = [140 * MBIT, 103 * MBIT, 141 * MBIT]
    rate = [[min(up[i], up[j]) for j in range(3)] for i in range(3)]
    noisy = network(up, rate=rate)
    assert min(shares.best_shares(*parts(noisy), noisy.works(), MANY)) < 0.1
    choice = topology.choose(noisy, MANY)
    assert choice.shares == pytest.approx((1 / 3,) * 3)
    assert choice.direct.pace == topology.default(noisy).direct.pace


@pytest.mark.parametrize("seed", range(20))
def test_plan_of_rates_within_noise_has_equal_shares(seed: int) -> None:
    rng = random.Random(seed)
    up = [100 * MBIT * rng.uniform(0.72, 1.0) for _ in range(rng.randint(3, 6))]
    assert topology.choose(network(up), MANY).shares == shares.equal_shares(len(up))


def test_who_has_room_for_it_owns_as_much_as_each_other_who_has() -> None:
    """At the pace of the slowest the second has room for a twentieth, the others for more than they need."""
    of = network([100.0, 200.0, 90.0, 30.0, 34.5])
    found = shares.best_shares(*parts(of), of.works(), MANY)
    assert shares.direct_pace(*parts(of), of.works(), found) == pytest.approx(1 / 30)
    assert found == pytest.approx((0.95 / 3, 0.95 / 3, 0.95 / 3, 0.0, 0.05))


@pytest.mark.parametrize(
    ("up", "slow_pair", "owners"),
    [
        ([400.0, 400.0, 400.0, 20.0], 20.0, (1.0, 0.0, 0.0, 0.0)),
        ([100.0, 100.0, 100.0, 20.0], 20.0, (0.5, 0.5, 0.0, 0.0)),  # one alone would be busy for 3/5 of the time
        ([400.0, 400.0, 400.0, 20.0], 19.0, (0.0, 1.0, 0.0, 0.0)),  # the link to the first is the slower one
        ([50.0, 50.0, 50.0, 20.0], 20.0, (1 / 3, 1 / 3, 1 / 3, 0.0)),  # none has half its time to spare
    ],
)
def test_for_a_slow_host_as_few_own_as_have_the_time(
    up: list[float], slow_pair: float, owners: tuple[float, ...]
) -> None:
    rate = [[UNKNOWN] * 4 for _ in range(4)]
    for rank in range(3):
        rate[rank][3] = rate[3][rank] = 20.0
    rate[0][3] = slow_pair
    choice = topology.choose(network(up, rate=rate), MANY)
    assert choice.shares == pytest.approx(owners) and choice.direct.pace == pytest.approx(1 / 20)


@pytest.mark.parametrize("seed", range(150))
def test_shares_are_as_fast_as_another_solver_s(seed: int) -> None:
    """Up to 12 uneven hosts, slow pairs, slow processors and shared lines, against scipy's HiGHS."""
    rng = random.Random(f"oracle {seed}")
    of = random_network(rng.getrandbits(32), rng.randint(3, 12))
    hosts, pairs = parts(of)
    world = of.world
    lines, bounds = [], []
    for i in range(world):
        unit = np.eye(world)[i]
        lines.append([*((world - 2) * unit), -hosts[i]])
        bounds.append(-1.0)
        move, fold = of.cpu[i].move, of.cpu[i].fold
        lines.append([*((2 * (world - 2) / move + world / fold) * unit), -1.0])
        bounds.append(-2 / move)
        for j in range(i):
            lines.append([*(unit + np.eye(world)[j]), -pairs[i][j]])
            bounds.append(0.0)
    bundles = []
    for i in range(world):
        others = [j for j in range(world) if j != i]
        if rng.random() < 0.3:
            bundles.append((i, tuple(rng.sample(others, rng.randint(1, world - 1))), rng.uniform(5, 100)))
    for i, others, rate in bundles:
        lines.append([*(len(others) * np.eye(world)[i] + sum(np.eye(world)[j] for j in others)), -rate])
        bounds.append(0.0)
    cost = [0.0] * world + [1.0]
    solved = optimize.linprog(cost, lines, bounds, [[1.0] * world + [0.0]], [1.0], method="highs")
    assert solved.status == 0
    found = shares.best_shares(hosts, pairs, of.works(), MANY, bundles)
    assert sum(found) == pytest.approx(1.0) and min(found) >= 0
    pace = shares.direct_pace(hosts, pairs, of.works(), found, bundles)
    assert solved.fun * (1 - 1e-6) <= pace <= solved.fun * (1 + 1e-5)


def test_what_is_begun_and_not_finished_comes_back_late_and_short_pieces_make_it_little() -> None:
    home = network([400 * MBIT] * 3 + [20 * MBIT], [400 * MBIT] * 3 + [50 * MBIT])
    shares = topology.choose(home, MANY).shares
    long, short = (topology.direct_line(home, shares, piece) for piece in (topology.PIECE_BYTES, 1 << 14))
    assert long.pace == short.pace and long.delay_s == short.delay_s
    assert long.lag_bytes == 16 * short.lag_bytes == topology.LANES_LEAST * 3 * topology.PIECE_BYTES
    size = 1 << 20  # all its pieces are under way at once: it goes to the owners, and then comes back
    assert long.seconds(size) == pytest.approx(long.delay_s + size / (20 * MBIT) + size / (50 * MBIT))
    assert topology.best_piece(home) == 1 << 14
    assert topology.best_piece(network([1000 * MBIT] * 4)) == topology.PIECE_BYTES
    assert topology.best_piece(network([UNKNOWN] * 4)) == topology.PIECE_BYTES
    assert topology.best_piece(network([80 * MBIT] * 4)) == 1 << 16


def test_plan_that_only_has_shorter_pieces_is_better_where_lines_are_slow() -> None:
    slow, fast = network([20 * MBIT] * 4), network([1000 * MBIT] * 4)
    found = topology.choose(slow, MANY)
    assert found.shares == pytest.approx((0.25,) * 4) and topology.is_better(found, topology.default(slow))
    assert not topology.is_better(topology.choose(fast, MANY), topology.default(fast))


def test_equal_hosts_get_equal_shares_and_no_ring() -> None:
    choice = topology.choose(network([100.0] * 5), MANY)
    assert choice.shares == pytest.approx((0.2,) * 5)
    assert choice.direct.pace == pytest.approx(1.6 / 100)
    assert choice.ring_from_bytes == NEVER


def test_for_a_host_that_is_too_slow_for_any_share_the_fastest_owns_all() -> None:
    choice = topology.choose(network([10.0, 100.0, 300.0]), MANY)
    assert choice.direct.pace == pytest.approx(1 / 10)
    assert choice.shares == (0.0, 0.0, 1.0)


def test_slow_pair_owns_little_although_both_its_hosts_are_fast() -> None:
    rate = [[100.0] * 4 for _ in range(4)]
    rate[0][1] = rate[1][0] = 5.0
    choice = topology.choose(network([100.0] * 4, rate=rate), MANY)
    pace = choice.direct.pace
    assert pace == pytest.approx(pace_by_corners(network([100.0] * 4, rate=rate)))
    assert (choice.shares[0] + choice.shares[1]) / 5.0 <= pace * (1 + 1e-6)
    assert choice.shares[2] == pytest.approx(choice.shares[3])


def test_host_that_folds_slowly_owns_less() -> None:
    choice = topology.choose(network([100.0] * 4, fold=[10.0, UNKNOWN, UNKNOWN, UNKNOWN]), MANY)
    assert choice.shares[0] < 0.05 < choice.shares[1]
    assert choice.direct.pace == pytest.approx(pace_by_corners(network([100.0] * 4, fold=[10.0, *[UNKNOWN] * 3])))


def test_host_that_moves_little_in_a_second_owns_less() -> None:
    """Its line would carry as much as the others'; all that it sends and receives goes through one thread."""
    of = network([100.0] * 4, move=[120.0, *[UNKNOWN] * 3])
    choice = topology.choose(of, MANY)
    assert choice.shares[0] < 0.15 < choice.shares[1]
    assert choice.direct.pace == pytest.approx(pace_by_corners(of))


def test_with_a_codec_less_goes_over_the_lines_and_processors_code_it() -> None:
    shares_ = (1 / 3,) * 3
    lines = topology.direct_line(network([100.0] * 3), shares_)
    fast = topology.direct_line(network([100.0] * 3, code=1e9), shares_, part=topology.CODED)
    assert fast.pace == pytest.approx(topology.CODED * lines.pace)
    slow = topology.direct_line(network([100.0] * 3, code=20.0), shares_, part=topology.CODED)
    assert slow.pace == pytest.approx(3 / 20)  # input and sum coded: 1; all of an own third and the others' sums: 2
    pair = topology.direct_line(network([100.0] * 2, code=20.0), (0.5, 0.5), part=topology.CODED)
    assert pair.pace == pytest.approx(3 / 20)


def test_plan_that_is_far_slower_with_a_codec_is_not_better() -> None:
    def taking(raw: float, coded: float) -> Choice:
        return Choice((1.0,), (0,), NEVER, Line(raw, 0.0), Line(raw, 0.0), coded=Line(coded, 0.0))

    assert topology.is_better(taking(0.5, 1.05), taking(1.0, 1.0))
    assert not topology.is_better(taking(0.5, 1.2), taking(1.0, 1.0))


def test_where_everybody_lacks_a_link_direct_is_impossible_and_the_ring_goes_round_them() -> None:
    rate = [[100.0] * 5 for _ in range(5)]
    rate[0][1] = rate[1][0] = rate[2][3] = rate[3][4] = 0.0
    choice = topology.choose(network([100.0] * 5, rate=rate), MANY)
    assert choice.direct.pace == math.inf and choice.shares == shares.equal_shares(5)
    assert choice.ring_from_bytes == 0.0 and choice.algorithm(1) == "ring"
    hops = ring_order.ring_hops(choice.order)
    assert not {(0, 1), (1, 0), (2, 3), (3, 4)} & set(hops)
    assert math.isfinite(choice.seconds(1000))


@pytest.mark.parametrize("world", [3, 4, 7])
@pytest.mark.parametrize("effort", [0, MANY])
def test_of_two_without_a_link_neither_owns_anything(world: int, effort: int) -> None:
    rate = [[100.0] * world for _ in range(world)]
    rate[0][2] = rate[2][0] = 0.0
    choice = topology.choose(network([100.0] * world, rate=rate), effort)
    assert choice.shares[0] == choice.shares[2] == 0.0
    assert sum(choice.shares) == pytest.approx(1) and choice.direct.pace == pytest.approx(2 / 100)
    assert plan_of(choice).shares[0] == 0
    if world > 3:
        assert not {(0, 2), (2, 0)} & set(ring_order.ring_hops(choice.order))


@pytest.mark.parametrize("seed", range(20))
def test_the_others_share_as_the_program_without_the_two_would(seed: int) -> None:
    """Hosts, pairs and folds of all kinds: no split of the vector among those that may own is faster."""
    rng = random.Random(seed)
    world = rng.randint(4, 6)
    hosts = [rng.uniform(10, 100) for _ in range(world)]
    rate = [[rng.uniform(5, 100) for _ in range(world)] for _ in range(world)]
    fold = [rng.uniform(50, 200) for _ in range(world)]
    rate[0][1] = 0.0
    of = network(hosts, rate=rate, fold=fold)
    found = topology.choose(of, MANY)
    assert found.shares[:2] == (0.0, 0.0)
    for _ in range(300):
        parts = [rng.random() ** 3 for _ in range(world - 2)]
        other = (0.0, 0.0, *(part / sum(parts) for part in parts))
        assert topology.direct_line(of, other).pace >= found.direct.pace * (1 - 1e-6)


def test_ring_wins_from_the_size_on_where_slow_pairs_can_be_left_out() -> None:
    """Two sites with one slow pair line each between every two hosts of different sites, but for two good ones."""
    fast, slow = 1000.0, 10.0
    rate = [[fast if (i < 3) == (j < 3) else slow for j in range(6)] for i in range(6)]
    rate[0][3] = rate[3][0] = rate[2][5] = rate[5][2] = fast
    choice = topology.choose(network([fast] * 6, rate=rate, delay=0.05), MANY)
    assert choice.ring.pace == pytest.approx(2 * 5 / 6 / fast)
    assert 0 < choice.ring_from_bytes < NEVER
    at, left = choice.ring_from_bytes, 1 - topology.RING_GAIN_LEAST
    assert choice.ring.seconds(at) <= choice.direct.seconds(at) * left
    assert choice.ring.seconds(at - 2) > choice.direct.seconds(at - 2) * left
    assert (choice.algorithm(at / 2), choice.algorithm(at * 2)) == ("direct", "ring")


@pytest.mark.parametrize(("seen", "rings"), [(40.0, False), (30.0, False), (5.0, True)])
def test_ring_must_gain_more_than_one_pair_that_was_measured_badly_makes_of_it(seen: float, rings: bool) -> None:
    """All alike, but one pair seemed slow one way: direct needs it, a ring goes round the other way."""
    rate = [[125.0] * 3 for _ in range(3)]
    rate[0][1] = seen
    choice = topology.choose(network([125.0] * 3, rate=rate), MANY)
    assert choice.ring.pace < choice.direct.pace
    assert (choice.ring_from_bytes < NEVER) is rings


def test_two_members_swap_and_one_waits_for_nobody() -> None:
    pair = topology.choose(network([100.0, 50.0], delay=0.1), MANY)
    assert (pair.shares, pair.direct, pair.ring_from_bytes) == ((0.5, 0.5), Line(0.2, 1 / 50), NEVER)
    assert topology.choose(network([100.0]), MANY).seconds(1 << 30) == 0.0


def test_nothing_measured_is_equal_shares_in_no_time() -> None:
    choice = topology.choose(network([UNKNOWN] * 4, delay=0.0), MANY)
    assert (choice.shares, choice.seconds(1 << 30)) == (shares.equal_shares(4), 0.0)


def test_a_little_better_is_not_better() -> None:
    def taking(seconds: float) -> Choice:
        return Choice((1.0,), (0,), NEVER, Line(seconds, 0.0), Line(seconds, 0.0))

    assert not topology.is_better(taking(0.92), taking(1.0))
    assert topology.is_better(taking(0.89), taking(1.0))
    assert not topology.is_better(taking(math.inf), taking(math.inf))


@pytest.mark.parametrize("seed", range(60))
def test_shares_are_as_fast_as_the_best_corner(seed: int) -> None:
    of = random_network(seed, 5 if seed % 20 == 0 else 3 + seed % 2)
    hosts, pairs = parts(of)
    found = shares.best_shares(hosts, pairs, of.works(), MANY)
    assert sum(found) == pytest.approx(1.0) and min(found) >= 0
    assert shares.direct_pace(hosts, pairs, of.works(), found) == pytest.approx(pace_by_corners(of), rel=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_closed_form_is_the_linear_program_where_hosts_alone_count(seed: int) -> None:
    rng = random.Random(seed)
    of = network([rng.uniform(1, 100) for _ in range(3 + seed % 2)])
    hosts, pairs = parts(of)
    pace = max(1 / min(hosts), (2 * of.world - 2) / sum(hosts))
    found = shares.best_shares(hosts, pairs, of.works(), effort=0)
    assert shares.direct_pace(hosts, pairs, of.works(), found) == pytest.approx(pace)
    assert pace == pytest.approx(pace_by_corners(of))


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("effort", [0, 500, MANY])
def test_ring_against_every_order(seed: int, effort: int) -> None:
    """Exact with enough effort; with little of it a tour all the same, never better than the best."""
    of = random_network(seed, 3 + seed % 5)
    ranks = range(of.world)
    rates = [[of.hop(i, j) for j in ranks] for i in ranks]
    found = ring_order.best_ring(rates, of.delay, effort)
    assert sorted(found) == list(ranks) and found[0] == 0
    costs = [ring_order.ring_cost(rates, of.delay, (0, *rest)) for rest in itertools.permutations(range(1, of.world))]
    got = ring_order.ring_cost(rates, of.delay, found)
    if effort == MANY:
        assert got == pytest.approx(min(costs))
    else:
        assert got[0] >= min(costs)[0]


@pytest.mark.parametrize("seed", range(8))
def test_local_search_finds_the_fast_tour_hidden_among_slow_hops(seed: int) -> None:
    """Beyond what is searched exactly: one tour of fast hops, and noise."""
    rng = random.Random(seed)
    world = 24
    hidden = list(range(world))
    rng.shuffle(hidden)
    rates = [[rng.uniform(1, 20) for _ in range(world)] for _ in range(world)]
    for i, j in ring_order.ring_hops(hidden):
        rates[i][j] = 100.0
    delays = [[0.01] * world for _ in range(world)]
    found = ring_order.best_ring(rates, delays, MANY)
    assert ring_order.ring_cost(rates, delays, found)[0] == 1 / 100
    assert found == ring_order.best_ring(rates, delays, MANY)


@pytest.mark.parametrize("seed", range(8))
def test_local_search_shortens_the_trips_without_a_slower_hop(seed: int) -> None:
    """Members on a circle of equal lines: the way round it is the shortest tour."""
    rng = random.Random(seed)
    world = 16
    places = [rng.random() for _ in range(world)]
    delays = [[min(abs(a - b), 1 - abs(a - b)) for b in places] for a in places]
    rates = [[100.0] * world for _ in range(world)]
    found = ring_order.best_ring(rates, delays, MANY)
    round_it = sorted(range(world), key=lambda i: places[i])
    shortest = ring_order.ring_cost(rates, delays, round_it)[1]
    assert ring_order.ring_cost(rates, delays, found)[1] <= 1.1 * shortest


@pytest.mark.parametrize("effort", [0, 1000, 100_000])
def test_little_effort_still_gives_a_plan_of_many_members(effort: int) -> None:
    of = random_network(7, 64)
    choice = topology.choose(of, effort)
    assert sum(choice.shares) == pytest.approx(1.0) and min(choice.shares) >= 0
    assert sorted(choice.order) == list(range(64))
    assert choice.direct.pace <= topology.default(of).direct.pace
    assert choice == topology.choose(of, effort)


def test_few_connections_are_as_many_as_have_a_piece_under_way_for_no_longer_than_that() -> None:
    assert topology.few(2.5e6, 0.04) == topology.LANES_LEAST == 2
    assert topology.few(20e6, 0.04) == 8  # eight flows of 20 Mbit/s keep their connections
    assert topology.few(20e6, 0.15) > 20
    assert topology.few(1.0, 0.0) == 2
