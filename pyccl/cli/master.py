"""pyccl-master: keep the member list of one run. Configuration and printing; the rules are MasterMachine's."""

from __future__ import annotations

import errno
import importlib.metadata
import ipaddress
import itertools
import logging
import math
import os
import resource
import secrets
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

import click
import trio

from pyccl import errors
from pyccl._io.address import join_address, shown
from pyccl._io.identity import Identity, short
from pyccl._io.journal import Journal, JournalError
from pyccl._io.master_server import BESIDE_MAX, CONNECTIONS_MAX, TRIES_PER_LINE, WRITE_AGAIN_S, MasterServer
from pyccl._native.handles import Relay
from pyccl._proto import limits
from pyccl._proto.past import NONCE_BITS, Began, Past, make_term, start_of
from pyccl.cli import log as logs
from pyccl.cli.operate import invite, kick, peers, revoke
from pyccl.cli.options import relay_cap, relay_options

EXIT_ARGUMENTS: Final = 2
EXIT_ADDRESS: Final = 3
EXIT_JOURNAL: Final = 4
_OTHER_FILES: Final = 64 + BESIDE_MAX  # descriptors beside those of connections that have said what they want

log = logging.getLogger("pyccl.master")


@dataclass(frozen=True)
class _Options:
    peer_timeout: float
    journal: Path | None
    new_run: bool
    adopt_run: bool
    needs_majority: bool
    identity: Identity | None  # secure; None: plain
    remote: bool
    relay_max: int | None  # bytes per second; 0: no cap; None: it does not relay


_EPILOG = """
\b
Exit status:
  0  stopped by SIGTERM or Ctrl-C
  2  bad arguments
  3  the address is in use or can't be bound
  4  the journal can't be used: another master has it, it is damaged, another version's, or can't be made
\b
A journal that holds a run and can't be written, as on a full disk, is tried again until it can; nobody can connect
until then.
\b
The journal is what lets a new master continue the run of one that died: the same command again, on the same
machine. Without --journal it is $XDG_STATE_HOME/pyccl/master-HOST-PORT.journal (~/.local/state by default), and
none for port 0, to which nobody can come back. With --no-journal a master goes on after a loss only with more than
half of the members (of two halves: the one with the lowest peer id), and one that starts anew takes over the run of
the members that connect, on the same terms; a secure one only what its identity has signed.
\b
Example: pyccl-master --listen 127.0.0.1:48148
"""


def _fail(code: int, text: str) -> NoReturn:
    click.echo(f"pyccl-master: {text}", err=True)
    sys.exit(code)


def _parse_listen(text: str) -> tuple[str, int]:
    host, separator, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isdigit() or int(port) > limits.PORT_MAX:
        raise click.BadParameter(f"{shown(text)} is not HOST:PORT with a port of 0..65535")
    return host, int(port)


def _resolve(host: str, port: int) -> tuple[int, tuple[str, int]]:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as e:
        _fail(EXIT_ARGUMENTS, f"--listen {host}:{port}: {e.strerror}")
    return family, (str(address[0]), port)


async def _bind(family: int, address: tuple[str, int]) -> trio.socket.SocketType:
    """It is ours, and nobody can connect yet."""
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await sock.bind(address)
    except OSError as e:
        _fail_address(sock, address, e)
    return sock


def _listen(sock: trio.socket.SocketType, address: tuple[str, int]) -> trio.SocketListener:
    try:
        sock.listen(1024)
    except OSError as e:
        _fail_address(sock, address, e)
    return trio.SocketListener(sock)


def _fail_address(sock: trio.socket.SocketType, address: tuple[str, int], error: OSError) -> NoReturn:
    sock.close()
    cause = "the address is in use" if error.errno == errno.EADDRINUSE else str(error.strerror)
    _fail(EXIT_ADDRESS, f"--listen {address[0]}:{address[1]}: {cause}")


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


def _open_journal(path: Path, new_run: bool, adopt_run: bool) -> Journal:
    """The run it holds, or a new one."""
    try:
        journal = Journal.open(path, forget=new_run)
        if adopt_run and journal.past is not None and journal.past.groups:
            raise JournalError(f"{path}: it holds run {journal.past.run.hex()}; --adopt-run needs a new journal")
        if journal.past is None:
            journal.begin(_new_past())
    except (JournalError, OSError) as e:
        _fail(EXIT_JOURNAL, str(e) if isinstance(e, JournalError) else f"--journal {path}: {e.strerror}")
    return journal


async def _begin_term(journal: Journal, stopped: Callable[[float], Awaitable[bool]]) -> bool:
    """Write this start into the journal, again and again until it is durable; False: stopped meanwhile.

    A full disk may have been what the master before met, too, and the members of its run wait for one that can write.
    """
    assert journal.past is not None
    began = Began(_next_term(journal.past.term))
    for tries in itertools.count():
        try:
            journal.append([began])
        except OSError as e:
            if tries % TRIES_PER_LINE == 0:
                log.error("journal_failed path=%s cause=%s next=try_again: no connections until then", journal.path, e)
        else:
            _log_journal(journal.path, journal.past)
            return True
        if await stopped(WRITE_AGAIN_S):
            return False
    raise AssertionError("it counts for ever")


