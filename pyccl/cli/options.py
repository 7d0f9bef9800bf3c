"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from pyccl import calls, errors

Command = TypeVar("Command", bound=Callable[..., Any])


def relay_rate(context: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """Bytes per second."""
    if value is None:
        return None
    try:
        return calls.rate(option.name or "", value)
    except errors.UsageError as e:
        raise click.BadParameter(str(e)) from e


def relay_options(command: Command) -> Command:
    """``--relay`` and ``--relay-max``, in bytes per second."""
    command = click.option(
        "--relay-max", metavar="RATE", callback=relay_rate, default=None,
        help="With --relay: at most so much of it altogether, such as 100mbit. Default: no cap.",
    )(command)  # fmt: skip
    return click.option(
        "--relay", is_flag=True,
        help="Carry connections of peers that do not reach each other. In a secure run it can't read them.",
    )(command)  # fmt: skip
