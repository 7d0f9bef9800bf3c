"""What one round does: a pure function of (seed, revision); inputs: of (seed, number of the process, revision, index).

Peers and oracle import the same functions, so no array travels between them. A round's results go into the shared
state: what two members did differently once, their digests tell for ever.
"""

from __future__ import annotations

import hashlib
import importlib.util
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pyccl.codecs import CODECS
from pyccl.reference import reference_all_reduce
from pyccl.state import SharedState

Array = np.ndarray[Any, Any]

INTEGERS: Final = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
FLOATS: Final = ("float16", "float32", "float64")
STATE_BYTES: Final = 2_500_000  # chunks of a MiB, the last one not whole
TOUCHED_BYTES: Final = 40_000  # of the state, in each round
COUNT_MAX: Final = 30_000
COUNT_QUANTIZED_MAX: Final = 8_000  # the oracle is slow at these
COUNT_LARGE: Final = 400_000  # now and then, so that faults meet operations on their way
LARGE_EVERY: Final = 6


@dataclass(frozen=True, slots=True)
class Op:
    """One all-reduce of a round. `index` is its place in the plan, not in the order of submission."""

    index: int
    tag: int
    dtype: str
    count: int
    op: str
    quantize: str | None
    quantize_block: int
    weighted: bool
    in_place: bool


def dtypes() -> tuple[str, ...]:
    """bfloat16 where there is an ml_dtypes to give it to NumPy; equal for all processes of one installation."""
    return (*INTEGERS, *FLOATS, *(("bfloat16",) if importlib.util.find_spec("ml_dtypes") else ()))


def dtype_of(name: str) -> np.dtype[Any]:
    if name == "bfloat16":
        import ml_dtypes  # noqa: PLC0415  optional: see dtypes()

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)


def plan(seed: int, revision: int) -> tuple[Op, ...]:
    """The operations of the round that makes the next revision, at most two of them with one tag."""
    rng = random.Random(f"plan {seed} {revision}")
    kinds = dtypes()
    return tuple(_op(rng, index, index // 2 if revision % 2 else index, kinds) for index in range(rng.randint(2, 6)))


def _op(rng: random.Random, index: int, tag: int, kinds: Sequence[str]) -> Op:
    dtype = rng.choice(kinds)
    is_float = dtype not in INTEGERS
    quantize = rng.choice(tuple(CODECS)) if is_float and rng.random() < 0.5 else None
    op = rng.choice(("sum", "avg", "prod", "min", "max") if is_float else ("sum", "prod", "min", "max"))
    most = COUNT_QUANTIZED_MAX if quantize else COUNT_MAX
    large = quantize is None and rng.randrange(LARGE_EVERY) == 0
    count = COUNT_LARGE if large else int(most ** rng.random())
    return Op(
        index=index, tag=tag, dtype=dtype, count=count, op=op, quantize=quantize,
        quantize_block=rng.choice((256, 1024, 4096)), weighted=op == "avg" and rng.random() < 0.5,
        in_place=rng.random() < 0.5,
    )  # fmt: skip


def order(seed: int, revision: int, number: int, ops: Sequence[Op]) -> list[Op]:
    """In which this member submits them: any, but for those with one tag, whose order pairs them up."""
    rng = random.Random(f"order {seed} {revision} {number}")
    tags = [op.tag for op in ops]
    rng.shuffle(tags)
    waiting = {tag: [op for op in ops if op.tag == tag] for tag in tags}
    return [waiting[tag].pop(0) for tag in tags]


def make_input(seed: int, number: int, revision: int, op: Op) -> Array:
    """Of the process `number`. Integers wrap in every sum; floats round in every one."""
    return _draw(np.random.default_rng([seed, number, revision, op.index]), op.dtype, op.count)


def exchange_input(seed: int, number: int, revision: int) -> Array:
    rng = np.random.default_rng([seed, number, revision, 1 << 20])
    return _draw(rng, "uint64", 1 + revision * 37 % 9000)


def _draw(rng: np.random.Generator, dtype: str, count: int) -> Array:
    if dtype in INTEGERS:
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, count, dtype=dtype, endpoint=True)
    return rng.standard_normal(count, dtype=np.float32).astype(dtype_of(dtype))


def weight(number: int) -> float:
    """Of this process in weighted averages."""
    return 1.0 + number % 4 * 0.75


def expected(seed: int, revision: int, op: Op, numbers: Sequence[int]) -> Array:
    """What everybody must get when the processes `numbers`, in rank order, took part."""
    return reference_all_reduce(
        [make_input(seed, number, revision, op) for number in numbers],
        op=op.op,
        quantize=op.quantize,
        quantize_block=op.quantize_block,
        weights=[weight(number) for number in numbers] if op.weighted else None,
    )


def partner(seed: int, revision: int, members: Sequence[str], me: str) -> str | None:
    """Whom to swap with in this round, if anybody; `members` must be equal on all."""
    rng = random.Random(f"pairs {seed} {revision}")
    if rng.randrange(3):
        return None
    mixed = sorted(members)
    rng.shuffle(mixed)
    at = mixed.index(me) ^ 1
    return mixed[at] if at < len(mixed) else None


def bits(array: Array) -> str:
    """What two arrays of one kind have in common when every bit is equal."""
    return hashlib.blake2b(array.reshape(-1).view(np.uint8).data, digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Outcome:
    """An all-reduce that succeeded, as every member must see it."""

    index: int
    bits: str
    epoch: int
    members: tuple[str, ...]


def new_state(digest: str = "fast") -> SharedState:
    """Revision 0, equal for all."""
    arrays = {
        "chain": np.zeros(32, np.uint8),
        "momentum": np.zeros(STATE_BYTES // 5, np.uint8),
        "weights": np.zeros(STATE_BYTES - STATE_BYTES // 5, np.uint8),
    }
    return SharedState(arrays, 0, digest=digest)


def advance(state: SharedState, outcomes: Sequence[Outcome]) -> None:
    """One revision on. The chain hashes what came before, every result and who took part in it; what is written
    where follows from the chain, so a newcomer needs the bytes, and a fork never looks like the trunk again."""
    chain = state.arrays["chain"]
    digest = hashlib.sha256(chain.tobytes())
    for outcome in sorted(outcomes, key=lambda outcome: outcome.index):
        digest.update(f"{outcome.index} {outcome.bits} {outcome.epoch} {' '.join(outcome.members)};".encode())
    chain[:] = np.frombuffer(digest.digest(), np.uint8)
    rng = np.random.default_rng(np.frombuffer(digest.digest(), np.uint32))
    for name in ("momentum", "weights"):
        array = state.arrays[name]
        at = int(rng.integers(array.size - TOUCHED_BYTES))
        array[at : at + TOUCHED_BYTES] ^= rng.integers(0, 256, TOUCHED_BYTES, np.uint8)
    state.revision += 1
