"""Plans: what is refused, how one is carried to other members, and when the master brings it into force."""

from __future__ import annotations

import random
import secrets
import struct

import pytest
from test_master import World, group_of, peer_id

from pyccl._proto import limits
from pyccl._proto.epoch import Epoch, Member, epoch_id, make_epoch
from pyccl._proto.messages import Arrive, EpochCommit, EpochPropose, Flush, Leave, Ready, Report
from pyccl._proto.plan import NEVER, NO_PLAN, Plan, carry, carry_bytes, decode_untrusted
from pyccl.errors import RemoteProtocolError

A, B, C, D, E = (peer_id(n) for n in range(1, 6))


def test_a_plan_comes_back_from_its_bytes_and_that_of_nothing_is_empty() -> None:
    for plan, members in (
        (Plan(), 7),
        (Plan(shares=(0, 1, limits.U32_MAX)), 3),
        (Plan(ring=(2, 0, 1)), 3),
        (Plan((5,), (0,), 0), 1),
        (Plan(piece_bytes=limits.PLAN_PIECE_MIN), 4),
        (Plan((3, 2), (1, 0), NEVER, limits.PLAN_PIECE_MAX), 2),
        (Plan(ring_from_bytes=NEVER - 1), 256),
        (Plan(tuple(range(256)), tuple(reversed(range(256))), 1 << 20, 1 << 14, 999_999), 256),
    ):
        assert decode_untrusted(plan.encode(members), members) == plan
    assert Plan().encode(3) == NO_PLAN == b""
    assert len(Plan(tuple(range(256)), tuple(range(256)), 0).encode(256)) < 2000


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"direct", "6 bytes"),
        (b"\1", "1 bytes"),
        (Plan(ring_from_bytes=5).encode(3)[:-1], "15 bytes"),
        (Plan(ring_from_bytes=5).encode(3) + b"\0", "has not 17 bytes"),
        (b"\2" + Plan(ring_from_bytes=5).encode(3)[1:], "version 2"),
        (b"\1\10" + Plan(ring_from_bytes=5).encode(3)[2:], "flags 8"),
        (Plan(ring_from_bytes=5).encode(4), "for 4 members of 3"),
        (Plan((1, 2, 3)).encode(3)[:-4] + b"\0", "has not"),
        (b"\1\1\3\0" + b"\xff" * 8 + bytes(16), "all 0"),
        (b"\1\2\3\0" + b"\xff" * 8 + bytes(4) + b"\0\0\1\0\1\0", "no order"),
        (b"\1\2\3\0" + b"\xff" * 8 + bytes(4) + b"\0\0\1\0\3\0", "no order"),
        (b"\1\0\3\0" + b"\xff" * 8 + bytes(4), "says nothing"),
        (b"\1\0\3\0" + bytes(8) + struct.pack("<I", 1_000_000), "ring_pace=1000000"),
        (b"\1\4\3\0" + b"\xff" * 8 + bytes(4), "has not 16 bytes"),
        (b"\1\4\3\0" + b"\xff" * 8 + bytes(8), "a piece of 0 bytes"),
        (b"\1\4\3\0" + b"\xff" * 8 + bytes(4) + b"\1\x80\0\0", "pieces of 32769 bytes"),
        (b"\1\4\3\0" + b"\xff" * 8 + bytes(4) + b"\0\x20\0\0", "pieces of 8192 bytes"),
        (b"\1\4\3\0" + b"\xff" * 8 + bytes(4) + b"\0\0\4\0", "pieces of 262144 bytes"),
    ],
)
def test_what_is_no_plan_is_refused_also_in_an_epoch(data: bytes, reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match=reason):
        decode_untrusted(data, 3)
    members = tuple(Member(peer, b"i" * 16) for peer in (A, B, C))
    epoch = Epoch(2, epoch_id(A, 1, 2, members, data), A, 1, members, data)
    with pytest.raises(RemoteProtocolError, match=reason):
        epoch.check_untrusted()


def test_any_bytes_are_a_plan_or_refused() -> None:
    seed = secrets.randbits(32)
    rng = random.Random(seed)
    good = Plan((1, 2, 3, 4), (3, 1, 0, 2), 77, 1 << 15).encode(4)
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.getrandbits(8)
        try:
            plan = decode_untrusted(bytes(data), 4)
        except RemoteProtocolError:
            continue
        assert plan.encode(4) == bytes(data), f"seed={seed}"


