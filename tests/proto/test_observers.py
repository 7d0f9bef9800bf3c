"""Observers: told of the members and the members of them, and in nobody's way."""

from __future__ import annotations

from typing import Any

import pytest
from test_master import RUN, TIMEOUT_S, World, group_of, incarnation, peer_id
from test_master_restart import Journaled
from test_member import LOW, RESUMED, come_back, in_epoch, pending

from pyccl._proto import limits
from pyccl._proto import member as mb
from pyccl._proto.epoch import Address, Member
from pyccl._proto.member import State
from pyccl._proto.messages import (
    Alive,
    Arrive,
    EpochCommit,
    EpochPropose,
    Heartbeat,
    Leave,
    Members,
    Observe,
    Observers,
    Pending,
    Recall,
    Rejected,
    Resume,
    Welcome,
)

WATCHER = 50  # peer and connection


def observe(world: World, n: int = WATCHER, conn: int | None = None, **changes: Any) -> None:
    conn = n if conn is None else conn
    fields: dict[str, Any] = {
        "version": 1, "library": "test", "group": 0, "peer": peer_id(n), "incarnation": incarnation(n),
        "addresses": (Address("h", n),),
    }  # fmt: skip
    world.do(world.master.connected(conn, world.now))
    world.say(conn, Observe(**{**fields, **changes}))


def watcher(n: int = WATCHER) -> Member:
    return Member(peer_id(n), incarnation(n), (Address("h", n),))


def test_it_is_told_of_the_members_and_they_of_it() -> None:
    world = group_of(2)
    observe(world)
    assert [type(m) for m in world.inbox[WATCHER]] == [Welcome, Members]
    assert world.last(WATCHER, Members) == Members(world.epoch().number, world.epoch().members)
    assert [world.last(n, Observers).observers for n in (1, 2)] == [(watcher(),)] * 2


def test_it_waits_for_nothing_and_nobody_waits_for_it() -> None:
    """Not pending, not proposed, not in an epoch; who joins knows of it before it is a member."""
    world = group_of(1)
    observe(world)
    world.hello(2)
    assert world.last(1, Pending).count == 1
    world.say(1, Arrive(1))
    assert world.last(2, EpochPropose).epoch.peers == (peer_id(1), peer_id(2))
    world.ready(1, 2)
    kinds = [type(m) for m in world.inbox[2]]
    assert kinds.index(Observers) < kinds.index(EpochCommit) and world.last(2, EpochCommit).world_size == 2
    assert world.last(WATCHER, Members).members == world.epoch().members
    assert len(world.got(1, Observers)) == 1  # nothing new to tell


def test_it_sees_a_group_end_and_another_begin() -> None:
    world = group_of(1)
    observe(world)
    world.say(1, Leave())
    assert world.last(WATCHER, Members) == Members(1, ())
    world.hello(2)
    assert [m.peer for m in world.last(WATCHER, Members).members] == [peer_id(2)]
    kinds = [type(m) for m in world.inbox[2]]
    assert kinds.index(Observers) < kinds.index(EpochCommit)


def test_of_a_group_that_nobody_has_joined() -> None:
    world = World()
    observe(world, group=7)
    assert world.last(WATCHER, Members) == Members(0, ())
    world.hello(1, group=7)
    world.hello(2)
    assert world.last(WATCHER, Members).members == (Member(peer_id(1), incarnation(1)),)
    assert not world.got(2, Observers)  # it is in another group


def test_its_connection_is_all_it_has() -> None:
    world = group_of(1)
    observe(world)
    world.drop(WATCHER)
    assert world.last(1, Observers).observers == ()
    observe(world, conn=51)
    assert world.last(1, Observers).observers == (watcher(),)
    observe(world, conn=52, incarnation=b"z" * 16)  # the process was started anew; the old line is half open
    assert 51 in world.closed and 52 not in world.closed
    assert [o.incarnation for o in world.last(1, Observers).observers] == [b"z" * 16]


def test_who_beats_stays_and_who_is_silent_goes() -> None:
    world = group_of(1)
    observe(world)
    observe(world, n=51)
    world.pass_time(3 * TIMEOUT_S + limits.GREETING_S, beating=(1, WATCHER))
    assert world.closed[51] == "silent" and WATCHER not in world.closed
    assert world.got(WATCHER, Alive) and world.last(1, Observers).observers == (watcher(),)


