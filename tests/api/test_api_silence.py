"""SIGSTOP: who is silent for longer than peer_timeout goes, who pauses for less stays."""

from __future__ import annotations

from collections.abc import Callable

from cluster import Cluster


def test_a_peer_that_is_stopped_is_evicted_and_comes_back_as_a_newcomer(cluster: Cluster) -> None:
    *rest, stopped = peers = cluster.members(3)
    for peer in peers:
        peer.ask("state", arrays={"w": {"seed": 5, "index": 0, "count": 10_000, "dtype": "float32"}}, revision=1)
    assert all(call.value()["changed"] == [] for call in [peer.call("sync") for peer in peers])
    stopped.stop()
    info = cluster.reduce(rest)  # waits until the master has given it up
    assert info["attempts" if "attempts" in info else "world_size"] == 2
    for peer in rest:
        peer.ask("poke", name="w", at=7, value=77)
        peer.ask("advance")
    assert len({call.value()["state"]["digest"] for call in [peer.call("sync") for peer in rest]}) == 1
    late = stopped.call("all_reduce", seed=1, count=1000)
    stopped.resume()
    assert late.error("EvictedError")["restored"]
    stopped.call("update_topology").error("EvictedError")
    cluster.admit(rest, [stopped])
    synced = [call.value() for call in [peer.call("sync") for peer in peers]]
    assert [info["changed"] for info in synced] == [[], [], ["w"]]
    assert {info["revision"] for info in synced} == {2}
    cluster.reduce(peers)


def test_an_operation_that_the_stopped_peer_had_begun_ends_for_the_others(cluster: Cluster) -> None:
    *rest, stopped = peers = cluster.members(3)
    stopped.ask("hook", phase="data", when="after", action="stop", bytes=4_000_000)
    seed, count = cluster.rng.getrandbits(32), 4_000_000
    calls = [peer.call("all_reduce", seed=seed, count=count) for peer in peers]
    stopped.wait_event("hook")
    info = cluster.check([call.value() for call in calls[:2]], seed, count)
    stopped.resume()
    if info["world_size"] == 3:  # it had sent everything before it stood still
        answer = calls[2].answer()
        assert "value" in answer or answer["error"]["class"] in ("EvictedError", "OutcomeUnknownError")
    else:
        assert calls[2].error("EvictedError")["restored"]
    cluster.reduce(rest)


def test_an_idle_peer_that_is_stopped_is_evicted_too(cluster: Cluster) -> None:
    *rest, stopped = cluster.members(3)
    stopped.stop()
    for peer in rest:
        peer.ask("wait_world", world=2)
    stopped.resume()
    cluster.reduce(rest)


def test_a_short_pause_evicts_nobody(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(peer_timeout=10)
    *rest, paused = peers = cluster.members(3)
    before = cluster.reduce(peers)["epoch"]
    paused.stop()
    seed = cluster.rng.getrandbits(32)
    for peer in rest:
        peer.ask("submit", name="x", seed=seed, count=1000)
    for peer in rest:  # it waits, and the wait that ends aborts nothing
        peer.call("wait", name="x", timeout=0.5).error("DeadlineError")
        assert peer.ask("done", name="x") is False
    late = paused.call("all_reduce", seed=seed, count=1000)
    paused.resume()
    info = cluster.check([*(peer.ask("wait", name="x") for peer in rest), late.value()], seed, 1000)
    assert (info["world_size"], info["epoch"]) == (3, before)
    cluster.reduce(peers)


def test_everybody_pauses_and_nobody_is_evicted(make_cluster: Callable[..., Cluster]) -> None:
    """A suspended machine: master and peers stand still for longer than peer_timeout, all of them."""
    cluster = make_cluster(peer_timeout=1)
    *peers, clock = cluster.members(4)
    clock.ask("close")
    before = cluster.reduce(peers)["epoch"]
    for process in [cluster.master, *peers]:
        process.stop()
    clock.ask("sleep", seconds=2.5)  # the pause itself, not a wait for something
    for process in [*peers, cluster.master]:
        process.resume()
    assert cluster.reduce(peers)["epoch"] == before
