"""Communicator: the blocking API. Thread-safe; waits in C without the GIL; Ctrl-C ends every wait.

It checks arrays and arguments, hands them to the engine and translates what comes back. Membership is the session's.
"""

from __future__ import annotations

import atexit
import enum
import importlib.metadata
import os
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from pyccl import errors
from pyccl._io.address import parse_address
from pyccl._io.session import Session, SessionConfig, View
from pyccl._io.statesync import STRATEGIES, SyncInfo, sync_shared_state
from pyccl._native import status
from pyccl._native._pyccl import lib
from pyccl._native.handles import TIMEOUT_S_MAX, WORLD_MAX, Kind, Op, OpInfo, Spec
from pyccl._proto import limits
from pyccl.arrays import Buffer, as_buffer, check_out, numpy_dtype
from pyccl.reference import QUANTIZE_BLOCK
from pyccl.state import SharedState

OPERATION_TIMEOUT_S: Final = 1800.0
REACH_TIMEOUT_S: Final = 30.0
CONNECT_TIMEOUT_S: Final = 3600.0
_IN_FLIGHT_MAX: Final = 1024
_TAG_PENDING: Final = 0  # of the library's own tags; those of state sync: _io/statesync.py
_SESSIONS: Final[set[Session]] = set()  # open ones, to end them at interpreter exit

Array = np.ndarray[Any, Any]


class ReduceOp(enum.StrEnum):
    """What an all-reduce computes, element by element."""

    SUM = "sum"
    AVG = "avg"
    PROD = "prod"
    MIN = "min"
    MAX = "max"


_OPS: Final[dict[ReduceOp, int]] = {
    ReduceOp.SUM: lib.PYCCL_SUM,
    ReduceOp.AVG: lib.PYCCL_AVG,
    ReduceOp.PROD: lib.PYCCL_PROD,
    ReduceOp.MIN: lib.PYCCL_MIN,
    ReduceOp.MAX: lib.PYCCL_MAX,
}
_CODECS: Final[dict[str, int]] = {"uint8": lib.PYCCL_CODEC_UINT8}


@dataclass(frozen=True, slots=True)
class ReduceInfo:
    """How an operation went.

    world_size, members (peer ids in hex, in rank order), epoch: those who contributed, two in an exchange. attempts:
    epochs it ran in. tx_bytes, rx_bytes: payload sent and received here for it. seconds: from the call to its end.
    """

    world_size: int
    members: tuple[str, ...]
    epoch: int
    attempts: int
    algorithm: str
    tx_bytes: int
    rx_bytes: int
    seconds: float


class Work:
    """An operation that runs while the caller does something else. Wait for it: the arrays are in use until then."""

    def __init__(self, comm: Communicator, session: Session, op: Op, what: str) -> None:
        self._comm, self._session, self._op, self._what = comm, session, op, what
        self._lock = threading.Lock()

    def done(self) -> bool:
        """Whether ``wait`` would return at once."""
        return self._op.done()

    def take(self, out: np.ndarray[Any, Any]) -> None:
        """Copy the result that an all_gather without ``out`` has kept, and give up the handle."""
        try:
            self._op.take(out)
        finally:
            self._op.release()

    def wait(self, timeout: float | None = None) -> ReduceInfo:
        """Wait for the end of the operation and return its info, or raise its error.

        Args:
            timeout: seconds to wait; None waits until the operation's own deadline.
        Raises:
            DeadlineError: with `timeout`, when it passed: the operation goes on, nothing was aborted.
            KeyboardInterrupt: Ctrl-C; the operation was given up (input restored) unless it was complete already.
        """
        self._comm._check_process()  # in a forked child nothing would ever end it
        with self._lock:
            info = self._op.ended
            if info is None:
                with self._session.waiting():
                    info = self._wait(timeout)
        return self._comm._conclude(self._session, info, self._what)

    def _wait(self, timeout: float | None) -> OpInfo:
        try:
            while self._op.wait(3600.0 if timeout is None else timeout) == status.PENDING:
                if timeout is not None:
                    raise errors.DeadlineError(f"{self._what}: not finished within {timeout:g} s; it goes on")
        except errors.DeadlineError:
            raise
        except BaseException:
            self._op.cancel()
            self._op.finish()
            raise
        return self._op.finish()

    def settle(self) -> None:
        """Give the operation up if it is not complete, and wait for its end without an error."""
        with self._lock:
            if self._op.ended is None:
                self._op.cancel()
                self._op.finish()

    def __del__(self) -> None:
        self._op.abandon()


