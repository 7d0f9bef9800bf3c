"""Which shared state a group goes on with: a pure function of one all-gather, so every member finds the same answer.

Only members of the group's last committed sync vote, so that newcomers, however many, can't replace what the group
holds; a voter of a foreign lineage (an old fork) is void; and a lone holder never wins against two that agree, whatever
revision it claims. Rule: design.md 6, a contract. Where nobody votes, lineages do not count: every sync begins a new
one, so peers that come back after a total loss with states of different moments hold different ones. The newest wins.

A member's strategy says what it offers and takes:
    ENFORCE_POPULAR  votes, serves, takes what is elected
    RECEIVE_ONLY     offers nothing: neither votes nor serves, takes what is elected
    SEND_ONLY        votes and serves like the first, but keeps its own arrays whatever is elected: it stands *apart*
                     where it holds something else, which is an error for it and changes nothing for the others
They mix as they like. If voters are all receive-only, nobody who may vote holds a state, so everybody else votes.
"""

from __future__ import annotations

import enum
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from pyccl.errors import RemoteProtocolError

ID_BYTES: Final = 16
HASH_BYTES: Final = 32
REVISION_MAX: Final = (1 << 63) - 1
DIGESTS_MAX: Final = 2  # digests are numbered 1..this, in pyccl.state
TIMEOUT_MS_MAX: Final = (1 << 53) - 1
_RECORD: Final = struct.Struct("<BBBB4x16s32s32sQQQ")
RECORD_BYTES: Final = _RECORD.size


class Strategy(enum.IntEnum):
    """Numbers on the wire."""

    ENFORCE_POPULAR = 0
    RECEIVE_ONLY = 1
    SEND_ONLY = 2


@dataclass(frozen=True, slots=True)
class Record:
    """What one peer contributes to the all-gather. The election does not look at the last three."""

    peer: bytes
    voter: bool  # this incarnation took part in the group's last committed sync
    lineage: bytes
    revision: int
    root: bytes  # digest over chunks, names, dtypes, shapes and revision
    layout: bytes  # hash of names, dtypes and shapes, and of what may differ
    digest: int = 1  # how chunks are hashed
    strategy: Strategy = Strategy.ENFORCE_POPULAR
    sync: int = 0  # under which the peer serves its state
    timeout_ms: int = 1
    asks: bool = False  # it knows observers, and would take a newer state of theirs where nobody votes


@dataclass(frozen=True, slots=True)
class Elected:
    """All peers but those apart have the state (lineage, revision, root) when the fetchers have fetched it.

    Each tuple is in id order. A receive-only peer that holds the state already is in none.
    """

    lineage: bytes
    revision: int
    root: bytes
    holders: tuple[bytes, ...]  # exactly that revision and root, voters or not
    fetchers: tuple[bytes, ...]  # hold something else, and take it
    apart: tuple[bytes, ...] = ()  # hold something else, and keep it


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The programs differ in `fields`: no state fits all. Groups of peers that agree, largest first."""

    groups: tuple[tuple[bytes, ...], ...]
    fields: tuple[str, ...]  # of "layout", "digest"

    @property
    def odd(self) -> tuple[bytes, ...]:
        """The peers outside the largest group (tie: the one with the lowest layout hash stays)."""
        return tuple(sorted(peer for group in self.groups[1:] for peer in group))


@dataclass(frozen=True, slots=True)
class Nobody:
    """All peers are receive-only: there is no state to take."""

    peers: tuple[bytes, ...]


Election = Elected | Mismatch | Nobody


def elect(records: Iterable[Record]) -> Election:
    """Decide. The order of the records does not matter. ValueError: none, or two of one peer (bugs of the caller)."""
    everybody = sorted(records, key=lambda record: record.peer)
    if not everybody or len({record.peer for record in everybody}) != len(everybody):
        raise ValueError("an election needs exactly one record of every peer")
    mismatch = _mismatch(everybody)
    if mismatch is not None:
        return mismatch
    offered = [record for record in everybody if record.strategy is not Strategy.RECEIVE_ONLY]
    if not offered:
        return Nobody(tuple(record.peer for record in everybody))
    lineage, revision, root = _winner(offered)
    others = [r for r in everybody if (r.revision, r.root) != (revision, root)]
    return Elected(
        lineage,
        revision,
        root,
        holders=tuple([r.peer for r in offered if (r.revision, r.root) == (revision, root)]),
        fetchers=tuple([r.peer for r in others if r.strategy is not Strategy.SEND_ONLY]),
        apart=tuple([r.peer for r in others if r.strategy is Strategy.SEND_ONLY]),
    )


def nobody_votes(records: Iterable[Record]) -> bool:
    """Whether no member of the group's last committed sync is left that offers its state."""
    return not any(record.voter and record.strategy is not Strategy.RECEIVE_ONLY for record in records)


