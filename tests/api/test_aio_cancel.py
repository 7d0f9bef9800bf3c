"""pyccl.aio under cancellation and Ctrl-C: no operation is left half done, at whatever phase it is interrupted.

Before DONE: input restored here, PeerLostError for the others. After DONE: settled first, and a result stands.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import trio
from aio_side import (
    Local,
    Task,
    error,
    event,
    here,
    mixed,
    prepared,
    reduce_all,
    stopped_before_done,
    together,
    told,
    trio_test,
    turns,
    until,
    value,
)
from cluster import DEADLINE_S, Call, Cluster, Peer
from hooks import sent_bytes
from oracle import draw, sha

import pyccl
from pyccl import aio

LARGE = 4_000_000  # float32 elements, sixteen pieces
NEVER_SILENT_S = 30.0  # a peer_timeout that does not pass while a peer is stopped


def nothing_is_left(local: Local) -> None:
    assert local.session.engine is not None
    assert not local.session.engine._ops and not local.session._watched and not local.session.blocked


@trio_test
async def test_cancelled_before_it_began_nothing_was_submitted(cluster: Cluster) -> None:
    async with mixed(cluster) as (local, [other]):
        comm, x = local.comm, local.draw(1, 100)
        before, counts = x.copy(), local.session.engine.counts()
        state = pyccl.SharedState({"w": x})
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: comm.all_reduce(x),
            lambda: comm.all_reduce_many([x, before]),
            lambda: comm.broadcast(x, comm.peer_id),
            lambda: comm.all_gather(x),
            lambda: comm.reduce_scatter(x),
            lambda: comm.sync_shared_state(state),
            lambda: aio.Communicator(cluster.master.address).connect(),
            comm.barrier,
            comm.are_peers_pending,
            comm.update_topology,
        ]
        for call in calls:
            with trio.CancelScope() as scope:
                scope.cancel()
                await call()
            assert scope.cancelled_caught
        assert local.session.engine.counts() == counts and local.session._topology is None
        assert np.array_equal(x, before)
        nothing_is_left(local)
        await reduce_all(cluster, local, [other])


@pytest.mark.parametrize("how", ["scope", "fail_after", "move_on_after", "handle", "sibling"])
@trio_test
async def test_cancelled_while_the_others_are_elsewhere(cluster: Cluster, how: str) -> None:
    async with mixed(cluster, agents=2) as (local, [early, late]):
        x = local.draw(1, 1000)
        before = x.copy()
        waiting = early.call("all_reduce", seed=1, count=1000)
        if how == "fail_after":
            with pytest.raises(trio.TooSlowError), trio.fail_after(0.2):
                await local.comm.all_reduce(x)
        elif how == "move_on_after":
            with trio.move_on_after(0.2) as scope:
                await local.comm.all_reduce(x)
            assert scope.cancelled_caught
        elif how == "sibling":
            failed = False
            try:
                await _with_a_failing_sibling(local, x)
            except* ZeroDivisionError:  # and nothing else
                failed = True
            assert failed
        else:
            async with trio.open_nursery() as nursery:
                handle = local.comm.all_reduce_async(x, timeout=DEADLINE_S) if how == "handle" else None
                task = Task(nursery, handle.wait if handle else lambda: local.comm.all_reduce(x, timeout=DEADLINE_S))
                await local.submitted(1)
                await task.cancel()
            assert task.cancelled and not task.returned and task.error is None
        assert np.array_equal(x, before)
        nothing_is_left(local)
        assert (await error(waiting, "PeerLostError"))["restored"]
        assert (await error(late.call("all_reduce", seed=1, count=1000), "PeerLostError"))["restored"]
        await reduce_all(cluster, local, [early, late])


@pytest.mark.parametrize("canceller", ["first", "second"])
@trio_test
async def test_an_exchange_cancelled_on_one_side_fails_on_the_other_and_holds_up_nobody(
    make_cluster: Callable[..., Cluster], canceller: str
) -> None:
    """first: it waits for the partner. second: the partner is stopped half-way through its data."""
    cluster = make_cluster(peer_timeout=NEVER_SILENT_S)
    async with mixed(cluster, agents=2, max_upload="200mbit") as (local, [other, beside]):  # it is not done by then
        count = 1000 if canceller == "first" else LARGE
        x = local.draw(1, count)
        before = x.copy()
        if canceller == "second":
            other.ask("hook", phase="data", action="tell", bytes=1_000_000)
        waiting = other.call("exchange", partner=local.id, seed=1, count=count) if canceller == "second" else None
        async with trio.open_nursery() as nursery:
            task = Task(nursery, lambda: local.comm.exchange(x, partner=other.id, tag=0, timeout=DEADLINE_S))
            if canceller == "second":
                await event(other, "hook")
                other.stop()
            await until(lambda: any(space == 2 for space, _, _ in local.session.engine.counts()))
            await task.cancel()
        assert task.cancelled and not task.returned and task.error is None
        assert np.array_equal(x, before)
        nothing_is_left(local)
        if canceller == "second":
            other.resume()
        waiting = waiting or other.call("exchange", partner=local.id, seed=1, count=count)
        assert (await error(waiting, "PeerLostError"))["restored"]
        again = other.call("exchange", partner=local.id, seed=1, count=count)
        await local.comm.exchange(x, partner=other.id)
        assert (await value(again))["sha"] == sha(before)
        assert sha(x) == sha(draw(1, other.index, count, "float32"))
        await reduce_all(cluster, local, [other, beside])


async def _with_a_failing_sibling(local: Local, x: np.ndarray[Any, Any]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(local.comm.all_reduce, x)
        await local.submitted(1)
        raise ZeroDivisionError


@trio_test
async def test_cancelled_while_data_flow(make_cluster: Callable[..., Cluster]) -> None:
    """Part of the other's vector is here, part of ours is there, and results overwrite the input meanwhile."""
    cluster = make_cluster(peer_timeout=NEVER_SILENT_S)
    async with mixed(cluster) as (local, [other]):
        other.ask("hook", phase="data", action="tell", bytes=800_000)  # of the four pieces that go ahead of ours
        theirs = other.call("all_reduce", seed=1, count=LARGE)
        await event(other, "hook")
        other.stop()
        x = local.draw(1, LARGE)
        before, sent = x.copy(), sent_bytes(local.session)
        async with trio.open_nursery() as nursery:
            task = Task(nursery, lambda: local.comm.all_reduce(x))
            await until(lambda: sent_bytes(local.session) - sent > 10_000)
            assert not task.ended.is_set()
            await task.cancel()
        assert task.cancelled and not task.returned
        assert np.array_equal(x, before)
        nothing_is_left(local)
        other.resume()
        assert (await error(theirs, "PeerLostError"))["restored"]
        await reduce_all(cluster, local, [other], LARGE)


