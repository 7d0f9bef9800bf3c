"""Everything was lost but files: the peers that come back go on from the newest revision that is whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster import Cluster, Peer
from states import give, sync

MODEL: dict[str, dict[str, Any]] = {
    "w": {"seed": 1, "count": 300_000, "dtype": "float32", "index": 0},
    "half": {"seed": 2, "count": 33, "dtype": "float16", "shape": [3, 11], "index": 0},
}


def train(peers: Sequence[Peer], rounds: int) -> None:
    """The same deterministic update on all, agreed upon."""
    for number in range(rounds):
        for peer in peers:
            peer.ask("poke", name="w", at=4 * number, value=number + 1)
            peer.ask("advance")
        sync(peers)


def saved(cluster: Cluster, directory: Path, revisions: Sequence[int]) -> list[tuple[Path, str]]:
    """A run of as many peers; each saves at another revision, all are killed. (file, digest) of each."""
    peers = cluster.members(len(revisions))
    give(peers, MODEL, 0)
    sync(peers)
    files: list[tuple[Path, str]] = []
    for revision in range(max(revisions) + 1):
        for peer, wanted in zip(peers, revisions, strict=True):
            if wanted == revision:
                files.append((directory / str(revision), peer.ask("digest")))
                peer.ask("save", path=str(files[-1][0]))
        train(peers, 1)
    for peer in peers:
        peer.kill()
    cluster.master.kill()
    cluster.restart_master("--journal", str(cluster.journal), "--new-run")
    return files


def test_the_newest_of_saved_states_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    files = saved(cluster, tmp_path, (1, 2, 4))
    peers = cluster.members(4)
    for peer, (file, digest) in zip(peers, cluster.rng.sample(files, 3), strict=False):
        peer.ask("load", path=str(file))
        assert peer.ask("digest") == digest
    give(peers[3:], {name: how | {"seed": 9} for name, how in MODEL.items()}, 0)
    infos = sync(peers)
    assert (infos[0]["revision"], infos[0]["state"]["digest"]) == (4, files[-1][1])
    train(peers, 1)


def test_a_torn_newest_file_is_refused_and_the_next_one_wins(cluster: Cluster, tmp_path: Path) -> None:
    files = saved(cluster, tmp_path, (1, 2, 4))
    torn, _ = files[-1]
    torn.write_bytes(torn.read_bytes()[:-4096])
    peers = cluster.members(3)
    assert peers[2].call("load", path=str(torn)).error("StateFileError")["class"] == "StateFileError"
    for peer, (file, _) in zip(peers, files, strict=True):
        if file != torn:
            peer.ask("load", path=str(file))
    give(peers[2:], MODEL, 0)
    infos = sync(peers)
    assert (infos[0]["revision"], infos[0]["state"]["digest"]) == (2, files[1][1])


def test_a_lone_stale_peer_does_not_overwrite_a_newer_state(cluster: Cluster, tmp_path: Path) -> None:
    """It comes first and goes on alone; who brings a newer state later is heard all the same."""
    (old, _), (new, digest) = saved(cluster, tmp_path, (1, 4))
    (stale,) = cluster.members(1)
    stale.ask("load", path=str(old))
    train([stale], 2)
    (other,) = cluster.spawn(1)
    cluster.make([other])
    cluster.admit([stale], [other])
    other.ask("load", path=str(new))
    infos = sync([stale, other])
    assert (infos[0]["revision"], infos[0]["state"]["digest"]) == (4, digest)


def test_a_loaded_state_does_not_outvote_a_run_that_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    _, (new, _) = saved(cluster, tmp_path, (1, 4))
    peers = cluster.members(2)
    give(peers, MODEL, 0)
    digest = sync(peers)[0]["state"]["digest"]
    (back,) = cluster.spawn(1)
    cluster.make([back])
    cluster.admit(peers, [back])
    back.ask("load", path=str(new))
    infos = sync([*peers, back])
    assert (infos[0]["revision"], infos[0]["state"]["digest"]) == (0, digest)
