"""pyccl-master with invites, as processes: the operator's commands, members, restarts, what others can see."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from at_once import both
from masters import started_master

import pyccl

MASTER = [sys.executable, "-P", "-m", "pyccl.cli.master"]
EXIT_ARGUMENTS, EXIT_UNREACHABLE = 2, 3

pytestmark = pytest.mark.usefixtures("home")


class Master:
    """A secure one on loopback, and its operator."""

    def __init__(self, journal: Path | None, listen: str = "127.0.0.1:0") -> None:
        kept = ["--no-journal"] if journal is None else ["--journal", str(journal)]
        command = [*MASTER, "--secure", "--listen", listen, *kept]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("listening on "), self.process.stderr and self.process.stderr.read()
        self.address = line.removeprefix("listening on ").strip()

    def operate(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [*MASTER, words[0], "--master", self.address, *words[1:]]
        return subprocess.run(command, check=False, capture_output=True, text=True)

    def invite(self, *options: str) -> tuple[str, str]:
        """The invite and its id."""
        done = self.operate("invite", *options)
        assert done.returncode == 0, done.stderr
        found = re.fullmatch(r"invite ([0-9a-f]{16})\n", done.stderr)
        assert found is not None
        return done.stdout.strip(), found[1]

    def end(self) -> str:
        """Its log."""
        self.process.kill()
        log = self.process.communicate()[1]
        assert "Traceback" not in log, log
        return log


@pytest.fixture
def master(home: Path) -> Iterator[Master]:
    started = Master(home / "journal")
    try:
        yield started
    finally:
        started.end()


def joined(address: str, *members: pyccl.Communicator) -> pyccl.Communicator:
    """One more, let in by these at a safe point."""
    comm = pyccl.Communicator(address)
    if not members:
        comm.connect()
        return comm
    joining = threading.Thread(target=comm.connect)
    joining.start()
    while not members[0]._pending_known:
        assert joining.is_alive()
        time.sleep(0.01)
    both(*(member.update_topology for member in members))
    joining.join()
    return comm


def test_members_with_an_invite_reduce_and_go_on_with_a_new_master(home: Path) -> None:
    first = Master(home / "journal")
    invite, _ = first.invite("--uses", "1", "--label", "ann")
    a = joined(invite)
    b = joined(invite, a)  # the same identity: one use
    x, y = np.arange(5, dtype=np.float32), np.ones(5, np.float32)
    both(lambda: a.all_reduce(x), lambda: b.all_reduce(y))
    assert x.tolist() == y.tolist() == [1, 2, 3, 4, 5]
    log = first.end()
    second = Master(home / "journal", first.address)
    try:
        both(a.update_topology, b.update_topology)
        assert a.world_size == 2 and a.epoch == b.epoch
        told = second.operate("peers").stdout
        for comm in (a, b):
            line = rf"^peer {comm.peer_id}  identity [0-9a-f]{{16}}  group 0  127\.0\.0\.1  invite \S+ ann$"
            assert re.search(line, told, re.MULTILINE)
        a.close()
        b.close()
    finally:
        log += second.end()
    assert invite.rpartition("/")[2][-30:] not in log


def test_without_a_journal_the_next_master_of_the_same_identity_takes_the_run_over(home: Path) -> None:
    first = Master(None)
    invite, _ = first.invite()
    a = joined(invite)
    b = joined(invite, a)
    first.end()
    second = Master(None, first.address)
    try:
        both(a.update_topology, b.update_topology)
        assert a.world_size == 2 and a.epoch == b.epoch
        c = joined(invite, a, b)
        assert c.world_size == 3
        for comm in (a, b, c):
            comm.close()
    finally:
        log = second.end()
    assert "run_adopted" in log and "epoch_adopted" in log


def test_uses_and_what_was_taken_back_outlive_the_master(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Master(home / "journal")
    once, _ = first.invite("--uses", "1")
    revoked, revoked_id = first.invite()
    open_to_all, _ = first.invite()
    assert first.operate("revoke", revoked_id).returncode == 0
    monkeypatch.setenv("PYCCL_IDENTITY", str(home / "ann.pem"))
    joined(once).close()
    monkeypatch.setenv("PYCCL_IDENTITY", str(home / "bob.pem"))
    bob = joined(open_to_all)
    monkeypatch.setenv("PYCCL_IDENTITY", str(home / "ours.pem"))
    assert first.operate("kick", bob.peer_id[:8]).stdout == f"kicked {bob.peer_id}\n"
    first.end()
    bob.close()
    second = Master(home / "journal", first.address)
    try:
        for who, invite, reason in (
            ("carol", once, "used up: 1 of 1"),
            ("carol", revoked, "revoked"),
            ("bob", open_to_all, "kicked"),
        ):
            monkeypatch.setenv("PYCCL_IDENTITY", str(home / f"{who}.pem"))
            with pytest.raises(pyccl.RejectedError, match=reason):
                pyccl.connect(invite)
        monkeypatch.setenv("PYCCL_IDENTITY", str(home / "carol.pem"))
        joined(open_to_all).close()
    finally:
        second.end()


def test_a_kicked_member_learns_it(master: Master) -> None:
    comm = joined(master.invite()[0])
    assert master.operate("kick", comm.peer_id).returncode == 0
    error: pyccl.EvictedError | None = None
    while error is None:
        try:
            comm.update_topology()
        except pyccl.EvictedError as e:
            error = e
    assert "kicked" in str(error)


def test_a_plain_peer_is_told_to_bring_an_invite(master: Master) -> None:
    with pytest.raises(pyccl.RejectedError, match="come with an invite"):
        pyccl.connect(master.address)


def test_an_invite_opens_no_plain_master(master: Master, monkeypatch: pytest.MonkeyPatch) -> None:
    with started_master("--insecure") as plain:
        invite = master.invite()[0].replace(master.address, plain)
        with pytest.raises(pyccl.RejectedError, match="not encrypted"):
            pyccl.connect(invite)
        monkeypatch.setenv("PYCCL_INVITE", invite)
        command = [sys.executable, "-P", "-m", "pyccl.cli.main", "status"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == EXIT_UNREACHABLE and "not encrypted" in done.stderr
        with pyccl.connect(plain) as comm:  # who knows that it is plain comes in
            assert comm.world_size == 1


class Warned(logging.Handler):
    """Set when a line with this text is logged."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text, self.event = text, threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if self._text in record.getMessage():
            self.event.set()


