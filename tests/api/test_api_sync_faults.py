"""sync_shared_state with holders that die, lie, stop or are slow, receivers that are, and histories that part."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cluster import Cluster, Peer
from states import CHUNK, FULL, MIB, ended_alike, give, model, started, sync

DIGESTS = ["fast", "sha256"]
CHUNKS = 40  # of `vast`: more than all holders together may be asked for at a time
PART = 3  # chunks received when something happens
PATIENT_S = 60.0  # a peer_timeout under which nobody who is stopped is evicted while a test runs


def vast(seed: int) -> dict[str, dict[str, object]]:
    return {"w": {"seed": seed, "count": CHUNKS * CHUNK, "dtype": "uint8", "index": 0}}


def far_behind(cluster: Cluster, holders: int, fetchers: int = 1) -> tuple[list[Peer], list[Peer]]:
    """Holders of a committed state, and members whose every chunk differs."""
    peers = cluster.members(holders + fetchers)
    good, odd = peers[:holders], peers[holders:]
    give(peers, vast(1), 1)
    sync(peers)
    give(odd, vast(2), 1)
    return good, odd


def pause_midway(peer: Peer, action: str = "wait") -> None:
    """Once it has put PART chunks into staging."""
    peer.ask("hook", phase="sync.chunk", when="after", nth=PART, action=action)


# ---- holders


def test_a_holder_that_is_killed_midway_is_replaced_by_the_others(cluster: Cluster) -> None:
    good, (odd,) = far_behind(cluster, holders=3)
    digest = good[0].ask("digest")
    victim = cluster.rng.choice(good)
    rest = [peer for peer in good if peer is not victim]
    pause_midway(odd)
    calls = started([*good, odd])
    odd.wait_event("hook")
    victim.kill()
    odd.ask("release", phase="sync.chunk")
    calls.pop(victim).died()
    ended_alike(cluster, list(calls.values()), digest)
    assert calls[odd].value()["rx_bytes"] == CHUNKS * CHUNK
    assert all(calls[peer].value()["tx_bytes"] > 0 for peer in rest)


def test_when_all_holders_are_killed_midway_nobodys_arrays_have_changed(cluster: Cluster) -> None:
    good, odd = far_behind(cluster, holders=2, fetchers=2)
    for peer in odd:
        pause_midway(peer)
    calls = started([*good, *odd])
    for peer in odd:
        peer.wait_event("hook")
    for peer in good:
        peer.kill()
    for peer in odd:
        peer.ask("release", phase="sync.chunk")
    for peer in good:
        calls[peer].died()
    for peer in odd:
        assert calls[peer].error("PeerLostError")["restored"]
    sync(odd)
    cluster.reduce(odd)


@pytest.mark.parametrize("since", ["table", "chunks", "midway"])
def test_a_holder_that_stands_still_loses_its_requests_to_the_others(
    make_cluster: Callable[..., Cluster], since: str
) -> None:
    """It is not evicted: only the others' taking over lets the fetcher end while it is stopped."""
    cluster = make_cluster(peer_timeout=PATIENT_S)
    good, (odd,) = far_behind(cluster, holders=3)
    digest = good[0].ask("digest")
    frozen = min(good, key=lambda peer: peer.id)  # the first to be asked for the table
    rest = [peer for peer in good if peer is not frozen]
    phase = {"table": "sync.records", "chunks": "sync.table", "midway": "sync.chunk"}[since]
    odd.ask("hook", phase=phase, when="after", action="wait", nth=PART if since == "midway" else 1)
    odd.ask("hook", phase="sync.commit", action="tell")
    for peer in good:  # so that the stopped one has taken part in the first all-gather
        peer.ask("hook", phase="sync.commit", action="tell")
    calls = started([*good, odd])
    odd.wait_event("hook", phase=phase)
    for peer in good:
        peer.wait_event("hook", phase="sync.commit")
    frozen.stop()
    odd.ask("release", phase=phase)
    odd.wait_event("hook", phase="sync.commit")  # has all
    frozen.resume()
    ended_alike(cluster, list(calls.values()), digest)
    served = [calls[peer].value()["tx_bytes"] for peer in rest]
    assert calls[odd].value()["rx_bytes"] == CHUNKS * CHUNK and sum(served) > CHUNKS * CHUNK // 2


def test_arrays_that_their_owner_changes_while_they_are_served_are_not_taken(cluster: Cluster) -> None:
    good, (odd,) = far_behind(cluster, holders=2)
    digest = good[1].ask("digest")
    odd.ask("hook", phase="sync.table", when="after", action="wait")
    calls = started([*good, odd])
    odd.wait_event("hook")
    for chunk in range(CHUNKS):
        for at, value in ((0, 1), (1, 2)):  # one of the bytes is new
            good[0].call("poke", thread="careless", name="w", at=chunk * CHUNK + at, value=value).value()
    odd.ask("release", phase="sync.table")
    info = calls[odd].value()
    assert info["state"]["digest"] == digest and info["liars"] == [good[0].id]
    assert calls[good[0]].value()["tx_bytes"] == 0 < calls[good[1]].value()["tx_bytes"]
    again = sync([*good, odd])  # it is found out in the next round
    assert again[0]["state"]["digest"] == digest and again[0]["changed"] == ["w"]


