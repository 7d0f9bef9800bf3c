"""Two members of one run in this process, for arrays of every kind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from masters import started_master
from pair import Pair


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with started_master("--peer-timeout", "30") as address, Pair(address) as pair:
        yield pair
