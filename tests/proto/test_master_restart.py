"""MasterMachine with a journal: what waits for it, and what the next master makes of it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from test_master import RUN, TIMEOUT_S, World, incarnation, peer_id

from pyccl._io.envelope import pack
from pyccl._proto import limits
from pyccl._proto import master as mm
from pyccl._proto.epoch import Member, make_epoch
from pyccl._proto.master import MasterMachine
from pyccl._proto.messages import (
    CAUSE_REFUSED,
    Arrive,
    Blocked,
    Cancelled,
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
    Pending,
    Ready,
    Recall,
    Report,
    Resume,
    Settle,
    Suspect,
    Term,
    Trust,
    Undecided,
    Unknown,
    Unreachable,
    Verdict,
    Welcome,
    from_wire_untrusted,
    to_wire,
)
from pyccl._proto.past import Began, Past, make_term, record_from_plain, record_to_plain, start_of


class Journaled(World):
    """A master whose journal is durable at once, or when ``flush`` is called."""

    def __init__(self) -> None:
        self.past = Past(RUN, make_term(1, 0xABC))
        self.holds = False
        self.held: list[mm.Persist] = []
        super().__init__()

    def make_master(self) -> MasterMachine:
        return MasterMachine(RUN, self.past.term, TIMEOUT_S, "test", journaled=True, past=self.past, now=self.now)

    def do(self, effects: list[mm.Effect]) -> None:
        super().do(effects)
        new = [effect for effect in effects if isinstance(effect, mm.Persist)]
        self.held += new
        if new and not self.holds:
            self.flush()

    def flush(self) -> None:
        held, self.held = self.held, []
        for persist in held:
            self.past.apply(record_from_plain(record_to_plain(persist.record)))
        self.do(self.master.persisted(held[-1].ticket, self.now))

    def restart(self, after_s: float = 1.0) -> None:
        """kill -9 and a new master; what was held is lost."""
        self.now += after_s
        self.held, self.holds = [], False
        self.inbox, self.closed, self.logs = {}, {}, []
        self.past.apply(Began(make_term(start_of(self.past.term) + 1, 0xDEF)))
        self.master = self.make_master()

    def resume(self, n: int, commit: EpochCommit, conn: int | None = None, *, frozen: bool = False) -> None:
        where = Resume(RUN, commit.epoch.number, commit.epoch.id, frozen)
        self.hello(n, conn, resume=where)


def group_of(n: int) -> Journaled:
    world = Journaled()
    for peer in range(1, n + 1):
        world.hello(peer)
    if n > 1:
        world.say(1, Arrive(1))
        world.ready(*range(1, n + 1))
    assert world.epoch().peers == tuple(peer_id(i) for i in range(1, n + 1))
    return world


def commit_of(world: World, conn: int = 1) -> EpochCommit:
    return world.last(conn, EpochCommit)


def test_the_first_members_of_a_new_run_have_no_time_of_grace() -> None:
    world = group_of(3)
    world.say(1, Suspect(peer_id(3), "silent"))
    world.pass_time(TIMEOUT_S + 0.2, beating=(1, 2))
    assert world.last(1, Flush).members == (peer_id(1), peer_id(2))


def lost_in(world: World) -> list[str]:
    return [fields["peer"] for event, fields in world.logs if event == "peer_lost"]


# ---- durable first


def test_nothing_that_tells_of_an_epoch_leaves_before_it_is_durable() -> None:
    world = Journaled()
    world.holds = True
    world.hello(1)
    assert [type(m) for m in world.inbox[1]] == [Welcome]
    world.flush()
    assert commit_of(world).kind == "found"


@pytest.mark.parametrize("kind", ["join", "loss", "settle"])
def test_while_a_decision_waits_all_are_heard_and_nothing_else_is_decided(kind: str) -> None:
    world = group_of(2)
    world.hello(3)
    world.holds = True
    if kind == "join":
        world.say(1, Arrive(2))
        world.say(2, Arrive(2))
        world.ready(1, 2, 3)
    else:
        world.say(1, Suspect(peer_id(2), CAUSE_REFUSED) if kind == "loss" else Settle(2))
        if kind == "loss":
            world.drop(2)
        flush = world.last(1, Flush)
        for n in (1, 2) if kind == "settle" else (1,):
            world.say(n, Report(2, flush.ballot, (OpReport(0, 0, 0, OpState.COMMITTED, 5),)))
    assert len(world.held) == 1
    world.forget()
    said: list[Message] = [
        Settle(2),
        Arrive(2),
        Blocked(2, (Key(0, 1, 0),), False, False),
        Suspect(peer_id(2), CAUSE_REFUSED),
        Heartbeat(),
    ]
    world.say(1, *said)
    world.hello(4)
    world.pass_time(3.0, beating=(1, 3, 4))
    assert len(world.held) == 1
    assert {type(m).__name__ for m in world.inbox[1]} <= {"Alive", "Pending"}
    assert world.master.status()["groups"][0]["deciding"]
    world.flush()
    commit = commit_of(world)
    assert (commit.kind, commit.epoch.number) == (kind, 3)
    assert [v.verdict for v in commit.verdicts] == ([] if kind == "join" else [Verdict.COMMIT])
    assert not world.closed or kind == "loss"


def test_a_member_lost_while_a_join_is_written_is_left_out_of_the_epoch_behind_it() -> None:
    world = group_of(2)
    world.hello(3)
    world.say(1, Arrive(2))
    world.say(2, Arrive(2))
    world.holds = True
    world.ready(1, 2, 3)
    world.say(2, Leave())
    world.flush()
    assert commit_of(world).epoch.peers == (peer_id(1), peer_id(2), peer_id(3))
    assert world.last(3, Flush).members == (peer_id(1), peer_id(3))
    world.holds = False
    for n in (1, 3):
        world.say(n, Report(3, world.last(n, Flush).ballot))
    assert commit_of(world, 3).epoch.peers == (peer_id(1), peer_id(3))


@pytest.mark.parametrize("what", ["hangs up", "comes again", "leaves", "cannot reach the others"])
def test_a_newcomer_whose_epoch_is_being_written_is_in_it_whatever_happens_to_it(what: str) -> None:
    world = group_of(1)
    world.hello(2)
    world.say(1, Arrive(1))
    world.holds = True
    version = world.last(2, EpochPropose).version
    world.ready(1, 2)
    if what == "leaves":
        world.say(2, Leave())
    elif what == "cannot reach the others":
        world.say(2, Unreachable(2, version, (peer_id(1),), "no route"))
    else:
        world.drop(2)
    if what == "comes again":
        world.hello(2, conn=20)
        assert not world.last(20, Welcome).resumed
    world.holds = False
    world.flush()
    if what == "leaves":
        world.say(1, Report(2, world.last(1, Flush).ballot))
        assert commit_of(world).epoch.peers == (peer_id(1),)
        return
    assert commit_of(world).epoch.peers == (peer_id(1), peer_id(2))
    if what == "comes again":
        assert commit_of(world, 20).epoch.peers == (peer_id(1), peer_id(2))


def test_a_founder_whose_epoch_is_being_written_may_not_speak_as_a_member() -> None:
    world = Journaled()
    world.holds = True
    world.hello(1)
    world.say(1, Arrive(1))
    assert "ENTERING" in world.closed[1]
    world.hello(1, conn=10)
    world.flush()
    assert commit_of(world, 10).epoch.peers == (peer_id(1),)


def test_a_journal_that_cannot_be_written_is_logged_once_and_told_in_the_status() -> None:
    world = group_of(1)
    world.holds = True
    world.hello(2)
    world.say(1, Arrive(1))
    world.ready(1, 2)
    for _ in range(3):
        world.do(world.master.not_persisted("no space left on device", world.now))
    failed = [fields for event, fields in world.logs if event == "journal_failed"]
    assert failed == [{"reason": "no space left on device", "waiting": 1}]
    assert world.master.status()["journal"] == {"kept": True, "waiting": 1, "error": "no space left on device"}
    world.flush()
    assert world.master.status()["journal"] == {"kept": True, "waiting": 0, "error": ""}


# ---- the next master


def test_members_come_back_into_their_epoch_and_nobody_else_does() -> None:
    world = group_of(3)
    commit = commit_of(world)
    world.restart()
    for n in (1, 2):
        world.resume(n, commit)
        welcome = world.last(n, Welcome)
        assert welcome.resumed and welcome.run == RUN and start_of(welcome.term) == 2
        assert not world.got(n, EpochCommit)
    world.hello(9, resume=Resume(RUN, commit.epoch.number, commit.epoch.id, False))
    assert "not a member" in world.last(9, Evicted).reason
    assert world.master.status()["groups"][0]["epoch"] == commit.epoch.number


def test_who_missed_the_last_commit_gets_it_from_the_journal_with_its_verdicts() -> None:
    world = group_of(3)
    before = commit_of(world)
    world.drop(3)
    world.say(1, Suspect(peer_id(3), CAUSE_REFUSED))
    for n in (1, 2):
        world.say(n, Report(2, world.last(n, Flush).ballot, (OpReport(0, 0, 4, OpState.PREPARED, 5),)))
    last = commit_of(world)
    assert last.verdicts
    world.restart()
    world.resume(1, last)
    world.resume(2, before, frozen=True)
    assert not world.got(1, EpochCommit)
    assert commit_of(world, 2) == last
    assert not world.got(2, Flush)
    world.hello(3, resume=Resume(RUN, 2, before.epoch.id, False))
    assert "refused" in world.last(3, Evicted).reason


def test_a_decision_that_was_not_durable_is_made_again_from_new_reports() -> None:
    world = group_of(2)
    commit = commit_of(world)
    world.holds = True
    world.say(1, Settle(2))
    ballot = world.last(1, Flush).ballot
    for n in (1, 2):
        world.say(n, Report(2, ballot, (OpReport(0, 0, 0, OpState.PREPARED, 5),)))
    assert len(world.held) == 1
    world.restart()
    world.resume(1, commit, frozen=True)
    flush = world.last(1, Flush)
    assert flush.ballot > ballot and flush.members == (peer_id(1), peer_id(2))
    world.resume(2, commit, frozen=True)
    for n in (1, 2):
        world.say(n, Report(2, world.last(n, Flush).ballot, (OpReport(0, 0, 0, OpState.PREPARED, 5),)))
    assert [v.verdict for v in commit_of(world).verdicts] == [Verdict.COMMIT]
    assert commit_of(world).epoch.number == 3


def test_a_proposal_that_was_cut_off_is_cancelled_and_the_admission_starts_over() -> None:
    world = group_of(2)
    commit = commit_of(world)
    world.hello(3)
    world.say(1, Arrive(2))
    world.say(2, Arrive(2))
    proposed = world.last(1, EpochPropose)
    world.restart()
    for n in (1, 2):
        world.resume(n, commit)
        assert world.last(n, Cancelled).version >= proposed.version
    world.hello(3)
    world.say(1, Arrive(2))
    world.say(2, Arrive(2))
    again = world.last(3, EpochPropose)
    assert again.version > proposed.version and again.epoch.number == 3
    assert again.epoch.id != proposed.epoch.id  # another term: the two can't be taken for each other
    world.ready(1, 2, 3)
    assert commit_of(world, 3).epoch.peers == (peer_id(1), peer_id(2), peer_id(3))


def test_a_newcomer_that_never_heard_of_its_commit_is_told_by_the_next_master() -> None:
    world = group_of(1)
    world.hello(2)
    world.say(1, Arrive(1))
    world.ready(1, 2)
    commit = commit_of(world)
    world.restart()
    world.hello(2)
    assert commit_of(world, 2) == commit


def test_nobody_is_given_up_for_silence_before_all_had_time_to_come_back() -> None:
    world = group_of(3)
    commit = commit_of(world)
    world.restart(after_s=100.0)
    world.resume(1, commit, frozen=True)
    world.pass_time(limits.RECONNECT_S + TIMEOUT_S - 0.3, beating=(1,))
    assert not lost_in(world)
    world.resume(2, commit)
    world.pass_time(1.0, beating=(1, 2))
    assert lost_in(world) == [peer_id(3).hex()[:8]]


@pytest.mark.parametrize("comes_after_s", [0.1, 1.5])
@pytest.mark.parametrize("silent_after_s", [-20.0, -0.1, 0.0, 1.6])
def test_silence_around_a_restart_costs_no_more_than_the_time_out_and_a_second(
    comes_after_s: float, silent_after_s: float
) -> None:
    """Counted from the later of the two: the master is up, the silence began. 1 alone is back, and heard."""
    world = group_of(3)
    commit = commit_of(world)
    world.restart(after_s=30.0)
    up = world.now
    world.pass_time(comes_after_s)
    world.resume(1, commit)
    world.resume(2, commit)
    beating: tuple[int, ...] = (1, 2)
    if silent_after_s > 0.0:
        world.resume(3, commit)
        beating = (1, 2, 3)
    world.pass_time(max(0.0, up + silent_after_s - world.now), beating)
    begins = max(up, up + silent_after_s)
    complains_at = max(world.now, up + silent_after_s + TIMEOUT_S)
    world.pass_time(complains_at - world.now, (1, 2))
    world.say(1, Suspect(peer_id(3), "silent"))
    world.pass_time(begins + TIMEOUT_S - 0.1 - world.now, (1, 2))
    assert not lost_in(world)
    world.pass_time(begins + TIMEOUT_S + 1.0 - world.now, (1, 2))
    assert lost_in(world) == [peer_id(3).hex()[:8]]


def test_whom_nobody_alive_misses_has_long_to_come_back_to_a_restarted_master() -> None:
    """2 complained and fell silent itself: what it said may be stale."""
    world = group_of(3)
    commit = commit_of(world)
    world.restart(after_s=30.0)
    world.resume(1, commit, frozen=True)
    world.resume(2, commit, frozen=True)
    world.say(2, Suspect(peer_id(3), "silent"))
    world.pass_time(limits.RECONNECT_S + TIMEOUT_S - 0.3, beating=(1,))
    assert not lost_in(world)


def test_a_member_whose_process_is_gone_is_out_at_once_after_the_restart() -> None:
    world = group_of(2)
    commit = commit_of(world)
    world.restart()
    world.resume(1, commit)
    world.say(1, Suspect(peer_id(2), CAUSE_REFUSED))
    world.say(1, Report(2, world.last(1, Flush).ballot))
    assert commit_of(world).epoch.peers == (peer_id(1),)


def test_a_group_whose_members_all_left_is_founded_anew_at_once() -> None:
    world = group_of(1)
    world.say(1, Leave())
    world.restart()
    world.hello(2)
    commit = commit_of(world, 2)
    assert (commit.kind, commit.epoch.number) == ("found", 2)
    world.hello(1, conn=10)
    assert world.last(10, Evicted).reason == "left"


def test_an_evicted_incarnation_stays_out_in_every_later_term() -> None:
    world = group_of(2)
    world.say(2, Leave())
    world.say(1, Report(2, world.last(1, Flush).ballot))
    for _ in range(3):
        commit = commit_of(world)
        world.restart()
        world.resume(1, commit)
        world.hello(2)
        assert world.last(2, Evicted).reason == "left"
        world.say(1, Arrive(commit.epoch.number))
        world.pass_time(0.5, beating=(1,))
        world.say(1, Ready(commit.epoch.number + 1, world.last(1, EpochPropose).version))


def test_groups_are_restored_each_with_its_own_epoch() -> None:
    world = Journaled()
    for n, group in ((1, 0), (2, 7), (3, 7)):
        world.hello(n, group=group)
    world.say(2, Arrive(1))
    world.ready(2, 3)
    commits = {n: commit_of(world, n) for n in (1, 2, 3)}
    assert commits[2].world_size == 3
    world.restart()
    for n, group in ((1, 0), (2, 7), (3, 7)):
        commit = commits[n]
        world.hello(n, group=group, resume=Resume(RUN, commit.epoch.number, commit.epoch.id, False))
        assert world.last(n, Welcome).resumed
    assert [(g["group"], g["epoch"]) for g in world.master.status()["groups"]] == [(0, 1), (7, 2)]


def test_members_of_another_run_are_sent_away_and_not_out_of_their_run() -> None:
    """Its master may come back: this one may have been started with the wrong journal."""
    world = group_of(1)
    world.hello(2, resume=Resume(b"X" * 16, 1, bytes(16), False))
    assert [type(m) for m in world.inbox[2]] == [Unknown]
    assert not world.last(2, Unknown).asks
    assert (b"X" * 16).hex() in world.closed[2] and RUN.hex() in world.closed[2]


# ---- a master that knows nothing takes over a run


class Adopting(Journaled):
    """With a journal (--adopt-run) or without one (--no-journal)."""

    def __init__(self, journaled: bool) -> None:
        self.journaled, self.adopts = journaled, True
        super().__init__()
        self.past = Past(b"N" * 16, make_term(1, 0x123))
        self.master = self.make_master()

    def make_master(self) -> MasterMachine:
        return MasterMachine(
            *(self.past.run, self.past.term, TIMEOUT_S, "test"), journaled=self.journaled,
            needs_majority=not self.journaled, adopts=self.adopts, past=self.past, now=self.now,
        )  # fmt: skip

    def come_back(
        self, n: int, commit: EpochCommit, *, conn: int | None = None, frozen: bool = False,
        term: int = make_term(1, 0xABC),
    ) -> None:
        conn = n if conn is None else conn
        self.resume(n, commit, conn, frozen=frozen)
        if self.got(conn, Unknown):
            assert self.last(conn, Unknown).asks
            self.say(conn, recall_of(commit, term))


def recall_of(commit: EpochCommit, term: int = make_term(1, 0xABC)) -> Recall:
    return Recall(
        *(RUN, term, commit.epoch, commit.kind, commit.verdicts),
        *(commit.detail, commit.world_size, commit.journaled),
    )


@pytest.mark.parametrize("journaled", [True, False])
def test_an_adopting_master_continues_the_run_of_those_who_come(journaled: bool) -> None:
    commit = commit_of(group_of(3))
    world = Adopting(journaled)
    for n in (1, 2, 3):
        world.come_back(n, commit)
        welcome = world.last(n, Welcome)
        assert welcome.run == RUN and welcome.resumed and start_of(welcome.term) == 2
        assert len(world.got(n, Unknown)) == (n == 1)  # one word is enough
    world.hello(4)
    for n in (1, 2, 3):
        world.say(n, Arrive(2))
    world.ready(1, 2, 3, 4)
    assert commit_of(world, 4).epoch.previous == commit.epoch.id
    assert commit_of(world, 4).journaled == journaled
    if journaled:
        assert world.past.run == RUN and world.past.groups[0].commit == commit_of(world, 4)


@pytest.mark.parametrize("journaled", [True, False])
def test_silence_in_a_run_that_is_taken_over_counts_from_the_masters_start(journaled: bool) -> None:
    commit = commit_of(group_of(3))
    world = Adopting(journaled)
    world.pass_time(1.5)
    for n in (1, 2):
        world.come_back(n, commit)
    world.say(1, Suspect(peer_id(3), "silent"))
    world.pass_time(TIMEOUT_S - 1.6, beating=(1, 2))
    assert not lost_in(world)
    world.pass_time(1.1, beating=(1, 2))
    assert lost_in(world) == [peer_id(3).hex()[:8]]


def test_a_master_that_was_up_for_long_gives_those_of_a_run_it_takes_over_time_to_come() -> None:
    commit = commit_of(group_of(3))
    world = Adopting(journaled=True)
    world.hello(9)  # somebody is heard all the time
    world.pass_time(10 * TIMEOUT_S)
    world.come_back(1, commit)
    world.come_back(2, commit)
    world.say(1, Suspect(peer_id(3), "silent"))
    world.pass_time(TIMEOUT_S - 0.2, beating=(1, 2))
    assert not lost_in(world)


def test_the_run_that_is_taken_over_is_durable_before_anybody_is_welcome() -> None:
    commit = commit_of(group_of(2))
    world = Adopting(journaled=True)
    world.holds = True
    world.come_back(1, commit)
    world.come_back(2, commit)
    assert not world.got(1, Welcome) and not world.got(2, Welcome)
    world.flush()
    assert world.last(1, Welcome).resumed and world.last(2, Welcome).resumed
    world.restart()
    world.resume(2, commit)
    assert world.last(2, Welcome).resumed


@pytest.mark.parametrize("journaled", [True, False])
def test_who_is_one_commit_ahead_brings_the_others_with_it(journaled: bool) -> None:
    world = group_of(3)
    before = commit_of(world)
    world.say(3, Leave())
    for n in (1, 2):
        world.say(n, Report(2, world.last(n, Flush).ballot, (OpReport(0, 0, 4, OpState.PREPARED, 5),)))
    last = commit_of(world)
    world = Adopting(journaled)
    world.come_back(2, before, frozen=True)
    world.come_back(1, last, term=make_term(6, 1))
    assert commit_of(world, 2) == last
    assert start_of(world.last(1, Welcome).term) == 7
    flush = world.last(2, Flush)
    world.come_back(3, before)
    assert world.last(3, Evicted).reason
    world.say(1, Settle(3))
    assert world.last(2, Flush).ballot > max(flush.ballot, 7 << 32)


def test_a_restarted_master_knows_which_epochs_are_their_members_word() -> None:
    """The operator has allowed it the first time; what it has decided since is its own word."""
    world = group_of(3)
    before = commit_of(world)
    world.say(3, Leave())
    for n in (1, 2):
        world.say(n, Report(2, world.last(n, Flush).ballot, (OpReport(0, 0, 4, OpState.PREPARED, 5),)))
    last = commit_of(world)
    world = Adopting(journaled=True)
    world.come_back(2, before)
    assert world.past.recalled == {0}
    world.adopts = False
    world.restart()
    world.resume(2, before)
    assert not world.got(2, Cancelled), "1 may have the commit of what was proposed"
    world.hello(9, group=7)
    assert not world.got(9, EpochCommit), "members of that group may be on their way"
    world.come_back(1, last)
    assert commit_of(world, 2) == last
    world.restart()
    for n in (1, 2):
        world.resume(n, last)
    world.say(1, Settle(3))
    for n in (1, 2):
        world.say(n, Report(3, world.last(n, Flush).ballot))
    assert commit_of(world).epoch.previous == last.epoch.id
    assert world.past.recalled == frozenset()


@pytest.mark.parametrize("journaled", [True, False])
def test_what_was_proposed_is_cancelled_when_nobody_can_hold_its_commit_any_more(journaled: bool) -> None:
    world = group_of(3)
    before = commit_of(world)
    world.hello(4)
    for n in (1, 2, 3):
        world.say(n, Arrive(2))
    world.ready(1, 2, 3, 4)
    last = commit_of(world)
    world = Adopting(journaled)
    world.come_back(2, before)
    world.come_back(3, before)
    assert not world.got(2, Cancelled) and not world.got(3, Cancelled)
    world.come_back(1, last)
    assert commit_of(world, 2) == commit_of(world, 3) == last
    world = Adopting(journaled)
    for n in (2, 3, 1):
        world.come_back(n, before)
    assert all(world.got(n, Cancelled) for n in (1, 2, 3))


def test_a_newcomer_founds_nothing_before_the_run_is_taken_over() -> None:
    commit = commit_of(group_of(2))
    world = Adopting(journaled=True)
    world.hello(9)
    assert "come first" in world.closed[9] and 9 not in world.inbox
    world.come_back(1, commit)
    world.hello(9, conn=90)
    assert world.last(90, Welcome).run == RUN


def test_a_run_that_comes_back_goes_before_one_founded_without_a_journal() -> None:
    commit = commit_of(group_of(2))
    world = Adopting(journaled=False)
    world.hello(9)
    assert commit_of(world, 9).kind == "found"
    world.come_back(1, commit)
    assert "older" in world.last(9, Evicted).reason
    assert world.last(1, Welcome).run == RUN


@pytest.mark.parametrize("journaled", [True, False])
def test_a_newcomer_does_not_found_anew_the_group_of_members_that_are_on_their_way(journaled: bool) -> None:
    before = Journaled()
    for n, group in ((1, 0), (2, 7)):
        before.hello(n, group=group)
    world = Adopting(journaled)
    world.come_back(1, commit_of(before, 1))
    world.hello(9, group=7)
    world.pass_time(limits.RECONNECT_S - 0.5, beating=(1, 9))
    commit = commit_of(before, 2)
    world.hello(2, group=7, resume=Resume(RUN, commit.epoch.number, commit.epoch.id, False))
    world.say(2, recall_of(commit))
    assert world.last(2, Welcome).resumed and world.last(2, Pending).count == 1
    world.say(2, Arrive(1))
    world.ready(2, 9)
    assert commit_of(world, 9).epoch.previous == commit.epoch.id


@pytest.mark.parametrize("journaled", [True, False])
def test_in_a_run_taken_over_an_unknown_group_is_founded_later_with_numbers_that_it_never_had(journaled: bool) -> None:
    world = Adopting(journaled)
    world.come_back(1, commit_of(group_of(1)))
    world.hello(9, group=7)
    world.pass_time(limits.RECONNECT_S - 0.5, beating=(1, 9))
    assert not world.got(9, EpochCommit)
    world.pass_time(1.0, beating=(1, 9))
    assert commit_of(world, 9).epoch.number == (2 << 32) + 1
    world.hello(10, group=7)
    world.say(9, Arrive((2 << 32) + 1))
    world.ready(9, 10)
    assert commit_of(world, 10).epoch.number == (2 << 32) + 2


def test_a_master_that_has_taken_over_one_run_sends_those_of_another_away() -> None:
    world = Adopting(journaled=False)
    world.come_back(1, commit_of(group_of(2)))
    world.hello(5, resume=Resume(b"X" * 16, 1, bytes(16), False))
    assert not world.last(5, Unknown).asks and 5 in world.closed


def test_a_ballot_that_is_open_when_a_later_term_is_heard_of_is_asked_again() -> None:
    commit = commit_of(group_of(3))
    world = Adopting(journaled=False)
    world.come_back(1, commit, frozen=True)
    first = world.last(1, Flush).ballot
    epoch = commit.epoch
    world.hello(2, resume=Resume(RUN, epoch.number, epoch.id, False, make_term(5, 1)))
    world.say(2, recall_of(commit, make_term(5, 1)))
    world.hello(3, resume=Resume(RUN, epoch.number, epoch.id, False))
    ballot = world.last(1, Flush).ballot
    assert ballot > first and ballot > 5 << 32
    term = world.master.term
    assert start_of(term) == 6 and world.got(1, Term) == [Term(term)] and not world.got(2, Term)
    assert world.inbox[1].index(Term(term)) < world.inbox[1].index(world.last(1, Flush)), "before what it numbers"
    assert world.last(2, Welcome).term == term
    for n in (1, 2, 3):
        assert world.last(n, Flush).ballot == ballot
        world.say(n, Report(epoch.number, ballot))
    assert commit_of(world).epoch.previous == epoch.id


def test_nothing_is_asked_under_a_later_term_before_that_is_durable() -> None:
    commit = commit_of(group_of(3))
    world = Adopting(journaled=True)
    epoch = commit.epoch
    for n in (1, 2):  # both are asked before there is a term to compare with
        world.hello(n, resume=Resume(RUN, epoch.number, epoch.id, n == 1, make_term(n, 9)))
    world.say(1, recall_of(commit, make_term(1, 9)))
    first = world.last(1, Flush).ballot
    world.holds = True
    world.say(2, recall_of(commit, make_term(2, 9)))
    world.hello(3, resume=Resume(RUN, epoch.number, epoch.id, False))
    assert world.last(1, Flush).ballot == first and not world.got(2, Welcome) and not world.got(3, Welcome)
    assert not world.got(1, Term)
    world.flush()
    assert world.got(1, Term) == [Term(world.past.term)]
    ballot = world.last(1, Flush).ballot
    assert ballot > max(first, start_of(make_term(2, 9)) << 32)
    for n in (1, 2, 3):
        assert world.last(n, Flush).ballot == ballot
        world.say(n, Report(epoch.number, ballot))
    world.flush()
    assert commit_of(world).epoch.previous == epoch.id


def test_the_term_of_a_recalled_epoch_counts_where_its_member_was_welcomed_in_an_earlier_one() -> None:
    """Its master has risen above another member's since."""
    commit = commit_of(group_of(1))
    old = commit.epoch
    epoch = make_epoch(old.number, old.previous, make_term(6, 1), old.members, old.plan)
    world = Adopting(journaled=True)
    world.come_back(1, replace(commit, epoch=epoch), term=make_term(5, 1))
    assert start_of(world.last(1, Welcome).term) == 7


