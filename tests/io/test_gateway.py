"""The default router in the texts of /proc/net."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from pyccl._io import gateway
from pyccl._io.gateway import Gateway, find_gateway, routes_ipv4, routes_ipv6

IPV4 = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
wlan0\t00000000\t0107A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0
eth0\t00000000\t0100000A\t0003\t0\t0\t100\t00000000\t0\t0\t0
tun0\t00000000\t00000000\t0001\t0\t0\t50\t00000000\t0\t0\t0
eth1\t00000000\t0200000A\t0002\t0\t0\t10\t00000000\t0\t0\t0
eth0\t0000000A\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0
"""
IPV6 = (
    "20010db8000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 "
    "00000100 00000001 00000000 00000001     eth0\n"
    "00000000000000000000000000000000 00 00000000000000000000000000000000 00 fe800000000000000000000000000001 "
    "00000400 00000001 00000000 00000003     eth0\n"
    "00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 "
    "ffffffff 00000001 00000000 00200200       lo\n"
)


def test_routers_of_default_routes_are_those_that_are_up_and_have_an_address() -> None:
    assert sorted(routes_ipv4(IPV4)) == [(100, "10.0.0.1", "eth0"), (600, "192.168.7.1", "wlan0")]
    assert routes_ipv6(IPV6) == [(1024, "fe80::1", "eth0")]


def test_the_route_of_least_metric_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = tmp_path / "route"
    table.write_text(IPV4.replace("0100000A", "0100007F"))  # 127.0.0.1: always reached, from itself
    monkeypatch.setattr(gateway, "ROUTES_IPV4", table)
    found = find_gateway()
    assert found == Gateway("127.0.0.1", "eth0", "127.0.0.1")
    assert found.family == socket.AF_INET and found.endpoint(5351) == ("127.0.0.1", 5351)
    table.write_text(IPV4.splitlines()[0])
    assert find_gateway() is None


def test_a_machine_without_ipv6_has_no_router_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gateway, "ROUTES_IPV6", tmp_path / "none")
    assert find_gateway(socket.AF_INET6) is None


def test_a_link_local_router_is_reached_through_its_interface() -> None:
    assert Gateway("fe80::1", "lo", "::1").endpoint(5351) == ("fe80::1", 5351, 0, socket.if_nametoindex("lo"))
    assert Gateway("2001:db8::1", "lo", "::1").endpoint(5351) == ("2001:db8::1", 5351, 0, 0)
