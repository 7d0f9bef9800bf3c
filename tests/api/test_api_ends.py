"""How a call ends early: deadlines, Ctrl-C, close() in another thread."""

from __future__ import annotations

import signal

from cluster import Cluster, Peer


def test_a_deadline_on_one_fails_the_same_operation_on_all(cluster: Cluster) -> None:
    hasty, patient, late = peers = cluster.members(3)
    calls = [hasty.call("all_reduce", seed=1, count=1000, timeout=0.3), patient.call("all_reduce", seed=1, count=1000)]
    for call in calls:
        assert call.error("DeadlineError")["restored"]
    # its number is spent: who comes late fails too, and the next one pairs up again
    assert late.call("all_reduce", seed=1, count=1000).error("DeadlineError")["restored"]
    assert cluster.reduce(peers)["world_size"] == 3


def test_a_deadline_beside_other_tags_disturbs_none_of_them(cluster: Cluster) -> None:
    hasty, patient, late = peers = cluster.members(3)
    failed = [
        hasty.call("all_reduce", thread="a", seed=1, count=1000, tag=1, timeout=0.3),
        patient.call("all_reduce", thread="a", seed=1, count=1000, tag=1),
    ]
    for _ in range(10):
        cluster.reduce(peers)
    for call in failed:
        call.error("DeadlineError")
    late.call("all_reduce", seed=1, count=1000, tag=1).error("DeadlineError")
    cluster.reduce(peers, tag=1)


def test_ctrl_c_ends_a_blocked_all_reduce_and_the_others_are_told(cluster: Cluster) -> None:
    interrupted, other, late = peers = cluster.members(3)
    calls = [peer.call("all_reduce", seed=1, count=100_000, timeout=600) for peer in (interrupted, other)]
    blocked(interrupted)
    interrupted.signal(signal.SIGINT)
    assert calls[0].error("KeyboardInterrupt")["restored"]
    assert calls[1].error("PeerLostError")["restored"]
    assert late.call("all_reduce", seed=1, count=100_000).error("PeerLostError")["restored"]
    cluster.reduce(peers)


def blocked(peer: Peer) -> None:
    """Until a thread of it waits for an operation."""
    peer.ask("wait_blocked", thread="watch")


MANY = 10_000  # operations of one member may be 4,096 ahead of another


def test_a_member_far_ahead_of_the_others_waits_for_them(cluster: Cluster) -> None:
    first, *late = cluster.members(3)
    calls = [first.call("run_ahead", calls=MANY, factor=1)]
    first.wait_event("submitted")
    calls += [peer.call("run_ahead", calls=MANY, factor=factor) for peer, factor in zip(late, (2, 3), strict=True)]
    for call in calls:
        assert call.value() == [6 * k for k in range(MANY)]


def test_calls_given_up_by_thousands_are_followed_by_one_that_works(cluster: Cluster) -> None:
    hasty, *late = peers = cluster.members(3)
    many = MANY // 2
    failed = ["DeadlineError restored"] * many
    assert hasty.call("call_in_vain", calls=many, timeout=0.05).value() == failed
    again = hasty.call("all_reduce", seed=1, count=1000)  # behind thousands that the others have not called
    for call in [peer.call("call_in_vain", calls=many, timeout=60) for peer in late]:
        assert call.value() == failed
    calls = [again, *(peer.call("all_reduce", seed=1, count=1000) for peer in late)]
    cluster.check([call.value() for call in calls], 1, 1000)
    assert cluster.reduce(peers)["world_size"] == 3


def test_ctrl_c_ends_a_call_that_waits_for_room_and_its_number_is_taken(cluster: Cluster) -> None:
    hasty, *late = peers = cluster.members(3)
    many = MANY // 2
    assert "OK" not in hasty.call("call_in_vain", calls=many, timeout=0.05).value()
    call = hasty.call("all_reduce", seed=1, count=1000, timeout=600)
    blocked(hasty)
    hasty.signal(signal.SIGINT)
    assert call.error("KeyboardInterrupt")["restored"]
    for call in [peer.call("call_in_vain", calls=many + 1, timeout=60) for peer in late]:
        assert call.value() == ["DeadlineError restored"] * many + ["PeerLostError restored"]
    cluster.reduce(peers)


