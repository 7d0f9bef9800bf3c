"""A scenario that is built: a network namespace for each host and router, a TUN device at the end of each line, and the
emulator between them.

    with Lab(load("pacific")) as lab:
        server = lab.start(0, ["python3", "server.py"], stdout=subprocess.PIPE)
        client = lab.start(1, ["python3", "client.py", lab.addresses[0]])
        client.wait(timeout=60)

Leaving the block kills all processes in the namespaces. So does the end of this process, whatever ends it. Needs root,
iproute2 and nsenter; with routers nftables, for UPnP miniupnpd.
"""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from pyccl.netlab.emulator import Addresses, Counts, Emulator
from pyccl.netlab.nat import DEVICE
from pyccl.netlab.scenario import Nat, Scenario
from pyccl.netlab.site import Site
from pyccl.processes.namespace import Namespace, NetworkError, need_tools

T = TypeVar("T")
# linux/if_tun.h
_TUNSETIFF: Final = 0x400454CA
_TUNSETOFFLOAD: Final = 0x400454D0
_IFF_TUN: Final = 0x0001
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_TUN_F_CSUM: Final = 0x01
_TUN_F_TSO4: Final = 0x02
_TUN_F_TSO6: Final = 0x04


@dataclass(frozen=True, slots=True)
class Interface:
    """IP packets' bytes as the host's kernel counts them, and the moment on the monotonic clock."""

    rx_bytes: int
    tx_bytes: int
    tx_dropped: int
    at_ns: int


