"""What peers make of a long line with a shallow queue: counted by the line, not timed. As root."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from pyccl.netlab import Counts, Lab, parse

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces and TUN devices need root")

MASTER_PORT = 48148
PEER = """
import sys
import numpy as np
import pyccl
with pyccl.connect(sys.argv[1], connections=8) as comm:
    while comm.group_world_size < 2:
        comm.update_topology()
    x = np.ones(int(sys.argv[2]) // 4, np.float32)
    for line in sys.stdin:
        for _ in range(int(line)):
            assert comm.all_reduce(x, op="avg", timeout=600).attempts == 1
        assert (x == 1).all()
        print("done", flush=True)
"""


@dataclass
class Peers:
    lab: Lab
    processes: list[subprocess.Popen[str]]

    def reduce(self, times: int) -> Counts:
        """So many all-reduces. What the lines had seen when the last one was done."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{times}\n")
            process.stdin.flush()
        for process in self.processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "done\n"
        return self.lab.counts()


@contextlib.contextmanager
def peers(toml: str, size_bytes: int) -> Iterator[Peers]:
    with contextlib.ExitStack() as pipes, Lab(parse(toml, "test")) as lab:

        def start(rank: int, *arguments: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-P", *arguments]
            process = lab.start(rank, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert process.stdin is not None
            assert process.stdout is not None
            pipes.enter_context(process.stdout)
            pipes.enter_context(process.stdin)
            return process

        address = f"{lab.addresses[0]}:{MASTER_PORT}"
        options = ["--listen", address, "--insecure", "--no-journal", "--peer-timeout", "60"]
        master = start(0, "-m", "pyccl.cli.master", *options)
        assert master.stdout is not None
        assert master.stdout.readline().startswith("listening")
        yield Peers(lab, [start(rank, "-c", PEER, address, str(size_bytes)) for rank in range(lab.world)])


def test_senders_keep_below_the_rate_of_their_line() -> None:
    """Eight connections, each seeking the line's rate for itself, have a quarter of what they send dropped."""
    toml = """
    [[host]]
    name = "peer"
    count = 2
    rate = "60mbit"
    queue = "20ms"
    [[router]]
    name = "internet"
    delay = "40ms"
    """
    with peers(toml, 8 << 20) as group:
        before = group.reduce(3)
        after = group.reduce(4)
    sent = sum(host.tx_packets for host in after.hosts) - sum(host.tx_packets for host in before.hosts)
    assert sent > 2 * 4 * (8 << 20) // 1500
    assert after.dropped - before.dropped < 0.04 * sent
