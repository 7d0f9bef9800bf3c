"""``pyccl stress``: options, screen, reports and exit status of the churn harness; the rest is `pyccl.stress`."""

from __future__ import annotations

import enum
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

import pyccl
from pyccl.bench import machine
from pyccl.processes.children import Children, Interrupted
from pyccl.processes.namespace import NetworkError
from pyccl.stress import report
from pyccl.stress.conductor import HANG_TIMEOUTS_MIN, TRACE_LINES, Conductor, Plan
from pyccl.stress.directory import own_directory
from pyccl.stress.faults import HEALTHY_LEFT, KINDS, Fault, FaultsError, choose
from pyccl.stress.namespaces import Namespaces
from pyccl.stress.network import Loopback, Network
from pyccl.stress.peer import CANARIES
from pyccl.stress.show import open_screen

EPILOG: Final = f"""\b
Exit status:
  0  no violation and no hang
  1  internal error
  2  bad arguments
  3  a value, a digest, a revision or an error was not as it must be, or a process crashed
  4  something hung
  128 + n  ended by signal n (Ctrl-C: 130)
\b
Faults: {", ".join(KINDS)}
\b
Example: pyccl stress --no-netns --peers 8 --minutes 30 --report churn
"""


EXIT_ARGUMENTS: Final = 2


class ExitStatus(enum.IntEnum):
    OK = 0
    VIOLATIONS = 3
    HANG = 4


def _names(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip()) if value else ()


@click.command(epilog=EPILOG)
@click.option(
    "--peers", type=click.IntRange(HEALTHY_LEFT + 1, 64), default=Plan.peers, show_default=True,
    help="Processes to keep up.",
)  # fmt: skip
@click.option(
    "--minutes", type=click.FloatRange(0, 60 * 24 * 7, min_open=True), default=Plan.minutes, show_default=True,
    help="How long faults go on.",
)  # fmt: skip
@click.option(
    "--fault-every", type=click.FloatRange(0.01, 3600), default=Plan.fault_every_s, show_default=True,
    metavar="SECONDS", help="Mean time between faults.",
)  # fmt: skip
@click.option("--faults", callback=_names, metavar="NAME,NAME...", help="Only these faults; all unless given.")
@click.option("--seed", type=click.IntRange(0), default=Plan.seed, show_default=True, help="Of faults and inputs.")
@click.option(
    "--peer-timeout", type=click.FloatRange(0.5, 60), default=Plan.peer_timeout_s, show_default=True,
    metavar="SECONDS", help="Silence after which the master counts a peer as dead.",
)  # fmt: skip
@click.option(
    "--calm", type=click.FloatRange(0.5, 3600), default=Plan.calm_s, show_default=True, metavar="SECONDS",
    help="Without faults, at first, to compare with.",
)  # fmt: skip
@click.option(
    "--hang", type=click.FloatRange(1, 3600), default=Plan.hang_s, show_default=True, metavar="SECONDS",
    help="So long without progress is a hang; at least six peer timeouts.",
)  # fmt: skip
@click.option(
    "--report", "report_path", type=click.Path(path_type=Path), metavar="PATH",
    help="Write PATH.json, PATH.png and PATH.log: what masters logged, and the peers there at the end.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, the rest on stderr.")
