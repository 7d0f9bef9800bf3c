"""``python -m stress.churn``: the same as ``pyccl stress``, from a clone."""

from __future__ import annotations

import sys
from pathlib import Path

# -m puts the clone first, whose sources have no compiled core: an installed pyccl goes before them.
_CLONE = Path(__file__).resolve().parent.parent
sys.path.sort(key=lambda entry: Path(entry or ".").resolve() == _CLONE)

from pyccl.cli.stress import stress  # noqa: E402

if __name__ == "__main__":
    stress()
