"""The codecs of quantized all-reduces in NumPy and without the C core: proto/wire.md 3.6, one block at a time.

Part of the oracle (reference.py): slow, and means to be obvious. What each codec costs and loses: docs/codecs.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from pyccl.errors import UsageError

Float32 = np.ndarray[Any, np.dtype[np.float32]]
UInt8 = np.ndarray[Any, np.dtype[np.uint8]]
UInt16 = np.ndarray[Any, np.dtype[np.uint16]]

_f32 = np.float32
_MAX: Final = np.float32(np.finfo(np.float32).max)
_NAN: Final[np.float32] = np.array([0x7FC00000], np.uint32).view(np.float32)[0]  # the canonical one
_SCALE_LEAST: Final = np.float32(2.0**-125)


@dataclass(frozen=True, slots=True)
class Codec:
    """encode_block: (n,) float32 -> head and codes; decode_block: these bytes and n -> (n,) float32."""

    head_bytes: int
    code_bits: int
    encode_block: Callable[[Float32], bytes]
    decode_block: Callable[[bytes, int], Float32]

    def block_bytes(self, elements: int) -> int:
        return self.head_bytes + (elements * self.code_bits + 7) // 8


def codec_of(name: str) -> Codec:
    """Raises UsageError with the names that there are."""
    if not isinstance(name, str) or name not in CODECS:
        raise UsageError(f"quantize={name!r} is not one of {', '.join(CODECS)}")
    return CODECS[name]


def size_bytes(codec: str, block: int, count: int) -> int:
    """Bytes of `count` encoded elements."""
    whole, rest = divmod(count, block)
    known = codec_of(codec)
    return whole * known.block_bytes(block) + (known.block_bytes(rest) if rest else 0)


def encode(x: Float32, codec: str, block: int) -> bytes:
    """(n,) float32 -> the bytes that travel. Any values."""
    known = codec_of(codec)
    with np.errstate(all="ignore"):
        return b"".join(known.encode_block(x[at : at + block]) for at in range(0, x.size, block))


def decode(data: bytes, codec: str, block: int, count: int) -> Float32:
    """(count,) float32 of ``size_bytes(codec, block, count)`` bytes, which may be any."""
    known, out = codec_of(codec), np.empty(count, np.float32)
    with np.errstate(all="ignore"):
        for at in range(0, count, block):
            start, n = at // block * known.block_bytes(block), min(block, count - at)
            out[at : at + n] = known.decode_block(data[start : start + known.block_bytes(n)], n)
    return out


def bfloat16_bits(x: Float32) -> UInt16:
    """Rounded to nearest even; NaN canonical."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    rounded[np.isnan(x)] = 0x7FC0
    return rounded


def _head(*numbers: np.float32) -> bytes:
    return b"".join(number.tobytes() for number in numbers)


def _cut(x: Float32) -> Float32:
    return np.clip(x, -_MAX, _MAX)


def _legal(scale: np.float32, spare_bits: int) -> bool:
    """Finite, not negative nor -0, and with these bits of the mantissa zero."""
    bits = int(np.array([scale], np.float32).view(np.uint32)[0])
    return bits < 0x7F800000 and bits & spare_bits == 0


# ---- uint8: low + code * scale --------------------------------------------------------------------------------------


def _uint8_encode(x: Float32) -> bytes:
    codes = np.zeros(x.size, np.uint8)
    if not np.isfinite(x).all():
        return _head(_NAN, _NAN) + codes.tobytes()
    low, high = _f32(x.min()) + _f32(0.0), _f32(x.max()) + _f32(0.0)  # + 0.0: a low of -0 is written as +0
    if low == high:
        return _head(low, _f32(0.0)) + codes.tobytes()
    scale = max(_sixteen_bits(_f32((np.float64(high) - np.float64(low)) / np.float64(255.0)), np.rint), _SCALE_LEAST)
    inverse = _f32(1.0) / (scale * _f32(0.5))
    codes[:] = np.rint((x * _f32(0.5) - low * _f32(0.5)) * inverse)
    return _head(low, scale) + codes.tobytes()


def _sixteen_bits(x: np.float32, whole: Callable[[np.float64], Any]) -> np.float32:
    """16 significant bits of it, by np.rint (ties to even) or np.floor: times a code it is exact in float32."""
    mantissa, exponent = np.frexp(np.float64(x))
    return np.float32(np.ldexp(whole(np.ldexp(mantissa, 16)), int(exponent) - 16))


def _uint8_decode(data: bytes, count: int) -> Float32:
    low, scale = np.frombuffer(data[:8], "<f4")
    if not np.isfinite(low) or not _legal(scale, 0xFF):
        return np.full(count, _NAN)
    steps = np.frombuffer(data[8:], np.uint8).astype(np.float32)
    if scale > _f32(2.0**120):  # the product could overflow
        return _cut((low * _f32(0.5) + steps * (scale * _f32(0.5))) * _f32(2.0))
    return _cut(low + steps * scale)


