"""``pyccl bench``: options, printing and exit status of the benchmarks; what they do is in ``pyccl.bench``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from pyccl import netlab
from pyccl._proto import limits
from pyccl.bench import (
    all_reduce,
    churn,
    content,
    digest,
    encryption,
    epochs,
    gloo,
    kernels,
    machine,
    memory,
    nat,
    nat_page,
    outer,
    scale,
    show,
    topology,
    wan,
)
from pyccl.bench.conductor import BenchError, Conductor, ExitStatus
from pyccl.bench.figures import MIB
from pyccl.calls import ALGORITHMS
from pyccl.netlab.scenario import Nat
from pyccl.processes.children import Children, Interrupted

T = TypeVar("T")
INTERRUPT: Final = 130  # Ctrl-C where no child is to be ended
EPILOG: Final = """\b
Exit status:
  0  measured
  1  internal error
  2  bad arguments, or the library does not offer what was asked for
  3  --vs gloo without torch
  4  a result was wrong, processes held different bits, or peers were not connected as expected
  5  no lab can be built here (it needs root and iproute2)
  6  a process failed
  7  no report from any process for longer than an operation may take
  128 + n  ended by signal n (Ctrl-C: 130)
"""


def _connections(ctx: click.Context, param: click.Parameter, value: str) -> int | str:
    if value == "auto":
        return value
    if not value.isascii() or not value.isdigit() or not 1 <= int(value) <= 64:
        raise click.BadParameter(f"{value!r} is neither 'auto' nor a number of 1..64", ctx, param)
    return int(value)


def _number(ctx: click.Context, param: click.Parameter, value: float) -> float:
    if value != value:  # no range keeps a NaN out
        raise click.BadParameter("nan is no number", ctx, param)
    return value


def _number_or_none(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    return None if value is None else _number(ctx, param, value)


@click.group(epilog=EPILOG)
def bench() -> None:
    """Measure on this machine: collectives on loopback or over long lines, kernels, digests, joins, syncs, losses,
    restarts of the master, changes of epoch, memory over hours.

    Each command starts the processes it needs, on loopback or in a lab of its own, and ends them. Figures depend on
    what else runs here: the machine's load is printed with them.
    """


def _mib(text: str, default: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(
        "--mib", type=click.FloatRange(0, min_open=True, max=1 << 20), default=default, show_default=True, help=text,
        callback=_number,
    )  # fmt: skip


_AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object with all raw figures.")


def _iters(default: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option(
        "--iters", type=click.IntRange(1, 100_000), default=default, show_default=True, help="Iterations."
    )


def _world(least: int, default: int, text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return click.option("--world", type=click.IntRange(least, 64), default=default, show_default=True, help=text)


_TIMEOUT: Final = click.option(
    "--timeout", type=click.FloatRange(1, 86_400), metavar="SECONDS", callback=_number_or_none,
    help="Of one operation; unless given, made of the size and the lines.",
)  # fmt: skip
_ALGORITHM: Final = click.option(
    "--algorithm", type=click.Choice(tuple(ALGORITHMS)), default="auto", show_default=True, help="pyccl only."
)


@bench.command("all-reduce", epilog=EPILOG)
@_world(2, 2, "Processes.")
@_mib("Size of each process' tensor.", 64)
@_iters(10)
@click.option("--warmup", type=click.IntRange(0, 10_000), default=2, show_default=True, help="Rounds not counted.")
@click.option("--dtype", type=click.Choice(kernels.DTYPES), default="float32", show_default=True)
@click.option("--op", type=click.Choice(kernels.OPS), default="sum", show_default=True)
@click.option("--quantize", metavar="CODEC", help="As all_reduce(quantize=...); pyccl only.")
@click.option(
    "--connections", default="auto", show_default=True, callback=_connections, metavar="auto|N",
    help="TCP connections for each pair, 1 to 64.",
)  # fmt: skip
@_ALGORITHM
@click.option("--in-place/--out", default=True, show_default=True, help="Result in the input, or in another array.")
@click.option("--vs", type=click.Choice(["gloo"]), help="Alternate with torch's Gloo in the same processes, over TCP.")
@_AS_JSON
def all_reduce_command(
    world: int, mib: float, iters: int, warmup: int, dtype: str, op: str, quantize: str | None,
    connections: int | str, algorithm: str, in_place: bool, vs: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Time an all-reduce between processes on loopback."""
    if vs == "gloo":
        _need_torch()
    if vs == "gloo" and dtype not in gloo.DTYPES:
        raise click.UsageError(f"--vs gloo: Gloo does not reduce {dtype}, only {', '.join(gloo.DTYPES)}")
    if dtype == "bfloat16" and not machine.is_installed("ml_dtypes"):
        raise click.UsageError("--dtype bfloat16 needs ml_dtypes: pip install ml_dtypes")
    plan = all_reduce.Plan(
        world=world, size_bytes=int(mib * MIB), iterations=iters, warmup=warmup, dtype=dtype, op=op,
        quantize=quantize, connections=connections, algorithm=algorithm, in_place=in_place, gloo=vs == "gloo",
    )  # fmt: skip
    _report(
        "all-reduce", as_json, lambda: _conduct(lambda conductor: all_reduce.measure(plan, conductor)),
        all_reduce.Result.to_json, show.all_reduce, "torch",
    )  # fmt: skip


