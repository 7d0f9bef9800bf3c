"""Calls of collectives drawn from a seed, with their arrays: what members run and what the oracle makes of it.

Agent and test draw the same list, so that hundreds of cases travel as one command: (seed, world) -> cases; a case and
a rank -> the arrays. Each member runs a case on memory of its own alignment, with guards around it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from oracle import DTYPES, FLOATS, KINDS, OPS, Array, draw, sha

import pyccl
from pyccl.codecs import CODECS

PIECE_BYTES: Final = 1 << 18
_GUARD_BYTES: Final = 64
_GUARD: Final = 0xA5
_CODECS: Final = tuple(CODECS)
_BLOCKS: Final = (64, 128, 1024, 4096, 65536)
# Of one member each. The last ones lead to totals that can't divide: UsageError for everybody.
_WEIGHTS: Final = (1.0, 1.0, 2.0, 0.5, 0.0, 1 / 3, 1e-3, 1e6, 1e-40, 3e38, 1e-60, 1e39)
_WILD_WEIGHTS: Final = 4


@dataclass(frozen=True)
class Case:
    """One call of every member. counts: elements of each array, more than one for all_reduce_many."""

    call: str
    seed: int
    dtype: str
    counts: tuple[int, ...]
    kind: str
    tag: int
    op: str = "sum"
    quantize: str | None = None
    block: int = 1024
    weights: tuple[float, ...] | None = None
    root: int = 0
    in_flight: int = 1
    algorithm: str = "auto"

    def inputs(self, rank: int) -> list[Array]:
        """(counts[i],) each."""
        return [draw(self.seed + i, rank, count, self.dtype, self.kind) for i, count in enumerate(self.counts)]

    def expected(self, world: int) -> list[str]:
        """sha of every result (reduce_scatter: every rank's part); ["UsageError"] where the call is wrong for all."""
        ranks = [self.inputs(rank) for rank in range(world)]
        if self.call == "broadcast":
            return [sha(x) for x in ranks[self.root]]
        if self.call == "all_gather":
            return [sha(np.concatenate([x.view(np.uint8) for (x,) in ranks]))]
        settings: dict[str, Any] = {
            "op": self.op, "quantize": self.quantize, "quantize_block": self.block,
            "algorithm": self.algorithm, "weights": self.weights,
        }  # fmt: skip
        try:
            if self.call == "reduce_scatter":
                shaped = [_shaped(x, random.Random(self.seed), scatter=True) for (x,) in ranks]
                return [sha(x) for x in pyccl.reference_reduce_scatter(shaped, **settings)]
            return [sha(pyccl.reference_all_reduce(each, **settings)) for each in zip(*ranks, strict=True)]
        except pyccl.UsageError:
            return ["UsageError"]

    def expected_of(self, expected: list[str], rank: int) -> list[str]:
        """What one member holds of it."""
        return [expected[rank]] if self.call == "reduce_scatter" and expected != ["UsageError"] else expected


def draw_cases(seed: int, world: int, rounds: int) -> list[Case]:
    """In each round: every dtype with every op that it has, with two codecs; and the other collectives with it."""
    rng = random.Random(seed)
    cases = [case for _ in range(rounds) for case in _round(rng, world)]
    rng.shuffle(cases)
    return cases


def _round(rng: random.Random, world: int) -> Iterator[Case]:
    for dtype in DTYPES:
        floats = dtype in FLOATS
        for op in OPS if floats else [op for op in OPS if op != "avg"]:
            for algorithm in (rng.choice(["auto", "direct"]), "ring"):
                yield _case(rng, "all_reduce", dtype, world, op=op, algorithm=algorithm)
                if floats:
                    for codec in rng.sample(_CODECS, 2):
                        yield _case(
                            rng, "all_reduce", dtype, world, op=op, algorithm=algorithm,
                            quantize=codec, block=rng.choice(_BLOCKS),
                        )  # fmt: skip
            for algorithm in (rng.choice(["auto", "direct"]), "ring"):
                codec = rng.choice([None, *_CODECS]) if floats else None
                yield _case(
                    rng, "reduce_scatter", dtype, world, op=op, algorithm=algorithm,
                    quantize=codec, block=rng.choice(_BLOCKS),
                )  # fmt: skip
        if floats:
            for codec in (None, rng.choice(_CODECS)):
                for pool in (_WEIGHTS, _WEIGHTS[:-_WILD_WEIGHTS], _WEIGHTS[:3]):
                    weights = tuple(rng.choice(pool) for _ in range(world))
                    call = rng.choice(["all_reduce", "all_reduce", "reduce_scatter"])
                    yield _case(
                        rng, call, dtype, world, op="avg", weights=weights, algorithm=rng.choice(["direct", "ring"]),
                        quantize=codec, block=rng.choice(_BLOCKS),
                    )  # fmt: skip
        yield _case(rng, "broadcast", dtype, world, root=rng.randrange(world))
        yield _case(rng, "all_gather", dtype, world)
        yield _case(
            rng, "all_reduce_many", dtype, world, arrays=rng.randint(0, 5), in_flight=rng.randint(1, 4),
            op=rng.choice(OPS) if floats else "sum", quantize=rng.choice([None, *_CODECS]) if floats else None,
        )  # fmt: skip


def _case(rng: random.Random, call: str, dtype: str, world: int, arrays: int = 1, **settings: Any) -> Case:
    counts = tuple(_count(rng, world, np.dtype(dtype).itemsize) for _ in range(arrays))
    tag = rng.choice([0, 0, 1, 2**32 - 1])
    return Case(call, rng.getrandbits(30), dtype, counts, rng.choice(KINDS), tag, **settings)


def _count(rng: random.Random, world: int, itemsize: int) -> int:
    """Mostly small and odd; now and then some pieces, with an element that does not divide."""
    small = [0, 1, 2, world - 1, world, world + 1, 63, 64, 65, 127, 251, 1031, 4099, rng.randrange(20_000)]
    if rng.random() < 0.04:
        size_bytes = PIECE_BYTES + rng.choice([0, PIECE_BYTES // 2, PIECE_BYTES * world])
        return size_bytes // itemsize + rng.choice([-1, 0, 1])
    return rng.choice(small)


# ---- on a member


class Memory:
    """A copy of an array at some place in a larger one, which nobody may touch."""

    def __init__(self, array: Array, offset: int) -> None:
        start = _GUARD_BYTES + offset
        self._whole = np.full(start + array.nbytes + _GUARD_BYTES, _GUARD, np.uint8)
        self._inside = slice(start, start + array.nbytes)
        self.array: Array = self._whole[self._inside].view(array.dtype).reshape(array.shape)
        self.array[...] = array

    def guards_stand(self) -> bool:
        outside = np.delete(self._whole, self._inside)
        return bool((outside == _GUARD).all())


def run_case(comm: pyccl.Communicator, case: Case, rng: random.Random) -> tuple[list[str], bool]:
    """(sha of every result or the error's class, whether all else is as it was). rng: of this member alone."""
    rank = comm.members.index(comm.peer_id)
    inputs, shapes = case.inputs(rank), random.Random(case.seed)
    scatter = case.call == "reduce_scatter"
    xs = [Memory(_shaped(x, shapes, scatter), _offset(x, rng)) for x in inputs]
    if case.call == "broadcast":
        if rank == case.root:
            xs[0].array.flags.writeable = False
        comm.broadcast(xs[0].array, comm.members[case.root], tag=case.tag)
        return [sha(xs[0].array)], xs[0].guards_stand()
    if case.call == "all_gather":
        out = comm.all_gather(xs[0].array, tag=case.tag)
        shape_ok = out.shape == (comm.group_world_size, *xs[0].array.shape) and out.dtype == inputs[0].dtype
        return [sha(out)], shape_ok and same(xs[0].array, inputs[0]) and xs[0].guards_stand()
    keywords: dict[str, Any] = {"op": case.op, "quantize": case.quantize, "quantize_block": case.block, "tag": case.tag}
    if case.call == "all_reduce_many":
        infos = comm.all_reduce_many([x.array for x in xs], max_in_flight=case.in_flight, **keywords)
        return [sha(x.array) for x in xs], len(infos) == len(xs) and all(x.guards_stand() for x in xs)
    if case.weights is not None:
        keywords["weight"] = case.weights[rank]
    keywords["algorithm"] = case.algorithm
    if scatter:
        return _reduce_scatter(comm, xs[0], inputs[0], keywords)
    return _all_reduce(comm, xs[0], inputs[0], keywords, rng)


def _all_reduce(
    comm: pyccl.Communicator, x: Memory, before: Array, keywords: dict[str, Any], rng: random.Random
) -> tuple[list[str], bool]:
    where = rng.choice(["in place", "in place", "out", "out", "out is x"])  # members need not agree on it
    out = x
    if where == "out":
        x.array.flags.writeable = False
        out = Memory(np.full(x.array.shape, 77, before.dtype), _offset(before, rng))
    try:
        comm.all_reduce(x.array, out=None if where == "in place" else out.array, **keywords)
    except pyccl.UsageError as e:
        return [type(e).__name__], same(x.array, before) and x.guards_stand()
    kept = out is x or same(x.array, before)
    return [sha(out.array)], kept and x.guards_stand() and out.guards_stand()


def _reduce_scatter(
    comm: pyccl.Communicator, x: Memory, before: Array, keywords: dict[str, Any]
) -> tuple[list[str], bool]:
    try:
        part = comm.reduce_scatter(x.array, **keywords)
    except pyccl.UsageError as e:
        return [type(e).__name__], same(x.array, before) and x.guards_stand()
    rank, world = comm.members.index(comm.peer_id), comm.group_world_size
    like = np.array_split(x.array, world)[rank]
    shape_ok = part.shape == like.shape and part.dtype == like.dtype
    return [sha(part)], shape_ok and same(x.array, before) and x.guards_stand()


def _shaped(x: Array, rng: random.Random, scatter: bool = False) -> Array:
    shapes: list[tuple[int, ...]] = [x.shape, (1, x.size), (x.size, 1)]
    if x.size == 1 and not scatter:
        shapes.append(())
    if x.size % 3 == 0:
        shapes.append((3, x.size // 3))
    return x.reshape(rng.choice(shapes))


def _offset(x: Array, rng: random.Random) -> int:
    """In bytes: aligned, aligned for an element alone, or not at all."""
    return rng.choice([0, 0, x.itemsize, 3 * x.itemsize, rng.randrange(64)])


def same(a: Array, b: Array) -> bool:
    return a.tobytes() == b.tobytes()


def run_cases(comm: pyccl.Communicator, seed: int, rounds: int, part: slice) -> list[Any]:
    """Part of the cases of (seed, world), one after the other."""
    rng = random.Random(f"{seed} {comm.peer_id}")
    return [run_case(comm, case, rng) for case in draw_cases(seed, comm.group_world_size, rounds)[part]]


def check_cases(seed: int, world: int, cases: Sequence[Case], told: Sequence[Sequence[Any]]) -> None:
    """told: [rank][case] of run_cases. Every member holds the bits of the oracle and left all else alone."""
    for number, case in enumerate(cases):
        expected = case.expected(world)
        for rank, of_rank in enumerate(told):
            results, kept = of_rank[number]
            wanted = case.expected_of(expected, rank)
            assert results == wanted, f"seed {seed}, world {world}: other bits than the oracle's: {case}"
            assert kept, f"seed {seed}, world {world}: something else was changed, too: {case}"
