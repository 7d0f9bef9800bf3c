"""Every decoder of foreign bytes: golden bytes, mutated, and anything at all. Only the documented error comes out,
what is accepted is written as the same bytes again, and the memory that it takes is bounded by what came in.

Hypothesis prints what replays a failure; PYCCL_TEST_LONG=1 tries a hundred times as much.
"""

from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any, Final

import msgpack
import numpy as np
import pytest
import trio
import trio.testing
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from untrusted import CERTIFICATE, PARTS, PLAIN, RUN_KEY, THOROUGH, TOKENS, Bytes, hexes, mutated, only

import pyccl
from pyccl import statefile
from pyccl._io import envelope, journal
from pyccl._io.address import invite_text, parse_master
from pyccl._io.identity import key_of_certificate_untrusted
from pyccl._io.packer import pack, unpack_untrusted
from pyccl._io.tls import Ticket
from pyccl._native.handles import is_heartbeat_untrusted
from pyccl._proto import candidates, election, invites, layout, limits, mismatch, past, plan, spec
from pyccl._proto.epoch import Address, AddressKind, Member
from pyccl._proto.messages import (
    from_wire_untrusted,
    to_wire,
)
from pyccl.errors import RemoteProtocolError, StateFileError, UsageError
from pyccl.optim import group

# ---- control messages ------------------------------------------------------------------------------------------------

MESSAGES: Final = hexes("messages.txt", 2) + hexes("messages.txt", 2, "refused")


@THOROUGH
@given(mutated(MESSAGES))
def test_envelope_body(body: bytes) -> None:
    message = only(RemoteProtocolError, lambda: envelope.unpack_untrusted(body))
    if message is not None:
        assert from_wire_untrusted(to_wire(message)) == message


@THOROUGH
@given(st.data())
def test_message_with_fields_of_any_type(data: st.DataObject) -> None:
    """A golden message of which parts, at any depth, are something else."""
    wire = msgpack.unpackb(data.draw(st.sampled_from(hexes("messages.txt", 2))), raw=False, strict_map_key=False)
    whole, key = [wire], 0
    at = whole
    while isinstance(at[key], list) and at[key] and data.draw(st.booleans()):
        at = at[key]
        key = data.draw(st.integers(0, len(at) - 1))
    at[key] = data.draw(PLAIN)
    only(RemoteProtocolError, lambda: from_wire_untrusted(whole[0]))


@pytest.mark.parametrize(
    "body",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\x91" * limits.BODY_NEWCOMER_MAX_BYTES,
        b"\xdc\xff\xff" + b"\x90" * 65_535,
        b"\xdd\x00\x01\x00\x00" + b"\xc0" * 65_536,
        b"\xdf\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
    ],
    ids=["array", "bytes", "text", "depth", "arrays", "nils", "map", "extension"],
)
def test_body_that_announces_more_than_it_brings_takes_no_memory(body: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError):
            envelope.unpack_untrusted(body)
        assert tracemalloc.get_traced_memory()[1] < 100 * len(body) + (1 << 20)
    finally:
        tracemalloc.stop()


@THOROUGH
@given(st.lists(mutated(MESSAGES), max_size=4), st.binary(max_size=8), PARTS)
def test_stream_of_envelopes(bodies: list[bytes], rest: bytes, parts: list[int]) -> None:
    stream = b"".join(struct.pack(">I", len(body)) + body for body in bodies) + rest

    async def read(source: trio.abc.ReceiveStream) -> None:
        with contextlib.suppress(RemoteProtocolError):
            while await envelope.receive(source, limits.BODY_NEWCOMER_MAX_BYTES) is not None:
                pass

    trio.run(read, Bytes(stream, parts))
    trio.run(read, envelope.Ahead(Bytes(stream, list(parts))))


# ---- parts of messages -----------------------------------------------------------------------------------------------

