"""Exchanges in the control plane: whom they concern, what a flush decides of them, who waits for whom."""

from __future__ import annotations

import pytest
from test_master import World, group_of, peer_id, report

from pyccl._native._pyccl import lib
from pyccl._proto import ballot, channel, limits
from pyccl._proto.master_records import Peer, Proposal
from pyccl._proto.messages import (
    Arrive,
    Blocked,
    Count,
    Differs,
    EpochCommit,
    EpochPropose,
    Flush,
    Key,
    Leave,
    OpReport,
    OpState,
    OpVerdict,
    Report,
    Verdict,
    to_wire,
)
from pyccl._proto.mismatch import blocked_detail, parse_detail
from pyccl.errors import RemoteProtocolError

MEMBERS = tuple(bytes([n]) * 16 for n in range(1, 5))
SPACE = channel.SPACE_PAIR
TAG = 7


def pair(a: int, b: int, tag: int = TAG) -> int:
    """The channel of two ranks."""
    return tag | min(a, b) << 32 | max(a, b) << 40


def key(a: int, b: int, seq: int = 0) -> Key:
    return Key(SPACE, pair(a, b), seq)


def op_report(a: int, b: int, state: int, result: int = 9) -> OpReport:
    return OpReport(SPACE, pair(a, b), 0, state, result)


# ---- channels


def test_channels_are_those_of_the_operation_machine() -> None:
    assert lib.PYCCL_SPACE_PAIR == SPACE
    for tag in (0, TAG, limits.U32_MAX):
        for a, b in ((0, 1), (3, 254), (254, 255)):
            assert lib.pyccl_channel(SPACE, tag, a, b) == lib.pyccl_channel(SPACE, tag, b, a) == pair(a, b, tag)
            assert channel.pair_of(SPACE, pair(a, b, tag)) == (a, b)
            assert channel.user_tag(pair(a, b, tag)) == tag
    assert lib.pyccl_channel(0, TAG, 0, 1) == TAG


def test_exchange_concerns_its_pair_and_anything_else_all() -> None:
    assert channel.participants(SPACE, pair(1, 3), MEMBERS) == (MEMBERS[1], MEMBERS[3])
    assert channel.participants(0, TAG, MEMBERS) == channel.participants(1, TAG, MEMBERS) == MEMBERS
    assert channel.participants(SPACE, pair(1, 4), MEMBERS) == ()


def test_member_may_speak_of_its_own_pairs_only() -> None:
    channel.check_told_untrusted((key(1, 3), Key(0, TAG, 0)), MEMBERS[3], MEMBERS)
    for foreign in (key(0, 1), key(3, 200)):
        with pytest.raises(RemoteProtocolError, match="not of"):
            channel.check_told_untrusted((foreign,), MEMBERS[3], MEMBERS)


# ---- verdicts


@pytest.mark.parametrize(
    ("reports", "verdict"),
    [
        ({0: None, 1: OpState.PREPARED, 2: None, 3: OpState.PREPARED}, Verdict.COMMIT),
        ({0: None, 1: OpState.PREPARED, 2: None, 3: OpState.COMMITTED}, Verdict.COMMIT),
        ({0: None, 1: None, 2: None, 3: OpState.COMMITTED}, Verdict.COMMIT),
        ({0: None, 1: OpState.PREPARED, 2: None, 3: None}, None),
        ({0: None, 1: OpState.PREPARED, 2: None}, Verdict.COMMIT),  # the partner is lost
        ({0: None, 1: None, 2: None}, None),
        ({1: OpState.PREPARED, 3: OpState.PREPARED}, Verdict.COMMIT),  # others are lost
    ],
)
def test_flush_asks_the_pair_alone(reports: dict[int, int | None], verdict: int | None) -> None:
    said = {MEMBERS[r]: () if state is None else (op_report(1, 3, state),) for r, state in reports.items()}
    decided = ballot.decide(said, MEMBERS)
    assert decided == (() if verdict is None else (OpVerdict(SPACE, pair(1, 3), 0, verdict),))


def test_flush_fails_an_exchange_whose_hashes_differ_and_keeps_pairs_of_one_tag_apart() -> None:
    said = {
        MEMBERS[0]: (op_report(0, 1, OpState.PREPARED),),
        MEMBERS[1]: (op_report(0, 1, OpState.PREPARED, 10),),
        MEMBERS[2]: (op_report(2, 3, OpState.PREPARED),),
        MEMBERS[3]: (),
    }
    assert ballot.decide(said, MEMBERS) == (OpVerdict(SPACE, pair(0, 1), 0, Verdict.FAIL),)


