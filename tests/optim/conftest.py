"""One master for all tests of this directory; every test has a peer group of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from masters import started_master
from replicas import Replicas


@pytest.fixture(scope="session")
def master() -> Iterator[str]:
    with started_master("--peer-timeout", "30") as address:
        yield address


@pytest.fixture
def replicas(master: str) -> Iterator[Replicas]:
    replicas = Replicas(master)
    yield replicas
    replicas.close()
