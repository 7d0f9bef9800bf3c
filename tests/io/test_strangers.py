"""Places for strangers, and how many lines a flood of them is worth."""

from __future__ import annotations

import logging

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
