"""The harness itself, short: real processes, real faults, and real mistakes that it must find."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyccl.stress.peer import CANARY_REVISION

TIMEOUT_S = 400
# Namespaces where they can be had, so that this is a test of as much as there is.
NETWORK, OPTIONS = ("namespaces", []) if os.geteuid() == 0 else ("loopback", ["--no-netns"])
STRESS = [sys.executable, "-P", "-m", "pyccl.cli.main", "stress", *OPTIONS]
ROOT = Path(__file__).resolve().parents[2]


def processes_mentioning(text: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if text in command:
                found.append(command)
    return found


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*STRESS, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def test_short_run_under_all_faults_has_no_violation_and_no_hang(seed: int, tmp_path: Path) -> None:
    done = run(
        "--peers", "4", "--minutes", "0.2", "--fault-every", "0.5", "--calm", "2", "--seed", str(seed), "--json",
        "--report", str(tmp_path / "churn"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["ok"] is True and told["violations"] == [] and told["hangs"] == 0
    assert told["command"].startswith("pyccl stress ") and f"--seed {seed}" in told["command"]
    assert told["seed"] == seed and told["network"] == NETWORK
    assert told["revisions"] > 0 and told["checked"]["values"] > 0 and told["checked"]["digests"] > 0
    assert len(told["faults"]) >= 5
    assert {cost["kind"] for cost in told["costs"]} == {fault["kind"] for fault in told["faults"]}
    assert [phase["name"] for phase in told["phases"]] == ["calm", "faults", "recovery"]
    assert told["rate_against_fault_free"] > 0
    assert told["memory"]["master"]["end"]["rss_bytes"] > 0 and len(told["memory_samples"]) >= 2
    assert json.loads((tmp_path / "churn.json").read_text(encoding="utf-8"))["seed"] == seed
    assert (tmp_path / "churn.png").read_bytes().startswith(b"\x89PNG")
    assert processes_mentioning(f'"seed": {seed}') == []


@pytest.mark.parametrize(
    ("canary", "kind", "status"),
    [
        ("wrong-value", "wrong value", 3),
        ("lost-revision", "lost revision", 3),
        ("repeated-revision", "skipped revision", 3),
        ("forked-state", "replaced state", 3),
        ("unknown-epoch", "journal", 3),
        ("hang", "hang", 4),
    ],
)
def test_a_peer_that_does_wrong_is_found(canary: str, kind: str, status: int, seed: int) -> None:
    done = run(
        "--peers", "3", "--minutes", "10", "--canary", canary, "--calm", "300", "--seed", str(seed), "--json",
        *(("--hang", "20", "--peer-timeout", "2") if kind == "hang" else ()),
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    told = json.loads(done.stdout)
    assert told["ok"] is False
    assert kind in {violation["kind"] for violation in told["violations"]}
    assert told["revisions"] == CANARY_REVISION if kind == "hang" else told["revisions"] >= CANARY_REVISION


def test_an_input_that_a_peer_does_not_restore_is_found(seed: int) -> None:
    done = run(
        "--peers", "4", "--minutes", "10", "--canary", "unrestored-input", "--calm", "1", "--seed", str(seed),
        "--faults", "stop-long", "--fault-every", "0.5", "--peer-timeout", "2", "--json",
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert {violation["kind"] for violation in json.loads(done.stdout)["violations"]} == {"input"}


def test_a_signal_ends_the_run_and_all_its_processes_the_stopped_ones_too(seed: int) -> None:
    command = [*STRESS, "--peers", "3", "--faults", "stop-long", "--fault-every", "0.2", "--calm", "1"]
    command += ["--seed", str(seed), "--peer-timeout", "60", "--minutes", "10"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as stress:
        assert stress.stdout is not None
        for line in stress.stdout:
            if "stop-long" in line:
                break
        assert len(processes_mentioning(f'"seed": {seed}')) >= 3
        stress.send_signal(signal.SIGINT)
        stress.communicate(timeout=TIMEOUT_S)
    assert stress.returncode == 128 + signal.SIGINT
    assert processes_mentioning(f'"seed": {seed}') == []


# Not all three: a line that loses may stall the group, too, and two stopped members are all stalls there may be.
@pytest.mark.parametrize("faults", ["stop-long,garbage", *(["loss,garbage"] if NETWORK == "namespaces" else [])])
def test_nothing_of_a_run_outlives_its_sudden_end(seed: int, faults: str) -> None:
    command = [*STRESS, "--peers", "4", "--faults", faults, "--fault-every", "0.2", "--calm", "1"]
    command += ["--seed", str(seed), "--peer-timeout", "60", "--minutes", "10"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as stress:
        assert stress.stdout is not None
        seen: set[str] = set()
        for line in stress.stdout:
            seen |= {fault for fault in faults.split(",") if fault in line}
            if seen == set(faults.split(",")):
                break
        children = Path(f"/proc/{stress.pid}/task/{stress.pid}/children").read_text(encoding="ascii").split()
        held = [os.pidfd_open(int(pid)) for pid in children]
        stress.kill()
    assert len(held) >= 5  # the master and the peers at least
    for pidfd in held:  # readable when its process has ended
        assert select.select([pidfd], [], [], TIMEOUT_S)[0] == [pidfd]
        os.close(pidfd)
    assert processes_mentioning(f'"seed": {seed}') == []


def test_faults_that_need_namespaces_are_refused_on_loopback() -> None:
    done = run("--no-netns", "--faults", "kill,partition")
    assert done.returncode == 2
    assert "network namespaces" in done.stderr


def test_without_the_right_to_make_namespaces_it_says_what_to_do() -> None:
    without = ["setpriv", "--bounding-set", "-sys_admin", "--"] if NETWORK == "namespaces" else []
    command = [*without, sys.executable, "-P", "-m", "pyccl.cli.main", "stress"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 2
    assert "--no-netns" in done.stderr and "Operation not permitted" in done.stderr


def test_module_of_the_clone_is_the_same_command() -> None:
    command = [sys.executable, "-m", "stress.churn", "--help"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--fault-every" in done.stdout and "--no-netns" in done.stdout
