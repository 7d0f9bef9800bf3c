"""Schedule: who is sent and applied after which step, with and without failures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyccl.errors import UsageError
from pyccl.optim.schedule import Schedule


def walk(schedule: Schedule, steps: int, fails: frozenset[int] = frozenset()) -> tuple[list[tuple[int, int]], ...]:
    """(step, fragment) of all sends and of all that are applied; `fails`: the slots that are not committed."""
    sent, applied, committed = [], [], 0
    for step in range(1, steps + 1):
        slot, position = divmod(step - 1, schedule.slot)
        if position == 0:
            is_sent = False
        if schedule.is_due(position + 1) and not is_sent:
            is_sent = True
            sent.append((step, schedule.fragment(committed)))
        if schedule.ends(position + 1) and slot not in fails:
            applied.append((step, schedule.fragment(committed)))
            committed += 1
    return sent, applied


def test_two_fragments_one_step_late() -> None:
    sent, applied = walk(Schedule(8, 2, 1), 16)
    assert sent == [(3, 0), (7, 1), (11, 0), (15, 1)]
    assert applied == [(4, 0), (8, 1), (12, 0), (16, 1)]


def test_fragment_that_failed_has_the_next_slot_too() -> None:
    _, applied = walk(Schedule(6, 3), 14, fails=frozenset({1, 2}))
    assert applied == [(2, 0), (8, 1), (10, 2), (12, 0), (14, 1)]


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_each_fragment_comes_once_in_sync_every_steps(slot: int, count: int, data: st.DataObject) -> None:
    delay = data.draw(st.integers(0, slot - 1))
    schedule = Schedule(slot * count, count, delay)
    assert schedule.slot == slot
    sent, applied = walk(schedule, 3 * slot * count)
    assert [(step + delay, fragment) for step, fragment in sent] == applied
    for fragment in range(count):
        steps = [step for step, which in applied if which == fragment]
        assert steps == [slot * (fragment + 1) + k * slot * count for k in range(3)]


@pytest.mark.parametrize(
    ("sync_every", "fragments", "delay", "told"),
    [
        (10, 3, 0, "no multiple of the 3 fragments"),
        (2, 4, 0, "no multiple of the 4 fragments"),
        (8, 2, 4, r"a whole number of 0\.\.3"),
        (8, 2, -1, r"a whole number of 0\.\.3"),
        (8, 2, True, r"a whole number of 0\.\.3"),
        (8, 2, 1.0, r"a whole number of 0\.\.3"),
        (0, 1, 0, "sync_every=0"),
        (2.5, 1, 0, "sync_every=2.5"),
    ],
)
def test_impossible_slots_are_refused(sync_every: int, fragments: int, delay: int, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Schedule(sync_every, fragments, delay)
