"""Bring a SharedState to the elected bits on every member: digests, election, fetch of differing chunks, commit.

    1  hash; publish the arrays and the chunk table under a random sync id
    2  all-gather of records (`_proto.election.Record`): one atomic operation: all see the same
    3  elect (pure): who holds it, who must fetch, who stands apart
    4  fetchers: the holder's chunk table (checked against the root), then the chunks that differ, from all holders at
       once, each checked against the table and only then put into staging
    5  all-gather of (outcome, bytes fetched from each, hash of the records): commits on all or on none; only now does
       staging replace the arrays

A holder that dies, lies or is slow costs a request that is made again. A fetcher whose time runs out leaves the run, so
that the others go on without it. Holders serve straight from the caller's arrays; a fetcher needs a window of memory
(`statefetch`) and a little staging (`staging`), whatever the size of the state. Runs in the caller's thread.
Spec: proto/wire.md 6.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from pyccl import errors
from pyccl._io.observed import FAILURES, Offer
from pyccl._io.session import Session, Waiter
from pyccl._io.staging import Staging, runs
from pyccl._io.statefetch import Fetcher, Piece
from pyccl._native.handles import CHUNK_BYTES, FETCH_BYTES_MAX
from pyccl._proto import layout, restoring
from pyccl._proto.election import (
    RECORD_BYTES,
    TIMEOUT_MS_MAX,
    Elected,
    Mismatch,
    Nobody,
    Record,
    Strategy,
    decode_untrusted,
    elect,
    encode,
)
from pyccl._proto.packing import Packing
from pyccl.state import Bytes, SharedState, StateDigest

TAG_RECORDS: Final = 1
TAG_COMMIT: Final = 2
TAG_LAYOUT: Final = 3
_OFFER: Final = struct.Struct("<Q")  # revision + 1 of what an observer has for us; 0: nothing
_LOST, _WHOLE, _UNSTAGED = 0, 1, 2  # outcomes
_TABLE_PATIENCE_S: Final = 1.0
_SETTLE_S: Final = 30.0  # for those whose time ran out to leave, and for the others to go on without them

log = logging.getLogger("pyccl.statesync")

# (tag, my bytes, deadline) -> (members in order, their bytes); every member calls it or it fails on all
Gather = Callable[[int, bytes, float], tuple[tuple[bytes, ...], list[bytes]]]


@dataclass(frozen=True, slots=True)
class SyncInfo:
    """What a sync did here. Peers are named by id (hex).

    revision: of the state that every member holds now. changed: names of the arrays whose bytes were replaced here.
    chunk_bytes: of the chunks that were fetched. rx_bytes, tx_bytes: as they came over the wire from members and
    observers and went to members, which is less where they were packed. packing: what was measured and decided about
    that here, for people. holders: had the state. apart: send-only members that hold another one, and got an error.
    liars: served bytes here that did not match their digest.
    """

    revision: int
    rx_bytes: int
    tx_bytes: int
    changed: tuple[str, ...]
    holders: tuple[str, ...]
    members: tuple[str, ...]
    seconds: float
    apart: tuple[str, ...] = ()
    liars: tuple[str, ...] = ()
    chunk_bytes: int = 0
    packing: str = ""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One that differs from the elected state."""

    name: str
    array_offset: int  # inside the array
    state_offset: int  # inside the published state
    staged_offset: int
    size_bytes: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class _Fetched:
    """How the fetch went here; of a peer that needed none: all as it is by default."""

    outcome: int = _WHOLE
    chunks: tuple[_Chunk, ...] = ()
    staging: Staging | None = None
    from_each: Mapping[bytes, int] = field(default_factory=dict)
    liars: tuple[bytes, ...] = ()
    error: errors.StagingError | None = None
    packing: str = ""