def test_ctrl_c_at_the_safe_point_takes_the_peer_back_from_it(cluster: Cluster) -> None:
    interrupted, *rest = peers = cluster.members(3)
    calls = [peer.call("update_topology") for peer in (interrupted, rest[0])]
    interrupted.ask("wait_safe_point", thread="watch")
    interrupted.signal(signal.SIGINT)
    calls[0].error("KeyboardInterrupt")
    before = interrupted.call("members").answer()["view"]["epoch"]
    calls = [calls[1], *(peer.call("update_topology") for peer in (interrupted, rest[1]))]
    for call in calls:
        call.value()
        assert call.answer()["view"]["epoch"] == before + 1
    cluster.reduce(peers)


def test_ctrl_c_ends_connect_and_state_sync(cluster: Cluster) -> None:
    member, = cluster.members(1)
    newcomer, = cluster.spawn(1)
    cluster.make([newcomer])
    join = newcomer.call("connect")
    member.ask("wait_pending", count=1)
    newcomer.signal(signal.SIGINT)
    join.error("KeyboardInterrupt")
    assert newcomer.ask("resources")["now"]["threads"] == ["MainThread"]
    cluster.admit([member], [newcomer])
    for peer in (member, newcomer):
        peer.ask("state", arrays={"w": {"seed": 1, "index": 0, "count": 1000, "dtype": "float32"}}, revision=1)
    sync = newcomer.call("sync")
    blocked(newcomer)
    newcomer.signal(signal.SIGINT)
    assert sync.error("KeyboardInterrupt")["restored"]
    assert member.call("sync").error("PeerLostError")["restored"]
    for call in [peer.call("sync") for peer in (member, newcomer)]:
        assert call.value()["changed"] == []


def test_close_ends_an_all_reduce_of_another_thread(cluster: Cluster) -> None:
    closing, *rest = peers = cluster.members(3)
    call = closing.call("all_reduce", thread="reduce", seed=1, count=1000, timeout=600)
    blocked(closing)
    calls = [peer.call("all_reduce", seed=1, count=1000) for peer in rest[:1]]
    closing.ask("close")
    assert call.error("UsageError")["restored"]
    calls.append(rest[1].call("all_reduce", seed=1, count=1000))
    assert cluster.check([call.value() for call in calls], 1, 1000)["world_size"] == 2
    closing.call("all_reduce", seed=1, count=1000).error("UsageError")
    closing.ask("close")  # idempotent
    cluster.admit(rest, [closing])
    cluster.reduce(peers)


def test_close_ends_a_connect_of_another_thread(cluster: Cluster) -> None:
    member, = cluster.members(1)
    newcomer, = cluster.spawn(1)
    cluster.make([newcomer])
    join = newcomer.call("connect", thread="join")
    member.ask("wait_pending", count=1)
    newcomer.ask("close")
    join.error("UsageError")
    cluster.admit([member], [newcomer])
    cluster.reduce([member, newcomer])


def test_a_safe_point_that_one_never_reaches_ends_with_its_deadline(cluster: Cluster) -> None:
    *rest, absent = peers = cluster.members(3)
    for call in [peer.call("update_topology", timeout=0.5) for peer in rest]:
        call.error("DeadlineError")
    before = cluster.reduce(peers)["epoch"]
    for call in [peer.call("update_topology") for peer in peers]:
        call.value()
    assert cluster.reduce(peers)["epoch"] == before + 1
    assert absent.ask("members") == sorted(peer.id for peer in peers)


def test_an_outcome_that_can_not_be_learned_is_told_as_unknown(cluster: Cluster) -> None:
    """One holds the whole result and has said so; the other stands still and there is no master to ask."""
    asking, stopped = cluster.members(2)
    stopped.ask("hook", phase="data", action="stop", bytes=4000)
    late = stopped.call("all_reduce", seed=5, count=1000)
    stopped.wait_event("hook")
    cluster.master.kill()
    call = asking.call("all_reduce", seed=5, count=1000, timeout=0.5)
    assert call.error("OutcomeUnknownError")["restored"]
    asking.call("barrier").error("OutcomeUnknownError")
    asking.call("update_topology").error("OutcomeUnknownError")
    stopped.resume()
    cluster.check([late.value()], 5, 1000)  # it had the data and the word of the other: committed


def test_a_wait_that_runs_out_aborts_nothing(cluster: Cluster) -> None:
    early, late = peers = cluster.members(2)
    early.ask("submit", name="x", seed=9, count=1000, out=True)
    early.call("wait", name="x", timeout=0.05).error("DeadlineError")
    assert early.ask("done", name="x") is False
    late.ask("submit", name="x", seed=9, count=1000)
    values = [peer.ask("wait", name="x") for peer in peers]
    cluster.check(values, 9, 1000)
    assert early.ask("done", name="x") is True
    assert early.ask("wait", name="x") == values[0]  # again, and the same
