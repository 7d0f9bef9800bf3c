"""Kinds of NAT behave as they are named: shown with plain sockets. As root, with nftables and miniupnpd.

Nothing waits to see that nothing comes. What a router drops is known after an echo over an older connection through the
same router: it travels behind what is dropped, and in order.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import shutil
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from select import POLLERR, POLLHUP, POLLIN, POLLOUT, poll

import pytest

from pyccl.netlab import Lab, parse
from pyccl.netlab.scenario import Nat

LACKING = [tool for tool in ("nft", "miniupnpd") if shutil.which(tool) is None]
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces and TUN devices need root"),
    pytest.mark.skipif(bool(LACKING), reason=f"no {' and no '.join(LACKING)}: apt-get install nftables miniupnpd"),
]

WAIT_S = 60.0
PORT = 7000
CENTRE = "centre"
KINDS = tuple(Nat)


def toml(*hosts: str) -> str:
    """Each is a name and more keys."""
    tables = [f"[[host]]\nname = '{name}'\n{keys}\n" for name, _, keys in (host.partition(" ") for host in hosts)]
    return "".join(tables)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Two hosts of each kind, and an open one which all can reach. Nothing of it is changed."""
    kinds = [f"{kind}{number} nat = '{kind}'".replace("_", "-", 1) for kind in KINDS for number in range(2)]
    with Lab(parse(toml(CENTRE, *kinds), "kinds")) as made:
        yield made


def name_of(kind: Nat, number: int) -> str:
    return f"{kind}{number}".replace("_", "-", 1)


ports = itertools.count(20_000)  # of the hosts: none comes twice, since flows are remembered


def tcp(lab: Lab, host: str, port: int, family: int = socket.AF_INET) -> socket.socket:
    """A socket of this host, which may share its port with others."""

    def make() -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.settimeout(WAIT_S)
        sock.bind(("" if family == socket.AF_INET else "::", port))
        return sock

    return lab.call(host, make)


class Peer:
    """A host that listens on its port, dials others from that port, and has a connection to the centre from it."""

    def __init__(self, lab: Lab, host: str, stack: contextlib.ExitStack, family: int = socket.AF_INET) -> None:
        self.lab, self.host, self.family, self.port = lab, host, family, next(ports)
        self._stack = stack
        self.listener = self._keep(tcp(lab, host, self.port, family))
        self.listener.listen()
        self.inside, self.outside = self.call_centre()
        self.seen = self.outside.getpeername()[:2]  # by the centre

    def _keep(self, sock: socket.socket) -> socket.socket:
        self._stack.callback(sock.close)
        return sock

    def call_centre(self) -> tuple[socket.socket, socket.socket]:
        """A new connection from the port: both ends."""
        public = self.lab.own(CENTRE)
        with tcp(self.lab, CENTRE, next(ports), self.family) as server:
            server.listen()
            dialled = self._keep(tcp(self.lab, self.host, self.port, self.family))
            dialled.connect((public.ipv4 if self.family == socket.AF_INET else public.ipv6, server.getsockname()[1]))
            return dialled, self._keep(server.accept()[0])

    def echo(self) -> None:
        """From the centre to here and back."""
        self.outside.sendall(b"?")
        assert self.inside.recv(1) == b"?"
        self.inside.sendall(b"!")
        assert self.outside.recv(1) == b"!"

    def dial(self, address: tuple[str, int]) -> socket.socket | None:
        """From the port: connecting, when this returns. None: the listener has a connection from there already."""
        sock = self._keep(tcp(self.lab, self.host, self.port, self.family))
        sock.setblocking(False)
        try:
            sock.connect(address)
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
            return None
        return sock


def result(dialled: socket.socket, timeout_s: float) -> str:
    """Of a connection: connected, refused, or pending, if it is neither after this time."""
    poller = poll()
    poller.register(dialled, POLLOUT)
    events = dict(poller.poll(timeout_s * 1000)).get(dialled.fileno(), 0)
    if events & (POLLERR | POLLHUP):
        return "refused"
    return "connected" if events & POLLOUT else "pending"


def from_centre(peer: Peer, address: tuple[str, int], want: str) -> str:
    """What comes of it that the centre dials this address, behind which is the peer's router."""
    with tcp(peer.lab, CENTRE, next(ports), peer.family) as stranger:
        stranger.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            stranger.connect(address)
        peer.echo()
        peer.echo()
        return result(stranger, 0 if want == "pending" else WAIT_S)


@dataclass(frozen=True)
class Behaviour:
    """translated: the centre sees another address. kept: the same port. unasked: what strangers meet at that port."""

    translated: bool
    kept: bool
    unasked: str


