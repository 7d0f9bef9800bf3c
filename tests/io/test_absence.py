"""What is logged of a master that is not reached."""

from __future__ import annotations

import logging

import pytest

from pyccl._io.absence import Absence

ADDRESS = "10.0.0.1:48148"


def test_each_cause_is_told_once_until_the_master_is_back(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    absence = Absence(logging.getLogger("test"), ADDRESS)
    for _ in range(3):
        absence.note("Connection refused")
        absence.note("no answer")
    absence.over()
    absence.over()
    absence.note("Connection refused")
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    refused = ("WARNING", f"master_away address={ADDRESS} cause='Connection refused' next=try_again")
    assert told == [
        refused,
        ("WARNING", f"master_away address={ADDRESS} cause='no answer' next=try_again"),
        ("INFO", f"master_back address={ADDRESS}"),
        refused,
    ]


def test_text_from_outside_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    absence = Absence(logging.getLogger("test"), ADDRESS)
    for number in range(1000):
        absence.note(f"it broke the protocol: {number}")
    assert len(caplog.records) < 10
