"""The simulator must find what is broken on purpose: each planted bug within a bounded number of seeds.

The bugs sit between the machines and the world (sim_engine.py, sim_peer.py: ``bug``); the machines stay as they ship.
"""

from __future__ import annotations

import pytest
from sim_cluster import simulate
from sim_world import SimError

BUGS = {
    "thaw": "a report does not freeze: DATA and DONE still change outcomes behind it",
    "no_verdicts": "the epoch is entered without the verdicts of the flush",
    "majority": "DONE of one member counts for all",
    "stale": "frames of an older epoch are taken for the current one",
    "no_resend": "a link that came back repeats nothing",
    "deaf_to_abort": "ABORT is not heard",
    "blames_others": "the master takes a failure of its own line for the silence of all members",
    "mixes_pairs": "early bytes of one partner are taken for those of another with the same tag and number",
    "forget_journal": "a master that starts again knows the run and none of its epochs",
    "send_before_sync": "an epoch is committed before its record is durable",
    "early_drained": "a member is ready for the next epoch before its operations have ended",
}
SEEDS = 60


def _failure(seed: int, bug: str) -> str:
    try:
        simulate(seed, bug, chaos_s=20.0, deadline_rate=0.05, fault_rate=1.0)
    except SimError as exc:
        return str(exc)
    return ""


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_found(bug: str) -> None:
    for seed in range(SEEDS):
        found = _failure(seed, bug)
        if found:
            assert f"--seed {seed} " in found
            assert not _failure(seed, ""), "it fails without the bug, too"
            return
    pytest.fail(f"{SEEDS} seeds did not find: {BUGS[bug]}")
