"""Validation losses: every variant with every seed, real replicas over loopback.

    python tools/experiments/losses.py [--out docs/optimizers-losses.json] [--seeds 3] [--jobs 2] [VARIANT...]

What is in the file already is not run again, so it can be ended and started at any time. Losses do not depend on how
fast the machine is (but for the run with kills, where a replica may die at any moment), so other things may run beside
it. The replicas of a run are threads of one process, with a communicator each; those that are killed are processes.
Needs torch. `--list` prints the variants, `report.py` makes tables and plots.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from replica import Settings, Told, run
from variants import ALL, BY_NAME, CANDIDATES, Variant

PEER_TIMEOUT_S = 300  # a replica that does not get the processor for a while is not dead
MASTER = [
    sys.executable, "-P", "-m", "pyccl.processes.leash", "pyccl.cli.master", "--listen", "127.0.0.1:0", "--no-journal",
    "--log-level", "error", "--peer-timeout", str(PEER_TIMEOUT_S),
]  # fmt: skip


@contextmanager
def master() -> Iterator[str]:
    """Its address."""
    process = subprocess.Popen(MASTER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
    finally:
        process.kill()
        process.communicate()


@dataclass(slots=True)
class Host:
    """A process with replicas. rounds: -1: they are not members yet."""

    process: Any
    pipe: Connection
    life: int
    rounds: int = -1
    told: list[Told] | None = None
    cpu_s: float = 0.0


class Experiment:
    """One run of a variant."""

    def __init__(self, address: str, variant: Variant, settings: Settings, seed: int) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._address, self._variant, self._settings, self._seed = address, variant, settings, seed
        self._rng = np.random.default_rng([seed, 0xDEAD])  # who is killed, and when
        self._rounds = settings.steps // variant.sync_every
        self._round_began, self._round_s, self._next_kill = time.monotonic(), 0.0, variant.kill_every
        self._kill_at: float | None = None
        self.kills: list[tuple[int, int]] = []  # (round, which host)
        self.present: Counter[int] = Counter()  # round -> how many processes took part in it
        streams = range(variant.peers)
        self._homes = [[stream] for stream in streams] if variant.kill_every else [list(streams)]
        self.hosts = [self._started(home, 0) for home in self._homes]

    def _started(self, streams: Sequence[int], life: int) -> Host:
        ours, theirs = self._context.Pipe(duplex=False)
        arguments = (theirs, self._address, self._variant, self._settings, self._seed, streams, life)
        process = self._context.Process(target=run, args=arguments, daemon=True)
        process.start()
        theirs.close()
        return Host(process, ours, life)

    def told(self) -> list[Told]:
        """Of all replicas, when they have ended."""
        try:
            while open_ := {host.pipe: host for host in self.hosts if not host.pipe.closed}:
                patience = None if self._kill_at is None else max(0.0, self._kill_at - time.monotonic())
                for pipe in wait(list(open_), patience):
                    assert isinstance(pipe, Connection)
                    self._hear(open_[pipe])
                if self._kill_at is not None and time.monotonic() >= self._kill_at:
                    self._kill_at = None
                    self._kill()
                if all(host.pipe.closed or host.rounds < 0 for host in self.hosts):
                    break  # who was not back in time does not come back
            return [told for host in self.hosts for told in host.told or ()]
        finally:
            for host in self.hosts:
                host.process.kill()
                host.process.join()

    def _hear(self, host: Host) -> None:
        try:
            what, value = host.pipe.recv()
        except EOFError:
            host.pipe.close()
            if host.told is None:
                raise RuntimeError(f"{self._variant.name}, seed {self._seed}: a replica failed") from None
            return
        if what == "done":
            host.told = value
        elif what == "cpu":
            host.cpu_s = value
        else:
            is_first = value > max(other.rounds for other in self.hosts)
            self.present[value] += value > max(host.rounds, 0)  # one that was rolled back is told again
            host.rounds = value
            if is_first and value:
                self._count_round(value)

    def _count_round(self, rounds: int) -> None:
        now = time.monotonic()
        self._round_s, self._round_began = now - self._round_began, now
        are_all_in = all(host.rounds >= 0 for host in self.hosts)
        if self._next_kill and are_all_in and self._next_kill <= rounds and not self._ends_soon():
            self._next_kill = rounds + self._variant.kill_every
            self._kill_at = now + self._rng.uniform(0, self._round_s)  # at any moment of a round, the exchange too

    def _ends_soon(self) -> bool:
        """The run has as many tokens as one that nobody disturbs, not as many rounds."""
        return sum(self.present.values()) > (self._rounds - 2) * self._variant.peers

    def _kill(self) -> None:
        """SIGKILL to a replica; another one comes up in its place at once."""
        if any(host.told for host in self.hosts):
            return  # the run ends
        number = int(self._rng.integers(len(self.hosts)))
        victim = self.hosts[number]
        victim.process.kill()
        victim.process.join()
        victim.pipe.close()
        self.kills.append((max(host.rounds for host in self.hosts), number))
        self.hosts[number] = self._started(self._homes[number], victim.life + 1)


def measure(variant: Variant, settings: Settings, seed: int) -> dict[str, Any]:
    """A run, as it is kept. Bytes and rounds: of one replica, the mean over those that ended."""
    begun = time.monotonic()
    with master() as address:
        experiment = Experiment(address, variant, settings, seed)
        told = experiment.told()
    losses = [one.loss for one in told if one.loss is not None]
    merged = [one.merged for one in told if one.merged is not None]
    curve = sorted({step: loss for one in told for step, loss in one.curve}.items())
    counted = ("rounds", "tx_bytes", "tx_bytes_peak", "syncs", "retries", "rollbacks")
    return {
        "loss": float(np.mean(losses)), "losses": losses, "merged": merged[0] if merged else None, "curve": curve,
        **{name: float(np.mean([getattr(one, name) for one in told])) for name in counted},
        "kills": experiment.kills, "present": [experiment.present[n + 1] for n in range(max(experiment.present))],
        "cpu_s": sum(host.cpu_s for host in experiment.hosts),
        "seconds": time.monotonic() - begun,
    }  # fmt: skip


@dataclass(slots=True)
class Results:
    """The file. runs: "VARIANT/SEED" -> what `measure` says."""

    path: Path
    settings: Settings
    runs: dict[str, Any] = field(default_factory=dict)
    _lock: Any = field(default_factory=Lock)

    def __post_init__(self) -> None:
        if not self.path.exists():
            return
        kept = json.loads(self.path.read_text())
        if kept["settings"] != asdict(self.settings):
            sys.exit(f"{self.path} was made with other settings: {kept['settings']}")
        self.runs = kept["runs"]

    def add(self, key: str, run_told: dict[str, Any]) -> None:
        with self._lock:
            self.runs[key] = run_told
            told = {"settings": asdict(self.settings), "runs": dict(sorted(self.runs.items()))}
            fresh = self.path.with_suffix(".new")
            fresh.write_text(json.dumps(told) + "\n")
            fresh.replace(self.path)
            sent, cpu = f"{run_told['tx_bytes'] / 1e6:8.2f} MB", f"{run_told['cpu_s']:6.1f} s CPU"
            print(f"{key:30} {run_told['loss']:.4f} {sent} {cpu} {run_told['seconds']:6.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="names; all unless given")
    parser.add_argument("--tuning", action="store_true", help="what the arguments of the outer steps were chosen from")
    parser.add_argument("--list", action="store_true", help="print the names of the variants")
    parser.add_argument("--out", type=Path, default=Path("docs/optimizers-losses.json"))
    parser.add_argument("--seeds", type=int, default=3, help="so many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    for one in fields(Settings):
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=type(one.default), default=one.default)
    args = parser.parse_args()
    if args.list:
        print("\n".join(BY_NAME))
        return
    unknown = sorted({*args.variants} - {*BY_NAME})
    if unknown:
        parser.error(f"no such variant: {', '.join(unknown)}; --list has their names")
    settings = Settings(**{one.name: getattr(args, one.name) for one in fields(Settings)})
    results = Results(args.out, settings)
    os.environ |= {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}  # of the processes to come
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch"])
    chosen = [BY_NAME[name] for name in args.variants] or (CANDIDATES if args.tuning else ALL)
    due = [(v, seed) for seed in range(args.first_seed, args.first_seed + args.seeds) for v in chosen]

    def run_one(what: tuple[Variant, int]) -> None:
        variant, seed = what
        key = f"{variant.name}/{seed}"
        if key not in results.runs:
            results.add(key, measure(variant, settings, seed))

    with ThreadPoolExecutor(args.jobs) as threads:
        for _ in threads.map(run_one, due):
            pass


if __name__ == "__main__":
    main()