def _mismatch(everybody: Sequence[Record]) -> Mismatch | None:
    kinds = Counter((record.layout, record.digest) for record in everybody)
    if len(kinds) == 1:
        return None
    order = sorted(kinds, key=lambda kind: (-kinds[kind], kind))
    columns = zip(("layout", "digest"), zip(*kinds, strict=True), strict=True)
    fields = tuple(name for name, values in columns if len(set(values)) > 1)
    return Mismatch(tuple(tuple(r.peer for r in everybody if (r.layout, r.digest) == kind) for kind in order), fields)


def _winner(offered: Sequence[Record]) -> tuple[bytes, int, bytes]:
    """(lineage, revision, root): newest, then most holders, then lowest root."""
    voters = [record for record in offered if record.voter]
    electorate = voters or offered
    if voters:
        lineage = _lineage(voters)
        electorate = [record for record in voters if record.lineage == lineage]
    votes = Counter((record.revision, record.root) for record in electorate)
    if voters and max(votes.values()) > 1:
        votes = Counter({candidate: count for candidate, count in votes.items() if count > 1})
    revision, root = min(votes, key=lambda candidate: (-candidate[0], -votes[candidate], candidate[1]))
    return _lineage([r for r in electorate if (r.revision, r.root) == (revision, root)]), revision, root


def _lineage(electorate: Sequence[Record]) -> bytes:
    """The lineage most voters hold, the lowest of several."""
    counts = Counter(record.lineage for record in electorate)
    return min(counts, key=lambda lineage: (-counts[lineage], lineage))


# ---- on the wire: proto/wire.md 6


def encode(record: Record) -> bytes:
    """RECORD_BYTES, without the peer: that is known from who sent it."""
    return _RECORD.pack(
        record.voter, record.strategy, record.digest, record.asks, record.lineage, record.root, record.layout,
        record.revision, record.sync, record.timeout_ms,
    )  # fmt: skip


def decode_untrusted(peer: bytes, data: bytes) -> Record:
    """The record that `peer` sent. RemoteProtocolError: it breaks proto/wire.md 6."""
    if len(data) != RECORD_BYTES:
        raise RemoteProtocolError(f"a state record of {len(data)} bytes")
    voter, strategy, digest, asks, lineage, root, layout, revision, sync, timeout_ms = _RECORD.unpack(data)
    wrong = {
        "voter": voter > 1,
        "strategy": strategy > max(Strategy),
        "digest": not 1 <= digest <= DIGESTS_MAX,
        "asks": asks > 1,
        "zero": any(data[4:8]),
        "revision": revision > REVISION_MAX,
        "timeout": not 1 <= timeout_ms <= TIMEOUT_MS_MAX,
    }
    for field, is_wrong in wrong.items():
        if is_wrong:
            raise RemoteProtocolError(f"state record of {peer.hex()[:8]}: {field} is out of range")
    return Record(
        peer, bool(voter), lineage, revision, root, layout, digest, Strategy(strategy), sync, timeout_ms, bool(asks)
    )  # fmt: skip
