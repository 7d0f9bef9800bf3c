"""Child processes end with their owner, whatever ends the owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from pyccl.processes.children import Children, Exited, Interrupted, Line

# Prints its pid, then sleeps for longer than any test waits.
SLEEPER = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(600)"
OWNER = """
import sys
from pyccl.processes.children import Children
with Children() as children:
    children.start("sleeper", "pyccl.processes.leash", ["sleeper"], {"PYTHONPATH": sys.argv[1]})
    print(children.next_event(30.0).text, flush=True)
    children.next_event(600.0)
"""
WAIT_S = 30.0


@pytest.fixture
def sleeper(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which a module ``sleeper`` can be run."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "sleeper.py").write_text(SLEEPER, encoding="utf-8")
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def becomes_true(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def first_line(children: Children) -> str:
    event = children.next_event(WAIT_S)
    assert isinstance(event, Line)
    return event.text


def test_running_child_is_ended_and_reaped_when_the_owner_leaves(sleeper: dict[str, str]) -> None:
    with Children() as children:
        children.start("sleeper", "sleeper", [], sleeper)
        pid = int(first_line(children))
        assert is_running(pid)
    assert not is_running(pid)
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def test_exception_in_the_owner_ends_the_child_too(sleeper: dict[str, str]) -> None:
    pids = []

    def owner() -> None:
        with Children() as children:
            children.start("sleeper", "sleeper", [], sleeper)
            pids.append(int(first_line(children)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        owner()
    assert not is_running(pids[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_comes_out_of_next_event_and_handlers_are_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Children() as children:
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted) as caught:
            children.next_event(WAIT_S)
    assert caught.value.signal_number == number
    assert signal.getsignal(number) is before


def test_killed_child_is_reported_with_its_signal_after_its_lines(sleeper: dict[str, str]) -> None:
    with Children() as children:
        children.start("sleeper", "sleeper", [], sleeper)
        first_line(children)
        children.kill("sleeper")
        assert children.next_event(WAIT_S) == Exited("sleeper", -signal.SIGKILL)


def test_traceback_of_a_failing_child_is_kept() -> None:
    with Children() as children:
        children.start("broken", "pyccl.demo.no_such_module", [])
        event = children.next_event(WAIT_S)
        assert isinstance(event, Exited)
        assert event.returncode == 1
        assert "no_such_module" in children.stderr_tail("broken")[-1]


def test_telling_a_child_that_is_gone_is_not_an_error(sleeper: dict[str, str]) -> None:
    with Children() as children:
        children.start("sleeper", "sleeper", [], sleeper)
        first_line(children)
        children.kill("sleeper")
        children.next_event(WAIT_S)
        children.tell("sleeper", "go")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_leashed_child_ends_when_a_signal_ends_its_owner(sleeper: dict[str, str], number: signal.Signals) -> None:
    command = [sys.executable, "-P", "-c", OWNER, sleeper["PYTHONPATH"]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert is_running(pid)
        owner.send_signal(number)
        owner.wait(WAIT_S)
    assert becomes_true(lambda: not is_running(pid))
