"""Meeting: two peers that can't be dialed, each on a connection that it has made to a relay, are joined there.

Whoever comes first waits; the second brings both together. Who is out of the run by then is not joined, and what has
been joined ends with it (``forget``). Spec: proto/wire.md 3.1, 11.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from pyccl._native.handles import Relay, RelayEnd
from pyccl._proto import limits
from pyccl._proto.messages import RelayHello
from pyccl.errors import RemoteProtocolError, UsageError

MEET_S: Final = 4.0
_WAITING_MAX: Final = 256
_OWNED: Final = "this relay carries all that it can, or may of the same owner"

Key = tuple[bytes, bytes, bytes, bytes]
Ready = Callable[[], Awaitable[trio.SocketStream]]


log = logging.getLogger("pyccl.relay")


class NoRoomError(UsageError):
    """The relay carries all that it can, or all that it may of one owner: nothing was sent to either end."""


def owner_of(identity: bytes) -> bytes:
    """As which a relay knows who answers for a peer: an identity's first bytes, which nobody else can have."""
    return identity[: limits.ID_BYTES]


class _Waiter:
    def __init__(self, ready: Ready, owner: bytes, taken: trio.Event) -> None:
        self.ready, self.owner, self.taken, self.over = ready, owner, taken, trio.Event()
        self.refused = False
        self.owners: frozenset[bytes] = frozenset()  # of both ends, while it is being joined


class Meetings:
    """At one relay."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._waiting: dict[Key, _Waiter] = {}
        self._joining: dict[_Waiter, Key] = {}

    async def meet(self, hello: RelayHello, ready: Ready, owner: bytes, met: trio.Event | None = None) -> bool:
        """Stay until the other has come, MEET_S at most; False: it has not.

        ready: makes the sender's end fit to be carried, told that it is. owner: see RelayEnd. met: set when the other
        is here. NoRoomError: of both, where they are too many. FAILURES of dialing.py: the two could not be joined.
        """
        mine = hello.from_peer, hello.from_incarnation, hello.to_peer, hello.to_incarnation
        other = self._waiting.pop((*mine[2:], *mine[:2]), None)
        if other is not None:
            other.taken.set()
            if not self._has_room(hello, owner, other):
                other.refused = True
                other.over.set()
                raise NoRoomError(_OWNED)
            self._joining[other] = mine
            other.owners = _owners(hello, owner, other)
            try:
                await self._join(hello, ready, owner, other)
            finally:
                self._joining.pop(other, None)
                other.over.set()
            return True
        if len(self._waiting) >= _WAITING_MAX or self._relay.pairs() >= Relay.PAIRS_MAX:
            raise NoRoomError("this relay carries all that it can")
        waiter = self._waiting[mine] = _Waiter(ready, owner, trio.Event() if met is None else met)
        try:
            with trio.move_on_after(MEET_S):
                await waiter.taken.wait()
        finally:
            if self._waiting.get(mine) is waiter:
                del self._waiting[mine]
            if waiter.taken.is_set():  # its stream is the other task's until it is over, also if we are cancelled now
                with trio.CancelScope(shield=True):
                    await waiter.over.wait()
        if waiter.refused:
            raise NoRoomError(_OWNED)
        return waiter.taken.is_set()

    def forget(self, peer: bytes) -> None:
        """It is out of the run: nothing of it is carried any more."""
        self._relay.forget(peer)
        self._waiting = {key: waiter for key, waiter in self._waiting.items() if peer not in (key[0], key[2])}
        self._joining = {waiter: key for waiter, key in self._joining.items() if peer not in (key[0], key[2])}

    def _has_room(self, hello: RelayHello, owner: bytes, other: _Waiter) -> bool:
        """Also when all have been joined that are at it."""
        owners = _owners(hello, owner, other)
        coming = sum(not owners.isdisjoint(waiter.owners) for waiter in self._joining)
        ends = RelayEnd(-1, hello.from_peer, owner), RelayEnd(-1, hello.to_peer, other.owner)
        return self._relay.room(*ends) > coming

    async def _join(self, hello: RelayHello, ready: Ready, owner: bytes, other: _Waiter) -> None:
        with trio.fail_after(MEET_S):
            theirs = await other.ready()
            mine = await ready()
        if other not in self._joining:
            raise RemoteProtocolError("one of the two has left the run meanwhile")
        self._relay.add(
            RelayEnd(mine.socket.detach(), hello.from_peer, owner),
            RelayEnd(theirs.socket.detach(), hello.to_peer, other.owner),
        )
        log.info("relays from=%s to=%s", hello.from_peer.hex()[:8], hello.to_peer.hex()[:8])


def _owners(hello: RelayHello, owner: bytes, other: _Waiter) -> frozenset[bytes]:
    return frozenset((owner or hello.from_peer, other.owner or hello.to_peer))
