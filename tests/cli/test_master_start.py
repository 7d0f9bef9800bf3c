"""How pyccl-master starts: first its address, then the journal, and on a full disk it waits."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyccl._io.journal import Journal, read_past
from pyccl._proto.past import Past, start_of
from pyccl.stress import disk

EXIT_ADDRESS, EXIT_JOURNAL = 3, 4


def command(journal: Path, listen: str) -> list[str]:
    return [sys.executable, "-P", "-m", "pyccl.cli.master", "--listen", listen, "--journal", str(journal)]


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A journal that holds a run, started once."""
    path = tmp_path / "master.journal"
    journal = Journal.open(path)
    journal.begin(Past(b"R" * 16, 1 << 32))
    journal.close()
    return path


@contextmanager
def started_on_a_full_disk(journal: Path) -> Iterator[subprocess.Popen[str]]:
    """When it has said that it waits."""
    with disk.full_for_children():
        master = subprocess.Popen(
            command(journal, "127.0.0.1:0"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    with master:
        try:
            assert master.stderr is not None
            line = next(line for line in master.stderr if "ERROR" in line)
            assert f"journal_failed path={journal} cause=" in line and "File too large next=try_again" in line
            yield master
        finally:
            master.kill()


def test_a_journal_with_a_run_on_a_full_disk_is_tried_again_until_there_is_room(begun: Path) -> None:
    before = begun.read_bytes()
    with started_on_a_full_disk(begun) as master:
        assert start_of(read_past(begun).term) == 1 and begun.read_bytes() == before
        disk.empty(master.pid)
        assert master.stdout is not None and master.stdout.readline().startswith("listening on ")
        past = read_past(begun)  # before anybody hears of this start it is durable
        assert (past.run, start_of(past.term)) == (b"R" * 16, 2)


def test_a_master_that_waits_for_room_ends_with_a_signal(begun: Path) -> None:
    with started_on_a_full_disk(begun) as master:
        master.send_signal(signal.SIGTERM)
        assert master.wait() == 0
    assert start_of(read_past(begun).term) == 1


def test_a_new_run_on_a_full_disk_is_an_error(tmp_path: Path) -> None:
    journal = tmp_path / "new.journal"
    with disk.full_for_children():
        master = subprocess.Popen(command(journal, "127.0.0.1:0"), stderr=subprocess.PIPE, text=True)
    _, told = master.communicate()
    assert master.returncode == EXIT_JOURNAL
    assert f"--journal {journal}: File too large" in told


def test_no_journal_is_made_where_the_address_is_taken(tmp_path: Path, begun: Path) -> None:
    before = begun.read_bytes()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        for journal in (tmp_path / "state" / "new.journal", begun):
            done = subprocess.run(command(journal, listen), check=False, capture_output=True, text=True)
            assert done.returncode == EXIT_ADDRESS
            assert "the address is in use" in done.stderr
    assert not (tmp_path / "state").exists()
    assert begun.read_bytes() == before
