"""Runs an example as its first lines say: from the folder of the source code, with what is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
EXAMPLES: Final = ROOT / "examples"


def ended(name: str, *arguments: str) -> str:
    """What it and its processes print, each text at once; the ends of lines may come later."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, f"examples/{name}", *arguments]
    told = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, cwd=ROOT, env=environment
    )
    assert told.returncode == 0, told.stdout + told.stderr
    return told.stdout