BEHAVIOUR = {
    Nat.OPEN: Behaviour(False, True, "connected"),
    Nat.FULL_CONE: Behaviour(True, True, "connected"),
    Nat.PORT_RESTRICTED: Behaviour(True, True, "pending"),
    Nat.SYMMETRIC: Behaviour(True, False, "pending"),
    Nat.UPNP: Behaviour(True, True, "pending"),
    Nat.DOUBLE: Behaviour(True, True, "pending"),
    Nat.FIREWALL: Behaviour(False, True, "pending"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_translates_keeps_ports_and_lets_in_as_named(lab: Lab, kind: Nat) -> None:
    want, host = BEHAVIOUR[kind], name_of(kind, 0)
    with contextlib.ExitStack() as stack:
        peer = Peer(lab, host, stack)
        address, port = peer.seen
        assert address == lab.public(host).ipv4
        assert (address != lab.own(host).ipv4) == want.translated
        assert (port == peer.port) == want.kept
        assert from_centre(peer, (address, port), want.unasked) == want.unasked
        closed = next(ports)  # that nothing was sent from
        unused = "refused" if kind is Nat.OPEN else "pending"
        assert from_centre(peer, (address, closed), unused) == unused


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not Nat.OPEN])
def test_a_port_is_the_same_to_everybody_unless_the_router_is_symmetric(lab: Lab, kind: Nat) -> None:
    with contextlib.ExitStack() as stack:
        peer = Peer(lab, name_of(kind, 0), stack)
        seen = {peer.seen[1], *(peer.call_centre()[1].getpeername()[1] for _ in range(3))}
    assert len(seen) == (4 if kind is Nat.SYMMETRIC else 1)


def may_connect(a: Nat, b: Nat) -> bool:
    """Two that dial each other at what the centre saw of their ports, while both listen."""
    return Nat.SYMMETRIC not in (a, b) or bool({a, b} & {Nat.OPEN, Nat.FULL_CONE})


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations_with_replacement(KINDS, 2)))
def test_simultaneous_open_passes_unless_symmetric_meets_one_that_filters(lab: Lab, a: Nat, b: Nat) -> None:
    with contextlib.ExitStack() as stack:
        peers = Peer(lab, name_of(a, 0), stack), Peer(lab, name_of(b, 1), stack)
        poller = poll()
        for peer, other in zip(peers, peers[::-1], strict=True):
            poller.register(peer.listener, POLLIN)
            if (dialled := peer.dial(other.seen)) is not None:
                poller.register(dialled, POLLOUT)
        for peer in peers * 2:
            peer.echo()
        connected = [events for _, events in poller.poll(WAIT_S * 1000 if may_connect(a, b) else 0)]
    assert bool(connected) == may_connect(a, b)
    assert all(events in (POLLIN, POLLOUT) for events in connected)


