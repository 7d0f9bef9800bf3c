"""MasterMachine, rule by rule."""

from __future__ import annotations

import json
from typing import Any, TypeVar

import pytest

from pyccl._io.envelope import pack
from pyccl._proto import limits
from pyccl._proto import master as mm
from pyccl._proto.epoch import Address, Epoch
from pyccl._proto.master import MasterMachine
from pyccl._proto.messages import (
    Arrive,
    Behind,
    Blocked,
    Cancelled,
    Count,
    Differs,
    EpochCommit,
    EpochPropose,
    Evicted,
    Flush,
    Heartbeat,
    Hello,
    Key,
    Leave,
    Message,
    OpReport,
    OpState,
    OpVerdict,
    Pending,
    Ready,
    Rejected,
    Report,
    Resume,
    Settle,
    Status,
    StatusAsk,
    Suspect,
    Trust,
    Unblocked,
    Unknown,
    Unreachable,
    Verdict,
    Welcome,
    Withdraw,
    from_wire_untrusted,
    to_wire,
)
from pyccl._proto.mismatch import parse_detail

RUN = b"R" * 16
TIMEOUT_S = 5.0
M = TypeVar("M", bound=Message)


def peer_id(n: int) -> bytes:
    return bytes([n]) * 16


def incarnation(n: int) -> bytes:
    return bytes([100 + n]) * 16


class World:
    """A master and scripted peers 1, 2, 3...; peer n talks on connection n until it reconnects."""

    def __init__(self) -> None:
        self.now = 0.0
        self.master = self.make_master()
        self.inbox: dict[int, list[Message]] = {}
        self.closed: dict[int, str] = {}
        self.logs: list[tuple[str, dict[str, Any]]] = []

    def make_master(self) -> MasterMachine:
        return MasterMachine(RUN, 1, TIMEOUT_S, "test", journaled=False)

    def do(self, effects: list[mm.Effect]) -> None:
        for effect in effects:
            match effect:
                case mm.Send(conn, message):
                    self.inbox.setdefault(conn, []).append(message)
                case mm.Close(conn, reason):
                    self.closed[conn] = reason
                case mm.Log(event, fields):
                    self.logs.append((event, fields))

    def hello(self, n: int, conn: int | None = None, host: str = "", **changes: Any) -> None:
        conn = n if conn is None else conn
        fields: dict[str, Any] = {
            "version": 1, "library": "test", "group": 0, "peer": peer_id(n), "incarnation": incarnation(n),
        }  # fmt: skip
        self.do(self.master.connected(conn, self.now, host))
        self.say(conn, Hello(**{**fields, **changes}))

    def say(self, conn: int, *messages: Message) -> None:
        for message in messages:
            self.do(self.master.receive(conn, message, self.now))

    def drop(self, conn: int) -> None:
        self.do(self.master.disconnected(conn, self.now))

    def pass_time(self, seconds: float, beating: tuple[int, ...] = ()) -> None:
        """Ticks of 0.1 s, with heartbeats of those."""
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            for conn in beating:
                self.say(conn, Heartbeat())
            self.do(self.master.tick(self.now))

    def got(self, conn: int, kind: type[M]) -> list[M]:
        return [message for message in self.inbox.get(conn, []) if isinstance(message, kind)]

    def last(self, conn: int, kind: type[M]) -> M:
        return self.got(conn, kind)[-1]

    def forget(self) -> None:
        self.inbox.clear()

    def epoch(self, conn: int = 1) -> Epoch:
        return self.last(conn, EpochCommit).epoch

    def ready(self, *conns: int) -> None:
        for conn in conns:
            proposal = self.last(conn, EpochPropose)
            self.say(conn, Ready(proposal.epoch.number, proposal.version))


def group_of(n: int, host: str = "") -> World:
    """Peers 1..n are members of one epoch. host: where the master sees them all."""
    world = World()
    for peer in range(1, n + 1):
        world.hello(peer, host=host)
    if n > 1:
        world.say(1, Arrive(1))
        world.ready(*range(1, n + 1))
    assert world.epoch().peers == tuple(peer_id(i) for i in range(1, n + 1))
    return world


# ---- hello


def test_first_hello_founds_the_group_at_once() -> None:
    world = World()
    world.hello(1)
    assert [type(m) for m in world.inbox[1]] == [Welcome, Pending, EpochCommit]
    commit = world.last(1, EpochCommit)
    assert (commit.kind, commit.epoch.number, commit.epoch.previous, commit.world_size) == ("found", 1, bytes(16), 1)


def test_other_version_is_rejected_with_both_versions_named() -> None:
    world = World()
    world.hello(1, version=9)
    assert "9" in world.last(1, Rejected).reason
    assert "1" in world.last(1, Rejected).reason
    assert 1 in world.closed


def test_newer_connection_of_a_connected_incarnation_takes_the_place_of_the_older() -> None:
    """Its old connection may be half open: only the peer knows that it is dead. Here it had missed its first commit."""
    world = group_of(2)
    world.hello(2, conn=20)
    assert world.last(20, Welcome).resumed
    assert world.last(20, EpochCommit).epoch == world.epoch(1)
    assert 2 in world.closed and 20 not in world.closed


