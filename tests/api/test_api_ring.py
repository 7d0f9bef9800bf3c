"""The ring, unequal shares and reduce_scatter between processes: plans that the master brings, losses, newcomers.

Values: test_api_values.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from cluster import Call, Cluster, Peer
from oracle import draw, sha

import pyccl

LARGE = 2_000_000  # float32 elements: pieces enough that a death finds it half way round


def in_rank_order(peers: Sequence[Peer]) -> list[Peer]:
    return sorted(peers, key=lambda peer: peer.id)


def meet(peers: Sequence[Peer]) -> None:
    for call in [peer.call("update_topology") for peer in peers]:
        call.value()


def test_a_plan_comes_into_force_at_the_safe_point_and_only_there(cluster: Cluster) -> None:
    peers = in_rank_order(cluster.members(4))
    plan: dict[str, Any] = {"shares": [0, 3, 1, 2], "ring": [2, 0, 3, 1]}
    cluster.master.plan_next(**plan, ring_from_bytes=4000)
    assert cluster.reduce(peers, count=1000, algorithm="auto")["algorithm"] == "direct"
    meet(peers)
    assert cluster.reduce(peers, count=1000, algorithm="auto", **plan)["algorithm"] == "ring"
    assert cluster.reduce(peers, count=999, algorithm="auto", **plan)["algorithm"] == "direct"
    assert cluster.reduce(peers, count=1000, algorithm="direct", **plan)["algorithm"] == "direct"
    assert cluster.reduce(peers, count=300_001, algorithm="ring", op="avg", **plan)["algorithm"] == "ring"
    meet(peers)  # the next one has nothing new to bring: it stays
    assert cluster.reduce(peers, count=1000, algorithm="auto", **plan)["algorithm"] == "ring"


def test_the_plan_is_carried_to_the_survivors_and_to_a_newcomer(cluster: Cluster) -> None:
    peers = in_rank_order(cluster.members(4))
    cluster.master.plan_next(shares=[1, 4, 2, 5], ring=[3, 1, 0, 2])
    meet(peers)
    lost = peers.pop(1)
    lost.kill()
    seed = cluster.rng.getrandbits(32)
    calls = [peer.call("all_reduce", seed=seed, count=5000, algorithm="auto") for peer in peers]
    info = cluster.check([call.value() for call in calls], seed, 5000, shares=[1, 2, 5], ring=[2, 0, 1])
    assert (info["algorithm"], info["world_size"]) == ("ring", 3)
    [newcomer] = cluster.spawn(1)
    cluster.make([newcomer])
    cluster.admit(peers, [newcomer])
    everybody = in_rank_order([*peers, newcomer])
    weights = dict(zip([*peers, newcomer], [1, 2, 5, 2], strict=True))
    order = [peers[2], peers[0], peers[1], newcomer]
    carried = {"shares": [weights[p] for p in everybody], "ring": [everybody.index(p) for p in order]}
    assert cluster.reduce(everybody, count=5000, algorithm="auto", **carried)["algorithm"] == "ring"


@pytest.mark.parametrize("world", [3, 5])
def test_a_peer_dies_in_a_ring(cluster: Cluster, world: int) -> None:
    """The survivors begin anew in the ring that is left."""
    *rest, victim = cluster.members(world)
    victim.ask("hook", phase="data", when="after", bytes=LARGE * 4 // 2)
    seed = cluster.rng.getrandbits(32)
    calls = [peer.call("all_reduce", seed=seed, count=LARGE, algorithm="ring") for peer in rest]
    victim.call("all_reduce", seed=seed, count=LARGE, algorithm="ring").died()
    info = cluster.check([call.value() for call in calls], seed, LARGE)
    assert info["algorithm"] == ("ring" if info["world_size"] > 2 else "direct")
    cluster.reduce(rest, algorithm="ring")
    cluster.agree(rest)


def test_rings_run_on_while_connections_break_somebody_comes_and_somebody_stops_reading(cluster: Cluster) -> None:
    """By a plan that wants the ring for all, which is carried to the newcomer and to the survivors."""
    peers, (newcomer,) = cluster.members(4), cluster.spawn(1)
    cluster.make([newcomer])
    cluster.master.plan_next(ring=[2, 0, 3, 1])
    meet(peers)
    seed, loops = cluster.rng.getrandbits(32), {}

    def begin(peer: Peer) -> None:
        loops[peer] = peer.call("loop", thread="loop", seed=seed, count=100_000, report=3)

    for peer in peers:
        begin(peer)
    for peer in peers:
        peer.wait_event("loop")
    for _ in range(4):
        cluster.rng.choice(peers).ask("cut", what="peers")
        assert cluster.reduce(peers, tag=1, dtype="int64", algorithm="auto")["algorithm"] == "ring"
    cluster.admit(peers, [newcomer])
    begin(newcomer)
    newcomer.wait_event("loop")
    stopped = cluster.rng.choice(peers)
    stopped.stop()
    rest = [peer for peer in (*peers, newcomer) if peer is not stopped]
    for peer in rest:
        peer.ask("wait_world", world=4)
    stopped.resume()
    loops.pop(stopped).error("EvictedError", "OutcomeUnknownError")
    for peer in rest:
        peer.ask("stop_loop")
    cluster.check_loops({peer: loop.value() for peer, loop in loops.items()}, seed, 100_000)
    assert cluster.reduce(rest, tag=1, dtype="int64", algorithm="auto")["algorithm"] == "ring"
    cluster.agree(rest)


def parts_are_right(cluster: Cluster, calls: Sequence[Call], seed: int, shape: list[int], **settings: Any) -> None:
    """Of those who called, in rank order."""
    values = {call.peer: call.value() for call in calls}
    peers = in_rank_order(list(values))
    count = shape[0] * shape[1]
    inputs = [draw(seed, peer.index, count, "float32").reshape(shape) for peer in peers]
    for peer, expected in zip(peers, pyccl.reference_reduce_scatter(inputs, **settings), strict=True):
        assert values[peer] == {"sha": sha(expected), "shape": list(expected.shape), "kept": True}, cluster.seed


def test_reduce_scatter_gives_each_its_rows_and_cuts_anew_after_a_loss(cluster: Cluster) -> None:
    first, last, victim = peers = cluster.members(3, max_upload="50mbit")  # the victim has more to send when it dies
    shapes = ([7, 11], [2, 300], [0, 4], [100_001, 3])
    for shape, algorithm in itertools.product(shapes, ("direct", "ring")):
        settings = {"op": "avg", "quantize": "uint8" if shape[0] == 7 else None, "algorithm": algorithm}
        calls = [peer.call("reduce_scatter", seed=5, shape=shape, **settings) for peer in peers]
        parts_are_right(cluster, calls, 5, shape, **settings)
    shape = [LARGE // 4, 4]
    victim.ask("hook", phase="data", when="after", bytes=LARGE)
    call = first.call("reduce_scatter", seed=6, shape=shape)
    victim.call("reduce_scatter", seed=6, shape=shape).died()  # before the last has called: three can't have ended it
    parts_are_right(cluster, [call, last.call("reduce_scatter", seed=6, shape=shape)], 6, shape)
    cluster.agree([first, last])


def test_reduce_scatter_goes_round_the_ring_of_the_plan_and_of_those_who_are_left(cluster: Cluster) -> None:
    peers = in_rank_order(cluster.members(4))
    victim = peers.pop(1)
    cluster.master.plan_next(shares=[0, 3, 1, 2], ring=[2, 0, 3, 1], ring_from_bytes=4000)
    meet([*peers, victim])
    shape = [1000, 1]
    calls = [peer.call("reduce_scatter", seed=7, shape=shape) for peer in (*peers, victim)]
    parts_are_right(cluster, calls, 7, shape, algorithm="ring", ring=[2, 0, 3, 1])
    shape = [LARGE // 4, 4]
    victim.ask("hook", phase="data", when="after", bytes=LARGE // 2)
    first, *others = peers
    begun = [peer.call("reduce_scatter", seed=8, shape=shape) for peer in others]
    victim.call("reduce_scatter", seed=8, shape=shape).died()
    late = first.call("reduce_scatter", seed=8, shape=shape)
    parts_are_right(cluster, [late, *begun], 8, shape, algorithm="ring", ring=[1, 0, 2])
    cluster.agree(peers)


def test_weights_of_a_reduce_scatter_that_add_up_to_nothing_are_an_error_on_all(cluster: Cluster) -> None:
    peers = cluster.members(3)
    for call in [peer.call("reduce_scatter", seed=1, shape=[6, 2], op="avg", weight=0.0) for peer in peers]:
        error = call.error("UsageError")
        assert error["restored"] and "add up to 0" in error["text"]
    cluster.reduce(peers)
