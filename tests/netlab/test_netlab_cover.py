"""Which ways a check measures: each pipe and each cap where it is the narrowest, and the rest is named."""

from __future__ import annotations

import itertools
import random

import pytest

from pyccl.netlab.cover import Cover, Hidden, Way, cover, neighbours
from pyccl.netlab.scenario import Cap, Pipe, Scenario, load, names, parse

MBIT = 10**6


def limits(scenario: Scenario, way: Way, *kinds: type[Pipe | Cap]) -> dict[str, int]:
    """By name."""
    return {
        step.name: step.line.rate
        for step in scenario.route(*way)
        if isinstance(step, Pipe | Cap) and isinstance(step, kinds) and step.line.rate is not None
    }


def check_cover(scenario: Scenario) -> Cover:
    """What holds for every scenario."""
    made = cover(scenario)
    ways = list(itertools.permutations(range(len(scenario.hosts)), 2))
    hidden = {one.name: one for one in made.hidden}
    for kind, chosen, beside in ((Pipe, made.pipes, (Pipe,)), (Cap, made.caps, (Pipe, Cap))):
        there = {way: limits(scenario, way, kind) for way in ways}
        every = {way: limits(scenario, way, *beside) for way in ways}
        for way, narrowest in chosen.items():
            least = min(every[way].values())
            assert set(narrowest) == {name for name, rate in there[way].items() if rate == least}
        rates = {name: rate for of_way in there.values() for name, rate in of_way.items()}
        for name, rate in rates.items():
            crossing = [way for way in ways if name in there[way]]
            shown = [way for way in crossing if min(every[way].values()) == rate]
            alone = [way for way in shown if list(every[way].values()).count(rate) == 1]
            assert (name in hidden) == (not shown)
            if shown:
                assert any(name in chosen[way] for way in chosen if way in (alone or shown)), name
            else:
                assert hidden[name] == Hidden(name, rate, max(min(every[way].values()) for way in crossing))
        assert len(set(chosen) - set(neighbours(len(scenario.hosts)))) <= len(rates)
    return made


@pytest.mark.parametrize("name", names())
def test_every_pipe_and_cap_of_the_package_is_shown_or_named(name: str) -> None:
    check_cover(load(name).without_nat())


def test_each_direction_of_each_link_has_its_way() -> None:
    made = check_cover(load("neighbours"))
    assert set(made.pipes) == set(itertools.permutations(range(6), 2))  # every pair of sites has a link of its own
    assert made.pipes[0, 2] == ("peer-a up", "a to c", "peer-c down") and made.pipes[2, 1] == ("c to b",)
    assert made.hidden == ()


def test_what_is_wider_than_all_that_leads_to_it_is_named() -> None:
    made = check_cover(load("newcomer"))
    assert made.hidden == (Hidden("newcomer down", 400 * MBIT, 100 * MBIT),)
    assert any("newcomer up" in narrowest for narrowest in made.pipes.values())


def test_uneven_hosts_are_shown_by_others_than_the_next() -> None:
    made = check_cover(load("home"))
    assert made.pipes[2, 3] == ("home down",) and made.pipes[3, 0] == ("home up",)
    assert made.pipes[2, 0] == ("peer2 up", "peer0 down")
    assert set(made.pipes) == {*neighbours(4), (2, 0)} and made.hidden == ()


def test_hosts_that_are_alike_need_no_other_way_than_to_the_next() -> None:
    assert list(cover(load("lan").with_options(hosts=100)).pipes) == neighbours(100)


def test_a_pipe_is_looked_at_where_nothing_is_as_narrow() -> None:
    scenario = parse(
        "[[host]]\nname = 'a'\ncount = 2\nrate = '10mbit'\n[[host]]\nname = 'b'\nrate = '20mbit'", "test"
    )
    made = check_cover(scenario)
    assert made.pipes[0, 1] == ("a0 up", "a1 down")
    assert (made.pipes[1, 2], made.pipes[2, 0]) == (("a1 up",), ("a0 down",))
    assert (made.pipes[0, 2], made.pipes[2, 1]) == (("a0 up",), ("a1 down",))
    assert {one.name for one in made.hidden} == {"b up", "b down"}


def test_a_cap_of_flows_is_shown_where_no_line_is_narrower() -> None:
    host = "[[host]]\nname = '{}'\nrate = '{}mbit'\n"
    router = "[[router]]\nname = 'r'\nflow_cap = '8mbit'\n"
    made = check_cover(parse(host.format("a", 5) + host.format("b", 20) + host.format("c", 20) + router, "test"))
    assert made.caps == {(1, 2): ("r flow cap",)} and made.hidden == ()
    slow = check_cover(parse(host.format("a", 5) + host.format("b", 20) + router, "test"))
    assert slow.caps == {} and Hidden("r flow cap", 8 * MBIT, 5 * MBIT) in slow.hidden


def test_any_scenario_is_covered(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(50):
        routers = [f"r{number}" for number in range(draw.randint(1, 4))]
        lines = []
        for number in range(draw.randint(2, 6)):
            up, down = (draw.choice((5, 8, 10)) for _ in range(2))
            router = draw.choice(routers)
            lines.append(f"[[host]]\nname = 'h{number}'\nrouter = '{router}'\nup = '{up}mbit'\ndown = '{down}mbit'")
        for name in routers:
            cap = draw.choice(("", "flow_cap = '6mbit'", "flow_cap = '9mbit'"))
            lines.append(f"[[router]]\nname = '{name}'\n{cap}")
        for a, b in itertools.pairwise(routers):
            rate = draw.choice(("", "rate = '7mbit'", "rate = '10mbit'"))
            lines.append(f"[[link]]\nbetween = ['{a}', '{b}']\ndelay = '1ms'\n{rate}")
        check_cover(parse("\n".join(lines), "drawn"))
