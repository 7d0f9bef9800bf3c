"""The examples run as their first lines say."""

from __future__ import annotations

import re

from example_runs import ended


def test_numpy_char_lm_ends_with_equal_weights_on_all_peers() -> None:
    out = ended("numpy_char_lm_diloco.py", "--rounds", "3", "--every", "4")
    losses = re.findall(r"round +(\d+)  \d peers .*? validation ([\d.]+) bits", out)
    assert sorted(int(round_) for round_, _ in losses) == [1, 1, 2, 2, 3, 3]
    last = {loss for round_, loss in losses if round_ == "3"}
    assert len(last) == 1 and float(last.pop()) < 7  # log2 of the letters is 6.6: nothing diverged
    digests = re.findall(r"peer [01]  ([0-9a-f]{16})  ", out)
    assert len(digests) == 2 and len(set(digests)) == 1
