"""Which array differs: the steps of members that gather, and what they say of it."""

from __future__ import annotations

import struct

import pytest

from pyccl._proto import layout
from pyccl._proto.layout import BLOCK, ENTRY_BYTES, Entry
from pyccl.errors import RemoteProtocolError

A, B, C = b"a" * 16, b"b" * 16, b"c" * 16


def entry(name: str, dtype: str = "<f4", shape: tuple[int, ...] = (2, 3), may_differ: bool = False) -> Entry:
    return Entry(name, dtype, shape, may_differ)


def encode(item: Entry) -> bytes:
    """As `SharedState.layout_entries`."""
    lengths = struct.pack("<IIII", len(item.name), len(item.dtype), len(item.shape), item.content_may_differ)
    return lengths + item.name.encode() + item.dtype.encode() + struct.pack(f"<{len(item.shape)}Q", *item.shape)


def found(states: dict[bytes, list[Entry]]) -> tuple[tuple[str, ...], str]:
    """What every member says; each takes its steps with what all of them gathered."""
    encoded = {peer: [encode(item) for item in entries] for peer, entries in states.items()}
    block = layout.first_difference([layout.block_hashes(entries) for entries in encoded.values()])
    if block is None:
        return (), ""
    at = layout.first_difference([layout.entry_hashes(entries, block) for entries in encoded.values()])
    assert at is not None
    packed = {peer: layout.padded(entries, block * BLOCK + at) for peer, entries in encoded.items()}
    return layout.describe({peer: layout.decode_untrusted(data) for peer, data in packed.items()})


@pytest.mark.parametrize(
    ("other", "fields", "text"),
    [
        (entry("w", dtype="<f8"), ("dtype",), "array 'w': dtype '<f4' on 61616161 63636363, '<f8' on 62626262"),
        (entry("w", shape=(3, 2)), ("shape",), "array 'w': shape (2, 3) on 61616161 63636363, (3, 2) on 62626262"),
        (entry("w", shape=()), ("shape",), "() on 62626262"),
        (entry("w", may_differ=True), ("allow_content_inequality",), "False on 61616161 63636363, True on 62626262"),
        (entry("w", "|i1", (1,)), ("dtype", "shape"), "; shape (2, 3)"),
        (entry("x"), ("name",), "there is no array 'w' on 62626262"),
        (entry("a"), ("name",), "there is no array 'a' on 61616161 63636363"),
    ],
)
def test_the_array_and_what_differs_are_named(other: Entry, fields: tuple[str, ...], text: str) -> None:
    got = found({A: [entry("w")], B: [other], C: [entry("w")]})
    assert got[0] == fields and text in got[1]


def test_one_array_of_65536_is_found() -> None:
    entries = [entry(f"{number:05}") for number in range(BLOCK * BLOCK)]
    for at in (0, BLOCK - 1, BLOCK, len(entries) - 1, 40_000):
        odd = [*entries[:at], entry(entries[at].name, shape=(at,)), *entries[at + 1 :]]
        assert found({A: entries, B: odd, C: entries})[1].startswith(f"array {entries[at].name!r}: shape (2, 3)")
        assert found({A: entries, B: [*entries[:at], *entries[at + 1 :]]})[1] == (
            f"there is no array {entries[at].name!r} on 62626262"
        )
    assert found({A: entries, B: entries}) == ((), "")


def test_a_name_of_control_characters_is_printed_as_text() -> None:
    assert "\x1b" not in found({A: [entry("\x1b[2J")], B: [entry("w")]})[1]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(ENTRY_BYTES + 1),
        b"\xff" * ENTRY_BYTES,
        encode(entry("w")).ljust(ENTRY_BYTES - 1, b"\0") + b"x",
        b"\xff\0\1\0" + encode(entry("w"))[4:].ljust(ENTRY_BYTES - 4, b"\0"),
        encode(entry("w", may_differ=True)).replace(b"\1\0\0\0w", b"\2\0\0\0w").ljust(ENTRY_BYTES, b"\0"),
        encode(entry("w")).replace(b"w", b"\xff").ljust(ENTRY_BYTES, b"\0"),
    ],
)
def test_what_no_member_would_send_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        layout.decode_untrusted(data)


def test_hashes_of_another_size_are_refused() -> None:
    with pytest.raises(RemoteProtocolError):
        layout.first_difference([b"x" * 8, b"y" * 8])