@click.option("--no-netns", is_flag=True, help="Plain loopback: no network namespaces and no faults that need them.")
@click.option("--canary", type=click.Choice(CANARIES), help="Peers do this wrong: the run must fail.")
def stress(
    peers: int,
    minutes: float,
    fault_every: float,
    faults: tuple[str, ...],
    seed: int,
    peer_timeout: float,
    calm: float,
    hang: float,
    report_path: Path | None,
    as_json: bool,
    no_netns: bool,
    canary: str | None,
) -> None:
    """Break a run on purpose, again and again, and check every value.

    A master and peers as processes of this machine reduce, exchange and advance a shared state, while faults drawn from
    the seed hit them. Every result is compared with the reference, every digest with the one that must come out.
    """
    try:
        kinds = choose(faults, links=not no_netns)
    except FaultsError as error:
        raise click.UsageError(f"--faults: {error}") from error
    save = None if report_path is None else _saver(report_path)
    plan = Plan(
        peers=peers, minutes=minutes, fault_every_s=fault_every, seed=seed, peer_timeout_s=peer_timeout, calm_s=calm,
        hang_s=max(hang, HANG_TIMEOUTS_MIN * peer_timeout), canary=canary or "",
    )  # fmt: skip
    network = _open_network(no_netns)
    try:
        conductor = _conduct(plan, kinds, network, as_json)
    finally:
        network.close()
    record, oracle = conductor.record, conductor.oracle
    for line in report.lines(record, oracle, seed):
        click.echo(line, err=as_json)
    # python -m stress.churn has no word of its own on the command line.
    arguments = sys.argv[2:] if sys.argv[1:2] == ["stress"] else sys.argv[1:]
    told = {
        "command": shlex.join(["pyccl", "stress", *arguments]), "version": pyccl.__version__, "seed": seed,
        "machine": machine.Machine.read().to_json(), "settings": vars(plan),
        "network": network.name, "kinds": record.kinds, **record.to_json(oracle),
    }  # fmt: skip
    if as_json:
        click.echo(json.dumps(told))
    if save is not None:
        save(conductor, told)
    sys.exit(int(_status(conductor)))


def _open_network(no_netns: bool) -> Network:
    if no_netns:
        return Loopback()
    try:
        return Namespaces()
    except NetworkError as error:
        raise click.UsageError(f"{error}: namespaces need root; --no-netns runs on plain loopback") from error


def _status(conductor: Conductor) -> ExitStatus:
    kinds = {violation.kind for violation in conductor.oracle.violations}
    if kinds - {"hang"}:
        return ExitStatus.VIOLATIONS
    return ExitStatus.HANG if kinds else ExitStatus.OK


def _saver(path: Path) -> Callable[[Conductor, dict[str, Any]], None]:
    """Refuse before the run what would fail after it."""
    base = path / "stress" if path.is_dir() else path.with_suffix("") if path.suffix in (".json", ".png") else path
    if not base.absolute().parent.is_dir():
        raise click.UsageError(f"--report: there is no directory {base.absolute().parent}")
    try:
        from pyccl.stress import plot  # noqa: PLC0415  matplotlib is optional
    except ImportError as error:
        raise click.UsageError(f"--report needs matplotlib: pip install matplotlib ({error})") from error

    def save(conductor: Conductor, told: dict[str, Any]) -> None:
        plan, record = conductor.plan, conductor.record
        title = f"pyccl stress: {plan.peers} peers, {len(record.faults)} faults, seed {plan.seed}"
        Path(f"{base}.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        plot.save(record, conductor.oracle, title, Path(f"{base}.png"))
        logged = [f"== {name}\n" + "\n".join(lines) for name, lines in record.traces.items()]
        Path(f"{base}.log").write_text("\n".join(logged) + "\n", encoding="utf-8")

    return save


def _conduct(plan: Plan, kinds: list[type[Fault]], network: Network, as_json: bool) -> Conductor:
    stream = sys.stderr if as_json else sys.stdout
    try:
        with (
            own_directory() as directory,
            open_screen(stream) as screen,
            Children(TRACE_LINES) as children,
        ):
            conductor = Conductor(plan, kinds, network, screen, children, directory)
            conductor.execute()
    except FaultsError as error:
        click.echo(f"pyccl stress: {error}", err=True)
        sys.exit(EXIT_ARGUMENTS)
    except Interrupted as interrupted:
        click.echo(f"pyccl stress: ended by signal {interrupted.signal_number}", err=True)
        sys.exit(128 + interrupted.signal_number)
    return conductor