def test_a_recall_that_tells_nothing_new_waits_for_no_record() -> None:
    """Nor do those who come behind it."""
    commit = commit_of(group_of(3))
    world = Adopting(journaled=True)
    resume = Resume(RUN, commit.epoch.number, commit.epoch.id, False)
    for n in (1, 2):  # both are asked
        world.hello(n, resume=resume)
    for n in (1, 2):
        world.say(n, recall_of(commit))
        assert world.last(n, Welcome).resumed
    world.hello(3, resume=resume)
    assert world.last(3, Welcome).resumed


def test_a_hello_that_waits_is_the_only_one_of_its_connection() -> None:
    commit = commit_of(group_of(2))
    world = Adopting(journaled=True)
    world.holds = True
    resume = Resume(RUN, commit.epoch.number, commit.epoch.id, False)
    world.hello(1, resume=resume)
    assert world.master.body_bytes_max(1) == limits.BODY_MAX_BYTES, "a Recall holds an epoch and its verdicts"
    assert world.master.body_bytes_max(2) == limits.BODY_NEWCOMER_MAX_BYTES
    world.say(1, recall_of(commit))
    world.hello(2, resume=resume)
    world.say(2, Hello(1, "test", 0, peer_id(2), incarnation(2), (), resume))
    assert 2 in world.closed
    world.flush()
    assert world.got(1, Welcome) and not world.got(2, Welcome)