def test_a_complaint_withdrawn_on_a_connection_that_broke_unseen_is_not_held_against_anybody() -> None:
    """The Trust was lost with the old connection; what still holds is told again on the new one."""
    world = group_of(3)
    world.say(2, Suspect(peer_id(3), "silent"))
    world.hello(2, conn=20, resume=resume_of(world))
    world.pass_time(4 * TIMEOUT_S, beating=(1, 3, 20))
    assert not [fields for event, fields in world.logs if event == "peer_lost"]


def test_newcomer_that_comes_again_starts_over_while_its_old_connection_is_half_open() -> None:
    world = World()
    world.hello(1)
    world.hello(2)
    world.hello(2, conn=20)
    assert not world.got(20, Rejected) and not world.last(20, Welcome).resumed
    assert 2 in world.closed
    world.say(1, Arrive(1))
    proposal = world.last(20, EpochPropose)
    assert proposal.epoch.peers == (peer_id(1), peer_id(2))
    world.do(world.master.disconnected(2, world.now))
    world.say(1, Ready(2, proposal.version))
    world.say(20, Ready(2, proposal.version))
    assert world.epoch(20).peers == (peer_id(1), peer_id(2))


def test_new_incarnation_of_a_live_member_waits_and_is_not_proposed_beside_it() -> None:
    world = group_of(2)
    world.hello(2, conn=20, incarnation=incarnation(50))
    assert world.last(1, Pending).count == 1
    world.say(1, Arrive(2))
    world.say(2, Arrive(2))
    assert not world.got(20, EpochPropose)
    assert world.last(1, EpochPropose).epoch.peers == (peer_id(1), peer_id(2))


def test_connection_that_never_greets_is_closed() -> None:
    world = World()
    world.do(world.master.connected(7, 0.0))
    world.pass_time(10.2)
    assert world.closed[7] == "no Hello within 10 s"


def test_illegal_message_costs_its_sender_the_connection_and_nobody_else_anything() -> None:
    world = group_of(2)
    world.forget()
    world.say(2, Ready(99, 99))
    assert world.closed == {2: "proposal 99 was never made"}
    assert world.inbox == {}
    world.hello(3)
    world.say(3, Settle(1))
    assert world.closed[3] == "Settle from a peer that is PENDING"


def test_message_before_hello_is_refused() -> None:
    world = World()
    world.do(world.master.connected(7, 0.0))
    world.say(7, Heartbeat())
    assert world.closed[7] == "Heartbeat before Hello"


def test_groups_have_epochs_of_their_own_and_world_size_counts_all() -> None:
    world = group_of(2)
    world.hello(3, group=5)
    commit = world.last(3, EpochCommit)
    assert (commit.epoch.peers, commit.world_size) == ((peer_id(3),), 3)


def test_status_tells_members_pending_and_events() -> None:
    world = group_of(2)
    world.hello(3)
    world.do(world.master.connected(9, world.now))
    world.say(9, StatusAsk(1))
    status = json.loads(world.last(9, Status).json)
    assert [m["peer"] for m in status["groups"][0]["members"]] == [peer_id(1).hex(), peer_id(2).hex()]
    assert [m["peer"] for m in status["groups"][0]["pending"]] == [peer_id(3).hex()]
    assert status["events"][-1]["event"] == "peer_pending"
    assert 9 in world.closed


def test_status_of_newcomers_with_long_addresses_fits_its_message() -> None:
    """Each of them takes 10,000 characters of JSON: who asks is told less, and the master lives."""
    world = World()
    host = "\u00e9" * limits.HOST_CHARS_MAX
    for n in range(1, 150):
        fields = {"peer": n.to_bytes(16, "big"), "addresses": (Address(host, 1),) * 7}
        world.hello(n, **fields)
    world.do(world.master.connected(999, world.now))
    world.say(999, StatusAsk(1))
    told = world.last(999, Status)
    assert json.loads(told.json)["run"] == RUN.hex()
    assert from_wire_untrusted(to_wire(told)) == told


# ---- strangers


def test_strangers_leave_no_trace_in_the_events() -> None:
    world = group_of(2)
    before = world.master.status()["events"]
    for conn in range(100, 100 + 2 * limits.EVENTS_MAX):
        world.do(world.master.connected(conn, world.now))
        world.say(conn, Heartbeat())
        assert "before Hello" in world.closed[conn]
    assert world.master.status()["events"] == before
    world.say(2, Ready(99, 99))  # a member's offence is told
    assert world.master.status()["events"][-1]["event"] == "connection_refused"


