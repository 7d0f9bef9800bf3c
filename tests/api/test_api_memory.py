"""What the members' memory grows by stays below the formula in ARCHITECTURE.md, "Memory"."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest
from cluster import Cluster

from pyccl._native._pyccl import lib

MIB: Final = 1 << 20
ENGINE: Final = (Path(__file__).parents[2] / "native" / "src" / "engine.h").read_text(encoding="utf-8")
LINK: Final = (Path(__file__).parents[2] / "native" / "src" / "link.h").read_text(encoding="utf-8")
ARCHITECTURE: Final = (Path(__file__).parents[2] / "ARCHITECTURE.md").read_text(encoding="utf-8")
HUGE_BYTES: Final = 2 * MIB
PIECE_BYTES: Final = 288 << 10  # on the wire: 256 KiB; with the codec's scales a little more
ROUNDS: Final = 150
ARRAYS: Final = {"w": {"seed": 1, "index": 0, "count": 1000, "dtype": "float32"}}
OVERHEAD_BYTES: Final = 4 * MIB  # of the interpreter and of malloc, which gives nothing back at once


def define(header: str, name: str) -> int:
    found = re.search(rf"^#define {name} (\d+)", header, re.MULTILINE)
    assert found is not None, name
    return int(found[1])


def bound(world: int, ops: int, size_bytes: int, *, in_place: bool, codec: bool) -> int:
    """As in ARCHITECTURE.md."""
    old = -(-size_bytes // HUGE_BYTES) * HUGE_BYTES if in_place else 0
    codes = size_bytes / 4 * (1 + 1 / world) * 9 / 8 + world * PIECE_BYTES if codec else 0
    waiting = size_bytes + world * PIECE_BYTES
    tables = 1024 + 512 * world + 16 * world * (size_bytes // PIECE_BYTES + world)
    kept = define(ENGINE, "SCRATCH_KEPT") * old if codec else 0  # of one size no more than are in flight
    kept += define(ENGINE, "PIECES_KEPT") * PIECE_BYTES
    connection = 2 * define(LINK, "LINK_STAGE_BYTES") + 1024 + 2 * PIECE_BYTES
    peers = (world - 1) * (lib.PYCCL_EAGER_MAX + connection)
    return int(ops * (old + codes + waiting + tables) + kept + peers + OVERHEAD_BYTES)


@pytest.mark.parametrize("quantize", [None, "uint8"])
@pytest.mark.parametrize("in_place", [True, False], ids=["in_place", "out"])
@pytest.mark.parametrize(("world", "ops", "mib"), [(2, 1, 24), (2, 6, 3), (3, 1, 24), (4, 5, 4)])
def test_the_most_memory_of_operations_is_within_the_formula(
    cluster: Cluster, world: int, ops: int, mib: int, in_place: bool, quantize: str | None
) -> None:
    peers = cluster.members(world)
    wanted = {"elements": mib * MIB // 4, "ops": ops, "in_place": in_place, "quantize": quantize}
    most = [call.value() for call in [peer.call("footprint", **wanted) for peer in peers]]
    limit = bound(world, ops, mib * MIB, in_place=in_place, codec=quantize is not None)
    print(f"most {max(most) / MIB:.1f} MiB, at most {limit / MIB:.1f}")
    assert max(most) <= limit
    if in_place:
        assert min(most) >= mib * MIB, "the old bytes are kept: what was measured is not what was meant"


def test_rounds_leave_nothing_behind(cluster: Cluster) -> None:
    """Neither objects nor free lists that are filled and never emptied, as by tuples made of generators."""
    a, b = cluster.members(2)
    for peer in (a, b):
        peer.ask("state", arrays=ARRAYS)
    calls = [peer.call("blocks_gained", rounds=ROUNDS) for peer in (a, b)]
    gained = [call.value() for call in calls]
    print(f"blocks gained in {ROUNDS} rounds: {gained}")
    assert max(gained) < 5 * ROUNDS


def test_the_numbers_of_the_formula_are_those_of_the_code() -> None:
    """ARCHITECTURE.md names them."""
    _, _, memory = ARCHITECTURE.partition("\n## Memory\n")
    memory, _, _ = memory.partition("\n## ")
    for text in (
        f"{lib.PYCCL_EAGER_MAX // MIB} MiB of pieces that came early",
        f"{define(ENGINE, 'SCRATCH_KEPT')} largest",
        f"{define(ENGINE, 'PIECES_KEPT')} pieces",
        f"{lib.PYCCL_EARLY_MAX:,} records",
        f"{lib.PYCCL_OPS_OPEN_MAX:,} operations",
    ):
        assert text in memory, text
