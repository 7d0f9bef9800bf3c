"""Masters as users write them: an address, or an invite that also says who the master is and lets its holder in."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pyccl._io.front import RELAY, Reach
from pyccl._io.identity import Identity
from pyccl._io.tls import Credentials, Ticket
from pyccl._proto import limits
from pyccl._proto.epoch import Address
from pyccl.errors import UsageError

DEFAULT_PORT: Final = 48148
SCHEME: Final = "pyccl://"
VARIABLE: Final = "PYCCL_INVITE"
_ADVERTISED_MAX: Final = limits.ADDRESSES_MAX - 3  # what a peer finds out itself needs places, too


@dataclass(frozen=True, slots=True)
class Master:
    """Where it is, and what an invite to it says; None: it is spoken to in plain."""

    host: str
    port: int
    ticket: Ticket | None = None

    @property
    def address(self) -> str:
        return join_address(self.host, self.port)


def parse_master(text: str | None) -> Master:
    """An address or an invite; None: the invite in $PYCCL_INVITE. No error repeats an invite."""
    if text is None:
        text = os.environ.get(VARIABLE)
        if not text:
            raise UsageError(f"which master? Give its address or an invite, or put an invite into {VARIABLE}")
        if not is_invite(text):
            raise UsageError(f"{VARIABLE} holds no invite: it begins with {SCHEME}")
    if not is_invite(text):
        return Master(*parse_address(text))
    where, slash, secret = text.strip()[len(SCHEME) :].partition("/")
    data = _decoded(secret) if slash else b""
    if not limits.KEY_BYTES < len(data) <= limits.KEY_BYTES + limits.TOKEN_BYTES_MAX:
        raise UsageError("the invite is incomplete, or something was added: it is pyccl://HOST:PORT/ and a long word")
    try:
        host, port = parse_address(where)
    except UsageError:  # and it repeats what may be a part of the secret
        raise UsageError(f"the invite has no HOST:PORT with a port of 1..{limits.PORT_MAX} after {SCHEME}") from None
    return Master(host, port, Ticket(data[: limits.KEY_BYTES], data[limits.KEY_BYTES :]))


def credentials_for(master: Master) -> Credentials | None:
    """Of this installation, with a salt of their own; None: for a plain master. UsageError: see Identity."""
    if master.ticket is None:
        return None
    return Credentials(Identity.load(), secrets.token_bytes(limits.ID_BYTES), master.ticket)


def reach_of(listen: object, advertise: object, relay: object) -> Reach:
    """What the arguments of a communicator mean. UsageError."""
    if relay not in RELAY:
        raise UsageError(f"relay={shown(relay)}: one of {', '.join(map(repr, RELAY))} is needed")
    if isinstance(advertise, str) or advertise is None:
        advertise = () if advertise is None else (advertise,)
    if not isinstance(advertise, Sequence) or len(advertise) > _ADVERTISED_MAX:
        raise UsageError(f"advertise={shown(advertise)}: HOST:PORT is needed, or at most {_ADVERTISED_MAX} of them")
    wanted = None if listen is None else _endpoint("listen", listen, host_needed=False)
    if wanted is not None and wanted.host:
        try:
            ipaddress.ip_address(wanted.host)
        except ValueError:
            raise UsageError(f"listen={shown(listen)}: HOST is an address of this machine, no name") from None
    advertised = tuple(_endpoint("advertise", each, host_needed=True) for each in advertise)
    return Reach(wanted, advertised, str(relay))


def _endpoint(name: str, text: object, *, host_needed: bool) -> Address:
    """Port 0: none is named."""
    problem = f"{name}={shown(text)}: HOST:PORT or HOST is needed" + ("" if host_needed else ", or :PORT")
    if not isinstance(text, str) or is_invite(text):
        raise UsageError(problem if isinstance(text, str) else f"{name}={shown(text)}: text is needed")
    host, separator, port = text.strip().rpartition(":")
    if not separator or (":" in host and not host.startswith("[")) or text.endswith("]"):
        host, port = text.strip(), "0"
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    bad_host = (host_needed and not host) or any(c.isspace() or c in "[]/" for c in host)
    bad_port = not (port.isascii() and port.isdigit()) or int(port[:6]) > limits.PORT_MAX
    if bad_host or bad_port or len(host) > limits.HOST_CHARS_MAX or (not host and port == "0"):
        raise UsageError(problem)
    return Address(host, int(port))


def shown(argument: object) -> str:
    """As an error names it. No address has a "/": what has one may be an invite or the rest of one, and is a secret."""
    text = repr(argument)
    return "..." if "/" in text else text


def is_invite(text: object) -> bool:
    return isinstance(text, str) and text.strip().lower().startswith(SCHEME)


def invite_text(address: str, ticket: Ticket) -> str:
    """What ``parse_master`` reads. A secret."""
    return f"{SCHEME}{address}/{_encoded(ticket.key + ticket.token)}"


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decoded(secret: str) -> bytes:
    """b"": it is no base64, or not as we write it: bits that mean nothing, in its last character, were altered."""
    try:
        data = base64.b64decode(secret + "=" * (-len(secret) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return b""
    return data if _encoded(data) == secret else b""


def join_address(host: str, port: int) -> str:
    """What `parse_address` reads."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_address(address: str) -> tuple[str, int]:
    """"host", "host:port", "[v6]" or "[v6]:port"."""
    if not isinstance(address, str):
        raise UsageError(f"the address of the master is text like 'host:port', not {shown(address)}")
    if is_invite(address):
        raise UsageError("an invite is given where only an address HOST:PORT will do")
    host, separator, port = address.rpartition(":")
    if not separator or (":" in host and not host.startswith("[")) or address.endswith("]"):
        host, port = address, str(DEFAULT_PORT)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    bad_port = not (port.isascii() and port.isdigit()) or len(port) > len(str(limits.PORT_MAX))
    bad_host = not host or any(c.isspace() or c in "[]/" for c in host)
    if "/" in address:  # it may be what was left of an invite, which no error repeats
        raise UsageError(f"neither HOST:PORT nor an invite, which begins with {SCHEME}")
    if bad_host or bad_port or not 1 <= int(port) <= limits.PORT_MAX:
        raise UsageError(f"{address!r} is not HOST:PORT with a port of 1..{limits.PORT_MAX}")
    return host, int(port)
