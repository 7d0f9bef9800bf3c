"""Who is in: joining, leaving, being alone, safe points beside running operations, groups."""

from __future__ import annotations

from typing import Any

import pytest
from cluster import Cluster, Peer


def test_peers_join_one_after_the_other_up_to_eight(cluster: Cluster) -> None:
    newcomers = cluster.spawn(8)
    cluster.make(newcomers)
    members: list[Peer] = []
    for peer in newcomers:
        if members:
            cluster.admit(members, [peer])
        else:
            peer.ask("connect")
        members.append(peer)
        if len(members) in (2, 3, 5, 8):
            cluster.reduce(members)


@pytest.mark.parametrize("world", [2, 3, 5, 8])
def test_peers_that_start_at_once_find_together(cluster: Cluster, world: int) -> None:
    """As programs do it: connect, then safe points until all are there."""
    peers = cluster.spawn(world)
    cluster.make(peers)
    calls = [call for peer in peers for call in (peer.call("connect"), peer.call("grow", world=world))]
    for call in calls:
        call.value()
    cluster.agree(peers)
    assert len({call.answer()["view"]["epoch"] for call in calls if call.do == "grow"}) == 1
    cluster.reduce(peers)


def test_are_peers_pending_gives_the_same_answer_everywhere(cluster: Cluster) -> None:
    *members, newcomer = cluster.spawn(4)
    cluster.make([*members, newcomer])
    members[0].ask("connect")
    assert members[0].ask("are_peers_pending") is False  # alone
    cluster.admit(members[:1], members[1:])

    def answers() -> list[bool]:
        return [call.value() for call in [peer.call("are_peers_pending") for peer in members]]

    assert answers() == [False] * 3
    join = newcomer.call("connect")
    members[1].ask("wait_pending", count=1)  # the others may not have heard yet
    assert answers() == [True] * 3
    cluster.reduce(members)  # a newcomer does not disturb
    for call in [join, *(peer.call("update_topology") for peer in members)]:
        call.value()
    members.append(newcomer)
    assert [call.value() for call in [peer.call("are_peers_pending") for peer in members]] == [False] * 4


def test_who_asks_for_peers_pending_waits_no_longer_than_it_says(cluster: Cluster) -> None:
    a, b = cluster.members(2)
    a.call("are_peers_pending", timeout=0.1).error("DeadlineError")
    assert a.id[:8] in b.call("are_peers_pending").error("DeadlineError")["text"]  # it was given up on all
    assert [call.value() for call in [peer.call("are_peers_pending") for peer in (a, b)]] == [False] * 2
    a.call("are_peers_pending", timeout=-1).error("UsageError")


def test_update_topology_without_newcomers_begins_a_new_epoch_of_the_same_members(cluster: Cluster) -> None:
    peers = cluster.members(3)
    before = cluster.reduce(peers)["epoch"]
    for call in [peer.call("update_topology") for peer in peers]:
        assert call.answer()["view"]["epoch"] == before + 1
        call.value()
    assert cluster.reduce(peers)["epoch"] == before + 1


def test_a_peer_leaves_in_the_middle_and_comes_back(cluster: Cluster) -> None:
    peers = cluster.members(3)
    seed = cluster.rng.getrandbits(32)
    loops = {peer: peer.call("loop", thread="loop", seed=seed, report=20) for peer in peers}
    leaver, *rest = peers
    leaver.wait_event("loop")
    leaver.ask("close")
    loops[leaver].error("UsageError", "OutcomeUnknownError")  # the latter: it had sent DONE
    for peer in rest:
        peer.ask("wait_world", world=2)
    for peer in rest:
        peer.ask("stop_loop")
    cluster.check_loops({peer: loops[peer].value() for peer in rest}, seed)
    cluster.agree(rest)
    cluster.reduce(rest)
    cluster.admit(rest, [leaver])
    cluster.reduce(peers)


def test_a_connected_communicator_can_not_connect_again(cluster: Cluster) -> None:
    peer, other = cluster.members(2)
    peer.call("connect").error("UsageError")
    cluster.reduce([peer, other])


