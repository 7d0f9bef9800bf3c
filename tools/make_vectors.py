#!/usr/bin/env python3
"""Write the golden vectors of ``proto/vectors``: ``python tools/make_vectors.py [--check]``.

A second implementation of ``proto/wire.md`` 3, with ``struct`` and the reference XXH3 of the ``xxhash`` package, so
that the C code is not its own judge. Every vector is a line; the C and the Python tests both load them:

    frames.txt   NAME ok|refused HEADER [FIELD=VALUE ...]
    specs.txt    NAME ok|refused SPEC [FIELD=VALUE ...]     hash= is the spec hash that DATA frames carry
    digests.txt  LENGTH SEED XXH3_64 XXH3_128               of the bytes (i * 131 + 7) & 255
    states.txt   NAME DIGEST REVISION ARRAYS LAYOUT TABLE ROOT     of shared state
    records.txt  NAME ok|refused RECORD [FIELD=VALUE ...]     of a state sync
    codecs.txt   NAME CODEC DTYPE BLOCK COUNT INPUT ENCODED DECODED     INPUT - where only decoding is meant

Bytes are hexadecimal, numbers decimal. What is refused has a correct checksum unless its name says otherwise, so that
the one wrong field decides. ``--check`` writes nothing and fails when a file is not what this script would write.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import xxhash

VECTORS = Path(__file__).resolve().parents[1] / "proto" / "vectors"
MAGIC = 0x31435950
PIECE_MAX = 2**20
U32_MAX = 2**32 - 1
U64_MAX = 2**64 - 1

FRAME_TYPES = {
    "open": 1, "data": 2, "done": 3, "abort": 4, "ask": 5, "answer": 6, "settled": 7,
    "heartbeat": 8, "state_ask": 9, "state_data": 10, "state_none": 11, "state_packed": 12,
}  # fmt: skip
FRAME_FIELDS = (
    "type", "phase", "space", "epoch_number", "epoch_tag", "seq", "tag", "length", "offset", "value", "spec_hash",
)  # fmt: skip
SPEC_FIELDS = (
    "kind", "dtype", "op", "codec", "algorithm", "retry", "space", "guard", "tag", "block", "count", "root",
)  # fmt: skip

Fields = dict[str, int]


def encode_frame(fields: Fields, *, magic: int = MAGIC, zero: int = 0, checksum_flip: int = 0) -> bytes:
    """Any header, right or wrong."""
    head = struct.pack(
        "<IBBBBQQQIIQQI",
        magic,
        fields["type"],
        fields["phase"],
        fields["space"],
        zero,
        fields["epoch_number"],
        fields["epoch_tag"],
        fields["seq"],
        fields["tag"],
        fields["length"],
        fields["offset"],
        fields["value"],
        fields["spec_hash"],
    )
    return head + struct.pack("<I", (xxhash.xxh3_64_intdigest(head) & U32_MAX) ^ checksum_flip)


def frame(type_name: str, /, **changes: int) -> Fields:
    return dict.fromkeys(FRAME_FIELDS, 0) | {"type": FRAME_TYPES[type_name]} | changes


# Where in the run a frame belongs; the values have no two bytes alike, so that a swapped field shows.
EPOCH = {"epoch_number": 0x0102030405060708, "epoch_tag": 0x1112131415161718}
OF_OPERATION = EPOCH | {"seq": 0x2122232425262728, "tag": 0x31323334}
OF_STATE = EPOCH | {"seq": 0x4142434445464748, "offset": 0x5152535455565758}
TYPICAL = {
    "open": frame("open", **OF_OPERATION, space=1, length=40, value=0x6162636465666768),
    "data": frame(
        "data", **OF_OPERATION, space=1, phase=1, length=65536, offset=0x7172737475767778, spec_hash=0x81828384
    ),
    "done": frame("done", **OF_OPERATION, space=1, value=0x9192939495969798),
    "abort": frame("abort", **OF_OPERATION, space=1, value=30),
    "ask": frame("ask", **OF_OPERATION, space=1),
    "answer": frame("answer", **OF_OPERATION, space=1, value=20),
    "settled": frame("settled", **OF_OPERATION, space=1),
    "heartbeat": frame("heartbeat"),
    "state_ask": frame("state_ask", **OF_STATE, value=4096),
    "state_data": frame("state_data", **OF_STATE, length=4096),
    "state_none": frame("state_none", **OF_STATE),
    "state_packed": frame("state_packed", **OF_STATE, length=4095, value=4096),
}
# The ends of each range: (name, type, changes).
FRAMES_AT_LIMITS: list[tuple[str, str, Fields]] = [
    ("open_zero", "open", dict.fromkeys(FRAME_FIELDS[2:7], 0) | {"value": 0}),
    ("open_value_most", "open", {"value": U64_MAX}),
    ("open_weight_one", "open", {"offset": 0x3FF << 52}),
    ("open_weight_most", "open", {"offset": (0x7FF << 52) - 1}),
    ("data_length_least", "data", {"length": 1, "phase": 0}),
    ("data_length_most", "data", {"length": PIECE_MAX}),
    ("data_all_ones", "data", dict.fromkeys(("epoch_number", "epoch_tag", "seq", "offset"), U64_MAX) | {
        "tag": U32_MAX, "spec_hash": U32_MAX}),
    ("open_of_a_pair", "open", {"space": 2}),
    ("data_of_a_pair", "data", {"space": 2}),
    ("done_value_zero", "done", {"value": 0, "space": 0}),
    ("done_value_most", "done", {"value": U64_MAX}),
    ("open_refuses_its_input", "open", {"phase": 1}),
    ("done_complains_of_a_contribution", "done", {"offset": 256}),
    ("done_complains_of_nobody", "done", {"offset": 257}),
    ("done_complains_of_a_share", "done", {"offset": 1 << 16}),
    ("done_complains_of_both", "done", {"offset": 257 | 256 << 16}),
    ("abort_value_least", "abort", {"value": 1}),
    ("abort_value_most", "abort", {"value": 255 | 257 << 8}),
    ("abort_of_the_first", "abort", {"value": 30 | 1 << 8}),
    ("answer_committed", "answer", {"value": 0}),
    ("answer_value_most", "answer", {"value": 255 | 257 << 8}),
    ("answer_of_the_last", "answer", {"value": 32 | 256 << 8}),
    ("state_ask_value_least", "state_ask", {"value": 1, "offset": 0}),
    ("state_ask_value_most", "state_ask", {"value": PIECE_MAX}),
    ("state_ask_packed", "state_ask", {"phase": 1}),
    ("state_packed_least", "state_packed", {"length": 1, "value": 2}),
    ("state_packed_most", "state_packed", {"length": PIECE_MAX - 1, "value": PIECE_MAX}),
    ("state_data_length_least", "state_data", {"length": 1}),
    ("state_data_length_most", "state_data", {"length": PIECE_MAX}),
]  # fmt: skip
# Fields that a type does not name must be zero.
UNNAMED = {
    "open": ("spec_hash",),
    "data": ("value",),
    "done": ("phase", "length", "spec_hash"),
    "abort": ("phase", "length", "offset", "spec_hash"),
    "ask": ("phase", "length", "offset", "value", "spec_hash"),
    "answer": ("phase", "length", "offset", "spec_hash"),
    "settled": ("phase", "length", "offset", "value", "spec_hash"),
    "heartbeat": FRAME_FIELDS[1:],
    "state_ask": ("space", "tag", "length", "spec_hash"),
    "state_data": ("phase", "space", "tag", "value", "spec_hash"),
    "state_none": ("phase", "space", "tag", "length", "value", "spec_hash"),
    "state_packed": ("phase", "space", "tag", "spec_hash"),
}
# One step beyond each range.
FRAMES_BEYOND_LIMITS: list[tuple[str, str, Fields]] = [
    ("type_zero", "done", {"type": 0}),
    ("type_13", "done", {"type": 13}),
    ("type_255", "done", {"type": 255}),
    ("open_length_39", "open", {"length": 39}),
    ("open_length_41", "open", {"length": 41}),
    ("open_length_zero", "open", {"length": 0}),
    ("open_space_3", "open", {"space": 3}),
    ("open_phase_2", "open", {"phase": 2}),
    ("done_complains_of_rank_257", "done", {"offset": 258}),
    ("done_complains_of_share_257", "done", {"offset": 257 << 16}),
    ("done_complaint_high_half", "done", {"offset": 1 << 32}),
    ("open_weight_infinite", "open", {"offset": 0x7FF << 52}),
    ("open_weight_nan", "open", {"offset": (0x7FF << 52) + 1}),
    ("open_weight_negative", "open", {"offset": (1 << 63) | (0x3FF << 52)}),
    ("open_weight_minus_zero", "open", {"offset": 1 << 63}),
    ("data_phase_2", "data", {"phase": 2}),
    ("data_space_3", "data", {"space": 3}),
    ("data_space_255", "data", {"space": 255}),
    ("data_length_zero", "data", {"length": 0}),
    ("data_length_beyond", "data", {"length": PIECE_MAX + 1}),
    ("data_length_all_ones", "data", {"length": U32_MAX}),
    ("abort_value_zero", "abort", {"value": 0}),
    ("abort_value_256", "abort", {"value": 256}),
    ("abort_value_high_half", "abort", {"value": 30 + 2**32}),
    ("answer_value_256", "answer", {"value": 256}),
    ("abort_of_rank_257", "abort", {"value": 30 | 258 << 8}),
    ("answer_of_rank_257", "answer", {"value": 30 | 258 << 8}),
    ("state_ask_value_zero", "state_ask", {"value": 0}),
    ("state_ask_value_beyond", "state_ask", {"value": PIECE_MAX + 1}),
    ("state_ask_phase_2", "state_ask", {"phase": 2}),
    ("state_packed_length_zero", "state_packed", {"length": 0}),
    ("state_packed_is_not_shorter", "state_packed", {"length": 4096}),
    ("state_packed_value_zero", "state_packed", {"value": 0}),
    ("state_packed_value_beyond", "state_packed", {"value": PIECE_MAX + 1}),
    ("state_packed_value_high_half", "state_packed", {"value": 4096 + 2**32}),
    ("state_data_length_zero", "state_data", {"length": 0}),
    ("state_data_length_beyond", "state_data", {"length": PIECE_MAX + 1}),
]


def frame_lines() -> Iterator[str]:
    def ok(name: str, fields: Fields) -> str:
        return f"{name} ok {encode_frame(fields).hex()} " + " ".join(f"{key}={fields[key]}" for key in FRAME_FIELDS)

    for name, fields in TYPICAL.items():
        yield ok(name, fields)
    for name, type_name, changes in FRAMES_AT_LIMITS:
        yield ok(name, TYPICAL[type_name] | changes)
    for name, type_name, changes in FRAMES_BEYOND_LIMITS:
        yield f"{name} refused {encode_frame(TYPICAL[type_name] | changes).hex()}"
    for type_name, fields_zero in UNNAMED.items():
        for field in fields_zero:
            yield f"{type_name}_{field}_not_zero refused {encode_frame(TYPICAL[type_name] | {field: 1}).hex()}"
    data = TYPICAL["data"]
    yield f"magic_of_another_protocol refused {encode_frame(data, magic=MAGIC + 0x01000000).hex()}"
    yield f"magic_zero refused {encode_frame(data, magic=0).hex()}"
    yield f"zero_byte_not_zero refused {encode_frame(data, zero=1).hex()}"
    yield f"checksum_wrong_low_bit refused {encode_frame(data, checksum_flip=1).hex()}"
    yield f"checksum_wrong_high_bit refused {encode_frame(data, checksum_flip=1 << 31).hex()}"
    for name, at in {"epoch_number": 8, "epoch_tag": 16, "seq": 24, "tag": 32, "offset": 40, "spec_hash": 56}.items():
        corrupt = bytearray(encode_frame(data))
        corrupt[at] ^= 0x80
        yield f"data_{name}_corrupt_on_the_way refused {corrupt.hex()}"
    yield f"all_zero refused {bytes(64).hex()}"
    yield f"all_ones refused {'ff' * 64}"


Spec = dict[str, int | bytes]
KINDS = {"all_reduce": 1, "broadcast": 2, "barrier": 3, "all_gather": 4, "exchange": 5, "reduce_scatter": 6}
DTYPES = {
    "int32": 1, "int64": 2, "float32": 3, "float64": 4, "uint8": 5, "int8": 6, "uint16": 7, "int16": 8, "uint32": 9,
    "uint64": 10, "float16": 11, "bfloat16": 12,
}  # fmt: skip
OPS = {"sum": 1, "avg": 2, "prod": 3, "min": 4, "max": 5}
COUNT_MAX = 2**48
ROOT = bytes(range(0xA0, 0xB0))


def row(elements: int) -> bytes:
    """The root of a reduce_scatter."""
    return struct.pack("<QQ", elements, 0)


OF_KIND: dict[str, Spec] = {
    "all_reduce": {"op": 1}, "broadcast": {"root": ROOT}, "barrier": {"count": 0, "dtype": 5},
    "exchange": {"space": 2, "root": ROOT}, "reduce_scatter": {"op": 1, "root": row(1)},
}  # fmt: skip


def spec(kind: str, /, **changes: int | bytes) -> Spec:
    base: Spec = {
        "kind": KINDS[kind], "dtype": 3, "op": 0, "codec": 0, "algorithm": 1, "retry": 1, "space": 0, "guard": 0,
        "tag": 0x31323334, "block": 0, "count": 1_000_003, "root": bytes(16),
    }  # fmt: skip
    return base | OF_KIND.get(kind, {}) | changes


def encode_spec(fields: Spec) -> bytes:
    """Any spec, right or wrong."""
    return struct.pack("<8BIIQ16s", *(fields[key] for key in SPEC_FIELDS))


def limits(peak: float, norm: float, row_elements: int = 0) -> bytes:
    """The root of a guarded reduction."""
    return struct.pack("<Qff", row_elements, peak, norm)


def guard_lines(ok: Callable[[str, Spec], str], refused: Callable[[str, Spec], str]) -> Iterator[str]:
    most = struct.unpack("<f", struct.pack("<I", 0x7F7FFFFF))[0]
    least = struct.unpack("<f", struct.pack("<I", 1))[0]
    for dtype_name, dtype in DTYPES.items():
        guarded = spec("all_reduce", dtype=dtype, guard=1)
        line = ok if "float" in dtype_name else refused
        yield line(f"guarded_{dtype_name}", guarded)
    for kind, elements in (("all_reduce", 0), ("reduce_scatter", 1)):
        for name, peak, norm, good in (
            ("without_limits", 0.0, 0.0, True), ("peak", 1.5, 0.0, True), ("norm", 0.0, 3.0, True),
            ("most", most, most, True), ("least", least, least, True),
            ("peak_infinite", math.inf, 0.0, False), ("norm_infinite", 0.0, math.inf, False),
            ("peak_nan", math.nan, 0.0, False), ("norm_nan", 0.0, math.nan, False), ("peak_negative", -1.0, 0.0, False),
            ("norm_minus_zero", 0.0, -0.0, False),
        ):  # fmt: skip
            line = ok if good else refused
            yield line(f"guarded_{kind}_{name}", spec(kind, guard=1, root=limits(peak, norm, elements)))
        yield refused(f"{kind}_limits_without_guard", spec(kind, root=limits(1.0, 0.0, elements)))
        for algorithm in (0, 2):
            yield refused(f"guarded_{kind}_algorithm_{algorithm}", spec(kind, guard=1, algorithm=algorithm))
        yield ok(f"guarded_{kind}_coded", spec(kind, guard=1, codec=1, block=1024))
    yield refused("guarded_all_reduce_row", spec("all_reduce", guard=1, root=limits(1.0, 1.0, 1)))
    for kind in ("broadcast", "barrier", "all_gather", "exchange"):
        yield refused(f"guarded_{kind}", spec(kind, guard=1))


def spec_lines() -> Iterator[str]:
    def ok(name: str, fields: Spec) -> str:
        encoded = encode_spec(fields)
        shown = {key: value.hex() if isinstance(value, bytes) else value for key, value in fields.items()}
        shown["hash"] = xxhash.xxh3_64_intdigest(encoded) & U32_MAX
        return f"{name} ok {encoded.hex()} " + " ".join(f"{key}={shown[key]}" for key in (*SPEC_FIELDS, "hash"))

    def refused(name: str, fields: Spec) -> str:
        return f"{name} refused {encode_spec(fields).hex()}"

    for dtype_name, dtype in DTYPES.items():
        for op_name, op in OPS.items():
            for kind in ("all_reduce", "reduce_scatter"):
                name, fields = f"{kind}_{op_name}_{dtype_name}", spec(kind, dtype=dtype, op=op)
                good = op_name != "avg" or "float" in dtype_name
                yield ok(name, fields) if good else refused(name, fields)
        for kind in ("broadcast", "barrier", "all_gather", "exchange"):
            yield ok(f"{kind}_{dtype_name}", spec(kind, dtype=dtype))
    for kind in KINDS:
        collective = refused if kind == "exchange" else ok
        yield collective(f"{kind}_no_retry", spec(kind, retry=0))
        yield collective(f"{kind}_of_the_library", spec(kind, space=1, tag=U32_MAX))
        yield ok(f"{kind}_count_zero", spec(kind, count=0, tag=0))
        most = spec(kind, count=COUNT_MAX)
        yield refused("barrier_count_most", most) if kind == "barrier" else ok(f"{kind}_count_most", most)
        yield refused(f"{kind}_count_beyond", spec(kind, count=COUNT_MAX + 1))
        yield refused(f"{kind}_count_all_ones", spec(kind, count=U64_MAX))
        for field, wrong in (
            ("dtype", 0), ("dtype", 13), ("dtype", 255), ("codec", 1), ("algorithm", 3), ("algorithm", 255),
            ("retry", 2), ("space", 0 if kind == "exchange" else 2), ("space", 3), ("guard", 2), ("guard", 255),
            ("block", 1),
        ):  # fmt: skip
            yield refused(f"{kind}_{field}_{wrong}", spec(kind, **{field: wrong}))
        reduces = kind in ("all_reduce", "reduce_scatter")
        for algorithm in (0, 2):
            other = spec(kind, algorithm=algorithm)
            name = f"{kind}_algorithm_{algorithm}"
            yield ok(name, other) if reduces else refused(name, other)
        if reduces:
            yield from (refused(f"{kind}_op_{op}", spec(kind, op=op)) for op in (0, 6, 255))
        else:
            yield from (refused(f"{kind}_op_{op}", spec(kind, op=op)) for op in (1, 5, 255))
        coded = spec(kind, dtype=DTYPES["float32"], codec=1, block=4096)
        yield ok(f"{kind}_coded", coded) if reduces else refused(f"{kind}_coded", coded)
        if "root" not in OF_KIND.get(kind, {}):
            yield refused(f"{kind}_root_not_zero", spec(kind, root=bytes(15) + b"\1"))
    yield refused("exchange_with_oneself", spec("exchange", root=bytes(16)))
    for codec in (2, 3, 4, 5):
        yield ok(f"codec_{codec}", spec("all_reduce", dtype=DTYPES["float32"], codec=codec, block=1024))
        yield refused(f"codec_{codec}_without_block", spec("all_reduce", dtype=DTYPES["float32"], codec=codec))
        yield refused(f"codec_{codec}_of_integers", spec("all_reduce", dtype=DTYPES["int8"], codec=codec, block=1024))
    yield from guard_lines(ok, refused)
    for codec in (6, 255):
        yield refused(f"codec_{codec}", spec("all_reduce", dtype=DTYPES["float32"], codec=codec, block=1024))
    for elements, count, good in (
        (1_000_003, 1_000_003, True), (7, 21, True), (7, 0, True), (COUNT_MAX, COUNT_MAX, True), (COUNT_MAX, 0, True),
        (0, 21, False), (7, 20, False), (22, 21, False), (COUNT_MAX + 1, 0, False), (U64_MAX, 0, False),
    ):  # fmt: skip
        name, fields = f"row_of_{elements}_in_{count}", spec("reduce_scatter", root=row(elements), count=count)
        yield ok(name, fields) if good else refused(name, fields)
    yield refused("row_and_more", spec("reduce_scatter", root=row(1)[:15] + b"\1"))
    for dtype_name, dtype in DTYPES.items():
        coded = spec("all_reduce", dtype=dtype, codec=1, block=64)
        yield ok(f"coded_{dtype_name}", coded) if "float" in dtype_name else refused(f"coded_{dtype_name}", coded)
    for block in (64, 65536):
        yield ok(f"block_{block}", spec("all_reduce", dtype=DTYPES["float32"], codec=1, block=block))
    for block in (0, 32, 63, 4095, 4097, 96, 131072, U32_MAX):
        yield refused(f"block_{block}", spec("all_reduce", dtype=DTYPES["float32"], codec=1, block=block))
    yield refused("barrier_count_one", spec("barrier", count=1))
    yield from (refused(f"kind_{kind}", spec("all_gather", kind=kind)) for kind in (0, 7, 255))
    yield refused("all_zero", spec("all_gather") | dict.fromkeys(SPEC_FIELDS[:-1], 0))


DIGEST_LENGTHS = (
    *range(36), 47, 48, 49, 63, 64, 65, 80, 95, 96, 97, 112, 127, 128, 129, 130, 143, 144, 145, 159, 160, 161, 192, 239,
    240, 241, 255, 256, 257, 319, 320, 321, 511, 512, 513, 1023, 1024, 1025, 1087, 1088, 1089, 2047, 2048, 2049, 2112,
    3000, 4096, 10_000, 65_535, 65_536, 100_003,
)  # fmt: skip
DIGEST_SEEDS = (0, 1, 0x9E3779B185EBCA8D, U64_MAX)


def digest_lines() -> Iterator[str]:
    pattern = bytes((i * 131 + 7) & 255 for i in range(max(DIGEST_LENGTHS)))
    for length in DIGEST_LENGTHS:
        for seed in DIGEST_SEEDS:
            data = pattern[:length]
            yield f"{length} {seed} {xxhash.xxh3_64_hexdigest(data, seed)} {xxhash.xxh3_128_hexdigest(data, seed)}"


def f32(x: float) -> float:
    """Rounded to float32. Sums, products and quotients of two float32 come out as IEEE float32 arithmetic has them."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", x))[0])
    except OverflowError:
        return math.copysign(math.inf, x)


