"""Every ``pyccl bench`` command on tiny sizes: what --json holds, exit statuses, and that no process remains."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from bench_runs import RUN_S, Finished, all_gone, bench, carriers, check_summary, done, started, state_of
from click.testing import CliRunner

import pyccl
from pyccl.bench import machine
from pyccl.bench.crowd import group_sizes
from pyccl.cli.main import main
from pyccl.codecs import CODECS, size_bytes


def test_all_reduce_tells_raw_times_of_every_rank() -> None:
    told = done("all-reduce", "--world", "3", "--mib", "0.05", "--iters", "2", "--warmup", "1", "--op", "avg", "--out")
    assert set(told["systems"]) == {"pyccl"} and told["ratio_of_medians"] is None
    figures = told["systems"]["pyccl"]
    check_summary(figures["seconds"])
    assert len(figures["raw_seconds"]) == 2
    assert [len(times) for times in figures["rank_raw_seconds"]] == [2, 2, 2]
    for i, slowest in enumerate(figures["raw_seconds"]):
        assert slowest >= max(times[i] for times in figures["rank_raw_seconds"])
    assert figures["wire_tx_bytes_per_rank"] >= min(figures["payload_tx_bytes_per_rank"]) > 0
    assert figures["bus_gb_per_s"] > 0 and figures["cpu_s_per_gib"] > 0
    assert told["settings"]["in_place"] is False and told["settings"]["op"] == "avg"


@pytest.mark.parametrize("algorithm", ["direct", "ring"])
def test_all_reduce_runs_the_algorithm_that_was_asked_for(algorithm: str) -> None:
    told = done("all-reduce", "--world", "3", "--mib", "0.05", "--iters", "1", "--algorithm", algorithm)
    assert told["settings"]["algorithm"] == told["systems"]["pyccl"]["algorithm"] == algorithm


def test_all_reduce_prints_a_table_for_a_person() -> None:
    finished = bench("all-reduce", "--mib", "0.01", "--iters", "2", "--connections", "2")
    assert finished.status == 0, finished.stderr
    assert finished.left == []
    assert "connections 2, algorithm direct (auto)" in finished.stdout
    for text in ("command   pyccl bench all-reduce", "machine   ", "versions  pyccl ", "bus GB/s", "CPU s/GiB"):
        assert text in finished.stdout


def test_bfloat16_without_its_package_is_a_bad_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "is_installed", lambda package: False)
    result = CliRunner().invoke(main, ["bench", "all-reduce", "--dtype", "bfloat16"])
    assert result.exit_code == 2 and "pip install ml_dtypes" in result.output


def test_python_m_pyccl_is_the_command() -> None:
    told = subprocess.run(
        [sys.executable, "-P", "-m", "pyccl", "--version"], capture_output=True, text=True, check=True
    )
    assert told.stdout == f"pyccl, version {pyccl.__version__}\n"


def test_what_the_library_refuses_is_a_bad_argument_and_ends_all_processes() -> None:
    finished = bench("all-reduce", "--mib", "0.01", "--iters", "2", "--quantize", "no-such-codec")
    assert (finished.status, finished.left) == (2, [])
    assert "no-such-codec" in finished.stderr and "Traceback" not in finished.stderr


def test_gloo_without_torch_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "is_installed", lambda package: False)
    result = CliRunner().invoke(main, ["bench", "all-reduce", "--vs", "gloo"])
    assert result.exit_code == 3
    assert result.output == "pyccl bench: --vs gloo needs torch: pip install torch\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["all-reduce", "--world", "1"],
        ["all-reduce", "--mib", "0"],
        ["sync", "--mib", "nan"],
        ["loss", "--peer-timeout", "nan"],
        ["all-reduce", "--connections", "none"],
        ["all-reduce", "--connections", "65"],
        ["all-reduce", "--dtype", "complex64"],
        ["all-reduce", "--vs", "gloo", "--dtype", "int16"],
        ["loss", "--world", "2"],
        ["loss", "--cause", "boredom"],
        ["sync", "--iters", "0"],
        ["sync", "--data", "nothing"],
        ["nothing"],
    ],
    ids=" ".join,
)
def test_bad_arguments_are_refused_at_once(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "is_installed", lambda package: True)
    assert CliRunner().invoke(main, ["bench", *arguments]).exit_code == 2


def test_join_tells_connect_sync_and_stall() -> None:
    told = done("join", "--world", "3", "--iters", "2")
    for name in ("connect_s", "sync_s", "total_s", "stall_s", "cpu_s"):
        check_summary(told[name])
    assert len(told["arrivals"]) == 2
    for arrival in told["arrivals"]:
        assert arrival["rx_bytes"] == sum(arrival["source_bytes"]) == told["settings"]["state_bytes"]
        assert arrival["wire_rx_bytes"] > arrival["rx_bytes"]
    assert told["quiet"]["longest_s"] >= told["quiet"]["median_s"] > 0


def test_sync_tells_bytes_of_each_source() -> None:
    told = done("sync", "--world", "3", "--mib", "3", "--iters", "1")
    check_summary(told["sync_mb_per_s"])
    check_summary(told["sync_cpu_s_per_gib"])
    (arrival,) = told["arrivals"]
    assert len(arrival["source_bytes"]) == 2
    assert arrival["rx_bytes"] == sum(arrival["source_bytes"]) == arrival["chunk_bytes"] == 3 << 20
    assert arrival["packing"] and told["settings"]["data"] == "random"


def test_sync_tells_the_memory_of_newcomer_and_holder() -> None:
    finished = bench("sync", "--world", "2", "--mib", "12", "--iters", "1")
    assert finished.status == 0 and "most memory beyond the state itself: newcomer" in finished.stdout, finished.stderr
    told = done("sync", "--world", "2", "--mib", "12", "--iters", "1")
    check_summary(told["extra_bytes"])
    assert told["extra_bytes"]["min"] >= 12 << 20  # staged in memory, being less than 32 MiB
    assert 0 <= told["holder_extra_bytes"] < told["extra_bytes"]["min"]


def test_loss_tells_the_gap_of_the_survivors() -> None:
    told = done("loss", "--mib", "0.01", "--iters", "1", "--peer-timeout", "1")
    for cause in ("killed", "silent"):
        check_summary(told[cause]["gap_s"])
    assert [loss["cause"] for loss in told["losses"]] == ["killed", "silent"]


def test_restart_tells_that_no_operation_failed_and_when_the_next_join_was() -> None:
    told = done("restart", "--world", "3", "--iters", "2", "--down", "0.1")
    for name in ("operations", "gap_s", "join_s"):
        check_summary(told[name])
    assert len(told["restarts"]) == 2 and all(restart["operations"] > 0 for restart in told["restarts"])


def test_restart_prints_a_table() -> None:
    finished = bench("restart", "--world", "3", "--iters", "1", "--down", "0")
    assert finished.status == 0 and finished.left == [], finished.stderr
    assert "all-reduces meanwhile, 0 failed" in finished.stdout


def test_epoch_tells_what_its_changes_cost_the_master() -> None:
    told = done("epoch", "--peers", "12", "--iters", "2")
    assert told["groups"] == [12]
    for change in ("loss", "join", "loss_alone", "join_alone"):
        assert told[change]["wall_s"]["min"] > 0 and told[change]["cpu_s"]["min"] >= 0
        assert [len(told["raw"][name][change]) for name in ("cpu_s", "wall_s")] == [2, 2]


def test_epoch_prints_a_table() -> None:
    finished = bench("epoch", "--peers", "5", "--iters", "1")
    assert finished.status == 0 and finished.left == [], finished.stderr
    assert "5 simulated peers in groups of 5" in finished.stdout


MEMORY = (
    *("memory", "--peers", "2", "--minutes", "0.1", "--warm-up", "0.01", "--round", "0.05", "--sample", "0.05"),
    *("--passers", "3"),
)


def test_memory_tells_a_line_for_the_master_and_every_peer_while_one_comes_and_goes() -> None:
    told = done(*MEMORY)
    assert [process["name"] for process in told["processes"]] == ["master", "founder 0", "founder 1", "comer"]
    assert told["rounds"] > 0 and told["visits"] > 0 and told["cpu_share"] > 0 and told["settings"]["passers"] == 3
    for process in told["processes"]:
        assert process["anonymous_bytes"]["plus_minus"] >= 0
        assert process["second_half"]["anonymous_bytes"]["plus_minus"] >= 0
        assert process["warm_up"] and all(sample["at_s"] < 0.6 for sample in process["warm_up"])
        for sample in process["samples"]:
            assert 0 < sample["anonymous_bytes"] <= sample["rss_bytes"] and sample["at_s"] >= 0.6
            assert sample["descriptors"] > 0 and 0 < sample["pss_bytes"] <= sample["rss_bytes"]


def test_memory_prints_a_table() -> None:
    finished = bench(*MEMORY)
    assert finished.status == 0 and finished.left == [], finished.stderr
    assert "2 members that stay and one that comes and goes" in finished.stdout and "KiB/hour" in finished.stdout


def test_memory_with_a_warm_up_as_long_as_the_run_is_a_bad_argument() -> None:
    result = CliRunner().invoke(main, ["bench", "memory", "--minutes", "10", "--warm-up", "10"])
    assert result.exit_code == 2 and "leaves nothing" in result.output


def test_the_peers_of_epoch_are_in_groups_that_hold_them() -> None:
    assert group_sizes(256) == [256]
    assert group_sizes(257) == [129, 128]
    assert group_sizes(1000) == [250] * 4


def test_kernels_tell_a_rate_for_each_instruction_set_and_place() -> None:
    told = done("kernels", "--mib", "0.1", "--dtype", "float32", "--dtype", "int32", "--op", "avg", "--op", "max")
    rates = told["rates"]
    for rate in rates:
        check_summary(rate["gib_per_s"])
    reduces = [rate for rate in rates if rate["what"] == "reduce"]
    assert {rate["place"] for rate in rates} == {"cache", "memory"}
    assert {(rate["dtype"], rate["op"]) for rate in reduces} == {
        ("float32", "avg"), ("float32", "max"), ("int32", "max"),  # integers have no average
    }  # fmt: skip
    assert {"memcpy", "reduce"} <= {rate["what"] for rate in rates}


def test_kernels_print_a_table_that_says_what_is_counted() -> None:
    finished = bench("kernels", "--mib", "0.1", "--dtype", "float32", "--op", "sum")
    assert finished.status == 0, finished.stderr
    assert "GiB/s of elements" in finished.stdout and "reduce float32 sum" in finished.stdout
    assert "codec, error of float32" in finished.stdout


def test_kernels_tell_rate_and_error_of_every_codec() -> None:
    told = done("kernels", "--mib", "0.1", "--dtype", "float32", "--op", "max")
    whats = {rate["what"] for rate in told["rates"]}
    assert {f"{way} {codec}" for way in ("encode", "decode") for codec in CODECS} < whats
    errors = {(error["codec"], error["data"]): error for error in told["codec_errors"]}
    assert len(errors) == 2 * len(CODECS) == len(told["codec_errors"])
    for (codec, _), error in errors.items():
        assert error["bits"] == 8 * size_bytes(codec, error["block"], error["block"]) / error["block"]
        assert 0 < error["worst"] <= 0.26 and 0 < error["rms"] < 0.25
    assert errors["int8", "normal"]["rms"] < errors["fp8_e4m3", "normal"]["rms"] < errors["fp4_e3m0", "normal"]["rms"]


def test_digest_tells_own_rates_and_others() -> None:
    told = done("digest", "--mib", "1")
    whats = {rate["what"] for rate in told["rates"]}
    assert {"pyccl chunks", "hashlib sha256"} <= whats
    assert ("xxhash xxh3_128" in whats) == machine.is_installed("xxhash")
    for rate in told["rates"]:
        check_summary(rate["gib_per_s"])


def test_outer_tells_rates_of_the_rules_beside_a_copy() -> None:
    told = done("outer", "--mib", "1")
    rates = {rate["what"]: rate for rate in told["rates"]}
    steps = {f"outer step, {kind}" for kind in ("Nesterov", "heavy-ball", "SGD")}
    assert set(rates) == {"memcpy", "theta - w", "eager", "mix", "gossip step, pair", *steps}
    for rate in rates.values():
        check_summary(rate["gib_per_s"])
        assert rate["of_copy"] == rate["gib_per_s"]["median"] / rates["memcpy"]["gib_per_s"]["median"]


def wait_for_stopped_child(mark: str) -> None:
    """Until a member was stopped; the run goes on for a minute after that."""
    deadline = time.monotonic() + RUN_S
    while not any(state_of(pid) == "T" for pid in carriers(mark)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


SILENT = ("loss", "--mib", "0.01", "--cause", "silent", "--iters", "1", "--peer-timeout", "60")


def test_sigterm_in_the_middle_ends_all_processes_and_one_that_is_stopped_too() -> None:
    with started(*SILENT) as (process, mark):
        wait_for_stopped_child(mark)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=RUN_S)
        finished = Finished(process.returncode, stdout, stderr, carriers(mark))
    assert (finished.status, finished.left) == (128 + signal.SIGTERM, [])
    assert "ended by signal 15" in finished.stderr


def test_killed_command_leaves_no_process_not_even_one_that_is_stopped() -> None:
    with started(*SILENT) as (process, mark):
        wait_for_stopped_child(mark)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(RUN_S)
        assert all_gone(mark)
