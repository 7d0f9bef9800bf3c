"""Plans at safe points: what members measured leads to a search, and its plan to the next epoch if it is better."""

from __future__ import annotations

from typing import Any

import pytest
from test_master import World, group_of, incarnation, peer_id

from pyccl._proto import limits, planning, topology
from pyccl._proto import master as mm
from pyccl._proto.messages import Arrive, EpochPropose, LinkMeasure, Measured, Ready, Rejected, Unreachable
from pyccl._proto.plan import NO_PLAN, decode_untrusted

FAST, SLOW = 50_000_000, 2_500_000


class Planned(World):
    """A world that keeps the searches, for the test to end."""

    searches: list[mm.Search]

    def do(self, effects: list[mm.Effect]) -> None:
        self.searches += [effect for effect in effects if isinstance(effect, mm.Search)]
        super().do(effects)

    def end(self, search: mm.Search) -> planning.Found:
        found = planning.search(search.job)
        self.do(self.master.planned(search.group, search.ticket, found, self.now))
        return found


def planned(members: int) -> Planned:
    world = group_of(members)
    world.__class__ = Planned
    assert isinstance(world, Planned)
    world.searches = []
    world.forget()
    return world


def measured(members: int, me: int, rate: dict[int, int]) -> Measured:
    """Everybody sends at its own rate, as `me` receives it: alone, and a third of it in the crowd."""
    others = [n for n in range(1, members + 1) if n != me]
    links = tuple(LinkMeasure(peer_id(n), rate[n], rate[n] // len(others), 40_000) for n in others)
    return Measured(10**10, 10**10, 10**9, 0, links)


def tell_all(world: Planned, members: int, rate: dict[int, int]) -> None:
    for n in range(1, members + 1):
        world.say(n, measured(members, n, rate))


def arrive_all(world: Planned, members: int, epoch: int) -> None:
    for n in range(1, members + 1):
        world.say(n, Arrive(epoch))


HOME = {1: FAST, 2: FAST, 3: FAST, 4: SLOW}


def parts(data: bytes, world: int) -> list[float]:
    weights = decode_untrusted(data, world).shares or (1,) * world
    return [weight / sum(weights) for weight in weights]


def logged(world: Planned) -> list[dict[str, Any]]:
    return [fields for event, fields in world.logs if event == "plan_found"]


def test_safe_point_waits_for_the_plan_and_the_slow_line_owns_nothing() -> None:
    world = planned(4)
    tell_all(world, 4, HOME)
    arrive_all(world, 4, 2)
    assert not world.got(1, EpochPropose)
    (search,) = world.searches
    world.end(search)
    proposal = world.last(1, EpochPropose)
    assert parts(proposal.epoch.plan, 4) == [1.0, 0.0, 0.0, 0.0]
    (fields,) = logged(world)
    assert fields["adopt"] is True and fields["predicted_s"] == pytest.approx(fields["present_s"] / 1.5, rel=0.1)
    assert fields["algorithm"] == "direct"
    assert fields["piece_bytes"] == decode_untrusted(proposal.epoch.plan, 4).piece_bytes == 1 << 14
    world.ready(1, 2, 3, 4)
    assert world.epoch().plan == proposal.epoch.plan


def test_plan_stays_at_safe_points_without_news_and_is_not_searched_for_again() -> None:
    world = planned(4)
    tell_all(world, 4, HOME)
    arrive_all(world, 4, 2)
    world.end(world.searches[0])
    world.ready(1, 2, 3, 4)
    first = world.epoch()
    arrive_all(world, 4, 3)
    world.ready(1, 2, 3, 4)
    assert world.epoch().number == 4 and world.epoch().plan == first.plan
    assert len(world.searches) == 1 and len(logged(world)) == 1


def test_plan_that_predicts_no_gain_is_not_adopted() -> None:
    world = planned(4)
    tell_all(world, 4, dict.fromkeys(range(1, 5), FAST))
    arrive_all(world, 4, 2)
    found = world.end(world.searches[0])
    assert not topology.is_better(found.best, found.present)
    assert world.last(1, EpochPropose).epoch.plan == NO_PLAN
    assert [fields["adopt"] for fields in logged(world)] == [False]


def test_safe_point_waits_no_longer_than_a_while_and_a_late_plan_is_for_the_next() -> None:
    world = planned(4)
    tell_all(world, 4, HOME)
    arrive_all(world, 4, 2)
    world.pass_time(planning.AWAITED_S + 0.2, beating=(1, 2, 3, 4))
    assert world.last(1, EpochPropose).epoch.plan == NO_PLAN
    world.ready(1, 2, 3, 4)
    assert world.epoch().plan == NO_PLAN
    world.end(world.searches[0])
    arrive_all(world, 4, 3)
    assert world.last(1, EpochPropose).epoch.plan != NO_PLAN
    assert len(world.searches) == 1


def test_answer_to_an_older_search_has_no_effect() -> None:
    world = planned(4)
    tell_all(world, 4, HOME)
    arrive_all(world, 4, 2)
    tell_all(world, 4, dict.fromkeys(range(1, 5), FAST))
    world.end(world.searches[0])
    assert not world.got(1, EpochPropose)
    world.end(world.searches[-1])
    assert world.last(1, EpochPropose).epoch.plan == NO_PLAN


def test_member_that_tells_something_new_all_the_time_holds_up_nobody() -> None:
    world = planned(4)
    tell_all(world, 4, HOME)
    arrive_all(world, 4, 2)
    for n in range(round(planning.AWAITED_S * 10) + 2):
        world.say(1, measured(4, 1, {**HOME, 4: SLOW + n}))
        world.pass_time(0.1, beating=(1, 2, 3, 4))
    assert world.got(1, EpochPropose)


def test_newcomer_is_planned_for_before_anybody_measured_it() -> None:
    world = planned(4)
    tell_all(world, 4, HOME)
    arrive_all(world, 4, 2)
    world.end(world.searches[0])
    world.ready(1, 2, 3, 4)
    world.hello(5)
    arrive_all(world, 4, 3)
    found = world.end(world.searches[1])
    assert len(found.best.shares) == 5 and found.best.shares[3] == pytest.approx(0.0, abs=1e-3)
    assert found.present.shares[4] == pytest.approx(1 / 5, abs=1e-3)  # carried: the newcomer gets the mean
    assert parts(world.last(5, EpochPropose).epoch.plan, 5)[3] == pytest.approx(0.0, abs=1e-3)


def test_member_that_is_lost_while_its_plan_is_searched_for_holds_up_nobody() -> None:
    world = planned(4)
    tell_all(world, 4, HOME)
    arrive_all(world, 4, 2)
    world.do(world.master.disconnected(4, world.now))
    world.hello(4, conn=14, incarnation=incarnation(44))  # it starts again: its old self is refused by the others
    world.end(world.searches[0])
    assert world.master.status()["groups"][0]["epoch"] == 2


def test_newcomer_that_leaves_a_proposal_while_a_plan_without_it_is_searched_for_holds_up_nobody() -> None:
    world = planned(3)
    tell_all(world, 3, {1: FAST, 2: FAST, 3: SLOW})
    world.hello(4)
    arrive_all(world, 3, 2)
    world.end(world.searches[0])
    proposal = world.last(1, EpochPropose)
    assert peer_id(4) in proposal.epoch.peers
    world.do(world.master.disconnected(4, world.now))
    assert len(world.searches) == 2 and world.last(1, EpochPropose) == proposal  # it waits for the second
    for n in (1, 2, 3):
        world.say(n, Ready(3, proposal.version))
    assert world.master.status()["groups"][0]["epoch"] == 2  # nobody enters an epoch with one who is gone
    world.end(world.searches[1])
    assert world.last(1, EpochPropose).epoch.peers == tuple(peer_id(n) for n in (1, 2, 3))
    world.ready(1, 2, 3)
    assert world.epoch().number == 3


@pytest.mark.parametrize("who", [1, 5])
def test_newcomer_that_left_meanwhile_is_nobodys_fault(who: int) -> None:
    """A member, or another newcomer, can't reach it; the proposal with it waits for a plan without it."""
    world = planned(3)
    tell_all(world, 3, {1: FAST, 2: FAST, 3: SLOW})
    world.hello(4)
    world.hello(5)
    arrive_all(world, 3, 2)
    world.end(world.searches[0])
    version = world.last(5, EpochPropose).version
    world.do(world.master.disconnected(4, world.now))
    world.say(who, Unreachable(3, version, (peer_id(4),), "connection refused"))
    assert world.got(5, Rejected) == []
    world.end(world.searches[1])
    assert world.last(5, EpochPropose).epoch.peers == tuple(peer_id(n) for n in (1, 2, 3, 5))
    world.ready(1, 2, 3, 5)
    assert world.epoch(5).number == 3


def test_many_members_get_a_second_longer_search_that_nobody_waits_for() -> None:
    members = 14
    world = planned(members)
    rate = {n: FAST if n % 3 else SLOW for n in range(1, members + 1)}
    tell_all(world, members, rate)
    arrive_all(world, members, 2)
    world.end(world.searches[0])
    assert world.got(1, EpochPropose)
    longer = world.searches[1]
    assert longer.job.effort == planning.EFFORT_LONG > world.searches[0].job.effort
    before = world.last(1, EpochPropose)
    world.end(longer)
    assert world.last(1, EpochPropose) == before and len(world.searches) == 2


@pytest.mark.parametrize(("slow", "pace"), [(10, 500_000), (5, 250_000), (0, 0)])
def test_plan_says_how_much_less_a_byte_costs_in_the_ring(slow: float, pace: int) -> None:
    """Six, each with two neighbours at 100; direct takes 1/3 of a vector at `slow`, the ring 5/3 at 100."""
    ranks = range(6)
    rate = tuple(tuple(100.0 if (i - j) % 6 in (1, 5) else float(slow) for j in ranks) for i in ranks)
    network = topology.Network((100.0,) * 6, (100.0,) * 6, rate, ((0.01,) * 6,) * 6, (topology.Cpu(),) * 6)
    plan = planning.plan_of(topology.choose(network, planning.EFFORT))
    assert plan.ring in ((0, 1, 2, 3, 4, 5), (0, 5, 4, 3, 2, 1))
    assert plan.ring_from_bytes < (1 << 20 if slow else 1) and plan.ring_pace == pytest.approx(pace, abs=pace / 50)


def test_two_members_need_no_plan_and_hear_what_their_swap_will_take() -> None:
    world = planned(2)
    tell_all(world, 2, {1: FAST, 2: SLOW})
    arrive_all(world, 2, 2)
    world.end(world.searches[0])
    assert world.last(1, EpochPropose).epoch.plan == NO_PLAN
    (fields,) = logged(world)
    assert fields["adopt"] is False
    assert fields["predicted_s"] == fields["present_s"]
    assert fields["present_s"] == pytest.approx(0.04 + topology.REFERENCE_BYTES / SLOW, rel=1e-3)


def test_alone_there_is_nothing_to_plan() -> None:
    world = planned(1)
    world.say(1, Measured(10**10, 10**10, 10**9, 0, ()))
    arrive_all(world, 1, 1)
    assert not world.searches


def test_a_member_that_lies_harms_nothing_but_speed() -> None:
    world = planned(4)
    tell_all(world, 4, HOME)
    lie = tuple(LinkMeasure(peer_id(n), limits.RATE_MAX if n == 2 else 1, 1, limits.RTT_US_MAX) for n in (1, 2, 4))
    world.say(3, Measured(1, 1, 1, 1, lie))
    arrive_all(world, 4, 2)
    world.end(world.searches[0])
    proposal = world.last(1, EpochPropose)
    for n in range(1, 5):
        world.say(n, Ready(3, proposal.version))
    assert world.epoch().number == 3
    assert sum(parts(world.epoch().plan, 4)) == pytest.approx(1.0)


@pytest.mark.parametrize("links", [[(1, 5)], [(2, 5), (2, 6)]], ids=["itself", "twice"])
def test_measure_of_itself_or_of_one_link_twice_costs_the_connection(links: list[tuple[int, int]]) -> None:
    world = planned(3)
    world.say(1, Measured(0, 0, 0, 0, tuple(LinkMeasure(peer_id(n), rate, 0, 0) for n, rate in links)))
    assert "measured twice, or to the sender itself" in world.closed[1]
