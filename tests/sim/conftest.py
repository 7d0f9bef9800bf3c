"""Options of the simulator's tests. To replay one run: tools/sim --seed N."""

from __future__ import annotations

import pytest

SEEDS_IN_CI = 40


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pyccl simulator")
    group.addoption("--sim-seeds", type=int, default=SEEDS_IN_CI, help="how many seeds to run (default: %(default)s)")
    group.addoption("--sim-first", type=int, default=0, help="the first of them (default: %(default)s)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" not in metafunc.fixturenames or "seeded" not in metafunc.definition.keywords:
        return
    config = metafunc.config
    first, count = config.getoption("sim_first", default=0), config.getoption("sim_seeds", default=SEEDS_IN_CI)
    metafunc.parametrize("seed", range(first, first + count), ids=lambda seed: f"seed{seed}")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "seeded: runs once for each seed of --sim-seeds")
