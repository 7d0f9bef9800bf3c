"""A front alone: where it listens and since when, and which addresses it tells as routers and networks change."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import trio
from listeners import listen
from trio.testing import wait_all_tasks_blocked
from waiting import until

from pyccl._io import envelope, front
from pyccl._io.front import Front, MasterAt, Name, Reach
from pyccl._io.portmap import NoMappingError
from pyccl._proto import limits
from pyccl._proto.epoch import Address, AddressKind
from pyccl._proto.messages import Heartbeat, Message, Reflect, Reflected

HANG_S = 60.0
LOOPBACK, LAN, OUTSIDE = "127.0.0.1", "192.168.7.2", "203.0.113.7"
ME = Name(b"p" * 16, b"i" * 16)
ANYWHERE = Address("0.0.0.0", 0)


class FakeMapping:
    """Of a router, which the test changes."""

    def __init__(self, external: tuple[str, int] | None) -> None:
        self.external, self._news = external, trio.Event()

    async def changed(self, known: tuple[str, int] | None) -> tuple[str, int] | None:
        while self.external == known:
            await self._news.wait()
        return self.external

    def becomes(self, external: tuple[str, int] | None) -> None:
        self.external, news = external, self._news
        self._news = trio.Event()
        news.set()


class Surroundings:
    """A master that tells where connections come from, and a router. told: the addresses, each time they changed."""

    def __init__(self) -> None:
        self.told: list[tuple[Address, ...]] = []
        self.accepted: list[int] = []  # ports that connections came from
        self.seen_from: list[int] = []  # at the master
        self.answer: Message = Reflected(OUTSIDE, 1234)
        self.lines: list[trio.SocketStream] = []
        self.mapping: FakeMapping | None = None
        self.mappings = 0  # that are held

    async def accept(self, stream: trio.SocketStream) -> None:
        async with stream:
            self.accepted.append(stream.socket.getpeername()[1])

    async def reflect(self, stream: trio.SocketStream) -> None:
        assert isinstance(await envelope.receive(stream), Reflect)
        self.seen_from.append(stream.socket.getpeername()[1])
        await stream.send_all(envelope.pack(self.answer))
        self.lines.append(stream)
        with contextlib.suppress(trio.BrokenResourceError):  # such connections are reset
            await stream.receive_some(1)

    @contextlib.asynccontextmanager
    async def open_mapping(self, _port: int) -> AsyncIterator[FakeMapping]:
        if self.mapping is None:
            raise NoMappingError({"pcp": "no answer"})
        self.mappings += 1
        try:
            yield self.mapping
        finally:
            self.mappings -= 1

    def kinds(self) -> dict[int, Address]:
        """The last address of each kind but LOCAL."""
        return {at.kind: at for at in self.told[-1] if at.kind != AddressKind.LOCAL}


def run(main: Callable[[Front, Surroundings], Awaitable[None]], reach: Reach = Reach(ANYWHERE)) -> None:  # noqa: B008
    async def limited() -> None:
        around = Surroundings()
        listener, master = await listen(LOOPBACK)
        with trio.fail_after(HANG_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.serve_listeners, around.reflect, [listener])
                made = Front(
                    *(reach, MasterAt(master.host, master.port, None), ME, nursery),
                    *(around.accept, around.told.append, around.open_mapping),
                )
                try:
                    await main(made, around)
                finally:
                    made.close()
                nursery.cancel_scope.cancel()

    trio.run(limited)


def ports(made: Front) -> set[int]:
    return {listener.socket.getsockname()[1] for listener in made._listeners}


# ---- listening


def test_who_connects_before_the_master_welcomes_us_is_heard_then() -> None:
    async def main(made: Front, around: Surroundings) -> None:
        await made.open(LOOPBACK)
        (at,) = made.addresses
        async with await trio.open_tcp_stream(at.host, at.port) as stream:
            await wait_all_tasks_blocked()
            assert not around.accepted
            await made.welcomed(LOOPBACK, LOOPBACK, remote=False)
            assert await stream.receive_some(1) == b""
            assert around.accepted == [stream.socket.getsockname()[1]]

    run(main, Reach())


def test_where_nobody_else_can_be_in_the_run_it_is_loopback_alone_until_others_may_come() -> None:
    async def main(made: Front, around: Surroundings) -> None:
        await made.open(LOOPBACK)
        assert [(at.host, at.kind) for at in made.addresses] == [(LOOPBACK, AddressKind.LOCAL)]
        await made.welcomed(LOOPBACK, LOOPBACK, remote=False)
        assert not around.told and len(ports(made)) == 1
        await made.welcomed(LOOPBACK, LOOPBACK, remote=True)
        assert made._bound is not None and made._bound.port in ports(made)
        hosts = {listener.socket.getsockname()[0] for listener in made._listeners}
        assert {LOOPBACK, "0.0.0.0"} <= hosts
        async with await trio.open_tcp_stream(LOOPBACK, made._bound.port) as stream:
            assert await stream.receive_some(1) == b""  # it is accepted there, too

    run(main, Reach())


def test_both_families_have_one_port() -> None:
    async def main(made: Front, around: Surroundings) -> None:
        await made.open(LAN)
        assert len(ports(made)) == 1 and {at.port for at in made.addresses} <= ports(made)

    run(main, Reach())


@pytest.mark.parametrize(("host", "family"), [("0.0.0.0", socket.AF_INET), ("::", socket.AF_INET6)])
def test_an_address_that_is_taken_is_an_error_and_leaves_nothing_open(host: str, family: int) -> None:
    """Of the second family, too, when the first is bound."""
    with socket.create_server((host, 0), family=family) as taken:

        async def main(made: Front, around: Surroundings) -> None:
            with pytest.raises(OSError, match="in use"):
                await made.open(LAN)
            assert not made._listeners and not made.addresses

        run(main, Reach(Address("", taken.getsockname()[1])))


# ---- addresses


def test_what_a_user_advertises_is_not_left_out_for_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = [f"10.0.0.{n}" for n in range(20)]
    monkeypatch.setattr(front, "addresses_of_interfaces", lambda: list(hosts))
    advertised = tuple(Address(f"198.51.100.{n}", n) for n in range(3))  # port 0: the listener's

    async def main(made: Front, around: Surroundings) -> None:
        await made.open(hosts[9])
        (port,) = ports(made)
        assert len(made.addresses) == limits.ADDRESSES_MAX
        assert made.addresses[0] == Address(hosts[9], port)  # that faces the master
        assert made.addresses[-3:] == tuple(
            Address(at.host, at.port or port, AddressKind.ADVERTISED) for at in advertised
        )

    run(main, Reach(ANYWHERE, advertised))


def test_behind_a_router_it_tells_what_the_master_sees_of_its_port() -> None:
    async def main(made: Front, around: Surroundings) -> None:
        await made.open(LAN)
        assert not made.is_behind_router and not made.may_punch
        await made.welcomed(LAN, OUTSIDE, remote=True)
        assert made.is_behind_router and made.may_punch
        await until(lambda: around.told and around.kinds())
        assert around.kinds() == {AddressKind.OBSERVED: Address(OUTSIDE, 1234, AddressKind.OBSERVED)}
        assert made.addresses == around.told[-1]
        assert around.seen_from == list(ports(made))  # the router maps that port
        await made.welcomed(LAN, OUTSIDE, remote=True)
        await wait_all_tasks_blocked()
        assert len(around.seen_from) == 1  # nothing has changed

    run(main)


@pytest.mark.parametrize("seen_as", [LAN, LOOPBACK, f"::ffff:{LAN}"])
def test_who_is_seen_where_it_is_is_behind_no_router(seen_as: str) -> None:
    async def main(made: Front, around: Surroundings) -> None:
        await made.open(LAN)
        await made.welcomed(LAN, seen_as, remote=True)
        assert not made.is_behind_router and made.may_punch == (seen_as != LOOPBACK)
        assert made.seen == LAN  # not on the master's machine, whatever it says
        await wait_all_tasks_blocked()
        assert not around.seen_from

    run(main)


def test_an_observation_that_ends_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "_AGAIN_S", (0.01, 0.01))

    async def main(made: Front, around: Surroundings) -> None:
        await made.open(LAN)
        around.answer = Heartbeat()  # no answer to a Reflect
        await made.welcomed(LAN, OUTSIDE, remote=True)
        await until(lambda: len(around.seen_from) >= 3)
        assert not around.told or not around.kinds()
        around.answer = Reflected(OUTSIDE, 1)
        await until(lambda: around.told and around.kinds())
        around.answer = Reflected(OUTSIDE, 2)
        around.lines[-1].socket.shutdown(socket.SHUT_WR)
        await until(lambda: around.kinds()[AddressKind.OBSERVED].port == 2)

    run(main)


def test_a_port_that_the_router_forwards_is_told_as_it_changes() -> None:
    async def main(made: Front, around: Surroundings) -> None:
        around.mapping = FakeMapping((OUTSIDE, 7))
        await made.open(LAN)
        await made.welcomed(LAN, OUTSIDE, remote=True)
        await until(lambda: around.told and len(around.kinds()) == 2)
        assert around.kinds()[AddressKind.MAPPED] == Address(OUTSIDE, 7, AddressKind.MAPPED)
        around.mapping.becomes((OUTSIDE, 1234))
        await until(lambda: len(around.kinds()) == 1)  # both are the same: as forwarded it is open to all
        assert around.kinds() == {AddressKind.MAPPED: Address(OUTSIDE, 1234, AddressKind.MAPPED)}
        around.mapping.becomes(None)
        await until(lambda: AddressKind.MAPPED not in around.kinds())
        assert AddressKind.OBSERVED in around.kinds()

    run(main)


def test_a_router_is_asked_only_from_a_private_address() -> None:
    async def main(made: Front, around: Surroundings) -> None:
        around.mapping = FakeMapping((OUTSIDE, 7))
        await made.open("198.51.100.9")
        await made.welcomed("198.51.100.9", OUTSIDE, remote=True)
        await until(lambda: around.told and around.kinds())
        await wait_all_tasks_blocked()
        assert not around.mappings and AddressKind.MAPPED not in around.kinds()

    run(main)


def test_in_another_network_what_held_in_the_one_before_is_over() -> None:
    async def main(made: Front, around: Surroundings) -> None:
        around.mapping = FakeMapping((OUTSIDE, 7))
        await made.open(LAN)
        await made.welcomed(LAN, OUTSIDE, remote=True)
        await until(lambda: around.told and len(around.kinds()) == 2)
        around.mapping, around.answer = None, Reflected("198.51.100.1", 99)
        await made.welcomed("10.0.0.2", "198.51.100.1", remote=True)
        assert not around.kinds()  # at once, before anything is known of the new one
        await until(around.kinds)
        assert around.kinds() == {AddressKind.OBSERVED: Address("198.51.100.1", 99, AddressKind.OBSERVED)}
        assert not around.mappings  # it was taken away, and there is none here
        await made.welcomed("198.51.100.1", "198.51.100.1", remote=True)
        assert not around.kinds() and not made.is_behind_router

    run(main)
