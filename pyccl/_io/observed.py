"""A member's side of observers: it gives them snapshots of the state, and asks them for theirs when nobody votes.

A snapshot is a copy of the state in a nameless file (where staged state goes, too), made after a committed sync in the
caller's thread, before the caller may change the arrays, and only if an observer that follows this member wants that
revision. At most one is kept, and those that are being sent.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

import trio

from pyccl import errors
from pyccl._io import staging, statestream
from pyccl._io.sealed import Channel, socket_of
from pyccl._io.statestream import OpenFile, Snapshot, StateServer
from pyccl._proto import restoring
from pyccl._proto.epoch import Member
from pyccl._proto.messages import StateHello, StateOffer
from pyccl.state import SharedState

if TYPE_CHECKING:
    from pyccl._io.session import Session, Waiter

OFFER_S: Final = 5.0  # how long an observer is waited for
_LOOK_S: Final = 0.1  # between two looks at whether the sync was given up
FAILURES: Final = (OSError, trio.TooSlowError, trio.BrokenResourceError, errors.RemoteProtocolError)

log = logging.getLogger("pyccl.observed")


class Observed:
    """Of one session."""

    def __init__(self, session: Session, peer: bytes, incarnation: bytes) -> None:
        self._session = session
        self.observers: tuple[Member, ...] = ()
        self._server = StateServer(self._run, peer, incarnation, drops=True, credentials=session.config.credentials)

    def _run(self) -> bytes | None:
        place = self._session.place()
        return None if place is None else place[0]

    # ---- in the Trio thread

    def know(self, observers: Iterable[Member]) -> None:
        self.observers = tuple(observers)
        self._server.know(self.observers)

    def enter(self, epoch: int) -> None:
        self._server.enter(epoch)

    async def serve(self, stream: trio.SocketStream, hello: StateHello) -> None:
        with contextlib.suppress(trio.TooSlowError):
            await self._server.serve(stream, hello)

    # ---- in the thread of a sync

    def publish(self, state: SharedState) -> None:
        """The state is what all members hold now. An observer that gets nothing fails no sync."""
        if not self._server.wants(state.revision):
            return
        try:
            with tempfile.TemporaryFile(dir=staging.directory(), prefix="pyccl-", buffering=0) as file:
                state.save_to(file.fileno())
                snapshot = Snapshot(os.dup(file.fileno()), state.revision, state.layout())
        except (OSError, errors.UsageError) as e:
            log.warning("snapshot_failed revision=%d cause=%s", state.revision, e)
            return
        self._session.soon(lambda: self._server.offer(snapshot))

    def best_offer(self, state: SharedState, deadline: float, waiter: Waiter) -> Offer | None:
        """The newest state of this layout that an observer has. The caller closes it. session's errors."""
        offers: list[Offer] = []
        chosen, lock = False, threading.Lock()
        layout = state.layout()

        async def ask_all() -> None:
            with trio.move_on_after(OFFER_S):
                async with trio.open_nursery() as nursery:
                    for observer in self.observers:
                        nursery.start_soon(ask, observer)
            waiter.finish()

        async def ask(observer: Member) -> None:
            offer = Offer(self._session, observer)
            told: StateOffer | None = None
            try:
                told = await offer.open()
                if told is not None and told.layout != layout:
                    log.warning("observer_of_another_layout peer=%s revision=%d", offer.name, told.revision)
                    told = None
            except FAILURES as e:
                log.warning("observer_not_reached peer=%s cause=%r", offer.name, e)
            finally:
                with lock:
                    late = chosen
                    if told is not None and not late:
                        offers.append(offer)
                if told is None or late:
                    await offer.aclose()

        best: Offer | None = None
        try:
            self._session.start_soon(ask_all, waiter)
            waiter.wait(max(0.0, min(deadline - time.monotonic(), OFFER_S + 1.0)))
            best = restoring.best(offers)
            return best
        finally:
            with lock:
                chosen = True  # one that comes after all is nobody's
            for offer in offers:
                if offer is not best:
                    offer.close()


class Offer:
    """An observer's state, offered on an open connection."""

    def __init__(self, session: Session, observer: Member) -> None:
        self._session, self._observer = session, observer
        self._stream: Channel | None = None
        self._told: StateOffer | None = None
        self.rx_bytes = 0  # of its state, when that is here

    @property
    def name(self) -> str:
        return self._observer.peer.hex()[:8]

    @property
    def revision(self) -> int:
        assert self._told is not None
        return self._told.revision

    async def open(self) -> StateOffer | None:
        place = self._session.place()
        assert place is not None  # we are a member
        self._stream = await statestream.ask(*place, self._observer, credentials=self._session.config.credentials)
        self._told = await statestream.next_offer(self._stream, OFFER_S)
        return self._told

    async def aclose(self) -> None:
        if self._stream is not None:
            await trio.aclose_forcefully(self._stream)

    def close(self) -> None:
        """From another thread."""
        if self._stream is None:
            return
        sock = socket_of(self._stream).socket
        if not self._session.soon(sock.close):
            os.close(sock.detach())

    def load(self, state: SharedState, deadline: float, waiter: Waiter, check: Callable[[], None]) -> None:
        """Fetch it, check it whole, and only then fill the arrays. OSError, StateFileError, RemoteProtocolError..."""
        scope = trio.CancelScope()
        with tempfile.TemporaryFile(dir=staging.directory(), prefix="pyccl-", buffering=0) as nameless:
            file = OpenFile(os.dup(nameless.fileno()))

        async def fetch() -> None:
            error: BaseException | None = None
            try:
                assert self._stream is not None and self._told is not None
                with scope:
                    await statestream.receive_file(self._stream, self._told, file.fd)
                    self.rx_bytes = self._told.size_bytes
            except FAILURES as e:
                error = e
            finally:
                waiter.finish(error)

        self._session.start_soon(fetch, waiter)
        try:
            while not waiter.wait(_LOOK_S):
                check()
                if time.monotonic() >= deadline:
                    raise errors.DeadlineError("the state did not come in time")
        except BaseException:
            self._session.soon(scope.cancel)
            raise
        state.load_shared(f"/proc/self/fd/{file.fd}")
