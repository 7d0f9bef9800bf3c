"""Core: what the blocking and the Trio communicator have in common: a peer of a run, its view, its operations.

It starts operations and translates their ends; how a caller waits meanwhile is the business of ``communicator.py``
(a thread, in C) and ``aio.py`` (a Trio task).
"""

from __future__ import annotations

import atexit
import importlib.metadata
import os
import secrets
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Final

import numpy as np

from pyccl import calls, errors
from pyccl._io.address import credentials_for, parse_master, reach_of
from pyccl._io.links import LinkPath
from pyccl._io.measure import TAG as TAG_MEASURE
from pyccl._io.measure import measure
from pyccl._io.session import Session, SessionConfig, View
from pyccl._io.statesync import SyncInfo, sync_shared_state
from pyccl._native import status
from pyccl._native._pyccl import lib
from pyccl._native.handles import WORLD_MAX, Op, OpInfo
from pyccl._proto import limits
from pyccl._proto.election import Strategy
from pyccl._proto.epoch import NO_ID
from pyccl._proto.messages import PATH_NAMES, Path
from pyccl.calls import Array, Call, Gathered
from pyccl.state import SharedState

_EPOCHS_CACHED: Final = 16
_ALGORITHMS: Final = {number: name for name, number in calls.ALGORITHMS.items()}
_SESSIONS: Final[set[Session]] = set()  # open ones, to end them at interpreter exit


@dataclass(frozen=True, slots=True)
class ReduceInfo:
    """How an operation went.

    world_size, members (peer ids in hex, in rank order), epoch: those who contributed, two in an exchange. attempts:
    epochs it ran in. algorithm: what ran, "direct" (also where two swap) or "ring". tx_bytes, rx_bytes: payload sent
    and received here for it. seconds: from the call to its end.
    """

    world_size: int
    members: tuple[str, ...]
    epoch: int
    attempts: int
    algorithm: str
    tx_bytes: int
    rx_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class PeerLink:
    """How a member is connected with this peer.

    peer: its id, 32 hex characters. path: "direct"; "mapped" (by a port that a router forwards for one of the two),
    "punched" (through both routers, begun by both at once), "relayed" (a third carries it), "none" (not connected).
    relay: of a relayed one the id of who carries it; None: the master does, or the other side knows. connections: TCP
    connections of the link.
    """

    peer: str
    path: str
    relay: str | None
    connections: int


def _peer_link(peer: bytes, link: LinkPath | None) -> PeerLink:
    if link is None:
        return PeerLink(peer.hex(), "none", None, 0)
    relay = link.via.hex() if link.path == Path.RELAYED and link.via != NO_ID else None
    return PeerLink(peer.hex(), PATH_NAMES[link.path], relay, link.connections)


