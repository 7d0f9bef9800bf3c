"""State files between members and observers, whole, over a connection of their own: served here, asked for here.

    StateHello(have, every) -> StateOffer, the file's bytes, StateOffer, ... | StateNone | PeerRefused
    every 0: what there is, once. Else whenever there is something so many revisions newer; StateNone meanwhile

A server reads from an open file, whose bytes go from the page cache to the socket (sendfile), so it needs no memory;
which file that is may change while it is being sent. In a secure run both sides prove who they are, and what is sent
is sealed, a record at a time, under new keys in each epoch. Who receives checks the whole file, so a source is believed
nothing. Neither side waits for the other one's next byte for ever: SILENCE_S, and a least pace. Spec: proto/wire.md 7.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from typing import Final

import trio

from pyccl._io import agreement, envelope, sealed
from pyccl._io.dialing import connect
from pyccl._io.sealed import Channel, SealedStream
from pyccl._io.strangers import Places, origin
from pyccl._io.tls import Credentials
from pyccl._proto import limits, restoring
from pyccl._proto.epoch import Member
from pyccl._proto.messages import PeerOffer, PeerRefused, StateHello, StateNone, StateOffer
from pyccl.errors import RemoteProtocolError

STILL_S: Final = 5.0  # between two StateNone to who follows
SILENCE_S: Final = 3 * STILL_S  # of a source, or of who receives
STORING_S: Final = 1800.0  # of a follower: it reads nothing while it checks a file and puts it on its disk
_KNOWN_S: Final = 10.0  # until the master has told of who asks
_CONNECT_S: Final = 5.0
_EARLY_MAX: Final = 64  # who ask, and the master has not told of them yet, or they have not proven who they are
_SERVING_MAX: Final = 32  # peers; each has one connection
_PIECE_BYTES: Final = 256 << 10
_LEAST_BYTES: Final = 1 << 20  # in each _SPAN_S; 17 KiB/s
_SPAN_S: Final = 60.0
_SHORTER: Final = "a state file became shorter while it was served"


class OpenFile:
    """A descriptor that several tasks and threads use; closed with the last reference to this."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


class Snapshot(OpenFile):
    """A whole state file."""

    def __init__(self, fd: int, revision: int, layout: bytes) -> None:
        super().__init__(fd)
        self.revision, self.layout = revision, layout
        self.size_bytes = os.fstat(fd).st_size


class Pace:
    """At least `least_bytes` move in each `span_s`, or TooSlowError: who trickles is no better than who is silent."""

    def __init__(self, least_bytes: int = _LEAST_BYTES, span_s: float = _SPAN_S) -> None:
        self._least_bytes, self._span_s = least_bytes, span_s
        self._since, self._bytes = trio.current_time(), 0

    def moved(self, size_bytes: int) -> None:
        self._bytes += size_bytes
        now = trio.current_time()
        if now - self._since < self._span_s:
            return
        if self._bytes < self._least_bytes:
            raise trio.TooSlowError(f"{self._bytes} bytes in {now - self._since:.0f} s")
        self._since, self._bytes = now, 0


class _Follower:
    """epoch: in which the keys of its connection were made."""

    def __init__(self, channel: Channel, hello: StateHello, epoch: int) -> None:
        self.channel, self._epoch = channel, epoch
        self.have, self.every = hello.have, hello.every  # have: also what it is receiving
        self._renewal: agreement.Renewal | None = None
        self._renewed = trio.Event()

    def wants(self, revision: int) -> bool:
        return restoring.wants(self.have, self.every, revision)

    async def enter(self, epoch: int) -> None:
        """Whatever is sent from here on is sealed with keys that were made in this epoch, or a later one."""
        if epoch == self._epoch or not isinstance(self.channel, SealedStream):
            return
        self._epoch, self._renewal, self._renewed = epoch, agreement.Renewal(), trio.Event()
        with trio.fail_after(SILENCE_S):
            await self.channel.send_all(envelope.pack(self._renewal.offer))
        with trio.fail_after(STORING_S):
            await self._renewed.wait()

    async def hear(self, scope: trio.CancelScope) -> None:
        """Its part of new keys, and then its end: nothing else is to come from it."""
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, RemoteProtocolError):
            while await self._is_renewed():
                pass
        scope.cancel()

    async def _is_renewed(self) -> bool:
        answer = await envelope.receive(self.channel, limits.BODY_GREETING_MAX_BYTES)
        renewal, self._renewal = self._renewal, None
        if renewal is None or not isinstance(answer, PeerOffer) or not isinstance(self.channel, SealedStream):
            return False
        renewal.use(self.channel, answer)
        self._renewed.set()
        return True


