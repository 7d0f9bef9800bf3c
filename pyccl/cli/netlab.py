"""``pyccl netlab``: labs of long lines on this machine; what they are and do is in ``pyccl.netlab``."""

from __future__ import annotations

import enum
import json
import math
import shlex
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final, TypeVar

import click

from pyccl import units
from pyccl.bench.show import columns
from pyccl.netlab import check, run, scenario
from pyccl.netlab.cover import cover
from pyccl.netlab.emulator import Counts
from pyccl.netlab.lab import Lab
from pyccl.netlab.scenario import Scenario, ScenarioError
from pyccl.processes.namespace import NetworkError

T = TypeVar("T")


class ExitStatus(enum.IntEnum):
    OK = 0
    FAILED = 1
    ARGUMENTS = 2
    NO_LAB = 3
    TIME = 124


EPILOG: Final = """\b
Exit status:
  0    done: every command ended with 0, every check passed
  1    a command ended with something else, a check failed
  2    bad arguments, or a wrong scenario
  3    no lab can be built here: no rights (it needs root), no iproute2, no nftables
  124  the time limit was reached
"""
INTERRUPT: Final = 130


@click.group(epilog=EPILOG)
def netlab() -> None:
    """Labs of hosts, routers and long lines in network namespaces: delay, loss, rates, queues, caps of TCP flows.

    SCENARIO is the name of one that comes with pyccl, or the path of a TOML file. Every host is a network namespace of
    its own; what they send to each other goes through a line emulator of ours, packet by packet of 1500 bytes. A lab
    ends with the command that built it, and all processes in it, whatever ends the command. Needs root and iproute2.

    In a file, a host may stand behind a router that translates or filters: nat = "full_cone", "port_restricted",
    "symmetric", "upnp", "double" or "firewall", alone or with others in one `lan`, and have IPv6. Routers need
    nftables, "upnp" miniupnpd too.
    """