def nat_pmp(lab: Lab, host: str, port: int) -> int:
    """Ask the router for a port of TCP that leads to this one (RFC 6886). It gives which."""
    with lab.call(host, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        sock.settimeout(WAIT_S)
        sock.sendto(struct.pack("!BBHHHI", 0, 2, 0, port, port, 3600), ("192.168.1.1", 5351))
        _, operation, result, _, inside, outside, _ = struct.unpack("!BBHIHHI", sock.recv(64))
        assert (operation, result, inside) == (130, 0, port)
        return int(outside)


def test_a_upnp_router_opens_the_port_that_it_is_asked_for(lab: Lab) -> None:
    with contextlib.ExitStack() as stack:
        peer = Peer(lab, name_of(Nat.UPNP, 0), stack)
        listening = stack.enter_context(tcp(lab, peer.host, next(ports)))
        listening.listen()
        port = nat_pmp(lab, peer.host, listening.getsockname()[1])
        assert from_centre(peer, (lab.public(peer.host).ipv4, port), "connected") == "connected"
        listening.accept()[0].close()


def test_hosts_of_one_lan_share_an_address_and_meet_inside_only() -> None:
    home = "nat = 'port_restricted'\nlan = 'home'\nrate = '50mbit'"
    with Lab(parse(toml(CENTRE, f"a {home}", f"b {home}"), "lan")) as lab, contextlib.ExitStack() as stack:
        a, b = Peer(lab, "a", stack), Peer(lab, "b", stack)
        assert a.seen[0] == b.seen[0] == lab.public("a").ipv4 == lab.public("b").ipv4
        assert lab.own("a").ipv4 != lab.own("b").ipv4
        by_public = a.dial(b.seen)
        by_lan = stack.enter_context(tcp(lab, "a", next(ports)))
        by_lan.connect((lab.own("b").ipv4, b.port))
        accepted = stack.enter_context(b.listener.accept()[0])
        assert accepted.getpeername()[0] == lab.own("a").ipv4
        assert by_public is not None and result(by_public, 0) == "pending"
        assert {pipe.name for pipe in lab.counts().pipes} == {"home up", "home down"}


@pytest.mark.parametrize(
    ("keys", "unasked"),
    [
        ("ipv6 = 'only'", "connected"),
        *((f"ipv6 = 'dual'\nnat = '{kind}'", "connected" if kind is Nat.OPEN else "pending") for kind in KINDS),
    ],
)
def test_ipv6_reaches_its_host_untranslated_and_routers_filter_it(keys: str, unasked: str) -> None:
    with (
        Lab(parse(toml(f"{CENTRE} ipv6 = 'dual'", f"host {keys}"), "six")) as lab,
        contextlib.ExitStack() as stack,
    ):
        peer = Peer(lab, "host", stack, socket.AF_INET6)
        assert peer.seen == (lab.own("host").ipv6, peer.port)
        assert from_centre(peer, peer.seen, unasked) == unasked
        assert bool(lab.own("host").ipv4) == ("only" not in keys)
        data = random.Random(1).randbytes(1 << 20)
        sender = threading.Thread(target=peer.inside.sendall, args=(data,))
        sender.start()
        received = bytearray()
        while len(received) < len(data):
            received += peer.outside.recv(1 << 20)
        sender.join()
        assert received == data
        assert lab.counts().hosts[1].tx_packets >= len(data) / 1440


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not Nat.OPEN])
def test_a_router_that_reboots_drops_old_flows_and_maps_ports_to_others(kind: Nat) -> None:
    with Lab(parse(toml(CENTRE, f"host nat = '{kind}'"), "reboot")) as lab, contextlib.ExitStack() as stack:
        old = Peer(lab, "host", stack)
        old.echo()
        lab.reboot_nat("host")
        old.inside.sendall(b"lost")
        new_inside, new_outside = old.call_centre()
        old.outside.sendall(b"lost")
        old.inside.setblocking(False)
        old.outside.setblocking(False)
        new_inside.sendall(b"!")
        assert new_outside.recv(1) == b"!"
        new_outside.sendall(b"?")
        assert new_inside.recv(1) == b"?"
        for end in (old.inside, old.outside):
            with pytest.raises(BlockingIOError):
                end.recv(1)
        address, port = new_outside.getpeername()
        assert address == lab.public("host").ipv4
        assert (port == old.seen[1]) == (kind is Nat.FIREWALL)
        old.inside, old.outside = new_inside, new_outside
        assert from_centre(old, (address, port), BEHAVIOUR[kind].unasked) == BEHAVIOUR[kind].unasked


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_address_is_the_one_that_others_see(kind: Nat) -> None:
    hosts = (f"{CENTRE} ipv6 = 'dual'", f"host nat = '{kind}'\nipv6 = 'dual'")
    with Lab(parse(toml(*hosts), "change")) as lab, contextlib.ExitStack() as stack:
        old = Peer(lab, "host", stack)
        public = lab.public("host")
        assert lab.change_address("host") == lab.public("host") != public
        lost = lab.counts().hosts[0].unroutable
        old.outside.sendall(b"lost")
        while lab.counts().hosts[0].unroutable == lost:
            pass
        new = Peer(lab, "host", stack)
        assert new.seen[0] == lab.public("host").ipv4
        assert Peer(lab, "host", stack, socket.AF_INET6).seen[0] == lab.own("host").ipv6
        assert from_centre(new, new.seen, BEHAVIOUR[kind].unasked) == BEHAVIOUR[kind].unasked


@pytest.mark.parametrize("kind", [Nat.OPEN, Nat.DOUBLE])
def test_a_host_that_was_cut_gets_its_addresses_and_routes_back(kind: Nat) -> None:
    hosts = (f"{CENTRE} ipv6 = 'dual'", f"host nat = '{kind}'\nipv6 = 'dual'")
    with Lab(parse(toml(*hosts), "cut")) as lab, contextlib.ExitStack() as stack:
        lab.cut("host")
        lab.mend("host")
        for family in (socket.AF_INET, socket.AF_INET6):
            Peer(lab, "host", stack, family).echo()


def test_an_open_host_has_no_router_to_reboot(lab: Lab) -> None:
    with pytest.raises(ValueError, match="'centre' has no router"):
        lab.reboot_nat(CENTRE)
