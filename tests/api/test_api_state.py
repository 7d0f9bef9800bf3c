"""Shared state: who gets what from whom, how many bytes that takes, and what a death in the middle leaves behind."""

from __future__ import annotations

import pytest
from cluster import Cluster
from states import CHUNK, FULL, divergent, ended_alike, give, model, sync


def test_a_newcomer_gets_model_and_revision_from_all_holders(cluster: Cluster) -> None:
    members = cluster.members(3)
    give(members, model(1), 5)
    digest = sync(members)[0]["state"]["digest"]
    newcomer = cluster.spawn(1)
    cluster.make(newcomer)
    cluster.admit(members, newcomer)
    give(newcomer, model(2), 0)
    infos = sync([*members, *newcomer])
    assert infos[-1]["state"]["digest"] == digest and infos[-1]["revision"] == 5
    assert sorted(infos[-1]["changed"]) == FULL
    assert infos[-1]["holders"] == sorted(peer.id for peer in members)
    assert all(info["tx_bytes"] > 0 for info in infos[:3])  # each gave its part
    assert all(info["changed"] == [] and info["rx_bytes"] == 0 for info in infos[:3])


def test_a_divergent_peer_gets_just_the_chunks_that_differ(cluster: Cluster) -> None:
    peers = cluster.members(3)
    give(peers, model(1), 1)
    before = sync(peers)[0]["state"]
    odd = cluster.rng.choice(peers)
    odd.ask("poke", name="big", at=3 * CHUNK + 17, value=0)
    odd.ask("poke", name="big", at=3 * CHUNK + 18, value=255)
    infos = sync(peers)
    info = infos[odd.index]
    assert info["state"] == before
    assert (info["changed"], info["rx_bytes"]) == (["big"], CHUNK)
    # the last chunk of an array is shorter, and several arrays may differ
    odd.ask("poke", name="big", at=8 * CHUNK + 1, value=3)
    odd.ask("poke", name="half", at=0, value=9)
    odd.ask("poke", name="exact", at=CHUNK - 1, value=9)
    infos = sync(peers)
    assert sorted(infos[odd.index]["changed"]) == ["big", "exact", "half"]
    assert infos[odd.index]["rx_bytes"] == (4 * 5) + CHUNK + 66
    assert all(info["changed"] == [] and info["state"] == before for i, info in enumerate(infos) if i != odd.index)


def test_in_step_nothing_travels_and_digests_agree_at_every_revision(cluster: Cluster) -> None:
    peers = cluster.members(3)
    give(peers, model(1), 0)
    for revision in range(5):
        infos = sync(peers)
        assert infos[0]["revision"] == revision
        assert all(info["rx_bytes"] == info["tx_bytes"] == 0 and info["changed"] == [] for info in infos)
        for peer in peers:
            peer.ask("poke", name="big", at=revision, value=revision)
            peer.ask("advance")
        assert len({peer.ask("digest") for peer in peers}) == 1


def test_the_first_election_takes_the_newest_then_the_most_common(cluster: Cluster) -> None:
    peers = cluster.members(3)
    give(peers, model(1, index=None), 1)
    give(peers[1:2], model(9), 2)
    newest = peers[1].ask("digest")
    assert sync(peers)[0]["state"]["digest"] == newest
    # nobody has a lineage in another group: of one revision most holders win
    others = cluster.members(3, group=1)
    give(others, model(3), 4)
    give(others[:1], model(4), 4)
    common = others[2].ask("digest")
    infos = sync(others)
    assert infos[0]["state"]["digest"] == common and sorted(infos[0]["changed"]) == FULL


def test_a_lone_high_revision_does_not_win_after_a_committed_sync(cluster: Cluster) -> None:
    peers = cluster.members(3)
    give(peers, model(1), 1)
    digest = sync(peers)[0]["state"]["digest"]
    liar = peers[cluster.rng.randrange(3)]
    liar.ask("advance", by=1000)
    liar.ask("poke", name="flags", at=0, value=1)
    liar.ask("poke", name="exact", at=0, value=200)
    infos = sync(peers)
    assert infos[0]["state"]["digest"] == digest and infos[0]["revision"] == 1
    assert "exact" in infos[liar.index]["changed"]


def test_newcomers_do_not_outvote_a_member_that_holds_the_state(cluster: Cluster) -> None:
    (member,) = cluster.members(1)
    give([member], model(1), 1)
    digest = sync([member])[0]["state"]["digest"]
    crowd = cluster.spawn(3)
    cluster.make(crowd)
    cluster.admit([member], crowd)
    give(crowd, model(2), 100)
    assert sync([member, *crowd])[0]["state"]["digest"] == digest


def test_who_left_and_came_back_has_no_vote(cluster: Cluster) -> None:
    *rest, leaver = peers = cluster.members(2)
    give(peers, model(1), 1)
    digest = sync(peers)[0]["state"]["digest"]
    leaver.ask("close")
    rest[0].ask("wait_world", world=1)
    leaver.ask("advance", by=10)
    leaver.ask("poke", name="exact", at=0, value=200)
    cluster.admit(rest, [leaver])
    assert sync(peers)[0]["state"]["digest"] == digest


