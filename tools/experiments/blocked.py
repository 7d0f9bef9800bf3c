"""How long an exchange holds training up: DiLoCo beside Streaming DiLoCo, over lines of a known rate.

    python tools/experiments/blocked.py [--mbit 100] [--parameters 8000000] [--rounds 2]

Two replicas in one process, each behind a cap of `--mbit` both ways. Inner steps are idle waits of 0.1 s, so that two
cores are enough; 50 of them make a round. Prints, for each optimizer, what was sent, and the share of the time that
`step()` waited for others; a line that does nothing else would need the time in the last column.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

import pyccl
from pyccl.optim import DiLoCo, OuterOptimizer, StreamingDiLoCo

H, STEP_S = 50, 0.1
TENSORS = 20  # of equal size

Make = Callable[[pyccl.Communicator, dict[str, Any]], OuterOptimizer]
OPTIMIZERS: dict[str, Make] = {
    "DiLoCo": lambda comm, params: DiLoCo(comm, params, H),
    "streaming, blocking": lambda comm, params: StreamingDiLoCo(comm, params, H, fragments=5),
    "streaming, delay 8": lambda comm, params: StreamingDiLoCo(comm, params, H, fragments=5, delay=8),
    "streaming, delay 8, fp4_e3m0": lambda comm, params: StreamingDiLoCo(
        comm, params, H, fragments=5, delay=8, quantize="fp4_e3m0"
    ),
}


def run(comm: pyccl.Communicator, make: Make, args: argparse.Namespace) -> tuple[float, float, float, float]:
    """Seconds, blocked, hidden, and MB sent, of a replica."""
    rng = np.random.default_rng(0)
    params = {f"w{i:02}": rng.standard_normal(args.parameters // TENSORS, np.float32) for i in range(TENSORS)}
    opt = make(comm, params)
    comm.barrier()
    begun, blocked, sent = time.monotonic(), opt.stats.seconds_blocked, opt.stats.tx_bytes
    for _ in range(args.rounds * H):
        time.sleep(STEP_S)  # the inner step
        for array in params.values():
            array[0] += 1.0
        opt.step()
    seconds = time.monotonic() - begun
    return seconds, opt.stats.seconds_blocked - blocked, opt.stats.seconds_hidden, (opt.stats.tx_bytes - sent) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=int, default=100)
    parser.add_argument("--parameters", type=int, default=8_000_000)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    listen = ["--listen", "127.0.0.1:0", "--no-journal", "--log-level", "error"]
    command = [sys.executable, "-P", "-m", "pyccl.cli.master", *listen]
    master = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert master.stdout is not None
        address, cap = master.stdout.readline().split()[-1], f"{args.mbit}mbit"
        print(f"{'':30}{'sent':>10}{'time':>10}{'blocked':>18}{'hidden':>10}{'line alone':>12}")
        for group, (name, make) in enumerate(OPTIMIZERS.items()):
            first, second = (
                pyccl.Communicator(address, group=group, max_upload=cap, max_download=cap) for _ in range(2)
            )
            with ThreadPoolExecutor(2) as threads:
                first.connect()
                join = threads.submit(second.connect)
                while first.group_world_size < 2:
                    first.update_topology()
                join.result()
                told = list(threads.map(lambda comm, make=make: run(comm, make, args), (first, second)))
            first.close()
            second.close()
            seconds, blocked, hidden, sent = max(told, key=lambda replica: replica[1])
            print(
                f"{name:30}{sent:7.1f} MB{seconds:8.1f} s{blocked:9.2f} s {blocked / seconds:6.1%}{hidden:8.1f} s"
                f"{sent * 8 / args.mbit:10.1f} s",
                flush=True,
            )
    finally:
        master.kill()
        master.wait()


if __name__ == "__main__":
    main()