@pytest.mark.parametrize("master", ["there", "gone"])
@trio_test
async def test_cancelled_after_done_it_waits_for_the_outcome(make_cluster: Callable[..., Cluster], master: str) -> None:
    """Without a master the other is asked, and has committed. With one there is a ballot as well: the other may be
    asked for its report before it has read our DONE. Then it is not committed, on neither side."""
    cluster = make_cluster(peer_timeout=NEVER_SILENT_S)
    async with mixed(cluster) as (local, [other]):
        theirs = await stopped_before_done(local, other, seed=5, count=1000)
        if master == "gone":
            cluster.master.kill()
        x, sent = local.draw(5, 1000), sent_bytes(local.session)
        before = x.copy()
        async with trio.open_nursery() as nursery:
            task = Task(nursery, lambda: local.comm.all_reduce(x))
            await prepared(local, 1000, sent)
            task.scope.cancel()
            await turns()
            assert not task.ended.is_set()  # it can neither give it up nor leave while the outcome is open
            other.resume()
        assert task.cancelled and task.error is None
        if task.returned or master == "gone":  # the info, and Cancelled at the checkpoint behind the call
            cluster.check([told(task.result, x), await value(theirs)], 5, 1000)
        else:
            assert np.array_equal(x, before)
            assert (await error(theirs, "DeadlineError"))["restored"]
        nothing_is_left(local)
        await reduce_all(cluster, local, [other])


@trio_test
async def test_cancelled_after_done_and_then_the_other_dies(make_cluster: Callable[..., Cluster]) -> None:
    """The survivors, of which there is one, all hold the result: it is committed."""
    cluster = make_cluster(peer_timeout=NEVER_SILENT_S)
    async with mixed(cluster) as (local, [other]):
        await stopped_before_done(local, other, seed=5, count=1000)
        x, sent = local.draw(5, 1000), sent_bytes(local.session)
        async with trio.open_nursery() as nursery:
            task = Task(nursery, lambda: local.comm.all_reduce(x))
            await prepared(local, 1000, sent)
            task.scope.cancel()
            await turns()
            assert not task.ended.is_set()
            await trio.to_thread.run_sync(other.kill)
        assert task.returned and task.cancelled
        cluster.check([told(task.result, x)], 5, 1000)


