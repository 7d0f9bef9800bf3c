"""Members that call different things get an error that says who and what, on all of them, and can go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cluster import Call, Cluster, Peer

GRACE_S = 0.5


@pytest.fixture
def peers(cluster: Cluster) -> list[Peer]:
    return cluster.members(3, mismatch_grace=GRACE_S)


def all_name(calls: list[Call], fields: list[str], involved: list[Peer]) -> None:
    for call in calls:
        error = call.error("MismatchError")
        assert error["fields"] == fields, error
        assert {peer.id for peer in involved} <= set(error["peers"]) <= {call.peer.id for call in calls}, error
        assert error.get("restored", True)


def opened(peers: list[Peer], do: str, **wanted: Any) -> list[Call]:
    """Calls that wait in their operations: a mismatch ends what is open, and nothing that comes later."""
    calls = [peer.call(do, **wanted) for peer in peers]
    for peer in peers:
        peer.ask("wait_blocked", thread="watch")
    return calls


@pytest.mark.parametrize(
    ("field", "spec"),
    [
        ("count", {"count": 1001}),
        ("dtype", {"dtype": "int32"}),
        ("op", {"op": "max"}),
        ("retry", {"retry": False}),
        ("codec, block", {"quantize": "fp4_e3m0"}),
        ("algorithm", {"algorithm": "ring"}),
        ("algorithm", {"algorithm": "direct"}),
    ],
)
def test_another_spec_is_an_error_on_all(cluster: Cluster, peers: list[Peer], field: str, spec: dict[str, Any]) -> None:
    cluster.reduce(peers)
    same = {"seed": 1, "count": 1000, "dtype": "float32", "op": "sum", "retry": True}
    odd = cluster.rng.choice(peers)
    calls = opened([peer for peer in peers if peer is not odd], "all_reduce", **same)
    all_name([*calls, odd.call("all_reduce", **{**same, **spec})], field.split(", "), [odd])
    cluster.reduce(peers)


def test_another_block_of_the_codec_is_an_error_on_all(cluster: Cluster, peers: list[Peer]) -> None:
    same = {"seed": 1, "count": 1000, "quantize": "uint8"}
    *rest, odd = peers
    calls = opened(rest, "all_reduce", **same)
    all_name([*calls, odd.call("all_reduce", **same, quantize_block=64)], ["block"], [odd])
    cluster.reduce(peers)


def test_another_codec_is_an_error_on_all(cluster: Cluster, peers: list[Peer]) -> None:
    same = {"seed": 1, "count": 1000}
    odd, *rest = peers
    calls = opened(rest, "all_reduce", **same, quantize="int8")
    all_name([*calls, odd.call("all_reduce", **same, quantize="fp8_e4m3")], ["codec"], [odd])
    cluster.reduce(peers)


def test_other_rows_of_a_reduce_scatter_are_an_error_on_all(cluster: Cluster, peers: list[Peer]) -> None:
    *rest, odd = peers
    calls = opened(rest, "reduce_scatter", seed=1, shape=[20, 50])
    all_name([*calls, odd.call("reduce_scatter", seed=1, shape=[50, 20])], ["root"], [odd])
    cluster.reduce(peers)


def test_weights_that_add_up_to_nothing_are_an_error_on_all_and_nothing_is_changed(
    cluster: Cluster, peers: list[Peer]
) -> None:
    epoch = cluster.reduce(peers)["epoch"]
    for call in [peer.call("all_reduce", seed=1, count=1000, op="avg", weight=0.0) for peer in peers]:
        error = call.error("UsageError")
        assert error["restored"] and "weights" in error["text"] and "add up to 0" in error["text"]
    assert cluster.reduce(peers)["epoch"] == epoch


def test_another_collective_is_an_error_on_all(cluster: Cluster, peers: list[Peer]) -> None:
    a, b, c = peers
    wanted = {"seed": 1, "count": 1000, "dtype": "float32"}
    calls = opened([a, b], "all_reduce", **wanted)
    all_name([*calls, c.call("broadcast", root=a.id, **wanted)], ["kind", "op", "algorithm", "root"], [c])
    calls = opened([b, c], "broadcast", root=b.id, **wanted)
    all_name([*calls, a.call("broadcast", root=a.id, **wanted)], ["root"], [a])
    cluster.reduce(peers)


def test_crossed_tags_are_an_error_on_all(cluster: Cluster, peers: list[Peer]) -> None:
    calls = [peer.call("all_reduce", seed=1, count=1000, tag=index) for index, peer in enumerate(peers)]
    all_name(calls, ["call"], peers)
    # all numbers start again at 0: also a tag that some have used and others have not
    for tag in range(3):
        cluster.reduce(peers, tag=tag)


def test_a_peer_at_the_safe_point_while_others_reduce_is_an_error_on_all(cluster: Cluster, peers: list[Peer]) -> None:
    safe, *rest = peers
    calls = [safe.call("update_topology"), *(peer.call("all_reduce", seed=1, count=1000) for peer in rest)]
    all_name(calls, ["call"], peers)
    for call in [peer.call("update_topology") for peer in peers]:
        call.value()
    cluster.reduce(peers)


def test_an_operation_that_one_skipped_before_the_safe_point_is_an_error_on_all(
    cluster: Cluster, peers: list[Peer]
) -> None:
    """All stand at the safe point, but below the cut is an operation that one of them never called."""
    skipper, *rest = peers
    for peer in rest:
        peer.ask("submit", name="x", seed=1, count=1000)
    reduces = [peer.call("wait", thread="reduce", name="x") for peer in rest]
    calls = [peer.call("update_topology") for peer in peers]
    for call in [*calls, *reduces]:
        error = call.error("MismatchError")
        assert skipper.id in error["peers"], error
    cluster.reduce(peers)
    cluster.agree(peers)


def test_a_peer_that_reduces_once_more_than_the_others_is_an_error_on_all(cluster: Cluster, peers: list[Peer]) -> None:
    a, b, c = peers
    a.ask("submit", name="extra", seed=1, count=1000, tag=7)
    calls = [peer.call("all_reduce", seed=2, count=1000) for peer in peers]
    cluster.check([call.value() for call in calls], 2, 1000)  # another tag is no obstacle
    calls = [a.call("wait", name="extra"), *(peer.call("update_topology") for peer in (b, c))]
    all_name(calls, ["call"], peers)
    cluster.reduce(peers, tag=7)


def test_a_straggler_is_no_mismatch(make_cluster: Callable[..., Cluster]) -> None:
    """Two wait for much longer than the grace; the third is just slow."""
    cluster = make_cluster()
    *rest, slow = cluster.members(3, mismatch_grace=0.2)
    seed = cluster.rng.getrandbits(32)
    for peer in rest:
        peer.ask("submit", name="x", seed=seed, count=1000)
    for call in [peer.call("wait", name="x", timeout=1.0) for peer in rest]:
        call.error("DeadlineError")
    late = slow.call("all_reduce", seed=seed, count=1000)
    cluster.check([*(peer.ask("wait", name="x") for peer in rest), late.value()], seed, 1000)


def test_mismatch_is_found_in_a_loss_too(cluster: Cluster, peers: list[Peer]) -> None:
    """The one that called something else dies before the others have learned of it."""
    a, b, victim = peers
    victim.ask("hook", phase="freeze")
    for peer in (a, b):  # open on both, or the verdict could come before a call that it does not end
        peer.ask("submit", name="x", seed=1, count=1000)
    victim.call("all_reduce", seed=1, count=1001).died()
    for call in [peer.call("wait", name="x") for peer in (a, b)]:
        assert call.error("MismatchError")["restored"]
    cluster.reduce([a, b])
