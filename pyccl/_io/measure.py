"""Measure the links of this member while all others measure theirs: the first half of ``optimize_topology``.

    1  all-gather: under which id everybody serves the bytes that the others receive
    2  all-gather: whose links each member lacks; the rounds follow from that (`_proto.measuring`)
    3  a round: barrier, in which a member may say that it is late: then no round begins any more; from one other
       member, which does the same, receive as fast as it comes; count what it has got
    4  all-gather: with whom each wants another round; with fewer connections where these may do, and goes back if they
       are slower; with all it has where a pair looks odd. The better figure counts
    5  the crowd, if anything was missing: barrier; the same from several members at once
    6  all-gather: what each sent in the crowd, if far less came to it; who sent most then receives from several alone

What is received is state that nobody needs: STATE frames over the links as they are, so connections, congestion control
and the CPU cost of both ends are in the figure. So much is asked for as fills the line and little more: what was asked
for and not yet received when the time is over delays the next round. A round goes on until the rate is steady: three
parts of 0.2 s and three round trips each after connections have risen to it, of which the last is not faster, or
ROUND_MOST_S. What counts is what TCP has delivered, holes or not: in order it comes in bursts after losses.
Times: a round takes at most ROUND_MOST_S, _DRAIN_S, pings (_PING_S) and a barrier; there are at most ROUNDS_MAX,
twice, the crowd and two alone after it, and none but the crowd begins after _ROUNDS_MOST_S or a part of the caller's
time. Figures are good for linktable.FRESH_S, longer if traffic confirms them.
Threads: the caller's.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import queue
import secrets
import struct
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import numpy as np

from pyccl._io.session import Session
from pyccl._native import status
from pyccl._native.handles import FETCH_BYTES_MAX, code_rate, fold_rate
from pyccl._proto import limits, measuring, topology
from pyccl.errors import RemoteProtocolError

TAG: Final = 4
ROUND_MOST_S: Final = 3.0
_PART_S: Final = 0.2
_PART_TRIPS: Final = 3  # that a part takes beyond: connections double their rate in each
_FALLS_MOST: Final = 0.75  # to so much
_RISES_MOST: Final = 1.1  # where the pace of the senders is what keeps it, it rises more
_STEADY_PARTS: Final = 3
_REST: Final = 0.05  # of what was fastest: nobody asks any more
_PINGS: Final = 4
_PING_S: Final = 2.0
_DRAIN_S: Final = 1.0  # for what is still on its way when a round is over
_ROUNDS_MOST_S: Final = 60.0  # no round begins later: pairs that are missing then are the next call's
_ROUNDS_PART: Final = 0.6  # of the caller's time, where that is less
_AGAIN_PART: Final = 0.1  # of the same: so much longer for pairs that measure again
_GO_ON, _LATE = b"\0", b"\1"
_WINDOW_LEAST: Final = 1 << 16
_WINDOW_MOST: Final = 32 << 20
_PARTS: Final = 16  # of a window, asked for one by one
_PART_LEAST: Final = 1 << 13
_SLACK_S: Final = 0.05  # beyond the round trip that a window lasts
_SAMPLE_S: Final = 0.02
_SERVED: Final = 4096  # times the same FETCH_BYTES_MAX of zeros, one behind the other
_U64: Final = struct.Struct("<Q")

log = logging.getLogger("pyccl.measure")

# (my bytes, deadline) -> (members in order, their bytes); every member calls it or it fails on all
Gather = Callable[[bytes, float], tuple[tuple[bytes, ...], list[bytes]]]


def measure(session: Session, gather: Gather, check: Callable[[], None], deadline: float) -> None:
    """Measure what this session's table lacks, together with all members, and tell the master of it.

    check: raises when there is no use in going on. Raises what a collective raises.
    """
    engine, sync, me, table = session.need_engine(), secrets.randbits(64), session.peer, session.table
    engine.publish(sync, [np.zeros(FETCH_BYTES_MAX, np.uint8)] * _SERVED)
    try:
        members, hellos = gather(_U64.pack(sync), deadline)
        syncs = {peer: _U64.unpack(hello)[0] for peer, hello in zip(members, hellos, strict=True)}
        table.keep(members)
        now = time.monotonic()
        whole_s = min(_ROUNDS_MOST_S / _ROUNDS_PART, deadline - now)
        rounds_until = now + _ROUNDS_PART * whole_s
        again_until = rounds_until + _AGAIN_PART * whole_s
        mine = bytes(int(peer != me and table.lacks(peer, now)) for peer in members)
        staying, lacking = gather(mine.ljust(limits.MEMBERS_MAX, b"\0"), deadline)
        rounds = measuring.rounds(len(members), _missing(members, staying, lacking))
        probe = _Probe(session, syncs, check)
        seen: dict[bytes, tuple[float, float]] = {}  # measured now: bytes per second, round trip
        for pairs in rounds:
            if _are_late(gather, rounds_until, deadline):
                break
            rank = measuring.partner(pairs, members.index(me))
            if rank is not None:
                peer = members[rank]
                rtt_s = probe.rtt_s(peer)
                rate = probe.rates([peer], rtt_s)[0]
                table.measured(peer, rate, rtt_s, time.monotonic())
                seen[peer] = rate, rtt_s
                log.info("link_measured peer=%s bytes_s=%.0f rtt_s=%.4f", peer.hex()[:8], rate, rtt_s)
        if rounds:
            _again(probe, gather, members, seen, again_until, deadline)
            for peer, (rate, rtt_s) in seen.items():
                table.measured(peer, rate, rtt_s, time.monotonic())
            gather(_GO_ON, deadline)
            if len(members) > 2:
                crowd = [members[rank] for rank in measuring.crowd(len(members), members.index(me))]
                rtt_s = max([probe.rtt_s(peer) for peer in crowd])
                sent = probe.rates(crowd, rtt_s)
                for peer, rate in zip(crowd, sent, strict=True):
                    table.crowded(peer, rate)
                table.received(_received(probe, gather, members, crowd, rtt_s, sum(sent), again_until, deadline))
            table.works(topology.Cpu(probe.move_rate(), fold_rate(), code_rate()))
            gather(_GO_ON, deadline)  # nobody stops serving before all have received
    finally:
        engine.unpublish(sync)


def _are_late(gather: Gather, until: float, deadline: float) -> bool:
    """The barrier ahead of a round. All come to the same answer: their clocks need not."""
    _, told = gather(_LATE if time.monotonic() > until else _GO_ON, deadline)
    return any(said != _GO_ON for said in told)


def _again(
    probe: _Probe,
    gather: Gather,
    members: tuple[bytes, ...],
    seen: dict[bytes, tuple[float, float]],
    until: float,
    deadline: float,
) -> None:
    """Use fewer connections where that is no slower. `seen` gets the better figures."""
    me, world = members.index(probe.me), len(members)
    fewer: dict[int, int] = {}  # rank -> connections
    odd: set[int] = set()
    fastest = max((rate for rate, _ in seen.values()), default=0.0)
    for peer, (rate, rtt_s) in seen.items():
        few = topology.few(rate, rtt_s)
        if rate > 0 and few < probe.conns(peer):
            fewer[members.index(peer)] = few
        elif measuring.is_odd(rate, fastest):
            odd.add(members.index(peer))
    wishes = bytes(int(rank in fewer or rank in odd) for rank in range(limits.MEMBERS_MAX))
    told = _by_rank(members, *gather(wishes, deadline))
    pairs = {(min(a, b), max(a, b)) for a, row in told.items() for b in range(world) if row[b] and b in told and a != b}
    unproven = set(fewer)
    try:
        for rank, few in fewer.items():
            probe.use(members[rank], few)
        for disjoint in measuring.rounds(world, pairs):
            if _are_late(gather, until, deadline):
                break
            partner = measuring.partner(disjoint, me)
            if partner is not None:
                peer = members[partner]
                before, rtt_s = seen.get(peer, (0.0, 0.0))
                (rate,) = probe.rates([peer], rtt_s)
                slower = rate < measuring.ENOUGH * before
                if not slower:
                    unproven.discard(partner)
                seen[peer] = max(rate, before), rtt_s
                log.info(
                    "link_again peer=%s conns=%d bytes_s=%.0f before=%.0f slower=%s",
                    *(peer.hex()[:8], fewer.get(partner, 0), rate, before, slower),
                )
    finally:
        for rank in unproven:
            probe.use(members[rank], 0)


def _received(
    probe: _Probe,
    gather: Gather,
    members: tuple[bytes, ...],
    crowd: Sequence[bytes],
    rtt_s: float,
    sent: float,
    until: float,
    deadline: float,
) -> float:
    """Bytes per second that come from the crowd while nobody else receives; 0: the crowd has shown what can come, or
    there is no time. sent: to it, in all."""
    crowd_came, came = probe.came, 0.0
    until = min(until, deadline - measuring.FAN_INS_MAX * (ROUND_MOST_S + _DRAIN_S))
    wish = measuring.clip_rate(sent) if measuring.may_take_more(sent, crowd_came) else 0
    told = _by_rank(members, *gather(_U64.pack(wish), deadline))
    wishes = {rank: _U64.unpack(said)[0] for rank, said in told.items()}
    for rank in measuring.fan_ins({rank: wish for rank, wish in wishes.items() if wish}):
        if _are_late(gather, until, deadline):
            break
        if members[rank] == probe.me:
            probe.rates(crowd, rtt_s, receives_alone=True)
            came = probe.came
            log.info("fan_in bytes_s=%.0f crowd=%.0f", came, crowd_came)
    return came


def _by_rank(members: tuple[bytes, ...], staying: tuple[bytes, ...], told: list[bytes]) -> dict[int, bytes]:
    return {members.index(peer): row for peer, row in zip(staying, told, strict=True)}


def _missing(members: tuple[bytes, ...], staying: tuple[bytes, ...], lacking: list[bytes]) -> set[measuring.Pair]:
    """Pairs of which one of both lacks the other, by rank in `members`."""
    missing = set()
    for peer, lacks in zip(staying, lacking, strict=True):
        a = members.index(peer)
        if set(lacks) - {0, 1} or lacks[a] or any(lacks[len(members) :]):
            raise RemoteProtocolError(f"{peer.hex()} does not say which links it lacks")
        for b in range(len(members)):
            if lacks[b] and members[b] in staying:
                missing.add((min(a, b), max(a, b)))
    return missing


class _Probe:
    """Receives as fast as it comes, into one buffer over and over. check: raises when there is no use in going on."""

    def __init__(self, session: Session, syncs: dict[bytes, int], check: Callable[[], None]) -> None:
        self._session, self._syncs, self._check = session, syncs, check
        self._buffer = np.empty(FETCH_BYTES_MAX, np.uint8)
        # A request is known by what it asks for: what comes late, or twice, must not pass for the answer to another.
        self._offsets = itertools.cycle(range(0, _SERVED * FETCH_BYTES_MAX, FETCH_BYTES_MAX))
        self._most = 0, 0.0  # bytes moved, and processor time, in the round that moved most
        self.came = 0.0  # bytes per second in all, in the last round

    def move_rate(self) -> float:
        """Bytes per second of the engine's processor time, in the busiest of the rounds until now."""
        moved, cpu_s = self._most
        return moved / cpu_s if cpu_s > 0 else 0.0

    def rtt_s(self, peer: bytes) -> float:
        """The shortest of a few; 0: no answer."""
        best, until = math.inf, time.monotonic() + _PING_S
        for _ in range(_PINGS):
            begun, ended = time.monotonic(), queue.SimpleQueue[int]()
            number = self.ask(peer, 1, ended.put)
            if number is None:
                break
            while ended.empty() and (time.monotonic() < until or not self._session.cancel_fetch(number)):
                self._check()
                with contextlib.suppress(queue.Empty):
                    ended.put(ended.get(timeout=_SAMPLE_S))
            if ended.empty() or ended.get() != status.OK:
                break
            best = min(best, time.monotonic() - begun)
        return best if best < math.inf else 0.0

    def rates(self, peers: Sequence[bytes], rtt_s: float, *, receives_alone: bool = False) -> list[float]:
        """Bytes per second to each, all at once, while as much is received. 0: nothing went, or the link was lost.
        receives_alone: nobody asks this one for anything meanwhile.

        All over the same time, the best one: what several make together is then what the host makes.
        """
        done: _Done = queue.SimpleQueue()
        begun = now = time.monotonic()
        streams = [_Stream(self, peer, rtt_s, done, begun, receives_alone) for peer in peers]
        part_s = min(_PART_S + _PART_TRIPS * rtt_s, ROUND_MOST_S / 4)  # the round has four or more
        moved, cpu_s = self._work(peers[0])
        while any(stream.open for stream in streams) and now < begun + ROUND_MOST_S:
            self._check()
            for stream in _ended(done):
                stream.fill()
            if time.monotonic() < now + _SAMPLE_S:
                continue
            now = time.monotonic()
            for stream in streams:
                stream.sample(now)
            if all(stream.is_steady(now, part_s) for stream in streams):
                break
        moved_now, cpu_now_s = self._work(peers[0])
        self._most = max(self._most, (moved_now - moved, cpu_now_s - cpu_s))
        since, until = best_time([stream.went for stream in streams], max(2 * part_s, (now - begun) / 2))
        rates = [0.0 if stream.failed else stream.went.rate(since, until) for stream in streams]
        since = min(max(stream.came.risen_at for stream in streams), now - 2 * part_s)
        self.came = sum(stream.came.rate(since, now) for stream in streams)  # not the best time: it comes in bursts
        while any(stream.open for stream in streams) and time.monotonic() < now + _DRAIN_S:
            self._check()
            _ended(done)
        for number in itertools.chain.from_iterable(stream.open for stream in streams):
            self._session.cancel_fetch(number)
        return rates

    @property
    def me(self) -> bytes:
        return self._session.peer

    def conns(self, peer: bytes) -> int:
        """Connections of the link that stand."""
        slot = self._session.slot_of(peer)
        return 0 if slot is None else self._session.need_engine().conns(slot)

    def use(self, peer: bytes, count: int) -> None:
        """So many are to carry what we send; 0: as many as is found out. Not where the user said how many."""
        slot = self._session.slot_of(peer)
        if slot is not None and self._session.config.connections is None and count <= limits.CONNECTIONS_MAX:
            self._session.need_engine().use(slot, count)

    def received(self, peer: bytes) -> int:
        """Bytes, on all its connections so far."""
        slot = self._session.slot_of(peer)
        return 0 if slot is None else self._session.need_engine().received(slot)

    def delivered(self, peer: bytes) -> tuple[int, bool]:
        """Bytes that it has of ours, on the connections that stand; whether the line takes no more than it gets now."""
        slot = self._session.slot_of(peer)
        return (0, True) if slot is None else self._session.need_engine().delivered(slot)

    def _work(self, peer: bytes) -> tuple[int, float]:
        slot = self._session.slot_of(peer)
        return (0, 0.0) if slot is None else self._session.need_engine().work(slot)

    def ask(self, peer: bytes, size: int, then: Callable[[int], None]) -> int | None:
        """The number of the request; None: there is no link."""
        slot = self._session.slot_of(peer)
        if slot is None:
            return None
        return self._session.fetch(
            slot, self._syncs[peer], next(self._offsets), self._buffer[:size], lambda code, _: then(code), packed=False
        )