# ---- int8 and fp8_e4m3: code * scale --------------------------------------------------------------------------------


def _cut_scale(x: Float32, most: float, nothing: float) -> np.float32:
    """The peak / most, cut to 16 bits. NaN where it is not finite, 0 where every code is 0."""
    if not np.isfinite(x).all():
        return _NAN
    peak = _f32(np.abs(x).max())
    if peak <= nothing:
        return _f32(0.0)
    return max(_sixteen_bits(peak / _f32(most), np.floor), _SCALE_LEAST)


def _int8_encode(x: Float32) -> bytes:
    scale = _cut_scale(x, 127.0, 2.0**-126)
    codes = np.zeros(x.size, np.int8)
    if scale > 0:
        codes = np.rint(x * (_f32(1.0) / scale)).astype(np.int8)
    return _head(scale) + codes.tobytes()


def _int8_decode(data: bytes, count: int) -> Float32:
    scale = np.frombuffer(data[:4], "<f4")[0]
    if not _legal(scale, 0xFF):
        return np.full(count, _NAN)
    return _cut(np.frombuffer(data[4:], np.int8).astype(np.float32) * scale)


# Sizes of the codes 0..127: 0, 2**-9, ..., 7 * 2**-9, 2**-6, 1.125 * 2**-6, ..., 448, NaN. Bit 7 is the sign.
_E4M3: Final = np.array(
    [code * 2.0**-9 if code < 8 else (1 + code % 8 / 8) * 2.0 ** (code // 8 - 7) for code in range(127)] + [np.nan]
)
_E4M3_HALFWAY: Final = np.append((_E4M3[:-2] + _E4M3[1:-1]) / 2, np.inf)


def _fp8_encode(x: Float32) -> bytes:
    scale = _cut_scale(x, 448.0, 2.0**-135)
    codes = np.zeros(x.size, np.uint8)
    if scale > 0:
        t = x * (_f32(1.0) / scale)
        size = np.abs(t).astype(np.float64)
        nearest = np.searchsorted(_E4M3_HALFWAY, size, side="left")  # the smaller code of a tie
        tie = size == _E4M3_HALFWAY[nearest]
        codes = ((nearest + (tie & (nearest % 2 == 1))) | np.where(np.signbit(t), 0x80, 0)).astype(np.uint8)
    return _head(scale) + codes.tobytes()


def _fp8_decode(data: bytes, count: int) -> Float32:
    scale = np.frombuffer(data[:4], "<f4")[0]
    if not _legal(scale, 0xFF):
        return np.full(count, _NAN)
    codes = np.frombuffer(data[4:], np.uint8)
    sizes = _E4M3[codes & 0x7F].astype(np.float32)
    x = _cut(np.where(codes & 0x80, -sizes, sizes) * scale)
    return np.where(np.isnan(x), _NAN, x)


# ---- fp4_e3m0: powers of two of the peak ----------------------------------------------------------------------------

# Least |x| / scale of the codes 1..7: halfway between their levels, 2**(code - 7), and those below (0 below the first).
_E3M0_FROM: Final = np.array([2.0**-7] + [0.75 * 2.0 ** (code - 7) for code in range(2, 8)])


def _fp4_encode(x: Float32) -> bytes:
    scale = _f32(np.abs(x).max()) if np.isfinite(x).all() else _NAN
    codes = np.zeros(x.size + x.size % 2, np.uint8)
    if scale > 0:
        sizes = np.abs(x).astype(np.float64)  # every product below is exact in float64
        codes[: x.size] = np.searchsorted(_E3M0_FROM * np.float64(scale), sizes, side="right")
        codes[: x.size][(x < 0) & (codes[: x.size] > 0)] |= 8
    return _head(scale) + (codes[0::2] | codes[1::2] << 4).tobytes()


def _fp4_decode(data: bytes, count: int) -> Float32:
    scale = np.frombuffer(data[:4], "<f4")[0]
    if not _legal(scale, 0):
        return np.full(count, _NAN)
    pairs = np.frombuffer(data[4:], np.uint8)
    codes = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(-1)[:count]
    level = np.array([0.0] + [2.0 ** (code - 7) for code in range(1, 8)], np.float32) * scale
    x: Float32 = np.where(codes & 8, -level[codes & 7], level[codes & 7])
    return x


# ---- bfloat16: each element by itself -------------------------------------------------------------------------------


def _bfloat16_encode(x: Float32) -> bytes:
    return bfloat16_bits(x).tobytes()


def _bfloat16_decode(data: bytes, count: int) -> Float32:
    x = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.where(np.isnan(x), _NAN, x)


CODECS: Final = {
    "uint8": Codec(8, 8, _uint8_encode, _uint8_decode),
    "int8": Codec(4, 8, _int8_encode, _int8_decode),
    "fp8_e4m3": Codec(4, 8, _fp8_encode, _fp8_decode),
    "fp4_e3m0": Codec(4, 4, _fp4_encode, _fp4_decode),
    "bfloat16": Codec(0, 16, _bfloat16_encode, _bfloat16_decode),
}
