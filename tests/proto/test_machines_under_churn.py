"""Hypothesis drives each machine through any order of inputs, legal or not, and watches what must always hold."""

from __future__ import annotations

import copy
import os
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pyccl._proto import master as mm
from pyccl._proto import member as mb
from pyccl._proto.epoch import Epoch, Member, make_epoch
from pyccl._proto.master import MasterMachine
from pyccl._proto.member import MemberMachine, State
from pyccl._proto.messages import (
    EPOCH_KINDS,
    SUSPECT_CAUSES,
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
    Pending,
    Ready,
    Rejected,
    Report,
    Resume,
    Settle,
    Suspect,
    Trust,
    Unblocked,
    Unreachable,
    Welcome,
    Withdraw,
    from_wire_untrusted,
    to_wire,
)
from pyccl.errors import RemoteProtocolError

RUN = b"R" * 16
PEERS = [bytes([n]) * 16 for n in range(1, 5)]
COUNTS = st.lists(st.builds(Count, st.just(0), st.integers(0, 1), st.integers(0, 3)), max_size=2).map(tuple)
REPORTS = st.lists(
    st.builds(OpReport, st.just(0), st.just(0), st.integers(0, 2), st.integers(1, 4), st.integers(0, 1)), max_size=3
).map(tuple)
KEYS = st.lists(st.builds(Key, st.just(0), st.just(0), st.integers(0, 2)), max_size=2).map(tuple)
SPECS = st.sampled_from([bytes(40), bytes(39) + b"\x01"])


def round_trip(message: Message) -> None:
    assert from_wire_untrusted(to_wire(message)) == message


