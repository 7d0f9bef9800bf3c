"""MemberMachine, rule by rule."""

from __future__ import annotations

import pytest

from pyccl._proto import member as mb
from pyccl._proto.epoch import Epoch, Member, make_epoch
from pyccl._proto.member import Link, MemberMachine, State
from pyccl._proto.messages import (
    Alive,
    Arrive,
    Behind,
    Blocked,
    Cancelled,
    Count,
    Differs,
    Entered,
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
    OpVerdict,
    Pending,
    Ready,
    Recall,
    Rejected,
    Report,
    Resume,
    Settle,
    Suspect,
    Term,
    Trust,
    Unblocked,
    Undecided,
    Unknown,
    Unreachable,
    Welcome,
    Withdraw,
)
from pyccl.errors import RemoteProtocolError, UsageError

RUN = b"R" * 16
ME = Member(b"\x02" * 16, b"\x52" * 16)
LOW = Member(b"\x01" * 16, b"\x51" * 16)
HIGH = Member(b"\x03" * 16, b"\x53" * 16)
WELCOME = Welcome(1, "test", RUN, 1, 5000, False)
RESUMED = Welcome(1, "test", RUN, 1, 5000, True)


def fresh() -> MemberMachine:
    return MemberMachine(ME.peer, ME.incarnation, 0, (), "test")


def pending() -> MemberMachine:
    machine = fresh()
    machine.connected(0.0)
    machine.receive(WELCOME, 0.0)
    assert machine.state is State.PENDING
    return machine


def first_epoch(*members: Member) -> Epoch:
    return make_epoch(4, b"P" * 16, 1, members or (LOW, ME, HIGH))


def after(epoch: Epoch, *members: Member) -> Epoch:
    return make_epoch(epoch.number + 1, epoch.id, 1, members or epoch.members)


def in_epoch() -> tuple[MemberMachine, Epoch]:
    """A member of epoch 4 with LOW and HIGH; it entered."""
    machine, epoch = pending(), first_epoch()
    machine.receive(EpochPropose(1, epoch), 0.0)
    machine.receive(EpochCommit(epoch, "join", world_size=3), 0.0)
    machine.entered(4, 0.0)
    return machine, epoch


def at_safe_point(version: int = 7) -> tuple[MemberMachine, Epoch, Epoch]:
    machine, epoch = in_epoch()
    machine.arrive((Count(0, 1, 3),), 0.0)
    proposed = after(epoch)
    machine.receive(EpochPropose(version, proposed, (Count(0, 1, 4),)), 0.0)
    return machine, epoch, proposed


def sent(effects: list[mb.Effect]) -> list[Message]:
    return [effect.message for effect in effects if isinstance(effect, mb.Send)]


def come_back(machine: MemberMachine, *more: Message) -> list[Message]:
    """The control connection breaks and comes back; what is sent after the Welcome."""
    machine.disconnected(1.0)
    machine.connected(1.0)
    effects = machine.receive(RESUMED, 1.0)
    for message in more:
        effects += machine.receive(message, 1.0)
    return sent(effects)


# ---- greeting and joining


def test_newcomer_greets_waits_links_and_joins() -> None:
    machine = fresh()
    assert sent(machine.connected(0.0)) == [Hello(1, "test", 0, ME.peer, ME.incarnation, (), None)]
    assert machine.receive(WELCOME, 0.0) == []
    assert machine.receive(Pending(1), 0.0) == [mb.PendingChanged(1)]
    epoch = first_epoch()
    assert machine.receive(EpochPropose(3, epoch, (Count(0, 0, 9),)), 0.0) == [mb.OpenLinks(3, 4, (LOW, HIGH))]
    assert machine.state == State.LINKING
    assert sent(machine.links_ready(3, 0.0)) == [Ready(4, 3)]
    assert machine.receive(EpochCommit(epoch, "join", (OpVerdict(0, 0, 0, 1),), world_size=9), 0.0) == [
        mb.Enter(epoch, (), restart=True, mismatch=False, rank=1, world_size=9),
        mb.KeepLinks((LOW.peer, HIGH.peer)),
        mb.Joined(epoch),
    ]
    assert machine.state is State.MEMBER
    assert sent(machine.entered(4, 0.0)) == [Entered(4)]


