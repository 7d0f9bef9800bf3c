"""``pyccl bench wan``: a tiny tensor over lines whose rate and delay bound its time from below. As root."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench_runs import RUN_S, bench, check_summary, done
from click.testing import CliRunner

from pyccl.bench import machine
from pyccl.cli.main import main

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces and TUN devices need root")
MIB = 1 << 20
LINES = ("--scenario", "lan", "--rate", "50mbit", "--delay", "5ms")


@as_root
def test_time_and_rate_are_those_of_the_lines() -> None:
    told = done("wan", *LINES, "--world", "3", "--mib", "0.25", "--iters", "2", "--warmup", "0")
    assert told["scenario"]["name"] == "lan" and told["scenario"]["rtt_ms"] == 10
    assert [host["up_bps"] for host in told["scenario"]["hosts"]] == [50_000_000] * 3
    figures, rate = told["systems"]["pyccl"], told["rates"]["pyccl"]
    check_summary(figures["seconds"])
    sent_bytes = 2 * 2 / 3 * MIB / 4
    assert figures["seconds"]["min"] >= sent_bytes * 8 / 50e6 + 0.005
    assert rate["mbit_s"] == pytest.approx(sent_bytes * 8 / figures["seconds"]["median"] / 1e6)
    assert rate["line_share"] == pytest.approx(rate["mbit_s"] / 50)
    assert 0 < rate["line_share"] < 1
    assert told["lines"]["hosts"][0]["tx_bytes"] > 3 * sent_bytes
    assert told["lines"]["routes"][0]["lost"] == 0


@as_root
def test_a_table_for_a_person_and_codes_count_as_what_they_are() -> None:
    finished = bench("wan", *LINES, "--world", "2", "--mib", "0.1", "--iters", "1", "--quantize", "uint8")
    assert (finished.status, finished.left) == (0, []), finished.stderr
    for text in ("scenario lan: ", "quantize uint8", "peer1 50mbit up, 50mbit down", "round trip 10ms", "of the line"):
        assert text in finished.stdout
    (row,) = [line.split() for line in finished.stdout.splitlines() if line.startswith("pyccl ")]
    mbit_s, share = float(row[7]), float(row[8].rstrip("%")) / 100
    assert share < 0.5 * mbit_s / 50


@as_root
def test_a_process_that_fails_takes_the_lab_with_it() -> None:
    finished = bench("wan", *LINES, "--mib", "0.1", "--quantize", "no-such-codec")
    assert (finished.status, finished.left) == (2, [])
    assert "no-such-codec" in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--scenario", "moon"], "no scenario 'moon'"),
        (["--rate", "400"], "'400' is no rate"),
        (["--scenario", "home", "--world", "65"], "--world"),
    ],
)
def test_wrong_scenarios_are_bad_arguments(arguments: list[str], text: str) -> None:
    result = CliRunner().invoke(main, ["bench", "wan", *arguments])
    assert result.exit_code == 2 and text in result.output


def test_without_the_right_to_build_a_lab_it_says_so() -> None:
    without = ["setpriv", "--bounding-set", "-sys_admin", "--"] if os.geteuid() == 0 else []
    command = [*without, sys.executable, "-P", "-m", "pyccl.cli.main", "bench", "wan", "--json"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=RUN_S, check=False, cwd=Path.cwd())
    assert finished.returncode == 5
    assert "no network namespace can be made: Operation not permitted (run it as root)" in finished.stderr


def test_gloo_over_lines_needs_torch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "is_installed", lambda package: False)
    result = CliRunner().invoke(main, ["bench", "wan", "--vs", "gloo"])
    assert result.exit_code == 3 and "pip install torch" in result.output
