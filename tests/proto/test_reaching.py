"""What the master does for peers that do not reach each other, and in which order a peer tries addresses."""

from __future__ import annotations

import pytest
from test_master import RUN, TIMEOUT_S, World, group_of, incarnation, peer_id, resume_of

from pyccl._proto import limits
from pyccl._proto.candidates import lead_home, ordered
from pyccl._proto.epoch import NO_ID, Address, AddressKind, Member
from pyccl._proto.master import MasterMachine
from pyccl._proto.messages import (
    Addresses,
    Hello,
    Moved,
    Observe,
    Punch,
    PunchAsk,
    PunchGo,
    RelayAsk,
    RelayCall,
    RelayFor,
    Relays,
    Welcome,
)

ENDPOINTS = tuple(Address("192.0.2.1", 1000 + n, AddressKind.OBSERVED) for n in range(4))
LAN, OUTSIDE = Address("192.168.1.2", 5), Address("192.0.2.1", 5, AddressKind.OBSERVED)
PUBLIC, LOOPBACK = Address("198.51.100.7", 5), Address("127.0.0.1", 5)
FAR, HERE = Address("203.0.113.9", 6, AddressKind.OBSERVED), Address("192.168.1.3", 6)


def test_both_begin_when_both_have_offered_each_when_its_message_takes_its_time() -> None:
    world = group_of(2)
    world.say(1, Punch(peer_id(2), ENDPOINTS[:3], 100_000))
    assert world.got(2, PunchAsk) == [PunchAsk(peer_id(1), 3)]
    assert world.got(1, PunchGo) == []
    world.say(2, Punch(peer_id(1), ENDPOINTS[2:], 20_000))
    margin_us = round(limits.PUNCH_MARGIN_S * 1e6)
    assert world.got(1, PunchGo) == [PunchGo(peer_id(2), ENDPOINTS[2:], margin_us)]
    assert world.got(2, PunchGo) == [PunchGo(peer_id(1), ENDPOINTS[:2], 40_000 + margin_us)]
    assert world.got(1, PunchAsk) == []


def test_an_offer_counts_once_and_not_for_ever() -> None:
    world = group_of(2)
    world.say(1, Punch(peer_id(2), ENDPOINTS, 0))
    world.say(2, Punch(peer_id(1), ENDPOINTS, 0))
    world.say(2, Punch(peer_id(1), ENDPOINTS, 0))
    assert len(world.got(1, PunchAsk)) == len(world.got(1, PunchGo)) == 1
    world.pass_time(limits.PUNCH_S + 0.2, beating=(1, 2))
    world.say(1, Punch(peer_id(2), ENDPOINTS, 0))
    assert len(world.got(2, PunchAsk)) == 2 and len(world.got(2, PunchGo)) == 1


@pytest.mark.parametrize("to", [1, 7])
def test_an_offer_to_oneself_or_to_nobody_has_no_effect(to: int) -> None:
    world = group_of(2)
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
    world.hello(2, conn=20, resume=resume_of(world))
    assert world.got(20, Moved) == [Moved(Member(peer_id(1), incarnation(1), (LAN,)))]


def test_an_observer_that_relays_is_offered_to_all_and_told_for_whom() -> None:
    world = group_of(2)
    world.do(world.master.connected(50, world.now, "198.51.100.7"))
    observe = Observe(limits.PROTOCOL_VERSION, "test", 3, peer_id(5), incarnation(5), (PUBLIC,), True)
    world.do(world.master.receive(50, observe, world.now))
    relay = Member(peer_id(5), incarnation(5), (PUBLIC,))
    assert world.got(1, Relays) == world.got(2, Relays) == [Relays((relay,))]
    world.say(1, RelayAsk(peer_id(2), peer_id(5)))
    members = [Member(peer_id(n), incarnation(n), ()) for n in (1, 2)]
    assert world.last(50, RelayFor) == RelayFor(*members)
    assert world.got(2, RelayCall) == [RelayCall(peer_id(1), peer_id(5))]
    moved = Address("198.51.100.8", 5)
    world.do(world.master.receive(50, Addresses((moved,)), world.now))
    assert world.got(1, Relays)[-1] == Relays((Member(peer_id(5), incarnation(5), (moved,)),))
    world.do(world.master.disconnected(50, world.now))
    assert world.got(1, Relays)[-1] == Relays(())


def test_a_master_that_relays_offers_itself() -> None:
    world = World()
    world.master = MasterMachine(RUN, 1, TIMEOUT_S, "test", journaled=False, relays=True)
    world.hello(1)
    world.hello(2)
    assert world.got(2, Relays) == [Relays((Member(NO_ID, NO_ID),))]
    one, other = ((peer_id(n), incarnation(n)) for n in (1, 2))
    assert world.master.are_to_be_linked(one, other)
    assert not world.master.are_to_be_linked(one, one)
    assert not world.master.are_to_be_linked(one, (peer_id(2), incarnation(3)))


@pytest.mark.parametrize(
    ("theirs", "mine", "wanted"),
    [
        ((LAN, OUTSIDE), (HERE, OUTSIDE), [LAN, OUTSIDE]),  # behind the same router
        ((LAN, OUTSIDE), (HERE, FAR), [OUTSIDE, LAN]),
        ((LAN,), (HERE,), [LAN]),
        ((LOOPBACK,), (LOOPBACK,), [LOOPBACK]),
        ((LOOPBACK, PUBLIC), (FAR,), [PUBLIC]),  # another machine
        ((PUBLIC, LOOPBACK), (LOOPBACK, PUBLIC), [LOOPBACK, PUBLIC]),  # this one
        ((Address("peer.example", 1), LAN), (FAR,), [Address("peer.example", 1), LAN]),
        ((), (HERE,), []),
    ],
)
def test_addresses_are_tried_in_the_order_of_their_promise(
    theirs: tuple[Address, ...], mine: tuple[Address, ...], wanted: list[Address]
) -> None:
    assert ordered(theirs, mine) == wanted


@pytest.mark.parametrize(
    ("theirs", "mine", "behind_router", "leads"),
    [
        ((LAN,), (HERE,), False, True),  # a run of one LAN
        ((LAN,), (HERE,), True, False),  # not seen by the master yet: a machine of ours may have that address
        ((LAN,), (HERE, OUTSIDE), True, False),
        ((LAN, OUTSIDE), (HERE, OUTSIDE), True, True),
        ((LAN, OUTSIDE), (HERE, FAR), True, True),  # refused at both
        ((LAN,), (PUBLIC,), False, False),
        ((LAN,), (LAN, OUTSIDE), True, True),  # this machine
        ((PUBLIC,), (HERE,), True, True),
        ((LOOPBACK,), (LOOPBACK,), False, True),
        ((LAN, Address("10.0.0.7", 5, AddressKind.OBSERVED)), (HERE,), True, True),  # routers within one private net
        ((), (HERE,), False, False),
    ],
)
def test_a_refusal_counts_only_where_the_peer_must_be(
    theirs: tuple[Address, ...], mine: tuple[Address, ...], behind_router: bool, leads: bool
) -> None:
    assert lead_home(theirs, mine, behind_router=behind_router) is leads
