"""The addresses of this machine's network interfaces, and what an address is good for."""

from __future__ import annotations

import array
import contextlib
import fcntl
import ipaddress
import socket
import struct
from pathlib import Path
from typing import Final

_SIOCGIFCONF: Final = 0x8912
_IFREQ_BYTES: Final = 40  # name 16, address 24
_INTERFACES_MAX: Final = 128
_SCOPE_GLOBAL: Final = "00"
_UNFIT: Final = 0x40 | 0x20 | 0x08  # IFA_F_TENTATIVE, DEPRECATED, DADFAILED
_IF_INET6: Final = Path("/proc/net/if_inet6")


def canonical(host: str) -> str:
    """An address as others write it; a name stays as it is."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def addresses_of_interfaces() -> list[str]:
    """Those that others may reach: no loopback, no link-local ones. IPv4 first."""
    return [host for host in (*_ipv4(), *_ipv6()) if not _is_useless(host)]


def _is_useless(host: str) -> bool:
    address = ipaddress.ip_address(host)
    return address.is_loopback or address.is_link_local or address.is_unspecified


def _ipv4() -> list[str]:
    buffer = array.array("B", bytes(_IFREQ_BYTES * _INTERFACES_MAX))
    at, size = buffer.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        told = fcntl.ioctl(sock, _SIOCGIFCONF, struct.pack("iL", size, at))
    used = struct.unpack("iL", told)[0]
    return [socket.inet_ntoa(buffer[i + 20 : i + 24].tobytes()) for i in range(0, used, _IFREQ_BYTES)]


def _ipv6() -> list[str]:
    lines: list[str] = []
    with contextlib.suppress(OSError):  # a kernel without IPv6
        lines = _IF_INET6.read_text(encoding="ascii").splitlines()
    found = []
    for line in lines:
        digits, _, _, scope, flags, _ = line.split()
        if scope == _SCOPE_GLOBAL and not int(flags, 16) & _UNFIT:
            found.append(str(ipaddress.IPv6Address(bytes.fromhex(digits))))
    return found
