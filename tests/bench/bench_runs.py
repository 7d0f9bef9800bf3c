"""Run ``pyccl bench`` as a user does, and find what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "PYCCL_BENCH_TEST"
RUN_S = 180.0  # bound of one run; a hang is a failure, slowness is not
GONE_S = 30.0


@dataclass(frozen=True)
class Finished:
    status: int
    stdout: str
    stderr: str
    left: list[int]  # processes of the run that are there still

    @property
    def json(self) -> dict[str, Any]:
        assert self.status == 0, self.stderr
        (line,) = self.stdout.splitlines()
        return dict(json.loads(line))


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command's process and the mark that it and all its children carry in their environment."""
    mark = secrets.token_hex(8)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "pyccl.cli.main", "bench", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, MARK: mark},
        encoding="utf-8",
    )
    with process:
        try:
            yield process, mark
        finally:
            if process.poll() is None:
                process.kill()


def bench(*arguments: str) -> Finished:
    with started(*arguments) as (process, mark):
        stdout, stderr = process.communicate(timeout=RUN_S)
        return Finished(process.returncode, stdout, stderr, carriers(mark))


def carriers(mark: str) -> list[int]:
    """Living processes with this mark."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def state_of(pid: int) -> str:
    """The letter of /proc/PID/stat: R, S, T (stopped), ...; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""


def all_gone(mark: str) -> bool:
    """Whether the marked processes end in time."""
    deadline = time.monotonic() + GONE_S
    while carriers(mark):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def done(*arguments: str) -> dict[str, Any]:
    """What ``pyccl bench ARGUMENTS --json`` tells; its head is checked."""
    finished = bench(*arguments, "--json")
    assert finished.left == []
    told, name = finished.json, arguments[0]
    assert told["bench"] == name
    assert told["command"].startswith(f"pyccl bench {name} ")
    assert set(told["machine"]) == {"cpu", "cores", "kernel", "congestion_control", "load_1m"}
    assert {"pyccl", "python", "numpy"} <= set(told["versions"])
    return told


def check_summary(summary: dict[str, float]) -> None:
    assert set(summary) == {"median", "min", "max"}
    assert 0 < summary["min"] <= summary["median"] <= summary["max"]