class Core:
    """One peer of a run; see the two Communicator classes."""

    def __init__(
        self,
        address: str | None,
        *,
        group: int,
        connections: int | str,
        max_upload: str | None,
        max_download: str | None,
        listen: str | None,
        advertise: str | Sequence[str] | None,
        relay: str,
    ) -> None:
        master = parse_master(address)
        calls.check_range("group", group, 0, limits.U32_MAX)
        if connections != "auto":
            calls.check_range("connections", connections, 1, lib.PYCCL_CONNS_MAX)
        credentials = credentials_for(master)
        self._config = SessionConfig(
            *(master.host, master.port, group, None if connections == "auto" else int(connections)),
            *(_library(), credentials),
            calls.rate("max_upload", max_upload), calls.rate("max_download", max_download),
            reach_of(listen, advertise, relay),
        )  # fmt: skip
        self._id = secrets.token_bytes(16) if credentials is None else credentials.peer
        self._session: Session | None = None
        self._joining: Session | None = None  # while another thread or task is in connect(), for close()
        self._when_dropped: weakref.finalize[..., Core] | None = None
        self._view = View(0, bytes(16), (), 0)
        self._pid = os.getpid()

    # ---- the view ----------------------------------------------------------------------------------------------------

    @property
    def peer_id(self) -> str:
        """This peer's id: 32 hex characters."""
        return self._id.hex()

    @property
    def epoch(self) -> int:
        """Number of the epoch; 0 before connect. Like all of the view, it changes only when a call returns."""
        return self._view.epoch

    @property
    def members(self) -> tuple[str, ...]:
        """Peer ids of the group's members in bytewise order, which is rank order."""
        return hex_ids(self._view.members)

    @property
    def peers(self) -> tuple[PeerLink, ...]:
        """The other members, in rank order, and how each is connected with this peer at the moment."""
        session, links = self._session, {}
        if session is not None and session.error is None:
            links = session.paths()
        others = [peer for peer in self._view.members if peer != self._id]
        return tuple([_peer_link(peer, links.get(peer)) for peer in others])

    @property
    def group_world_size(self) -> int:
        """Members of this peer group."""
        return len(self._view.members)

    @property
    def _pending_known(self) -> int:
        """Newcomers that the master has told this peer of; other members may have been told of more, or fewer."""
        return self._require().pending

    @property
    def _is_watched(self) -> bool:
        """Whether this peer knows of an observer, which learns of a new revision by syncs."""
        return len(self._require().observed.observers) > 0

    @property
    def world_size(self) -> int:
        """Members of all peer groups, as the master counted them when this group's epoch began."""
        return self._view.world_size

    # ---- the session -------------------------------------------------------------------------------------------------

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise errors.UsageError("a communicator does not survive fork(); make one in the child")

    def _require(self) -> Session:
        self._check_process()
        session = self._session
        if session is None:
            raise errors.UsageError("the communicator is not connected")
        if session.error is not None:
            raise session.error
        return session

    def _begin_session(self) -> Session:
        """A new incarnation, not launched yet. Ends with ``_adopt``, or ``_forget`` once it is over."""
        self._check_process()
        if self._session is not None and self._session.error is None:
            raise errors.UsageError("the communicator is connected already")
        session = Session(self._config, self._id, secrets.token_bytes(16))
        _SESSIONS.add(session)
        self._joining = session
        return session

    def _adopt(self, session: Session) -> None:
        self._session, self._view = session, session.view
        self._when_dropped = weakref.finalize(self, _leave_dropped, session, self._pid)
        self._when_dropped.atexit = False

    def _forget(self, session: Session) -> None:
        _SESSIONS.discard(session)
        if session is self._session and self._when_dropped is not None:
            self._when_dropped.detach()  # it would hold the session for as long as this object lives

    def _sessions_to_close(self) -> list[Session]:
        if os.getpid() != self._pid:
            return []  # a fork's copy: threads and connections are the parent's
        return [session for session in (self._joining, self._session) if session is not None]

    # ---- operations --------------------------------------------------------------------------------------------------

    def _submit(self, session: Session, call: Call, begun: list[Op], number: int = 0) -> Op:
        """number: of ``Session.watch``, for who does not wait in C."""
        engine = session.need_engine()
        _, spec, source, target, timeout_s, weight = call
        src = None if source is None or spec.elements == 0 else source.array
        dst = None if target is None or spec.elements == 0 else target.array
        put_back = None if target is None else target.put_back
        try:
            return engine.submit(spec, src, dst, timeout_s, begun, put_back, number, weight)
        except errors.UsageError:
            if session.error is not None:  # left the run between the check and the submit
                raise session.error from None
            raise

    def _check_partner(self, session: Session, partner: str) -> None:
        if calls.parse_peer(partner) not in session.view.members:
            raise errors.PeerLostError(
                f"exchange: {partner} is no member of epoch {session.view.epoch}", peer=partner.lower()
            )

    def _of_pair(self, info: ReduceInfo, partner: str) -> ReduceInfo:
        return replace(info, world_size=2, members=tuple(sorted((self.peer_id, partner.lower()))))

    def _conclude(self, session: Session, info: OpInfo, what: str) -> ReduceInfo:
        """The end of an operation for its caller: the view moves on, a failure is raised."""
        self._view = session.view
        if info.status == lib.PYCCL_ERR_MISMATCH:
            raise session.mismatch_error(what)
        if left_run(info):
            raise session.last_error()
        if info.status == status.ARGUMENT and what in ("all_reduce", "reduce_scatter"):  # seen by all together
            raise errors.UsageError(
                f"{what}: avg can't divide by the members' weights, which add up to 0 or to more than a float holds"
            )
        if info.status < 0:
            raise status.error_of(info.status, what, info.peer.hex() or None)
        members = hex_ids(session.members_of(info.epoch))
        return ReduceInfo(
            len(members), members, info.epoch, info.attempts, _ALGORITHMS[info.algorithm],
            info.tx_bytes, info.rx_bytes, info.seconds,
        )  # fmt: skip


