"""``pyccl doctor``: options, printing and exit status; what it looks at is in ``pyccl.doctor``."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from typing import Final

import click
import trio
from rich.console import Console
from rich.text import Text

from pyccl._io.address import VARIABLE, Master, parse_master
from pyccl._io.portmap import open_mapping
from pyccl.cli.hide import hide_invite
from pyccl.cli.log import printable
from pyccl.doctor import machine, network
from pyccl.doctor.finding import EXIT, Finding, Level, worst
from pyccl.errors import UsageError

_STYLES: Final = {Level.OK: "green", Level.NOTE: "cyan", Level.WARNING: "yellow", Level.ERROR: "bold red"}
_EPILOG = """\b
Exit status:
  0  nothing worse than a note
  1  a warning: it works, slowly or not always
  2  bad arguments
  3  an error: taking part does not work from here

Example: pyccl doctor 127.0.0.1:48148
"""


@click.command(epilog=_EPILOG)
@click.argument("master", default="", metavar="[HOST:PORT|INVITE]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--no-port-mapping", is_flag=True, help="Ask no router for a port.")
def doctor(master: str, as_json: bool, no_port_mapping: bool) -> None:
    """Look for what stands in the way of taking part in a run from this machine, and say what to do about it.

    With a master (or an invite in PYCCL_INVITE) also the way to it and back. It joins no run, spends no use of an
    invite, and takes away what it asks a router for.
    """
    hide_invite(master)
    try:
        where: Master | None = parse_master(master or None) if master or os.environ.get(VARIABLE) else None
    except UsageError as e:
        raise click.UsageError(str(e)) from e
    findings = [machine.versions_here(), machine.cpu(), machine.kernels(), *machine.sockets(), machine.identity()]
    library = importlib.metadata.version("pyccl-p2p")
    findings += trio.run(network.look, where, library, None if no_port_mapping else open_mapping)
    if as_json:
        told = [finding.to_json() for finding in findings]
        click.echo(json.dumps({"level": worst(findings).name.lower(), "findings": told}))
    else:
        show(Console(highlight=False), findings)
    sys.exit(EXIT[worst(findings)])


def show(console: Console, findings: list[Finding]) -> None:
    """A line each; under it what to do."""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        line = Text()
        line.append(f"{finding.level.name.lower():<8}", _STYLES[finding.level])
        line.append(f"{finding.name:<{width}}  {printable(finding.text)}")
        console.print(line, soft_wrap=True)
        if finding.advice:
            console.print(Text(f"{'':<8}{'':<{width}}  -> {printable(finding.advice)}", "dim"), soft_wrap=True)
