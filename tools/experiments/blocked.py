"""How long exchanges hold training up on a long line: every variant on the emulated lines of `atlantic`, as root.

    python tools/experiments/blocked.py [--repeat 5] [--out docs/optimizers-blocked.json] [--parameters 8000000]
                                        [VARIANT...]

Four replicas (or eight), each on a host of a lab of its own (`pyccl netlab`): 400 Mbit/s both ways, 90 ms round trip.
Inner steps are idle waits of 0.1 s: two cores cannot host four replicas that compute. A round to begin with, in which
the lines get to be known, does not count. Tells for each variant what a replica sent, the share of the time in which it
waited for others, and in which it did not train; beside that what the line needs for the bytes. With `--repeat` all
variants have a turn before any has its next one. What is in the file already is kept, but for the variants that are
measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from variants import ALL, BY_NAME, Variant

import pyccl
from pyccl.netlab import Lab, load

SCENARIO: Final = "atlantic"
STEP_S: Final = 0.1
TENSORS: Final = 20  # of equal size
STEPS: Final = 100  # after those of a first round
STEPS_OF_EVERY: Final = 6  # of what exchanges at every step
PORT: Final = 48148


def replica(comm: pyccl.Communicator, variant: Variant, parameters: int) -> dict[str, float]:
    """Of one: what is kept of it."""
    rng = np.random.default_rng(0)
    params = {f"w{i:02}": rng.standard_normal(parameters // TENSORS, np.float32) for i in range(TENSORS)}
    opt = variant.make(comm, params)
    grads = np.ones(parameters, np.float32)
    first = variant.sync_every
    steps, sent = STEPS_OF_EVERY if first == 1 else STEPS, 0
    before, begun, blocked = (0.0, 0.0, 0), 0.0, 0.0
    comm.barrier()
    for step in range(first + steps):
        if step == first:
            begun, blocked, sent = time.monotonic(), 0.0, 0
            if opt is not None:
                before = (opt.stats.seconds_blocked, opt.stats.seconds_hidden, opt.stats.tx_bytes)
        time.sleep(STEP_S)  # the inner step
        if opt is None:
            info = comm.all_reduce(grads, op="avg")
            blocked, sent = blocked + info.seconds, sent + info.tx_bytes
        else:
            for array in params.values():
                array[0] += 1.0
            opt.step()
    seconds = time.monotonic() - begun
    told = {"steps": steps, "step_s": STEP_S, "seconds": seconds, "blocked": blocked, "hidden": 0.0, "tx_bytes": sent}
    if opt is not None:
        stats = opt.stats
        told |= {
            "blocked": stats.seconds_blocked - before[0], "hidden": stats.seconds_hidden - before[1],
            "tx_bytes": stats.tx_bytes - before[2],
        }  # fmt: skip
    comm.barrier()  # what one still has in flight ends before another leaves
    return told


def on_host(names: list[str], parameters: int) -> None:
    """What runs on every host: prints a line of JSON for each variant."""
    world, rank = int(os.environ["NETLAB_WORLD"]), int(os.environ["NETLAB_RANK"])
    for group, name in enumerate(names):
        comm = pyccl.Communicator(f"{os.environ['NETLAB_MASTER']}:{PORT}", group=group)
        comm.connect()
        while comm.group_world_size < world:
            comm.update_topology()
        print(json.dumps({"variant": name, "rank": rank, **replica(comm, BY_NAME[name], parameters)}), flush=True)
        comm.close()


def measure(
    variants: list[Variant], world: int, parameters: int, line: str | None
) -> Iterator[tuple[str, dict[str, float]]]:
    """In turn, each one's name and what the replica told that was blocked for longest; line_s: what its bytes need."""
    scenario = load(SCENARIO).with_options(hosts=world, rate=line)
    rate = scenario.hosts[0].up.rate
    assert rate is not None
    with Lab(scenario) as lab:
        listen = ["--listen", f"{lab.addresses[0]}:{PORT}", "--no-journal", "--insecure", "--log-level", "error"]
        master = lab.start(0, [sys.executable, "-P", "-m", "pyccl.cli.master", *listen], stdout=subprocess.PIPE)
        assert master.stdout is not None
        master.stdout.readline()
        command = [sys.executable, __file__, "--on-host", "--parameters", str(parameters)]
        command += [variant.name for variant in variants]
        hosts = [lab.start(rank, command, stdout=subprocess.PIPE, text=True) for rank in range(world)]
        for variant in variants:
            told = [json.loads(host.stdout.readline()) for host in hosts if host.stdout is not None]
            slowest: dict[str, Any] = max(told, key=lambda one: float(one["blocked"]))
            assert {one.pop("variant") for one in told} == {variant.name}
            slowest["line_s"] = max(one["tx_bytes"] for one in told) * 8 / rate
            show(variant.name, slowest)
            yield variant.name, slowest


def _is_timed(variant: Variant) -> bool:
    return not variant.kill_every and (variant.optimizer is None or variant.sync_every > 1)


def show(name: str, told: dict[str, float]) -> None:
    seconds = told["seconds"]
    trained = told["steps"] * STEP_S
    print(
        f"{name:26}{told['tx_bytes'] / 1e6:8.1f} MB{seconds:7.1f} s   blocked {told['blocked']:6.2f} s "
        f"{told['blocked'] / seconds:6.1%}   not training {1 - trained / seconds:6.1%}   "
        f"hidden {told['hidden']:5.1f} s   line alone {told['line_s']:5.2f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="names, as `losses.py --list` tells; all")
    parser.add_argument("--out", type=Path, default=Path("docs/optimizers-blocked.json"))
    parser.add_argument("--parameters", type=int, default=8_000_000)
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="runs of each variant; default: 1")
    parser.add_argument("--rate", help="of every line, both ways, instead of the scenario's: 100mbit")
    parser.add_argument("--on-host", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.on_host:
        on_host(args.variants, args.parameters)
        return
    chosen = [BY_NAME[name] for name in args.variants] or [variant for variant in ALL if _is_timed(variant)]
    kept = json.loads(args.out.read_text()) if args.out.exists() else {}
    kept = {"parameters": args.parameters, "rate": args.rate, "runs": {}} | kept
    if (kept["parameters"], kept["rate"]) != (args.parameters, args.rate):
        parser.error(f"{args.out} was made with {kept['parameters']} parameters and rate {kept['rate']}")
    found: dict[str, list[dict[str, float]]] = {}
    for world in sorted({variant.peers for variant in chosen}):
        these = [variant for variant in chosen if variant.peers == world] * args.repeat
        for name, told in measure(these, world, args.parameters, args.rate):
            found.setdefault(name, []).append(told)
            args.out.write_text(json.dumps(kept | {"runs": kept["runs"] | found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
