"""Every value of every collective against the oracle, bit for bit, while nothing goes wrong.

The groups of the drawn cases live as long as this module, so that hundreds of calls take seconds. Replay a failure
with PYCCL_TEST_SEED=<the seed it printed>; PYCCL_TEST_LONG=1 draws more.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from cases import check_cases, draw_cases
from cluster import Cluster, Peer
from zygote import Zygote

from pyccl._native._pyccl import lib
from pyccl.codecs import CODECS, size_bytes

LONG = os.environ.get("PYCCL_TEST_LONG") == "1"
AT_ONCE = 25  # cases in one command: none takes long, so each answer guards against a hang


@pytest.fixture(scope="module", params=[2, 3, 5, 8])
def group(request: pytest.FixtureRequest, zygote: Zygote) -> Iterator[tuple[Cluster, list[Peer]]]:
    """Members in rank order."""
    with Cluster(zygote, request.param, peer_timeout=30.0) as cluster:
        yield cluster, sorted(cluster.members(request.param), key=lambda peer: peer.id)


def run_drawn(peers: list[Peer], seed: int, rounds: int) -> None:
    cases = draw_cases(seed, len(peers), rounds)
    for first in range(0, len(cases), AT_ONCE):
        some = cases[first : first + AT_ONCE]
        calls = [peer.call("cases", seed=seed, rounds=rounds, first=first, last=first + AT_ONCE) for peer in peers]
        check_cases(seed, len(peers), some, [call.value() for call in calls])


def test_drawn_calls_give_the_bits_of_the_oracle_on_every_member(group: tuple[Cluster, list[Peer]], seed: int) -> None:
    _, peers = group
    run_drawn(peers, seed, 5 if LONG else 2)


def kernels_here() -> list[str]:
    """Instruction sets that this CPU has."""
    found = [k for k in ("scalar", "avx2", "avx512", "neon") if lib.pyccl_kernel_select(k.encode()) == lib.PYCCL_OK]
    assert lib.pyccl_kernel_select(b"auto") == lib.PYCCL_OK
    return found


def test_members_with_different_instruction_sets_give_the_bits_of_the_oracle(
    group: tuple[Cluster, list[Peer]], seed: int
) -> None:
    _, peers = group
    kernels = kernels_here()
    try:
        for i, peer in enumerate(peers):
            wanted = kernels[(i + seed) % len(kernels)]  # two members: any two of them
            assert peer.ask("kernel", name=wanted) == wanted
        run_drawn(peers, seed, 5 if LONG else 1)
    finally:
        for peer in peers:
            peer.ask("kernel", name="auto")


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


@pytest.mark.parametrize("codec", CODECS)
def test_info_counts_the_encoded_bytes_of_a_codec(cluster: Cluster, codec: str) -> None:
    """Each of three sends two thirds of the vector to the owners and its own third twice."""
    peers, count, block = cluster.members(3), 3 * 64 * 100, 64
    calls = [peer.call("all_reduce", seed=9, count=count, quantize=codec, quantize_block=block) for peer in peers]
    values = [call.value() for call in calls]
    cluster.check(values, 9, count, quantize=codec, quantize_block=block)
    for value in values:
        assert value["info"]["tx_bytes"] == value["info"]["rx_bytes"] == size_bytes(codec, block, count) * 4 // 3
