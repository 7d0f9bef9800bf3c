"""What is at the end of a line: one host with a public address, or routers and the hosts behind them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pyccl.netlab.emulator import Addresses
from pyccl.netlab.nat import BETWEEN, DEVICE, GATEWAY, LAN, Router
from pyccl.netlab.scenario import IPv6, Nat, Scenario
from pyccl.processes.namespace import Namespace

MTU: Final = 1500
_QUEUE_LENGTH: Final = 2000  # frames that wait for the emulator: it drops by its own rules, the device shall not


class Site:
    """By its number, see `Scenario.sites`. `line` is to be opened as wan0 before `start`.

    Args:
        inside: a namespace of each host.
    """

    def __init__(self, scenario: Scenario, number: int, inside: Sequence[Namespace]) -> None:
        hosts = [scenario.hosts[rank] for rank in scenario.sites[number]]
        self.kind: Final = hosts[0].nat
        self._number, self._changes = number, 0
        self._inside, self._ipv6 = inside, [host.ipv6 for host in hosts]
        self.routers: list[Router] = []
        try:
            if self.kind is Nat.DOUBLE:
                self.routers = [Router(Nat.PORT_RESTRICTED, f"{BETWEEN}.1/24")]
                self.routers.append(Router(Nat.PORT_RESTRICTED, f"{LAN}.1/24"))
            elif self.kind is not Nat.OPEN:
                address = f"{LAN}.1/24" if self.kind.translates else f"{GATEWAY}/32"
                self.routers = [Router(self.kind, address)]
        except BaseException:
            self.close()
            raise

    @property
    def line(self) -> Namespace:
        """The outermost router's, or the host's."""
        return self.routers[0].namespace if self.routers else self._inside[0]

    @property
    def public(self) -> Addresses:
        """What packets from other sites are sent to."""
        only = all(ipv6 is IPv6.ONLY for ipv6 in self._ipv6)
        none = all(ipv6 is IPv6.NONE for ipv6 in self._ipv6)
        return Addresses(
            "" if only else f"11.78.{self._changes}.{self._number + 1}",
            "" if none else f"2a0e:78:{self._changes:x}:{self._number + 1:x}::",
        )

    def own(self, place: int) -> Addresses:
        """Of the interface of the host at this place here. ipv6: a whole address."""
        ipv6 = self._ipv6[place]
        ipv4 = f"{LAN}.{place + 2}" if self.kind.translates else self.public.ipv4
        return Addresses(
            "" if ipv6 is IPv6.ONLY else ipv4, "" if ipv6 is IPv6.NONE else f"{self.public.ipv6}{place + 2:x}"
        )

    def start(self) -> None:
        """Make everything but the line, and set all addresses and routes."""
        for outer, inner in zip(self.routers, self.routers[1:], strict=False):
            outer.join(inner.namespace)
        for host in self._inside:
            if self.routers:
                self.routers[-1].join(host)
            host.ip("link set lo up")
        for namespace in (self.line, *(router.namespace for router in self.routers[1:]), *self._inside):
            if self.public.ipv6:
                namespace.call(_keep_addresses)
            namespace.ip(f"link set {DEVICE} mtu {MTU} txqueuelen {_QUEUE_LENGTH} up")
        self._set_addresses()
        for router in self.routers:
            router.start()

    def change_address(self) -> None:
        """Others from now on, of everything that has a public one."""
        self._changes += 1
        self._set_addresses()
        for router in self.routers:
            router.forget()

    def _set_addresses(self) -> None:
        for number, router in enumerate(self.routers):
            last = number + 1 == len(self.routers)
            router.namespace.ip(
                f"addr flush dev {DEVICE} scope global", *self._router_lines(outermost=number == 0, innermost=last)
            )
        for place in range(len(self._inside)):
            self._set_own(place)

    def _router_lines(self, outermost: bool, innermost: bool) -> list[str]:
        """Of ip(8)."""
        public = self.public
        lines = []
        if not outermost:
            lines += [f"addr add {BETWEEN}.2/24 dev {DEVICE}", f"route replace default via {BETWEEN}.1"]
            lines += [f"addr replace fe80::2/64 dev {DEVICE} nodad", f"route replace ::/0 via fe80::1 dev {DEVICE}"]
        elif self.kind.translates:
            lines += [f"addr add {public.ipv4}/32 dev {DEVICE}", f"route replace default dev {DEVICE}"]
        elif public.ipv4:
            lines += [f"route replace {public.ipv4}/32 dev lan0", f"route replace default dev {DEVICE}"]
        if outermost and public.ipv6:
            lines.append(f"route replace ::/0 dev {DEVICE}")
        if public.ipv6:
            lines.append("addr replace fe80::1/64 dev lan0 nodad")
            lines.append(f"route replace {public.ipv6}/64 {'' if innermost else 'via fe80::2 '}dev lan0")
        return lines

    def _set_own(self, place: int) -> None:
        own, bits = self.own(place), 24 if self.kind.translates else 32
        self._inside[place].ip(
            f"addr flush dev {DEVICE} scope global",
            *([f"addr add {own.ipv4}/{bits} dev {DEVICE}"] if own.ipv4 else []),
            *([f"addr add {own.ipv6}/{64 if self.routers else 128} dev {DEVICE} nodad"] if own.ipv6 else []),
            *self._own_routes(place),
        )

    def _own_routes(self, place: int) -> list[str]:
        own = self.own(place)
        via4, via6 = (f"via {LAN}.1 ", "via fe80::1 ") if self.routers else ("", "")
        lines = []
        if self.kind is Nat.FIREWALL and own.ipv4:
            lines.append(f"route replace {GATEWAY}/32 dev {DEVICE} scope link")
            via4 = f"via {GATEWAY} "
        if own.ipv4:
            lines.append(f"route replace default {via4}dev {DEVICE}")
        if own.ipv6:
            lines.append(f"route replace ::/0 {via6}dev {DEVICE}")
        return lines

    def cut(self, place: int) -> None:
        self._inside[place].ip(f"link set {DEVICE} down")

    def mend(self, place: int) -> None:
        self._inside[place].ip(f"link set {DEVICE} up", *self._own_routes(place))

    def close(self) -> None:
        """The routers; nothing may run in them any more."""
        for router in self.routers:
            router.close()
        self.routers.clear()


def _keep_addresses() -> None:
    """Of IPv6, which the kernel removes from an interface that goes down."""
    Path("/proc/sys/net/ipv6/conf/all/keep_addr_on_down").write_text("1", encoding="ascii")