def _ended(done: _Done) -> list[_Stream]:
    """Wait a moment for requests to end; whose they were."""
    streams = []
    with contextlib.suppress(queue.Empty):
        stream, key, code = done.get(timeout=_SAMPLE_S)
        while True:
            stream.ended(key, code)
            streams.append(stream)
            stream, key, code = done.get_nowait()
    return streams


class Curve:
    """How much there was when. It has risen when it no longer becomes twice as fast."""

    def __init__(self, begun: float, count: int) -> None:
        self.counts = [(begun, count)]
        self._fastest, self.risen_at = 0.0, begun

    def add(self, now: float, count: int, over_s: float) -> float:
        """The rate over so long until now."""
        self.counts.append((now, count))
        rate = self.rate(now - over_s, now)
        if rate > 2 * self._fastest:
            self._fastest, self.risen_at = rate, now
        return rate

    def is_steady(self, now: float, part_s: float) -> bool:
        """Of three parts in a row the last was little faster than the first, and not far slower. Not before it has
        risen: a part that is half slow start may be no slower than the next, in which the first losses are repaired."""
        if now < self.risen_at + _STEADY_PARTS * part_s:
            return False
        since = now - _STEADY_PARTS * part_s
        before, last = self.rate(since, since + part_s), self.rate(now - part_s, now)
        return 0 < _FALLS_MOST * before <= last <= _RISES_MOST * before

    def is_over(self, now: float, part_s: float) -> bool:
        return now >= self.risen_at + part_s and self.rate(now - part_s, now) < _REST * self._fastest

    def rate(self, since: float, until: float) -> float:
        """From the last count before the one time to the last count before the other."""
        (begun, before), (ended, after) = (
            self.counts[max(bisect_right(self.counts, (at, math.inf)) - 1, 0)] for at in (since, until)
        )
        return max(0, after - before) / (ended - begun) if ended > begun else 0.0