@trio_test
async def test_cancelled_after_done_and_the_outcome_is_never_learned(cluster: Cluster) -> None:
    """Nobody answers: this peer leaves the run, and whoever calls next is told why."""
    async with mixed(cluster) as (local, [other]):
        await stopped_before_done(local, other, seed=5, count=1000)
        cluster.master.kill()
        x, sent = local.draw(5, 1000), sent_bytes(local.session)
        before = x.copy()
        async with trio.open_nursery() as nursery:
            task = Task(nursery, lambda: local.comm.all_reduce(x))
            await prepared(local, 1000, sent)
            await task.cancel()
        assert task.cancelled and not task.returned and task.error is None
        assert np.array_equal(x, before)
        with pytest.raises(pyccl.OutcomeUnknownError):
            await local.comm.barrier()


@trio_test
async def test_a_cancelled_task_does_not_disturb_others(cluster: Cluster) -> None:
    async with mixed(cluster) as (local, [other]):
        xs = [local.draw(tag, 20_000) for tag in range(10)]
        before = [x.copy() for x in xs]
        async with trio.open_nursery() as nursery:
            tasks = [Task(nursery, lambda tag=tag: local.comm.all_reduce(xs[tag], tag=tag)) for tag in range(10)]
            await local.submitted(1, tag=9)
            for task in tasks[::2]:
                await task.cancel()
            assert not any(task.ended.is_set() for task in tasks[1::2])
            calls = [
                other.call("all_reduce", thread=str(tag), seed=tag, count=20_000, tag=tag) for tag in range(10)
            ]
        for tag in range(10):
            if tag % 2 == 0:
                assert tasks[tag].cancelled and np.array_equal(xs[tag], before[tag])
                assert (await error(calls[tag], "PeerLostError"))["restored"]
            else:
                cluster.check([told(tasks[tag].result, xs[tag]), await value(calls[tag])], tag, 20_000)
        nothing_is_left(local)
        await reduce_all(cluster, local, [other])


@trio_test
async def test_all_reduce_many_gives_up_all_that_are_in_flight(cluster: Cluster) -> None:
    async with mixed(cluster) as (local, [other]):
        xs = [local.draw(tag, 500) for tag in range(8)]
        before = [x.copy() for x in xs]
        calls = [other.call("all_reduce", seed=seed, count=500) for seed in range(2)]
        async with trio.open_nursery() as nursery:
            task = Task(nursery, lambda: local.comm.all_reduce_many(xs, max_in_flight=3, timeout=DEADLINE_S))
            done = [await value(call) for call in calls]
            await local.submitted(5)  # two are done, three in flight
            await task.cancel()
        assert task.cancelled and not task.returned
        for seed in range(2):
            assert done[seed]["sha"] == told(_nobody(), xs[seed])["sha"] and not np.array_equal(xs[seed], before[seed])
        assert all(map(np.array_equal, xs[2:], before[2:]))
        nothing_is_left(local)
        for seed in range(2, 5):
            await error(other.call("all_reduce", seed=seed, count=500), "PeerLostError")
        await reduce_all(cluster, local, [other])  # the sixth number: nothing more was submitted


def _nobody() -> pyccl.ReduceInfo:
    return pyccl.ReduceInfo(0, (), 0, 0, "", 0, 0, 0.0)


@trio_test
async def test_a_cancelled_all_gather_reduce_scatter_broadcast_and_barrier(cluster: Cluster) -> None:
    async with here(cluster) as (a, b):
        x = a.draw(1, 1000)
        for call in (
            lambda local: local.comm.all_gather(x, tag=7),
            lambda local: local.comm.reduce_scatter(x, tag=7),
            lambda local: local.comm.broadcast(x.copy(), b.id, tag=7),
            lambda local: local.comm.barrier(tag=7),
        ):
            async with trio.open_nursery() as nursery:
                task = Task(nursery, lambda call=call: call(a))
                await a.submitted(b.submits(7) + 1, tag=7)
                await task.cancel()
            assert task.cancelled and not task.returned
            with pytest.raises(pyccl.PeerLostError):
                await call(b)
            await together(lambda call=call: call(a), lambda call=call: call(b))
            nothing_is_left(a)


@trio_test
async def test_update_topology_cancelled_goes_back_from_the_safe_point(cluster: Cluster) -> None:
    async with mixed(cluster) as (local, [other]):
        epoch = local.comm.epoch
        async with trio.open_nursery() as nursery:
            task = Task(nursery, local.comm.update_topology)
            await until(lambda: local.session._topology is not None)
            await task.cancel()
        assert task.cancelled
        await reduce_all(cluster, local, [other])  # nobody is at a safe point
        met = other.call("update_topology")
        await local.comm.update_topology()
        await value(met)
        assert local.comm.epoch == epoch + 1
        await reduce_all(cluster, local, [other])


