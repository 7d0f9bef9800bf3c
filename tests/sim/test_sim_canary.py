"""The simulator must find what is broken on purpose: each planted bug within a bounded number of seeds.

Each canary changes what is imported, so it runs in an interpreter of its own: that of the command.
"""

from __future__ import annotations

import json

import pytest
from sim_canaries import CANARIES, ROOT
from sim_command import sim
from sim_main import CANARY_SEEDS, run_seed

REQUIRED = {
    *("skip_flush", "report_without_freezing", "abort_after_done", "accept_stale_epoch"),
    *("majority_done", "forget_journal", "send_before_fsync", "admit_twice"),
}


@pytest.mark.parametrize("name", CANARIES)
def test_the_code_still_holds_what_the_canary_changes(name: str) -> None:
    canary = CANARIES[name]
    source = (ROOT / canary.file).read_text(encoding="utf-8")
    assert canary.planted(source) != source


@pytest.mark.parametrize("name", CANARIES)
def test_planted_bug_is_found(name: str) -> None:
    status, out = sim("--canary", name, "--json")
    told = json.loads(out)
    assert status == 1, f"{CANARY_SEEDS} seeds did not find: {CANARIES[name].text}"
    (seed,) = told["failed"]
    assert told["replay"] == [f"tools/sim --seed {seed} --canary {name}"]
    assert run_seed(int(seed), saved=CANARIES[name].saved).failure == "", "it fails without the bug, too"


def test_known_bugs_are_among_them_in_both_languages() -> None:
    assert set(CANARIES) >= REQUIRED
    assert {canary.language for canary in CANARIES.values()} == {"Python", "C"}


def test_canary_whose_text_is_gone_is_an_error() -> None:
    canary = CANARIES["skip_flush"]
    planted = canary.planted((ROOT / canary.file).read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="skip_flush"):
        canary.planted(planted)
