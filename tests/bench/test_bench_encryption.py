"""``pyccl bench encryption`` with a small tensor: that one of both was sealed shows in the bytes that it sent."""

from __future__ import annotations

import pytest
from bench_runs import bench, done

MIB = 1 << 20


def test_encryption_times_plain_and_sealed_runs() -> None:
    told = done("encryption", "--mib", "8", "--iters", "3", "--warmup", "1", "--rounds", "2")
    plain, sealed = told["plain"], told["sealed"]
    assert len(plain["raw_seconds"]) == len(sealed["raw_seconds"]) == 6
    assert told["ratio_of_medians"] == pytest.approx(sealed["seconds"]["median"] / plain["seconds"]["median"])
    assert 8 * MIB <= plain["wire_tx_bytes_per_rank"] < sealed["wire_tx_bytes_per_rank"] < 1.01 * 8 * MIB
    records = 8 * MIB / 65_516  # each with 20 bytes beside what it seals
    assert sealed["wire_tx_bytes_per_rank"] >= 8 * MIB + 20 * records


def test_encryption_prints_a_table() -> None:
    finished = bench("encryption", "--mib", "1", "--iters", "2", "--rounds", "1")
    assert (finished.status, finished.left) == (0, []), finished.stderr
    assert "sealed / plain: median" in finished.stdout
