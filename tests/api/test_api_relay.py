"""Two members that do not reach each other: a third carries their connection, and everything works as ever."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cases import check_cases, draw_cases
from cluster import Cluster, Peer
from test_api_exchange import swap, swapped

LARGE = 4_000_000  # float32 elements, so that a death finds it half sent
CASES = 25


@pytest.fixture
def bricks() -> Iterator[int]:
    """A port that refuses connections and that nobody else is given."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


def wall(bricks: int, *peers: Peer) -> None:
    """None of them reaches another of them."""
    for peer in peers:
        peer.ask("wall", peers=[other.id for other in peers if other is not peer], bricks=bricks)


def partly_linked(cluster: Cluster, count: int, bricks: int) -> list[Peer]:
    """Members, the first two walled off from each other."""
    peers = cluster.spawn(count)
    cluster.make(peers)
    wall(bricks, *peers[:2])
    peers[0].ask("connect")
    cluster.admit(peers[:1], peers[1:])
    return peers


def relay_between(a: Peer, b: Peer, peers: list[Peer]) -> Peer:
    """Who dials knows it."""
    told = {**a.ask("relays", thread="watch"), **b.ask("relays", thread="watch")}
    (relay,) = set(told.values())
    return next(peer for peer in peers if peer.id == relay)


def test_everything_works_between_two_that_do_not_reach_each_other(
    make_cluster: Callable[..., Cluster], seed: int, bricks: int
) -> None:
    cluster = make_cluster(peer_timeout=30.0)
    a, b, *_ = peers = partly_linked(cluster, 4, bricks)
    assert relay_between(a, b, peers) in peers[2:]
    ranked = sorted(peers, key=lambda peer: peer.id)
    cases = draw_cases(seed, 4, 1)
    for first in range(0, len(cases), CASES):
        calls = [peer.call("cases", seed=seed, rounds=1, first=first, last=first + CASES) for peer in ranked]
        check_cases(seed, 4, cases[first : first + CASES], [call.value() for call in calls])
    cluster.reduce(peers, count=1_000_000, algorithm="ring")
    epoch = cluster.reduce(peers, count=1_000_000)["epoch"]
    swapped(swap(a, b, seed), seed)
    for peer in peers:
        peer.ask("state", arrays={"w": {"seed": 5, "index": 0, "count": 1_000_000, "dtype": "float32"}}, revision=1)
    b.ask("poke", name="w", at=7, value=77)
    synced = [call.value() for call in [peer.call("sync") for peer in peers]]
    assert [info["changed"] for info in synced] == [[], ["w"], [], []]
    (newcomer,) = cluster.spawn(1)
    cluster.make([newcomer])
    cluster.admit(peers, [newcomer])
    assert cluster.reduce([*peers, newcomer])["epoch"] == epoch + 1
    assert relay_between(a, b, peers) in peers[2:]


def test_a_plan_goes_round_a_relayed_pair_and_the_status_names_it(cluster: Cluster, bricks: int) -> None:
    a, b, r = peers = partly_linked(cluster, 3, bricks)
    for call in [peer.call("optimize_topology") for peer in peers]:
        call.value()
    ranked = sorted(peers, key=lambda peer: peer.id)
    cluster.reduce(peers, count=100_000, algorithm="direct", shares=[int(peer is r) for peer in ranked])
    (group,) = cluster.master.status()["groups"]
    low, high = sorted((a.id, b.id))
    assert {m["peer"]: m["relayed"] for m in group["members"]} == {low: [high[:8]], high: [low[:8]], r.id: []}


def test_a_newcomer_that_does_not_reach_every_member_comes_in(cluster: Cluster, bricks: int) -> None:
    members = cluster.members(3)
    (newcomer,) = cluster.spawn(1)
    cluster.make([newcomer])
    wall(bricks, members[0], newcomer)
    cluster.admit(members, [newcomer])
    assert relay_between(members[0], newcomer, members) in members[1:]
    cluster.reduce([*members, newcomer])


def test_a_wall_that_rises_in_a_run_of_collectives_costs_nobody_its_place(cluster: Cluster, bricks: int) -> None:
    a, b, *_ = peers = cluster.members(4)
    epoch = cluster.reduce(peers)["epoch"]
    seed = cluster.rng.getrandbits(32)
    loops = {peer: peer.call("loop", thread="loop", seed=seed, count=10_000, report=3) for peer in peers}
    for peer in peers:
        peer.wait_event("loop")
    wall(bricks, a, b)
    a.ask("cut", what="peers")
    lower, higher = sorted((a, b), key=lambda peer: peer.id)
    lower.ask("wait_relay", peer=higher.id, thread="watch")
    for peer in peers:
        peer.ask("stop_loop")
    cluster.check_loops({peer: loop.value() for peer, loop in loops.items()}, seed, 10_000)
    assert cluster.reduce(peers)["epoch"] == epoch
    cluster.agree(peers)


def test_a_relay_that_dies_in_the_data_phase_is_all_that_goes(cluster: Cluster, bricks: int) -> None:
    a, b, *_ = peers = partly_linked(cluster, 4, bricks)
    dead = relay_between(a, b, peers)
    rest = [peer for peer in peers if peer is not dead]
    dead.ask("hook", phase="data", when="after", bytes=2_000_000)
    seed = cluster.rng.getrandbits(32)
    calls = {peer: peer.call("all_reduce", seed=seed, count=LARGE) for peer in peers}
    calls[dead].died()
    info = cluster.check([calls[peer].value() for peer in rest], seed, LARGE)
    assert info["world_size"] in (3, 4)  # 4: it had sent everything, and said so
    cluster.reduce(rest)
    cluster.agree(rest)
    assert relay_between(a, b, rest) is rest[-1]
    swapped(swap(a, b, seed), seed)


def test_a_relay_whose_interpreter_is_busy_for_longer_than_peer_timeout_carries_on(
    cluster: Cluster, bricks: int, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    a, b, *_ = peers = partly_linked(cluster, 3, bricks)
    relay = relay_between(a, b, peers)
    epoch = cluster.reduce(peers)["epoch"]
    held = relay.call("hold_gil", seconds=4 * cluster.peer_timeout, fifo=str(gate))
    relay.wait_event("held")
    seed = cluster.rng.getrandbits(32)
    swapped(swap(a, b, seed, count=LARGE), seed, LARGE)
    gate.write_bytes(b"x")
    held.value()
    assert cluster.reduce(peers)["epoch"] == epoch
    cluster.agree(peers)


@pytest.mark.parametrize(("settings", "relay_max"), [({}, 0), ({"max_upload": "50mbit"}, 50_000_000 // 8 // 2)])
def test_a_member_with_a_cap_carries_no_more_than_half_of_it_for_others(
    cluster: Cluster, settings: dict[str, str], relay_max: int
) -> None:
    (peer,) = cluster.members(1, **settings)
    assert peer.ask("relay_max") == relay_max
