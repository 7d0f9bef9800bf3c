"""How a benchmark's peers come into a secure run: all have the identity of its master, and are its operators."""

from __future__ import annotations

import secrets
from typing import Final

import trio

from pyccl._io.address import invite_text, parse_address
from pyccl._io.ask import ask
from pyccl._io.identity import Identity
from pyccl._io.tls import Credentials, Ticket
from pyccl._proto import limits
from pyccl._proto.messages import InviteAsk, Invited

_INVITE_S: Final = 3600


def invite(master: str) -> str:
    """One to a master of our own identity."""
    host, port = parse_address(master)
    identity = Identity.load()
    operator = Credentials(identity, secrets.token_bytes(limits.ID_BYTES), Ticket(identity.public, b""))
    invited = trio.run(ask, host, port, operator, InviteAsk(_INVITE_S, 0, None, "bench"))
    assert isinstance(invited, Invited)
    return invite_text(master, Ticket(identity.public, invited.token))
