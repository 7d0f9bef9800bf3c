"""Fetch pieces of published state from several holders at once, within a fixed window of memory.

Each piece is asked of one holder at a time. Whoever has the fewest requests open gets the next; a holder has at most
_IN_FLIGHT, all together at most WINDOW. What a holder's death leaves open goes back to the queue. When nothing else is
left to ask, a holder that has no request *robs* another: of half of the requests of the one with the most, from the
tail, or of a lone request that has waited for a while. Who is robbed is asked for less (one piece at a time) and later
than others, and must let twice the time pass before it may rob in turn, until it delivers something: so a slow or
stuck holder holds up nobody, and two slow ones don't snatch a piece from each other for ever.

Pieces are asked for packed while `packing` says so (`_proto.packing`); it is told what comes.

A holder whose bytes are refused has lied (or its caller has changed the arrays): it is named, left, and asked nothing
more. Completions come through a queue from the Trio thread.
Threads: one, the caller of ``run``.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from pyccl import errors
from pyccl._io import packer
from pyccl._io.session import Session
from pyccl._native import status
from pyccl._native.handles import FETCH_BYTES_MAX
from pyccl._proto.packing import Packing

WINDOW: Final = 32  # requests at a time, of one FETCH_BYTES_MAX each: 32 MiB, as much as a line of 1 Gbit/s and 250 ms
_IN_FLIGHT: Final = 16  # of them, at one holder
_PATIENCE_S: Final = 1.0  # a lone request that is older may be robbed, by a holder that was not
_ROBBED_MAX: Final = 10  # counted
_REST_S: Final = 0.05  # a link of a member is being repaired, or its loss is being settled
_POLL_S: Final = 0.1

log = logging.getLogger("pyccl.statesync")

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
# (piece, its bytes, then) -> whether they are right. If so it calls then() when it needs them no more, in any thread.
Take = Callable[["Piece", Bytes, Callable[[], None]], bool]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of the published state, at most FETCH_BYTES_MAX long."""

    offset: int
    size_bytes: int


@dataclass(slots=True, eq=False)
class _Request:
    piece: Piece
    buffer: Bytes  # FETCH_BYTES_MAX long
    asked_s: float
    packed: bool  # how it was asked for
    number: int = 0


@dataclass(slots=True, eq=False)
class _Holder:
    requests: list[_Request] = field(default_factory=list)  # open ones, in the order they were asked
    rests_until_s: float = 0.0
    robbed: int = 0  # times since it last delivered