@pytest.mark.parametrize("what", ["shape", "dtype", "name", "missing"])
def test_another_layout_is_a_mismatch_that_names_the_peer(cluster: Cluster, what: str) -> None:
    peers = cluster.members(3)
    give(peers, model(1), 1)
    odd = cluster.rng.choice(peers)
    arrays = model(1)
    if what == "shape":
        arrays["half"]["shape"] = [11, 3]
    elif what == "dtype":
        arrays["half"]["dtype"] = "int16"
    elif what == "name":
        arrays["halb"] = arrays.pop("half")
    else:
        del arrays["half"]
    give([odd], arrays, 1)
    for call in [peer.call("sync") for peer in peers]:
        error = call.error("MismatchError")
        assert error["peers"] == [odd.id] and error["restored"]
        assert error["fields"] == ["name" if what == "missing" else what]
        assert ("'halb'" if what == "name" else "'half'") in error["text"]
    give([odd], model(1), 1)
    sync(peers)
    cluster.reduce(peers)


@pytest.mark.parametrize("stage", ["sync.table", "serve"])
def test_a_holder_that_dies_in_the_middle_costs_a_request_not_the_sync(cluster: Cluster, stage: str) -> None:
    """In one case dead before the first chunk was asked for, in the other with some of them sent."""
    good, odd = divergent(cluster, holders=3)
    digest = good[0].ask("digest")
    *rest, victim = cluster.rng.sample(good, 3)
    if stage == "serve":
        give([odd], model(2), 1)
        odd.ask("advance", by=0)
        victim.ask("hook", phase="serve", bytes=CHUNK + CHUNK // 2)
    else:
        odd.ask("hook", phase=stage, when="after", action="wait")
    calls = {peer: peer.call("sync") for peer in [*good, odd]}
    if stage == "sync.table":
        odd.wait_event("hook")
        victim.kill()
        odd.ask("release", phase=stage)
    calls.pop(victim).died()
    ended_alike(cluster, [calls[peer] for peer in [*rest, odd]], digest)


def test_the_loss_of_every_holder_changes_nothing_and_tells_all(cluster: Cluster) -> None:
    """A lone holder of the elected state dies before anybody has it."""
    *rest, holder = peers = cluster.members(3)
    give(rest, model(1), 1)
    give([holder], model(2), 2)  # no committed sync yet: the newest wins
    for peer in rest:
        peer.ask("hook", phase="sync.table", action="wait")
    calls = [peer.call("sync") for peer in peers]
    for peer in rest:
        peer.wait_event("hook")
    holder.kill()
    for peer in rest:
        peer.ask("release", phase="sync.table")
    calls.pop().died()
    for call in calls:
        assert call.error("PeerLostError")["restored"]
    sync(rest)
    cluster.reduce(rest)


@pytest.mark.parametrize(
    ("stage", "when"),
    [
        ("sync.records", "before"),
        ("sync.records", "after"),
        ("sync.table", "after"),
        ("sync.fetch", "after"),
        ("sync.commit", "before"),
        ("sync.commit", "after"),
        ("sync.adopt", "after"),
    ],
)
def test_a_fetcher_that_dies_does_not_disturb_the_others(cluster: Cluster, stage: str, when: str) -> None:
    good, odd = divergent(cluster, holders=2)
    digest = good[0].ask("digest")
    odd.ask("hook", phase=stage, when=when)
    calls = [peer.call("sync") for peer in [*good, odd]]
    calls.pop().died()
    ended_alike(cluster, calls, digest)


@pytest.mark.parametrize(
    ("stage", "when"),
    [("sync.records", "before"), ("sync.records", "after"), ("sync.commit", "before"), ("sync.commit", "after")],
)
def test_a_holder_that_dies_at_any_stage_does_not_disturb_the_others(cluster: Cluster, stage: str, when: str) -> None:
    good, odd = divergent(cluster, holders=3)  # two that agree are left
    digest = good[0].ask("digest")
    victim = cluster.rng.choice(good)
    rest = [peer for peer in good if peer is not victim]
    victim.ask("hook", phase=stage, when=when)
    calls = [peer.call("sync") for peer in [*rest, odd, victim]]
    calls.pop().died()
    ended_alike(cluster, calls, digest)


def test_collectives_of_another_thread_run_beside_a_sync(cluster: Cluster) -> None:
    good, odd = divergent(cluster, holders=2)
    seed = cluster.rng.getrandbits(31)
    peers = [*good, odd]
    loops = {peer: peer.call("loop", thread="loop", seed=seed, report=5) for peer in peers}
    for peer in peers:
        peer.wait_event("loop")
    sync(peers)
    for peer in peers:
        peer.ask("stop_loop")
    cluster.check_loops({peer: loop.value() for peer, loop in loops.items()}, seed)