def test_what_strangers_say_does_not_show_that_the_masters_line_works() -> None:
    """All members fall silent at once, as when the master's uplink fails; only its own host still reaches it."""
    world = group_of(3)
    world.say(1, Suspect(peer_id(3), "silent"))
    for conn in range(100, 100 + round(TIMEOUT_S * 20)):
        world.pass_time(0.1)
        world.do(world.master.connected(conn, world.now))
        world.say(conn, StatusAsk(1) if conn % 2 else Heartbeat())
    world.pass_time(0.2, beating=(1, 2))
    assert not world.got(1, Flush), "nobody is late while nobody can be heard"
    world.pass_time(TIMEOUT_S - 0.2, beating=(1, 2))
    assert not world.got(1, Flush), "its own connection may repeat into the line that was cut a little later"
    world.pass_time(1.0, beating=(1, 2))
    assert world.got(1, Flush), "it is now"


def test_a_master_that_nobody_has_called_for_long_gives_the_first_members_no_time_of_grace() -> None:
    world = World()
    world.pass_time(10 * TIMEOUT_S)
    for n in (1, 2, 3):
        world.hello(n)
    world.say(1, Arrive(1))
    world.ready(1, 2, 3)
    world.say(1, Suspect(peer_id(3), "silent"))
    world.pass_time(TIMEOUT_S + 0.2, beating=(1, 2))
    assert world.last(1, Flush).members == (peer_id(1), peer_id(2))


def test_groups_that_nobody_is_in_make_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "GROUPS_MAX", 40)
    world = World()
    conns = iter(range(10_000, 10_000_000))

    def visit(group: int) -> int:
        conn = next(conns)
        world.hello(1, conn, group=group, peer=conn.to_bytes(16, "big"))
        return conn

    stays = visit(0)
    for group in range(1, limits.GROUPS_MAX + 50):
        conn = visit(group)
        assert world.last(conn, EpochCommit).kind == "found"
        world.say(conn, Leave())
    assert len(world.master.status()["groups"]) == limits.GROUPS_MAX
    held = [visit(group) for group in range(limits.GROUPS_MAX + 50, 2 * limits.GROUPS_MAX + 49)]
    assert all(world.got(conn, Welcome) for conn in held)
    assert "at most" in world.last(visit(99_999), Rejected).reason
    assert stays not in world.closed
    world.pass_time(1.0, beating=(stays,))


def test_so_many_newcomers_wait_and_one_more_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PENDING_MAX", 3)
    world = group_of(1)
    for n in range(2, 7):
        world.hello(n)
    assert [n for n in range(2, 7) if world.got(n, Welcome)] == [2, 3, 4]
    assert all(world.last(n, Rejected).reason and n in world.closed for n in (5, 6))
    world.drop(3)
    world.hello(7)
    assert world.got(7, Welcome)


def test_a_newcomer_may_not_make_the_master_hold_as_much_as_a_member() -> None:
    world = group_of(1)
    world.hello(2)
    assert world.master.body_bytes_max(1) == limits.BODY_MAX_BYTES
    assert world.master.body_bytes_max(2) == world.master.body_bytes_max(77) == limits.BODY_NEWCOMER_MAX_BYTES
    reason = "\u20ac" * limits.REASON_CHARS_MAX
    longest = Unreachable(limits.U64_MAX, limits.U64_MAX, (b"x" * 16,) * limits.MEMBERS_MAX, reason)
    assert len(pack(longest)) - 4 <= limits.BODY_NEWCOMER_MAX_BYTES
    world.say(1, Arrive(1))
    world.ready(1, 2)
    assert world.master.body_bytes_max(2) == limits.BODY_MAX_BYTES


# ---- resume


def resume_of(world: World, *, number: int | None = None, ident: bytes | None = None, frozen: bool = False) -> Resume:
    epoch = world.epoch()
    numbers = epoch.number if number is None else number, epoch.id if ident is None else ident
    return Resume(RUN, *numbers, frozen, world.master.term)


def test_member_that_missed_a_commit_gets_it_when_it_comes_back() -> None:
    world = group_of(2)
    before = world.epoch()
    world.say(1, Arrive(2))
    world.say(2, Arrive(2))
    world.ready(1, 2)
    world.drop(2)
    world.hello(2, conn=20, resume=Resume(RUN, before.number, before.id, False, world.master.term))
    assert [type(m) for m in world.inbox[20]] == [Welcome, EpochCommit, Cancelled, Pending]
    assert world.last(20, Welcome).resumed
    assert world.last(20, EpochCommit).epoch == world.epoch()


def test_member_that_missed_nothing_is_not_told_again() -> None:
    world = group_of(2)
    world.drop(2)
    world.hello(2, conn=20, resume=resume_of(world))
    assert not world.got(20, EpochCommit)


def test_open_flush_and_open_proposal_are_repeated_after_a_resume() -> None:
    world = group_of(2)
    world.say(1, Arrive(2))
    world.say(2, Arrive(2))
    world.drop(2)
    world.hello(2, conn=20, resume=resume_of(world))
    assert world.last(20, EpochPropose) == world.last(1, EpochPropose)
    world.say(1, Settle(2))
    world.drop(20)
    world.hello(2, conn=21, resume=resume_of(world))
    assert world.last(21, Flush) == world.last(1, Flush)
    assert not world.got(21, EpochPropose)


