#!/usr/bin/env python3
"""Write proto/vectors/seals.txt: ``python tools/make_seal_vectors.py [--check]``.

Each line is CIPHER WHO EPOCH TEXT BYTES: what the dialer or the acceptor writes for TEXT on one connection, by
proto/wire.md 10, with the `cryptography` library and none of the C code; the other side reads it before the next line.
EPOCH is entered first, if it is not 0. Eight lines are a connection. Its secrets are the bytes 0..31 of who dialed,
100..131 of the other; the n-th private key of who dialed is 32 bytes 0x10 + n, of the other 0x80 + n, from n = 0.
``--check`` writes nothing and fails when the file is not what this script would write.
"""

from __future__ import annotations

import argparse
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

PATH = Path(__file__).resolve().parents[1] / "proto" / "vectors" / "seals.txt"
CIPHERS: dict[int, type[AESGCM | ChaCha20Poly1305]] = {1: AESGCM, 2: ChaCha20Poly1305}
EPOCHS = {1: b"epoch one".ljust(16, b"\0"), 2: b"epoch two".ljust(16, b"\0")}


def expand(secret: bytes, info: bytes) -> bytes:
    return HKDFExpand(hashes.SHA256(), 32, info).derive(secret)


class Side:
    """What one side sends, and the keys that it has made and heard of."""

    def __init__(self, cipher: int, secret: bytes, first_key: int, *, dials: bool) -> None:
        self.make, self.dials, self.next_key = CIPHERS[cipher], dials, first_key
        self.number, self.id = 0, bytes(16)
        self.key: X25519PrivateKey | None = None
        self.heard: list[bytes] = []
        self.answers = False
        self.begin(secret, 0)

    def begin(self, secret: bytes, epoch: int) -> None:
        self.secret, self.epoch, self.count = secret, epoch, 0
        self.aead = self.make(expand(secret, b"pyccl record key 1"))

    def record(self, kind: int, plain: bytes) -> bytes:
        head = struct.pack("<I", len(plain) | kind << 24)
        known = head + struct.pack("<BQQ", self.dials, self.epoch, self.count)
        sealed = self.aead.encrypt(bytes(4) + struct.pack("<Q", self.count), plain, known)
        self.count += 1
        return head + sealed

    def turn(self, other: Side, *, fresh: bool) -> bytes:
        public = bytes(32)
        if fresh or self.key is None:
            self.key = X25519PrivateKey.from_private_bytes(bytes([self.next_key]) * 32)
            self.next_key += 1
            public = self.key.public_key().public_bytes_raw()
        shared = self.key.exchange(X25519PublicKey.from_public_bytes(self.heard[-1])) if self.heard else bytes(32)
        told = struct.pack("<Q", self.number) + self.id + public + struct.pack("<I", len(self.heard))
        sealed = self.record(2, told)
        kdf = HKDF(hashes.SHA256(), 32, salt=self.secret, info=b"pyccl epoch 1" + told)
        self.begin(kdf.derive(shared), self.number)
        if any(public):
            other.heard.append(public)
            other.answers = True
        return sealed

    def write(self, other: Side, epoch: int, text: str) -> bytes:
        told = b""
        if epoch:
            self.number, self.id = epoch, EPOCHS[epoch]
        if epoch or self.answers:
            self.answers = False
            told = self.turn(other, fresh=epoch > 0)
        return told + self.record(1, text.encode())


SCRIPT = (
    ("dialer", 0, "first"),
    ("acceptor", 0, "well-met"),
    ("dialer", 1, "second"),
    ("acceptor", 1, "of-one-epoch"),
    ("dialer", 0, "both-mixed-in"),
    ("acceptor", 2, "ahead"),
    ("dialer", 2, "third-of-an-epoch"),
    ("acceptor", 0, "last"),
)


def lines() -> Iterator[str]:
    for cipher in CIPHERS:
        dialer = Side(cipher, bytes(range(32)), 0x10, dials=True)
        acceptor = Side(cipher, bytes(range(100, 132)), 0x80, dials=False)
        for who, epoch, text in SCRIPT:
            one, other = (dialer, acceptor) if who == "dialer" else (acceptor, dialer)
            yield f"{cipher} {who} {epoch} {text} {one.write(other, epoch, text).hex()}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the file is stale")
    text = "".join(lines())
    if not parser.parse_args().check:
        PATH.write_text(text, encoding="utf-8")
        return 0
    stale = not PATH.is_file() or PATH.read_text(encoding="utf-8") != text
    if stale:
        print(f"{PATH} is stale: run tools/make_seal_vectors.py", file=sys.stderr)
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
