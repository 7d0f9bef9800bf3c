"""State files over a connection, and the directory they end in: only whole ones count, whoever serves or asks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import trio
from listeners import SEEN, listen
from trio.testing import MockClock, memory_stream_one_way_pair, wait_all_tasks_blocked

import pyccl
from pyccl._io import agreement, envelope, statestream
from pyccl._io.identity import Identity
from pyccl._io.sealed import Channel, SealedStream
from pyccl._io.statestore import StateStore, StoreError, opened, whole
from pyccl._io.statestream import Snapshot, StateServer
from pyccl._io.tls import Credentials, Ticket
from pyccl._proto import limits
from pyccl._proto.epoch import Address, Member
from pyccl._proto.messages import Message, PeerOffer, PeerRefused, StateHello, StateNone, StateOffer
from pyccl.errors import RemoteProtocolError, StateFileError

RUN = b"R" * 16
SERVER, ASKER = (b"s" * 16, b"S" * 16), Member(b"a" * 16, b"A" * 16, seen=SEEN)
HANG_S = 30.0


def state(revision: int, size: int = 3_000_000) -> pyccl.SharedState:
    return pyccl.SharedState({"w": np.random.default_rng(revision).integers(0, 256, size, np.uint8)}, revision)


def snapshot(tmp_path: Path, revision: int) -> Snapshot:
    path = tmp_path / f"snapshot-{revision}"
    state(revision).save(path)
    return opened(whole(path))


def created(path: Path) -> IO[bytes]:
    return open(path, "wb")


def run(main: Callable[[], Awaitable[None]], clock: trio.abc.Clock | None = None) -> None:
    async def limited() -> None:
        with trio.fail_after(HANG_S):
            await main()

    trio.run(limited, clock=clock)


@asynccontextmanager
async def serving(server: StateServer) -> AsyncIterator[Member]:
    """What dials it. Errors of a connection end that connection."""
    listener, address = await listen("127.0.0.1")

    async def accept(stream: trio.SocketStream) -> None:
        async with stream:
            hello = await envelope.receive(stream)
            assert isinstance(hello, StateHello)
            try:
                await server.serve(stream, hello)
            except (OSError, trio.TooSlowError, trio.BrokenResourceError):
                await trio.aclose_forcefully(stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, accept, [listener])
        yield Member(*SERVER, (address,), SEEN)
        nursery.cancel_scope.cancel()


def server(*, drops: bool = False) -> StateServer:
    made = StateServer(lambda: RUN, *SERVER, drops=drops)
    made.know([ASKER])
    return made


async def received(stream: trio.SocketStream, path: Path, *, waits: bool = False) -> pyccl.SharedState:
    """waits: there may be nothing new at first."""
    offer = await statestream.next_offer(stream)
    while waits and offer is None:
        offer = await statestream.next_offer(stream)
    assert offer is not None
    with created(path) as file:
        await statestream.receive_file(stream, offer, file.fileno())
    loaded = pyccl.SharedState.load(path)
    assert (loaded.revision, loaded.layout()) == (offer.revision, offer.layout)
    return loaded


def test_who_asks_once_gets_the_newest_or_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        made = server()
        async with serving(made) as there:
            async with await statestream.ask(RUN, ASKER, there) as stream:
                assert await statestream.next_offer(stream) is None
            made.offer(snapshot(tmp_path, 4))
            async with await statestream.ask(RUN, ASKER, there) as stream:
                assert (await received(stream, tmp_path / "got")).digest() == state(4).digest()
                assert await statestream.next_offer(stream) is None
                with pytest.raises(RemoteProtocolError, match="closed"):
                    await statestream.next_offer(stream)
            async with await statestream.ask(RUN, ASKER, there, have=5) as stream:
                assert await statestream.next_offer(stream) is None

    run(main)


def test_who_follows_gets_what_is_far_enough_and_what_went_back(tmp_path: Path) -> None:
    async def main() -> None:
        made = server()
        async with serving(made) as there, await statestream.ask(RUN, ASKER, there, every=3) as stream:
            assert await statestream.next_offer(stream) is None  # it follows now
            for revision, comes in ((1, True), (2, False), (3, False), (4, True), (0, True), (3, True)):
                assert made.wants(revision) is comes
                if comes:
                    made.offer(snapshot(tmp_path, revision))
                    assert (await received(stream, tmp_path / "got")).revision == revision
                    assert await statestream.next_offer(stream) is None

    run(main)


def test_what_comes_while_a_file_is_on_its_way_is_sent_after_it_the_newest_alone(tmp_path: Path) -> None:
    async def main() -> None:
        made = server()
        async with serving(made) as there, await statestream.ask(RUN, ASKER, there, every=1) as stream:
            assert await statestream.next_offer(stream) is None
            made.offer(snapshot(tmp_path, 1))
            offer = await statestream.next_offer(stream)
            assert offer is not None and offer.revision == 1
            assert not made.wants(1)  # it is receiving that
            for revision in (2, 3, 4):
                assert made.wants(revision)
                made.offer(snapshot(tmp_path, revision))
            with created(tmp_path / "first") as file:
                await statestream.receive_file(stream, offer, file.fileno())
            assert (await received(stream, tmp_path / "got")).revision == 4
            assert await statestream.next_offer(stream) is None

    run(main)


def test_a_snapshot_is_dropped_with_the_last_follower(tmp_path: Path) -> None:
    async def main() -> None:
        made, gone = server(drops=True), snapshot(tmp_path, 1)
        async with serving(made) as there:
            async with await statestream.ask(RUN, ASKER, there, every=1) as stream:
                assert await statestream.next_offer(stream) is None
                made.offer(gone)
                await received(stream, tmp_path / "got")
            while made.wants(99):  # until its end is noticed
                await trio.lowlevel.checkpoint()
            async with await statestream.ask(RUN, ASKER, there) as stream:
                assert await statestream.next_offer(stream) is None

    run(main)


@pytest.mark.parametrize(
    "changes", [{"run": b"x" * 16}, {"to_peer": b"x" * 16}, {"to_incarnation": b"x" * 16}, {"version": 9}], ids=str
)
def test_who_looks_for_somebody_else_is_refused(changes: dict[str, Any]) -> None:
    async def main() -> None:
        async with serving(server()) as there:
            (address,) = there.addresses
            fields = {
                "version": limits.PROTOCOL_VERSION, "run": RUN, "from_peer": ASKER.peer,
                "from_incarnation": ASKER.incarnation, "to_peer": SERVER[0], "to_incarnation": SERVER[1],
                "have": 0, "every": 0,
            }  # fmt: skip
            async with await trio.open_tcp_stream(address.host, address.port) as stream:
                await stream.send_all(envelope.pack(StateHello(**{**fields, **changes})))
                assert isinstance(await envelope.receive(stream), PeerRefused)

    run(main)


def test_who_is_not_known_waits_until_the_master_tells_of_it_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statestream, "_KNOWN_S", 0.3)

    async def main() -> None:
        made = StateServer(lambda: RUN, *SERVER, drops=False)
        async with serving(made) as there:
            async with await statestream.ask(RUN, ASKER, there) as stream:
                with pytest.raises(RemoteProtocolError, match="the master has not told of you"):
                    await statestream.next_offer(stream)
            async with await statestream.ask(RUN, ASKER, there) as stream:
                made.know([ASKER])
                assert await statestream.next_offer(stream) is None

    run(main)


def test_so_many_are_served_at_a_time_also_of_those_who_had_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statestream, "_SERVING_MAX", 2)

    async def main() -> None:
        made = StateServer(lambda: RUN, *SERVER, drops=False)
        askers = [Member(bytes([n]) * 16, b"A" * 16, seen=SEEN) for n in range(4)]
        async with serving(made) as there, contextlib.AsyncExitStack() as opened_streams:
            asking = [
                await opened_streams.enter_async_context(await statestream.ask(RUN, asker, there, every=1))
                for asker in askers
            ]
            made.know([*askers, ASKER])
            answers = []
            for stream in asking:
                try:
                    answers.append(await statestream.next_offer(stream))
                except RemoteProtocolError as e:
                    answers.append(str(e))
            assert sorted(map(str, answers)) == [*["None"] * 2, *["no state from there: 2 others are served"] * 2]
            for stream, answer in zip(asking, answers, strict=True):
                if answer is None:
                    await stream.aclose()
            while True:  # it has not seen the ends yet
                async with await statestream.ask(RUN, ASKER, there) as stream:
                    with contextlib.suppress(RemoteProtocolError):
                        assert await statestream.next_offer(stream) is None
                        break

    run(main)


def test_who_asks_again_gives_up_the_place_it_had_and_nobody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statestream, "_SERVING_MAX", 2)

    async def main() -> None:
        made, other = server(drops=True), Member(b"o" * 16, b"O" * 16, seen=SEEN)
        made.know([ASKER, other])
        async with serving(made) as there, contextlib.AsyncExitStack() as opened_streams:
            following = []
            for asker in (other, *[ASKER] * 5):
                stream = await opened_streams.enter_async_context(await statestream.ask(RUN, asker, there, every=1))
                assert await statestream.next_offer(stream) is None
                following.append(stream)
            for stream in following[1:-1]:
                with pytest.raises(RemoteProtocolError, match="closed"):
                    await statestream.next_offer(stream)
            made.offer(snapshot(tmp_path, 1))
            for stream in (following[0], following[-1]):
                assert (await received(stream, tmp_path / "got")).revision == 1

    run(main)


@asynccontextmanager
async def lying(*sent: bytes) -> AsyncIterator[trio.SocketStream]:
    """A source that answers with these bytes and ends."""
    listener, address = await listen("127.0.0.1")

    async def accept(stream: trio.SocketStream) -> None:
        async with stream:
            await envelope.receive(stream)
            await stream.send_all(b"".join(sent))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, accept, [listener])
        source = Member(*SERVER, (Address(address.host, address.port),), SEEN)
        async with await statestream.ask(RUN, ASKER, source) as stream:
            yield stream
        nursery.cancel_scope.cancel()


def test_a_source_that_ends_early_is_told(tmp_path: Path) -> None:
    async def main() -> None:
        async with lying(envelope.pack(StateOffer(1, 1000, bytes(32))), bytes(999)) as stream:
            offer = await statestream.next_offer(stream)
            assert offer is not None
            with created(tmp_path / "got") as file, pytest.raises(RemoteProtocolError, match="1 bytes before"):
                await statestream.receive_file(stream, offer, file.fileno())

    run(main)


def test_an_offer_that_no_disk_holds_costs_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with lying(envelope.pack(StateOffer(1, (1 << 63) - 1, bytes(32)))) as stream:
            offer = await statestream.next_offer(stream)
            assert offer is not None
            with created(tmp_path / "got") as file:
                with pytest.raises(OSError, match=r".*"):
                    await statestream.receive_file(stream, offer, file.fileno())
                assert os.fstat(file.fileno()).st_size == 0

    run(main)


@pytest.mark.parametrize(
    "message", [PeerRefused("no"), StateHello(1, *[b"x" * 16] * 5, 0, 0)], ids=["refused", "other"]
)
def test_what_is_no_offer_is_an_error(message: Message) -> None:
    async def main() -> None:
        async with lying(envelope.pack(message)) as stream:
            with pytest.raises(RemoteProtocolError, match="no state from there"):
                await statestream.next_offer(stream)

    run(main)


def test_state_none_is_nothing_for_now() -> None:
    async def main() -> None:
        async with lying(envelope.pack(StateNone())) as stream:
            assert await statestream.next_offer(stream) is None

    run(main)


# ---- sealed


def credentials(salt: bytes) -> Credentials:
    return Credentials(Identity.new(), salt * 16, Ticket(bytes(32), b""))


ANN, BOB, EVE = (credentials(salt) for salt in (b"1", b"2", b"3"))
ASKS, SERVES = Member(ANN.peer, b"A" * 16, seen=SEEN), (BOB.peer, b"S" * 16)


@asynccontextmanager
async def sealed_server(made: StateServer) -> AsyncIterator[tuple[Member, list[Exception]]]:
    """What dials it, and why connections ended."""
    listener, address = await listen("127.0.0.1")
    ended: list[Exception] = []

    async def accept(stream: trio.SocketStream) -> None:
        async with stream:
            hello = await envelope.receive(stream)
            assert isinstance(hello, StateHello)
            try:
                await made.serve(stream, hello)
            except (OSError, trio.TooSlowError, trio.BrokenResourceError, RemoteProtocolError) as e:
                ended.append(e)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, accept, [listener])
        yield Member(*SERVES, (address,), SEEN), ended
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def sealed_following(epoch: int = 0) -> AsyncIterator[tuple[StateServer, Channel, list[Exception]]]:
    """A source in this epoch, who follows it, and why connections ended."""
    made = StateServer(lambda: RUN, *SERVES, drops=True, credentials=BOB)
    made.know([ASKS])
    made.enter(epoch)
    async with (
        sealed_server(made) as (there, ended),
        await statestream.ask(RUN, ASKS, there, every=1, credentials=ANN) as stream,
    ):
        yield made, stream, ended


def test_in_a_secure_run_a_state_goes_to_who_proves_to_be_a_peer_and_to_nobody_else(tmp_path: Path) -> None:
    async def main() -> None:
        made = StateServer(lambda: RUN, *SERVES, drops=False, credentials=BOB)
        made.know([ASKS])
        made.offer(snapshot(tmp_path, 4))
        async with sealed_server(made) as (there, ended):
            async with await statestream.ask(RUN, ASKS, there, credentials=ANN) as stream:
                assert (await received(stream, tmp_path / "got")).digest() == state(4).digest()
                assert await statestream.next_offer(stream) is None
            # Who knows all that greetings show, and has another key; who would have it in plain.
            with suppress(RemoteProtocolError, trio.BrokenResourceError):
                async with await statestream.ask(RUN, ASKS, there, credentials=EVE) as stream:
                    await statestream.next_offer(stream)
                    pytest.fail("it was served")
            async with await statestream.ask(RUN, ASKS, there) as stream:
                await stream.send_all(envelope.pack(StateNone()))
                with pytest.raises((RemoteProtocolError, trio.BrokenResourceError)):
                    await statestream.next_offer(stream)
            while len(ended) < 2:
                await trio.lowlevel.checkpoint()
            assert "does not prove" in str(ended[0]) and "no PeerOffer" in str(ended[1])
            async with await statestream.ask(RUN, ASKS, there, credentials=ANN) as stream:
                assert (await received(stream, tmp_path / "again")).revision == 4

    run(main)


def test_in_a_secure_run_nobody_else_passes_for_a_source(tmp_path: Path) -> None:
    async def main() -> None:
        liar = StateServer(lambda: RUN, *SERVES, drops=False, credentials=EVE)
        liar.know([ASKS])
        liar.offer(snapshot(tmp_path, 4))
        async with sealed_server(liar) as (there, _):
            with pytest.raises(RemoteProtocolError, match="does not prove"):
                await statestream.ask(RUN, ASKS, there, credentials=ANN)
        async with serving(server()) as plain:
            with pytest.raises(RemoteProtocolError):
                await statestream.ask(RUN, ASKER, plain, credentials=ANN)

    run(main)


def test_who_asks_a_secure_peer_and_says_nothing_more_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(statestream, "_KNOWN_S", 0.3)

    async def main() -> None:
        made = StateServer(lambda: RUN, *SERVES, drops=False, credentials=BOB)
        made.know([ASKS])
        made.offer(snapshot(tmp_path, 4))
        async with (
            sealed_server(made) as (there, _),
            await statestream.ask(RUN, ASKS, there) as stream,
        ):
            with pytest.raises(RemoteProtocolError, match="did not prove in time"):
                await statestream.next_offer(stream)

    run(main)


def secrets_of(stream: Any) -> set[bytes]:
    assert isinstance(stream, SealedStream)
    return {stream._rx._secret, stream._tx._secret}


def test_who_follows_in_a_secure_run_gets_new_keys_with_each_epoch_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statestream, "STILL_S", 0.1)

    async def main() -> None:
        async with sealed_following(epoch=7) as (made, stream, ended):
            assert await statestream.next_offer(stream) is None
            had = secrets_of(stream)
            assert await statestream.next_offer(stream) is None
            assert secrets_of(stream) == had  # no epoch has begun
            for epoch, revisions in ((8, (1, 2)), (9, ()), (11, (3,))):
                made.enter(epoch)
                for revision in revisions:
                    made.offer(snapshot(tmp_path, revision))
                    got = await received(stream, tmp_path / "got", waits=True)  # STILL_S may pass before it is offered
                    assert got.digest() == state(revision).digest()
                assert await statestream.next_offer(stream) is None
                now = secrets_of(stream)
                assert len(now) == 2 and not now & had
                had |= now
                assert made.wants(99)  # it has followed all the time
            assert len(had) == 8 and not ended

    run(main)


def test_an_epoch_that_begins_while_a_file_is_on_its_way_renews_behind_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with sealed_following() as (made, stream, ended):
            assert await statestream.next_offer(stream) is None
            had = secrets_of(stream)
            made.offer(snapshot(tmp_path, 1))
            offer = await statestream.next_offer(stream)
            assert offer is not None
            made.enter(8)
            made.offer(snapshot(tmp_path, 2))
            with created(tmp_path / "got") as file:
                await statestream.receive_file(stream, offer, file.fileno())
            assert pyccl.SharedState.load(tmp_path / "got").digest() == state(1).digest()
            assert secrets_of(stream) == had
            assert (await received(stream, tmp_path / "got")).revision == 2
            assert not secrets_of(stream) & had and not ended

    run(main)


@pytest.mark.parametrize(
    "answer", [StateNone(), PeerOffer(bytes(32), 1), None], ids=["other", "no point of the curve", "nothing"]
)
def test_who_does_not_agree_on_new_keys_is_not_served_on(
    answer: Message | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if answer is None:
        monkeypatch.setattr(statestream, "STORING_S", 0.3)

    async def main() -> None:
        async with sealed_following() as (made, stream, ended):
            assert isinstance(await envelope.receive(stream), StateNone)
            made.enter(8)
            made.offer(snapshot(tmp_path, 1))
            assert isinstance(await envelope.receive(stream), PeerOffer)
            if answer is not None:
                await stream.send_all(envelope.pack(answer))
            with suppress(trio.BrokenResourceError):  # it hung up with our bytes unread
                assert await envelope.receive(stream) is None
            assert not made.wants(99)
            assert [type(e) for e in ended] == ([] if answer is not None else [trio.TooSlowError])

    run(main)


def test_who_stores_a_file_while_an_epoch_begins_answers_late_and_gets_what_was_offered_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statestream, "SILENCE_S", 3.0)
    clock = MockClock(rate=1.0)

    async def main() -> None:
        async with sealed_following() as (made, stream, ended):
            assert await statestream.next_offer(stream) is None
            made.enter(8)
            made.offer(snapshot(tmp_path, 1))
            offer = await envelope.receive(stream)
            assert isinstance(offer, PeerOffer)
            await wait_all_tasks_blocked()
            clock.jump(3 * statestream.SILENCE_S)
            await wait_all_tasks_blocked()
            assert isinstance(stream, SealedStream)
            await agreement.answer_renewal(stream, offer)
            assert (await received(stream, tmp_path / "got")).digest() == state(1).digest()
            assert not ended

    run(main, clock)


def test_keys_that_nobody_asked_for_end_the_connection_of_who_follows() -> None:
    async def main() -> None:
        made = StateServer(lambda: RUN, *SERVES, drops=True, credentials=BOB)
        made.know([ASKS])
        async with (
            sealed_server(made) as (there, _),
            await statestream.ask(RUN, ASKS, there, every=1, credentials=ANN) as stream,
        ):
            assert await statestream.next_offer(stream) is None
            await stream.send_all(envelope.pack(PeerOffer(bytes(range(32)), 1)))
            with pytest.raises(RemoteProtocolError, match="closed"):
                await statestream.next_offer(stream)

    run(main)


# ---- the directory


def put(store: StateStore, made: pyccl.SharedState, offered: int | None = None) -> None:
    fd = store.incoming()
    try:
        made.save_to(fd)
        store.take(fd, made.revision if offered is None else offered)
    finally:
        os.close(fd)


def revisions(store: StateStore) -> list[int]:
    return [kept.revision for kept in store.kept]


def test_the_last_n_stay_and_the_newest_in_any_case(tmp_path: Path) -> None:
    store = StateStore(tmp_path, keep=2)
    for revision in (1, 9, 2, 3, 4):
        put(store, state(revision, 100))
    assert revisions(store) == [9, 3, 4] and store.newest is not None and store.newest.revision == 9
    put(store, state(4, 101))  # another state of that revision
    put(store, state(4, 101))  # the same again
    assert revisions(store) == [9, 4, 4]
    store.close()
    again = StateStore(tmp_path, keep=2)
    assert sorted(revisions(again)) == [4, 4, 9]
    assert len(list(tmp_path.glob("state-*"))) == 3


def test_what_is_damaged_is_set_aside_and_never_counts(tmp_path: Path) -> None:
    store = StateStore(tmp_path, keep=9)
    for revision in range(4):
        put(store, state(revision, 5000))
    store.close()
    paths = sorted(tmp_path.glob("state-*.safetensors"))
    paths[3].write_bytes(paths[3].read_bytes()[:-1])
    data = bytearray(paths[2].read_bytes())
    data[-100] ^= 4
    paths[2].write_bytes(data)
    (tmp_path / "state-foreign.safetensors").write_bytes(b"hello")
    (tmp_path / ".incoming").write_bytes(bytes(100))
    again = StateStore(tmp_path, keep=9)
    assert sorted(revisions(again)) == [0, 1] and again.newest is not None and again.newest.revision == 1
    assert len(list(tmp_path.glob("*.damaged"))) == 3
    put(again, state(7, 10))
    assert sorted(revisions(again)) == [0, 1, 7]


def test_what_came_damaged_or_as_another_revision_is_refused(tmp_path: Path) -> None:
    store = StateStore(tmp_path, keep=3)
    with pytest.raises(StateFileError, match="revision 1 was offered as 2"):
        put(store, state(1), offered=2)
    fd = store.incoming()
    state(5).save_to(fd)
    os.pwrite(fd, b"\xaa\x55", 2_000_000)
    with pytest.raises(StateFileError, match="damaged"):
        store.take(fd, 5)
    os.close(fd)
    store.refuse()
    store.refuse()
    assert store.kept == [] and sorted(path.name for path in tmp_path.iterdir()) == [".lock"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    store = StateStore(tmp_path, keep=1)
    with pytest.raises(StoreError, match="another process"):
        StateStore(tmp_path, keep=1)
    store.close()
    StateStore(tmp_path, keep=1).close()


def test_a_source_that_trickles_is_given_up(tmp_path: Path) -> None:
    """It is never silent for long."""

    async def main() -> None:
        send, receive = memory_stream_one_way_pair()

        async def trickle() -> None:
            while True:
                await send.send_all(b"x" * 100)
                await trio.sleep(statestream.SILENCE_S / 2)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trickle)
            with created(tmp_path / "slow") as file, pytest.raises(trio.TooSlowError):
                await statestream.receive_file(receive, StateOffer(1, 3_000_000, b"l" * 32), file.fileno())
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_a_steady_pace_is_fast_enough_however_long_it_takes() -> None:
    async def main() -> None:
        pace = statestream.Pace(1000, 10.0)
        for _ in range(300):
            await trio.sleep(1.0)
            pace.moved(101)
        pace = statestream.Pace(1000, 10.0)
        for _ in range(9):
            await trio.sleep(1.0)
            pace.moved(99)
        await trio.sleep(1.0)
        with pytest.raises(trio.TooSlowError):
            pace.moved(99)

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_who_receives_too_slowly_is_not_served_on(tmp_path: Path) -> None:
    class Stopwatch(statestream.Pace):
        def moved(self, size_bytes: int) -> None:
            self.total += size_bytes
            if self.total > 1_000_000:
                raise trio.TooSlowError

        total = 0

    async def main() -> None:
        listener, address = await listen("127.0.0.1")
        async with listener, trio.open_nursery() as nursery:
            stream = await trio.open_tcp_stream(address.host, address.port)
            accepted = await listener.accept()
            nursery.start_soon(_swallow, stream)
            pace = Stopwatch()
            with pytest.raises(trio.TooSlowError):
                await statestream.send_file(accepted, snapshot(tmp_path, 1), pace)
            assert pace.total < 3_000_000
            await accepted.aclose()

    run(main)


async def _swallow(stream: trio.SocketStream) -> None:
    async with stream:
        while await stream.receive_some():
            pass
