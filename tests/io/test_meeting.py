"""Meetings alone: who waits, who is joined, whose stream is whose meanwhile, and how many there may be."""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from pyccl._io import meeting
from pyccl._io.meeting import MEET_S, Meetings, NoRoomError
from pyccl._native.handles import Relay, RelayEnd
from pyccl._proto import limits
from pyccl._proto.messages import RelayHello
from pyccl.errors import RemoteProtocolError, UsageError

A, B = b"a" * 16, b"b" * 16


def run(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main, clock=MockClock(autojump_threshold=0))


def hello(from_: bytes, to: bytes, life: int = 0) -> RelayHello:
    """life: of both."""
    lives = [bytes(byte ^ life for byte in reversed(peer)) + bytes([life]) for peer in (from_[1:], to[1:])]
    return RelayHello(limits.PROTOCOL_VERSION, b"R" * 16, from_, lives[0], to, lives[1])


class Joins:
    """A relay that keeps what it is given."""

    def __init__(self, pairs: int = 0, room: int = Relay.OWNED_MAX) -> None:
        self.pairs_there, self.room_at_first = pairs, room
        self.joined: list[tuple[int, int, bytes, bytes]] = []
        self.owners: list[tuple[bytes, bytes]] = []
        self.forgotten: list[bytes] = []

    def pairs(self) -> int:
        return self.pairs_there + len(self.joined)

    def room(self, one: RelayEnd, other: RelayEnd) -> int:
        return self.room_at_first - len(self.joined)

    def add(self, one: RelayEnd, other: RelayEnd) -> None:
        self.joined.append((one.fd, other.fd, one.peer, other.peer))
        self.owners.append((one.owner, other.owner))

    def forget(self, peer: bytes) -> None:
        self.forgotten.append(peer)

    def close(self) -> None:
        for fd_a, fd_b, *_ in self.joined:
            os.close(fd_a)
            os.close(fd_b)


class End:
    """One that comes to the relay. over: what became of it."""

    def __init__(self, meetings: Meetings, told: RelayHello) -> None:
        self._meetings, self._told = meetings, told
        ours, self.far = socket.socketpair()
        self.fd = ours.fileno()
        self.stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        self.owner = self.fd.to_bytes(2)
        self.readied = 0
        self.may_go = trio.Event()
        self.may_go.set()
        self.error: BaseException | None = None
        self.met = trio.Event()
        self.was_met_when_readied = False
        self.scope = trio.CancelScope()
        self.over: list[object] = []

    async def ready(self) -> trio.SocketStream:
        self.readied += 1
        self.was_met_when_readied = self.met.is_set()
        await self.may_go.wait()
        if self.error is not None:
            raise self.error
        return self.stream

    async def come(self) -> None:
        with self.scope:
            try:
                self.over.append(await self._meetings.meet(self._told, self.ready, self.owner, self.met))
            except (UsageError, RemoteProtocolError, trio.TooSlowError, trio.BrokenResourceError) as e:
                self.over.append(e)
        if self.scope.cancelled_caught:
            self.over.append("cancelled")
        self.stream.socket.close()
        self.far.close()


def held(**options: int) -> tuple[Joins, Meetings]:
    joins = Joins(**options)
    relay: Any = joins
    return joins, Meetings(relay)


@pytest.mark.parametrize("first", [A, B])
def test_two_who_come_are_joined_whoever_is_first(first: bytes) -> None:
    async def main() -> None:
        joins, meetings = held()
        second = B if first == A else A
        ends = [End(meetings, hello(first, second)), End(meetings, hello(second, first))]
        fds = [end.fd for end in ends]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ends[0].come)
            await wait_all_tasks_blocked()
            assert not ends[0].met.is_set() and not ends[0].readied
            nursery.start_soon(ends[1].come)
        assert [end.over for end in ends] == [[True], [True]] and ends[0].met.is_set()
        assert joins.joined == [(fds[1], fds[0], second, first)]
        assert joins.owners == [(fds[1].to_bytes(2), fds[0].to_bytes(2))]
        assert [end.readied for end in ends] == [1, 1] and ends[0].was_met_when_readied
        joins.close()

    run(main)


