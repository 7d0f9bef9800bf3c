"""PCP (RFC 6887) and NAT-PMP (RFC 6886): how a router is asked for a port of its own, as bytes. Knows no socket.

    PCP       version 2 | opcode u8 | reserved u16 | lifetime u32 | client 16      answer: ... result u8, epoch u32
    MAP       nonce 12 | protocol u8 | reserved 3 | internal port u16 | external port u16 | external address 16
    NAT-PMP   version 0 | opcode u8 [| reserved u16 | internal u16 | external u16 | lifetime u32]

Both listen on one port; who speaks only the older one says so. Every answer carries an epoch: the seconds since the
router last lost its mappings.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass
from typing import Final

from pyccl.errors import RemoteProtocolError

PORT: Final = 5351
ANSWER_BYTES_MAX: Final = 1100  # RFC 6887 7
NONCE_BYTES: Final = 12
SUCCESS: Final = 0
UNSUPPORTED_VERSION: Final = 1
# The reasons of RFC 6887 7.4 and RFC 6886 3.5, in words for people.
PCP_RESULTS: Final = {
    1: "it speaks another version",
    2: "not allowed",
    3: "malformed request",
    4: "the operation is not supported",
    5: "an option is not supported",
    6: "malformed option",
    7: "the router's own network fails",
    8: "no room for another mapping",
    9: "the protocol is not supported",
    10: "this client has too many mappings",
    11: "the external port or address can't be had",
    12: "our address was changed on the way: there is another NAT before this router",
    13: "too many remote peers",
}
NAT_PMP_RESULTS: Final = {
    1: "it speaks another version",
    2: "not allowed: switched off",
    3: "the router's own network fails",
    4: "no room for another mapping",
    5: "the operation is not supported",
}

_PCP_VERSION: Final = 2
_NAT_PMP_VERSION: Final = 0
_RESPONSE: Final = 0x80
_ANNOUNCE: Final = 0
_MAP: Final = 1
_ADDRESS: Final = 0
_MAP_TCP: Final = 2
_TCP: Final = 6
_PCP_HEAD: Final = struct.Struct("!BBHI16s")
_PCP_ANSWER: Final = struct.Struct("!BBBBII12x")
_PCP_MAP: Final = struct.Struct("!12sB3xHH16s")
_NAT_PMP_MAP: Final = struct.Struct("!BBHHHI")
_NAT_PMP_ANSWER: Final = struct.Struct("!BBHI")
_NAT_PMP_MAPPED: Final = struct.Struct("!HHI")
_ANY_IPV4: Final = ipaddress.IPv6Address("::ffff:0.0.0.0").packed


@dataclass(frozen=True, slots=True)
class Mapped:
    """What a router gave. host: "" where the protocol tells it by another question."""

    internal_port: int
    host: str
    port: int
    lifetime_s: int
    nonce: bytes = b""


@dataclass(frozen=True, slots=True)
class Answer:
    """result: SUCCESS, or a key of the protocol's reasons. mapped, host: of a success, where that was asked for."""

    result: int
    epoch_s: int
    mapped: Mapped | None = None
    host: str = ""


# ---- PCP


def pcp_announce(client: str) -> bytes:
    """Asks for nothing but an answer."""
    return _PCP_HEAD.pack(_PCP_VERSION, _ANNOUNCE, 0, 0, _packed(client))


def pcp_map(client: str, nonce: bytes, internal: int, external: tuple[str, int] | None, lifetime_s: int) -> bytes:
    """A TCP port. external: the address and port that would be liked best; lifetime_s 0 takes the mapping away."""
    host, port = external or ("", 0)
    address = _packed(host) if host else bytes(16) if ":" in client else _ANY_IPV4
    head = _PCP_HEAD.pack(_PCP_VERSION, _MAP, 0, lifetime_s, _packed(client))
    return head + _PCP_MAP.pack(nonce, _TCP, internal, port, address)