@lru_cache(_EPOCHS_CACHED)
def hex_ids(peers: tuple[bytes, ...]) -> tuple[str, ...]:
    return tuple([peer.hex() for peer in peers])


def left_run(info: OpInfo) -> bool:
    """The operation ended because the session did, which knows, or soon will, why."""
    return info.status in (status.CLOSED, status.EVICTED)


class Work:
    """An operation that runs while the caller does something else. Wait for it: the arrays are in use until then."""

    def __init__(self, core: Core, session: Session, op: Op, what: str) -> None:
        self._core, self._session, self._op, self._what = core, session, op, what
        self._lock = threading.Lock()

    def done(self) -> bool:
        """Whether ``wait`` would return at once."""
        return self._op.done()

    def _take(self, out: Array) -> None:
        """Copy the result that the engine has kept, and give up the handle."""
        take(self._op, out)

    def wait(self, timeout: float | None = None) -> ReduceInfo:
        """Wait for the end of the operation and return its info, or raise its error.

        Args:
            timeout: seconds to wait; None waits until the operation's own deadline.
        Raises:
            DeadlineError: with `timeout`, when it passed: the operation goes on, nothing was aborted.
            KeyboardInterrupt: Ctrl-C; the operation was given up (input restored) unless it was complete already.
        """
        self._core._check_process()  # in a forked child nothing would ever end it
        with self._lock:
            info = self._op.ended
            if info is None:
                with self._session.waiting():
                    info = self._wait(timeout)
        return self._core._conclude(self._session, info, self._what)

    def _wait(self, timeout: float | None) -> OpInfo:
        try:
            while self._op.wait(3600.0 if timeout is None else timeout) == status.PENDING:
                if timeout is not None:
                    raise still_running(self._what, timeout)
        except errors.DeadlineError:
            raise
        except BaseException:
            self._op.cancel()
            self._op.finish()
            raise
        return self._op.finish()

    def _settle(self) -> None:
        """Give the operation up if it is not complete, and wait for its end without an error."""
        with self._lock:
            if self._op.ended is None:
                self._op.cancel()
                self._op.finish()

    def __del__(self) -> None:
        self._op.abandon()


class Gather:
    """An all_gather that runs while the caller does something else."""

    def __init__(self, work: Work, gathered: Gathered) -> None:
        self._work, self._gathered = work, gathered

    def wait(self) -> tuple[Array, ReduceInfo]:
        """Once: everybody's arrays, (info.world_size, *shape), and how it went. Errors as of ``Work.wait``."""
        info = self._work.wait()
        out = self._gathered.empty(info.world_size)
        self._work._take(out)
        return out, info

    def _settle(self) -> None:
        """As of a Work; a result is dropped."""
        self._work._settle()


def take(op: Op, out: Array) -> None:
    """The result that the engine has kept; the handle is free then."""
    try:
        if out.size:
            op.take(out.reshape(-1).view(np.uint8))
    finally:
        op.release()


def still_running(what: str, timeout: float) -> errors.DeadlineError:
    return errors.DeadlineError(f"{what}: not finished within {timeout:g} s; it goes on")


