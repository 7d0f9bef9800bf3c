"""What the master does for peers that do not reach each other, and in which order a peer tries addresses."""

from __future__ import annotations

import pytest
from test_master import RUN, TIMEOUT_S, World, group_of, incarnation, peer_id, report, resume_of

from pyccl._proto import limits
from pyccl._proto.candidates import are_near, lead_home, may_reach, ordered
from pyccl._proto.epoch import NO_ID, Address, AddressKind, Member
from pyccl._proto.master import MasterMachine, Out
from pyccl._proto.messages import (
    Addresses,
    Arrive,
    EpochCommit,
    EpochPropose,
    Hello,
    Moved,
    Observe,
    Punch,
    PunchAsk,
    PunchGo,
    RelayAsk,
    RelayCall,
    RelayFor,
    RelayOver,
    Relays,
    Welcome,
)

SEEN = "192.0.2.1"
ENDPOINTS = tuple(Address(SEEN, 1000 + n, AddressKind.OBSERVED) for n in range(4))
LAN, OUTSIDE = Address("192.168.1.2", 5), Address(SEEN, 5, AddressKind.OBSERVED)
PUBLIC, LOOPBACK, NAMED = Address("198.51.100.7", 5), Address("127.0.0.1", 5), Address("peer.example", 1)
INSIDE, ELSEWHERE = "192.168.1.3", "203.0.113.9"


def test_both_begin_when_both_have_offered_each_when_its_message_takes_its_time() -> None:
    world = group_of(2, SEEN)
    world.say(1, Punch(peer_id(2), ENDPOINTS[:3], 100_000))
    assert world.got(2, PunchAsk) == [PunchAsk(peer_id(1), 3)]
    assert world.got(1, PunchGo) == []
    world.say(2, Punch(peer_id(1), ENDPOINTS[2:], 20_000))
    margin_us = round(limits.PUNCH_MARGIN_S * 1e6)
    assert world.got(1, PunchGo) == [PunchGo(peer_id(2), ENDPOINTS[2:], margin_us)]
    assert world.got(2, PunchGo) == [PunchGo(peer_id(1), ENDPOINTS[:2], 40_000 + margin_us)]
    assert world.got(1, PunchAsk) == []


def test_an_offer_counts_once_and_not_for_ever() -> None:
    world = group_of(2, SEEN)
    world.say(1, Punch(peer_id(2), ENDPOINTS, 0))
    world.say(2, Punch(peer_id(1), ENDPOINTS, 0))
    world.say(2, Punch(peer_id(1), ENDPOINTS, 0))
    assert len(world.got(1, PunchAsk)) == len(world.got(1, PunchGo)) == 1
    world.pass_time(limits.PUNCH_S + 0.2, beating=(1, 2))
    world.say(1, Punch(peer_id(2), ENDPOINTS, 0))
    assert len(world.got(2, PunchAsk)) == 2 and len(world.got(2, PunchGo)) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "192.168.1.1", "169.254.169.254", "198.51.100.1", "db.internal", "::1"])
def test_an_offer_of_what_the_master_has_not_seen_has_no_effect(host: str) -> None:
    world = group_of(2, SEEN)
    world.say(2, Punch(peer_id(1), ENDPOINTS, 0))
    world.say(1, Punch(peer_id(2), (*ENDPOINTS, Address(host, 22, AddressKind.OBSERVED)), 0))
    assert len(world.got(1, PunchAsk)) == 1
    assert [world.got(n, kind) for n, kind in ((2, PunchAsk), (1, PunchGo), (2, PunchGo))] == [[]] * 3


def test_an_offer_counts_at_other_places_that_its_reflections_came_from_and_in_the_network_of_an_ipv6_host() -> None:
    world = group_of(2, "2001:db8::1")
    world.master.reflected(peer_id(1), incarnation(1), "198.51.100.7")
    world.master.reflected(peer_id(1), incarnation(7), "198.51.100.8")
    endpoints = tuple(Address(host, 1, AddressKind.OBSERVED) for host in ("198.51.100.7", "2001:db8::abcd"))
    world.say(1, Punch(peer_id(2), endpoints, 0))
    assert world.got(2, PunchAsk) == [PunchAsk(peer_id(1), 2)]
    world.say(2, Punch(peer_id(1), (endpoints[1],), 0))
    assert world.got(2, PunchGo)[0].endpoints == endpoints[:1]
    world.say(1, Punch(peer_id(2), (Address("198.51.100.8", 1),), 0))
    assert len(world.got(2, PunchAsk)) == 1


@pytest.mark.parametrize("to", [1, 7])
def test_an_offer_to_oneself_or_to_nobody_has_no_effect(to: int) -> None:
    world = group_of(2, SEEN)
    world.say(1, Punch(peer_id(to), ENDPOINTS, 0))
    world.say(1, RelayAsk(peer_id(to), peer_id(2)))
    assert [world.got(n, kind) for n in (1, 2) for kind in (PunchAsk, PunchGo, RelayCall)] == [[]] * 6


