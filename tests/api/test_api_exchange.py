"""exchange(): two members swap, nobody else is involved, whatever the others do meanwhile."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from cluster import Call, Cluster, Peer
from oracle import DTYPES, draw, sha

LARGE = 4_000_000  # float32 elements: sixteen pieces, so that a death finds it half sent
GRACE_S = 0.5


def swap(a: Peer, b: Peer, seed: int, count: int = 1000, **wanted: Any) -> list[Call]:
    """Both call it with each other."""
    return [p.call("exchange", partner=q.id, seed=seed, count=count, **wanted) for p, q in ((a, b), (b, a))]


def swapped(calls: list[Call], seed: int, count: int = 1000, dtype: str = "float32") -> dict[str, Any]:
    """Each has what the other had; returns the info, which is of the two."""
    values = [call.value() for call in calls]
    bits = "int16" if dtype == "bfloat16" else dtype
    ids = sorted(call.peer.id for call in calls)
    for value, partner in zip(values, reversed(calls), strict=True):
        assert value["sha"] == sha(draw(seed, partner.peer.index, count, bits)), (dtype, count)
        assert value["kept"]
        assert value["info"]["members"] == ids and value["info"]["world_size"] == 2
    infos = [{k: value["info"][k] for k in ("members", "epoch", "attempts")} for value in values]
    assert infos[0] == infos[1]
    info: dict[str, Any] = values[0]["info"]
    return info


def waits(peer: Peer) -> None:
    """Until a thread of it waits for an operation."""
    peer.ask("wait_blocked", thread="watch")


def test_each_of_a_pair_gets_the_bytes_of_the_other_for_every_dtype_and_size(cluster: Cluster) -> None:
    a, b, _ = cluster.members(3)
    for dtype in (*DTYPES, "bfloat16"):
        for count in (0, 1, 3, 1031):
            for out in (True, False):
                seed = cluster.rng.getrandbits(32)
                info = swapped(swap(a, b, seed, count, dtype=dtype, out=out), seed, count, dtype)
                assert info["tx_bytes"] == info["rx_bytes"] and info["attempts"] == 1
    for out in (True, False):
        seed = cluster.rng.getrandbits(32)
        info = swapped(swap(a, b, seed, LARGE + 1, out=out, tag=2**32 - 1), seed, LARGE + 1)
        assert info["tx_bytes"] == 4 * (LARGE + 1)


def test_pairs_exchange_at_once_with_one_tag_in_any_order(cluster: Cluster) -> None:
    """Two pairs, and then each with each: the n-th of a pair and a tag on one side is the n-th on the other."""
    peers = cluster.members(4)
    rng = cluster.rng
    for _ in range(5):
        a, b, c, d = rng.sample(peers, 4)
        seed = rng.getrandbits(32)
        one, two = swap(a, b, seed, 100_000, tag=7), swap(c, d, seed, 100_000, tag=7)
        swapped(two, seed, 100_000)
        swapped(one, seed, 100_000)
    pairs = [(p, q) for i, p in enumerate(peers) for q in peers[i + 1 :]]
    calls: dict[tuple[Peer, Peer, int], list[Call]] = {}
    for number in range(3):  # each pair in a thread of its own on both sides: six exchanges of one tag at a time
        for p, q in rng.sample(pairs, len(pairs)):
            name = f"{p.index}{q.index}"
            calls[p, q, number] = swap(p, q, 1000 * number + p.index, 500 + number, tag=7, thread=name)
    for (p, _, number), both in calls.items():
        swapped(both, 1000 * number + p.index, 500 + number)


def test_exchange_goes_on_beside_a_collective_that_waits_for_others(cluster: Cluster) -> None:
    a, b, c, late = peers = cluster.members(4)
    seed = cluster.rng.getrandbits(32)
    reduces = [peer.call("all_reduce", thread="r", seed=seed, count=1000) for peer in (a, b, c)]
    for peer in (a, b, c):
        waits(peer)
    for number in range(3):
        swapped(swap(a, b, seed + number, 5000), seed + number, 5000)
    assert all(call.pending for call in reduces)
    reduces.append(late.call("all_reduce", thread="r", seed=seed, count=1000))
    cluster.check([call.value() for call in reduces], seed, 1000)
    cluster.agree(peers)


@pytest.mark.parametrize(("phase", "when"), [("submit", "before"), ("submit", "after"), ("data", "after")])
@pytest.mark.parametrize("out", [True, False])
def test_partner_dies_and_the_input_is_there_again(cluster: Cluster, phase: str, when: str, out: bool) -> None:
    a, victim, other = cluster.members(3)
    victim.ask("hook", phase=phase, when=when, bytes=LARGE // 2)
    count = LARGE if phase == "data" else 1000
    call, lost = swap(a, victim, 1, count, out=out)
    lost.died()
    answer = call.answer()
    if "value" in answer:  # all was on its way when the death came, and so all is held
        assert (phase, when) != ("submit", "before")
        assert answer["value"]["sha"] == sha(draw(1, victim.index, count, "float32")) and answer["value"]["kept"]
    else:
        error = call.error("PeerLostError")
        assert error["restored"] and error["peer"] == victim.id
    for peer in (a, other):
        peer.ask("wait_world", world=2)
    error = a.call("exchange", partner=victim.id, seed=1, count=10).error("PeerLostError")
    assert "no member" in error["text"] and error["peer"] == victim.id
    seed = cluster.rng.getrandbits(32)
    swapped(swap(a, other, seed), seed)
    cluster.reduce([a, other])


def test_partner_that_dies_after_its_commit_leaves_the_result(cluster: Cluster) -> None:
    a, victim, _ = cluster.members(3)
    victim.ask("hook", phase="commit", when="before")
    call, lost = swap(a, victim, 5)
    lost.died()
    assert call.value()["sha"] == sha(draw(5, victim.index, 1000, "float32"))


def test_last_partner_that_dies_is_a_lost_peer_too(cluster: Cluster) -> None:
    """Nobody else is left, but the call was for that one."""
    a, victim = cluster.members(2)
    victim.ask("hook", phase="submit")
    call, lost = swap(a, victim, 1)
    lost.died()
    error = call.error("PeerLostError")
    assert error["restored"] and error["peer"] == victim.id


@pytest.mark.parametrize("lowest", [True, False], ids=["lowest id dies", "highest id dies"])
def test_loss_of_somebody_else_only_repeats_it(cluster: Cluster, lowest: bool) -> None:
    """Also where the ranks of the pair move with the loss. One of the pair submits after it: numbers are kept."""
    peers = cluster.members(4)
    victim = sorted(peers, key=lambda peer: peer.id)[0 if lowest else -1]
    a, b, c = (peer for peer in peers if peer is not victim)
    seed = cluster.rng.getrandbits(32)
    swapped(swap(a, b, seed), seed)
    early = a.call("exchange", partner=b.id, seed=seed + 1, count=5000)
    waits(a)
    victim.kill()
    for peer in (a, b, c):
        peer.ask("wait_world", thread="w", world=3)
    calls = [early, b.call("exchange", partner=a.id, seed=seed + 1, count=5000)]
    info = [call.value()["info"] for call in calls]
    assert [i["attempts"] for i in info] == [2, 1] and info[0]["epoch"] == info[1]["epoch"]
    assert calls[0].value()["sha"] == sha(draw(seed + 1, b.index, 5000, "float32"))
    assert calls[1].value()["sha"] == sha(draw(seed + 1, a.index, 5000, "float32"))
    for x, y in ((a, b), (b, c), (a, c)):
        swapped(swap(x, y, seed), seed)


def test_somebody_else_dies_in_the_middle_of_the_bytes(cluster: Cluster) -> None:
    a, b, victim = cluster.members(3)
    seed = cluster.rng.getrandbits(32)
    a.ask("hook", phase="data", when="after", bytes=LARGE, action="tell")
    calls = swap(a, b, seed, LARGE)
    a.wait_event("hook", phase="data")
    victim.kill()
    swapped_values = [call.value() for call in calls]
    for value, partner in zip(swapped_values, reversed(calls), strict=True):
        assert value["sha"] == sha(draw(seed, partner.peer.index, LARGE, "float32"))
    for peer in (a, b):
        peer.ask("wait_world", world=2)
    swapped(swap(a, b, seed + 1), seed + 1)


@pytest.mark.parametrize(("field", "spec"), [("count", {"count": 1001}), ("dtype", {"dtype": "int32"})])
def test_arrays_of_two_kinds_are_an_error_that_names_the_two(
    cluster: Cluster, field: str, spec: dict[str, Any]
) -> None:
    a, b, other = peers = cluster.members(3)
    same = {"seed": 1, "count": 1000, "dtype": "float32"}
    call = a.call("exchange", partner=b.id, **same)
    waits(a)
    for failed in (call, b.call("exchange", partner=a.id, **{**same, **spec})):
        error = failed.error("MismatchError")
        assert error["fields"] == [field] and sorted(error["peers"]) == sorted([a.id, b.id]), error
        assert error["restored"]
    seed = cluster.rng.getrandbits(32)
    swapped(swap(a, b, seed), seed)
    cluster.reduce(peers)
    cluster.agree([a, b, other])


def test_ring_of_exchanges_is_an_error_though_a_fourth_does_nothing(cluster: Cluster) -> None:
    a, b, c, idle = peers = cluster.members(4, mismatch_grace=GRACE_S)
    ring = [p.call("exchange", partner=q.id, seed=1, count=1000) for p, q in ((a, b), (b, c), (c, a))]
    for call in ring:
        error = call.error("MismatchError")
        assert sorted(error["peers"]) == sorted(peer.id for peer in (a, b, c)), error
        assert error["fields"] == ["call"] and error["restored"]
    seed = cluster.rng.getrandbits(32)
    swapped(swap(a, idle, seed), seed)
    cluster.reduce(peers)


def test_two_with_crossed_tags_are_an_error(cluster: Cluster) -> None:
    a, b, _ = cluster.members(3, mismatch_grace=GRACE_S)
    calls = [p.call("exchange", partner=q.id, seed=1, count=9, tag=t) for p, q, t in ((a, b, 1), (b, a, 2))]
    for call in calls:
        assert call.error("MismatchError")["restored"]
    swapped(swap(a, b, 3), 3)


def test_partner_at_the_safe_point_is_an_error_on_all(cluster: Cluster) -> None:
    a, b, c = peers = cluster.members(3, mismatch_grace=GRACE_S)
    calls = [a.call("exchange", partner=b.id, seed=1, count=1000), *(p.call("update_topology") for p in (b, c))]
    for call in calls:
        error = call.error("MismatchError")
        assert error["fields"] == ["call"] and set(error["peers"]) == {peer.id for peer in peers}
    for call in [peer.call("update_topology") for peer in peers]:
        call.value()
    swapped(swap(a, b, 3), 3)


def test_wait_for_a_slow_partner_is_no_mismatch(cluster: Cluster) -> None:
    """Two of the three wait for one that is just slow, for much longer than the grace."""
    a, b, slow = cluster.members(3, mismatch_grace=0.2)
    calls = [p.call("exchange", partner=q.id, seed=1, count=1000) for p, q in ((a, b), (b, slow))]
    reduce = a.call("all_reduce", thread="r", seed=1, count=10, timeout=1.5)
    reduce.error("DeadlineError")  # by then the others have waited for long
    assert all(call.pending for call in calls)
    calls += [slow.call("exchange", partner=b.id, seed=1, count=1000)]
    swapped(calls[1:], 1)
    swapped([calls[0], b.call("exchange", partner=a.id, seed=1, count=1000)], 1)


def test_exchange_below_the_cut_runs_in_the_old_epoch_though_a_newcomer_waits(cluster: Cluster) -> None:
    """One of the pair stands at the safe point with it open; the other submits it there, after all have arrived."""
    a, b, c, newcomer = cluster.spawn(4)
    cluster.make([a, b, c, newcomer])
    a.ask("connect")
    cluster.admit([a], [b, c])
    before = a.call("members").answer()["view"]["epoch"]
    join = newcomer.call("connect")
    a.ask("wait_pending", count=1)
    early = a.call("exchange", thread="x", partner=b.id, seed=1, count=5000)
    waits(a)
    points = [peer.call("update_topology") for peer in (a, b, c)]
    for peer in (a, b, c):
        peer.ask("wait_safe_point", thread="watch")
    late = b.call("exchange", thread="x", partner=a.id, seed=1, count=5000)
    assert swapped([early, late], 1, 5000)["epoch"] == before
    for call in [*points, join]:
        call.value()
    assert swapped(swap(c, newcomer, 2), 2)["epoch"] == before + 1
    swapped(swap(a, b, 3), 3)  # numbers start again at 0 for those who had some


def test_exchanges_of_others_hold_up_no_safe_point(cluster: Cluster) -> None:
    a, b, c = cluster.members(3)
    for number in range(3):
        swapped(swap(a, b, number), number)
    for call in [peer.call("update_topology") for peer in (a, b, c)]:
        call.value()
    for number in range(2):
        swapped(swap(b, c, number), number)


def test_deadline_on_one_fails_it_on_the_other_and_spends_its_number(cluster: Cluster) -> None:
    hasty, late, other = peers = cluster.members(3)
    assert hasty.call("exchange", partner=late.id, seed=1, count=9, timeout=0.3).error("DeadlineError")["restored"]
    swapped(swap(hasty, other, 2), 2)
    assert late.call("exchange", partner=hasty.id, seed=1, count=9).error("DeadlineError")["restored"]
    swapped(swap(hasty, late, 3), 3)
    cluster.reduce(peers)


def test_ctrl_c_ends_it_and_the_partner_is_told(cluster: Cluster) -> None:
    a, b, _ = cluster.members(3)
    call = a.call("exchange", partner=b.id, seed=1, count=100_000, timeout=600)
    waits(a)
    a.signal(signal.SIGINT)
    assert call.error("KeyboardInterrupt")["restored"]
    assert b.call("exchange", partner=a.id, seed=1, count=100_000).error("PeerLostError")["restored"]
    swapped(swap(a, b, 3), 3)


def test_close_in_another_thread_ends_it_and_the_partner_has_lost_a_peer(cluster: Cluster) -> None:
    a, b, c = cluster.members(3)
    call = a.call("exchange", partner=b.id, seed=1, count=1000)
    other = b.call("exchange", partner=a.id, seed=1, count=1000, tag=1)
    waits(a)
    waits(b)
    a.ask("close", thread="closer")
    assert call.error("UsageError")["restored"]
    error = other.error("PeerLostError")
    assert error["restored"] and error["peer"] == a.id
    swapped(swap(b, c, 3), 3)


def test_partner_that_is_no_member_is_an_error_at_once(cluster: Cluster) -> None:
    a, b = cluster.members(2)
    (stranger,) = cluster.spawn(1)
    cluster.make([stranger])
    error = a.call("exchange", partner=stranger.id, seed=1, count=9).error("PeerLostError")
    assert "no member of epoch" in error["text"] and error["peer"] == stranger.id and error["restored"]
    assert "this peer itself" in a.call("exchange", partner=a.id, seed=1, count=9).error("UsageError")["text"]
    swapped(swap(a, b, 3), 3)
