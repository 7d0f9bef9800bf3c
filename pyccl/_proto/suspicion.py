"""Who is to be evicted, and why: a pure function of what the master has heard and what members complain of.

Nobody goes because one uplink or the master paused: silence needs a member's complaint and the master's own timer, or
a silent member that others wait for. When the master, or its own line, has failed and is back, whom members miss as
well has little more than its time-out to come back; whom the master misses alone has long. A pair that can't reach
each other is given time to mend; then one side goes, never both. Rules: design.md 5 ("Eviction for silence") and 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from pyccl._proto.messages import CAUSE_PROTOCOL, CAUSE_REFUSED, CAUSE_SILENT
from pyccl._proto.mismatch import short

CAUSE_UNREACHABLE: Final = "unreachable"  # not on the wire: an old member named in Unreachable
MEND_TIMEOUTS: Final = 2  # so many peer_timeouts a pair has to find each other again


@dataclass(frozen=True, slots=True)
class Complaint:
    cause: str
    since: float
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Seen:
    """One member, as far as this matters. `complaints` are its own, against others."""

    peer: bytes
    connected: bool
    heard_at: float
    complaints: Mapping[bytes, Complaint] = field(default_factory=dict)
    owes: str = ""  # the answer of its that all the others wait for; "": none


@dataclass(frozen=True, slots=True)
class Line:
    """The master's own: since when it works. Silence and complaints from before count from then on."""

    missed_since: float  # for whom another member does not hear either
    since: float  # for everybody else


def refused_at_once(members: Sequence[Seen]) -> list[tuple[bytes, str]]:
    """Control and data links both gone, and reconnecting refused: its process is dead, no timer is needed."""
    lost = []
    for member in members:
        if member.connected:
            continue
        by = [m for m in members if m.connected and _cause(m, member.peer) == CAUSE_REFUSED]
        if by:
            lost.append((member.peer, f"its process is gone: {short(by[0].peer)} is refused when it connects"))
    return lost


def lost_members(members: Sequence[Seen], now: float, peer_timeout: float, line: Line) -> list[tuple[bytes, str]]:
    """(peer, reason) of all members to evict now. Members stand in the order of the epoch."""
    lost = dict(refused_at_once(members))
    for member in members:
        if member.peer in lost:
            continue
        by = [m for m in members if m.connected and m.peer != member.peer and member.peer in m.complaints]
        missed = any(
            _cause(m, member.peer) in (CAUSE_SILENT, CAUSE_REFUSED) and now - m.heard_at < peer_timeout for m in by
        )
        silent_s = now - max(member.heard_at, line.missed_since if missed else line.since)
        if silent_s < peer_timeout:
            continue
        if by:
            lost[member.peer] = f"silent for {silent_s:.1f} s, {short(by[0].peer)} does not hear it either"
        elif member.owes:
            lost[member.peer] = f"silent for {silent_s:.1f} s while the others wait for {member.owes}"
        elif len(members) == 1 and not member.connected:
            lost[member.peer] = f"silent for {silent_s:.1f} s and nobody else is there"
    rest = [member for member in members if member.peer not in lost]
    return [*lost.items(), *_partitions(rest, now, peer_timeout, line.since)]


def _partitions(members: Sequence[Seen], now: float, peer_timeout: float, line_since: float) -> list[tuple[bytes, str]]:
    """Both sides of a complaint are heard: after the time to mend, the side with the most complaints goes."""
    edges: dict[tuple[int, int], Complaint] = {}  # ranks, the lower first -> the oldest complaint of the two
    rank = {member.peer: index for index, member in enumerate(members)}
    for member in members:
        if not member.connected or now - member.heard_at >= peer_timeout:
            continue  # a complaint of somebody whom we do not hear ourselves may be stale
        for peer, said in member.complaints.items():
            if peer in rank and peer != member.peer:
                complaint = replace(said, since=max(said.since, line_since))  # a Trust may have been held up before
                a, b = sorted((rank[member.peer], rank[peer]))
                known = edges.get((a, b))
                if known is None or _due(complaint, peer_timeout) < _due(known, peer_timeout):
                    edges[a, b] = complaint
    lost = []
    while due := [edge for edge, complaint in edges.items() if _due(complaint, peer_timeout) <= now]:
        degree = {r: sum(r in edge for edge in edges) for edge in due for r in edge}
        worst = max(degree, key=lambda r: (degree[r], r))
        by = sorted(r for edge in due if worst in edge for r in edge if r != worst)
        lost.append((members[worst].peer, f"it and {short(members[by[0]].peer)} do not reach each other"))
        edges = {edge: complaint for edge, complaint in edges.items() if worst not in edge}
    return lost


def _due(complaint: Complaint, peer_timeout: float) -> float:
    timeouts = 1 if complaint.cause == CAUSE_PROTOCOL else MEND_TIMEOUTS
    return complaint.since + timeouts * peer_timeout


def _cause(member: Seen, against: bytes) -> str | None:
    complaint = member.complaints.get(against)
    return complaint.cause if complaint is not None else None
