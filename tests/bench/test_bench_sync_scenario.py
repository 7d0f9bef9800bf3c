"""``pyccl bench sync --scenario``: a tiny state over lines whose rate and delay bound its time from below. As root."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench_runs import RUN_S, bench, check_summary, done
from click.testing import CliRunner

from pyccl.bench import churn
from pyccl.bench.churn import ArrivalPlan, measure_arrivals_in
from pyccl.bench.conductor import BenchError, ExitStatus
from pyccl.cli.main import main
from pyccl.netlab import NetworkError, parse
from pyccl.processes.children import Children

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces and TUN devices need root")
MIB = 1 << 20
ONE_WAY_S = 0.02  # of the scenario newcomer
WAYS = 6  # one behind the other: the records, table and chunk there and back, the votes


@as_root
def test_the_state_comes_over_the_lines_of_the_scenario() -> None:
    told = done("sync", "--scenario", "newcomer", "--mib", "2.5", "--iters", "1")
    check_summary(told["sync_mb_per_s"])
    (arrival,) = told["arrivals"]
    assert told["settings"]["world"] == 4 and len(arrival["source_bytes"]) == 3
    assert arrival["chunk_bytes"] == sum(arrival["source_bytes"]) == 2.5 * MIB
    assert arrival["connect_s"] >= 2 * ONE_WAY_S
    assert arrival["sync_s"] >= WAYS * ONE_WAY_S
    assert max(arrival["source_bytes"]) * 8 / arrival["sync_s"] <= 100e6


@as_root
def test_a_person_reads_the_rate_and_nothing_is_left() -> None:
    finished = bench("sync", "--scenario", "newcomer", "--world", "2", "--mib", "0.1", "--iters", "1")
    assert (finished.status, finished.left) == (0, []), finished.stderr
    assert "to 1 members" in finished.stdout and "Mbit/s" in finished.stdout


@as_root
def test_newcomers_are_on_the_last_host_and_each_founder_is_on_its_own() -> None:
    """The last host's line is the narrow one, which only newcomers may have."""
    size_bytes, rate = MIB // 4, 4e6
    scenario = parse(
        """
        [[host]]
        count = 2
        [[host]]
        name = "last"
        up = "100mbit"
        down = "4mbit"
        queue = "1s"
        """,
        "narrow",
    )
    plan = ArrivalPlan(world=64, iterations=2, state_bytes=size_bytes)
    with Children() as children:
        result = measure_arrivals_in(scenario, plan, children)
    assert result.plan.world == 3 and len(result.arrivals) == 2
    for arrival in result.arrivals:
        assert arrival.chunk_bytes == sum(arrival.source_bytes) == size_bytes and len(arrival.source_bytes) == 2
        assert arrival.sync_s >= size_bytes * 8 / rate


def test_no_lab_is_an_error_of_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(scenario: object) -> None:
        raise NetworkError("not here")

    monkeypatch.setattr(churn, "Lab", none)
    scenario = parse("[[host]]\ncount = 2\n", "test")
    with Children() as children, pytest.raises(BenchError, match="not here") as caught:
        measure_arrivals_in(scenario, ArrivalPlan(), children)
    assert caught.value.status is ExitStatus.NO_LAB


def test_without_the_right_to_build_a_lab_it_says_so() -> None:
    without = ["setpriv", "--bounding-set", "-sys_admin", "--"] if os.geteuid() == 0 else []
    command = [*without, sys.executable, "-P", "-m", "pyccl.cli.main", "bench", "sync", "--scenario", "newcomer"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=RUN_S, check=False, cwd=Path.cwd())
    assert finished.returncode == 5
    assert "no network namespace can be made: Operation not permitted (run it as root)" in finished.stderr


@pytest.mark.parametrize(("name", "text"), [("moon", "no scenario 'moon'"), ("./gone.toml", "gone.toml")])
def test_wrong_scenarios_are_bad_arguments(name: str, text: str) -> None:
    result = CliRunner().invoke(main, ["bench", "sync", "--scenario", name])
    assert result.exit_code == 2 and text in result.output
