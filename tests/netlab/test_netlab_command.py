"""``pyccl netlab``: run, check, scenarios; what they print, and their exit statuses."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from pyccl.cli.main import main
from pyccl.netlab import Lab, check, names, parse
from pyccl.netlab.check import loss_passes, rate_passes, round_trip_passes
from pyccl.netlab.cover import cover

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces and TUN devices need root")
WAIT_S = 120.0


def netlab(*arguments: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, "-P", "-m", "pyccl.cli.main", "netlab", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False, cwd=Path.cwd())


@as_root
def test_run_tells_each_host_apart() -> None:
    done = netlab("run", "lan", "--hosts", "2", "--", "sh", "-c", "echo $NETLAB_RANK of $NETLAB_WORLD; echo no >&2")
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == ["[peer0] 0 of 2", "[peer1] 1 of 2"]
    assert sorted(done.stderr.splitlines()) == ["[peer0] no", "[peer1] no"]


@as_root
def test_run_reports_how_each_command_ended() -> None:
    done = netlab("run", "lan", "--json", "--", "sh", "-c", "echo $NETLAB_HOST; exit $NETLAB_RANK")
    told = json.loads(done.stdout)
    assert done.returncode == 1
    assert [(host["host"], host["rank"], host["status"]) for host in told["hosts"]] == [
        ("peer0", 0, 0), ("peer1", 1, 1), ("peer2", 2, 2),
    ]  # fmt: skip
    assert [host["stdout"] for host in told["hosts"]] == [["peer0"], ["peer1"], ["peer2"]]
    assert told["timed_out"] is False and told["lines"]["delivered"] == 0


@as_root
def test_run_ends_at_its_time_limit_with_all_that_was_started() -> None:
    done = netlab("run", "lan", "--time-limit", "0.5", "--", "sh", "-c", "test $NETLAB_RANK = 0 || sleep 1000 & wait")
    assert done.returncode == 124
    assert "[peer1] " in done.stderr and "time limit" in done.stderr and "[peer0] sh" not in done.stderr


@as_root
def test_commands_of_two_hosts_reach_each_other() -> None:
    code = (
        "import os, socket, time\n"
        "if os.environ['NETLAB_RANK'] == '0':\n"
        "    with socket.create_server((os.environ['NETLAB_MASTER'], 7000)) as server:\n"
        "        print(server.accept()[1][0])\n"
        "else:\n"
        "    while True:\n"
        "        try:\n"
        "            socket.create_connection((os.environ['NETLAB_MASTER'], 7000)).close()\n"
        "            break\n"
        "        except ConnectionRefusedError:\n"
        "            time.sleep(0.05)\n"
    )
    done = netlab("run", "lan", "--hosts", "2", "--time-limit", "60", "--", sys.executable, "-c", code)
    assert (done.returncode, done.stdout) == (0, "[peer0] 11.78.0.2\n"), done.stderr


@as_root
def test_check_measures_what_was_asked_for(tmp_path: Path) -> None:
    """What it finds of the rate depends on how busy the machine is; what it may not find does not."""
    path = tmp_path / "tiny.toml"
    path.write_text(
        "[[host]]\ncount = 2\nrate = '20mbit'\n[[router]]\nname = 'r'\ndelay = '4ms'\nloss = 0.02", encoding="utf-8"
    )
    done = netlab("check", str(path), "--json")
    told = json.loads(done.stdout)
    assert done.returncode == (0 if all(found["passed"] for found in told["findings"]) else 1)
    found = {(one["what"], one["source"]): one for one in told["findings"]}
    assert len(found) == 8
    for host in ("host0", "host1"):
        assert found["round trip", host]["asked"] == 8 and found["round trip", host]["found"] >= 8
        assert found["loss", host]["asked"] == pytest.approx(0.02)
        assert 0 < found["loss", host]["found"] < 0.1
        assert found["rate", host]["asked"] == found["TCP", host]["asked"] == 20e6
        assert 0 < found["TCP", host]["found"] <= 20e6
        assert found["rate", host]["found"] > 0


@as_root
def test_what_queues_drop_of_the_probe_is_told_and_is_not_loss_of_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many packets of the probe come at once, as on a busy machine; this queue has room for two or three."""
    monkeypatch.setattr(check, "LOSS_BURST_S", 0.2)
    lines = parse("[[host]]\ncount = 2\nrate = '2mbit'\nqueue = '500us'\n", "shallow")
    with Lab(lines) as lab:
        loss = next(found for found in check.check(lab, cover(lines)) if found.what is check.What.LOSS)
    assert loss.passed and loss.found == 0
    assert "0 were lost" in loss.note and "dropped by full queues" in loss.note


