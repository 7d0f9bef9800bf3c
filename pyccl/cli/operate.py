"""pyccl-master invite, revoke, peers, kick: what the operator of a secure master tells it, over its own port.

They speak as the master's own identity, so they work for whoever can read its file: on its machine, as its user.
"""

from __future__ import annotations

import json
import re
import secrets
import sys
from typing import Any, Final, NoReturn

import click
import trio

from pyccl import errors
from pyccl._io.address import invite_text, join_address, parse_address
from pyccl._io.ask import ask, told
from pyccl._io.identity import Identity
from pyccl._io.tls import Credentials, Ticket
from pyccl._proto import limits
from pyccl._proto.messages import InviteAsk, Invited, Kick, Message, PeersAsk, Revoke
from pyccl.cli.log import printable

EXIT_UNREACHABLE: Final = 3
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_MASTER: Final = click.option(
    "--master", default="127.0.0.1:48148", show_default=True, metavar="HOST:PORT", help="Where the master listens."
)
_TIMEOUT_S: Final = 10.0


class _Span(click.ParamType[int]):
    """"7d", "12h", "90m": seconds."""

    name = "SPAN"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d{1,9})([smhdw])", value)
        seconds = int(found[1]) * _UNITS[found[2]] if found else 0
        if not 1 <= seconds <= limits.INVITE_S_MAX:
            self.fail(f"{value!r} is no time such as 7d, 12h or 90m, of at most {limits.INVITE_S_MAX // 86_400}d")
        return seconds


def _fail(code: int, text: str) -> NoReturn:
    click.echo(printable(f"pyccl-master: {text}"), err=True)
    sys.exit(code)


def _tell(master: str, message: Message) -> tuple[Identity, Message]:
    """The answer."""
    try:
        host, port = parse_address(master)
        identity = Identity.load()
    except errors.UsageError as e:
        _fail(2, str(e))
    credentials = Credentials(identity, secrets.token_bytes(limits.ID_BYTES), Ticket(identity.public, b""))

    async def run() -> Message:
        with trio.fail_after(_TIMEOUT_S):
            return await ask(host, port, credentials, message)

    try:
        return identity, trio.run(run)
    except trio.TooSlowError:
        _fail(EXIT_UNREACHABLE, f"{master} did not answer within {_TIMEOUT_S:g} s")
    except errors.PycclError as e:
        _fail(EXIT_UNREACHABLE, str(e))


@click.command()
@_MASTER
@click.option("--expires", type=_Span(), default="7d", show_default=True, metavar="SPAN", help="When it ends: 90m, 7d.")
@click.option(
    "--uses", type=click.IntRange(1, limits.USES_MAX), metavar="N",
    help="How many identities may come in with it; who comes again does not count again. Default: any number.",
)  # fmt: skip
@click.option("--group", type=click.IntRange(0, limits.U32_MAX), metavar="GROUP", help="For this peer group only.")
@click.option("--label", default="", metavar="NAME", help="For you, in `peers`; at most 32 characters.")
@click.option(
    "--address", metavar="HOST:PORT", help="Where the peers reach the master, if not where this command does."
)
def invite(master: str, expires: int, uses: int | None, group: int | None, label: str, address: str | None) -> None:
    """Print an invite: who has it can join the run. It goes to stdout, its id, for `revoke`, to stderr."""
    if len(label) > limits.LABEL_CHARS_MAX:
        _fail(2, f"--label: more than {limits.LABEL_CHARS_MAX} characters")
    try:
        host, port = parse_address(address or master)
    except errors.UsageError as e:
        _fail(2, str(e))
    identity, answer = _tell(master, InviteAsk(expires, uses or 0, group, label))
    assert isinstance(answer, Invited)
    where = join_address(host, port)
    click.echo(f"invite {answer.invite.hex()}", err=True)
    click.echo(invite_text(where, Ticket(identity.public, answer.token)))


@click.command()
@_MASTER
@click.argument("invite_id", metavar="ID")
def revoke(master: str, invite_id: str) -> None:
    """Let nobody in any more with the invite of this ID. Who is in stays: see kick."""
    if not re.fullmatch(r"[0-9a-fA-F]{16}", invite_id):
        _fail(2, "ID is the 16 digits that `invite` and `peers` show")
    _tell(master, Revoke(bytes.fromhex(invite_id)))
    click.echo(f"revoked {invite_id.lower()}")


@click.command()
@_MASTER
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def peers(master: str, as_json: bool) -> None:
    """List who is connected: peer, identity, address, and the invite they came with."""
    answer = _peers(master)
    if as_json:
        click.echo(json.dumps(answer))
        return
    for peer in answer["peers"]:
        kind = "observer" if peer["observer"] else "peer"
        by = f"invite {peer['invite']} {peer['label']}".rstrip() if peer["invite"] else "no invite"
        click.echo(
            printable(
                f"{kind} {peer['peer']}  identity {peer['identity']}  group {peer['group']}  {peer['address']}  {by}"
            )
        )


@click.command()
@_MASTER
@click.argument("peer")
def kick(master: str, peer: str) -> None:
    """Put PEER, the first digits of its id, out of the run with all peers of its identity, for good."""
    found = sorted(p["peer"] for p in _peers(master)["peers"] if p["peer"].startswith(peer.lower()))
    if len(found) > 1:
        _fail(2, f"{len(found)} peers begin with {peer}: {', '.join(found)}")
    if not found and not re.fullmatch(r"[0-9a-fA-F]{32}", peer):
        _fail(2, f"nobody who is connected begins with {peer}")
    whole = found[0] if found else peer.lower()
    _tell(master, Kick(bytes.fromhex(whole)))
    click.echo(f"kicked {whole}")


def _peers(master: str) -> dict[str, Any]:
    return told(_tell(master, PeersAsk())[1], master)
