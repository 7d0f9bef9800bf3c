"""Routers that stand between hosts and their line: network namespaces with nftables, and miniupnpd for UPnP.

    host: wan0 (192.168.1.2) ── port0 ┐                 router namespace
    host: wan0 (192.168.1.3) ── port1 ┴ bridge lan0 (192.168.1.1), wan0 (11.78.0.1): a TUN device, the emulator's

Of two routers the outer one (192.168.0.1) has the TUN device. Every LAN has the same addresses, as in reality. All
routers drop what nobody inside asked for, without an answer, and none sends what is for its own public address back
into its LAN. IPv6 is not translated: there each kind is a firewall.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from pyccl.netlab.scenario import Nat
from pyccl.processes.namespace import Namespace, NetworkError

DEVICE: Final = "wan0"  # of hosts and of routers, towards the internet
LAN: Final = "192.168.1"  # of hosts
BETWEEN: Final = "192.168.0"  # of an inner router, behind the outer one
GATEWAY: Final = "169.254.0.1"  # of a host behind a firewall, whose own address is public
_SSDP_GROUP: Final = "239.255.255.250"
_START_S: Final = 20.0
_PROBE_S: Final = 0.05
_NAT_PMP_PORT: Final = 5351
_MASKS: Final = 63
# linux/netfilter/nfnetlink_conntrack.h, linux/netlink.h
_NETLINK_NETFILTER: Final = 12
_CT_DELETE: Final = 1 << 8 | 2
_REQUEST_AND_ACK: Final = 0x01 | 0x04
_NLMSG_ERROR: Final = 2

_UPNP: Final = f"""ext_ifname={DEVICE}
listening_ip=lan0
enable_upnp=yes
enable_natpmp=yes
secure_mode=yes
system_uptime=no
upnp_table_name=filter
upnp_nat_table_name=nat
upnp_forward_chain=miniupnpd
upnp_nat_chain=miniupnpd_in
upnp_nat_postrouting_chain=miniupnpd_out
allow 1024-65535 0.0.0.0/0 1024-65535
"""


def ruleset(kind: Nat, moves: int) -> str:
    """For nft(8), of one router.

    Args:
        kind: FULL_CONE, PORT_RESTRICTED or SYMMETRIC, or FIREWALL, which translates nothing.
        moves: 0: ports are kept if they are free. Else TCP ports are mapped one to one, by each number to others.
    """
    mask = moves % _MASKS << 8
    out = 'oifname "wan0" meta nfproto ipv4'
    kept = f"{out} masquerade"
    moved = f"{out} meta l4proto tcp masquerade to : tcp sport ^ {mask}\n    {kept}" if mask else kept
    enter, leave = "", {Nat.FIREWALL: "", Nat.SYMMETRIC: f"{out} masquerade random,fully-random"}.get(kind, moved)
    if kind is Nat.FULL_CONE:
        enter = f'iifname "wan0" dnat ip to (tcp dport ^ {mask}) map @cone : tcp dport ^ {mask}'
        leave = f"{out} add @cone {{ tcp sport : ip saddr }}\n    {leave}"
    return f"""flush ruleset
