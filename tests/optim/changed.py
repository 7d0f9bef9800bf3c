"""Parameters that are not what they were when ``Params`` took them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import pyccl
from pyccl.optim.params import Params, Vectors


def refused_after(change: Callable[[], object], params: Params, match: str) -> Vectors:
    """Every call that looks at them is a UsageError, and nothing was read. Returns where it would have been."""
    theta, out = params.vectors(), params.vectors()
    change()
    for call in (
        params.check,
        lambda: params.read(out),
        lambda: params.write(theta),
        lambda: params.pseudo_gradient(theta, out),
    ):
        with pytest.raises(pyccl.UsageError, match=match):
            call()
    assert not out.vectors[0].any()
    return out
