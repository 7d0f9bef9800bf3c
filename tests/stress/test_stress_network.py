"""Lines between namespaces are cut, blocked and bent, and nothing of a run is left behind. As root with real ones."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyccl.processes.namespace import NetworkError
from pyccl.stress.bend import QUEUE_MIN_BYTES, QUEUE_S, Direction
from pyccl.stress.directory import own_directory
from pyccl.stress.namespaces import NamespaceLine, Namespaces
from pyccl.stress.network import Bend

PORT = 7000
ARRIVES_S = 60.0  # at the latest
LOST_S = 1.0
IS_ROOT = os.geteuid() == 0


class Ends:
    """Two placed processes, played by sockets of ours."""

    def __init__(self, network: Namespaces) -> None:
        for name in ("peer 0", "peer 1"):
            network.place(name)
        lines = [network.line(name) for name in ("peer 0", "peer 1")]
        assert all(isinstance(line, NamespaceLine) for line in lines)
        self.a, self.b = lines
        self.sockets = [line.inside.call(lambda line=line: self._open(line.address)) for line in lines]

    @staticmethod
    def _open(address: str) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((address, PORT))
        sock.settimeout(0.05)
        return sock

    def passes(self, sender: int, within_s: float) -> bool:
        """Whether anything that this end sends arrives; again and again, for resolving an address loses some."""
        out, into = self.sockets[sender], self.sockets[1 - sender]
        to = (self.b if sender == 0 else self.a).address
        word, until_s = os.urandom(8), time.monotonic() + within_s
        while time.monotonic() < until_s:
            with contextlib.suppress(OSError):  # nothing yet, or no route while the line is down
                out.sendto(word, (to, PORT))
                if into.recv(100) == word:
                    return True
        return False

    def carry(self, there: bool, back: bool) -> bool:
        """Whether they carry so: what shall arrive has time to, what shall not is sent some twenty times."""
        wanted = (there, back)
        return all(self.passes(end, ARRIVES_S if wants else LOST_S) == wants for end, wants in enumerate(wanted))


@pytest.fixture
def ends() -> Iterator[Ends | None]:
    """None without the right to make namespaces: that this is told is the test then."""
    if not IS_ROOT:
        with pytest.raises(NetworkError):
            Namespaces()
        yield None
        return
    network = Namespaces()
    made = Ends(network)
    yield made
    for sock in made.sockets:
        sock.close()
    network.close()


def test_a_line_that_is_cut_carries_nothing_until_it_is_mended(ends: Ends | None) -> None:
    if ends is None:
        return
    assert ends.carry(True, True)
    ends.a.cut()
    assert ends.carry(False, False)
    ends.a.mend()
    assert ends.carry(True, True)


def test_a_block_holds_one_way_between_two(ends: Ends | None) -> None:
    if ends is None:
        return
    assert ends.carry(True, True)
    ends.a.block(ends.b)
    assert ends.carry(False, True)
    ends.a.unblock(ends.b)
    assert ends.carry(True, True)


def test_a_bent_line_loses_delays_and_is_straight_again(ends: Ends | None) -> None:
    if ends is None:
        return
    ends.a.bend(Bend(delay_s=0.05), seed=1)
    wait_for_relay(ends.a)
    assert ends.carry(True, True)
    out, into = ends.sockets
    into.settimeout(ARRIVES_S)
    sent_s = time.monotonic()
    out.sendto(b"last", (ends.b.address, PORT))
    while into.recv(100) != b"last":
        pass
    assert time.monotonic() - sent_s >= 0.05
    into.settimeout(0.05)
    ends.a.straighten()
    assert ends.carry(True, True)
    ends.a.bend(Bend(loss=1.0), seed=1)
    wait_for_relay(ends.a)
    assert ends.carry(False, False)
    ends.a.straighten()
    assert ends.carry(True, True)


def wait_for_relay(line: NamespaceLine) -> None:
    assert line.handover is not None
    line.handover.join()


def test_a_bent_line_carries_a_stream_in_large_frames(ends: Ends | None) -> None:
    if ends is None:
        return
    data = random.Random(1).randbytes(5_000_000)

    def listen() -> socket.socket:
        return socket.create_server((ends.b.address, PORT))

    with ends.b.inside.call(listen) as server:
        ends.a.bend(Bend(delay_s=0.001, bits_per_s=200e6), seed=1)
        wait_for_relay(ends.a)

        def send() -> None:
            with socket.create_connection((ends.b.address, PORT), timeout=ARRIVES_S) as sock:
                sock.sendall(data)

        sender = threading.Thread(target=lambda: ends.a.inside.call(send))
        sender.start()
        server.settimeout(ARRIVES_S)
        sock, _ = server.accept()
        with sock:
            sock.settimeout(ARRIVES_S)
            received = b"".join(iter(lambda: sock.recv(1 << 20), b""))
        sender.join()
    assert received == data


def test_a_line_whose_process_has_ended_takes_faults_without_effect(ends: Ends | None) -> None:
    if ends is None:
        return
    ends.a.bend(Bend(loss=0.5), seed=1)
    ends.a.close()
    for call in (ends.a.cut, ends.a.mend, ends.a.straighten, ends.a.close):
        call()
    ends.b.block(ends.a)
    ends.b.unblock(ends.a)
    ends.a.bend(Bend(loss=0.5), seed=1)
    ends.a.straighten()


# ---- what a bent line does with frames, without one


def test_a_delay_keeps_the_order_and_is_the_same_for_all() -> None:
    way = Direction(Bend(delay_s=0.5), random.Random(1))
    way.take(b"a", 1.0)
    way.take(b"b", 1.2)
    assert (way.due(1.4), way.next_s()) == ([], 1.5)
    assert way.due(1.6) == [b"a"]
    assert way.due(1.7) == [b"b"]
    assert way.next_s() is None


def test_loss_is_a_share_and_follows_from_the_seed() -> None:
    def through(seed: int) -> list[bytes]:
        way = Direction(Bend(loss=0.25), random.Random(seed))
        for number in range(2000):
            way.take(str(number).encode(), 0.0)
        return way.due(0.0)

    assert through(7) == through(7) != through(8)
    assert 1400 < len(through(7)) < 1600


def test_a_narrow_line_spreads_frames_and_drops_what_its_queue_cannot_hold() -> None:
    frame = bytes(60_000)
    way = Direction(Bend(bits_per_s=QUEUE_MIN_BYTES * 8 / QUEUE_S), random.Random(1))
    for _ in range(100):
        way.take(frame, 0.0)
    frame_s = len(frame) * QUEUE_S / QUEUE_MIN_BYTES
    assert way.next_s() == pytest.approx(frame_s)
    held = way.due(10.0)
    assert QUEUE_MIN_BYTES <= sum(len(f) for f in held) <= QUEUE_MIN_BYTES + 2 * len(frame)


# ---- what is left behind


def test_the_directory_of_a_run_goes_with_it_and_that_of_a_killed_one_with_the_next(tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from pyccl.stress.directory import own_directory\n"
    program += "with own_directory(Path(sys.argv[1])) as path: print(path, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        left = Path(killed.stdout.readline().strip())
        with own_directory(tmp_path) as mine:
            assert left.is_dir() and mine.is_dir() and mine != left
        assert not mine.exists() and left.is_dir()
        killed.kill()
    assert left.is_dir()
    with own_directory(tmp_path) as mine:
        assert list(tmp_path.iterdir()) == [mine]
    assert list(tmp_path.iterdir()) == []
