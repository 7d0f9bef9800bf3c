"""Saved states under faults (tools/sim --saved). Their planted bugs are in test_sim_canary.py, with all others."""

from __future__ import annotations

from collections import Counter

import pytest
from sim_cluster import SimCluster
from sim_command import sim
from sim_options import Options
from sim_saved import SavedProgram, draw_saved_options

SEEDS = (3, 4, 6)  # in them all of it happens


def test_what_saved_states_are_for_happens_and_nothing_newer_is_ever_left_behind() -> None:
    met: Counter[str] = Counter()
    for seed in SEEDS:
        cluster = SimCluster(seed, draw_saved_options(seed)).run()
        saved = cluster.saved
        assert saved is not None
        met.update(losses=saved.losses, restored=saved.restored, refounded=saved.refounded, backs=saved.backs)
        met.update(refused=saved.refused, alone=saved.alone)
    assert len(met) == 6 and all(met.values()), met


@pytest.mark.parametrize("seed", range(3))
def test_a_lone_stale_peer_that_trains_on_takes_the_newer_copy_when_its_observer_comes(seed: int) -> None:
    options = Options(faults=(), peers=3, observers=1, think_s=0.2, chaos_s=1e6, peers_max=3)
    cluster = SimCluster(seed, options)
    saved, world = cluster.saved, cluster.world
    assert saved is not None
    (place,) = saved.places
    assert world.run(180.0, lambda: place.newest_revision >= 100), cluster.replay_line()
    cluster.chaos = False  # nobody comes by himself
    stale, kept = cluster.programs[1].state._replace(revision=1, root=1), place.newest_revision
    assert place.process is not None
    place.process.crash()
    for peer in cluster.living():
        peer.crash()
    saved.own.clear()
    program = cluster.programs[cluster.add(cluster.peers[0]).index]
    assert isinstance(program, SavedProgram)
    program._load(stale)
    assert world.run(world.now_s + 120.0, lambda: program.state.revision >= 5), cluster.replay_line()
    assert saved.alone >= 4 and saved.restored == 0, cluster.replay_line()
    saved.start(place)
    assert world.run(world.now_s + 60.0, lambda: saved.restored > 0), cluster.replay_line()
    assert program.state.revision == kept, cluster.replay_line()


def test_the_command_replays_such_a_seed() -> None:
    status, out = sim("--saved", "--seed", "8")
    assert status == 0 and "observer 0 keeps revision" in out
