"""Peers on the hosts of a lab that reduce when they are told to."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from pyccl.netlab import Lab, parse

MASTER_PORT = 48148
PEER = """
import sys
import numpy as np
import pyccl
with pyccl.connect(sys.argv[1], connections=8) as comm:
    while comm.group_world_size < int(sys.argv[3]):
        comm.update_topology()
    x = np.ones(int(sys.argv[2]) // 4, np.float32)
    for line in sys.stdin:
        infos = [comm.all_reduce(x, op="avg", timeout=600) for _ in range(int(line))]
        assert (x == 1).all() and {info.attempts for info in infos} == {1}
        print(*(info.seconds for info in infos), flush=True)
"""


@dataclass
class Peers:
    lab: Lab
    processes: list[subprocess.Popen[str]]

    def reduce(self, times: int) -> list[list[float]]:
        """So many all-reduces, one after the other. Seconds from call to end, by peer and call."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{times}\n")
            process.stdin.flush()
        seconds = []
        for process in self.processes:
            assert process.stdout is not None
            seconds.append([float(word) for word in process.stdout.readline().split()])
            assert len(seconds[-1]) == times
        return seconds


@contextlib.contextmanager
def peers(toml: str, size_bytes: int) -> Iterator[Peers]:
    """A peer on each host, and the master beside the first."""
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
        arguments = (PEER, address, str(size_bytes), str(lab.world))
        yield Peers(lab, [start(rank, "-c", *arguments) for rank in range(lab.world)])