@trio_test
async def test_connect_cancelled_leaves_nothing(cluster: Cluster) -> None:
    async with here(cluster, 1) as (member,):
        threads, fds = _threads(), _fds()
        comm = aio.Communicator(cluster.master.address)
        async with trio.open_nursery() as nursery:
            task = Task(nursery, comm.connect)
            await until(lambda: member.session.pending == 1)
            await task.cancel()
        assert task.cancelled and (_threads(), _fds()) == (threads, fds)
        await until(lambda: member.session.pending == 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(comm.connect)
            await until(lambda: member.session.pending == 1)
            await member.comm.update_topology()
        await together(comm.barrier, member.comm.barrier)
        with trio.CancelScope() as scope:  # close is complete where it is cancelled, too
            scope.cancel()
            await comm.close()
        assert scope.cancelled_caught and _threads() == threads
        await until(lambda: member.session.view.members == (member.session.peer,))
        await until(lambda: _fds() == fds)  # the member's end of their connections goes when it reads that they ended


def _threads() -> int:
    """Of ours: Trio's own come and go."""
    return sum(thread.name.startswith("pyccl") for thread in threading.enumerate())


def _fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@trio_test
async def test_sync_cancelled_while_the_others_are_elsewhere(cluster: Cluster) -> None:
    async with mixed(cluster) as (local, [other]):
        w = local.draw(1, 1000)
        before, state = w.copy(), pyccl.SharedState({"w": w}, revision=2)
        other.ask("state", arrays={"w": {"seed": 1, "index": 0, "count": 1000, "dtype": "float32"}}, revision=1)
        async with trio.open_nursery() as nursery:
            task = Task(nursery, lambda: local.comm.sync_shared_state(state, timeout=DEADLINE_S))
            await until(lambda: bool(local.session.blocked))
            await task.cancel()
        assert task.cancelled and np.array_equal(w, before) and state.revision == 2
        assert (await error(other.call("sync"), "PeerLostError"))["restored"]
        nothing_is_left(local)
        theirs = other.call("sync")
        await local.comm.sync_shared_state(state)
        assert (await value(theirs))["state"]["digest"] == state.digest()


@trio_test
async def test_sync_cancelled_while_chunks_are_fetched(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    async with mixed(cluster) as (local, [holder]):
        w = np.zeros(3 << 20, np.uint8)
        state = pyccl.SharedState({"w": w}, revision=1)
        holder.ask("state", arrays={"w": {"seed": 1, "index": 0, "count": w.size, "dtype": "uint8"}}, revision=2)
        theirs = holder.call("sync")
        asked = []
        with monkeypatch.context() as patch:
            patch.setattr(local.session, "fetch", lambda *request, **how: asked.append(request))  # it gets no answer
            async with trio.open_nursery() as nursery:
                task = Task(nursery, lambda: local.comm.sync_shared_state(state, timeout=DEADLINE_S))
                await until(lambda: bool(asked))
                await task.cancel()
        assert task.cancelled and not w.any() and state.revision == 1
        assert (await error(theirs, "PeerLostError", "DeadlineError"))["restored"]
        nothing_is_left(local)
        theirs = holder.call("sync")
        assert (await local.comm.sync_shared_state(state)).revision == 2
        assert (await value(theirs))["state"]["digest"] == state.digest()


@trio_test
async def test_a_thousand_cancelled_operations_leave_nothing(cluster: Cluster) -> None:
    async with here(cluster) as (a, b):
        gc.collect()  # engines of earlier tests
        fds, threads = _fds(), _threads()
        xs = [a.draw(i, 200) for i in range(1000)]
        before = [x.copy() for x in xs]
        for first in range(0, 1000, 250):
            async with trio.open_nursery() as nursery:
                for x in xs[first : first + 250]:
                    nursery.start_soon(a.comm.all_reduce, x)
                await a.submitted(first + 250)
                nursery.cancel_scope.cancel()
        assert all(map(np.array_equal, xs, before))
        nothing_is_left(a)
        for _ in range(1000):
            with pytest.raises(pyccl.PeerLostError):
                await b.comm.all_reduce(xs[0])
        nothing_is_left(b)
        assert np.array_equal(xs[0], before[0])
        await together(lambda: a.comm.all_reduce(xs[0]), lambda: b.comm.all_reduce(xs[1]))
        assert np.array_equal(xs[0], xs[1])
        gc.collect()
        assert (_fds(), _threads()) == (fds, threads)


@trio_test
async def test_a_handle_that_is_dropped_runs_on_and_is_released(cluster: Cluster) -> None:
    async with here(cluster) as (a, b):
        x = np.ones(1000, np.float32)
        a.comm.all_reduce_async(x)
        gc.collect()
        await b.comm.all_reduce(np.ones(1000, np.float32))
        await together(a.comm.barrier, b.comm.barrier)
        assert np.array_equal(x, np.full(1000, 2, np.float32))
        nothing_is_left(a)


# ---- Ctrl-C: the main task is interrupted whatever it waits for, so these bring a loop of their own


@pytest.mark.parametrize("where", ["main task", "another task"])
def test_ctrl_c_gives_an_operation_up(cluster: Cluster, where: str) -> None:
    seen: dict[str, Any] = {}

    async def press(local: Local) -> None:
        """In a system task, which Ctrl-C does not hit: Trio hands it to the main task."""
        await local.submitted(1)
        signal.raise_signal(signal.SIGINT)

    async def main() -> None:
        async with mixed(cluster) as (local, [other]):
            x = local.draw(1, 1000)
            before = x.copy()
            trio.lowlevel.spawn_system_task(press, local)
            try:
                if where == "main task":
                    await local.comm.all_reduce(x)
                else:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(local.comm.all_reduce, x)
            finally:
                seen["restored"] = np.array_equal(x, before)
                nothing_is_left(local)
                with trio.CancelScope(shield=True):
                    seen["other"] = await error(other.call("all_reduce", seed=1, count=1000), "PeerLostError")
                    await reduce_all(cluster, local, [other])

    with pytest.raises((KeyboardInterrupt, BaseExceptionGroup)) as caught:
        trio.run(main)
    assert caught.errisinstance(KeyboardInterrupt) or caught.group_contains(KeyboardInterrupt)
    assert seen["restored"] and seen["other"]["restored"]


def test_ctrl_c_after_done_waits_for_the_outcome(make_cluster: Callable[..., Cluster]) -> None:
    """Pressed twice: it is raised in any case, and the result stands."""
    cluster = make_cluster(peer_timeout=NEVER_SILENT_S)
    seen: dict[str, Any] = {}

    async def press(local: Local, other: Peer, sent: int, theirs: Call) -> None:
        await prepared(local, 1000, sent)
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
            await turns()
        seen["early"] = "raised" in seen
        other.resume()
        seen["theirs"] = await value(theirs)

    async def main() -> None:
        async with mixed(cluster) as (local, [other]):
            theirs = await stopped_before_done(local, other, seed=5, count=1000)
            cluster.master.kill()  # no ballot: the other is asked, and has committed
            x = local.draw(5, 1000)
            trio.lowlevel.spawn_system_task(press, local, other, sent_bytes(local.session), theirs)
            try:
                await local.comm.all_reduce(x)
            except KeyboardInterrupt:
                seen["raised"] = True
                with trio.CancelScope(shield=True):
                    await until(lambda: "theirs" in seen)
                cluster.check([{**told(_nobody(), x), "info": seen["theirs"]["info"]}, seen["theirs"]], 5, 1000)
                raise

    with pytest.raises(KeyboardInterrupt):
        trio.run(main)
    assert seen["raised"] and not seen["early"]


def test_ctrl_c_at_the_safe_point_in_connect_and_in_sync(cluster: Cluster) -> None:
    ended = []

    async def press(reached: Callable[[], bool]) -> None:
        await until(reached)
        signal.raise_signal(signal.SIGINT)

    async def interrupt(call: Callable[[], Awaitable[Any]], reached: Callable[[], bool]) -> None:
        trio.lowlevel.spawn_system_task(press, reached)
        try:
            await call()
        except KeyboardInterrupt:
            ended.append(call)

    async def main() -> None:
        async with mixed(cluster) as (local, [other]):
            session = local.session
            await interrupt(local.comm.update_topology, lambda: session._topology is not None)
            newcomer = aio.Communicator(cluster.master.address)
            await interrupt(newcomer.connect, lambda: session.pending == 1)
            state = pyccl.SharedState({"w": np.ones(100, np.float32)})
            await interrupt(lambda: local.comm.sync_shared_state(state), lambda: bool(session.blocked))
            other.ask("state", arrays={"w": {"seed": 1, "index": 0, "count": 100, "dtype": "float32"}})
            await error(other.call("sync"), "PeerLostError")
            assert _threads() == 1
            await reduce_all(cluster, local, [other])

    trio.run(main)
    assert len(ended) == 3
