"""What a scenario's lines mean for a benchmark: where the master is, what no operation exceeds, what no plan beats."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from bench_runs import bench, done
from click.testing import CliRunner

from pyccl import netlab
from pyccl.bench import topology
from pyccl.bench.conductor import BenchError, ExitStatus
from pyccl.bench.lines import bound_s, master_rank, need_gloo, timeout_s
from pyccl.bench.topology import _predicted_s
from pyccl.cli.main import main

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces and TUN devices need root")
MIB = 1 << 20
TWO_AND_TWO = """
[[host]]
name = "a"
count = 2
rate = "400mbit"
router = "left"
[[host]]
name = "b"
count = 2
rate = "400mbit"
router = "right"
[[router]]
name = "left"
[[router]]
name = "right"
[[link]]
between = ["left", "right"]
rate = "50mbit"
"""


def hosts(*kinds: str) -> netlab.Scenario:
    return netlab.parse("".join(f"[[host]]\nname = 'h{n}'\n{kind}\n" for n, kind in enumerate(kinds)), "test")


NAT, V6, DUAL, OPEN = "nat = 'port_restricted'", "ipv6 = 'only'", "ipv6 = 'dual'", ""


@pytest.mark.parametrize(
    ("kinds", "rank"),
    [((OPEN, OPEN), 0), ((NAT, OPEN, OPEN), 1), ((V6, V6), 0), ((DUAL, OPEN), 0), ((V6, DUAL), 0), ((DUAL, V6), 1)],
)
def test_master_is_where_all_can_dial_it(kinds: tuple[str, ...], rank: int) -> None:
    assert master_rank(hosts(*kinds)) == rank


@pytest.mark.parametrize("kinds", [(NAT, NAT), (V6, OPEN), (V6, NAT)])
def test_where_nobody_can_be_dialed_by_all_it_says_so(kinds: tuple[str, ...]) -> None:
    with pytest.raises(BenchError, match="no host for the master") as caught:
        master_rank(hosts(*kinds))
    assert caught.value.status is ExitStatus.ARGUMENTS


@pytest.mark.parametrize("kind", [NAT, V6])
def test_gloo_needs_public_ipv4_addresses(kind: str) -> None:
    with pytest.raises(BenchError, match=r"h1.*no public IPv4"):
        need_gloo(hosts(OPEN, kind))
    need_gloo(hosts(OPEN, DUAL))


def test_slow_lines_and_large_vectors_get_the_time_that_they_take() -> None:
    slow = netlab.load("lan").with_options(rate="5mbit", hosts=2)
    assert timeout_s(slow, 64 * MIB) > 4 * 64 * MIB * 8 / 5e6
    assert timeout_s(netlab.load("lan"), MIB) == pytest.approx(60, abs=1)
    shared = netlab.parse(TWO_AND_TWO, "test")
    assert timeout_s(shared, 64 * MIB) > 4 * 2 * 64 * MIB * 8 / 50e6
    capped = netlab.load("flowcap")
    assert timeout_s(capped, 64 * MIB) > 4 * 64 * MIB * 8 / 20e6


def test_bound_counts_what_several_pairs_share() -> None:
    """Over the link each way: direct two vectors whoever owns what, a ring one hop of three halves."""
    shared = netlab.parse(TWO_AND_TWO, "test")
    assert bound_s(shared, 8 * MIB) == pytest.approx(1.5 * 8 * MIB * 8 / 50e6, rel=0.01)


def test_bound_of_lines_that_are_hosts_own_is_the_planners() -> None:
    home = netlab.load("home")
    slowest_up = 20e6
    assert bound_s(home, 8 * MIB) > 8 * MIB * 8 / slowest_up
    two = hosts("rate = '80mbit'", "rate = '80mbit'")
    assert bound_s(two, 10 * MIB) == pytest.approx(10 * MIB * 8 / 80e6)
    assert bound_s(hosts(OPEN, OPEN), 10 * MIB) == 0.0


def found(epoch: int, adopt: bool, pace: float) -> dict[str, object]:
    return {"epoch": epoch, "adopt": adopt, "direct": [1.0, pace, 0, 0], "present_direct": [2.0, pace, 0, 0],
            "ring": [3.0, pace, 0, 0], "coded": [4.0, pace, 0, 0], "present_ring": [5.0, pace, 0, 0]}  # fmt: skip


def test_prediction_is_that_of_the_plan_in_force() -> None:
    plan = topology.Plan(size_bytes=100)
    plans = [found(3, adopt=False, pace=0.1), found(4, adopt=True, pace=0.2), found(5, adopt=True, pace=0.7)]
    assert _predicted_s(plan, "direct", plans, 5) == pytest.approx(1 + 20)
    assert _predicted_s(plan, "ring", plans, 5) == pytest.approx(3 + 20)
    assert _predicted_s(plan, "direct", plans, 4) == pytest.approx(2 + 10)
    assert _predicted_s(plan, "direct", plans, 3) is None
    coded = topology.Plan(size_bytes=100, coded=True)
    assert _predicted_s(coded, "direct", plans, 5) == pytest.approx(4 + 20)
    assert _predicted_s(coded, "ring", plans, 5) is None


@as_root
def test_first_host_behind_nat_and_another_with_ipv6_only(tmp_path: Path) -> None:
    """And lines without a rate: there is no bound to compare with."""
    path = tmp_path / "odd.toml"
    path.write_text(f"[[host]]\nname = 'inner'\n{NAT}\n[[host]]\nname = 'far'\n", encoding="utf-8")
    told = done("topology", "--scenario", str(path), "--mib", "0.1", "--iters", "1", "--warmup", "0")
    assert told["bound_s"] == 0.0 and told["planned_to_bound"] is None
    assert told["predicted_s"] > 0 and told["predicted_to_planned"] > 0
    six = tmp_path / "six.toml"
    six.write_text(f"[[host]]\n{V6}\n[[host]]\nname = 'other'\n{V6}\n", encoding="utf-8")
    assert done("wan", "--scenario", str(six), "--mib", "0.1", "--iters", "1")["systems"]["pyccl"]["seconds"]["max"] > 0


@as_root
def test_optimize_and_caps_reach_the_peers() -> None:
    """2 MiB at 8 Mbit/s take two seconds, whatever the line."""
    told = done("wan", "--scenario", "lan", "--world", "2", "--mib", "2", "--iters", "1", "--warmup", "0",
                "--max-upload", "8mbit", "--optimize")  # fmt: skip
    assert told["systems"]["pyccl"]["seconds"]["min"] > 0.8 * 2 * MIB * 8 / 8e6
    told = done("wan", "--scenario", "lan", "--world", "2", "--mib", "2", "--iters", "1", "--warmup", "0",
                "--max-download", "8mbit")  # fmt: skip
    assert told["systems"]["pyccl"]["seconds"]["min"] > 0.8 * 2 * MIB * 8 / 8e6


@as_root
def test_operation_that_takes_longer_than_asked_for_is_told() -> None:
    finished = bench("wan", "--scenario", "lan", "--rate", "1mbit", "--mib", "2", "--iters", "1", "--timeout", "1")
    assert finished.status == ExitStatus.CHILD_FAILED and "time ran out" in finished.stderr
    assert finished.left == []


@as_root
def test_sync_has_the_scenarios_hosts(tmp_path: Path) -> None:
    path = tmp_path / "three.toml"
    path.write_text("[[host]]\ncount = 3\n", encoding="utf-8")
    told = done("sync", "--scenario", str(path), "--mib", "0.1", "--iters", "1")
    assert told["settings"]["world"] == 3


def test_scenario_that_can_not_be_dialed_is_a_bad_argument(tmp_path: Path) -> None:
    path = tmp_path / "hidden.toml"
    path.write_text(f"[[host]]\ncount = 2\n{NAT}\n", encoding="utf-8")
    for command in ("wan", "topology", "sync"):
        result = CliRunner().invoke(main, ["bench", command, "--scenario", str(path)])
        assert result.exit_code == ExitStatus.ARGUMENTS and "no host for the master" in result.output, command