class Fetcher:
    """One sync's sources. `syncs`: the id under which each of `holders` serves."""

    def __init__(
        self, session: Session, holders: Iterable[bytes], syncs: dict[bytes, int], deadline: float, packing: Packing
    ) -> None:
        self._session, self._syncs, self._deadline, self._packing = session, syncs, deadline, packing
        self._holders = {peer: _Holder() for peer in sorted(holders)}
        self._buffers: list[Bytes] = []  # free ones; any thread may add one, ours takes them
        self._done: queue.SimpleQueue[tuple[bytes, _Request, int, int]] = queue.SimpleQueue()
        self.fetched: dict[bytes, int] = {}  # holder -> bytes accepted from it, as they came over the wire
        self.liars: list[bytes] = []

    @property
    def holders(self) -> tuple[bytes, ...]:
        """Those that can still be asked."""
        return tuple(self._holders)

    def run(self, pieces: Sequence[Piece], take: Take) -> bool:
        """Fetch all. False: no usable holder is left.

        Raises:
            DeadlineError: the time ran out.
            what the session ended with, if it did, and what `take` raises.
        """
        todo = deque(pieces)
        while todo or self._in_flight():
            self._hand_out(todo)
            if not self._in_flight():
                if not self._wait_for_links():
                    return False
                continue
            self._rob(bool(todo))
            self._accept(todo, take)
        return True

    def run_from_one(self, pieces: Sequence[Piece], take: Take, patience_s: float) -> bool:
        """Fetch all from the first holder. False: it is gone, or let `patience_s` pass without a piece; it is the last
        one to be asked again then."""
        peer = next(iter(self._holders))
        todo, moved_s = deque(pieces), time.monotonic()
        while peer in self._holders:
            holder = self._holders[peer]
            while todo and len(holder.requests) < _IN_FLIGHT and self._slot(peer) is not None:
                self._ask(peer, todo.popleft(), packed=False)
            left = len(todo) + len(holder.requests)
            if left == 0:
                return True
            if holder.requests:
                self._accept(todo, take)
            else:
                self._wait_for_links()
            now = time.monotonic()
            if len(todo) + len(holder.requests) < left:
                moved_s = now
            elif now - moved_s >= patience_s and peer in self._holders:
                self._recall(holder.requests)
                self._holders[peer] = self._holders.pop(peer)
                return False
        return False

    def refuse(self, peer: bytes, what: str) -> None:
        """What it served is not what its digest says: leave it."""
        log.warning("state_source_lied peer=%s what=%s next=ask_others", peer.hex()[:8], what)
        self.liars.append(peer)
        self._drop(peer)

    # ---- requests

    def _in_flight(self) -> int:
        return sum(len(holder.requests) for holder in self._holders.values())

    def _hand_out(self, todo: deque[Piece]) -> None:
        """Ask for as much as the window holds."""
        share = max(1, min(_IN_FLIGHT, WINDOW // max(1, len(self._holders))))
        while todo and self._in_flight() < WINDOW:
            peer = self._least_busy(share)
            if peer is None:
                return
            self._ask(peer, todo.popleft(), packed=self._packing.packed)

    def _least_busy(self, share: int) -> bytes | None:
        """Of the holders that can be asked now and have fewer than `share` requests open: the one with the fewest."""
        ready = [
            (holder.robbed, len(holder.requests), peer)
            for peer, holder in self._holders.items()
            if len(holder.requests) < (1 if holder.robbed else share) and self._slot(peer) is not None
        ]
        return min(ready)[2] if ready else None

    def _slot(self, peer: bytes) -> int | None:
        """None: it has no link, or one that was broken a moment ago."""
        rests = time.monotonic() < self._holders[peer].rests_until_s
        return None if rests else self._session.slot_of(peer)

    def _ask(self, peer: bytes, piece: Piece, *, packed: bool) -> None:
        slot = self._slot(peer)
        buffer = self._buffers.pop() if self._buffers else np.empty(FETCH_BYTES_MAX, np.uint8)
        request = _Request(piece, buffer, time.monotonic(), packed)

        def then(code: int, packed_bytes: int) -> None:
            self._done.put((peer, request, code, packed_bytes))

        self._holders[peer].requests.append(request)
        if slot is None:  # lost since the caller looked
            then(status.PEER_LOST, 0)
            return
        request.number = self._session.fetch(
            slot, self._syncs[peer], piece.offset, buffer[: piece.size_bytes], then, packed=packed
        )

    def _recall(self, requests: Iterable[_Request]) -> list[Piece]:
        """Take these requests back; the pieces of those that have not ended by now."""
        recalled = [request for request in list(requests) if self._session.cancel_fetch(request.number)]
        for holder in self._holders.values():
            holder.requests = [request for request in holder.requests if request not in recalled]
        self._buffers += [request.buffer for request in recalled]
        return [request.piece for request in recalled]

    def _rob(self, more: bool) -> None:
        """Give an idle holder what others are asked for. `more`: there are pieces that nobody was asked for."""
        if more and self._in_flight() < WINDOW:
            return  # the idle ones can't be asked now
        thief = self._least_busy(1)
        if thief is None:
            return
        robbed = self._holders[thief].robbed
        busiest = max(self._holders.values(), key=lambda holder: len(holder.requests))
        half = len(busiest.requests) // 2
        if half and robbed <= busiest.robbed:
            self._move(busiest, busiest.requests[-half:], thief)
            return
        victim = min(self._busy(), key=lambda holder: holder.requests[0].asked_s)
        oldest = victim.requests[0]
        if time.monotonic() - oldest.asked_s >= _PATIENCE_S * 2**robbed:
            self._move(victim, [oldest], thief)

    def _busy(self) -> list[_Holder]:
        return [holder for holder in self._holders.values() if holder.requests]

    def _move(self, victim: _Holder, requests: Sequence[_Request], thief: bytes) -> None:
        pieces = self._recall(requests)
        if pieces:
            victim.robbed = min(victim.robbed + 1, _ROBBED_MAX)
        for piece in pieces:
            self._ask(thief, piece, packed=self._packing.packed)

    def _accept(self, todo: deque[Piece], take: Take) -> None:
        """Wait a moment for a request to end, and see what it brought."""
        self.check()
        try:
            peer, request, code, packed_bytes = self._done.get(timeout=_POLL_S)
        except queue.Empty:
            return
        holder = self._holders.get(peer)
        if holder is None or request not in holder.requests:
            return  # of a holder that was dropped: its pieces are asked of others
        holder.requests.remove(request)
        piece = request.piece
        if code == status.OK and self._take(request, packed_bytes, take):
            self.fetched[peer] = self.fetched.get(peer, 0) + (packed_bytes or piece.size_bytes)
            holder.robbed = 0
            return
        todo.appendleft(piece)
        if code == status.OK:
            todo.extendleft(request.piece for request in holder.requests)
            self.refuse(peer, f"offset_{piece.offset}")
        elif code == status.ARGUMENT:
            log.info("state_source_left peer=%s", peer.hex()[:8])  # it has given the sync up
            todo.extendleft(request.piece for request in holder.requests)
            self._drop(peer)
        else:
            self._buffers.append(request.buffer)
            holder.rests_until_s = time.monotonic() + _REST_S

    def _take(self, request: _Request, packed_bytes: int, take: Take) -> bool:
        """Whether these are the right bytes. The buffer is, or will be, free, but for one with wrong bytes."""
        size_bytes, was = request.piece.size_bytes, self._packing.packed
        data: Bytes | None = request.buffer[:size_bytes]
        then: Callable[[], None] = lambda: self._buffers.append(request.buffer)  # noqa: E731
        if packed_bytes:
            data, then = packer.unpack_untrusted(request.buffer[:packed_bytes], size_bytes), _nothing
            self._buffers.append(request.buffer)
        if data is None or not take(request.piece, data, then):
            return False
        now = time.monotonic()
        self._packing.arrived(now, packed_bytes or size_bytes, size_bytes, asked_packed=request.packed)
        if packed_bytes == 0 and self._packing.wants_sample(now):  # the buffer is not taken before we ask
            self._packing.sampled(size_bytes, *packer.sample(data))
        if self._packing.packed != was:
            log.info("state_packing packed=%s reason=%r", not was, self._packing.reason)
        return True

    def _drop(self, peer: bytes) -> None:
        """Ask it for nothing more; the caller asks others for what is open there."""
        holder = self._holders.pop(peer)
        for request in holder.requests:
            if self._session.cancel_fetch(request.number):
                self._buffers.append(request.buffer)

    # ---- waiting

    def _wait_for_links(self) -> bool:
        """Nothing can be asked now: drop holders that are no members any more; is there one left to hope for?"""
        self.check()
        for peer in [p for p in self._holders if p not in self._session.view.members]:
            del self._holders[peer]
        time.sleep(_REST_S)
        return bool(self._holders)

    def check(self) -> None:
        """Raises what `run` raises when there is no use in going on."""
        self._session.check_sync()
        if time.monotonic() >= self._deadline:
            raise errors.DeadlineError(
                "sync_shared_state: the time ran out while chunks were fetched; this peer left the run"
            )


def _nothing() -> None:
    """What was unpacked is in nobody's buffer."""