@as_root
def test_check_measures_rates_and_caps_on_the_ways_that_show_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOSS_SECONDS", "RATE_SECONDS", "TCP_SECONDS", "QUIET_S"):
        monkeypatch.setattr(check, name, 0.2)
    toml = """
    [[host]]
    name = "a"
    count = 2
    rate = "10mbit"
    [[host]]
    name = "b"
    rate = "20mbit"
    [[router]]
    name = "r"
    flow_cap = "4mbit"
    queue = "1ms"
    """
    lines = parse(toml, "uneven")
    ways = cover(lines)
    found, dropped = [], [0]  # by queues of caps
    with Lab(lines) as lab:
        for one in check.check(lab, ways):
            found.append(one)
            dropped.append(sum(way.capped for way in lab.counts().routes))
    measured = {kind: {(one.source, one.target): one for one in found if one.what is kind} for kind in check.What}
    near, more = {("a0", "a1"), ("a1", "b"), ("b", "a0")}, {("a0", "b"), ("b", "a1")}
    assert set(measured[check.What.RATE]) == near | more
    for kind in (check.What.ROUND_TRIP, check.What.LOSS, check.What.FLOW_CAP, check.What.TCP):
        assert set(measured[kind]) == near
    assert measured[check.What.RATE]["a0", "b"].narrowest == ("a0 up",)
    for one, before, after in zip(found, dropped, dropped[1:], strict=False):
        if one.what is check.What.RATE:
            assert one.asked == 10e6 and one.found > 0 and after == before
        if one.what is check.What.FLOW_CAP:
            assert one.asked == 4e6 and one.found > 0 and after > before  # it was offered more than it lets through
            assert one.narrowest == ("r flow cap",)


@as_root
def test_check_names_what_no_way_shows(tmp_path: Path) -> None:
    path = tmp_path / "wide.toml"
    path.write_text("[[host]]\nname = 'a'\nrate = '5mbit'\n[[host]]\nname = 'b'\nrate = '8mbit'\n", encoding="utf-8")
    done = netlab("check", str(path))
    for line in ("b up of 8mbit is the narrowest on no way; one host gets at most 5mbit there", "Not measured: b down"):
        assert line in done.stdout


def test_verdicts_of_the_check() -> None:
    assert not round_trip_passes(150, 149.9) and round_trip_passes(150, 150.4) and not round_trip_passes(150, 153)
    assert not round_trip_passes(150, math.inf)
    assert rate_passes(100e6, 98e6) and not rate_passes(100e6, 96e6) and not rate_passes(100e6, 104e6)
    assert loss_passes(0, 1000, 0) and not loss_passes(0, 1000, 1)
    assert loss_passes(0.01, 10_000, 110) and not loss_passes(0.01, 10_000, 160) and not loss_passes(0.01, 10_000, 40)


def test_scenarios_lists_all() -> None:
    listed = CliRunner().invoke(main, ["netlab", "scenarios"])
    assert [line.split()[0] for line in listed.output.splitlines()] == names()
    assert set(json.loads(CliRunner().invoke(main, ["netlab", "scenarios", "--json"]).output)) == set(names())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["check", "moon"], "no scenario 'moon'"),
        (["check", "lan", "--rate", "fast"], "'fast' is no rate"),
        (["run", "lan", "--hosts", "1", "--", "true"], "1 hosts: lan can have"),
        (["run", "lan"], "COMMAND"),
    ],
)
def test_bad_arguments_say_what_is_wrong(arguments: list[str], text: str) -> None:
    result = CliRunner().invoke(main, ["netlab", *arguments])
    assert result.exit_code == 2 and text in result.output


def test_without_the_right_to_build_a_lab_it_says_so() -> None:
    before = ("setpriv", "--bounding-set", "-sys_admin", "--") if os.geteuid() == 0 else ()
    done = netlab("run", "lan", "--", "true", before=before)
    assert done.returncode == 3
    assert "no network namespace can be made: Operation not permitted (run it as root)" in done.stderr
