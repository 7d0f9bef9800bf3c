"""A peer of a lab: ``python reach_peer.py ADDRESS KEYWORDS``. It answers each line on stdin by one of JSON."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import numpy as np

import pyccl

TIMEOUT_S = 60.0
COUNT = 10_000


def do(comm: pyccl.Communicator, word: str) -> Any:
    if word == "connect":
        comm.connect(TIMEOUT_S, TIMEOUT_S)
    elif word == "admit":
        comm.update_topology(TIMEOUT_S)
    elif word == "reduce":
        x = np.arange(COUNT, dtype=np.float32)
        comm.all_reduce(x, timeout=TIMEOUT_S)
        return bool((x == comm.group_world_size * np.arange(COUNT)).all())
    elif word == "peers":
        return [[link.path, link.relay, link.connections] for link in comm.peers]
    elif word == "paths":
        return {link.peer: link.path for link in comm.peers}
    elif word == "world":
        return comm.group_world_size
    elif word == "id":
        return comm.peer_id
    return None


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    comm = pyccl.Communicator(sys.argv[1], **json.loads(sys.argv[2]))
    for line in sys.stdin:
        try:
            answer: Any = do(comm, line.strip())
        except pyccl.PycclError as e:
            answer = {"error": type(e).__name__, "text": str(e)}
        print(json.dumps(answer), flush=True)
    comm.close()


if __name__ == "__main__":
    main()