def test_newer_connection_of_a_resumed_member_replaces_a_half_open_one() -> None:
    world = group_of(2)
    world.hello(2, conn=20, resume=resume_of(world))
    assert 2 in world.closed
    assert 20 not in world.closed
    world.drop(2)
    assert world.master.status()["groups"][0]["members"][1]["connected"]


def test_newcomer_whose_commit_was_lost_with_its_connection_is_a_member_when_it_greets_again() -> None:
    world = group_of(2)
    world.drop(2)
    world.hello(2, conn=20)
    assert world.last(20, Welcome).resumed
    assert world.last(20, EpochCommit).epoch == world.epoch()


def test_unknown_run_is_told_so_and_unknown_incarnation_is_evicted() -> None:
    world = group_of(2)
    world.hello(3, resume=Resume(b"?" * 16, 2, bytes(16), False))
    assert world.last(3, Unknown) == Unknown(RUN, asks=False) and "does not know run" in world.closed[3]
    world.hello(4, resume=resume_of(world))
    assert "not a member" in world.last(4, Evicted).reason


def test_member_from_an_epoch_that_leads_nowhere_is_evicted() -> None:
    world = group_of(3)
    world.drop(2)
    world.hello(2, conn=20, resume=resume_of(world, ident=b"?" * 16))
    assert "does not lead" in world.last(20, Evicted).reason
    assert world.last(1, Flush).members == (peer_id(1), peer_id(3))


def test_frozen_member_without_an_open_ballot_is_owed_one() -> None:
    world = group_of(2)
    world.drop(2)
    world.hello(2, conn=20, resume=resume_of(world, frozen=True))
    assert world.last(20, Flush).ballot == 1
    assert world.last(1, Flush).members == (peer_id(1), peer_id(2))


# ---- safe points


def test_newcomer_disturbs_nobody_until_all_members_have_arrived() -> None:
    world = group_of(2)
    world.hello(3)
    world.say(1, Arrive(2))
    assert not world.got(3, EpochPropose)
    world.say(2, Arrive(2))
    assert world.last(3, EpochPropose).epoch.peers == tuple(peer_id(n) for n in (1, 2, 3))
    world.ready(1, 2)
    assert world.epoch().number == 2
    world.ready(3)
    assert (world.last(3, EpochCommit).kind, world.epoch().number) == ("join", 3)
    assert world.last(1, Pending).count == 0


def test_cut_is_the_highest_count_of_each_tag() -> None:
    world = group_of(2)
    world.say(1, Arrive(2, (Count(0, 1, 5), Count(0, 2, 1))))
    world.say(2, Arrive(2, (Count(0, 1, 4), Count(1, 1, 9))))
    assert world.last(1, EpochPropose).cut == (Count(0, 1, 5), Count(0, 2, 1), Count(1, 1, 9))


def test_member_that_is_behind_raises_the_cut_and_old_answers_have_no_effect() -> None:
    world = group_of(2)
    world.say(1, Arrive(2))
    world.say(2, Arrive(2))
    old = world.last(1, EpochPropose)
    world.say(1, Behind(3, old.version, (Count(0, 1, 7),)))
    new = world.last(2, EpochPropose)
    assert (new.version, new.cut, new.epoch) == (old.version + 1, (Count(0, 1, 7),), old.epoch)
    world.say(1, Ready(3, old.version))
    world.say(2, Ready(3, old.version))
    assert world.epoch().number == 2
    world.ready(1, 2)
    assert world.epoch().number == 3


def test_safe_point_without_newcomers_still_opens_a_new_epoch() -> None:
    world = group_of(2)
    world.say(1, Arrive(2))
    world.say(2, Arrive(2))
    world.ready(1, 2)
    assert (world.epoch().number, world.last(1, EpochCommit).kind) == (3, "join")


def test_lone_member_at_a_safe_point_waits_a_moment_for_company_and_then_goes_on() -> None:
    world = group_of(1)
    world.say(1, Arrive(1))
    assert world.got(1, EpochPropose) == []
    world.pass_time(0.2, beating=(1,))
    world.ready(1)
    assert (world.epoch().number, world.last(1, EpochCommit).kind) == (2, "join")


def test_lone_member_at_a_safe_point_takes_a_newcomer_at_once() -> None:
    world = group_of(1)
    world.say(1, Arrive(1))
    world.hello(2)
    assert len(world.last(1, EpochPropose).epoch.members) == 2


def test_newcomer_that_misses_a_quiet_member_is_not_dropped_for_it() -> None:
    world = group_of(2)
    world.hello(3)
    world.say(1, Arrive(2))
    world.say(2, Arrive(2))
    first = world.last(3, EpochPropose)
    world.pass_time(TIMEOUT_S * 0.6, beating=(1, 3))
    world.say(3, Unreachable(first.epoch.number, first.version, (peer_id(2),), "no answer"))
    again = world.last(3, EpochPropose)
    assert again.version > first.version
    assert peer_id(3) in again.epoch.peers
    assert world.got(3, Rejected) == []