def test_founder_joins_without_links() -> None:
    machine = pending()
    epoch = make_epoch(1, bytes(16), 1, (ME,))
    effects = machine.receive(EpochCommit(epoch, "found", world_size=1), 0.0)
    assert effects == [mb.Enter(epoch, (), True, False, 0, 1), mb.KeepLinks(()), mb.Joined(epoch)]


def test_a_later_term_of_its_master_is_what_a_member_comes_back_with_and_recalls() -> None:
    machine, epoch = in_epoch()
    later = machine.term + (3 << 32)
    assert machine.receive(Term(later), 1.0) == []
    with pytest.raises(RemoteProtocolError, match="goes back"):
        machine.receive(Term(later - 1), 1.0)
    machine.disconnected(2.0)
    (hello,) = sent(machine.connected(3.0))
    assert isinstance(hello, Hello) and hello.resume is not None and hello.resume.term == later
    (recall,) = sent(machine.receive(Unknown(b"N" * 16, True), 3.0))
    assert isinstance(recall, Recall) and (recall.term, recall.epoch) == (later, epoch)


def test_newcomer_that_loses_its_connection_greets_anew() -> None:
    machine = pending()
    machine.receive(EpochPropose(3, first_epoch()), 0.0)
    machine.disconnected(0.0)
    assert machine.state is State.GREETING
    assert machine.links_ready(3, 0.0) == []
    (hello,) = sent(machine.connected(1.0))
    assert isinstance(hello, Hello)
    assert hello.resume is None
    machine.receive(RESUMED, 1.0)
    assert mb.Joined(first_epoch()) in machine.receive(EpochCommit(first_epoch(), "join"), 1.0)


def test_newcomer_that_cannot_link_says_whom_and_may_still_get_ready() -> None:
    machine = pending()
    machine.receive(EpochPropose(3, first_epoch()), 0.0)
    assert sent(machine.links_failed(3, (HIGH.peer,), "x" * 300, 0.0)) == [
        Unreachable(4, 3, (HIGH.peer,), "x" * 197 + "...")
    ]
    assert sent(machine.links_ready(3, 0.0)) == [Ready(4, 3)]


@pytest.mark.parametrize(("message", "kind"), [(Rejected("no"), "rejected"), (Evicted("no"), "evicted")])
def test_refusal_ends_it_and_nothing_happens_any_more(message: Message, kind: str) -> None:
    machine, epoch = in_epoch()
    assert machine.receive(message, 0.0) == [mb.Ended(kind, "no")]
    assert machine.state is State.ENDED
    assert machine.receive(EpochCommit(after(epoch), "join"), 0.0) == []
    assert machine.arrive((), 0.0) == machine.suspect(LOW.peer, "silent", "", 0.0) == machine.tick(99.0) == []
    assert machine.connected(9.0) == machine.leave(9.0) == []


def test_leaving_says_so_and_ends() -> None:
    machine, _ = in_epoch()
    assert machine.leave(0.0) == [mb.Send(Leave()), mb.Ended("left", "left the run")]


# ---- what is refused leaves everything as it was


def test_member_refuses_an_epoch_that_does_not_follow_its_own() -> None:
    machine, epoch = in_epoch()
    later = make_epoch(6, epoch.id, 1, epoch.members)
    foreign = make_epoch(5, b"?" * 16, 1, epoch.members)
    without = make_epoch(5, epoch.id, 1, (LOW, HIGH))
    reborn = make_epoch(5, epoch.id, 1, (LOW, Member(ME.peer, b"?" * 16)))
    forged = Epoch(5, b"?" * 16, epoch.id, 1, epoch.members)
    for wrong in (later, foreign, without, reborn, forged):
        for message in (EpochCommit(wrong, "join"), EpochPropose(9, wrong)):
            with pytest.raises(RemoteProtocolError):
                machine.receive(message, 0.0)
    assert (machine.state, machine.epoch) == (State.MEMBER, epoch)


