"""Whether a lab is what was asked for: measured from the hosts, by the kernel's ping, its counters and plain TCP.

Each host sends to the next one, and rates are measured on as many ways more as show each pipe and each flow's cap. The
emulator is asked for what it dropped only, to compare with what did not arrive.
"""

from __future__ import annotations

import contextlib
import enum
import math
import os
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

from pyccl.netlab.cover import Cover, Way, neighbours
from pyccl.netlab.lab import Lab
from pyccl.netlab.site import MTU
from pyccl.units import show_rate

PINGS: Final = 20
QUIET_S: Final = 1.0  # beyond the delay of a way, after which nothing comes any more
PING_BYTES: Final = 84  # an IP packet
LATE_MS: Final = 1.0  # that the best of all pings may be late
LOSS_SECONDS: Final = 3.0
LOSS_PACKETS: Final = (1000, 100_000)
LOSS_EXPECTED: Final = 30  # packets, where time allows
LOSS_BYTES: Final = 60  # of an IP packet
LOSS_BURST_S: Final = 0.002  # sent at once; what a busy machine held up is not made up for
SIGMAS: Final = 5.0
RATE_SECONDS: Final = 1.0
RATE_TOLERANCE: Final = 0.03
TCP_SECONDS: Final = 2.0
TCP_ROUND_TRIPS: Final = 20
OVERLOAD: Final = 1.25
UDP_BYTES: Final = MTU - 28
TCP_PORT: Final = 9  # of segments that belong to no connection
_UDP_SEGMENT: Final = 103  # linux/udp.h
_ECHO_REQUEST, _ECHO_REPLY = 8, 0
_RESET: Final = 4  # of the flags of TCP


class What(enum.StrEnum):
    ROUND_TRIP = "round trip"
    LOSS = "loss"
    RATE = "rate"
    FLOW_CAP = "flow cap"
    TCP = "TCP"


@dataclass(frozen=True, slots=True)
class Finding:
    """One figure of one way. asked, found: ms, probability or bits a second; asked is None where nothing limits it.

    narrowest: of a rate or flow cap, the names of the pipes or caps that it is of.
    """

    what: What
    source: str
    target: str
    asked: float | None
    found: float
    passed: bool
    note: str = ""
    narrowest: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check(lab: Lab, cover: Cover) -> Iterator[Finding]:
    """Measure one after the other; some seconds for each host and one or two for each way more.

    cover: of the lab's scenario.
    """
    near = neighbours(lab.world)
    for way in near:
        yield _round_trip(lab, *way)
        yield _loss(lab, *way)
        yield from _limits(lab, cover, way)
        yield _tcp(lab, *way)
    for way in sorted({*cover.pipes, *cover.caps} - set(near)):
        yield from _limits(lab, cover, way)


def _limits(lab: Lab, cover: Cover, way: Way) -> Iterator[Finding]:
    rate, cap = lab.scenario.rate(*way), lab.scenario.flow_cap(*way)
    if way in cover.pipes and rate is not None:
        yield _rate(lab, way, What.RATE, rate, cover.pipes[way])
    if way in cover.caps and cap is not None:
        yield _rate(lab, way, What.FLOW_CAP, cap, cover.caps[way])


def _finding(
    lab: Lab, way: Way, what: What, asked: float | None, found: float, passed: bool, note: str,
    narrowest: tuple[str, ...] = (),
) -> Finding:  # fmt: skip
    source, target = (lab.scenario.hosts[rank].name for rank in way)
    return Finding(what, source, target, asked, found, passed, note, narrowest)


# ---- round trip


def _round_trip(lab: Lab, source: int, target: int) -> Finding:
    ways = ((source, target), (target, source))
    asked = sum(lab.scenario.delay_ns(*way) for way in ways) / 1e6
    answers = [_ping(lab, source, target, number, QUIET_S + asked / 1e3) for number in range(PINGS)]
    times = [time_ms for time_ms in answers if time_ms is not None]
    if not times:
        return _finding(lab, ways[0], What.ROUND_TRIP, asked, math.inf, False, f"none of {PINGS} pings came back")
    note = f"median {statistics.median(times):.2f} ms of {len(times)} pings"
    passed = round_trip_passes(asked + _on_the_line_ms(lab, ways), min(times))
    return _finding(lab, ways[0], What.ROUND_TRIP, asked, min(times), passed, note)


def round_trip_passes(asked_ms: float, found_ms: float) -> bool:
    """Never early; the best of all pings is hardly late."""
    return asked_ms <= found_ms <= asked_ms + LATE_MS + 0.01 * asked_ms


