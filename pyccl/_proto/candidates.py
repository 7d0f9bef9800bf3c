"""Which addresses of others are tried, and in which order. Pure; the attempts overlap, so it is a matter of time alone.

An address that is no good costs a moment: whoever else answers there is not the peer, and says so (proto/wire.md 3.1).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Final

from pyccl._proto.epoch import Address, AddressKind

_PRIVATE: Final = tuple(  # what is_private holds is more: all that is not global
    map(ipaddress.ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"))
)
_NOT_PUBLIC: Final = (  # of IPv4; from 224.0.0.0 on multicast and reserved
    *_PRIVATE,
    *map(ipaddress.ip_network, ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16")),
    *map(ipaddress.ip_network, ("192.0.0.0/24", "198.18.0.0/15", "224.0.0.0/3")),
)
_UNICAST: Final = ipaddress.IPv6Network("2000::/3")  # all else is local, multicast, reserved, or an IPv4 address
_TUNNELS: Final = (ipaddress.IPv6Network("2001::/32"), ipaddress.IPv6Network("2002::/16"))  # to an IPv4 address


def is_private(host: str) -> bool:
    """Whether it may mean another machine on another site; a name does not."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return any(address in network for network in _PRIVATE if network.version == address.version)


def is_loopback(host: str) -> bool:
    """Whether it is an address of this machine's own; names are not looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return f"{int(address) >> 64:x}/64"


def may_dial(host: str, own: str) -> bool:
    """Whether a member that the master sees at `own` may be made to dial `host`: public, and elsewhere.

    All else would be its own machine or LAN, whoever names it. Masters judge so, too (dialback.py).
    """
    return is_public(host) and place(own) not in ("", place(host))


def ordered(theirs: Iterable[Address], mine: Iterable[Address]) -> list[Address]:
    """`theirs` as one with the addresses `mine` dials them.

    On the same machine loopback first, on another never. Behind the same router addresses of the LAN before others,
    else public ones first.
    """
    theirs, mine = tuple(theirs), tuple(mine)
    same_machine, same_site = _are_near(theirs, mine)
    only_loopback = all(is_loopback(address.host) for address in theirs)

    def rank(address: Address) -> int:
        if is_loopback(address.host):
            return 0
        return 1 if is_private(address.host) == same_site else 2

    wanted = [a for a in theirs if only_loopback or same_machine or not is_loopback(a.host)]
    return sorted(wanted, key=rank)


def lead_home(theirs: Iterable[Address], mine: Iterable[Address], *, behind_router: bool) -> bool:
    """Whether one of `theirs` surely is that peer's machine, so that it matters who refuses there.

    A private address, dialed from another site, is a machine that has nothing to do with the peer. Who is behind no
    router has the site of the master's, and of those whom it sees at such an address.
    """
    theirs, mine = tuple(theirs), tuple(mine)
    if any(_are_near(theirs, mine)) or any(a.kind != AddressKind.LOCAL or not is_private(a.host) for a in theirs):
        return True
    on_lan = any(is_private(a.host) for a in mine if a.kind == AddressKind.LOCAL)
    return bool(theirs) and on_lan and not behind_router


def _are_near(theirs: tuple[Address, ...], mine: tuple[Address, ...]) -> tuple[bool, bool]:
    """On one machine; behind one router."""
    hosts = {address.host for address in mine if address.kind == AddressKind.LOCAL and not is_loopback(address.host)}
    outside = AddressKind.OBSERVED, AddressKind.MAPPED
    seen = {address.host for address in mine if address.kind in outside}
    same_machine = any(address.host in hosts for address in theirs if address.kind == AddressKind.LOCAL)
    return same_machine, any(address.host in seen for address in theirs if address.kind in outside)
