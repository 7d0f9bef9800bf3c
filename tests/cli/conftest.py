"""What several tests of commands share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that holds this installation's key and state, and no invite from outside."""
    monkeypatch.setenv("PYCCL_IDENTITY", str(tmp_path / "ours.pem"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("PYCCL_INVITE", raising=False)
    return tmp_path