PLANS: Final = [
    plan.Plan((1, 2, 0), (2, 0, 1), 1 << 20, 1 << 14, 5).encode(3),
    plan.Plan(ring=(1, 0, 2), ring_from_bytes=7).encode(3),
    plan.Plan(shares=(0, 0, 1)).encode(3),
    plan.NO_PLAN,
]


@THOROUGH
@given(mutated(PLANS))
def test_plan(data: bytes) -> None:
    decoded = only(RemoteProtocolError, lambda: plan.decode_untrusted(data, 3))
    if decoded is not None:
        assert decoded.encode(3) == data


@THOROUGH
@given(mutated(hexes("records.txt", 2) + hexes("records.txt", 2, "refused")))
def test_record_of_a_state(data: bytes) -> None:
    record = only(RemoteProtocolError, lambda: election.decode_untrusted(bytes(16), data))
    if record is not None:
        assert election.encode(record) == data


ENTRY: Final = struct.pack("<IIII", 1, 3, 2, 1) + b"w<f4" + struct.pack("<QQ", 3, 4)
LAYOUTS: Final = [layout.padded([ENTRY], 0), layout.padded([], 0)]


@THOROUGH
@given(mutated(LAYOUTS), st.booleans())
def test_array_of_a_layout(data: bytes, fits: bool) -> None:
    data = data[: layout.ENTRY_BYTES].ljust(layout.ENTRY_BYTES, b"\0") if fits else data
    entry = only(RemoteProtocolError, lambda: layout.decode_untrusted(data))
    if entry is not None:
        layout.describe({bytes(16): entry, bytes([1]) * 16: None})


@THOROUGH
@given(mutated(hexes("specs.txt", 2) + hexes("specs.txt", 2, "refused")), mutated(hexes("specs.txt", 2)))
def test_specs_can_be_compared_and_shown(mine: bytes, theirs: bytes) -> None:
    one, other = (only(RemoteProtocolError, lambda data=data: spec.decode_untrusted(data)) for data in (mine, theirs))
    if one is not None and other is not None:
        for field in spec.differing_fields(one, other):
            assert spec.show(one, field) and spec.show(other, field)


@THOROUGH
@given(st.text(max_size=200) | st.just("peers 0123abcd; fields count; x").map(lambda text: text[:-1]))
def test_text_of_a_mismatch(text: str) -> None:
    peers, fields = mismatch.parse_detail(text)
    assert len(peers) <= len(text) and len(fields) <= len(text)


HOSTS: Final = st.text(max_size=40) | st.sampled_from(
    ["", "127.0.0.1", "10.1.2.3", "203.0.113.7", "8.8.8.8", "::1", "fe80::1%eth0", "2606:4700::1", "2002:a00:1::", "::"]
) | st.ip_addresses().map(str) | st.ip_addresses(v=4).map("::ffff:{}".format)  # fmt: skip
ADDRESSES: Final = st.lists(
    st.builds(Address, HOSTS, st.integers(1, limits.PORT_MAX), st.integers(0, AddressKind.MAPPED)), max_size=8
)


@THOROUGH
@given(HOSTS, HOSTS, HOSTS, ADDRESSES, st.booleans())
def test_hosts_and_addresses_of_others(
    host: str, own: str, seen: str, addresses: list[Address], behind_router: bool
) -> None:
    if candidates.may_dial(host, own):
        assert not candidates.is_private(host) and not candidates.is_loopback(host)
    theirs, mine = Member(b"t" * 16, b"t" * 16, tuple(addresses), seen), Member(b"m" * 16, b"m" * 16, (), own)
    if candidates.may_reach(host, theirs, mine) and not candidates.are_near(seen, own):
        assert not candidates.is_private(host) and not candidates.is_loopback(host)
    assert set(candidates.ordered(theirs, mine)) <= set(addresses)
    assert addresses or not candidates.lead_home(theirs, mine, behind_router=behind_router)


