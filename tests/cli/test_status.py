"""What `pyccl status` says of a journal: what would become of the run without this master."""

from __future__ import annotations

from pyccl._proto.master import MasterMachine
from pyccl.cli.status import describe


def told(*, journaled: bool, needs_majority: bool = False, error: str = "") -> str:
    master = MasterMachine(b"r" * 16, 1, 5.0, journaled=journaled, needs_majority=needs_majority)
    if error:
        master.not_persisted(error, 0.0)
    return "\n".join(describe(master.status()))


def test_status_tells_who_may_continue_a_run_without_a_journal() -> None:
    for needs_majority in (False, True):  # port 0, --no-journal
        text = told(journaled=False, needs_majority=needs_majority)
        assert "only with --no-journal or --adopt-run" in text and "only while members live" in text
        assert ("more than half" in text) == needs_majority


def test_status_says_nothing_of_a_journal_that_works() -> None:
    assert "journal" not in told(journaled=True) and "half" not in told(journaled=True)
    assert "can't be written, 0 decisions wait: disk full" in told(journaled=True, error="disk full")