def test_a_peer_learns_from_where_it_comes_and_others_where_it_has_gone() -> None:
    world = group_of(2)
    world.do(world.master.connected(9, world.now, "198.51.100.7"))
    world.say(9, Hello(limits.PROTOCOL_VERSION, "test", 0, peer_id(9), incarnation(9)))
    assert world.last(9, Welcome).observed == "198.51.100.7" and world.last(1, Welcome).observed == ""
    world.say(1, Addresses((LAN, OUTSIDE)))
    world.say(1, Addresses((LAN, OUTSIDE)))
    assert world.got(2, Moved) == [Moved(Member(peer_id(1), incarnation(1), (LAN, OUTSIDE)))]
    assert world.got(1, Moved) == []


def test_who_was_away_is_told_who_has_moved_meanwhile() -> None:
    world = group_of(2)
    world.drop(2)
    world.say(1, Addresses((LAN,)))
    world.hello(2, conn=20, host=ELSEWHERE, resume=resume_of(world))
    assert world.got(20, Moved) == [Moved(Member(peer_id(1), incarnation(1), (LAN,)))]
    assert world.got(1, Moved) == [Moved(Member(peer_id(2), incarnation(2), (), ELSEWHERE))]


def test_an_observer_that_relays_is_offered_to_all_and_told_for_whom() -> None:
    world = group_of(2)
    world.do(world.master.connected(50, world.now, "198.51.100.7"))
    observe = Observe(limits.PROTOCOL_VERSION, "test", 3, peer_id(5), incarnation(5), (PUBLIC,), True)
    world.do(world.master.receive(50, observe, world.now))
    relay = Member(peer_id(5), incarnation(5), (PUBLIC,), "198.51.100.7")
    assert world.got(1, Relays) == world.got(2, Relays) == [Relays((relay,))]
    world.say(1, RelayAsk(peer_id(2), peer_id(5)))
    members = [Member(peer_id(n), incarnation(n), ()) for n in (1, 2)]
    assert world.last(50, RelayFor) == RelayFor(*members)
    assert world.got(2, RelayCall) == [RelayCall(peer_id(1), peer_id(5))]
    moved = Address("198.51.100.8", 5)
    world.do(world.master.receive(50, Addresses((moved,)), world.now))
    assert world.got(1, Relays)[-1] == Relays((Member(peer_id(5), incarnation(5), (moved,), "198.51.100.7"),))
    world.do(world.master.disconnected(50, world.now))
    assert world.got(1, Relays)[-1] == Relays(())


def test_a_master_that_relays_offers_itself() -> None:
    world = World()
    world.master = MasterMachine(RUN, 1, TIMEOUT_S, "test", journaled=False, relays=True)
    world.hello(1)
    world.hello(2)
    assert world.got(2, Relays) == [Relays((Member(NO_ID, NO_ID),))]


def test_a_relay_carries_between_those_who_are_in_an_epoch_or_will_be_and_nobody_else() -> None:
    world = group_of(2)
    master = world.master
    one, other, third, elsewhere = ((peer_id(n), incarnation(n)) for n in (1, 2, 3, 4))
    world.hello(4, group=7)
    assert master.are_to_be_linked(one, other)
    assert not master.are_to_be_linked(one, one)
    assert not master.are_to_be_linked(one, (peer_id(2), incarnation(3)))
    assert not master.are_to_be_linked(one, elsewhere)
    world.hello(3)  # waits
    assert not master.are_to_be_linked(one, third)
    world.say(3, RelayAsk(peer_id(1), NO_ID))
    assert not world.got(1, RelayCall)
    for conn in (1, 2):
        world.say(conn, Arrive(world.epoch().number))
    assert world.last(3, EpochPropose)
    assert master.are_to_be_linked(one, third) and master.are_to_be_linked(third, other)
    world.do(master.kick(peer_id(3), world.now))
    assert not master.are_to_be_linked(one, third)
    world.do(master.kick(peer_id(2), world.now))
    assert master.knows(*other)  # until the others have agreed on it
    assert not master.are_to_be_linked(one, other)


def observes(world: World, conn: int, *, relays: bool) -> None:
    world.do(world.master.connected(conn, world.now, "198.51.100.7"))
    me = peer_id(conn), incarnation(conn)
    world.say(conn, Observe(limits.PROTOCOL_VERSION, "test", 3, *me, (PUBLIC,), relays))


def test_what_is_carried_for_a_newcomer_goes_on_when_it_comes_again() -> None:
    world = group_of(2)
    observes(world, 50, relays=True)
    world.hello(3)
    world.do(world.master.connected(30, world.now))
    again = Hello(limits.PROTOCOL_VERSION, "test", 0, peer_id(3), incarnation(3))
    effects = world.master.receive(30, again, world.now)
    world.do(effects)
    assert world.last(30, Welcome) and 3 in world.closed
    assert not [effect for effect in effects if isinstance(effect, Out)] and not world.got(50, RelayOver)
    world.drop(30)
    assert world.got(50, RelayOver) == [RelayOver((peer_id(3),))]


