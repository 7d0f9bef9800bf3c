"""What holds for all tests.

Those that need torch are in files named test_*_torch.py: collected where it is. tools/test runs both ways.

Under pytest-xdist (``-n 2 --dist loadgroup``, as tools/test does) there are two lanes. The tests of groups on loopback
run one after the other in the one, those of commands, emulated lines and faults in the other; each waits more than it
computes, and passes on a machine with that much load. What only computes fills up whichever lane is shorter.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["*_torch.py"]

_HERE = Path(__file__).parent
_GROUPS = [_HERE / "api", _HERE / "arrays"]
_COMPUTES = [
    *(_HERE / name for name in ("native", "proto", "sim")),
    *(_HERE / "demo" / f"test_demo_{name}.py" for name in ("corpus", "model", "progress")),
    _HERE / "stress" / "test_stress_oracle.py",
    *(_HERE / f"test_{name}.py" for name in ("layering", "statefile", "usage_errors")),
]


def pytest_itemcollected(item: pytest.Item) -> None:
    def is_in(paths: list[Path]) -> bool:
        return any(item.path.is_relative_to(path) for path in paths)

    if item.config.pluginmanager.hasplugin("xdist") and not is_in(_COMPUTES):
        item.add_marker(pytest.mark.xdist_group("groups" if is_in(_GROUPS) else "lines"))
