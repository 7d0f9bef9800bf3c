"""Options of the simulator: ``pytest tests/sim --seed N`` replays one run with its whole trace."""

from __future__ import annotations

import pytest

SEEDS_IN_CI = 100


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pyccl simulator")
    group.addoption(
        "--seed", type=int, default=None, help="run only this seed of the simulated cluster, trace it whole"
    )
    group.addoption("--sim-seeds", type=int, default=SEEDS_IN_CI, help="how many seeds to run (default: %(default)s)")
    group.addoption("--sim-first", type=int, default=0, help="the first of them (default: %(default)s)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" not in metafunc.fixturenames or "seeded" not in metafunc.definition.keywords:
        return
    config = metafunc.config
    one = config.getoption("seed", default=None)
    first, count = config.getoption("sim_first", default=0), config.getoption("sim_seeds", default=SEEDS_IN_CI)
    seeds = range(first, first + count) if one is None else (one,)
    metafunc.parametrize("seed", seeds, ids=lambda seed: f"seed{seed}")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "seeded: runs once for each seed of --seed or --sim-seeds")


@pytest.fixture
def trace_max(request: pytest.FixtureRequest) -> int | None:
    """How much of the trace a failure prints; None: all of it, when one seed is replayed."""
    return 150 if request.config.getoption("seed", default=None) is None else None
