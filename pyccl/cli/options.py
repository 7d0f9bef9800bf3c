"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from pyccl import calls, errors

Command = TypeVar("Command", bound=Callable[..., Any])


RELAY_MAX_BYTES_S: Final = 12_500_000  # 100mbit


def relay_rate(context: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """Bytes per second; 0: no cap."""
    if value is None:
        return None
    if value == "unlimited":
        return 0
    try:
        return calls.rate(option.name or "", value)
    except errors.UsageError as e:
        raise click.BadParameter(str(e)) from e


def relay_cap(*, relay: bool, relay_max: int | None) -> int | None:
    """Of the options: bytes per second, 0 for no cap; None: it does not relay. UsageError: they do not go together."""
    if not relay:
        if relay_max is not None:
            raise errors.UsageError("--relay-max goes with --relay")
        return None
    return RELAY_MAX_BYTES_S if relay_max is None else relay_max


def relay_options(command: Command) -> Command:
    """``--relay`` and ``--relay-max``, for ``relay_cap``."""
    command = click.option(
        "--relay-max", metavar="RATE", callback=relay_rate, default=None,
        help="With --relay: at most so much of it altogether, such as 50mbit, or unlimited. Default: 100mbit.",
    )(command)  # fmt: skip
    return click.option(
        "--relay", is_flag=True,
        help="Carry connections of peers that do not reach each other. In a secure run it can't read them.",
    )(command)  # fmt: skip
