"""The demo itself, short: real processes, a real kill, a real join."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT_S = 120
DEMO = [sys.executable, "-P", "-m", "pyccl.cli.main", "demo"]


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


def test_short_demo_survives_kill_and_join_with_equal_digests(tmp_path: Path) -> None:
    picture = tmp_path / "demo.png"
    command = [*DEMO, "--rounds", "9", "--json", "--plot", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    result = json.loads(done.stdout)
    assert result["ok"] is True
    assert result["digests"]["differences"] == []
    assert result["digests"]["revisions"] == 10
    assert result["killed"]["revision"] >= 3
    assert result["joined"]["revision"] >= 6
    assert result["loss"]["last"] <= result["loss"]["limit"] < result["loss"]["first"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_in_the_middle_ends_the_demo_and_all_its_processes(number: signal.Signals) -> None:
    seed = str(900_000_000 + os.getpid())  # tells our peers from those of any other demo on this machine
    with subprocess.Popen([*DEMO, "--seed", seed], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        assert "round" in demo.stdout.readline()
        assert len(processes_mentioning(f"--seed {seed}")) >= 5  # the demo and its peers
        demo.send_signal(number)
        demo.communicate(timeout=TIMEOUT_S)
    assert demo.returncode == 128 + number
    assert processes_mentioning(f"--seed {seed}") == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--peers", "2"], "at least 3 peers"),
        (["--rounds", "1"], "--rounds"),
        (["--plot", "/no/such/folder/demo.png"], "no directory"),
    ],
)
def test_bad_arguments_are_refused_before_anything_starts(arguments: list[str], reason: str) -> None:
    done = subprocess.run([*DEMO, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 2
    assert reason in done.stderr
    assert done.stdout == ""