class Communicator:
    """One peer of a run: a member of one peer group.

    Args:
        address: "host:port" of the master.
        group: peer group, 0..2**32-1; collectives and shared state span the members of one group.
        connections: TCP connections to each peer, 1..64, or "auto".
    """

    def __init__(self, address: str, *, group: int = 0, connections: int | str = "auto") -> None:
        host, port = parse_address(address)
        _check_range("group", group, 0, limits.U32_MAX)
        if connections != "auto":
            _check_range("connections", connections, 1, lib.PYCCL_CONNS_MAX)
        self._config = SessionConfig(
            host, port, group, None if connections == "auto" else int(connections), _library()
        )
        self._id = secrets.token_bytes(16)
        self._session: Session | None = None
        self._joining: Session | None = None  # while another thread is in connect(), for close()
        self._view = View(0, bytes(16), (), 0)
        self._lock = threading.Lock()
        self._sync_lock = threading.Lock()
        self._pid = os.getpid()

    # ---- membership --------------------------------------------------------------------------------------------------

    def connect(self, timeout: float = CONNECT_TIMEOUT_S, reach_timeout: float = REACH_TIMEOUT_S) -> None:
        """Join the run: returns when this peer is a member of an epoch.

        The first peer of a group is admitted at once; others when the members next call ``update_topology()``.
        After an eviction it comes back as a newcomer: synchronise the shared state before going on.

        Args:
            timeout: seconds until admitted.
            reach_timeout: seconds in which the master must have answered.
        Raises:
            MasterUnavailableError: no master answered in time.
            RejectedError: it refused this peer, with the reason (version, unreachable from a member, ...).
            RemoteProtocolError: what listens there is no pyccl master.
            DeadlineError: not admitted within `timeout`.
            UsageError: connected already.
        """
        limit_s, reach_s = _seconds("timeout", timeout), _seconds("reach_timeout", reach_timeout)
        with self._lock:
            self._check_process()
            if self._session is not None and self._session.error is None:
                raise errors.UsageError("the communicator is connected already")
            if self._session is not None:
                self._drop(self._session)
            session = Session(self._config, self._id, secrets.token_bytes(16))
            _SESSIONS.add(session)
            self._joining = session
            try:
                session.start(limit_s, reach_s)
            except BaseException:
                _SESSIONS.discard(session)
                raise
            finally:
                self._joining = None
            self._session, self._view = session, session.view
            weakref.finalize(self, _leave_dropped, session, self._pid).atexit = False

    def close(self) -> None:
        """Leave the run: the others go on without this peer. Open operations fail. Idempotent, any thread."""
        if os.getpid() != self._pid:
            return  # a fork's copy: threads and connections are the parent's
        for session in (self._joining, self._session):
            if session is not None:
                self._drop(session)

    def _drop(self, session: Session) -> None:
        session.close()
        _SESSIONS.discard(session)

    def __enter__(self) -> Self:
        if self._session is None:
            self.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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
        return tuple(peer.hex() for peer in self._view.members)

    @property
    def group_world_size(self) -> int:
        """Members of this peer group."""
        return len(self._view.members)

    @property
    def world_size(self) -> int:
        """Members of all peer groups, as the master counted them when this group's epoch began."""
        return self._view.world_size

    def are_peers_pending(self) -> bool:
        """Whether newcomers wait for the next safe point. Collective: every member gets the same answer.

        Needs no master: it combines what the master has told each member.
        """
        session = self._require()
        if session.view.members == (self._id,):
            self._view = session.view
            return session.pending > 0
        mine = np.array([session.pending], np.int32)
        spec = Spec(Kind.ALL_REDUCE, lib.PYCCL_INT32, 1, lib.PYCCL_MAX, lib.PYCCL_SPACE_INTERNAL, _TAG_PENDING)
        try:
            buffer = as_buffer("mine", mine, writable=True)
            self._run(session, spec, buffer, buffer, OPERATION_TIMEOUT_S, "are_peers_pending")
        except errors.AloneError:
            return session.pending > 0  # the others were lost meanwhile
        return bool(mine[0] > 0)

    def update_topology(self, timeout: float = OPERATION_TIMEOUT_S) -> None:
        """The safe point: all members meet, pending peers get in, a new epoch begins. Collective.

        Operations that other threads submitted before all members had arrived still run in the old epoch.

        Raises:
            MasterUnavailableError: this call has waited 30 s for the master. The epoch goes on; try again later.
            MismatchError: members were elsewhere, in operations this peer never called.
            DeadlineError: `timeout` seconds passed; this peer has gone back from the safe point.
        """
        limit_s, session = _seconds("timeout", timeout), self._require()
        try:
            session.update_topology(limit_s, REACH_TIMEOUT_S)
        finally:
            self._view = session.view

    # ---- collectives -------------------------------------------------------------------------------------------------

    def all_reduce(
        self,
        x: Any,
        op: ReduceOp | str = ReduceOp.SUM,
        *,
        out: Any = None,
        tag: int = 0,
        quantize: str | None = None,
        algorithm: str = "auto",
        weight: float = 1.0,
        retry: bool = True,
        timeout: float = OPERATION_TIMEOUT_S,
        quantize_block: int = QUANTIZE_BLOCK,
    ) -> ReduceInfo:
        """Reduce ``x`` over all members of the epoch; the result is in ``out``, or in ``x`` itself without ``out``.

        Every member gets the same bits: each element is folded by one member in rank order.

        Args:
            x: any shape, C-contiguous; (u)int8/16/32/64, float16, bfloat16, float32 or float64; shape and dtype equal
                on all members. A NumPy array (bfloat16: ``ml_dtypes``), a torch tensor, or anything in host memory
                with the buffer protocol or DLPack (writable from DLPack 1.0 on); never copied, but a tensor on an
                accelerator is staged through host memory. Writable when ``out`` is not given.
                A torch tensor is written as under ``torch.no_grad()``: a parameter takes the new values, a result
                that autograd tracks is refused, a backward pass that needs the old values raises.
            op: "sum", "avg" (floats only: one sum, one division), "prod", "min", "max". Integers wrap; min and max
                propagate NaN and order -0 below +0; a NaN result is the canonical quiet NaN. float16 and bfloat16 are
                folded in float32 and rounded once.
            out: array of the same shape and dtype that does not overlap ``x`` in part; undefined after an error.
            tag: 0..2**32-1, pairs operations that run at the same time: the n-th call with a tag on one member
                belongs to the n-th on the others.
            quantize: None, or "uint8" (floats only): blocks of ``quantize_block`` elements (a power of two, 64..65536)
                travel as one byte an element with an offset and a scale. Each contribution is rounded once and, with
                more than two members, the result once more; still the same bits everywhere. A block with a NaN or
                an infinity becomes NaN. Equal on all members. Codec: proto/wire.md 3.6.
            algorithm: "auto" or "direct".
            weight: of this member's ``x`` in an "avg": finite, >= 0; the sum of the weighted inputs is divided by the
                sum of the weights. UsageError on all members when that is 0.
            retry: run it again among the survivors when a member is lost; False raises PeerLostError instead.
            timeout: seconds from this call to the result, waiting for stragglers included.
        Raises:
            UsageError: arguments; nothing was sent.
            PeerLostError: a member was lost (``retry=False``) or gave the operation up.
            AloneError: nobody else is left.
            DeadlineError: the time ran out here or at another member, or the operation stopped moving.
            MismatchError: members called different things; its ``peers`` and ``fields`` say who and what.
            EvictedError, OutcomeUnknownError: this peer is out of the run; ``connect()`` again.
            After every one of them ``x`` holds its input.
        """
        with _given_up_on_error() as begun:
            return self._reduce(
                x, op, out, tag, quantize, algorithm, weight, retry, timeout, quantize_block, begun
            ).wait()

    def all_reduce_async(
        self,
        x: Any,
        op: ReduceOp | str = ReduceOp.SUM,
        *,
        out: Any = None,
        tag: int = 0,
        quantize: str | None = None,
        algorithm: str = "auto",
        weight: float = 1.0,
        retry: bool = True,
        timeout: float = OPERATION_TIMEOUT_S,
        quantize_block: int = QUANTIZE_BLOCK,
    ) -> Work:
        """Start an ``all_reduce`` and return a handle; ``x`` and ``out`` belong to it until ``wait()`` has ended.

        ``wait()`` also brings the result of a tensor on an accelerator back there.
        """
        with _given_up_on_error() as begun:
            return self._reduce(x, op, out, tag, quantize, algorithm, weight, retry, timeout, quantize_block, begun)

    def broadcast(
        self, x: Any, root: str, *, tag: int = 0, retry: bool = True, timeout: float = OPERATION_TIMEOUT_S
    ) -> ReduceInfo:
        """Copy ``x`` of the member `root` into ``x`` of every other one.

        Args:
            x: as for ``all_reduce``, shape and dtype equal on all members; written everywhere but at the root.
            root: peer id (32 hex characters), equal on all members.
            tag, retry, timeout: as for ``all_reduce``.
        Raises:
            PeerLostError: the root was lost, or a member with ``retry=False``; else as ``all_reduce``.
        """
        session = self._require()
        source = _parse_peer(root)
        at_root = source == self._id
        buffer = as_buffer("x", x, writable=not at_root)
        spec = Spec(Kind.BROADCAST, buffer.code, buffer.count, tag=_tag(tag), retry=bool(retry), root=source)
        target = None if at_root else buffer
        return self._run(session, spec, buffer, target, timeout, "broadcast")

    def all_gather(
        self, x: Any, *, tag: int = 0, retry: bool = True, timeout: float = OPERATION_TIMEOUT_S
    ) -> np.ndarray[Any, Any]:
        """Everybody's ``x``, on everybody.

        Args:
            x: as for ``all_reduce``, shape and dtype equal on all members; not changed.
            tag, retry, timeout: as for ``all_reduce``.
        Returns:
            A new NumPy array of shape (group_world_size, *x.shape) in member order: of the members that contributed,
            which after a loss are those of the view. bfloat16 comes as ``ml_dtypes.bfloat16``.
        Raises: as ``all_reduce``.
        """
        session = self._require()
        buffer = as_buffer("x", x, writable=False)
        dtype = numpy_dtype(buffer)
        spec = Spec(Kind.ALL_GATHER, buffer.code, buffer.count, tag=_tag(tag), retry=bool(retry))
        with _given_up_on_error() as begun:
            work = self._start(session, spec, buffer, None, timeout, "all_gather", begun)
            info = work.wait()
        out = np.empty((info.world_size, *buffer.shape), dtype)
        if out.size:
            work.take(out.reshape(-1).view(np.uint8))
        return out

    def all_reduce_many(
        self,
        arrays: Sequence[Any],
        op: ReduceOp | str = ReduceOp.SUM,
        *,
        max_in_flight: int = 8,
        tag: int = 0,
        **options: Any,
    ) -> list[ReduceInfo]:
        """``all_reduce`` each of the arrays in place, several at a time, all with one tag; equal order on all members.

        Args:
            arrays: as ``x`` of ``all_reduce``, not overlapping.
            max_in_flight: 1..1024, operations that run at the same time.
            options: further keywords of ``all_reduce`` but ``out``.
        Returns:
            One info per array, in order.
        Raises: what the first operation that failed raised, after all that were started have ended. Arrays before it
            are reduced, it and those never started hold their inputs, the others in flight hold one or the other.
        """
        _check_range("max_in_flight", max_in_flight, 1, _IN_FLIGHT_MAX)
        if "out" in options:
            raise errors.UsageError("all_reduce_many works in place: it takes no out")
        infos: list[ReduceInfo] = []
        works: deque[Work] = deque()
        try:
            for x in arrays:
                if len(works) == max_in_flight:
                    infos.append(works.popleft().wait())
                works.append(self.all_reduce_async(x, op, tag=tag, **options))
            while works:
                infos.append(works.popleft().wait())
        except BaseException:
            for work in works:  # the caller's arrays again, whatever becomes of it
                work.settle()
            raise
        return infos

    def exchange(
        self, x: Any, *, partner: str, out: Any = None, tag: int = 0, timeout: float = OPERATION_TIMEOUT_S
    ) -> ReduceInfo:
        """Swap ``x`` with one other member, who calls this too: ``out`` holds the partner's ``x``, here and there.

        Nobody else is involved: others may reduce, and other pairs exchange with the same tag, at the same time. It
        succeeds on both or fails on both. Members that wait for each other's exchanges in a ring get MismatchError.

        Args:
            x: as for ``all_reduce``; shape and dtype equal on both. Not changed where ``out`` is given, else replaced
                by the partner's.
            partner: its peer id (32 hex characters).
            out: array of the same shape and dtype that does not overlap ``x`` in part; undefined after an error.
            tag: 0..2**32-1: the n-th exchange with a partner and a tag belongs to the partner's n-th with us.
            timeout: seconds from this call to the result, waiting for the partner included.
        Returns:
            An info of the two; `attempts` counts the epochs in which it ran: the loss of somebody else repeats it.
        Raises:
            UsageError: arguments, ``partner`` is this peer itself; nothing was sent.
            PeerLostError: the partner was lost, or is no member of the epoch.
            MismatchError: the two called different things, or wait for each other elsewhere.
            DeadlineError, EvictedError, OutcomeUnknownError: as ``all_reduce``.
            After every one of them ``x`` holds its input.
        """
        session = self._require()
        other = _parse_peer(partner)
        if other == self._id:
            raise errors.UsageError(f"partner={partner!r} is this peer itself")
        source = as_buffer("x", x, writable=out is None)
        target = source if out is None else as_buffer("out", out, writable=True)
        check_out(source, target)
        pair = bytes(a ^ b for a, b in zip(self._id, other, strict=True))
        spec = Spec(Kind.EXCHANGE, source.code, source.count, space=lib.PYCCL_SPACE_PAIR, tag=_tag(tag), root=pair)
        limit_s, view = _seconds("timeout", timeout), session.view
        if other not in view.members:
            raise errors.PeerLostError(f"exchange: {partner} is no member of epoch {view.epoch}", peer=other.hex())
        info = self._run(session, spec, source, target, limit_s, "exchange")
        return replace(info, world_size=2, members=tuple(sorted((self.peer_id, other.hex()))))

    def barrier(self, *, tag: int = 0, timeout: float = OPERATION_TIMEOUT_S) -> ReduceInfo:
        """Return when every member has called it."""
        spec = Spec(Kind.BARRIER, lib.PYCCL_UINT8, 0, tag=_tag(tag))
        return self._run(self._require(), spec, None, None, timeout, "barrier")

    def sync_shared_state(
        self, state: SharedState, strategy: str = "enforce_popular", *, timeout: float = OPERATION_TIMEOUT_S
    ) -> SyncInfo:
        """Give every member the same arrays and revision. Collective.

        Members of the last committed sync vote (all do if there was none); the newest revision wins, then the one
        with most holders, then the lowest root; a lone one never wins against two that agree. Only chunks that differ
        travel, from all holders at once, each checked against its digest. The arrays are replaced on all members or
        on none. States above 32 MiB are staged in a file without a name in $TMPDIR, or /var/tmp.

        Args:
            state: names, dtypes, shapes, ``allow_content_inequality`` and ``digest`` equal on all members.
            strategy: of this member; they may differ.
                "enforce_popular": offers what it holds and takes what is elected.
                "receive_only": offers nothing, neither votes nor serves, and takes what is elected.
                "send_only": offers what it holds and never changes it. If another state is elected it gets a
                MismatchError, and the others go on with what is elected (``SyncInfo.apart`` names it).
                If all who may vote are receive-only, the others vote. If all members are: MismatchError on all.
            timeout: seconds for all members to call it, and again (the least of all members') for the transfer. A
                member that has not received the state by then leaves the run with DeadlineError and has to
                ``connect()`` again; the others go on without it.
        Raises:
            MismatchError: members differ in what must be equal, which `fields` names, or "strategy", see above;
                `peers` says who. Nothing was changed.
            PeerLostError: every holder was lost or served wrong bytes, or a member could not stage the state, before
                all had it. Nothing was changed.
            StagingError: this peer can't stage the state; names the directory. Nothing was changed, on any member.
            otherwise as ``all_reduce``, without AloneError: alone it commits what is here.
        """
        if not isinstance(state, SharedState):
            raise errors.UsageError(f"a SharedState is needed, not {type(state).__name__}")
        if not isinstance(strategy, str) or strategy not in STRATEGIES:
            raise errors.UsageError(f"strategy={strategy!r} is not one of {', '.join(STRATEGIES)}")
        limit_s, session = _seconds("timeout", timeout), self._require()
        with self._sync_lock:
            try:
                return sync_shared_state(session, self._gather, state, STRATEGIES[strategy], limit_s)
            except errors.UsageError:
                if session.error is not None:  # left the run meanwhile
                    raise session.error from None
                raise
            finally:
                self._view = session.view

    # ---- inside ------------------------------------------------------------------------------------------------------

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

    def _reduce(
        self,
        x: Any,
        op: ReduceOp | str,
        out: Any,
        tag: int,
        quantize: str | None,
        algorithm: str,
        weight: float,
        retry: bool,
        timeout: float,
        quantize_block: int,
        begun: list[Op],
    ) -> Work:
        session = self._require()
        source = as_buffer("x", x, writable=out is None)
        target = source if out is None else as_buffer("out", out, writable=True)
        known = _reduce_op(op, source)
        check_out(source, target)
        codec, block = _codec(quantize, quantize_block, source)
        if algorithm not in ("auto", "direct"):
            raise errors.UsageError(f"algorithm={algorithm!r}: this version has 'auto' and 'direct'")
        spec = Spec(
            Kind.ALL_REDUCE, source.code, source.count, _OPS[known],
            tag=_tag(tag), retry=bool(retry), codec=codec, block=block, weight=_weight(weight, known),
        )  # fmt: skip
        return self._start(session, spec, source, target, timeout, "all_reduce", begun)

    def _start(
        self,
        session: Session,
        spec: Spec,
        src: Buffer | None,
        dst: Buffer | None,
        timeout: float,
        what: str,
        begun: list[Op],
    ) -> Work:
        limit_s, engine = _seconds("timeout", timeout), session.need_engine()
        source, target = (None if x is None or spec.count == 0 else x.bytes_ for x in (src, dst))
        try:
            op = engine.submit(spec, source, target, limit_s, begun, None if dst is None else dst.put_back)
        except errors.UsageError:
            if session.error is not None:  # left the run between the check and the submit
                raise session.error from None
            raise
        return Work(self, session, op, what)

    def _run(
        self, session: Session, spec: Spec, src: Buffer | None, dst: Buffer | None, timeout: float, what: str
    ) -> ReduceInfo:
        with _given_up_on_error() as begun:
            return self._start(session, spec, src, dst, timeout, what, begun).wait()

    def _conclude(self, session: Session, info: OpInfo, what: str) -> ReduceInfo:
        """The end of an operation for its caller: the view moves on, a failure is raised."""
        self._view = session.view
        if info.status == lib.PYCCL_ERR_MISMATCH:
            raise session.mismatch_error(what)
        if info.status in (lib.PYCCL_ERR_CLOSED, lib.PYCCL_ERR_EVICTED):
            raise session.last_error()
        if info.status < 0:
            raise status.error_of(info.status, what, info.peer.hex() or None)
        members = session.members_of(info.epoch)
        return ReduceInfo(
            world_size=len(members),
            members=tuple(peer.hex() for peer in members),
            epoch=info.epoch,
            attempts=info.attempts,
            algorithm="direct",
            tx_bytes=info.tx_bytes,
            rx_bytes=info.rx_bytes,
            seconds=info.seconds,
        )

    def _gather(self, tag: int, mine: bytes, deadline: float) -> tuple[tuple[bytes, ...], list[bytes]]:
        """All-gather of a few bytes on the library's own tags; alone it is just ours."""
        session = self._require()
        if session.view.members == (self._id,):
            return (self._id,), [mine]
        size = len(mine)
        spec = Spec(Kind.ALL_GATHER, lib.PYCCL_UINT8, size, space=lib.PYCCL_SPACE_INTERNAL, tag=tag)
        out = np.empty(WORLD_MAX * size, np.uint8)
        try:
            timeout = max(deadline - time.monotonic(), 0.001)
            source, target = as_buffer("mine", mine, writable=False), as_buffer("out", out, writable=True)
            info = self._run(session, spec, source, target, timeout, "sync_shared_state")
        except errors.AloneError:
            return (self._id,), [mine]
        members = session.members_of(info.epoch)
        return members, [out[i * size : (i + 1) * size].tobytes() for i in range(len(members))]


