"""The router that this machine sends to what is far away, as the kernel's routing tables have it.

Read through the calling thread, whose network namespace may not be the process's.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROUTES_IPV4: Final = Path("/proc/thread-self/net/route")
ROUTES_IPV6: Final = Path("/proc/thread-self/net/ipv6_route")
_UP: Final = 0x1  # linux/route.h
_GATEWAY: Final = 0x2
# Nothing is sent there: the kernel is asked which address of ours it would send from.
_FAR_AWAY_IPV6: Final = "2000::1"
_ANY_PORT: Final = 9


@dataclass(frozen=True, slots=True)
class Gateway:
    """A router.

    host: its address, without a scope. interface: by which it is reached; its name is the scope of a link-local one.
    local: our address, which it forwards to.
    """

    host: str
    interface: str
    local: str

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    def endpoint(self, port: int) -> tuple[str, int] | tuple[str, int, int, int]:
        """To connect a socket to."""
        if self.family == socket.AF_INET:
            return self.host, port
        scope = socket.if_nametoindex(self.interface) if ipaddress.ip_address(self.host).is_link_local else 0
        return self.host, port, 0, scope


def find_gateway(family: socket.AddressFamily = socket.AF_INET) -> Gateway | None:
    """Of the default route; None: there is no such route, or no router on it."""
    path, read = (ROUTES_IPV6, routes_ipv6) if family == socket.AF_INET6 else (ROUTES_IPV4, routes_ipv4)
    try:
        found = read(path.read_text(encoding="ascii"))
    except FileNotFoundError:  # a kernel without IPv6
        return None
    if not found:
        return None
    _, host, interface = min(found)
    local = _local_address(family, _FAR_AWAY_IPV6 if family == socket.AF_INET6 else host)
    return None if local is None else Gateway(host, interface, local)


def routes_ipv4(text: str) -> list[tuple[int, str, str]]:
    """Default routes through a router in the text of /proc/net/route: metric, router, interface."""
    found = []
    for line in text.splitlines()[1:]:
        interface, destination, router, flags, _, _, metric, mask = line.split()[:8]
        if int(destination, 16) == 0 and int(mask, 16) == 0 and int(flags, 16) & (_UP | _GATEWAY) == _UP | _GATEWAY:
            found.append((int(metric), str(ipaddress.IPv4Address(bytes.fromhex(router)[::-1])), interface))
    return found


def routes_ipv6(text: str) -> list[tuple[int, str, str]]:
    """As ``routes_ipv4``, of /proc/net/ipv6_route."""
    found = []
    for line in text.splitlines():
        destination, prefix, _, _, router, metric, _, _, flags, interface = line.split()
        is_default = int(destination, 16) == 0 and int(prefix, 16) == 0
        if is_default and int(flags, 16) & (_UP | _GATEWAY) == _UP | _GATEWAY:
            found.append((int(metric, 16), str(ipaddress.IPv6Address(bytes.fromhex(router))), interface))
    return found


def _local_address(family: socket.AddressFamily, towards: str) -> str | None:
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((towards, _ANY_PORT))
        except OSError:  # the route went away, or there is no address to send from
            return None
        return str(sock.getsockname()[0])
