"""The arithmetic of the benchmarks."""

from __future__ import annotations

import pytest

from pyccl.bench.figures import (
    GIB,
    Summary,
    bus_gb_per_s,
    cpu_s_per_gib,
    gaps_within_ns,
    longest_gap_ns,
    ring_bytes,
    slowest_s,
    summarize,
)
from pyccl.bench.machine import cpu_model
from pyccl.bench.memory import BLOCKS, HOUR_S, slope
from pyccl.bench.show import columns, seconds


def test_summary_tells_median_and_both_ends() -> None:
    assert summarize([3.0, 1.0, 2.0, 10.0]) == Summary(median=2.5, min=1.0, max=10.0)


def test_iteration_lasts_from_the_first_start_to_the_last_return() -> None:
    starts = [[1_000_000_000, 20_000_000_000], [2_000_000_000, 19_000_000_000]]
    ends = [[4_000_000_000, 21_000_000_000], [3_000_000_000, 22_000_000_000]]
    assert slowest_s(starts, ends) == [3.0, 3.0]


def test_ranks_with_different_numbers_of_iterations_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        slowest_s([[1, 2], [1]], [[3, 4], [3]])


@pytest.mark.parametrize(("world", "share"), [(2, 1.0), (4, 1.5), (8, 1.75)])
def test_each_rank_sends_twice_the_share_of_the_others(world: int, share: float) -> None:
    assert ring_bytes(world, 1000) == pytest.approx(share * 1000)


def test_bus_bandwidth_counts_what_a_rank_must_send() -> None:
    assert bus_gb_per_s(4, 2_000_000_000, 3.0) == pytest.approx(1.0)


def test_cpu_time_is_of_all_ranks_for_one_gib_of_one_rank() -> None:
    assert cpu_s_per_gib([[1.0, 1.0], [0.5, 1.5]], GIB // 2) == pytest.approx(4.0)


def test_gap_counts_where_it_overlaps_the_window() -> None:
    times = [0, 10, 100, 101, 300]
    assert longest_gap_ns(times, 20, 30) == 90
    assert longest_gap_ns(times, 0, 10) == 10
    assert longest_gap_ns(times, 100, 101) == 1
    assert longest_gap_ns(times, 50, 250) == 199
    assert longest_gap_ns(times, 400, 500) is None
    assert longest_gap_ns([5], 0, 10) is None


def test_quiet_gaps_lie_inside_the_window() -> None:
    assert gaps_within_ns([0, 10, 30, 60, 100], 10, 60) == [20, 30]


def test_cpu_model_is_found_in_cpuinfo() -> None:
    assert cpu_model("processor\t: 0\nmodel name\t: Xeon (R)\nflags: a b\n") == "Xeon (R)"
    assert cpu_model("processor\t: 0\nBogoMIPS\t: 50\n") is None


def test_times_are_shown_in_a_fitting_unit() -> None:
    assert [seconds(value) for value in (2.5, 0.0125, 0.00001)] == ["2.500 s", "12.50 ms", "10 us"]


def test_columns_align() -> None:
    assert columns([["", "median"], ["pyccl", "1 s"]]) == ["       median", "pyccl     1 s"]


def test_the_slope_of_a_line_is_found_with_no_doubt() -> None:
    found = slope([float(at) for at in range(100)], [5.0 + 2.0 * at for at in range(100)])
    assert found.bytes_per_hour == pytest.approx(2 * HOUR_S) and found.plus_minus == pytest.approx(0, abs=1e-6)


def test_one_spike_is_no_slope() -> None:
    found = slope([float(at) for at in range(1000)], [0.0] * 450 + [4096.0] + [0.0] * 549)
    assert abs(found.bytes_per_hour) < found.plus_minus


def test_a_slope_needs_samples_throughout() -> None:
    with pytest.raises(ValueError, match=f"{BLOCKS} spans"):
        slope([0.0, 1.0, 2.0], [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=f"{BLOCKS} spans"):
        slope([1.0] * 20, [1.0] * 20)
