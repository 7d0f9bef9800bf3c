"""Fewer connections where they do: each member decides by itself, from what all have told, and all must agree."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from pyccl._io import measure
from pyccl._proto import measuring, topology

MANY = 8
TIMEOUT_S = 30.0
SLOW, FAST = 2.5e6, 50e6


class Lab:
    """Lines between members, as threads: what the probe of one sees depends on how many connections it uses."""

    def __init__(self, world: int, rate: Callable[[int, int, int], float]) -> None:
        """rate: (from, to, connections) -> bytes per second."""
        self.world, self.rate = world, rate
        self.members = tuple(bytes([n]) * 16 for n in range(world))
        self.uses = {(i, j): MANY for i in range(world) for j in range(world)}
        self.first: dict[tuple[int, int], float] = {}  # (from, to) where the first round saw something else than `rate`
        self.seen: dict[int, dict[int, float]] = {}  # from whom, to whom: in the end
        self.probed: list[tuple[int, int]] = []  # from, to
        self.told: dict[int, list[bytes]] = {}
        self.barrier = threading.Barrier(world)
        self.failed: list[BaseException] = []
        self.until = [math.inf] * world  # when a member is late

    def gather(self, rank: int, mine: bytes) -> tuple[tuple[bytes, ...], list[bytes]]:
        turns = self.told.setdefault(rank, [])
        turns.append(mine)
        self.barrier.wait(TIMEOUT_S)
        return self.members, [self.told[other][len(turns) - 1] for other in range(self.world)]

    def run(self, gather: Callable[[int, bytes], Any] | None = None) -> None:
        def member(rank: int) -> None:
            others = [j for j in range(self.world) if j != rank]
            rates = {j: self.first.get((rank, j), self.rate(rank, j, MANY)) for j in others}
            seen = {self.members[j]: (rate, 0.02) for j, rate in rates.items()}
            ask = gather or self.gather
            try:
                measure._again(
                    Probe(self, rank), lambda mine, _: ask(rank, mine), self.members, seen, self.until[rank], math.inf
                )
                self.seen[rank] = {peer[0]: rate for peer, (rate, _) in seen.items()}
            except (ConnectionError, threading.BrokenBarrierError) as error:
                self.failed.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=member, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


class Probe(measure._Probe):
    def __init__(self, lab: Lab, rank: int) -> None:
        self.lab, self.rank = lab, rank

    @property
    def me(self) -> bytes:
        return self.lab.members[self.rank]

    def conns(self, peer: bytes) -> int:
        return MANY

    def use(self, peer: bytes, count: int) -> None:
        self.lab.uses[self.rank, peer[0]] = count or MANY

    def rates(self, peers: Any, rtt_s: float) -> list[float]:
        (peer,) = peers
        self.lab.probed.append((self.rank, peer[0]))
        return [self.lab.rate(self.rank, peer[0], self.lab.uses[self.rank, peer[0]])]


def of_hosts(up: list[float], down: list[float]) -> Callable[[int, int, int], float]:
    return lambda i, j, conns: min(up[i], down[j])


def test_slow_links_get_by_with_few_connections_and_fast_ones_keep_theirs() -> None:
    lab = Lab(4, of_hosts([FAST, FAST, FAST, SLOW], [FAST, FAST, FAST, SLOW]))
    lab.run()
    assert not lab.failed
    for (i, j), use in lab.uses.items():
        assert use == (topology.few(SLOW, 0.02) if i != j and 3 in (i, j) else MANY), (i, j)
    assert sorted(lab.probed) == sorted([(i, 3) for i in range(3)] + [(3, i) for i in range(3)])


def test_pair_that_does_better_with_fewer_counts_as_it_then_does() -> None:
    """A pace that was too low rises from round to round: what was seen first is no rate of the line."""
    lab = Lab(3, of_hosts([SLOW] * 3, [SLOW] * 3))
    lab.first = {(0, 1): 0.2 * SLOW, (1, 0): 1.2 * SLOW}
    lab.run()
    assert not lab.failed
    assert lab.seen[0][1] == SLOW and lab.seen[1][0] == 1.2 * SLOW
    assert lab.uses[0, 1] == topology.LANES_LEAST and lab.uses[1, 0] == MANY


def test_who_is_slower_with_fewer_gets_them_all_back() -> None:
    """A line that limits each flow: three of the links alone are as fast with few."""
    lab = Lab(3, lambda i, j, conns: conns * SLOW / MANY if 0 in (i, j) else SLOW)
    lab.run()
    assert not lab.failed
    assert lab.uses[1, 2] == lab.uses[2, 1] == topology.LANES_LEAST
    assert all(lab.uses[i, j] == MANY for i, j in ((0, 1), (1, 0), (0, 2), (2, 0)))


def test_pair_that_looks_odd_measures_again_as_it_is_and_the_better_figure_counts() -> None:
    """What was seen from 0 to 1 was a busy processor; what is seen again from 1 to 0 is less than before."""
    lab = Lab(4, of_hosts([FAST] * 4, [FAST] * 4))
    lab.first = {(0, 1): 0.45 * FAST, (1, 0): 1.1 * FAST, (2, 3): 0.7 * FAST}
    lab.run()
    assert not lab.failed
    assert sorted(lab.probed) == [(0, 1), (1, 0)]
    assert set(lab.uses.values()) == {MANY}
    assert lab.seen[0][1] == FAST and lab.seen[1][0] == 1.1 * FAST and lab.seen[2][3] == 0.7 * FAST


def test_where_nothing_is_slow_there_is_one_gather_and_no_round() -> None:
    lab = Lab(3, of_hosts([FAST] * 3, [FAST] * 3))
    lab.run()
    assert not lab.failed and not lab.probed
    assert {len(turns) for turns in lab.told.values()} == {1}


def test_where_one_is_late_nobody_begins_another_round_and_all_keep_their_connections() -> None:
    lab = Lab(4, of_hosts([SLOW] * 4, [SLOW] * 4))
    lab.until[2] = -math.inf
    lab.run()
    assert not lab.failed and not lab.probed
    assert {len(turns) for turns in lab.told.values()} == {2}
    assert set(lab.uses.values()) == {MANY}


@pytest.mark.parametrize("deadline_s", [math.inf, 1.0])
def test_who_sent_far_more_than_came_receives_alone_if_there_is_time(deadline_s: float) -> None:
    """Three lines of 100 up; 0 and 3 sent more, 3 most."""
    deadline = time.monotonic() + deadline_s
    lab = Lab(4, of_hosts([FAST] * 4, [FAST] * 4))
    sent, crowd, alone = [120.0, 100.0, 100.0, 400.0], [60.0, 90.0, 100.0, 99.0], [50.0, 0.0, 0.0, 300.0]
    order: list[int] = []
    came: dict[int, float] = {}

    class Receiver(Probe):
        def __init__(self, rank: int) -> None:
            super().__init__(lab, rank)
            self.came = crowd[rank]

        def rates(self, peers: Any, rtt_s: float, *, receives_alone: bool = False) -> list[float]:
            assert receives_alone and list(peers) == [peer for peer in lab.members if peer != self.me]
            order.append(self.rank)
            self.came = alone[self.rank]
            return []

    def member(rank: int) -> None:
        others = [peer for peer in lab.members if peer != lab.members[rank]]
        gather = partial(lab.gather, rank)
        came[rank] = measure._received(
            Receiver(rank), lambda mine, _: gather(mine), lab.members, others, 0.02, sent[rank], math.inf, deadline
        )

    threads = [threading.Thread(target=member, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if deadline_s < math.inf:
        assert order == [] and set(came.values()) == {0.0}
    else:
        assert order == [3, 0] and came == {0: 50.0, 1: 0.0, 2: 0.0, 3: 300.0}
        assert {len(turns) for turns in lab.told.values()} == {3}


@pytest.mark.parametrize("fails_at", [2, 3, 4])
def test_what_was_not_seen_to_be_enough_is_taken_back_when_it_fails(fails_at: int) -> None:
    """At one of the three rounds. What was seen before that stays; a last round some have ended, others not."""
    lab = Lab(4, of_hosts([SLOW] * 4, [SLOW] * 4))

    def gather(rank: int, mine: bytes) -> Any:
        if len(lab.told.get(rank, [])) == fails_at - 1:
            raise ConnectionError("lost")
        return lab.gather(rank, mine)

    lab.run(gather)
    every = [(i, j) for j in range(4) for i in range(j)]
    at = {pair: k for k, pairs in enumerate(measuring.rounds(4, every)) for pair in pairs}
    assert len(lab.failed) == 4
    for (i, j), use in lab.uses.items():
        number = at.get((min(i, j), max(i, j)), fails_at)
        allowed = {topology.LANES_LEAST} if number < fails_at - 3 else {MANY}
        assert use in allowed or number == fails_at - 3, (i, j)


def test_numbers_that_are_none_are_not_used() -> None:
    """A row of another member may hold any bytes."""
    used: list[tuple[bytes, int]] = []

    class Session:
        class config:  # noqa: N801
            connections = None

        def slot_of(self, peer: bytes) -> int:
            return 7

        def need_engine(self) -> Any:
            class Engine:
                def use(self, slot: int, count: int) -> None:
                    used.append((bytes([slot]), count))

            return Engine()

    session: Any = Session()
    probe = measure._Probe(session, {}, lambda: None)
    for count in (0, 1, 64, 65, 255):
        probe.use(b"p" * 16, count)
    assert used == [(b"\7", 0), (b"\7", 1), (b"\7", 64)]
    session.config.connections = 4
    probe.use(b"p" * 16, 2)
    assert len(used) == 3  # the user has said how many


def curve_of(rates: list[tuple[float, float]]) -> tuple[measure.Curve, float]:
    """After so many seconds each at so many bytes per second, looked at every 20 ms; and when that is over."""
    now, count = 100.0, 0.0
    curve = measure.Curve(now, 0)
    for seconds, rate in rates:
        for _ in range(round(seconds / 0.02)):
            now += 0.0201
            count += 0.0201 * rate
            curve.add(now, int(count), 0.09)
    return curve, now


SLOW_START = [(0.1, 1e6), (0.1, 2e6), (0.1, 4e6), (0.1, 8e6), (0.1, 16e6), (0.1, 32e6)]


def test_what_connections_rise_from_is_not_steady() -> None:
    """Two parts of 0.4 s made about as much: one ends in the line's rate, in the next losses are repaired."""
    lossy = [*SLOW_START, (0.1, 50e6), (0.1, 10e6), (0.3, 25e6)]
    curve, now = curve_of(lossy)
    before, last = curve.rate(now - 0.8, now - 0.4), curve.rate(now - 0.4, now)
    assert 0.75 * max(before, last) < min(before, last)
    assert not curve.is_steady(now, 0.4)
    curve, now = curve_of([*lossy, (1.4, 40e6)])
    assert curve.is_steady(now, 0.4)
    assert curve.rate(*measure.best_time([curve], 0.8)) == pytest.approx(40e6, rel=0.05)


