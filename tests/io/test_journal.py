"""The journal's file: whatever a crash or a disk does to it, a state that was durable comes back or an error does."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyccl._io import journal as journals
from pyccl._io.journal import Journal, JournalError
from pyccl._proto import limits
from pyccl._proto.epoch import NO_ID, Address, Member, make_epoch
from pyccl._proto.messages import KIND_FOUND, KIND_JOIN, KIND_LOSS, KIND_SETTLE, EpochCommit, OpVerdict, Verdict
from pyccl._proto.past import Adopted, Began, Committed, Dissolved, Fenced, Past, Record

RUN = b"R" * 16


def member(n: int) -> Member:
    return Member(bytes([n]) * 16, bytes([100 + n]) * 16, (Address("10.0.0.1", 5000 + n),))


def history() -> list[Record]:
    """A group is founded, grows, loses a member with verdicts, dissolves; others live on; the master starts again.
    It has taken over the run, and follows another master that has."""
    first = make_epoch(1, NO_ID, 1 << 32, (member(1),))
    second = make_epoch(2, first.id, 1 << 32, (member(1), member(2)))
    third = make_epoch(3, second.id, 2 << 32, (member(2),))
    other = make_epoch(1, NO_ID, 2 << 32, (member(3),))
    later = make_epoch(2, other.id, 4 << 32, (member(3),))
    verdicts = (OpVerdict(0, 7, 1, Verdict.COMMIT), OpVerdict(1, 0, 9, Verdict.FAIL))
    return [
        Adopted(RUN, 1 << 32 | 5),
        Committed(6, EpochCommit(other, KIND_FOUND, (), "", 1), recalled=True),
        Committed(0, EpochCommit(first, KIND_FOUND, (), "", 1), recalled=True),
        Committed(0, EpochCommit(second, KIND_JOIN, (), "", 2)),
        Began(2 << 32 | 77),
        Committed(5, EpochCommit(other, KIND_FOUND, (), "", 3)),
        Committed(
            0,
            EpochCommit(third, KIND_LOSS, verdicts, "detail ä", 2),
            (Fenced(member(1).peer, member(1).incarnation, "silent"),),
        ),
        Dissolved(0, (Fenced(member(2).peer, member(2).incarnation, "left"),)),
        Began(4 << 32 | 78, follows=True),
        Committed(5, EpochCommit(later, KIND_SETTLE, (), "", 1)),
    ]


def states() -> list[Past]:
    """Before the first record, and after each."""
    past = Past(RUN, 1 << 32)
    out = [past.copy()]
    for record in history():
        past.apply(record)
        out.append(past.copy())
    return out


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "master.journal"


def begun(path: Path) -> Journal:
    journal = Journal.open(path)
    assert journal.past is None
    journal.begin(Past(RUN, 1 << 32))
    return journal


def written(path: Path) -> bytes:
    """A journal with all of the history."""
    journal = begun(path)
    for record in history():
        journal.append([record])
    journal.close()
    return path.read_bytes()


@contextlib.contextmanager
def opened(path: Path, data: bytes) -> Iterator[Journal]:
    path.write_bytes(data)
    journal = Journal.open(path)
    try:
        yield journal
    finally:
        journal.close()


def test_what_was_appended_is_there_when_it_is_opened_again(path: Path) -> None:
    data = written(path)
    with opened(path, data) as journal:
        assert journal.past == states()[-1]
        assert journal.past.groups[0].commit is None and journal.past.groups[0].number == 3
        assert journal.past.recalled == {0, 6}
        assert list(journal.past.gone.values()) == ["silent", "left"]
    assert path.stat().st_mode & 0o777 == 0o600  # incarnations are capabilities


def test_several_records_in_one_append_are_the_same_journal(path: Path) -> None:
    data = written(path)
    path.unlink()
    journal = begun(path)
    journal.append(history())
    journal.close()
    assert path.read_bytes() == data


def test_every_truncation_is_an_old_state_and_what_is_appended_then_is_kept(path: Path) -> None:
    data, known = written(path), states()
    whole = len(data) - sum(len(frame) for frame in frames(data))
    found = []
    for size in range(whole, len(data) + 1):
        with opened(path, data[:size]) as journal:
            assert journal.past in known, size
            found.append(known.index(journal.past))
            journal.append([Began(9 << 32)])
            after = journal.past
        journal = Journal.open(path)
        assert journal.past == after
        journal.close()
    assert found == sorted(found) and set(found) == set(range(len(known)))


def frames(data: bytes) -> list[bytes]:
    """The records behind the first."""
    at, out = len(journals._HEADER), []
    while at < len(data):
        length, _ = journals._HEAD.unpack_from(data, at)
        end = at + journals._HEAD.size + length + journals._DIGEST_BYTES + len(journals._END)
        out.append(data[at:end])
        at = end
    return out[1:]


def test_a_file_cut_inside_its_first_record_is_refused(path: Path) -> None:
    """It is never written in part: the name is given when it is whole."""
    data = written(path)
    whole = len(data) - sum(len(frame) for frame in frames(data))
    for size in range(1, whole):
        path.write_bytes(data[:size])
        with pytest.raises(JournalError):
            Journal.open(path)


def test_every_single_bit_that_flips_is_found(path: Path) -> None:
    data = written(path)
    assert journals._parse(data, path)[0] == states()[-1]
    for at in range(len(data)):
        for bit in range(8):
            broken = bytearray(data)
            broken[at] ^= 1 << bit
            with pytest.raises(JournalError):
                journals._parse(bytes(broken), path)


@pytest.mark.parametrize("lost", ["first", "last"])
def test_a_tail_with_a_sector_that_was_never_written_is_cut_off(path: Path, lost: str) -> None:
    """After a power cut a file may have its new size and not its new bytes."""
    data = written(path)
    epoch = make_epoch(9, NO_ID, 1, tuple(member(n) for n in range(1, 80)))
    journal = Journal.open(path)
    journal.append([Committed(7, EpochCommit(epoch, KIND_LOSS))])
    journal.close()
    longer = bytearray(path.read_bytes())
    assert len(longer) > len(data) + 3 * 512
    first = (len(data) // 512 + 1) * 512
    at = first if lost == "first" else len(longer) // 512 * 512
    longer[at : at + 512] = bytes(len(longer[at : at + 512]))
    with opened(path, bytes(longer)) as journal:
        assert journal.past == states()[-1]
    assert path.read_bytes() == data


def test_a_record_that_is_missing_twice_there_or_elsewhere_is_found(path: Path) -> None:
    data = written(path)
    parts = frames(data)
    front = data[: len(data) - sum(map(len, parts))]
    for wrong in (parts[1:], parts[:2] + parts[1:], [parts[1], parts[0], *parts[2:]]):
        path.write_bytes(front + b"".join(wrong))
        with pytest.raises(JournalError, match="damaged"):
            Journal.open(path)


def test_a_newer_format_and_another_file_are_refused_with_the_reason(path: Path) -> None:
    data = written(path)
    path.write_bytes(data.replace(b"journal 3\n", b"journal 4\n"))
    with pytest.raises(JournalError, match="format 4 of another pyccl, this one reads 3"):
        Journal.open(path)
    path.write_bytes(b"#!/bin/sh\n")
    with pytest.raises(JournalError, match="not a journal"):
        Journal.open(path)


def test_a_damaged_one_can_be_forgotten_for_a_new_run(path: Path) -> None:
    data = written(path)
    path.write_bytes(data[:40] + b"x" + data[41:])
    with pytest.raises(JournalError, match="--new-run"):
        Journal.open(path)
    journal = Journal.open(path, forget=True)
    assert journal.past is None
    journal.begin(Past(b"N" * 16, 1))
    journal.close()
    with opened(path, path.read_bytes()) as journal:
        assert journal.past == Past(b"N" * 16, 1)


def test_the_file_stays_small_and_is_locked_under_its_name_all_the_time(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journals, "_GROWN_BYTES", 4096)
    journal = begun(path)
    largest, inodes = 0, set()
    for n in range(1, 400):
        journal.append([Began(n << 32)])
        largest = max(largest, path.stat().st_size)
        inodes.add(path.stat().st_ino)
        with pytest.raises(JournalError, match="another master uses it"):
            Journal.open(path)
    assert largest <= 4096 and len(inodes) > 1
    journal.close()
    with opened(path, path.read_bytes()) as journal:
        assert journal.past == Past(RUN, 399 << 32)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_what_others_put_into_its_directory_is_neither_written_nor_in_the_way(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.parent.mkdir()
    victim, guess = path.parent / "victim", "0" * 16
    victim.write_text("precious")
    path.with_name(f"{path.name}.new").symlink_to(victim)
    begun(path).close()
    path.unlink()
    path.with_name(f"{path.name}.{guess}.new").symlink_to(victim)
    journal = Journal.open(path)
    path.with_name(f"{path.name}.{guess}.new").symlink_to(victim)
    monkeypatch.setattr(journals.secrets, "token_hex", lambda size: guess[: 2 * size])
    with pytest.raises(FileExistsError):  # also if they had guessed
        journal.begin(Past(RUN, 1 << 32))
    assert victim.read_text() == "precious"
    monkeypatch.undo()
    journal.begin(Past(RUN, 1 << 32))
    journal.close()


def test_what_a_crash_left_of_a_new_file_is_removed_and_nothing_else(path: Path) -> None:
    begun(path).close()
    others = [path.with_name(name) for name in ("master.journal.new", "master.journal.copy.new", "other")]
    left = path.with_name(f"{path.name}.{'a1' * 8}.new")
    for file in (*others, left):
        file.touch()
    Journal.open(path).close()
    assert sorted(path.parent.iterdir()) == sorted([path, *others])


def test_a_lock_ends_with_its_process(path: Path) -> None:
    program = f"""