# ---- who waits for whom


def wait(*keys: Key, safe: bool = False, below: bool = False) -> Blocked:
    return Blocked(2, keys, safe, below)


@pytest.mark.parametrize(
    "blocked",
    [
        [wait(key(0, 1)), wait(key(1, 2)), wait(key(0, 2)), None],  # in a ring; the fourth moves
        [wait(key(0, 1)), wait(key(1, 2)), wait(key(0, 2), key(2, 3)), wait(key(0, 3))],
        [wait(key(0, 1)), wait(safe=True), wait(safe=True), wait(safe=True)],
        [wait(key(0, 1)), wait(Key(0, 5, 0)), wait(Key(0, 5, 0)), wait(Key(0, 5, 0))],
        [wait(key(0, 1)), wait(Key(SPACE, pair(0, 1, 8), 0)), None, None],  # crossed tags
        [wait(key(0, 1)), wait(key(0, 1, 1)), None, None],
        [wait(safe=True, below=True), None, None, None],
    ],
)
def test_members_that_wait_for_each_other_are_a_mismatch(blocked: list[Blocked | None]) -> None:
    assert blocked_detail(dict(zip(MEMBERS, blocked, strict=True)), MEMBERS) is not None


@pytest.mark.parametrize(
    "blocked",
    [
        [wait(key(0, 1)), None, wait(key(0, 2)), wait(key(0, 3))],  # all wait for one that moves
        [wait(key(0, 1)), wait(key(1, 2)), None, None],
        [wait(key(0, 1)), wait(key(0, 1)), None, None],  # an OPEN is late
        [wait(key(0, 1)), wait(safe=True), None, wait(safe=True)],  # 2 has not arrived yet, and moves
        [wait(key(0, 1), key(0, 3)), wait(key(1, 2)), wait(key(0, 2)), None],  # 3 may free 0
        [wait(key(0, 1), safe=True), wait(key(1, 2)), wait(key(0, 2)), None],
        [wait(safe=True), wait(safe=True), wait(safe=True), wait(safe=True)],
        [wait(Key(0, 5, 0)), wait(Key(0, 5, 0)), wait(Key(0, 5, 0)), None],
    ],
)
def test_members_that_wait_for_one_that_moves_are_no_mismatch(blocked: list[Blocked | None]) -> None:
    assert blocked_detail(dict(zip(MEMBERS, blocked, strict=True)), MEMBERS) is None


def test_mismatch_names_the_ring_and_leaves_out_who_only_waits_beside_it() -> None:
    blocked = {
        MEMBERS[0]: wait(key(0, 1)),
        MEMBERS[1]: wait(key(1, 2)),
        MEMBERS[2]: wait(key(0, 2, 5)),
        MEMBERS[3]: None,
    }
    detail = blocked_detail(blocked, MEMBERS)
    assert detail is not None and parse_detail(detail) == (("01010101", "02020202", "03030303"), ("call",))
    assert "01010101 wait in exchange 0 of tag 7 between 01010101 and 02020202" in detail
    assert "03030303 wait in exchange 5 of tag 7 between 01010101 and 03030303" in detail


def test_exchange_that_is_reported_was_opened_by_both() -> None:
    blocked: dict[bytes, Blocked | None] = {
        MEMBERS[0]: wait(key(0, 1)),
        MEMBERS[1]: wait(Key(SPACE, pair(0, 1, 8), 0)),
        MEMBERS[2]: None,
        MEMBERS[3]: None,
    }
    assert blocked_detail(blocked, MEMBERS, {key(0, 1)}) is None


# ---- the master


def test_ring_of_exchanges_ends_in_a_mismatch_epoch_though_a_fourth_moves() -> None:
    world = group_of(4)
    world.say(1, wait(key(0, 1)))
    world.say(2, wait(key(1, 2)))
    assert not world.got(4, Flush)
    world.say(3, wait(key(0, 2)))
    for conn in (1, 2, 3, 4):
        report(world, conn)
    assert world.last(4, EpochCommit).kind == "mismatch"