def test_a_group_whose_place_was_needed_is_forgotten_in_the_journal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "GROUPS_MAX", 2)
    world = Journaled()
    for group in range(5):
        world.hello(group + 1, group=group)
        world.say(group + 1, Leave())
    assert sorted(world.past.groups) == [3, 4]
    world.restart()
    assert len(world.master.status()["groups"]) == 2


@pytest.mark.parametrize("journaled", [True, False])
def test_two_who_come_at_once_and_have_seen_different_terms_are_both_taken_over(journaled: bool) -> None:
    commit = commit_of(group_of(2))
    world = Adopting(journaled)
    world.holds = journaled
    for n, term in ((1, make_term(1, 5)), (2, make_term(2, 0xFFFFFFFF))):
        world.hello(n, resume=Resume(RUN, commit.epoch.number, commit.epoch.id, False, term))
    world.say(1, recall_of(commit, make_term(1, 5)))
    if journaled:
        world.say(2, recall_of(commit, make_term(2, 0xFFFFFFFF)))
        world.flush()
    else:  # it was asked before there was a term to compare with
        world.say(2, recall_of(commit, make_term(2, 0xFFFFFFFF)))
    assert world.last(2, Welcome).term > make_term(2, 0xFFFFFFFF)
    assert [event for event, _ in world.logs].count("epoch_adopted") == 1
    third = world.master.term
    world.drop(1)
    world.hello(1, resume=Resume(RUN, commit.epoch.number, commit.epoch.id, False, third))
    assert world.last(1, Welcome).term == third


