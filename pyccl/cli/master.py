"""pyccl-master: keep the member list of one run. Configuration and printing; the rules are MasterMachine's."""

from __future__ import annotations

import errno
import importlib.metadata
import ipaddress
import logging
import os
import resource
import secrets
import signal
import socket
import sys
from pathlib import Path
from typing import Final

import click
import trio

from pyccl._io.journal import Journal, JournalError
from pyccl._io.master_server import CONNECTIONS_MAX, MasterServer
from pyccl._proto import limits
from pyccl._proto.past import NONCE_BITS, Began, Past, make_term, start_of
from pyccl.cli import log as logs

EXIT_ARGUMENTS: Final = 2
EXIT_ADDRESS: Final = 3
EXIT_JOURNAL: Final = 4
_OTHER_FILES: Final = 64  # descriptors that are no connections

log = logging.getLogger("pyccl.master")

_EPILOG = """
\b
Exit status:
  0  stopped by SIGTERM or Ctrl-C
  2  bad arguments
  3  the address is in use or can't be bound
  4  the journal can't be used: another master has it, it is damaged, or it can't be written
\b
The journal is what lets a new master continue the run of one that died: the same command again, on the same
machine. Without --journal it is $XDG_STATE_HOME/pyccl/master-HOST-PORT.journal (~/.local/state by default), and
none for port 0, to which nobody can come back. With --no-journal a master goes on after a loss only with more than
half of the members (of two halves: the one with the lowest peer id), and one that starts anew takes over the run of
the members that connect, on the same terms.
\b
Example: pyccl-master --listen 127.0.0.1:48148
"""


def _fail(code: int, text: str) -> None:
    click.echo(f"pyccl-master: {text}", err=True)
    sys.exit(code)


def _parse_listen(text: str) -> tuple[str, int]:
    host, separator, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isdigit() or int(port) > limits.PORT_MAX:
        raise click.BadParameter(f"{text!r} is not HOST:PORT with a port of 0..65535")
    return host, int(port)


def _resolve(host: str, port: int) -> tuple[int, tuple[str, int]]:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as e:
        _fail(EXIT_ARGUMENTS, f"--listen {host}:{port}: {e.strerror}")
        raise AssertionError from e  # _fail does not return
    return family, (str(address[0]), port)


async def _listen(family: int, address: tuple[str, int]) -> trio.SocketListener:
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await sock.bind(address)
        sock.listen(1024)
    except OSError as e:
        sock.close()
        cause = "the address is in use" if e.errno == errno.EADDRINUSE else str(e.strerror)
        _fail(EXIT_ADDRESS, f"--listen {address[0]}:{address[1]}: {cause}")
    return trio.SocketListener(sock)