def test_nothing_but_a_greeting_is_legal_before_welcome() -> None:
    machine, epoch = in_epoch()
    machine.disconnected(0.0)
    assert machine.receive(EpochCommit(after(epoch), "loss"), 0.0) == []
    machine.connected(0.0)
    with pytest.raises(RemoteProtocolError, match="EpochCommit is not legal in MEMBER with the link GREETED"):
        machine.receive(EpochCommit(after(epoch), "loss"), 0.0)
    assert machine.link is Link.GREETED


def test_second_welcome_another_run_and_an_older_term_are_refused() -> None:
    machine, _ = in_epoch()
    with pytest.raises(RemoteProtocolError):
        machine.receive(RESUMED, 0.0)
    machine.disconnected(0.0)
    machine.connected(0.0)
    for wrong in (WELCOME, Welcome(1, "", b"?" * 16, 1, 5000, True), Welcome(1, "", RUN, 0, 5000, True)):
        with pytest.raises(RemoteProtocolError):
            machine.receive(wrong, 0.0)
    assert machine.link is Link.GREETED


def test_message_of_another_direction_is_refused() -> None:
    machine, _ = in_epoch()
    with pytest.raises(RemoteProtocolError, match="Heartbeat is not legal"):
        machine.receive(Heartbeat(), 0.0)


# ---- safe points


def test_member_is_ready_when_linked_and_drained() -> None:
    machine, epoch = in_epoch()
    assert sent(machine.arrive((Count(0, 1, 3),), 0.0)) == [Arrive(4, (Count(0, 1, 3),))]
    proposed = after(epoch, LOW, ME)
    assert machine.receive(EpochPropose(7, proposed, (Count(0, 1, 4),)), 0.0) == [
        mb.OpenLinks(7, 5, (LOW,)),
        mb.SetCut(7, (Count(0, 1, 4),)),
    ]
    assert machine.links_ready(7, 0.0) == []
    assert machine.drained(6, 0.0) == []
    assert sent(machine.drained(7, 0.0)) == [Ready(5, 7)]
    assert machine.drained(7, 0.0) == []
    effects = machine.receive(EpochCommit(proposed, "join", world_size=2), 0.0)
    assert effects == [
        mb.Enter(proposed, (), True, False, 1, 2),
        mb.KeepLinks((LOW.peer,)),
        mb.SafePointDone(None, "join"),
    ]


def test_member_that_is_behind_says_so_and_answers_the_next_version() -> None:
    machine, _, proposed = at_safe_point(7)
    assert sent(machine.behind(7, (Count(0, 1, 5),), 0.0)) == [Behind(5, 7, (Count(0, 1, 5),))]
    machine.receive(EpochPropose(8, proposed, (Count(0, 1, 5),)), 0.0)
    assert machine.links_ready(7, 0.0) == machine.drained(7, 0.0) == []
    machine.links_ready(8, 0.0)
    assert sent(machine.drained(8, 0.0)) == [Ready(5, 8)]


def test_withdrawal_opens_the_cut_and_a_commit_on_its_way_is_entered_all_the_same() -> None:
    machine, _, proposed = at_safe_point()
    assert machine.withdraw(0.0) == [mb.Send(Withdraw(4)), mb.ClearCut()]
    effects = machine.receive(EpochCommit(proposed, "join"), 0.0)
    assert [type(effect) for effect in effects] == [mb.Enter, mb.KeepLinks]


def test_proposal_that_crossed_a_withdrawal_is_answered_with_it() -> None:
    machine, epoch = in_epoch()
    machine.arrive((), 0.0)
    machine.withdraw(0.0)
    assert machine.receive(EpochPropose(7, after(epoch)), 0.0) == [mb.Send(Withdraw(4))]


def test_cancelled_proposal_opens_the_cut_of_who_stays_arrived() -> None:
    machine, _, _ = at_safe_point(7)
    assert machine.receive(Cancelled(7), 0.0) == [mb.ClearCut()]
    assert machine.receive(Cancelled(7), 0.0) == []
    assert machine.drained(7, 0.0) == []


