"""Runs the simulator's command as tools/sim does, for tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def sim(*args: str, hash_seed: int = 0) -> tuple[int, str]:
    """(exit status, output)."""
    path = os.pathsep.join(part for part in (str(HERE), os.environ.get("PYTHONPATH")) if part)
    env = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": str(hash_seed)}
    command = [sys.executable, "-P", str(HERE / "sim_main.py"), *args]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, done.stdout
