"""Names to addresses, in a thread of its own for each: Trio's would keep one idle for ten seconds after a close()."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any

import trio


class Resolver(trio.abc.HostnameResolver):
    """Give it to ``trio.socket.set_custom_hostname_resolver`` inside of ``trio.run``."""

    async def getaddrinfo(
        self,
        host: bytes | None,
        port: bytes | str | int | None,
        family: int = 0,
        type: int = 0,  # noqa: A002  the interface's name
        proto: int = 0,
        flags: int = 0,
    ) -> list[Any]:
        done, token = trio.Event(), trio.lowlevel.current_trio_token()
        found: list[Any] = []
        failed: list[OSError] = []

        def look_up() -> None:
            try:
                found.extend(socket.getaddrinfo(host, port, family, type, proto, flags))
            except OSError as e:
                failed.append(e)
            with contextlib.suppress(trio.RunFinishedError):  # nobody waits any more
                token.run_sync_soon(done.set)

        threading.Thread(target=look_up, name="pyccl-resolver", daemon=True).start()
        await done.wait()
        if failed:
            raise failed[0]
        return found

    async def getnameinfo(self, sockaddr: Any, flags: int) -> tuple[str, str]:
        raise OSError("this resolver finds addresses, no names")
