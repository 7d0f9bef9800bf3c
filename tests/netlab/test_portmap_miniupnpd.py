"""Port mappings of a real router: miniupnpd on nftables between two namespaces. As root.

    outside 11.0.0.9 --- 11.0.0.1 router 192.168.7.1 --- 192.168.7.2 inside

miniupnpd maps no ports behind an external address that it knows for a private or documentation one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest
import trio

from pyccl._io import pcp, portmap
from pyccl._io.gateway import Gateway, find_gateway
from pyccl._io.portmap import Mapping, Terms, open_mapping
from pyccl._io.routers import Router, routers_for
from pyccl.processes.namespace import Namespace

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(
        shutil.which("miniupnpd") is None or shutil.which("nft") is None,
        reason="miniupnpd and nft are not installed (Debian: miniupnpd-nftables, nftables)",
    ),
]

PORT = 5000
WAIT_S = 60.0
METHODS = ("pcp", "nat-pmp", "upnp")
ROUTER, INSIDE, OUTER, OUTSIDE = "192.168.7.1", "192.168.7.2", "11.0.0.1", "11.0.0.9"
RULES = """
table inet pyccl {
    chain forward { type filter hook forward priority 0; policy drop; ct state established,related accept
        iifname "lan0" accept
        jump mapped
    }
    chain prerouting { type nat hook prerouting priority -100; jump mapped_in
    }
    chain postrouting { type nat hook postrouting priority 100; jump mapped_out
        oifname "wan0" masquerade
    }
    chain mapped { }
    chain mapped_in { }
    chain mapped_out { }
}
"""
SETTINGS = """
ext_ifname=wan0
listening_ip=lan0
port=0
enable_upnp=yes
enable_natpmp=yes
secure_mode=yes
uuid=21d6f7b6-1d43-4809-8663-85bff93fa3f8
upnp_table_name=pyccl
upnp_nat_table_name=pyccl
upnp_forward_chain=mapped
upnp_nat_chain=mapped_in
upnp_nat_postrouting_chain=mapped_out
allow 1024-65535 192.168.7.0/24 1024-65535
deny 0-65535 0.0.0.0/0 0-65535
"""
# Within two seconds of its start nobody can tell a restart by a router's epoch (RFC 6887 8.5).
EPOCH_S = 4
LISTENS = "Listening for NAT-PMP/PCP traffic"  # the last that it says when it starts


class Net:
    """inside, router, outside, and miniupnpd on the router while it runs."""

    def __init__(self, directory: Path) -> None:
        self.inside, self.router, self.outside = Namespace(), Namespace(), Namespace()
        self._settings = directory / "miniupnpd.conf"
        self._pid_file = directory / "pid"
        self._process: subprocess.Popen[str] | None = None
        self._said: list[str] = []
        self._listens = threading.Event()
        self.router.ip(
            "link set lo up",
            f"link add lan0 type veth peer name eth0 netns {self.inside.path}",
            f"link add wan0 type veth peer name eth0 netns {self.outside.path}",
            f"addr add {ROUTER}/24 dev lan0",
            f"addr add {OUTER}/24 dev wan0",
            "link set lan0 up",
            "link set wan0 up",
        )
        self.inside.ip(f"addr add {INSIDE}/24 dev eth0", "link set eth0 up", f"route add default via {ROUTER}")
        self.outside.ip(f"addr add {OUTSIDE}/24 dev eth0", "link set eth0 up")
        self.on_router("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        self.on_router("nft", "-f", "-", text=RULES)

    def on_router(self, *argv: str, text: str = "") -> str:
        done = subprocess.run(
            [*self.router.command(), *argv], input=text, text=True, capture_output=True, check=True, timeout=WAIT_S
        )
        return done.stdout

    def start(self) -> None:
        self._settings.write_text(SETTINGS)
        argv = ["miniupnpd", "-d", "-f", str(self._settings), "-P", str(self._pid_file)]
        self._process = subprocess.Popen(
            [*self.router.command(), *argv], text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        self._reader = threading.Thread(target=self._read, args=(self._process.stderr,))
        self._said.clear()
        self._reader.start()
        assert self._listens.wait(WAIT_S), "".join(self._said)
        assert any(LISTENS in line for line in self._said), "".join(self._said)

    def _read(self, lines: IO[str]) -> None:
        """To the end: it must not wait for a reader."""
        with lines:
            for line in lines:
                self._said.append(line)
                if LISTENS in line:
                    self._listens.set()
        self._listens.set()

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=WAIT_S)
            self._reader.join()
            self._process = None
            self._listens.clear()

    def mappings(self) -> str:
        """Of nftables."""
        return self.on_router("nft", "list", "chain", "inet", "pyccl", "mapped_in")

    def run_inside(self, main: Callable[[], Awaitable[None]]) -> None:
        self.inside.call(lambda: trio.run(main))

    def is_reached(self, address: tuple[str, int]) -> bool:
        """A listener inside, dialled from outside."""

        def listen() -> socket.socket:
            return socket.create_server((INSIDE, PORT))

        def dial() -> bytes:
            with socket.create_connection(address, timeout=WAIT_S) as sock:
                return sock.recv(2)

        with self.inside.call(listen) as listener:
            listener.settimeout(WAIT_S)

            def answer() -> None:
                with listener.accept()[0] as conn:
                    conn.sendall(b"ok")

            thread = threading.Thread(target=answer, daemon=True)
            thread.start()
            said = self.outside.call(dial)
            thread.join(timeout=WAIT_S)
            return said == b"ok"

    def close(self) -> None:
        self.stop()
        for namespace in (self.inside, self.router, self.outside):
            namespace.close()


async def is_up_for_some_seconds() -> None:
    """The router, by its own clock."""
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, trio.fail_after(WAIT_S):
        await sock.connect((ROUTER, pcp.PORT))
        while True:
            await sock.send(pcp.nat_pmp_address())
            if pcp.read_nat_pmp_untrusted(await sock.recv(100)).epoch_s >= EPOCH_S:
                return
            await trio.sleep(0.2)


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Net]:
    with contextlib.closing(Net(tmp_path)) as made:
        yield made


def speak_only(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def some(
        gateway: Gateway, port: int, nonce: bytes, choose: Callable[[], int], pcp_port: int, ssdp_port: int
    ) -> list[Router]:
        routers = routers_for(gateway, port, nonce, choose, pcp_port, ssdp_port)
        return [router for router in routers if router.method == method]

    monkeypatch.setattr(portmap, "routers_for", some)


@pytest.mark.parametrize("method", METHODS)
def test_a_mapped_port_is_reached_from_outside_until_it_is_taken_away(
    net: Net, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    speak_only(monkeypatch, method)
    net.start()

    async def main() -> None:
        async with open_mapping(PORT) as mapping:
            assert (mapping.external, mapping.method) == ((OUTER, PORT), method)
            assert f"{INSIDE}:{PORT}" in net.mappings()
            assert await trio.to_thread.run_sync(net.is_reached, mapping.external)
        assert INSIDE not in net.mappings()

    net.run_inside(main)


def test_all_protocols_at_once_leave_nothing_behind(net: Net) -> None:
    net.start()

    async def main() -> None:
        with trio.CancelScope() as scope:
            async with open_mapping(PORT) as mapping:
                assert mapping.external == (OUTER, PORT)
                assert net.mappings().count(INSIDE) == 1
                scope.cancel()
                await trio.sleep_forever()
        assert INSIDE not in net.mappings()

    assert net.inside.call(find_gateway) == Gateway(ROUTER, "eth0", INSIDE)
    net.run_inside(main)


@pytest.mark.parametrize("method", METHODS)
def test_a_port_that_is_taken_becomes_another(net: Net, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    speak_only(monkeypatch, method)
    net.start()
    net.inside.ip("addr add 192.168.7.3/24 dev eth0")

    async def main() -> None:
        other = Gateway(ROUTER, "eth0", "192.168.7.3")
        async with open_mapping(PORT, gateway=other) as theirs, open_mapping(PORT) as mapping:
            assert theirs.external is not None and mapping.external is not None
            assert theirs.external[1] == PORT != mapping.external[1]
            assert await trio.to_thread.run_sync(net.is_reached, mapping.external)
            assert f"192.168.7.3:{PORT}" in net.mappings()
        assert "192.168.7." not in net.mappings()

    net.run_inside(main)


@pytest.mark.parametrize("method", METHODS)
def test_a_router_that_restarts_without_its_mappings_is_asked_anew(
    net: Net, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    speak_only(monkeypatch, method)
    net.start()

    async def main() -> None:
        async with open_mapping(PORT, terms=replace(Terms(), check_s=0.2)) as mapping:
            await is_up_for_some_seconds()
            await trio.to_thread.run_sync(net.stop)
            net.on_router("nft", "flush", "chain", "inet", "pyccl", "mapped_in")
            await trio.to_thread.run_sync(net.start)
            with trio.fail_after(WAIT_S):
                while INSIDE not in net.mappings():  # noqa: ASYNC110  nftables tells of no events
                    await trio.sleep(0.1)
            assert mapping.external == (OUTER, PORT)

    net.run_inside(main)


@pytest.mark.parametrize("method", METHODS)
def test_another_external_address_of_the_router_is_told(net: Net, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    speak_only(monkeypatch, method)
    net.start()

    async def main() -> None:
        async with open_mapping(PORT, terms=replace(Terms(), check_s=0.2)) as mapping:
            await is_up_for_some_seconds()
            await trio.to_thread.run_sync(net.stop)
            net.router.ip(f"addr del {OUTER}/24 dev wan0", "addr add 11.0.0.2/24 dev wan0")
            await trio.to_thread.run_sync(net.start)
            with trio.fail_after(WAIT_S):
                assert await changed_to_some(mapping) == ("11.0.0.2", PORT)

    net.run_inside(main)


async def changed_to_some(mapping: Mapping) -> tuple[str, int] | None:
    return await mapping.changed((OUTER, PORT)) or await mapping.changed(None)
