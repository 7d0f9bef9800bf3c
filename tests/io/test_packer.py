"""zstd for chunks: what is packed comes out again, what is forged does not and costs no memory; the holder's thread."""

from __future__ import annotations

import random
import struct
import threading
import tracemalloc

import numpy as np
import pytest
import zstandard

from pyccl._io import packer
from pyccl._io.packer import Packer, pack, unpack_untrusted
from pyccl._io.session import Session, SessionConfig

SEED = 20310622
SIZE = 1 << 20


def bytes_of(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def text(size: int) -> np.ndarray:
    return np.resize(bytes_of(b"the quick brown fox jumps over the lazy dog; "), size)


@pytest.mark.parametrize("size", [1, 2, 1000, SIZE])
def test_what_is_packed_comes_out_again(size: int) -> None:
    found = unpack_untrusted(bytes_of(pack(text(size))), size)
    assert found is not None and np.array_equal(found, text(size))


def test_a_sample_tells_bytes_and_time() -> None:
    packed_bytes, pack_s, unpack_s = packer.sample(text(SIZE))
    assert packed_bytes == len(pack(text(SIZE))) < SIZE // 10 and pack_s > 0 and unpack_s > 0


def of_unknown_size(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(data)


def with_size(frame: bytes, size: int) -> bytes:
    """A frame that says in 4 bytes how long it is, as if that were `size`."""
    assert frame[4] >> 6 == 2
    at = 5 if frame[4] & 0x20 else 6
    return frame[:at] + struct.pack("<I", size) + frame[at + 4 :]


def with_window(frame: bytes, descriptor: int) -> bytes:
    assert not frame[4] & 0x20
    return frame[:5] + bytes([descriptor]) + frame[6:]


def forged() -> dict[str, bytes]:
    good = pack(text(SIZE))
    with_dictionary = zstandard.ZstdCompressor(
        dict_data=zstandard.ZstdCompressionDict(text(4096).tobytes(), dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    )
    return {
        "empty": b"",
        "no frame": b"\0" * 100,
        "cut": good[:-1],
        "one byte more": good + b"\0",
        "two frames": good + good,
        "a longer one": pack(text(SIZE + 1)),
        "a shorter one": pack(text(SIZE - 1)),
        "a bomb": pack(np.zeros(256 << 20, np.uint8)),
        "a bomb of unknown size": of_unknown_size(bytes(256 << 20)),
        "the right bytes, of unknown size": of_unknown_size(text(SIZE).tobytes()),
        "a bomb that lies": with_size(pack(np.zeros(256 << 20, np.uint8)), SIZE),
        "shorter than it says": with_size(pack(text(SIZE // 2)), SIZE),
        "a window of 128 MiB": with_window(good, 17 << 3),
        "of two frames, each half": pack(text(SIZE // 2)) * 2,
        "skippable": struct.pack("<II", 0x184D2A50, 8) + bytes(8),
        "skippable first": struct.pack("<II", 0x184D2A50, 8) + bytes(8) + good,
        "says 2**63": b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 63) + b"\x01\0\0",
        "with a dictionary": with_dictionary.compress(bytes(4096) + text(SIZE - 4096).tobytes())[:-9],
    }


@pytest.mark.parametrize("name", sorted(forged()))
def test_what_is_forged_gives_nothing_and_takes_no_memory(name: str) -> None:
    frame = bytes_of(forged()[name])
    tracemalloc.start()
    try:
        assert unpack_untrusted(frame, SIZE) is None
        assert tracemalloc.get_traced_memory()[1] < 4 * SIZE
    finally:
        tracemalloc.stop()


def test_flipped_bits_give_nothing_or_as_many_bytes_which_a_digest_judges() -> None:
    rng, good = random.Random(SEED), pack(text(SIZE))
    for _ in range(2000):
        frame = bytearray(good)
        frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
        found = unpack_untrusted(bytes_of(bytes(frame)), SIZE)
        assert found is None or found.nbytes == SIZE, SEED


class FakeEngine:
    """Keeps the answers; each lets go of one permit of `arrived`."""

    def __init__(self) -> None:
        self.answers: dict[tuple[int, int, int], bytes] = {}
        self.arrived = threading.Semaphore(0)

    def packed(self, slot: int, sync: int, offset: int, size_bytes: int, data: bytes) -> None:
        assert sync == 7
        self.answers[slot, offset, size_bytes] = data
        self.arrived.release()


def test_a_holder_packs_what_lies_in_one_array_and_is_shorter_so() -> None:
    noise = np.random.default_rng(SEED).integers(0, 256, SIZE, np.uint8)
    engine = FakeEngine()
    packs = Packer(engine, 7, [text(SIZE), np.empty(0, np.uint8), noise, text(100)])  # type: ignore[arg-type]
    wanted = [(1, 0, SIZE), (2, 5, 1000), (1, SIZE, SIZE), (1, SIZE - 1, 2), (1, 2 * SIZE, 100), (1, 2 * SIZE + 99, 2),
              (1, 1 << 60, SIZE)]  # fmt: skip
    for asked in wanted:
        packs.ask(*asked)
    for _ in wanted:
        assert engine.arrived.acquire(timeout=60)
    packs.close()
    assert engine.answers.keys() == set(wanted)
    for asked, start in {(1, 0, SIZE): 0, (2, 5, 1000): 5, (1, 2 * SIZE, 100): 0}.items():
        found = unpack_untrusted(bytes_of(engine.answers.pop(asked)), asked[2])
        assert found is not None and np.array_equal(found, text(SIZE)[start : start + asked[2]])
    assert set(engine.answers.values()) == {b""}
    packs.ask(3, 0, SIZE)
    assert engine.answers[3, 0, SIZE] == b""  # closed: nothing is read any more


def test_too_many_that_wait_are_sent_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packer, "_QUEUE_MAX", 0)
    engine = FakeEngine()
    packs = Packer(engine, 7, [text(SIZE)])  # type: ignore[arg-type]
    packs.ask(1, 0, SIZE)
    assert engine.answers == {(1, 0, SIZE): b""}
    packs.close()


def test_all_who_wait_are_answered_when_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine tells of so many asks of a peer only that were not answered."""
    engine, at_work, go_on = FakeEngine(), threading.Event(), threading.Event()

    def slow(data: np.ndarray) -> bytes:
        at_work.set()
        assert go_on.wait(60)
        return pack(data)

    monkeypatch.setattr(packer, "pack", slow)
    packs = Packer(engine, 7, [text(SIZE)])  # type: ignore[arg-type]
    for offset in range(5):
        packs.ask(1, offset, 1000)
    assert at_work.wait(60)
    thread = packs._thread
    assert thread is not None
    monkeypatch.setattr(thread, "join", lambda join=thread.join: (go_on.set(), join()))  # what `close` does last
    packs.close()
    assert engine.answers.keys() == {(1, offset, 1000) for offset in range(5)}
    assert [bool(engine.answers[1, offset, 1000]) for offset in range(5)] == [True, False, False, False, False]


def test_without_a_thread_or_memory_everything_is_sent_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    engine = FakeEngine()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fails)
        packs = Packer(engine, 7, [text(SIZE)])  # type: ignore[arg-type]
        packs.ask(1, 0, SIZE)
        packs.ask(1, 5, 1000)
    packs.close()
    assert engine.answers == {(1, 0, SIZE): b"", (1, 5, 1000): b""}

    def is_short(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(packer, "pack", is_short)
    packs = Packer(engine, 7, [text(SIZE)])  # type: ignore[arg-type]
    packs.ask(2, 0, SIZE)
    packs.ask(2, 5, 1000)
    packs.close()
    assert engine.answers[2, 0, SIZE] == engine.answers[2, 5, 1000] == b""


def test_ctrl_c_in_the_wait_for_the_packer_leaves_nothing_published() -> None:
    class Interrupted:
        def close(self) -> None:
            raise KeyboardInterrupt

    class Published:
        def __init__(self) -> None:
            self.syncs = {7}

        def unpublish(self, sync: int) -> None:
            self.syncs.remove(sync)

    session, engine = Session(SessionConfig("127.0.0.1", 1, 0, None, "test"), bytes(16), bytes(16)), Published()
    session._packers[7] = Interrupted()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        session.unpublish(7, engine)  # type: ignore[arg-type]
    assert not engine.syncs and not session._packers
