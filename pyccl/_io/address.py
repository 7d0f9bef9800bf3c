"""Addresses of masters as users write them."""

from __future__ import annotations

from typing import Final

from pyccl._proto import limits
from pyccl.errors import UsageError

DEFAULT_PORT: Final = 48148


def parse_address(address: str) -> tuple[str, int]:
    """"host", "host:port", "[v6]" or "[v6]:port"."""
    if not isinstance(address, str):
        raise UsageError(f"the address of the master is text like 'host:port', not {address!r}")
    host, separator, port = address.rpartition(":")
    if not separator or (":" in host and not host.startswith("[")) or address.endswith("]"):
        host, port = address, str(DEFAULT_PORT)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    bad_host = not host or any(c.isspace() or c in "[]/" for c in host)
    if bad_host or not (port.isascii() and port.isdigit()) or not 1 <= int(port) <= limits.PORT_MAX:
        raise UsageError(f"{address!r} is not HOST:PORT with a port of 1..{limits.PORT_MAX}")
    return host, int(port)
