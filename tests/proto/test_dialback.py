"""Members that dial back for who asks a master: whom it asks, how often, what it tells; and what a member takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_master import World, incarnation, peer_id
from test_member import RUN, first_epoch, fresh, pending, sent

from pyccl._proto import limits
from pyccl._proto import master as mm
from pyccl._proto import member as mb
from pyccl._proto.budget import Budget
from pyccl._proto.candidates import may_dial
from pyccl._proto.dialback import DialBacks
from pyccl._proto.master_records import PeerKey
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
    ("host", "own", "may"),
    [
        ("203.0.113.5", "198.51.100.1", True),
        ("203.0.113.5", "203.0.113.6", True),
        ("2001:db8::5", "198.51.100.1", True),
        ("2001:db8::5", "2001:db8:0:1::5", True),
        ("203.0.113.5", "192.168.1.2", True),  # it is on the master's LAN, and goes out
        ("203.0.113.5", "127.0.0.1", True),  # it is on the master's machine, or comes through a tunnel
        ("203.0.113.5", "203.0.113.5", False),
        ("203.0.113.5", "::ffff:203.0.113.5", False),
        ("2001:db8::5", "2001:db8::6", False),
        ("203.0.113.5", "", False),
        *((host, "198.51.100.1", True) for host in ("11.0.0.1", "172.32.0.1", "100.128.0.1", "2a0e:78::1")),
        *((host, "127.0.0.1", False) for host in ("127.0.0.1", "::1", "192.168.1.7", "10.0.0.1", "localhost")),
        *((host, "192.168.1.2", False) for host in ("192.168.1.7", "127.0.0.1", "fc00::7")),
        *((host, "198.51.100.1", False) for host in ("10.1.2.3", "172.16.0.1", "172.31.255.255", "100.64.0.1")),
        *((host, "198.51.100.1", False) for host in ("0.0.0.0", "0.1.2.3", "127.1.2.3", "169.254.169.254")),
        *((host, "198.51.100.1", False) for host in ("224.0.0.1", "240.0.0.1", "255.255.255.255", "198.18.0.1")),
        *((host, "198.51.100.1", False) for host in ("::", "::1", "fd00::1", "fe80::1", "fec0::1", "ff02::1")),
        *((host, "198.51.100.1", False) for host in ("fe80::1%eth0", "2001:db8::5%eth0", "64:ff9b::a00:1")),
        *((host, "198.51.100.1", False) for host in ("2002:a00:1::1", "2001:0:a00:1::1", "::10.0.0.1")),
        *((host, "198.51.100.1", False) for host in ("::ffff:127.0.0.1", "::ffff:203.0.113.5", "example.org", "")),
        *((host, "198.51.100.1", False) for host in ("203.0.113.05", "0x7f000001", "2130706433")),
    ],
)
def test_a_member_dials_public_addresses_elsewhere_and_a_master_asks_for_no_other(
    host: str, own: str, may: bool
) -> None:
    key = peer_id(1), incarnation(1)
    assert may_dial(host, own) is may
    assert DialBacks().begin(1, host, [(key, own)], 0.0) == [key] * may


def test_three_members_of_several_hosts_are_asked_others_each_time_and_none_where_it_is_asked_from() -> None:
    run = Run("198.51.100.1", "198.51.100.1", "198.51.100.1", "198.51.100.2", "198.51.100.3", HOST, "127.0.0.1")
    asked = [run.ask() for _ in range(limits.DIAL_BACKS_BURST)]
    assert all(len(conns) == limits.DIALERS_MAX and 6 not in conns for conns in asked)
    places = [{1: 1, 2: 1, 3: 1}.get(conn, conn) for conn in asked[0]]
    assert len(set(places)) == limits.DIALERS_MAX
    assert len({tuple(conns) for conns in asked}) > 1
    for host in ("127.0.0.1", "192.168.1.7"):
        assert Run("127.0.0.1", "192.168.1.7", "192.168.1.8", "198.51.100.1").ask(host) == []


def test_hosts_of_one_64_are_one_place() -> None:
    run = Run("2001:db8:0:1::1", "2001:db8:0:1::2", "2001:db8:0:1::3", "2001:db8:0:2::1", "198.51.100.1")
    for _ in range(limits.DIAL_BACKS_BURST):
        asked = run.ask()
        assert {4, 5} < set(asked) and len(asked) == limits.DIALERS_MAX
    assert Run("2001:db8:0:1::1", "2001:db8:0:2::1").ask("2001:db8:0:1::2") == [2]


def test_members_are_not_even_looked_at_when_none_may_be_asked() -> None:
    looked = 0

    def members() -> Iterator[tuple[PeerKey, str]]:
        nonlocal looked
        looked += 1
        yield (peer_id(1), incarnation(1)), "198.51.100.1"

    dial_backs = DialBacks()
    for ticket, host in enumerate(("127.0.0.1", "10.0.0.1", "fe80::1%eth0", "a name")):
        assert dial_backs.begin(ticket, host, members(), 0.0) == [] and looked == 0
    asked = [dial_backs.begin(ticket, HOST, members(), 0.0) for ticket in range(10, 50)]
    assert looked == len([keys for keys in asked if keys]) == limits.DIAL_BACKS_BURST


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


def test_the_next_master_is_not_told_what_the_one_before_has_asked() -> None:
    machine = member()
    assert machine.receive(DialAsk(1, HOST, PORT), 0.0) != []
    machine.disconnected(0.5)
    machine.connected(1.0)
    machine.receive(Welcome(1, "test", RUN, 1, 5000, True, "198.51.100.1", True), 1.0)
    assert machine.receive(DialAsk(1, "203.0.113.6", PORT), 1.0) == []  # one at a time, also then
    assert machine.dialed(1, "", 2.0) == []
    assert machine.receive(DialAsk(2, HOST, PORT), 2.0) == [mb.DialBack(2, HOST, PORT)]
    assert machine.dialed(1, "", 2.0) == []
    assert machine.receive(DialAsk(3, HOST, PORT), 2.0) != []
    assert sent(machine.dialed(3, "", 3.0)) == [Dialed(3, "")]


def test_a_member_dials_more_often_than_a_master_asks_also_one_that_starts_anew() -> None:
    machine, masters, answered, asked = member(), Budget(0, 1.0), 0, 0
    for n in range(1000):
        if n % 500 == 0:
            masters = Budget(limits.DIAL_BACKS_BURST, limits.DIAL_BACK_EVERY_S)
        if masters.take(100.0 + n / 5):
            asked += 1
            answered += len(machine.receive(DialAsk(n, HOST, PORT), 100.0 + n / 5 - n % 3))  # the line jitters
            machine.dialed(n, "", 100.0 + n / 5)
    assert answered == asked > 2 * limits.DIAL_BACKS_BURST


def test_a_master_makes_a_member_dial_no_more_than_so_often() -> None:
    machine, dialed = member(), 0
    for n in range(100):
        dialed += len(machine.receive(DialAsk(n, HOST, PORT), 50.0))
        machine.dialed(n, "", 50.0)
    assert dialed == limits.DIALS_BURST


@pytest.mark.parametrize("host", ["127.0.0.1", "192.168.1.1", "169.254.169.254", "metadata.example", "0.0.0.0"])
def test_a_master_makes_a_member_dial_nothing_that_is_near_to_the_member_alone(host: str) -> None:
    for observed in ("198.51.100.1", "127.0.0.1", "192.168.1.1"):  # whatever the master says that it sees
        machine = member(observed)
        assert machine.receive(DialAsk(1, host, PORT), 0.0) == []
        assert machine.receive(DialAsk(2, HOST, PORT), 0.0) != []  # and that has cost nothing


def test_a_newcomer_is_not_asked() -> None:
    with pytest.raises(RemoteProtocolError, match="DialAsk"):
        pending().receive(DialAsk(1, HOST, PORT), 0.0)


_HOSTS = st.sampled_from(["203.0.113.5", "8.8.8.8", "2606:4700::1", "10.0.0.1", "127.0.0.1", "::1", "name", "", "\0"])
_KEYS = st.integers(1, 6).map(lambda n: (peer_id(n), incarnation(n)))
_STEPS = st.lists(
    st.tuples(st.just("begin"), _HOSTS, st.lists(st.tuples(_KEYS, _HOSTS), max_size=6, unique_by=lambda m: m[0]))
    | st.tuples(st.just("told"), st.integers(0, 12), _KEYS, st.text(max_size=5))
    | st.tuples(st.just("wait"), st.floats(0, 20)),
    max_size=30,
)


@given(_STEPS)
def test_whatever_is_asked_and_told_each_ticket_is_over_once_and_names_only_who_was_asked(
    steps: list[tuple[Any, ...]],
) -> None:
    backs, now = DialBacks(), 0.0
    chosen: dict[int, list[PeerKey]] = {}
    over: dict[int, tuple[DialTold, ...]] = {}
    asked_s: list[float] = []
    for kind, *what in [*steps, ("wait", limits.DIAL_TOLD_S)]:
        if kind == "begin":
            ticket, seen = len(chosen), dict(what[1])
            chosen[ticket] = backs.begin(ticket, what[0], what[1], now)
            assert len(set(chosen[ticket])) == len(chosen[ticket]) <= limits.DIALERS_MAX
            assert all(may_dial(what[0], seen[key]) for key in chosen[ticket])
            asked_s += [now] if chosen[ticket] else []
        elif kind == "told":
            backs.told(what[0], what[1], what[2])
        else:
            now += what[0]
        for ticket, told in backs.over(now):
            assert ticket not in over
            assert {each.peer for each in told} <= {peer for peer, _ in chosen[ticket]}
            over[ticket] = told
    assert set(over) == set(chosen)
    for first, at_s in enumerate(asked_s):  # so many at once, and then one every so often
        more = sum(other_s <= at_s + limits.DIAL_BACK_EVERY_S / 2 for other_s in asked_s[first:])
        assert more <= limits.DIAL_BACKS_BURST + 1
