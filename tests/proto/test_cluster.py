"""Whole clusters from a seed: random order of delivery, random faults; afterwards all who are left agree."""

from __future__ import annotations

import os

import pytest
from proto_cluster import Cluster, Node

SEEDS = 400 if os.environ.get("PYCCL_TEST_LONG") else 25


def _fault(cluster: Cluster, running: list[Node]) -> None:
    rng = cluster.rng
    node = rng.choice(running)
    match rng.randrange(7):
        case 0:
            cluster.crash(node)
        case 1:
            node.silent = True
        case 2 | 3:
            cluster.reset_control(node)
        case 4:
            cluster.leave(node)
        case 5:
            cluster.cut.add(frozenset({node.machine.peer, rng.choice(running).machine.peer}))
        case 6:
            cluster.add()


def _run(cluster: Cluster, steps: int, fault_rate: float) -> None:
    for _ in range(steps):
        running = [node for node in cluster.nodes if node.runs]
        if cluster.rng.random() < fault_rate and running:
            _fault(cluster, running)
        for node in cluster.nodes:
            if node.silent and cluster.rng.random() < 0.005:
                node.silent = False
        cluster.step()


@pytest.mark.parametrize("seed", range(SEEDS), ids=lambda seed: f"seed{seed}")
def test_survivors_share_one_epoch_after_random_kills(seed: int) -> None:
    cluster = Cluster(seed)
    for _ in range(cluster.rng.randint(2, 6)):
        cluster.add()
    _run(cluster, 4000, fault_rate=0.004)
    cluster.cut.clear()
    cluster.add()  # somebody is always left
    steps = 0
    while not cluster.agreed():
        cluster.step()
        steps += 1
        assert cluster.now < 600 and steps < 200_000, cluster.replay_line()


def test_peers_that_meet_at_safe_points_are_all_admitted_when_nothing_fails() -> None:
    cluster = Cluster(1)
    for _ in range(5):
        cluster.add()
    while not cluster.agreed():
        cluster.step()
        assert cluster.now < 60, cluster.replay_line()
    assert all(node.ended is None for node in cluster.nodes)


@pytest.mark.parametrize("seed", range(10))
def test_exactly_one_side_goes_when_two_members_cannot_reach_each_other(seed: int) -> None:
    cluster = Cluster(1000 + seed)
    nodes = [cluster.add() for _ in range(3)]
    while not cluster.agreed():
        cluster.step()
    cluster.cut.add(frozenset({nodes[0].machine.peer, nodes[1].machine.peer}))
    while sum(node.runs for node in nodes) == 3 or not cluster.agreed():
        cluster.step()
        assert cluster.now < 60, cluster.replay_line()
    assert nodes[2].runs
    assert sum(node.runs for node in nodes) == 2
