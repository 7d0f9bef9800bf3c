"""The first of several addresses: when each is tried, whose answer counts, and what becomes of the others'."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
from listeners import SEEN, listen
from trio.testing import MockClock

from pyccl._io.dialing import HEAD_START_S, NotTakenError, connect, first_of
from pyccl._proto.epoch import Address, AddressKind, Member
from pyccl.errors import RemoteProtocolError

ADDRESSES = tuple(Address(f"192.0.2.{n}", 1) for n in range(4))


def run(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main, clock=MockClock(autojump_threshold=0))


Failure = tuple[type[BaseException], str]


class Attempts:
    """One for each address: so long, and then an error, or the address. shielded: which can't be interrupted."""

    def __init__(self, *plan: tuple[float, BaseException | Failure | None], shielded: tuple[int, ...] = ()) -> None:
        self._plan, self._shielded = plan, shielded
        self.began: list[float] = []
        self.discarded: list[Address] = []

    async def __call__(self, at: Address) -> Address:
        number = ADDRESSES.index(at)
        self.began.append(trio.current_time())
        with trio.CancelScope(shield=number in self._shielded):
            await trio.sleep(self._plan[number][0])
        error = self._plan[number][1]
        if isinstance(error, tuple):
            raise error[0](*filter(None, error[1:]))
        if error is not None:
            raise error
        return at

    async def first(self) -> Address:
        since, count = trio.current_time(), len(self._plan)
        try:
            return await first_of(ADDRESSES[:count], self, self.discarded.append)
        finally:
            self.began = [at - since for at in self.began]
            self.took = trio.current_time() - since


def test_the_next_address_is_tried_a_little_later_or_when_the_one_before_has_failed() -> None:
    async def main() -> None:
        attempts = Attempts((9.0, None), (0.01, OSError("no route")), (9.0, OSError("late")), (1.0, None))
        assert await attempts.first() == ADDRESSES[3]
        begun = [0, HEAD_START_S, HEAD_START_S + 0.01, 2 * HEAD_START_S + 0.01]
        assert attempts.began == pytest.approx(begun)
        assert attempts.took == pytest.approx(begun[3] + 1.0) and not attempts.discarded

    run(main)


def test_who_answers_within_the_head_start_is_the_only_one_asked() -> None:
    async def main() -> None:
        attempts = Attempts((HEAD_START_S / 2, None), (0.0, None))
        assert await attempts.first() == ADDRESSES[0]
        assert len(attempts.began) == 1

    run(main)


def test_what_comes_too_late_is_discarded() -> None:
    async def main() -> None:
        attempts = Attempts((2.0, None), (1.0, None), (1.5, RemoteProtocolError("x")), shielded=(0, 2))
        assert await attempts.first() == ADDRESSES[1]
        assert attempts.discarded == [ADDRESSES[0]]

    run(main)


def test_what_was_found_is_discarded_when_an_attempt_breaks() -> None:
    """No failure of a connection, but a fault of ours."""

    async def main() -> None:
        attempts = Attempts((2.0, KeyError("fault")), (1.0, None), shielded=(0,))
        with pytest.raises(ExceptionGroup) as caught:
            await attempts.first()
        assert isinstance(caught.value.exceptions[0], KeyError) and attempts.discarded == [ADDRESSES[1]]

    run(main)


REFUSED = ConnectionRefusedError, "refused by the host"  # made anew where it is raised: others count what is left


@pytest.mark.parametrize(
    ("errors", "refused", "said"),
    [
        ((), False, "names no address"),
        ((REFUSED,), True, "refused"),
        ((REFUSED, REFUSED), True, "refused"),
        (((OSError, "no route"), REFUSED), False, "no route"),
        ((REFUSED, (trio.TooSlowError, "")), False, "192.0.2.1:1: TooSlowError"),
        ((REFUSED, (NotTakenError, "it is somebody else")), False, "somebody else"),
        (((RemoteProtocolError, "no PeerWelcome"), REFUSED), False, "no PeerWelcome"),
        (((trio.BrokenResourceError, "reset"), REFUSED), False, "reset"),
        (((UnicodeError, "label too long"), REFUSED), False, "no name of a host"),
    ],
)
def test_only_if_all_are_refused_nobody_listens_there(errors: tuple[Failure, ...], refused: bool, said: str) -> None:
    async def main() -> None:
        with pytest.raises(OSError, match=said) as caught:
            await Attempts(*((0.0, error) for error in errors)).first()
        assert isinstance(caught.value, ConnectionRefusedError) == refused

    run(main)


def test_a_host_with_several_addresses_is_refused_if_all_of_them_refuse() -> None:
    async def main() -> None:
        for others, refused in (([ConnectionRefusedError()], True), ([TimeoutError("no answer")], False)):
            error = OSError("host: no address of it takes a connection")
            error.__cause__ = ExceptionGroup("host", [ConnectionRefusedError(), *others])
            with pytest.raises(OSError, match="host") as caught:
                await Attempts((0.0, error)).first()
            assert isinstance(caught.value, ConnectionRefusedError) == refused

    run(main)


@pytest.mark.parametrize("host", ["localhost", "127.1", "0x7f000001", "2130706433", "127.0.0.1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize(("seen", "taken"), [("203.0.113.9", False), (SEEN, True)])
def test_a_name_is_dialed_only_at_addresses_that_may_be(host: str, seen: str, taken: bool) -> None:
    """Its owner may have it mean whatever it likes: loopback is dialed where the master sees both there."""

    async def main() -> None:
        listener, address = await listen("127.0.0.1")
        theirs = Member(b"t" * 16, b"t" * 16, (Address(host, address.port, AddressKind.ADVERTISED),), seen)
        mine = Member(b"m" * 16, b"m" * 16, seen=SEEN)
        async with listener:
            if taken:
                await (await connect(theirs, mine)).aclose()
                return
            with pytest.raises(OSError, match="may be dialed") as caught:
                await connect(theirs, mine)
            assert not isinstance(caught.value, ConnectionRefusedError)
            with pytest.raises(BlockingIOError):
                listener.socket._sock.accept()

    trio.run(main)


def test_who_gives_up_waiting_leaves_no_attempt_behind() -> None:
    async def main() -> None:
        attempts = Attempts((9.0, None), (9.0, None))
        with trio.move_on_after(1.0) as scope:
            await attempts.first()
        assert scope.cancelled_caught and len(attempts.began) == 2 and not attempts.discarded

    run(main)