@contextmanager
def given_up_on_error() -> Iterator[list[Op]]:
    """Ctrl-C may come after the submit and outside of ``Work.wait``, which would see to it: the array comes back."""
    begun: list[Op] = []
    try:
        yield begun
    except BaseException:
        give_up(begun)
        raise


def give_up(begun: list[Op]) -> None:
    """Stay until they have ended."""
    for op in begun:
        if not op.done():
            op.cancel()
            op.finish()


# ---- calls that are several collectives ------------------------------------------------------------------------------


class Gathering:
    """A call that gathers bytes of all members several times; a thread runs it, which may block."""

    def __init__(self, core: Core, session: Session, what: str) -> None:
        self._core, self._session, self._what = core, session, what
        self._given_up = False
        self._op: Op | None = None

    def give_up(self) -> None:
        """From any thread: it fails here and on all others, unless it is as good as done."""
        self._given_up = True
        if self._op is not None:
            self._session.cancel_soon(self._op)

    def _gather(self, tag: int, mine: bytes, deadline: float) -> tuple[tuple[bytes, ...], list[bytes]]:
        """All-gather of a few bytes; alone it is just ours. Given up, it takes part all the same: to make it fail."""
        session, me = self._session, self._session.peer
        if session.error is not None:
            raise session.error
        if session.view.members == (me,):
            return (me,), [mine]
        size = len(mine)
        out = np.empty(WORLD_MAX * size, np.uint8)
        call = calls.gather_bytes(self._what, mine, out, tag, max(deadline - time.monotonic(), 0.001))
        try:
            with given_up_on_error() as begun:
                self._op = self._core._submit(session, call, begun)
                if self._given_up:
                    self._op.cancel()
                info = Work(self._core, session, self._op, call.what).wait()
        except errors.AloneError:
            return (me,), [mine]
        members = session.members_of(info.epoch)
        return members, [out[i * size : (i + 1) * size].tobytes() for i in range(len(members))]


class Measuring(Gathering):
    """The first half of an optimize_topology; the second is a safe point."""

    def __init__(self, core: Core, session: Session) -> None:
        super().__init__(core, session, "optimize_topology")

    def run(self, timeout_s: float) -> None:
        try:
            measure(self._session, partial(self._gather, TAG_MEASURE), self._check, time.monotonic() + timeout_s)
        except errors.UsageError:
            if self._session.error is not None:  # left the run meanwhile
                raise self._session.error from None
            raise

    def _check(self) -> None:
        if self._session.error is not None:
            raise self._session.error
        if self._given_up:
            raise errors.PeerLostError("optimize_topology: given up here")


class StateSync(Gathering):
    """One sync_shared_state."""

    def __init__(self, core: Core, session: Session) -> None:
        super().__init__(core, session, "sync_shared_state")

    def run(self, state: SharedState, strategy: Strategy, timeout_s: float) -> SyncInfo:
        self._session.sync_given_up = False
        try:
            return sync_shared_state(self._session, self._gather, state, strategy, timeout_s)
        except errors.UsageError:
            if self._session.error is not None:  # left the run meanwhile
                raise self._session.error from None
            raise

    def give_up(self) -> None:
        self._session.sync_given_up = True
        super().give_up()


# ---- the ends of sessions that nobody closed -------------------------------------------------------------------------


def _leave_dropped(session: Session, pid: int) -> None:
    """The communicator was dropped without close(): a member that nobody drives would hold up all the others."""
    if os.getpid() == pid:
        session.leave_soon()


@atexit.register
def _close_all() -> None:
    """Interpreter exit: leave every run, end every thread, close every socket."""
    for session in list(_SESSIONS):
        session.close()


os.register_at_fork(after_in_child=_SESSIONS.clear)  # the parent's; its threads do not exist in the child


def _library() -> str:
    return importlib.metadata.version("pyccl-p2p")[: limits.LIBRARY_CHARS_MAX]
