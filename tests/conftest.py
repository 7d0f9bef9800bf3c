"""What holds for all tests.

Those that need torch are in files named test_*_torch.py: collected where it is. tools/test runs both ways.

Under pytest-xdist (``-n 4``, as in tools/test) there are four lanes. The tests of groups on loopback run one after the
other in the first, those of the optimizers in the second, those of routers and attackers in the third, those of
commands, benchmarks and faults in the fourth; each waits more than it computes, and passes on a machine with that much
load. What only computes fills up whichever lane is shorter.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import signal
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

try:
    from xdist.scheduler import LoadScopeScheduling
except ImportError:  # then everything runs in one process
    LoadScopeScheduling = object

# A busy machine fails no test; print_blob replays the example that does.
settings.register_profile("pyccl", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pyccl")

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["*_torch.py"]

_GROUPS = ("tests/api/", "tests/arrays/")
_OPTIMIZERS = ("tests/optim/",)
_NETWORKS = ("tests/nat/", "tests/netlab/", "tests/secure/")
_COMPUTES = (
    *(f"tests/{name}/" for name in ("native", "proto", "sim")),
    *(f"tests/demo/test_demo_{name}.py" for name in ("corpus", "model", "progress")),
    *(f"tests/optim/test_{name}.py" for name in ("fragments", "gossip", "rules", "schedule")),
    "tests/stress/test_stress_oracle.py",
    *(f"tests/test_{name}.py" for name in ("layering", "statefile", "usage_errors")),
)


class Lanes(LoadScopeScheduling):  # type: ignore[misc]
    """By path and not by the marks of ``--dist loadgroup``, which get lost under pytest 9.2."""

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(_COMPUTES):
            return nodeid
        if nodeid.startswith(_GROUPS):
            return "groups"
        if nodeid.startswith(_NETWORKS):
            return "networks"
        return "optimizers" if nodeid.startswith(_OPTIMIZERS) else "commands"


def pytest_configure() -> None:
    # A shell ignores SIGINT for a command in the background: tests of Ctrl-C would wait for ever.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return Lanes(config, log)


@pytest.fixture
def seed() -> int:
    """Of a randomized test, whose failure shows it; PYCCL_TEST_SEED replays it."""
    given = os.environ.get("PYCCL_TEST_SEED")
    number = int(given) if given else secrets.randbits(31)
    print(f"seed: PYCCL_TEST_SEED={number}")
    return number
