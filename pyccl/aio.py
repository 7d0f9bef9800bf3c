"""The same API for Trio programs: ``async with pyccl.aio.connect("host:port") as comm: await comm.all_reduce(x)``.

Methods have the names, arguments, results and errors of ``pyccl.Communicator``, where they are described. What differs:

* They are coroutines, but for ``all_reduce_async``, which returns a handle at once. Waiting blocks neither the loop nor
  a thread: the engine tells the session's thread of the end of an operation, and that wakes the loop.
* Cancellation leaves no operation half done. A cancelled call gives its operation up and returns when that has ended:
  at once before this peer has the whole result, as after a deadline; the other members get PeerLostError, and the input
  is restored before Cancelled is raised. Once this peer has told the others that it holds the result they may have
  committed it, so the call first learns what became of it, within ``peer_timeout``. If it was committed, the result
  stands and the call returns it; Cancelled comes at the next checkpoint. If not, it fails on all as on a deadline, and
  if that can't be learned this peer leaves the run: the next call raises OutcomeUnknownError. Ctrl-C is the same, but
  is always raised.
* A communicator belongs to the Trio run that connected it; any number of its tasks may use it at the same time.

    all_reduce ──submit──▶ engine thread ──EVENT_OP──▶ session thread ──run_sync_soon──▶ the task goes on
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import trio
from trio.lowlevel import checkpoint, checkpoint_if_cancelled, enable_ki_protection

from pyccl import calls, errors
from pyccl._io.session import Session, Waiter
from pyccl._io.statesync import SyncInfo
from pyccl._native import status
from pyccl._native.handles import Op, OpInfo
from pyccl.calls import CONNECT_TIMEOUT_S, OPERATION_TIMEOUT_S, REACH_TIMEOUT_S, Array, Call, ReduceOp
from pyccl.core import Core, Measuring, ReduceInfo, StateSync, left_run, still_running, take
from pyccl.guards import Guard
from pyccl.reference import QUANTIZE_BLOCK
from pyccl.state import SharedState

__all__ = ["Communicator", "Work", "connect"]

_COPY_BYTES_MAX: Final = 4 << 20  # what the loop may copy itself

T = TypeVar("T")


def _token() -> trio.lowlevel.TrioToken:
    try:
        return trio.lowlevel.current_trio_token()
    except RuntimeError:
        raise errors.UsageError("pyccl.aio works inside a Trio program only; elsewhere: pyccl.Communicator") from None


class _Ended(Waiter):
    """A Waiter of a Trio task: fulfilled in another thread, it wakes the loop in which it was made."""

    def __init__(self) -> None:
        super().__init__()
        self._token, self._woken = _token(), trio.Event()

    def finish(self, error: BaseException | None = None) -> None:
        super().finish(error)
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._woken.set)

    async def within(self, seconds: float = math.inf) -> bool:
        """Wait so long for it. Whether it is fulfilled."""
        with trio.move_on_after(seconds):
            await self._woken.wait()
        return self.finished

    async def surely(self) -> KeyboardInterrupt | None:
        """Wait until it is fulfilled, whatever comes; returns a Ctrl-C, which no shield keeps from the main task."""
        interrupt: KeyboardInterrupt | None = None
        with trio.CancelScope(shield=True):
            while not self._woken.is_set():
                try:
                    await self._woken.wait()
                except KeyboardInterrupt as e:
                    interrupt = e
        return interrupt

    async def or_given_up(
        self, give_up: Callable[[], None], seconds: float = math.inf
    ) -> trio.Cancelled | KeyboardInterrupt | None:
        """Wait so long for it. Interrupted: give it up, and wait until it has ended all the same; returns by what."""
        try:
            await self.within(seconds)
        except (trio.Cancelled, KeyboardInterrupt) as e:
            give_up()
            return await self.surely() or e
        return None


class Work:
    """As ``pyccl.Work``, with a coroutine to wait with. Any number of tasks may wait for it."""

    def __init__(self, comm: Communicator, session: Session, op: Op, what: str, ended: _Ended) -> None:
        self._comm, self._session, self._op, self._what = comm, session, op, what
        self._ended = ended

    def done(self) -> bool:
        """Whether ``wait`` would return at once."""
        return self._op.done()

    @enable_ki_protection
    async def wait(self, timeout: float | None = None) -> ReduceInfo:
        """As ``pyccl.Work.wait``: a `timeout` that expires aborts nothing. Cancelled, it gives the operation up."""
        self._comm._check_loop()
        seconds = math.inf if timeout is None else max(0.0, timeout)
        with self._session.waiting():
            interrupt = await self._ended.or_given_up(self._give_up, seconds)
        if timeout is not None and not self._ended.finished:
            raise still_running(self._what, timeout)
        info = self._info()
        if interrupt is not None and (info.status != status.OK or isinstance(interrupt, KeyboardInterrupt)):
            raise interrupt
        return await self._comm._concluded(self._session, info, self._what)

    async def _outcome(self) -> ReduceInfo:
        """As ``wait``, but cancelled it gives nothing up: its caller will."""
        with self._session.waiting():
            await self._ended.within()
        return await self._comm._concluded(self._session, self._info(), self._what)

    def _give_up(self) -> None:
        """The operation fails here and on all others, unless this peer has the result; then it is settled at once."""
        if not self.done():
            self._session.cancel_soon(self._op)

    async def _settled(self) -> KeyboardInterrupt | None:
        """After ``_give_up``: until the arrays are the caller's again."""
        interrupt = await self._ended.surely()
        self._info()
        return interrupt

    def _info(self) -> OpInfo:
        return self._op.ended or self._op.finish()

    async def _take(self, out: Array) -> None:
        """The result that an all_gather has kept."""
        if out.nbytes <= _COPY_BYTES_MAX:
            take(self._op, out)
            return
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(take, self._op, out)

    def __del__(self) -> None:
        self._op.abandon()


