"""The examples run as their first lines say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_numpy_char_lm_ends_with_equal_weights_on_all_peers() -> None:
    command = [sys.executable, "-P", str(EXAMPLES / "numpy_char_lm_diloco.py"), "--rounds", "3", "--every", "4"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert told.returncode == 0, told.stdout + told.stderr
    losses = re.findall(r"round +(\d+)  \d peers .* validation ([\d.]+) bits", told.stdout)
    assert sorted(int(round_) for round_, _ in losses) == [1, 1, 2, 2, 3, 3]
    last = {loss for round_, loss in losses if round_ == "3"}
    assert len(last) == 1 and float(last.pop()) < 7  # log2 of the letters is 6.6: nothing diverged
    digests = re.findall(r"peer [01]  ([0-9a-f]{16})  ", told.stdout)
    assert len(digests) == 2 and len(set(digests)) == 1
