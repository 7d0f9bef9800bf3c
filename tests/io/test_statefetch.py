"""Which holder is asked for which piece: the window, deaths, refusals, and requests that are taken over."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pyccl import errors
from pyccl._io import statefetch
from pyccl._io.statefetch import WINDOW, Fetcher, Piece
from pyccl._native import status
from pyccl._native.handles import FETCH_BYTES_MAX
from pyccl._proto.packing import Packing

SEED = 20310504
STUCK: Callable[[int], int | None] = lambda offset: None  # noqa: E731
FOREVER = float("inf")
SIZE = 16


def peer(number: int) -> bytes:
    return bytes([number]) * 16


class FakeSession:
    """Holders that answer at once, or never. `answers`: peer -> offset -> status; None: no answer."""

    def __init__(self, answers: dict[bytes, Callable[[int], int | None]]) -> None:
        self.answers = answers
        self.error: Exception | None = None
        self.view = SimpleNamespace(members=tuple(answers))
        self.asked: list[tuple[bytes, int]] = []
        self.open: dict[int, tuple[bytes, Callable[[], None]]] = {}
        self.most_open = 0
        self.most_of_one = 0
        self._last = 0

    def check_sync(self) -> None:
        if self.error is not None:
            raise self.error

    def slot_of(self, peer: bytes) -> int | None:
        return list(self.answers).index(peer) if peer in self.view.members else None

    def fetch(
        self, slot: int, sync: int, offset: int, dst: Any, then: Callable[[int, int], None], *, packed: bool
    ) -> int:
        self._last += 1
        who = list(self.answers)[slot]
        assert sync == 100 + who[0]
        self.asked.append((who, offset))

        def deliver() -> None:
            dst[:] = offset % 251
            then(status.OK, 0)

        self.open[self._last] = who, deliver
        self.most_open = max(self.most_open, len(self.open))
        self.most_of_one = max(self.most_of_one, [of for of, _ in self.open.values()].count(who))
        code = self.answers[who](offset)
        if code is not None:
            del self.open[self._last]
            if code == status.OK:
                deliver()
            else:
                then(status.OK if code == LIE else code, 0)
        return self._last

    def revive(self, who: bytes) -> None:
        """It answers what it was asked, and from now on at once."""
        self.answers[who] = ok
        for number, (of, deliver) in list(self.open.items()):
            if of == who:
                del self.open[number]
                deliver()

    def cancel_fetch(self, number: int) -> bool:
        return self.open.pop(number, None) is not None


LIE = 77  # of FakeSession: the answer comes and its bytes are wrong


def ok(offset: int) -> int:
    return status.OK


def lie(offset: int) -> int:
    return LIE


def gone(offset: int) -> int:
    return status.ARGUMENT


class Taken:
    """Counts each piece once and judges its bytes."""

    def __init__(self) -> None:
        self.offsets: list[int] = []

    def __call__(self, piece: Piece, data: Any, then: Callable[[], None]) -> bool:
        right = data.size == piece.size_bytes and bool(np.all(data == piece.offset % 251))
        if right:
            self.offsets.append(piece.offset)
            then()
        return right


def pieces(count: int) -> list[Piece]:
    return [Piece(number * SIZE + 1, SIZE) for number in range(count)]


def fetcher(session: FakeSession, deadline: float = FOREVER) -> Fetcher:
    syncs = {who: 100 + who[0] for who in session.answers}
    return Fetcher(session, session.answers, syncs, deadline, Packing(len(syncs)))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert FETCH_BYTES_MAX == 1 << 20  # WINDOW is counted in these
    monkeypatch.setattr(statefetch, "FETCH_BYTES_MAX", SIZE)
    monkeypatch.setattr(statefetch, "_POLL_S", 0.001)
    monkeypatch.setattr(statefetch, "_REST_S", 0.001)
    monkeypatch.setattr(statefetch, "_PATIENCE_S", 0.001)


def test_every_piece_is_taken_once_and_all_holders_give() -> None:
    session, taken = FakeSession({peer(n): ok for n in (1, 2, 3)}), Taken()
    fetch = fetcher(session)
    assert fetch.run(pieces(100), taken)
    assert sorted(taken.offsets) == [piece.offset for piece in pieces(100)] and len(session.asked) == 100
    assert set(fetch.fetched) == set(session.answers) and sum(fetch.fetched.values()) == 100 * SIZE
    assert min(fetch.fetched.values()) >= 20 * SIZE


@pytest.mark.parametrize("holders", [1, 4, 5, 33, 200])
def test_the_window_bounds_what_is_open(holders: int) -> None:
    """All but the last are stuck, and everything comes from that one."""
    session = FakeSession({peer(n): STUCK for n in range(1, holders)} | {peer(holders): ok})
    fetch, taken = fetcher(session), Taken()
    assert fetch.run(pieces(300), taken)
    assert sorted(taken.offsets) == [piece.offset for piece in pieces(300)]
    assert session.most_open <= WINDOW and session.most_of_one <= 16
    assert fetch.fetched == {peer(holders): 300 * SIZE}


def test_a_stuck_holder_loses_half_of_its_requests_at_a_time_and_the_last_after_a_while() -> None:
    session, taken = FakeSession({peer(1): STUCK, peer(2): ok}), Taken()
    assert fetcher(session).run(pieces(8), taken)
    assert sorted(taken.offsets) == [piece.offset for piece in pieces(8)]
    moved = [offset for who, offset in session.asked if who == peer(1)]
    again = [offset for who, offset in session.asked if who == peer(2) and offset in moved]
    assert len(moved) == 4 and set(again[:2]) == set(moved[2:]) and again[-1] == moved[0]


def test_two_that_answer_late_do_not_snatch_a_piece_from_each_other_for_ever() -> None:
    """A request lives twice as long each time both were robbed."""
    lives: list[float] = []
    session, taken = FakeSession({peer(1): STUCK, peer(2): STUCK}), Taken()
    fetch, cancel, asked_s = fetcher(session), session.cancel_fetch, [time.monotonic()]

    def cancelled(number: int) -> bool:
        lives.append(time.monotonic() - asked_s[0])
        asked_s[0] = time.monotonic()
        if len(lives) == 7:
            session.answers = {peer(1): ok, peer(2): ok}
        return cancel(number)

    session.cancel_fetch = cancelled  # type: ignore[method-assign]
    assert fetch.run(pieces(1), taken)
    assert [who for who, _ in session.asked] == [peer(1), peer(2)] * 4
    for life, robbed in zip(lives, (0, 1, 1, 2, 2, 3, 3), strict=True):
        assert life >= 0.001 * 2**robbed


def test_who_was_robbed_is_asked_for_one_piece_at_a_time_until_it_delivers() -> None:
    """It comes to life when the other has gone."""
    answers = 0

    def leaves(offset: int) -> int:
        nonlocal answers
        answers += 1
        if answers == 12:
            session.revive(peer(1))
        return status.OK if answers < 12 else status.ARGUMENT

    session, taken = FakeSession({peer(1): STUCK, peer(2): leaves}), Taken()
    fetch = fetcher(session)
    assert fetch.run(pieces(14), taken)
    assert sorted(taken.offsets) == [piece.offset for piece in pieces(14)]
    assert fetch.fetched == {peer(1): 3 * SIZE, peer(2): 11 * SIZE}


def test_a_liar_is_named_and_asked_nothing_more() -> None:
    session, taken = FakeSession({peer(1): lie, peer(2): ok}), Taken()
    fetch = fetcher(session)
    assert fetch.run(pieces(50), taken)
    assert fetch.liars == [peer(1)] and fetch.fetched == {peer(2): 50 * SIZE}
    assert sum(who == peer(1) for who, _ in session.asked) <= 16
    assert sorted(taken.offsets) == [piece.offset for piece in pieces(50)]


@pytest.mark.parametrize("answer", [lie, gone])
def test_no_holder_left_is_told(answer: Callable[[int], int]) -> None:
    session = FakeSession({peer(1): answer, peer(2): answer})
    fetch = fetcher(session)
    assert not fetch.run(pieces(50), Taken())
    assert fetch.holders == () and len(fetch.liars) == (2 if answer is lie else 0)


def test_a_buffer_is_used_again_only_when_its_bytes_are_needed_no_more() -> None:
    """A slow disk holds some back while the next pieces come."""
    held: list[tuple[Piece, Any, Callable[[], None]]] = []
    seen: set[int] = set()

    def take(piece: Piece, data: Any, then: Callable[[], None]) -> bool:
        held.append((piece, data, then))
        seen.add(data.ctypes.data)
        if len(held) == 5:
            for of, kept, free in held:
                assert np.all(kept == of.offset % 251)
                free()
            held.clear()
        return True

    assert fetcher(FakeSession({peer(1): ok, peer(2): ok})).run(pieces(100), take)
    assert held == [] and len(seen) <= WINDOW + 5


def test_a_link_that_breaks_is_tried_again_while_its_peer_is_a_member() -> None:
    rng = random.Random(SEED)
    flaky: Callable[[int], int] = lambda offset: status.PEER_LOST if rng.random() < 0.5 else status.OK  # noqa: E731
    session, taken = FakeSession({peer(1): flaky, peer(2): flaky}), Taken()
    assert fetcher(session).run(pieces(60), taken), SEED
    assert sorted(taken.offsets) == [piece.offset for piece in pieces(60)], SEED


def test_a_holder_that_is_no_member_any_more_is_given_up() -> None:
    session = FakeSession({peer(1): ok})

    def lost(offset: int) -> int:
        session.view.members = ()
        return int(status.PEER_LOST)

    session.answers[peer(1)] = lost
    fetch = fetcher(session)
    assert not fetch.run(pieces(3), Taken()) and fetch.holders == ()


def test_the_deadline_and_the_end_of_the_session_are_raised() -> None:
    with pytest.raises(errors.DeadlineError):
        fetcher(FakeSession({peer(1): STUCK}), deadline=0.0).run(pieces(3), Taken())
    session = FakeSession({peer(1): STUCK})
    session.error = errors.EvictedError("gone")
    with pytest.raises(errors.EvictedError):
        fetcher(session).run(pieces(3), Taken())


def test_one_source_at_a_time_and_the_next_when_it_is_silent() -> None:
    session, taken = FakeSession({peer(1): STUCK, peer(2): ok}), Taken()
    fetch = fetcher(session)
    assert not fetch.run_from_one(pieces(3), taken, patience_s=0.01)
    assert session.open == {} and fetch.holders == (peer(2), peer(1))  # the silent one is the last now
    assert fetch.run_from_one(pieces(3), taken, patience_s=0.01)
    assert len(taken.offsets) == 3 and {who for who, _ in session.asked[3:]} == {peer(2)}
    fetch.refuse(peer(2), "table")
    assert fetch.holders == (peer(1),) and fetch.liars == [peer(2)]


def test_nothing_to_fetch_needs_nobody() -> None:
    session = FakeSession({peer(1): STUCK})
    assert fetcher(session).run([], Taken())
    assert fetcher(session).run_from_one([], Taken(), patience_s=1.0)
    assert session.asked == []