DTYPE_BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
DTYPE_MOST = {"float32": f32(2.0**128 - 2.0**104), "float16": 65504.0, "bfloat16": 2.0**128 - 2.0**120}
DTYPE_MOST["float64"] = DTYPE_MOST["float32"]
DTYPE_NAN = {"float32": "0000c07f", "float64": "000000000000f87f", "float16": "007e", "bfloat16": "c07f"}


def unpack_floats(dtype: str, data: bytes) -> list[float]:
    """As float32: float64 rounded, the others exact."""
    if dtype == "bfloat16":
        return [struct.unpack("<f", b"\0\0" + data[i : i + 2])[0] for i in range(0, len(data), 2)]
    code = {"float32": "f", "float64": "d", "float16": "e"}[dtype]
    return [f32(x) for x in struct.unpack(f"<{len(data) // DTYPE_BYTES[dtype]}{code}", data)]


def pack_float(dtype: str, x: float) -> bytes:
    if math.isnan(x):
        return bytes.fromhex(DTYPE_NAN[dtype])
    if dtype == "bfloat16":
        (bits,) = struct.unpack("<I", struct.pack("<f", x))
        return struct.pack("<H", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
    if dtype == "float16" and abs(x) >= 65520:
        x = math.copysign(math.inf, x)
    return struct.pack({"float32": "<f", "float64": "<d", "float16": "<e"}[dtype], x)


Encode = Callable[[list[float]], bytes]
Decode = Callable[[bytes, int], list[float]]


def encode_uint8(elements: list[float]) -> bytes:
    """One block (proto/wire.md 3.6)."""
    if not all(math.isfinite(x) for x in elements):
        return bytes.fromhex("0000c07f0000c07f") + bytes(len(elements))
    low, high = min(elements) + 0.0, max(elements)
    if low == high:
        return struct.pack("<ff", low, 0.0) + bytes(len(elements))
    mantissa, exponent = math.frexp(f32((high - low) / 255))
    scale = max(math.ldexp(round(mantissa * 2**16), exponent - 16), 2.0**-125)  # round() takes ties to even
    inverse = f32(1 / (scale * 0.5))
    codes = [round(f32(f32(f32(x * 0.5) - f32(low * 0.5)) * inverse)) for x in elements]
    return struct.pack("<ff", low, scale) + bytes(codes)


def decode_uint8(block: bytes, count: int) -> list[float]:
    low, scale = struct.unpack("<ff", block[:8])
    (scale_bits,) = struct.unpack("<I", block[4:8])
    half = 0.5 if scale > 2.0**120 else 1.0
    if not (math.isfinite(low) and scale_bits < 0x7F800000 and scale_bits % 256 == 0):
        return [math.nan] * count
    return [f32(f32(low * half) + f32(code * (scale * half))) / half for code in block[8:]]


def cut_scale(elements: list[float], most: int, nothing: float) -> float:
    """16 significant bits of the peak / most, the rest cut off; 0 where every code is 0."""
    if not all(math.isfinite(x) for x in elements):
        return math.nan
    peak = max(abs(x) for x in elements)
    mantissa, exponent = math.frexp(f32(peak / most))
    return 0.0 if peak <= nothing else max(math.ldexp(math.floor(mantissa * 2**16), exponent - 16), 2.0**-125)


def head_of(scale: float) -> bytes:
    return bytes.fromhex(DTYPE_NAN["float32"]) if math.isnan(scale) else struct.pack("<f", scale)


def scale_of(block: bytes, spare: int) -> float:
    """NaN where no encoder writes it."""
    (bits,) = struct.unpack("<I", block[:4])
    return float(struct.unpack("<f", block[:4])[0]) if bits < 0x7F800000 and bits & spare == 0 else math.nan


def encode_int8(elements: list[float]) -> bytes:
    scale = cut_scale(elements, 127, 2.0**-126)
    codes = [round(f32(x * f32(1 / scale))) if scale > 0 else 0 for x in elements]
    return head_of(scale) + struct.pack(f"<{len(codes)}b", *codes)


def decode_int8(block: bytes, count: int) -> list[float]:
    return [f32(code * scale_of(block, 0xFF)) for code in struct.unpack(f"<{count}b", block[4:])]


E4M3 = [code * 2.0**-9 if code < 8 else (8 + code % 8) * 2.0 ** (code // 8 - 10) for code in range(127)]


def encode_fp8(elements: list[float]) -> bytes:
    scale = cut_scale(elements, 448, 2.0**-135)
    codes = bytearray(len(elements))
    for i, x in enumerate(elements if scale > 0 else ()):
        t = f32(x * f32(1 / scale))
        codes[i] = min(range(127), key=lambda code: (abs(E4M3[code] - abs(t)), code % 2))  # a tie: the even one
        codes[i] |= 0x80 if math.copysign(1, t) < 0 else 0
    return head_of(scale) + bytes(codes)


def decode_fp8(block: bytes, count: int) -> list[float]:
    scale, sizes = scale_of(block, 0xFF), [*E4M3, math.nan]
    return [f32((-1 if code & 0x80 else 1) * sizes[code & 0x7F] * scale) for code in block[4:]]


def encode_fp4(elements: list[float]) -> bytes:
    finite = all(math.isfinite(x) for x in elements)
    scale = max(abs(x) for x in elements) if finite else math.nan
    codes = []
    for x in elements:
        least = [2.0**-7 * scale] + [0.75 * 2.0 ** (code - 7) * scale for code in range(2, 8)]  # exact
        code = sum(abs(x) >= size for size in least) if scale > 0 else 0
        codes.append(code | (8 if code and x < 0 else 0))
    codes += [0] * (len(codes) % 2)
    return head_of(scale) + bytes(low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True))


def decode_fp4(block: bytes, count: int) -> list[float]:
    scale = scale_of(block, 0)
    codes = [nibble for pair in block[4:] for nibble in (pair & 15, pair >> 4)][:count]
    return [f32((-1 if code & 8 else 1) * (2.0 ** (code % 8 - 7) if code % 8 else 0.0) * scale) for code in codes]


def encode_bfloat16(elements: list[float]) -> bytes:
    return b"".join(pack_float("bfloat16", x) for x in elements)


def decode_bfloat16(block: bytes, count: int) -> list[float]:
    return unpack_floats("bfloat16", block)


class Codec(NamedTuple):
    number: int
    encode: Encode
    decode: Decode


CODECS = {
    "uint8": Codec(1, encode_uint8, decode_uint8),
    "int8": Codec(2, encode_int8, decode_int8),
    "fp8_e4m3": Codec(3, encode_fp8, decode_fp8),
    "fp4_e3m0": Codec(4, encode_fp4, decode_fp4),
    "bfloat16": Codec(5, encode_bfloat16, decode_bfloat16),
}


def decode_as(codec: str, block: bytes, count: int, dtype: str) -> bytes:
    """Cut to the finite range of the dtype, but for bfloat16, and rounded to it."""
    out = b""
    for x in CODECS[codec].decode(block, count):
        most = math.inf if codec == "bfloat16" else DTYPE_MOST[dtype]
        out += pack_float(dtype, x if math.isnan(x) else min(max(x, -most), most))
    return out


CHUNK = 1 << 20
CHUNK_DIGESTS = {"fast": (1, xxhash.xxh3_128_digest), "sha256": (2, lambda data: hashlib.sha256(data).digest())}
# name, type string, shape, bytes, may the content differ
State = list[tuple[str, str, tuple[int, ...], int, int]]
STATES: dict[str, State] = {
    "one_scalar": [("x", "<f8", (), 8, 0)],
    "empty": [("x", "<f4", (0, 4), 0, 0)],
    "one_chunk_exactly": [("w", "|u1", (CHUNK,), CHUNK, 0)],
    "one_byte_more": [("w", "|u1", (CHUNK + 1,), CHUNK + 1, 0)],
    "several": [("bias", "<f4", (3,), 12, 0), ("big", "<f2", (2, CHUNK), 4 * CHUNK, 0), ("step", "<i8", (), 8, 0)],
    "order_is_that_of_the_utf8_bytes": [("ä", "|u1", (1,), 1, 0), ("z", "|u1", (2,), 2, 0), ("Z", "|u1", (3,), 3, 0)],
    "some_may_differ": [("rng", "<u8", (5,), 40, 1), ("w", "<f4", (2, 2), 16, 0)],
    "all_may_differ": [("rng", "<u8", (5,), 40, 1)],
    "foreign_types": [("a", "<bfloat16", (3,), 6, 0), ("b", "<float8_e4m3fn", (3,), 3, 0), ("c", "<f2", (3,), 6, 0)],
}


def state_lines() -> Iterator[str]:
    for name, arrays in STATES.items():
        for digest, (number, hash_chunk) in CHUNK_DIGESTS.items():
            for revision in (0, 2**63 - 1):
                layout, table = hashlib.sha256(), b""
                for array, dtype, shape, size, unequal in sorted(arrays, key=lambda array: array[0].encode()):
                    layout.update(struct.pack("<IIII", len(array.encode()), len(dtype), len(shape), unequal))
                    layout.update(array.encode() + dtype.encode() + struct.pack(f"<{len(shape)}Q", *shape))
                    data = bytes((i * 131 + 7) & 255 for i in range(0 if unequal else size))
                    table += b"".join(hash_chunk(data[at : at + CHUNK]) for at in range(0, len(data), CHUNK))
                root = hashlib.sha256(layout.digest() + struct.pack("<QQ", number, revision) + table)
                shown = ";".join(
                    f"{array.encode().hex()},{dtype},{'x'.join(map(str, shape)) or '-'},{unequal}"
                    for array, dtype, shape, _, unequal in arrays
                )
                yield (
                    f"{name}_{digest}_{revision} {digest} {revision} {shown} {layout.hexdigest()} "
                    f"{table.hex() or '-'} {root.hexdigest()}"
                )


RECORD_FIELDS = ("voter", "strategy", "digest", "asks", "lineage", "root", "layout", "revision", "sync", "timeout_ms")
RECORD: dict[str, int | bytes] = {
    "voter": 1, "strategy": 2, "digest": 2, "asks": 1, "lineage": bytes(range(0xA0, 0xB0)),
    "root": bytes(range(0x20, 0x40)),
    "layout": bytes(range(0x40, 0x60)), "revision": 0x0102030405060708, "sync": 0x1112131415161718, "timeout_ms": 5000,
}  # fmt: skip


def encode_record(fields: dict[str, int | bytes], zeros: bytes = bytes(4)) -> bytes:
    return struct.pack("<BBBB4s16s32s32sQQQ", *(fields[key] for key in RECORD_FIELDS[:4]), zeros,
                       *(fields[key] for key in RECORD_FIELDS[4:]))  # fmt: skip


def record_lines() -> Iterator[str]:
    good: dict[str, dict[str, int | bytes]] = {
        "plain": {}, "least": dict.fromkeys(("voter", "strategy", "asks", "revision", "sync"), 0) | {
            "digest": 1, "timeout_ms": 1, "lineage": bytes(16)},
        "most": {"revision": 2**63 - 1, "sync": U64_MAX, "timeout_ms": 2**53 - 1, "lineage": b"\xff" * 16},
        "receive_only": {"strategy": 1},
    }  # fmt: skip
    for name, changes in good.items():
        fields = RECORD | changes
        shown = {key: value.hex() if isinstance(value, bytes) else value for key, value in fields.items()}
        yield f"{name} ok {encode_record(fields).hex()} " + " ".join(f"{key}={shown[key]}" for key in RECORD_FIELDS)
    for field, wrong in (
        ("voter", 2), ("voter", 255), ("strategy", 3), ("strategy", 255), ("digest", 0), ("digest", 3), ("digest", 255),
        ("asks", 2), ("asks", 255),
        ("revision", 2**63), ("revision", U64_MAX), ("timeout_ms", 0), ("timeout_ms", 2**53), ("timeout_ms", U64_MAX),
    ):  # fmt: skip
        yield f"{field}_{wrong} refused {encode_record(RECORD | {field: wrong}).hex()}"
    for at in range(4):
        yield f"zero_{at}_not_zero refused {encode_record(RECORD, bytes(at) + bytes([1]) + bytes(3 - at)).hex()}"
    yield f"too_short refused {encode_record(RECORD)[:-1].hex()}"
    yield f"too_long refused {encode_record(RECORD).hex()}00"


Block = tuple[str, str, int, list[float]]
CODEC_INPUTS: list[Block] = [
    ("plain", "float32", 8, [math.sin(i * 0.7) * 3 for i in range(19)]),
    ("ties", "float32", 16, [0.0, 255.0, 0.5, 1.5, 2.5, 253.5, 254.5, 127.5, 128.5]),
    ("equal", "float32", 4, [-3.5] * 4),
    ("zeros", "float32", 4, [-0.0, 0.0, -0.0]),
    ("zeros_of_both_signs_among_others", "float32", 8, [-0.0, 1.0, 0.0, 2.0]),
    ("denormals", "float32", 8, [0.0, 2.0**-149, -(2.0**-149), 2.0**-127]),
    ("least_scale", "float32", 8, [2.0**-120, 2.0**-119, 2.0**-118]),
    ("whole_range", "float32", 8, [-DTYPE_MOST["float32"], DTYPE_MOST["float32"], 0.0, 1e38, -1e38]),
    ("far_from_zero", "float32", 8, [1e6, 1e6 + 0.0625, 1e6 + 0.125, 1e6 + 0.1875]),
    ("infinity_spoils_its_block_only", "float32", 2, [1.0, math.inf, 1.0, 2.0, -math.inf]),
    ("nan_spoils_its_block", "float32", 4, [1.0, math.nan, 2.0]),
    ("plain", "float64", 8, [math.cos(i * 1.3) / 3 for i in range(11)]),
    ("beyond_float32", "float64", 8, [1.0, 1e300]),
    ("plain", "float16", 8, [math.sin(i * 0.9) * 3 for i in range(13)]),
    ("most", "float16", 8, [65504.0, -65504.0, 0.0, 1.0]),
    ("plain", "bfloat16", 8, [math.sin(i * 1.1) * 3 for i in range(13)]),
    ("most", "bfloat16", 8, [DTYPE_MOST["bfloat16"], -DTYPE_MOST["bfloat16"], 0.0]),
]
# Where codes lie halfway between two, and the examples of optimizers.md for fp4.
CODEC_TIES: list[tuple[str, str, list[float]]] = [
    ("int8", "own_ties", [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 125.5, -127.0, -0.0]),
    ("fp8_e4m3", "own_ties", [448.0, 432.0, 17.0, 19.0, -17.0, 2.0**-10, -3 * 2.0**-10, 5 * 2.0**-10, -0.0]),
    ("fp8_e4m3", "edge_of_the_normals", [448.0, 0.015625, 0.0146484375, 0.0151, -0.0137, 0.0166]),
    ("fp4_e3m0", "examples", [2.0, -1.4, 0.1, 0.01, -0.0, 0.0]),
    ("fp4_e3m0", "own_ties", [-1.0, 0.75, -0.375, 0.1875, 0.09375, 0.046875, -0.0234375, 0.0078125, 0.0078124]),
    ("fp4_e3m0", "inexact_boundaries", [f32(x) for x in (1.1, 0.825, 0.8250001, 0.4125, -0.0085937)]),
    ("bfloat16", "own_ties", [1.00390625, 1.01171875, -1.00390625, 2.0**-134, 3 * 2.0**-134, f32(1.0039063)]),
    ("bfloat16", "rounds_to_infinity", [DTYPE_MOST["float32"], 2.0**128 - 2.0**119, 2.0**128 - 2.0**120]),
]
HOSTILE_SCALES = {
    "spare_bits": "0100803f", "negative": "000080bf", "minus_zero": "00000080", "zero": "00000000",
    "infinite": "0000807f", "nan": "0100807f", "overflowing": "00ff7f7f", "largest": "ffff7f7f",
    "denormal": "00010000", "least": "01000000",
}  # fmt: skip
HOSTILE_LOWS = {
    "low_infinite": "000080ff0000803f", "low_nan": "0100807f0000803f", "low_and_scale_overflowing": "00ff7f7f00ff7f7f",
    "low_minus_zero": "000000800000803f", "low_and_scale_denormal": "0100008000010000",
}  # fmt: skip
HOSTILE_CODES = {"int8": "00017f8081ff", "fp8_e4m3": "0001077e7f80fffe", "fp4_e3m0": "0818f7ef", "uint8": "000180ff"}


def codec_line(codec: str, name: str, dtype: str, block: int, elements: list[float]) -> str:
    data = b"".join(pack_float(dtype, x) for x in elements)
    values = unpack_floats(dtype, data)
    parts = [values[i : i + block] for i in range(0, len(values), block)]
    blocks = [CODECS[codec].encode(part) for part in parts]
    decoded = b"".join(decode_as(codec, one, len(part), dtype) for one, part in zip(blocks, parts, strict=True))
    line = f"{codec}_{name}_{dtype} {CODECS[codec].number} {DTYPES[dtype]} {block} {len(values)} {data.hex()}"
    return f"{line} {b''.join(blocks).hex()} {decoded.hex()}"


def hostile_line(codec: str, name: str, dtype: str, encoded: bytes, count: int) -> str:
    decoded = decode_as(codec, encoded, count, dtype).hex()
    return f"{codec}_{name}_{dtype} {CODECS[codec].number} {DTYPES[dtype]} {count} {count} - {encoded.hex()} {decoded}"


def codec_lines() -> Iterator[str]:
    for codec in CODECS:
        for name, dtype, block, elements in CODEC_INPUTS:
            yield codec_line(codec, name, dtype, block, elements)
    for codec, name, elements in CODEC_TIES:
        yield codec_line(codec, name, "float32", 16, elements)
    for dtype in DTYPE_BYTES:
        for name, head in HOSTILE_LOWS.items():
            yield hostile_line("uint8", name, dtype, bytes.fromhex(head + HOSTILE_CODES["uint8"]), 4)
        for codec, codes in HOSTILE_CODES.items():
            low, count = "0000803f" if codec == "uint8" else "", len(codes) // (1 if codec == "fp4_e3m0" else 2)
            for name, scale in HOSTILE_SCALES.items():
                yield hostile_line(codec, f"scale_{name}", dtype, bytes.fromhex(low + scale + codes), count)
        nans = bytes.fromhex("c07f807f80ffc1ff017f7f7f01000080")
        yield hostile_line("bfloat16", "nans_infinities_denormals", dtype, nans, 8)
    yield hostile_line("fp4_e3m0", "last_half_not_zero", "float32", bytes.fromhex("0000803f17f7"), 3)


FILES = {
    "frames.txt": ("NAME ok|refused HEADER [FIELD=VALUE ...]", frame_lines),
    "specs.txt": ("NAME ok|refused SPEC [FIELD=VALUE ...]; hash= is the spec hash that DATA frames carry", spec_lines),
    "digests.txt": ("LENGTH SEED XXH3_64 XXH3_128, of the bytes (i * 131 + 7) & 255", digest_lines),
    "states.txt": (
        "NAME DIGEST REVISION ARRAYS LAYOUT TABLE ROOT; array: NAME_IN_HEX,TYPE,SHAPE,MAY_DIFFER, its bytes as above",
        state_lines,
    ),
    "records.txt": ("NAME ok|refused RECORD [FIELD=VALUE ...]", record_lines),
    "codecs.txt": (
        "NAME CODEC DTYPE BLOCK COUNT INPUT ENCODED DECODED; INPUT - where only decoding is meant",
        codec_lines,
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the golden vectors of proto/vectors.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file is out of date")
    check = parser.parse_args().check
    stale = []
    for name, (form, lines) in FILES.items():
        body = list(lines())
        names = [line.split()[0] for line in body]
        if name != "digests.txt" and len(set(names)) != len(names):
            raise SystemExit(f"{name}: two vectors of one name")
        text = "\n".join(["# Written by tools/make_vectors.py; do not edit.", f"# {form}", *body]) + "\n"
        path = VECTORS / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
        print(f"{name}: {len(body)} vectors{' (out of date)' if check and name in stale else ''}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
