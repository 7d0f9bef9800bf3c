"""Tests that need torch are in files named test_*_torch.py: collected where it is. tools/test runs both ways."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["*_torch.py"]
