"""Ask a running master for its status: one connection, one question, one answer (proto/wire.md 4, StatusAsk)."""

from __future__ import annotations

import json
from typing import Any

import trio

from pyccl import errors
from pyccl._io import envelope
from pyccl._io.causes import reason_of
from pyccl._proto import limits
from pyccl._proto.messages import Rejected, Status, StatusAsk


async def ask_status(host: str, port: int) -> dict[str, Any]:
    """The master's account of its run. MasterUnavailableError, RemoteProtocolError or RejectedError otherwise."""
    where = f"{host}:{port}"
    try:
        async with await trio.open_tcp_stream(host, port) as stream:
            await stream.send_all(envelope.pack(StatusAsk(limits.PROTOCOL_VERSION)))
            answer = await envelope.receive(stream)
    except (OSError, UnicodeError, trio.BrokenResourceError) as e:  # UnicodeError: a name that IDNA refuses
        raise errors.MasterUnavailableError(f"no master answers at {where}: {reason_of(e)}") from e
    except errors.RemoteProtocolError as e:
        raise errors.RemoteProtocolError(f"{where} does not speak pyccl: {e}") from e
    if answer is None:
        raise errors.MasterUnavailableError(f"{where} closed the connection without an answer")
    if isinstance(answer, Rejected):
        raise errors.RejectedError(answer.reason)
    if not isinstance(answer, Status):
        raise errors.RemoteProtocolError(f"{where} answered with {type(answer).__name__}")
    try:
        told = json.loads(answer.json)
    except (ValueError, RecursionError) as e:
        raise errors.RemoteProtocolError(f"the status of {where} is no JSON") from e
    if not isinstance(told, dict):
        raise errors.RemoteProtocolError(f"the status of {where} is no object")
    return told