def test_a_relay_learns_who_is_out() -> None:
    world = group_of(3)
    observes(world, 50, relays=True)
    observes(world, 51, relays=False)
    assert not world.got(50, RelayOver)
    world.hello(4)
    world.do(world.master.disconnected(4, world.now))
    assert world.got(50, RelayOver) == [RelayOver((peer_id(4),))]
    world.do(world.master.kick(peer_id(3), world.now))
    assert world.got(50, RelayOver)[1:] == [RelayOver((peer_id(3),))]  # before anybody has agreed
    for conn in (1, 2):
        report(world, conn)
    assert world.last(1, EpochCommit).kind == "loss"
    assert set(world.got(50, RelayOver)[1:]) == {RelayOver((peer_id(3),))}
    observes(world, 52, relays=True)  # as one that was away
    assert world.got(52, RelayOver) == [RelayOver((peer_id(3),))]
    assert not world.got(51, RelayOver)


def one(seen: str, *addresses: Address) -> Member:
    return Member(peer_id(1), incarnation(1), addresses, seen)


@pytest.mark.parametrize(
    ("theirs", "seen", "wanted"),
    [
        (one(SEEN, OUTSIDE, LAN), SEEN, [LAN, OUTSIDE]),  # behind the same router
        (one(SEEN, LAN, OUTSIDE), ELSEWHERE, [OUTSIDE]),
        (one("192.168.1.2", LAN), INSIDE, [LAN]),  # both on the master's LAN
        (one("127.0.0.1", LOOPBACK, LAN), INSIDE, [LAN]),  # one on its machine
        (one("127.0.0.1", LAN, LOOPBACK), "127.0.0.1", [LOOPBACK, LAN]),  # both
        (one("::1", Address("::1", 5)), "127.0.0.1", [Address("::1", 5)]),
        (one("127.0.0.1", LOOPBACK, PUBLIC, LAN), ELSEWHERE, [PUBLIC]),
        (one("fe80::1", LAN), "127.0.0.1", [LAN]),
        (one("198.18.0.2", Address("198.18.0.2", 5)), "198.18.4.1", [Address("198.18.0.2", 5)]),  # a lab
        (one("2001:db8::1", LAN), "2001:db8::2", [LAN]),
        (one("2001:db8::1", LAN), "2001:db8:0:1::2", []),
        (one(SEEN, NAMED, LAN), ELSEWHERE, [NAMED]),
        (one("", LOOPBACK, LAN, PUBLIC), "", [PUBLIC]),  # it is not known where
        (one(SEEN), SEEN, []),
    ],
)
def test_addresses_are_tried_where_the_peer_may_be_in_the_order_of_their_promise(
    theirs: Member, seen: str, wanted: list[Address]
) -> None:
    assert ordered(theirs, one(seen)) == wanted


@pytest.mark.parametrize("theirs", ["127.0.0.1", "192.168.1.2", SEEN, "::1", ELSEWHERE, ""])
@pytest.mark.parametrize("mine", ["127.0.0.1", INSIDE, SEEN, "2001:db8::1", ""])
def test_what_is_no_address_of_one_machine_is_never_dialed_nor_what_a_peer_says_of_ours(
    theirs: str, mine: str
) -> None:
    hosts = ["169.254.169.254", "fe80::1", "fe80::1%lo", "0.0.0.0", "::", "224.0.0.1", "ff02::1", "255.255.255.255"]
    hosts += ["240.0.0.1", "2002:7f00:1::1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "fec0::1"]
    assert not any(may_reach(host, one(theirs), one(mine)) for host in hosts)
    on_machine = theirs in ("127.0.0.1", "::1") and mine == "127.0.0.1"
    claims = one(theirs, Address(mine or SEEN, 1), Address(mine or SEEN, 1, AddressKind.OBSERVED))
    for host in ("127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"):
        assert may_reach(host, claims, one(mine)) == on_machine
    near = are_near(theirs, mine)
    for host in ("10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1", "198.18.0.1", "fd00::1", "::ffff:10.1.2.3"):
        assert may_reach(host, claims, one(mine)) == near


@pytest.mark.parametrize(
    ("theirs", "seen", "behind_router", "leads"),
    [
        (one("192.168.1.2", LAN), INSIDE, False, True),  # a run of one LAN
        (one(SEEN, LAN), SEEN, True, True),
        (one(SEEN, LAN, OUTSIDE), SEEN, True, True),
        (one(SEEN, LAN, OUTSIDE), ELSEWHERE, True, True),  # refused where it is seen
        (one(SEEN, LAN), ELSEWHERE, True, False),  # nothing was dialed
        (one(SEEN, PUBLIC), ELSEWHERE, True, True),
        (one("127.0.0.1", LOOPBACK), "127.0.0.1", False, True),
        (one("10.0.0.7", LAN), "10.0.0.8", True, False),  # a machine of ours may have that address
        (one("10.0.0.7", LAN, Address("10.0.0.7", 5, AddressKind.OBSERVED)), "10.0.0.8", True, True),
        (one(SEEN), SEEN, False, False),
    ],
)
def test_a_refusal_counts_only_where_the_peer_must_be(
    theirs: Member, seen: str, behind_router: bool, leads: bool
) -> None:
    assert lead_home(theirs, one(seen), behind_router=behind_router) is leads