def _on_the_line_ms(lab: Lab, ways: tuple[tuple[int, int], tuple[int, int]]) -> float:
    """That a ping's bits take to go onto the narrowest lines."""
    rates = [rate for way in ways if (rate := lab.scenario.rate(*way)) is not None]
    return sum(PING_BYTES * 8 / rate * 1e3 for rate in rates)


def _ping(lab: Lab, source: int, target: int, number: int, timeout_s: float) -> float | None:
    """Milliseconds until the target's kernel has answered; None: it was lost."""
    request = _echo_request(number)
    made = lab.call(source, lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP))
    with made as sock:
        sock.settimeout(timeout_s)
        start_ns = time.monotonic_ns()
        sock.sendto(request, (lab.addresses[target], 0))
        try:
            while True:
                reply = sock.recv(2048)
                end_ns = time.monotonic_ns()
                if reply[20] == _ECHO_REPLY and reply[24:] == request[4:]:
                    return (end_ns - start_ns) / 1e6
        except TimeoutError:
            return None


def _echo_request(number: int) -> bytes:
    """RFC 792."""
    rest = struct.pack("!HH", os.getpid() & 0xFFFF, number) + bytes(PING_BYTES - 28)
    total = sum(struct.unpack(f"!{len(rest) // 2}H", rest)) + (_ECHO_REQUEST << 8)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!BBH", _ECHO_REQUEST, 0, ~total & 0xFFFF) + rest


# ---- loss


def _loss(lab: Lab, source: int, target: int) -> Finding:
    asked, rate = lab.scenario.loss(source, target), lab.scenario.rate(source, target)
    least, most = LOSS_PACKETS
    # packets a second
    pace = most / LOSS_SECONDS if rate is None else min(most / LOSS_SECONDS, rate / 2 / 8 / LOSS_BYTES)
    most = min(most, int(LOSS_SECONDS * pace))
    count = min(max(least, math.ceil(LOSS_EXPECTED / asked) if asked > 0 else least), most)
    burst = max(1, int(pace * LOSS_BURST_S))
    before, overflowed = lab.counts(), lab.call(target, _overflowed)
    with _receiver(lab, target) as into, _sender(lab, source) as out:
        arrived = _Arrivals(into, QUIET_S + lab.scenario.delay_ns(source, target) / 1e9)
        for sent in range(0, count, burst):
            now_s = time.monotonic()
            for _ in range(min(burst, count - sent)):
                out.sendto(bytes(LOSS_BYTES - 28), into.getsockname())
            time.sleep(max(burst / pace - (time.monotonic() - now_s), 0))
        missing = count - arrived.count()
    after = lab.counts()
    lost = after.lost - before.lost
    others = {
        "dropped by full queues": after.dropped - before.dropped,
        "by the emulator, which had no time": after.overrun - before.overrun,
        "by a receiver that had none": lab.call(target, _overflowed) - overflowed,
    }
    passed = loss_passes(asked, count - sum(others.values()), lost) and lost + sum(others.values()) == missing
    note = f"{missing} of {count} packets did not arrive, {lost} were lost"
    note += "".join(f", {number} {what}" for what, number in others.items() if number)
    return _finding(lab, (source, target), What.LOSS, asked, lost / count, passed, note)


def _overflowed() -> int:
    """UDP packets that arrived in the calling thread's namespace and found a full socket."""
    with open("/proc/thread-self/net/snmp", encoding="ascii") as lines:
        names, values = [line.split() for line in lines if line.startswith("Udp:")]
    return int(values[names.index("RcvbufErrors")])


def loss_passes(asked: float, count: int, lost: int) -> bool:
    """Within so many standard deviations of the binomial distribution."""
    return abs(lost - asked * count) <= SIGMAS * math.sqrt(count * asked * (1 - asked))


class _Arrivals:
    """Counts datagrams in a thread, so that the socket's buffer does not fill while others are sent."""

    def __init__(self, sock: socket.socket, quiet_s: float) -> None:
        self._sock, self._count = sock, 0
        self._all_sent = threading.Event()
        sock.settimeout(quiet_s)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                self._sock.recv(2048)
                self._count += 1
            except TimeoutError:
                if self._all_sent.is_set():
                    return

    def count(self) -> int:
        """Until none came for a while; all must have been sent."""
        self._all_sent.set()
        self._thread.join()
        return self._count


# ---- rate