# ---- liars


@pytest.mark.parametrize("digest", DIGESTS)
@pytest.mark.parametrize("what", ["arrays", "table"])
def test_a_holder_that_serves_wrong_bytes_is_named_and_left(cluster: Cluster, what: str, digest: str) -> None:
    *good, odd = peers = cluster.members(4)
    give(good, model(1), 1, digest=digest)
    give([odd], model(2), 0, digest=digest)
    liar = min(good, key=lambda peer: peer.id)  # the first to be asked for the table
    liar.ask("lie", what=what)
    infos = dict(zip(peers, sync(peers), strict=True))
    assert sorted(infos[odd]["changed"]) == FULL
    assert infos[odd]["liars"] == [liar.id] and all(infos[peer]["liars"] == [] for peer in good)
    assert infos[liar]["tx_bytes"] == 0 < sum(infos[peer]["tx_bytes"] for peer in good)


@pytest.mark.parametrize("what", ["arrays", "table"])
def test_a_liar_alone_changes_nothing_and_is_named(cluster: Cluster, what: str) -> None:
    liar, *rest = peers = cluster.members(3)
    give(rest, model(1), 1)
    give([liar], model(2), 2)  # no committed sync yet: the newest wins
    liar.ask("lie", what=what)
    calls = started(peers)
    for peer in rest:
        error = calls[peer].error("PeerLostError")
        assert liar.id[:8] in error["text"] and error["restored"]
    assert calls[liar].error("PeerLostError")["restored"]
    sync([*rest, liar], {liar: "receive_only"})
    cluster.reduce(peers)


def test_records_that_one_member_was_told_otherwise_are_found_out_by_all(cluster: Cluster) -> None:
    odd, *rest = peers = cluster.members(3)
    give(peers, model(1), 1)
    odd.ask("mishear")
    calls = started(peers)
    told = {peer: call.error("MismatchError") for peer, call in calls.items()}
    assert all(error["fields"] == ["records"] and error["restored"] for error in told.values())
    assert sorted(told[odd]["peers"]) == sorted(peer.id for peer in rest)
    assert all(told[peer]["peers"] == [odd.id] for peer in rest)
    sync(peers)


def test_liars_among_the_holders_are_left_one_by_one(cluster: Cluster) -> None:
    good, (odd,) = far_behind(cluster, holders=4)
    digest = good[0].ask("digest")
    liars = cluster.rng.sample(good, 3)
    for peer, what in zip(liars, ("arrays", "arrays", "table"), strict=True):
        peer.ask("lie", what=what)
    infos = dict(zip([*good, odd], sync([*good, odd]), strict=True))
    assert infos[odd]["state"]["digest"] == digest
    assert set(infos[odd]["liars"]) >= {peer.id for peer in liars[:2]}
    assert all(infos[peer]["tx_bytes"] == 0 for peer in liars[:2])


# ---- receivers


def test_a_fetcher_that_is_killed_midway_costs_the_other_fetcher_nothing(cluster: Cluster) -> None:
    good, (victim, other) = far_behind(cluster, holders=2, fetchers=2)
    digest = good[0].ask("digest")
    pause_midway(victim, "kill")
    calls = started([*good, victim, other])
    calls.pop(victim).died()
    ended_alike(cluster, list(calls.values()), digest)
    assert calls[other].value()["rx_bytes"] == CHUNKS * CHUNK


def test_a_fetcher_that_stops_midway_is_evicted_and_the_others_have_the_state(cluster: Cluster) -> None:
    good, (frozen, other) = far_behind(cluster, holders=2, fetchers=2)
    digest = good[0].ask("digest")
    pause_midway(frozen, "stop")
    calls = started([*good, frozen, other])
    frozen.wait_event("hook")
    stopped = calls.pop(frozen)
    ended_alike(cluster, list(calls.values()), digest)
    frozen.resume()
    assert stopped.error("EvictedError")["restored"]
    cluster_of = [*good, other, frozen]
    cluster.admit([*good, other], [frozen])
    sync(cluster_of)


def test_a_fetcher_whose_time_runs_out_leaves_and_the_others_have_the_state(cluster: Cluster) -> None:
    """The least time that any member gave counts, here a holder's."""
    *good, other, slow = peers = cluster.members(4)
    give(peers, model(1), 1)
    digest = sync(peers)[0]["state"]["digest"]
    give([other, slow], model(2), 1)
    slow.ask("starve")
    calls = started([good[0], other, slow])
    calls[good[1]] = good[1].call("sync", timeout=6.0)
    error = calls.pop(slow).error("DeadlineError")
    assert error["restored"] and "left the run" in error["text"]
    assert "left the run" in slow.call("barrier").error("DeadlineError")["text"]
    ended_alike(cluster, list(calls.values()), digest)


