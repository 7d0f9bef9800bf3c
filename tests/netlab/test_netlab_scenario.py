"""Scenarios: the ones in the package, what is read from TOML, what is refused and how, and the ways through routers."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyccl import units
from pyccl.netlab.scenario import (
    Cap,
    Delay,
    IPv6,
    Line,
    Loss,
    Nat,
    Pipe,
    Scenario,
    ScenarioError,
    load,
    names,
    parse,
)

MS = 10**6
MBIT = 10**6
HOSTS = "[[host]]\nname = 'a'\n[[host]]\nname = 'b'\n"


HOME = """
[[host]]
name = "x"
lan = "home"
nat = "upnp"
rate = "2mbit"
ipv6 = "dual"
[[host]]
name = "y"
lan = "home"
nat = "upnp"
rate = '2mbit'
"""


def two(host: str = "", more: str = "") -> Scenario:
    return parse(f"[[host]]\nname = 'h'\ncount = 2\n{host}\n{more}", "test")


def test_every_scenario_of_the_package_is_valid_and_described() -> None:
    assert names() == ["atlantic", "europe", "flowcap", "home", "lan", "nat", "neighbours", "newcomer", "pacific"]
    for name in names():
        scenario = load(name)
        assert scenario.description and scenario.rate(0, 1)


@pytest.mark.parametrize(
    ("name", "rtt_ms", "loss"), [("europe", 30, 0), ("atlantic", 90, 1e-5), ("pacific", 150, 1e-4)]
)
def test_long_lines_have_the_round_trip_that_their_name_promises(name: str, rtt_ms: int, loss: float) -> None:
    scenario = load(name)
    assert scenario.rtt_ns == rtt_ms * MS
    assert scenario.loss(0, 1) == pytest.approx(loss)
    assert scenario.rate(0, 1) == 400 * MBIT


def test_uneven_scenarios_say_which_host_has_which_rate() -> None:
    home = load("home")
    assert [(host.up.rate, host.down.rate) for host in home.hosts] == [(400 * MBIT, 400 * MBIT)] * 3 + [
        (20 * MBIT, 50 * MBIT)
    ]
    newcomer = load("newcomer")
    assert [host.name for host in newcomer.hosts] == ["holder0", "holder1", "holder2", "newcomer"]
    assert [newcomer.rate(holder, 3) for holder in range(3)] == [100 * MBIT] * 3
    neighbours = load("neighbours")
    rates = [sorted(neighbours.rate(a, b) or 0 for b in range(6) if b != a) for a in range(6)]
    assert rates == [[8 * MBIT] * 3 + [100 * MBIT] * 2] * 6 and neighbours.rtt_ns == 20 * MS
    flowcap = load("flowcap")
    assert (flowcap.rate(0, 1), flowcap.flow_cap(0, 1)) == (200 * MBIT, 20 * MBIT)


def test_a_packet_meets_lines_router_and_losses_in_order() -> None:
    scenario = parse(
        """
        [[host]]
        name = "a"
        up = "10mbit"
        down = "20mbit"
        queue = "5ms"
        delay = "1ms"
        loss = 0.1
        [[host]]
        name = "b"
        rate = "30mbit"
        [[router]]
        name = "r"
        delay = "7ms"
        loss = 0.2
        flow_cap = "5mbit"
        queue = "10kB"
        """,
        "test",
    )
    assert scenario.route(0, 1) == [
        Pipe("a up", Line(10 * MBIT, 5 * MS)), Delay(MS), Loss(0.1), Delay(7 * MS), Loss(0.2),
        Cap("r flow cap", Line(5 * MBIT, 16 * MS)), Pipe("b down", Line(30 * MBIT, 50 * MS)),
    ]  # fmt: skip
    assert scenario.route(1, 0)[-3:] == [Loss(0.1), Pipe("a down", Line(20 * MBIT, 5 * MS)), Delay(MS)]
    assert scenario.loss(0, 1) == pytest.approx(1 - 0.9 * 0.8)
    assert scenario.rate(0, 1) == 10 * MBIT and scenario.flow_cap(0, 1) == 5 * MBIT


ROUTERS = """
[[router]]
name = "x"
delay = "1ms"
[[router]]
name = "y"
[[router]]
name = "z"
[[link]]
between = ["x", "y"]
delay = "50ms"
[[link]]
between = ["z", "x"]
rate = "8mbit"
delay = "20ms"
[[link]]
between = ["y", "z"]
delay = "20ms"
loss = 0.5
"""


def test_packets_take_the_way_with_the_least_delay_through_routers() -> None:
    scenario = parse(HOSTS.replace("'b'", "'b'\nrouter = 'y'") + ROUTERS, "test")
    assert scenario.delay_ns(0, 1) == scenario.delay_ns(1, 0) == 41 * MS
    assert scenario.loss(0, 1) == 0.5
    assert scenario.route(0, 1)[1] == Pipe("x to z", Line(8 * MBIT, 50 * MS))
    back = [Delay(20 * MS), Loss(0.5), Pipe("z to x", Line(8 * MBIT, 50 * MS)), Delay(20 * MS), Delay(MS)]
    assert scenario.route(1, 0) == back


def test_options_change_rate_delay_loss_and_hosts() -> None:
    changed = load("pacific").with_options(rate="100mbit", delay="10ms", loss=0.0, hosts=5, seed=9)
    assert [host.name for host in changed.hosts] == [f"peer{number}" for number in range(5)]
    assert {host.up.rate for host in changed.hosts} == {host.down.rate for host in changed.hosts} == {100 * MBIT}
    assert (changed.rtt_ns, changed.loss(0, 1), changed.seed) == (20 * MS, 0.0, 9)
    assert [host.name for host in load("home").with_options(hosts=3).hosts] == ["peer0", "peer1", "home"]


def test_hosts_that_are_added_take_no_name_that_there_is() -> None:
    scenario = parse("[[host]]\nname = 'a1'\n[[host]]\nname = 'a0'\n", "test")
    assert scenario.with_options(hosts=2) == scenario
    with pytest.raises(ScenarioError, match="two hosts are called 'a0'"):
        scenario.with_options(hosts=3)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rate": "400"}, "'400' is no rate"),
        ({"delay": "4 parsecs"}, "its unit must be one of us, ms, s"),
        ({"loss": 2.0}, "no probability"),
        ({"hosts": 1}, "home can have 2 to 250"),
        ({"seed": -1}, "2\\*\\*63-1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ScenarioError, match=text):
        load("home").with_options(**options)  # type: ignore[arg-type]


def test_delay_of_several_routers_is_no_option() -> None:
    scenario = parse(HOSTS + ROUTERS, "test")
    with pytest.raises(ScenarioError, match="several routers"):
        scenario.with_options(delay="1ms")


@pytest.mark.parametrize(
    ("toml", "text"),
    [
        ("a = [", "test: no TOML"),
        (HOSTS + "colour = 'blue'", "unknown key 'colour' .known: name, count"),
        ("colour = 'blue'\n" + HOSTS, "test: unknown key 'colour'"),
        (HOSTS + "rate = 400", "test: host.1..rate: 400 is no rate: write a number and a unit, as '400mbit'"),
        (HOSTS + "rate = '400mb'", "host.1..rate: '400mb' is no rate: its unit must be one of bit, kbit, mbit, gbit"),
        (HOSTS + "rate = '0mbit'", "more than nothing"),
        (HOSTS + "rate = '-1mbit'", "is no rate"),
        (HOSTS + "rate = '1mbit'\nup = '2mbit'", "either rate, or up and down"),
        (HOSTS + "delay = '75'", "host.1..delay: '75' is no time"),
        (HOSTS + "delay = '61s'", "at most 60s"),
        (HOSTS + "rate = '1mbit'\nqueue = '5 bananas'", "no queue: its unit must be one of us, ms, s, B, kB"),
        (HOSTS + "loss = 1.5", "host.1..loss: 1.5 is no probability"),
        (HOSTS + "loss = true", "no probability"),
        (HOSTS + "count = 0", "host.1..count: 0 is not 1 to 250"),
        (HOSTS + "count = 1.5", "no whole number"),
        (HOSTS + "nat = 'cone'", "host.1..nat: 'cone' is none of open, full_cone, port_restricted, symmetric, upnp"),
        (HOSTS + "nat = 1", "host.1..nat: 1 is none of"),
        (HOSTS + "ipv6 = 'yes'", "host.1..ipv6: 'yes' is none of none, dual, only"),
        (HOSTS + "ipv6 = 'only'\nnat = 'symmetric'", "host.1..ipv6: symmetric translates IPv4"),
        (HOSTS + "lan = 'home'", "lan 'home': behind which kind of nat"),
        (HOSTS + "lan = 'home'\nnat = 'firewall'", "firewall has no LAN"),
        (HOSTS + "lan = 'a'\nnat = 'upnp'", "lan 'a': a host has that name"),
        (HOSTS + "lan = 'My Home'\nnat = 'upnp'", "host.1..lan: 'My Home' is no name"),
        ("[[host]]\ncount = 2\nnat = 'double'\nlan = 'home'", "all hosts are in one LAN"),
        (HOME.replace("'2mbit'", "'3mbit'") + HOSTS, "lan 'home': 'x' and 'y' have one router and line, but differ"),
        (HOSTS + "router = 'nowhere'", "host 'b' hangs on 'nowhere', which is no router"),
        (HOSTS + "name = 'b'", "no TOML"),
        (HOSTS + "[[host]]\nname = 'a'", "two hosts are called 'a'"),
        ("[[host]]\nname = 'A b'\ncount = 2", "no name"),
        ("[[host]]\nname = 'a'", "test: 1 hosts: a scenario has 2 to 250"),
        ("[host]\nname = 'a'", "write \\[\\[host\\]\\], not host"),
        ("host = [1, 2]", "host.0. is no table"),
        ("seed = -1\n" + HOSTS, "test.seed: -1 is not"),
        ("description = 5\n" + HOSTS, "test.description: 5 is no text"),
        (HOSTS + "[[router]]\ndelay = '1ms'", "a router needs a name"),
        (HOSTS + "[[router]]\nname = 'r'\nqueue = '1ms'", "stands in front of flow_cap"),
        (HOSTS + "[[router]]\nname = 'r'\n[[router]]\nname = 'r'", "two routers have one name"),
        (HOSTS + "[[link]]\ndelay = '1ms'", "which routers"),
        (HOSTS + "[[link]]\nbetween = ['internet', 'x']", "a link ends at 'x'"),
        (HOSTS + "[[link]]\nbetween = ['x', 'x']", "no pair of routers"),
        (HOSTS + "router = 'y'\n[[router]]\nname = 'x'\n[[router]]\nname = 'y'", "no way from router 'x' to 'y'"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(toml: str, text: str) -> None:
    with pytest.raises(ScenarioError, match=text):
        parse(toml, "test")


def test_a_scenario_comes_from_the_package_or_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(HOSTS, encoding="utf-8")
    assert load(str(path)).name == "mine"
    with pytest.raises(ScenarioError, match=r"no scenario 'moon': atlantic, .*pacific, or the path of a file"):
        load("moon")
    with pytest.raises(ScenarioError, match=r"No such file"):
        load(str(tmp_path / "none.toml"))


def test_queues_are_times_or_sizes() -> None:
    assert two("rate = '8mbit'\nqueue = '50kB'").hosts[0].up == Line(8 * MBIT, 50 * MS)
    assert two("rate = '8mbit'\nqueue = '50ms'").hosts[0].up == Line(8 * MBIT, 50 * MS)
    assert two("up = '8mbit'\nqueue = '50kB'").hosts[0].down == Line(None, 0)


@pytest.mark.parametrize(
    ("value", "text"), [(400 * MBIT, "400mbit"), (1_500_000, "1.5mbit"), (999, "999bit"), (None, "unlimited")]
)
def test_rates_are_shown_as_they_may_be_written(value: int | None, text: str) -> None:
    assert units.show_rate(value) == text
    assert value is None or units.rate_bps(text) == value


@pytest.mark.parametrize(("value", "text"), [(75 * MS, "75ms"), (100_000, "100us"), (0, "0ms"), (1500 * MS, "1.5s")])
def test_times_are_shown_as_they_may_be_written(value: int, text: str) -> None:
    assert units.show_time(value) == text
    assert units.time_ns(text) == value


def test_hosts_of_a_lan_have_one_line_and_nothing_between_them() -> None:
    scenario = parse(HOSTS + "delay = '3ms'\n" + HOME, "test")
    assert scenario.sites == ((0,), (1,), (2, 3))
    assert scenario.route(2, 3) == scenario.route(3, 2) == []
    assert scenario.route(2, 0) == scenario.route(3, 0) == [Pipe("home up", Line(2 * MBIT, 50 * MS))]
    assert [host.nat for host in scenario.hosts] == [Nat.OPEN, Nat.OPEN, Nat.UPNP, Nat.UPNP]
    assert [host.ipv6 for host in scenario.hosts] == [IPv6.NONE, IPv6.NONE, IPv6.DUAL, IPv6.NONE]


def test_without_nat_each_host_has_an_address_and_the_lines_stay() -> None:
    scenario = parse(HOSTS + HOME, "test").without_nat()
    assert scenario.sites == ((0,), (1,), (2,), (3,))
    pipe = Line(2 * MBIT, 50 * MS)
    assert scenario.route(2, 3) == [Pipe("home up", pipe), Pipe("home down", pipe)]
