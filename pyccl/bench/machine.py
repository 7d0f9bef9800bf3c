"""Where a figure was taken: machine, versions, load. Read once, before anything is measured."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self

CPUINFO: Final = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Machine:
    """What a reader needs to judge a figure. load_1m: runnable processes, one minute's mean, before the benchmark."""

    cpu: str
    cores: int
    kernel: str
    congestion_control: str
    load_1m: float

    @classmethod
    def read(cls) -> Self:
        return cls(
            cpu=cpu_model(CPUINFO.read_text(encoding="utf-8", errors="replace")) or platform.machine(),
            cores=len(os.sched_getaffinity(0)),
            kernel=f"{platform.system()} {platform.release()}",
            congestion_control=_first_line(Path("/proc/sys/net/ipv4/tcp_congestion_control")),
            load_1m=os.getloadavg()[0],
        )

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.cpu}, {self.cores} cores, {self.kernel}, TCP {self.congestion_control}, "
            f"load {self.load_1m:.2f} before the start"
        )


def cpu_model(cpuinfo: str) -> str | None:
    """The CPU's name in the text of /proc/cpuinfo, None where it has none (as on some ARM kernels)."""
    for line in cpuinfo.splitlines():
        key, separator, value = line.partition(":")
        if separator and key.strip() in ("model name", "Processor", "cpu model"):
            return value.strip()
    return None


def versions(*packages: str) -> dict[str, str | None]:
    """Versions of pyccl, Python, NumPy and more packages; None: not installed. Imports nothing."""
    found: dict[str, str | None] = {
        "pyccl": importlib.metadata.version("pyccl-p2p"),
        "python": platform.python_version(),
    }
    for package in ("numpy", *packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def command() -> str:
    """The command line of this process, to be run again."""
    return shlex.join(["pyccl", *sys.argv[1:]])


def _first_line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").split("\n", 1)[0]
    except OSError:
        return "unknown"
