"""Communicator: the blocking API. Thread-safe; waits in C without the GIL; Ctrl-C ends every wait.

Arguments are checked in ``calls.py``; operations begin and end in ``core.py``. Membership is the session's.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from pyccl import calls, errors
from pyccl._io.session import Session, Waiter
from pyccl._io.statesync import SyncInfo
from pyccl._native.handles import TIMEOUT_S_MAX, Op
from pyccl.calls import CONNECT_TIMEOUT_S, OPERATION_TIMEOUT_S, REACH_TIMEOUT_S, Array, Call, ReduceOp
from pyccl.core import Core, Gather, Measuring, ReduceInfo, StateSync, Work, give_up, given_up_on_error
from pyccl.guards import Guard
from pyccl.reference import QUANTIZE_BLOCK
from pyccl.state import SharedState


class Communicator(Core):
    """One peer of a run: a member of one peer group.

    Args:
        address: "host:port" of the master, or an invite "pyccl://host:port/...", with which the master is spoken to
            encrypted and proves its key. None: the invite in the environment variable PYCCL_INVITE.
        group: peer group, 0..2**32-1; collectives and shared state span the members of one group.
        connections: TCP connections to each peer, 1..64, or "auto": as many as the line is found to gain from.
        max_upload, max_download: None, or caps like "50mbit" (kbit, mbit, gbit; 1mbit to 1000gbit) of what all data
            connections together send and receive, shared state included. Kept within 5 %. What this member relays for
            others comes on top: at most half of the lower cap each way, without a cap as much as they send.
        listen: "HOST:PORT", "HOST" or ":PORT", where other peers' data connections are accepted; HOST is an address of
            this machine. None: on all addresses and a free port, in a run on this machine alone on loopback.
        advertise: "HOST:PORT" or "HOST" (with the port listened on), or several: where others reach this peer, as you
            know, beside what it finds out itself: a router forwards a port, say. Private and loopback addresses, a
            name's too, are dialed only by peers that the master sees on the same site or machine.
        relay: "auto": a peer that can't be reached otherwise is reached through a third: one that offers it
            (``pyccl-peer --relay``, ``pyccl-master --relay``) or another member, and this one carries for others, too.
            "never": neither; who can't be reached is not admitted. "only": every peer through one that offers it.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        group: int = 0,
        connections: int | str = "auto",
        max_upload: str | None = None,
        max_download: str | None = None,
        listen: str | None = None,
        advertise: str | Sequence[str] | None = None,
        relay: str = "auto",
    ) -> None:
        super().__init__(
            address, group=group, connections=connections, max_upload=max_upload, max_download=max_download,
            listen=listen, advertise=advertise, relay=relay,
        )  # fmt: skip
        self._lock = threading.Lock()
        self._sync_lock = threading.Lock()

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
        limit_s, reach_s = calls.seconds("timeout", timeout), calls.seconds("reach_timeout", reach_timeout)
        with self._lock:
            session, old = self._begin_session(), self._session
            try:
                if old is not None:
                    self._drop(old)
                joined = Waiter()
                session.launch(joined, reach_s)
                if not joined.wait(limit_s):
                    raise errors.DeadlineError(f"not admitted to the run within {limit_s:g} s")
            except BaseException:
                self._drop(session)
                raise
            finally:
                self._joining = None
            self._adopt(session)

    def close(self) -> None:
        """Leave the run: the others go on without this peer. Open operations fail. Idempotent, any thread."""
        for session in self._sessions_to_close():
            self._drop(session)

    def _drop(self, session: Session) -> None:
        session.close()
        self._forget(session)

    def __enter__(self) -> Self:
        if self._session is None:
            self.connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def are_peers_pending(self, timeout: float = OPERATION_TIMEOUT_S) -> bool:
        """Whether newcomers wait for the next safe point. Collective: every member gets the same answer.

        Needs no master: it combines what the master has told each member.

        Args:
            timeout: seconds until every member has called it.
        Raises:
            DeadlineError: one has not, or gave up.
            PeerLostError, MismatchError, EvictedError, OutcomeUnknownError, MasterUnavailableError: as ``all_reduce``.
        """
        limit_s = calls.seconds("timeout", timeout)
        session = self._require()
        if session.view.members == (self._id,):
            self._view = session.view
            return session.pending > 0
        call, counts = calls.are_peers_pending(session.pending, limit_s)
        try:
            self._run(session, call)
        except errors.AloneError:
            return session.pending > 0  # the others were lost meanwhile
        return bool(counts[0] > 0)

    def update_topology(self, timeout: float = OPERATION_TIMEOUT_S) -> None:
        """The safe point: all members meet, pending peers get in, a new epoch begins. Collective.

        Operations that other threads submitted before all members had arrived still run in the old epoch.

        Raises:
            MasterUnavailableError: this call has waited 30 s for the master. The epoch goes on; try again later.
            MismatchError: members were elsewhere, in operations this peer never called.
            DeadlineError: `timeout` seconds passed; this peer has gone back from the safe point.
        """
        self._meet(calls.seconds("timeout", timeout), self._require())

    def optimize_topology(self, timeout: float = OPERATION_TIMEOUT_S) -> None:
        """A safe point before which the members measure their links; the new epoch has a plan that rests on that.

        Measured is what is not known, or for ten minutes was not confirmed by traffic: rates and round trips of pairs,
        several pairs at a time but no member in two, then all together. It takes 0.6 s and some ten round trips for
        each of N rounds, until rates are steady, 6 s at most; as much again for links that may do with fewer
        connections or look odd; and nothing where all is known. No round begins after a minute or six tenths of
        `timeout`, nor a 17th: the next call measures the rest. What else runs meanwhile makes links seem slower. A plan
        is adopted where it predicts a gain; the master logs it with the time it predicts (``plan_found``). Collective.

        Raises: as ``update_topology``, and MismatchError where other members call that.
        """
        started, limit_s, session = time.monotonic(), calls.seconds("timeout", timeout), self._require()
        with self._sync_lock:
            try:
                Measuring(self, session).run(limit_s)
            finally:
                self._view = session.view
        self._meet(max(limit_s - (time.monotonic() - started), 0.001), session)

    def _meet(self, limit_s: float, session: Session) -> None:
        waiter = Waiter()
        try:
            session.arrive(waiter, REACH_TIMEOUT_S)
            if not waiter.wait(limit_s):
                raise errors.DeadlineError(f"the members did not meet at the safe point within {limit_s:g} s")
        except BaseException:
            session.withdraw(waiter)
            raise
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
        guard: Guard | str | None = None,
    ) -> ReduceInfo:
        """Reduce ``x`` over all members of the epoch; the result is in ``out``, or in ``x`` itself without ``out``.

        Every member gets the same bits, in an order of additions that members, algorithm and plan fix: in rank order,
        or along the ring.

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
            quantize: None, "uint8" (affine), "int8" (symmetric), "fp8_e4m3", "fp4_e3m0" or "bfloat16"; floats only.
                Blocks of ``quantize_block`` elements (a power of two, 64..65536) travel as codes of 8, 8, 8, 4 or 16
                bits with a scale each (bfloat16: none). Each contribution is rounded once and, with more than two
                members, the result once more; still the same bits everywhere. A block with a NaN or an infinity
                becomes NaN; bfloat16 passes them on. Equal on all members. Errors: docs/codecs.md.
            algorithm: "direct": everybody sends to the owner of each share; "ring": each to the next member alone,
                for groups that are large or whose lines differ (two members swap, whatever is said); "auto": what the
                epoch's plan says, "direct" without one. Equal on all members. `algorithm` of the info tells what ran.
            weight: of this member's ``x`` in an "avg": finite, >= 0; the sum of the weighted inputs is divided by the
                sum of the weights. UsageError on all members when that is 0.
            retry: run it again among the survivors when a member is lost; False raises PeerLostError instead.
            guard: None; "finite": fail on all members if a member contributes a NaN or an infinity, or if the result is
                not finite; or a ``Guard`` with limits. Floats only, equal on all members, not with "ring" ("auto" is
                "direct"). It costs a pass over ``x`` before this call has started anything, and one over what arrives.
            timeout: seconds from this call to the result, waiting for stragglers included.
        Raises:
            UsageError: arguments; nothing was sent.
            PeerLostError: a member was lost (``retry=False``) or gave the operation up.
            AloneError: nobody else is left.
            DeadlineError: the time ran out here or at another member, or the operation stopped moving.
            MismatchError: members called different things; its ``peers`` and ``fields`` say who and what.
            PoisonError: the guard refuses what its ``peer`` contributed.
            EvictedError, OutcomeUnknownError: this peer is out of the run; ``connect()`` again.
            After every one of them ``x`` holds its input.
        """
        session = self._require()
        call = calls.all_reduce(x, op, out, tag, quantize, algorithm, weight, retry, timeout, quantize_block, guard)
        return self._run(session, call)

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
        guard: Guard | str | None = None,
    ) -> Work:
        """Start an ``all_reduce`` and return a handle; ``x`` and ``out`` belong to it until ``wait()`` has ended.

        ``wait()`` also brings the result of a tensor on an accelerator back there.
        """
        session = self._require()
        call = calls.all_reduce(x, op, out, tag, quantize, algorithm, weight, retry, timeout, quantize_block, guard)
        with given_up_on_error() as begun:
            return self._start(session, call, begun)

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
        return self._run(session, calls.broadcast(self._id, x, root, tag, retry, timeout))

    def all_gather(self, x: Any, *, tag: int = 0, retry: bool = True, timeout: float = OPERATION_TIMEOUT_S) -> Array:
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
        call, gathered = calls.all_gather(x, tag, retry, timeout)
        with given_up_on_error() as begun:
            work = self._start(session, call, begun)
            info = work.wait()
        out = gathered.empty(info.world_size)
        work._take(out)
        return out

    def _all_gather_async(
        self, x: Any, *, tag: int = 0, retry: bool = True, timeout: float = OPERATION_TIMEOUT_S
    ) -> Gather:
        """Start an ``all_gather``; ``x`` belongs to it until ``wait()`` has ended."""
        session = self._require()
        call, gathered = calls.all_gather(x, tag, retry, timeout)
        with given_up_on_error() as begun:
            return Gather(self._start(session, call, begun), gathered)

    def reduce_scatter(
        self,
        x: Any,
        op: ReduceOp | str = ReduceOp.SUM,
        *,
        tag: int = 0,
        quantize: str | None = None,
        algorithm: str = "auto",
        weight: float = 1.0,
        retry: bool = True,
        timeout: float = OPERATION_TIMEOUT_S,
        quantize_block: int = QUANTIZE_BLOCK,
        guard: Guard | str | None = None,
    ) -> Array:
        """Reduce ``x`` over all members; each gets its own part of the result, cut along axis 0.

        Args:
            x: as for ``all_reduce``, of at least one dimension; shape and dtype equal on all members; not changed.
            op, tag, weight, retry, timeout, guard: as for ``all_reduce``.
            quantize, quantize_block: as for ``all_reduce``, but each contribution is rounded once and the part, which
                travels no further, not again. Blocks are counted from the first element of each part.
            algorithm: as for ``all_reduce``. The order of additions is that of ``members`` ("direct"), or that of the
                ring from the member after the part's owner to the owner. In a ring each member holds about a whole
                ``x`` of unfinished sums until the operation ends, and only a contribution's first hop is quantized.
        Returns:
            A new NumPy array: part `rank` of ``numpy.array_split(reduced, world_size)`` among those who contributed,
            which after a loss are those of the view. Empty where there are more members than rows.
        Raises: as ``all_reduce``; UsageError where ``x`` has no dimension.
        """
        session = self._require()
        call, scattered = calls.reduce_scatter(
            x, op, tag, quantize, algorithm, weight, retry, timeout, quantize_block, guard
        )
        with given_up_on_error() as begun:
            work = self._start(session, call, begun)
            info = work.wait()
        out = scattered.empty(info.members.index(self.peer_id), info.world_size)
        work._take(out)
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
        calls.check_many(max_in_flight, options)
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
                work._settle()
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
        call = calls.exchange(self._id, x, out, partner, tag, timeout)
        self._check_partner(session, partner)
        return self._of_pair(self._run(session, call), partner)

    def _exchange_async(
        self, x: Any, *, partner: str, out: Any = None, tag: int = 0, timeout: float = OPERATION_TIMEOUT_S
    ) -> Work:
        """Start an ``exchange``; ``x`` and ``out`` belong to it until ``wait()`` has ended, which names all members."""
        session = self._require()
        call = calls.exchange(self._id, x, out, partner, tag, timeout)
        self._check_partner(session, partner)
        with given_up_on_error() as begun:
            return self._start(session, call, begun)

    def barrier(self, *, tag: int = 0, timeout: float = OPERATION_TIMEOUT_S) -> ReduceInfo:
        """Return when every member has called it."""
        session = self._require()
        return self._run(session, calls.barrier(tag, timeout))

    def sync_shared_state(
        self, state: SharedState, strategy: str = "enforce_popular", *, timeout: float = OPERATION_TIMEOUT_S
    ) -> SyncInfo:
        """Give every member the same arrays and revision. Collective.

        Members of the last committed sync vote; the newest revision wins, then the one with most holders, then the
        lowest root; a lone one never wins against two that agree. If there was no sync yet, all vote, and the newest
        wins even if one alone holds it (so that one peer can bring a checkpoint). Only chunks that differ travel,
        from all holders at once, each checked against its digest. The arrays are replaced on all members or on none.
        States above 32 MiB are staged in a file without a name in $TMPDIR, or /var/tmp.

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
                `peers` says who. "records": some member told `peers` other things than this one; which of them did
                is not known. Nothing was changed.
            PeerLostError: every holder was lost or served wrong bytes, or a member could not stage the state, before
                all had it. Nothing was changed.
            StagingError: this peer can't stage the state; names the directory. Nothing was changed, on any member.
            otherwise as ``all_reduce``, without AloneError: alone it commits what is here.
        """
        chosen = calls.sync_shared_state(state, strategy)
        limit_s, session = calls.seconds("timeout", timeout), self._require()
        with self._sync_lock:
            try:
                return StateSync(self, session).run(state, chosen, limit_s)
            finally:
                self._view = session.view

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _start(self, session: Session, call: Call, begun: list[Op]) -> Work:
        return Work(self, session, self._submit(session, call, begun), call.what)

    def _run(self, session: Session, call: Call) -> ReduceInfo:
        """Start it and wait for it: as ``Work`` does, with less about it."""
        begun: list[Op] = []
        try:
            op = self._submit(session, call, begun)
            try:
                session.blocked.add(op)
                op.wait(TIMEOUT_S_MAX)
            finally:
                session.blocked.discard(op)
            info = op.finish()
        except BaseException:
            give_up(begun)
            raise
        return self._conclude(session, info, call.what)


def connect(
    address: str | None = None,
    *,
    group: int = 0,
    connections: int | str = "auto",
    max_upload: str | None = None,
    max_download: str | None = None,
    listen: str | None = None,
    advertise: str | Sequence[str] | None = None,
    relay: str = "auto",
    timeout: float = CONNECT_TIMEOUT_S,
    reach_timeout: float = REACH_TIMEOUT_S,
) -> Communicator:
    """Make a Communicator and connect it: ``with pyccl.connect("host:port") as comm: ...``.

    For the arguments see ``Communicator`` and ``Communicator.connect`` (the two timeouts).
    """
    comm = Communicator(
        address, group=group, connections=connections, max_upload=max_upload, max_download=max_download,
        listen=listen, advertise=advertise, relay=relay,
    )  # fmt: skip
    comm.connect(timeout, reach_timeout)
    return comm
