"""What becomes of the connections to observers whose offers a member does not take. Real sockets, a session of ours."""

from __future__ import annotations

import gc
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import trio
from listeners import SEEN

import pyccl
from pyccl._io import envelope
from pyccl._io.observed import Observed
from pyccl._io.session import Waiter
from pyccl._proto import limits
from pyccl._proto.epoch import Address, Member
from pyccl._proto.messages import StateOffer

ME = Member(b"m" * 16, b"i" * 16, (), SEEN)
PATIENCE_S = 60.0


class FakeSession:
    """A Trio thread, with observers in it that offer the revisions of ``serve`` and wait for the end."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(credentials=None)
        self._started, self._over = threading.Event(), trio.Event()
        self.ended: dict[int, threading.Event] = {}
        self._thread = threading.Thread(target=trio.run, args=[self._main])
        self._thread.start()
        assert self._started.wait(PATIENCE_S)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as self._nursery:
            self._started.set()
            await self._over.wait()
            self._nursery.cancel_scope.cancel()

    def stop(self) -> None:
        self._token.run_sync_soon(self._over.set)
        self._thread.join()

    def serve(self, revision: int, layout: bytes, let: threading.Event | None = None) -> Member:
        """An observer that offers when it is let."""
        self.ended[revision] = threading.Event()

        async def serve_one(stream: trio.SocketStream) -> None:
            await envelope.receive(stream, limits.BODY_GREETING_MAX_BYTES)
            if let is not None:
                await trio.to_thread.run_sync(let.wait)
            await stream.send_all(envelope.pack(StateOffer(revision, 1000, layout)))
            assert await stream.receive_some(1) == b""
            self.ended[revision].set()

        async def start() -> int:
            (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
            self._nursery.start_soon(trio.serve_listeners, serve_one, [listener])
            return int(listener.socket.getsockname()[1])

        port = trio.from_thread.run(start, trio_token=self._token)
        return Member(bytes([revision]) * 16, b"i" * 16, (Address("127.0.0.1", port),), SEEN)

    def place(self) -> tuple[bytes, Member]:
        return b"R" * 16, ME

    def start_soon(self, task: Callable[[], Awaitable[None]], waiter: Waiter) -> None:
        self._token.run_sync_soon(self._nursery.start_soon, task)

    def soon(self, call: Callable[[], None]) -> bool:
        self._token.run_sync_soon(call)
        return True


@pytest.fixture
def session() -> Iterator[FakeSession]:
    session = FakeSession()
    yield session
    session.stop()


@pytest.fixture
def no_leak() -> Iterator[None]:
    """Sockets that nobody closed would warn when they are freed."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", ResourceWarning)
        yield
        gc.collect()
    assert [str(warning.message) for warning in warned] == []


@pytest.mark.usefixtures("no_leak")
def test_all_offers_but_the_best_are_closed_at_once(session: FakeSession) -> None:
    state = pyccl.SharedState({"w": np.zeros(3, np.float32)})
    observed = Observed(session, ME.peer, ME.incarnation)  # type: ignore[arg-type]
    observed.observers = tuple(session.serve(revision, state.layout()) for revision in (1, 7, 3))
    best = observed.best_offer(state, time.monotonic() + PATIENCE_S, Waiter())
    assert best is not None and best.revision == 7
    assert session.ended[1].wait(PATIENCE_S) and session.ended[3].wait(PATIENCE_S)
    assert not session.ended[7].is_set()
    best.close()
    assert session.ended[7].wait(PATIENCE_S)


@pytest.mark.usefixtures("no_leak")
def test_an_offer_that_comes_too_late_is_closed(session: FakeSession) -> None:
    state = pyccl.SharedState({"w": np.zeros(3, np.float32)})
    observed = Observed(session, ME.peer, ME.incarnation)  # type: ignore[arg-type]
    let = threading.Event()
    observed.observers = (session.serve(5, state.layout(), let),)
    assert observed.best_offer(state, time.monotonic(), Waiter()) is None
    let.set()
    assert session.ended[5].wait(PATIENCE_S)


@pytest.mark.usefixtures("no_leak")
def test_who_is_interrupted_while_it_waits_leaves_nothing_open(session: FakeSession) -> None:
    class Interrupted(Waiter):
        def wait(self, timeout: float) -> bool:
            assert super().wait(PATIENCE_S)
            raise KeyboardInterrupt

    state = pyccl.SharedState({"w": np.zeros(3, np.float32)})
    observed = Observed(session, ME.peer, ME.incarnation)  # type: ignore[arg-type]
    observed.observers = (session.serve(5, state.layout()),)
    with pytest.raises(KeyboardInterrupt):
        observed.best_offer(state, time.monotonic() + PATIENCE_S, Interrupted())
    assert session.ended[5].wait(PATIENCE_S)