def test_a_peer_alone_has_nobody_to_reduce_with_but_can_synchronise(cluster: Cluster) -> None:
    (peer,) = cluster.members(1)
    for do in ("all_reduce", "broadcast"):
        arguments: dict[str, Any] = {"root": peer.id, "dtype": "float32"} if do == "broadcast" else {}
        error = peer.call(do, seed=1, count=100, **arguments).error("AloneError")
        assert error["restored"]
    peer.call("barrier").error("AloneError")
    peer.ask("update_topology")
    peer.ask("state", arrays={"w": {"seed": 1, "count": 100, "dtype": "float32"}}, revision=3)
    synced = peer.ask("sync")
    assert synced["revision"] == 3 and synced["changed"] == [] and synced["members"] == [peer.id]
    assert peer.ask("are_peers_pending") is False


def test_the_last_survivor_is_told_that_it_is_alone(cluster: Cluster) -> None:
    peer, other = cluster.members(2)
    call = peer.call("all_reduce", seed=1, count=1000)
    other.kill()
    assert call.error("AloneError")["restored"]
    assert call.answer()["view"]["members"] == [peer.id]


def safe_points_beside_loops(cluster: Cluster, peers: list[Peer], seed: int) -> dict[int, dict[Peer, Any]]:
    """Two threads of each reduce on tags 1 and 2 without end."""
    return {
        tag: {p: p.call("loop", thread=f"loop{tag}", seed=seed + tag * 10**6, tag=tag, report=5) for p in peers}
        for tag in (1, 2)
    }


def test_operations_of_two_threads_go_on_across_safe_points(cluster: Cluster) -> None:
    peers = cluster.members(3)
    seed = cluster.rng.getrandbits(31)
    loops = safe_points_beside_loops(cluster, peers, seed)
    for peer in peers:
        peer.wait_event("loop")
    for _ in range(5):
        for call in [peer.call("update_topology") for peer in peers]:
            call.value()
    for peer in peers:
        peer.ask("stop_loop")
    for tag, calls in loops.items():
        records = {peer: call.value() for peer, call in calls.items()}
        assert len({len(r) for r in records.values()}) == 1
        cluster.check_loops(records, seed + tag * 10**6)


def test_a_newcomer_enters_between_the_operations_of_two_threads(cluster: Cluster) -> None:
    peers = cluster.members(2)
    newcomer = cluster.spawn(1)[0]
    cluster.make([newcomer])
    seed = cluster.rng.getrandbits(31)
    loops = safe_points_beside_loops(cluster, peers, seed)
    for peer in peers:
        peer.wait_event("loop")
    join = newcomer.call("connect")
    peers[0].ask("wait_pending", count=1)
    for call in [*(peer.call("update_topology") for peer in peers), join]:
        call.value()
    for tag, calls in safe_points_beside_loops(cluster, [newcomer], seed).items():
        loops[tag].update(calls)
    newcomer.wait_event("loop")
    for peer in [*peers, newcomer]:
        peer.ask("stop_loop")
    for tag, calls in loops.items():
        records = {peer: call.value() for peer, call in calls.items()}
        assert len(records[newcomer][0]["members"]) == 3
        cluster.check_loops(records, seed + tag * 10**6)


def test_groups_are_independent(cluster: Cluster) -> None:
    first, second = cluster.members(3), cluster.members(2, group=1)
    epoch = cluster.reduce(second)["epoch"]
    cluster.reduce(first)
    first.pop().kill()
    assert cluster.reduce(first)["members"] == sorted(peer.id for peer in first)
    assert cluster.reduce(second)["epoch"] == epoch
    # a safe point, a newcomer and a mismatch of one group are nothing to the other either
    newcomer = cluster.spawn(1)[0]
    cluster.make([newcomer], group=0)
    cluster.admit(first, [newcomer])
    for call in [peer.call("all_reduce", seed=1, count=10 + peer.index) for peer in first]:
        call.error("MismatchError")
    assert cluster.reduce(second)["epoch"] == epoch
    views = [call.answer()["view"] for call in [peer.call("update_topology") for peer in second]]
    assert [(view["group_world"], view["world"]) for view in views] == [(2, 5)] * 2
