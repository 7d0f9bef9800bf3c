"""Bring a SharedState to the elected bits on every member: digests, election, fetch of differing chunks, commit.

    1  hash; publish the arrays and the chunk table under a random sync id
    2  all-gather of (voter, lineage, revision, root, layout, sync id): one atomic operation: all see the same
    3  elect (pure): who holds it, who must fetch
    4  fetchers: the holder's chunk table (checked against the root), then the chunks that differ, from all holders at
       once, each checked against the table, into staging memory
    5  all-gather of (whole?, bytes fetched from each): commits on all or on none; only now staging replaces the arrays

A holder that dies, lies or stops serving costs a re-request. Runs in the caller's thread; a chunk's bytes never pass
through Python. Spec: proto/wire.md 6.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import queue
import secrets
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from pyccl import errors
from pyccl._io.session import Session
from pyccl._native import status
from pyccl._native.handles import CHUNK_BYTES, FETCH_BYTES_MAX, chunk_digests
from pyccl._proto.election import Elected, LayoutMismatch, Record, elect
from pyccl.state import SharedState, StateDigest, chunks_of, state_root

TAG_RECORDS: Final = 1
TAG_COMMIT: Final = 2
_IN_FLIGHT: Final = 8  # requests to one holder at a time
_RETRY_S: Final = 0.05
_RECORD: Final = struct.Struct("<B7x16s16s16sQQ")  # voter, lineage, root, layout, revision, sync id

log = logging.getLogger("pyccl.statesync")

# (tag, my bytes, deadline) -> (members in order, their bytes); every member calls it or it fails on all
Gather = Callable[[int, bytes, float], tuple[tuple[bytes, ...], list[bytes]]]


@dataclass(frozen=True, slots=True)
class SyncInfo:
    """What a sync did here.

    revision: of the state that every member holds now. changed: names of the arrays whose bytes were replaced here.
    rx_bytes, tx_bytes: of chunks fetched from others and served to them. holders: peer ids (hex) that had the state.
    """

    revision: int
    rx_bytes: int
    tx_bytes: int
    changed: tuple[str, ...]
    holders: tuple[str, ...]
    members: tuple[str, ...]
    seconds: float


@dataclass(slots=True)
class _Chunk:
    name: str
    array_offset: int  # inside the array
    state_offset: int  # inside the published state
    digest: bytes
    bytes_: np.ndarray[Any, np.dtype[np.uint8]] | None = None


@dataclass(slots=True)
class _Staged:
    chunks: list[_Chunk] = field(default_factory=list)
    fetched: dict[bytes, int] = field(default_factory=dict)  # holder -> bytes
    whole: bool = True


def sync_shared_state(session: Session, gather: Gather, state: SharedState, timeout: float) -> SyncInfo:
    started = time.monotonic()
    deadline = started + timeout
    tree = state.tree()
    sync = secrets.randbits(64)
    engine = session.need_engine()
    buffers = [_bytes_of(array) for array in state.arrays.values()]
    engine.publish(sync, [*buffers, np.frombuffer(tree.table, np.uint8)])
    try:
        members, records, syncs = _records(session, gather, state, tree, sync, deadline)
        decided = elect(records)
        if isinstance(decided, LayoutMismatch):
            odd = tuple(peer.hex() for peer in decided.odd)
            raise errors.MismatchError(
                f"sync_shared_state: names, dtypes or shapes differ on {', '.join(o[:8] for o in odd)}",
                peers=odd,
                fields=("layout",),
            )
        staged = _Staged()
        if session.peer in decided.fetchers:
            try:
                staged = _fetch(session, state, tree, decided, syncs, deadline)
            except BaseException:
                _vote_no(gather, members)
                raise
        served = _commit(session, gather, members, decided, staged, deadline)
    finally:
        engine.unpublish(sync)
    return _adopt(session, state, decided, staged, served, members, time.monotonic() - started)


def _bytes_of(array: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return array.reshape(-1).view(np.uint8)


def _records(
    session: Session, gather: Gather, state: SharedState, tree: StateDigest, sync: int, deadline: float
) -> tuple[tuple[bytes, ...], list[Record], dict[bytes, int]]:
    voter = state.voter == session.incarnation
    mine = _RECORD.pack(voter, state.lineage, tree.root, tree.layout, state.revision, sync)
    members, packed = gather(TAG_RECORDS, mine, deadline)
    records, syncs = [], {}
    for peer, data in zip(members, packed, strict=True):
        is_voter, lineage, root, layout, revision, peer_sync = _RECORD.unpack(data)
        records.append(Record(peer, bool(is_voter), lineage, revision, root, layout))
        syncs[peer] = peer_sync
    return members, records, syncs


def _commit(
    session: Session,
    gather: Gather,
    members: Sequence[bytes],
    decided: Elected,
    staged: _Staged,
    deadline: float,
) -> int:
    """All or none take the state. Returns the bytes that others fetched from here."""
    layout = struct.Struct(f"<{1 + len(members)}Q")
    mine = layout.pack(staged.whole, *(staged.fetched.get(peer, 0) for peer in members))
    final, packed = gather(TAG_COMMIT, mine, deadline)
    votes = {peer: layout.unpack(data) for peer, data in zip(final, packed, strict=True)}
    missing = [peer.hex()[:8] for peer, vote in votes.items() if not vote[0]]
    if missing:
        raise errors.PeerLostError(
            f"sync_shared_state: every holder of revision {decided.revision} was lost before "
            f"{', '.join(missing)} had it; nothing was changed"
        )
    column = 1 + members.index(session.peer)
    return sum(vote[column] for vote in votes.values())


def _vote_no(gather: Gather, members: Sequence[bytes]) -> None:
    """We give up between the two all-gathers: take part in the second with no time left. The others then fail at once
    instead of waiting for us, and its number is used up here as there."""
    with contextlib.suppress(errors.PycclError):
        gather(TAG_COMMIT, bytes(8 * (1 + len(members))), time.monotonic())


def _adopt(
    session: Session,
    state: SharedState,
    decided: Elected,
    staged: _Staged,
    served: int,
    members: Sequence[bytes],
    seconds: float,
) -> SyncInfo:
    changed: dict[str, None] = {}
    for chunk in staged.chunks:
        assert chunk.bytes_ is not None
        end = chunk.array_offset + chunk.bytes_.nbytes
        _bytes_of(state.arrays[chunk.name])[chunk.array_offset : end] = chunk.bytes_
        changed[chunk.name] = None
    state.revision = decided.revision
    # A chain over the committed syncs: who leaves it and goes on alone has another lineage from then on.
    chain = decided.lineage + decided.root + struct.pack("<Q", decided.revision)
    state.lineage = hashlib.sha256(chain).digest()[:16]
    state.voter = session.incarnation
    return SyncInfo(
        revision=decided.revision,
        rx_bytes=sum(staged.fetched.values()),
        tx_bytes=served,
        changed=tuple(changed),
        holders=tuple(peer.hex() for peer in decided.holders),
        members=tuple(peer.hex() for peer in members),
        seconds=seconds,
    )


class _Fetcher:
    """Requests to several holders at once; each completion comes back through a queue from the Trio thread."""

    def __init__(self, session: Session, holders: Sequence[bytes], syncs: dict[bytes, int], deadline: float) -> None:
        self.session, self.syncs, self.deadline = session, syncs, deadline
        self.holders = dict.fromkeys(holders, 0)  # usable ones -> requests in flight
        self.fetched: dict[bytes, int] = {}
        self.done: queue.SimpleQueue[tuple[bytes, int, _Chunk]] = queue.SimpleQueue()

    def run(self, chunks: Sequence[_Chunk], sizes: Callable[[_Chunk], int], check: Callable[[_Chunk], bool]) -> bool:
        """Fetch all; False when no usable holder is left."""
        todo, in_flight = deque(chunks), 0
        while todo or in_flight:
            in_flight += self._ask(todo, sizes)
            if not in_flight and not self._wait_for_links():
                return False
            if not in_flight:
                continue
            peer, code, chunk = self._next()
            in_flight -= 1
            if peer in self.holders:
                self.holders[peer] -= 1
            if code == status.OK and check(chunk):
                assert chunk.bytes_ is not None
                self.fetched[peer] = self.fetched.get(peer, 0) + chunk.bytes_.nbytes
                continue
            todo.appendleft(chunk)
            if code == status.OK:
                log.warning("state_source_lied peer=%s offset=%d", peer.hex()[:8], chunk.state_offset)
            if code in (status.OK, status.ARGUMENT):  # wrong bytes, or it does not serve it
                self.holders.pop(peer, None)
        return True

    def _ask(self, todo: deque[_Chunk], sizes: Callable[[_Chunk], int]) -> int:
        """Hand out work to whoever has the fewest requests in flight."""
        asked = 0
        while todo:
            ready = [
                (flying, peer, slot)
                for peer, flying in self.holders.items()
                if flying < _IN_FLIGHT and (slot := self._slot(peer)) is not None
            ]
            if not ready:
                return asked
            _, peer, slot = min(ready)
            chunk = todo.popleft()
            chunk.bytes_ = np.empty(sizes(chunk), np.uint8)

            def then(code: int, peer: bytes = peer, chunk: _Chunk = chunk) -> None:
                self.done.put((peer, code, chunk))

            self.session.fetch(slot, self.syncs[peer], chunk.state_offset, chunk.bytes_, then)
            self.holders[peer] += 1
            asked += 1
        return asked

    def _slot(self, peer: bytes) -> int | None:
        slot = self.session.slot_of(peer)
        engine = self.session.engine
        return slot if slot is not None and engine is not None and engine.conns(slot) > 0 else None

    def _wait_for_links(self) -> bool:
        """Nothing can be asked now: drop holders that are no members any more; is there one left to hope for?"""
        self._check()
        for peer in [p for p in self.holders if p not in self.session.view.members]:
            del self.holders[peer]
        time.sleep(_RETRY_S)  # a link of a member is being repaired, or its loss is being settled
        return bool(self.holders)

    def _next(self) -> tuple[bytes, int, _Chunk]:
        while True:
            self._check()
            try:
                return self.done.get(timeout=0.1)
            except queue.Empty:
                continue

    def _check(self) -> None:
        self.session.check_sync()
        if time.monotonic() >= self.deadline:
            raise errors.DeadlineError("sync_shared_state: the time ran out while chunks were fetched")


def _fetch(
    session: Session,
    state: SharedState,
    tree: StateDigest,
    decided: Elected,
    syncs: dict[bytes, int],
    deadline: float,
) -> _Staged:
    """The chunks that differ from the elected state, checked, in staging memory."""
    fetcher = _Fetcher(session, decided.holders, syncs, deadline)
    try:
        table = _fetch_table(fetcher, state, tree, decided)
        if table is None:
            return _Staged(whole=False)
        chunks = _differing(state, tree.table, table)
        sizes = {id(c): min(CHUNK_BYTES, state.arrays[c.name].nbytes - c.array_offset) for c in chunks}
        whole = fetcher.run(chunks, lambda c: sizes[id(c)], lambda c: chunk_digests(c.bytes_) == c.digest)
        return _Staged(chunks if whole else [], fetcher.fetched, whole)
    finally:
        session.forget_fetches()


def _fetch_table(fetcher: _Fetcher, state: SharedState, tree: StateDigest, decided: Elected) -> bytes | None:
    """The chunk digests of the elected state: believed when they hash to the elected root."""
    size = len(tree.table)
    while fetcher.holders:
        parts = [
            _Chunk("", offset, state.size_bytes + offset, b"") for offset in range(0, size, FETCH_BYTES_MAX)
        ]
        source = min(fetcher.holders)
        one = _Fetcher(fetcher.session, (source,), fetcher.syncs, fetcher.deadline)
        if one.run(parts, lambda c: min(FETCH_BYTES_MAX, size - c.array_offset), lambda c: True):
            table = b"".join(part.bytes_.tobytes() for part in parts if part.bytes_ is not None)
            if state_root(tree.layout, decided.revision, table) == decided.root:
                return table  # its bytes are not counted: SyncInfo tells of chunks
            log.warning("state_source_lied peer=%s what=table", source.hex()[:8])
        del fetcher.holders[source]
    return None


def _differing(state: SharedState, mine: bytes, elected: bytes) -> list[_Chunk]:
    chunks, state_offset, at = [], 0, 0
    for name, array in state.arrays.items():
        for index in range(chunks_of(array.nbytes)):
            digest = elected[at : at + 16]
            if digest != mine[at : at + 16]:
                offset = index * CHUNK_BYTES
                chunks.append(_Chunk(name, offset, state_offset + offset, digest))
            at += 16
        state_offset += array.nbytes
    return chunks