def _connections_max() -> int:
    """As many as the system lets us have open: more than the soft limit, which is meant for programs that select()."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS_MAX + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return CONNECTIONS_MAX if soft == resource.RLIM_INFINITY else max(1, min(CONNECTIONS_MAX, soft - _OTHER_FILES))


def _default_journal(host: str, port: int) -> Path:
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    name = "".join(c if c.isalnum() or c in "-." else "_" for c in host)
    return state / "pyccl" / f"master-{name}-{port}.journal"


def _open_journal(path: Path, new_run: bool, adopt_run: bool) -> tuple[Past, Journal]:
    """The run it holds, or a new one; this start is in it when this returns."""
    try:
        journal = Journal.open(path, forget=new_run)
        if adopt_run and journal.past is not None and journal.past.groups:
            raise JournalError(f"{path}: it holds run {journal.past.run.hex()}; --adopt-run needs a new journal")
        if journal.past is None:
            journal.begin(_new_past())
        else:
            journal.append([Began(_next_term(journal.past.term))])
    except (JournalError, OSError) as e:
        _fail(EXIT_JOURNAL, str(e) if isinstance(e, JournalError) else f"--journal {path}: {e.strerror}")
        raise AssertionError from e  # _fail does not return
    past = journal.past
    assert past is not None
    members = sum(len(g.commit.epoch.members) for g in past.groups.values() if g.commit is not None)
    log.info("journal path=%s run=%s start=%d members=%d", path, past.run.hex(), start_of(past.term), members)
    return past, journal


def _new_past() -> Past:
    return Past(secrets.token_bytes(limits.ID_BYTES), _next_term(0))


def _next_term(term: int) -> int:
    return make_term(start_of(term) + 1, secrets.randbits(NONCE_BITS))


async def _serve(family: int, address: tuple[str, int], server: MasterServer) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        listener = await _listen(family, address)
        host, port = listener.socket.getsockname()[:2]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve, listener)
            click.echo(f"listening on {f'[{host}]' if ':' in host else host}:{port}")
            sys.stdout.flush()
            async for number in signals:
                log.info("stopped signal=%s", signal.Signals(number).name)
                nursery.cancel_scope.cancel()
                break


@click.command(epilog=_EPILOG, context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]})
@click.option(
    "--listen", default="127.0.0.1:48148", show_default=True, metavar="HOST:PORT",
    help="Address for control connections; port 0 takes a free one. The address is printed on stdout.",
)  # fmt: skip
@click.option(
    "--peer-timeout", type=click.FloatRange(0.5, 300), default=5.0, show_default=True, metavar="SECONDS",
    help="Silence after which a peer counts as dead, 0.5 to 300.",
)  # fmt: skip
@click.option(
    "--journal", "journal_path", type=click.Path(dir_okay=False, path_type=Path), metavar="PATH",
    help="File that keeps what must outlive this process; made if it does not exist. Default: see below.",
)  # fmt: skip
@click.option("--no-journal", is_flag=True, help="Keep none: see below what that costs.")
@click.option(
    "--new-run", is_flag=True,
    help="Forget the run in the journal and start another. Peers that are still in it must connect anew.",
)  # fmt: skip
@click.option(
    "--adopt-run", is_flag=True,
    help="The journal is lost: take over the run of the members that connect, and found none before. Only when no "
    "other master keeps that run: two of them would split it.",
)  # fmt: skip
@click.option("--log-level", type=click.Choice(logs.LEVELS), default="info", show_default=True)
@click.option(
    "--insecure", is_flag=True,
    help="Listen on an address that is not loopback: nothing is encrypted or authenticated in this version.",
)  # fmt: skip
@click.version_option(package_name="pyccl-p2p", prog_name="pyccl-master")
def main(
    listen: str,
    peer_timeout: float,
    journal_path: Path | None,
    no_journal: bool,
    new_run: bool,
    adopt_run: bool,
    log_level: str,
    insecure: bool,
) -> None:
    """Keep the member list of one run; open its epochs and settle what a lost peer left open.

    Carries no tensor data. Peers connect with pyccl.connect("HOST:PORT").
    """
    logs.configure(log_level)
    host, port = _parse_listen(listen)
    family, address = _resolve(host, port)
    if not ipaddress.ip_address(address[0].partition("%")[0]).is_loopback:
        if not insecure:
            _fail(
                EXIT_ARGUMENTS,
                f"--listen {listen}: not a loopback address, and this version can't encrypt or authenticate; "
                "--insecure listens there all the same",
            )
        log.warning("insecure listen=%s: anybody who can reach this address can join the run and read its data", listen)
    if no_journal and journal_path is not None:
        _fail(EXIT_ARGUMENTS, "--journal and --no-journal exclude each other")
    if adopt_run and new_run:
        _fail(EXIT_ARGUMENTS, "--adopt-run and --new-run exclude each other")
    past, journal = _new_past(), None
    if journal_path is not None or (port and not no_journal):
        past, journal = _open_journal(journal_path or _default_journal(host, port), new_run, adopt_run)
    elif no_journal:
        log.warning(
            "no_journal: this master goes on after a loss only with more than half of the members, and one that is "
            "started after it knows nothing but what they tell"
        )
    else:
        log.info("no_journal: nobody can come back to port 0; give --journal to keep the run when this process ends")
    server = MasterServer(
        past,
        journal,
        peer_timeout,
        importlib.metadata.version("pyccl-p2p"),
        connections_max=_connections_max(),
        needs_majority=no_journal,
        adopts=adopt_run or no_journal,
    )
    trio.run(_serve, family, address, server)


if __name__ == "__main__":
    main()
