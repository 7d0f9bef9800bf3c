"""python worker.py JSON: a replica in a process of its own, which may be told to kill itself in an exchange.

JSON: {"address", "group", "kind", "world", "rank", "seed", "rounds", "count", "options", "kill"}. Trains `count`
numbers for so many rounds with so many others. kill: None, or what ``hooks.Hook`` takes, set after round 1.
Prints {"peer": id}, then {"round", "theta"} (hex of SHA-256) after each round, and {"end": ...}.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "api"))

import numpy as np
from hooks import Hook, install

import pyccl
from pyccl.optim import exchange
from pyccl.optim.diloco import AsyncDiLoCo, DiLoCo
from pyccl.optim.local_sgd import LocalSGD

KINDS = {kind.__name__: kind for kind in (LocalSGD, DiLoCo, AsyncDiLoCo)}


def shift(seed: int, rank: int, round_: int, count: int) -> Any:
    """The inner steps of a round: what is added to the weights."""
    return np.random.default_rng([seed, rank, round_]).standard_normal(count, np.float32)


def sha(x: Any) -> str:
    return hashlib.sha256(x.tobytes()).hexdigest()


def say(**told: Any) -> None:
    print(json.dumps(told), flush=True)


def main() -> None:
    told = json.loads(sys.argv[1])
    seed, rank, count = told["seed"], told["rank"], told["count"]
    exchange.PIECE_BYTES = told.get("piece_bytes", exchange.PIECE_BYTES)  # type: ignore[misc]
    with pyccl.connect(told["address"], group=told["group"]) as comm:
        say(peer=comm.peer_id)
        while comm.group_world_size < told["world"]:
            comm.update_topology()
        w = np.zeros(count, np.float32)
        opt = KINDS[told["kind"]](comm, {"w": w}, 1, **told["options"])
        for round_ in range(told["rounds"]):
            if round_ == 2 and told["kill"] is not None:
                when = told["kill"].pop("when")
                install(Hook(tell=lambda phase: None, **told["kill"]), when, lambda: comm._session)
            w += shift(seed, rank, round_, count)
            opt.step()
            say(round=round_, theta=sha(opt.theta["w"]), members=comm.members)
        opt.finish()
        say(end=sha(opt.theta["w"]), digest=opt.shared.digest(), rounds=opt.stats.rounds, retries=opt.stats.retries)


if __name__ == "__main__":
    main()