class Communicator(Core):
    """As ``pyccl.Communicator``, for Trio: see the top of this module for what differs."""

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
        self._token: trio.lowlevel.TrioToken | None = None
        self._sync_lock = trio.Lock()

    # ---- membership --------------------------------------------------------------------------------------------------

    @enable_ki_protection
    async def connect(self, timeout: float = CONNECT_TIMEOUT_S, reach_timeout: float = REACH_TIMEOUT_S) -> None:
        """As ``pyccl.Communicator.connect``. Cancelled, it leaves the run, for which it takes two seconds at most."""
        limit_s, reach_s = calls.seconds("timeout", timeout), calls.seconds("reach_timeout", reach_timeout)
        token = _token()
        if self._joining is not None:
            raise errors.UsageError("another task is in connect() already")
        await checkpoint_if_cancelled()
        session, old = self._begin_session(), self._session
        try:
            if old is not None:
                await self._drop(old)
            joined = _Ended()
            session.launch(joined, reach_s)
            if not await joined.within(limit_s):
                raise errors.DeadlineError(f"not admitted to the run within {limit_s:g} s")
            joined.check()
        except BaseException:
            await self._drop(session)
            raise
        finally:
            self._joining = None
        self._adopt(session)
        self._token, self._sync_lock = token, trio.Lock()

    @enable_ki_protection
    async def close(self) -> None:
        """As ``pyccl.Communicator.close``; takes two seconds at most, also where it is cancelled."""
        _token()
        for session in self._sessions_to_close():
            await self._drop(session)
        await checkpoint()

    aclose = close

    async def _drop(self, session: Session) -> None:
        ended = _Ended()
        session.leave_soon()
        session.watch(ended)
        interrupt = await ended.surely()
        session.close()  # its thread has done all it had to
        self._forget(session)
        if interrupt is not None:
            raise interrupt

    async def __aenter__(self) -> Self:
        if self._session is None:
            await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def are_peers_pending(self, timeout: float = OPERATION_TIMEOUT_S) -> bool:
        """As ``pyccl.Communicator.are_peers_pending``."""
        limit_s = calls.seconds("timeout", timeout)
        session = self._require()
        if session.view.members == (session.peer,):
            await checkpoint()
            self._view = session.view
            return session.pending > 0
        call, counts = calls.are_peers_pending(session.pending, limit_s)
        try:
            await self._run(session, call)
        except errors.AloneError:
            return session.pending > 0  # the others were lost meanwhile
        return bool(counts[0] > 0)

    @enable_ki_protection
    async def update_topology(self, timeout: float = OPERATION_TIMEOUT_S) -> None:
        """As ``pyccl.Communicator.update_topology``. Cancelled, it goes back from the safe point, as on a timeout."""
        limit_s, session = calls.seconds("timeout", timeout), self._require()
        await checkpoint_if_cancelled()
        await self._meet(limit_s, session)

    @enable_ki_protection
    async def optimize_topology(self, timeout: float = OPERATION_TIMEOUT_S) -> None:
        """As ``pyccl.Communicator.optimize_topology``, in a thread until the safe point. Cancelled while it measures,
        it fails on all members; later, it goes back from the safe point."""
        started, limit_s, session = trio.current_time(), calls.seconds("timeout", timeout), self._require()
        await checkpoint_if_cancelled()
        async with self._sync_lock:
            measuring = Measuring(self, session)
            try:
                await _in_thread(lambda: measuring.run(limit_s), measuring.give_up)
            finally:
                self._view = session.view
        await self._meet(max(limit_s - (trio.current_time() - started), 0.001), session)

    @enable_ki_protection
    async def _meet(self, limit_s: float, session: Session) -> None:
        met = _Ended()
        try:
            session.arrive(met, REACH_TIMEOUT_S)
            try:
                await met.within(limit_s)
            except trio.Cancelled:
                if not met.finished:
                    raise
            if not met.finished:
                raise errors.DeadlineError(f"the members did not meet at the safe point within {limit_s:g} s")
            met.check()
        except BaseException:
            session.withdraw(met)
            raise
        finally:
            self._view = session.view

    # ---- collectives -------------------------------------------------------------------------------------------------

    async def all_reduce(
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
        """As ``pyccl.Communicator.all_reduce``."""
        session = self._require()
        call = calls.all_reduce(x, op, out, tag, quantize, algorithm, weight, retry, timeout, quantize_block, guard)
        return await self._run(session, call)

    @enable_ki_protection
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
        """As ``pyccl.Communicator.all_reduce_async``: no coroutine, and no checkpoint."""
        session = self._require()
        call = calls.all_reduce(x, op, out, tag, quantize, algorithm, weight, retry, timeout, quantize_block, guard)
        return self._start(session, call)

    async def broadcast(
        self, x: Any, root: str, *, tag: int = 0, retry: bool = True, timeout: float = OPERATION_TIMEOUT_S
    ) -> ReduceInfo:
        """As ``pyccl.Communicator.broadcast``."""
        session = self._require()
        return await self._run(session, calls.broadcast(self._id, x, root, tag, retry, timeout))

    @enable_ki_protection
    async def all_gather(
        self, x: Any, *, tag: int = 0, retry: bool = True, timeout: float = OPERATION_TIMEOUT_S
    ) -> Array:
        """As ``pyccl.Communicator.all_gather``."""
        session = self._require()
        call, gathered = calls.all_gather(x, tag, retry, timeout)
        await checkpoint_if_cancelled()
        work = self._start(session, call)
        info = await work.wait()
        out = gathered.empty(info.world_size)
        await work._take(out)
        return out

    @enable_ki_protection
    async def reduce_scatter(
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
        """As ``pyccl.Communicator.reduce_scatter``."""
        session = self._require()
        call, scattered = calls.reduce_scatter(
            x, op, tag, quantize, algorithm, weight, retry, timeout, quantize_block, guard
        )
        await checkpoint_if_cancelled()
        work = self._start(session, call)
        info = await work.wait()
        out = scattered.empty(info.members.index(self.peer_id), info.world_size)
        await work._take(out)
        return out

    @enable_ki_protection
    async def all_reduce_many(
        self,
        arrays: Sequence[Any],
        op: ReduceOp | str = ReduceOp.SUM,
        *,
        max_in_flight: int = 8,
        tag: int = 0,
        **options: Any,
    ) -> list[ReduceInfo]:
        """As ``pyccl.Communicator.all_reduce_many``.

        Cancelled, it gives up all that are in flight and raises Cancelled when they have ended; those that could not
        be given up any more are reduced.
        """
        calls.check_many(max_in_flight, options)
        infos: list[ReduceInfo] = []
        works: deque[Work] = deque()
        try:
            for x in arrays:
                if len(works) == max_in_flight:
                    infos.append(await works[0]._outcome())
                    works.popleft()
                await checkpoint_if_cancelled()
                works.append(self.all_reduce_async(x, op, tag=tag, **options))
            while works:
                infos.append(await works[0]._outcome())
                works.popleft()
        except BaseException:
            for work in works:
                work._give_up()
            interrupts = [await work._settled() for work in works]  # the caller's arrays again, whatever becomes of it
            for interrupt in filter(None, interrupts):
                raise interrupt from None
            raise
        return infos

    async def exchange(
        self, x: Any, *, partner: str, out: Any = None, tag: int = 0, timeout: float = OPERATION_TIMEOUT_S
    ) -> ReduceInfo:
        """As ``pyccl.Communicator.exchange``. Cancelled, it fails for the partner too."""
        session = self._require()
        call = calls.exchange(self._id, x, out, partner, tag, timeout)
        self._check_partner(session, partner)
        return self._of_pair(await self._run(session, call), partner)

    async def barrier(self, *, tag: int = 0, timeout: float = OPERATION_TIMEOUT_S) -> ReduceInfo:
        """As ``pyccl.Communicator.barrier``."""
        session = self._require()
        return await self._run(session, calls.barrier(tag, timeout))

    @enable_ki_protection
    async def sync_shared_state(
        self, state: SharedState, strategy: str = "enforce_popular", *, timeout: float = OPERATION_TIMEOUT_S
    ) -> SyncInfo:
        """As ``pyccl.Communicator.sync_shared_state``. Cancelled, it fails on all members, unless all have the state.

        The one call that uses a thread, to hash and to copy.
        """
        chosen = calls.sync_shared_state(state, strategy)
        limit_s, session = calls.seconds("timeout", timeout), self._require()
        async with self._sync_lock:
            sync = StateSync(self, session)
            try:
                return await _in_thread(lambda: sync.run(state, chosen, limit_s), sync.give_up)
            finally:
                self._view = session.view

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _require(self) -> Session:
        _token()
        session = super()._require()
        self._check_loop()
        return session

    def _check_loop(self) -> None:
        self._check_process()
        if _token() is not self._token:
            raise errors.UsageError("this communicator belongs to the Trio run that connected it")

    def _start(self, session: Session, call: Call) -> Work:
        ended = _Ended()
        number = session.watch(ended)
        try:
            op = self._submit(session, call, [], number)
        except BaseException:
            session.unwatch(number)
            raise
        return Work(self, session, op, call.what, ended)

    @enable_ki_protection
    async def _run(self, session: Session, call: Call) -> ReduceInfo:
        await checkpoint_if_cancelled()
        return await self._start(session, call).wait()

    async def _concluded(self, session: Session, info: OpInfo, what: str) -> ReduceInfo:
        if left_run(info) and session.error is None:  # why is on its way
            over = _Ended()
            session.watch(over)
            await over.surely()
        return self._conclude(session, info, what)


@asynccontextmanager
async def connect(
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
) -> AsyncIterator[Communicator]:
    """Make a Communicator, connect it, and close it in the end: ``async with pyccl.aio.connect(address) as comm``."""
    comm = Communicator(
        address, group=group, connections=connections, max_upload=max_upload, max_download=max_download,
        listen=listen, advertise=advertise, relay=relay,
    )  # fmt: skip
    await comm.connect(timeout, reach_timeout)
    async with comm:
        yield comm


async def _in_thread(run: Callable[[], T], give_up: Callable[[], None]) -> T:
    """Run it in a thread. Interrupted: give it up and wait for its end; a result that it had all the same stands."""
    ended = _Ended()
    results: list[T] = []

    def work() -> None:
        error: BaseException | None = None
        try:
            results.append(run())
        except BaseException as e:  # noqa: BLE001  it is raised where it is waited for
            error = e
        ended.finish(error)

    threading.Thread(target=work, name="pyccl-sync", daemon=True).start()
    interrupt = await ended.or_given_up(give_up)
    if interrupt is not None and (not results or isinstance(interrupt, KeyboardInterrupt)):
        raise interrupt
    ended.check()
    return results[0]
