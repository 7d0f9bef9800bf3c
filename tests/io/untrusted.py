"""What tests of foreign bytes share: golden bytes, and how they are mutated."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import settings
from hypothesis import strategies as st

from pyccl._proto import invites

VECTORS: Final = Path(__file__).resolve().parents[2] / "proto" / "vectors"
THOROUGH: Final = settings(max_examples=20_000 if os.environ.get("PYCCL_TEST_LONG") == "1" else 200)
RUN_KEY: Final = bytes(range(32))


def hexes(name: str, column: int, only: str = "ok") -> list[bytes]:
    lines = [line.split() for line in (VECTORS / name).read_text(encoding="utf-8").splitlines()]
    return [bytes.fromhex(line[column]) for line in lines if line and line[0] != "#" and line[1] == only]


@st.composite
def mutated(draw: st.DrawFn, golden: Sequence[bytes]) -> bytes:
    """One of them with bytes changed, cut, doubled, or spliced with another; sometimes anything else."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=300))
    data = bytearray(draw(st.sampled_from(golden)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.integers(0, 4))
        if kind == 0 and at < len(data):
            data[at] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xC1, 0xDC, 0xDD, 0xFF, data[at] ^ 1, data[at] ^ 0x80]))
        elif kind == 1:
            del data[at : at + draw(st.integers(1, 9))]
        elif kind == 2:
            data[at:at] = draw(st.binary(max_size=9))
        elif kind == 3:
            data[at:at] = data[at : at + draw(st.integers(1, 40))]
        else:
            other = draw(st.sampled_from(golden))
            data[at:] = other[draw(st.integers(0, len(other))) :]
    return bytes(data)


def only(kind: type[BaseException] | tuple[type[BaseException], ...], call: Callable[[], Any]) -> Any:
    """What it returns, or None where it raised that; anything else fails the test."""
    try:
        return call()
    except kind:
        return None


PLAIN: Final = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 1 << 64) | st.floats() | st.binary(max_size=40) | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=20,
)


# Into which a stream is cut.
PARTS: Final = st.lists(st.integers(1, 20), max_size=50)


class Bytes(trio.abc.ReceiveStream):
    """A stream of these, in parts of these lengths, and then its end."""

    def __init__(self, data: bytes, parts: list[int]) -> None:
        self._data, self._parts = data, parts

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        size = min(max_bytes or 1, self._parts.pop() if self._parts else 1 << 20)
        part, self._data = self._data[:size], self._data[size:]
        return part

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


TOKENS: Final = [
    invites.seal(RUN_KEY, invites.Invite(bytes(16), bytes(8), 9, 0, None, "")),
    invites.seal(RUN_KEY, invites.Invite(bytes(16), bytes(8), 1 << 63, 5, 7, "ann ö")),
]


def certificate() -> bytes:
    """As a master's."""
    key = Ed25519PrivateKey.from_private_bytes(RUN_KEY)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pyccl")])
    begin = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, begin, begin + datetime.timedelta(1))
    return builder.sign(key, None).public_bytes(Encoding.DER)


CERTIFICATE: Final = certificate()