def test_a_journal_that_is_older_than_the_run_decides_nothing_in_it() -> None:
    """It was brought back from a copy, or another master has taken the run over meanwhile."""
    world = group_of(2)
    commit = commit_of(world)
    world.restart()
    world.hello(1, resume=Resume(RUN, commit.epoch.number, commit.epoch.id, False, make_term(2, 1)))
    assert world.last(1, Unknown) == Unknown(RUN, asks=False)
    assert "another master" in world.closed[1]


def test_a_recall_must_be_asked_for_and_fit_its_hello() -> None:
    commit = commit_of(group_of(2))
    other = commit_of(group_of(3))
    world = Adopting(journaled=False)
    world.do(world.master.connected(1, 0.0))
    world.say(1, recall_of(commit))
    assert "nobody asked" in world.closed[1]
    world.resume(2, commit)
    world.say(2, recall_of(other))
    assert "another epoch" in world.closed[2]
    world.resume(3, commit)
    world.say(3, recall_of(commit))
    assert "another epoch" in world.closed[3]  # it is not in it
    assert world.master.status()["run"] == (b"N" * 16).hex()


def test_a_recall_that_leaves_no_numbers_or_takes_the_members_of_another_group_is_refused() -> None:
    commit = commit_of(group_of(2))
    world = Adopting(journaled=False)
    world.resume(1, commit)
    world.say(1, recall_of(commit, limits.U64_MAX))
    assert "no numbers" in world.closed[1]
    last = EpochCommit(make_epoch(limits.U64_MAX, bytes(16), 1, commit.epoch.members), "loss", (), "", 2)
    world.resume(2, last)
    world.say(2, recall_of(last))
    assert "no numbers" in world.closed[2]
    world.come_back(1, commit, conn=3)
    assert world.got(3, Welcome)
    both = (commit.epoch.members[0], Member(peer_id(9), incarnation(9)))
    of_both = EpochCommit(make_epoch(1, bytes(16), 1, both), "loss")
    world.hello(9, group=7, resume=Resume(RUN, 1, of_both.epoch.id, False))
    world.say(9, recall_of(of_both))
    assert "another group" in world.closed[9]


