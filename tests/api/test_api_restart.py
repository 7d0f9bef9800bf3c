"""kill -9 of the master at each phase, and another from its journal: one epoch for all, and no peer restarts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from cluster import Cluster, Master, Peer

EXIT_JOURNAL = 4
# (phase, when, the how manyth time): of an admission, and of a flush
ADMISSION = [
    ("send:EpochPropose", "before", 1),
    ("send:EpochPropose", "after", 2),
    ("append", "before", 1),
    ("fsync", "before", 1),
    ("append", "after", 1),
    ("send:EpochCommit", "before", 1),
    ("send:EpochCommit", "after", 1),
    ("send:EpochCommit", "after", 3),
]
FLUSH = [
    ("send:Flush", "before", 1),
    ("send:Flush", "after", 1),
    ("append", "before", 1),
    ("fsync", "before", 1),
    ("append", "after", 1),
    ("send:EpochCommit", "after", 1),
]


def pids(peers: Sequence[Peer]) -> list[int]:
    assert all(peer.code is None for peer in peers)
    return [peer.pid for peer in peers]


def join(cluster: Cluster, members: Sequence[Peer]) -> list[Peer]:
    """One more, at a safe point."""
    newcomer = cluster.spawn(1)
    cluster.make(newcomer)
    cluster.admit(members, newcomer)
    return [*members, *newcomer]


@pytest.mark.parametrize(("phase", "when", "nth"), ADMISSION)
def test_the_master_is_killed_during_an_admission(cluster: Cluster, phase: str, when: str, nth: int) -> None:
    peers = cluster.members(2)
    newcomer = cluster.spawn(1)[0]
    cluster.make([newcomer])
    before = pids([*peers, newcomer])
    cluster.master.hook(phase, when, nth=nth)
    connect = newcomer.call("connect")
    grows = [peer.call("grow", world=3) for peer in peers]
    assert cluster.master.wait() == -9
    cluster.restart_master()
    for call in [connect, *grows]:
        call.value()
    everybody = [*peers, newcomer]
    cluster.agree(everybody)
    cluster.reduce(everybody)
    everybody = join(cluster, everybody)
    cluster.reduce(everybody)
    assert pids(everybody)[:3] == before


@pytest.mark.parametrize(("phase", "when", "nth"), FLUSH)
def test_the_master_is_killed_during_a_flush(cluster: Cluster, phase: str, when: str, nth: int) -> None:
    peers = cluster.members(4)
    *rest, victim = peers
    before = pids(rest)
    cluster.master.hook(phase, when, nth=nth)
    victim.ask("hook", phase="submit", when="after")
    seed = cluster.rng.getrandbits(32)
    calls = [peer.call("all_reduce", seed=seed, count=300_000) for peer in rest]
    victim.call("all_reduce", seed=seed, count=300_000).died()
    assert cluster.master.wait() == -9
    cluster.restart_master()
    info = cluster.check([call.value() for call in calls], seed, 300_000)
    assert set(info["members"]) >= {peer.id for peer in rest}
    cluster.reduce(rest)
    cluster.agree(rest)
    rest = join(cluster, rest)
    cluster.reduce(rest)
    assert pids(rest)[:3] == before


@pytest.mark.parametrize("stage", ["sync.records", "sync.fetch", "sync.commit"])
def test_the_master_is_killed_during_a_state_sync(cluster: Cluster, stage: str) -> None:
    peers = join(cluster, cluster.members(2))
    *holders, newcomer = peers
    arrays = {"w": {"seed": 1, "count": 600_000, "dtype": "float32", "index": 0}}
    other = {"w": {"seed": 2, "count": 600_000, "dtype": "float32", "index": 0}}
    for peer in holders:
        peer.ask("state", arrays=arrays, revision=7)
    newcomer.ask("state", arrays=other, revision=0)
    newcomer.ask("hook", phase=stage, action="wait")
    calls = [peer.call("sync") for peer in peers]
    newcomer.wait_event("hook", phase=stage)
    cluster.master.kill()
    newcomer.ask("release", phase=stage, thread="release")
    infos = [call.value() for call in calls]
    assert len({info["state"]["digest"] for info in infos}) == 1
    assert [info["revision"] for info in infos] == [7, 7, 7]
    cluster.restart_master()
    peers = join(cluster, peers)
    cluster.reduce(peers)


def test_no_operation_fails_while_the_master_is_killed_and_restarted_again_and_again(cluster: Cluster) -> None:
    peers = cluster.members(3)
    epoch = cluster.reduce(peers)["epoch"]
    seed = cluster.rng.getrandbits(32)
    loops = {peer: peer.call("loop", thread="loop", seed=seed, report=20) for peer in peers}
    for peer in peers:
        peer.wait_event("loop")
    for _ in range(4):
        cluster.master.kill()
        cluster.restart_master()
        told = cluster.master.wait_status(lambda told: all(m["connected"] for m in told["groups"][0]["members"]))
        assert told["groups"][0]["epoch"] == epoch and len(told["groups"][0]["members"]) == 3
    for peer in peers:
        peer.ask("stop_loop")
    records = {peer: loop.value() for peer, loop in loops.items()}
    cluster.check_loops(records, seed)
    assert {record["epoch"] for steps in records.values() for record in steps} == {epoch}
    cluster.reduce(join(cluster, peers))


def test_a_safe_point_that_waits_while_the_master_is_away_ends_well_with_the_next(cluster: Cluster) -> None:
    peers = cluster.members(3)
    cluster.master.kill()
    newcomer = cluster.spawn(1)[0]
    cluster.make([newcomer])
    calls = [newcomer.call("connect"), *(peer.call("grow", world=4) for peer in peers)]
    cluster.restart_master()
    for call in calls:
        call.value()
    cluster.reduce([*peers, newcomer])


def test_a_peer_lost_while_the_master_is_away_is_settled_by_the_next(cluster: Cluster) -> None:
    peers = cluster.members(3)
    *rest, victim = peers
    cluster.master.kill()
    victim.ask("hook", phase="submit", when="after")
    seed = cluster.rng.getrandbits(32)
    calls = [peer.call("all_reduce", seed=seed, count=300_000) for peer in rest]
    victim.call("all_reduce", seed=seed, count=300_000).died()
    cluster.restart_master()
    cluster.check([call.value() for call in calls], seed, 300_000)
    cluster.reduce(join(cluster, rest))


def test_a_peer_that_was_evicted_stays_out_of_the_next_masters_run(cluster: Cluster) -> None:
    peers = cluster.members(3)
    *rest, silent = peers
    silent.stop()
    for call in [peer.call("all_reduce", seed=3, count=1000) for peer in rest]:
        call.value()
    cluster.master.kill()
    cluster.restart_master()
    silent.resume()
    silent.call("all_reduce", seed=3, count=1000).error("EvictedError")
    cluster.reduce(rest)


def test_a_second_master_on_the_same_journal_is_refused(cluster: Cluster) -> None:
    peers = cluster.members(2)
    second = Master(cluster.zygote, cluster.peer_timeout, "--journal", str(cluster.journal))
    cluster.processes.append(second)
    assert second.wait() == EXIT_JOURNAL
    assert any("another master uses it" in line for line in second.log())
    cluster.reduce(join(cluster, peers))


def test_a_full_disk_holds_up_what_must_be_decided_and_no_operation(cluster: Cluster) -> None:
    peers = cluster.members(2)
    newcomer, founder = cluster.spawn(2)
    cluster.make([newcomer])
    cluster.make([founder], group=1)
    cluster.master.file_bytes_max(10)
    founded = founder.call("connect")
    told = cluster.master.wait_status(lambda told: told["journal"]["error"] != "")
    assert told["journal"]["waiting"] == 1
    assert [group["deciding"] for group in told["groups"]] == [False, True]
    for _ in range(5):
        cluster.reduce(peers)
    joins = [newcomer.call("connect"), *(peer.call("grow", world=3) for peer in peers)]
    cluster.master.wait_status(lambda told: told["journal"]["waiting"] == 2)
    assert all(call.pending for call in [founded, *joins])
    cluster.master.file_bytes_max(None)
    for call in [founded, *joins]:
        call.value()
    cluster.reduce([*peers, newcomer])
    assert cluster.master.status()["journal"] == {"kept": True, "waiting": 0, "error": ""}
    cluster.master.wait_log("journal_written")


# ---- without its journal


def test_a_master_with_a_lost_journal_leaves_the_run_alone_until_the_operator_says_so(cluster: Cluster) -> None:
    peers = cluster.members(3)
    epoch = cluster.reduce(peers)["epoch"]
    cluster.master.kill()
    cluster.journal.unlink()
    cluster.restart_master()
    told = cluster.master.wait_status(lambda told: any(e["event"] == "run_unknown" for e in told["events"]))
    assert told["groups"] == []
    assert cluster.reduce(peers)["epoch"] == epoch
    cluster.master.kill()
    cluster.journal.unlink()
    cluster.restart_master("--journal", str(cluster.journal), "--adopt-run")
    peers = join(cluster, peers)
    assert cluster.reduce(peers)["epoch"] == epoch + 1
    cluster.master.kill()
    cluster.restart_master()  # from the new journal
    cluster.reduce(join(cluster, peers))


def test_without_a_journal_a_new_master_takes_over_and_goes_on_with_a_majority(
    make_cluster: Callable[..., Any],
) -> None:
    cluster: Cluster = make_cluster(journaled=False)
    peers = cluster.members(3, master_timeout=1.0)
    cluster.reduce(peers)
    for _ in range(2):
        cluster.master.kill()
        cluster.restart_master()
        cluster.master.wait_status(lambda told: len(told["groups"]) == 1)
    *rest, victim = sorted(peers, key=lambda peer: peer.id)
    victim.kill()
    assert cluster.reduce(rest)["world_size"] == 2
    # of two the one with the lowest id may go on alone, the other may not: it is told, and does not wait
    first, second = rest
    first.kill()
    assert second.call("all_reduce", seed=1, count=100).error("MasterUnavailableError")["restored"]
    told = cluster.master.status()
    assert told["groups"][0]["ballot"]["undecided"]


def test_adopt_run_is_refused_where_the_journal_holds_a_run(cluster: Cluster) -> None:
    cluster.members(1)
    cluster.master.kill()
    second = Master(cluster.zygote, cluster.peer_timeout, "--journal", str(cluster.journal), "--adopt-run")
    cluster.processes.append(second)
    assert second.wait() == EXIT_JOURNAL
