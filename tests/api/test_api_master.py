"""The master away: collectives go on, what needs it says so, and when it is back so is everything."""

from __future__ import annotations

import signal

from cluster import Cluster


def test_collectives_go_on_while_the_master_is_stopped(cluster: Cluster) -> None:
    peers = cluster.members(3, reach_timeout=0.5)
    newcomer = cluster.spawn(1)[0]
    cluster.make([newcomer])
    before = cluster.reduce(peers)["epoch"]
    seed = cluster.rng.getrandbits(32)
    loops = {peer: peer.call("loop", thread="loop", seed=seed, report=20) for peer in peers}
    for peer in peers:
        peer.wait_event("loop")
    cluster.master.stop()
    # what needs the master: a safe point ends with an error, and the operations beside it are none the worse
    for call in [peer.call("update_topology") for peer in peers]:
        call.error("MasterUnavailableError")
    newcomer.call("connect", reach_timeout=0.5).error("MasterUnavailableError")
    for peer in peers:
        peer.ask("stop_loop")
    records = {peer: loop.value() for peer, loop in loops.items()}
    cluster.check_loops(records, seed)
    assert {record["epoch"] for steps in records.values() for record in steps} == {before}
    cluster.master.resume()
    assert cluster.reduce(peers)["epoch"] == before  # nobody was evicted for the master's silence
    # as a program would: the master may still see the newcomer's first attempt come and go
    for call in [newcomer.call("connect"), *(peer.call("grow", world=4) for peer in peers)]:
        call.value()
    cluster.reduce([*peers, newcomer])


def test_a_connection_on_which_the_master_is_silent_gives_way_to_a_new_one(cluster: Cluster) -> None:
    peers = cluster.members(3)
    epoch = cluster.reduce(peers)["epoch"]
    cluster.master.stop()
    for peer in peers:
        peer.wait_log("silent for")
    assert cluster.reduce(peers)["epoch"] == epoch
    cluster.master.resume()
    for peer in peers:
        cluster.master.wait_log(f"peer_resumed peer={peer.id[:8]}")
    for call in [peer.call("update_topology") for peer in peers]:
        call.value()
    assert cluster.reduce(peers)["epoch"] == epoch + 1


def test_a_safe_point_after_a_long_absence_gives_the_master_its_time(cluster: Cluster) -> None:
    peers = cluster.members(2, reach_timeout=3.0)
    cluster.master.stop()
    for call in [peer.call("update_topology") for peer in peers]:
        call.error("MasterUnavailableError")
    # away for longer than a call waits; each of these calls waits anew, and so sees it come back
    calls = [peer.call("update_topology", thread="safe point") for peer in peers]
    for peer in peers:
        peer.ask("wait_safe_point")
        peer.ask("wait_watched")
    cluster.master.resume()
    for call in calls:
        call.value()


def test_collectives_go_on_after_the_master_was_killed(cluster: Cluster) -> None:
    peers = cluster.members(3, reach_timeout=0.5)
    seed = cluster.rng.getrandbits(32)
    loops = {peer: peer.call("loop", thread="loop", seed=seed, report=20) for peer in peers}
    for peer in peers:
        peer.wait_event("loop")
    cluster.master.kill()
    for _ in range(20):
        cluster.reduce(peers, tag=1)
    for peer in peers:
        peer.ask("stop_loop")
    cluster.check_loops({peer: loop.value() for peer, loop in loops.items()}, seed)
    for call in [peer.call("update_topology") for peer in peers]:
        call.error("MasterUnavailableError")
    assert [call.value() for call in [peer.call("are_peers_pending") for peer in peers]] == [False] * 3
    for peer in peers:
        peer.ask("state", arrays={"w": {"seed": peer.index, "count": 100, "dtype": "float32"}}, revision=1)
    assert len({call.value()["state"]["digest"] for call in [peer.call("sync") for peer in peers]}) == 1
    # nobody can settle a loss now: an operation that waits for no master ends with its own deadline, on all
    *rest, victim = peers
    victim.kill()
    for call in [peer.call("all_reduce", seed=1, count=100, timeout=1.0) for peer in rest]:
        assert call.error("DeadlineError")["restored"]
    for peer in rest:
        peer.ask("close")


def test_an_operation_with_a_lost_peer_waits_for_an_absent_master_no_longer_than_master_timeout(
    cluster: Cluster,
) -> None:
    peers = cluster.members(3, master_timeout=1.0)
    cluster.master.kill()
    *rest, victim = peers
    victim.kill()
    for _ in range(2):  # the second waits anew
        for call in [peer.call("all_reduce", seed=1, count=100) for peer in rest]:
            assert call.error("MasterUnavailableError")["restored"]
    cluster.restart_master()
    cluster.master.wait_status(lambda told: len(told["groups"][0]["members"]) == 2)  # now it is not away any more
    assert cluster.reduce(rest)["members"] == sorted(peer.id for peer in rest)


def test_the_master_ends_cleanly_on_sigterm_with_members_connected(cluster: Cluster) -> None:
    peers = cluster.members(2)
    cluster.master.signal(signal.SIGTERM)
    assert cluster.master.wait() == 0
    cluster.reduce(peers)


def test_the_master_is_killed_while_peers_stand_at_the_safe_point(cluster: Cluster) -> None:
    early, waiting, late = peers = cluster.members(3, reach_timeout=0.5)
    epoch = cluster.reduce(peers)["epoch"]
    calls = [peer.call("update_topology") for peer in (early, waiting)]
    for peer in (early, waiting):
        peer.ask("wait_safe_point", thread="watch")
    cluster.master.kill()
    for call in [*calls, late.call("update_topology")]:
        call.error("MasterUnavailableError")
    assert cluster.reduce(peers)["epoch"] == epoch


def test_a_loss_while_the_master_is_stopped_is_settled_when_it_goes_on(cluster: Cluster) -> None:
    *rest, victim = cluster.members(3)
    seed = cluster.rng.getrandbits(32)
    calls = [peer.call("all_reduce", seed=seed, count=100_000) for peer in rest]
    for peer in rest:
        peer.ask("wait_blocked", thread="watch")
    cluster.master.stop()
    victim.kill()
    assert all(call.pending for call in calls)
    cluster.master.resume()
    assert cluster.check([call.value() for call in calls], seed, 100_000)["world_size"] == 2
    cluster.agree(rest)