def test_line_that_is_slow_from_the_start_has_risen_at_once() -> None:
    curve, now = curve_of([(1.2, 2e6)])
    assert curve.risen_at < now - 1.1 and curve.is_steady(now, 0.3)
    assert curve.rate(*measure.best_time([curve], 0.4)) == pytest.approx(2e6, rel=0.05)


def test_pace_that_still_rises_is_not_steady() -> None:
    """By six percent in each part, as senders do that were paced below what the line takes."""
    climb = [(0.4, 20e6 * 1.06**n) for n in range(4)]
    curve, now = curve_of([(0.1, 20e6), *climb])
    assert not curve.is_steady(now, 0.4)
    curve, now = curve_of([(0.1, 20e6), *((seconds, 20e6) for seconds, _ in climb)])
    assert curve.is_steady(now, 0.4)


def test_who_is_asked_for_nothing_more_is_over() -> None:
    curve, now = curve_of([(1.0, 20e6), (0.5, 0.0)])
    assert curve.is_over(now, 0.4) and not curve.is_steady(now, 0.4)
    curve, now = curve_of([(1.0, 20e6), (0.5, 3e6)])
    assert not curve.is_over(now, 0.4)


def test_links_that_take_turns_on_a_line_make_what_it_carries_together() -> None:
    """Each at its best makes three quarters of the line; both at the same time the line."""
    a, _ = curve_of([(0.5, 30e6), (0.5, 10e6)])
    b, _ = curve_of([(0.5, 10e6), (0.5, 30e6)])
    since, until = measure.best_time([a, b], 0.5)
    assert a.rate(since, until) + b.rate(since, until) == pytest.approx(40e6, rel=0.01)
