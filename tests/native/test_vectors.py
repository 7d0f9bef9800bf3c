"""The golden vectors of proto/vectors through the binding, and the scripts that write them: both still say the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pyccl._native._pyccl import ffi, lib
from pyccl._proto import election
from pyccl._proto import spec as specs
from pyccl.errors import RemoteProtocolError
from pyccl.state import SharedState

ROOT = Path(__file__).resolve().parents[2]
VECTORS = ROOT / "proto" / "vectors"


def lines(name: str) -> list[list[str]]:
    text = (VECTORS / name).read_text(encoding="utf-8")
    return [line.split() for line in text.splitlines() if line and not line.startswith("#")]


def fields(words: list[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words)


@pytest.mark.parametrize(
    "script", ["make_vectors.py", "make_message_vectors.py", "make_seal_vectors.py", "make_fuzz_corpus.py"]
)
def test_vectors_are_what_their_script_writes(script: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / script), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_frame_vector_is_decoded_to_its_fields_or_refused() -> None:
    judged = {"ok": 0, "refused": 0}
    for name, verdict, header, *wanted in lines("frames.txt"):
        frame = ffi.new("pyccl_frame *")
        status = lib.pyccl_frame_decode_untrusted(bytes.fromhex(header), frame)
        assert (status == lib.PYCCL_OK) == (verdict == "ok"), name
        judged[verdict] += 1
        for key, value in fields(wanted).items():
            assert getattr(frame, key) == int(value), (name, key)
        if verdict == "ok":
            out = ffi.new("uint8_t[]", lib.PYCCL_FRAME_SIZE)
            lib.pyccl_frame_encode(frame, out)
            assert bytes(ffi.buffer(out)).hex() == header, name
    assert min(judged.values()) >= 10, judged


def test_every_spec_vector_reads_alike_in_c_and_in_python() -> None:
    accepted = 0
    for name, verdict, encoded, *wanted in lines("specs.txt"):
        spec = ffi.new("pyccl_spec *")
        status = lib.pyccl_spec_decode_untrusted(bytes.fromhex(encoded), spec)
        assert (status == lib.PYCCL_OK) == (verdict == "ok"), name
        if verdict != "ok":
            continue
        accepted += 1
        python = specs.decode_untrusted(bytes.fromhex(encoded))
        for key, value in fields(wanted).items():
            if key == "hash":
                assert lib.pyccl_spec_hash(spec) == int(value), name
            elif key == "root":
                assert bytes(spec.root).hex() == python.root.hex() == value, name
            elif key != "reserved":
                told = getattr(python, "length" if key == "count" else key)
                assert getattr(spec, key) == told == int(value), (name, key)
    assert accepted >= 10


def test_digest_vectors_hold_through_the_binding() -> None:
    for length, seed, short, long in lines("digests.txt"):
        data = bytes((i * 131 + 7) & 255 for i in range(int(length)))
        out = ffi.new("uint8_t[16]")
        lib.pyccl_xxh3_128(data, len(data), int(seed), out)
        assert f"{lib.pyccl_xxh3_64(data, len(data), int(seed)):016x}" == short, (length, seed)
        assert bytes(ffi.buffer(out)).hex() == long, (length, seed)


def test_state_vectors_have_these_layouts_tables_and_roots() -> None:
    judged = set()
    for name, digest, revision, arrays, layout, table, root in lines("states.txt"):
        held, unequal = {}, []
        for encoded, dtype, shape, may_differ in (array.split(",") for array in arrays.split(";")):
            foreign = getattr(ml_dtypes, dtype[1:], None)
            array = np.empty([int(size) for size in shape.split("x")] if shape != "-" else [], foreign or dtype)
            bytes_ = array.reshape(-1).view(np.uint8)
            bytes_[:] = np.arange(bytes_.size, dtype=np.uint64) * 131 + 7 & 255
            held[bytes.fromhex(encoded).decode()] = array
            unequal += [bytes.fromhex(encoded).decode()] * (may_differ == "1")
        state = SharedState(held, int(revision), digest=digest, allow_content_inequality=unequal)
        tree = state.tree()
        assert tree.layout.hex() == layout, name
        assert (tree.table.hex() or "-") == table, name
        assert tree.root.hex() == state.digest() == root, name
        judged.add(digest)
    assert judged == {"fast", "sha256"}


def test_every_state_record_vector_is_decoded_to_its_fields_or_refused() -> None:
    judged = {"ok": 0, "refused": 0}
    peer = bytes(range(16))
    for name, verdict, data, *wanted in lines("records.txt"):
        judged[verdict] += 1
        if verdict == "refused":
            with pytest.raises(RemoteProtocolError, match="state record"):
                election.decode_untrusted(peer, bytes.fromhex(data))
            continue
        record = election.decode_untrusted(peer, bytes.fromhex(data))
        assert record.peer == peer and election.encode(record).hex() == data, name
        for key, value in fields(wanted).items():
            told = getattr(record, key)
            assert (told.hex() if isinstance(told, bytes) else str(int(told))) == value, (name, key)
    assert judged["ok"] >= 4 and judged["refused"] >= 10


def test_a_difference_of_two_spec_vectors_is_told_by_the_name_of_the_field() -> None:
    wanted = {name: bytes.fromhex(encoded) for name, verdict, encoded, *_ in lines("specs.txt") if verdict == "ok"}
    mine, theirs = wanted["all_reduce_sum_int32"], wanted["all_reduce_prod_int32"]
    assert specs.differing_fields(specs.decode_untrusted(mine), specs.decode_untrusted(theirs)) == ("op",)
