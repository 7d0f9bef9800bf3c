"""The command tools/sim: what it promises of each seed, its exit status, and that a replay is the same run."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
import sim_main
import sim_options
from sim_command import sim
from sim_faults import PHASES
from sim_options import FAULT_KINDS


def test_seeds_that_pass_are_whole_and_end_with_status_0() -> None:
    status, out = sim("--seeds", "4", "--first", "100", "--jobs", "2", "--json")
    told = json.loads(out)
    assert (status, told["seeds"], told["failed"]) == (0, 4, {}), out
    least = told["least"]
    assert least["virtual_s"] >= 120 and least["faults"] >= 20 and least["operations"] >= 200
    assert least["peers"] >= 4 and told["peers_most"] <= 12


def test_every_fault_and_every_phase_is_met() -> None:
    faults: Counter[str] = Counter()
    phases: Counter[str] = Counter()
    for out in sim_main.run_seeds(200, 12, 2):
        assert not out.failure, (out.seed, out.failure)
        for kind, phase, times in out.met:
            faults[kind] += times
            phases[phase] += times
    assert set(faults) == set(FAULT_KINDS)
    assert set(phases) == set(PHASES)


def test_seed_that_fails_is_named_with_its_replay_line_which_fails_alike() -> None:
    status, out = sim("--canary", "no_verdicts")
    found = re.search(r"seed (\d+) fails: (.*)\n  replay: tools/sim (--seed \d+ --canary no_verdicts)\n", out)
    assert status == 1 and found is not None, out
    status, trace = sim(*found[3].split(), hash_seed=1)
    assert status == 1
    assert f"seed {found[1]} FAILS: {found[2]}" in trace
    assert re.search(r"^ +\d+\.\d{4} fault \w+ at p\d+", trace, re.MULTILINE)
    assert re.search(r"^ +\d+\.\d{4} p\d+ <- EpochCommit", trace, re.MULTILINE)


def test_run_is_the_same_in_every_process() -> None:
    runs = [sim("--seed", "5", hash_seed=hash_seed)[1] for hash_seed in (1, 2)]
    trace, again = (run.rpartition(", CPU ")[0] for run in runs)
    assert len(trace) > 100_000
    assert trace == again


def test_process_that_dies_costs_its_seed_only() -> None:
    assert sim_main._outcome(3, b"", -6).failure == "its process died of SIGABRT"
    assert sim_main._outcome(3, b"", 1).failure == "its process ended with status 1"


def test_run_with_too_few_operations_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim_options, "OPERATIONS_MIN", 10**6)
    assert sim_main.run_seed(100).failure.startswith("only ")
