"""SharedState.save and load: what was saved comes back bit for bit, or an error says why not."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import pyccl
from pyccl import state as state_module
from pyccl import statefile

SEED = 20310504
MIB = 1 << 20
DIGESTS = ["fast", "sha256"]
DTYPES = [*(name for name in statefile._CODES if name not in statefile._OF_ML_DTYPES)]
FLOATS_OF_ML_DTYPES = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"]


def drawn(seed: int, dtype: Any, *shape: int) -> np.ndarray[Any, Any]:
    """Any bits, NaNs with payloads too."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.random.default_rng([SEED, seed]).integers(0, 2 if dtype.kind == "b" else 256, size, np.uint8)
    return raw.view(dtype).reshape(shape)


def model(seed: int = 0, revision: int = 7, digest: str = "fast") -> pyccl.SharedState:
    arrays = {
        "w": drawn(seed, "float32", 600, 513),  # more than a chunk
        "half": drawn(seed + 1, ml_dtypes.bfloat16, 7, 3),
        "flag": drawn(seed + 2, "bool", 5),
        "scalar": drawn(seed + 3, "float64"),
        "empty": drawn(seed + 4, "int16", 0, 4),
        "rng ä": drawn(seed + 5, "uint64", 6),
    }
    state = pyccl.SharedState(arrays, revision, allow_content_inequality=["rng ä"], digest=digest)
    state.lineage = bytes(range(16))
    return state


def told(state: pyccl.SharedState) -> Any:
    """All that a file must bring back."""
    arrays = {name: (a.dtype, a.shape, a.tobytes()) for name, a in state.arrays.items()}
    return arrays, state.revision, state.lineage, state.digest(), state.chunk_digest.name


@pytest.mark.parametrize("digest", DIGESTS)
def test_what_was_saved_comes_back_in_new_arrays_and_in_given_ones(digest: str, tmp_path: Path) -> None:
    saved, other = model(digest=digest), model(seed=50, revision=3, digest=digest)
    saved.save(tmp_path / "state")
    new = pyccl.SharedState.load(str(tmp_path / "state"))
    arrays = dict(other.arrays)
    assert other.load(tmp_path / "state") is other
    assert told(new) == told(saved) == told(other)
    assert all(other.arrays[name] is array for name, array in arrays.items())
    assert all(array.flags.writeable and array.flags.c_contiguous for array in new.arrays.values())
    assert new.voter is None and os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize("dtype", [*DTYPES, *FLOATS_OF_ML_DTYPES])
def test_every_dtype_that_safetensors_knows(dtype: str, tmp_path: Path) -> None:
    kind = getattr(ml_dtypes, dtype) if dtype in FLOATS_OF_ML_DTYPES else dtype
    state = pyccl.SharedState({"x": drawn(1, kind, 9, 5), "y": drawn(2, "uint8", 3)})
    state.save(tmp_path / "state")
    assert told(pyccl.SharedState.load(tmp_path / "state")) == told(state)
    with safetensors.safe_open(tmp_path / "state", framework="np") as file:
        view = file.get_slice("x")
        assert view.get_shape() == [9, 5] and view.get_dtype() == statefile._CODES[dtype]


