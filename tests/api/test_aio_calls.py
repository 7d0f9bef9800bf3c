"""pyccl.aio: what calls return, many at once, how they fail, and that nobody blocks the loop."""

from __future__ import annotations

import asyncio
import inspect
import re
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio
from aio_side import Task, add, error, here, mixed, reduce_all, together, told, trio_test, turns, until, value
from cluster import DEADLINE_S, Cluster
from oracle import draw, sha

import pyccl
from pyccl import aio
from pyccl._proto import member


def public(kind: type) -> dict[str, Any]:
    return {name: inspect.getattr_static(kind, name) for name in dir(kind) if not name.startswith("_")}


@pytest.mark.parametrize(("blocking", "trio_"), [(pyccl.Communicator, aio.Communicator), (pyccl.Work, aio.Work)])
def test_both_apis_have_the_same_methods_with_the_same_signatures(blocking: type, trio_: type) -> None:
    there, here_ = public(blocking), public(trio_)
    assert set(here_) - set(there) == ({"aclose"} if trio_ is aio.Communicator else set())
    assert set(there) <= set(here_)
    assert inspect.signature(blocking) == inspect.signature(trio_) or blocking is pyccl.Work
    plain = {"all_reduce_async", "done"}
    for name, method in there.items():
        if isinstance(method, property):
            assert isinstance(here_[name], property), name
            continue
        assert inspect.signature(method) == inspect.signature(here_[name]), name
        assert inspect.iscoroutinefunction(inspect.unwrap(here_[name])) == (name not in plain), name
        assert inspect.getdoc(here_[name]), name


def test_both_connects_take_the_same_arguments() -> None:
    assert inspect.signature(pyccl.connect).parameters == inspect.signature(aio.connect).parameters


# ---- results


@pytest.mark.parametrize(("dtype", "op"), [("float32", "avg"), ("int64", "sum"), ("float64", "min"), ("uint8", "prod")])
@trio_test
async def test_an_all_reduce_with_blocking_members_has_the_bits_of_the_oracle(
    cluster: Cluster, dtype: str, op: str
) -> None:
    async with mixed(cluster, agents=2) as (local, others):
        for count in (1, 1000, 400_001):
            seed = cluster.rng.getrandbits(32)
            calls = [peer.call("all_reduce", seed=seed, count=count, dtype=dtype, op=op) for peer in others]
            x = local.draw(seed, count, dtype)
            out, before = np.empty_like(x), x.copy()
            info = await local.comm.all_reduce(x, op, out=out)
            assert np.array_equal(x.view(np.uint8), before.view(np.uint8))
            values = [told(info, out), *[await value(call) for call in calls]]
            cluster.check(values, seed, count, dtype=dtype, op=op)
            assert info.members == local.comm.members