def read_pcp_untrusted(data: bytes) -> Answer:
    """RemoteProtocolError: no answer. What follows it, options that were not asked for, is not looked at."""
    if len(data) >= 4 and data[0] == _NAT_PMP_VERSION and data[1] & _RESPONSE:
        return Answer(UNSUPPORTED_VERSION, 0)  # as RFC 6887 9 has it: eight bytes of NAT-PMP
    if not _PCP_ANSWER.size <= len(data) <= ANSWER_BYTES_MAX:
        raise RemoteProtocolError(f"a PCP answer of {len(data)} bytes")
    version, opcode, _, result, lifetime_s, epoch_s = _PCP_ANSWER.unpack_from(data)
    if not opcode & _RESPONSE:
        raise RemoteProtocolError("a PCP request")
    if version != _PCP_VERSION:
        return Answer(UNSUPPORTED_VERSION, epoch_s)
    if result != SUCCESS or opcode == _RESPONSE | _ANNOUNCE:
        return Answer(result, epoch_s)
    if opcode != _RESPONSE | _MAP or len(data) < _PCP_ANSWER.size + _PCP_MAP.size:
        raise RemoteProtocolError(f"a PCP answer with opcode {opcode:#x} and {len(data)} bytes")
    nonce, protocol, internal, external, address = _PCP_MAP.unpack_from(data, _PCP_ANSWER.size)
    if protocol != _TCP or (external == 0 and lifetime_s != 0):
        raise RemoteProtocolError("a PCP answer for no TCP port")
    return Answer(SUCCESS, epoch_s, Mapped(internal, _unpacked(address), external, lifetime_s, nonce))


# ---- NAT-PMP


def nat_pmp_address() -> bytes:
    """Asks for the external address."""
    return bytes([_NAT_PMP_VERSION, _ADDRESS])


def nat_pmp_map(internal: int, external: int, lifetime_s: int) -> bytes:
    """A TCP port. external: the one that would be liked best, or 0; lifetime_s 0 takes the mapping away."""
    return _NAT_PMP_MAP.pack(_NAT_PMP_VERSION, _MAP_TCP, 0, internal, external, lifetime_s)


def read_nat_pmp_untrusted(data: bytes) -> Answer:
    """RemoteProtocolError: no answer."""
    if not _NAT_PMP_ANSWER.size <= len(data) <= ANSWER_BYTES_MAX:
        raise RemoteProtocolError(f"a NAT-PMP answer of {len(data)} bytes")
    version, opcode, result, epoch_s = _NAT_PMP_ANSWER.unpack_from(data)
    if not opcode & _RESPONSE:
        raise RemoteProtocolError("a NAT-PMP request")
    if version != _NAT_PMP_VERSION:
        return Answer(UNSUPPORTED_VERSION, 0)
    if result != SUCCESS:
        return Answer(result, epoch_s)
    body = data[_NAT_PMP_ANSWER.size :]
    if opcode == _RESPONSE | _ADDRESS and len(body) == 4:
        return Answer(SUCCESS, epoch_s, host=str(ipaddress.IPv4Address(body)))
    if opcode == _RESPONSE | _MAP_TCP and len(body) == _NAT_PMP_MAPPED.size:
        internal, external, lifetime_s = _NAT_PMP_MAPPED.unpack(body)
        if external != 0 or lifetime_s == 0:
            return Answer(SUCCESS, epoch_s, Mapped(internal, "", external, lifetime_s))
    raise RemoteProtocolError(f"a NAT-PMP answer with opcode {opcode:#x} and {len(data)} bytes")


# ---- epochs


def kept_mappings(before: tuple[int, float], after: tuple[int, float]) -> bool:
    """Whether a router has kept its mappings between two answers (RFC 6887 8.5).

    Args:
        before, after: the answer's epoch, and our monotonic time when it came, seconds.
    """
    server_s, client_s = after[0] - before[0], after[1] - before[1]
    if server_s < -1:
        return False
    # Clocks may differ by a sixteenth, and an answer be late by two seconds.
    return client_s + 2 >= server_s - server_s / 16 and server_s + 2 >= client_s - client_s / 16


def _packed(host: str) -> bytes:
    address = ipaddress.ip_address(host)
    return address.packed if address.version == 6 else ipaddress.IPv6Address(f"::ffff:{host}").packed


def _unpacked(address: bytes) -> str:
    found = ipaddress.IPv6Address(address)
    return str(found.ipv4_mapped or found)
