"""``pyccl bench all-reduce --vs gloo``."""

from __future__ import annotations

import pytest
from bench_runs import bench, check_summary, done


@pytest.mark.parametrize(("world", "quantize"), [("2", []), ("3", ["--quantize", "uint8"])], ids=["plain", "quantized"])
def test_all_reduce_against_gloo_uses_tcp_alone(world: str, quantize: list[str]) -> None:
    told = done("all-reduce", "--world", world, "--mib", "0.5", "--iters", "2", "--vs", "gloo", *quantize)
    assert set(told["systems"]) == {"pyccl", "gloo"}
    for figures in told["systems"].values():
        check_summary(figures["seconds"])
        assert figures["bus_gb_per_s"] > 0 and figures["cpu_s_per_gib"] > 0
    for transport in told["systems"]["gloo"]["transport"]:
        assert transport["tcp_sockets"] > 0 and transport["carried_by_tcp"]
        assert transport["unix_sockets"] == 0 and transport["shared_memory"] == []
    medians, sent = (
        [told["systems"][name][what] for name in ("pyccl", "gloo")] for what in ("seconds", "wire_tx_bytes_per_rank")
    )
    assert told["ratio_of_medians"] == pytest.approx(medians[0]["median"] / medians[1]["median"])
    assert sent[1] > 2 * (int(world) - 1) / int(world) * told["settings"]["size_bytes"]
    assert not quantize or sent[0] < sent[1] / 2


def test_the_table_says_what_is_compared_where_it_is_not_the_same() -> None:
    finished = bench(
        "all-reduce", "--mib", "0.1", "--iters", "1", "--vs", "gloo", "--quantize", "uint8", "--out", "--op", "avg"
    )
    assert finished.status == 0, finished.stderr
    for text in ("pyccl / gloo: median", "Gloo has no codecs", "Gloo always reduces in place"):
        assert text in finished.stdout