def test_the_reference_library_reads_the_same_arrays(tmp_path: Path) -> None:
    state = pyccl.SharedState(
        {
            **{dtype: drawn(n, dtype, n, 3) for n, dtype in enumerate(DTYPES)},
            "big": drawn(1, "float32", 3 * MIB // 4 + 1),
        }
    )
    state.save(tmp_path / "state")
    read = safetensors.numpy.load_file(tmp_path / "state")
    assert {name: (a.dtype, a.shape, a.tobytes()) for name, a in read.items()} == told(state)[0]
    with safetensors.safe_open(tmp_path / "state", framework="np") as file:
        manifest = json.loads(file.metadata()["pyccl"])
    assert (manifest["revision"], manifest["root"]) == (0, state.digest())


@pytest.mark.parametrize("dtype", [">f4", "complex128", "M8[s]", "S5", "f4,i8", ml_dtypes.int4])
def test_a_dtype_without_a_place_is_refused_by_name(dtype: Any, tmp_path: Path) -> None:
    state = pyccl.SharedState({"good": np.zeros(3), "odd": np.zeros(3, np.dtype(dtype))})
    with pytest.raises(pyccl.UsageError, match="odd: a state file can't hold dtype"):
        state.save(tmp_path / "state")
    with pytest.raises(pyccl.UsageError, match="__metadata__"):
        pyccl.SharedState({"__metadata__": np.zeros(3)}).save(tmp_path / "state")
    assert os.listdir(tmp_path) == []


# ---- damage


def small(digest: str = "fast") -> pyccl.SharedState:
    arrays = {"w": drawn(1, "float32", 11), "b": drawn(2, "int8", 3), "rng": drawn(3, "uint32", 2)}
    return pyccl.SharedState(arrays, 5, allow_content_inequality=["rng"], digest=digest)


def refused_whole(path: Path) -> None:
    """By both ways to load, and given arrays stay what they were."""
    with pytest.raises(pyccl.StateFileError, match=str(path)):
        pyccl.SharedState.load(path)
    state = small()
    before = told(state)
    with pytest.raises(pyccl.StateFileError, match=str(path)):
        state.load(path)
    assert told(state) == before


def test_every_single_bit_counts(tmp_path: Path) -> None:
    path = tmp_path / "state"
    small().save(path)
    data = path.read_bytes()
    for at in range(len(data)):
        spoiled = bytearray(data)
        spoiled[at] ^= 1 << at % 8
        path.write_bytes(spoiled)
        refused_whole(path)


def test_every_truncation_and_every_addition_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    small().save(path)
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        refused_whole(path)
    for more in (b"\0", b" " * 8, data):
        path.write_bytes(data + more)
        refused_whole(path)


@pytest.mark.parametrize("digest", DIGESTS)
def test_a_sector_that_was_never_written_is_found_and_its_array_named(digest: str, tmp_path: Path) -> None:
    path = tmp_path / "state"
    model(digest=digest).save(path)
    start, size = statefile.StateFile(path).places["w"]
    offset = path.stat().st_size - sum(s for _, s in statefile.StateFile(path).places.values()) + start + size - 700
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(bytes(512))
    with pytest.raises(pyccl.StateFileError, match="array w is damaged"):
        pyccl.SharedState.load(path)
    other = model(seed=90, digest=digest)
    before = told(other)
    with pytest.raises(pyccl.StateFileError, match="array w is damaged"):
        other.load(path)
    assert told(other) == before


def test_arrays_that_changed_places_are_found(tmp_path: Path) -> None:
    one, other = drawn(1, "float32", 8), drawn(2, "float32", 8)
    path = tmp_path / "state"
    pyccl.SharedState({"a": one, "b": other}).save(path)
    data = path.read_bytes()
    path.write_bytes(data[:-64] + data[-32:] + data[-64:-32])
    with pytest.raises(pyccl.StateFileError, match="array a is damaged"):
        pyccl.SharedState.load(path)


def header_of(text: str, data: bytes = b"") -> bytes:
    return len(text.encode()).to_bytes(8, "little") + text.encode() + data


FOREIGN = {
    "empty": b"",
    "noise": np.random.default_rng(SEED).bytes(500),
    "huge header": b"\xff" * 64,
    "pickle": b"\x80\x04\x95" + bytes(100),
    "no object": header_of("[]"),
    "deep": header_of("[" * 100_000),
    "no manifest": header_of("{}"),
    "other metadata": header_of('{"__metadata__":{"format":"pt"}}'),
    "manifest is no text": header_of('{"__metadata__":{"pyccl":7}}'),
    "manifest is no object": header_of('{"__metadata__":{"pyccl":"[]"}}'),
}


@pytest.mark.parametrize("data", FOREIGN.values(), ids=list(FOREIGN))
def test_what_is_no_state_file_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(data)
    refused_whole(tmp_path / "state")


def test_a_file_of_safetensors_without_a_manifest_is_foreign(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"w": np.zeros(3, np.float32)}, tmp_path / "state")
    with pytest.raises(pyccl.StateFileError, match="none that pyccl has written"):
        pyccl.SharedState.load(tmp_path / "state")


