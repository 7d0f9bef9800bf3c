"""Every value of every collective against NumPy, bit for bit, while nothing goes wrong."""

from __future__ import annotations

import pytest
from cluster import Cluster
from oracle import DTYPES, FLOATS, OPS, draw, sha

PIECES = 10 * (1 << 18) + (1 << 17) + 1  # bytes: ten pieces and a half, and an element that does not divide


@pytest.mark.parametrize("world", [2, 3, 5])
def test_all_reduce_gives_the_bits_of_the_oracle_for_every_dtype_op_and_size(cluster: Cluster, world: int) -> None:
    peers = cluster.members(world)
    small = [0, 1, world - 1, world, 2 * world + 1, 1031]
    for dtype in DTYPES:
        for op in OPS if dtype in FLOATS else [o for o in OPS if o != "avg"]:
            for count in small:
                cluster.reduce(peers, count=count, dtype=dtype, op=op, out=count % 2 == 1)
            cluster.reduce(peers, count=1031, dtype=dtype, op=op, out=False, tag=2**32 - 1)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_all_reduce_of_several_pieces_gives_the_bits_of_the_oracle(cluster: Cluster, world: int) -> None:
    peers = cluster.members(world)
    for dtype, op, out in (("float32", "avg", False), ("int64", "sum", True), ("float64", "max", False)):
        count = PIECES // int(dtype[-2:]) * 8
        cluster.reduce(peers, count=count, dtype=dtype, op=op, out=out)
        cluster.reduce(peers, count=count, dtype=dtype, op=op, out=not out)
    cluster.reduce(peers, count=PIECES // 4 * world + 1, dtype="int32", op="prod")  # several pieces in each share


@pytest.mark.parametrize("dtype", FLOATS)
def test_special_floats_give_the_bits_of_the_oracle(cluster: Cluster, dtype: str) -> None:
    peers = cluster.members(3)
    for op in OPS:
        for out in (False, True):
            cluster.reduce(peers, count=4099, dtype=dtype, op=op, kind="special", out=out)


def test_broadcast_gives_everybody_the_bytes_of_each_root(cluster: Cluster) -> None:
    peers = cluster.members(3)
    for root in peers:
        for dtype in DTYPES:
            for count in (0, 1, 2, 1031, PIECES // 4):
                seed = cluster.rng.getrandbits(32)
                calls = [p.call("broadcast", seed=seed, count=count, dtype=dtype, root=root.id) for p in peers]
                expected = sha(draw(seed, root.index, count, dtype))
                assert [call.value()["sha"] for call in calls] == [expected] * 3, (dtype, count)


def test_barrier_returns_when_the_last_has_come(cluster: Cluster) -> None:
    first, second, last = cluster.members(3)
    waiting = [peer.call("barrier", thread="b", tag=1) for peer in (first, second)]
    cluster.reduce([first, second, last])  # the barriers wait beside it
    assert all(call.pending for call in waiting)
    for call in [last.call("barrier", tag=1), *waiting]:
        assert call.value()["info"]["world_size"] == 3


def test_fifty_tagged_operations_in_another_order_on_each_peer(cluster: Cluster) -> None:
    peers = cluster.members(3)
    seed = cluster.rng.getrandbits(32)
    counts = [cluster.rng.choice([0, 1, 2, 1000, 5000, 300_000]) for _ in range(50)]
    waits = {}
    for peer in peers:
        for tag in cluster.rng.sample(range(50), 50):
            wanted = {"seed": seed + tag, "count": counts[tag], "tag": tag, "out": tag % 2 == 0}
            peer.call("submit", name=str(tag), **wanted)
    for peer in peers:
        for tag in cluster.rng.sample(range(50), 50):
            waits[peer, tag] = peer.call("wait", name=str(tag))
    for tag in range(50):
        cluster.check([waits[peer, tag].value() for peer in peers], seed + tag, counts[tag])


def test_operations_of_one_tag_pair_up_in_their_order(cluster: Cluster) -> None:
    peers = cluster.members(2)
    seed = cluster.rng.getrandbits(32)
    for i in range(20):
        for peer in peers:
            peer.call("submit", name=str(i), seed=seed + i, count=100 + i, tag=5)
    for i in reversed(range(20)):
        cluster.check([peer.ask("wait", name=str(i)) for peer in peers], seed + i, 100 + i)


def test_an_operation_whose_handle_is_dropped_runs_to_its_end(cluster: Cluster) -> None:
    """Its arrays stay alive as long as the engine may touch them: here they are mapped, and would be unmapped."""
    peers = cluster.members(2)
    for tag in range(3):
        for peer in peers:
            peer.ask("drop", seed=1, count=10_000_000, kind="flat", tag=tag)
    cluster.reduce(peers, tag=3)
    for call in [peer.call("update_topology") for peer in peers]:  # the dropped ones end before it
        call.value()
    for peer in peers:
        peer.ask("close")