@THOROUGH
@given(mutated(hexes("frames.txt", 2) + hexes("frames.txt", 2, "refused")))
def test_frame_of_a_pulse(header: bytes) -> None:
    is_heartbeat_untrusted(header[:64].ljust(64, b"\0"))


RECORDS: Final = [
    json.dumps({"new": True, "settings": {"a": "b"}, "parts": {"x": "y"}}).encode(),
    b'{"new":1e999,"settings":{},"parts":[]}',
    b"[" * 2000,
    b'{"new":true,"settings":' + b"9" * 5000 + b"}",
]


@THOROUGH
@given(mutated(RECORDS))
def test_record_of_an_optimizer(data: bytes) -> None:
    only(RemoteProtocolError, lambda: group._decode_untrusted("ab" * 16, data))


# ---- who comes in ----------------------------------------------------------------------------------------------------


@THOROUGH
@given(mutated(TOKENS))
def test_token_opens_only_as_it_was_sealed(token: bytes) -> None:
    opened = only(invites.RefusedError, lambda: invites.open_untrusted(RUN_KEY, token))
    assert (opened is not None) == (token in TOKENS)


@THOROUGH
@given(
    st.text(max_size=80)
    | st.text("0123456789:[]./abc", max_size=40).map("pyccl://".__add__)
    | st.integers(0, 6000).map(lambda digits: "host:" + "9" * digits)
)
def test_invite_or_address(text: str) -> None:
    only(UsageError, lambda: parse_master(text))


TICKETS: Final = [Ticket(RUN_KEY, TOKENS[0]), Ticket(bytes([0xFF]) * 32, TOKENS[1])]
INVITES: Final = [
    invite_text(where, ticket).encode()
    for where, ticket in zip(("h.example:48148", "[2001:db8::1]:1"), TICKETS, strict=True)
]


@THOROUGH
@given(mutated(INVITES))
def test_invite_that_was_not_copied_whole(data: bytes) -> None:
    text = data.decode("latin-1")
    told = ""
    try:
        master = parse_master(text)
    except UsageError as e:
        told = str(e)
    else:
        assert 1 <= master.port <= limits.PORT_MAX
        assert master.ticket is None or 1 <= len(master.ticket.token) <= limits.TOKEN_BYTES_MAX
    for secret in (invite.decode().rpartition("/")[2] for invite in INVITES):  # and a part of it is one
        parts = [secret[at : at + 20] for at in range(0, len(secret) - 20, 10)]
        assert "/" not in text or not any(part in told for part in parts)


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@THOROUGH
@given(mutated([CERTIFICATE]))
def test_certificate(der: bytes) -> None:
    key = key_of_certificate_untrusted(der)
    assert key is None or len(key) == 32


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
def test_certificate_of_every_byte_changed() -> None:
    for at in range(len(CERTIFICATE)):
        for value in (0, 1, 4, 0x7F, 0x80, 0xFF):
            der = CERTIFICATE[:at] + bytes([value]) + CERTIFICATE[at + 1 :]
            key = key_of_certificate_untrusted(der)
            assert key is None or len(key) == 32


# ---- state -----------------------------------------------------------------------------------------------------------

CHUNK: Final = np.arange(5000, dtype=np.uint16).view(np.uint8)
PACKED: Final = [
    pack(CHUNK),
    pack(np.zeros(1 << 20, np.uint8)),
    zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000)),
]


@THOROUGH
@given(mutated(PACKED), st.sampled_from([10_000, 1 << 20, 1000, 0]))
def test_packed_chunk(data: bytes, size: int) -> None:
    found = unpack_untrusted(np.frombuffer(data, np.uint8), size)
    assert found is None or found.nbytes == size


