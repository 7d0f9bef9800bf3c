"""Connections that break while everybody lives: nobody is evicted, nothing is lost, nothing runs twice."""

from __future__ import annotations

import pytest
from cluster import Call, Cluster, Peer


def looping(cluster: Cluster, peers: list[Peer], count: int) -> tuple[int, dict[Peer, Call]]:
    seed = cluster.rng.getrandbits(32)
    loops = {peer: peer.call("loop", thread="loop", seed=seed, count=count, report=3) for peer in peers}
    for peer in peers:
        peer.wait_event("loop")
    return seed, loops


def finish(cluster: Cluster, seed: int, loops: dict[Peer, Call], count: int) -> set[int]:
    """Ends the loops; the epochs they ran in."""
    for peer in loops:
        peer.ask("stop_loop")
    records = {peer: loop.value() for peer, loop in loops.items()}
    cluster.check_loops(records, seed, count)
    return {record["epoch"] for steps in records.values() for record in steps}


@pytest.mark.parametrize("connections", ["auto", 1, 8])
@pytest.mark.parametrize("count", [1000, 1_000_000])
def test_data_connections_break_in_a_run_of_collectives(cluster: Cluster, connections: int | str, count: int) -> None:
    peers = cluster.members(3, connections=connections)
    epoch = cluster.reduce(peers, tag=1)["epoch"]
    seed, loops = looping(cluster, peers, count)
    for _ in range(10):
        cluster.rng.choice(peers).ask("cut", what="peers")
        cluster.reduce(peers, tag=1)
    assert finish(cluster, seed, loops, count) == {epoch}
    cluster.agree(peers)


def test_control_connections_break_in_a_run_of_collectives(cluster: Cluster) -> None:
    peers = cluster.members(3)
    epoch = cluster.reduce(peers, tag=1)["epoch"]
    seed, loops = looping(cluster, peers, 1000)
    for _ in range(5):
        for peer in peers:
            peer.ask("cut", what="master")
        cluster.reduce(peers, tag=1)
    assert finish(cluster, seed, loops, 1000) == {epoch}
    for call in [peer.call("update_topology") for peer in peers]:
        call.value()
    cluster.agree(peers)


def test_control_connections_break_at_the_safe_point(cluster: Cluster) -> None:
    *members, newcomer = cluster.spawn(4)
    cluster.make([*members, newcomer])
    members[0].ask("connect")
    cluster.admit(members[:1], members[1:])
    first, second, last = members
    calls = [peer.call("update_topology") for peer in (first, second)]
    for peer in (first, second):
        peer.ask("wait_safe_point", thread="watch")
        peer.ask("cut", what="master", thread="watch")
    join = newcomer.call("connect")
    for call in [last.call("update_topology"), *calls]:
        call.value()
    for call in [join, *(peer.call("grow", world=4) for peer in members)]:
        call.value()
    cluster.reduce([*members, newcomer])


def test_everything_breaks_and_one_peer_dies(cluster: Cluster) -> None:
    peers = cluster.members(4)
    seed, loops = looping(cluster, peers, 100_000)
    *rest, victim = peers
    for peer in rest:
        peer.ask("cut", what="peers")
    victim.kill()
    del loops[victim]
    for peer in rest:
        peer.ask("cut", what="master")
    for peer in rest:
        peer.ask("wait_world", world=3)
    finish(cluster, seed, loops, 100_000)
    cluster.reduce(rest, tag=1)
    cluster.agree(rest)


def test_connections_break_while_state_is_fetched(cluster: Cluster) -> None:
    *holders, odd = peers = cluster.members(3)
    big = {"w": {"seed": 1, "index": 0, "count": 8 << 20, "dtype": "float32"}}
    for peer in peers:
        peer.ask("state", arrays=big, revision=1)
    digest = odd.ask("digest")
    for call in [peer.call("sync") for peer in peers]:
        call.value()
    for chunk in range(32):
        odd.ask("poke", name="w", at=chunk << 20, value=0)
        odd.ask("poke", name="w", at=(chunk << 20) + 1, value=255)
    for peer in holders:
        peer.ask("hook", phase="serve", action="tell", bytes=3 << 20)
    calls = [peer.call("sync", thread="sync") for peer in peers]
    for peer in holders:
        peer.wait_event("hook")
        peer.ask("cut", what="peers")
    assert [call.value()["state"]["digest"] for call in calls] == [digest] * 3


def test_a_newcomer_that_nobody_can_reach_is_dropped_with_the_reason(cluster: Cluster) -> None:
    *members, hidden = cluster.spawn(3)
    cluster.make([*members, hidden])
    for peer in [*members, hidden]:
        peer.ask("links_timeout", seconds=1)
    members[0].ask("connect")
    cluster.admit(members[:1], members[1:])
    hidden.id = hidden.ask("renumber", peer="f" * 32)  # the others dial it
    hidden.ask("hide")
    join = hidden.call("connect")
    members[0].ask("wait_pending", count=1)
    calls = [peer.call("update_topology") for peer in members]
    assert "could not reach" in join.error("RejectedError")["text"]  # it or them: both sides notice at the same time
    for call in calls:
        call.value()
    cluster.reduce(members)
    cluster.agree(members)


def test_a_peer_of_another_version_is_rejected_with_both_versions(cluster: Cluster) -> None:
    members = cluster.members(1)
    stranger = cluster.spawn(1)
    cluster.make(stranger)
    stranger[0].ask("speak_version", version=7)
    text = stranger[0].call("connect").error("RejectedError")["text"]
    assert "protocol 7" in text and "1" in text
    other = cluster.spawn(1)
    cluster.make(other)
    cluster.admit(members, other)
    cluster.reduce([*members, *other])
