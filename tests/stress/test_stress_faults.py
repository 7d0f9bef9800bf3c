"""Which faults are drawn, how they end, and what they do to a connection. No run is started."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyccl.stress import disk, workload
from pyccl.stress.faults import (
    HEALTHY_LEFT,
    KINDS,
    STALLS_AT_ONCE,
    STALLS_IN_A_ROW,
    Drawer,
    FaultsError,
    Partition,
    Slow,
    choose,
)
from pyccl.stress.report import Memory, Record, longest_gap
from pyccl.stress.sockets import connections


class FakeLine:
    """Takes everything."""

    def block(self, other: FakeLine) -> None: ...
    def unblock(self, other: FakeLine) -> None: ...


class FakeLab:
    """Notes what is done to it; time passes when told."""

    peer_timeout_s, master_address = 5.0, "127.0.0.1:1"

    def __init__(self, *, master_well: bool = True) -> None:
        self.master_well = master_well
        self.done: list[tuple[str, Any]] = []
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        self.timers.append((delay_s, call))

    def line(self, peer: int) -> FakeLine:
        return FakeLine()

    def surplus(self) -> int:
        return 0

    def master_may_fail(self) -> bool:
        return self.master_well

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: self.done.append((name, arguments))


def drawn(seed: int, count: int) -> list[tuple[str, tuple[int, ...]]]:
    drawer = Drawer(choose((), links=True), random.Random(seed))
    faults = [drawer.draw(FakeLab(), range(5), 0) for _ in range(count)]
    return [(fault.name, tuple(fault.victims)) for fault in faults if fault is not None]


def test_the_seed_decides_kinds_and_victims_and_every_kind_comes() -> None:
    assert drawn(3, 200) == drawn(3, 200) != drawn(4, 200)
    assert {name for name, _ in drawn(3, 400)} == set(KINDS)


def test_the_master_has_one_fault_at_a_time() -> None:
    drawer = Drawer(choose((), links=True), random.Random(1))
    faults = [drawer.draw(FakeLab(master_well=False), range(8), 0) for _ in range(400)]
    assert all(fault is not None and not fault.needs_master for fault in faults)
    assert Drawer(choose(("kill-master",), links=True), random.Random(1)).draw(FakeLab(), range(8), 0) is not None


def test_a_fault_of_a_pair_leaves_as_many_members_untouched() -> None:
    drawer = Drawer(choose(("partition",), links=True), random.Random(1))
    assert drawer.draw(FakeLab(), range(HEALTHY_LEFT + 1), 0) is None
    fault = drawer.draw(FakeLab(), range(HEALTHY_LEFT + 2), 0)
    assert fault is not None and len(set(fault.victims)) == 2


def test_members_that_no_fault_touches_are_left() -> None:
    drawer = Drawer(choose((), links=False), random.Random(1))
    for _ in range(200):
        fault = drawer.draw(FakeLab(), range(HEALTHY_LEFT), 0)
        assert fault is not None and not fault.victims
    assert Drawer(choose(("kill",), links=False), random.Random(1)).draw(FakeLab(), range(HEALTHY_LEFT), 0) is None


def test_faults_under_which_the_group_stands_still_are_few_at_a_time() -> None:
    drawer = Drawer(choose((), links=False), random.Random(1))
    faults = [drawer.draw(FakeLab(), range(8), STALLS_AT_ONCE) for _ in range(200)]
    assert all(fault is not None and not fault.stalls for fault in faults)
    faults = [drawer.draw(FakeLab(), range(8), 0, STALLS_IN_A_ROW) for _ in range(200)]
    assert all(fault is not None and not fault.stalls for fault in faults)


@pytest.mark.parametrize("name", [kind.name for kind in KINDS.values() if kind.needs_links])
def test_a_fault_of_links_is_refused_on_loopback_with_the_reason(name: str) -> None:
    with pytest.raises(FaultsError, match="network namespaces"):
        choose(("kill", name), links=False)


def test_an_unknown_fault_is_refused_with_the_known_ones() -> None:
    with pytest.raises(FaultsError, match="known are kill"):
        choose(("earthquake",), links=False)


def test_a_slow_peer_runs_again_when_the_fault_is_healed_whatever_timer_comes_later() -> None:
    lab = FakeLab()
    fault = Slow(lab, random.Random(1), [7])
    assert fault.apply() > 0
    for _ in range(5):
        lab.timers.pop()[1]()
    fault.heal()
    assert lab.done[-1] == ("resume", (7,))
    done = len(lab.done)
    while lab.timers:
        lab.timers.pop()[1]()
    assert len(lab.done) == done


def test_a_connection_of_a_child_is_reset_at_both_ends() -> None:
    program = "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[1]))); print(s.recv(1))"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        command = [sys.executable, "-c", program, str(port)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
            ours, _ = server.accept()
            with ours, connections(child.pid) as found:
                (connection,) = found
                assert connection.remote == ("127.0.0.1", port)
                connection.reset()
                with pytest.raises(ConnectionResetError):
                    ours.recv(1)
            _, errors = child.communicate(timeout=60)
    assert child.returncode != 0
    assert "Error: [Errno" in errors.splitlines()[-1]


def partitioned(evictions: dict[int, int]) -> FakeLab:
    """After a partition of peers 1 and 2, in which each was evicted so often."""
    lab, told = FakeLab(), dict.fromkeys((1, 2), 5)
    lab.evictions = told.__getitem__
    fault = Partition(lab, random.Random(3), [1, 2])
    fault.apply()
    fault.heal()
    for peer, count in evictions.items():
        told[peer] += count
    while lab.timers:
        lab.timers.pop()[1]()
    return lab


def test_a_partition_blocks_and_frees_the_same_ways_and_may_cost_one_side() -> None:
    lab = partitioned({1: 1, 2: 0})
    calls = [name for name, _ in lab.done]
    assert "complain" not in calls
    for peer in (1, 2):
        assert ("excuse", (peer, "partition")) in lab.done
        assert ("excuse_ends", (peer, Partition.SETTLED_TIMEOUTS * lab.peer_timeout_s)) in lab.done


def test_a_partition_that_costs_both_sides_is_a_violation() -> None:
    (complaint,) = [arguments for name, arguments in partitioned({1: 1, 2: 1}).done if name == "complain"]
    assert complaint[0] == "partition" and "[1, 2]" in complaint[1]


def test_a_full_disk_refuses_every_write_until_it_is_emptied(tmp_path: Path) -> None:
    program = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
for line in sys.stdin:
    try:
        print(os.write(fd, b"0123456789"), flush=True)
    except OSError as error:
        print(error.strerror, flush=True)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "journal")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None and child.stdout is not None

        def write() -> str:
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write("\n")
            child.stdin.flush()
            return child.stdout.readline().strip()

        assert write() == "10"
        disk.fill(child.pid)
        assert [write(), write()] == ["File too large"] * 2
        disk.empty(child.pid)
        assert write() == "10"


def test_a_child_started_on_a_full_disk_can_write_once_it_is_emptied(tmp_path: Path) -> None:
    program = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
os.write(fd, b"0")
try:
    os.write(fd, b"1")
except OSError as error:
    print(error.strerror, flush=True)
input()
print(os.write(fd, b"2"))
"""
    command = [sys.executable, "-c", program, str(tmp_path / "journal")]
    with disk.full_for_children():
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdin is not None and child.stdout is not None
        assert child.stdout.readline() == "File too large\n"
        disk.empty(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "1\n"
    assert (tmp_path / "ours").write_text("we can write") == 12


@pytest.mark.parametrize("ends_early", [False, True])
def test_the_master_is_killed_while_its_disk_is_full_and_not_after(ends_early: bool) -> None:
    lab = FakeLab()
    fault = KINDS["disk-full-kill-master"](lab, random.Random(3), [])
    seconds = fault.apply()
    ((delay_s, kill),) = lab.timers
    assert 0 < delay_s < seconds
    if ends_early:  # the run was cut short
        fault.heal()
        kill()
    else:
        kill()
        fault.heal()
    killed = [] if ends_early else ["kill_master"]
    assert [name for name, _ in lab.done] == ["fill_journal", *killed, "empty_journal"]


# ---- workload and figures


def test_a_process_that_has_ended_has_no_memory() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        memory = Memory.of(child.pid)
        assert memory is not None and memory.rss_bytes > 0 and memory.descriptors > 0
        os.kill(child.pid, signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert Memory.of(child.pid) is None
    assert Memory.of(child.pid) is None


def test_order_of_submission_differs_between_members_but_not_within_a_tag() -> None:
    differing = 0
    for revision in range(40):
        ops = workload.plan(1, revision)
        orders = [workload.order(1, revision, number, ops) for number in range(4)]
        differing += any(order != orders[0] for order in orders)
        for order in orders:
            assert sorted(op.index for op in order) == [op.index for op in ops]
            for tag in {op.tag for op in ops}:
                indices = [op.index for op in order if op.tag == tag]
                assert indices == sorted(indices)
    assert differing > 20


def test_partners_name_each_other() -> None:
    members = [f"{number:032x}" for number in range(5)]
    paired = 0
    for revision in range(60):
        partners = {me: workload.partner(9, revision, members, me) for me in members}
        for me, partner in partners.items():
            if partner is not None:
                assert partner != me and partners[partner] == me
                paired += 1
    assert paired > 0


def test_a_state_depends_on_every_result_and_on_who_took_part() -> None:
    base = workload.Outcome(0, "aa", 3, ("p", "q"))
    digests = set()
    for outcomes in (
        [],
        [base],
        [workload.Outcome(0, "ab", 3, ("p", "q"))],
        [workload.Outcome(0, "aa", 4, ("p", "q"))],
        [workload.Outcome(0, "aa", 3, ("p", "r"))],
    ):
        state = workload.new_state()
        workload.advance(state, outcomes)
        digests.add(state.digest())
    assert len(digests) == 5


def test_a_fault_is_charged_with_the_longest_pause_that_overlaps_it() -> None:
    times = [0.0, 1.0, 2.0, 9.0, 10.0, 11.0]
    assert longest_gap(times, 3.0, 4.0) == 7.0
    assert longest_gap(times, 9.5, 10.5) == 1.0
    assert longest_gap([], 0.0, 1.0) == 0.0
    record = Record(0.0, ["kill", "leave"])
    record.fault("kill", 1, 3.0, 3.0)
    record.fault("leave", 2, 9.6, 9.6)
    record.round(9.0, 100, 2, 3)
    costs = {cost.kind: cost for cost in record.costs(times)}
    assert (costs["kill"].longest_stall_s, costs["leave"].longest_stall_s) == (7.0, 1.0)
    assert (costs["kill"].retries, costs["leave"].retries) == (0, 0)
    record.round(9.7, 100, 2, 3)
    assert {cost.kind: cost for cost in record.costs(times)}["leave"].retries == 2
