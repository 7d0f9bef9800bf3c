"""sync_shared_state: who offers, takes or keeps what; arrays that may differ; digests; where chunks are staged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, Peer
from states import CHUNK, FULL, MIB, divergent, give, model, started, sync

RECEIVE, SEND = "receive_only", "send_only"
DIGESTS = ["fast", "sha256"]


def digests(peers: list[Peer]) -> list[str]:
    return [peer.ask("digest") for peer in peers]


# ---- strategies


def test_receivers_take_what_the_sender_holds_whatever_they_claim(cluster: Cluster) -> None:
    trainer, *others = peers = cluster.members(3)
    give(others, model(2), 9)  # two that agree on something newer
    give([trainer], model(1), 1)
    digest = trainer.ask("digest")
    infos = sync(peers, {trainer: SEND, others[0]: RECEIVE, others[1]: RECEIVE})
    assert all(info["state"]["digest"] == digest and info["holders"] == [trainer.id] for info in infos)
    assert infos[0]["changed"] == [] and sorted(infos[1]["changed"]) == sorted(infos[2]["changed"]) == FULL


def test_a_newcomer_may_receive_only_while_members_send_only(cluster: Cluster) -> None:
    members = cluster.members(2)
    give(members, model(1), 5)
    digest = sync(members)[0]["state"]["digest"]
    newcomer = cluster.spawn(1)
    cluster.make(newcomer)
    cluster.admit(members, newcomer)
    give(newcomer, model(2), 100)
    infos = sync([*members, *newcomer], {members[0]: SEND, members[1]: SEND, newcomer[0]: RECEIVE})
    assert {info["state"]["digest"] for info in infos} == {digest} and infos[0]["apart"] == []
    assert sync([*members, *newcomer])[2]["rx_bytes"] == 0  # in step, and a member like the others from then on


def test_who_receives_only_serves_nobody_though_it_is_up_to_date(cluster: Cluster) -> None:
    good, odd = divergent(cluster, holders=3)
    infos = sync([*good, odd], {good[1]: RECEIVE})
    assert infos[3]["holders"] == sorted([good[0].id, good[2].id])
    assert infos[1]["tx_bytes"] == infos[1]["rx_bytes"] == 0 < infos[3]["rx_bytes"]


def test_all_receive_only_is_an_error_on_all_and_changes_nothing(cluster: Cluster) -> None:
    peers = cluster.members(3)
    give(peers, model(1, index=None), 1)
    for call in started(peers, dict.fromkeys(peers, RECEIVE)).values():
        error = call.error("MismatchError")
        assert error["fields"] == ["strategy"] and error["restored"]
        assert error["peers"] == sorted(peer.id for peer in peers)
    sync(peers)
    cluster.reduce(peers)


def test_alone_a_sender_holds_the_state_and_a_receiver_has_nobody_to_ask(cluster: Cluster) -> None:
    (peer,) = cluster.members(1)
    give([peer], model(1), 3)
    assert started([peer], {peer: RECEIVE})[peer].error("MismatchError")["fields"] == ["strategy"]
    (info,) = sync([peer], {peer: SEND})
    assert (info["revision"], info["changed"], info["holders"]) == (3, [], [peer.id])


@pytest.mark.parametrize("ahead", [0, 7])
def test_a_sender_that_differs_gets_an_error_and_the_others_go_on(cluster: Cluster, ahead: int) -> None:
    good, odd = divergent(cluster, holders=3)
    digest = good[0].ask("digest")
    lagging = good[2]
    lagging.ask("poke", name="exact", at=1, value=77)
    lagging.ask("poke", name="exact", at=2, value=78)
    odd.ask("advance", by=ahead)
    calls = started([*good, odd], {odd: SEND})
    error = calls.pop(odd).error("MismatchError")
    assert error["peers"] == [odd.id] and error["restored"]
    assert error["fields"] == (["revision", "root"] if ahead else ["root"])
    for call in calls.values():
        info = call.value()
        assert info["state"]["digest"] == digest and info["apart"] == [odd.id]
        assert info["members"] == sorted(peer.id for peer in [*good, odd])
    # it was not in step: whatever it holds has no vote until it takes what the others have
    odd.ask("advance", by=1000)
    infos = sync([*good, odd])
    assert infos[0]["state"]["digest"] == digest and infos[0]["apart"] == []


def test_who_stood_apart_never_outvotes_the_one_that_went_on(cluster: Cluster) -> None:
    """One against one, again and again: lineages that tie would be decided by chance."""
    member, apart = peers = cluster.members(2)
    give(peers, model(1), 5)
    sync(peers)
    apart.ask("poke", name="exact", at=0, value=1)
    apart.ask("poke", name="exact", at=1, value=2)
    member.ask("advance")
    digest = member.ask("digest")
    for _ in range(8):
        calls = started(peers, {apart: SEND})
        assert calls[member].value()["state"]["digest"] == digest
        assert calls[apart].error("MismatchError")["restored"]
        apart.ask("advance", by=100)
    assert sync(peers)[1]["state"]["digest"] == digest


def test_a_trainer_that_comes_back_sends_to_members_that_only_receive(cluster: Cluster) -> None:
    members = cluster.members(2)
    give(members, model(1), 5)
    sync(members)
    trainer = cluster.spawn(1)
    cluster.make(trainer)
    cluster.admit(members, trainer)
    give(trainer, model(2), 6)
    digest = trainer[0].ask("digest")
    infos = sync([*members, *trainer], {members[0]: RECEIVE, members[1]: RECEIVE, trainer[0]: SEND})
    assert infos[0]["state"]["digest"] == digest


# ---- arrays that may differ


def unequal(seed: int, index: int | None = None) -> dict[str, dict[str, Any]]:
    """A big array and a small one, equal on all; one each peer has its own of, between them by name."""
    own = {} if index is None else {"index": index}
    return {
        "a": {"seed": seed, "count": 2 * CHUNK + 5, "dtype": "uint8", "index": 0},
        "rng": {"seed": seed + 1, "count": CHUNK + 7, "dtype": "uint8", **own},
        "z": {"seed": seed + 2, "count": 3, "dtype": "float64", "index": 0},
    }


def told(peer: Peer) -> dict[str, Any]:
    return dict(peer.ask("told_state"))


@pytest.mark.parametrize("digest", DIGESTS)
def test_content_that_may_differ_is_in_no_digest_and_stays_where_it_is(cluster: Cluster, digest: str) -> None:
    options = {"allow_content_inequality": ["rng"], "digest": digest}
    peers = cluster.members(2)
    give(peers, unequal(1), 4, **options)
    assert len(set(digests(peers))) == 1
    assert len({told(peer)["arrays"]["rng"] for peer in peers}) == 2
    for call in started(peers).values():
        info = call.value()
        assert (info["rx_bytes"], info["changed"], len(info["holders"])) == (0, [], 2)
    # a newcomer has all from the others but its own generator
    newcomer = cluster.spawn(1)
    cluster.make(newcomer)
    cluster.admit(peers, newcomer)
    give(newcomer, unequal(7), 0, **options)
    before = told(newcomer[0])["arrays"]["rng"]
    infos = [call.value() for call in started([*peers, *newcomer]).values()]
    assert sorted(infos[2]["changed"]) == ["a", "z"] and infos[2]["rx_bytes"] == 2 * CHUNK + 5 + 24
    assert told(newcomer[0])["arrays"] == {**told(peers[0])["arrays"], "rng": before}
    assert len({info["state"]["digest"] for info in infos}) == 1


def test_members_must_allow_the_same_names_to_differ(cluster: Cluster) -> None:
    peers = cluster.members(3)
    give(peers, unequal(1, index=0), 4, allow_content_inequality=["rng"])
    give(peers[1:2], unequal(1, index=0), 4)
    for call in started(peers).values():
        error = call.error("MismatchError")
        assert (error["fields"], error["peers"]) == (["allow_content_inequality"], [peers[1].id])
        assert "array 'rng'" in error["text"]


def test_a_state_of_nothing_but_unequal_content_still_has_a_revision(cluster: Cluster) -> None:
    peers = cluster.members(2)
    arrays = {"rng": unequal(1)["rng"]}
    give(peers, arrays, 4, allow_content_inequality=["rng"])
    peers[1].ask("advance", by=3)
    for call in started(peers).values():
        info = call.value()
        assert (info["revision"], info["changed"], info["rx_bytes"]) == (7, [], 0)


# ---- digests


def test_a_state_is_synchronised_under_sha256(cluster: Cluster) -> None:
    peers = cluster.members(3)
    give(peers, model(1), 1, digest="sha256")
    before = sync(peers)[0]["state"]
    assert len(before["digest"]) == 64
    odd = cluster.rng.choice(peers)
    odd.ask("poke", name="big", at=3 * CHUNK + 17, value=0)
    odd.ask("poke", name="big", at=3 * CHUNK + 18, value=255)
    info = sync(peers)[odd.index]
    assert (info["state"], info["changed"], info["rx_bytes"]) == (before, ["big"], CHUNK)


def test_members_must_use_the_same_digest(cluster: Cluster) -> None:
    peers = cluster.members(3)
    give(peers, model(1), 1)
    give(peers[2:], model(1), 1, digest="sha256")
    for call in started(peers).values():
        error = call.error("MismatchError")
        assert (error["fields"], error["peers"]) == (["digest"], [peers[2].id]) and error["restored"]
    give(peers[2:], model(1), 1)
    sync(peers)


# ---- staging


@pytest.mark.parametrize("digest", DIGESTS)
def test_a_big_state_is_staged_in_a_file_without_a_name(cluster: Cluster, tmp_path: Path, digest: str) -> None:
    members = cluster.members(3)
    *good, odd = members
    give(good, model(1), 1, digest=digest)
    give([odd], model(2), 0, digest=digest)
    odd.ask("staging", memory_bytes=MIB, directory=str(tmp_path))
    odd.ask("hook", phase="sync.commit", action="wait")
    calls = started(members)
    odd.wait_event("hook")
    (file,) = odd.call("open_files", directory=str(tmp_path), thread="look").value()
    assert "(deleted)" in file and list(tmp_path.iterdir()) == []
    odd.ask("release", phase="sync.commit")
    infos = [calls[peer].value() for peer in members]
    assert len({info["state"]["digest"] for info in infos}) == 1 and sorted(infos[2]["changed"]) == FULL
    assert odd.ask("open_files", directory=str(tmp_path)) == []


@pytest.mark.parametrize("why", ["missing", "full"])
def test_who_can_not_stage_the_state_names_the_directory_and_all_keep_theirs(
    cluster: Cluster, tmp_path: Path, why: str
) -> None:
    *good, odd = members = cluster.members(3)
    give(good, model(1), 1)
    give([odd], model(2), 0)
    directory = str(tmp_path if why == "full" else tmp_path / "gone")
    odd.ask("staging", memory_bytes=MIB, directory=directory, file_bytes=4 * MIB if why == "full" else None)
    calls = started(members)
    error = calls.pop(odd).error("StagingError")
    assert directory in error["text"] and error["pyccl"] and error["restored"]
    for call in calls.values():
        error = call.error("PeerLostError")
        assert error["peer"] == odd.id and "stage" in error["text"] and error["restored"]
    cluster.reduce(members)
    odd.ask("staging", memory_bytes=MIB, directory=str(tmp_path))
    sync(members)


def test_a_disk_that_fails_after_the_commit_costs_its_owner_the_membership(cluster: Cluster, tmp_path: Path) -> None:
    *good, odd = members = cluster.members(3)
    give(good, model(1), 1)
    give([odd], model(2), 0)
    odd.ask("staging", memory_bytes=MIB, directory=str(tmp_path))
    odd.ask("break_disk")
    calls = started(members)
    assert str(tmp_path) in calls.pop(odd).error("StagingError")["text"]
    digest = {call.value()["state"]["digest"] for call in calls.values()}
    cluster.reduce(good)
    odd.ask("mend_disk")
    cluster.admit(good, [odd])
    assert {info["state"]["digest"] for info in sync(members)} == digest


def test_ctrl_c_while_the_arrays_are_replaced_comes_when_they_are_whole(cluster: Cluster) -> None:
    *good, odd = members = cluster.members(3)
    give(good, model(1), 1)
    give([odd], model(2), 0)
    odd.ask("hook", phase="sync.replace", action="interrupt")
    calls = started(members)
    calls.pop(odd).error("KeyboardInterrupt")
    (digest,) = {call.value()["state"]["digest"] for call in calls.values()}
    assert odd.ask("digest") == digest
    assert sync(members)[2]["rx_bytes"] == 0


def test_a_state_far_beyond_the_bounds_costs_little_memory(cluster: Cluster, tmp_path: Path) -> None:
    """Newcomer: window of chunks in flight; holder: nothing that grows with the state."""
    mib = 160
    holder, newcomer = members = cluster.members(2)
    for seed, peer in enumerate(members):
        give([peer], {"big": {"seed": seed, "count": mib * MIB, "dtype": "uint8"}}, 1 - seed)
    newcomer.ask("staging", memory_bytes=32 * MIB, directory=str(tmp_path))
    before = {peer: peer.ask("memory")["VmRSS"] for peer in members}
    for peer in members:
        peer.ask("forget_peak")
    infos = [call.value() for call in [peer.call("sync", tell_state=False) for peer in members]]
    assert infos[1]["rx_bytes"] == mib * MIB
    extra = {peer: peer.ask("memory")["VmHWM"] - before[peer] for peer in members}
    assert extra[newcomer] < 48 * MIB and extra[holder] < 16 * MIB, extra
    assert len(set(digests(members))) == 1
