"""One master for all tests of this directory; every test has a peer group of its own."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest
from replicas import Replicas, started_master


@pytest.fixture(scope="session")
def master() -> Iterator[str]:
    with started_master() as address:
        yield address


@pytest.fixture
def replicas(master: str) -> Iterator[Replicas]:
    replicas = Replicas(master)
    yield replicas
    replicas.close()


@pytest.fixture
def seed() -> int:
    given = os.environ.get("PYCCL_TEST_SEED")
    number = int(given) if given else secrets.randbits(31)
    print(f"seed: PYCCL_TEST_SEED={number}")  # shown if the test failed
    return number
