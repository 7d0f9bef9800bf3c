"""The verdict on a demo run: what must make the exit status non-zero does, and which status it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pyccl.demo.progress import ExitStatus, Fate, Mark, Peer, Plan, Run
from pyccl.demo.show import PlainScreen, summary, table

PLAN = Plan(peers=4, rounds=9)
ENTROPY_BITS = 4.0
JOINED_AT = 7


def line(revision: int, **changes: object) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "event": "round",
        "revision": revision,
        "digest": f"digest-{revision}",
        "epoch": 2,
        "world_size": 4,
        "retries": 0,
        "sync_bytes": 0,
        "train_loss": 3.0,
        "validation_loss": 6.0 - revision / 3,
        "mb_per_s": 100.0,
    }
    return fields | changes


def good_run() -> Run:
    """Peer 1 is killed at revision 3, peer 4 joins at 7."""
    run = Run(PLAN, ENTROPY_BITS, {number: Peer(number) for number in range(5)})
    spans = {0: (0, 9), 1: (0, 3), 2: (0, 9), 3: (0, 9), 4: (JOINED_AT, 9)}
    for number, (first, last) in spans.items():
        run.observe(number, {"event": "joined", "peer_id": f"{number}" * 32}, 0.0)
        for revision in range(first, last + 1):
            run.observe(number, line(revision, retries=int(revision == 4)), float(revision))
        run.peers[number].fate = Fate.FINISHED
    run.peers[1].fate = Fate.KILLED
    run.killed = Mark(3, 3.0, 1)
    run.told_to_join = Mark(6, 6.0, 4)
    return run


def replace_report(run: Run, number: int, revision: int, **changes: object) -> None:
    peer = run.peers[number]
    kept = [report for report in peer.reports if report.revision != revision]
    peer.reports = kept
    run.observe(number, line(revision, **changes), float(revision))
    peer.reports.sort(key=lambda report: report.revision)


def test_good_run_is_ok_and_counts_what_it_compared() -> None:
    run = good_run()
    assert run.verdict().status is ExitStatus.OK
    assert run.verdict().reasons == ()
    check = run.check_digests()
    assert (check.compared, check.revisions) == (4 * 4 + 3 * 3 + 4 * 3, 10)
    assert run.retries == 3  # three survivors ran an operation of round 4 twice
    assert run.joined() == Mark(JOINED_AT, float(JOINED_AT), 4)


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_one_different_digest_fails_the_run_and_names_revision_and_peer(number: int) -> None:
    run = good_run()
    replace_report(run, number, 3, digest="rotten")
    verdict = run.verdict()
    assert verdict.status is ExitStatus.DIGESTS_DIFFER
    assert any("revision 3" in reason and f"peer {number} rotten" in reason for reason in verdict.reasons)


def test_newcomer_that_ends_with_another_digest_fails_the_run() -> None:
    run = good_run()
    replace_report(run, 4, 9, digest="rotten")
    assert run.verdict().status is ExitStatus.DIGESTS_DIFFER


def test_peer_that_reports_two_digests_for_one_revision_fails_the_run() -> None:
    run = good_run()
    run.observe(0, line(9, digest="second thoughts"), 9.5)
    assert run.verdict().status is ExitStatus.DIGESTS_DIFFER


@pytest.mark.parametrize("number", [0, 4])
def test_survivor_that_left_out_a_revision_fails_the_run(number: int) -> None:
    run = good_run()
    run.peers[number].reports = [report for report in run.peers[number].reports if report.revision != 8]
    verdict = run.verdict()
    assert verdict.status is ExitStatus.DIGESTS_DIFFER
    assert f"peer {number} did not report every revision" in verdict.reasons[0]


@pytest.mark.parametrize(("loss", "status"), [(3.2, ExitStatus.OK), (3.21, ExitStatus.LOSS_TOO_HIGH)])
def test_last_loss_must_be_at_most_four_fifths_of_the_entropy(loss: float, status: ExitStatus) -> None:
    run = good_run()
    for number in (0, 2, 3, 4):
        replace_report(run, number, 9, validation_loss=loss)
    assert run.verdict().status is status


def test_loss_that_is_not_a_number_fails_the_run() -> None:
    run = good_run()
    for number in (0, 2, 3, 4):
        replace_report(run, number, 9, validation_loss=float("nan"))
    assert run.verdict().status is ExitStatus.LOSS_TOO_HIGH


def test_run_without_its_kill_or_its_join_fails() -> None:
    run = good_run()
    run.killed = None
    del run.peers[4]
    verdict = run.verdict()
    assert verdict.status is ExitStatus.NO_KILL_OR_JOIN
    assert verdict.reasons == ("the kill did not happen", "the newcomer did not join")


def test_kill_and_join_are_not_missed_when_they_were_not_wanted() -> None:
    plan = Plan(peers=2, rounds=1, kill=False, join=False)
    run = Run(plan, ENTROPY_BITS, {number: Peer(number) for number in range(2)})
    for number in range(2):
        for revision in (0, 1):
            run.observe(number, line(revision, validation_loss=3.0), 0.0)
        run.peers[number].fate = Fate.FINISHED
    assert run.verdict().status is ExitStatus.OK


def test_failed_peer_and_different_digests_are_both_named_and_digests_are_graver() -> None:
    run = good_run()
    run.fail(ExitStatus.CHILD_FAILED, "peer 2 ended early with status 1")
    assert run.verdict().status is ExitStatus.CHILD_FAILED
    replace_report(run, 0, 5, digest="rotten")
    verdict = run.verdict()
    assert verdict.status is ExitStatus.DIGESTS_DIFFER
    assert len(verdict.reasons) == 2


def test_run_without_any_report_is_not_ok() -> None:
    assert Run(PLAN, ENTROPY_BITS).verdict().status is not ExitStatus.OK


@pytest.mark.parametrize(
    "fields",
    [{"event": "dance"}, {}, line(1, digest=None), line(1) | {"revision": "1"}, line(1, mb_per_s="fast")],
)
def test_malformed_report_is_refused_and_leaves_no_trace(fields: dict[str, Any]) -> None:
    run = Run(PLAN, ENTROPY_BITS, {0: Peer(0)})
    with pytest.raises(ValueError, match=r"event|field"):
        run.observe(0, fields, 0.0)
    assert run.peers[0] == Peer(0)


def test_summary_shows_each_figure_and_the_outcome() -> None:
    text = "\n".join(summary(good_run()))
    for figure in ("6.000 at first", "3.000 at last", "3.200", "37 compared", "peer 1 at round 3", "peer 4 at round 7"):
        assert figure in text
    assert "exit status 0" in text.splitlines()[-1]


def test_summary_of_an_empty_run_names_its_failure() -> None:
    run = Run(PLAN, ENTROPY_BITS)
    run.fail(ExitStatus.CHILD_FAILED, "master ended early with status 3")
    assert "FAILED           master ended early with status 3" in summary(run)


def test_json_object_carries_the_verdict_and_survives_a_round_trip() -> None:
    data = json.loads(json.dumps(good_run().to_json()))
    assert data["ok"] is True
    assert data["exit_status"] == 0
    assert data["loss"]["unit"] == "bits/char"
    assert data["digests"] == {"compared": 37, "revisions": 10, "differences": []}
    assert data["killed"]["peer"] == 1
    assert data["joined"]["revision"] == JOINED_AT


def test_plain_screen_prints_one_line_for_each_new_revision(tmp_path: Path) -> None:
    run = Run(PLAN, ENTROPY_BITS, {0: Peer(0)})
    with (tmp_path / "out").open("w+", encoding="utf-8") as stream:
        screen = PlainScreen(stream)
        for revision in range(3):
            run.observe(0, line(revision), float(revision))
            screen.update(run, float(revision))
            screen.update(run, float(revision))
        stream.seek(0)
        shown = stream.read().splitlines()
    assert len(shown) == 3
    assert "round   2/9" in shown[-1]


def test_table_has_a_row_for_each_peer_even_before_its_first_report() -> None:
    run = good_run()
    run.peers[5] = Peer(5)
    assert table(run, 1.0) is not None


def test_plot_writes_a_png_even_of_a_run_that_never_began(tmp_path: Path) -> None:
    plot = pytest.importorskip("pyccl.demo.plot")
    for name, run in (("good.png", good_run()), ("empty.png", Run(PLAN, ENTROPY_BITS))):
        plot.save(run, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