@bench.command("wan", epilog=EPILOG)
@click.option(
    "--scenario", "name", default="pacific", show_default=True, metavar="NAME|FILE", help="See pyccl netlab scenarios."
)
@click.option("--world", type=click.IntRange(2, 64), help="Hosts, a peer on each; as in the scenario unless given.")
@click.option("--rate", metavar="RATE", help="Of every host's line, both ways: 400mbit.")
@click.option("--delay", metavar="TIME", help="One way between any two hosts: 75ms.")
@click.option("--loss", type=float, metavar="SHARE", help="Of the packets between any two hosts: 1e-4.")
@click.option("--seed", type=int, metavar="N", help="Of the losses.")
@_mib("Size of each peer's tensor.", 64)
@_iters(5)
@click.option("--warmup", type=click.IntRange(0, 10_000), default=2, show_default=True, help="Rounds not counted.")
@click.option("--quantize", metavar="CODEC", help="As of all_reduce(quantize=...), for pyccl only.")
@click.option(
    "--connections", default="auto", show_default=True, callback=_connections, metavar="auto|N",
    help="TCP connections for each pair, 1 to 64.",
)  # fmt: skip
@_ALGORITHM
@click.option("--optimize", is_flag=True, help="Call optimize_topology() before all; pyccl only.")
@click.option("--max-upload", metavar="RATE", help="Cap of each peer, as of Communicator; pyccl only.")
@click.option("--max-download", metavar="RATE", help="As --max-upload.")
@_TIMEOUT
@click.option("--vs", type=click.Choice(["gloo"]), help="Alternate with torch's Gloo in the same processes.")
@_AS_JSON
def wan_command(
    name: str, world: int | None, rate: str | None, delay: str | None, loss: float | None, seed: int | None,
    mib: float, iters: int, warmup: int, quantize: str | None, connections: int | str, algorithm: str, optimize: bool,
    max_upload: str | None, max_download: str | None, timeout: float | None, vs: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Time an all-reduce of float32 over the long lines of a lab. Needs root and iproute2.

    A peer on each host of the scenario, the master beside the first one that all can dial; the lines are emulated on
    this machine.
    """
    try:
        scenario = netlab.load(name).with_options(rate=rate, delay=delay, loss=loss, hosts=world, seed=seed)
    except netlab.ScenarioError as error:
        raise click.UsageError(str(error)) from error
    if vs == "gloo":
        _need_torch()
    plan = all_reduce.Plan(
        size_bytes=int(mib * MIB), iterations=iters, warmup=warmup, quantize=quantize, connections=connections,
        algorithm=algorithm, gloo=vs == "gloo", optimize=optimize, max_upload=max_upload, max_download=max_download,
        timeout_s=timeout or 0.0,
    )  # fmt: skip

    def measure() -> wan.Result:
        with Children() as children:
            return wan.measure(scenario, plan, children)

    _report("wan", as_json, measure, wan.Result.to_json, show.wan, "torch")


@bench.command("encryption", epilog=EPILOG)
@click.option("--scenario", "name", metavar="NAME|FILE", help="Over its lines; else on loopback.")
@_world(2, 2, "Processes on loopback.")
@_mib("Size of each peer's tensor.", 64)
@_iters(10)
@click.option("--rounds", type=click.IntRange(1, 100), default=2, show_default=True, help="Of each kind of run.")
@click.option("--warmup", type=click.IntRange(0, 10_000), default=2, show_default=True, help="Rounds not counted.")
@_AS_JSON
def encryption_command(
    name: str | None, world: int, mib: float, iters: int, rounds: int, warmup: int, as_json: bool
) -> None:
    """Time an all-reduce of float32 in plain and in secure runs, in turn."""
    plan = all_reduce.Plan(world=world, size_bytes=int(mib * MIB), iterations=iters, warmup=warmup)
    try:
        scenario = None if name is None else netlab.load(name)
    except netlab.ScenarioError as error:
        raise click.UsageError(str(error)) from error

    def reduce(plan: all_reduce.Plan) -> all_reduce.Result:
        if scenario is None:
            return _conduct(lambda conductor: all_reduce.measure(plan, conductor))
        with Children() as children:
            return wan.measure(scenario, plan, children).reduced

    _report(
        "encryption", as_json, lambda: encryption.measure(plan, rounds, name or "loopback", reduce),
        encryption.Result.to_json, show.encryption,
    )  # fmt: skip


def _kinds(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[Nat, ...]:
    names = tuple(Nat) if value is None else tuple(value.split(","))
    for name in names:
        if name not in tuple(Nat):
            raise click.BadParameter(f"{name!r} is none of {', '.join(Nat)}", ctx, param)
    return tuple(kind for kind in Nat if kind in names)


@bench.command("nat", epilog=EPILOG)
@click.option("--kinds", callback=_kinds, metavar="KIND,KIND", help=f"Of {', '.join(Nat)}. Default: all.")
@click.option("--delay", default="10ms", show_default=True, metavar="TIME", help="One way between any two lines.")
@_mib("Size of each peer's tensor.", 1)
@click.option("--repeat", type=click.IntRange(1, 100), default=1, show_default=True, help="Of each pair.")
@click.option(
    "--write", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write the tables: docs/nat.md."
)
@click.option("--insecure", is_flag=True, help="Plain runs. Default: secure ones, with an invite and encrypted.")
@_AS_JSON
def nat_command(
    kinds: tuple[Nat, ...], delay: str, mib: float, repeat: int, write: Path | None, insecure: bool, as_json: bool
) -> None:  # fmt: skip
    """Connect two peers behind each pair of kinds of NAT; say how and how fast. Needs root, nftables and miniupnpd.

    A pair that is not connected as it should, or that reduces to wrong values, is told and ends with status 4.
    """
    pairs = tuple((a, b) for a, b in nat.PAIRS if a in kinds and b in kinds)
    plan = nat.Plan(pairs, delay, int(mib * MIB), repeat, secure=not insecure)
    try:
        nat.scenario(kinds, delay)
    except netlab.ScenarioError as error:
        raise click.UsageError(str(error)) from error

    def told(cell: nat.Cell) -> None:
        if not as_json:
            click.echo(show.nat_cell(cell))

    found: list[nat.Result] = []
    here = machine.Machine.read()

    def measure() -> nat.Result:
        found.append(nat.measure(plan, told))
        return found[0]

    _report("nat", as_json, measure, nat.Result.to_json, lambda result: [])
    if write is not None:
        write.write_text(nat_page.page(found[0], here), encoding="utf-8")
    sys.exit(ExitStatus.OK if all(cell.is_as_expected for cell in found[0].cells) else ExitStatus.WRONG_VALUES)


@bench.command("scale", epilog=EPILOG)
@click.option(
    "--world", "worlds", type=click.IntRange(2, 64), multiple=True, default=scale.Plan().worlds, show_default=True,
    help="Members; repeatable.",
)  # fmt: skip
@click.option(
    "--size", "size_bytes", type=click.IntRange(4, 1 << 24), default=4096, show_default=True, metavar="BYTES",
    help="Of each member's tensor.",
)  # fmt: skip
@_iters(200)
@click.option("--warmup", type=click.IntRange(0, 10_000), default=20, show_default=True, help="Rounds not counted.")
@_AS_JSON
def scale_command(worlds: tuple[int, ...], size_bytes: int, iters: int, warmup: int, as_json: bool) -> None:
    """Time an all-reduce of a small tensor on loopback as the group grows: time, CPU, bytes beside the tensor, what the
    master hears meanwhile, memory of a member.
    """
    plan = scale.Plan(worlds=worlds, size_bytes=size_bytes, operations=iters, warmup=warmup)
    _report("scale", as_json, lambda: scale.measure(plan, _conduct), scale.Result.to_json, show.scale)


@bench.command("topology", epilog=EPILOG)
@click.option(
    "--scenario", "name", default="home", show_default=True, metavar="NAME|FILE", help="See pyccl netlab scenarios."
)
@click.option("--world", type=click.IntRange(2, 64), help="Hosts, a peer on each; as in the scenario unless given.")
@click.option("--seed", type=int, metavar="N", help="Of the losses.")
@_mib("Size of each peer's tensor.", 8)
@_iters(5)
@click.option("--warmup", type=click.IntRange(0, 10_000), default=2, show_default=True, help="Rounds not counted.")
@click.option("--coded", is_flag=True, help="As uint8 codes, all three.")
@_TIMEOUT
@_AS_JSON
def topology_command(
    name: str, world: int | None, seed: int | None, mib: float, iters: int, warmup: int, coded: bool,
    timeout: float | None, as_json: bool,
) -> None:  # fmt: skip
    """Time an all-reduce with equal shares, round an equal ring and by the plan of optimize_topology, and compare the
    last with what the plan predicted and with what the lines allow. Needs root and iproute2.
    """
    try:
        scenario = netlab.load(name).with_options(hosts=world, seed=seed)
    except netlab.ScenarioError as error:
        raise click.UsageError(str(error)) from error
    plan = topology.Plan(
        size_bytes=max(1, int(mib * MIB) // 4) * 4, iterations=iters, warmup=warmup, coded=coded,
        timeout_s=timeout or 0.0,
    )  # fmt: skip

    def measure() -> topology.Result:
        with Children() as children:
            return topology.measure(scenario, plan, children)

    _report("topology", as_json, measure, topology.Result.to_json, show.topology)


@bench.command("kernels")
@_mib("Working set of the measurements from memory.", 64)
@click.option("--dtype", "dtypes", type=click.Choice(kernels.DTYPES), multiple=True, help="Only this one; repeatable.")
@click.option("--op", "ops", type=click.Choice(kernels.OPS), multiple=True, help="Only this one; repeatable.")
@_AS_JSON
def kernels_command(mib: float, dtypes: tuple[str, ...], ops: tuple[str, ...], as_json: bool) -> None:
    """Rates of the element kernels and codecs, one thread, each instruction set that this CPU has; what codecs lose."""
    _report(
        "kernels", as_json,
        lambda: (
            kernels.measure(int(mib * MIB), dtypes or kernels.DTYPES, ops or kernels.OPS), kernels.codec_errors()
        ),
        lambda told: {
            "settings": {"mib": mib}, "unit": "GiB/s of elements", "rates": [rate.to_json() for rate in told[0]],
            "codec_errors": [error.to_json() for error in told[1]],
        },
        lambda told: [*show.kernel_rates(told[0]), *show.codec_errors(told[1])],
    )  # fmt: skip


@bench.command("digest")
@_mib("Size of what is hashed from memory.", 64)
@_AS_JSON
def digest_command(mib: float, as_json: bool) -> None:
    """Rates of the digests of shared state, one thread, and of others to compare with."""
    _report(
        "digest", as_json, lambda: digest.measure(int(mib * MIB)),
        lambda rates: {"settings": {"mib": mib}, "unit": "GiB/s hashed", "rates": [rate.to_json() for rate in rates]},
        show.digest_rates, "xxhash",
    )  # fmt: skip


@bench.command("outer")
@_mib("Size of theta, and of every other vector.", 256)
@_AS_JSON
def outer_command(mib: float, as_json: bool) -> None:
    """Rates of the arithmetic of outer optimizers, one thread, beside a copy of memory."""
    _report(
        "outer", as_json, lambda: outer.measure(int(mib * MIB)),
        lambda rates: {"settings": {"mib": mib}, "unit": "GiB/s moved", "rates": [rate.to_json() for rate in rates]},
        show.outer_rates,
    )  # fmt: skip


@bench.command("join", epilog=EPILOG)
@_world(2, 4, "Members once the newcomer is in.")
@_iters(5)
@_AS_JSON
def join_command(world: int, iters: int, as_json: bool) -> None:
    """Time a newcomer's connect() and first sync of a small state, while the members go on reducing.

    Starting the newcomer's process and its imports are not counted.
    """
    _arrivals("join", churn.ArrivalPlan(world=world, iterations=iters), as_json)


@bench.command("sync", epilog=EPILOG)
@click.option(
    "--world", type=click.IntRange(2, 64),
    help="Members once the newcomer is in; all others hold the state. 4, or as in the scenario, unless given.",
)  # fmt: skip
@_mib("Size of the state.", 128)
@_iters(3)
@click.option(
    "--data", type=click.Choice(tuple(content.KINDS)), default="random", show_default=True,
    help="What the state is made of; all but the first can be packed, weights hardly.",
)  # fmt: skip
@click.option(
    "--scenario", "name", metavar="NAME|FILE",
    help="Over the lines of a lab (pyccl netlab scenarios), newcomers on its last host; needs root and iproute2.",
)  # fmt: skip
@_AS_JSON
def sync_command(world: int | None, mib: float, iters: int, data: str, name: str | None, as_json: bool) -> None:
    """Time the transfer of a state to a newcomer that holds another one, from all members."""
    plan = churn.ArrivalPlan(world=world or 4, iterations=iters, state_bytes=int(mib * MIB), data=data)
    if name is None:
        _arrivals("sync", plan, as_json)
        return
    try:
        scenario = netlab.load(name).with_options(hosts=world)
    except netlab.ScenarioError as error:
        raise click.UsageError(str(error)) from error

    def measure() -> churn.Arrivals:
        with Children() as children:
            return churn.measure_arrivals_in(scenario, plan, children)

    _report("sync", as_json, measure, churn.Arrivals.to_json, lambda result: show.arrivals(result, with_rate=True))


@bench.command("loss", epilog=EPILOG)
@_world(3, 3, "Members before the loss.")
@_mib("Size of the vector that is reduced.", 1)
@_iters(5)
@click.option(
    "--cause", "causes", type=click.Choice(churn.CAUSES), multiple=True,
    help="killed (SIGKILL) or silent (SIGSTOP); both unless given.",
)  # fmt: skip
@click.option(
    "--peer-timeout", type=click.FloatRange(0.5, 60), default=churn.PEER_TIMEOUT_S, show_default=True,
    metavar="SECONDS", callback=_number, help="Silence after which a member counts as dead.",
)  # fmt: skip
@_AS_JSON
def loss_command(
    world: int, mib: float, iters: int, causes: tuple[str, ...], peer_timeout: float, as_json: bool
) -> None:
    """Time the gap that the survivors see when a member is killed, or falls silent."""
    plan = churn.LossPlan(
        world=world, iterations=iters, peer_timeout_s=peer_timeout, vector_bytes=int(mib * MIB),
        causes=tuple(dict.fromkeys(causes)) or churn.CAUSES,
    )  # fmt: skip
    _report(
        "loss", as_json, lambda: _conduct(lambda conductor: churn.measure_losses(plan, conductor)),
        churn.Losses.to_json, show.losses,
    )  # fmt: skip


@bench.command("restart", epilog=EPILOG)
@_world(3, 4, "Members once the newcomer is in.")
@_iters(5)
@click.option(
    "--down", type=click.FloatRange(0, 60), default=1.0, show_default=True, metavar="SECONDS", callback=_number,
    help="Time without a master, and what its start takes.",
)  # fmt: skip
@_AS_JSON
def restart_command(world: int, iters: int, down: float, as_json: bool) -> None:
    """Kill the master of a group that goes on reducing, start it again and time the next join."""
    plan = churn.RestartPlan(world=world, iterations=iters, down_s=down)
    _report(
        "restart", as_json, lambda: _conduct(lambda conductor: churn.measure_restarts(plan, conductor)),
        churn.Restarts.to_json, show.restarts,
    )  # fmt: skip


@bench.command("epoch", epilog=EPILOG)
@click.option("--peers", type=click.IntRange(2, 4000), default=1000, show_default=True, help="Simulated peers.")
@_iters(5)
@_AS_JSON
def epoch_command(peers: int, iters: int, as_json: bool) -> None:
    """Time a change of epoch in a master with many peers, which are simulated: control connections only.

    Groups have 256 members at most; all of them change at the same moment, and then one alone.
    """
    plan = epochs.Plan(peers=peers, iterations=iters)
    _report(
        "epoch", as_json, lambda: _conduct(lambda conductor: epochs.measure(plan, conductor)),
        epochs.Changes.to_json, show.epoch_changes,
    )  # fmt: skip


@bench.command("memory", epilog=EPILOG)
@click.option("--peers", type=click.IntRange(2, 64), default=4, show_default=True, help="Who stay; one comes and goes.")
@click.option(
    "--minutes", type=click.FloatRange(0, 10_000, min_open=True), default=60.0, show_default=True, callback=_number,
    help="Length of the run.",
)  # fmt: skip
@click.option(
    "--warm-up", type=click.FloatRange(0, 10_000), default=10.0, show_default=True, metavar="MINUTES",
    callback=_number, help="At the start, not part of the line.",
)  # fmt: skip
@click.option(
    "--round", "round_s", type=click.FloatRange(0, 60), default=1.0, show_default=True, metavar="SECONDS",
    callback=_number, help="From the start of a round to the next.",
)  # fmt: skip
@click.option(
    "--sample", "sample_s", type=click.FloatRange(0.01, 30), default=5.0, show_default=True, metavar="SECONDS",
    callback=_number, help="Between looks at the memory.",
)  # fmt: skip
@click.option(
    "--passers", type=click.IntRange(0), default=limits.GONE_MAX, show_default=True,
    help="Simulated members that come and leave before: the master remembers so many who are out.",
)  # fmt: skip
@_AS_JSON
def memory_command(
    peers: int, minutes: float, warm_up: float, round_s: float, sample_s: float, passers: int, as_json: bool
) -> None:
    """Watch the memory of a group that reduces, exchanges and synchronises while a peer comes and goes."""
    if warm_up >= minutes:
        raise click.UsageError(f"--warm-up {warm_up:g} leaves nothing of --minutes {minutes:g}")
    plan = memory.Plan(
        peers=peers, minutes=minutes, warm_up_minutes=warm_up, round_s=round_s, sample_s=sample_s,
        away_s=2 * round_s, passers=passers,
    )  # fmt: skip
    _report(
        "memory", as_json, lambda: _conduct(lambda conductor: memory.measure(plan, conductor)),
        memory.Tracks.to_json, show.memory,
    )  # fmt: skip


def _need_torch() -> None:
    if not machine.is_installed("torch"):
        click.echo(f"pyccl bench: {gloo.INSTALL}", err=True)
        sys.exit(ExitStatus.NO_TORCH)


def _arrivals(name: str, plan: churn.ArrivalPlan, as_json: bool) -> None:
    _report(
        name, as_json, lambda: _conduct(lambda conductor: churn.measure_arrivals(plan, conductor)),
        churn.Arrivals.to_json, lambda result: show.arrivals(result, with_rate=name == "sync"),
    )  # fmt: skip


def _conduct(measure: Callable[[Conductor], T]) -> T:
    with Children() as children:
        return measure(Conductor(children))


def _report(
    name: str,
    as_json: bool,
    measure: Callable[[], T],
    to_json: Callable[[T], dict[str, Any]],
    to_lines: Callable[[T], list[str]],
    *packages: str,
) -> None:
    """Tell where it is measured, measure, tell what was found."""
    here, versions, command = machine.Machine.read(), machine.versions(*packages), machine.command()
    if not as_json:
        for line in show.heading(command, here, versions):
            click.echo(line)
    try:
        result = measure()
    except BenchError as error:
        for line in error.details:
            click.echo(line, err=True)
        click.echo(f"pyccl bench {name}: {error}", err=True)
        sys.exit(int(error.status))
    except Interrupted as interrupted:
        click.echo(f"pyccl bench {name}: ended by signal {interrupted.signal_number}", err=True)
        sys.exit(128 + interrupted.signal_number)
    except KeyboardInterrupt:
        sys.exit(INTERRUPT)
    if as_json:
        head = {"bench": name, "command": command, "machine": here.to_json(), "versions": versions}
        click.echo(json.dumps(head | to_json(result)))
        return
    for line in to_lines(result):
        click.echo(line)
