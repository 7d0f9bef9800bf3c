"""The command tools/sim: many seeds in parallel, each in a process of its own, and what they have shown.

tools/sim --seeds 1000               exit status 1 if a seed fails; its replay line is printed
tools/sim --seed 17                  that seed once more, with its whole trace
tools/sim --canary abort_after_done  the same with a planted bug; stops at the seed that finds it (exit status 1)
tools/sim --canary all               every planted bug; exit status 1 if one is not found
tools/sim --saved ...                the same with observers, saved states and total losses
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import sim_canaries

CPU_MAX_S: Final = 120  # a seed that takes longer does not end
CANARY_SEEDS: Final = 60  # each planted bug is found within so many


@dataclass
class Outcome:
    """What one seed has shown."""

    seed: int
    failure: str = ""  # "": none
    cpu_s: float = 0.0
    virtual_s: float = 0.0
    peers: int = 0  # at the start
    peers_most: int = 0  # at a time
    faults: int = 0
    operations: int = 0
    commits: int = 0
    events: int = 0
    met: list[tuple[str, str, int]] = field(default_factory=list)  # fault, phase, times
    epochs: dict[str, int] = field(default_factory=dict)  # by kind
    ends: dict[str, int] = field(default_factory=dict)  # of operations that failed, by status


def run_seed(seed: int, *, saved: bool = False, traced: bool = False) -> Outcome:
    from sim_cluster import SimCluster  # noqa: PLC0415, after the canary is planted
    from sim_options import OPERATIONS_MIN, PEERS_MAX, PEERS_MIN, SECONDS_MIN, draw_options  # noqa: PLC0415
    from sim_saved import draw_saved_options  # noqa: PLC0415
    from sim_world import SimError  # noqa: PLC0415

    started, out, options = time.process_time(), Outcome(seed), (draw_saved_options if saved else draw_options)(seed)
    cluster = SimCluster(seed, options, trace_max=40)
    cluster.world.prints_trace = traced
    if traced:
        print(options)
    try:
        cluster.run()
    except SimError as exc:
        out.failure = str(exc).partition("\nreplay: ")[0]
    checks, faults = cluster.checks, cluster.faults
    out.cpu_s, out.virtual_s = time.process_time() - started, cluster.world.now_s
    out.peers, out.peers_most, out.events = options.peers, cluster.peers_most, cluster.world.events
    out.faults, out.operations, out.commits = faults.count, checks.ended, checks.commits
    out.met = [(kind, phase, times) for (kind, phase), times in sorted(faults.met.items())]
    out.epochs, out.ends = checks.kinds, checks.statuses
    whole = out.virtual_s >= SECONDS_MIN and out.faults >= options.faults_min and out.operations >= OPERATIONS_MIN
    if not out.failure and not (whole and out.peers >= PEERS_MIN and out.peers_most <= PEERS_MAX):
        out.failure = f"this seed is too small, or too large: {asdict(out)}"
    return out


# ---- processes: an assertion of the C code, or a loop without end, costs its seed only


def _child(seed: int, saved: bool, write: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_MAX_S, CPU_MAX_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    text = json.dumps(asdict(run_seed(seed, saved=saved))).encode()
    with os.fdopen(write, "wb") as file:
        file.write(text)
    os._exit(0)


def _start(seed: int, saved: bool) -> tuple[int, int]:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            _child(seed, saved, write)
        finally:
            os._exit(1)
    os.close(write)
    return pid, read


def run_seeds(first: int, count: int, jobs: int, *, saved: bool = False) -> Iterator[Outcome]:
    """As they end. gc: what a run makes is dropped with its process."""
    import sim_cluster  # noqa: F401, PLC0415, once for all

    gc.disable()
    gc.freeze()
    seeds, running = iter(range(first, first + count)), dict[int, tuple[int, int, bytes]]()
    try:
        while True:
            while len(running) < jobs and (seed := next(seeds, None)) is not None:
                pid, read = _start(seed, saved)
                running[read] = (seed, pid, b"")
            if not running:
                return
            for read in select.select([*running], [], [])[0]:
                seed, pid, data = running[read]
                part = os.read(read, 1 << 16)
                running[read] = (seed, pid, data + part)
                if not part:
                    del running[read]
                    os.close(read)
                    yield _outcome(seed, data, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    finally:
        for _, pid, _ in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _outcome(seed: int, data: bytes, code: int) -> Outcome:
    if code == 0:
        return Outcome(**json.loads(data))
    how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return Outcome(seed, f"its process {how}")


# ---- for people


def replay_line(seed: int, canary: str, *, saved: bool = False) -> str:
    return f"tools/sim --seed {seed}" + (f" --canary {canary}" if canary else " --saved" if saved else "")


def coverage_table(met: Counter[tuple[str, str]]) -> str:
    from sim_faults import PHASES  # noqa: PLC0415
    from sim_options import FAULT_KINDS  # noqa: PLC0415

    kinds = list(dict.fromkeys((*FAULT_KINDS, *sorted(kind for kind, _ in met))))
    width = max(map(len, kinds))
    lines = ["which faults met which phases of the protocol (a fault may meet several)"]
    lines.append(" " * width + "".join(f"{phase.rpartition(' ')[2]:>10}" for phase in PHASES))
    lines[-1:-1] = [" " * width + "".join(f"{phase.rpartition(' ')[0]:>10}" for phase in PHASES)]
    lines += [f"{kind:{width}}" + "".join(f"{met[kind, p] or '-':>10}" for p in PHASES) for kind in kinds]
    return "\n".join(lines)


def summary(outcomes: list[Outcome], wall_s: float) -> dict[str, Any]:
    ok = [out for out in outcomes if not out.failure]

    def least(of: Callable[[Outcome], float]) -> float:
        return min(map(of, ok), default=0)

    met: Counter[tuple[str, str]] = Counter()
    epochs: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    for out in outcomes:
        met.update({(kind, phase): times for kind, phase, times in out.met})
        epochs.update(out.epochs)
        ends.update(out.ends)
    return {
        "seeds": len(outcomes),
        "failed": {out.seed: out.failure for out in sorted(outcomes, key=lambda o: o.seed) if out.failure},
        "wall_s": round(wall_s, 1),
        "cpu_s_per_seed": round(sum(out.cpu_s for out in outcomes) / max(1, len(outcomes)), 3),
        "least": {
            "virtual_s": round(least(lambda o: o.virtual_s), 1),
            "peers": least(lambda o: o.peers),
            "faults": least(lambda o: o.faults),
            "operations": least(lambda o: o.operations),
        },
        "peers_most": max((out.peers_most for out in outcomes), default=0),
        "sum": {
            "virtual_s": round(sum(out.virtual_s for out in outcomes)),
            "faults": sum(out.faults for out in outcomes),
            "operations": sum(out.operations for out in outcomes),
            "commits": sum(out.commits for out in outcomes),
            "events": sum(out.events for out in outcomes),
        },
        "epochs": dict(epochs),
        "failed_operations": dict(ends),
        "coverage": {f"{kind} / {phase}": times for (kind, phase), times in sorted(met.items())},
    }


def print_summary(outcomes: list[Outcome], wall_s: float) -> None:
    told, met = summary(outcomes, wall_s), Counter[tuple[str, str]]()
    for out in outcomes:
        met.update({(kind, phase): times for kind, phase, times in out.met})
    least, total = told["least"], told["sum"]
    print(coverage_table(met))
    print(f"epochs: {told['epochs']}; operations that failed, on each peer: {told['failed_operations']}")
    print(
        f"each seed that passed: at least {least['virtual_s']} virtual seconds, {least['peers']} to "
        f"{told['peers_most']} peers, {least['faults']} faults, {least['operations']} operations"
    )
    print(
        f"{told['seeds']} seeds, {len(told['failed'])} failed: {total['virtual_s']} virtual seconds, {total['faults']} "
        f"faults, {total['operations']} operations, {total['commits']} commits, {total['events']} events; "
        f"{told['wall_s']} s, CPU {told['cpu_s_per_seed']} s per seed"
    )


# ---- the command


def hunt(args: argparse.Namespace) -> int:
    """The seeds; with a canary up to the first that finds it."""
    started, outcomes, canary = time.monotonic(), list[Outcome](), args.canary
    with contextlib.closing(run_seeds(args.first, args.seeds, args.jobs, saved=args.saved)) as ends:
        for out in ends:
            outcomes.append(out)
            if out.failure and not args.json:
                first_line, again = out.failure.splitlines()[0], replay_line(out.seed, canary, saved=args.saved)
                print(f"seed {out.seed} fails: {first_line}\n  replay: {again}", flush=True)
            if out.failure and canary:
                break
    found, wall_s = [out for out in outcomes if out.failure], time.monotonic() - started
    if args.json:
        told = summary(outcomes, wall_s)
        again = [replay_line(out.seed, canary, saved=args.saved) for out in found]
        print(json.dumps({**told, "canary": canary, "replay": again}))
    elif not canary:
        print_summary(outcomes, wall_s)
    else:
        print(f"canary {canary}: {'FOUND' if found else 'NOT FOUND'} after {len(outcomes)} seeds, {wall_s:.1f} s")
    return 1 if found else 0


def hunt_all_canaries(args: argparse.Namespace) -> int:
    """Each in an interpreter of its own, since it changes what is imported."""
    rows = []
    for canary in sim_canaries.CANARIES.values():
        command = [sys.executable, __file__, "--canary", canary.name, "--json"]
        first = canary.first if args.first is None else args.first
        command += ["--first", str(first), "--seeds", str(args.seeds), "--jobs", str(args.jobs)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode not in (0, 1) or not done.stdout:
            raise SystemExit(f"canary {canary.name} did not run:\n{done.stderr}")
        told = json.loads(done.stdout)
        seed, failure = next(iter(told["failed"].items()), ("", ""))
        rows.append({"name": canary.name, "language": canary.language, "bug": canary.text, "found": bool(failure)})
        rows[-1].update(seed=seed, seeds=told["seeds"], how=failure.partition("\n")[0], wall_s=told["wall_s"])
        if not args.json:
            how = f"seed {seed:>3}: {rows[-1]['how'][:90]}" if failure else f"NOT FOUND in {told['seeds']} seeds"
            print(f"{canary.name:24} {canary.language:7} {how}", flush=True)
    missed = [row["name"] for row in rows if not row["found"]]
    if args.json:
        print(json.dumps({"canaries": rows, "missed": missed}))
    else:
        print(f"{len(rows)} canaries, {len(missed)} not found" + (": " + ", ".join(missed) if missed else ""))
    return 1 if missed else 0


def replay(args: argparse.Namespace) -> int:
    gc.disable()
    out = run_seed(args.seed, saved=args.saved, traced=not args.json)
    if args.json:
        print(json.dumps(asdict(out)))
    elif out.failure:
        print(f"seed {out.seed} FAILS: {out.failure}")
    else:
        print(
            f"seed {out.seed} passes: {out.virtual_s:.1f} virtual seconds, {out.peers} peers at the start, "
            f"{out.peers_most} at most, {out.faults} faults, {out.operations} operations, CPU {out.cpu_s:.2f} s"
        )
    return 1 if out.failure else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/sim", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, help=f"how many (default: 1000; with --canary {CANARY_SEEDS})")
    parser.add_argument("--first", type=int, help="the first of them (default: 0; or where a canary is found soon)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="run this one only and print its trace")
    names = ", ".join(sim_canaries.CANARIES)
    parser.add_argument("--canary", default="", metavar="NAME", help=f"all, or one of: {names}")
    parser.add_argument("--saved", action="store_true", help="with observers, saved states and total losses")
    parser.add_argument("--json", action="store_true", help="the result as JSON")
    args = parser.parse_args(argv)
    if args.canary not in ("", "all", *sim_canaries.CANARIES):
        parser.error(f"no canary is called {args.canary}; --help names them")
    if args.canary == "all" and args.seed is not None:
        parser.error("--seed replays one canary, not all")
    if args.seeds is None:
        args.seeds = CANARY_SEEDS if args.canary else 1000
    if args.jobs < 1 or args.seeds < 1:
        parser.error("--seeds and --jobs are at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.canary == "all":
        return hunt_all_canaries(args)
    if args.canary:
        canary = sim_canaries.CANARIES[args.canary]
        sim_canaries.plant(canary)
        args.saved = canary.saved
        args.first = canary.first if args.first is None else args.first
    args.first = args.first or 0
    return hunt(args) if args.seed is None else replay(args)


if __name__ == "__main__":
    sys.exit(main())
