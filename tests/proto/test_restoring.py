"""Saved states: what an observer keeps, wants and offers, and who takes what at a sync without voters."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from pyccl._proto import restoring
from pyccl._proto.election import Record, Strategy
from pyccl._proto.epoch import Member
from pyccl._proto.restoring import SHUNNED_S, Sources

A, B, C = (bytes([n]) * 16 for n in (1, 2, 3))
MEMBERS = tuple(Member(peer, peer, ()) for peer in (A, B, C))


@dataclass(frozen=True)
class File:
    revision: int
    written_ns: int


@dataclass(frozen=True)
class Told:
    revision: int
    name: str


def test_the_newest_revision_is_offered_and_stays_whatever_was_written_after_it() -> None:
    kept = [File(50, 1), File(1, 2), File(2, 3), File(3, 4)]
    assert restoring.newest(kept) == File(50, 1)
    assert restoring.to_drop(kept, 2) == [File(1, 2)]
    assert restoring.newest([File(3, 1), File(3, 2)]) == File(3, 2)
    assert restoring.newest([]) is None and restoring.to_drop([], 2) == []


@pytest.mark.parametrize(
    ("have", "every", "revision", "wanted"),
    [(0, 5, 0, True), (4, 3, 3, False), (4, 3, 5, False), (4, 3, 6, True), (4, 3, 2, True), (4, 0, 4, True)],
)
def test_it_wants_what_is_far_enough_or_went_back(have: int, every: int, revision: int, wanted: bool) -> None:
    assert restoring.wants(have, every, revision) is wanted


def test_members_are_followed_in_turn_but_for_one_that_served_what_was_no_state() -> None:
    sources = Sources()
    assert sources.next((), 0.0) is None
    assert [sources.next(MEMBERS, 0.0) for _ in range(4)] == [*MEMBERS, MEMBERS[0]]
    sources.shun(MEMBERS[1], 10.0)
    assert {sources.next(MEMBERS, 10.0) for _ in range(4)} == {MEMBERS[0], MEMBERS[2]}
    assert sources.next(MEMBERS[1:2], 10.0 + SHUNNED_S - 1) is None
    assert sources.next(MEMBERS[1:2], 10.0 + SHUNNED_S) == MEMBERS[1]


def record(peer: bytes, *, voter: bool = False, asks: bool = False, strategy: int = 0) -> Record:
    return Record(peer, voter, b"l" * 16, 1, b"r" * 32, b"", strategy=Strategy(strategy), asks=asks)


def test_observers_are_asked_when_nobody_votes_and_somebody_knows_one() -> None:
    assert restoring.asks_first([record(A), record(B, asks=True)])
    assert not restoring.asks_first([record(A), record(B)])
    assert not restoring.asks_first([record(A, voter=True), record(B, asks=True)])
    assert restoring.asks_first([record(A, voter=True, strategy=Strategy.RECEIVE_ONLY), record(B, asks=True)])


def test_the_best_offer_is_taken_by_one_member_and_only_if_it_is_newer() -> None:
    assert restoring.best([Told(3, "b"), Told(4, "c"), Told(4, "a")]) == Told(4, "a")
    assert restoring.best([]) is None
    assert restoring.taker((A, B, C), (0, 8, 8), 6) == (7, B)
    assert restoring.taker((A, B, C), (0, 8, 8), 8) == (7, None)
    assert restoring.taker((A, B, C), (0, 0, 0), 0) == (0, None)


def test_what_is_on_offer_must_be_held_at_the_election_though_its_holder_may_be_lost_before() -> None:
    assert restoring.taker((A, B), (0, 8), 7) == (7, None)


def test_a_state_from_a_file_votes_when_somebody_else_has_agreed_to_it() -> None:
    assert restoring.after_sync(True, alone=True) == (True, False)
    assert restoring.after_sync(True, alone=False) == (False, True)
    assert restoring.after_sync(False, alone=True) == (False, True)