def forged(**changes: Any) -> bytes:
    """A file whose manifest is sealed and tells what it likes."""
    told = {
        "format": 1, "revision": 0, "lineage": "00" * 16, "digest": "fast", "root": "00" * 32,
        "layout": "00" * 32, "arrays": {"w": ["uint8", [0], True, "00" * 32]},
    }  # fmt: skip
    told |= changes
    sealed = told | {"seal": hashlib.sha256(json.dumps(told, separators=(",", ":")).encode()).hexdigest()}
    text = json.dumps(sealed, separators=(",", ":"))
    plain = {"__metadata__": {"pyccl": text}, "w": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}
    encoded = json.dumps(plain, separators=(",", ":"))
    return header_of(encoded + " " * (-len(encoded) % 8))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2}, {"revision": -1}, {"revision": 1 << 63}, {"revision": "x"}, {"revision": None},
        {"revision": 0.5},
        {"lineage": "00"}, {"lineage": "zz" * 16}, {"digest": "md5"}, {"root": "11" * 32},
        {"layout": "11"}, {"arrays": []},
        {"arrays": {}}, {"arrays": {"w": 1}}, {"arrays": {"w": ["uint8", [-1], True, ""]}},
        {"arrays": {"w": ["object", [0], True, ""]}}, {"arrays": {"w": ["uint8", [1 << 60], True, ""]}},
        {"arrays": {"w": ["uint8", [0, 10**40], True, ""]}}, {"arrays": {"w": ["uint8", [0] * 99, True, ""]}},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_that_lies_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(forged(**changes))
    refused_whole(tmp_path / "state")


def test_another_layout_or_digest_is_refused_and_named(tmp_path: Path) -> None:
    path = tmp_path / "state"
    small().save(path)
    wrong = {
        "w is float32 .11,. there, float64 .11,. here": {"w": np.zeros(11)},
        "w is float32 .11,. there, float32 .12,. here": {"w": np.zeros(12, np.float32)},
        "more is missing there": {"more": np.zeros(1)},
    }
    for text, change in wrong.items():
        state = pyccl.SharedState(dict(small().arrays) | change, allow_content_inequality=["rng"])
        with pytest.raises(pyccl.StateFileError, match=text):
            state.load(path)
    with pytest.raises(pyccl.StateFileError, match=r"rng is uint32 .2,., may differ there, uint32 .2,. here"):
        pyccl.SharedState(dict(small().arrays)).load(path)
    with pytest.raises(pyccl.StateFileError, match='digest is "fast", here it is "sha256"'):
        small("sha256").load(path)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        pyccl.SharedState.load(tmp_path / "state")
    with pytest.raises(FileNotFoundError):
        small().save(tmp_path / "nowhere" / "state")


# ---- saving, and not coming to its end


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "state"
    model(revision=1).save(path)
    before = told(pyccl.SharedState.load(path))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, old[1]))
        with pytest.raises(OSError, match=str(path)) as caught:
            model(seed=9, revision=2).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert told(pyccl.SharedState.load(path)) == before and os.listdir(tmp_path) == ["state"]