@trio_test
async def test_every_collective_in_one_loop(cluster: Cluster) -> None:
    async with here(cluster, 3) as locals_:
        comms = sorted((local.comm for local in locals_), key=lambda comm: comm.peer_id)
        assert all(comm.members == tuple(c.peer_id for c in comms) for comm in comms)
        inputs = [draw(5, index, 1000, "float32") for index in range(3)]
        quantized = [x.copy() for x in inputs]
        await together(*[lambda c=c, x=x: c.all_reduce(x, "avg", quantize="uint8") for c, x in _with(comms, quantized)])
        expected = pyccl.reference_all_reduce(inputs, op="avg", quantize="uint8")
        assert all(sha(x) == sha(expected) for x in quantized)

        sent = [x.copy() for x in inputs]
        await together(*[lambda c=c, x=x: c.broadcast(x, comms[1].peer_id) for c, x in _with(comms, sent)])
        assert all(sha(x) == sha(inputs[1]) for x in sent)

        large = [np.full((3, 700_000), index, np.int16) for index in range(3)]  # past what the loop copies itself
        for arrays in ([x.reshape(10, 100) for x in inputs], large):
            gathered = await together(*[lambda c=c, x=x: c.all_gather(x) for c, x in _with(comms, arrays)])
            assert all(np.array_equal(g, np.stack(arrays)) and g.dtype == arrays[0].dtype for g in gathered)

        for scattered in ([x.reshape(10, 100) for x in inputs], large, [x[:2] for x in inputs]):
            parts = await together(*[lambda c=c, x=x: c.reduce_scatter(x) for c, x in _with(comms, scattered)])
            for part, expected in zip(parts, pyccl.reference_reduce_scatter(scattered), strict=True):
                assert part.shape == expected.shape and sha(part) == sha(expected)

        ringed = [x.copy() for x in inputs]
        rings = await together(*[lambda c=c, x=x: c.all_reduce(x, algorithm="ring") for c, x in _with(comms, ringed)])
        assert [info.algorithm for info in rings] == ["ring"] * 3
        assert {sha(x) for x in ringed} == {sha(pyccl.reference_all_reduce(inputs, algorithm="ring"))}

        many = [[draw(tag, index, 2000, "int32") for tag in range(20)] for index in range(3)]
        want = [sha(pyccl.reference_all_reduce([many[index][tag] for index in range(3)])) for tag in range(20)]
        infos = await together(*[lambda c=c, xs=xs: c.all_reduce_many(xs) for c, xs in _with(comms, many)])
        assert all([sha(x) for x in arrays] == want for arrays in many)
        assert [info.world_size for info in infos[0]] == [3] * 20

        assert [info.world_size for info in await together(*[c.barrier for c in comms])] == [3] * 3
        assert await together(*[c.are_peers_pending for c in comms]) == [False] * 3


@pytest.mark.parametrize("where", ["in place", "out"])
@trio_test
async def test_an_exchange_with_a_blocking_member_and_one_of_this_loop_swaps_both_ways(
    cluster: Cluster, where: str
) -> None:
    """Both at once under one tag; sizes of one piece, of several, and of none."""
    async with mixed(cluster) as (local, [other]):
        comm = aio.Communicator(cluster.master.address)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(comm.connect)
            await until(lambda: local.session.pending == 1)
            met = other.call("update_topology")
            await local.comm.update_topology()
        await value(met)
        async with comm:
            third = add(cluster, comm)
            for count in (0, 9, 400_001):
                seed = cluster.rng.getrandbits(32)
                theirs = other.call("exchange", partner=local.id, seed=seed, count=count, tag=3)
                arrays = [local.draw(seed, count), local.draw(seed + 1, count), third.draw(seed, count)]
                before = [x.copy() for x in arrays]
                partners = [(local, other.id), (local, third.id), (third, local.id)]
                outs = [None] * 3 if where == "in place" else [np.empty_like(x) for x in arrays]
                infos = await together(
                    *[
                        partial(one.comm.exchange, x, out=out, partner=partner, tag=3)
                        for (one, partner), x, out in zip(partners, arrays, outs, strict=True)
                    ]
                )
                wanted = [draw(seed, other.index, count, "float32"), before[2], before[1]]
                results = arrays if where == "in place" else outs
                assert [sha(x) for x in results] == [sha(x) for x in wanted]
                assert where == "in place" or [sha(x) for x in arrays] == [sha(x) for x in before]
                told_there = await value(theirs)
                assert told_there["sha"] == sha(before[0])
                for info, (one, partner) in zip(infos, partners, strict=True):
                    assert info.members == tuple(sorted([one.id, partner])) and info.world_size == 2
                    assert info.tx_bytes == info.rx_bytes == 4 * count
                assert told_there["info"]["members"] == list(infos[0].members)


def _with(comms: list[aio.Communicator], arrays: list[Any]) -> list[tuple[aio.Communicator, Any]]:
    return list(zip(comms, arrays, strict=True))


