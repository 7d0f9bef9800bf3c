"""Real text that every Python installation has: the top-level modules of its standard library.

Pure but for reading files: no clock, no randomness. Invariants: the same installation gives the same arrays in every
process; a file is in the training text or in the validation text, never in both, and which one depends on its name
alone.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

ALPHABET: Final = "\n" + "".join(map(chr, range(32, 127)))
OTHER: Final = len(ALPHABET)  # every byte outside the alphabet, tabs included
VOCABULARY_SIZE: Final = len(ALPHABET) + 1
TRAIN_SIZE_MAX: Final = 2_000_000  # characters; reading and encoding them takes a few milliseconds
VALIDATION_SIZE_MAX: Final = 300_000
VALIDATION_SHARE: Final = 8  # one file in so many is kept for validation


def _code_table() -> npt.NDArray[np.uint8]:
    table = np.full(256, OTHER, dtype=np.uint8)
    for code, character in enumerate(ALPHABET):
        table[ord(character)] = code
    return table


_CODES: Final = _code_table()


@dataclass(frozen=True)
class Corpus:
    """Character codes of both texts, ``uint8`` below ``VOCABULARY_SIZE``."""

    train: npt.NDArray[np.uint8]
    validation: npt.NDArray[np.uint8]


def is_validation_file(name: str) -> bool:
    """Decide from the name alone, so that no order of reading and no cap moves a file to the other side."""
    return hashlib.sha256(name.encode()).digest()[0] % VALIDATION_SHARE == 0


def encode(text: bytes) -> npt.NDArray[np.uint8]:
    """Map bytes to codes; bytes outside the alphabet become ``OTHER``."""
    return _CODES[np.frombuffer(text, dtype=np.uint8)]


def source_files(folder: Path | None = None) -> list[Path]:
    """The ``.py`` files of ``folder`` (the standard library by default), sorted by name."""
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    return sorted(folder.glob("*.py"), key=lambda path: path.name)


def _read(files: Sequence[Path], size_max: int) -> npt.NDArray[np.uint8]:
    parts: list[bytes] = []
    size = 0
    for path in files:
        if size >= size_max:
            break
        part = path.read_bytes()
        parts.append(part)
        size += len(part)
    return encode(b"".join(parts)[:size_max])


def load(folder: Path | None = None) -> Corpus:
    """Read and split the text.

    Raises:
        FileNotFoundError: the folder has too little Python source (a zipped or stripped standard library).
    """
    files = source_files(folder)
    train = _read([path for path in files if not is_validation_file(path.name)], TRAIN_SIZE_MAX)
    validation = _read([path for path in files if is_validation_file(path.name)], VALIDATION_SIZE_MAX)
    if min(train.size, validation.size) < 10_000:
        where = sysconfig.get_path("stdlib") if folder is None else folder
        raise FileNotFoundError(f"too little Python source in {where}: the demo trains on the standard library")
    return Corpus(train, validation)


def unigram_entropy_bits(codes: npt.NDArray[np.uint8]) -> float:
    """Entropy of the text's own character frequencies, in bits per character: no unigram model does better on it."""
    counts = np.bincount(codes, minlength=VOCABULARY_SIZE).astype(np.float64)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())
