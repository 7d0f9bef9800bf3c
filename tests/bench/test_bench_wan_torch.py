"""``pyccl bench wan --vs gloo``: Gloo goes over the same lines."""

from __future__ import annotations

import os

import pytest
from bench_runs import done

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces and TUN devices need root")


def test_gloo_is_measured_on_the_same_lines() -> None:
    told = done(
        "wan", "--scenario", "lan", "--rate", "50mbit", "--delay", "5ms", "--world", "2", "--mib", "0.25",
        "--iters", "1", "--warmup", "0", "--vs", "gloo",
    )  # fmt: skip
    for name in ("pyccl", "gloo"):
        assert told["systems"][name]["seconds"]["min"] >= 2 * 0.25 * 2**20 / 2 * 8 / 50e6 + 0.005
        assert 0 < told["rates"][name]["line_share"] < 1
    assert told["ratio_of_medians"] > 0
