"""The election: examples of each clause, and what must hold whatever the records are."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pyccl._proto.election import Elected, Mismatch, Nobody, Record, Strategy, decode_untrusted, elect, encode
from pyccl.errors import RemoteProtocolError

LINE, FORK = b"L" * 16, b"K" * 16
LAYOUT = b"l" * 32
OLD, NEW, EVIL = b"o" * 32, b"n" * 32, b"e" * 32
POPULAR, RECEIVE, SEND = Strategy.ENFORCE_POPULAR, Strategy.RECEIVE_ONLY, Strategy.SEND_ONLY


def record(
    peer: int, revision: int, root: bytes, *, voter: bool = True, lineage: bytes = LINE, strategy: Strategy = POPULAR
) -> Record:
    return Record(bytes([peer]) * 16, voter, lineage, revision, root, LAYOUT, strategy=strategy)


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


def test_without_voters_the_newest_wins_whatever_its_lineage() -> None:
    """After a total loss: every sync begins another lineage, so states of different moments hold different ones."""
    back = [record(n, n, NEW, voter=False, lineage=bytes([9 - n]) * 16) for n in (1, 2, 3)]
    fresh = [record(n, 0, OLD, voter=False, lineage=bytes(16)) for n in (4, 5, 6, 7)]
    result = elected(*back, *fresh)
    assert (result.revision, result.lineage, result.holders) == (3, bytes([6]) * 16, ids(3))


def test_voters_of_a_fork_are_void() -> None:
    result = elected(record(1, 5, NEW), record(2, 5, NEW), record(3, 99, EVIL, lineage=FORK))
    assert (result.lineage, result.root) == (LINE, NEW)


def test_lowest_lineage_and_lowest_root_break_ties() -> None:
    assert elected(record(1, 5, NEW, lineage=LINE), record(2, 5, OLD, lineage=FORK)).lineage == FORK
    assert elected(record(1, 5, OLD), record(2, 5, NEW)).root == NEW


def test_most_holders_win_at_equal_revisions() -> None:
    assert elected(record(1, 5, EVIL), record(2, 5, OLD), record(3, 5, OLD)).root == OLD


def test_two_layouts_are_a_mismatch_that_names_the_minority() -> None:
    odd = dataclasses.replace(record(3, 5, NEW), layout=b"x" * 32)
    result = elect([record(1, 5, NEW), record(2, 5, NEW), odd])
    assert isinstance(result, Mismatch)
    assert (result.groups, result.odd, result.fields) == ((ids(1, 2), ids(3)), ids(3), ("layout",))


def test_two_digests_are_a_mismatch_and_so_are_both() -> None:
    good = [record(1, 5, NEW), record(2, 5, NEW)]
    result = elect([*good, dataclasses.replace(record(3, 5, NEW), digest=2)])
    assert isinstance(result, Mismatch) and (result.odd, result.fields) == (ids(3), ("digest",))
    result = elect([*good, dataclasses.replace(record(3, 5, NEW), digest=2, layout=b"x" * 32)])
    assert isinstance(result, Mismatch) and result.fields == ("layout", "digest")


# ---- strategies


def test_receive_only_neither_votes_nor_holds() -> None:
    crowd = [record(n, 9, NEW, strategy=RECEIVE) for n in (2, 3, 4)]
    result = elected(record(1, 5, OLD), *crowd)
    assert (result.root, result.holders, result.fetchers) == (OLD, ids(1), ids(2, 3, 4))


def test_receive_only_in_step_has_nothing_to_do() -> None:
    result = elected(record(1, 5, NEW), record(2, 5, NEW, strategy=RECEIVE))
    assert (result.holders, result.fetchers, result.apart) == (ids(1), (), ())


def test_all_receive_only_elect_nobody() -> None:
    assert elect([record(n, n, NEW, strategy=RECEIVE) for n in (2, 1)]) == Nobody(ids(1, 2))


def test_send_only_holds_or_stands_apart_and_never_fetches() -> None:
    result = elected(record(1, 5, NEW), record(2, 5, NEW, strategy=SEND), record(3, 4, OLD, strategy=SEND))
    assert (result.holders, result.fetchers, result.apart) == (ids(1, 2), (), ids(3))


def test_send_only_has_one_vote_like_others() -> None:
    result = elected(record(1, 9, EVIL, strategy=SEND), record(2, 5, NEW), record(3, 5, NEW))
    assert (result.root, result.apart) == (NEW, ids(1))


def test_send_only_newcomer_does_not_outvote_the_members() -> None:
    result = elected(record(1, 5, OLD), record(2, 9, NEW, voter=False, strategy=SEND))
    assert (result.root, result.apart) == (OLD, ids(2))


def test_newcomers_vote_when_all_voters_receive_only() -> None:
    result = elected(record(1, 9, OLD, strategy=RECEIVE), record(2, 5, NEW, voter=False, strategy=SEND))
    assert (result.root, result.holders, result.fetchers) == (NEW, ids(2), ids(1))


def test_no_record_or_two_of_one_peer_is_a_bug_of_the_caller() -> None:
    with pytest.raises(ValueError, match="exactly one"):
        elect([])
    with pytest.raises(ValueError, match="exactly one"):
        elect([record(1, 5, NEW), record(1, 6, NEW)])


_RECORDS = st.lists(
    st.builds(
        record, st.integers(0, 255), st.integers(0, 3), st.sampled_from([OLD, NEW, EVIL]),
        voter=st.booleans(), lineage=st.sampled_from([LINE, FORK]), strategy=st.sampled_from(Strategy),
    ),
    min_size=1, max_size=8, unique_by=lambda r: r.peer,
)  # fmt: skip


def offering(records: list[Record]) -> list[Record]:
    return [r for r in records if r.strategy is not RECEIVE]


@given(_RECORDS, st.randoms())
def test_order_of_the_records_does_not_matter(records: list[Record], rng: object) -> None:
    result = elect(records)
    rng.shuffle(records)  # type: ignore[attr-defined]
    assert elect(records) == result


@given(_RECORDS)
def test_winner_is_held_by_somebody_who_may_vote(records: list[Record]) -> None:
    assume(offering(records))
    result = elected(*records)
    voters = [r for r in offering(records) if r.voter] or offering(records)
    assert any((r.lineage, r.revision, r.root) == (result.lineage, result.revision, result.root) for r in voters)


@given(_RECORDS)
def test_everybody_has_exactly_one_part_and_the_one_of_its_strategy(records: list[Record]) -> None:
    assume(offering(records))
    result = elected(*records)
    for r in records:
        in_step = (r.revision, r.root) == (result.revision, result.root)
        assert (r.peer in result.holders) == (in_step and r.strategy is not RECEIVE)
        assert (r.peer in result.fetchers) == (not in_step and r.strategy is not SEND)
        assert (r.peer in result.apart) == (not in_step and r.strategy is SEND)
    assert result.holders  # somebody can serve it


@given(_RECORDS)
def test_nobody_is_elected_exactly_when_all_receive_only(records: list[Record]) -> None:
    assert isinstance(elect(records), Nobody) == (not offering(records))


@given(_RECORDS, st.booleans())
def test_what_a_sender_enforces_is_what_it_would_vote_for(records: list[Record], send: bool) -> None:
    """send_only and enforce_popular elect the same: they part only after it."""
    assume(offering(records))
    strategy = SEND if send else POPULAR
    alike = [dataclasses.replace(r, strategy=strategy) if r.strategy is not RECEIVE else r for r in records]
    one, other = elected(*records), elected(*alike)
    assert (one.lineage, one.revision, one.root, one.holders) == (
        other.lineage, other.revision, other.root, other.holders,
    )  # fmt: skip


@given(_RECORDS, _RECORDS)
def test_receivers_never_change_what_the_others_elect(records: list[Record], receivers: list[Record]) -> None:
    assume(offering(records))
    peers = {r.peer for r in records}
    more = [dataclasses.replace(r, strategy=RECEIVE) for r in receivers if r.peer not in peers]
    alone, together = elected(*records), elected(*records, *more)
    assert (alone.lineage, alone.revision, alone.root) == (together.lineage, together.revision, together.root)
    assert alone.holders == together.holders


@given(_RECORDS, st.integers(0, 2**63 - 1), st.sampled_from([POPULAR, SEND]), st.sampled_from([POPULAR, SEND]))
def test_lone_liar_never_wins_when_two_honest_voters_agree(
    records: list[Record], revision: int, lying: Strategy, honest_by: Strategy
) -> None:
    liar = Record(b"\xff" * 15 + b"\xfe", True, LINE, revision, b"?" * 32, LAYOUT, strategy=lying)
    honest = [Record(bytes([n]) * 15 + b"\xfe", True, LINE, 2, NEW, LAYOUT, strategy=honest_by) for n in (1, 2)]
    assert elected(liar, *honest).root == NEW
    others = [r for r in records if not r.voter or r.strategy is RECEIVE]
    assert elected(liar, *honest, *others).root == NEW


@given(_RECORDS, st.integers(3, 2**63 - 1))
def test_a_smaller_fork_never_wins_however_new_it_is(records: list[Record], revision: int) -> None:
    members = [Record(bytes([n]) * 15 + b"\xfe", True, LINE, 2, NEW, LAYOUT) for n in (1, 2, 3)]
    forked = [Record(bytes([n]) * 15 + b"\xfd", True, FORK, revision, EVIL, LAYOUT) for n in (1, 2)]
    others = [r for r in records if not r.voter]
    assert elected(*members, *forked, *others).root == NEW


@given(_RECORDS, _RECORDS)
def test_newcomers_never_change_what_voters_elect(voters: list[Record], newcomers: list[Record]) -> None:
    assume(offering(voters))
    old = [dataclasses.replace(r, voter=True) for r in voters]
    peers = {r.peer for r in old}
    new = [
        dataclasses.replace(r, voter=False, revision=r.revision + 9) for r in newcomers if r.peer not in peers
    ]  # fmt: skip
    alone, together = elected(*old), elected(*old, *new)
    assert (alone.lineage, alone.revision, alone.root) == (together.lineage, together.revision, together.root)


# ---- on the wire


@given(
    st.builds(
        Record, st.binary(min_size=16, max_size=16), st.booleans(), st.binary(min_size=16, max_size=16),
        st.integers(0, 2**63 - 1), st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32),
        st.integers(1, 2), st.sampled_from(Strategy), st.integers(0, 2**64 - 1), st.integers(1, 2**53 - 1),
    )
)  # fmt: skip
def test_a_record_survives_the_wire(sent: Record) -> None:
    assert decode_untrusted(sent.peer, encode(sent)) == sent


@given(st.binary(min_size=100, max_size=140))
def test_any_bytes_are_a_record_or_refused(data: bytes) -> None:
    try:
        received = decode_untrusted(bytes(16), data)
    except RemoteProtocolError:
        return
    assert encode(received) == data
