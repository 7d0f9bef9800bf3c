"""Labs that are built: what is lost, delayed and capped, and that nothing is left of one. As root.

Nothing here depends on how fast the machine is: a packet may be later than its time, never earlier, and which ones are
lost is known beforehand.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyccl.netlab import Lab, NetworkError, Scenario, parse
from pyccl.netlab.lab import DEVICE

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces and TUN devices need root")

PORT = 7000
WAIT_S = 60.0
HEADERS = 28  # of IP and UDP
NS = 10**9


def scenario(host: str = "", router: str = "", seed: int = 1) -> Scenario:
    return parse(f"seed = {seed}\n[[host]]\ncount = 2\n{host}\n[[router]]\nname = 'r'\n{router}", "test")


def udp(lab: Lab, rank: int) -> socket.socket:
    def make() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        sock.bind((lab.addresses[rank], PORT))
        sock.settimeout(WAIT_S)
        return sock

    return lab.call(rank, make)


@contextlib.contextmanager
def datagrams(lab: Lab) -> Iterator[tuple[socket.socket, socket.socket]]:
    with udp(lab, 0) as a, udp(lab, 1) as b:
        yield a, b


def is_lost(seed: int, source: int, target: int, number: int, loss: float) -> bool:
    """What native/netlab/line.c says."""
    mask = (1 << 64) - 1

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    key = mix(mix(seed) ^ (source << 32 | target))
    return (mix((key + (number + 1) * 0x9E3779B97F4A7C15) & mask) >> 11) * 2.0**-53 < loss


def transfer(lab: Lab, source: int, target: int, data: bytes) -> tuple[bytes, float]:
    """By one TCP connection: what arrived, and seconds from before the first byte until after the last."""
    with lab.call(target, lambda: socket.create_server((lab.addresses[target], 0))) as server:
        port = server.getsockname()[1]

        def send() -> None:
            with lab.call(source, lambda: socket.create_connection((lab.addresses[target], port))) as sock:
                sock.sendall(data)

        start_s = time.monotonic()
        sender = threading.Thread(target=send)
        sender.start()
        received = bytearray()
        with server.accept()[0] as sock:
            while part := sock.recv(1 << 20):
                received += part
        sender.join()
        return bytes(received), time.monotonic() - start_s


def test_no_packet_is_earlier_than_the_delay_of_its_way() -> None:
    with Lab(scenario("delay = '3ms'", "delay = '20ms'")) as lab, datagrams(lab) as (a, b):
        for sender, receiver, to in ((a, b, 1), (b, a, 0)) * 10:
            sent_ns = time.monotonic_ns()
            sender.sendto(b"probe", (lab.addresses[to], PORT))
            assert receiver.recv(100) == b"probe"
            assert time.monotonic_ns() - sent_ns >= 26_000_000


def test_exactly_the_packets_are_lost_that_the_seed_names() -> None:
    seed = int(os.environ.get("PYCCL_TEST_SEED", random.randrange(1 << 31)))
    print(f"PYCCL_TEST_SEED={seed}")
    count, loss = 3000, 0.05
    for way in ((0, 1), (1, 0)):
        with Lab(scenario(router=f"loss = {loss}", seed=seed)) as lab, datagrams(lab) as ends:
            source, target = way
            want = [n for n in range(count) if not is_lost(seed, source, target, n, loss)]
            last, got = want[-1], []
            for number in range(last + 1):
                ends[source].sendto(number.to_bytes(4, "big"), (lab.addresses[target], PORT))
                if number in want[-1:] or number % 100 == 99:  # the receiver's buffer is not endless
                    behind = [n for n in want if n <= number]
                    while len(got) < len(behind):
                        got.append(int.from_bytes(ends[target].recv(100), "big"))
            assert got == want
            assert lab.counts().lost == last + 1 - len(want)


def test_a_line_carries_no_more_than_its_rate() -> None:
    count, size = 200, 1200
    with Lab(scenario("rate = '10mbit'\nqueue = '10s'")) as lab, datagrams(lab) as (a, b):
        start_s = time.monotonic()
        for _ in range(count):
            a.sendto(bytes(size), (lab.addresses[1], PORT))
        for _ in range(count):
            b.recv(2000)
        assert time.monotonic() - start_s >= count * (size + HEADERS) * 8 / 10e6
        counts = lab.counts()
    assert counts.dropped == counts.lost == 0
    assert counts.hosts[0].tx_packets == counts.hosts[1].rx_packets == count
    assert counts.hosts[1].rx_bytes == count * (size + HEADERS)


def test_a_full_queue_drops_and_every_packet_is_accounted_for() -> None:
    count = 1000
    with Lab(scenario("rate = '10mbit'\nqueue = '20ms'")) as lab, datagrams(lab) as (a, b):
        for _ in range(count):
            a.sendto(bytes(1472), (lab.addresses[1], PORT))
        counts = lab.counts()
        while sum(host.tx_packets for host in counts.hosts) < count:
            counts = lab.counts()
        for _ in range(count - counts.dropped):
            b.recv(2000)
        counts = lab.counts()
    assert counts.dropped > 0
    assert counts.pipes[0].name == "host0 up" and counts.pipes[0].dropped == counts.dropped
    assert counts.hosts[1].rx_packets == count - counts.dropped


def test_tcp_carries_every_byte_over_a_lossy_line() -> None:
    data = random.Random(1).randbytes(4 << 20)
    with Lab(scenario("rate = '200mbit'", "delay = '2ms'\nloss = 0.01")) as lab:
        received, seconds = transfer(lab, 0, 1, data)
        counts = lab.counts()
    assert hashlib.sha256(received).digest() == hashlib.sha256(data).digest()
    assert seconds >= len(data) * 8 / 200e6
    assert counts.lost > 0
    assert counts.hosts[1].rx_bytes / counts.hosts[1].rx_packets <= 1500  # whatever the kernel hands over at once
    assert counts.hosts[0].tx_packets >= len(data) / 1460


def test_each_tcp_flow_is_capped_and_udp_is_not() -> None:
    with Lab(scenario("rate = '1gbit'", "flow_cap = '8mbit'\nqueue = '1s'")) as lab:
        data = bytes(1 << 19)
        assert transfer(lab, 0, 1, data)[1] >= len(data) * 8 / 8e6
        with datagrams(lab) as (a, b):
            a.sendto(b"free", (lab.addresses[1], PORT))
            assert b.recv(100) == b"free"
        assert lab.counts().routes[0].lost == 0


def test_two_hosts_behind_a_narrow_link_share_it() -> None:
    toml = """
    [[host]]
    name = "west"
    count = 2
    router = "w"
    [[host]]
    name = "east"
    router = "e"
    [[router]]
    name = "w"
    [[router]]
    name = "e"
    [[link]]
    between = ["w", "e"]
    rate = "10mbit"
    queue = "10s"
    delay = "5ms"
    """
    count, size = 50, 1200
    with Lab(parse(toml, "test")) as lab:
        with udp(lab, 0) as a, udp(lab, 1) as b, udp(lab, 2) as east:
            start_s = time.monotonic()
            for _ in range(count):
                for sock in (a, b):
                    sock.sendto(bytes(size), (lab.addresses[2], PORT))
            for _ in range(2 * count):
                east.recv(2000)
            assert time.monotonic() - start_s >= 2 * count * (size + HEADERS) * 8 / 10e6 + 0.005
        (shared,) = [pipe for pipe in lab.counts().pipes if pipe.name == "w to e"]
        assert shared.packets == 2 * count


def test_commands_are_told_where_they_are() -> None:
    with Lab(scenario()) as lab:
        names = ("HOST", "RANK", "WORLD", "ADDRESSES", "ADDRESS", "MASTER", "SCENARIO")
        command = f"echo {' '.join(f'$NETLAB_{name}' for name in names)} $EXTRA; ip -brief link"
        told = lab.start("host1", ["sh", "-c", command], env={"EXTRA": "more"}, stdout=subprocess.PIPE, text=True)
        variables, *devices = told.communicate(timeout=WAIT_S)[0].splitlines()
        first, second = lab.addresses
        assert variables.split() == ["host1", "1", "2", f"{first},{second}", second, first, "test", "more"]
        assert [device.split()[0] for device in devices] == ["lo", DEVICE]
        with pytest.raises(KeyError):
            lab.rank("nobody")


def test_a_host_that_is_cut_hears_nothing_until_it_is_mended() -> None:
    with Lab(scenario()) as lab, datagrams(lab) as (a, b):
        lab.cut(1)
        a.sendto(b"lost", (lab.addresses[1], PORT))
        while lab.counts().hosts[1].refused == 0:
            pass
        lab.mend(1)
        a.sendto(b"found", (lab.addresses[1], PORT))
        assert b.recv(100) == b"found"


# ---- nothing is left

OWNER = """
import subprocess, sys, time
from pyccl.netlab import Lab, parse
with Lab(parse(sys.argv[1], "owned")) as lab:
    # One that leaves its parent, session and process group behind.
    lab.start(0, ["setsid", "sh", "-c", "sleep 1000 & echo started; exec sleep 1000"])
    sys.stdout.write("emulator\\n")  # one write, also when unbuffered: the other writes to this pipe, too
    sys.stdout.flush()
    sys.stdin.readline()
