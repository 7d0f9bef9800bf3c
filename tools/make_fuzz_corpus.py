"""Write native/fuzz/corpus, the inputs that fuzzing begins with, from the golden vectors in proto/vectors.

    tools/make_fuzz_corpus.py [--check]     --check: write nothing, fail if a file differs

Files that were found by fuzzing and are kept lie beside them under found-*; this tool leaves those alone.
"""

from __future__ import annotations

import argparse
import itertools
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VECTORS = ROOT / "proto" / "vectors"
CORPUS = ROOT / "native" / "fuzz" / "corpus"
REPAIR_ALL = b"\x07"  # of an engine's frame: magic, checksum, epoch, spec hash
DATA, OPEN = 2, 1


def lines(name: str) -> Iterator[list[str]]:
    for line in (VECTORS / name).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            yield line.split()


def hexed(text: str) -> bytes:
    return b"" if text == "-" else bytes.fromhex(text)


def frames() -> Iterator[tuple[str, bytes]]:
    """Every header and spec, a few in a file: each file is an input that goes through all it holds."""
    headers = [b"\0" + hexed(fields[2]) for fields in lines("frames.txt")]
    specs = [b"\1" + hexed(fields[2]) for fields in lines("specs.txt")]
    for name, parts in (("headers", headers), ("specs", specs)):
        for first in range(0, len(parts), 32):
            yield f"{name}-{first // 32}", b"".join(parts[first : first + 32])


def codecs() -> Iterator[tuple[str, bytes]]:
    dtypes = {11: 0, 12: 1, 3: 2, 4: 3}
    for name, codec, dtype, block, count, _, encoded, _ in lines("codecs.txt"):
        if int(count) < 600 and name.endswith("_float32"):
            log2 = int(block).bit_length() - 1
            yield name, bytes([int(codec), dtypes[int(dtype)], log2]) + struct.pack("<Q", int(count)) + hexed(encoded)


def seals() -> Iterator[tuple[str, bytes]]:
    def commands(cipher: int, *steps: tuple[int, int, bytes]) -> bytes:
        head = struct.pack("<BQ", cipher, 999)
        return head + b"".join(struct.pack("<BQ", what, number) + extra for what, number, extra in steps)

    for cipher in (0, 1):
        whole = [(1, 3, b""), (0, 40, b""), (0, 69_999, b""), (1, 4, b""), (0, 1, b"")]
        yield f"whole-{cipher}", commands(cipher, *whole)
        yield f"bit-{cipher}", commands(cipher, *whole, (2, 30, b""))
        yield f"cut-{cipher}", commands(cipher, *whole, (3, 10, b""), (0, 5, b""))
        yield f"again-{cipher}", commands(cipher, *whole, (4, 20, b""))
    for cipher, who, number, name, record in lines("seals.txt"):
        stolen = hexed(record)
        yield f"{name}-{cipher}-{who}-{number}", commands(int(cipher) - 1, (5, len(stolen), stolen))


SCHEDULED = ("_sum_float32", "_coded", "_algorithm_2", "_count_most", "broadcast_int64", "exchange_uint8", "row_of_7")


def schedules() -> Iterator[tuple[str, bytes]]:
    for name, verdict, encoded, *_ in lines("specs.txt"):
        if verdict != "ok" or not any(part in name for part in SCHEDULED):
            continue
        for world, says in ((2, 8), (3, 8), (3, 7 + 16)):
            plan = b"".join(struct.pack("<IB", 1 + i * i, i) for i in range(world)) + struct.pack("<QQ", 1 << 20, 1000)
            asks = b"".join(
                struct.pack("<BBQQ", sender, phase, at, 1 << 18)
                for sender, phase, at in itertools.product((0, 1), (0, 1), (0, 7))
            )
            yield f"{name}-{world}-{says}", bytes([world - 2, 0, 1, says]) + plan + hexed(encoded) + asks


