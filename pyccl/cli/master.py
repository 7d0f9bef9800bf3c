"""pyccl-master: keep the member list of one run. Configuration and printing; the rules are MasterMachine's."""

from __future__ import annotations

import errno
import importlib.metadata
import ipaddress
import logging
import resource
import secrets
import signal
import socket
import sys
from typing import Final

import click
import trio

from pyccl._io.master_server import CONNECTIONS_MAX, MasterServer
from pyccl._proto import limits
from pyccl.cli import log as logs

EXIT_ARGUMENTS: Final = 2
EXIT_ADDRESS: Final = 3
_OTHER_FILES: Final = 64  # descriptors that are no connections

log = logging.getLogger("pyccl.master")

_EPILOG = """
\b
Exit status:
  0  stopped by SIGTERM or Ctrl-C
  2  bad arguments
  3  the address is in use or can't be bound
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


async def _serve(family: int, address: tuple[str, int], peer_timeout: float) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        listener = await _listen(family, address)
        host, port = listener.socket.getsockname()[:2]
        version = importlib.metadata.version("pyccl-p2p")
        server = MasterServer(secrets.token_bytes(16), peer_timeout, version, _connections_max())
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
@click.option("--log-level", type=click.Choice(logs.LEVELS), default="info", show_default=True)
@click.option(
    "--insecure", is_flag=True,
    help="Listen on an address that is not loopback: nothing is encrypted or authenticated in this version.",
)  # fmt: skip
@click.version_option(package_name="pyccl-p2p", prog_name="pyccl-master")
def main(listen: str, peer_timeout: float, log_level: str, insecure: bool) -> None:
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
    trio.run(_serve, family, address, peer_timeout)


if __name__ == "__main__":
    main()