def test_a_master_that_was_paused_drops_no_observer() -> None:
    world = group_of(1)
    observe(world)
    world.pass_time(1.0, beating=(1, WATCHER))
    world.now += 100.0
    world.pass_time(1.0)
    assert WATCHER not in world.closed


def test_only_heartbeats_are_legal_from_it() -> None:
    world = group_of(1)
    observe(world)
    world.say(WATCHER, Heartbeat())
    assert isinstance(world.inbox[WATCHER][-1], Alive)
    world.say(WATCHER, Arrive(1))
    assert "from an observer" in world.closed[WATCHER] and world.last(1, Observers).observers == ()
    world.say(1, Observe(1, "test", 0, peer_id(1), incarnation(1)))
    assert 1 in world.closed  # nor is a peer of the run one besides


def test_too_many_and_other_versions_are_rejected() -> None:
    world = group_of(1)
    for n in range(limits.OBSERVERS_MAX):
        observe(world, n=60 + n)
    observe(world, n=90)
    assert "8 observers already" in world.last(90, Rejected).reason and 90 in world.closed
    observe(world, n=60, conn=91)  # one that comes again has its place
    assert 91 not in world.closed
    observe(world, n=92, version=9, group=1)
    assert "9" in world.last(92, Rejected).reason
    assert len(world.last(1, Observers).observers) == limits.OBSERVERS_MAX


def test_observers_of_all_groups_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "OBSERVERS_OF_ALL_MAX", 3)
    world = group_of(1)
    for n in range(4):
        observe(world, n=60 + n, conn=60 + n, group=n)
    assert [n for n in range(60, 64) if n in world.closed] == [63]
    assert "at most 3 observers" in world.last(63, Rejected).reason


def test_a_member_that_comes_back_is_told_anew_and_a_restarted_master_learns_of_it_from_itself() -> None:
    world = Journaled()
    world.hello(1)
    observe(world)
    commit = world.last(1, EpochCommit)
    world.resume(1, commit, conn=2)
    assert [type(m) for m in world.inbox[2]][:2] == [Welcome, Observers]
    world.restart()
    world.resume(1, commit, conn=3)
    assert not world.got(3, Observers)
    observe(world)
    assert world.last(3, Observers).observers == (watcher(),)
    assert world.last(WATCHER, Members) == Members(1, commit.epoch.members)


def test_members_that_a_master_takes_over_may_have_observers_anew() -> None:
    """They are connected to a run that is there no more."""
    old = group_of(1)
    world = World()
    world.master = world.master.__class__(b"N" * 16, 1, TIMEOUT_S, "test", journaled=False, adopts=True)
    observe(world)
    commit = old.last(1, EpochCommit)
    world.hello(1, resume=Resume(RUN, 1, commit.epoch.id, False, 1))
    told = (commit.kind, commit.verdicts, commit.detail, commit.world_size, commit.journaled)
    world.say(1, Recall(RUN, 1, commit.epoch, *told))
    assert world.last(1, Welcome).resumed and world.closed[WATCHER] == "another run is taken over"


def test_status_names_it() -> None:
    world = group_of(1)
    observe(world, group=3)
    (told,) = world.master.status()["observers"]
    assert (told["peer"], told["group"], told["addresses"]) == (peer_id(WATCHER).hex(), 3, ["h:50"])


# ---- the member


@pytest.mark.parametrize("standing", [State.PENDING, State.MEMBER])
def test_a_member_hands_on_what_it_is_told(standing: State) -> None:
    machine = pending() if standing is State.PENDING else in_epoch()[0]
    assert machine.receive(Observers((LOW,)), 0.0) == [mb.ObserversChanged((LOW,))]
    assert machine.state is standing


def test_a_member_that_comes_back_knows_none_until_it_is_told() -> None:
    """What was told before may be gone, and a master tells of none that are not."""
    machine, _ = in_epoch()
    machine.receive(Observers((LOW,)), 0.0)
    machine.disconnected(1.0)
    assert machine.observers == (LOW,)  # collectives and syncs go on without a master
    machine.connected(1.0)
    assert machine.receive(RESUMED, 1.0)[0] == mb.ObserversChanged(())
    come_back(machine, Observers((LOW,)))
    assert machine.observers == (LOW,)