class Lab:
    """Hosts, by rank. NetworkError: it can't be built here."""

    interface_name: Final = DEVICE

    def __init__(self, scenario: Scenario) -> None:
        kinds = {host.nat for host in scenario.hosts}
        need_tools(*(["nft"] if kinds - {Nat.OPEN} else []), *(["miniupnpd"] if Nat.UPNP in kinds else []))
        self.scenario = scenario
        self._namespaces: list[Namespace] = []
        self._sites: list[Site] = []
        self._started: list[subprocess.Popen[Any]] = []
        self._emulator: Emulator | None = None
        devices: list[int] = []
        try:
            for _ in scenario.hosts:
                self._namespaces.append(Namespace())
            for number, ranks in enumerate(scenario.sites):
                site = Site(scenario, number, [self._namespaces[rank] for rank in ranks])
                self._sites.append(site)
                devices.append(site.line.call(_open_tun))
                site.start()
            inodes = [namespace.inode for namespace in self._all_namespaces()]
            self._emulator = Emulator(scenario, devices, [site.public for site in self._sites], inodes)
        except BaseException:
            self.close()
            raise
        finally:
            for fd in devices:
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _all_namespaces(self) -> list[Namespace]:
        return [*self._namespaces, *(router.namespace for site in self._sites for router in site.routers)]

    def _place(self, host: int | str) -> tuple[int, int]:
        """Number of its site, and its place there."""
        rank = self.rank(host)
        ((number, ranks),) = [site for site in enumerate(self.scenario.sites) if rank in site[1]]
        return number, ranks.index(rank)

    def own(self, host: int | str) -> Addresses:
        """Of its interface. ipv6: the address. "": none."""
        number, place = self._place(host)
        return self._sites[number].own(place)

    def public(self, host: int | str) -> Addresses:
        """What others see it as: its router's, where that translates. ipv6: the /64 of its address."""
        return self._sites[self._place(host)[0]].public

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of the hosts' interfaces: IPv4, or IPv6 where that is all they have."""
        return tuple(own.ipv4 or own.ipv6 for own in map(self.own, range(self.world)))

    @property
    def world(self) -> int:
        return len(self.scenario.hosts)

    def rank(self, host: int | str) -> int:
        """Of a host's name. KeyError: there is none."""
        if isinstance(host, int):
            return range(self.world)[host]
        for rank, known in enumerate(self.scenario.hosts):
            if known.name == host:
                return rank
        raise KeyError(host)

    def before(self, host: int | str) -> list[str]:
        """What a command is to be put behind so that it runs on this host: it replaces itself by the command (exec)."""
        return self._namespaces[self.rank(host)].command()

    def environment(self, host: int | str) -> dict[str, str]:
        """What a command on this host is told."""
        rank = self.rank(host)
        return {
            "NETLAB_HOST": self.scenario.hosts[rank].name,
            "NETLAB_RANK": str(rank),
            "NETLAB_WORLD": str(self.world),
            "NETLAB_ADDRESS": self.addresses[rank],
            "NETLAB_ADDRESSES": ",".join(self.addresses),
            "NETLAB_MASTER": self.addresses[0],
            "NETLAB_SCENARIO": self.scenario.name,
        }

    def start(
        self, host: int | str, argv: Sequence[str], env: Mapping[str, str] | None = None, **popen: Any
    ) -> subprocess.Popen[Any]:
        """Run a command on a host.

        Args:
            env: beside ours and the variables of `environment`.
            popen: of `subprocess.Popen`.
        """
        environment = {**os.environ, **self.environment(host), **(env or {})}
        process = subprocess.Popen([*self.before(host), *argv], env=environment, **popen)
        self._started.append(process)
        return process

    def call(self, host: int | str, function: Callable[[], T]) -> T:
        """Call it in a thread on a host: sockets that it opens are that host's, for as long as they are open."""
        return self._namespaces[self.rank(host)].call(function)

    def cut(self, host: int | str) -> None:
        """Nothing gets to or from this host until `mend`; what is on its way to it is lost. Nobody is told."""
        number, place = self._place(host)
        self._sites[number].cut(place)

    def mend(self, host: int | str) -> None:
        """After `cut`."""
        number, place = self._place(host)
        self._sites[number].mend(place)

    def reboot_nat(self, host: int | str) -> None:
        """Its router forgets all flows and mappings, as at a power cut, and maps ports to others than before.

        What goes on in an old flow is dropped, both ways. Of two routers both do it.

        Raises:
            ValueError: it has none.
        """
        site = self._sites[self._place(host)[0]]
        if not site.routers:
            raise ValueError(f"host {host!r} has no router")
        for router in site.routers:
            router.reboot(moves_ports=router is site.routers[0])

    def change_address(self, host: int | str) -> Addresses:
        """Give its line another public address, of IPv4 and IPv6, which is returned. The old one is nobody's."""
        number, _ = self._place(host)
        site = self._sites[number]
        site.change_address()
        if self._emulator is None:
            raise NetworkError("the lab is closed")
        self._emulator.change(number, site.public)
        return site.public

    def counts(self) -> Counts:
        """What the emulator has seen. NetworkError: it has ended."""
        if self._emulator is None:
            raise NetworkError("the lab is closed")
        counts = self._emulator.counts()
        dropped = [site.line.call(_read_interface).tx_dropped for site in self._sites]
        lines = [replace(line, overrun=count) for line, count in zip(counts.hosts, dropped, strict=True)]
        return replace(counts, hosts=tuple(lines))

    def interface(self, host: int | str) -> Interface:
        """What the kernel has counted on this host's interface."""
        return self.call(host, _read_interface)

    @property
    def emulator_pid(self) -> int:
        """Of the line emulator's process."""
        if self._emulator is None:
            raise NetworkError("the lab is closed")
        return self._emulator.pid

    def close(self) -> None:
        """End all that runs on the hosts, and take everything away. Again: nothing."""
        emulator, self._emulator = self._emulator, None
        try:
            if emulator is not None:
                emulator.close()
        finally:
            for site in self._sites:
                site.close()
            for namespace in self._namespaces:
                namespace.close()
            self._sites.clear()
            self._namespaces.clear()
            for process in self._started:  # ended by the emulator, but for one that had not entered its namespace yet
                process.kill()
                process.wait()


def _read_interface() -> Interface:
    """Of the calling thread's namespace."""
    with open("/proc/thread-self/net/dev", encoding="ascii") as lines:
        (line,) = [line for line in lines if line.strip().startswith(f"{DEVICE}:")]
    columns = line.split(":")[1].split()
    return Interface(int(columns[0]), int(columns[8]), int(columns[11]), time.monotonic_ns())


def _open_tun() -> int:
    """A descriptor of a new device in the calling thread's namespace."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), flags))
        fcntl.ioctl(fd, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6)
    except BaseException:
        os.close(fd)
        raise
    return fd