@pytest.mark.parametrize("journaled", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_recalled_an_adopting_master_goes_on(seed: int, journaled: bool) -> None:
    """Strangers that know the run: all that it sends can be sent, and the next master can read its journal."""
    rng = random.Random(seed)
    world = Adopting(journaled)
    members = [Member(peer_id(n), incarnation(n + 10 * again)) for n in range(1, 5) for again in (0, 1)]
    epochs = [
        make_epoch(number, rng.choice([bytes(16), b"p" * 16]), rng.choice([1, limits.U64_MAX]), tuple(some))
        for number in (1, 2, 3, 1 << 62, limits.U64_MAX)
        for some in (rng.sample(members[::2], 3), rng.sample(members[1::2], 2))
    ]
    epochs += [make_epoch(e.number + 1, e.id, 1, e.members[1:]) for e in epochs if e.number < limits.U64_MAX]
    recalls = 0
    for conn in range(300):
        epoch, term = rng.choice(epochs), rng.choice([make_term(rng.randint(0, 3), 7), limits.U64_MAX])
        run, who = rng.choice([RUN, RUN, RUN, b"?" * 16]), rng.choice(members)
        resume = rng.choice([Resume(run, epoch.number, epoch.id, rng.random() < 0.5, term)] * 5 + [None])
        world.hello(
            0, conn, peer=who.peer, incarnation=who.incarnation, group=rng.choice([0, 0, 0, 1, 2]), resume=resume
        )
        if world.got(conn, Unknown) and world.last(conn, Unknown).asks:
            recalls += 1
            world.say(conn, Recall(run, rng.choice([term, term, 0]), epoch, "loss", (), "", 9, rng.random() < 0.5))
        if rng.random() < 0.3:
            world.drop(rng.choice([c for c in range(conn + 1) if c not in world.closed] or [conn]))
        world.pass_time(rng.choice([0.1, 0.1, 0.1, 2.0, 20.0]))
    assert recalls, f"seed {seed}"
    for sent in world.inbox.values():
        for message in sent:
            from_wire_untrusted(to_wire(message))
            pack(message)
    if journaled:
        world.past = Past.from_plain(world.past.to_plain())
        world.restart()
        assert world.master.status()["groups"]


# ---- without a journal


@pytest.mark.parametrize(
    ("lost", "decides"),
    [((3,), True), ((1,), True), ((3, 4), True), ((1, 2), False), ((1, 4), False), ((2, 3, 4), False)],
)
def test_without_a_journal_a_loss_is_settled_with_a_majority_only(lost: tuple[int, ...], decides: bool) -> None:
    world = Adopting(journaled=False)
    for n in range(1, 5):
        world.hello(n)
    world.say(1, Arrive(1))
    world.ready(1, 2, 3, 4)
    staying = [n for n in range(1, 5) if n not in lost]
    for n in lost:
        world.drop(n)
        world.say(staying[0], Suspect(peer_id(n), CAUSE_REFUSED))
    for n in staying:
        world.say(n, Report(2, world.last(n, Flush).ballot))
    if decides:
        assert commit_of(world, staying[0]).epoch.peers == tuple(peer_id(n) for n in staying)
        assert not commit_of(world, staying[0]).journaled
        return
    assert commit_of(world, staying[0]).epoch.number == 2
    ballot = world.last(staying[0], Flush).ballot
    assert [world.last(n, Undecided).ballot for n in staying] == [ballot] * len(staying)
    # who is heard again is wanted back, and the rest go on with it
    for n in staying:
        world.say(n, *(Trust(peer_id(m)) for m in lost))
    for n in lost:
        world.now += 1.0
        epoch = commit_of(world, staying[0]).epoch
        world.hello(n, resume=Resume(world.past.run, epoch.number, epoch.id, True))
    for n in range(1, 5):
        world.say(n, Report(2, world.last(n, Flush).ballot))
    assert commit_of(world, 1).epoch.number == 3


def test_who_leaves_by_its_own_word_needs_no_majority() -> None:
    world = Adopting(journaled=False)
    for n in (1, 2):
        world.hello(n)
    world.say(1, Arrive(1))
    world.ready(1, 2)
    world.say(1, Leave())
    world.say(2, Report(2, world.last(2, Flush).ballot))
    assert commit_of(world, 2).epoch.peers == (peer_id(2),)


def test_terms_of_two_masters_never_meet() -> None:
    assert make_term(2, 0) > make_term(1, (1 << 32) - 1)
    assert start_of(make_term(7, 12345)) == 7