class StateServer:
    """Gives the newest snapshot to those peers that the master has named.

    drops: a snapshot is kept only while somebody follows. sent: called when one was sent whole, or could not be read.
    credentials: of a secure run, where who asks has to prove who it is.
    """

    def __init__(
        self,
        run: Callable[[], bytes | None],
        peer: bytes,
        incarnation: bytes,
        *,
        drops: bool,
        sent: Callable[[], None] = lambda: None,
        credentials: Credentials | None = None,
    ) -> None:
        self._run, self._me, self._drops, self._sent = run, (peer, incarnation), drops, sent
        self._credentials = credentials
        self._early = Places(_EARLY_MAX, _KNOWN_S)
        self._serving: dict[bytes, trio.CancelScope] = {}  # by peer: the newest of each
        self._known: frozenset[tuple[bytes, bytes]] = frozenset()
        self._changed, self._offered = trio.Event(), trio.Event()
        self._snapshot: Snapshot | None = None
        self._epoch = 0
        self._followers: set[_Follower] = set()

    def know(self, members: Iterable[Member]) -> None:
        """Whom to serve."""
        self._known = frozenset((member.peer, member.incarnation) for member in members)
        self._changed.set()
        self._changed = trio.Event()

    def wants(self, revision: int) -> bool:
        """Whether a follower waits for a snapshot of this revision, or will when it has what it is receiving: it may be
        the last one. Any thread."""
        return any(follower.wants(revision) for follower in tuple(self._followers))

    def offer(self, snapshot: Snapshot | None) -> None:
        """In place of the one before, whoever has not had that. None: nothing."""
        self._snapshot = snapshot
        self._offered.set()
        self._offered = trio.Event()

    def enter(self, epoch: int) -> None:
        """An epoch has begun: who follows gets new keys before anything else."""
        self._epoch = epoch
        self._offered.set()
        self._offered = trio.Event()

    async def serve(self, stream: trio.SocketStream, hello: StateHello) -> None:
        """One connection, to its end. OSError, trio.TooSlowError, trio.BrokenResourceError, RemoteProtocolError."""
        epoch = self._epoch
        channel: Channel | None = None
        reason = self._reason_to_refuse(hello)
        if not reason:
            reason = "the master has not told of you"
            with self._early.place(origin(stream)):
                while (hello.from_peer, hello.from_incarnation) not in self._known:
                    await self._changed.wait()
                others = len(self._serving.keys() - {hello.from_peer})
                reason = f"{others} others are served"
                if others < _SERVING_MAX:  # those who prove themselves meanwhile have bounded places, too
                    reason = "you did not prove in time who you are"
                    channel = await self._proven(stream, hello)
        if channel is None:
            await stream.send_all(envelope.pack(PeerRefused(reason)))
            return
        follower = _Follower(channel, hello, epoch)
        broken: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follower.hear, nursery.cancel_scope)
            if (older := self._serving.get(hello.from_peer)) is not None:
                older.cancel()
            self._serving[hello.from_peer] = nursery.cancel_scope
            if hello.every:
                self._followers.add(follower)
            try:
                while await self._next(follower) or hello.every:
                    pass
            except (OSError, trio.TooSlowError, trio.BrokenResourceError) as e:
                broken = e  # raised outside: a nursery wraps what leaves it
            finally:
                if self._serving.get(hello.from_peer) is nursery.cancel_scope:
                    del self._serving[hello.from_peer]
                self._followers.discard(follower)
                if self._drops and not self._followers:
                    self._snapshot = None
                nursery.cancel_scope.cancel()
        if broken is not None:
            raise broken

    async def _proven(self, stream: trio.SocketStream, hello: StateHello) -> Channel:
        if self._credentials is None:
            return stream
        return SealedStream(stream, await agreement.accept(stream, hello, hello.from_peer, self._credentials))

    def _reason_to_refuse(self, hello: StateHello) -> str:
        if hello.version != limits.PROTOCOL_VERSION:
            return f"protocol version {hello.version}; this peer speaks {limits.PROTOCOL_VERSION}"
        if hello.run != self._run() or (hello.to_peer, hello.to_incarnation) != self._me:
            return "you look for somebody else"
        return ""

    async def _next(self, follower: _Follower) -> bool:
        """False: there was nothing."""
        channel = follower.channel
        await follower.enter(self._epoch)
        snapshot, offered = self._snapshot, self._offered
        if snapshot is not None and follower.wants(snapshot.revision):
            follower.have = snapshot.revision + 1
            with trio.fail_after(SILENCE_S):
                offer = StateOffer(snapshot.revision, snapshot.size_bytes, snapshot.layout)
                await channel.send_all(envelope.pack(offer))
            try:
                await send_file(channel, snapshot, Pace())
            except ConnectionError:
                raise
            except OSError:
                self._sent()
                raise
            self._sent()
            return True
        with trio.fail_after(SILENCE_S):
            await channel.send_all(envelope.pack(StateNone()))
        if follower.every:
            with trio.move_on_after(STILL_S):
                await offered.wait()
        return False


