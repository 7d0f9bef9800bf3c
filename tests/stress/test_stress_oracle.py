"""The oracle is right about a right run, and finds each thing that a wrong library could do. No process is started."""

from __future__ import annotations

from typing import Any

import pytest
from stress_reports import HANG_S, PEERS, SEED, Report, exchange_of, judged, kinds, reports, spoilt

from pyccl.stress import workload
from pyccl.stress.oracle import MASTER_GRACE_S


def test_a_right_run_has_no_violations_and_everything_is_compared() -> None:
    oracle = judged(reports(6))
    oracle.finish(1000.0)
    assert oracle.violations == []
    assert oracle.revision == 6
    assert oracle.checked["values"] == 3 * sum(len(workload.plan(SEED, revision)) for revision in range(6))
    assert oracle.checked["digests"] == 3 * 7
    exchanges = [exchange_of(number, revision) for number in PEERS for revision in range(6)]
    assert oracle.checked["exchanges"] == sum(told is not None for told in exchanges) > 0
    assert oracle.in_step() == [0, 1, 2]


def test_a_wrong_value_is_found_and_names_the_peer() -> None:
    def spoil(report: Report) -> None:
        index, bits, roster = report["ops"][1]
        report["ops"][1] = (index, bits[:-1] + ("0" if bits[-1] != "0" else "1"), roster)

    (violation,) = judged(spoilt(3, 2, "round", 1, spoil)).violations
    assert (violation.kind, violation.peer) == ("wrong value", 2)
    assert "round 1" in violation.text


def test_a_value_that_is_right_for_other_members_is_wrong() -> None:
    def spoil(report: Report) -> None:
        report["rosters"] = [(3, tuple(PEERS[number] for number in (0, 1)))]

    found = kinds(judged(spoilt(3, 1, "round", 1, spoil)))
    assert "wrong value" in found and "fork" in found


def test_the_same_bits_in_another_epoch_are_a_fork() -> None:
    def spoil(report: Report) -> None:
        report["rosters"] = [(4, report["rosters"][0][1])]

    assert set(kinds(judged(spoilt(3, 1, "round", 1, spoil)))) == {"fork"}


def test_a_member_that_nobody_started_is_found() -> None:
    def spoil(report: Report) -> None:
        epoch, members = report["rosters"][0]
        report["rosters"] = [(epoch, (*members, "f" * 32))]

    assert "members" in kinds(judged(spoilt(3, 0, "round", 2, spoil)))


def test_a_wrong_digest_is_found() -> None:
    def spoil(report: Report) -> None:
        report["digest"] = "0" * 64

    (violation,) = judged(spoilt(3, 1, "sync", 2, spoil)).violations
    assert (violation.kind, violation.peer) == ("digest", 1)


def test_equal_wrong_digests_on_all_are_found_too() -> None:
    told = reports(3)
    for _, report in told:
        if report["event"] == "sync" and report["revision"] == 2:
            report["digest"] = "0" * 64
    assert kinds(judged(told)) == ["digest"] * 3


def test_a_digest_of_a_revision_that_nobody_made_is_found_at_the_end() -> None:
    oracle = judged([*reports(2), (0, {**sync_report(7, epoch=4), "t": 99.0})])
    oracle.finish(100.0)
    assert kinds(oracle) == ["skipped revision", "digest"]


def sync_report(revision: int, *, epoch: int, **fields: Any) -> Report:
    return {
        "event": "sync", "t": 50.0, "revision": revision, "digest": "1" * 64, "epoch": epoch, "changed": (),
        "rx_bytes": 0, "liars": (), **fields,
    }  # fmt: skip


def test_a_lost_revision_is_found_at_a_member_that_stayed() -> None:
    told = reports(3)
    digest = next(r["digest"] for n, r in told if n == 1 and r["event"] == "sync" and r["revision"] == 2)
    (violation,) = judged([*told, (1, sync_report(2, epoch=3, digest=digest))]).violations
    assert (violation.kind, violation.peer) == ("lost revision", 1)


def test_a_group_that_goes_on_from_an_older_revision_in_a_later_epoch_is_found() -> None:
    told = reports(3)
    digest = next(r["digest"] for n, r in told if n == 1 and r["event"] == "sync" and r["revision"] == 1)
    newcomer: Report = {"event": "member", "t": 49.0, "epoch": 4, "members": tuple(PEERS.values())}
    oracle = judged([*told, (2, newcomer), (2, sync_report(1, epoch=4, digest=digest))])
    assert kinds(oracle) == ["lost revision"]


def test_a_round_that_is_made_twice_is_found() -> None:
    told = reports(4)
    again = [report for number, report in told if number == 0 and report["event"] == "round"][1]
    again = {**again, "rosters": [(4, again["rosters"][0][1])], "t": 99.0}
    assert "fork" in kinds(judged([*told, (0, again)]))