def sync_shared_state(
    session: Session, gather: Gather, state: SharedState, strategy: Strategy, timeout: float
) -> SyncInfo:
    """What ``Communicator.sync_shared_state`` promises."""
    started = time.monotonic()
    info = _attempt(session, gather, state, strategy, started, timeout, asks=True)
    if not isinstance(info, SyncInfo):
        least, changed, restored_bytes = _restore(session, gather, state, strategy, started + timeout, newest=info)
        info = _attempt(session, gather, state, strategy, started, timeout, least=least)
        assert isinstance(info, SyncInfo)
        changed = tuple(dict.fromkeys((*changed, *info.changed)))
        info = replace(info, changed=changed, rx_bytes=info.rx_bytes + restored_bytes)
    session.observed.publish(state)
    return info


def _attempt(
    session: Session,
    gather: Gather,
    state: SharedState,
    strategy: Strategy,
    started: float,
    timeout: float,
    *,
    asks: bool = False,
    least: int = 0,
) -> SyncInfo | int:
    """A number, only if it asks: nobody votes, and this is the newest revision that members hold. So see first what
    observers have. least: what they offer, and somebody must hold by now."""
    tree = state.tree()
    engine, sync = session.need_engine(), secrets.randbits(64)
    with contextlib.ExitStack() as cleanup:
        session.publish(sync, [*state.compared.values(), np.frombuffer(tree.table, np.uint8)])
        try:
            mine = _record(session, state, tree, strategy, sync, timeout)
            members, records, seen = _records(gather, mine, started + timeout)
            decided = _decided(gather, state, records, started + timeout)
            newest = max(record.revision for record in records if record.strategy is not Strategy.RECEIVE_ONLY)
            if asks and restoring.asks_first(records):
                return newest
            if newest < least:
                raise errors.PeerLostError(
                    f"sync_shared_state: revision {least} could not be had: an observer offers it, no member holds it"
                )
            deadline = time.monotonic() + min(record.timeout_ms for record in records) / 1000
            fetched = _Fetched()
            if session.peer in decided.fetchers:
                try:
                    fetched = _fetch(session, state, tree, decided, records, deadline, cleanup)
                except errors.DeadlineError as e:  # the others go on as after a loss
                    session.leave_because(e)
                    raise
                except BaseException:
                    _vote_no(gather, TAG_COMMIT, _vote_of(len(members)).size)
                    raise
            served = _commit(session, gather, members, seen, decided, fetched, deadline + _SETTLE_S)
        finally:
            session.unpublish(sync, engine)
        if session.peer in decided.apart:
            raise _stands_apart(session, state, tree, decided)
        _adopt(session, state, decided, fetched, alone=members == (session.peer,))
        return _info(decided, fetched, served, members, time.monotonic() - started)


def _record(
    session: Session, state: SharedState, tree: StateDigest, strategy: Strategy, sync: int, timeout: float
) -> Record:
    return Record(
        peer=session.peer,
        voter=state.voter == session.incarnation,
        lineage=state.lineage,
        revision=state.revision,
        root=tree.root,
        layout=tree.layout,
        digest=state.chunk_digest.number,
        strategy=strategy,
        sync=sync,
        timeout_ms=min(max(1, int(timeout * 1000)), TIMEOUT_MS_MAX),
        asks=_asks(session, strategy),
    )


def _asks(session: Session, strategy: Strategy) -> bool:
    return strategy is Strategy.ENFORCE_POPULAR and len(session.observed.observers) > 0


def _records(gather: Gather, mine: Record, deadline: float) -> tuple[tuple[bytes, ...], list[Record], bytes]:
    """The members in order, everybody's record, and SHA-256 of both."""
    members, packed = gather(TAG_RECORDS, encode(mine), deadline)
    records = [decode_untrusted(peer, data) for peer, data in zip(members, packed, strict=True)]
    return members, records, hashlib.sha256(b"".join((*members, *packed))).digest()


def _mismatch_error(gather: Gather, state: SharedState, found: Mismatch, deadline: float) -> errors.MismatchError:
    fields: list[str] = []
    texts = []
    if "layout" in found.fields:
        names, text = _array_that_differs(gather, state.layout_entries(), deadline)
        fields += names
        texts.append(text)
    if "digest" in found.fields:
        fields.append("digest")
        texts.append("digest")
    return errors.MismatchError(
        f"sync_shared_state: {_short(found.odd)} differs from the others; {'; '.join(texts)}",
        peers=tuple(peer.hex() for peer in found.odd),
        fields=tuple(fields),
    )