def test_who_waits_in_vain_goes_in_time_and_meets_nobody_later() -> None:
    async def main() -> None:
        joins, meetings = held()
        for told in (hello(A, B), hello(B, A), hello(A, B, life=1)):  # none at a time when the other is there
            end, since = End(meetings, told), trio.current_time()
            await end.come()
            assert end.over == [False] and not end.readied
            assert trio.current_time() - since == pytest.approx(MEET_S)
        assert not joins.joined

    run(main)


@pytest.mark.parametrize("other", [hello(B, A, life=1), hello(B, b"c" * 16), hello(b"c" * 16, A), hello(A, B)])
def test_only_who_is_wanted_in_the_same_life_is_joined(other: RelayHello) -> None:
    async def main() -> None:
        joins, meetings = held()
        ends = [End(meetings, hello(A, B)), End(meetings, other)]
        async with trio.open_nursery() as nursery:
            for end in ends:
                nursery.start_soon(end.come)
        assert [end.over for end in ends] == [[False], [False]] and not joins.joined

    run(main)


def test_who_comes_again_takes_its_own_place_and_the_newest_is_joined() -> None:
    async def main() -> None:
        joins, meetings = held()
        old, new, other = (End(meetings, told) for told in (hello(A, B), hello(A, B), hello(B, A)))
        fds = other.fd, new.fd
        async with trio.open_nursery() as nursery:
            nursery.start_soon(old.come)
            await trio.sleep(MEET_S / 2)
            nursery.start_soon(new.come)
            await trio.sleep(MEET_S * 3 / 4)
            assert old.over == [False] and not new.over  # its end takes nothing from the new one
            nursery.start_soon(other.come)
        assert new.over == other.over == [True]
        assert [joined[:2] for joined in joins.joined] == [fds]
        joins.close()

    run(main)


def test_so_many_wait_and_no_more_and_who_meets_one_of_them_is_joined_all_the_same() -> None:
    async def main() -> None:
        joins, meetings = held()
        peers = [n.to_bytes(16, "big") for n in range(meeting._WAITING_MAX)]
        waiting = [End(meetings, hello(peer, B)) for peer in peers]
        late, other = End(meetings, hello(A, B)), End(meetings, hello(B, peers[7]))
        async with trio.open_nursery() as nursery:
            for end in waiting:
                nursery.start_soon(end.come)
            await wait_all_tasks_blocked()
            await late.come()
            assert isinstance(late.over[0], UsageError) and "all that it can" in str(late.over[0])
            await other.come()
            assert other.over == [True]
            again = End(meetings, hello(A, B))
            nursery.start_soon(again.come)
            await wait_all_tasks_blocked()
            assert not again.over  # there is room now
        assert [end.over for end in waiting] == [[n == 7] for n in range(len(waiting))]
        assert not meetings._waiting
        joins.close()

    run(main)


def test_a_relay_that_carries_all_that_it_can_lets_nobody_wait() -> None:
    async def main() -> None:
        _, meetings = held(pairs=Relay.PAIRS_MAX)
        end = End(meetings, hello(A, B))
        await end.come()
        assert isinstance(end.over[0], UsageError)

    run(main)


def test_two_whose_owner_has_all_that_it_may_are_told_so_and_neither_is_readied() -> None:
    """Those count, too, who are being joined. What is not joined is not logged as relayed."""

    async def main() -> None:
        joins, meetings = held(room=1)
        ends = [[End(meetings, hello(*two, life)) for life in (0, 1)] for two in ((A, B), (B, A))]
        for end in (*ends[0], *ends[1]):
            end.owner = b"o" * 16
        ends[0][0].may_go = trio.Event()
        async with trio.open_nursery() as nursery:
            for life in (0, 1):
                nursery.start_soon(ends[0][life].come)
                await wait_all_tasks_blocked()
                nursery.start_soon(ends[1][life].come)
                await wait_all_tasks_blocked()
            late = [ends[0][1], ends[1][1]]
            assert [type(end.over[0]) for end in late] == [NoRoomError] * 2 and not any(end.readied for end in late)
            ends[0][0].may_go.set()
        assert ends[0][0].over == ends[1][0].over == [True] and len(joins.joined) == 1
        joins.close()

    run(main)


