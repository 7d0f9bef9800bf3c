"""A lab of long lines in network namespaces: scenarios in TOML, a line emulator of our own (native/netlab), hosts that
commands run on. For benchmarks and tests; nothing of the library imports it. Linux, as root, with iproute2.

``scenario`` is pure: what there is, and which way packets go. ``lab`` builds it, ``emulator`` owns the C process.
"""

from __future__ import annotations

from pyccl.netlab.emulator import Counts
from pyccl.netlab.lab import Lab
from pyccl.netlab.scenario import Scenario, ScenarioError, load, names, parse
from pyccl.processes.namespace import NetworkError

__all__ = ["Counts", "Lab", "NetworkError", "Scenario", "ScenarioError", "load", "names", "parse"]
