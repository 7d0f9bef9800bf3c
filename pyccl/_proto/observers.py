"""Observers of the groups, as the master keeps them: who is connected, and who was heard. It decides nothing else.

An observer holds the shared state and is no member: it owns no share, sends no DONE, stands in no epoch, and nobody
waits for it or speaks of it. So it has no standing that could be lost: it is one for as long as its control connection
lives and is told the members of its group whenever they change; they are told of it. Nothing of it is in the journal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from pyccl._proto import limits
from pyccl._proto.epoch import Address, Member
from pyccl._proto.messages import Observe

TIMEOUTS: Final = 3  # so many peer_timeouts of silence: nobody waits for it, so there is no hurry


@dataclass(slots=True)
class _Observer:
    member: Member
    group: int
    library: str
    heard_at: float
    relays: bool


class Observers:
    """By connection."""

    def __init__(self) -> None:
        self._by_conn: dict[int, _Observer] = {}

    def __contains__(self, conn: int) -> bool:
        return conn in self._by_conn

    def reason_to_reject(self, observe: Observe) -> str:
        """Why it can't be served; "": it can."""
        if observe.version != limits.PROTOCOL_VERSION:
            return f"the observer speaks protocol {observe.version}, this master {limits.PROTOCOL_VERSION}"
        others = [known for known in self._by_conn.values() if known.member.peer != observe.peer]
        if sum(known.group == observe.group for known in others) >= limits.OBSERVERS_MAX:
            return f"group {observe.group} has {limits.OBSERVERS_MAX} observers already"
        if len(others) >= limits.OBSERVERS_OF_ALL_MAX:
            return f"this master keeps at most {limits.OBSERVERS_OF_ALL_MAX} observers"
        return ""

    def add(self, conn: int, observe: Observe, seen: str, now: float) -> list[int]:
        """Connections that it takes the place of: the same peer came on them before. seen: as of a Member."""
        older = [other for other, known in self._by_conn.items() if known.member.peer == observe.peer]
        member = Member(observe.peer, observe.incarnation, observe.addresses, seen)
        self._by_conn[conn] = _Observer(member, observe.group, observe.library, now, observe.relays)
        return older

    def has(self, peer: bytes, incarnation: bytes) -> bool:
        known = (o.member for o in self._by_conn.values())
        return any((member.peer, member.incarnation) == (peer, incarnation) for member in known)

    def readdress(self, conn: int, addresses: tuple[Address, ...]) -> None:
        known = self._by_conn[conn]
        known.member = replace(known.member, addresses=addresses)

    def heard(self, conn: int, now: float) -> None:
        self._by_conn[conn].heard_at = now

    def drop(self, conn: int) -> int | None:
        """Its group, if it was one."""
        known = self._by_conn.pop(conn, None)
        return None if known is None else known.group

    def group_of(self, conn: int) -> int:
        return self._by_conn[conn].group

    def of(self, group: int) -> tuple[Member, ...]:
        """In id order."""
        return tuple(sorted((o.member for o in self._by_conn.values() if o.group == group), key=lambda m: m.peer))

    def relays(self) -> tuple[Member, ...]:
        """Those of any group that offer to relay, in id order; only so many."""
        offering = sorted((o.member for o in self._by_conn.values() if o.relays), key=lambda m: m.peer)
        return tuple(offering[: limits.RELAYS_MAX - 1])  # and the master

    def relaying(self) -> list[int]:
        """The connections of those that offer to relay."""
        return [conn for conn, known in self._by_conn.items() if known.relays]

    def conn_of(self, peer: bytes) -> int | None:
        return next((conn for conn, known in self._by_conn.items() if known.member.peer == peer), None)

    def conns(self, group: int | None = None) -> list[int]:
        """Of one group, or of all."""
        return [conn for conn, known in self._by_conn.items() if group in (None, known.group)]

    def silent(self, now: float, peer_timeout: float) -> list[int]:
        return [conn for conn, known in self._by_conn.items() if now - known.heard_at >= TIMEOUTS * peer_timeout]

    def restart_timers(self, now: float) -> None:
        for known in self._by_conn.values():
            known.heard_at = now

    def status(self) -> list[dict[str, Any]]:
        return [
            {
                "peer": known.member.peer.hex(),
                "group": known.group,
                "addresses": [f"{address.host}:{address.port}" for address in known.member.addresses],
                "library": known.library,
                "relays": known.relays,
            }
            for known in sorted(self._by_conn.values(), key=lambda known: known.member.peer)
        ]
