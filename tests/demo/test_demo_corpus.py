"""The text of the demo: deterministic, and split by file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pyccl.demo import corpus


def write_files(folder: Path, count: int) -> None:
    for index in range(count):
        (folder / f"module_{index:03d}.py").write_bytes(f"# marker {index:03d}\n".encode() * 500)


def markers(codes: np.ndarray) -> set[str]:
    text = "".join(corpus.ALPHABET[code] for code in codes.tolist())
    return {line.removeprefix("# marker ") for line in text.splitlines() if len(line) == len("# marker 000")}


def test_loading_twice_gives_the_same_codes() -> None:
    first, second = corpus.load(), corpus.load()
    assert np.array_equal(first.train, second.train)
    assert np.array_equal(first.validation, second.validation)


def test_standard_library_fills_both_texts_with_codes_of_the_vocabulary() -> None:
    text = corpus.load()
    assert text.train.size > 500_000
    assert text.validation.size > 50_000
    for codes in (text.train, text.validation):
        assert codes.dtype == np.uint8
        assert codes.max() < corpus.VOCABULARY_SIZE


def test_no_file_is_in_both_texts_and_none_is_lost(tmp_path: Path) -> None:
    write_files(tmp_path, 64)
    text = corpus.load(tmp_path)
    train, validation = markers(text.train), markers(text.validation)
    assert not train & validation
    assert train | validation == {f"{index:03d}" for index in range(64)}


def test_other_files_in_the_folder_do_not_move_a_file_to_the_other_text(tmp_path: Path) -> None:
    few, many = tmp_path / "few", tmp_path / "many"
    few.mkdir()
    many.mkdir()
    write_files(few, 40)
    write_files(many, 64)
    assert markers(corpus.load(few).validation) <= markers(corpus.load(many).validation)


def test_texts_are_capped(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d", "e", "f", "g", "h", "i", "j"):
        (tmp_path / f"{name}.py").write_bytes(b"x" * 700_000)
    text = corpus.load(tmp_path)
    assert text.train.size == corpus.TRAIN_SIZE_MAX
    assert text.validation.size <= corpus.VALIDATION_SIZE_MAX


def test_folder_without_sources_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        corpus.load(tmp_path)


def test_bytes_outside_the_alphabet_become_other() -> None:
    assert corpus.encode(b"\n ~\t\xff").tolist() == [0, 1, 95, corpus.OTHER, corpus.OTHER]


@pytest.mark.parametrize(("codes", "bits"), [([3] * 8, 0.0), ([1, 2] * 4, 1.0), ([1, 2, 3, 4] * 2, 2.0)])
def test_unigram_entropy_of_known_texts(codes: list[int], bits: float) -> None:
    assert corpus.unigram_entropy_bits(np.array(codes, dtype=np.uint8)) == pytest.approx(bits)