def _array_that_differs(gather: Gather, entries: Sequence[bytes], deadline: float) -> tuple[tuple[str, ...], str]:
    """(fields, text). The members take the steps of `_proto.layout` together; who is lost meanwhile, or whose time runs
    out, may be the one that differed: then it is not known in which array."""
    with contextlib.suppress(errors.PeerLostError, errors.DeadlineError):
        block = layout.first_difference(gather(TAG_LAYOUT, layout.block_hashes(entries), deadline)[1])
        if block is not None:
            at = layout.first_difference(gather(TAG_LAYOUT, layout.entry_hashes(entries, block), deadline)[1])
            if at is not None:
                mine = layout.padded(entries, block * layout.BLOCK + at)
                members, packed = gather(TAG_LAYOUT, mine, deadline)
                found = map(layout.decode_untrusted, packed)
                fields, text = layout.describe(dict(zip(members, found, strict=True)))
                if fields:
                    return fields, text
    return ("layout",), "names, dtypes, shapes or allow_content_inequality"


def _decided(gather: Gather, state: SharedState, records: Sequence[Record], deadline: float) -> Elected:
    decided = elect(records)
    if isinstance(decided, Mismatch):
        raise _mismatch_error(gather, state, decided, deadline)
    if isinstance(decided, Nobody):
        raise errors.MismatchError(
            "sync_shared_state: every member is receive_only, so there is no state to take",
            peers=tuple(peer.hex() for peer in decided.peers),
            fields=("strategy",),
        )
    if decided.apart:
        log.warning("state_apart peers=%s revision=%d", _short(decided.apart), decided.revision)
    return decided


def _short(peers: Sequence[bytes]) -> str:
    return ", ".join(peer.hex()[:8] for peer in peers)


# ---- observers


def _restore(
    session: Session, gather: Gather, state: SharedState, strategy: Strategy, deadline: float, *, newest: int
) -> tuple[int, tuple[str, ...], int]:
    """Nobody votes: if an observer holds something newer than the members, one of them takes it into its arrays before
    the election, which is then held as ever. Returns the least revision that somebody must hold now, what changed here,
    and the bytes that came for it.
    """
    offer = None
    try:
        if _asks(session, strategy):
            offer = session.observed.best_offer(state, deadline, Waiter())
    except BaseException:
        _vote_no(gather, TAG_RECORDS, _OFFER.size)
        raise
    try:
        members, packed = gather(TAG_RECORDS, _OFFER.pack(0 if offer is None else offer.revision + 1), deadline)
        best, taker = restoring.taker(members, [_OFFER.unpack(data)[0] for data in packed], newest)
        if offer is None or taker != session.peer:
            return best, (), 0
        return best, _take_offer(session, gather, state, offer, deadline), offer.rx_bytes
    finally:
        if offer is not None:
            offer.close()


def _take_offer(
    session: Session, gather: Gather, state: SharedState, offer: Offer, deadline: float
) -> tuple[str, ...]:
    """The names of the arrays that changed. What fails here fails on all, when nobody turns out to hold it."""
    log.info("state_from_observer peer=%s revision=%d", offer.name, offer.revision)
    before = state.tree().table
    try:
        offer.load(state, deadline, Waiter(), session.check_sync)
    except (*FAILURES, errors.StateFileError, errors.DeadlineError) as e:
        log.warning("state_not_from_observer peer=%s revision=%d cause=%r", offer.name, offer.revision, e)
    except BaseException:
        _vote_no(gather, TAG_RECORDS, RECORD_BYTES)
        raise
    return tuple(dict.fromkeys(chunk.name for chunk in _differing(state, before, state.tree().table)))


# ---- fetch