def test_safe_point_starts_over_in_a_loss_epoch() -> None:
    machine, epoch, _ = at_safe_point()
    assert machine.receive(Flush(1, 4, 5, (LOW.peer, ME.peer)), 0.0) == [mb.Freeze(1)]
    assert machine.links_ready(7, 0.0) == machine.drained(7, 0.0) == []
    left = after(epoch, LOW, ME)
    verdicts = (OpVerdict(0, 1, 3, 1),)
    assert machine.receive(EpochCommit(left, "loss", verdicts, world_size=2), 0.0) == [
        mb.Enter(left, verdicts, False, False, 1, 2),
        mb.KeepLinks((LOW.peer,)),
        mb.NeedCounts(),
    ]
    assert sent(machine.arrive((), 0.0)) == [Arrive(5, ())]


def test_arrival_during_a_freeze_waits_for_the_epoch() -> None:
    machine, epoch = in_epoch()
    machine.receive(Flush(1, 4, 5, (ME.peer,)), 0.0)
    assert machine.arrive((), 0.0) == []
    assert mb.NeedCounts() in machine.receive(EpochCommit(after(epoch, ME), "loss"), 0.0)


def test_mismatch_ends_the_safe_point_with_its_detail() -> None:
    machine, epoch, _ = at_safe_point()
    detail = "peers 01010101; fields count; told"
    effects = machine.receive(EpochCommit(after(epoch), "mismatch", detail=detail, world_size=3), 0.0)
    assert effects == [
        mb.MismatchNotice(detail, (LOW.peer.hex(),), ("count",)),
        mb.Enter(after(epoch), (), True, True, 1, 3),
        mb.KeepLinks((LOW.peer, HIGH.peer)),
        mb.SafePointDone(detail, "mismatch"),
    ]


def test_update_topology_without_an_epoch_is_a_usage_error() -> None:
    with pytest.raises(UsageError):
        fresh().arrive((), 0.0)


# ---- ballots


def test_flush_freezes_reports_and_takes_a_newer_ballot_only() -> None:
    machine, _ = in_epoch()
    everybody = (LOW.peer, ME.peer, HIGH.peer)
    assert machine.receive(Flush(2, 4, 5, everybody), 0.0) == [mb.Freeze(2)]
    ops = (OpReport(0, 0, 0, 2, 9),)
    assert sent(machine.frozen(2, ops, 0.0)) == [Report(4, 2, ops)]
    assert machine.receive(Flush(1, 4, 5, everybody), 0.0) == []
    assert machine.receive(Flush(3, 4, 5, (ME.peer,)), 0.0) == [mb.Freeze(3)]
    assert machine.frozen(2, ops, 0.0) == []
    assert sent(machine.frozen(3, (), 0.0)) == [Report(4, 3, ())]


def test_report_too_long_for_a_message_leaves_out_what_decides_nothing() -> None:
    machine, _ = in_epoch()
    machine.receive(Flush(1, 4, 5, (ME.peer,)), 0.0)
    ops = tuple(OpReport(0, 0, seq, 1 + seq % 2, 0) for seq in range(70_000))
    (report,) = sent(machine.frozen(1, ops, 0.0))
    assert isinstance(report, Report)
    assert (len(report.ops), {op.state for op in report.ops}) == (35_000, {2})


def test_flush_of_another_epoch_or_other_members_is_refused_and_of_an_old_one_ignored() -> None:
    machine, _ = in_epoch()
    assert machine.receive(Flush(1, 3, 4, (ME.peer,)), 0.0) == []
    for wrong in (Flush(1, 5, 6, (ME.peer,)), Flush(1, 4, 5, (LOW.peer,)), Flush(1, 4, 5, (ME.peer, b"?" * 16))):
        with pytest.raises(RemoteProtocolError):
            machine.receive(wrong, 0.0)


# ---- coming back


def test_returning_member_says_where_it_stands_and_tells_again_what_holds() -> None:
    machine, epoch = in_epoch()
    machine.arrive((Count(0, 1, 3),), 0.0)
    machine.suspect(HIGH.peer, "silent", "5 s", 0.0)
    machine.settle(0.0)
    machine.differs(Key(0, 0, 0), LOW.peer, bytes(40), bytes(40), 0.0)
    machine.blocked((Key(0, 0, 1),), False, 0.0)
    assert come_back(machine) == [
        Entered(4),
        Arrive(4, (Count(0, 1, 3),)),
        Suspect(HIGH.peer, "silent", "5 s"),
        Settle(4),
        Differs(4, Key(0, 0, 0), LOW.peer, bytes(40), bytes(40)),
        Blocked(4, (Key(0, 0, 1),), True, False),
    ]
    machine.disconnected(2.0)
    (hello,) = sent(machine.connected(2.0))
    assert isinstance(hello, Hello)
    assert hello.resume == Resume(RUN, 4, epoch.id, False, 1)


