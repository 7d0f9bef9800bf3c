"""Trio members in the process of the test, beside agents that use the blocking API in processes of their own."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final, TypeVar

import numpy as np
import pytest
import trio
from cluster import DEADLINE_S, Call, Cluster, Peer
from hooks import sent_bytes
from oracle import draw, sha

from pyccl import aio
from pyccl._io.session import Session

OPEN_BYTES: Final = 64 + 40
FRAME_BYTES: Final = 64
T = TypeVar("T")


def trio_test(test: Callable[..., Awaitable[None]]) -> Any:
    """A test that is a coroutine; it fails instead of hanging."""

    @functools.wraps(test)
    async def guarded(**fixtures: Any) -> None:
        with trio.fail_after(2 * DEADLINE_S):
            await test(**fixtures)

    return pytest.mark.trio(guarded)


@dataclasses.dataclass(eq=False)
class Local:
    """A member of this process, with what Cluster asks of a peer."""

    comm: aio.Communicator
    index: int

    @property
    def id(self) -> str:
        return self.comm.peer_id

    def draw(self, seed: int, count: int, dtype: str = "float32") -> np.ndarray[Any, Any]:
        return draw(seed, self.index, count, dtype)

    @property
    def session(self) -> Session:
        assert self.comm._session is not None
        return self.comm._session

    def submits(self, tag: int = 0) -> int:
        """Operations of this tag since numbers restarted."""
        assert self.session.engine is not None
        return sum(count for space, of, count in self.session.engine.counts() if (space, of) == (0, tag))

    def submits_inside(self, tag: int) -> int:
        """Of the library's own operations."""
        return sum(count for space, of, count in self.session.engine.counts() if (space, of) == (1, tag))

    async def submitted(self, count: int, tag: int = 0) -> None:
        await until(lambda: self.submits(tag) >= count)


async def until(reached: Callable[[], bool]) -> None:
    """What happens in another thread or process, and tells nobody."""
    end = time.monotonic() + DEADLINE_S
    while not reached():
        assert time.monotonic() < end, "it never came to that"
        await trio.sleep(0.002)


async def turns(count: int = 20) -> None:
    """So many rounds of the loop."""
    for _ in range(count):
        await trio.lowlevel.checkpoint()


async def value(call: Call) -> Any:
    return await trio.to_thread.run_sync(call.value)


async def error(call: Call, *classes: str) -> dict[str, Any]:
    return await trio.to_thread.run_sync(lambda: call.error(*classes))


async def event(peer: Peer, name: str) -> None:
    await trio.to_thread.run_sync(peer.wait_event, name)


def told(info: Any, x: np.ndarray[Any, Any]) -> dict[str, Any]:
    """The outcome of an all_reduce here, as an agent tells it."""
    fields = {name: getattr(info, name) for name in info.__slots__}
    return {"sha": sha(x), "kept": True, "info": {**fields, "members": list(info.members)}}


def add(cluster: Cluster, comm: aio.Communicator) -> Local:
    local = Local(comm, len(cluster.peers))
    peers: list[Any] = cluster.peers
    peers.append(local)
    return local


@asynccontextmanager
async def mixed(cluster: Cluster, agents: int = 1, **settings: Any) -> AsyncIterator[tuple[Local, list[Peer]]]:
    """One member here, which founds the group, and so many agents with these settings."""
    others = cluster.spawn(agents)
    cluster.make(others, **settings)
    comm = aio.Communicator(cluster.master.address)
    comm._config = dataclasses.replace(comm._config, **cluster.settings)
    async with comm:
        local = add(cluster, comm)
        await admit(local, others)
        yield local, others


async def admit(local: Local, others: list[Peer]) -> None:
    joins = [peer.call("connect") for peer in others]
    await until(lambda: local.session.pending == len(others))
    await local.comm.update_topology()
    for join in joins:
        await value(join)


@asynccontextmanager
async def here(cluster: Cluster, count: int = 2) -> AsyncIterator[list[Local]]:
    """So many members, all of them in this loop."""
    cluster.spawn(0)
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(aio.connect(cluster.master.address, timeout=DEADLINE_S))
        locals_ = [add(cluster, first)]
        for _ in range(count - 1):
            comm = aio.Communicator(cluster.master.address)
            stack.push_async_callback(comm.close)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(comm.connect)
                await until(lambda: locals_[0].session.pending == 1)
                for local in locals_:
                    nursery.start_soon(local.comm.update_topology)
            locals_.append(add(cluster, comm))
        yield locals_


async def together(*calls: Callable[[], Awaitable[T]]) -> list[T]:
    """Run all at once; their results in order."""
    results: dict[int, T] = {}

    async def run(index: int, call: Callable[[], Awaitable[T]]) -> None:
        results[index] = await call()

    async with trio.open_nursery() as nursery:
        for index, call in enumerate(calls):
            nursery.start_soon(run, index, call)
    return [results[index] for index in range(len(calls))]


class Task:
    """A call in a task of its own, with the scope that cancels it."""

    def __init__(self, nursery: trio.Nursery, call: Callable[[], Awaitable[Any]]) -> None:
        self.scope, self.ended = trio.CancelScope(), trio.Event()
        self.result: Any = None
        self.error: BaseException | None = None
        self._call = call
        nursery.start_soon(self._run)

    async def _run(self) -> None:
        with self.scope:
            try:
                self.result = await self._call()
            except Exception as e:  # noqa: BLE001  the test looks at it
                self.error = e
            await trio.lowlevel.checkpoint()
        self.ended.set()

    @property
    def returned(self) -> bool:
        return self.result is not None

    @property
    def cancelled(self) -> bool:
        """Cancelled was raised by the call, or at the checkpoint behind it."""
        return self.scope.cancelled_caught

    async def cancel(self) -> None:
        self.scope.cancel()
        await self.ended.wait()


async def reduce_all(cluster: Cluster, local: Local, others: list[Peer], count: int = 1000) -> None:
    """All of them can go on: one all-reduce, checked."""
    seed = cluster.rng.getrandbits(32)
    calls = [peer.call("all_reduce", seed=seed, count=count) for peer in others]
    x = local.draw(seed, count)
    info = await local.comm.all_reduce(x)
    values = [told(info, x), *[await value(call) for call in calls]]
    assert cluster.check(values, seed, count)["world_size"] == 1 + len(others)


async def stopped_before_done(local: Local, other: Peer, seed: int, count: int) -> Call:
    """The other has sent its part of an all_reduce of two and stands still: it can't answer with DONE."""
    other.ask("hook", phase="data", action="tell", bytes=OPEN_BYTES + FRAME_BYTES + 4 * count)
    call = other.call("all_reduce", seed=seed, count=count)
    await event(other, "hook")
    other.stop()
    return call


async def prepared(local: Local, count: int, sent: int) -> None:
    """Until it has said DONE in an all_reduce of two that was submitted when `sent` bytes had left."""
    wanted = OPEN_BYTES + FRAME_BYTES + 4 * count + FRAME_BYTES
    await until(lambda: sent_bytes(local.session) - sent >= wanted)
