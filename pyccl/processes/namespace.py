"""Network namespaces without names: descriptors of ours and the processes in them keep them.

When all of these are gone, and be it by SIGKILL, the kernel takes them away with every interface. Nothing of the host's
own network is touched. Needs root, iproute2 and nsenter.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")
_CLONE_NEWNET: Final = 0x40000000
_libc: Final = ctypes.CDLL(None, use_errno=True)


class NetworkError(Exception):
    """This network can't be had here; the text says why."""


_PACKAGES: Final = {"ip": "iproute2", "nsenter": "util-linux", "nft": "nftables", "miniupnpd": "miniupnpd-nftables"}


def need_tools(*more: str) -> None:
    """NetworkError if ip, nsenter or one of these programs are missing."""
    missing = [tool for tool in ("ip", "nsenter", *more) if shutil.which(tool) is None]
    if missing:
        packages = ", ".join(_PACKAGES[tool] for tool in missing)
        raise NetworkError(f"{' and '.join(missing)} not found (Debian: {packages})")


class Namespace:
    """A network namespace, kept by a descriptor."""

    def __init__(self) -> None:
        self._fd = -1
        error: list[int] = []

        def make() -> None:  # unshare(2) is of the calling thread alone
            if _libc.unshare(_CLONE_NEWNET) != 0:
                error.append(ctypes.get_errno())
                return
            self._fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        if error:
            hint = " (run it as root)" if error[0] == errno.EPERM else ""
            raise NetworkError(f"no network namespace can be made: {os.strerror(error[0])}{hint}")

    @property
    def path(self) -> str:
        """For other processes, as long as this one lives and has it open."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    @property
    def inode(self) -> int:
        """What tells it from others: of /proc/PID/ns/net of the processes in it."""
        return os.fstat(self._fd).st_ino

    def command(self) -> list[str]:
        return ["nsenter", f"--net={self.path}", "--"]

    def ip(self, *commands: str) -> None:
        """Run commands of ip(8) inside."""
        run = [*self.command(), "ip", "-batch", "-"]
        done = subprocess.run(run, input="\n".join(commands), text=True, capture_output=True, check=False)
        if done.returncode != 0:
            raise NetworkError(f"ip: {'; '.join(commands)}: {done.stderr.strip()}")

    def enter(self) -> None:
        """The calling thread."""
        if _libc.setns(self._fd, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")

    def call(self, function: Callable[[], T]) -> T:
        """Call it in a thread inside. Sockets and devices that it opens stay on this network."""
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                self.enter()
                results.append(function())
            except BaseException as error:  # noqa: BLE001  it is the caller's
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def close(self) -> None:
        os.close(self._fd)