def _fetch(
    session: Session,
    state: SharedState,
    tree: StateDigest,
    decided: Elected,
    records: Sequence[Record],
    deadline: float,
    cleanup: contextlib.ExitStack,
) -> _Fetched:
    """The chunks that differ from the elected state, checked, in staging, which `cleanup` closes."""
    packing = Packing(len(decided.holders))
    fetcher = Fetcher(session, decided.holders, {record.peer: record.sync for record in records}, deadline, packing)
    try:
        table = _fetch_table(fetcher, state, tree, decided)
        if table is None:
            return _Fetched(_LOST, liars=tuple(fetcher.liars))
        chunks = _differing(state, tree.table, table)
        staging = cleanup.enter_context(Staging(sum(chunk.size_bytes for chunk in chunks), fetcher.check))
        wanted = {Piece(chunk.state_offset, chunk.size_bytes): chunk for chunk in chunks}

        def take(piece: Piece, data: Bytes, then: Callable[[], None]) -> bool:
            chunk = wanted[piece]
            right = state.chunk_digest.matches(data, chunk.digest)
            if right:
                staging.write(chunk.staged_offset, data, then)
            return right

        whole = fetcher.run(list(wanted), take)
        if whole:
            staging.flush()
        return _Fetched(
            _WHOLE if whole else _LOST, tuple(chunks), staging, dict(fetcher.fetched), tuple(fetcher.liars),
            packing=packing.reason,
        )  # fmt: skip
    except errors.StagingError as e:
        return _Fetched(_UNSTAGED, error=e)
    finally:
        session.forget_fetches()


def _fetch_table(fetcher: Fetcher, state: SharedState, tree: StateDigest, decided: Elected) -> bytes | None:
    """The chunk digests of the elected state: believed when they hash to the elected root. From one holder at a time,
    since a wrong one shows only in the whole. None: no holder is left."""
    start = sum(array.nbytes for array in state.compared.values())
    table = bytearray(len(tree.table))
    patience_s = _TABLE_PATIENCE_S

    def take(piece: Piece, data: Bytes, then: Callable[[], None]) -> bool:
        table[piece.offset - start : piece.offset - start + piece.size_bytes] = data.data
        then()
        return True

    while fetcher.holders:
        source = fetcher.holders[0]
        pieces = [
            Piece(start + at, min(FETCH_BYTES_MAX, len(table) - at)) for at in range(0, len(table), FETCH_BYTES_MAX)
        ]
        if not fetcher.run_from_one(pieces, take, patience_s):
            patience_s *= 2
        elif state.root_of(decided.revision, bytes(table)) == decided.root:
            fetcher.fetched.clear()  # SyncInfo tells of chunks
            return bytes(table)
        else:
            fetcher.refuse(source, "table")
    return None


def _differing(state: SharedState, mine: bytes, elected: bytes) -> list[_Chunk]:
    chunks, state_offset, staged_offset, at = [], 0, 0, 0
    size = state.chunk_digest.size_bytes
    for name, array in state.compared.items():
        for offset in range(0, array.nbytes, CHUNK_BYTES):
            digest = elected[at : at + size]
            if digest != mine[at : at + size]:
                here = min(CHUNK_BYTES, array.nbytes - offset)
                chunks.append(_Chunk(name, offset, state_offset + offset, staged_offset, here, digest))
                staged_offset += here
            at += size
        state_offset += array.nbytes
    return chunks


# ---- commit


def _vote_of(members: int) -> struct.Struct:
    return struct.Struct(f"<{1 + members}Q32s")