def test_packed_chunk_that_would_grow_without_end_takes_no_memory() -> None:
    bombs = [
        pack(np.zeros(1 << 26, np.uint8)),
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 26)),
        pack(np.zeros(1 << 20, np.uint8)) * 64,
        _bomb_with_false_size(1 << 20),
    ]
    tracemalloc.start()
    try:
        for bomb in bombs:
            assert unpack_untrusted(np.frombuffer(bomb, np.uint8), 1 << 20) is None
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def _bomb_with_false_size(told: int) -> bytes:
    """A frame that states `told` bytes and holds 64 MiB: a single block header repeated."""
    rle = struct.pack("<I", (1 << 17) << 3 | 1 << 1)[:3] + b"\0"
    return b"\x28\xb5\x2f\xfd" + b"\xa0" + struct.pack("<I", told) + rle * 512


def sealed(told: dict[str, Any]) -> bytes:
    """A header whose manifest has the seal that belongs to it: who writes files can make it."""
    whole = {**told, "seal": statefile._seal(told)}
    text = json.dumps({"__metadata__": {"pyccl": json.dumps(whole, separators=(",", ":"))}}).encode()
    return text + b" " * (-len(text) % 8)


MANIFEST: Final[dict[str, Any]] = {
    "format": 1, "revision": 3, "lineage": "00" * 16, "digest": "fast", "root": "11" * 32, "layout": "22" * 32,
    "arrays": {"w": ["float32", [2, 3], True, "33" * 32], "ö": ["bfloat16", [], False, ""]},
}  # fmt: skip
HUGE: Final = ["float32", [1 << 62, 1 << 62], True, ""]
ODD: Final = PLAIN | st.sampled_from(
    [float("inf"), float("nan"), 1 << 70, -1, "\ud800", [], {}, "zz", [HUGE], HUGE, "9" * 5000]
)


@THOROUGH
@given(data=st.data())
def test_manifest_of_a_state_file(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    told = json.loads(json.dumps(MANIFEST))
    where: Any = told
    key: Any = data.draw(st.sampled_from(sorted(told)))
    while isinstance(where[key], dict | list) and where[key] and data.draw(st.booleans()):
        where = where[key]
        key = data.draw(st.sampled_from(sorted(where)) if isinstance(where, dict) else st.integers(0, len(where) - 1))
    odd = data.draw(ODD)
    if isinstance(where, dict) and isinstance(odd, str) and data.draw(st.booleans()):
        where[odd] = where.pop(key)
    else:
        where[key] = odd
    try:
        header = sealed(told)
    except (TypeError, UnicodeEncodeError):  # what JSON can't say
        return
    path = tmp_path_factory.getbasetemp() / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))
    only(StateFileError, lambda: statefile.StateFile(path).close())


@pytest.mark.parametrize("shape", ["9" * 5000, [1 << 48, 2], [1] * 65], ids=["product", "bytes", "dimensions"])
def test_manifest_with_an_array_that_nobody_has(shape: Any, tmp_path: Path) -> None:
    header = sealed(MANIFEST | {"arrays": {"w": ["float32", shape, True, ""]}})
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(StateFileError, match="tells what no state has"):
        statefile.StateFile(path)


@pytest.fixture(scope="module")
def state_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("state") / "a.safetensors"
    pyccl.SharedState({"w": np.arange(6, dtype=np.float32), "b": np.zeros((0, 2))}, revision=4).save(path)
    return path.read_bytes()


@THOROUGH
@given(data=st.data())
def test_state_file(data: st.DataObject, state_file: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(data.draw(mutated([state_file])))
    only(StateFileError, lambda: statefile.StateFile(path).close())


# ---- the journal: who can write it is the master's own machine, but it may be damaged in any way ---------------------


@pytest.fixture(scope="module")
def journal_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("journal") / "journal"
    written = journal.Journal.open(path)
    written.begin(past.Past(bytes(16)))
    written.append([past.Began(1 << 32), past.Forgotten(3), past.Revoked(bytes(8), 9, 1)])
    written.close()
    return path.read_bytes()


@THOROUGH
@given(data=st.data())
def test_journal(data: st.DataObject, journal_file: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "journal"
    path.write_bytes(data.draw(mutated([journal_file])))
    only(journal.JournalError, lambda: journal.read_past(path))
