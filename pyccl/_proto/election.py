"""Which shared state a group goes on with: a pure function of one all-gather, so every member finds the same answer.

Only members of the group's last committed sync vote, so that newcomers, however many, can't replace what the group
holds; a voter of a foreign lineage (an old fork) is void; and a lone holder never wins against two that agree, whatever
revision it claims. Rule: design.md 6, a contract.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Record:
    """What one peer contributes to the all-gather."""

    peer: bytes
    voter: bool  # this incarnation took part in the group's last committed sync
    lineage: bytes
    revision: int
    root: bytes  # digest over chunks, names, dtypes, shapes and revision
    layout: bytes  # hash of names, dtypes and shapes


@dataclass(frozen=True, slots=True)
class Elected:
    """All peers have the state (lineage, revision, root) when the fetchers have fetched it from the holders."""

    lineage: bytes
    revision: int
    root: bytes
    holders: tuple[bytes, ...]  # exactly that revision and root, voters or not, in id order
    fetchers: tuple[bytes, ...]  # everybody else, in id order


@dataclass(frozen=True, slots=True)
class LayoutMismatch:
    """The programs differ in names, dtypes or shapes: no state fits all. Groups of peers by layout, largest first."""

    groups: tuple[tuple[bytes, ...], ...]

    @property
    def odd(self) -> tuple[bytes, ...]:
        """The peers outside the largest group (tie: the one with the lowest layout hash stays)."""
        return tuple(sorted(peer for group in self.groups[1:] for peer in group))


Election = Elected | LayoutMismatch


def elect(records: Iterable[Record]) -> Election:
    """Decide. The order of the records does not matter. ValueError: none, or two of one peer (bugs of the caller)."""
    everybody = sorted(records, key=lambda record: record.peer)
    if not everybody or len({record.peer for record in everybody}) != len(everybody):
        raise ValueError("an election needs exactly one record of every peer")
    layouts = Counter(record.layout for record in everybody)
    if len(layouts) > 1:
        order = sorted(layouts, key=lambda layout: (-layouts[layout], layout))
        return LayoutMismatch(tuple(tuple(r.peer for r in everybody if r.layout == layout) for layout in order))
    voters = [record for record in everybody if record.voter]
    electorate = voters or everybody
    lineage = _lineage(electorate)
    votes = Counter((r.revision, r.root) for r in electorate if r.lineage == lineage)
    if voters and max(votes.values()) > 1:
        votes = Counter({candidate: count for candidate, count in votes.items() if count > 1})
    revision, root = min(votes, key=lambda candidate: (-candidate[0], -votes[candidate], candidate[1]))
    holders = tuple(r.peer for r in everybody if (r.revision, r.root) == (revision, root))
    fetchers = tuple(r.peer for r in everybody if (r.revision, r.root) != (revision, root))
    return Elected(lineage, revision, root, holders, fetchers)


def _lineage(electorate: Sequence[Record]) -> bytes:
    """The lineage most voters hold, the lowest of several."""
    counts = Counter(record.lineage for record in electorate)
    return min(counts, key=lambda lineage: (-counts[lineage], lineage))
