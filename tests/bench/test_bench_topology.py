"""``pyccl bench topology``: a tiny tensor over a lab's lines; the bound is the planner's for those lines. As root."""

from __future__ import annotations

import os

import pytest
from bench_runs import bench, check_summary, done
from click.testing import CliRunner

from pyccl import netlab
from pyccl._proto import topology as planner
from pyccl.bench.lines import EFFORT, network_of
from pyccl.cli.main import main

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces and TUN devices need root")
TINY = ("--scenario", "lan", "--world", "3", "--mib", "0.25", "--iters", "1", "--warmup", "0")


@as_root
def test_it_tells_of_each_way_and_compares_the_plan_with_the_bound() -> None:
    told = done("topology", *TINY)
    assert set(told["systems"]) == {"equal direct", "equal ring", "planned"}
    for system in told["systems"].values():
        check_summary(system["seconds"])
    assert told["systems"]["equal direct"]["algorithm"] == "direct"
    assert told["systems"]["equal ring"]["algorithm"] == "ring"
    planned = told["systems"]["planned"]["seconds"]["median"]
    assert told["planned_to_bound"] == pytest.approx(planned / told["bound_s"])
    ring = told["systems"]["equal ring"]["seconds"]["median"]
    assert told["equal_ring_to_planned"] == pytest.approx(ring / planned)
    assert told["optimize_s"] > 0


@as_root
def test_a_table_for_a_person() -> None:
    finished = bench("topology", *TINY)
    assert (finished.status, finished.left) == (0, []), finished.stderr
    for text in ("scenario lan: ", "equal ring ", "planned ", "the lines allow ", "x the bound", "optimize_topology "):
        assert text in finished.stdout


def test_lines_of_the_home_scenario_are_what_the_planner_is_told() -> None:
    network = network_of(netlab.load("home"))
    assert network.up == (50e6, 50e6, 50e6, 2.5e6) and network.down == (50e6, 50e6, 50e6, 6.25e6)
    assert network.delay[0][3] == pytest.approx(0.02)


def test_only_the_fast_links_of_six_neighbours_make_a_ring_and_it_wins() -> None:
    network = network_of(netlab.load("neighbours"))
    choice = planner.choose(network, EFFORT)
    hops = zip(choice.order, [*choice.order[1:], choice.order[0]], strict=True)
    assert {network.rate[i][j] for i, j in hops} == {12.5e6}
    assert choice.algorithm(2 << 20) == "ring" and choice.direct.pace > 2.4 * choice.ring.pace


@pytest.mark.parametrize("name", [name for name in netlab.names() if name != "neighbours"])
def test_where_each_line_is_a_hosts_own_the_ring_never_wins(name: str) -> None:
    network = network_of(netlab.load(name))
    assert planner.choose(network, EFFORT).ring_from_bytes == planner.NEVER


def test_scenario_that_is_none_is_a_bad_argument() -> None:
    result = CliRunner().invoke(main, ["bench", "topology", "--scenario", "moon"])
    assert result.exit_code == 2 and "no scenario 'moon'" in result.output