def test_who_stays_keeps_weight_and_place_and_who_is_new_gets_the_mean() -> None:
    assert carry(Plan(piece_bytes=1 << 14), [A, B, C], [A, C]) == Plan(piece_bytes=1 << 14)
    plan = Plan((1, 0, 5, 3), (3, 1, 0, 2), 99, ring_pace=9)
    assert carry(plan, [A, B, C, D], [A, B, C, D]) == plan
    assert carry(plan, [A, B, C, D], [A, C, D]) == Plan((1, 5, 3), (2, 0, 1), 99, ring_pace=9)
    assert carry(plan, [A, C, D, E], [A, B, C, D, E]) == Plan((1, 2, 0, 5, 3), (4, 2, 0, 3, 1), 99, ring_pace=9)
    assert carry(plan, [A, B, C, D], [B]) == Plan((), (0,), 99, ring_pace=9)  # who owned something is gone
    assert carry(Plan((0, 1), (), 7), [A, B], [A, B, C]) == Plan((0, 1, 1), (), 7)
    assert carry(Plan(), [A], [A, B]) == Plan()
    assert carry_bytes(NO_PLAN, [A], [A, B]) == NO_PLAN


def test_carrying_step_by_step_and_at_once_is_the_same_for_losses() -> None:
    seed = secrets.randbits(32)
    rng = random.Random(seed)
    peers = [bytes([n]) * 16 for n in range(20)]
    for _ in range(100):
        ring = rng.sample(range(20), 20)
        plan = Plan(tuple(rng.randint(1, 9) for _ in range(20)), tuple(ring), rng.getrandbits(64))
        some = sorted(rng.sample(peers, 12))
        fewer = sorted(rng.sample(some, 5))
        assert carry(carry(plan, peers, some), some, fewer) == carry(plan, peers, fewer), f"seed={seed}"


# ---- the master


def plan_of(world: World) -> Plan:
    epoch = world.epoch()
    return decode_untrusted(epoch.plan, len(epoch.members))


def test_the_master_proposes_a_plan_at_the_next_safe_point_and_keeps_it() -> None:
    world, plan = group_of(3), Plan((1, 2, 3), (2, 1, 0), 5)
    world.do(world.master.plan_next(0, (A, B, C), plan, world.now))
    assert plan_of(world) == Plan()
    for _ in range(2):
        number = world.epoch().number
        for n in (1, 2, 3):
            world.say(n, Arrive(number))
        world.ready(1, 2, 3)
        assert world.epoch().number == number + 1 and plan_of(world) == plan


def test_a_plan_that_comes_while_a_proposal_is_open_makes_it_anew() -> None:
    world, plan = group_of(2), Plan((1, 2), (), 5)
    for n in (1, 2):
        world.say(n, Arrive(world.epoch().number))
    first = world.last(1, EpochPropose)
    world.do(world.master.plan_next(0, (A, B), plan, world.now))
    again = world.last(1, EpochPropose)
    assert again.version == first.version + 1 and decode_untrusted(again.epoch.plan, 2) == plan
    world.say(1, Ready(first.epoch.number, first.version))
    world.say(2, Ready(first.epoch.number, first.version))
    assert world.epoch().number == first.epoch.number - 1
    world.ready(1, 2)
    assert plan_of(world) == plan


def test_a_loss_epoch_takes_the_plan_to_the_survivors_and_leaves_a_new_one_waiting() -> None:
    world = group_of(3)
    world.do(world.master.plan_next(0, (A, B, C), Plan((1, 2, 3), (2, 1, 0), 5), world.now))
    for n in (1, 2, 3):
        world.say(n, Arrive(world.epoch().number))
    world.ready(1, 2, 3)
    world.do(world.master.plan_next(0, (A, B, C), Plan((7, 8, 9), (1, 2, 0), 6), world.now))
    lose_second(world)
    assert plan_of(world) == Plan((1, 3), (1, 0), 5)
    for n in (1, 3):
        world.say(n, Arrive(world.epoch().number))
    world.ready(1, 3)
    assert plan_of(world) == Plan((7, 9), (1, 0), 6)


def lose_second(world: World) -> None:
    world.say(2, Leave())
    flush = world.last(1, Flush)
    for n in (1, 3):
        world.say(n, Report(flush.epoch, flush.ballot, ()))
    assert world.last(1, EpochCommit).kind == "loss"


def test_a_newcomer_is_planned_for_when_it_comes_in() -> None:
    world = group_of(2)
    world.do(world.master.plan_next(0, (A, B), Plan((10, 20), (1, 0), NEVER), world.now))
    world.hello(3)
    for n in (1, 2):
        world.say(n, Arrive(world.epoch().number))
    world.ready(1, 2, 3)
    assert plan_of(world) == Plan((10, 20, 15), (1, 0, 2), NEVER)


def test_a_plan_for_a_group_that_is_not_there_is_forgotten() -> None:
    world = group_of(1)
    assert world.master.plan_next(7, (A,), Plan((1,)), world.now) == []


def test_our_own_plan_must_fit() -> None:
    with pytest.raises(AssertionError):
        Plan((1, 2)).encode(3)
    with pytest.raises(AssertionError):
        make_and_plan((2,))


def make_and_plan(ring: tuple[int, ...]) -> Epoch:
    return make_epoch(1, bytes(16), 1, (Member(A, A),), Plan(ring=ring).encode(1))