def test_unreachable_newcomer_is_dropped_with_the_reason_and_the_rest_goes_on() -> None:
    world = group_of(2)
    world.hello(3)
    world.say(1, Arrive(2))
    world.say(2, Arrive(2))
    version = world.last(1, EpochPropose).version
    world.say(1, Unreachable(3, version, (peer_id(3),), "connection refused"))
    assert "connection refused" in world.last(3, Rejected).reason
    assert 3 in world.closed
    assert world.last(2, EpochPropose).epoch.peers == (peer_id(1), peer_id(2))
    world.ready(1, 2)
    assert world.epoch().number == 3


def test_newcomer_that_reaches_no_member_is_the_one_dropped() -> None:
    world = group_of(2)
    world.hello(3)
    world.say(1, Arrive(2))
    world.say(2, Arrive(2))
    world.say(3, Unreachable(3, world.last(3, EpochPropose).version, (peer_id(1), peer_id(2)), "no route"))
    assert "no route" in world.last(3, Rejected).reason


def test_of_two_newcomers_that_do_not_reach_each_other_the_later_is_dropped() -> None:
    world = group_of(1)
    world.hello(2)
    world.hello(3)
    world.say(1, Arrive(1))
    world.say(2, Unreachable(2, world.last(2, EpochPropose).version, (peer_id(3),), "no route"))
    assert world.got(3, Rejected)
    assert not world.got(2, Rejected)


def test_newcomer_that_disconnects_or_falls_silent_does_not_hold_up_the_safe_point() -> None:
    for way in ("disconnect", "silence"):
        world = group_of(2)
        world.hello(3)
        world.say(1, Arrive(2))
        world.say(2, Arrive(2))
        if way == "disconnect":
            world.drop(3)
        else:
            world.pass_time(TIMEOUT_S + 0.2, beating=(1, 2))
            assert "silent" in world.last(3, Rejected).reason
        assert world.last(1, EpochPropose).epoch.peers == (peer_id(1), peer_id(2))
        world.ready(1, 2)
        assert world.epoch().number == 3


def test_withdrawal_cancels_the_proposal_for_all_and_the_others_stay_arrived() -> None:
    world = group_of(2)
    world.hello(3)
    world.say(1, Arrive(2))
    world.say(2, Arrive(2))
    version = world.last(1, EpochPropose).version
    world.say(1, Withdraw(2))
    assert world.last(2, Cancelled).version == world.last(3, Cancelled).version == version
    world.say(2, Ready(3, version))
    world.say(1, Arrive(2))
    assert world.last(2, EpochPropose).version == version + 1


# ---- loss, ballots, verdicts


def report(world: World, conn: int, *ops: OpReport) -> None:
    flush = world.last(conn, Flush)
    world.say(conn, Report(flush.epoch, flush.ballot, ops))


def test_leave_opens_a_ballot_of_the_survivors_that_ends_in_a_loss_epoch() -> None:
    world = group_of(3)
    world.say(2, Leave())
    assert world.closed[2] == "left"
    flush = world.last(1, Flush)
    assert (flush.epoch, flush.proposed, flush.members) == (2, 3, (peer_id(1), peer_id(3)))
    report(world, 1)
    assert world.epoch().number == 2
    report(world, 3)
    assert (world.last(3, EpochCommit).kind, world.epoch().peers) == ("loss", (peer_id(1), peer_id(3)))


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        (OpState.COMMITTED, OpState.PREPARED, Verdict.COMMIT),
        (OpState.PREPARED, OpState.COMMITTED, Verdict.COMMIT),
        (OpState.PREPARED, OpState.PREPARED, Verdict.COMMIT),
        (OpState.PREPARED, OpState.RUNNING, None),
        (OpState.PREPARED, OpState.FAILED, None),
        (OpState.RUNNING, OpState.FAILED, None),
        (OpState.PREPARED, None, None),
        (OpState.COMMITTED, None, Verdict.COMMIT),
    ],
)
def test_verdict_commits_only_what_somebody_committed_or_all_hold(
    first: int, second: int | None, verdict: int | None
) -> None:
    world = group_of(3)
    world.say(3, Leave())
    report(world, 1, OpReport(0, 4, 9, first, 77))
    report(world, 2, *([] if second is None else [OpReport(0, 4, 9, second, 77)]))
    expected = () if verdict is None else (OpVerdict(0, 4, 9, verdict),)
    assert world.last(1, EpochCommit).verdicts == world.last(2, EpochCommit).verdicts == expected


def test_verdict_fails_what_all_hold_with_different_bits() -> None:
    world = group_of(3)
    world.say(3, Leave())
    report(world, 1, OpReport(0, 4, 9, OpState.PREPARED, 77))
    report(world, 2, OpReport(0, 4, 9, OpState.PREPARED, 78))
    assert world.last(1, EpochCommit).verdicts == (OpVerdict(0, 4, 9, Verdict.FAIL),)


