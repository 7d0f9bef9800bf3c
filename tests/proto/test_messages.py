"""Messages against the golden vectors, against themselves, and against anything at all."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyccl._proto import limits
from pyccl._proto.epoch import Address, Member, epoch_id, make_epoch
from pyccl._proto.messages import (
    MESSAGE_TYPES,
    Arrive,
    Count,
    EpochCommit,
    Hello,
    Message,
    Pending,
    Rejected,
    Report,
    clip,
    from_wire_untrusted,
    to_wire,
)
from pyccl.errors import RemoteProtocolError

ROOT = Path(__file__).resolve().parents[2]
VECTORS = [line.split(" ") for line in (ROOT / "proto/vectors/messages.txt").read_text(encoding="utf-8").splitlines()]
GOOD = [(name, bytes.fromhex(body)) for name, verdict, body in VECTORS if verdict == "ok"]
READS = 200
BAD = [(name, bytes.fromhex(body)) for name, verdict, body in VECTORS if verdict == "refused"]


def unpack(body: bytes) -> object:
    return msgpack.unpackb(body, raw=False, strict_map_key=False)


@pytest.mark.parametrize(("name", "body"), GOOD, ids=[name for name, _ in GOOD])
def test_golden_message_is_read_and_written_as_the_same_bytes(name: str, body: bytes) -> None:
    message = from_wire_untrusted(unpack(body))
    assert msgpack.packb(to_wire(message), use_bin_type=True) == body, name


@pytest.mark.parametrize(("name", "body"), GOOD, ids=[name for name, _ in GOOD])
def test_reading_a_message_leaves_nothing_behind(name: str, body: bytes) -> None:
    """Not even tuples in the interpreter's free lists: what a generator fills is from one and freed to another."""
    plain = unpack(body)
    gc.collect()
    gc.disable()
    try:
        for turn in range(2 * READS):
            if turn == READS:
                before = sys.getallocatedblocks()
            from_wire_untrusted(plain)
        assert sys.getallocatedblocks() - before < READS, name
    finally:
        gc.enable()


@pytest.mark.parametrize(("name", "body"), BAD, ids=[name for name, _ in BAD])
def test_golden_malformed_message_is_refused(name: str, body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        from_wire_untrusted(unpack(body))


def test_every_message_has_a_golden_vector() -> None:
    types = {type(from_wire_untrusted(unpack(body))) for _, body in GOOD}
    assert types == set(MESSAGE_TYPES.values())


def test_vectors_are_what_their_script_writes() -> None:
    subprocess.run([sys.executable, ROOT / "tools/make_message_vectors.py", "--check"], check=True)


def test_types_are_those_of_wire_md() -> None:
    rows = [line.split("|") for line in (ROOT / "proto/wire.md").read_text(encoding="utf-8").splitlines()]
    written = {
        int(r[1]): r[2].strip() for r in rows if len(r) == 5 and r[1].strip().isdigit() and r[2].strip()[0].isupper()
    }
    written = {number: name for number, name in written.items() if not name.isupper() and "_" not in name}
    ours = {number: cls.__name__ for number, cls in MESSAGE_TYPES.items()}
    assert {**written, 40: "Cancelled"} == ours


_LEAF = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=40), st.binary(max_size=41),
    st.sampled_from([bytes(16), bytes(40), 10**4000, -1, "\ud800", object(), {}, {1: 2}, set(), 1j, b"R" * 16]),
)  # fmt: skip
_ANY = st.recursive(_LEAF, lambda inner: st.lists(inner, max_size=8) | st.tuples(inner, inner), max_leaves=30)


@given(_ANY)
def test_anything_at_all_raises_only_remote_protocol_error(value: object) -> None:
    with contextlib.suppress(RemoteProtocolError):
        assert isinstance(from_wire_untrusted(value), Message)


@given(st.data())
def test_golden_message_with_one_place_replaced_raises_only_remote_protocol_error(data: st.DataObject) -> None:
    body = unpack(data.draw(st.sampled_from([body for _, body in GOOD])))
    place = body
    while isinstance(place, list) and place:
        index = data.draw(st.integers(0, len(place) - 1))
        if isinstance(place[index], list) and place[index] and data.draw(st.booleans()):
            place = place[index]
            continue
        place[index] = data.draw(_ANY)
        break
    try:
        message = from_wire_untrusted(body)
    except RemoteProtocolError:
        return
    assert from_wire_untrusted(to_wire(message)) == message


def test_a_field_outside_its_limit_is_our_own_bug_when_it_is_sent() -> None:
    with pytest.raises(ValueError, match=r"Rejected\.reason"):
        to_wire(Rejected("x" * 201))
    with pytest.raises(ValueError, match=r"Pending\.count"):
        to_wire(Pending(-1))


def test_number_too_long_to_print_is_refused_like_any_other() -> None:
    with pytest.raises(RemoteProtocolError, match="outside"):
        from_wire_untrusted([38, 10**5000])


def test_error_names_message_and_field() -> None:
    with pytest.raises(RemoteProtocolError, match=r"Arrive\.counts: the number is outside 0\.\.2"):
        from_wire_untrusted([5, 1, [[7, 0, 0]]])


def test_limits_are_inclusive() -> None:
    counts = tuple(Count(0, tag, limits.U64_MAX) for tag in range(limits.KEYS_MAX))
    assert from_wire_untrusted(to_wire(Arrive(limits.U64_MAX, counts))) == Arrive(limits.U64_MAX, counts)
    with pytest.raises(ValueError, match="entries"):
        to_wire(Arrive(1, (*counts, Count(0, limits.KEYS_MAX, 0))))
    hello = Hello(1, "x" * 32, limits.U32_MAX, bytes(16), bytes(16), (Address("h" * 255, 65535),) * 8)
    assert from_wire_untrusted(to_wire(hello)) == hello


def test_clip_leaves_what_fits_and_makes_the_rest_encodable() -> None:
    assert clip("x" * 200) == "x" * 200
    assert len(clip("x" * 201)) == 200
    assert to_wire(Rejected(clip("\ud800" * 500)))


def test_epoch_id_is_the_one_of_wire_md() -> None:
    commit = from_wire_untrusted(unpack(dict(GOOD)["epoch_commit_loss"]))
    assert isinstance(commit, EpochCommit)
    epoch = commit.epoch
    assert epoch_id(epoch.previous, epoch.term, epoch.number, epoch.members, epoch.plan) == epoch.id


@given(st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=6, unique=True), st.randoms())
def test_epoch_does_not_depend_on_the_order_of_its_members(peers: list[bytes], rng: object) -> None:
    members = [Member(peer, peer) for peer in peers]
    epoch = make_epoch(3, bytes(16), 1, tuple(members))
    rng.shuffle(members)  # type: ignore[attr-defined]
    assert make_epoch(3, bytes(16), 1, tuple(members)) == epoch
    assert epoch.peers == tuple(sorted(peers))
    assert [epoch.rank_of(peer) for peer in sorted(peers)] == list(range(len(peers)))


def test_empty_report_round_trips() -> None:
    assert from_wire_untrusted(to_wire(Report(1, 1))) == Report(1, 1)
