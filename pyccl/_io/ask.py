"""Ask a running master for its status: one connection, one question, one answer (proto/wire.md 4, StatusAsk)."""

from __future__ import annotations

import json
from typing import Any

import trio

from pyccl import errors
from pyccl._io import envelope, tls
from pyccl._io.causes import reason_of
from pyccl._io.tls import Credentials
from pyccl._proto import limits
from pyccl._proto.messages import Message, Rejected, Status, StatusAsk


async def ask_status(host: str, port: int, credentials: Credentials | None = None) -> dict[str, Any]:
    """The master's account of its run. MasterUnavailableError, RemoteProtocolError or RejectedError otherwise."""
    return told(await ask(host, port, credentials, StatusAsk(limits.PROTOCOL_VERSION)), f"{host}:{port}")


async def ask(host: str, port: int, credentials: Credentials | None, question: Message) -> Message:
    """The answer, which is not Rejected. Errors as of ``ask_status``."""
    where = f"{host}:{port}"
    try:
        line = await tls.reach(host, port, credentials)
        async with tls.socket_of(line):
            await line.send_all(envelope.pack(question))
            answer = await envelope.receive(line)
    except (OSError, UnicodeError, trio.BrokenResourceError) as e:  # UnicodeError: a name that IDNA refuses
        raise errors.MasterUnavailableError(f"no master answers at {where}: {reason_of(e)}") from e
    except errors.RejectedError as e:
        raise errors.RejectedError(f"{where}: {e}") from e
    except errors.RemoteProtocolError as e:
        raise errors.RemoteProtocolError(f"{where} does not speak pyccl: {e}") from e
    if answer is None:
        raise errors.MasterUnavailableError(f"{where} closed the connection without an answer")
    if isinstance(answer, Rejected):
        raise errors.RejectedError(answer.reason)
    return answer


def told(answer: Message, where: str) -> dict[str, Any]:
    """What a Status tells. RemoteProtocolError: it is none."""
    if not isinstance(answer, Status):
        raise errors.RemoteProtocolError(f"{where} answered with {type(answer).__name__}")
    try:
        plain = json.loads(answer.json)
    except (ValueError, RecursionError) as e:
        raise errors.RemoteProtocolError(f"the status of {where} is no JSON") from e
    if not isinstance(plain, dict):
        raise errors.RemoteProtocolError(f"the status of {where} is no object")
    return plain