# ---- histories


def test_a_fork_of_the_lineage_has_no_vote_however_new_it_claims_to_be(cluster: Cluster) -> None:
    peers = cluster.members(3)
    give(peers, model(1), 1)
    digest = sync(peers)[0]["state"]["digest"]
    fork = cluster.rng.choice(peers)
    fork.ask("fork_off")
    fork.ask("advance", by=1000)
    fork.ask("poke", name="exact", at=0, value=200)
    fork.ask("poke", name="exact", at=1, value=201)
    infos = sync(peers)
    assert infos[0]["state"]["digest"] == digest and infos[0]["revision"] == 1
    assert infos[fork.index]["changed"] == ["exact"]


def test_who_went_on_alone_and_comes_back_takes_the_groups_state(cluster: Cluster) -> None:
    """Each side commits syncs of its own; the one that comes back is a newcomer whatever its revision."""
    *rest, loner = peers = cluster.members(3)
    give(peers, model(1), 1)
    sync(peers)
    loner.ask("close")
    rest[0].ask("wait_world", world=2)
    for peer in rest:
        peer.ask("poke", name="exact", at=5, value=1)
        peer.ask("advance")
    digest = sync(rest)[0]["state"]["digest"]
    cluster.make([loner], group=1)
    loner.ask("connect")
    for _ in range(5):
        loner.ask("advance", by=10)
        sync([loner])
    loner.ask("close")
    cluster.make([loner])
    cluster.admit(rest, [loner])
    infos = sync(peers)
    assert infos[0]["state"]["digest"] == digest and infos[0]["holders"] == sorted(peer.id for peer in rest)


def test_a_minority_of_the_same_revision_takes_the_bytes_of_the_majority(cluster: Cluster) -> None:
    peers = cluster.members(5)
    give(peers, model(1), 1)
    digest = sync(peers)[0]["state"]["digest"]
    for peer in cluster.rng.sample(peers, 2):
        peer.ask("poke", name="half", at=3, value=cluster.rng.randrange(256))
        peer.ask("poke", name="half", at=4, value=251)
        peer.ask("poke", name="half", at=5, value=252)
    infos = sync(peers)
    assert infos[0]["state"]["digest"] == digest and len(infos[0]["holders"]) == 3


def test_a_newcomer_and_a_divergent_member_fetch_beside_each_other(cluster: Cluster) -> None:
    members = cluster.members(4)
    give(members, vast(1), 3)
    digest = sync(members)[0]["state"]["digest"]
    newcomers = cluster.spawn(2)
    cluster.make(newcomers)
    cluster.admit(members, newcomers)
    give(newcomers, vast(2), 0)
    members[1].ask("poke", name="w", at=7 * MIB, value=1)
    members[1].ask("poke", name="w", at=7 * MIB + 1, value=2)
    infos = sync([*members, *newcomers])
    assert infos[0]["state"]["digest"] == digest
    assert [info["rx_bytes"] // CHUNK for info in infos] == [0, 1, 0, 0, CHUNKS, CHUNKS]


# ---- packed


def flags(seed: int) -> dict[str, dict[str, object]]:
    """Bytes of 0 and 1, which zstd packs to less than a third."""
    return {"w": {"seed": seed, "count": CHUNKS * CHUNK, "dtype": "bool", "index": 0}}


def packing_far_behind(cluster: Cluster, holders: int) -> tuple[list[Peer], Peer]:
    *good, odd = peers = cluster.members(holders + 1)
    give(peers, flags(1), 1)
    sync(peers)
    give([odd], flags(2), 1)
    odd.ask("always_pack")
    return good, odd


def test_chunks_come_packed_and_a_holder_that_is_killed_midway_is_replaced(cluster: Cluster) -> None:
    good, odd = packing_far_behind(cluster, holders=3)
    digest = good[0].ask("digest")
    victim = cluster.rng.choice(good)
    pause_midway(odd)
    calls = started([*good, odd])
    odd.wait_event("hook")
    victim.kill()
    odd.ask("release", phase="sync.chunk")
    calls.pop(victim).died()
    ended_alike(cluster, list(calls.values()), digest)
    info = calls[odd].value()
    assert info["chunk_bytes"] == CHUNKS * CHUNK and 0 < info["rx_bytes"] < CHUNKS * CHUNK // 2


def test_a_holder_that_packs_other_bytes_is_named_and_left(cluster: Cluster) -> None:
    good, odd = packing_far_behind(cluster, holders=2)
    digest = good[0].ask("digest")
    good[1].ask("always_pack", spoil=True)
    calls = started([*good, odd])
    ended_alike(cluster, list(calls.values()), digest)
    info = calls[odd].value()
    assert info["liars"] == [good[1].id] and calls[good[1]].value()["tx_bytes"] == 0
    assert info["chunk_bytes"] == CHUNKS * CHUNK and 0 < info["rx_bytes"] < CHUNKS * CHUNK // 2
