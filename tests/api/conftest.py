"""Fixtures of the multi-process tests. Replay a failure with PYCCL_TEST_SEED=<the seed it printed>."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from cluster import Cluster
from zygote import Zygote


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.fixture
def make_cluster(zygote: Zygote, seed: int) -> Iterator[Callable[..., Cluster]]:
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(Cluster(zygote, seed, **options))


@pytest.fixture
def cluster(make_cluster: Callable[..., Cluster]) -> Any:
    return make_cluster()