table inet filter {{
  chain miniupnpd {{
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    ct state established,related accept
    iifname "lan0" ct state new accept
    ct status dnat accept
    jump miniupnpd
  }}
  chain input {{
    type filter hook input priority filter; policy drop;
    iifname "lo" accept
    ct state established,related accept
    meta l4proto {{ icmp, ipv6-icmp }} accept
    iifname "lan0" ip daddr {{ {LAN}.1, {BETWEEN}.1, {_SSDP_GROUP} }} accept
  }}
}}
table inet nat {{
  map cone {{
    type inet_service : ipv4_addr; flags dynamic,timeout; timeout 1h; size 65535
  }}
  chain miniupnpd_in {{
  }}
  chain miniupnpd_out {{
  }}
  chain prerouting {{
    type nat hook prerouting priority dstnat
    {enter}
    jump miniupnpd_in
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat
    jump miniupnpd_out
    {leave}
  }}
}}
"""


class Router:
    """One of them: lan0 is there. wan0 must be made, and then `start` called.

    Args:
        kind: as of `ruleset`, or UPNP: port-restricted, with miniupnpd.
        address: of lan0, with its bits.
    """

    def __init__(self, kind: Nat, address: str) -> None:
        self._kind, self._moves, self._ports = kind, 0, 0
        self._daemon: subprocess.Popen[bytes] | None = None
        self.namespace: Final = Namespace()
        self.namespace.ip(
            "link set lo up",
            "link add lan0 type bridge forward_delay 0 mcast_snooping 0",
            f"addr add {address} dev lan0",
            "link set lan0 up",
        )

    def join(self, inside: Namespace) -> None:
        """Make wan0 in another namespace, on the LAN. It has no address yet and is down."""
        port = f"port{self._ports}"
        self._ports += 1
        self.namespace.ip(
            f"link add name {port} type veth peer name {DEVICE} netns {inside.path}",
            f"link set {port} master lan0 up",
        )

    def start(self) -> None:
        self.namespace.call(_forward)
        self._load()

    def _load(self) -> None:
        translates = Nat.PORT_RESTRICTED if self._kind is Nat.UPNP else self._kind
        nft = [*self.namespace.command(), "nft", "-f", "-"]
        text = ruleset(translates, self._moves)
        done = subprocess.run(nft, input=text, text=True, capture_output=True, check=False)
        if done.returncode != 0:
            raise NetworkError(f"nft: {done.stderr.strip()}")
        if self._kind is Nat.UPNP:
            daemon = self._daemon = _start_miniupnpd(self.namespace.command())
            self.namespace.call(lambda: _wait_for_miniupnpd(daemon))

    def reboot(self, moves_ports: bool) -> None:
        """It forgets all flows and mappings: packets of old flows are dropped. moves_ports: as in `ruleset`."""
        self._moves += moves_ports
        self._stop_daemon()
        self._load()
        self.forget()

    def forget(self) -> None:
        """All flows."""
        self.namespace.call(_flush_conntrack)

    def _stop_daemon(self) -> None:
        daemon, self._daemon = self._daemon, None
        if daemon is not None:
            daemon.kill()
            daemon.wait()

    def close(self) -> None:
        self._stop_daemon()
        self.namespace.close()


def _forward() -> None:
    """In the calling thread's namespace. A packet in the middle of an unknown flow belongs to none."""
    for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        Path("/proc/sys/net", name).write_text("1", encoding="ascii")
    loose = Path("/proc/sys/net/netfilter/nf_conntrack_tcp_loose")
    if not loose.exists():
        raise NetworkError("no connection tracking in this kernel (CONFIG_NF_CONNTRACK)")
    loose.write_text("0", encoding="ascii")


def _flush_conntrack() -> None:
    """Of the calling thread's namespace: IPCTNL_MSG_CT_DELETE without a tuple."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as sock:
        body = struct.pack("=BBH", socket.AF_UNSPEC, 0, 0)
        sock.send(struct.pack("=IHHII", 16 + len(body), _CT_DELETE, _REQUEST_AND_ACK, 1, 0) + body)
        reply = sock.recv(4096)
    _, kind, _, _, _, error = struct.unpack_from("=IHHIIi", reply)
    if kind != _NLMSG_ERROR or error != 0:
        raise NetworkError(f"connection tracking can't be flushed: {os.strerror(-error)}")


def _start_miniupnpd(before: Sequence[str]) -> subprocess.Popen[bytes]:
    """It reads a file and writes one with its number: both in memory, so that nothing can be left of them."""
    files = [os.memfd_create(name) for name in ("miniupnpd.conf", "miniupnpd.pid")]
    try:
        os.write(files[0], _UPNP.encode())
        conf, pid = (f"/proc/self/fd/{file}" for file in files)
        daemon = subprocess.Popen(
            [*before, "miniupnpd", "-d", "-f", conf, "-P", pid],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=files,
        )  # fmt: skip
    finally:
        for file in files:
            os.close(file)
    return daemon


def _wait_for_miniupnpd(daemon: subprocess.Popen[bytes]) -> None:
    """In the router's namespace, until it answers a NAT-PMP request: it opens that port last."""
    deadline_s = time.monotonic() + _START_S
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((f"{LAN}.1", _NAT_PMP_PORT))
        sock.settimeout(_PROBE_S)
        while daemon.poll() is None and time.monotonic() < deadline_s:
            try:
                sock.send(bytes(2))
                sock.recv(64)
            except ConnectionRefusedError:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    daemon.wait(_PROBE_S)
            except TimeoutError:
                continue
            else:
                return
    raise NetworkError(f"miniupnpd does not start (status {daemon.returncode})")
