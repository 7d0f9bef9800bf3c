"""Who comes and goes leaves nothing behind: descriptors, threads and memory of the members, the master and its own."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

from cluster import DEADLINE_S, Cluster, Peer, Process

ROUNDS: Final = 500 if os.environ.get("PYCCL_TEST_LONG") == "1" else 60
WARM_UP: Final = 10
GROWTH_BYTES_MAX: Final = 4 << 20  # of 500 rounds: a leak of one connection's buffers would be far above


def test_joins_and_leaves_leave_nothing_behind(cluster: Cluster) -> None:
    rest = cluster.members(2)
    (comer,) = cluster.spawn(1)
    everybody: list[Process] = [cluster.master, *rest, comer]
    for _ in range(WARM_UP):
        _come_and_go(cluster, rest, comer)
    held = [_files(process) for process in everybody]
    tasks = [_tasks(process) for process in everybody]
    before = [_resident_bytes(process) for process in everybody]
    for _ in range(ROUNDS):
        _come_and_go(cluster, rest, comer)
    for process, files, threads, resident in zip(everybody, held, tasks, before, strict=True):
        _until_no_more(process, files, threads)
        assert _resident_bytes(process) - resident < GROWTH_BYTES_MAX, process.name


def test_who_comes_back_with_the_same_communicator_keeps_nothing_of_its_former_lives(cluster: Cluster) -> None:
    rest = cluster.members(1)
    (comer,) = cluster.spawn(1)
    cluster.make([comer])
    for _ in range(5):
        cluster.admit(rest, [comer])
        cluster.reduce([*rest, comer])
        comer.ask("close")
    assert comer.ask("sessions") == 1  # the last one knows why it ended


def _come_and_go(cluster: Cluster, rest: list[Peer], comer: Peer) -> None:
    cluster.make([comer])
    cluster.admit(rest, [comer])
    cluster.reduce([*rest, comer])
    comer.ask("close")
    assert cluster.reduce(rest)["world_size"] == len(rest)


def _until_no_more(process: Process, files: list[str], tasks: int) -> None:
    """As many as there were; the ends of connections go when their readers notice."""
    until = time.monotonic() + DEADLINE_S
    while len(_files(process)) > len(files) or _tasks(process) > tasks:
        now = f"{_files(process)}, {_tasks(process)} tasks"
        assert time.monotonic() < until, f"{process.name} has {now}; it had {files}, {tasks} tasks"
        time.sleep(0.05)


def _files(process: Process) -> list[str]:
    """Kinds of what it has open."""
    kinds = []
    for fd in Path(f"/proc/{process.pid}/fd").iterdir():
        try:
            kinds.append(os.readlink(fd).split(":")[0])
        except FileNotFoundError:
            continue
    return sorted(kinds)


def _tasks(process: Process) -> int:
    return len(os.listdir(f"/proc/{process.pid}/task"))


def _resident_bytes(process: Process) -> int:
    pages = int(Path(f"/proc/{process.pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