class MasterUnderChurn(RuleBasedStateMachine):
    """Peers greet, answer, lie, fall silent and come back. One number never has two epochs; the evicted stay out."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.master = MasterMachine(RUN, 1, 5.0, "test", journaled=False)
        self.conns: dict[int, tuple[bytes, bytes]] = {}
        self.last_conn = 0
        self.epochs: dict[tuple[int, int], Epoch] = {}
        self.newest: dict[int, int] = {}
        self.evicted: set[tuple[bytes, bytes]] = set()
        self.seen: dict[tuple[bytes, bytes], EpochCommit] = {}
        self.flushes: dict[int, Flush] = {}
        self.proposals: dict[int, EpochPropose] = {}

    def take(self, effects: list[mm.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, mm.Close):
                self.conns.pop(effect.conn, None)
            elif isinstance(effect, mm.Send):
                assert effect.conn in self.conns, "sent on a connection that is closed"
                self.sent(effect.conn, effect.message)

    def sent(self, conn: int, message: Message) -> None:
        round_trip(message)
        if isinstance(message, EpochCommit):
            key = (0, message.epoch.number)
            assert self.epochs.setdefault(key, message.epoch) == message.epoch
            assert message.epoch.number >= self.newest.get(conn, 0)
            self.newest[conn] = message.epoch.number
            self.seen[self.conns[conn]] = message
            for member in message.epoch.members:
                assert (member.peer, member.incarnation) not in self.evicted
            previous = self.epochs.get((0, message.epoch.number - 1))
            assert previous is None or previous.id == message.epoch.previous
        elif isinstance(message, Evicted):
            self.evicted.add(self.conns[conn])
        elif isinstance(message, Flush):
            self.flushes[conn] = message
        elif isinstance(message, EpochPropose):
            self.proposals[conn] = message

    @rule(peer=st.sampled_from(PEERS), incarnation=st.integers(0, 2), resume=st.booleans(), frozen=st.booleans())
    def greet(self, peer: bytes, incarnation: int, resume: bool, frozen: bool) -> None:
        self.last_conn += 1
        key = (peer, bytes([incarnation]) * 16)
        self.conns[self.last_conn] = key
        self.take(self.master.connected(self.last_conn, self.now))
        where = None
        if resume and key in self.seen:
            epoch = self.seen[key].epoch
            where = Resume(RUN, epoch.number, epoch.id, frozen)
        self.take(self.master.receive(self.last_conn, Hello(1, "test", 0, *key, (), where), self.now))

    def say(self, data: st.DataObject, message: Message) -> None:
        if self.conns:
            conn = data.draw(st.sampled_from(sorted(self.conns)))
            self.take(self.master.receive(conn, message, self.now))

    def a_number(self, data: st.DataObject) -> int:
        newest = max((number for _, number in self.epochs), default=1)
        return data.draw(st.sampled_from([newest, newest, newest, newest - 1, newest + 1]))

    @rule(data=st.data())
    def everybody_arrives(self, data: st.DataObject) -> None:
        number = max((number for _, number in self.epochs), default=1)
        for conn in sorted(self.conns):
            if conn in self.newest:
                self.take(self.master.receive(conn, Arrive(number, data.draw(COUNTS)), self.now))

    @rule(data=st.data(), who=st.integers(0, 9))
    def somebody_answers_proposal(self, data: st.DataObject, who: int) -> None:
        for conn in sorted(self.conns)[: who + 1]:
            proposal = self.proposals.get(conn)
            if proposal is None:
                continue
            number, version = proposal.epoch.number, proposal.version
            answer = data.draw(st.sampled_from("rrrrbu"))
            if answer == "r":
                self.take(self.master.receive(conn, Ready(number, version), self.now))
            elif answer == "b":
                self.take(self.master.receive(conn, Behind(number, version, data.draw(COUNTS)), self.now))
            else:
                peers = tuple(data.draw(st.lists(st.sampled_from(PEERS), max_size=2, unique=True)))
                self.take(self.master.receive(conn, Unreachable(number, version, peers, "why"), self.now))

    @rule(data=st.data(), who=st.integers(0, 9))
    def somebody_reports(self, data: st.DataObject, who: int) -> None:
        for conn in sorted(self.conns)[: who + 1]:
            flush = self.flushes.get(conn)
            if flush is not None:
                self.take(self.master.receive(conn, Report(flush.epoch, flush.ballot, data.draw(REPORTS)), self.now))

    @rule(data=st.data())
    def any_message(self, data: st.DataObject) -> None:
        number = self.a_number(data)
        peer = data.draw(st.sampled_from(PEERS))
        kinds: list[Message] = [
            Heartbeat(),
            Leave(),
            Withdraw(number),
            Suspect(peer, data.draw(st.sampled_from(SUSPECT_CAUSES))),
            Suspect(peer, data.draw(st.sampled_from(SUSPECT_CAUSES))),
            Trust(peer),
            Settle(number),
            Blocked(number, data.draw(KEYS), data.draw(st.booleans()), data.draw(st.booleans())),
            Unblocked(number),
            Differs(number, Key(0, 0, 0), peer, data.draw(SPECS), data.draw(SPECS)),
            Entered(number),
            Report(number, data.draw(st.integers(0, 3)), data.draw(REPORTS)),
            Welcome(1, "", RUN, 1, 1, False),
        ]
        self.say(data, data.draw(st.sampled_from(kinds)))

    @precondition(lambda self: self.conns)
    @rule(data=st.data())
    def connection_ends(self, data: st.DataObject) -> None:
        conn = data.draw(st.sampled_from(sorted(self.conns)))
        self.take(self.master.disconnected(conn, self.now))
        self.conns.pop(conn)

    @rule(data=st.data(), seconds=st.sampled_from([0.1, 0.5, 0.9, 7.0]), steps=st.integers(1, 20))
    def time_passes(self, data: st.DataObject, seconds: float, steps: int) -> None:
        beating = data.draw(st.sets(st.sampled_from(PEERS)))
        for _ in range(steps):
            self.now += seconds
            for conn, (peer, _) in sorted(self.conns.items()):
                if peer in beating and conn in self.conns:
                    self.take(self.master.receive(conn, Heartbeat(), self.now))
            self.take(self.master.tick(self.now))

    @invariant()
    def open_ballot_waits_for_somebody_who_was_asked(self) -> None:
        for group in self.master.status()["groups"]:
            if group["ballot"] is not None:
                waits = set(group["ballot"]["waits_for"])
                assert waits, "all reports are there and no verdict"
                records = {record["peer"][:8]: record for record in group["members"]}
                assert all(not records[peer]["lost"] for peer in waits)
                assert group["proposal"] is None

    @invariant()
    def open_proposal_waits_for_somebody(self) -> None:
        for group in self.master.status()["groups"]:
            assert group["proposal"] is None or group["proposal"]["waits_for"]
            assert group["founded"] or not group["pending"], "newcomers wait and nobody founds the group"


class MemberUnderChurn(RuleBasedStateMachine):
    """A master that is right, late or wrong, and an engine that answers anything. A refused message changes nothing."""

    ME = Member(PEERS[1], b"\x51" * 16)

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.machine = MemberMachine(self.ME.peer, self.ME.incarnation, 0, (), "test")
        self.entered: list[Epoch] = []
        self.ended = False

    def take(self, effects: list[mb.Effect]) -> None:
        assert not (self.ended and effects), effects
        for effect in effects:
            if isinstance(effect, mb.Send):
                round_trip(effect.message)
                up = self.machine.link is mb.Link.UP or self.machine.state is State.ENDED
                assert up or isinstance(effect.message, Hello)
            elif isinstance(effect, mb.Enter):
                assert effect.epoch.members[effect.rank] == self.ME
                assert effect.restart or self.entered
                if self.entered:
                    assert effect.epoch.previous == self.entered[-1].id
                    assert effect.epoch.number == self.entered[-1].number + 1
                self.entered.append(effect.epoch)
            elif isinstance(effect, mb.Ended):
                self.ended = True

    def hear(self, message: Message) -> None:
        before = copy.deepcopy(vars(self.machine))
        try:
            effects = self.machine.receive(message, self.now)
        except RemoteProtocolError:
            assert vars(self.machine) == before
            return
        self.take(effects)

    def next_epoch(self, data: st.DataObject) -> Epoch:
        """Mostly the right one."""
        others = data.draw(st.sets(st.sampled_from([PEERS[0], PEERS[2], PEERS[3]]), max_size=3))
        mine = self.ME if data.draw(st.integers(0, 9)) else Member(self.ME.peer, b"?" * 16)
        current = self.machine.epoch
        number = (current.number if current else 3) + data.draw(st.sampled_from([1, 1, 1, 1, 0, 2]))
        previous = current.id if current and data.draw(st.integers(0, 9)) else b"P" * 16
        return make_epoch(number, previous, 1, (mine, *(Member(peer, peer) for peer in others)))

    @rule()
    def connect(self) -> None:
        self.take(self.machine.connected(self.now))
        self.hear(Welcome(1, "test", RUN, 1, 5000, self.machine.epoch is not None))

    @rule(data=st.data())
    def propose(self, data: st.DataObject) -> None:
        self.hear(EpochPropose(data.draw(st.integers(1, 5)), self.next_epoch(data), data.draw(COUNTS)))

    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        proposal = self.machine._standing.proposal
        epoch = proposal.epoch if proposal and data.draw(st.booleans()) else self.next_epoch(data)
        self.hear(EpochCommit(epoch, data.draw(st.sampled_from(EPOCH_KINDS)), (), "detail"))

    @rule(data=st.data())
    def flush(self, data: st.DataObject) -> None:
        number = self.machine.epoch.number if self.machine.epoch else 1
        members = self.machine.epoch.peers if self.machine.epoch else (self.ME.peer,)
        self.hear(Flush(data.draw(st.integers(0, 3)), number, number + 1, members))

    @rule(data=st.data())
    def other_message(self, data: st.DataObject) -> None:
        harmless = [Cancelled(3), Pending(2), Heartbeat(), Welcome(1, "", RUN, 1, 1, True)]
        fatal = [Rejected("no"), Evicted("no")]
        self.hear(data.draw(st.sampled_from(harmless if data.draw(st.integers(0, 9)) else fatal)))

    @rule(data=st.data(), version=st.integers(1, 5), peer=st.sampled_from(PEERS))
    def input(self, data: st.DataObject, version: int, peer: bytes) -> None:
        machine, now = self.machine, self.now
        number = machine.epoch.number if machine.epoch else 0
        calls: list[tuple[Any, tuple[Any, ...]]] = [
            (machine.disconnected, ()),
            (machine.links_ready, (version,)),
            (machine.links_failed, (version, (peer,), "why")),
            (machine.behind, (version, data.draw(COUNTS))),
            (machine.drained, (version,)),
            (machine.frozen, (version, data.draw(REPORTS))),
            (machine.suspect, (peer, "silent", "")),
            (machine.trust, (peer,)),
            (machine.settle, ()),
            (machine.differs, (Key(0, 0, 0), peer, bytes(40), bytes(40))),
            (machine.blocked, (data.draw(KEYS), False)),
            (machine.unblocked, ()),
            (machine.withdraw, ()),
            (machine.entered, (number,)),
        ]
        if machine.state in (State.MEMBER, State.ENDED):
            calls += [(machine.arrive, (data.draw(COUNTS),))] * 3
        call, args = data.draw(st.sampled_from(calls))
        self.take(call(*args, now))

    @rule(seconds=st.sampled_from([0.1, 2.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.take(self.machine.tick(self.now))

    @invariant()
    def state_and_epoch_agree(self) -> None:
        machine = self.machine
        if machine.state is State.MEMBER:
            assert machine.epoch is not None
            assert machine.epoch == self.entered[-1]
        elif machine.state is not State.ENDED:
            assert machine.epoch is None
        frozen = machine._standing.ballot > 0
        assert not (frozen and machine._standing.proposal is not None)


TestMasterUnderChurn = MasterUnderChurn.TestCase
TestMemberUnderChurn = MemberUnderChurn.TestCase
_EFFORT = settings(
    max_examples=300 if os.environ.get("PYCCL_TEST_LONG") else 40, stateful_step_count=50
)
TestMasterUnderChurn.settings = TestMemberUnderChurn.settings = _EFFORT