@pytest.mark.parametrize("gone", [A, B])
def test_who_is_out_of_the_run_is_not_joined_whether_it_waits_or_meets(gone: bytes) -> None:
    async def main() -> None:
        joins, meetings = held()
        waits = End(meetings, hello(A, B))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(waits.come)
            await wait_all_tasks_blocked()
            meetings.forget(gone)
            late = End(meetings, hello(B, A))
            nursery.start_soon(late.come)
        assert waits.over == late.over == [False]
        ends = [End(meetings, hello(A, B)), End(meetings, hello(B, A))]
        others = [End(meetings, hello(A, b"c" * 16)), End(meetings, hello(b"c" * 16, A))]
        ends[0].may_go = trio.Event()
        async with trio.open_nursery() as nursery:
            for end in (*ends, *others):
                nursery.start_soon(end.come)
            await wait_all_tasks_blocked()
            meetings.forget(gone)
            ends[0].may_go.set()
        over = [type(over) for end in ends for over in end.over]
        assert len(over) == 2 and set(over) == {bool, RemoteProtocolError}  # of who came last the error
        assert len(joins.joined) == 1 and joins.forgotten == [gone, gone]
        joins.close()

    run(main)


@pytest.mark.parametrize("broken", [0, 1])
def test_where_one_end_is_not_fit_both_are_over_and_nothing_is_joined(broken: int) -> None:
    async def main() -> None:
        joins, meetings = held()
        ends = [End(meetings, hello(A, B)), End(meetings, hello(B, A))]
        ends[broken].error = trio.BrokenResourceError("it hung up")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ends[0].come)
            await wait_all_tasks_blocked()
            nursery.start_soon(ends[1].come)
        assert ends[0].over == [True] and isinstance(ends[1].over[0], trio.BrokenResourceError)
        assert not joins.joined and not meetings._waiting

    run(main)


@pytest.mark.parametrize("slow", [0, 1])
def test_an_end_that_does_not_get_ready_is_given_up_in_time(slow: int) -> None:
    async def main() -> None:
        joins, meetings = held()
        ends = [End(meetings, hello(A, B)), End(meetings, hello(B, A))]
        ends[slow].may_go = trio.Event()
        since = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ends[0].come)
            await wait_all_tasks_blocked()
            nursery.start_soon(ends[1].come)
        assert isinstance(ends[1].over[0], trio.TooSlowError) and not joins.joined
        assert trio.current_time() - since == pytest.approx(MEET_S)

    run(main)


@pytest.mark.parametrize("before", [True, False], ids=["before", "meanwhile"])
def test_who_is_sent_away_in_the_moment_when_the_other_comes_stays_until_that_is_over(before: bool) -> None:
    """As where the relay reaches the other by itself at that moment. A stream is nobody else's while it is joined."""

    async def main() -> None:
        joins, meetings = held()
        ends = [End(meetings, hello(A, B)), End(meetings, hello(B, A))]
        ends[0].may_go = trio.Event()

        async def let_go() -> None:
            await wait_all_tasks_blocked()
            ends[0].scope.cancel()
            await wait_all_tasks_blocked()
            assert ends[0].readied and not ends[0].over
            ends[0].may_go.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ends[0].come)
            await wait_all_tasks_blocked()
            nursery.start_soon(let_go)
            if before:
                ends[0].scope.cancel()  # it has not gone yet when the other is there
            await ends[1].come()
        assert ends[1].over == [True] and len(joins.joined) == 1
        assert ends[0].over in ([True], ["cancelled"])
        joins.close()

    run(main)
