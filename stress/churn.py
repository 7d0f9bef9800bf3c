"""``python -m stress.churn``: the same as ``pyccl stress``, from a clone."""

from __future__ import annotations

from pyccl.cli.stress import stress

if __name__ == "__main__":
    stress()
