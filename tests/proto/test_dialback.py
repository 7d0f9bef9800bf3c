"""Members that dial back for who asks a master: whom it asks, how often, what it tells; and what a member takes."""

from __future__ import annotations

import pytest
from test_master import World, incarnation, peer_id
from test_member import RUN, first_epoch, fresh, pending, sent

from pyccl._proto import limits
from pyccl._proto import master as mm
from pyccl._proto import member as mb
from pyccl._proto.budget import Budget
from pyccl._proto.candidates import may_dial
from pyccl._proto.member import MemberMachine
from pyccl._proto.messages import DialAsk, Dialed, DialTold, EpochCommit, EpochPropose, Hello, Welcome, to_wire
from pyccl.errors import RemoteProtocolError

HOST, PORT = "203.0.113.5", 4000  # of who asks


class Run(World):
    """Founders 1, 2, 3 ... of a group each, which the master sees at these hosts."""

    def __init__(self, *hosts: str) -> None:
        super().__init__()
        self.told: list[mm.DialsTold] = []
        for n, host in enumerate(hosts, 1):
            self.do(self.master.connected(n, self.now, host))
            self.say(n, Hello(1, "test", n, peer_id(n), incarnation(n)))
        self.ticket = 0

    def do(self, effects: list[mm.Effect]) -> None:
        super().do(effects)
        self.told += [effect for effect in effects if isinstance(effect, mm.DialsTold)]

    def ask(self, host: str = HOST) -> list[int]:
        """Who is told to dial."""
        self.ticket += 1
        self.do(self.master.dial_back(self.ticket, host, PORT, self.now))
        ask = DialAsk(self.ticket, host, PORT)
        return [conn for conn in sorted(self.inbox) if ask in self.inbox[conn]]


def test_a_budget_is_a_burst_and_then_one_every_so_often() -> None:
    budget = Budget(2, 10.0)
    assert [budget.take(1000.0) for _ in range(3)] == [True, True, False]
    assert budget.wait_s(1004.0) == pytest.approx(6.0)
    assert not budget.take(1009.9) and budget.take(1010.1) and not budget.take(1010.1)
    assert [budget.take(9000.0) for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    ("host", "seen_as", "may"),
    [
        ("203.0.113.5", "198.51.100.1", True),
        ("2001:db8::5", "198.51.100.1", True),
        ("203.0.113.5", "192.168.1.2", True),  # it is on the master's LAN, and goes out
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "192.168.1.2", False),
        ("::1", "198.51.100.1", False),
        ("192.168.1.7", "192.168.1.2", True),
        ("192.168.1.7", "127.0.0.1", True),  # it is on the master's machine
        ("192.168.1.7", "198.51.100.1", False),
        ("fc00::7", "2001:db8::1", False),
        ("::ffff:127.0.0.1", "198.51.100.1", False),
        ("::ffff:203.0.113.5", "198.51.100.1", False),
        ("169.254.169.254", "198.51.100.1", False),
        ("fe80::1%eth0", "198.51.100.1", False),
        ("224.0.0.1", "198.51.100.1", False),
        ("0.0.0.0", "127.0.0.1", False),
        ("localhost", "127.0.0.1", False),
        ("203.0.113.5", "", False),
    ],
)
def test_a_member_dials_only_what_is_the_same_machine_to_it(host: str, seen_as: str, may: bool) -> None:
    assert may_dial(host, seen_as) is may


def test_three_members_of_several_hosts_are_asked_others_each_time_and_none_where_it_is_asked_from() -> None:
    run = Run("198.51.100.1", "198.51.100.1", "198.51.100.1", "198.51.100.2", "198.51.100.3", HOST, "127.0.0.1")
    asked = [run.ask() for _ in range(limits.DIAL_BACKS_BURST)]
    assert all(len(conns) == limits.DIALERS_MAX and 6 not in conns for conns in asked)
    places = [{1: 1, 2: 1, 3: 1}.get(conn, conn) for conn in asked[0]]
    assert len(set(places)) == limits.DIALERS_MAX
    assert len({tuple(conns) for conns in asked}) > 1
    assert Run("127.0.0.1").ask("127.0.0.1") == [1]
    assert Run("192.168.1.7").ask("192.168.1.7") == []


