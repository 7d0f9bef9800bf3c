"""Places for strangers, and how many lines a flood of them is worth."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from pyccl._io.strangers import Notes, Places


def run(main: object) -> None:
    trio.run(main, clock=MockClock(autojump_threshold=0))  # type: ignore[arg-type]


def test_who_has_waited_longest_gives_its_place_to_who_comes() -> None:
    async def main() -> None:
        places, ended = Places(3, 60.0), []

        async def stranger(n: int) -> None:
            with places.place():
                await trio.sleep_forever()
            ended.append((n, trio.current_time() - started))

        started = trio.current_time()
        async with trio.open_nursery() as nursery:
            for n in range(5):
                nursery.start_soon(stranger, n)
                await trio.sleep(1)
            assert ended == [(0, 3.0), (1, 4.0)]
        assert ended[2:] == [(2, 62.0), (3, 63.0), (4, 64.0)]  # their time was up

    run(main)


MOST, SECONDS = 256, 10.0  # as a master's
ROUND_TRIPS_S = 0.3  # of a handshake: so long who is honest needs its place


async def let_in(rate: int, flood: Callable[[int], str], newcomers: Sequence[str]) -> int:
    """How many newcomers keep their place for as long as they need it, one every 0.1 s, in a flood of so many
    connections a second. flood: where the nth comes from."""
    places, came = Places(MOST, SECONDS), 0

    async def silent(at: str) -> None:
        with places.place(at):
            await trio.sleep_forever()

    async def honest(at: str) -> None:
        nonlocal came
        with places.place(at):
            await trio.sleep(ROUND_TRIPS_S)
            came += 1

    async with trio.open_nursery() as nursery:
        for n in range(rate):  # it is there before them
            nursery.start_soon(silent, flood(n))
            await trio.sleep(1 / rate)
        for i, at in enumerate(newcomers):
            nursery.start_soon(honest, at)
            for n in range(rate // 10):
                nursery.start_soon(silent, flood(rate + i * rate // 10 + n))
                await trio.sleep(1 / rate)
        await trio.sleep(ROUND_TRIPS_S)
        nursery.cancel_scope.cancel()
    return came


@pytest.mark.parametrize("rate", [500, 1500, 3000])
def test_a_flood_from_one_host_takes_places_from_itself_alone(rate: int) -> None:
    async def main() -> None:
        assert await let_in(rate, lambda n: "flood", [f"host {n}" for n in range(12)]) == 12
        assert await let_in(rate, lambda n: "flood", ["router"] * 12) == 12

    run(main)


def test_a_flood_from_everywhere_is_as_if_origins_were_not_known() -> None:
    async def main() -> None:
        assert await let_in(500, lambda n: f"flood {n}", [f"host {n}" for n in range(12)]) == 12
        assert await let_in(500, str, ["router"] * 12) == 12

    run(main)


@pytest.mark.parametrize("flood", [0, 1, MOST])
def test_many_newcomers_behind_one_router_take_no_places_from_each_other_before_all_are_taken(flood: int) -> None:
    async def main() -> None:
        places, there, let_go = Places(MOST, SECONDS), 0, trio.Event()

        async def stay(at: str) -> None:
            nonlocal there
            with places.place(at):
                await let_go.wait()
                there += at == "router"

        async with trio.open_nursery() as nursery:
            for _ in range(flood):
                nursery.start_soon(stay, "flood")
            await wait_all_tasks_blocked()
            for _ in range(MOST // 2 if flood == MOST else MOST - flood):
                nursery.start_soon(stay, "router")
            await wait_all_tasks_blocked()
            let_go.set()
        assert there == (MOST // 2 if flood == MOST else MOST - flood)

    run(main)


def test_who_has_left_its_place_is_not_sent_away() -> None:
    async def main() -> None:
        places = Places(2, 60.0)
        for _ in range(5):
            with places.place():
                pass
        with pytest.raises(ValueError, match="its own"), places.place():
            raise ValueError("its own")
        async with trio.open_nursery() as nursery:
            waited = trio.Event()

            async def stranger() -> None:
                with places.place():
                    await waited.wait()
                    return
                pytest.fail("it was sent away")

            nursery.start_soon(stranger)
            nursery.start_soon(stranger)
            await wait_all_tasks_blocked()
            waited.set()

    run(main)


def test_a_flood_is_worth_a_few_lines_and_a_number(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        notes = Notes(logging.getLogger("pyccl.test"))
        for _ in range(10_000):
            notes.tell("stranger_refused", "noise")
        await trio.sleep(2.0)
        for _ in range(10_000):
            notes.tell("stranger_refused", "noise")

    run(main)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "stranger_refused cause=noise"
    assert lines[-2:] == ["stranger_refused cause=noise left_out=9980", "stranger_refused cause=noise"]
    assert len(lines) == 22
