"""``pyccl bench kernels``: the C core's element kernels on one thread, each instruction set that this CPU has.

Rates are GiB of elements a second: those that a fold of two arrays reads (both) or an encoder reads, those that a
decoder writes. "cache" works on about 1 MiB in all, input and output together, "memory" on the size that is asked
for, in codecs piece after piece. Functions that this build of the core lacks are left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from typing import Any, Final

import numpy as np

from pyccl._native._pyccl import ffi, lib
from pyccl.bench.figures import GIB, MIB, NS, Summary, summarize
from pyccl.reference import QUANTIZE_BLOCK

Array = np.ndarray[Any, Any]

CACHE_BYTES: Final = 1 * MIB
INPUTS: Final = 2  # arrays that are folded
BLOCK: Final = QUANTIZE_BLOCK
PIECE: Final = 1 << 18  # elements that a call encodes, as an all-reduce does
SAMPLE_S: Final = 0.001  # shorter than a scheduler's slice: on a busy machine most samples are undisturbed
SAMPLES: Final = (5, 25)  # at least, at most
BUDGET_S: Final = 0.2  # after which the least will do
KERNELS: Final = ("scalar", "avx2", "avx512", "neon")
OPS: Final = ("sum", "avg", "prod", "min", "max")
DTYPES: Final = (
    "float32", "float64", "float16", "bfloat16",
    "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
)  # fmt: skip
CODEC_DTYPES: Final = ("float32", "float16", "bfloat16")
ERROR_BLOCKS: Final = 256  # that errors are taken over
DATA: Final[dict[str, Callable[[np.random.Generator, int], Array]]] = {
    "normal": lambda rng, count: rng.standard_normal(count),
    "heavy tails": lambda rng, count: rng.standard_t(3, count),  # Student's t with 3 degrees of freedom
}


@dataclass(frozen=True, slots=True)
class Rate:
    """GiB of elements a second."""

    what: str  # "reduce", "encode uint8", "decode uint8", "memcpy"
    dtype: str
    op: str
    kernel: str
    place: str  # "cache" or "memory"
    gib_per_s: Summary

    def to_json(self) -> dict[str, Any]:
        return {
            "what": self.what, "dtype": self.dtype, "op": self.op, "kernel": self.kernel, "place": self.place,
            "gib_per_s": self.gib_per_s.to_json(),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class CodecError:
    """What a trip through a codec costs float32 elements."""

    codec: str
    data: str  # a key of DATA
    block: int
    bits: float  # of an element on the wire, heads included
    rms: float  # of the error, over that of the data
    worst: float  # the largest error, over the largest element

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def sample(run: Callable[[], object], size_bytes: int, sample_s: float = SAMPLE_S) -> Summary:
    """GiB a second over some samples, each of as many calls as fill `sample_s`."""
    run()
    begun_ns = time.monotonic_ns()
    run()
    once_ns = max(time.monotonic_ns() - begun_ns, 1)
    calls = max(1, round(sample_s * NS / once_ns))
    rates: list[float] = []
    least, most = SAMPLES
    while len(rates) < (least if time.monotonic_ns() - begun_ns > BUDGET_S * NS else most):
        start_ns = time.monotonic_ns()
        for _ in range(calls):
            run()
        rates.append(size_bytes * calls / GIB / ((time.monotonic_ns() - start_ns) / NS))
    return summarize(rates)


def kernels_here() -> tuple[str, ...]:
    """Names of the instruction sets that the core has for this CPU; ("default",) where it can't be told to choose."""
    if not hasattr(lib, "pyccl_kernel_select"):
        return ("default",)
    found = tuple(name for name in KERNELS if lib.pyccl_kernel_select(name.encode()) == lib.PYCCL_OK)
    _select("auto")
    return found


@contextmanager
def kernel(name: str) -> Iterator[None]:
    """Use one instruction set in this process."""
    _select(name)
    try:
        yield
    finally:
        _select("auto")


def _select(name: str) -> None:
    if name != "default" and hasattr(lib, "pyccl_kernel_select"):
        assert lib.pyccl_kernel_select(name.encode()) == lib.PYCCL_OK, name


def _pin(array: Array) -> Any:
    return ffi.from_buffer("uint8_t[]", array)


def _code(dtype: str) -> int | None:
    return getattr(lib, f"PYCCL_{dtype.upper()}", None)