@trio_test
async def test_hundreds_at_once_need_no_threads(cluster: Cluster) -> None:
    async with here(cluster) as (a, b):
        threads = threading.active_count()
        inputs = [[local.draw(tag, 500) for tag in range(500)] for local in (a, b)]
        rank = sorted((0, 1), key=lambda i: (a, b)[i].id)
        want = [sha(pyccl.reference_all_reduce([inputs[rank[0]][tag], inputs[rank[1]][tag]])) for tag in range(500)]
        async with trio.open_nursery() as nursery:
            for tag in range(500):
                nursery.start_soon(lambda tag=tag: a.comm.all_reduce(inputs[0][tag], tag=tag))
            await trio.testing.wait_all_tasks_blocked()
            most = threading.active_count()
            for tag in reversed(range(500)):
                nursery.start_soon(lambda tag=tag: b.comm.all_reduce(inputs[1][tag], tag=tag))
        assert most <= threads
        assert [sha(x) for x in inputs[0]] == want == [sha(x) for x in inputs[1]]
        assert not a.session._watched and not a.session.engine._ops


@trio_test
async def test_the_loop_goes_on_while_calls_wait(cluster: Cluster) -> None:
    """Each waits for what a later step of the same loop does."""
    async with here(cluster) as (a, b):
        state = {local: pyccl.SharedState({"w": np.full(9, local.index, np.float32)}, revision=1) for local in (a, b)}
        x = {local: np.ones(4, np.float32) for local in (a, b)}
        calls: list[Callable[[Any], Awaitable[Any]]] = [
            lambda local: local.comm.all_reduce(x[local]),
            lambda local: local.comm.all_gather(x[local]),
            lambda local: local.comm.all_reduce_many([x[local]]),
            lambda local: local.comm.are_peers_pending(),
            lambda local: local.comm.sync_shared_state(state[local]),
            lambda local: local.comm.update_topology(),
        ]
        for call in calls:
            async with trio.open_nursery() as nursery:
                first = Task(nursery, lambda call=call: call(a))
                await trio.testing.wait_all_tasks_blocked()
                await turns()
                assert not first.ended.is_set()
                await call(b)
            assert first.error is None and not first.cancelled
        assert np.array_equal(state[a].arrays["w"], state[b].arrays["w"])


@trio_test
async def test_an_expired_wait_aborts_nothing_and_several_tasks_may_wait(cluster: Cluster) -> None:
    async with mixed(cluster) as (local, [other]):
        x = local.draw(9, 1000)
        work = local.comm.all_reduce_async(x)
        for timeout in (0, 0.01):
            with pytest.raises(pyccl.DeadlineError, match="goes on"):
                await work.wait(timeout)
        assert not work.done()
        async with trio.open_nursery() as nursery:
            waits = [Task(nursery, work.wait) for _ in range(3)]
            await trio.testing.wait_all_tasks_blocked()
            late = other.call("all_reduce", seed=9, count=1000)
        assert work.done()
        assert waits[0].result == waits[1].result == waits[2].result == await work.wait() == await work.wait(0)
        cluster.check([told(waits[0].result, x), await value(late)], 9, 1000)


@trio_test
async def test_a_newcomer_is_pending_gets_in_and_gets_the_state(cluster: Cluster) -> None:
    async with mixed(cluster) as (local, [other]):
        newcomer, = cluster.spawn(1)
        cluster.make([newcomer])
        join = newcomer.call("connect")
        await until(lambda: local.session.pending == 1)
        pending = other.call("are_peers_pending")
        assert await local.comm.are_peers_pending() is True and await value(pending) is True
        epoch = local.comm.epoch
        met = other.call("update_topology")
        await local.comm.update_topology()
        await value(join)
        await value(met)
        assert (local.comm.epoch, local.comm.group_world_size, local.comm.world_size) == (epoch + 1, 3, 3)
        how = {"w": {"seed": 1, "index": 0, "count": 300_000, "dtype": "float32"}}
        for peer, revision in ((other, 7), (newcomer, 3)):
            peer.ask("state", arrays=how, revision=revision)
        state = pyccl.SharedState({"w": np.zeros(300_000, np.float32)})
        syncs = [peer.call("sync") for peer in (other, newcomer)]
        info = await local.comm.sync_shared_state(state)
        assert (info.revision, info.changed, state.revision) == (7, ("w",), 7)
        assert {(await value(sync))["state"]["digest"] for sync in syncs} == {state.digest()}
        assert sha(state.arrays["w"]) == sha(draw(1, 0, 150_000, "int64"))  # as the agents draw it


