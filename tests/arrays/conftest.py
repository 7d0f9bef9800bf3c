"""Two members of one run in this process, for arrays of every kind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pair import Pair, started_master


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with started_master() as address, Pair(address) as pair:
        yield pair