def machines() -> Iterator[tuple[str, bytes]]:
    """Commands of fuzz_fsm.c: operations that all open and finish, of several kinds, and what goes wrong in them."""

    def told(kind: int, sender: int, what: int, seq: int = 0, value: int = 0, complaint: bytes = b"") -> bytes:
        return bytes([9, 0, kind, sender, what, seq, value]) + complaint

    def opened(what: int) -> bytes:
        return told(1, 0, what) + told(1, 1, what)

    def operation(what: int, *ends: bytes) -> bytes:
        return bytes([0, what]) + opened(what) + bytes([2, 0]) + b"".join(ends)

    for name, what in (("plain", 0), ("guarded", 16), ("broadcast", 32), ("exchange", 64)):
        yield f"{name}-committed", operation(what, told(3, 0, what), told(3, 1, what))
        yield f"{name}-differs", operation(what, told(3, 0, what, 0, 1), told(3, 1, what))
        yield f"{name}-aborted", operation(what, told(4, 0, what, 0, 30))
        yield f"{name}-flushed", operation(what, bytes([4, 0, 5, 0]), opened(what), told(3, 0, what))
        yield f"{name}-late", operation(what, bytes([6, 255, 6, 255, 6, 255]), told(6, 0, what))
        yield f"{name}-early", told(1, 0, what) + told(3, 0, what) + bytes([0, what, 7, 0])
    yield "guarded-complaint", operation(16, told(3, 0, 16 + 4, 0, 0, b"\1\0"), told(3, 1, 16 + 4, 0, 0, b"\0\1"))
    yield "guarded-refused", bytes([0, 16]) + told(1, 0, 16 + 4) + told(1, 1, 16)


def engines() -> Iterator[tuple[str, bytes]]:
    """Of fuzz_engine.c: all headers of the vectors, repaired, and an operation from its OPEN to its DONE."""

    def header(kind: int, tag: int, *, phase: int = 0, length: int = 0, offset: int = 0, value: int = 0) -> bytes:
        return struct.pack("<IBBBBQQQIIQQII", 0, kind, phase, 0, 0, 0, 0, 0, tag, length, offset, value, 0, 0)

    def opened(tag: int) -> bytes:
        return REPAIR_ALL + header(OPEN, tag, length=40, offset=0x3FF << 52)

    def data(tag: int, phase: int, offset: int, length: int) -> bytes:
        return REPAIR_ALL + header(DATA, tag, phase=phase, length=length, offset=offset) + bytes(length)

    def ended(kind: int, tag: int, value: int = 0) -> bytes:
        return REPAIR_ALL + header(kind, tag, value=value)

    yield "opens", b"\0" + b"".join(opened(tag) for tag in range(5))
    yield "swap", b"\0" + opened(0) + data(0, 0, 0, 1200) + ended(3, 0)
    yield "direct", b"\1" + opened(0) + data(0, 0, 0, 400) + data(0, 1, 0, 400) + ended(3, 0)
    yield "ring", b"\1" + opened(1) + data(1, 0, 0, 400) + data(1, 0, 400, 400) + data(1, 1, 800, 400)
    yield "guarded", b"\0" + opened(3) + data(3, 0, 0, 340) + ended(3, 3)
    yield "aborted", b"\0" + opened(2) + ended(4, 2, 30) + ended(5, 2) + ended(6, 2, 30)
    for first, headers in enumerate(_some(list(lines("frames.txt")), 12)):
        yield f"vectors-{first}", b"\1" + b"".join(b"\3" + hexed(fields[2]) + bytes(64) for fields in headers)


def _some(parts: list[list[str]], count: int) -> Iterator[list[list[str]]]:
    for first in range(0, len(parts), count):
        yield parts[first : first + count]


TARGETS = {
    "frame": frames, "codec": codecs, "seal": seals, "schedule": schedules, "fsm": machines, "engine": engines,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    wrong = 0
    for target, make in TARGETS.items():
        folder = CORPUS / target
        wanted = dict(make())
        there = {path.name for path in folder.glob("*") if not path.name.startswith("found-")}
        wrong += len(there ^ wanted.keys())
        wrong += sum((folder / name).read_bytes() != wanted[name] for name in there & wanted.keys())
        if not check:
            folder.mkdir(parents=True, exist_ok=True)
            for name in there - wanted.keys():
                (folder / name).unlink()
            for name, content in wanted.items():
                (folder / name).write_bytes(content)
            print(f"{target}: {len(wanted)} files, {sum(map(len, wanted.values()))} bytes")
    if check and wrong:
        print(f"{wrong} files of native/fuzz/corpus are not as tools/make_fuzz_corpus.py writes them", file=sys.stderr)
    return 1 if check and wrong else 0


if __name__ == "__main__":
    sys.exit(main())