# ---- failures


@trio_test
async def test_a_deadline_fails_it_here_and_there(cluster: Cluster) -> None:
    async with mixed(cluster) as (local, [other]):
        x = local.draw(1, 1000)
        before = x.copy()
        with pytest.raises(pyccl.DeadlineError):
            await local.comm.all_reduce(x, timeout=0.1)
        assert np.array_equal(x, before)
        assert (await error(other.call("all_reduce", seed=1, count=1000), "DeadlineError"))["restored"]
        with pytest.raises(pyccl.DeadlineError, match="safe point"):
            await local.comm.update_topology(timeout=0.1)
        with pytest.raises(pyccl.DeadlineError):
            await local.comm.sync_shared_state(pyccl.SharedState({"w": x}), timeout=0.1)
        assert (await error(_sync(other), "DeadlineError", "PeerLostError"))["restored"]
        await reduce_all(cluster, local, [other])


def _sync(other: Any) -> Any:
    other.ask("state", arrays={"w": {"seed": 1, "count": 1000, "dtype": "float32"}})
    return other.call("sync")


@pytest.mark.parametrize("retry", [True, False])
@trio_test
async def test_a_peer_that_is_killed_meanwhile(cluster: Cluster, retry: bool) -> None:
    async with mixed(cluster, agents=2) as (local, [other, victim]):
        seed, count = cluster.rng.getrandbits(32), 4_000_000
        victim.ask("hook", phase="data", bytes=4_000_000)
        x = local.draw(seed, count)
        before = x.copy()
        wanted = {"seed": seed, "count": count, "retry": retry}
        async with trio.open_nursery() as nursery:
            mine = Task(nursery, lambda: local.comm.all_reduce(x, retry=retry))
            await local.submitted(1)
            theirs = other.call("all_reduce", **wanted)
            await trio.to_thread.run_sync(lambda: other.ask("wait_blocked", thread="watch"))
            victim.call("all_reduce", **wanted).died()
        if mine.error is None:  # with retry; or the death came too late to hurt
            assert cluster.check([told(mine.result, x), await value(theirs)], seed, count)["world_size"] in (2, 3)
        else:
            assert not retry and isinstance(mine.error, pyccl.PeerLostError) and mine.error.peer == victim.id
            assert (await error(theirs, "PeerLostError"))["restored"] and np.array_equal(x, before)
        await reduce_all(cluster, local, [other])