def test_what_members_say_is_told_when_all_have_said_it() -> None:
    run = Run("198.51.100.1", "198.51.100.2")
    assert run.ask() == [1, 2]
    run.say(1, Dialed(1, ""))
    assert run.told == []
    run.say(2, Dialed(1, "no answer"))
    assert run.told == [mm.DialsTold(1, (DialTold(peer_id(1), ""), DialTold(peer_id(2), "no answer")))]
    run.say(2, Dialed(1, ""))
    assert len(run.told) == 1 and not run.closed


def test_who_says_nothing_is_left_out_in_time() -> None:
    run = Run("198.51.100.1", "198.51.100.2")
    run.ask()
    run.say(2, Dialed(1, ""))
    run.pass_time(limits.DIAL_TOLD_S - 0.2, beating=(1, 2))
    assert run.told == []
    run.pass_time(0.3, beating=(1, 2))
    assert run.told == [mm.DialsTold(1, (DialTold(peer_id(2), ""),))]


def test_who_was_not_asked_has_nothing_to_say() -> None:
    run = Run("198.51.100.1", HOST)
    assert run.ask() == [1]
    run.say(2, Dialed(1, "a lie"))
    run.say(1, Dialed(7, "of another ticket"))
    assert run.told == []
    run.say(1, Dialed(1, ""))
    assert run.told == [mm.DialsTold(1, (DialTold(peer_id(1), ""),))]


def test_nobody_is_asked_too_often_or_who_is_not_connected() -> None:
    run = Run("198.51.100.1")
    assert [run.ask() for _ in range(limits.DIAL_BACKS_BURST)] == [[1]] * limits.DIAL_BACKS_BURST
    assert run.ask() == [] and run.told == [mm.DialsTold(run.ticket, ())]  # at once
    run.pass_time(limits.DIAL_BACK_EVERY_S + 0.1, beating=(1,))
    assert run.ask() == [1] and run.ask() == []
    gone = Run("198.51.100.1")
    gone.drop(1)
    assert gone.ask() == []


def test_a_newcomer_that_answers_what_nobody_asks_it_breaks_the_protocol() -> None:
    run = Run("198.51.100.1")
    run.hello(9, group=1)
    run.say(9, Dialed(1, ""))
    assert "Dialed" in run.closed[9]


# ---- the member


def member(observed: str = "198.51.100.1") -> MemberMachine:
    machine, epoch = fresh(), first_epoch()
    machine.connected(0.0)
    machine.receive(Welcome(1, "test", RUN, 1, 5000, False, observed, True), 0.0)
    machine.receive(EpochPropose(1, epoch), 0.0)
    machine.receive(EpochCommit(epoch, "join", world_size=3), 0.0)
    machine.entered(epoch.number, 0.0)
    return machine


def test_a_member_dials_one_at_a_time_and_tells_how_it_went() -> None:
    machine = member()
    assert machine.receive(DialAsk(1, HOST, PORT), 0.0) == [mb.DialBack(1, HOST, PORT)]
    assert machine.receive(DialAsk(2, HOST, PORT), 0.0) == []
    told = sent(machine.dialed(1, "x" * 500, 1.0))
    assert told == [Dialed(1, "x" * 97 + "...")]
    to_wire(told[0])
    assert machine.receive(DialAsk(3, HOST, PORT), 1.0) == [mb.DialBack(3, HOST, PORT)]
    machine.disconnected(2.0)
    assert machine.dialed(3, "", 3.0) == []  # the master that asked is gone


def test_a_master_makes_a_member_dial_no_more_than_so_often() -> None:
    machine, dialed = member(), 0
    for n in range(100):
        dialed += len(machine.receive(DialAsk(n, HOST, PORT), 50.0))
        machine.dialed(n, "", 50.0)
    assert dialed == limits.DIAL_BACKS_BURST


@pytest.mark.parametrize("host", ["127.0.0.1", "192.168.1.1", "169.254.169.254", "metadata.example", "0.0.0.0"])
def test_a_master_makes_a_member_dial_nothing_that_is_near_to_the_member_alone(host: str) -> None:
    machine = member()
    assert machine.receive(DialAsk(1, host, PORT), 0.0) == []
    assert machine.receive(DialAsk(2, HOST, PORT), 0.0) != []  # and that has cost nothing


def test_a_newcomer_is_not_asked() -> None:
    with pytest.raises(RemoteProtocolError, match="DialAsk"):
        pending().receive(DialAsk(1, HOST, PORT), 0.0)
