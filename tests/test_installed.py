"""What the tests test: in tools/test the installed package, not the source tree beside them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import pyccl

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif("PYTHONSAFEPATH" not in os.environ, reason="run by tools/test only")
def test_imported_package_is_the_installed_one() -> None:
    assert not Path(pyccl.__file__).is_relative_to(ROOT / "pyccl")


def test_version_is_the_one_in_pyproject() -> None:
    assert f'version = "{pyccl.__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