def _scenario(function: Callable[..., None]) -> Callable[..., None]:
    options = [
        click.argument("name", metavar="SCENARIO"),
        click.option("--rate", metavar="RATE", help="Of every host's line, both ways: 400mbit."),
        click.option("--delay", metavar="TIME", help="One way between any two hosts: 75ms."),
        click.option("--loss", type=float, metavar="SHARE", help="Of the packets between any two hosts: 1e-4."),
        click.option("--hosts", type=int, metavar="N", help="So many in all; the number of the first kind changes."),
        click.option("--seed", type=int, metavar="N", help="Of the losses."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def _load(name: str, **options: Any) -> Scenario:
    try:
        return scenario.load(name).with_options(**options)
    except ScenarioError as error:
        raise click.UsageError(str(error)) from error


@netlab.command("scenarios")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def scenarios_command(as_json: bool) -> None:
    """List the scenarios that come with pyccl."""
    found = [scenario.load(name) for name in scenario.names()]
    if as_json:
        click.echo(json.dumps({one.name: one.description for one in found}))
        return
    width = max(len(one.name) for one in found)
    for one in found:
        click.echo(f"{one.name:<{width}}  {len(one.hosts)} hosts. {one.description}")


@netlab.command("check", epilog=EPILOG)
@_scenario
def check_command(
    name: str, rate: str | None, delay: str | None, loss: float | None, hosts: int | None, seed: int | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Build the lab and measure whether it is what was asked for.

    From each host to the next: the round trip of the best of 20 pings, the share of lost packets, what UDP gets through
    a line that is offered more than it carries, and what one plain TCP connection reaches (which is the kernel's
    business, so only more than the line carries is wrong). UDP between other hosts, too, until each direction of each
    line and link was the narrowest on a way, and segments of one TCP flow where a cap of flows is; what is nowhere the
    narrowest is named, and not measured. Some seconds for each host, and one or two for each way more. Lines are
    measured, so routers (`nat`) are left out.
    """
    asked = _load(name, rate=rate, delay=delay, loss=loss, hosts=hosts, seed=seed)
    lines = asked.without_nat()
    ways = cover(lines)

    def measure() -> tuple[list[check.Finding], Counts]:
        with Lab(lines) as lab:
            found = list(check.check(lab, ways))
            return found, lab.counts()

    found, counts = _in_lab(measure)
    if as_json:
        told = [finding.to_json() for finding in found]
        hidden = [one.to_json() for one in ways.hidden]
        click.echo(json.dumps({"scenario": asked.name, "findings": told, "hidden": hidden, "lines": asdict(counts)}))
    else:
        rows = [["", "from", "to", "asked", "found", ""]]
        rows += [_row(finding) for finding in found]
        for line, finding in zip(columns(rows), [None, *found], strict=True):
            click.echo(f"{line}   {finding.note}" if finding is not None else line)
        for one in ways.hidden:
            what = f"{one.name} of {units.show_rate(one.rate)} is the narrowest on no way"
            click.echo(f"Not measured: {what}; one host gets at most {units.show_rate(one.at_most)} there")
        click.echo(f"This machine: {counts.punctuality()}")
    sys.exit(ExitStatus.OK if all(finding.passed for finding in found) else ExitStatus.FAILED)


def _row(finding: check.Finding) -> list[str]:
    def show(value: float | None) -> str:
        if value is None:
            return "-"
        if finding.what is check.What.ROUND_TRIP:
            return f"{value:.2f} ms"
        if finding.what is check.What.LOSS:
            return f"{value:.3g}"
        return units.show_rate(round(value)) if math.isfinite(value) and value >= 1 else "0"

    verdict = "ok" if finding.passed else "WRONG"
    return [finding.what, finding.source, finding.target, show(finding.asked), show(finding.found), verdict]


@netlab.command("run", epilog=EPILOG, context_settings={"ignore_unknown_options": True})
@_scenario
@click.option(
    "--time-limit", type=click.FloatRange(0, min_open=True), metavar="SECONDS", help="Kill what still runs after it."
)
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
def run_command(
    name: str, rate: str | None, delay: str | None, loss: float | None, hosts: int | None, seed: int | None,
    as_json: bool, time_limit: float | None, argv: tuple[str, ...],
) -> None:  # fmt: skip
    """Build the lab and run COMMAND on every host at once.

    It finds in its environment NETLAB_HOST (name), NETLAB_RANK (0, 1, ...), NETLAB_WORLD (how many), NETLAB_ADDRESS
    (its own), NETLAB_ADDRESSES (all, by commas), NETLAB_MASTER (that of rank 0) and NETLAB_SCENARIO. Its lines are
    printed behind its host's name. Example:

    \b
      pyccl netlab run pacific -- sh -c 'test $NETLAB_RANK = 0 && exec iperf3 -s -1 || exec iperf3 -c $NETLAB_MASTER'
    """
    asked = _load(name, rate=rate, delay=delay, loss=loss, hosts=hosts, seed=seed)
    lock = threading.Lock()

    def printed(host: str, line: str, is_error: bool) -> None:
        if not as_json:
            with lock:
                click.echo(f"[{host}] {line}", err=is_error)

    result = _in_lab(lambda: run.run(asked, argv, time_limit, printed))
    if as_json:
        click.echo(json.dumps(result.to_json()))
    else:
        for host in result.hosts:
            if host.status != 0:
                how = "ran into the time limit" if host.status is None else f"ended with {host.status}"
                click.echo(f"[{host.host}] {shlex.join(argv)} {how}", err=True)
    if result.timed_out:
        sys.exit(ExitStatus.TIME)
    sys.exit(ExitStatus.OK if result.succeeded else ExitStatus.FAILED)


def _in_lab(measure: Callable[[], T]) -> T:
    try:
        return measure()
    except NetworkError as error:
        click.echo(f"pyccl netlab: {error}", err=True)
        sys.exit(ExitStatus.NO_LAB)
    except KeyboardInterrupt:
        sys.exit(INTERRUPT)
