"""Guards through the public API: who contributes what is refused, or what a limit forbids, is named on all members."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import trio
from masters import started_master
from reference import H as ROUND
from reference import Late, local, same
from replicas import Array, Replicas, bits, copied, move, weights

import pyccl
from pyccl import Guard, PoisonError, UsageError
from pyccl.optim import AsyncDiLoCo, DiLoCo, LocalSGD, StreamingDiLoCo
from pyccl.optim.streaming import SlotOutcome

COUNT: Final = 100_003
H: Final = 2


def poisoned(comm: pyccl.Communicator, call: Callable[[], Any]) -> str | None:
    """Whom the error names: a rank, or None."""
    with pytest.raises(PoisonError) as caught:
        call()
    peer = caught.value.peer
    assert peer is None or peer[:8] in str(caught.value)
    return None if peer is None else str(comm.members.index(peer))


def numbers(rank: int, dtype: str = "float32") -> Array:
    return np.random.default_rng([7, rank]).uniform(-1, 1, COUNT).astype(dtype)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("quantize", [None, "uint8"])
def test_poison_is_refused_and_its_peer_is_named_on_all(
    replicas: Replicas, world: int, dtype: str, quantize: str | None
) -> None:
    def run(comm: pyccl.Communicator, rank: int) -> list[str | None]:
        named: list[str | None] = []
        for bad, value in enumerate((np.nan, np.inf, -np.inf)):
            x = numbers(rank, dtype)
            if rank == bad % world:
                x[bad * COUNT // 3] = value
            before = x.tobytes()
            named.append(poisoned(comm, lambda x=x: comm.all_reduce(x, guard="finite", quantize=quantize)))
            named.append(
                poisoned(comm, lambda x=x: comm.all_reduce_async(x, op="avg", guard=Guard(), quantize=quantize).wait())
            )
            named.append(poisoned(comm, lambda x=x: comm.reduce_scatter(x, guard="finite", quantize=quantize)))
            named.append(
                poisoned(comm, lambda x=x: comm.all_reduce_many([x], guard="finite", quantize=quantize, tag=9))
            )
            assert x.tobytes() == before
        return named

    expected = [str(bad % world) for bad in range(3) for _ in range(4)]
    assert replicas.run(world, run) == [expected] * world


def test_guard_changes_no_bit_of_what_it_lets_through(replicas: Replicas) -> None:
    def run(comm: pyccl.Communicator, rank: int) -> None:
        for dtype in ("float32", "float64", "float16"):
            for quantize in (None, "int8"):
                plain, guarded = (numbers(rank, dtype) for _ in range(2))
                comm.all_reduce(plain, op="avg", quantize=quantize, algorithm="direct")
                info = comm.all_reduce(guarded, op="avg", quantize=quantize, guard=Guard(max_abs=1.1, max_norm=190.0))
                assert plain.tobytes() == guarded.tobytes()
                assert info.algorithm == "direct"

    replicas.run(3, run)


def test_limits_of_the_greatest_number_and_of_the_norm(replicas: Replicas) -> None:
    def run(comm: pyccl.Communicator, rank: int) -> list[str | None]:
        x = numbers(rank)
        norm = max(float(np.linalg.norm(numbers(r).astype("float64"))) for r in range(3))
        if rank == 1:
            x[COUNT - 1] = 3.0
        named = [poisoned(comm, lambda: comm.all_reduce(x, guard=Guard(max_abs=2.5)))]
        comm.all_reduce(x.copy(), guard=Guard(max_abs=3.0))
        if rank == 2:
            x *= 2.0
        named.append(poisoned(comm, lambda: comm.all_reduce(x, guard=Guard(max_norm=norm * 1.5))))
        named.append(poisoned(comm, lambda: comm.all_reduce(x, guard=Guard(max_abs=2.5, max_norm=norm * 3))))
        comm.all_reduce(x, guard=Guard(max_abs=4.0, max_norm=norm * 2.1))
        return named

    assert replicas.run(3, run) == [["1", "2", "1"]] * 3


def test_finite_numbers_that_add_up_to_infinity_name_nobody(replicas: Replicas) -> None:
    def run(comm: pyccl.Communicator, rank: int) -> str | None:
        x = np.full(1000, 3e38, np.float32)
        named = poisoned(comm, lambda: comm.all_reduce(x, guard="finite"))
        comm.all_reduce(x, op="max", guard="finite")
        assert bool((x == np.float32(3e38)).all())
        return named

    assert replicas.run(3, run) == [None] * 3


def test_another_guard_is_a_mismatch_that_says_so(replicas: Replicas) -> None:
    def run(comm: pyccl.Communicator, rank: int) -> tuple[str, ...]:
        with pytest.raises(pyccl.MismatchError) as caught:
            comm.all_reduce(numbers(rank), algorithm="direct", guard=(None, "finite")[rank])
        with pytest.raises(pyccl.MismatchError) as again:
            comm.all_reduce(numbers(rank), guard=("finite", Guard(max_abs=1.5))[rank])
        assert "abs_1.5" in str(again.value)
        return caught.value.fields + again.value.fields

    assert replicas.run(2, run) == [("guard", "guard")] * 2


def test_wrong_guards_are_usage_errors_before_anything_is_sent(replicas: Replicas) -> None:
    (comm,) = replicas.members(1)
    for value in (0, -1.0, float("nan"), float("inf"), 1e39, True, "1", 1e-50):
        with pytest.raises(UsageError, match="max_abs"):
            Guard(max_abs=value)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="max_norm"):
            Guard(max_norm=value)  # type: ignore[arg-type]
    for x, options in (
        (np.ones(4, np.int32), {"guard": "finite"}),
        (np.ones(4), {"guard": "infinite"}),
        (np.ones(4), {"guard": True}),
        (np.ones(4), {"guard": "finite", "algorithm": "ring"}),
    ):
        for call in (comm.all_reduce, comm.reduce_scatter):
            with pytest.raises(UsageError, match="guard"):
                call(x, **options)
    assert Guard(max_abs=0.1).max_abs == float(np.float32(0.1))


def test_operations_go_on_after_poison_and_a_nan_passes_without_a_guard(replicas: Replicas) -> None:
    def run(comm: pyccl.Communicator, rank: int) -> None:
        for i in range(20):
            x = numbers(rank)
            if rank == i % 3:
                x[i] = np.nan
            tag = i % 2
            assert poisoned(comm, lambda x=x, tag=tag: comm.all_reduce(x, guard="finite", tag=tag)) == str(i % 3)
            comm.all_reduce(x, tag=tag)
            assert np.flatnonzero(np.isnan(x)).tolist() == [i]

    replicas.run(3, run)


def test_trio_api_names_the_same(replicas: Replicas) -> None:
    members = replicas.members(1)  # founds the group

    async def main() -> list[tuple[str | None, str]]:
        told: list[tuple[str | None, str]] = []

        async def reduce(comm: pyccl.aio.Communicator, value: float) -> None:
            x = np.full(1000, value)
            with pytest.raises(PoisonError) as caught:
                await comm.all_reduce(x, guard=Guard(max_abs=4.0))
            assert bool((x == value).all())
            with pytest.raises(PoisonError) as scattered:
                await comm.reduce_scatter(x, guard=Guard(max_abs=4.0))
            assert scattered.value.peer == caught.value.peer
            told.append((caught.value.peer, comm.peer_id))

        async with (
            trio.open_nursery() as nursery,
            pyccl.aio.Communicator(replicas.address, group=replicas.group) as comm,
        ):
            nursery.start_soon(trio.to_thread.run_sync, together)
            await reduce(comm, 5.0)
        return told

    admitted = replicas.start(_admit, members[0])

    def together() -> None:
        admitted.result()  # the other may be a member before this one knows it
        x = np.zeros(1000)
        named = poisoned(members[0], lambda: members[0].all_reduce(x, guard=Guard(max_abs=4.0)))
        assert named == poisoned(members[0], lambda: members[0].reduce_scatter(x, guard=Guard(max_abs=4.0)))

    assert all(peer == own for peer, own in trio.run(main))


def _admit(comm: pyccl.Communicator) -> None:
    while comm.group_world_size < 2:
        comm.update_topology(40.0)


# ---- optimizers ------------------------------------------------------------------------------------------------------


def make(kind: str, comm: pyccl.Communicator, params: dict[str, Array], quantize: str | None) -> Any:
    if kind == "local":
        return LocalSGD(comm, params, H, guard="finite")
    if kind == "streaming":
        return StreamingDiLoCo(comm, params, H, fragments=1, quantize=quantize, guard="finite")
    cls = AsyncDiLoCo if kind == "async" else DiLoCo
    return cls(comm, params, H, quantize=quantize, guard="finite", error_feedback=quantize is not None)


@pytest.mark.parametrize("kind", ["local", "diloco", "async", "streaming"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_optimizer_round_with_poison_fails_on_all_and_theta_stays(
    replicas: Replicas, seed: int, kind: str, quantize: str | None
) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> tuple[str | None, Any]:
        params = weights()
        opt = make(kind, comm, params, quantize)
        step = 0

        def rounds(count: int) -> None:
            nonlocal step
            for _ in range(count * H):
                move(params, seed, rank, step)
                step += 1
                opt.step()

        rounds(2)
        opt.finish()
        before = copied(opt.theta)
        healthy = copied(params)
        if rank == 1:
            params["b"][2] = np.nan

        def spoiled() -> None:
            rounds(1)
            opt.finish()

        named = poisoned(comm, spoiled)
        assert bits(opt.theta) == bits(before)
        assert opt.stats.rollbacks == 1
        if kind == "streaming":
            assert opt.outcomes[-1] == SlotOutcome(0, committed=False, world_size=0, round=2)
        if kind == "local":  # the live weights are all that there is of its round: the caller mends them
            for name, array in healthy.items():
                np.copyto(params[name], array)
        rounds(2)
        opt.finish()
        assert all(np.isfinite(array).all() for array in opt.theta.values())
        assert bits(opt.theta) != bits(before)
        return named, bits(opt.theta)

    told = replicas.run(3, train)
    assert [named for named, _ in told] == ["1"] * 3
    assert all(theta == told[0][1] for _, theta in told)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    ("guard", "bad"),
    [("finite", np.nan), ("finite", np.inf), (Guard(max_abs=50.0), 100.0), (Guard(max_norm=50.0), 100.0)],
)
def test_an_eager_replica_does_not_take_a_share_of_its_own_that_the_guard_refuses(
    replicas: Replicas, seed: int, world: int, guard: Guard | str, bad: float
) -> None:
    """Rank 1 spoils round 2. Its theta steps as if it had not moved; the exchange fails with round 3, on all."""

    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params, seen, named = weights(), [], []
        opt = AsyncDiLoCo(comm, params, ROUND, outer_lr=0.4, outer_momentum=0.5, eager=True, guard=guard)
        for step in range(7 * ROUND):
            move(params, seed, rank, step)
            if step == 3 * ROUND - 1 and rank == 1:
                params["b"][2] = bad
            if step == 4 * ROUND - 1:
                named.append(poisoned(comm, opt.step))
            else:
                opt.step()
            if step % ROUND == ROUND - 1:
                assert bits(params) == bits(opt.theta)
                seen.append(copied(opt.theta))
        return seen, named, opt.round, opt.contributions, opt.stats.rollbacks

    late = Late(world, 0.4, 0.5, eager=True)
    expected: list[list[dict[str, Array]]] = [[] for _ in range(world)]
    for round_ in range(7):
        if round_ == 2:
            shares = {rank: local(late.outers[rank].theta, seed, rank, round_) for rank in range(world)}
            late._step(shares | {1: {name: np.zeros_like(x) for name, x in shares[1].items()}})
        elif round_ == 3:
            late.flying = {}
        else:
            late.round(range(world), seed, round_)
        for rank in range(world):
            expected[rank].append(copied(late.outers[rank].theta))
    for rank, (seen, *told) in enumerate(replicas.run(world, train)):
        same(seen, expected[rank])
        assert told == [["1"], 4, 4 * world, 1]


@pytest.mark.parametrize("world", [2, 3])
def test_an_eager_replica_looks_at_what_the_others_decode(replicas: Replicas, seed: int, world: int) -> None:
    def train(comm: pyccl.Communicator, rank: int) -> Any:
        params, named = weights(), []
        opt = AsyncDiLoCo(comm, params, H, eager=True, guard="finite", quantize="int8", error_feedback=True)
        for step in range(7 * H):
            move(params, seed, rank, step)
            if step == 3 * H - 1 and rank == 1:
                params["b"][2] = np.nan
            if step == 4 * H - 1:
                named.append(poisoned(comm, opt.step))
            else:
                opt.step()
            assert all(np.isfinite(array).all() for array in opt.theta.values())
        opt.finish()
        return named, opt.round, opt.contributions

    assert replicas.run(world, train) == [(["1"], 5, 5 * world)] * world


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_replica_alone_does_not_step_on_poison(replicas: Replicas, seed: int, quantize: str | None) -> None:
    (comm,) = replicas.members(1)
    params = weights()
    opt = DiLoCo(comm, params, 1, min_peers=1, quantize=quantize, guard="finite")
    opt.step()
    before = bits(opt.theta)
    params["b"][1] = np.nan
    assert poisoned(comm, opt.step) == "0"
    assert bits(opt.theta) == before == bits(params) and (opt.round, opt.stats.rollbacks) == (1, 1)
    move(params, seed, 0, 0)
    opt.step()
    assert opt.round == 2


# ---- a secure run ----------------------------------------------------------------------------------------------------


@pytest.fixture
def secure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Replicas]:
    monkeypatch.setenv("PYCCL_IDENTITY", str(tmp_path / "ours.pem"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with started_master("--secure", "--journal", str(tmp_path / "journal"), "--peer-timeout", "30") as address:
        invite = [sys.executable, "-P", "-m", "pyccl.cli.master", "invite", "--master", address]
        done = subprocess.run(invite, check=True, capture_output=True, text=True, env=os.environ)
        replicas = Replicas(done.stdout.strip())
        yield replicas
        replicas.close()


def test_poison_is_refused_in_a_secure_run(secure: Replicas) -> None:
    def run(comm: pyccl.Communicator, rank: int) -> str | None:
        x = numbers(rank)
        if rank == 2:
            x[5] = np.inf
        named = poisoned(comm, lambda: comm.all_reduce(x, guard="finite"))
        comm.all_reduce(numbers(rank), guard="finite")
        return named

    assert secure.run(3, run) == ["2"] * 3
