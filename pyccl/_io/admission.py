"""A secure master's door and gate: whose an encrypted connection is, who may come in, what the operator wants.

It carries out what ``_proto/invites.py`` decides: with the time of day, random numbers, and records that are durable
before anybody is let in or told that something is done. The operator is who has the master's own identity.
"""

from __future__ import annotations

import hmac
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import trio

from pyccl._io.identity import Identity, short
from pyccl._io.tls import Door, Guest, Line
from pyccl._proto import limits
from pyccl._proto.invites import Gate, Invite, RefusedError, open_untrusted
from pyccl._proto.messages import (
    Done,
    Hello,
    InviteAsk,
    Invited,
    Kick,
    Message,
    Observe,
    PeersAsk,
    Probe,
    Pulse,
    Reflect,
    Rejected,
    RelayHello,
    Revoke,
    Sample,
    Status,
    StatusAsk,
)
from pyccl._proto.past import Admissions, Record

OPERATOR_ONLY: Final = (InviteAsk, Revoke, PeersAsk, Kick)
CLOSE_S: Final = 2.0  # to deliver what was sent before a connection is closed
_STAYS: Final = (Hello, Observe, Pulse)
_FULL_LINE_EVERY_S: Final = 60.0  # of the log, for each identity
PLAIN_REFUSED: Final = "this master takes encrypted connections only: come with an invite (pyccl-master invite)"

log = logging.getLogger("pyccl.master")


class FullError(Exception):
    """So much of this identity is connected: there is room when some of that has ended."""


@dataclass(frozen=True, slots=True)
class Run:
    """What it needs of the master. durable: returns when the records are in the journal."""

    id: Callable[[], bytes]
    has: Callable[[bytes], bool]  # peer
    knows: Callable[[bytes, bytes], bool]  # peer, incarnation
    kick: Callable[[bytes], bool]  # False: no such peer
    durable: Callable[[Sequence[Record]], Awaitable[None]]


@dataclass(slots=True)
class _Connection:
    """Of who has proven who it is. scope: around all of it. first: what it was let in with."""

    guest: Guest
    scope: trio.CancelScope
    first: Message | None = None


@dataclass(frozen=True, slots=True)
class _Present:
    """Of a control connection that was let in."""

    guest: Guest
    first: Hello | Observe
    invite: Invite | None
    address: str
    since: float


