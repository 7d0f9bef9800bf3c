"""The election: examples of each clause, and what must hold whatever the records are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyccl._proto.election import Elected, LayoutMismatch, Record, elect

LINE, FORK = b"L" * 16, b"K" * 16
LAYOUT = b"l" * 16
OLD, NEW, EVIL = b"o" * 16, b"n" * 16, b"e" * 16


def record(peer: int, revision: int, root: bytes, *, voter: bool = True, lineage: bytes = LINE) -> Record:
    return Record(bytes([peer]) * 16, voter, lineage, revision, root, LAYOUT)


def ids(*peers: int) -> tuple[bytes, ...]:
    return tuple(bytes([peer]) * 16 for peer in peers)


def elected(*records: Record) -> Elected:
    result = elect(records)
    assert isinstance(result, Elected)
    return result


def test_newest_revision_wins_among_voters_and_the_others_fetch() -> None:
    result = elected(record(1, 4, OLD), record(2, 5, NEW), record(3, 5, NEW), record(4, 4, OLD))
    assert (result.revision, result.root, result.holders, result.fetchers) == (5, NEW, ids(2, 3), ids(1, 4))


def test_lone_liar_with_a_huge_revision_loses_against_two_that_agree() -> None:
    result = elected(record(1, 5, NEW), record(2, 5, NEW), record(3, 10**9, EVIL))
    assert (result.root, result.fetchers) == (NEW, ids(3))


def test_newcomers_do_not_vote_while_a_voter_is_there() -> None:
    result = elected(record(1, 5, OLD), *(record(n, 10**9, EVIL, voter=False) for n in range(2, 9)))
    assert (result.root, result.holders) == (OLD, ids(1))


def test_newcomer_that_holds_exactly_the_elected_state_serves_it() -> None:
    assert elected(record(1, 5, NEW), record(2, 5, NEW, voter=False)).holders == ids(1, 2)


def test_first_sync_lets_all_vote() -> None:
    result = elected(*(record(n, 3, NEW, voter=False) for n in (1, 2)), record(3, 7, EVIL, voter=False))
    assert (result.revision, result.holders) == (7, ids(3))


def test_voters_of_a_fork_are_void() -> None:
    result = elected(record(1, 5, NEW), record(2, 5, NEW), record(3, 99, EVIL, lineage=FORK))
    assert (result.lineage, result.root) == (LINE, NEW)


def test_lowest_lineage_and_lowest_root_break_ties() -> None:
    assert elected(record(1, 5, NEW, lineage=LINE), record(2, 5, OLD, lineage=FORK)).lineage == FORK
    assert elected(record(1, 5, OLD), record(2, 5, NEW)).root == NEW


def test_most_holders_win_at_equal_revisions() -> None:
    assert elected(record(1, 5, EVIL), record(2, 5, OLD), record(3, 5, OLD)).root == OLD


def test_two_layouts_are_a_mismatch_that_names_the_minority() -> None:
    odd = Record(b"\x03" * 16, True, LINE, 5, NEW, b"x" * 16)
    result = elect([record(1, 5, NEW), record(2, 5, NEW), odd])
    assert isinstance(result, LayoutMismatch)
    assert (result.groups, result.odd) == ((ids(1, 2), ids(3)), ids(3))


def test_no_record_or_two_of_one_peer_is_a_bug_of_the_caller() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        elect([])
    with pytest.raises(ValueError, match="exactly one"):
        elect([record(1, 5, NEW), record(1, 6, NEW)])


_RECORDS = st.lists(
    st.builds(
        record, st.integers(0, 255), st.integers(0, 3), st.sampled_from([OLD, NEW, EVIL]),
        voter=st.booleans(), lineage=st.sampled_from([LINE, FORK]),
    ),
    min_size=1, max_size=8, unique_by=lambda r: r.peer,
)  # fmt: skip


@given(_RECORDS, st.randoms())
def test_order_of_the_records_does_not_matter(records: list[Record], rng: object) -> None:
    result = elect(records)
    rng.shuffle(records)  # type: ignore[attr-defined]
    assert elect(records) == result


@given(_RECORDS)
def test_winner_is_held_by_somebody_who_may_vote_and_everybody_holds_or_fetches(records: list[Record]) -> None:
    result = elected(*records)
    voters = [r for r in records if r.voter] or records
    assert any((r.lineage, r.revision, r.root) == (result.lineage, result.revision, result.root) for r in voters)
    assert sorted((*result.holders, *result.fetchers)) == sorted(r.peer for r in records)


@given(_RECORDS, st.integers(0, 2**63))
def test_lone_liar_never_wins_when_two_honest_voters_agree(records: list[Record], revision: int) -> None:
    liar = Record(b"\xff" * 15 + b"\xfe", True, LINE, revision, b"?" * 16, LAYOUT)
    honest = [Record(bytes([n]) * 15 + b"\xfe", True, LINE, 2, NEW, LAYOUT) for n in (1, 2)]
    assert elected(liar, *honest).root == NEW
    others = [r for r in records if not r.voter]
    assert elected(liar, *honest, *others).root == NEW


@given(_RECORDS, _RECORDS)
def test_newcomers_never_change_what_voters_elect(voters: list[Record], newcomers: list[Record]) -> None:
    old = [Record(r.peer, True, r.lineage, r.revision, r.root, LAYOUT) for r in voters]
    peers = {r.peer for r in old}
    new = [Record(r.peer, False, r.lineage, r.revision + 9, r.root, LAYOUT) for r in newcomers if r.peer not in peers]
    alone, together = elected(*old), elected(*old, *new)
    assert (alone.lineage, alone.revision, alone.root) == (together.lineage, together.revision, together.root)