def test_a_state_that_a_sync_replaces_at_a_member_that_held_it_is_found() -> None:
    def spoil(report: Report) -> None:
        report["changed"] = ("weights",)

    assert kinds(judged(spoilt(3, 0, "sync", 2, spoil))) == ["replaced state"]


def test_an_input_that_was_not_restored_is_found() -> None:
    def spoil(report: Report) -> None:
        report["errors"] = [{"index": 0, "class": "EvictedError", "text": "silent", "restored": False}]

    oracle = judged(reports(1))
    oracle.excuse(1, "stop-long")
    report = reports(2)[-5][1]
    spoil(report)
    oracle.take(1, report)
    assert kinds(oracle) == ["input"]


def test_an_eviction_is_explained_by_a_fault_only() -> None:
    evicted: Report = {"event": "failed", "t": 50.0, "class": "EvictedError", "text": "silent for 5.0 s"}
    oracle = judged(reports(1))
    oracle.excuse(1, "stop-long")
    oracle.take(1, evicted)
    assert oracle.violations == [] and oracle.errors["EvictedError after stop-long"] == 1
    assert oracle.in_step() == [0, 2]
    oracle.take(2, evicted)
    assert kinds(oracle) == ["error"]


def test_a_master_that_is_away_explains_calls_that_need_it_and_nothing_else_does() -> None:
    failed: Report = {"event": "failed", "t": 50.0, "class": "MasterUnavailableError", "text": "away for 20 s"}
    refused = {**failed, "event": "refused"}
    oracle = judged(reports(1))
    oracle.master_away()
    oracle.take(1, failed)
    oracle.take(2, refused)
    oracle.master_back(49.0)
    oracle.take(1, failed)
    assert oracle.violations == [] and oracle.in_step() == [0, 1, 2]
    later = 49.0 + MASTER_GRACE_S + 1
    oracle.take(1, {**failed, "t": later})
    oracle.take(2, {**refused, "t": later})
    assert kinds(oracle) == ["error", "error"]


def test_an_excuse_ends_when_the_peer_goes_on_without_having_been_evicted() -> None:
    oracle = judged(reports(1))
    oracle.excuse(1, "stop-long")
    oracle.excuse_ends(1, 10.0)
    for number, report in reports(2)[-9:]:
        oracle.take(number, report)
    assert oracle.in_step() == [0, 1, 2]
    oracle.take(1, {"event": "failed", "t": 50.0, "class": "EvictedError", "text": "silent for 5.0 s"})
    assert kinds(oracle) == ["error"]


@pytest.mark.parametrize("name", ["DeadlineError", "MismatchError", "AloneError", "PeerLostError"])
def test_errors_that_no_fault_explains_are_violations(name: str) -> None:
    oracle = judged(reports(1))
    oracle.excuse(1, "stop-long")
    oracle.take(1, {"event": "failed", "t": 50.0, "class": name, "text": "?"})
    assert kinds(oracle) == ["error"]


def test_a_wrong_exchange_is_found() -> None:
    revision = next(r for r in range(20) if exchange_of(0, r) is not None)

    def spoil(report: Report) -> None:
        report["exchange"]["bits"] = "0" * 32

    assert kinds(judged(spoilt(revision + 1, 0, "round", revision, spoil))) == ["wrong value"]


def test_a_group_that_hangs_is_found() -> None:
    told = reports(3)
    oracle, last_s = judged(told), told[-1][1]["t"]
    assert oracle.watch(last_s + HANG_S - 5) == []
    found = oracle.watch(last_s + HANG_S + 5)
    assert {violation.kind for violation in found} == {"hang"}
    assert {violation.peer for violation in found} == {None, 0, 1, 2}
    assert oracle.violations == found


def test_one_peer_that_hangs_while_the_others_go_on_is_found() -> None:
    quiet = [(number, report) for number, report in reports(12) if number != 1 or report["t"] < 20]
    oracle = judged(quiet)
    (violation,) = oracle.watch(quiet[-1][1]["t"])
    assert (violation.kind, violation.peer) == ("hang", 1)


def test_a_stopped_peer_and_a_stopped_master_do_not_hang() -> None:
    told = reports(3)
    last_s = told[-1][1]["t"]
    oracle = judged(told)
    assert oracle.watch(last_s + 100, not_before_s=last_s + 90) == []
    for number in PEERS:
        oracle.stop(number)
    assert oracle.watch(last_s + 100) == []
    oracle.resume(1, last_s + 100)
    assert oracle.watch(last_s + 100 + HANG_S / 2) == []
    (violation,) = oracle.watch(last_s + 101 + HANG_S)
    assert (violation.kind, violation.peer) == ("hang", 1)


def test_a_process_that_ends_by_itself_is_a_crash() -> None:
    oracle = judged(reports(1))
    oracle.ended(0, expected=True, how="killed", now_s=50.0)
    assert oracle.violations == []
    oracle.ended(1, expected=False, how="ended with -11", now_s=50.0)
    assert kinds(oracle) == ["crash"]
    assert oracle.in_step() == [2]
