"""kill -9 at each phase of the protocol: the survivors hold the same bits, of the members they name, and go on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from cluster import Call, Cluster, Peer

LARGE = 4_000_000  # float32 elements: sixteen pieces, so that a death finds it half sent


def survivors_agree(
    cluster: Cluster, calls: Sequence[Call], seed: int, count: int, everybody: Sequence[Peer]
) -> dict[str, Any]:
    """All ended well, with the lost peers' part or without it, and can go on among themselves."""
    info = cluster.check([call.value() for call in calls], seed, count)
    rest = [call.peer for call in calls]
    assert set(info["members"]) >= {peer.id for peer in rest}
    assert set(info["members"]) <= {peer.id for peer in everybody}
    assert cluster.reduce(rest)["world_size"] == len(rest)
    cluster.agree(rest)
    return info


@pytest.mark.parametrize(
    ("phase", "when", "count"),
    [
        ("submit", "before", 1000),
        ("submit", "after", 1000),
        ("data", "after", LARGE),
        ("commit", "before", 1000),
        ("commit", "before", LARGE),
    ],
)
@pytest.mark.parametrize("lowest", [True, False], ids=["lowest id dies", "highest id dies"])
def test_a_peer_dies_in_an_operation(cluster: Cluster, phase: str, when: str, count: int, lowest: bool) -> None:
    """The lowest dials all data connections, the highest none: both ways to notice a death."""
    peers = cluster.members(3)
    victim = sorted(peers, key=lambda peer: peer.id)[0 if lowest else -1]
    rest = [peer for peer in peers if peer is not victim]
    victim.ask("hook", phase=phase, when=when, bytes=count * 4 // 2)
    seed = cluster.rng.getrandbits(32)
    calls = [peer.call("all_reduce", seed=seed, count=count) for peer in rest]
    victim.call("all_reduce", seed=seed, count=count).died()
    info = survivors_agree(cluster, calls, seed, count, peers)
    if phase == "commit":  # it held DONE from all, so all hold the result
        assert info["world_size"] == 3
    if (phase, when) == ("submit", "before"):
        assert info["world_size"] == 2


@pytest.mark.parametrize("bytes_", [104, 2 * 104, 2 * 104 + 64, 2 * (104 + 64)], ids=["OPEN", "OPENs", "DONE", "DONEs"])
def test_a_peer_dies_with_its_word_on_the_way(cluster: Cluster, bytes_: int) -> None:
    """A barrier is nothing but OPEN and DONE: some have left, or all; the others may hold all of them, or none."""
    *rest, victim = cluster.members(3)
    victim.ask("hook", phase="data", bytes=bytes_)
    calls = [peer.call("barrier") for peer in rest]
    victim.call("barrier").died()
    infos = [call.value()["info"] for call in calls]
    assert infos[0]["members"] == infos[1]["members"] and infos[0]["epoch"] == infos[1]["epoch"]
    cluster.reduce(rest)
    cluster.agree(rest)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_peer_dies_as_it_tells_that_it_entered_an_epoch(cluster: Cluster, when: str) -> None:
    *rest, victim = peers = cluster.members(3)
    victim.ask("hook", phase="send:Entered", when=when)
    for call in [peer.call("update_topology") for peer in peers][:2]:
        call.value()
    victim.wait()
    cluster.reduce(rest)
    cluster.agree(rest)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_peer_dies_as_it_leaves(cluster: Cluster, when: str) -> None:
    *rest, victim = cluster.members(3)
    victim.ask("hook", phase="send:Leave", when=when)
    seed = cluster.rng.getrandbits(32)
    calls = [peer.call("all_reduce", seed=seed, count=1000) for peer in rest]
    victim.call("close").died()
    assert survivors_agree(cluster, calls, seed, 1000, rest)["world_size"] == 2


@pytest.mark.parametrize("phase", ["submit", "data"])
def test_without_retry_all_survivors_get_peer_lost_and_their_input_back(cluster: Cluster, phase: str) -> None:
    peers = cluster.members(3)
    *rest, victim = peers
    victim.ask("hook", phase=phase, when="before", bytes=LARGE)
    seed = cluster.rng.getrandbits(32)
    wanted = {"seed": seed, "count": LARGE, "retry": False, "out": phase == "submit"}
    calls = [peer.call("all_reduce", **wanted) for peer in rest]
    for peer in rest:  # or an early death is settled before they begin, and they do well without the victim
        peer.ask("wait_blocked", thread="watch")
    victim.call("all_reduce", **wanted).died()
    answers = [call.answer() for call in calls]
    if all("value" in answer for answer in answers):  # the death came too late to hurt, or before both submits
        cluster.check([answer["value"] for answer in answers], seed, LARGE)
    else:
        errors = [call.error("PeerLostError") for call in calls]
        assert all(error["restored"] and error["peer"] == victim.id for error in errors)
    cluster.reduce(rest)


def test_a_broadcast_survives_the_loss_of_a_leaf_and_fails_with_its_root(cluster: Cluster) -> None:
    peers = cluster.members(4)
    root, a, b, leaf = peers
    leaf.ask("hook", phase="submit")
    calls = [peer.call("broadcast", seed=1, count=5000, dtype="float64", root=root.id) for peer in peers]
    calls[3].died()
    assert len({call.value()["sha"] for call in calls[:3]}) == 1
    root.ask("hook", phase="submit")
    calls = [peer.call("broadcast", seed=1, count=5000, dtype="float64", root=root.id) for peer in (a, b, root)]
    calls[2].died()
    for call in calls[:2]:
        error = call.error("PeerLostError")
        assert error["restored"] and error["peer"] == root.id
    cluster.reduce([a, b])


def test_fifty_operations_in_flight_survive_a_loss(cluster: Cluster) -> None:
    peers = cluster.members(3)
    *rest, victim = peers
    victim.ask("hook", phase="submit", nth=31)
    seed = cluster.rng.getrandbits(32)
    for peer in peers:
        for tag in range(50):
            peer.call("submit", name=str(tag), seed=seed + tag, count=20_000, tag=tag, op="avg")
    waits = {(peer, tag): peer.call("wait", name=str(tag)) for tag in range(50) for peer in rest}
    sizes = []
    for tag in range(50):
        values = [waits[peer, tag].value() for peer in rest]
        sizes.append(cluster.check(values, seed + tag, 20_000, op="avg")["world_size"])
    assert set(sizes) <= {2, 3} and sizes[30:] == [2] * 20
    cluster.reduce(rest)


@pytest.mark.parametrize(
    ("phase", "when"),
    [("freeze", "before"), ("freeze", "after"), ("send:Report", "after"), ("enter", "before"), ("enter", "after")],
)
def test_a_second_peer_dies_while_the_loss_of_the_first_is_settled(cluster: Cluster, phase: str, when: str) -> None:
    peers = cluster.members(4)
    a, b, second, first = peers
    first.ask("hook", phase="submit")
    second.ask("hook", phase=phase, when=when)
    second.ask("hook", phase="commit", action="wait")  # or it answers before it is killed
    seed = cluster.rng.getrandbits(32)
    calls = [peer.call("all_reduce", seed=seed, count=100_000) for peer in peers]
    calls[3].died()
    calls[2].died()
    info = survivors_agree(cluster, calls[:2], seed, 100_000, [a, b, second])
    assert info["world_size"] == 2 or phase == "enter"


@pytest.mark.parametrize(
    ("phase", "when"),
    [
        ("send:Arrive", "before"),
        ("send:Arrive", "after"),
        ("set_cut", "before"),
        ("open_links", "after"),
        ("send:Ready", "before"),
        ("send:Ready", "after"),
        ("send:PeerHello", "before"),
        ("send:PeerHello", "after"),
        ("send:PeerWelcome", "before"),
        ("send:PeerWelcome", "after"),
        ("keep_links", "before"),
        ("enter", "before"),
        ("enter", "after"),
    ],
)
def test_a_member_dies_while_the_safe_point_is_open(cluster: Cluster, phase: str, when: str) -> None:
    """A newcomer waits at it and gets in all the same."""
    *members, newcomer = cluster.spawn(4)
    cluster.make([*members, newcomer])
    members[0].ask("connect")
    cluster.admit(members[:1], members[1:])
    *rest, victim = members
    if phase.startswith("send:Peer"):  # the lower id dials and says PeerHello
        newcomer.id = newcomer.ask("renumber", peer=("f" if phase == "send:PeerHello" else "0") * 32)
    victim.ask("hook", phase=phase, when=when)
    join = newcomer.call("connect")
    rest[0].ask("wait_pending", count=1)
    calls = [peer.call("update_topology") for peer in members]
    calls.pop().died()
    for call in [*calls, join]:
        call.value()
    everybody = [*rest, newcomer]
    assert cluster.reduce(everybody)["world_size"] == 3
    cluster.agree(everybody)


@pytest.mark.parametrize(
    ("phase", "when"),
    [
        ("send:Hello", "after"),
        ("open_links", "before"),
        ("adopt", "before"),
        ("adopt", "after"),
        ("send:Ready", "before"),
        ("send:Ready", "after"),
        ("send:PeerHello", "before"),
        ("send:PeerHello", "after"),
        ("send:PeerWelcome", "before"),
        ("send:PeerWelcome", "after"),
        ("enter", "before"),
        ("joined", "after"),
    ],
)
def test_a_newcomer_dies_while_it_joins(cluster: Cluster, phase: str, when: str) -> None:
    *members, newcomer = cluster.spawn(3)
    cluster.make([*members, newcomer])
    members[0].ask("connect")
    cluster.admit(members[:1], members[1:])
    if phase.startswith("send:Peer"):
        newcomer.id = newcomer.ask("renumber", peer=("0" if phase == "send:PeerHello" else "f") * 32)
    newcomer.ask("hook", phase=phase, when=when)
    join = newcomer.call("connect")
    if phase == "send:Hello":
        join.died()
    else:
        members[0].ask("wait_pending", count=1)
    calls = [peer.call("update_topology") for peer in members]
    join.died()
    for call in calls:
        call.value()
    cluster.reduce(members)
    cluster.agree(members)
    # and the next one gets in
    other = cluster.spawn(1)
    cluster.make(other)
    cluster.admit(members, other)
    cluster.reduce([*members, *other])


def test_half_of_the_peers_die_at_once(cluster: Cluster) -> None:
    peers = cluster.members(6)
    seed = cluster.rng.getrandbits(32)
    loops = {peer: peer.call("loop", thread="loop", seed=seed, report=5) for peer in peers}
    for peer in peers:
        peer.wait_event("loop")
    victims = cluster.rng.sample(peers, 3)
    for peer in victims:
        peer.doom()
    alive = [peer for peer in peers if peer not in victims]
    for peer in alive:
        peer.ask("wait_world", world=3)
    for peer in alive:
        peer.ask("stop_loop")
    cluster.check_loops({peer: loops[peer].value() for peer in alive}, seed)
    cluster.agree(alive)


def test_peers_die_and_join_in_a_run_of_collectives(cluster: Cluster) -> None:
    """Five peers reduce without end; three die, two join at safe points, every bit is checked afterwards."""
    peers = cluster.members(5)
    seed = cluster.rng.getrandbits(32)
    loops = {peer: peer.call("loop", thread="loop", seed=seed, report=10) for peer in peers}
    alive = list(peers)
    for peer in peers:
        peer.wait_event("loop")
    for _ in range(3):
        victim = cluster.rng.choice(alive)
        alive.remove(victim)
        victim.kill()
        for peer in alive:
            peer.ask("wait_world", world=len(alive))
        if len(alive) < 4:
            (newcomer,) = cluster.spawn(1)
            cluster.make([newcomer])
            join = newcomer.call("connect")
            alive[0].ask("wait_pending", count=1)
            for call in [*(peer.call("update_topology") for peer in alive), join]:
                call.value()
            alive.append(newcomer)
            loops[newcomer] = newcomer.call("loop", thread="loop", seed=seed, report=10)
            newcomer.wait_event("loop")
    for peer in alive:
        peer.ask("stop_loop")
    cluster.check_loops({peer: loops[peer].value() for peer in alive}, seed)
    cluster.agree(alive)
