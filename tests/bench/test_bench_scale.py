"""``pyccl bench scale`` with tiny groups."""

from __future__ import annotations

import pytest
from bench_runs import bench, check_summary, done


def test_it_tells_time_cpu_bytes_and_memory_of_each_size_of_group() -> None:
    told = done("scale", "--world", "2", "--world", "4", "--iters", "20", "--warmup", "1", "--size", "4000")
    assert [size["world"] for size in told["sizes"]] == [2, 4]
    for size in told["sizes"]:
        n = size["world"]
        assert size["algorithm"] == "direct" and len(size["raw_seconds"]) == 20
        for summary in ("seconds", "memory_bytes", "start_bytes"):
            check_summary(size[summary])
        assert size["payload_bytes"] == pytest.approx(2 * (n - 1) / n * 4000)
        assert size["connections"] >= n - 1 and size["cpu_s"] > 0
        assert size["cpu_s_per_pair"] == pytest.approx(size["cpu_s"] / (n * (n - 1)))
        assert size["data_bytes"] > 0 and size["control_bytes"] >= 0


def test_bytes_beside_the_tensor_do_not_grow_with_it_and_the_master_hears_of_no_operation() -> None:
    """What is sent for an operation is bounded by its frames; heartbeats, which time brings, are in it too."""
    few, many = (
        done("scale", "--world", "3", "--iters", str(count), "--warmup", "0", "--size", "65536")["sizes"][0]
        for count in (10, 200)
    )
    assert many["data_bytes"] < 0.05 * many["payload_bytes"]
    assert many["control_bytes"] * 200 < few["control_bytes"] * 10 + 190 * 8  # not a word for each


def test_a_table_for_a_person() -> None:
    finished = bench("scale", "--world", "2", "--iters", "5")
    assert (finished.status, finished.left) == (0, []), finished.stderr
    assert "2, direct" in finished.stdout and "memory/member" in finished.stdout
