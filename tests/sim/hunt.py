"""Run many seeds outside pytest, one process each worker; failures are printed as they are found.

python tests/sim/hunt.py FIRST COUNT [WORKERS] [BUG]
"""

from __future__ import annotations

import os
import sys
import time

from sim_cluster import simulate
from sim_world import SimError


def hunt(first: int, count: int, step: int, bug: str) -> int:
    failures = 0
    for seed in range(first, first + count, step):
        child = os.fork()  # an assertion of the C code ends the process: it costs this seed only
        if child == 0:
            try:
                simulate(seed, bug)
            except SimError as exc:
                print(f"seed {seed}: {str(exc).splitlines()[0]}", flush=True)
                os._exit(1)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code < 0:
            print(f"seed {seed}: died of signal {-code}", flush=True)
        failures += code != 0
    return failures


def main() -> None:
    first, count = int(sys.argv[1]), int(sys.argv[2])
    workers = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    bug = sys.argv[4] if len(sys.argv) > 4 else ""
    started = time.process_time(), time.monotonic()
    children = []
    for worker in range(workers):
        pid = os.fork()
        if pid == 0:
            os._exit(min(250, hunt(first + worker, count - worker, workers, bug)))
        children.append(pid)
    failures = sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children)
    print(f"{count} seeds from {first}: {failures} failures, {time.monotonic() - started[1]:.0f} s")


if __name__ == "__main__":
    main()
