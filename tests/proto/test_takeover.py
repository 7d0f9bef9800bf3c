"""Who is believed by a master that takes a run over, and by one that has a run: what is signed, and what is later."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
from test_master import TIMEOUT_S, World, incarnation, peer_id
from test_master_restart import Journaled

from pyccl._io.identity import Identity
from pyccl._io.signing import Signer
from pyccl._proto import limits
from pyccl._proto.epoch import Member, make_epoch
from pyccl._proto.master import MasterMachine
from pyccl._proto.messages import (
    KIND_FOUND,
    KIND_LOSS,
    Arrive,
    EpochCommit,
    EpochPropose,
    Evicted,
    Flush,
    Leave,
    Pending,
    Ready,
    Recall,
    Report,
    Resume,
    Settle,
    Suspect,
    Term,
    Undecided,
    Unknown,
    Welcome,
)
from pyccl._proto.past import Past, make_term, start_of

ASKED_MAX = 3
BACK_S = limits.RECONNECT_S + 0.1
SIGNER, OTHERS = Signer(Identity.new()), Signer(Identity.new())
EVIL = 9


class Known(NamedTuple):
    """What a member remembers of its run."""

    run: bytes
    commit: EpochCommit
    term: Term


class Master(Journaled):
    """Knows nothing. Without a journal it is `pyccl-master --no-journal`, with one `--adopt-run`."""

    def __init__(self, *, secure: bool = True, journaled: bool = False, run: bytes = b"N" * 16, nonce: int = 1) -> None:
        self.signer, self.journaled = SIGNER if secure else None, journaled
        super().__init__()
        self.past = Past(run, make_term(1, nonce))
        self.master = self.make_master()

    def make_master(self) -> MasterMachine:
        return MasterMachine(
            *(self.past.run, self.past.term, TIMEOUT_S, "test"), journaled=self.journaled,
            needs_majority=not self.journaled, adopts=True, signer=self.signer, past=self.past, now=self.now,
        )  # fmt: skip

    def come_back(self, n: int, known: Known, conn: int | None = None, *, group: int = 0) -> None:
        """It resumes, and tells what it knows when it is asked."""
        conn = n if conn is None else conn
        epoch = known.commit.epoch
        self.hello(n, conn, resume=Resume(known.run, epoch.number, epoch.id, False, known.term.term), group=group)
        for _ in range(ASKED_MAX):
            if self.inbox[conn][-1] != Unknown(self.master.run, asks=True):
                return
            self.say(conn, recall_of(known))
            if conn in self.closed:
                return
        raise AssertionError("asked again and again")

    def settle(self, *members: int, number: int = 0) -> None:
        """The epoch behind this one is decided, as a ballot leads to it."""
        self.say(members[0], Settle(number or self.epoch(members[0]).number))
        self.report(*members)

    def report(self, *members: int) -> None:
        for n in members:
            flush = self.last(n, Flush)
            self.say(n, Report(flush.epoch, flush.ballot))

    def is_out(self, n: int) -> bool:
        return bool(self.got(n, Evicted)) or n in self.closed


def recall_of(known: Known) -> Recall:
    c = known.commit
    told = (c.epoch, c.kind, c.verdicts, c.detail, c.world_size, c.journaled, c.signature)
    return Recall(known.run, known.term.term, *told, known.term.signature)


def known_to(world: World, conn: int, before: Known | None = None) -> Known:
    """before: by what it came back, if no commit was told since."""
    run, term = world.last(conn, Welcome).run, term_told(world, conn)
    commits = world.got(conn, EpochCommit)
    if before is not None and not commits:
        return Known(run, before.commit, term)
    return Known(run, commits[-1], term)


def term_told(world: World, conn: int) -> Term:
    welcome = world.last(conn, Welcome)
    return [Term(welcome.term, welcome.term_signature), *world.got(conn, Term)][-1]


def master_of(*members: int, secure: bool = True, run: bytes = b"R" * 16) -> Master:
    """These have founded a run at it, and are members of epoch 2; of epoch 1 if it is one."""
    world = Master(secure=secure, run=run, nonce=7)
    for n in members:
        world.hello(n)
    if len(members) > 1:
        world.say(members[0], Arrive(1))
        world.ready(*members)
    return world


def invented(run: bytes, *, secure: bool, term: int = make_term(5, 7)) -> Known:
    """As if another master had kept the run since, with nobody but the one who tells of it."""
    me = Member(peer_id(EVIL), incarnation(EVIL))
    commit = EpochCommit(make_epoch(900, b"p" * 16, term, (me,)), KIND_LOSS, (), "", 1)
    told = Term(term)
    if secure:  # with a key of its own
        commit = replace(commit, signature=OTHERS.sign(run, 0, commit))
        told = replace(told, signature=OTHERS.sign(run, 0, told))
    return Known(run, commit, told)


# ---- a master that has members


@pytest.mark.parametrize("secure", [True, False])
@pytest.mark.parametrize("run", [b"R" * 16, b"X" * 16])
def test_a_run_in_which_two_have_met_is_not_thrown_out_for_what_a_stranger_tells(run: bytes, secure: bool) -> None:
    world = master_of(1, 2, 3, secure=secure)
    world.come_back(EVIL, invented(run, secure=secure))
    assert world.is_out(EVIL) and not world.got(EVIL, Welcome)
    assert world.master.run == b"R" * 16 and not any(world.is_out(n) for n in (1, 2, 3))
    world.settle(1, 2, 3)
    assert world.epoch().number == 3 and len(world.epoch().members) == 3


@pytest.mark.parametrize("secure", [True, False])
def test_nor_for_another_run_of_the_same_master_and_it_is_when_all_have_gone(secure: bool) -> None:
    old = known_to(master_of(EVIL, secure=secure, run=b"X" * 16), EVIL)
    world = master_of(1, 2, secure=secure)
    world.come_back(EVIL, old)
    assert not world.last(EVIL, Unknown).asks and world.master.run == b"R" * 16
    world.say(2, Leave())
    world.report(1)
    world.come_back(EVIL, old, conn=90)
    assert world.master.run == b"R" * 16, "who is left has what both have made"
    world.say(1, Leave())
    world.come_back(EVIL, old, conn=91)
    assert world.last(91, Welcome).resumed and world.master.run == b"X" * 16


@pytest.mark.parametrize("secure", [True, False])
def test_a_founder_that_nobody_has_met_gives_way_to_the_run_that_comes_back(secure: bool) -> None:
    before = master_of(1, 2, secure=secure)
    world = Master(secure=secure)
    world.hello(5)
    for number in (1, 2, 3):  # it goes on by itself
        world.say(5, Arrive(number))
        world.pass_time(0.3, beating=(5,))
        world.say(5, Ready(number + 1, world.last(5, EpochPropose).version))
    assert world.epoch(5).number == 4
    for n in (1, 2):
        world.come_back(n, known_to(before, n))
        assert world.last(n, Welcome).resumed
    assert "older" in world.last(5, Evicted).reason and world.master.run == b"R" * 16


def test_of_a_run_only_what_another_master_has_signed_since_goes_before_what_this_one_has_decided() -> None:
    """It was stopped, and its members went on with another one."""
    world = master_of(1, 2, 3)
    before = known_to(world, 1)
    for n in (1, 2, 3):
        world.drop(n)
    later = Master()
    for n in (1, 2, 3):
        later.come_back(n, before)
    later.say(3, Leave())
    later.pass_time(BACK_S, beating=(1, 2))
    later.report(1, 2)
    assert later.epoch().number == 3
    world.forget()
    world.come_back(3, before, conn=30)
    assert world.last(30, Welcome).resumed, "it was that master's, too"
    for n in (1, 2):
        world.come_back(n, known_to(later, n), conn=10 + n)
        assert world.last(10 + n, Welcome).resumed and not world.got(10 + n, Evicted)
    assert "left out" in world.last(30, Evicted).reason
    assert start_of(world.master.term) > start_of(later.master.term)
    world.pass_time(BACK_S, beating=(11, 12))
    world.say(11, Settle(3))
    world.report(11, 12)
    assert world.epoch(11).number == 4


def test_who_has_heard_of_a_later_master_from_one_group_follows_it_in_the_others_after_a_restart_too() -> None:
    """It has taken the run over and decided for both groups, as the later one has since."""
    groups = {0: (1, 2), 5: (3, 4)}
    first, world, later = Master(run=b"R" * 16, nonce=7), Master(journaled=True), Master(nonce=2)
    for group, members in groups.items():
        for n in members:
            first.hello(n, group=group)
        first.say(members[0], Arrive(1))
        first.ready(*members)
    for before, after in ((first, world), (world, later)):
        for group, members in groups.items():
            known = known_to(before, members[0])
            for n in members:
                after.come_back(n, known, group=group)
        after.pass_time(BACK_S, beating=(1, 2, 3, 4))
        for members in groups.values():
            after.settle(*members, number=known_to(before, members[0]).commit.epoch.number)
    assert world.past.recalled == frozenset()
    world.come_back(1, known_to(later, 1), conn=10)
    assert world.past.recalled == {0, 5}
    world.restart()
    for group, members in groups.items():
        for n in members:
            world.come_back(n, known_to(later, n), group=group)
            assert world.last(n, Welcome).resumed and not world.is_out(n)
    world.pass_time(BACK_S, beating=(1, 2, 3, 4))
    for members in groups.values():
        world.settle(*members, number=later.epoch(members[0]).number)
        assert world.epoch(members[0]).previous == later.epoch(members[0]).id
    assert world.past.recalled == frozenset()


def test_a_master_that_has_kept_a_run_follows_a_later_one_that_has_decided_nothing_and_loses_nobody() -> None:
    world = master_of(1, 2)
    before = known_to(world, 1)
    later = Master()
    later.come_back(1, before)
    world.drop(1)
    world.come_back(1, known_to(later, 1, before), conn=10)
    assert world.last(10, Welcome).resumed and world.last(10, Welcome).term > later.master.term
    assert world.last(2, Term).term == world.master.term and not world.is_out(2)


def test_a_commit_of_old_wins_nothing_from_what_was_decided_since_whatever_term_is_told_with_it() -> None:
    """Of somebody who was in the run once, and has heard of its present term as a newcomer."""
    world = master_of(1, 2, EVIL)
    old = known_to(world, EVIL)
    world.say(EVIL, Leave())
    world.report(1, 2)
    world.hello(EVIL, conn=90, incarnation=b"2" * 16)
    for told in (old, old._replace(term=term_told(world, 90)), old._replace(term=Term(make_term(9, 9)))):
        conn = len(world.inbox) + 100
        world.come_back(EVIL, told, conn=conn)
        assert world.is_out(conn) and not world.got(conn, Welcome)
    lie = Resume(old.run, old.commit.epoch.number, old.commit.epoch.id, False, make_term(9, 9))
    world.hello(EVIL, conn=95, resume=lie)
    world.say(95, recall_of(old))
    assert "no other master" in world.closed[95]
    assert world.epoch().number == 3 and not any(world.is_out(n) for n in (1, 2))
    world.settle(1, 2)
    assert world.epoch().number == 4


# ---- a master that takes a run over


@pytest.mark.parametrize("journaled", [True, False])
def test_only_what_is_signed_with_the_masters_key_is_taken_over(journaled: bool) -> None:
    known = known_to(master_of(1, 2), 1)
    commit, term, run = known.commit, known.term, known.run
    more = replace(commit, epoch=make_epoch(3, commit.epoch.id, commit.epoch.term, commit.epoch.members))
    wrong = [
        known._replace(commit=replace(commit, signature=b"")),
        known._replace(commit=replace(commit, signature=OTHERS.sign(run, 0, commit))),
        known._replace(commit=replace(commit, signature=SIGNER.sign(run, 1, commit))),
        known._replace(commit=replace(commit, signature=term.signature)),
        known._replace(commit=more),
        known._replace(commit=replace(commit, kind=KIND_FOUND)),
        known._replace(run=b"X" * 16),
        known._replace(term=Term(term.term)),
        known._replace(term=replace(term, term=term.term + 1)),
        known._replace(term=replace(term, signature=commit.signature)),
    ]
    world = Master(journaled=journaled)
    for conn, told in enumerate(wrong, 100):
        world.come_back(1, told, conn=conn)
        assert "no master of this key has signed" in world.closed[conn], told
    assert world.master.run == b"N" * 16 and not world.master.status()["groups"]
    world.come_back(1, known)
    assert world.last(1, Welcome).resumed and world.master.run == run


def test_what_is_signed_is_told_on_from_master_to_master() -> None:
    """One that has taken the run over tells its commit to who missed it, and the next one believes that."""
    first = master_of(1, 2, 3)
    before = known_to(first, 2)
    first.say(3, Leave())
    first.report(1, 2)
    second = Master(journaled=True)
    second.come_back(2, before)
    second.come_back(1, known_to(first, 1))
    known = known_to(second, 2)
    assert known.commit == first.last(1, EpochCommit) and start_of(known.term.term) == 2
    second.restart()
    second.come_back(2, before._replace(term=known.term))
    assert known_to(second, 2).commit == known.commit, "from the journal, too"
    third = Master()
    third.come_back(2, known_to(second, 2))
    assert third.last(2, Welcome).resumed


@pytest.mark.parametrize("journaled", [True, False])
@pytest.mark.parametrize("comes_alone", [True, False])
def test_who_comes_first_with_an_old_commit_does_not_keep_out_who_has_a_later_one(
    comes_alone: bool, journaled: bool
) -> None:
    """A member of before, or the founder, who then had nobody to ask."""
    first = master_of(EVIL)
    old = known_to(first, EVIL)
    for n in (1, 2):
        first.hello(n)
    first.say(EVIL, Arrive(1))
    first.ready(EVIL, 1, 2)
    if not comes_alone:
        old = known_to(first, EVIL)
    first.say(EVIL, Leave())
    first.report(1, 2)
    first.settle(1, 2)
    world = Master(journaled=journaled)
    world.come_back(EVIL, old)
    assert world.last(EVIL, Welcome).resumed, "nothing later is known"
    world.say(EVIL, Arrive(old.commit.epoch.number))
    world.pass_time(limits.RECONNECT_S - 0.5, beating=(EVIL,))
    if comes_alone:
        world.ready(EVIL)
    assert not world.got(EVIL, EpochCommit), "others may be on their way"
    for n in (1, 2):
        world.come_back(n, known_to(first, n))
        assert world.last(n, Welcome).resumed
    assert "left out" in world.last(EVIL, Evicted).reason
    world.pass_time(1.0, beating=(1, 2))
    world.say(1, Settle(4))
    world.report(1, 2)
    assert world.epoch().peers == (peer_id(1), peer_id(2))


def test_the_commit_of_the_later_term_counts_however_far_an_older_master_went() -> None:
    """It had not heard that another one kept the run, and nobody but one was there to hear it."""
    first = master_of(1, 2, EVIL)
    before = known_to(first, 1)
    first.settle(1, 2, EVIL)
    first.settle(1, 2, EVIL)
    branch = known_to(first, EVIL)
    second = Master()
    for n in (1, 2):
        second.come_back(n, before)
    second.say(1, Suspect(peer_id(EVIL), "refused"))
    second.pass_time(BACK_S, beating=(1, 2))
    second.report(1, 2)
    assert (second.epoch().number, branch.commit.epoch.number) == (3, 4)
    world = Master()
    world.come_back(EVIL, branch)
    world.come_back(1, known_to(second, 1))
    assert world.last(1, Welcome).resumed and world.got(EVIL, Evicted)
    world.come_back(EVIL, branch, conn=90)
    assert world.is_out(90) and not world.got(1, Evicted)


def test_nothing_is_decided_in_a_secure_run_before_who_lives_has_come_back_and_then_at_once() -> None:
    before = known_to(master_of(1, 2, 3), 1)
    world = Master()
    for n in (1, 2):
        world.come_back(n, before)
    world.say(1, Suspect(peer_id(3), "refused"))
    world.report(1, 2)
    world.pass_time(limits.RECONNECT_S - 0.2, beating=(1, 2))
    assert not world.got(1, EpochCommit) and not world.got(1, Undecided)
    world.pass_time(0.3, beating=(1, 2))
    assert world.epoch().peers == (peer_id(1), peer_id(2))
    world.hello(4)
    for n in (1, 2):
        world.say(n, Arrive(3))
    world.ready(1, 2, 4)
    assert world.epoch(4).number == 4, "what it has decided itself needs no time"


def test_what_was_judged_once_is_not_asked_for_again() -> None:
    """A commit that leads nowhere: its member learns it, instead of telling it for ever."""
    first = master_of(1, 2, 3)
    old = known_to(first, 3)
    first.say(3, Leave())
    first.report(1, 2)
    first.settle(1, 2)
    world = Master()
    world.come_back(1, known_to(first, 1))
    world.come_back(3, old)
    assert world.last(3, Evicted).reason and world.got(1, Welcome)


@pytest.mark.parametrize("journaled", [True, False])
def test_a_plain_master_believes_nobody_else_once_all_members_are_back(journaled: bool) -> None:
    """A commit that somebody has invented follows the one that all know."""
    before = known_to(master_of(1, 2, secure=False), 1)
    world = Master(secure=False, journaled=journaled)
    for n in (1, 2):
        world.come_back(n, before)
    epoch = before.commit.epoch
    me = Member(peer_id(EVIL), incarnation(EVIL))
    ahead = make_epoch(epoch.number + 1, epoch.id, epoch.term, (me,))
    world.come_back(EVIL, before._replace(commit=EpochCommit(ahead, KIND_LOSS, (), "", 1)))
    assert world.is_out(EVIL) and not world.is_out(1) and not world.is_out(2)
    world.settle(1, 2, number=epoch.number)
    assert world.epoch().peers == epoch.peers


def test_a_group_that_gave_its_place_away_while_it_was_waited_for_is_waited_for_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "GROUPS_MAX", 1)
    world = Master()
    world.come_back(1, known_to(master_of(1), 1))
    world.say(1, Leave())
    world.hello(5, group=7)
    world.pass_time(2 * limits.RECONNECT_S, beating=(5,))
    assert world.got(5, Pending) and world.epoch(5).number > 1
