"""Invites: who may come into a run. Pure: the run key, ids and the time of day come in as arguments.

    token  version u8 1, run id, invite id (8 bytes), ends u64 (seconds since 1970), uses u32, group u32 + 1 or 0 (u64),
           u8 and label (UTF-8), then 32 bytes: HMAC-SHA256 by the run key over "pyccl invite 1" and all before

A token says itself what it allows, so whoever has the run key judges it without having kept it: an invite outlives the
loss of a journal. What must be remembered is which identities came in with an invite for so many, as which peers, and
what the operator took back (``Admissions``, in the journal). An identity counts once: who starts again needs no second
use.
Spec: proto/wire.md 9.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from pyccl._proto import limits
from pyccl._proto.past import Admissions, Banned, Came, Record, Revoked, Used

_VERSION: Final = 1
_CONTEXT: Final = b"pyccl invite 1"
_HEAD: Final = struct.Struct(">B16s8sQIQB")
_TAG_BYTES: Final = 32
_ALTERED: Final = "the invite was altered, or this master did not issue it"


class RefusedError(Exception):
    """Who asks does not come in; the text is for them."""


@dataclass(frozen=True, slots=True)
class Invite:
    """What a token allows. No secret: without its tag it is worth nothing."""

    run: bytes
    id: bytes
    ends: int  # seconds since 1970
    uses: int  # identities; 0: any number
    group: int | None  # None: any
    label: str


def seal(run_key: bytes, invite: Invite) -> bytes:
    """The token."""
    label = invite.label.encode()
    group = 0 if invite.group is None else invite.group + 1
    body = _HEAD.pack(_VERSION, invite.run, invite.id, invite.ends, invite.uses, group, len(label)) + label
    return body + _tag(run_key, body)


def open_untrusted(run_key: bytes, token: bytes) -> Invite:
    """RefusedError: not sealed with this key. Nothing of a token is looked at before that is known."""
    body, tag = token[:-_TAG_BYTES], token[-_TAG_BYTES:]
    if not hmac.compare_digest(_tag(run_key, body), tag):
        raise RefusedError(_ALTERED)
    if len(body) < _HEAD.size or body[0] != _VERSION:
        raise RefusedError("the invite is of another version of pyccl")
    _, run, id_, ends, uses, group, label_bytes = _HEAD.unpack_from(body)
    assert len(body) == _HEAD.size + label_bytes, "we sealed it"
    return Invite(run, id_, ends, uses, group - 1 if group else None, body[_HEAD.size :].decode())


def read_unproven(token: bytes) -> Invite | None:
    """What a token says that nobody has judged, for who holds it; None: it is none of this version."""
    body = token[:-_TAG_BYTES]
    if len(body) < _HEAD.size or body[0] != _VERSION:
        return None
    _, run, id_, ends, uses, group, label_bytes = _HEAD.unpack_from(body)
    if len(body) != _HEAD.size + label_bytes or group > limits.U32_MAX + 1:
        return None
    label = body[_HEAD.size :].decode(errors="replace")
    return Invite(run, id_, ends, uses, group - 1 if group else None, label)


def _tag(run_key: bytes, body: bytes) -> bytes:
    return hmac.digest(run_key, _CONTEXT + body, hashlib.sha256)


class Gate:
    """Judges who comes, and keeps what must be remembered of it.

    What it returns as records has taken effect here; it is to be durable before anybody is let in because of it.
    """

    def __init__(self, run_key: bytes, admissions: Admissions) -> None:
        self._run_key, self._admissions = run_key, admissions

    def issue(
        self, id_: bytes, run: bytes, now_s: int, seconds: int, uses: int, group: int | None, label: str
    ) -> bytes:
        """A token of this run. Labels are for people: what can't be printed on one line becomes "?"."""
        label = "".join(c if c.isprintable() else "?" for c in label)
        while len(label.encode()) > 2 * limits.LABEL_CHARS_MAX:
            label = label[:-1]
        return seal(self._run_key, Invite(run, id_, now_s + seconds, uses, group, label))

    def judge(self, token: bytes, identity: bytes, run: bytes, now_s: int) -> Invite:
        """RefusedError, unless this identity may come in with it now."""
        self.check_identity(identity)
        if not token:
            raise RefusedError("no invite was given")
        invite = open_untrusted(self._run_key, token)
        if invite.run != run:
            raise RefusedError("the invite is for another run of this master")
        if invite.id in self._admissions.revoked:
            raise RefusedError("the invite was revoked")
        if now_s >= invite.ends:
            raise RefusedError("the invite has expired")
        used = self._admissions.identities(invite.id)
        if invite.uses and identity not in used and len(used) >= invite.uses:
            raise RefusedError(f"the invite was used up: {len(used)} of {invite.uses}")
        return invite

    def check_identity(self, identity: bytes) -> None:
        if identity in self._admissions.banned:
            raise RefusedError("this identity was kicked out of the run")

    def admit(self, token: bytes, identity: bytes, group: int, run: bytes, now_s: int) -> Sequence[Record]:
        """It comes in: as ``judge``, and the use counts from here on."""
        invite = self.judge(token, identity, run, now_s)
        if invite.group is not None and invite.group != group:
            raise RefusedError(f"the invite is for group {invite.group}, not {group}")
        if not invite.uses or identity in self._admissions.identities(invite.id):
            return ()
        if self._admissions.used_count(now_s) >= limits.USED_MAX:
            raise RefusedError("the master can't remember more uses; an invite without --uses needs none")
        return self._taken(Used(invite.id, invite.ends, identity, now_s))

    def came(self, peer: bytes, identity: bytes, is_in: Callable[[bytes], bool]) -> Sequence[Record]:
        """It is let in: whose it is is known from here on, so that it can be kicked whether it is connected or not.

        is_in: whether that peer is in the run; who is not is forgotten first.
        """
        came = self._admissions.came
        if came.get(peer) == identity:
            return ()
        oldest = None
        if len(came) >= limits.CAME_MAX:
            oldest = next((other for other in came if not is_in(other)), next(iter(came)))
        return self._taken(Came(peer, identity, oldest))

    def identity_of(self, peer: bytes) -> bytes | None:
        """As far as it is remembered."""
        return self._admissions.came.get(peer)

    def peers_of(self, identity: bytes) -> list[bytes]:
        return [peer for peer, whose in self._admissions.came.items() if whose == identity]

    def revoke(self, id_: bytes, now_s: int) -> Sequence[Record]:
        """No invite of this id lets anybody in any more; who is in stays."""
        if id_ in self._admissions.revoked:
            return ()
        if self._admissions.revoked_count(now_s) >= limits.REVOKED_MAX:
            raise RefusedError("the master can't remember more revoked invites; --new-run makes all invites void")
        return self._taken(Revoked(id_, now_s + limits.INVITE_S_MAX, now_s))

    def ban(self, identity: bytes) -> Sequence[Record]:
        """It does not come in any more, whatever invite it has."""
        if identity in self._admissions.banned:
            return ()
        if len(self._admissions.banned) >= limits.BANNED_MAX:
            raise RefusedError("the master can't remember more kicked identities")
        return self._taken(Banned(identity))

    def _taken(self, record: Used | Revoked | Banned | Came) -> Sequence[Record]:
        self._admissions.apply(record)
        return (record,)