def test_another_loss_during_a_ballot_restarts_it_and_old_reports_do_not_count() -> None:
    world = group_of(4)
    world.say(4, Leave())
    report(world, 1)
    report(world, 2)
    world.say(3, Leave())
    assert world.last(1, Flush).members == (peer_id(1), peer_id(2))
    world.say(1, Report(2, 1))
    assert world.epoch().number == 2
    report(world, 1)
    report(world, 2)
    assert world.epoch().peers == (peer_id(1), peer_id(2))


def test_report_to_an_older_ballot_does_not_replace_the_newer_one() -> None:
    world = group_of(4)
    world.say(4, Leave())
    world.say(3, Leave())
    report(world, 1, OpReport(0, 0, 0, OpState.COMMITTED, 7))
    world.say(1, Report(2, 1))
    report(world, 2)
    assert world.last(1, EpochCommit).verdicts == (OpVerdict(0, 0, 0, Verdict.COMMIT),)


def test_ballot_drops_a_proposal_and_newcomers_stay_pending() -> None:
    world = group_of(2)
    world.hello(3)
    world.say(1, Arrive(2))
    world.say(2, Arrive(2))
    world.say(2, Leave())
    report(world, 1)
    assert world.epoch().peers == (peer_id(1),)
    assert not world.got(3, EpochCommit)
    world.say(1, Arrive(3))
    world.ready(1, 3)
    assert world.epoch().peers == (peer_id(1), peer_id(3))


def test_settle_opens_a_ballot_of_all_members_once() -> None:
    world = group_of(2)
    world.say(1, Settle(2))
    world.say(2, Settle(2))
    assert world.last(1, Flush).ballot == 1
    report(world, 1)
    report(world, 2)
    assert (world.last(1, EpochCommit).kind, len(world.epoch().members)) == ("settle", 2)
    world.say(1, Settle(2))  # crossed the commit
    assert len(world.got(1, Flush)) == 1


def test_group_that_lost_everybody_is_founded_again_with_the_next_number() -> None:
    world = group_of(1)
    last = world.epoch()
    world.say(1, Leave())
    world.hello(2)
    commit = world.last(2, EpochCommit)
    assert (commit.kind, commit.epoch.number, commit.epoch.previous) == ("found", last.number + 1, last.id)


def test_newcomer_that_waits_founds_the_group_when_the_last_member_leaves() -> None:
    world = group_of(1)
    world.hello(2)
    world.say(1, Leave())
    assert world.epoch(2).peers == (peer_id(2),)


# ---- suspicion


def test_silent_member_is_evicted_only_with_a_complaint_and_our_own_timer() -> None:
    world = group_of(3)
    world.pass_time(TIMEOUT_S + 1, beating=(1, 3))
    assert not world.got(1, Flush)
    world.say(1, Suspect(peer_id(2), "silent", "5.0 s"))
    world.pass_time(0.1, beating=(1, 3))
    assert world.last(1, Flush).members == (peer_id(1), peer_id(3))
    report(world, 1)
    report(world, 3)
    assert "silent" in world.last(2, Evicted).reason
    assert world.closed[2].startswith("evicted")


def test_pulse_counts_as_heard_though_python_says_nothing() -> None:
    world = group_of(3)
    world.say(1, Suspect(peer_id(2), "silent"))
    for _ in range(80):
        world.do(world.master.heard(peer_id(2), incarnation(2), world.now))
        world.pass_time(0.1, beating=(1, 3))
    assert not world.got(1, Flush)


def test_reset_and_refused_member_is_evicted_at_once() -> None:
    world = group_of(3)
    world.say(1, Suspect(peer_id(2), "refused"))
    assert not world.got(1, Flush)
    world.drop(2)
    assert world.last(1, Flush).members == (peer_id(1), peer_id(3))


def test_suspect_that_is_heard_before_the_verdict_is_taken_back_in() -> None:
    world = group_of(3)
    world.say(1, Suspect(peer_id(2), "silent"))
    world.pass_time(TIMEOUT_S + 0.2, beating=(1, 3))
    assert len(world.last(1, Flush).members) == 2
    world.now += 0.1
    world.say(2, Heartbeat())
    assert len(world.last(1, Flush).members) == 2, "member 1 still does not hear it"
    world.say(1, Trust(peer_id(2)))
    assert len(world.last(1, Flush).members) == 3
    assert world.last(2, Flush) == world.last(1, Flush)
    for conn in (1, 2, 3):
        report(world, conn)
    assert (world.last(2, EpochCommit).kind, len(world.epoch().members)) == ("loss", 3)


def test_evicted_incarnation_is_answered_with_the_reason_and_comes_back_only_as_another() -> None:
    world = group_of(2)
    world.drop(2)
    world.say(1, Suspect(peer_id(2), "refused"))
    report(world, 1)
    world.hello(2, conn=20, resume=resume_of(world))
    world.hello(2, conn=21)
    assert "refused" in world.last(20, Evicted).reason
    assert world.got(21, Evicted)
    assert {20, 21} <= set(world.closed)
    world.hello(2, conn=22, incarnation=incarnation(50))
    assert world.last(1, Pending).count == 1