async def send_file(channel: Channel, snapshot: Snapshot, pace: Pace) -> None:
    """All of its bytes. OSError, trio.TooSlowError, trio.BrokenResourceError."""
    if isinstance(channel, SealedStream):
        await _seal_file(channel, snapshot, pace)
    else:
        await _copy_file(channel, snapshot, pace)


async def _seal_file(channel: SealedStream, snapshot: Snapshot, pace: Pace) -> None:
    for at in range(0, snapshot.size_bytes, sealed.PLAIN_MAX):
        size = min(sealed.PLAIN_MAX, snapshot.size_bytes - at)
        part = os.pread(snapshot.fd, size, at)
        if len(part) < size:
            raise OSError(_SHORTER)
        with trio.fail_after(SILENCE_S):
            await channel.send_all(part)
        pace.moved(size)


async def _copy_file(stream: trio.SocketStream, snapshot: Snapshot, pace: Pace) -> None:
    at = 0
    while at < snapshot.size_bytes:
        try:
            sent = os.sendfile(stream.socket.fileno(), snapshot.fd, at, min(_PIECE_BYTES, snapshot.size_bytes - at))
        except BlockingIOError:
            with trio.fail_after(SILENCE_S):
                await trio.lowlevel.wait_writable(stream.socket)
            continue
        if sent == 0:
            raise OSError(_SHORTER)
        at += sent
        pace.moved(sent)
        if at < snapshot.size_bytes:  # who has it all may be gone at once: no reason to cancel who sent it
            await trio.lowlevel.checkpoint()


# ---- asking


async def ask(
    run: bytes, me: Member, source: Member, have: int = 0, every: int = 0, credentials: Credentials | None = None
) -> Channel:
    """A connection to `source` on which its offers come. credentials: of a secure run.

    OSError, trio.BrokenResourceError, trio.TooSlowError. RemoteProtocolError: it refuses, or is not that peer.
    """
    with trio.fail_after(_CONNECT_S):
        stream = await connect(source, me)
    hello = StateHello(
        *(limits.PROTOCOL_VERSION, run, me.peer, me.incarnation, source.peer, source.incarnation), *(have, every)
    )
    try:
        if credentials is None:
            await stream.send_all(envelope.pack(hello))
            return stream
        with trio.fail_after(SILENCE_S):
            keys = await agreement.dial(stream, hello, source.peer, credentials)
        if isinstance(keys, str):
            raise RemoteProtocolError(f"no state from there: {keys}")
        return SealedStream(stream, keys)
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise


async def next_offer(stream: Channel, patience_s: float = SILENCE_S) -> StateOffer | None:
    """None: nothing (more) for now. RemoteProtocolError: it refuses, ends or breaks the protocol."""
    with trio.fail_after(patience_s):
        message = await envelope.receive(stream, limits.BODY_GREETING_MAX_BYTES)
        while isinstance(message, PeerOffer) and isinstance(stream, SealedStream):
            await agreement.answer_renewal(stream, message)
            message = await envelope.receive(stream, limits.BODY_GREETING_MAX_BYTES)
    if isinstance(message, StateOffer):
        return message
    if isinstance(message, StateNone):
        return None
    reason = message.reason if isinstance(message, PeerRefused) else "it closed the connection"
    raise RemoteProtocolError(f"no state from there: {reason}")


async def receive_file(stream: trio.abc.ReceiveStream, offer: StateOffer, fd: int) -> None:
    """The bytes behind an offer, into an empty file whose space is taken first. trio.TooSlowError, OSError,
    RemoteProtocolError."""
    pace = Pace()
    if offer.size_bytes:
        os.posix_fallocate(fd, 0, offer.size_bytes)
    left = offer.size_bytes
    while left:
        with trio.fail_after(SILENCE_S):
            part = await stream.receive_some(min(_PIECE_BYTES, left))
        if not part:
            raise RemoteProtocolError(f"the source ended {left} bytes before the end of its state")
        left -= len(part)
        pace.moved(len(part))
        rest = memoryview(part)
        while rest:
            rest = rest[os.write(fd, rest) :]