def connect(
    address: str,
    *,
    group: int = 0,
    connections: int | str = "auto",
    timeout: float = CONNECT_TIMEOUT_S,
    reach_timeout: float = REACH_TIMEOUT_S,
) -> Communicator:
    """Make a Communicator and connect it: ``with pyccl.connect("host:port") as comm: ...``."""
    comm = Communicator(address, group=group, connections=connections)
    comm.connect(timeout, reach_timeout)
    return comm


@contextmanager
def _given_up_on_error() -> Iterator[list[Op]]:
    """Ctrl-C may come after the submit and outside of ``Work.wait``, which would see to it: the array comes back."""
    begun: list[Op] = []
    try:
        yield begun
    except BaseException:
        for op in begun:
            if not op.done():
                op.cancel()
                op.finish()
        raise


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


def _parse_peer(peer: str) -> bytes:
    try:
        parsed = bytes.fromhex(peer)
    except (TypeError, ValueError):
        parsed = b""
    if len(parsed) != limits.ID_BYTES:
        raise errors.UsageError(f"{peer!r} is no peer id: 32 hex characters are needed")
    return parsed


def _check_range(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= int(value) <= high:
        raise errors.UsageError(f"{name}={value!r}: a whole number of {low}..{high} is needed")


def _seconds(name: str, value: object) -> float:
    """A time to wait; so long a one that no clock or lock minds it, where more is asked for."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not float(value) > 0:
        raise errors.UsageError(f"{name}={value!r}: a positive number of seconds is needed")
    return min(float(value), TIMEOUT_S_MAX)


def _tag(tag: int) -> int:
    _check_range("tag", tag, 0, limits.U32_MAX)
    return int(tag)


def _reduce_op(op: ReduceOp | str, x: Buffer) -> ReduceOp:
    try:
        known = ReduceOp(op)
    except ValueError:
        raise errors.UsageError(f"op={op!r} is not one of {', '.join(ReduceOp)}") from None
    if known is ReduceOp.AVG and not x.is_float:
        raise errors.UsageError(f"op='avg' needs floats, not {x.dtype}: sum them and divide as you need")
    return known


def _codec(quantize: str | None, block: int, x: Buffer) -> tuple[int, int]:
    """(codec, block) of the spec."""
    if quantize is None:
        return lib.PYCCL_CODEC_NONE, 0
    codec = _CODECS.get(quantize)
    if codec is None:
        raise errors.UsageError(f"quantize={quantize!r} is not one of {', '.join(_CODECS)}")
    if not x.is_float:
        raise errors.UsageError(f"quantize={quantize!r} needs floats, not {x.dtype}")
    _check_range("quantize_block", block, lib.PYCCL_BLOCK_MIN, lib.PYCCL_BLOCK_MAX)
    if block & (block - 1):
        raise errors.UsageError(f"quantize_block={block}: a power of two is needed")
    return codec, int(block)


def _weight(weight: float, op: ReduceOp) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float | np.number):
        raise errors.UsageError(f"weight={weight!r}: a number is needed")
    if not 0 <= float(weight) < float("inf"):
        raise errors.UsageError(f"weight={weight!r}: finite and not negative is needed")
    if op is not ReduceOp.AVG and float(weight) != 1.0:
        raise errors.UsageError(f"weight={weight!r}: weights are for op='avg' only")
    return float(weight)
