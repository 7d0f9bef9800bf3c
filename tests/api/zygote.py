"""Processes for the tests, forked from one that has imported everything: a third of a second saved for each.

    pytest --(argv; stdin, stdout, stderr)--> zygote --fork--> agent or master
           <--(pid, pidfd), later (pid, status)--

The zygote has one thread and nothing of pyccl in use, so a fork of it is as good as a new interpreter. It reaps its
children and tells; signals go through the pidfd, so never to a process that took over a number. Whoever loses its
parent dies: the zygote with pytest, the children with the zygote.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Final

DEADLINE_S: Final = 60.0
AGENT: Final = Path(__file__).resolve().with_name("agent.py")
_MESSAGE_BYTES_MAX: Final = 1 << 16
_PR_SET_PDEATHSIG: Final = 1
# One BLAS thread in each: the processes share the cores already.
_ENV: Final = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


# ---- in the zygote


def serve(fd: int) -> list[str]:
    """Fork on request. Returns in the children only, with the arguments that were asked for."""
    die_with_parent()
    with socket.socket(fileno=fd) as control:
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write)
        while True:
            ready, _, _ = select.select([control, wake_read], [], [])
            if wake_read in ready:
                os.read(wake_read, 4096)
                _reap(control)
            if control in ready:
                arguments = _fork(control, (wake_read, wake_write))
                if arguments is not None:
                    return arguments


def _reap(control: socket.socket) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            _tell(control, pid=ended[0], code=os.waitstatus_to_exitcode(ended[1]))


def _tell(control: socket.socket, fds: tuple[int, ...] = (), **message: Any) -> None:
    socket.send_fds(control, [json.dumps(message).encode()], fds)


def _fork(control: socket.socket, ours: tuple[int, ...]) -> list[str] | None:
    data, fds, _, _ = socket.recv_fds(control, _MESSAGE_BYTES_MAX, 3)
    if not data:
        os._exit(0)  # pytest has ended
    pid = os.fork()
    if pid:
        pidfd = os.pidfd_open(pid)
        for fd in fds:
            os.close(fd)
        _tell(control, (pidfd,), pid=pid)
        os.close(pidfd)
        return None
    die_with_parent()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()  # Ctrl-C in a terminal is for pytest, which ends us
    for standard, fd in enumerate(fds):
        os.dup2(fd, standard)
        os.close(fd)
    for fd in ours:
        os.close(fd)
    arguments: list[str] = json.loads(data)
    return arguments


# ---- in pytest


class Child:
    """A process that the zygote forked."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid, self._pidfd = pid, pidfd
        self.code: int | None = None
        self._ended = threading.Event()

    def ended(self, code: int) -> None:
        self.code = code
        self._ended.set()

    def send(self, number: int) -> None:
        """ProcessLookupError: it has ended."""
        signal.pidfd_send_signal(self._pidfd, number)

    def wait(self, timeout: float = DEADLINE_S) -> int:
        assert self._ended.wait(timeout), f"process {self.pid} did not end within {timeout:g} s"
        assert self.code is not None
        return self.code

    def close(self) -> None:
        os.close(self._pidfd)


class Zygote:
    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(AGENT), "--zygote", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                env={**os.environ, **_ENV},
                start_new_session=True,
            )
        self._control = ours
        self._children: dict[int, Child] = {}
        self._born: list[Child] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def fork(self, arguments: list[str], stdin: int, stdout: int, stderr: int) -> Child:
        """Start a child; one request at a time."""
        socket.send_fds(self._control, [json.dumps(arguments).encode()], [stdin, stdout, stderr])
        with self._changed:
            assert self._changed.wait_for(lambda: self._born, DEADLINE_S), "the zygote does not answer"
            return self._born.pop()

    def _read(self) -> None:
        while True:
            data, ancillary, _, _ = self._control.recvmsg(_MESSAGE_BYTES_MAX, socket.CMSG_SPACE(4))
            if not data:
                return
            message = json.loads(data)
            with self._changed:
                if "code" in message:
                    self._children.pop(message["pid"]).ended(message["code"])
                else:
                    (pidfd,) = array.array("i", ancillary[0][2])
                    child = self._children[message["pid"]] = Child(message["pid"], pidfd)
                    self._born.append(child)
                self._changed.notify_all()

    def close(self) -> None:
        self._control.shutdown(socket.SHUT_RDWR)
        self._process.wait(DEADLINE_S)
        self._reader.join()
        self._control.close()