@trio_test
async def test_members_that_call_different_things_are_told(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(settings={"mismatch_grace": 0.3})
    async with mixed(cluster) as (local, [other]):
        call = other.call("all_reduce", seed=1, count=7)
        with pytest.raises(pyccl.MismatchError) as caught:
            await local.comm.all_reduce(local.draw(1, 8))
        assert caught.value.fields == ("count",)
        await error(call, "MismatchError")
        call = other.call("update_topology")
        with pytest.raises(pyccl.MismatchError):  # who waits in Trio counts as one who waits
            await local.comm.barrier()
        await error(call, "MismatchError")
        await reduce_all(cluster, local, [other])


@pytest.mark.parametrize("how", ["closed", "evicted"])
@trio_test
async def test_the_end_of_the_session_wakes_everybody_with_the_reason(cluster: Cluster, how: str) -> None:
    async with mixed(cluster) as (local, [other]):
        comm, x = local.comm, [local.draw(1, 1000) for _ in range(20)]
        before = [array.copy() for array in x]
        state = pyccl.SharedState({"w": np.ones(5, np.float32)})
        async with trio.open_nursery() as nursery:
            waits = [Task(nursery, lambda i=i: comm.all_reduce(x[i], tag=i)) for i in range(10)]
            waits += [Task(nursery, comm.all_reduce_async(x[10 + i], tag=i).wait) for i in range(10)]
            waits += [
                Task(nursery, lambda: comm.barrier(tag=30)),
                Task(nursery, lambda: comm.sync_shared_state(state)),
            ]
            await until(lambda: len([op for op in list(local.session.engine._ops) if not op.done()]) == 22)
            waits.append(Task(nursery, comm.update_topology))
            await until(lambda: local.session._topology is not None)
            if how == "closed":
                await comm.close()
            else:
                session = local.session
                session._soon(lambda: session._feed([member.Ended("evicted", "by the test")]))
        kind, text = (pyccl.UsageError, "closed") if how == "closed" else (pyccl.EvictedError, "by the test")
        for wait in waits:
            assert type(wait.error) is kind and text in str(wait.error), wait.error
        assert all(map(np.array_equal, x, before))
        for call in (comm.barrier, comm.update_topology, comm.are_peers_pending):
            with pytest.raises(kind, match=text):
                await call()
        with pytest.raises(kind, match=text):
            comm.all_reduce_async(x[0])
        await trio.to_thread.run_sync(lambda: other.ask("wait_world", world=1))
        await comm.close()
        async with trio.open_nursery() as nursery:  # it comes back as a newcomer
            connect = Task(nursery, comm.connect)
            await trio.to_thread.run_sync(lambda: other.ask("wait_pending", count=1))
            await value(other.call("update_topology"))
        assert connect.error is None
        await reduce_all(cluster, local, [other])


@trio_test
async def test_a_safe_point_without_a_master_is_an_error(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aio, "REACH_TIMEOUT_S", 0.3)
    async with mixed(cluster) as (local, [other]):
        cluster.master.kill()
        with pytest.raises(pyccl.MasterUnavailableError):
            await local.comm.update_topology()
        await reduce_all(cluster, local, [other])  # nobody needs it for that


@trio_test
async def test_two_tasks_can_not_stand_at_the_safe_point(cluster: Cluster) -> None:
    async with mixed(cluster) as (local, [other]):
        async with trio.open_nursery() as nursery:
            first = Task(nursery, local.comm.update_topology)
            await until(lambda: local.session._topology is not None)
            with pytest.raises(pyccl.UsageError, match="update_topology"):
                await local.comm.update_topology()
            await value(other.call("update_topology"))
        assert first.error is None
        await reduce_all(cluster, local, [other])


@trio_test
async def test_connect_and_its_errors(cluster: Cluster) -> None:
    async with here(cluster, 1) as (member_,):
        with pytest.raises(pyccl.UsageError, match="connected already"):
            await member_.comm.connect()
        comm = aio.Communicator(cluster.master.address)
        with pytest.raises(pyccl.DeadlineError, match="not admitted"):  # nobody calls update_topology
            await comm.connect(timeout=0.1)
        await until(lambda: member_.session.pending == 0)  # or the next wait would see the one that has gone
        async with trio.open_nursery() as nursery:
            first = Task(nursery, comm.connect)
            await until(lambda: member_.session.pending == 1)
            with pytest.raises(pyccl.UsageError, match="another task"):
                await comm.connect()
            await comm.close()  # ends the other task's
        assert isinstance(first.error, pyccl.UsageError) and "closed" in str(first.error)
        await until(lambda: member_.session.pending == 0)
        async with trio.open_nursery() as nursery:
            again = Task(nursery, comm.connect)
            await until(lambda: member_.session.pending == 1)
            await member_.comm.update_topology()
        assert again.error is None and comm.members == member_.comm.members
        await comm.close()
    cluster.master.kill()
    with pytest.raises(pyccl.MasterUnavailableError):
        await aio.Communicator(cluster.master.address).connect(reach_timeout=0.3)


@trio_test
async def test_wrong_arguments_are_told_as_by_the_blocking_api(cluster: Cluster) -> None:
    async with here(cluster, 1) as (local,):
        comm, x = local.comm, np.ones(4, np.float32)
        for call, match in (
            (lambda: comm.all_reduce([1.0]), "not list"),
            (lambda: comm.all_reduce(x, "mean"), "op='mean'"),
            (lambda: comm.all_reduce(x, timeout=0), "timeout=0"),
            (lambda: comm.broadcast(x, "me"), "no peer id"),
            (lambda: comm.all_gather(x, tag=-1), "tag=-1"),
            (lambda: comm.reduce_scatter(np.zeros(())), "no axis"),
            (lambda: comm.all_reduce(x, algorithm="tree"), "algorithm='tree'"),
            (lambda: comm.all_reduce_many([x], out=x), "no out"),
            (lambda: comm.all_reduce_many([x], max_in_flight=0), "max_in_flight"),
            (lambda: comm.sync_shared_state({"x": x}), "SharedState"),
            (lambda: comm.update_topology(timeout=None), "timeout=None"),
        ):
            with pytest.raises(pyccl.UsageError, match=match):
                await call()
        for alone in (lambda: comm.all_reduce(x), lambda: comm.all_gather(x), lambda: comm.all_reduce_many([x])):
            with pytest.raises(pyccl.AloneError):
                await alone()
        assert await comm.are_peers_pending() is False


def test_outside_its_trio_run_it_is_a_clear_error(cluster: Cluster) -> None:
    cluster.spawn(0)
    comm = aio.Communicator(cluster.master.address)
    calls: list[Callable[[], Any]] = [
        comm.connect, comm.close, comm.barrier, comm.update_topology, comm.are_peers_pending,
        lambda: comm.all_reduce(np.ones(4)),
    ]  # fmt: skip

    def outside() -> None:
        for call in calls:
            with pytest.raises(pyccl.UsageError, match="Trio"):
                call().send(None)
            with pytest.raises(pyccl.UsageError, match="Trio"):
                asyncio.run(call())
        with pytest.raises(pyccl.UsageError, match="Trio"):
            comm.all_reduce_async(np.ones(4))

    async def founded() -> None:
        with pytest.raises(pyccl.UsageError, match="not connected"):
            await comm.barrier()
        await comm.connect(timeout=DEADLINE_S)
        await trio.to_thread.run_sync(outside)  # a thread has no loop either

    async def elsewhere() -> None:
        with pytest.raises(pyccl.UsageError, match="the Trio run that connected it"):
            await comm.barrier()
        with pytest.raises(pyccl.UsageError, match="connected already"):
            await comm.connect()
        await comm.close()
        with pytest.raises(pyccl.UsageError, match="closed"):
            await comm.barrier()

    outside()
    trio.run(founded)
    outside()
    trio.run(elsewhere)


def test_the_example_of_the_readme(cluster: Cluster) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    example, = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "pyccl.aio" in block]
    cluster.spawn(0)
    program = example.replace("127.0.0.1:48148", cluster.master.address)
    assert program != example
    peers = [subprocess.Popen([sys.executable, "-P", "-c", program], stdout=subprocess.PIPE, text=True) for _ in "ab"]
    try:
        assert [peer.communicate(timeout=DEADLINE_S)[0] for peer in peers] == ["2.0 0.5\n"] * 2
        assert [peer.returncode for peer in peers] == [0, 0]
    finally:
        for peer in peers:
            peer.kill()
            peer.communicate()


def test_a_communicator_dropped_by_its_program_leaves_the_run(cluster: Cluster) -> None:
    """Its loop has ended, an operation is under way, and nobody called close()."""
    other, = cluster.spawn(1)
    cluster.make([other])

    async def main() -> None:
        comm = aio.Communicator(cluster.master.address)
        await comm.connect(timeout=DEADLINE_S)
        async with trio.open_nursery() as nursery:
            join = other.call("connect")
            await until(lambda: comm._session is not None and comm._session.pending == 1)
            nursery.start_soon(comm.update_topology)
            await value(join)
        comm.all_reduce_async(np.ones(1000, np.float32))

    trio.run(main)
    other.ask("wait_world", world=1)
    for thread in threading.enumerate():
        if thread.name == "pyccl-control":
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