def _elements(dtype: str, count: int, seed: int) -> Array:
    """Raw bytes of `count` elements: floats in 1..2, so that nothing overflows or becomes subnormal; small integers."""
    numbers = np.random.default_rng(seed).random(count, np.float32) + np.float32(1)
    if dtype == "bfloat16":
        return (numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    if dtype.startswith("float"):
        return numbers.astype(dtype).view(np.uint8)
    return (numbers * 3).astype(dtype).view(np.uint8)


def measure(
    memory_bytes: int,
    dtypes: Iterable[str] = DTYPES,
    ops: Iterable[str] = OPS,
    sample_s: float = SAMPLE_S,
) -> list[Rate]:
    """Every kernel in every place; then copies to compare with."""
    dtypes, ops = tuple(dtypes), tuple(ops)
    rates: list[Rate] = []
    for place, size_bytes in (("cache", CACHE_BYTES), ("memory", memory_bytes)):
        rates += _copies(place, size_bytes, sample_s)
        for dtype in dtypes:
            rates += _reduces(dtype, ops, place, size_bytes, sample_s)
            if dtype in CODEC_DTYPES:
                rates += _codecs(dtype, place, size_bytes, sample_s)
    return rates


def _copies(place: str, size_bytes: int, sample_s: float) -> list[Rate]:
    source = _elements("float32", max(size_bytes // 8, 1), 1)
    target = np.empty_like(source)
    rate = sample(lambda: np.copyto(target, source), source.nbytes, sample_s)
    return [Rate("memcpy", "", "", "numpy", place, rate)]


def _reduces(dtype: str, ops: tuple[str, ...], place: str, size_bytes: int, sample_s: float) -> Iterator[Rate]:
    code = _code(dtype)
    item_bytes = 0 if code is None else int(lib.pyccl_dtype_size(code))
    if item_bytes == 0:
        return
    count = max(size_bytes // (INPUTS + 1) // item_bytes, 1)
    arrays = [_elements(dtype, count, seed) for seed in range(INPUTS)]
    out = np.empty_like(arrays[0])
    pins = [_pin(array) for array in (*arrays, out)]
    inputs = ffi.new("const void *[]", [ffi.cast("const void *", pin) for pin in pins[:INPUTS]])
    for op in ops:
        arguments = (code, getattr(lib, f"PYCCL_{op.upper()}"), inputs, ffi.NULL, INPUTS, count, pins[INPUTS])
        if lib.pyccl_reduce(*arguments) != lib.PYCCL_OK:
            continue  # an integer average, or a dtype that this core can't reduce
        for name in kernels_here():
            with kernel(name):
                rate = sample(partial(lib.pyccl_reduce, *arguments), INPUTS * out.nbytes, sample_s)
            yield Rate("reduce", dtype, op, name, place, rate)


def codecs() -> dict[str, int]:
    """Codecs of this core: name -> number."""
    if not hasattr(lib, "pyccl_codec_encode"):
        return {}
    return {
        name.removeprefix("PYCCL_CODEC_").lower(): getattr(lib, name)
        for name in dir(lib)
        if name.startswith("PYCCL_CODEC_") and name != "PYCCL_CODEC_NONE"
    }


def codec_errors() -> list[CodecError]:
    """Every codec on the same elements, with the block that all_reduce takes when it is not told another."""
    count, block = ERROR_BLOCKS * BLOCK, BLOCK
    found = []
    for data, drawn in DATA.items():
        x = drawn(np.random.default_rng(1), count).astype(np.float32)
        for codec, number in codecs().items():
            encoded, decoded = np.empty(int(lib.pyccl_codec_size(number, block, count)), np.uint8), np.empty_like(x)
            pins = [_pin(array.view(np.uint8)) for array in (x, encoded, decoded)]
            assert lib.pyccl_codec_encode(number, lib.PYCCL_FLOAT32, block, pins[0], count, pins[1]) == lib.PYCCL_OK
            assert lib.pyccl_codec_decode(number, lib.PYCCL_FLOAT32, block, pins[1], count, pins[2]) == lib.PYCCL_OK
            error, size = np.abs(x.astype(np.float64) - decoded), np.abs(x.astype(np.float64))
            rms = float(np.sqrt((error**2).mean() / (size**2).mean()))
            worst = float(error.max() / size.max())
            found.append(CodecError(codec, data, block, 8 * encoded.size / count, rms, worst))
    return found


def _in_turn(function: Callable[..., object], calls: list[tuple[Any, ...]]) -> Callable[[], object]:
    """A call with the next arguments each time."""
    following = cycle(calls)
    return lambda: function(*next(following))


def _codecs(dtype: str, place: str, size_bytes: int, sample_s: float) -> Iterator[Rate]:
    code = _code(dtype)
    if code is None:
        return
    item_bytes = int(lib.pyccl_dtype_size(code))
    count = max(size_bytes // (item_bytes + 1), 1)
    part = min(count, PIECE)
    values = _elements(dtype, count // part * part, 1)
    for codec, number in codecs().items():
        part_bytes = int(lib.pyccl_codec_size(number, BLOCK, part))
        encoded = np.full(count // part * part_bytes, 0, np.uint8)  # written once: no page is new while it is measured
        x, codes = _pin(values), _pin(encoded)
        places = [(x + i * part * item_bytes, codes + i * part_bytes) for i in range(count // part)]
        into = _in_turn(lib.pyccl_codec_encode, [(number, code, BLOCK, at, part, to) for at, to in places])
        back = _in_turn(lib.pyccl_codec_decode, [(number, code, BLOCK, to, part, at) for at, to in places])
        for name in kernels_here():
            with kernel(name):
                encode = sample(into, part * item_bytes, sample_s)
                decode = sample(back, part * item_bytes, sample_s)
            yield Rate(f"encode {codec}", dtype, "", name, place, encode)
            yield Rate(f"decode {codec}", dtype, "", name, place, decode)