def _commit(
    session: Session,
    gather: Gather,
    members: Sequence[bytes],
    seen: bytes,
    decided: Elected,
    fetched: _Fetched,
    deadline: float,
) -> int:
    """All or none take the state. Returns the bytes that others fetched from here.

    seen: SHA-256 of the records by which we elected. What a member contributes to an all-gather it could make differ
    from one to the other and yet have the hash of a result that all compare, which is fast; not this one.
    """
    vote_of = _vote_of(len(members))
    mine = vote_of.pack(fetched.outcome, *[fetched.from_each.get(peer, 0) for peer in members], seen)
    final, packed = gather(TAG_COMMIT, mine, deadline)
    if fetched.error is not None:
        raise fetched.error
    votes = {peer: vote_of.unpack(data) for peer, data in zip(final, packed, strict=True)}
    unstaged = [peer for peer, vote in votes.items() if vote[0] == _UNSTAGED]
    if unstaged:
        raise errors.PeerLostError(
            f"sync_shared_state: {_short(unstaged)} has no room to stage the state; nothing was changed",
            unstaged[0].hex(),
        )
    missing = [peer for peer, vote in votes.items() if vote[0] != _WHOLE]
    if missing:
        lied = f" ({_short(fetched.liars)} served other bytes than it had hashed)" if fetched.liars else ""
        raise errors.PeerLostError(
            f"sync_shared_state: no holder of revision {decided.revision} was left before "
            f"{_short(missing)} had it{lied}; nothing was changed"
        )
    others = [peer for peer, vote in votes.items() if vote[-1] != seen]
    if others:
        raise errors.MismatchError(
            f"sync_shared_state: some member told {_short(others)} other things than this peer; nothing was changed",
            peers=tuple(peer.hex() for peer in others),
            fields=("records",),
        )
    column = 1 + members.index(session.peer)
    return sum(vote[column] for vote in votes.values())


def _vote_no(gather: Gather, tag: int, size_bytes: int) -> None:
    """We give up between two all-gathers: take part in the second with no time left. The others then fail at once
    instead of waiting for us, and its number is used up here as there."""
    with contextlib.suppress(errors.PycclError):
        gather(tag, bytes(size_bytes), time.monotonic())


def _stands_apart(session: Session, state: SharedState, tree: StateDigest, decided: Elected) -> errors.MismatchError:
    """The others have committed without this send-only peer: what it holds has no vote any more."""
    state.voter = None
    mine = {"revision": state.revision != decided.revision, "root": tree.root != decided.root}
    return errors.MismatchError(
        f"sync_shared_state: send_only, but the members elected revision {decided.revision} as held by "
        f"{_short(decided.holders)}, which differs from revision {state.revision} here; nothing was changed here",
        peers=(session.peer.hex(),),
        fields=tuple(name for name, differs in mine.items() if differs),
    )


def _adopt(session: Session, state: SharedState, decided: Elected, fetched: _Fetched, *, alone: bool) -> None:
    """The members have committed: replace what differs. A Ctrl-C comes through when the state is whole."""
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            _replace(state, fetched)
            break
        except KeyboardInterrupt as e:
            interrupt = e
        except errors.StagingError as e:  # what was staged can't be read again; a newcomer's sync mends it
            state.voter = None
            session.leave_because(e)
            raise
    state.revision = decided.revision
    # A chain over the committed syncs: who leaves it and goes on alone has another lineage from then on.
    chain = decided.lineage + decided.root + struct.pack("<Q", decided.revision)
    state.lineage = hashlib.sha256(chain).digest()[:16]
    state.restored, votes = restoring.after_sync(state.restored, alone=alone)
    state.voter = session.incarnation if votes else None
    if interrupt is not None:
        raise interrupt


def _replace(state: SharedState, fetched: _Fetched) -> None:
    at, arrays = 0, state.compared
    for name, offset, size in runs([(chunk.name, chunk.array_offset, chunk.size_bytes) for chunk in fetched.chunks]):
        assert fetched.staging is not None
        fetched.staging.read(at, arrays[name][offset : offset + size])
        at += size


def _info(decided: Elected, fetched: _Fetched, served: int, members: Sequence[bytes], seconds: float) -> SyncInfo:
    def named(peers: Sequence[bytes]) -> tuple[str, ...]:
        return tuple([peer.hex() for peer in peers])

    return SyncInfo(
        revision=decided.revision,
        rx_bytes=sum(fetched.from_each.values()),
        tx_bytes=served,
        changed=tuple(dict.fromkeys(chunk.name for chunk in fetched.chunks)),
        holders=named(decided.holders),
        members=named(members),
        seconds=seconds,
        apart=named(decided.apart),
        liars=named(fetched.liars),
        chunk_bytes=sum(chunk.size_bytes for chunk in fetched.chunks),
        packing=fetched.packing,
    )