def test_a_member_does_not_follow_a_master_that_came_back_plain(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyccl.communicator.REACH_TIMEOUT_S", 0.1)
    first = Master(home / "journal")
    comm = joined(first.invite()[0])
    warned = Warned("that master is not encrypted")
    logging.getLogger("pyccl").addHandler(warned)
    try:
        first.end()
        with started_master("--insecure", "--no-journal", listen=first.address) as plain:
            assert warned.event.wait(60)
            with pytest.raises(pyccl.MasterUnavailableError, match=r"away for 0\.1 s: that master is not encrypted"):
                comm.update_topology()
            command = [sys.executable, "-P", "-m", "pyccl.cli.main", "status", plain]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            assert done.returncode == 0 and "no peer has joined yet" in done.stdout
    finally:
        logging.getLogger("pyccl").removeHandler(warned)
        comm.close()


def test_status_takes_the_invite_of_the_environment_and_no_stranger(master: Master) -> None:
    command = [sys.executable, "-P", "-m", "pyccl.cli.main", "status"]
    environment = os.environ | {"PYCCL_INVITE": master.invite()[0]}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "no peer has joined yet" in done.stdout
    done = subprocess.run([*command, master.address], check=False, capture_output=True, text=True)
    assert done.returncode == EXIT_UNREACHABLE and "come with an invite" in done.stderr


def test_an_invite_on_the_command_line_of_pyccl_peer_does_not_stay_there(master: Master, tmp_path: Path) -> None:
    invite = master.invite()[0]
    command = [sys.executable, "-P", "-m", "pyccl.cli.peer", invite, "--dir", str(tmp_path / "states")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as peer:
        try:
            assert peer.stdout is not None
            lines = iter(peer.stdout.readline, "")
            assert any(line.startswith("observing run ") for line in lines)
            words = Path(f"/proc/{peer.pid}/cmdline").read_bytes().split(b"\0")
            assert b"--dir" in words and not any(b"pyccl://" in word for word in words)
            assert "observer" in master.operate("peers").stdout
        finally:
            peer.kill()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("invite", "--expires", "7"), "no time such as 7d"),
        (("invite", "--expires", "367d"), "at most 366d"),
        (("invite", "--label", "x" * 33), "more than 32 characters"),
        (("revoke", "12"), "16 digits"),
        (("kick", "12"), "begins with 12"),
    ],
)
def test_wrong_words_are_refused(master: Master, words: tuple[str, ...], said: str) -> None:
    done = master.operate(*words)
    assert done.returncode == EXIT_ARGUMENTS and said in done.stderr


def test_an_identity_that_others_can_read_stops_master_and_peer(home: Path, master: Master) -> None:
    invite = master.invite()[0]
    (home / "ours.pem").chmod(0o644)
    command = [*MASTER, "--secure", "--listen", "127.0.0.1:0", "--no-journal"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == EXIT_ARGUMENTS and "mode 0644" in done.stderr
    with pytest.raises(pyccl.UsageError, match="mode 0644"):
        pyccl.Communicator(invite)


def test_off_loopback_a_master_is_secure_unless_told_otherwise(home: Path) -> None:
    for options, secure in (((), True), (("--insecure",), False)):
        command = [*MASTER, "--listen", "0.0.0.0:0", *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
            assert started.stdout is not None and started.stderr is not None
            port = int(started.stdout.readline().rpartition(":")[2])
            peers = [*MASTER, "peers", "--master", f"127.0.0.1:{port}"]
            done = subprocess.run(peers, check=False, capture_output=True, text=True)
            started.kill()
            log = started.stderr.read()
        assert (done.returncode == 0) == secure, done.stderr
        assert ("insecure listen=0.0.0.0:0: anybody" in log) == (not secure)
        assert secure or "not encrypted" in done.stderr
    done = subprocess.run([*MASTER, "--secure", "--insecure"], check=False, capture_output=True, text=True)
    assert done.returncode == EXIT_ARGUMENTS
