"""What the states of ``pyccl bench sync --data`` are made of."""

from __future__ import annotations

import numpy as np
import pytest

from pyccl._io.packer import pack
from pyccl.bench.content import KINDS, content

MIB = 1 << 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 13, 5 * MIB + 3])
def test_it_is_as_long_as_wanted_and_another_for_each_seed(kind: str, size: int) -> None:
    first = content(kind, 1, size)
    assert first.dtype == np.uint8 and first.shape == (size,)
    assert np.array_equal(first, content(kind, 1, size))
    if size > MIB:
        assert not np.array_equal(first[-MIB:], content(kind, 1000, size)[-MIB:])


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [("random", 0.98, 1.01), ("weights", 0.9, 0.96), ("rounded", 0.4, 0.6), ("text", 0.2, 0.6), ("constant", 0, 0.01)],
)
def test_it_packs_as_is_said(kind: str, least: float, most: float) -> None:
    assert least <= len(pack(content(kind, 1, MIB))) / MIB <= most
