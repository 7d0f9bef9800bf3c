"""pyccl-peer: hold the shared state of a group on disk. Configuration and printing; what it does is Observer's."""

from __future__ import annotations

import importlib.metadata
import logging
import signal
import sys
from pathlib import Path
from typing import Final

import click
import trio

from pyccl import errors
from pyccl._io.address import credentials_for, parse_master, reach_of
from pyccl._io.observer import Observer, ObserverConfig
from pyccl._io.statestore import StateStore, StoreError, held
from pyccl._proto import limits
from pyccl.cli import log as logs
from pyccl.cli.hide import hide_invite
from pyccl.cli.options import relay_cap, relay_options

EXIT_ARGUMENTS: Final = 2
EXIT_REJECTED: Final = 3
EXIT_DIRECTORY: Final = 4

log = logging.getLogger("pyccl.peer")

_EPILOG = """
\b
Exit status:
  0  stopped by SIGTERM or Ctrl-C
  2  bad arguments
  3  the master refuses it, or what answers there is no master
  4  the directory can't be used: another process has it, or it can't be written
\b
It takes no part in collectives and is no member. The directory holds safetensors files, which
pyccl.SharedState.load reads; give each group and each training job a directory of its own.
\b
Example: pyccl-peer 127.0.0.1:48148 --dir /var/lib/pyccl/run1 --keep 5 --every 10
"""


def _fail(code: int, text: str) -> None:
    click.echo(f"pyccl-peer: {text}", err=True)
    sys.exit(code)


def _say(line: str) -> None:
    click.echo(line)
    sys.stdout.flush()


def _open_store(directory: Path, keep: int) -> StateStore:
    try:
        return StateStore(directory, keep)
    except (StoreError, OSError) as e:
        _fail(EXIT_DIRECTORY, str(e))
        raise AssertionError from e  # _fail does not return


async def _observe(config: ObserverConfig, store: StateStore) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        _say(f"holding {held(store)}")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Observer(config, store, _say).run)
            async for number in signals:
                log.info("stopped signal=%s", signal.Signals(number).name)
                nursery.cancel_scope.cancel()
                break


def _run(config: ObserverConfig, store: StateStore) -> None:
    """trio.run, whose nurseries wrap what leaves them."""
    try:
        trio.run(_observe, config, store)
    except* errors.RejectedError as group:
        _fail(EXIT_REJECTED, f"the master refuses: {_first(group)}")
    except* errors.RemoteProtocolError as group:
        _fail(EXIT_REJECTED, f"{config.host}:{config.port} does not speak pyccl: {_first(group)}")


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@click.command(epilog=_EPILOG, context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]})
@click.argument("master", required=False)
@click.option(
    "--dir", "directory", required=True, type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
    help="Where the states are kept; made if it does not exist. Damaged files in it are set aside.",
)  # fmt: skip
@click.option(
    "--keep", type=click.IntRange(1, 1_000_000), default=3, show_default=True, metavar="N",
    help="How many states: the last that came, and in any case the newest revision.",
)  # fmt: skip
@click.option(
    "--every", type=click.IntRange(1), default=1, show_default=True, metavar="REVISIONS",
    help="Keep a state when it is so many revisions newer than the last one.",
)  # fmt: skip
@click.option(
    "--group", type=click.IntRange(0, limits.U32_MAX), default=0, show_default=True, metavar="GROUP",
    help="Peer group whose state it is.",
)  # fmt: skip
@relay_options
@click.option(
    "--listen", metavar="HOST:PORT",
    help="Where members are accepted: an address of this machine, :PORT for all of them. Default: a free port.",
)  # fmt: skip
@click.option(
    "--advertise", metavar="HOST:PORT", multiple=True,
    help="Where members reach it, if it can't find that out itself. May be given several times.",
)  # fmt: skip
@click.option("--log-level", type=click.Choice(logs.LEVELS), default="info", show_default=True)
@click.version_option(package_name="pyccl-p2p", prog_name="pyccl-peer")
def main(
    master: str | None,
    directory: Path,
    keep: int,
    every: int,
    group: int,
    relay: bool,
    relay_max: int | None,
    listen: str | None,
    advertise: tuple[str, ...],
    log_level: str,
) -> None:
    """Hold the shared state of a run on disk, and give it to peers that come back when nobody else has it.

    MASTER is the address of pyccl-master, HOST:PORT, or an invite; without it, the invite in PYCCL_INVITE, which, other
    than an argument, nobody else on this machine can read. It reconnects by itself, and goes on where it was when
    restarted.
    """
    logs.configure(log_level)
    hide_invite(master)
    try:
        where = parse_master(master)
        credentials = credentials_for(where)
        reach = reach_of(listen, advertise, "auto")
        relay_at_most = relay_cap(relay=relay, relay_max=relay_max)
    except errors.UsageError as e:
        _fail(EXIT_ARGUMENTS, str(e))
    store = _open_store(directory, keep)
    try:
        _run(
            ObserverConfig(
                *(where.host, where.port, group, every, importlib.metadata.version("pyccl-p2p"), credentials),
                *(reach, relay_at_most),
            ),
            store,
        )
    finally:
        store.close()


if __name__ == "__main__":
    main()