def test_loss_of_somebody_else_commits_what_the_pair_has_prepared() -> None:
    world = group_of(4)
    world.say(4, Leave())
    ballot_number = world.last(1, Flush).ballot
    for conn in (1, 2, 3):
        ops = (op_report(0, 2, OpState.PREPARED),) if conn != 2 else ()
        world.say(conn, Report(2, ballot_number, ops))
    assert world.last(1, EpochCommit).verdicts == (OpVerdict(SPACE, pair(0, 2), 0, Verdict.COMMIT),)


def test_cut_tells_each_member_of_its_own_pairs_the_highest_count_of_the_two() -> None:
    world = group_of(3)
    world.say(1, Arrive(2, (Count(0, 1, 4), Count(SPACE, pair(0, 1), 2))))
    world.say(2, Arrive(2, (Count(0, 1, 3), Count(SPACE, pair(0, 1), 3), Count(SPACE, pair(1, 2), 1))))
    world.say(3, Arrive(2))
    assert world.last(1, EpochPropose).cut == (Count(0, 1, 4), Count(SPACE, pair(0, 1), 3))
    assert world.last(2, EpochPropose).cut == (
        Count(0, 1, 4), Count(SPACE, pair(0, 1), 3), Count(SPACE, pair(1, 2), 1),
    )  # fmt: skip
    assert world.last(3, EpochPropose).cut == (Count(0, 1, 4), Count(SPACE, pair(1, 2), 1))


def specs_of_two_sizes() -> tuple[bytes, bytes]:
    head, root = bytes([5, 3, 0, 0, 1, 1, SPACE, 0]) + TAG.to_bytes(4, "little") + bytes(4), bytes([3]) * 16
    return head + (10).to_bytes(8, "little") + root, head + (12).to_bytes(8, "little") + root


def test_exchange_of_two_sizes_names_both_and_the_field() -> None:
    world = group_of(3)
    world.say(1, Differs(2, key(0, 1, 7), peer_id(2), *specs_of_two_sizes()))
    for conn in (1, 2, 3):
        report(world, conn)
    detail = world.last(3, EpochCommit).detail
    assert parse_detail(detail) == (("01010101", "02020202"), ("count",))
    assert "exchange 7 of tag 7 between 01010101 and 02020202: count is 10 at 01010101 and 12 at 02020202" in detail


def refused(world: World, conn: int) -> bool:
    return conn in world.closed and not world.got(1, Flush)


def test_member_that_speaks_of_a_foreign_pair_loses_its_connection_and_changes_nothing() -> None:
    foreign = (
        Arrive(2, (Count(SPACE, pair(1, 2), 5),)),
        wait(key(1, 2)),
        Differs(2, key(0, 2), peer_id(2), *specs_of_two_sizes()),
    )
    for message in foreign:
        world = group_of(3)
        world.say(1, message)
        assert refused(world, 1), message


def test_report_on_a_foreign_pair_is_refused() -> None:
    world = group_of(3)
    world.say(3, Leave())
    world.say(1, Report(2, world.last(1, Flush).ballot, (op_report(1, 2, OpState.COMMITTED),)))
    assert 1 in world.closed


def test_a_proposal_is_one_message_to_all_of_the_same_cut() -> None:
    """It is packed once; and the epoch in it once more for all, whatever their cuts."""
    world = group_of(3)
    world.hello(4)
    common, ours = Count(0, 1, 7), Count(SPACE, pair(0, 1), 3)
    for n in (1, 2):
        world.say(n, Arrive(2, (common, ours)))
    world.say(3, Arrive(2, (common,)))
    first, second, third, newcomer = (world.last(n, EpochPropose) for n in (1, 2, 3, 4))
    assert first is second and first.cut == (common, ours)
    assert third.cut == (common,) and newcomer.cut == ()
    assert to_wire(first)[2] is to_wire(third)[2]


def test_a_long_cut_is_not_looked_at_for_each_member() -> None:
    """65,536 counts, 256 times: the master would stand still for seconds."""

    class OneOfMany(Count):
        __hash__ = None  # type: ignore[assignment]

    world = group_of(3)
    epoch = world.last(1, EpochCommit).epoch
    members = [Peer(n.to_bytes(1, "big") * 16, bytes(16), 0, (), "", order=n, heard_at=0.0) for n in (1, 2, 3)]
    proposal = Proposal(5, epoch, (OneOfMany(0, 1, 7),), {}, (members[2].key,), 0.0)
    first, second, newcomer = map(proposal.message_to, members)
    assert first is second and first.cut == (Count(0, 1, 7),) and newcomer.cut == ()
