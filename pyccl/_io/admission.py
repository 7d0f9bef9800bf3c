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
from collections.abc import Awaitable, Callable, Sequence
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
PLAIN_REFUSED: Final = "this master takes encrypted connections only: come with an invite (pyccl-master invite)"

log = logging.getLogger("pyccl.master")


@dataclass(frozen=True, slots=True)
class Run:
    """What it needs of the master. durable: returns when the records are in the journal."""

    id: Callable[[], bytes]
    knows: Callable[[bytes, bytes], bool]  # peer, incarnation
    kick: Callable[[bytes], bool]  # False: no such peer
    durable: Callable[[Sequence[Record]], Awaitable[None]]


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

    async def enter(self, stream: trio.SocketStream) -> tuple[Line, Guest]:
        return await self._door.enter(stream, secrets.token_bytes(limits.KEY_BYTES))

    async def admit(self, guest: Guest, first: Message) -> None:
        """RefusedError: not with this first message."""
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
            if not isinstance(first, Pulse):
                self._check_room(guest.identity)
            if self._run.knows(first.peer, first.incarnation):  # is in: an invite may end meanwhile
                self._gate.check_identity(guest.identity)
            elif not isinstance(first, Pulse | Reflect):
                # Of a run that it returns to and this master does not know the machine thinks what it will.
                run = first.resume.run if isinstance(first, Hello) and first.resume is not None else self._run.id()
                now_s = int(self._clock())
                await self._run.durable(self._gate.admit(guest.token, guest.identity, first.group, run, now_s))

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

    def conns_of(self, peer: bytes) -> list[int]:
        return [conn for conn, present in self._present.items() if present.guest.peer == peer]

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
        """With all peers of its identity that are connected."""
        identities = {p.guest.identity for p in self._present.values() if p.guest.peer == peer}
        for identity in identities:
            await self._run.durable(self._gate.ban(identity))
            log.info("kicked peer=%s identity=%s", peer.hex()[:8], short(identity))
        peers = {p.guest.peer for p in self._present.values() if p.guest.identity in identities} | {peer}
        known = [self._run.kick(other) for other in sorted(peers)]
        if identities:
            return Done()
        if any(known):
            return Rejected("it is out, but was not connected: its identity is not known, and may come in again")
        return Rejected("no such peer is in the run")

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

    def _check_room(self, identity: bytes) -> None:
        """An invite is one installation's, however many peers it starts: it must not take everybody's connections."""
        count = sum(present.guest.identity == identity for present in self._present.values())
        if count >= limits.CONNECTIONS_OF_IDENTITY_MAX:
            raise RefusedError(f"{count} peers of this identity are connected")

    def _is_operator(self, guest: Guest) -> bool:
        return hmac.compare_digest(guest.identity, self._public)