def test_frozen_member_says_so_and_answers_the_repeated_flush_with_the_same_report() -> None:
    machine, _ = in_epoch()
    flush = Flush(1, 4, 5, (ME.peer,))
    machine.receive(flush, 0.0)
    machine.disconnected(0.0)
    assert machine.frozen(1, (OpReport(0, 0, 0, 1, 0),), 0.0) == []
    (hello,) = sent(machine.connected(1.0))
    assert isinstance(hello, Hello)
    assert hello.resume is not None
    assert hello.resume.frozen
    machine.receive(RESUMED, 1.0)
    assert sent(machine.receive(flush, 1.0)) == [Report(4, 1, (OpReport(0, 0, 0, 1, 0),))]


def test_answer_given_while_disconnected_is_sent_when_the_proposal_is_repeated() -> None:
    machine, _, proposed = at_safe_point(7)
    machine.disconnected(0.0)
    machine.links_ready(7, 0.0)
    assert machine.drained(7, 0.0) == []
    again = EpochPropose(7, proposed, (Count(0, 1, 4),))
    assert come_back(machine, again)[-1] == Ready(5, 7)


def test_withdrawal_while_disconnected_is_told_again() -> None:
    machine, _, _ = at_safe_point(7)
    machine.disconnected(0.0)
    assert machine.withdraw(0.0) == [mb.ClearCut()]
    assert Withdraw(4) in come_back(machine)


def test_commit_that_is_repeated_is_ignored() -> None:
    machine, epoch = in_epoch()
    assert machine.receive(EpochCommit(epoch, "join"), 0.0) == []


# ---- complaints, blocks, heartbeats


def test_complaint_is_sent_once_and_withdrawn_once() -> None:
    machine, _ = in_epoch()
    assert sent(machine.suspect(HIGH.peer, "silent", "", 0.0)) == [Suspect(HIGH.peer, "silent", "")]
    assert machine.suspect(HIGH.peer, "silent", "", 0.0) == []
    assert sent(machine.trust(HIGH.peer, 0.0)) == [Trust(HIGH.peer)]
    assert machine.trust(HIGH.peer, 0.0) == []
    assert machine.suspect(b"?" * 16, "silent", "", 0.0) == []


def test_complaint_about_who_is_no_longer_a_member_is_forgotten() -> None:
    machine, epoch = in_epoch()
    machine.suspect(HIGH.peer, "silent", "", 0.0)
    machine.receive(EpochCommit(after(epoch, LOW, ME), "loss"), 0.0)
    assert not any(isinstance(message, Suspect) for message in come_back(machine))


def test_arriving_takes_a_block_back_and_a_new_epoch_forgets_it() -> None:
    machine, epoch = in_epoch()
    assert sent(machine.blocked((), False, 0.0)) == [Blocked(4, (), False, False)]
    assert machine.blocked((), False, 0.0) == []
    assert sent(machine.arrive((), 0.0)) == [Unblocked(4), Arrive(4, ())]
    assert sent(machine.blocked((), True, 0.0)) == [Blocked(4, (), True, True)]
    machine.receive(EpochCommit(after(epoch), "loss"), 0.0)
    assert machine.unblocked(0.0) == []


def test_heartbeat_goes_out_every_fifth_of_the_timeout() -> None:
    machine = fresh()
    assert machine.tick(100.0) == []
    machine.connected(0.0)
    assert machine.tick(100.0) == []
    machine.receive(WELCOME, 0.0)
    assert machine.tick(0.9) == []
    assert sent(machine.tick(1.0)) == [Heartbeat()]
    assert machine.tick(1.9) == []
    assert sent(machine.tick(2.0)) == [Heartbeat()]


