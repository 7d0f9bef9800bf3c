"""Wrong control messages and wrong frames against the decoders alone: those that test_api_hostile.py sends."""

from __future__ import annotations

import itertools
import random
import struct

import msgpack
import pytest
import trio
import trio.testing
from hostile import WRONG_FRAMES, bombs, envelope, frame, garbage, spoilt_messages, valid, wire, wrong_frame

from pyccl._io import envelope as reader
from pyccl._native._pyccl import ffi, lib
from pyccl._proto import limits
from pyccl._proto.epoch import Member, make_epoch
from pyccl._proto.messages import MESSAGE_TYPES, Message, from_wire_untrusted, to_wire
from pyccl.errors import RemoteProtocolError

EACH = 200


@pytest.mark.parametrize("cls", MESSAGE_TYPES.values(), ids=lambda cls: cls.__name__)
def test_a_valid_message_is_itself_again_after_a_round_trip(cls: type[Message], seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(EACH):
        message = from_wire_untrusted([cls.TYPE, *(valid(kind, rng) for kind in cls.KINDS)])
        assert type(message) is cls
        assert reader.unpack_untrusted(msgpack.packb(to_wire(message), use_bin_type=True)) == message


@pytest.mark.parametrize("cls", MESSAGE_TYPES.values(), ids=lambda cls: cls.__name__)
def test_a_message_with_one_thing_wrong_is_refused(cls: type[Message], seed: int) -> None:
    for what, data, _ in itertools.islice(spoilt_messages(cls, random.Random(seed)), EACH):
        print(what, data[:200].hex())
        with pytest.raises(RemoteProtocolError):
            reader.unpack_untrusted(data[4:])


def test_any_change_of_a_valid_body_gives_a_message_or_remote_protocol_error(seed: int) -> None:
    rng = random.Random(seed)
    outcomes = {True: 0, False: 0}
    for _ in range(5000):
        cls = rng.choice(list(MESSAGE_TYPES.values()))
        body = bytearray(wire([cls.TYPE, *(valid(kind, rng) for kind in cls.KINDS)])[4:])
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(body))
            match rng.randrange(3):
                case 0:
                    body[at] = rng.randrange(256)
                case 1:
                    del body[at : at + rng.randint(1, 4)]
                case 2:
                    body[at:at] = rng.randbytes(rng.randint(1, 4))
            body = body or bytearray(b"\0")
        try:
            message = reader.unpack_untrusted(bytes(body))
        except RemoteProtocolError:
            outcomes[False] += 1
        else:
            assert from_wire_untrusted(to_wire(message)) == message
            outcomes[True] += 1
    assert min(outcomes.values()) > 100, outcomes


def receive(data: bytes, most: int = limits.BODY_MAX_BYTES, *, step: int | None = None) -> list[Message]:
    """All messages of a stream that holds these bytes and ends; step: so many bytes arrive at a time."""
    stream = trio.testing.MemoryReceiveStream()
    for at in range(0, len(data), step or len(data) or 1):
        stream.put_data(data[at : at + (step or len(data))])
    stream.put_eof()
    taken: list[Message] = []

    async def read() -> None:
        while (message := await reader.receive(stream, most)) is not None:
            taken.append(message)

    trio.run(read)
    return taken


def test_the_reader_cuts_a_stream_into_its_messages_however_it_arrives(seed: int) -> None:
    rng = random.Random(seed)
    sent = []
    for _ in range(50):
        cls = rng.choice(list(MESSAGE_TYPES.values()))
        sent.append(from_wire_untrusted([cls.TYPE, *(valid(kind, rng) for kind in cls.KINDS)]))
    data = b"".join(reader.pack(message) for message in sent)
    for step in (None, 1, 3, rng.randint(4, 999)):
        assert receive(data, step=step) == sent


def test_the_reader_refuses_noise_bombs_and_streams_that_end_early(seed: int) -> None:
    rng = random.Random(seed)
    for what, data in [*itertools.islice(garbage(rng), 300), *itertools.islice(bombs(rng), 300)]:
        print(what, data[:200].hex())
        with pytest.raises(RemoteProtocolError):
            receive(data, limits.BODY_GREETING_MAX_BYTES)
    whole = wire([5, 1, [[0, 0, 3]]])
    for end in range(1, len(whole)):
        with pytest.raises(RemoteProtocolError, match="ended inside"):
            receive(whole[:end])


def test_a_length_that_is_too_long_is_refused_before_its_body_is_read() -> None:
    for most in (limits.BODY_GREETING_MAX_BYTES, limits.BODY_NEWCOMER_MAX_BYTES, limits.BODY_MAX_BYTES):
        with pytest.raises(RemoteProtocolError, match=f"at most {most}"):
            receive(struct.pack(">I", most + 1), most)


def test_a_body_of_millions_of_empty_arrays_is_given_up_early() -> None:
    """They would be 260 MB of lists."""
    inner = b"\xdd\x00\x00\xff\xff" + b"\x90" * 65535
    body = b"\xdd" + struct.pack(">I", 63) + inner * 63
    assert len(body) < limits.BODY_MAX_BYTES
    with pytest.raises(RemoteProtocolError, match="not msgpack that we accept: ValueError"):
        reader.unpack_untrusted(body)
    counts = [[0, tag, 1] for tag in range(limits.KEYS_MAX)]  # as many as a message may have
    assert len(receive(envelope(msgpack.packb([5, 1, counts], use_bin_type=True)))) == 1


def test_wrong_frames_are_refused_and_right_ones_are_not(seed: int) -> None:
    """By the header alone, where that is what is wrong: the frames that the hostile members of other tests send."""
    rng = random.Random(seed)
    epoch = make_epoch(3, bytes(16), 1, (Member(b"a" * 16, b"b" * 16),))
    out = ffi.new("pyccl_frame *")
    right_by_itself = {"an epoch of the same number", "OPEN of another tag", "early DATA without end"}
    for what in WRONG_FRAMES:
        status = lib.pyccl_frame_decode_untrusted(wrong_frame(what, epoch, rng)[:64], out)
        assert (status == 0) == (what in right_by_itself), what
    assert lib.pyccl_frame_decode_untrusted(frame(epoch, type=3, seq=7), out) == 0