import pathlib, sys
from pyccl._io.journal import Journal
journal = Journal.open(pathlib.Path({str(path)!r}))
print("locked", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-P", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(JournalError, match="another master"):
            Journal.open(path)
        process.kill()
        process.wait()
    Journal.open(path).close()


def test_what_is_remembered_of_the_evicted_is_bounded(path: Path) -> None:
    journal = begun(path)
    for n in range(limits.GONE_MAX // 64 + 2):
        fenced = tuple(Fenced(n.to_bytes(16, "big"), i.to_bytes(16, "big"), "x" * 200) for i in range(64))
        journal.append([Dissolved(0, fenced)])
    journal.close()
    with opened(path, path.read_bytes()) as journal:
        assert journal.past is not None and len(journal.past.gone) == limits.GONE_MAX
    assert path.stat().st_size < 4 << 20


# ---- a write fails


@contextlib.contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """write() beyond it is short, then EFBIG: a disk that is full at that byte."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_an_error_at_every_byte_and_the_same_records_go_through_later(path: Path) -> None:
    data = written(path)
    record = history()[1]
    journal = Journal.open(path)
    journal.append([record])
    journal.close()
    needed = path.stat().st_size - len(data)
    for room in range(needed):
        with opened(path, data) as journal:
            before = journal.past
            for limit in (
                len(data) + room,
                64,
            ):  # in doubt after the first: a whole new file, which does not fit either
                with file_size_limit(limit), pytest.raises(OSError, match="too large"):
                    journal.append([record])
                assert journal.past == before
                past, _, _ = journals._parse(path.read_bytes(), path)  # what would be read after a crash now
                assert past == before
            journal.append([record])
            assert journal.past == applied(before, record)
        with opened(path, path.read_bytes()) as journal:
            assert journal.past == applied(before, record)


def applied(past: Past | None, record: Record) -> Past:
    assert past is not None
    after = past.copy()
    after.apply(record)
    return after


def test_after_a_failed_fsync_nothing_is_taken_for_durable_until_a_whole_file_is(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel forgets which pages it could not write: a second fsync of the same file proves nothing."""
    journal = begun(path)
    inode = path.stat().st_ino

    def broken(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output"):
                journal.append([Began(2 << 32)])
            assert journal.past == Past(RUN, 1 << 32)
    journal.append([Began(2 << 32)])
    assert path.stat().st_ino != inode
    with pytest.raises(BlockingIOError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    journal.close()
    with opened(path, path.read_bytes()) as journal:
        assert journal.past == Past(RUN, 2 << 32)


def test_records_are_synced_before_append_returns_and_names_before_begin_does(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    journal = begun(path)
    assert len(synced) == 2 and synced[0].startswith(f"{path}.") and synced[1] == str(path.parent)
    synced.clear()
    journal.append(history())
    assert synced == [str(path)]
    journal.close()


def test_another_process_reads_what_is_durable_while_the_master_writes(path: Path) -> None:
    journal = begun(path)
    assert journals.read_past(path) == states()[0]
    for record, state in zip(history(), states()[1:], strict=True):
        journal.append([record])
        assert journals.read_past(path) == state
        with path.open("ab") as half_written:
            half_written.write(b"\x40\x00")
        assert journals.read_past(path) == state
        os.truncate(path, path.stat().st_size - 2)
    journal.close()
