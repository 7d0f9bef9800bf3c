"""A peer of tests/netlab/test_nat_runs.py: ``python nat_agent.py MASTER NUMBER``, reduces until its stdin ends.

Each member contributes the bit of its number, so a sum names who took part in it; every element is checked. Who is put
out of the run comes back. A line of JSON for each operation.
"""

from __future__ import annotations

import json
import sys
import threading
import time

import numpy as np

import pyccl

ELEMENTS = 50_000
PAUSE_S = 0.05  # between two operations
CONNECT_S = 120.0


def main() -> None:
    master, number = sys.argv[1], int(sys.argv[2])
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    own, out = np.full(ELEMENTS, 1 << number, np.int64), np.empty(ELEMENTS, np.int64)
    joins = 0
    while not over.is_set():
        joins += 1
        try:
            with pyccl.connect(master, timeout=CONNECT_S) as comm:
                while not over.is_set():
                    turn(comm, own, out, number, joins)
        except (pyccl.EvictedError, pyccl.MasterUnavailableError, pyccl.OutcomeUnknownError) as error:
            say(number=number, left=type(error).__name__)


def turn(comm: pyccl.Communicator, own: np.ndarray, out: np.ndarray, number: int, joins: int) -> None:
    """One operation, and a safe point if somebody waits for it."""
    began_s = time.monotonic()
    try:
        info = comm.all_reduce(own, out=out, timeout=CONNECT_S)
    except pyccl.AloneError:
        comm.update_topology()
        time.sleep(PAUSE_S)
        return
    who = int(out[0])
    assert (out == who).all()
    assert who.bit_count() == info.world_size
    assert who >> number & 1
    say(
        number=number, began_s=began_s, who=who, joins=joins, peer=comm.peer_id,
        links={link.peer: (link.path, link.relay) for link in comm.peers},
    )  # fmt: skip
    if comm.are_peers_pending():
        comm.update_topology()
    time.sleep(PAUSE_S)


def say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


main()