def test_silent_member_that_blocks_a_flush_or_a_proposal_is_evicted_without_a_complaint() -> None:
    world = group_of(3)
    world.say(3, Leave())
    report(world, 1)
    world.pass_time(TIMEOUT_S + 0.2, beating=(1,))
    report(world, 1)
    assert world.epoch().peers == (peer_id(1),)
    world = group_of(2)
    world.say(1, Arrive(2))
    world.say(2, Arrive(2))
    world.pass_time(TIMEOUT_S + 0.2, beating=(1,))
    assert world.last(1, Flush).members == (peer_id(1),)


def test_member_that_drains_for_long_but_is_heard_is_not_evicted() -> None:
    world = group_of(2)
    world.say(1, Arrive(2))
    world.say(2, Arrive(2))
    world.pass_time(120, beating=(1, 2))
    assert not world.got(1, Flush)


def test_member_that_never_answers_a_flush_is_evicted_though_its_pulse_beats() -> None:
    world = group_of(3)
    world.say(3, Leave())
    report(world, 1)
    world.pass_time(59, beating=(1, 2))
    assert world.last(1, Flush).members == (peer_id(1), peer_id(2))
    world.pass_time(2, beating=(1, 2))
    assert world.last(1, Flush).members == (peer_id(1),)


def test_lone_member_that_died_makes_room_for_who_waits() -> None:
    world = group_of(1)
    world.drop(1)
    world.hello(2)
    world.pass_time(TIMEOUT_S + 0.2, beating=(2,))
    assert world.epoch(2).peers == (peer_id(2),)


def test_whole_group_that_died_at_once_makes_room_after_a_long_time_only() -> None:
    world = group_of(2)
    world.drop(1)
    world.drop(2)
    world.hello(3)
    world.pass_time(29, beating=(3,))
    assert not world.got(3, EpochCommit)
    world.pass_time(2, beating=(3,))
    assert world.epoch(3).peers == (peer_id(3),)


def test_of_two_members_that_do_not_reach_each_other_one_goes_after_time_to_mend() -> None:
    world = group_of(4)
    world.say(1, Suspect(peer_id(2), "silent"))
    world.say(2, Suspect(peer_id(1), "silent"))
    world.pass_time(2 * TIMEOUT_S - 0.5, beating=(1, 2, 3, 4))
    assert not world.got(3, Flush)
    world.pass_time(1, beating=(1, 2, 3, 4))
    assert world.last(3, Flush).members == tuple(peer_id(n) for n in (1, 3, 4))


def test_member_with_the_most_complaints_goes_not_the_later_one() -> None:
    world = group_of(4)
    world.say(1, Suspect(peer_id(3), "silent"))
    world.say(4, Suspect(peer_id(1), "silent"))
    world.pass_time(2 * TIMEOUT_S + 0.5, beating=(1, 2, 3, 4))
    assert world.last(2, Flush).members == tuple(peer_id(n) for n in (2, 3, 4))


def test_pair_that_mended_in_time_stays() -> None:
    world = group_of(3)
    world.say(1, Suspect(peer_id(2), "silent"))
    world.pass_time(TIMEOUT_S, beating=(1, 2, 3))
    world.say(1, Trust(peer_id(2)))
    world.pass_time(3 * TIMEOUT_S, beating=(1, 2, 3))
    assert not world.got(1, Flush)


def test_complaints_of_who_lost_its_connection_are_forgotten_until_told_again() -> None:
    world = group_of(3)
    world.say(1, Suspect(peer_id(2), "silent"))
    world.drop(1)
    world.hello(1, conn=10, resume=resume_of(world))
    world.pass_time(3 * TIMEOUT_S, beating=(10, 2, 3))
    assert not world.got(3, Flush)


def test_protocol_breaker_goes_after_one_timeout() -> None:
    world = group_of(3)
    world.say(1, Suspect(peer_id(3), "protocol", "bad magic"))
    world.pass_time(TIMEOUT_S + 0.2, beating=(1, 2, 3))
    assert world.last(1, Flush).members == (peer_id(1), peer_id(2))


def test_old_members_that_do_not_reach_each_other_at_a_safe_point_are_a_partition() -> None:
    world = group_of(3)
    for conn in (1, 2, 3):
        world.say(conn, Arrive(2))
    version = world.last(1, EpochPropose).version
    world.say(1, Unreachable(3, version, (peer_id(2),), "no route"))
    assert world.last(1, EpochPropose).version == version
    world.pass_time(TIMEOUT_S, beating=(1, 2, 3))
    world.ready(1)  # it mended
    world.pass_time(3 * TIMEOUT_S, beating=(1, 2, 3))
    assert not world.got(1, Flush)
    world.ready(2, 3)
    assert world.epoch().number == 3