def _log_journal(path: Path, past: Past) -> None:
    members = sum(len(g.commit.epoch.members) for g in past.groups.values() if g.commit is not None)
    log.info("journal path=%s run=%s start=%d members=%d", path, past.run.hex(), start_of(past.term), members)


def _identity() -> Identity:
    try:
        return Identity.load()
    except errors.UsageError as e:
        _fail(EXIT_ARGUMENTS, str(e))


def _new_past() -> Past:
    return Past(secrets.token_bytes(limits.ID_BYTES), _next_term(0))


def _next_term(term: int) -> int:
    return make_term(start_of(term) + 1, secrets.randbits(NONCE_BITS))


async def _serve(family: int, address: tuple[str, int], options: _Options) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:

        async def stopped(within_s: float) -> bool:
            with trio.move_on_after(within_s):
                log.info("stopped signal=%s", signal.Signals(await anext(signals)).name)
                return True
            return False

        sock = await _bind(family, address)
        journal = None
        if options.journal is not None:
            journal = _open_journal(options.journal, options.new_run, options.adopt_run)
            if not await _begin_term(journal, stopped):
                return
        server = MasterServer(
            _new_past() if journal is None or journal.past is None else journal.past,
            journal,
            options.peer_timeout,
            importlib.metadata.version("pyccl-p2p"),
            connections_max=_connections_max(),
            needs_majority=options.needs_majority,
            adopts=options.adopt_run or options.needs_majority,
            identity=options.identity,
            remote=options.remote,
            relay=None if options.relay_max is None else Relay(options.peer_timeout, options.relay_max),
        )
        listener = _listen(sock, address)
        host, port = listener.socket.getsockname()[:2]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve, listener)
            click.echo(f"listening on {join_address(host, port)}")
            if options.identity is not None:
                log.info("secure identity=%s next=pyccl-master invite", short(options.identity.public))
            sys.stdout.flush()
            await stopped(math.inf)
            nursery.cancel_scope.cancel()


@click.group(
    epilog=_EPILOG, invoke_without_command=True, subcommand_metavar="[COMMAND [ARGS]...]",
    context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
)  # fmt: skip
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
    "--secure", is_flag=True,
    help="Take encrypted connections with an invite only, on loopback, too; elsewhere it is the default.",
)  # fmt: skip
@click.option(
    "--insecure", is_flag=True,
    help="On an address that is not loopback: encrypt nothing, and let everybody in who can reach it.",
)  # fmt: skip
@relay_options
@click.version_option(package_name="pyccl-p2p", prog_name="pyccl-master")
@click.pass_context
def main(
    context: click.Context,
    listen: str,
    peer_timeout: float,
    journal_path: Path | None,
    no_journal: bool,
    new_run: bool,
    adopt_run: bool,
    log_level: str,
    secure: bool,
    insecure: bool,
    relay: bool,
    relay_max: int | None,
) -> None:
    """Keep the member list of one run; open its epochs and settle what a lost peer left open.

    Carries no tensor data. On loopback peers connect with pyccl.connect("HOST:PORT"); elsewhere with an invite, which
    `pyccl-master invite` prints. The commands are for the operator, on the machine of a master that runs.
    """
    if context.invoked_subcommand is not None:
        return
    logs.configure(log_level)
    host, port = _parse_listen(listen)
    family, address = _resolve(host, port)
    is_loopback = ipaddress.ip_address(address[0].partition("%")[0]).is_loopback
    if secure and insecure:
        _fail(EXIT_ARGUMENTS, "--secure and --insecure exclude each other")
    if insecure and not is_loopback:
        log.warning("insecure listen=%s: anybody who can reach this address can join the run and read its data", listen)
    identity = _identity() if secure or not (is_loopback or insecure) else None
    if no_journal and journal_path is not None:
        _fail(EXIT_ARGUMENTS, "--journal and --no-journal exclude each other")
    if adopt_run and new_run:
        _fail(EXIT_ARGUMENTS, "--adopt-run and --new-run exclude each other")
    path = journal_path or (_default_journal(host, port) if port and not no_journal else None)
    if no_journal:
        log.warning(
            "no_journal: this master goes on after a loss only with more than half of the members, and one that is "
            "started after it knows nothing but what they tell"
        )
    elif path is None:
        log.info("no_journal: nobody can come back to port 0; give --journal to keep the run when this process ends")
    if identity is not None and path is None:
        log.warning("no_journal: a master started later knows neither uses of invites nor who was revoked or kicked")
    try:
        relay_at_most = relay_cap(relay=relay, relay_max=relay_max)
    except errors.UsageError as e:
        _fail(EXIT_ARGUMENTS, str(e))
    options = _Options(
        *(peer_timeout, path, new_run, adopt_run, no_journal, identity),
        *(not is_loopback, relay_at_most),
    )
    trio.run(_serve, family, address, options)


for command in (invite, revoke, peers, kick):
    main.add_command(command)


if __name__ == "__main__":
    main()
