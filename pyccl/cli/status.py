"""``pyccl status``: what a running master knows: groups, epochs, members, who waits for what, last events."""

from __future__ import annotations

import json
import os
import sys
from typing import Any, Final

import click
import trio

from pyccl import errors
from pyccl._io.address import VARIABLE, credentials_for, parse_master
from pyccl._io.ask import ask_status
from pyccl.cli.hide import hide_invite
from pyccl.cli.log import printable

EXIT_UNREACHABLE: Final = 3
_EPILOG = """\b
Exit status:
  0  the master answered
  2  bad arguments
  3  no master answered, or what answered is none

Example: pyccl status 127.0.0.1:48148
"""


@click.command(epilog=_EPILOG)
@click.argument("master", default="", metavar="[HOST:PORT|INVITE]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--timeout", type=click.FloatRange(0.1, 3600), default=5.0, show_default=True, metavar="SECONDS")
def status(master: str, as_json: bool, timeout: float) -> None:
    """Print what a running master knows of its run. Without an argument: the one of the invite in PYCCL_INVITE, or
    127.0.0.1:48148.
    """
    hide_invite(master)
    try:
        where = parse_master(master or (None if os.environ.get(VARIABLE) else "127.0.0.1:48148"))
        credentials = credentials_for(where)
    except errors.UsageError as e:
        raise click.UsageError(str(e)) from e

    async def ask() -> dict[str, Any]:
        with trio.fail_after(timeout):
            return await ask_status(where.host, where.port, credentials)

    try:
        told = trio.run(ask)
    except trio.TooSlowError:
        click.echo(f"pyccl status: {where.address} did not answer within {timeout:g} s", err=True)
        sys.exit(EXIT_UNREACHABLE)
    except errors.PycclError as e:
        click.echo(printable(f"pyccl status: {e}"), err=True)
        sys.exit(EXIT_UNREACHABLE)
    if as_json:
        click.echo(json.dumps(told))
        return
    try:
        lines = describe(told)
    except (KeyError, TypeError, ValueError, AttributeError):
        click.echo(
            f"pyccl status: what {where.address} answers is no status of this version (--json prints it)", err=True
        )
        sys.exit(EXIT_UNREACHABLE)
    for line in lines:
        click.echo(printable(line))


def describe(told: dict[str, Any]) -> list[str]:
    """The status as lines for a person."""
    lines = [f"run {told['run'][:8]}  library {told['library']}  peer timeout {told['peer_timeout_s']:g} s"]
    journal = told["journal"]
    if not journal["kept"]:
        lines.append(
            "no journal: another master at this address continues the run only with --no-journal or --adopt-run, "
            "and only while members live"
        )
    elif journal["error"]:
        lines.append(f"the journal can't be written, {journal['waiting']} decisions wait: {journal['error']}")
    if told["needs_majority"]:
        lines.append("a loss is settled only with more than half of the members, or half and the lowest id")
    if not told["groups"]:
        lines.append("no peer has joined yet")
    for group in told["groups"]:
        lines.append(
            f"group {group['group']}  epoch {group['epoch']}  {len(group['members'])} members, "
            f"{len(group['pending'])} pending"
        )
        lines += [f"  member   {_peer(peer)}" for peer in group["members"]]
        lines += [f"  pending  {_peer(peer)}" for peer in group["pending"]]
        if group["deciding"]:
            lines.append("  its next epoch is decided and waits for the journal")
        if group["ballot"] is not None and group["ballot"]["undecided"]:
            lines.append(f"  can't decide: {group['ballot']['undecided']}")
        for what in ("ballot", "proposal"):
            if group[what] is not None:
                lines.append(f"  {what} waits for {', '.join(group[what]['waits_for']) or 'nobody'}")
    for observer in told["observers"]:
        lines.append(f"observer {observer['peer'][:8]} of group {observer['group']}  {' '.join(observer['addresses'])}")
    lines += [f"gone {peer}: {why}" for peer, why in told["gone"].items()]
    lines += [f"{event['ago_s']:8.1f} s ago  {_event(event)}" for event in told["events"][-10:]]
    return lines


def _peer(peer: dict[str, Any]) -> str:
    notes = [
        "" if peer["connected"] else "no control connection",
        "at the safe point" if peer["at_safe_point"] else "",
        "blocked" if peer["blocked"] else "",
        f"lost: {peer['lost']}" if peer["lost"] else "",
        *(f"complains of {other}: {cause}" for other, cause in peer["complaints"].items()),
        *(f"{path} to {other}" for other, path in peer["paths"].items() if path != "direct"),
    ]
    said = ", ".join(note for note in notes if note)
    return f"{peer['peer'][:8]}  {' '.join(peer['addresses'])}  heard {peer['heard_ago_s']:.1f} s ago  {said}".rstrip()


def _event(event: dict[str, Any]) -> str:
    told = (f"{key}={value}" for key, value in event.items() if key not in ("event", "ago_s") and value != "")
    return " ".join([event["event"], *told])
