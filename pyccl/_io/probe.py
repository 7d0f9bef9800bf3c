"""How a master sees who asks: from where they come, whether they are reached there. Both sides.

A master dials nobody but who asks, at the address from which they ask, a few at a time, and sends nothing there: it is
no way to make it scan or flood others. It may ask members to do the same. Spec: proto/wire.md 12.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from pyccl._io import envelope, tls
from pyccl._io.causes import reason_of
from pyccl._io.dialing import connect_to
from pyccl._io.interfaces import canonical
from pyccl._io.tls import Credentials, Line
from pyccl._proto import limits
from pyccl._proto.messages import DialTold, Message, Probe, Probed, Rejected, clip
from pyccl.errors import MasterUnavailableError, RejectedError, RemoteProtocolError

DIALS_MAX: Final = 8  # at a time, of one master; who comes beyond is told so

AskMembers = Callable[[str, int], Awaitable[tuple[DialTold, ...]]]


@dataclass(frozen=True, slots=True)
class Seen:
    """An answer of a master.

    local: our end of the connection. connect_s: of TCP, one round trip. offset_s: its clock minus ours, within error_s.
    peers: of members that tried, too: by id why they did not reach us; "": they did.
    """

    local: tuple[str, int]
    observed: tuple[str, int]
    connect_s: float
    offset_s: float
    error_s: float
    reached: bool
    reason: str
    peers: dict[str, str] = field(default_factory=dict)


class Prober:
    """Of a master. ask_members: has members dial, within limits.DIAL_TOLD_S. clock: the time of day, seconds."""

    def __init__(self, ask_members: AskMembers, clock: Callable[[], float] = time.time) -> None:
        self._ask_members, self._clock, self._dials = ask_members, clock, 0

    async def answer(self, stream: trio.SocketStream, probe: Probe) -> Message:
        """Within limits.DIAL_TOLD_S. OSError: the connection that asks is gone."""
        if probe.version != limits.PROTOCOL_VERSION:
            return Rejected(f"protocol version {probe.version}; this master speaks {limits.PROTOCOL_VERSION}")
        host, port = stream.socket.getpeername()[:2]
        reason = "no port was named"
        peers: tuple[DialTold, ...] = ()
        if probe.port and self._dials >= DIALS_MAX:
            reason = f"{self._dials} others are being tried: ask again"
        elif probe.port:
            self._dials += 1
            try:
                reason, peers = await self._tried(host, probe.port)
            finally:
                self._dials -= 1
        return Probed(host, port, int(self._clock() * 1000), not reason, clip(reason), peers)

    async def _tried(self, host: str, port: int) -> tuple[str, tuple[DialTold, ...]]:
        """By us, and by members meanwhile."""
        peers: tuple[DialTold, ...] = ()

        async def by_members() -> None:
            nonlocal peers
            peers = await self._ask_members(canonical(host), port)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(by_members)
            reason = await dial(host, port)
        return reason, peers


async def dial(host: str, port: int, allowed: Callable[[str], bool] = lambda _: True) -> str:
    """Why it can't be connected to; "": it can. allowed: as of ``connect_to``."""
    if not 1 <= port <= limits.PORT_MAX:  # the system would take it modulo 65,536, or not at all
        return "there is no such port"
    try:
        with trio.fail_after(limits.DIAL_BACK_S):
            await trio.aclose_forcefully(await connect_to(host, port, allowed=allowed))
    except trio.TooSlowError:
        return f"no answer within {limits.DIAL_BACK_S:g} s"
    except (OSError, UnicodeError) as e:
        return reason_of(e)
    return ""


async def probe(
    host: str, port: int, credentials: Credentials | None, back: int = 0, clock: Callable[[], float] = time.time
) -> Seen:
    """Ask a master. back: a port of ours that it shall connect to; 0: none.

    MasterUnavailableError: none answers. RejectedError: it refuses. RemoteProtocolError: it is none.
    """
    where = f"{host}:{port}"
    try:
        started_s = trio.current_time()
        with trio.fail_after(limits.DIAL_BACK_S):  # for the round trip alone; a handshake and its work come after it
            await trio.aclose_forcefully(await trio.open_tcp_stream(host, port))
        connect_s = trio.current_time() - started_s
        line = await tls.reach(host, port, credentials)
        async with tls.socket_of(line):
            return await _asked(line, back, connect_s, clock)
    except trio.TooSlowError as e:
        raise MasterUnavailableError(f"no master answers at {where}: no answer within {limits.DIAL_BACK_S:g} s") from e
    except (OSError, UnicodeError, trio.BrokenResourceError) as e:
        raise MasterUnavailableError(f"no master answers at {where}: {reason_of(e)}") from e


async def _asked(line: Line, back: int, connect_s: float, clock: Callable[[], float]) -> Seen:
    sent_s, sent_at_s = trio.current_time(), clock()
    await line.send_all(envelope.pack(Probe(limits.PROTOCOL_VERSION, back)))
    answer = await envelope.receive(line, limits.BODY_GREETING_MAX_BYTES)
    took_s = trio.current_time() - sent_s
    if isinstance(answer, Rejected):
        raise RejectedError(answer.reason)
    if not isinstance(answer, Probed):
        raise RemoteProtocolError(f"no Probed, but {type(answer).__name__}")
    host, port = tls.socket_of(line).socket.getsockname()[:2]
    # Its clock was read when the answer left, half a round trip ago.
    offset_s = answer.time_ms / 1000 - (sent_at_s + took_s - connect_s / 2)
    observed = _canonical(answer.host), answer.port
    peers = {told.peer.hex(): told.reason for told in answer.peers}
    local = _canonical(host), port
    return Seen(local, observed, connect_s, offset_s, connect_s / 2, answer.reached, answer.reason, peers)


def _canonical(host: str) -> str:
    """An IPv4 address of a dual-stack socket as such. RemoteProtocolError: no address."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError as e:
        raise RemoteProtocolError("an observed host that is no address") from e
    mapped = address.ipv4_mapped if address.version == 6 else None
    return str(mapped or address)
