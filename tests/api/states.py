"""Shared state of several peers: what they hold, and a sync whose outcome is checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster import Call, Cluster, Peer

CHUNK = 1 << 20
MIB = 1 << 20


def model(seed: int, *, index: int | None = 0) -> dict[str, dict[str, Any]]:
    """Arrays of several kinds. index: whose; None: each peer its own."""
    owner = {} if index is None else {"index": index}
    return {
        "big": {"seed": seed, "count": 2 * MIB + 5, "dtype": "float32", "shape": [1, 2 * MIB + 5], **owner},  # 9 chunks
        "exact": {"seed": seed + 1, "count": MIB, "dtype": "uint8", **owner},
        "half": {"seed": seed + 2, "count": 33, "dtype": "float16", "shape": [3, 11], **owner},
        "flags": {"seed": seed + 3, "count": 7, "dtype": "bool", **owner},
        "when": {"seed": seed + 4, "count": 9, "dtype": "datetime64[s]", **owner},
        "swapped": {"seed": seed + 5, "count": 9, "dtype": ">i4", **owner},
        "nothing": {"seed": seed + 6, "count": 0, "dtype": "float32", "shape": [0, 4], **owner},
        "scalar": {"seed": seed + 7, "count": 1, "dtype": "float64", "shape": [], **owner},
    }


NAMES = sorted(model(0))
FULL = sorted(set(NAMES) - {"nothing"})  # arrays that have bytes that can differ


def give(peers: Sequence[Peer], arrays: dict[str, dict[str, Any]], revision: int, **options: Any) -> None:
    for call in [peer.call("state", arrays=arrays, revision=revision, **options) for peer in peers]:
        call.value()


def started(peers: Sequence[Peer], strategies: dict[Peer, str] | None = None, **options: Any) -> dict[Peer, Call]:
    """All of them enter a sync; "enforce_popular" where `strategies` says nothing."""
    by = strategies or {}
    return {
        peer: peer.call("sync", **options, **({"strategy": by[peer]} if peer in by else {})) for peer in peers
    }  # fmt: skip


def sync(peers: Sequence[Peer], strategies: dict[Peer, str] | None = None) -> list[dict[str, Any]]:
    """All of them, and all hold the same afterwards; bytes sent are bytes received."""
    infos = [call.value() for call in started(peers, strategies).values()]
    assert len({info["state"]["digest"] for info in infos}) == 1
    assert all(info["state"]["arrays"] == infos[0]["state"]["arrays"] for info in infos)
    assert len({info["revision"] for info in infos}) == 1
    assert all(info["members"] == sorted(peer.id for peer in peers) for info in infos)
    assert sum(info["rx_bytes"] for info in infos) == sum(info["tx_bytes"] for info in infos)
    return infos


def divergent(cluster: Cluster, holders: int) -> tuple[list[Peer], Peer]:
    """Members that agree, and one whose arrays all differ."""
    *good, odd = peers = cluster.members(holders + 1)
    give(peers, model(1), 1)
    sync(peers)
    for name in FULL:
        if name != "flags":
            odd.ask("poke", name=name, at=0, value=123)
    return good, odd


def ended_alike(cluster: Cluster, calls: Sequence[Call], digest: str) -> None:
    """The survivors have the state, and go on."""
    peers = [call.peer for call in calls]
    for call in calls:
        assert call.value()["state"]["digest"] == digest
    cluster.reduce(peers)
    cluster.agree(peers)
    for peer in peers:
        peer.ask("advance")
    sync(peers)