def best_time(curves: Sequence[Curve], least_s: float) -> tuple[float, float]:
    """In which most was done in all, of at least that length: connections begin slowly, and may stall.

    The curves have counts of the same times.
    """
    times = [at for at, _ in curves[0].counts]
    totals = [sum(count for _, count in counts) for counts in zip(*(c.counts for c in curves), strict=True)]
    best, found = 0.0, (times[0], times[-1])
    for k, (until, total) in enumerate(zip(times, totals, strict=True)):
        j = bisect_right(times, until - least_s) - 1
        if 0 <= j < k and (total - totals[j]) / (until - times[j]) > best:
            best, found = (total - totals[j]) / (until - times[j]), (times[j], until)
    return found


class _Stream:
    """From one member as much is asked for as its rate and the round trip make use of; it does the same.

    What went is what its TCP has of ours. What came is in order, so that a loss holds it up and a burst follows: good
    enough to tell what to ask for, and whether the other has seen enough.
    """

    def __init__(
        self, probe: _Probe, peer: bytes, rtt_s: float, done: _Done, begun: float, receives_alone: bool
    ) -> None:
        self._probe, self._peer, self._rtt_s, self._done = probe, peer, rtt_s, done
        self._receives_alone = receives_alone
        self._window = _WINDOW_LEAST
        self._keys = itertools.count()
        self._asked: dict[int, tuple[int, int]] = {}  # key -> number of the request, bytes
        self.came, self.went = Curve(begun, probe.received(peer)), Curve(begun, probe.delivered(peer)[0])
        self.failed = self._full = False
        self.fill()

    @property
    def open(self) -> tuple[int, ...]:
        """Numbers of the requests that have not ended."""
        return tuple(number for number, _ in self._asked.values())

    def fill(self) -> None:
        part = min(FETCH_BYTES_MAX, max(_PART_LEAST, self._window // _PARTS))
        while not self.failed and (sum(size for _, size in self._asked.values()) + part <= self._window):
            key = next(self._keys)
            number = self._probe.ask(self._peer, part, partial(self._tell, key))
            if number is None:
                self.failed = True
            else:
                self._asked[key] = number, part

    def _tell(self, key: int, code: int) -> None:
        self._done.put((self, key, code))

    def ended(self, key: int, code: int) -> None:
        del self._asked[key]
        self.failed = self.failed or code != status.OK

    def sample(self, now: float) -> None:
        """Count, and ask for twice what comes in a round trip: what is not limited by that then grows."""
        over_s = max(self._rtt_s, 2 * _SAMPLE_S)
        delivered, self._full = self._probe.delivered(self._peer)
        self.went.add(now, delivered, over_s)
        rate = self.came.add(now, self._probe.received(self._peer), over_s)
        self._window = max(self._window, min(int(2 * rate * (self._rtt_s + _SLACK_S)), _WINDOW_MOST))

    def is_steady(self, now: float, part_s: float) -> bool:
        """Both ways, or the other has seen enough."""
        if self._receives_alone:
            return self.failed or self.came.is_over(now, part_s) or self.came.is_steady(now, part_s)
        if self.went.is_over(now, part_s):
            return True
        return self._full and self.went.is_steady(now, part_s) and self.came.is_steady(now, part_s)


_Done = queue.SimpleQueue[tuple[_Stream, int, int]]