def test_two_saves_at_once_the_second_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with open(tmp_path / ".state.new", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(pyccl.StateFileError, match="another save is under way"):
            small().save(path)
    small().save(path)  # what a killed one left is taken over
    assert os.listdir(tmp_path) == ["state"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "state").symlink_to(tmp_path / "there" / "real")
    small().save(tmp_path / "state")
    assert (tmp_path / "state").is_symlink() and told(pyccl.SharedState.load(tmp_path / "state")) == told(small())


KILLED_AT = """
import os, sys
import numpy as np
import pyccl
path, call, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
state = pyccl.SharedState({"w": np.full(12 << 20, 2, np.uint8)}, 2)
inner, count = getattr(os, call), 0
def trap(*args, **keywords):
    global count
    count += 1
    if count == number:
        print("here", flush=True)
        sys.stdin.read()  # until it is killed
    return inner(*args, **keywords)
setattr(os, call, trap)
state.save(path)
"""


@pytest.mark.parametrize(
    ("call", "number", "revision"),
    [("posix_fallocate", 1, 1), ("write", 1, 1), ("write", 3, 1), ("fsync", 1, 1), ("rename", 1, 1), ("fsync", 2, 2)],
)
def test_kill_9_in_a_save_leaves_the_old_file_or_the_new_one(
    call: str, number: int, revision: int, tmp_path: Path
) -> None:
    path = tmp_path / "state"
    pyccl.SharedState({"w": np.full(12 << 20, 1, np.uint8)}, 1).save(path)
    with subprocess.Popen(
        [sys.executable, "-P", "-c", KILLED_AT, str(path), call, str(number)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == b"here\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    state = pyccl.SharedState.load(path)
    assert state.revision == revision and np.all(state.arrays["w"] == revision)
    state.revision = 3
    state.save(path)
    assert pyccl.SharedState.load(path).revision == 3 and os.listdir(tmp_path) == ["state"]


def test_kill_9_at_any_time_leaves_a_whole_file(tmp_path: Path) -> None:
    """A process saves on and on; it is killed at random moments."""
    program = """
import itertools, sys, numpy as np, pyccl
state = pyccl.SharedState({"w": np.zeros(3 << 20, np.uint8)})
for state.revision in itertools.count(int(sys.argv[2])):
    state.arrays["w"][:] = state.revision % 256
    state.save(sys.argv[1])
    print(state.revision, flush=True)
"""
    path, rng, seen = tmp_path / "state", np.random.default_rng(SEED), 0
    for _ in range(5):
        with subprocess.Popen(
            [sys.executable, "-P", "-c", program, str(path), str(seen + 1)], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            durable = int(process.stdout.readline())
            until = time.monotonic() + rng.random() * 0.02  # where in a save it is caught; either way it must hold
            while time.monotonic() < until:
                pass
            process.kill()
            durable = max([durable, *map(int, process.stdout.read().split(b"\n")[:-1])])
        state = pyccl.SharedState.load(path)
        assert state.revision in (durable, durable + 1) and np.all(state.arrays["w"] == state.revision % 256), SEED
        seen = state.revision


MEMORY = """
import sys, numpy as np, pyccl
def peak():
    with open("/proc/self/status") as lines:
        return dict(line.split(":", 1) for line in lines)["VmHWM"].split()[0]
state = pyccl.SharedState({f"w{n}": np.ones(32 << 20, np.uint8) for n in range(4)}, 1)
state.digest()  # its threads and tables
with open("/proc/self/clear_refs", "w") as file: file.write("5")
before = int(peak())
state.save(sys.argv[1])
state.load(sys.argv[1])
print(int(peak()) - before)
"""


def test_neither_save_nor_load_needs_a_second_copy(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", MEMORY, str(tmp_path / "state")], stdout=subprocess.PIPE, check=True
    )
    assert int(done.stdout) << 10 <= 24 * MIB  # of 128: a window of 8 MiB, and what the allocator keeps


def test_a_file_that_changes_while_it_is_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, state = tmp_path / "state", small()
    state.save(path)
    check = state_module.check_state_file

    def changed_behind(file: Any) -> None:
        check(file)
        with open(path, "r+b") as spoiled:
            spoiled.seek(-1, os.SEEK_END)
            spoiled.write(b"\xaa")

    monkeypatch.setattr(state_module, "check_state_file", changed_behind)
    with pytest.raises(pyccl.StateFileError, match="only part of it"):
        state.load(path)
