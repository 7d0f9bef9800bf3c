"""TCP connections to peers: to whichever of their addresses answers first, from a port of choice where that counts."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Final, TypeVar

import trio

from pyccl._io.causes import causes_of
from pyccl._proto.candidates import may_reach, ordered
from pyccl._proto.epoch import Address, Member
from pyccl.errors import PycclError

DIAL_S: Final = 5.0
HEAD_START_S: Final = 0.15  # of one address before the next

T = TypeVar("T")
FAILURES: Final = (OSError, UnicodeError, trio.TooSlowError, trio.BrokenResourceError, PycclError)


class NotTakenError(Exception):
    """Who answers there does not take the connection."""


def new_socket(family: int) -> trio.socket.SocketType:
    """A TCP socket with CUBIC from before the handshake: one that started with BBR paces for ever.

    Where the handshake shows a long line, the engine turns BBR on.
    """
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    with contextlib.suppress(OSError):  # a kernel without CUBIC works as well
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
    return sock


def share_port(sock: trio.socket.SocketType) -> None:
    """A router maps a port of ours to one of its own: connections from it to several hosts share that mapping."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


async def connect_to(
    host: str, port: int, *, shared_port: int | None = None, allowed: Callable[[str], bool] = lambda _: True
) -> trio.SocketStream:
    """A connection to the first of the host's addresses that takes one, each within its part of the time to dial.

    shared_port: from this port of ours, which other connections may share; 0: a new one. allowed: whether an address
    may be dialed; a name may mean any.
    """
    found = [at for at in await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM) if allowed(str(at[4][0]))]
    if not found:
        raise OSError(f"{host}: no address of it may be dialed")
    failed: list[OSError] = []
    for family, _, _, _, address in found:
        sock = new_socket(family)
        try:
            if shared_port is not None:
                share_port(sock)
                await sock.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", shared_port))
            with trio.fail_after(DIAL_S / (len(found) + 1)):
                await sock.connect(address)
            return trio.SocketStream(sock)
        except (OSError, trio.TooSlowError) as e:
            sock.close()
            failed.append(e if isinstance(e, OSError) else TimeoutError(f"no answer from {address[0]}"))
        except BaseException:
            sock.close()
            raise
    try:
        if len(failed) == 1:
            raise failed[0]
        raise OSError(f"{host}: no address of it takes a connection") from ExceptionGroup(host, failed)
    finally:
        failed.clear()  # or the exception holds this frame, which holds it, until garbage is collected


async def connect(theirs: Member, mine: Member) -> trio.SocketStream:
    """A TCP connection to the first address of theirs that answers; whoever that may be."""
    return await first_of(ordered(theirs, mine), partial(connect_at, theirs, mine), lambda s: s.socket.close())


async def connect_at(theirs: Member, mine: Member, at: Address) -> trio.SocketStream:
    """To one of their addresses, if it is one that we may dial."""
    return await connect_to(at.host, at.port, allowed=lambda host: may_reach(host, theirs, mine))


async def first_of(
    addresses: Iterable[Address], attempt: Callable[[Address], Awaitable[T]], discard: Callable[[T], object]
) -> T:
    """What the first attempt gives that does not fail. The next begins HEAD_START_S later, or when the one before has
    failed. discard: what comes too late.

    ConnectionRefusedError: all were refused. OSError: one was not, or there is none.
    """
    found: list[T] = []
    failed: list[OSError] = []

    async def one(address: Address, over: trio.Event) -> None:
        try:
            got = await attempt(address)
        except (*FAILURES, NotTakenError) as e:
            failed.append(_as_os_error(e, address))
        else:
            if found:
                discard(got)
            else:
                found.append(got)
                nursery.cancel_scope.cancel()
        finally:
            over.set()

    try:
        async with trio.open_nursery() as nursery:
            for address in addresses:
                over = trio.Event()
                nursery.start_soon(one, address, over)
                with trio.move_on_after(HEAD_START_S):
                    await over.wait()
    except BaseException:
        for got in found:
            discard(got)
        raise
    if found:
        return found[0]
    error = OSError("the peer names no address that may be dialed")
    if failed:
        others = [e for e in failed if not isinstance(e, ConnectionRefusedError)]
        error = (others or failed)[-1]
    try:
        raise error
    finally:
        del error  # as above
        failed.clear()
        others = []


def _as_os_error(error: BaseException, address: Address) -> OSError:
    if isinstance(error, OSError):
        refused = all(isinstance(cause, ConnectionRefusedError) for cause in causes_of(error))
        return ConnectionRefusedError(str(error)) if refused else error
    if isinstance(error, UnicodeError):  # a name that IDNA refuses: foreign text, and no OSError
        return OSError(f"{address.host!r} is no name of a host: {error}")
    return OSError(f"{address.host}:{address.port}: {str(error) or type(error).__name__}")
