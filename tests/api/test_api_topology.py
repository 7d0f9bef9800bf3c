"""optimize_topology: every link is measured once, the master plans by it; who does something else holds up nobody.

Reductions are direct: what a busy machine measures may make a ring of it, in whatever order.
"""

from __future__ import annotations

from typing import Any

import pytest
import trio
from aio_side import error, mixed, trio_test, until, value
from cluster import Cluster, Peer

GRACE_S = 0.5


def optimize(peers: list[Peer]) -> None:
    for call in [peer.call("optimize_topology") for peer in peers]:
        call.value()
    for peer in peers:
        assert peer.ask("members") == sorted(p.id for p in peers)


def rounds(peer: Peer) -> int:
    """In which it measured a link."""
    return sum("link_measured" in line for line in peer.log())


def plans_found(cluster: Cluster) -> list[dict[str, Any]]:
    return [event for event in cluster.master.status()["events"] if event["event"] == "plan_found"]


def test_each_measures_each_once_and_the_master_plans_by_it(cluster: Cluster) -> None:
    peers = cluster.members(4)
    epoch = cluster.reduce(peers)["epoch"]
    optimize(peers)
    measured = {peer: peer.ask("links") for peer in peers}
    for peer, links in measured.items():
        assert set(links) == {other.id for other in peers if other is not peer}
        assert all(link["rate"] > 0 and link["crowd"] > 0 and link["rtt_s"] > 0 for link in links.values())
    (found,) = plans_found(cluster)
    assert len(found["shares"]) == 4 and sum(found["shares"]) == pytest.approx(1.0, abs=1e-3)
    assert found["predicted_s"] > 0
    assert cluster.reduce(peers, algorithm="direct")["epoch"] == epoch + 1
    optimize(peers)
    assert [rounds(peer) for peer in peers] == [3] * 4  # nothing was missing
    assert cluster.reduce(peers, algorithm="direct")["epoch"] == epoch + 2


def test_newcomer_is_measured_and_the_others_are_not_again(cluster: Cluster) -> None:
    *members, newcomer = cluster.spawn(4)
    cluster.make([*members, newcomer])
    members[0].ask("connect")
    cluster.admit(members[:1], members[1:])
    optimize(members)
    assert [rounds(peer) for peer in members] == [2] * 3
    cluster.admit(members, [newcomer])
    optimize([*members, newcomer])
    assert [rounds(peer) for peer in (*members, newcomer)] == [3] * 4
    assert all(len(peer.ask("links")) == 3 for peer in (*members, newcomer))
    cluster.reduce([*members, newcomer], algorithm="direct")


def test_alone_there_is_nothing_to_measure(cluster: Cluster) -> None:
    (peer,) = cluster.members(1)
    optimize([peer])
    assert peer.ask("links") == {} and not plans_found(cluster)


def test_who_updates_while_others_optimize_is_an_error_on_all(cluster: Cluster) -> None:
    peers = cluster.members(3, mismatch_grace=GRACE_S)
    odd, *rest = peers
    calls = [odd.call("update_topology"), *(peer.call("optimize_topology") for peer in rest)]
    for call in calls:
        assert set(call.error("MismatchError")["peers"]) <= {peer.id for peer in peers}
    optimize(peers)
    cluster.reduce(peers, algorithm="direct")


def test_who_reduces_while_others_optimize_is_an_error_on_all(cluster: Cluster) -> None:
    peers = cluster.members(3, mismatch_grace=GRACE_S)
    odd, *rest = peers
    calls = [odd.call("all_reduce", seed=1, count=1000), *(peer.call("optimize_topology") for peer in rest)]
    for call in calls:
        call.error("MismatchError")
    optimize(peers)


@pytest.mark.parametrize("nth", [1, 2, 4, 6])
def test_member_that_dies_while_it_measures_leaves_the_others_to_a_plan(cluster: Cluster, nth: int) -> None:
    """At one of its collectives: the two gathers, the begin of a round, of the crowd."""
    peers = cluster.members(4)
    *rest, victim = peers
    victim.ask("hook", phase="submit", nth=nth)
    calls = [peer.call("optimize_topology") for peer in peers]
    calls[-1].died()
    for call in calls[:-1]:
        call.value()
    cluster.agree(rest)
    cluster.reduce(rest, algorithm="direct")
    optimize(rest)
    assert all(set(peer.ask("links")) == {other.id for other in rest if other is not peer} for peer in rest)


@trio_test
async def test_a_trio_program_and_blocking_ones_optimize_together(cluster: Cluster) -> None:
    async with mixed(cluster, agents=2) as (local, others):
        calls = [peer.call("optimize_topology") for peer in others]
        await local.comm.optimize_topology()
        for call in calls:
            await value(call)
        assert local.comm.group_world_size == 3
        assert local.session.table.news(local.session.view.members) is None  # all was told before it arrived
        assert len(await trio.to_thread.run_sync(others[0].ask, "links")) == 2


@trio_test
async def test_cancelled_while_it_measures_it_fails_on_all_and_they_can_try_again(cluster: Cluster) -> None:
    async with mixed(cluster, agents=2) as (local, others):
        with trio.CancelScope() as scope:
            scope.cancel()
            await local.comm.optimize_topology()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(local.comm.optimize_topology)
            await until(lambda: local.submits_inside(4) == 1)  # it waits for the others
            nursery.cancel_scope.cancel()
        calls = [peer.call("optimize_topology") for peer in others]
        for call in calls:
            await error(call, "PeerLostError", "MismatchError")
        calls = [peer.call("optimize_topology") for peer in others]
        await local.comm.optimize_topology()
        for call in calls:
            await value(call)