def test_master_that_answers_no_heartbeat_is_away_until_it_does() -> None:
    machine, _ = in_epoch()
    timeout = machine.peer_timeout
    assert not machine.master_is_away(0.9 * timeout)
    assert machine.master_is_away(timeout)
    assert machine.receive(Alive(), timeout) == []
    assert not machine.master_is_away(timeout)
    machine.disconnected(timeout)
    assert machine.master_is_away(timeout)


# ---- a master that does not know the run, or may not decide


def test_a_member_tells_a_master_that_asks_where_the_run_stands() -> None:
    machine, epoch = in_epoch()
    machine.disconnected(1.0)
    machine.connected(1.0)
    recall = Recall(RUN, 1, epoch, "join", (), "", 3, journaled=True)
    assert sent(machine.receive(Unknown(b"N" * 16, asks=True), 1.0)) == [recall]
    machine.receive(Welcome(1, "test", RUN, 2, 5000, True), 1.0)
    assert machine.term == 2 and machine.epoch == epoch


def test_a_member_tells_with_what_it_knows_that_its_master_has_signed_it() -> None:
    """The last of each, also behind a connection that was lost."""
    machine, epoch = in_epoch()
    last = EpochCommit(after(epoch), "loss", (), "", 3, False, b"c" * 64)
    machine.receive(last, 0.0)
    machine.disconnected(1.0)
    machine.connected(1.0)
    for term, message in ((2, Welcome(1, "test", RUN, 2, 5000, True, "", False, b"2" * 64)), (3, Term(3, b"3" * 64))):
        machine.receive(message, 1.0)
        machine.disconnected(1.0)
        machine.connected(1.0)
        recall = Recall(RUN, term, last.epoch, "loss", (), "", 3, False, b"c" * 64, b"%d" % term * 64)
        assert sent(machine.receive(Unknown(b"N" * 16, asks=True), 1.0)) == [recall]
        assert recall.commit == last
        machine.receive(Welcome(1, "test", RUN, term, 5000, True, "", False, b"%d" % term * 64), 1.0)


def test_a_member_stays_one_where_a_master_does_not_know_its_run() -> None:
    machine, epoch = in_epoch()
    machine.disconnected(1.0)
    machine.connected(1.0)
    assert machine.receive(Unknown(b"N" * 16, asks=False), 1.0) == []
    machine.disconnected(1.0)
    assert machine.state is State.MEMBER and machine.epoch == epoch and machine.run == RUN
    machine.connected(2.0)
    machine.receive(RESUMED, 2.0)
    with pytest.raises(RemoteProtocolError, match="Unknown is not legal"):
        machine.receive(Unknown(b"N" * 16, asks=True), 2.0)


def test_a_master_that_may_not_decide_is_away_until_it_asks_again() -> None:
    machine, _ = in_epoch()
    members = (LOW.peer, ME.peer, HIGH.peer)
    assert not machine.needs_master
    machine.receive(Flush(9, 4, 5, members[:2]), 1.0)
    assert machine.needs_master and not machine.master_is_away(1.0)
    machine.receive(Undecided(8, "of another ballot"), 1.0)
    assert not machine.master_is_away(1.0)
    machine.receive(Undecided(9, "too few"), 1.0)
    assert machine.master_is_away(1.0)
    machine.receive(Flush(10, 4, 5, members), 1.0)
    assert not machine.master_is_away(1.0)


def test_operations_need_a_master_once_a_member_is_complained_of() -> None:
    machine, _ = in_epoch()
    machine.suspect(LOW.peer, "silent", "", 1.0)
    assert machine.needs_master
    machine.trust(LOW.peer, 2.0)
    assert not machine.needs_master


def test_after_a_link_has_come_back_what_is_lacking_may_still_be_on_its_way() -> None:
    machine, _ = in_epoch()
    machine.suspect(LOW.peer, "silent", "", 1.0)
    machine.trust(LOW.peer, 10.0)
    assert machine.blocked((Key(0, 1, 2),), False, 10.1) == []
    assert sent(machine.blocked((Key(0, 1, 2),), False, 15.1)) == [Blocked(4, (Key(0, 1, 2),), False, False)]
