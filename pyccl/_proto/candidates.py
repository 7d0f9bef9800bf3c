"""Which addresses of others are tried, and in which order. Pure.

An address is what a peer says, and whoever says it must not have others knock at what only they reach: their own
machine and LAN. So those are tried only where the master sees both peers on one machine or site. Any other that is no
good costs a moment: who else answers there is not the peer, and says so (proto/wire.md 3.1). Spec: proto/wire.md 11.
"""

from __future__ import annotations

import ipaddress
from typing import Final

from pyccl._proto.epoch import Address, AddressKind, Member

_PRIVATE: Final = (  # what ipaddress's is_private holds is more: all that is not global
    *map(ipaddress.ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")),
    ipaddress.ip_network("198.18.0.0/15"),  # of labs, RFC 2544
)
_NOT_PUBLIC: Final = (  # of IPv4; from 224.0.0.0 on multicast and reserved
    *_PRIVATE,
    *map(ipaddress.ip_network, ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16")),
    *map(ipaddress.ip_network, ("192.0.0.0/24", "224.0.0.0/3")),
)
_UNICAST: Final = ipaddress.IPv6Network("2000::/3")  # all else is local, multicast, reserved, or an IPv4 address
_TUNNELS: Final = (ipaddress.IPv6Network("2001::/32"), ipaddress.IPv6Network("2002::/16"))  # to an IPv4 address


def _parsed(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """None: a name. An IPv4 address within an IPv6 one is that."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, ipaddress.IPv6Address) else address


def is_private(host: str) -> bool:
    """Whether it may mean another machine on another site; a name does not."""
    address = _parsed(host)
    return address is not None and any(address in net for net in _PRIVATE if net.version == address.version)


def is_loopback(host: str) -> bool:
    """Whether it is an address of this machine's own; names are not looked up."""
    address = _parsed(host)
    return address is not None and address.is_loopback


def is_public(host: str) -> bool:
    """Whether it is one machine's address, or router's, wherever one asks. Names, zones, tunnels are none."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None or address not in _UNICAST:
            return False
        return not any(address in network for network in _TUNNELS)
    return not any(address in network for network in _NOT_PUBLIC)


def place(host: str) -> str:
    """Who shares it is near: an IPv4 address is one by itself, an IPv6 address its /64. A name has none: ""."""
    address = _parsed(host)
    if isinstance(address, ipaddress.IPv6Address):
        return f"{int(address) >> 64:x}/64"
    return "" if address is None else str(address)


def may_dial(host: str, own: str) -> bool:
    """Whether a member that the master sees at `own` may be made to dial `host`: public, and elsewhere.

    All else would be its own machine or LAN, whoever names it. Masters judge so, too (dialback.py).
    """
    return is_public(host) and place(own) not in ("", place(host))


def may_reach(host: str, theirs: Member, mine: Member) -> bool:
    """Whether `mine` may dial `host` as an address of `theirs`: what a peer says of itself leads nobody astray.

    Public addresses; private ones on one site; loopback on the master's machine. It is the master who sees where they
    are. Names are judged by what they mean (dialing.py).
    """
    if is_loopback(host):
        return is_loopback(mine.seen) and is_loopback(theirs.seen)
    address = _parsed(host)
    return is_public(str(address)) or (is_private(host) and are_near(theirs.seen, mine.seen))


def seen_at(told: str, own: str) -> str:
    """Where we are by a master's word. It can't have us be on its machine, where loopback is dialed: `own` is what our
    end of the connection to it says."""
    return own if is_loopback(told) and not is_loopback(own) else told


def are_near(one: str, other: str) -> bool:
    """Whether those whom the master sees there are on one site: behind one router, or both on the master's."""
    at = place(one)
    return at != "" and (at == place(other) or (_is_inside(one) and _is_inside(other)))


def ordered(theirs: Member, mine: Member) -> list[Address]:
    """Those that may be dialed of one's addresses, and names. Loopback first; on one site addresses of the LAN before
    others."""

    def rank(address: Address) -> int:
        return 0 if is_loopback(address.host) else 1 if is_private(address.host) else 2

    wanted = [a for a in theirs.addresses if _parsed(a.host) is None or may_reach(a.host, theirs, mine)]
    return sorted(wanted, key=rank)


def lead_home(theirs: Member, mine: Member, *, behind_router: bool) -> bool:
    """Whether an address of theirs that may be dialed surely is that peer's machine, so that it matters who refuses
    there.

    A private address behind another router is a machine that has nothing to do with the peer. Who is behind no router
    has the site of the master's, and of those whom it sees at such an address.
    """
    return any(
        address.kind != AddressKind.LOCAL
        or not is_private(address.host)
        or not behind_router
        or place(theirs.seen) == place(mine.seen)
        for address in ordered(theirs, mine)
    )


def _is_inside(host: str) -> bool:
    """Whether the master sees there only who is on its own site."""
    address = _parsed(host)
    return address is not None and (address.is_loopback or address.is_link_local or is_private(host))