class Admission:
    """Of one master."""

    def __init__(
        self, identity: Identity, admissions: Admissions, run: Run, clock: Callable[[], float] = time.time
    ) -> None:
        self._public, self._door = identity.public, Door(identity)
        self._run_key = identity.run_key()
        self._gate, self._run, self._clock = Gate(self._run_key, admissions), run, clock
        self._present: dict[int, _Present] = {}
        self._connections: dict[bytes, list[_Connection]] = {}  # by identity
        self._full_told: dict[bytes, float] = {}  # of those identities: when it was last logged that there was no room

    async def enter(self, stream: trio.SocketStream) -> tuple[Line, Guest]:
        return await self._door.enter(stream, secrets.token_bytes(limits.KEY_BYTES))

    @contextmanager
    def connection(self, guest: Guest, scope: trio.CancelScope) -> Iterator[_Connection]:
        """It counts as its identity's in here, and ends when that is kicked."""
        connection = _Connection(guest, scope)
        self._connections.setdefault(guest.identity, []).append(connection)
        try:
            yield connection
        finally:
            others = self._connections[guest.identity]
            others.remove(connection)
            if not others:
                del self._connections[guest.identity]
                self._full_told.pop(guest.identity, None)

    async def admit(self, connection: _Connection, first: Message) -> None:
        """RefusedError: not with this first message. FullError: not now."""
        guest, connection.first = connection.guest, first
        if not self.is_for_operator(guest, first) and (reason := self._reason_for_no_room(connection)):
            self._tell_of_full(guest.identity, reason)
            raise FullError(reason)
        if isinstance(first, OPERATOR_ONLY):
            if not self._is_operator(guest):
                raise RefusedError("that is the operator's: it takes the master's own identity")
        elif isinstance(first, StatusAsk | Probe | Sample) or (
            isinstance(first, Reflect) and not self._run.knows(first.peer, first.incarnation)
        ):
            if not self._is_operator(guest):
                self._gate.judge(guest.token, guest.identity, self._run.id(), int(self._clock()))
        elif isinstance(first, RelayHello):
            if first.from_peer != guest.peer or not self._run.knows(first.from_peer, first.from_incarnation):
                raise RefusedError("the peer is another identity's, or not in the run")
            self._gate.check_identity(guest.identity)
        elif isinstance(first, Hello | Observe | Pulse | Reflect):
            if first.peer != guest.peer:
                raise RefusedError("the peer id is another identity's")
            records: list[Record] = []
            if self._run.knows(first.peer, first.incarnation):  # is in: an invite may end meanwhile
                self._gate.check_identity(guest.identity)
            elif not isinstance(first, Pulse | Reflect):
                # Of a run that it returns to and this master does not know the machine thinks what it will.
                run = first.resume.run if isinstance(first, Hello) and first.resume is not None else self._run.id()
                records += self._gate.admit(guest.token, guest.identity, first.group, run, int(self._clock()))
            if not isinstance(first, Pulse | Reflect):
                records += self._gate.came(guest.peer, guest.identity, self._run.has)
                await self._run.durable(records)
                self._gate.check_identity(guest.identity)  # it may have been kicked meanwhile

    def came(self, conn: int, guest: Guest, first: Hello | Observe, address: str) -> None:
        try:
            invite = open_untrusted(self._run_key, guest.token)
        except RefusedError:  # one that is in already needs none
            invite = None
        self._present[conn] = _Present(guest, first, invite, address, self._clock())
        name = "" if invite is None else f"{invite.id.hex()} {invite.label}".rstrip()
        log.info("admitted peer=%s identity=%s invite=%r", guest.peer.hex()[:8], short(guest.identity), name)

    def went(self, conn: int) -> None:
        self._present.pop(conn, None)

    def is_for_operator(self, guest: Guest, first: Message) -> bool:
        """What it does must be possible when nothing else is."""
        return self._is_operator(guest) and isinstance(first, (*OPERATOR_ONLY, StatusAsk))

    async def obey(self, message: Message) -> Message:
        """The answer to what the operator wants. RefusedError."""
        now_s = int(self._clock())
        if isinstance(message, InviteAsk):
            id_ = secrets.token_bytes(limits.INVITE_ID_BYTES)
            token = self._gate.issue(
                id_, self._run.id(), now_s, message.seconds, message.uses, message.group, message.label
            )
            log.info("invite_issued invite=%s seconds=%d uses=%d", id_.hex(), message.seconds, message.uses)
            return Invited(id_, token)
        if isinstance(message, Revoke):
            await self._run.durable(self._gate.revoke(message.invite, now_s))
            log.info("invite_revoked invite=%s", message.invite.hex())
            return Done()
        if isinstance(message, Kick):
            return await self._kick(message.peer)
        assert isinstance(message, PeersAsk)
        return Status(json.dumps({"peers": [self._told(present) for present in self._present.values()]}))

    async def _kick(self, peer: bytes) -> Message:
        """With all peers of its identity, and all that those have open here."""
        identity = self._gate.identity_of(peer)
        if identity is None:
            if self._run.kick(peer):
                return Rejected("it is out, but it is not known whose it is: its identity may come in again")
            return Rejected("no such peer is in the run")
        records = self._gate.ban(identity)
        log.info("kicked peer=%s identity=%s", peer.hex()[:8], short(identity))
        for other in self._gate.peers_of(identity):
            self._run.kick(other)
        for each in self._connections.get(identity, ()):
            if each.first is None or not self.is_for_operator(each.guest, each.first):
                each.scope.deadline = min(each.scope.deadline, trio.current_time() + CLOSE_S)
        await self._run.durable(records)
        return Done()

    def _told(self, present: _Present) -> dict[str, Any]:
        invite = present.invite
        return {
            "peer": present.guest.peer.hex(),
            "identity": short(present.guest.identity),
            "group": present.first.group,
            "observer": isinstance(present.first, Observe),
            "address": present.address,
            "invite": None if invite is None else invite.id.hex(),
            "label": "" if invite is None else invite.label,
            "connected_s": round(self._clock() - present.since, 1),
        }

    def _reason_for_no_room(self, mine: _Connection) -> str:
        """An invite is one installation's, however many peers it starts: it must not take everybody's connections.

        Of who is in the run and comes back only what peers hold open counts, and newcomers do not keep it out.
        """
        others = [each for each in self._connections[mine.guest.identity] if each is not mine]
        is_known = self._is_known(mine)
        count = sum(isinstance(each.first, _STAYS) for each in others) if is_known else len(others)
        if count >= limits.CONNECTIONS_OF_IDENTITY_MAX:
            return f"{count} connections of this identity are open"
        if isinstance(mine.first, Hello | Observe):
            firsts = [each.first for each in others if isinstance(each.first, Hello | Observe)]
            peers = {(first.peer, first.incarnation) for first in firsts}
            peers.discard((mine.first.peer, mine.first.incarnation))  # whose place it takes
            if len(peers) >= limits.CONTROLS_OF_IDENTITY_MAX and not is_known:
                return f"{len(peers)} peers of this identity are connected"
        elif not isinstance(mine.first, Pulse):
            count = sum(not isinstance(each.first, _STAYS) for each in others)
            if count >= limits.OTHERS_OF_IDENTITY_MAX:
                return f"{count} connections of this identity are open beside those of its peers"
        return ""

    def _is_known(self, mine: _Connection) -> bool:
        """It is of a peer in the run, each of whose connections replaces one."""
        first = mine.first
        return (
            isinstance(first, _STAYS)
            and first.peer == mine.guest.peer
            and self._run.knows(first.peer, first.incarnation)
        )

    def _tell_of_full(self, identity: bytes, reason: str) -> None:
        now = trio.current_time()
        if now - self._full_told.get(identity, -_FULL_LINE_EVERY_S) >= _FULL_LINE_EVERY_S:
            self._full_told[identity] = now
            log.warning("identity_full identity=%s cause=%s: who comes tries again", short(identity), reason)

    def _is_operator(self, guest: Guest) -> bool:
        return hmac.compare_digest(guest.identity, self._public)