def test_member_cut_off_from_the_master_alone_is_not_evicted_until_others_wait_at_a_safe_point() -> None:
    world = group_of(3)
    world.drop(2)
    world.pass_time(60, beating=(1, 3))
    assert not world.got(1, Flush)
    world.say(1, Arrive(2))
    world.say(3, Arrive(2))
    world.pass_time(TIMEOUT_S + 0.5, beating=(1, 3))
    assert world.last(1, Flush).members == (peer_id(1), peer_id(3))


def test_nobody_is_evicted_because_the_master_itself_was_stopped() -> None:
    world = group_of(3)
    world.pass_time(0.2, beating=(1, 2, 3))
    world.say(1, Suspect(peer_id(2), "silent"))
    world.now += 60
    world.do(world.master.tick(world.now))
    world.pass_time(TIMEOUT_S - 0.5, beating=(1, 3))
    assert not world.got(1, Flush)
    assert "master_paused" in [event for event, _ in world.logs]


# ---- mismatch


def test_different_specs_end_in_a_mismatch_epoch_that_names_peers_and_fields() -> None:
    world = group_of(3)
    mine = (
        bytes([1, 3, 1, 0, 1, 1, 0, 0]) + (3).to_bytes(4, "little") + bytes(4) + (10).to_bytes(8, "little") + bytes(16)
    )
    theirs = (
        bytes([1, 4, 1, 0, 1, 1, 0, 0]) + (3).to_bytes(4, "little") + bytes(4) + (12).to_bytes(8, "little") + bytes(16)
    )
    world.say(1, Differs(2, Key(0, 3, 7), peer_id(2), mine, theirs))
    for conn in (1, 2, 3):
        report(world, conn)
    commit = world.last(3, EpochCommit)
    assert (commit.kind, len(commit.epoch.members)) == ("mismatch", 3)
    assert parse_detail(commit.detail) == (("01010101", "02020202"), ("dtype", "count"))
    assert "float32 at 01010101 and float64 at 02020202" in commit.detail


def test_all_blocked_and_one_lacks_what_another_has_open_is_a_mismatch() -> None:
    world = group_of(2)
    world.say(1, Blocked(2, (Key(0, 1, 4),), False, False))
    assert not world.got(1, Flush)
    world.say(2, Blocked(2, (Key(0, 2, 0),), False, False))
    report(world, 1)
    report(world, 2)
    detail = world.last(1, EpochCommit).detail
    assert world.last(1, EpochCommit).kind == "mismatch"
    assert "01010101 wait in operation 4 of tag 1" in detail


def test_one_in_update_topology_while_another_reduces_is_a_mismatch() -> None:
    world = group_of(2)
    world.say(1, Arrive(2))
    world.say(1, Blocked(2, (), True, False))
    world.say(2, Blocked(2, (Key(0, 1, 4),), False, False))
    report(world, 1)
    report(world, 2)
    assert "01010101 wait in update_topology, 02020202 do not" in world.last(1, EpochCommit).detail


def test_members_that_only_take_their_time_are_no_mismatch() -> None:
    world = group_of(2)
    world.say(1, Blocked(2, (), True, False))
    world.say(2, Blocked(2, (), False, False))  # in an operation that member 1 has open in another thread
    assert not world.got(1, Flush)


def test_member_that_lacks_something_below_the_cut_is_a_mismatch_by_itself() -> None:
    world = group_of(2)
    world.say(2, Blocked(2, (), True, True))
    assert world.got(1, Flush)


def test_unblocking_and_disconnection_take_a_block_back() -> None:
    world = group_of(2)
    world.say(1, Blocked(2, (Key(0, 1, 4),), False, False), Unblocked(2))
    world.say(2, Blocked(2, (Key(0, 2, 4),), False, False))
    assert not world.got(1, Flush)
    world.drop(2)
    world.say(1, Blocked(2, (Key(0, 1, 4),), False, False))
    assert not world.got(1, Flush)


def test_loss_in_a_mismatch_ballot_keeps_it_a_mismatch() -> None:
    world = group_of(3)
    world.say(2, Blocked(2, (), True, True))
    world.say(3, Leave())
    report(world, 1)
    report(world, 2)
    assert (world.last(1, EpochCommit).kind, len(world.epoch().members)) == ("mismatch", 2)


def test_a_kicked_member_is_left_out_of_the_next_epoch_and_a_kicked_newcomer_at_once() -> None:
    world = group_of(2)
    world.hello(3)
    assert world.master.has(peer_id(3))
    world.do(world.master.kick(peer_id(3), world.now))
    assert world.last(3, Rejected).reason == mm.KICKED and not world.master.has(peer_id(3))
    world.do(world.master.kick(peer_id(2), world.now))
    flush = world.last(1, Flush)
    assert flush.members == (peer_id(1),)
    world.say(1, Report(flush.epoch, flush.ballot))
    assert world.last(1, EpochCommit).epoch.peers == (peer_id(1),)
    assert world.last(2, Evicted).reason == mm.KICKED
    assert world.master.kick(peer_id(9), world.now) == []