"""
MARK = "PYCCL_NETLAB_TEST"


def carriers(mark: str) -> list[int]:
    """Living processes with this mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


UPNP = "[[host]]\nname = 'inner'\nnat = 'upnp'\n"  # its router runs a daemon
without_daemon = pytest.mark.skipif(shutil.which("miniupnpd") is None, reason="no miniupnpd: apt-get install it")


@pytest.mark.parametrize("end", ["kill", "close"])
@pytest.mark.parametrize(("more", "processes"), [("", 4), pytest.param(UPNP, 5, marks=without_daemon)])
def test_nothing_remains_of_a_lab_whatever_ends_its_owner(more: str, processes: int, end: str) -> None:
    mark = os.urandom(8).hex()
    with subprocess.Popen(
        [sys.executable, "-P", "-c", OWNER, f"[[host]]\ncount = 2\n{more}"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, MARK: mark},
    ) as owner:  # fmt: skip
        assert owner.stdout is not None and owner.stdin is not None
        lines = {owner.stdout.readline() for _ in range(2)}
        assert lines == {"emulator\n", "started\n"}
        wait_until(lambda: len(carriers(mark)) >= processes)  # it, the emulator, both on host 0
        if end == "kill":
            owner.send_signal(signal.SIGKILL)
        else:
            owner.stdin.write("\n")
            owner.stdin.flush()
        owner.wait(WAIT_S)
        wait_until(lambda: not carriers(mark))
    assert owner.returncode == (-signal.SIGKILL if end == "kill" else 0)


def test_closing_ends_what_runs_on_the_hosts() -> None:
    lab = Lab(scenario())
    process = lab.start(0, ["sleep", "1000"])
    lab.close()
    assert process.returncode == -signal.SIGKILL
    lab.close()
    with pytest.raises(NetworkError, match="closed"):
        lab.counts()


def test_an_emulator_that_ends_is_told() -> None:
    lab = Lab(scenario())
    os.kill(lab.emulator_pid, signal.SIGKILL)
    with pytest.raises(NetworkError, match="the line emulator ended"):
        lab.counts()
    with pytest.raises(NetworkError, match="ended with -9"):
        lab.close()


def test_without_the_right_to_make_namespaces_it_says_so() -> None:
    code = "from pyccl.netlab import *\ntry: Lab(load('lan'))\nexcept NetworkError as error: print(error)"
    done = subprocess.run(
        ["setpriv", "--bounding-set", "-sys_admin", "--", sys.executable, "-P", "-c", code],
        capture_output=True, text=True, timeout=WAIT_S, check=True,
    )  # fmt: skip
    assert "no network namespace can be made: Operation not permitted" in done.stdout
