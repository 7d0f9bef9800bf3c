"""Whole clusters from one seed: safe while faults last, live once they stop. Replay: tools/sim --seed 1734

An abort of the C code ends the process without a report: ``pytest -v`` shows the seed it was in.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from sim_checks import Checks
from sim_cluster import SimCluster, simulate
from sim_options import FAULT_KINDS, Options, draw_options
from sim_program import LONG_S
from sim_world import S

from pyccl._proto.channel import user_tag
from pyccl._proto.messages import OpState


@pytest.mark.seeded
def test_cluster_is_atomic_pure_and_live_through_faults(seed: int) -> None:
    simulate(seed)


def test_same_seed_gives_the_same_run() -> None:
    first, second = simulate(7), simulate(7)
    assert (first.world.events, first.world.now, first.checks.commits) == (
        second.world.events,
        second.world.now,
        second.checks.commits,
    )
    assert first.world.trace_text() == second.world.trace_text()


def test_seeds_reach_every_kind_of_epoch_and_failure() -> None:
    kinds: Counter[str] = Counter()
    statuses: Counter[str] = Counter()
    evictions = swaps = 0
    for seed in range(5000, 5012):
        checks: Checks = simulate(seed, faults=FAULT_KINDS, deadline_rate=0.05, flip_rate=0.01).checks
        kinds.update(checks.kinds)
        statuses.update(checks.statuses)
        evictions += checks.evictions
        swaps += checks.swaps
    assert swaps > 100
    assert set(kinds) >= {"found", "join", "loss", "settle"}
    assert set(statuses) >= {"DEADLINE", "ALONE", "PEER_LOST", "RESULT_DIFFERS", "EVICTED", "CLOSED"}
    assert evictions > 5


def test_plans_follow_lines_that_change_while_members_and_master_fail() -> None:
    plans = losses = 0
    for seed in range(5100, 5106):
        checks = simulate(seed, faults=FAULT_KINDS, measures=True).checks
        plans += sum(len(plans) - 1 for plans in checks.plans.values())
        losses += checks.kinds.get("loss", 0)
    assert plans > 20 and losses > 5


# ---- what must hold in one definite situation

QUIET = Options(faults=(), peers=4, think_s=0.05, chaos_s=1e6)


def _at_work(seed: int, options: Options) -> SimCluster:
    """All are members of one epoch and reduce."""
    cluster = SimCluster(seed, options)
    cluster.world.run(1.0)  # all have started
    assert cluster.converge(60.0), cluster.replay_line()
    assert len(cluster.peers) == options.peers
    return cluster


def _meet_no_more(cluster: SimCluster) -> None:
    """All go without safe points from the same round on, behind any that one of them is in."""
    last = max(program.state.round for program in cluster.programs.values())
    for program in cluster.programs.values():
        program.last_meeting = last


@pytest.mark.parametrize("seed", range(4))
def test_operations_commit_while_the_master_is_cut_off(seed: int) -> None:
    cluster = _at_work(seed, QUIET)
    _meet_no_more(cluster)
    cluster.world.run(cluster.world.now_s + 5)
    sent = [peer.messages_out for peer in cluster.peers]
    epochs = [peer.number for peer in cluster.peers]
    commits = cluster.checks.commits
    cluster.world.cut(cluster.master, None, 10.0)
    cluster.world.run(cluster.world.now_s + 9.9)
    assert cluster.checks.commits - commits > 200
    assert [peer.messages_out for peer in cluster.peers] == sent, "a commit needs no message to the master"
    cluster.world.run(cluster.world.now_s + 10)
    assert [peer.number for peer in cluster.peers] == epochs
    assert cluster.checks.evictions == 0


@pytest.mark.parametrize("fault", ["master_stop", "master_cut"])
@pytest.mark.parametrize("seed", range(6))
def test_nobody_is_evicted_when_the_master_was_stopped_or_cut(seed: int, fault: str) -> None:
    """Also in the middle of safe points, ballots and joins."""
    cluster = _at_work(seed, Options(faults=(), peers=3, think_s=0.2, chaos_s=1e6, deadline_rate=0.1))
    for _ in range(5):
        cluster.do_fault(fault, cluster.peers[0], for_s=cluster.rng.random() * 8)
        cluster.world.run(cluster.world.now_s + 10)
    assert cluster.checks.evictions == 0
    assert not any(peer.over for peer in cluster.peers), [peer.over for peer in cluster.peers]


@pytest.mark.parametrize("seed", range(4))
def test_nobody_is_evicted_for_one_paused_uplink_that_no_one_waits_for(seed: int) -> None:
    cluster = _at_work(seed, QUIET)
    _meet_no_more(cluster)
    cluster.world.run(cluster.world.now_s + 5)
    commits = cluster.checks.commits
    cluster.world.cut(cluster.peers[1], cluster.master, 20.0)
    cluster.world.run(cluster.world.now_s + 30)
    assert cluster.checks.evictions == 0
    assert cluster.checks.commits - commits > 400


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fault", ["crash", "silence"])
def test_survivors_go_on_soon_after_one_is_lost(seed: int, fault: str) -> None:
    cluster = _at_work(seed, replace(QUIET, peer_timeout=5.0, mismatch_grace=5.0))
    cluster.world.run(cluster.world.now_s + 2)
    lost = cluster.peers[seed % 4]
    cluster.do_fault(fault, lost, for_s=60.0)
    done = {peer.index: cluster.programs[peer.index].rounds_done for peer in cluster.peers}
    limit_s = 0.5 if fault == "crash" else 5.0 + 2.0
    others = [peer for peer in cluster.peers if peer is not lost]

    def gone_on() -> bool:
        return all(
            peer.machine.epoch is not None
            and lost.peer not in peer.machine.epoch.peers
            and cluster.programs[peer.index].rounds_done > done[peer.index] + 1
            for peer in others
        )

    assert cluster.world.run(cluster.world.now_s + limit_s, gone_on), cluster.replay_line()
    assert not any(peer.over for peer in others)


@pytest.mark.parametrize("seed", range(4))
def test_program_that_skips_a_call_gets_a_mismatch_and_all_go_on(seed: int) -> None:
    options = Options(faults=(), peers=3, think_s=0.05, chaos_s=30.0, strict=False, mismatch_rate=0.1)
    cluster = SimCluster(seed, options).run()
    assert cluster.checks.kinds["mismatch"] > 0
    assert cluster.checks.evictions == 0


# ---- the master dies


@pytest.mark.parametrize("seed", range(8))
def test_nobody_is_evicted_when_the_master_was_killed_and_started_again(seed: int) -> None:
    """Also in the middle of safe points, ballots and joins, and of what it was writing."""
    cluster = _at_work(seed, Options(faults=(), peers=3, think_s=0.2, chaos_s=1e6, deadline_rate=0.1, sync_s=0.05))
    for _ in range(6):
        cluster.do_fault("master_crash", cluster.peers[0], for_s=cluster.rng.random() * 8)
        if cluster.rng.random() < 0.5:
            cluster.add()
        cluster.world.run(cluster.world.now_s + 15)
    assert cluster.converge(60.0), cluster.replay_line()
    assert cluster.checks.evictions == 0
    assert not any(peer.over for peer in cluster.peers), [peer.over for peer in cluster.peers]


@pytest.mark.parametrize("seed", range(6))
def test_a_newcomer_is_in_within_two_seconds_of_the_masters_return(seed: int) -> None:
    cluster = _at_work(seed, replace(QUIET, peer_timeout=5.0, mismatch_grace=5.0))
    away_s = 3 + 20 * cluster.rng.random()  # long enough for every back-off to be at its longest
    cluster.crash_master(away_s)
    newcomer = cluster.add()
    cluster.world.run(cluster.world.now_s + away_s)
    assert cluster.master.alive
    assert cluster.world.run(cluster.world.now_s + 2.0, lambda: newcomer.number > 0), cluster.replay_line()


@pytest.mark.parametrize("seed", range(4))
def test_a_peer_lost_while_the_master_is_down_is_out_soon_after_its_return(seed: int) -> None:
    cluster = _at_work(seed, replace(QUIET, peer_timeout=5.0, mismatch_grace=5.0))
    cluster.crash_master(10.0)
    cluster.world.run(cluster.world.now_s + 1.0)
    lost = cluster.peers[seed % 4]
    cluster.do_fault("crash", lost)
    cluster.world.run(cluster.world.now_s + 9.0)
    others = [peer for peer in cluster.peers if peer is not lost]

    def gone_on() -> bool:
        return all(p.machine.epoch is not None and lost.peer not in p.machine.epoch.peers for p in others)

    assert cluster.world.run(cluster.world.now_s + 2.5, gone_on), cluster.replay_line()
    assert cluster.converge(10.0), cluster.replay_line()


@pytest.mark.parametrize("seed", range(4))
def test_with_a_full_disk_nothing_is_decided_and_operations_go_on(seed: int) -> None:
    cluster = _at_work(seed, QUIET)
    cluster.disk.full = True
    epochs = [peer.number for peer in cluster.peers]
    cluster.world.run(cluster.world.now_s + 0.5)
    newcomer = cluster.add()
    cluster.world.run(cluster.world.now_s + 10)
    assert [peer.number for peer in cluster.peers] == [*epochs, 0]
    status = cluster.master.machine.status()
    assert status["journal"] == {"kept": True, "waiting": 1, "error": "no space left"}
    assert status["groups"][0]["deciding"]
    cluster.disk.full = False
    assert cluster.world.run(cluster.world.now_s + 2, lambda: newcomer.number > 0), cluster.replay_line()
    assert cluster.converge(30.0), cluster.replay_line()
    assert cluster.checks.evictions == 0


@pytest.mark.parametrize("seed", range(8))
def test_a_master_killed_and_started_again_on_a_full_disk_decides_nothing_until_it_has_room(seed: int) -> None:
    """A newcomer waits, and what the first master was writing for it may be there in part."""
    cluster = _at_work(seed, QUIET)
    cluster.disk.full = True
    newcomer = cluster.add()
    cluster.world.run(cluster.world.now_s + 5)
    epochs = [peer.number for peer in cluster.peers]
    assert epochs[-1] == 0 and cluster.master.machine.status()["journal"]["waiting"] == 1
    cluster.crash_master(0.5)
    cluster.world.run(cluster.world.now_s + 10)
    assert cluster.starts_refused > 0 and not cluster.master.alive
    assert [peer.number for peer in cluster.peers] == epochs
    cluster.disk.full = False
    assert cluster.world.run(cluster.world.now_s + 5, lambda: newcomer.number > 0), cluster.replay_line()
    assert cluster.converge(30.0), cluster.replay_line()
    assert cluster.checks.evictions == 0 and not any(peer.over for peer in cluster.peers)


@pytest.mark.parametrize("fault", ["master_stop", "master_cut", "master_crash"])
@pytest.mark.parametrize("seed", range(3))
def test_a_master_that_is_away_for_thirty_seconds_evicts_nobody(seed: int, fault: str) -> None:
    cluster = _at_work(seed, replace(QUIET, peer_timeout=5.0, mismatch_grace=5.0, deadline_rate=0.05))
    for _ in range(3):
        cluster.do_fault(fault, cluster.peers[0], for_s=30.0)
        cluster.world.run(cluster.world.now_s + 45.0)
    assert cluster.converge(30.0), cluster.replay_line()
    assert cluster.checks.evictions == 0 and not any(peer.over for peer in cluster.peers)


def test_operations_with_a_lost_peer_end_while_the_master_is_away_unless_they_are_prepared() -> None:
    """All go on with the next master."""
    ended = kept = 0
    for seed in range(6):
        cluster = _at_work(seed, replace(QUIET, master_timeout_s=4.0))
        _meet_no_more(cluster)
        cluster.world.run(cluster.world.now_s + 3)
        cluster.crash_master(30.0)
        lost = cluster.peers[seed % 4]
        cluster.do_fault("crash", lost)
        cluster.world.run(cluster.world.now_s + 29)
        waiting = {
            (peer.index, op.space, op.tag, op.seq)
            for peer in cluster.living()
            for op in cluster.programs[peer.index].open
            if op.status is None and op.deadline < cluster.world.now + int((LONG_S - 6) * S)  # called 6 s ago
        }
        prepared = {
            (peer.index, space, user_tag(tag), seq)
            for peer in cluster.living()
            if peer.engine is not None
            for space, tag, seq, state, _ in peer.engine.fsm.report()
            if state == OpState.PREPARED
        }
        assert waiting <= prepared, cluster.replay_line()
        ended += cluster.checks.statuses.get("MASTER_AWAY", 0)
        kept += len(waiting)
        assert cluster.converge(30.0), cluster.replay_line()
    assert ended > 0 and kept > 0


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_masters_without_a_journal_take_over_the_run_one_after_the_other(seed: int, secure: bool) -> None:
    faults = ("master_crash", "master_stop", "master_cut", "reset_data", "reset_control", "stop", "join")
    options = Options(faults=faults, peers=5, journaled=False, think_s=0.05, deadline_rate=0.05, chaos_s=20.0)
    cluster = SimCluster(seed, replace(options, fault_rate=1.0, secure=secure))
    cluster.run()


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_without_a_journal_it_stays_safe_whatever_is_lost(seed: int, secure: bool) -> None:
    """It need not come to rest: too few may be left to decide."""
    options = replace(draw_options(seed), journaled=False, faults=FAULT_KINDS, fault_rate=1.0, secure=secure)
    cluster = SimCluster(seed, options)
    cluster.world.run(40.0)
    assert cluster.checks.commits > 0