def _rate(lab: Lab, way: Way, what: What, asked: float, narrowest: tuple[str, ...]) -> Finding:
    """Send more than is carried, by UDP or as one flow of TCP, and see what the target's interface counts."""
    flow = _tcp_flow if what is What.FLOW_CAP else _udp_flow
    stop = threading.Event()
    with contextlib.ExitStack() as sockets:
        send = flow(lab, way, _segments(asked * OVERLOAD), sockets)
        flood = threading.Thread(target=_flood, args=(send, asked * OVERLOAD, stop))
        flood.start()
        settled_s = 2 * lab.scenario.delay_ns(*way) / 1e9 + 0.3  # the queues are full
        time.sleep(settled_s)
        start = lab.interface(way[1])
        time.sleep(RATE_SECONDS)
        end = lab.interface(way[1])
        stop.set()
        flood.join()
    found = (end.rx_bytes - start.rx_bytes) * 8e9 / (end.at_ns - start.at_ns)
    note = f"of {'one TCP flow' if what is What.FLOW_CAP else 'UDP'}, {show_rate(int(asked * OVERLOAD))} offered"
    note += f", through {', '.join(narrowest)}"
    return _finding(lab, way, what, asked, found, rate_passes(asked, found), note, narrowest)


def rate_passes(asked_bps: float, found_bps: float) -> bool:
    return abs(found_bps - asked_bps) <= RATE_TOLERANCE * asked_bps


def _segments(rate_bps: float) -> int:
    """Packets that are sent at once: about each millisecond."""
    return max(1, min(40, int(rate_bps * 0.001 / 8 / MTU)))


def _udp_flow(lab: Lab, way: Way, segments: int, sockets: contextlib.ExitStack) -> Callable[[], None]:
    """Sends a burst, by one call."""
    source, target = way
    into, out = sockets.enter_context(_receiver(lab, target)), sockets.enter_context(_sender(lab, source))
    out.setsockopt(socket.SOL_UDP, _UDP_SEGMENT, UDP_BYTES)
    address, burst = into.getsockname(), bytes(UDP_BYTES * segments)

    def send() -> None:
        out.sendto(burst, address)

    return send


def _tcp_flow(lab: Lab, way: Way, segments: int, sockets: contextlib.ExitStack) -> Callable[[], None]:
    """Sends a burst of segments of one flow, at our pace: a connection's is its kernel's business."""
    source, target = way
    out = lab.call(source, lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP))
    sockets.enter_context(out)
    address = (lab.addresses[target], 0)
    # RFC 9293; a reset, since nobody answers one
    head = struct.pack("!HHIIBBHHH", TCP_PORT, TCP_PORT, 0, 0, 5 << 4, _RESET, 0, 0, 0)
    segment = head + bytes(MTU - 20 - len(head))

    def send() -> None:
        for _ in range(segments):
            out.sendto(segment, address)

    return send


def _flood(send: Callable[[], None], rate_bps: float, stop: threading.Event) -> None:
    with contextlib.suppress(PermissionError):  # a sender that has to wait for others leaves the line idle
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))  # the calling thread
    burst_s = _segments(rate_bps) * MTU * 8 / rate_bps
    due_s = time.monotonic()
    while not stop.is_set():
        send()
        due_s += burst_s
        if (ahead_s := due_s - time.monotonic()) > 0:
            time.sleep(ahead_s)


# ---- TCP


def _tcp(lab: Lab, source: int, target: int) -> Finding:
    """One connection, as the kernel makes it."""
    limits = (lab.scenario.rate(source, target), lab.scenario.flow_cap(source, target))
    asked = min((limit for limit in limits if limit is not None), default=None)
    seconds = TCP_SECONDS + TCP_ROUND_TRIPS * lab.scenario.delay_ns(source, target) * 2 / 1e9
    with lab.call(target, lambda: socket.create_server((lab.addresses[target], 0))) as server:
        address = server.getsockname()
        sender = threading.Thread(
            target=_send_for, args=(lab.call(source, lambda: socket.create_connection(address)), seconds)
        )
        with server.accept()[0] as sock:
            start_s = time.monotonic()
            sender.start()
            received = 0
            while part := sock.recv(1 << 18):
                received += len(part)
            found = received * 8 / (time.monotonic() - start_s)
        sender.join()
    passed = found > 0 and (asked is None or found <= asked)
    note = f"one connection for {seconds:.1f} s"
    if asked is not None:
        note += f", {found / asked:.0%} of the line"
    return _finding(lab, (source, target), What.TCP, asked, found, passed, note)


def _send_for(sock: socket.socket, seconds: float) -> None:
    with sock:
        until_s = time.monotonic() + seconds
        block = bytes(1 << 16)
        while time.monotonic() < until_s:
            sock.sendall(block)


def _receiver(lab: Lab, rank: int) -> socket.socket:
    def make() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        sock.bind((lab.addresses[rank], 0))
        return sock

    return lab.call(rank, make)


def _sender(lab: Lab, rank: int) -> socket.socket:
    return lab.call(rank, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
