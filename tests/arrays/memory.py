"""python memory.py numpy|torch MIB: growth of the resident memory while two members here all-reduce such arrays."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from masters import started_master
from pair import Pair


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    kind, mib = sys.argv[1], int(sys.argv[2])
    torch: Any = importlib.import_module("torch")  # for both, so that it counts for neither
    with started_master("--peer-timeout", "30") as address, Pair(address) as pair:
        pair.all_reduce(np.ones(1000), np.ones(1000))
        arrays = [np.full(mib << 18, rank + 1, np.float32) for rank in range(2)]
        given = arrays if kind == "numpy" else [torch.from_numpy(x) for x in arrays]
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is resident now
        before = status("VmRSS")
        pair.all_reduce(*given)
        grown = status("VmHWM") - before
        assert all(x[0] == x[-1] == 3 for x in arrays)
    print(json.dumps({"grown_bytes": grown}))


if __name__ == "__main__":
    main()
