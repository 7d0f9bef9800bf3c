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


def may_dial(host: str, seen_as: str) -> bool:
    """Whether `host`, as the master sees it, is that machine also to a member that the master sees at `seen_as`.

    Another host's 127.0.0.1, or 192.168.1.2 of another site, is a machine that has nothing to do with it.
    """
    try:
        address = ipaddress.ip_address(host)
        ipaddress.ip_address(seen_as)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return False  # a master names IPv4 addresses as such
    if address.is_loopback:
        return is_loopback(seen_as)
    if is_private(host):
        return is_private(seen_as) or is_loopback(seen_as)
    return not (address.is_unspecified or address.is_multicast or address.is_link_local)


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
